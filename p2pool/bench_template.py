"""The benchmark of a new Bitcoin block: how long until miners work on it, through a whole node and real sockets.

Theory of operation. Three processes besides the one that counts: an imaginary Bitcoin node, the node that is measured,
and the miners. In each round the Bitcoin node has a new tip. It notes when it says so, when it is asked for a template
and when it begins to answer; the miners note when the first byte of the job on that tip came and when all of it was
there; the node notes what it did in between. All clocks are one, the monotonic clock of the machine. The processes are
told what to do by lines of JSON.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from p2pool.bench import BLOCK_BITS, BLOCK_HASH, Row, make_row, mine_share, miner_scripts, window_params
from p2pool.bench_bitcoin import FIRST_HEIGHT, ImaginaryBitcoin, tip_hash
from p2pool.bitcoin_backend import rpc
from p2pool.bitcoin_backend.address import encode_address
from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.selection import coinbase_reserve
from p2pool.bitcoin_backend.template import BlockTemplate
from p2pool.database import DataDirectory
from p2pool.errors import ConfigError, P2PoolError
from p2pool.node import Node
from p2pool.report import load_chain
from p2pool.stratum.server import ServerSettings, open_listeners
from p2pool.stratum.values import Notify, Worker
from sharechain.chain import Accepted
from sharechain.params import Params, decode_params
from sharechain.validate import BlockFacts

__all__ = ["allow_files", "bench_template", "rounds_of"]

#: Shares in the chain of the node, each of another miner: what a coinbase pays.
SHARES: Final = 500
#: What the miners say that they are: so many window payouts fit 12, 12, 47 and 146.
AGENTS: Final = ("Antminer S19/1.0", "cgminer/4.12.1", "Antminer S21/1.0", "bitaxe/BM1370")
#: Files that a process opens besides its connections.
SPARE_FILES: Final = 100
#: Seconds after which a round has failed, and between two rounds.
PATIENCE_S: Final = 60.0
PAUSE_S: Final = 0.1

_Advance = Callable[[int], None]


def bench_template(
    quick: bool,
    *,
    rounds: int | None = None,
    connections: int | None = None,
    transactions: int | None = None,
    advance: _Advance = lambda done: None,
) -> Iterator[Row]:
    """From a new tip, and from the template's answer, to the job at the miners.

    Args:
        quick: a tenth of everything that is not given.
        rounds: of each case, 20 if None; the first after a start is not counted.
        connections: of miners, 1,000 if None.
        transactions: of a template, 4,000 if None.
        advance: told how many rounds are done, of ``rounds_of``.

    Raises:
        ConfigError: the system does not let a process have so many files.
        P2PoolError: one of the processes ended or does not answer.
    """
    rounds = rounds or (2 if quick else 20)
    connections = connections or (100 if quick else 1_000)
    transactions = transactions if transactions is not None else (400 if quick else 4_000)
    allow_files(connections + SPARE_FILES)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        advance(done)

    yield make_row(_machine(), "cores", os.cpu_count() or 1, "cores")
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pool-bench-")))
        params = window_params(SHARES)
        _fill(path / "data", params)
        bitcoin = stack.enter_context(_process("bitcoin", transactions))
        url = bitcoin.hear()["url"]
        fetched, size = _fetch(url, rounds)
        node = stack.enter_context(_process("node", url, str(path / "data"), params.encoded.hex()))
        address = node.hear()["address"]
        yield make_row(f"template of {transactions} transactions", "size", size / 1e6, "MB")
        reference = f"template of {transactions} transactions, reference: fetch and json.loads alone"
        yield from _spread(reference, "request to values", fetched)
        measured = _Measured(bitcoin, node, address, rounds, count)

        found = measured.run(1, own_addresses=False, full=True)
        case = f"template of {transactions} transactions, one miner"
        yield from _rows_of_one(case, found)
        whole = statistics.median([one["first"] - one["requested"] for one in found])
        yield make_row(case, "request to first byte, times the reference", whole / statistics.median(fetched), "")

        for own_addresses in (True, False):
            whose = "an address each" if own_addresses else "one address"
            for full in (True, False):
                what = f"{transactions} transactions" if full else "empty"
                case = f"new tip, {connections} connections, {whose}, {what}"
                found = measured.run(connections, own_addresses=own_addresses, full=full)
                yield from _rows_of_many(case, found)
        sizes = found[-1]["sizes"]
        bare = _bare_broadcast(rounds, sizes, count)
        case = f"{connections} connections, reference: a bare loop of send, {statistics.mean(sizes):.0f} bytes each"
        yield from _spread(case, "begin to last notify", bare)


def rounds_of(quick: bool, rounds: int | None) -> int:
    """How many rounds ``bench_template`` tells ``advance`` of."""
    return 6 * (rounds or (2 if quick else 20))


def allow_files(needed: int) -> None:
    """Let this process and those that it starts open so many files.

    Raises:
        ConfigError: the system does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if wanted < needed:
        raise ConfigError(
            f"{needed} open files are needed, the system allows {hard}: ask for fewer --connections, or raise the "
            f"limit (ulimit -Hn {needed}, or LimitNOFILE of systemd)"
        )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{needed} open files are needed, and the limit of {soft} cannot be raised: {error}"
        ) from None


