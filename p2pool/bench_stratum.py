"""The benchmark of Stratum: a whole node in one process, a load generator in another, over loopback.

The generator finds valid submissions before it starts the clock: at the easiest difficulty half of all nonces are good.
The node does with each what it does with any: job lookup, hash, duplicates, vardiff, books. Shares are so hard that
none is found. Beside it, in the same run, a bare trio server that decodes, hashes and answers, and does nothing else.
"""

from __future__ import annotations

import json
import math
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

import trio

from p2pool.bench import BLOCK_BITS, Row, make_row
from p2pool.bench_network import StillBitcoin
from p2pool.bitcoin_backend import BlockTemplate
from p2pool.bitcoin_backend.address import encode_address
from p2pool.database import DataDirectory
from p2pool.node import Node
from p2pool.stratum.server import ServerSettings, open_listeners
from sharechain import hasher
from sharechain.difficulty import DIFFICULTY_1_TARGET
from sharechain.params import NETWORKS, Params
from sharechain.share import pack_header

__all__ = ["bench_stratum"]

CONNECTIONS: Final = (1, 100, 1_000, 5_000, 10_000)
#: Seconds of closed loop, each session with one submission on its way.
SECONDS: Final = 10.0
#: Submissions a second of all sessions together, where the latency at a given load is measured.
RATE: Final = 10_000
#: Submissions a second of all sessions together, and of one: what is prepared for.
MOST_OF_ALL: Final = 40_000
MOST_OF_ONE: Final = 10_000
#: Jobs for all sessions, one after the other.
BROADCASTS: Final = 5
#: The easiest difficulty, 2^-31: a hash meets it half of the time.
EASIEST: Final = 2.0**-31
#: Levels of the merkle branch, as of a block of 4,000 transactions; a job has about a kilobyte.
LEVELS: Final = 12
USER: Final = encode_address(b"\x00\x14" + bytes(range(20)), "regtest")
#: Seconds for everything that takes no measurable time.
PATIENCE_S: Final = 60.0


def bench_stratum(quick: bool) -> Iterator[Row]:
    """Closed loops, a given load, and jobs for everybody, at ever more connections."""
    # Descriptors of both ends of a connection are in processes of their own.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100
    seconds = SECONDS / 10 if quick else SECONDS
    for count in (1, 100) if quick else [count for count in CONNECTIONS if count <= most]:
        for kind in ("bare", "node"):
            case = f"{count} connections" if kind == "node" else f"{count} connections, reference: a bare server"
            yield from _bench(kind, count, seconds, case)


