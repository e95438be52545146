"""A node with a real miner on a Bitcoin node over RPC, and everything that may happen to the latter, one by one.

    python -m tests.bench.outages
    BITCOIND=/path/to/bitcoind python -m tests.bench.outages --backend core
    python -m tests.bench.outages --backend btcd reorg-1 restart

Between the pool and the Bitcoin node is a wire that can be slow, cut, or deaf to one word. A thread of this machine
mines over TCP while a fault comes and goes. Told is what the miner saw: what was accepted and rejected, for how long it
worked on a block that was no longer Bitcoin's tip, for how long it had no work at all, what became of blocks, and how
much was logged. The rows are a Markdown table; with --json the last line is a JSON object; exit code 0 only if every
fault was overcome and all of the database is valid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.rpc import connect_bitcoin
from p2pool.bitcoin_backend.selection import coinbase_reserve
from p2pool.database import DataDirectory, open_copy
from p2pool.miner import Miner, MinerEvent, mine
from p2pool.node import Node
from p2pool.report import VerifyReport, verify_store
from p2pool.stratum.server import ServerSettings, open_listeners
from p2pool.stratum.vardiff import VardiffSettings
from sharechain import hasher
from sharechain.hasher import sha256d
from sharechain.params import NETWORKS, Params
from tests.p2pool.fakecore import FakeCore, open_fake_core
from tests.p2pool.network import address
from tests.p2pool.realnodes import FullNode, running_node
from tests.p2pool.regtest import (
    FUNDED,
    KEY,
    MATURITY,
    PREMINED,
    UNUSED,
    EmbeddedNode,
    after,
    build_block,
    extend_empty,
    premined_wallet,
    take_premined,
)
from tests.p2pool.spending import spend_p2tr, spend_p2wpkh, txid_of

T = TypeVar("T")

HOST: Final = "127.0.0.1"
#: Seconds of undisturbed mining before and after each fault.
CALM_S: Final = 5.0
#: Seconds for which a node is away, and by which one is slow.
AWAY_S: Final = 5.0
SLOW_S: Final = 30.0
#: Seconds after which a fault counts as not overcome.
PATIENCE_S: Final = 180.0
#: Seconds between two looks at the miner's job, and at the tip.
LOOK_S: Final = 0.01
#: Shares in a second, and shares to a block, about.
SHARE_PERIOD_MS: Final = 250
SHARES_PER_BLOCK: Final = 8
#: Transactions of a full block, 12 levels of merkle branch; and payments that make their coins, each a transaction.
FULL: Final = 2_100
FAN_OUT: Final = 210
#: Sat.
COIN: Final = 20_000
FEE: Final = 4_000

#: Spent by showing it: 1,350 bytes of nothing.
NOTHING: Final = (b"\x4d\x08\x02" + bytes(520) + b"\x75") * 2 + b"\x4d\x1e\x01" + bytes(286) + b"\x75\x51"
NOTHING_SCRIPT: Final = b"\x00\x20" + hashlib.sha256(NOTHING).digest()


def network() -> Params:
    """A network whose first shares come at about the wanted rate on this machine."""
    header, hashes, started = bytes(80), 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.5:
        hashes += hasher.scan_nonces(header, hashes, 1 << 12, 0).hashes
    expected = max(4, int(hashes / seconds * SHARE_PERIOD_MS / 1000))
    return NETWORKS["regtest"].with_overrides(
        {
            "name": "outages",
            "share_period_ms": SHARE_PERIOD_MS,
            "half_life_s": 60,
            "stall_after_s": 60,
            "stall_doubling_s": 20,
            "max_target": min(2**255 - 1, 2**256 // expected),
            "window_max_shares": 2_000,
            "block_target_divisor": SHARES_PER_BLOCK,
        }
    )


# The Bitcoin nodes.


class Bitcoin:
    """A Bitcoin node of whatever kind.

    Mutable fields: ``is_up``, and the node behind it.
    """

    def __init__(self, node: EmbeddedNode | FullNode, fake: FakeCore | None = None) -> None:
        """Starts and stops nothing by itself.

        Arguments:
            node: what tests mine on.
            fake: the server in front of an embedded node.
        """
        self.node = node
        self.is_up = True
        self._fake = fake
        self._lock = trio.Lock()

    @property
    def endpoint(self) -> Endpoint:
        """How the pool reaches it."""
        if self._fake is not None:
            return self._fake.endpoint
        assert isinstance(self.node, FullNode)
        return self.node.endpoint

    @property
    def port(self) -> int:
        """Of its RPC server."""
        return int(self.endpoint.url.rpartition(":")[2])

    async def do(self, act: Callable[[EmbeddedNode | FullNode], T]) -> T:
        """Do something with the node, past the pool."""
        if isinstance(self.node, EmbeddedNode):
            done = act(self.node)
            self.node.kernel._announce_tip()
            await trio.lowlevel.checkpoint()
            return done
        async with self._lock:
            return await trio.to_thread.run_sync(act, self.node)

    async def stop(self, *, kill: bool = False) -> None:
        """End it, in order or as a power cut does."""
        self.is_up = False
        if self._fake is not None:
            await self._fake.stop()
        else:
            assert isinstance(self.node, FullNode)
            node = self.node
            await self.do(lambda _: node.kill() if kill else node.stop())

    async def start(self) -> None:
        """Start it again."""
        if self._fake is not None:
            await self._fake.start()
        else:
            assert isinstance(self.node, FullNode)
            node = self.node
            await self.do(lambda _: node.start())
        self.is_up = True


@asynccontextmanager
async def bitcoins(kind: str, directory: Path, count: int) -> AsyncIterator[list[Bitcoin]]:
    """Nodes with the same chain, connected to one another."""
    async with AsyncExitStack() as stack:
        if kind == "fake":
            kernel = KernelBackend.open(directory / "kernel", check_scripts=False)
            stack.push_async_callback(kernel.aclose)
            node = EmbeddedNode(kernel)
            take_premined(node, FUNDED + MATURITY)
            cookies = [directory / f"cookie{number}" for number in range(count)]
            servers = [await stack.enter_async_context(open_fake_core(kernel, cookie_file=file)) for file in cookies]
            yield [Bitcoin(node, server) for server in servers]
            return
        full = []
        for number in range(count):
            # It would hang up, after 30 s, on whoever is slow because of the wire.
            options = ["-rpcservertimeout=600"] if kind == "core" else []
            full.append(stack.enter_context(running_node(kind, directory / f"{kind}{number}", *options)))
            await trio.to_thread.run_sync(take_premined, full[-1], PREMINED)
            if kind == "core":  # it writes what it has each hour, and when it ends
                await trio.to_thread.run_sync(full[-1].restart)
        for other in full[1:]:
            await trio.to_thread.run_sync(other.connect, full[0])
        yield [Bitcoin(one) for one in full]


class Wire:
    """TCP to a Bitcoin node.

    Mutable fields: ``delay_s`` (by which each question comes later), ``deaf_to`` (questions with this in them end their
    connection), ``port``.
    """

    def __init__(self, target: int) -> None:
        """Relays nothing before `run`."""
        self.delay_s = 0.0
        self.deaf_to: bytes | None = None
        self.port = 0
        self._target = target

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Relay until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host=HOST)
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._relay, [listener])

    async def _relay(self, caller: trio.SocketStream) -> None:
        try:
            called = await trio.open_tcp_stream(HOST, self._target)
            async with called, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, called, caller, nursery.cancel_scope)
                await self._ask(caller, called, nursery)
                nursery.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError):
            pass

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        async for data in source:
            await sink.send_all(data)
        scope.cancel()

    async def _ask(self, caller: trio.SocketStream, called: trio.SocketStream, nursery: trio.Nursery) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](1_000_000)

        async def deliver() -> None:
            async for at, data in receive:
                await trio.sleep_until(at)
                await called.send_all(data)

        nursery.start_soon(deliver)
        async for data in caller:
            if self.deaf_to is not None and self.deaf_to in data:
                return
            send.send_nowait((trio.current_time() + self.delay_s, bytes(data)))


# What is seen.


@dataclass
class Seen:
    """What a miner and an operator saw.

    Mutable fields: all. ``stale_s`` and ``idle_s``: seconds with work on another block than Bitcoin's tip, and without
    work; ``longest_stale_s`` of them in a row; ``reasons`` of rejections; ``lines`` of the log.
    """

    tip: bytes = b""
    stale_s: float = 0.0
    longest_stale_s: float = 0.0
    idle_s: float = 0.0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def heard(self, event: MinerEvent) -> None:
        """From the miner."""
        self.accepted = event.statistics.accepted
        if event.kind == "rejected":
            self.reasons[event.text] += 1

    async def follow(self, miner: Miner, nodes: Sequence[Bitcoin]) -> None:
        """Look at the miner's work and at Bitcoin's tip until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_tip, nodes)
            before, row_s = trio.current_time(), 0.0
            while True:
                await trio.sleep(LOOK_S)
                now = trio.current_time()
                job, past_s = miner._job, now - before
                if job is None:
                    self.idle_s += past_s
                elif job.previous_block_hash != self.tip:
                    self.stale_s += past_s
                    row_s += past_s
                    self.longest_stale_s = max(self.longest_stale_s, row_s)
                if job is None or job.previous_block_hash == self.tip:
                    row_s = 0.0
                before = now

    async def _follow_tip(self, nodes: Sequence[Bitcoin]) -> None:
        while True:
            for node in reversed(nodes):  # the last one is never away
                if node.is_up:
                    try:
                        self.tip = await node.do(lambda one: one.tip())
                    except OSError:  # it ends just now
                        continue
                    break
            await trio.sleep(LOOK_S)