# Rows.


def _rows_of_one(case: str, found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Where the time goes, for one miner."""
    spans = {
        "request to first byte": ("requested", "first"),
        "answer begins to first byte": ("answered", "first"),
        "part: Bitcoin node makes its answer": ("requested", "answered"),
        "part: HTTP and JSON": ("answered", "read_began"),
        "part: read_template": ("read_began", "read_ended"),
        "part: header and work": ("read_ended", "job_began"),
        "part: job and coinbase": ("job_began", "job_ended"),
        "part: send to first byte": ("job_ended", "first"),
    }
    for metric, (start, end) in spans.items():
        yield from _spread(case, metric, [one[end] - one[start] for one in found])


def _rows_of_many(case: str, found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """How long all the miners take to have the job."""
    delays = sorted(at - one["announced"] for one in found for at in one["all"])
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        delay = delays[min(len(delays) - 1, int(share * len(delays)))]
        yield make_row(case, f"tip to whole notify, {name} of connections", delay * 1e3, "ms")
    yield from _spread(case, "tip to last notify", [max(one["all"]) - one["announced"] for one in found])
    spans = {
        "part: tip to template asked for": ("announced", "requested"),
        "part: template asked for to first job": ("requested", "job_began"),
        "part: first job to last byte sent": ("job_began", "jobs_ended"),
        "part: last job to last notify": ("jobs_ended", "last"),
    }
    for metric, (start, end) in spans.items():
        yield from _spread(case, metric, [one[end] - one[start] for one in found])
    yield from _spread(case, "part: of that, making jobs", [one["jobs_s"] for one in found])
    yield make_row(case, "a notify, mean", statistics.mean([statistics.mean(one["sizes"]) for one in found]), "bytes")
    yield make_row(case, "rounds with empty work before", sum(one["bridged"] for one in found), "rounds")


def _spread(case: str, metric: str, seconds: Sequence[float]) -> Iterator[Row]:
    yield make_row(case, f"{metric}, median", statistics.median(seconds) * 1e3, "ms")
    yield make_row(case, f"{metric}, worst", max(seconds) * 1e3, "ms")


def _machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"machine: {model}, {platform.system()}, Python {platform.python_version()}, load {load}"


# The process that counts.


class _Process:
    """A helper process, with which lines of JSON are exchanged."""

    def __init__(self, kind: str, *arguments: object) -> None:
        self._kind = kind
        code = "import sys; from p2pool.bench_template import serve; serve(sys.argv[1:])"
        self.popen: Final = subprocess.Popen(
            [sys.executable, "-c", code, kind, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> Any:
        """Say something and wait for the answer."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(question) + "\n")
            self.popen.stdin.flush()
        except OSError:
            raise P2PoolError(f"the benchmark's process {self._kind!r} has ended") from None
        return self.hear()

    def hear(self) -> Any:
        """Wait for a line. Raises: P2PoolError, there is none."""
        assert self.popen.stdout is not None
        if not select.select([self.popen.stdout], [], [], PATIENCE_S)[0]:
            raise P2PoolError(f"the benchmark's process {self._kind!r} does not answer within {PATIENCE_S:.0f} s")
        line = self.popen.stdout.readline()
        if not line:
            raise P2PoolError(f"the benchmark's process {self._kind!r} has ended")
        return json.loads(line)


@contextmanager
def _process(kind: str, *arguments: object) -> Iterator[_Process]:
    process = _Process(kind, *arguments)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


class _Measured:
    """A Bitcoin node and a node, and what rounds on them gave. Mutable field: ``_tip``, the number of the tip."""

    def __init__(
        self, bitcoin: _Process, node: _Process, address: tuple[str, int], rounds: int, count: Callable[[], None]
    ) -> None:
        self._bitcoin = bitcoin
        self._node = node
        self._address = address
        self._rounds = rounds
        self._count = count
        self._tip = 0

    def run(self, connections: int, *, own_addresses: bool, full: bool) -> list[dict[str, Any]]:
        """Rounds with so many miners, who come for them and go after them."""
        found: list[dict[str, Any]] = []
        with _process("miners", *self._address, connections, int(own_addresses)) as miners:
            miners.hear()
            self._round(miners, full)  # whatever is done once is done here
            for _ in range(self._rounds):
                found.append(self._round(miners, full))
                self._count()
        return found

    def _round(self, miners: _Process, full: bool) -> dict[str, Any]:
        time.sleep(PAUSE_S)
        self._tip += 1
        tip = tip_hash(self._tip)
        miners.ask({"wanted": stratum_hash(tip), "full": full})
        self._bitcoin.ask({"tip": self._tip, "full": full})
        arrived = miners.hear()
        marks = self._bitcoin.ask(None) | self._node.ask({"tip": tip.hex(), "full": full})
        if "job_began" not in marks or "answered" not in marks:
            raise P2PoolError("the benchmark's node has given miners a job without noting how it made it")
        found: dict[str, Any] = {**marks, **arrived, "first": min(arrived["first"]), "last": max(arrived["all"])}
        return found


def _fill(path: Path, params: Params) -> None:
    """A data directory with a window full of shares, each of another miner."""
    directory = DataDirectory(path, params)
    try:
        chain = load_chain(params, directory.store)
        facts = {BLOCK_HASH: BlockFacts(height=FIRST_HEIGHT, next_bits=BLOCK_BITS)}
        chain.learn_block(BLOCK_HASH, facts[BLOCK_HASH], 0.0)
        for number, script in enumerate(miner_scripts()[:SHARES]):
            change = chain.accept(mine_share(chain, script, block_height=FIRST_HEIGHT), time.time())
            assert isinstance(change, Accepted), change
            directory.store.write(change, first_seen_ms=0, facts={} if number else facts, sync=False)
            directory.note_written()
    finally:
        directory.close()


def _fetch(url: str, rounds: int) -> tuple[list[float], int]:
    """Seconds that the template takes with nothing but an HTTP client and ``json``, and its bytes."""
    import httpx

    question = {"id": 0, "method": "getblocktemplate", "params": []}
    seconds, size = [], 0
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            content = client.post(url, json=question).content
            json.loads(content)
            seconds.append(time.perf_counter() - start)
            size = len(content)
    return seconds[1:], size


def _bare_broadcast(rounds: int, sizes: Sequence[int], count: Callable[[], None]) -> list[float]:
    """Seconds to the last notify if nothing is done but to send as many bytes to as many miners."""
    seconds = []
    listener = open_listeners("127.0.0.1", 0)[0]
    with ExitStack() as stack:
        stack.enter_context(listener)
        listener.settimeout(PATIENCE_S)
        miners = stack.enter_context(_process("miners", *listener.getsockname()[:2], len(sizes), 0))
        sockets = [stack.enter_context(listener.accept()[0]) for _ in sizes]
        for one in sockets:
            one.settimeout(PATIENCE_S)

        def send_all(wanted: str) -> float:
            lines = [b'{"id":null,"method":"mining.notify","params":["1","%b"' % wanted.encode() for _ in sizes]
            lines = [line.ljust(size - 3) + b"]}\n" for line, size in zip(lines, sizes, strict=True)]
            start = time.perf_counter()
            for one, line in zip(sockets, lines, strict=True):
                one.sendall(line)
            return start

        send_all("")
        miners.hear()
        for number in range(rounds):
            time.sleep(PAUSE_S)
            wanted = stratum_hash(tip_hash(number))
            miners.ask({"wanted": wanted, "full": True})
            start = send_all(wanted)
            seconds.append(max(miners.hear()["all"]) - start)
            count()
    return seconds


# The other processes.


def serve(arguments: Sequence[str]) -> None:
    """What a helper process does, until it is killed."""
    kind, *rest = arguments
    if kind == "bitcoin":
        trio.run(_serve_bitcoin, int(rest[0]))
    elif kind == "node":
        trio.run(_serve_node, rest[0], Path(rest[1]), decode_params(bytes.fromhex(rest[2])))
    else:
        host, port, connections, own_addresses = rest
        _serve_miners((host, int(port)), int(connections), own_addresses == "1")


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


async def _hear() -> Any:
    line = await trio.to_thread.run_sync(sys.stdin.readline)
    return json.loads(line) if line else await trio.sleep_forever()


def stratum_hash(block_hash: bytes) -> str:
    """A hash as it stands in ``mining.notify``."""
    return "".join(block_hash[start : start + 4][::-1].hex() for start in range(0, 32, 4))


async def _serve_bitcoin(transactions: int) -> None:
    bitcoin = ImaginaryBitcoin(transactions)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, bitcoin.serve, 0, host="127.0.0.1"))
        _say({"url": f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"})
        while True:
            question = await _hear()
            if question is None:
                _say(bitcoin.marks)
            else:
                bitcoin.move_to(question["tip"], full=question["full"])
                _say(None)


class _WatchedNode(Node):
    """A node that notes when it makes its jobs. Mutable field: ``marks``, by tip and whether there are transactions."""

    def __init__(self, **settings: Any) -> None:
        self.marks: dict[tuple[bytes, bool], dict[str, float]] = {}
        super().__init__(**settings)

    def notify_for(self, worker: Worker) -> Notify | None:
        """As of `Node`, with the time noted."""
        began = time.perf_counter()
        notify = super().notify_for(worker)
        ended = time.perf_counter()
        if notify is not None:
            marks = self.marks.setdefault((notify.previous_block_hash, bool(notify.branch)), {"jobs_s": 0.0})
            marks.setdefault("job_began", began)
            marks.setdefault("job_ended", ended)
            marks["jobs_ended"] = ended
            marks["jobs_s"] += ended - began
        return notify


async def _serve_node(url: str, path: Path, params: Params) -> None:
    weight, sigops = coinbase_reserve(max(params.payout_classes))
    directory = DataDirectory(path, params)
    times: dict[tuple[bytes, bool], dict[str, float]] = {}
    inner = vars(rpc)["read_template"]

    def read_template(result: Any, **settings: Any) -> BlockTemplate:
        began = time.perf_counter()
        template: BlockTemplate = inner(result, **settings)
        ended = time.perf_counter()
        key = template.previous_block_hash, bool(template.transactions)
        times.setdefault(key, {"read_began": began, "read_ended": ended})
        return template

    vars(rpc)["read_template"] = read_template  # no other place sees both ends of it
    async with (
        rpc.connect_bitcoin(
            [Endpoint(url=url)], network="regtest", reserved_weight=weight, reserved_sigops=sigops
        ) as backend,
        trio.open_nursery() as nursery,
    ):
        # Miners of a benchmark find nothing, and would have their difficulty changed all the time.
        settings = ServerSettings(tick_s=3_600.0, max_connections=100_000)
        node = _WatchedNode(directory=directory, params=params, backend=backend, stratum=settings)
        await nursery.start(node.run, open_listeners("127.0.0.1", 0))
        _say({"address": node.server.addresses[0]})
        while True:
            question = await _hear()
            key = bytes.fromhex(question["tip"]), question["full"]
            bridged = question["full"] and (key[0], False) in node.marks
            _say(node.marks.get(key, {}) | times.get(key, {}) | {"bridged": bridged})
            node.marks.clear()
            times.clear()


class _Miner:
    """A connection. Mutable fields: ``line`` that is being read, ``began`` when its first byte came."""

    def __init__(self, address: tuple[str, int], user: str, agent: str) -> None:
        self.socket: Final = socket.create_connection(address)
        self.line = bytearray()
        self.began = 0.0
        subscribe = json.dumps({"id": 1, "method": "mining.subscribe", "params": [agent]})
        authorize = json.dumps({"id": 2, "method": "mining.authorize", "params": [user, "x"]})
        self.socket.sendall(f"{subscribe}\n{authorize}\n".encode())
        self.socket.setblocking(False)

    def read(self) -> Iterator[tuple[bytes, float, float]]:
        """Lines that have come, each with the time of its first byte and of its last."""
        data = self.socket.recv(1 << 20)
        now = time.perf_counter()
        if not data:
            raise P2PoolError("the benchmark's node has closed the connection of a miner")
        if not self.line:
            self.began = now
        self.line += data
        while (end := self.line.find(b"\n") + 1) > 0:
            line = bytes(self.line[:end])
            del self.line[:end]
            yield line, self.began, now
            self.began = now


def _serve_miners(address: tuple[str, int], connections: int, own_addresses: bool) -> None:
    users = [encode_address(script, "regtest") or "" for script in miner_scripts()]
    selector = selectors.DefaultSelector()
    for number in range(connections):
        user = f"{users[number % len(users) if own_addresses else 0]}.{number}"
        miner = _Miner(address, user, AGENTS[number % len(AGENTS)])
        selector.register(miner.socket, selectors.EVENT_READ, miner)
    _gather(selector, connections, "", full=None)
    _say(None)
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        question = json.loads(line)
        _say(None)
        _say(_gather(selector, connections, question["wanted"], full=question["full"]))


def _gather(selector: selectors.BaseSelector, connections: int, wanted: str, *, full: bool | None) -> dict[str, Any]:
    """Read until each miner has its job on a block.

    Args:
        selector: of the miners.
        connections: how many they are.
        wanted: the block's hash as Stratum has it; of any block if empty.
        full: whether the job must have a merkle branch; None if that does not matter.
    """
    arrived: dict[int, tuple[float, float, int]] = {}
    pattern = f'"{wanted}'.encode()
    deadline = time.perf_counter() + PATIENCE_S
    while len(arrived) < connections:
        ready = selector.select(deadline - time.perf_counter())
        if not ready:
            raise P2PoolError(f"{len(arrived)} of {connections} miners have their job after {PATIENCE_S:.0f} s")
        for key, _ in ready:
            for line, began, ended in key.data.read():
                is_job = b"mining.notify" in line[:60] and pattern in line[:200]
                if is_job and (full is None or full == (b",[]," not in line)):
                    arrived[key.fd] = began, ended, len(line)
    first, last, sizes = zip(*arrived.values(), strict=True)
    return {"first": first, "all": last, "sizes": sizes}
