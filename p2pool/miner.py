"""The CPU miner: an ordinary Stratum client round the hasher, for test networks, demonstrations and one's own tests.

Theory of operation. One task reads the pool's lines and hands each new job to the hasher's `Scanner`, whose threads
leave the old one within milliseconds. A second task waits for what they find, sends it, and lets the headers' time
follow the clock. Threads never try the same header: each has its own extranonce2.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import trio

from p2pool.errors import P2PoolError
from p2pool.stratum.vardiff import target_of_difficulty
from sharechain import __version__, hasher

USER_AGENT: Final = f"p2pool-cpuminer/{__version__}"
WAIT_MS = 100
"""How long a wait for finds lasts at most: how often hashes are counted and the clock is looked at."""
MAX_TIME_ROLL_S = 120
"""How far beyond the job's the header's time may follow the clock; a live pool sends a job each 30 s."""
RATE_WINDOW_S = 15.0
"""Time constant of the hash rate that is shown."""
SILENCE_S = 180.0
"""A pool that says nothing for so long is gone."""
MAX_UNANSWERED = 64
"""Submissions on their way. A test network's difficulty can be so low that hashing is faster than telling."""
MAX_JOBS = 16
"""Jobs since the last clean one that finds are still sent for."""
HANDSHAKE_S = 30.0
"""For connecting, and for each answer up to the first job."""
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 30.0
MAX_LINE_BYTES = 1 << 20
"""A job with a coinbase of 500 outputs has 50 kB."""