class Log(logging.Handler):
    """Takes down what an operator reads."""

    def __init__(self, seen: Seen) -> None:
        """Attach it to a logger."""
        super().__init__(logging.INFO)
        self._seen = seen
        self._started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Take down a line."""
        seconds = time.monotonic() - self._started
        self._seen.lines.append(f"{seconds:6.2f} {record.levelname:7} {record.name}: {record.getMessage()}")


@contextmanager
def logging_to(seen: Seen) -> Iterator[None]:
    """Have the node's log taken down."""
    logger, handler = logging.getLogger("p2pool"), Log(seen)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# A pool.


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A node with its miner, and Bitcoin nodes, those that it uses at the end of a wire."""

    node: Node
    miner: Miner
    seen: Seen
    nodes: Sequence[Bitcoin]
    wires: Sequence[Wire]

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for something that must happen. Raises: TooSlowError."""
        try:
            with trio.fail_after(PATIENCE_S):
                while not reached():  # noqa: ASYNC110 - what moves is no task of ours
                    await trio.sleep(LOOK_S)
        except trio.TooSlowError:
            raise trio.TooSlowError(f"not in {PATIENCE_S:.0f} s: {what}") from None

    async def until_current(self) -> None:
        """Wait until the miner works on Bitcoin's tip."""
        job = self.miner
        await self.until(
            lambda: job._job is not None and job._job.previous_block_hash == self.seen.tip, "work on the tip"
        )

    async def until_block(self) -> None:
        """Wait until the node has found another block and knows what became of it."""
        count = len(self.node.statistics().blocks)
        await self.until(lambda: len(self.node.statistics().blocks) > count, "another block")

    async def end_of(self, tip: bytes) -> None:
        """Wait until Bitcoin's tip is another one and the miner works on it."""
        await self.until(lambda: self.seen.tip != tip, "another tip")
        await self.until_current()


