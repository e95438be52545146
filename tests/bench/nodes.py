"""Many real nodes as processes on loopback, each with its own Bitcoin, database and miners: run, kill, or cut in two.

    python -m tests.bench.nodes run --nodes 5 --minutes 10 --period 1000
    python -m tests.bench.nodes kill --nodes 5 --minutes 10 --every 10
    python -m tests.bench.nodes cut --nodes 5 --seconds 60

``run`` lets them mine and tells share, uncle and orphan rates, how long shares take from node to node, CPU and memory.
``kill`` kills a random node with SIGKILL again and again, and starts it again. ``cut`` cuts all connections between two
halves for a while, and measures the time from the mending to one tip. All three end with the question whether all nodes
agree, and ``p2pool verify`` on every database. The last line is a JSON object; exit code 0 only if all is well.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from p2pool.bitcoin_backend.address import encode_address
from p2pool.cluster import HOST, Cluster, NodeProcess, propagation_ms
from sharechain import hasher
from sharechain.params import NETWORKS, Params
from tests.builders import miner_script


def network(period_ms: int) -> Params:
    """A network whose first shares come at about the wanted rate on this machine."""
    header, hashes, started = bytes(80), 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.5:
        hashes += hasher.scan_nonces(header, hashes, 1 << 12, 0).hashes
    expected = max(4, int(hashes / seconds * period_ms / 1000))
    return NETWORKS["regtest"].with_overrides(
        {
            "name": f"bench-{period_ms}",
            "share_period_ms": period_ms,
            "half_life_s": max(20, 12 * period_ms // 1000),
            "stall_after_s": max(15, 60 * period_ms // 1000),
            "stall_doubling_s": max(5, 6 * period_ms // 1000),
            "max_target": min(2**255 - 1, 2**256 // expected),
            "window_max_shares": 8_640,
            "block_target_divisor": 20,
        }
    )


class Gate:
    """A wire between two nodes that can be cut: relays TCP to a port.

    Mutable fields: ``is_cut``, and the scopes of the connections.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._scopes: set[trio.CancelScope] = set()
        self.is_cut = False
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Relay until cancelled."""
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            self.port = listener.socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, self._relay, [listener])
            task_status.started()

    def cut(self) -> None:
        """End all connections, and let none through."""
        self.is_cut = True
        for scope in self._scopes:
            scope.cancel()

    def mend(self) -> None:
        """Let connections through again."""
        self.is_cut = False

    async def _relay(self, caller: trio.SocketStream) -> None:
        if self.is_cut:
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                called = await trio.open_tcp_stream(HOST, self._target)
                async with called, trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, caller, called)
                    await self._copy(called, caller)
                    nursery.cancel_scope.cancel()
            except* OSError:
                pass
            except* trio.BrokenResourceError:
                pass
            finally:
                self._scopes.discard(scope)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)


def targets(nodes: Sequence[NodeProcess], miners: int) -> list[tuple[NodeProcess, str]]:
    """Each node's miners, all with addresses of their own."""
    found = []
    for number in range(miners * len(nodes)):
        address = encode_address(miner_script(number), "regtest")
        assert address is not None
        found.append((nodes[number % len(nodes)], address))
    return found


def tip(node: NodeProcess) -> str | None:
    status = node.status()
    return None if status is None else status["tip"]