_CLOSED = "the pool closed the connection"
_SUBSCRIBE, _AUTHORIZE, _FIRST_SUBMIT = 1, 2, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerStatistics:
    """A miner at one moment.

    Attributes:
        hashes: done since the start.
        hash_rate: of late, in hashes per second, all threads together.
        accepted, rejected: submissions answered; rejected by the pool's error code.
        difficulty: of the job in hand, 0 before the first.
    """

    hashes: int
    hash_rate: float
    accepted: int
    rejected: Mapping[int, int]
    difficulty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerEvent:
    """Something that a person who watches a miner may want to read."""

    kind: Literal["connected", "job", "accepted", "rejected", "disconnected"]
    text: str
    statistics: MinerStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job as received, with the target in force."""

    job_id: str
    previous_block_hash: bytes
    coinb1: bytes
    coinb2: bytes
    branch: tuple[bytes, ...]
    version: int
    bits: int
    time: int
    target: int
    generation: int
    received_at: float


class _Disconnected(Exception):
    """The connection is over, for a reason that connecting again may cure."""


class _Pool:
    """A connection's lines. Mutable state: the bytes of the line to come; the submissions still without an answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._send_lock = trio.Lock()
        self._unanswered = trio.Semaphore(MAX_UNANSWERED)

    async def send(self, message: Mapping[str, object]) -> None:
        async with self._send_lock:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")

    async def submit(self, message: Mapping[str, object]) -> None:
        await self._unanswered.acquire()
        await self.send(message)

    def on_answer(self) -> None:
        if self._unanswered.value < MAX_UNANSWERED:
            self._unanswered.release()

    async def receive(self, patience_s: float) -> dict[str, object]:
        """The next line, decoded. Raises: _Disconnected; P2PoolError for what is no JSON object."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise P2PoolError(f"the pool sent a line of more than {MAX_LINE_BYTES} bytes")
            data = None
            with trio.move_on_after(patience_s):
                data = await self._stream.receive_some(65536)
            if data is None:
                raise _Disconnected(f"the pool said nothing for {patience_s:.0f} s")
            if not data:
                raise _Disconnected(_CLOSED)
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise P2PoolError(f"the pool sent what is not a JSON object: {line[:200]!r}")
        return message


class Miner:
    """See `mine`.

    Mutable state: `_job` is the one in hand, None between connections; `_jobs` are those that finds may still come for,
    by the tag that the scanner knows them by, `_tag` the last; `_generation` counts clean jobs; the extranonce and
    difficulty of the connection; and what was counted. Invariant: the scanner works on `_job`, and on nothing if that
    is None.
    """

    def __init__(
        self, *, user: str, password: str, scanner: hasher.Scanner, on_event: Callable[[MinerEvent], None] | None
    ) -> None:
        self._user = user
        self._password = password
        self._on_event = on_event
        self._scanner = scanner
        self._difficulty = 0.0
        self._extranonce1 = b""
        self._extranonce2_size = 8
        self._job: _Job | None = None
        self._jobs: dict[int, _Job] = {}
        self._tag = 0
        self._hashes = self._accepted = 0
        self._rejected: Counter[int] = Counter()
        self._rate = 0.0
        self._rate_at = trio.current_time()
        self._started_at = self._rate_at
        self._next_id = _FIRST_SUBMIT
        self._generation = 0

    def statistics(self) -> MinerStatistics:
        self._count_hashes()
        seen_s = max(self._rate_at - self._started_at, 1e-3)
        return MinerStatistics(
            hashes=self._hashes,
            hash_rate=self._rate / -math.expm1(-seen_s / RATE_WINDOW_S),
            accepted=self._accepted,
            rejected=dict(self._rejected),
            difficulty=self._difficulty if self._job else 0.0,
        )

    async def run_connection(self, host: str, port: int, authorized: Callable[[], None]) -> str:
        """Mine over one connection; returns why it ended. `authorized` is called when the pool has taken the user.

        Raises:
            P2PoolError: the pool refused the user, or is no pool.
        """
        try:
            with trio.fail_after(HANDSHAKE_S):
                stream = await trio.open_tcp_stream(host, port)
        except (OSError, trio.TooSlowError) as error:
            return f"cannot connect: {error or 'too slow'}"
        pool = _Pool(stream)
        ended = ""
        refused: P2PoolError | None = None
        try:
            async with stream, trio.open_nursery() as nursery:
                # The reader's fault is a value here, not an exception of the nursery, which would wrap it.
                try:
                    await self._follow_pool(pool, nursery, authorized)
                except _Disconnected as error:
                    ended = str(error)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    ended = _CLOSED
                except P2PoolError as error:
                    refused = error
                nursery.cancel_scope.cancel()
        finally:
            self._end_job()
        if refused is not None:
            raise refused
        return ended

    async def _follow_pool(self, pool: _Pool, nursery: trio.Nursery, authorized: Callable[[], None]) -> None:
        """Introduce the miner, then take what the pool sends until the connection ends."""
        await pool.send({"id": _SUBSCRIBE, "method": "mining.subscribe", "params": [USER_AGENT]})
        await pool.send({"id": _AUTHORIZE, "method": "mining.authorize", "params": [self._user, self._password]})
        is_authorized = False
        while True:
            message = await pool.receive(SILENCE_S if is_authorized else HANDSHAKE_S)
            try:
                match message:
                    case {"method": "client.get_version", "id": identity} if identity is not None:
                        await pool.send({"id": identity, "result": USER_AGENT, "error": None})
                    case {"method": str(method), "params": list(params)}:
                        self._on_push(method, params)
                    case {"id": int(identity)} if identity == _SUBSCRIBE:
                        self._on_subscribed(message)
                    case {"id": int(identity)} if identity == _AUTHORIZE:
                        if message.get("result") is not True:
                            raise P2PoolError(f"the pool refused {self._user}: {_error_of(message)[1]}")
                        is_authorized = True
                        self._tell("connected", f"mining as {self._user}")
                        authorized()
                        nursery.start_soon(self._follow_scanner, pool)
                    case {"id": int(), "result": _}:
                        pool.on_answer()
                        self._on_answer(message)
            except (TypeError, ValueError, LookupError) as error:
                raise P2PoolError(f"the pool sent what is not Stratum: {str(message)[:200]} ({error})") from error

    def _on_push(self, method: str, params: list[object]) -> None:
        if method == "mining.set_difficulty":
            difficulty = _number(params[0])
            if not (math.isfinite(difficulty) and difficulty > 0):
                raise ValueError(f"difficulty: expected a number above 0, got {difficulty}")
            self._difficulty = difficulty
        elif method == "mining.notify":
            self._generation += params[8:] != [False]
            job = _decode_job(params, target_of_difficulty(self._difficulty or 1.0), self._generation)
            self._start_job(job)
            self._tell("job", f"job {job.job_id} at difficulty {self._difficulty:g}")

    def _on_subscribed(self, message: Mapping[str, object]) -> None:
        result = message.get("result")
        if not isinstance(result, list):
            raise P2PoolError(f"the pool refused to subscribe us: {_error_of(message)[1]}")
        extranonce1, size = result[1], result[2]
        if not isinstance(extranonce1, str) or not isinstance(size, int) or not 2 <= size <= 16:
            raise ValueError("expected an extranonce1 and the size of extranonce2")
        self._extranonce1, self._extranonce2_size = bytes.fromhex(extranonce1), size

    def _on_answer(self, message: Mapping[str, object]) -> None:
        if message.get("result") is True:
            self._accepted += 1
            self._tell("accepted", "submission accepted")
        else:
            code, text = _error_of(message)
            self._rejected[code] += 1
            self._tell("rejected", f"submission rejected: {text} ({code})")

    async def _follow_scanner(self, pool: _Pool) -> None:
        """Send what the threads find, and keep the headers' time and the count of hashes up to date."""
        while True:
            finds = await trio.to_thread.run_sync(self._scanner.wait, WAIT_MS, abandon_on_cancel=True)
            self._count_hashes()
            if (job := self._job) is not None:
                late_s = int(trio.current_time() - job.received_at)
                self._scanner.set_time(min(job.time + min(late_s, MAX_TIME_ROLL_S), 2**32 - 1))
            for find in finds:
                # A job replaced by one that is not clean is still good for what was found in it.
                if (of := self._jobs.get(find.tag)) is None or of.generation != self._generation:
                    continue
                params = [self._user, of.job_id, find.extranonce.hex(), f"{find.time:08x}", f"{find.nonce:08x}"]
                self._next_id += 1
                try:
                    await pool.submit({"id": self._next_id, "method": "mining.submit", "params": params})
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # The reader finds out too, and ends the connection.

    def _start_job(self, job: _Job) -> None:
        """Set the threads on a job; from now on they find nothing for the one before."""
        self._tag += 1
        self._job = job
        self._jobs = {tag: of for tag, of in self._jobs.items() if of.generation == job.generation}
        self._jobs[self._tag] = job
        while len(self._jobs) > MAX_JOBS:
            del self._jobs[min(self._jobs)]
        self._scanner.start(
            tag=self._tag,
            prefix=job.coinb1 + self._extranonce1,
            extranonce_size=self._extranonce2_size,
            suffix=job.coinb2,
            branch=job.branch,
            version=job.version,
            previous_block_hash=job.previous_block_hash,
            time=job.time,
            bits=job.bits,
            target=job.target,
        )

    def _end_job(self) -> None:
        self._scanner.stop()
        self._job = None
        self._jobs = {}

    def _count_hashes(self) -> None:
        now = trio.current_time()
        hashes = self._scanner.hashes - self._hashes
        self._hashes += hashes
        self._rate = self._rate * math.exp(-(now - self._rate_at) / RATE_WINDOW_S) + hashes / RATE_WINDOW_S
        self._rate_at = now

    def _tell(self, kind: Literal["connected", "job", "accepted", "rejected", "disconnected"], text: str) -> None:
        if self._on_event is not None:
            self._on_event(MinerEvent(kind=kind, text=text, statistics=self.statistics()))

    def tell_disconnected(self, text: str) -> None:
        self._tell("disconnected", text)