@asynccontextmanager
async def pool(directory: Path, params: Params, nodes: Sequence[Bitcoin], used: int) -> AsyncIterator[Pool]:
    """Everything, running, on the first ones of some Bitcoin nodes."""
    seen = Seen()
    data = DataDirectory(directory, params)
    weight, sigops = coinbase_reserve(max(params.payout_classes))
    try:
        async with trio.open_nursery() as nursery:
            wires = [Wire(node.port) for node in nodes[:used]]
            for wire in wires:
                await nursery.start(wire.run)
            endpoints = [
                replace(node.endpoint, url=f"http://{HOST}:{wire.port}")
                for node, wire in zip(nodes, wires, strict=False)
            ]
            with logging_to(seen):
                async with connect_bitcoin(
                    endpoints, network="regtest", reserved_weight=weight, reserved_sigops=sigops
                ) as backend:
                    vardiff = VardiffSettings(start_difficulty=2.0**-26, target_interval_s=0.2, window_s=2.0)
                    node = Node(directory=data, params=params, backend=backend, stratum=ServerSettings(vardiff=vardiff))
                    async with trio.open_nursery() as inner:
                        await inner.start(node.run, open_listeners(HOST, 0))
                        host, port = node.server.addresses[0]
                        client = partial(mine, host=host, port=port, user=address(0), on_event=seen.heard)
                        miner: Miner = await inner.start(client)
                        await trio.sleep(1.0)  # the first job
                        inner.start_soon(seen.follow, miner, nodes[:used])
                        yield Pool(node=node, miner=miner, seen=seen, nodes=nodes, wires=wires)
                        inner.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    finally:
        data.close()


