"""Many real nodes on one machine: each a process of its own, with its own Bitcoin, database, ports and identity.

Theory of operation. A node is what ``p2pool run`` starts; nothing of it is in this process. We choose its ports and
make its identity before it starts, so that all know one another's addresses; we read what it says of itself in its
``status.json``, its log, and, while it runs or after, a copy of its database. Miners are one more process, at the
lowest priority: nodes and miners share the machine's cores, and a node that waits for a core would measure the miners.

No process outlives this one: each child asks the system to be ended with its parent (Linux), has a session of its own,
so that Ctrl-C on the terminal reaches us alone, and is ended by ``Cluster.stop`` in any case.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import trio

from p2pool.database import open_copy, read_status
from p2pool.errors import P2PoolError
from p2pool.p2p.identity import load_identity
from p2pool.report import export_rows, load_chain
from sharechain.params import NETWORKS, Params

__all__ = ["Cluster", "MinerProcess", "MinerReport", "NodeProcess", "Usage", "earlier_nodes", "propagation_ms"]

HOST: Final = "127.0.0.1"
#: Below the ports that Linux gives to outgoing connections (32768 and above), which might take one before a node does.
PORTS: Final = range(20_000, 32_000)
#: For all nodes to start and connect: so much, and so much for each. A start is some 2 s of a core's time.
START_PATIENCE_S: Final = (60.0, 10.0)
#: For a node to stop in order: libp2p may take 2 s, the embedded Bitcoin a moment.
STOP_PATIENCE_S: Final = 15.0
#: Between two looks at a process or a status.
POLL_S: Final = 0.05
#: All nodes agree if nothing has moved for so long. Nodes write their status each second.
STABLE_S: Final = 1.5
#: Other nodes that a node is told of: 32 nodes are one network with some 8 peers each, not one of 496 links.
MAX_LINKS: Final = 4
#: Of miners; a node has 0.
NICENESS: Final = 19
#: Between two reports of a process of miners.
REPORT_INTERVAL_S: Final = 0.25
#: How much of a log an error shows.
TAIL_LINES: Final = 15

#: Ends a child with its parent: prctl(PR_SET_PDEATHSIG, SIGTERM). The parent may be gone by then.
_CHILD: Final = """
import ctypes, os, sys
parent = int(sys.argv.pop(1))
getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(1, 15)
if os.getppid() != parent:
    sys.exit(1)
"""
#: What a node runs, as Python; its arguments are ``run --config FILE``.
_NODE: Final = "from p2pool.cli import main; main()"
_RUN_MINERS: Final = _CHILD + "from p2pool.cluster import run_miners; run_miners(sys.argv[1])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process has taken of the machine."""

    #: User and system, since its start.
    cpu_s: float
    rss_bytes: int