async def mine(
    *,
    host: str,
    port: int,
    user: str,
    password: str = "x",
    threads: int = 1,
    on_event: Callable[[MinerEvent], None] | None = None,
    reconnect: bool = True,
    task_status: trio.TaskStatus[Miner] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mine with this machine's processor for a pool, until cancelled.

    Arguments:
        user, password: as for any Stratum miner; for this pool, `address[.worker]`.
        threads: hashing threads.
        on_event: told what happens; it must return at once.
        reconnect: after a failed or lost connection, try again and again, with pauses of up to 30 s.
        task_status: started with the `Miner`, for its statistics, when the pool has first taken the user.

    Raises:
        P2PoolError: the pool refused the user, with its text, or is no Stratum pool; without `reconnect` also that the
            connection failed or was lost.
    """
    scanner = hasher.Scanner(threads)
    miner = Miner(user=user, password=password, scanner=scanner, on_event=on_event)
    backoff_s = FIRST_BACKOFF_S
    is_started = False

    def on_authorized() -> None:
        nonlocal backoff_s, is_started
        backoff_s = FIRST_BACKOFF_S
        if not is_started:
            is_started = True
            task_status.started(miner)

    try:
        while True:
            ended = await miner.run_connection(host, port, on_authorized)
            text = f"pool at {host}:{port}: {ended}"
            if not reconnect:
                raise P2PoolError(text)
            miner.tell_disconnected(f"{text}; again in {backoff_s:g} s")
            await trio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)
    finally:
        scanner.close()


def _decode_job(params: list[object], target: int, generation: int) -> _Job:
    """Raises: TypeError, ValueError, IndexError, for anything that is not a job."""
    job_id, previous, coinb1, coinb2, branch, version, bits, time = params[:8]
    if not isinstance(branch, list):
        raise TypeError("merkle branch: expected a list")
    swapped = _hash(previous)
    return _Job(
        job_id=_string(job_id),
        previous_block_hash=b"".join(swapped[i : i + 4][::-1] for i in range(0, 32, 4)),
        coinb1=bytes.fromhex(_string(coinb1)),
        coinb2=bytes.fromhex(_string(coinb2)),
        branch=tuple(_hash(node) for node in branch),
        version=_hex_32_bits(version),
        bits=_hex_32_bits(bits),
        time=_hex_32_bits(time),
        target=target,
        generation=generation,
        received_at=trio.current_time(),
    )


def _error_of(message: Mapping[str, object]) -> tuple[int, str]:
    """The code and text of a refusal, as far as the pool gave any."""
    match message.get("error"):
        case [int(code), str(text), *_]:
            return code, text
        case {"code": int(code), "message": str(text)}:
            return code, text
        case _:
            return 20, "no reason given"


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _hash(value: object) -> bytes:
    raw = bytes.fromhex(_string(value))
    if len(raw) != 32:
        raise ValueError(f"hash: expected 32 bytes, got {len(raw)}")
    return raw


def _hex_32_bits(value: object) -> int:
    number = int(_string(value), 16)
    if not 0 <= number < 2**32:
        raise ValueError(f"expected 32 bits, got {value!r}")
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)