# The faults.


def replace_blocks(node: EmbeddedNode | FullNode, depth: int) -> None:
    """Have a stranger's branch replace the last blocks, whatever is found meanwhile."""
    template = node.template()
    tip, height = template.previous_block_hash, template.height - 1
    fork = tip
    for _ in range(depth):
        fork = node.block(fork)[4:36]
    raw = node.block(fork)
    height -= depth
    for _ in range(depth + 100):
        height += 1
        raw = build_block(after(raw, height), UNUSED)
        node.submit(raw)
        if node.tip() == sha256d(raw[:80]):
            return
    raise AssertionError("the pool is faster than the branch")


async def calm(_: Pool) -> None:
    """Nothing: templates without transactions."""
    await trio.sleep(AWAY_S)


async def reorg(used: Pool, depth: int) -> None:
    """The last blocks are replaced."""
    tip = used.seen.tip
    await used.nodes[0].do(partial(replace_blocks, depth=depth))
    await used.end_of(tip)


async def restart(used: Pool, *, kill: bool) -> None:
    """The Bitcoin node is away for a while; after a kill it gets what it lost from one that the pool does not use."""
    await used.nodes[0].stop(kill=kill)
    await trio.sleep(AWAY_S)
    await used.nodes[0].start()
    await reconnect(used)
    await used.until_block()
    await used.until_current()


async def reconnect(used: Pool) -> None:
    """Have a node that was started again find the other one, if there is one, as it would in time."""
    first, *others = (one.node for one in used.nodes)
    for other in others:
        if isinstance(first, FullNode) and isinstance(other, FullNode):
            place = f"{HOST}:{other.peer_port}"
            await used.nodes[0].do(partial(_add_peer, place=place))


def _add_peer(node: EmbeddedNode | FullNode, place: str) -> None:
    assert isinstance(node, FullNode)
    node.rpc("addnode", place, "onetry")


async def slow(used: Pool) -> None:
    """Each answer comes half a minute late, and a stranger finds a block."""
    used.wires[0].delay_s = SLOW_S
    await trio.sleep(AWAY_S)
    tip = used.seen.tip
    await used.nodes[0].do(extend_empty)
    await used.end_of(tip)
    used.wires[0].delay_s = 0.0