class _Child:
    """A process of ours.

    Mutable fields: ``_process`` (None before the first start), ``_wanted`` (whether it shall run: false from the
    moment that we end it), ``_usage`` (as last seen).
    """

    def __init__(self, name: str, log_file: Path) -> None:
        self.name: Final = name
        self.log_file: Final = log_file
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._usage = Usage(cpu_s=0.0, rss_bytes=0)

    @property
    def pid(self) -> int | None:
        """Process id, also of one that has ended; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def spawn(self, code: str, arguments: Sequence[str]) -> None:
        """Start the process; its output goes to the end of its log."""
        assert not self.is_running, f"{self.name} runs already"
        self._wanted = True
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(os.getpid()), *arguments],
                env={name: value for name, value in os.environ.items() if not name.startswith("P2POOL_")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; to stop and kill is expected of it then, anything else (SIGSTOP, SIGCONT) changes nothing."""
        if self.is_running:
            assert self._process is not None
            self.usage()
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
                self._wanted = False
            self._process.send_signal(number)
            if number == signal.SIGTERM:
                self._process.send_signal(signal.SIGCONT)  # one that was paused has to hear it

    async def stop(self, patience_s: float = STOP_PATIENCE_S) -> int | None:
        """Stop in order, or by force if that takes too long. Returns the exit code; None if it never ran."""
        try:
            if self._wanted:  # not yet told: a second signal would cut the first one's work short
                self.signal(signal.SIGTERM)
            with trio.move_on_after(patience_s):
                return await self.wait()
        finally:
            self.kill()
        return None if self._process is None else self._process.returncode

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    async def wait(self) -> int | None:
        """Wait for the end. Returns the exit code, negative for a signal; None if it never ran."""
        while self.is_running:  # noqa: ASYNC110  # the system tells of a child's end only whoever asks
            await trio.sleep(POLL_S)
        return None if self._process is None else self._process.returncode

    def check(self) -> None:
        """Raise P2PoolError, with the end of the log, if it has ended by itself."""
        if not self._wanted or self.is_running:
            return
        assert self._process is not None
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise P2PoolError(f"{self.name} has died ({how}); the end of its log:\n{self.log_tail()}")

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the log, indented."""
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (nothing)"

    def usage(self) -> Usage:
        """What it has taken so far, or until it was last looked at; zeros where there is no /proc."""
        if self.is_running:
            try:
                numbers = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
                pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                return self._usage
            ticks = int(numbers[11]) + int(numbers[12])  # fields 14 and 15: utime, stime
            if pages:  # a process that has ended and was not waited for has none
                self._usage = Usage(
                    cpu_s=ticks / os.sysconf("SC_CLK_TCK"), rss_bytes=pages * os.sysconf("SC_PAGE_SIZE")
                )
        return self._usage


class NodeProcess(_Child):
    """One node of a cluster. Mutable fields: those of every process of ours."""

    def __init__(
        self,
        *,
        number: int,
        directory: Path,
        params: Params,
        p2p_port: int,
        stratum_port: int,
        options: Mapping[str, object],
        program: str,
    ) -> None:
        """Make the directory and the identity; nothing runs yet. For the arguments see ``Cluster``."""
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(f"node {number}", directory / "node.log")
        #: From 1.
        self.number: Final = number
        self.directory: Final = directory
        self.params: Final = params
        self.stratum_port: Final = stratum_port
        from p2pool.p2p.hardening import identity_of  # loads libp2p: half a second

        #: Of the node, as others know it.
        self.peer_id: Final = identity_of(load_identity(directory / "identity.key"))
        #: Where other nodes call it.
        self.address: Final = f"/ip4/{HOST}/tcp/{p2p_port}/p2p/{self.peer_id}"
        self._program = _CHILD + program
        self._options: Final[dict[str, object]] = {
            "network": params.bitcoin_network,
            "data_dir": str(directory),
            "stratum_host": HOST,
            "stratum_port": stratum_port,
            "p2p_host": HOST,
            "p2p_port": p2p_port,
            "max_outbound": 0,  # beside the links: a node calls nobody else by its own choice
            "vardiff_interval": 1,
            **options,
        }

    def start(self, peers: Sequence[str]) -> None:
        """Start the node.

        Args:
            peers: addresses that it shall keep calling.
        """
        config = self.directory / "node.toml"
        config.write_text(_to_toml({**self._options, "peer": list(peers)}, self.params), encoding="utf-8")
        self.spawn(self._program, ["run", "--config", str(config)])

    def status(self) -> dict[str, Any] | None:
        """What the node said of itself last, in this run of it; None if it has said nothing yet."""
        status = read_status(self.directory)
        return status if status is not None and status.get("pid") == self.pid else None

    def rows(self) -> list[dict[str, Any]]:
        """All its shares, as ``p2pool export`` prints them; whether it runs or not."""
        with open_copy(self.directory) as (params, store):
            return list(export_rows(load_chain(params, store), store))


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerReport:
    """What one miner has done."""

    user: str
    hashes: int
    #: Hashes per second, of late.
    hash_rate: float
    accepted: int
    rejected: int


class MinerProcess(_Child):
    """Miners in one process, each with a thread. Mutable fields: those of every process of ours."""

    def __init__(self, directory: Path, targets: Sequence[tuple[NodeProcess, str]]) -> None:
        """
        Args:
            directory: for its files; must exist.
            targets: for each miner the node that it mines at, and its user name.
        """
        super().__init__("the miners", directory / "miners.log")
        self._file = directory / "miners.json"
        self._plan = [(node.stratum_port, user) for node, user in targets]

    def start(self) -> None:
        """Start mining."""
        self._file.with_suffix(".plan").write_text(json.dumps(self._plan))
        self._file.unlink(missing_ok=True)
        self.spawn(_RUN_MINERS, [str(self._file)])

    def reports(self) -> list[MinerReport]:
        """What each miner has done, in the order of the targets; nothing before the first."""
        try:
            return [MinerReport(**row) for row in json.loads(self._file.read_text())]
        except FileNotFoundError:
            return []


def run_miners(path: str) -> None:
    """What the process of miners does: mine by the plan beside ``path``, and report there. Ends with SIGTERM."""
    from p2pool.miner import Miner, mine
    from p2pool.service import until_signal

    file = Path(path)
    plan: list[tuple[int, str]] = [(port, user) for port, user in json.loads(file.with_suffix(".plan").read_text())]
    miners: dict[int, Miner] = {}

    def report() -> None:
        rows = []
        for number, (_, user) in enumerate(plan):
            row = {"user": user, "hashes": 0, "hash_rate": 0.0, "accepted": 0, "rejected": 0}
            if number in miners:
                done = miners[number].statistics()
                row |= {"hashes": done.hashes, "hash_rate": done.hash_rate, "accepted": done.accepted}
                row["rejected"] = sum(done.rejected.values())
            rows.append(row)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(rows))
        fresh.replace(file)

    async def work() -> None:
        async with trio.open_nursery() as nursery:

            async def start(number: int, port: int, user: str) -> None:
                miners[number] = await nursery.start(partial(mine, host=HOST, port=port, user=user))

            for number, (port, user) in enumerate(plan):
                nursery.start_soon(start, number, port, user)
            try:
                while True:
                    report()
                    await trio.sleep(REPORT_INTERVAL_S)
            finally:
                report()

    os.nice(NICENESS)  # before there are threads: they inherit it
    trio.run(until_signal, work)


def earlier_nodes(number: int) -> tuple[int, ...]:
    """Which nodes a node is told of: all that started before it, or, in a large cluster, some of them.

    Args:
        number: of the node, from 1.

    Returns:
        Numbers of other nodes. Node 1 is told of nobody; everybody can be reached from it.
    """
    if number - 1 <= MAX_LINKS:
        return tuple(range(1, number))
    step = (number - 1) / MAX_LINKS
    return tuple(sorted({number - 1 - int(link * step) for link in range(MAX_LINKS)}))


class Cluster:
    """Nodes of one private share network, to be used as an asynchronous context: the end stops all processes.

    Mutable fields: ``_miners`` (all processes of miners that were started). The nodes are what they are from the
    start; whether they run is theirs to know.
    """

    def __init__(
        self,
        directory: Path,
        params: Params,
        count: int,
        *,
        links: Callable[[int], Sequence[int]] = earlier_nodes,
        options: Mapping[str, object] | None = None,
        program: Callable[[int], str] = lambda _: _NODE,
    ) -> None:
        """Make directories, identities and a choice of ports; nothing runs yet.

        Args:
            directory: each node has its own in it: ``node1`` and so on.
            params: of the share network, on regtest.
            count: of nodes.
            links: the numbers (from 1) of the nodes that a node shall keep calling.
            options: of all nodes, as in the configuration file.
            program: by a node's number, the Python text that it runs; its arguments are ``run --config FILE``.
        """
        ports = _free_ports(2 * count)
        #: In the order of their numbers.
        self.nodes: Final = tuple(
            NodeProcess(
                number=number,
                directory=directory / f"node{number}",
                params=params,
                p2p_port=next(ports),
                stratum_port=next(ports),
                options=options or {},
                program=program(number),
            )
            for number in range(1, count + 1)
        )
        self.directory: Final = directory
        self._links = links
        self._miners: list[MinerProcess] = []

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self.stop()

    def start_node(self, node: NodeProcess) -> None:
        """Start a node, or start it again after its end."""
        node.start([self.nodes[number - 1].address for number in self._links(node.number)])

    async def start(self, patience_s: float | None = None) -> None:
        """Start all nodes and wait until each serves miners and is connected to those that it is told of.

        Args:
            patience_s: None for what a busy machine may need.

        Raises:
            P2PoolError: a node died, or it took too long.
        """
        for node in self.nodes:
            self.start_node(node)
        if patience_s is None:
            patience_s = START_PATIENCE_S[0] + START_PATIENCE_S[1] * len(self.nodes)
        await self.wait_until(lambda: all(map(self._is_linked, self.nodes)), patience_s, "the nodes to connect")

    def mine(self, targets: Sequence[tuple[NodeProcess, str]]) -> MinerProcess:
        """Start miners, all in one process; ``stop`` it when it has mined enough.

        Args:
            targets: for each miner the node that it mines at, and its user name.
        """
        directory = self.directory / f"miners{len(self._miners) + 1}"
        directory.mkdir(exist_ok=True)
        miners = MinerProcess(directory, targets)
        self._miners.append(miners)
        miners.start()
        return miners

    def check(self) -> None:
        """Raise P2PoolError, with the end of its log, if a process has ended by itself."""
        for child in (*self.nodes, *self._miners):
            child.check()

    async def wait_until(self, condition: Callable[[], bool], patience_s: float, what: str) -> None:
        """Wait until something is so, looking after all processes meanwhile.

        Raises:
            P2PoolError: a process died, or it took too long.
        """
        with trio.move_on_after(patience_s):
            while True:
                self.check()
                if condition():
                    return
                await trio.sleep(POLL_S)
        raise P2PoolError(f"waited {patience_s:g} s for {what}, in vain; the nodes say: {self._summary()}")

    async def wait_converged(self, patience_s: float = 60.0) -> tuple[str, ...]:
        """Wait until all running nodes have chains of one total work and one height of Bitcoin, and stay so.

        Shares may still wait somewhere: those of a branch that lost, whose parents nobody needs.

        Returns:
            The hashes of their tips, as displayed; empty if there is no share. More than one is a tie: shares of equal
            work, each the first that some node saw. The next share decides it.

        Raises:
            P2PoolError: a process died, or they do not come so far in time.
        """
        agreed: tuple[Any, float] | None = None
        tips: set[str] = set()

        def converged() -> bool:
            nonlocal agreed, tips
            statuses = [node.status() for node in self.nodes if node.is_running]
            views = {(s["total_work"], s["bitcoin_height"]) if s else None for s in statuses}
            moments: list[float] = [s["time"] for s in statuses if s]
            view = views.pop() if len(views) == 1 else None
            if view is None:
                agreed = None
                return False
            if agreed is None or agreed[0] != view:
                agreed = (view, max(moments))
            tips = {s["tip"] for s in statuses if s and s["tip"] is not None}
            return min(moments) >= agreed[1] + STABLE_S

        await self.wait_until(converged, patience_s, "one tip at all nodes")
        return tuple(sorted(tips))

    async def stop(self, patience_s: float = STOP_PATIENCE_S) -> None:
        """End all processes, in order where they do so in time."""
        children: list[_Child] = [*self._miners, *self.nodes]
        try:
            for child in children:
                child.signal(signal.SIGTERM)
            async with trio.open_nursery() as nursery:
                for child in children:
                    nursery.start_soon(child.stop, patience_s)
        finally:
            for child in children:
                child.kill()

    def _is_linked(self, node: NodeProcess) -> bool:
        status = node.status()
        if status is None or status["network"] is None or status["network"]["state"] != "synced":
            return False
        connected = {row["peer_id"] for row in status["network"]["peers"] if row["state"] == "connected"}
        wanted = {self.nodes[number - 1].peer_id for number in self._links(node.number)}
        return wanted.issubset(connected)

    def _summary(self) -> str:
        lines = []
        for node in self.nodes:
            status = node.status()
            if status is None:
                lines.append(f"{node.name}: nothing")
                continue
            network = status["network"] or {"state": "alone", "inbound": 0, "outbound": 0}
            lines.append(
                f"{node.name}: {network['state']}, {network['inbound'] + network['outbound']} peers, tip "
                f"{(status['tip'] or '-')[:16]} at height {status['height']}, {status['waiting']} waiting, "
                f"Bitcoin at {status['bitcoin_height']}"
            )
        return "; ".join(lines)


def propagation_ms(rows: Sequence[Sequence[Mapping[str, Any]]], *, since_ms: int = 0) -> list[int]:
    """How long shares took to the nodes that had them later than the first: sorted milliseconds.

    Args:
        rows: for each node its exported rows. All must have seen the shares on one clock.
        since_ms: Unix milliseconds: only shares that were first seen from then on, with all nodes up, say something.

    Returns:
        A number for each share and each node that has it, but for one node that had it first.
    """
    seen: dict[str, list[int]] = {}
    for one in rows:
        for row in one:
            seen.setdefault(row["hash"], []).append(row["first_seen_ms"])
    return sorted(
        moment - min(moments) for moments in seen.values() if min(moments) >= since_ms for moment in sorted(moments)[1:]
    )


def _free_ports(count: int) -> Iterator[int]:
    """Ports that nobody listens on, as far as one can tell before use."""
    ports: list[int] = []
    for port in random.Random(f"{os.getpid()} {time.monotonic_ns()}").sample(PORTS, len(PORTS)):
        if len(ports) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
        ports.append(port)
    if len(ports) < count:
        raise P2PoolError(f"{count} free ports are needed from {PORTS.start} to {PORTS.stop}, there are {len(ports)}")
    return iter(ports)


def _to_toml(options: Mapping[str, object], params: Params) -> str:
    """A configuration file of a private network."""
    base = NETWORKS[params.bitcoin_network]
    changed = {f.name: getattr(params, f.name) for f in fields(Params)}
    changed = {key: value for key, value in changed.items() if value != getattr(base, key)}
    if "max_target" in changed:  # beyond TOML's integers
        changed["max_target"] = f"{changed['max_target']:x}"
    lines = [f"{key} = {_toml_value(value)}" for key, value in options.items()]
    lines += ["", "[params]", *(f"{key} = {_toml_value(value)}" for key, value in changed.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    # JSON's texts, numbers, switches and lists of them are TOML's too.
    return json.dumps(list(value) if isinstance(value, tuple) else value)