def verified(node: NodeProcess) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from p2pool.cli import main; main()"]
    return subprocess.run([*program, "verify", "--data-dir", str(node.directory)], capture_output=True, text=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def settle(cluster: Cluster) -> dict[str, Any]:
    """Wait for one view at all nodes, stop them, and look at what each has on its disk."""
    mended = time.monotonic()
    tips = await cluster.wait_converged(120)
    seconds = time.monotonic() - mended
    await cluster.stop()
    rows = [await trio.to_thread.run_sync(node.rows) for node in cluster.nodes]
    status = [row["status"] for row in rows[0]]
    delays = propagation_ms(rows)
    cuts = statistics.quantiles(delays, n=100) if len(delays) > 1 else [0.0] * 99
    verify = [await trio.to_thread.run_sync(verified, node) for node in cluster.nodes]
    for done in verify:
        if done.returncode:
            say(done.stderr)
    total = len(status)
    return {
        "tips": len(tips),
        "converged_s": round(seconds, 1),
        "shares": total,
        "uncle_rate": round(status.count("uncle") / max(1, total), 4),
        "orphan_rate": round(status.count("stale") / max(1, total), 4),
        "blocks": sum(bool(row["is_block"]) for row in rows[0]),
        "propagation_p50_ms": round(cuts[49], 1),
        "propagation_p99_ms": round(cuts[98], 1),
        "main_chains": len({tuple(row["hash"] for row in one if row["status"] == "main") for one in rows}),
        "verify_failures": sum(bool(done.returncode) for done in verify),
    }


async def run(cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let them mine."""
    await cluster.start()
    miners = cluster.mine(targets(cluster.nodes, arguments.miners))
    before = [node.usage() for node in cluster.nodes]
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < arguments.minutes * 60:
        await trio.sleep(min(10.0, arguments.minutes * 60 - seconds + 0.1))
        cluster.check()
        heights = [(node.status() or {}).get("height") for node in cluster.nodes]
        say(f"{time.monotonic() - started:5.0f} s  heights {heights}")
    usage = [node.usage() for node in cluster.nodes]
    hash_rate = sum(report.hash_rate for report in miners.reports())
    await miners.stop()
    return {
        "hash_rate": round(hash_rate),
        "cpu_percent_per_node": [
            round(100 * (now.cpu_s - then.cpu_s) / seconds, 1) for now, then in zip(usage, before, strict=True)
        ],
        "rss_mb_per_node": [round(now.rss_bytes / 1e6) for now in usage],
        **await settle(cluster),
    }


async def kill(cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill one node after another, and start each again."""
    dice = random.Random(arguments.seed)
    await cluster.start()
    miners = cluster.mine(targets(cluster.nodes, arguments.miners))
    kills, started = 0, time.monotonic()
    while time.monotonic() - started < arguments.minutes * 60:
        await trio.sleep(dice.uniform(0.5, 1.5) * arguments.every / 2)
        node = dice.choice(cluster.nodes)
        node.signal(signal.SIGKILL)
        await node.wait()
        kills += 1
        await trio.sleep(dice.uniform(0.0, arguments.every / 2))
        cluster.start_node(node)
        say(f"{time.monotonic() - started:5.0f} s  kill {kills}: {node.name}, heights " + str(
            [(one.status() or {}).get("height") for one in cluster.nodes]
        ))  # fmt: skip
    await cluster.wait_until(lambda: all(node.status() for node in cluster.nodes), 60, "the nodes to be up")
    await miners.stop()
    return {"kills": kills, **await settle(cluster)}


async def cut(cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cut the nodes in two for a while. The halves know each other only through gates."""
    nodes, half = cluster.nodes, len(cluster.nodes) // 2
    gates: list[Gate] = []
    async with trio.open_nursery() as nursery:
        for number, node in enumerate(nodes):
            peers = [other.address for other in nodes[:number] if (nodes.index(other) < half) == (number < half)]
            for other in nodes[:half] if number >= half else ():
                ports = other.address.split("/")
                gate = Gate(int(ports[4]))
                await nursery.start(gate.run)
                gates.append(gate)
                peers.append("/".join([*ports[:4], str(gate.port), *ports[5:]]))
            node.start(peers)
        await cluster.wait_until(lambda: all(node.status() for node in nodes), 60, "the nodes to be up")
        miners = cluster.mine(targets(nodes, arguments.miners))
        await trio.sleep(arguments.seconds / 2)
        for gate in gates:
            gate.cut()
        say("cut")
        await trio.sleep(arguments.seconds)
        sides = [{tip(node) for node in side} for side in (nodes[:half], nodes[half:])]
        heights = [(node.status() or {}).get("height") for node in nodes]
        say(f"heights {heights}; mended")
        apart = not sides[0] & sides[1]
        works = [
            max((node.status() or {}).get("total_work", 0) for node in side) for side in (nodes[:half], nodes[half:])
        ]
        for gate in gates:
            gate.mend()
        mended = time.monotonic()
        fork = {node.number: (node.status() or {}).get("height", 0) for node in nodes}
        await cluster.wait_until(lambda: len({tip(node) for node in nodes}) == 1, 120, "one tip while mining goes on")
        healed_s = time.monotonic() - mended
        await trio.sleep(5)
        await miners.stop()
        result = {"were_apart": apart, "works": works, "heights": fork, "one_tip_after_s": round(healed_s, 1)}
        result |= await settle(cluster)
        nursery.cancel_scope.cancel()
    return result


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "kill", "cut"])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--miners", type=int, default=2, help="per node, a thread each")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--period", type=int, default=1_000, help="share period in milliseconds")
    parser.add_argument("--every", type=float, default=10.0, help="kill: seconds between two kills")
    parser.add_argument("--seconds", type=float, default=60.0, help="cut: how long")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    jobs = {"run": run, "kill": kill, "cut": cut}

    async def work(directory: Path) -> dict[str, Any]:
        options = {"max_outbound": 0} if arguments.what == "cut" else {}
        async with Cluster(directory, network(arguments.period), arguments.nodes, options=options) as cluster:
            return await jobs[arguments.what](cluster, arguments)

    scratch = Path(tempfile.mkdtemp(prefix="p2pool-nodes-"))
    say(f"data and logs: {scratch}")
    result = trio.run(work, scratch)
    print(json.dumps({"what": arguments.what, "nodes": arguments.nodes, "period_ms": arguments.period, **result}))
    return 0 if result["tips"] <= 2 and result["verify_failures"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