async def hanging(used: Pool) -> None:
    """No answer comes any more for 45 s, and a stranger finds a block."""
    used.wires[0].delay_s = 45.0
    tip = used.seen.tip
    await used.nodes[0].do(extend_empty)
    await trio.sleep(45.0)
    used.wires[0].delay_s = 0.0
    await used.end_of(tip)


async def full(used: Pool) -> None:
    """A stranger's empty block, then one of 3.0 MB."""
    tip = used.seen.tip
    await used.nodes[0].do(extend_empty)
    await used.end_of(tip)
    await used.until(
        lambda: any(block.transactions >= FULL // 2 for block in used.node.statistics().blocks), "a full block"
    )
    await used.until_current()


async def failover(used: Pool, *, kill: bool) -> None:
    """The first of two nodes is away for a while, and a stranger finds a block."""
    await used.nodes[0].stop(kill=kill)
    await trio.sleep(AWAY_S / 2)
    tip = used.seen.tip
    await used.nodes[1].do(extend_empty)
    await used.end_of(tip)
    await trio.sleep(AWAY_S / 2)
    await used.nodes[0].start()
    await reconnect(used)
    await used.until_block()
    await used.until_current()


async def unsubmitted(used: Pool) -> None:
    """`submitblock` finds nobody who listens for a while."""
    used.wires[0].deaf_to = b'"submitblock"'
    height = used.node.statistics().chain.height
    kept = used.node._directory
    await used.until(lambda: any(True for _ in kept.kept_blocks()), f"a block is kept after share {height}")
    await trio.sleep(AWAY_S)
    used.wires[0].deaf_to = None
    await used.until(lambda: not any(True for _ in kept.kept_blocks()), "all blocks are answered")
    await used.until_current()


def fill(node: EmbeddedNode | FullNode) -> None:
    """Put as many transactions into the mempool as a block takes."""
    wallet = premined_wallet()
    coins: list[tuple[bytes, int]] = []
    for spent, script in wallet.coins[: FULL // FAN_OUT]:
        outputs = [(COIN, NOTHING_SCRIPT)] * FAN_OUT
        change = spent[2] - COIN * FAN_OUT - 100_000
        sign = spend_p2wpkh if len(script) == 22 else spend_p2tr
        raw = sign(KEY, [spent], [*outputs, (change, UNUSED)])
        node.send(raw)
        coins += [(txid_of(raw), index) for index in range(FAN_OUT)]
    while node.mempool():  # Bitcoin Core's templates may be of 5 s ago
        node.submit(build_block(node.template(), UNUSED))
        time.sleep(0.2)
    for txid, index in coins:
        source = b"\x01" + txid + index.to_bytes(4, "little") + b"\x00" + b"\xff" * 4
        target = b"\x01" + (COIN - FEE).to_bytes(8, "little") + bytes([len(UNUSED)]) + UNUSED
        witness = b"\x01\xfd" + len(NOTHING).to_bytes(2, "little") + NOTHING
        node.send(b"\x02\0\0\0\x00\x01" + source + target + witness + bytes(4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens, how many Bitcoin nodes it takes, how many of them the pool uses, what comes before."""

    run: Callable[[Pool], Awaitable[None]]
    nodes: int = 1
    used: int = 1
    prepare: Callable[[EmbeddedNode | FullNode], object] | None = None
    kinds: tuple[str, ...] = ("fake", "btcd", "core")


FAULTS: Final[dict[str, Fault]] = {
    "calm": Fault(run=calm),
    "reorg-1": Fault(run=partial(reorg, depth=1)),
    "reorg-3": Fault(run=partial(reorg, depth=3)),
    # btcd throws its regtest chain away at each start.
    "restart": Fault(run=partial(restart, kill=False), kinds=("fake", "core")),
    "kill": Fault(run=partial(restart, kill=True), nodes=2, kinds=("core",)),
    "slow": Fault(run=slow),
    "hanging": Fault(run=hanging),
    "full": Fault(run=full, prepare=fill, kinds=("fake", "core")),
    "failover": Fault(run=partial(failover, kill=True), nodes=2, used=2, kinds=("fake", "core")),
    "unsubmitted": Fault(run=unsubmitted),
}


async def suffer(kind: str, name: str, scratch: Path, params: Params) -> dict[str, Any]:
    """Let a fault come and go; give what was seen of it."""
    fault, trouble = FAULTS[name], ""
    directory = scratch / name
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(bitcoins(kind, directory, fault.nodes))
        if fault.prepare is not None:
            await nodes[0].do(fault.prepare)
        used = await stack.enter_async_context(pool(directory / "pool", params, nodes, fault.used))
        await trio.sleep(CALM_S)
        started = trio.current_time()
        try:
            await fault.run(used)
        except trio.TooSlowError as error:
            trouble = str(error)
        seconds = trio.current_time() - started
        await trio.sleep(CALM_S)
        statistics, seen = used.node.statistics(), used.seen
        outcomes = Counter(block.reason or "accepted" for block in statistics.blocks)
        row = {
            "fault": name,
            "seconds": round(seconds, 1),
            "accepted": seen.accepted,
            "rejected": sum(seen.reasons.values()),
            "reasons": dict(seen.reasons.most_common(3)),
            "stale_s": round(seen.stale_s, 2),
            "longest_stale_s": round(seen.longest_stale_s, 2),
            "idle_s": round(seen.idle_s, 2),
            "shares": statistics.shares,
            "broken_rules": dict(statistics.invalid),
            "blocks": sum(outcomes.values()),
            "outcomes": dict(outcomes),
            "transactions": max((block.transactions for block in statistics.blocks), default=0),
            "log_lines": len(seen.lines),
            "trouble": trouble,
        }
    (scratch / f"{name}.log").write_text("\n".join(seen.lines) + "\n")
    with open_copy(directory / "pool") as (stored, store):
        *_, report = verify_store(stored, store)
    assert isinstance(report, VerifyReport)
    row["verified_shares"] = report.shares
    return row


def say(text: str) -> None:
    """To whoever watches."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| fault | lasted, s | submissions accepted / rejected | on another block than the tip, s (longest) | "
        "without work, s | shares | blocks: accepted / stale / other | lines of log |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        outcomes = row["outcomes"]
        accepted, stale = outcomes.get("accepted", 0), outcomes.get("inconclusive", 0)
        lines.append(
            f"| {row['fault']} | {row['seconds']} | {row['accepted']:,} / {row['rejected']} | {row['stale_s']} "
            f"({row['longest_stale_s']}) | {row['idle_s']} | {row['shares']} | "
            f"{accepted} / {stale} / {row['blocks'] - accepted - stale} | {row['log_lines']} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the faults that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--backend", choices=["fake", "btcd", "core"], default="fake")
    parser.add_argument("--json", action="store_true", help="end with a JSON object")
    parser.add_argument("--log", action="store_true", help="show what the node logged")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    scratch = Path(tempfile.mkdtemp(prefix="p2pool-outages-"))
    say(f"data and logs: {scratch}")
    params, rows = network(), []
    for name in arguments.faults or FAULTS:
        if arguments.backend not in FAULTS[name].kinds:
            say(f"{name}: not with {arguments.backend}")
            continue
        rows.append(trio.run(suffer, arguments.backend, name, scratch, params))
        say(f"{name}: {json.dumps(rows[-1])}")
        if arguments.log:
            say((scratch / f"{name}.log").read_text())
    print(table(rows))
    if arguments.json:
        print(json.dumps({"backend": arguments.backend, "rows": rows}))
    is_well = not any(row["trouble"] or row["verified_shares"] < row["shares"] for row in rows)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