def _bench(kind: str, count: int, seconds: float, case: str) -> Iterator[Row]:
    with _serving(kind) as server:
        server.say("rss")
        before = server.hear()
        load = _Load(server.port, count)
        try:
            server.say("rss")
            yield make_row(case, "memory a session", (server.hear() - before) / count / 1024, "KiB")
            load.prepare(seconds)
            closed = load.run(seconds, rate=math.inf)
            yield from _latencies(case, "closed loop", closed, seconds)
            if kind == "node" and count > 1:
                given = load.run(seconds, rate=RATE)
                yield from _latencies(case, f"at {RATE} submits/s", given, seconds)
            yield make_row(case, "refused", load.refused, "submits")
            if kind == "node":
                spans = [load.time_of_a_job(server) for _ in range(BROADCASTS)]
                yield make_row(case, "job to the last of all, median", sorted(spans)[len(spans) // 2] * 1e3, "ms")
                yield make_row(case, "size of a job", load.job_bytes, "bytes")
        finally:
            load.close()


def _latencies(case: str, what: str, latencies: Sequence[float], seconds: float) -> Iterator[Row]:
    ordered = sorted(latencies) or [math.nan]
    yield make_row(case, what, len(latencies) / seconds, "submits/s")
    for name, part in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
        at = min(int(part * len(ordered)), len(ordered) - 1)
        yield make_row(case, f"{what}, {name}", ordered[at] * 1e3, "ms")


# The load


class _Miner:
    """One connection of the generator. Mutable: what is to be sent, and what was heard of."""

    __slots__ = ("buffer", "extranonce1", "jobs", "lines", "next_line", "sent_at", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.extranonce1 = b""
        self.lines: list[bytes] = []
        self.next_line = 0
        self.sent_at = 0.0
        self.jobs = 0


class _Load:
    """So many miners in one loop.

    Mutable: the miners, by descriptor; ``refused`` submissions; the last job heard and its size.
    """

    def __init__(self, port: int, count: int) -> None:
        self._poll = select.epoll()
        self._miners: dict[int, _Miner] = {}
        self._job: list[Any] = []
        self.job_bytes = 0
        self.refused = 0
        opening = (
            '{"id":1,"method":"mining.subscribe","params":["cpuminer/2.5.1"]}\n'
            f'{{"id":2,"method":"mining.authorize","params":["{USER}+{EASIEST!r}","x"]}}\n'
        ).encode()
        for _ in range(count):
            miner = _Miner(socket.create_connection(("127.0.0.1", port)))
            miner.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            miner.sock.sendall(opening)
            self._miners[miner.sock.fileno()] = miner
            self._poll.register(miner.sock, select.EPOLLIN)
            if len(self._miners) % 100 == 0:  # the other side has its turn
                self._await_jobs()
        self._await_jobs()

    def close(self) -> None:
        for miner in self._miners.values():
            miner.sock.close()
        self._poll.close()

    def prepare(self, seconds: float) -> None:
        """Find submissions for each miner, enough for two runs of so many seconds at the rates that may be met."""
        job_id, previous, coinb1, coinb2, branch, version, bits, ntime, _ = self._job
        words = b"".join(bytes.fromhex(previous[at : at + 8])[::-1] for at in range(0, 64, 8))
        levels = [bytes.fromhex(level) for level in branch]
        wanted = max(64, int(2 * seconds * min(MOST_OF_ALL / len(self._miners), MOST_OF_ONE)))
        for miner in self._miners.values():
            coinbase = bytes.fromhex(coinb1) + miner.extranonce1 + bytes(8) + bytes.fromhex(coinb2)
            header = pack_header(
                version=int(version, 16),
                previous_block_hash=words,
                merkle_root=hasher.fold_merkle(hasher.sha256d(coinbase), levels),
                time=int(ntime, 16),
                bits=int(bits, 16),
                nonce=0,
            )
            nonce = 0
            while len(miner.lines) < wanted:
                found = hasher.scan_nonces(header, nonce, 2**32 - nonce, DIFFICULTY_1_TARGET << 31).nonce
                assert found is not None
                nonce = found + 1
                miner.lines.append(
                    f'{{"id":4,"method":"mining.submit","params":["{USER}+{EASIEST!r}","{job_id}","{"00" * 8}",'
                    f'"{ntime}","{found:08x}"]}}\n'.encode()
                )

    def run(self, seconds: float, *, rate: float) -> list[float]:
        """Submit; with a rate, at most so many in a second, in turns. Returns the seconds that each answer took."""
        latencies: list[float] = []
        started = time.monotonic()
        end = started + seconds
        idle = list(self._miners.values())
        sent = 0
        while (now := time.monotonic()) < end:
            allowed = len(idle) if math.isinf(rate) else min(len(idle), int((now - started) * rate) - sent)
            while allowed > 0 and idle:
                miner = idle.pop()
                assert miner.next_line < len(miner.lines), "the server is faster than what was prepared"
                miner.sent_at = time.monotonic()
                miner.sock.sendall(miner.lines[miner.next_line])
                miner.next_line += 1
                sent += 1
                allowed -= 1
            for miner in self._hear(0.001):
                latencies.append(time.monotonic() - miner.sent_at)
                idle.insert(0, miner)
        while len(latencies) < sent:
            answered = self._hear(0.1)
            now = time.monotonic()
            assert now < end + PATIENCE_S, "the server answers no more"
            latencies += [now - miner.sent_at for miner in answered]
        return latencies

    def time_of_a_job(self, server: _Server) -> float:
        """Seconds from the node's decision to give everybody a new job until every miner has it."""
        for miner in self._miners.values():
            miner.jobs = 0
        server.say("job")
        self._await_jobs()
        return time.monotonic() - server.hear()

    def _await_jobs(self) -> None:
        missing = {miner for miner in self._miners.values() if not miner.jobs}
        deadline = time.monotonic() + PATIENCE_S
        while missing:
            assert time.monotonic() < deadline, "the server is too slow"
            self._hear(0.1)
            missing = {miner for miner in missing if not miner.jobs}

    def _hear(self, patience_s: float) -> list[_Miner]:
        """Read what there is; the miners that got an answer to a submission."""
        answered = []
        for descriptor, _ in self._poll.poll(patience_s):
            miner = self._miners[descriptor]
            data = miner.sock.recv(65536)
            assert data, "the server closed a connection"
            *lines, miner.buffer = (miner.buffer + data).split(b"\n")
            for line in lines:
                if line.startswith(b'{"id":4,'):
                    answered.append(miner)
                    self.refused += b'"result":true' not in line
                elif line.startswith(b'{"id":null,"method":"mining.notify"'):
                    miner.jobs += 1
                    self.job_bytes = len(line) + 1
                    if not self._job:
                        self._job = json.loads(line)["params"]
                elif line.startswith(b'{"id":1,'):
                    miner.extranonce1 = bytes.fromhex(json.loads(line)["result"][1])
        return answered


# The servers


class _Server:
    """The other process: its port, and what it says to a word."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._words: IO[str] = process.stdin
        self._answers: IO[str] = process.stdout
        self.port = int(self.hear())

    def say(self, word: str) -> None:
        """Ask for ``rss`` or a ``job`` for everybody."""
        print(word, file=self._words, flush=True)

    def hear(self) -> float:
        """The next answer: bytes of memory, or when the job was decided on."""
        return float(self._answers.readline())


@contextmanager
def _serving(kind: str) -> Iterator[_Server]:
    code = "import sys; from p2pool.bench_stratum import serve; serve(sys.argv[1])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield _Server(process)
    finally:
        process.kill()
        process.communicate()


def serve(kind: str) -> None:
    """What the other process does, until it is killed."""
    trio.run(_serve_bare if kind == "bare" else _serve_node)


async def _serve_node() -> None:
    params = _params()
    with tempfile.TemporaryDirectory(prefix="p2pool-bench-") as scratch:
        directory = DataDirectory(Path(scratch), params)
        settings = ServerSettings(max_connections=100_000)
        node = Node(directory=directory, params=params, backend=_FullBlock(), stratum=settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, open_listeners("127.0.0.1", 0))
            print(node.server.addresses[0][1], flush=True)
            async for word in _words():
                if word == "job":
                    print(time.monotonic(), flush=True)
                    node._renew_work(clean=True)
                else:
                    print(_rss(), flush=True)


async def _serve_bare() -> None:
    """Decode, hash, answer; a task and a stream for each connection, as one writes it first."""
    [listener] = open_listeners("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    coinb1, coinb2, branch = bytes(60), bytes(120), tuple(bytes([level]) * 32 for level in range(LEVELS))
    words = ",".join(f'"{level.hex()}"' for level in branch)
    job = (
        f'{{"id":null,"method":"mining.notify","params":["1","{"00" * 32}","{coinb1.hex()}","{coinb2.hex()}",[{words}],'
        f'"20000000","{BLOCK_BITS:08x}","65000000",true]}}\n'
    ).encode()
    subscribed = b'{"id":1,"result":[[],"00000001",8],"error":null}\n'
    target = DIFFICULTY_1_TARGET << 31

    async def talk(stream: trio.SocketStream) -> None:
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["method"] != "mining.submit":
                    await stream.send_all(subscribed if message["method"] == "mining.subscribe" else job)
                    continue
                _, _, extranonce2, ntime, nonce = message["params"]
                coinbase = coinb1 + b"\x00\x00\x00\x01" + bytes.fromhex(extranonce2) + coinb2
                header = pack_header(
                    version=0x20000000,
                    previous_block_hash=bytes(32),
                    merkle_root=hasher.fold_merkle(hasher.sha256d(coinbase), branch),
                    time=int(ntime, 16),
                    bits=BLOCK_BITS,
                    nonce=int(nonce, 16),
                )
                good = int.from_bytes(hasher.sha256d(header), "little") <= target
                await stream.send_all(b'{"id":4,"result":true,"error":null}\n' if good else b'{"id":4,"result":null}\n')

    async with trio.open_nursery() as nursery:
        socket_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        nursery.start_soon(trio.serve_listeners, talk, [socket_listener])
        async for _ in _words():
            print(_rss(), flush=True)


async def _words() -> AsyncIterator[str]:
    async with trio.lowlevel.FdStream(0) as stream:
        async for data in stream:
            for word in data.decode().split():
                yield word


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _params() -> Params:
    """A network in which this load finds no share, however long nobody finds one."""
    return NETWORKS["regtest"].with_overrides(
        {"name": "bench-stratum", "max_target": f"{2**200:x}", "stall_after_s": 1_000_000}
    )


class _FullBlock(StillBitcoin):
    """A Bitcoin that stands still, with a full block's merkle branch."""

    async def block_template(self) -> BlockTemplate:
        template = await super().block_template()
        return replace(template, merkle_branch=tuple(bytes([level]) * 32 for level in range(LEVELS)))
