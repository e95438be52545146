"""One miner's Stratum session, without sockets, clock or randomness: bytes and the time in, bytes out.

Theory of operation. `Session.receive` cuts the bytes into lines and answers each; it never raises for anything that a
miner can send. What it asks of the node it asks a `Desk`, synchronously: who is this, what is the work, is this
submission good. `Session.on_new_work` and `on_tick` return what the server should push.

- Every line of work carries a job id of its own, fresh in the session, because some firmware drops an id that it has
  seen: so the same `Notify` can be sent again with another difficulty or another version mask. The session remembers,
  for each id, what the miner was told: which job of the desk, which session target, which mask.
- `mining.set_difficulty` goes out only when the difficulty changed and only immediately before a `mining.notify`:
  miners that take it as valid from the next job and miners that take it as valid at once then agree.
- A submission whose job is known goes to the desk *before* it is judged stale, low or duplicate: a block is a block.

Source: observed clients and servers (cpuminer, cgminer, bfgminer, ESP-Miner, ckpool, datum_gateway); BIP310 for
`mining.configure`. There is no Stratum v1 specification.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from p2pool.errors import StratumError
from p2pool.stratum.login import read_difficulty
from p2pool.stratum.values import (
    DEFAULT_VERSION_MASK,
    DUPLICATE,
    EXTRANONCE1_SIZE,
    EXTRANONCE2_SIZE,
    LOW_DIFFICULTY,
    NOT_SUBSCRIBED,
    OTHER,
    STALE,
    UNAUTHORIZED,
    Desk,
    Notify,
    SessionStatistics,
    Submission,
    SubmissionOutcome,
    Verdict,
    Worker,
    reason_of,
)
from p2pool.stratum.vardiff import (
    Vardiff,
    VardiffSettings,
    difficulty_of_exponent,
    exponent_of_difficulty,
    hardest_exponent_for,
    tolerant_target_of_exponent,
)
from sharechain.difficulty import DIFFICULTY_1_TARGET

MAX_LINE_BYTES = 8 * 1024
"""The longest honest line, a `mining.configure` or a submit with a long user name, has a few hundred bytes."""
MAX_JOBS_REMEMBERED = 64
"""Per session. At one job each 10 s, ten minutes: longer than any miner's queue."""
MAX_SUBMISSIONS_REMEMBERED = 1024
"""Per job. The oldest are forgotten: the sharechain knows a duplicate share by itself."""
MAX_WORKERS = 256
"""User names on one connection, as a farm's proxy sends them."""
MIN_RESEND_S = 1.0
"""Between two lines of work that only the miner's own doing asks for."""
KEEP_ALIVE_S = 25.0
"""Without a job; then the job in hand goes out under another id. An Antminer D9 drops a pool after 60 s of silence,
cgminer after 90 s, and minerd stops hashing 120 s after the last job."""
TLS_HANDSHAKE: Final = 0x16
"""The first byte of a TLS connection; of a line of JSON never."""

_HEX_32_BITS = re.compile(r"[0-9a-fA-F]{1,8}", re.ASCII)
_HEX_256_BITS = re.compile(r"(?:0x)?([0-9a-fA-F]{1,64})", re.ASCII)
_EXTRANONCE2 = re.compile(rf"[0-9a-fA-F]{{{2 * EXTRANONCE2_SIZE}}}", re.ASCII)
_VERSION_QUERY = "p2pool-version"
_HTTP_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ", b"CONNECT ")
_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This port speaks Stratum, to miners.\r\n"
)


@dataclass(slots=True, kw_only=True)
class _SentJob:
    """What the miner was told with one job id."""

    desk_job_id: str
    worker: Worker
    exponent: int
    version: int
    version_mask: int
    generation: int
    seen: dict[bytes, None]


class Session:
    """One connection's conversation.

    Mutable state: `_workers` are the authorized user names with their passwords, the first of which the work is made
    for; `_jobs` is what was sent, by job id, oldest first, the last `MAX_JOBS_REMEMBERED`; a job is stale if its
    generation is below `_generation`, which counts Bitcoin's tips. Job ids that belong to one `Notify` share one
    `seen`. Work is sent if and only if the session is subscribed and has a worker.
    """

    def __init__(
        self,
        *,
        session_id: str,
        extranonce1: bytes,
        desk: Desk,
        now: float,
        vardiff: VardiffSettings | None = None,
        version_mask: int = DEFAULT_VERSION_MASK,
        resume: Callable[[str], Session | None] | None = None,
    ) -> None:
        """
        Arguments:
            session_id: what the miner may come back with, so not to be guessed.
            extranonce1: 4 bytes that no other live session has.
            version_mask: the version bits that the pool lets miners roll.
            resume: hands out the closed session of an id, once, and with it its extranonce1.
        """
        if len(extranonce1) != EXTRANONCE1_SIZE:
            raise ValueError(f"extranonce1: expected {EXTRANONCE1_SIZE} bytes, got {len(extranonce1)}")
        self.session_id = session_id
        self.extranonce1 = extranonce1
        self.closing: str | None = None
        """Why the connection is to be closed after what was returned has been sent; None while it lives."""
        self.line_since: float | None = None
        """When the line that is still incomplete began; None between lines."""
        self._desk = desk
        self._pool_mask = version_mask
        self._resume = resume
        self._vardiff = Vardiff(vardiff or VardiffSettings(), now)
        self._buffer = bytearray()
        self._subscribed = False
        self._user_agent = ""
        self._version_mask = 0
        self._workers: dict[str, tuple[Worker, str]] = {}
        self._jobs: dict[str, _SentJob] = {}
        self._next_job = 1
        self._generation = 0
        self._clean_due = True
        self._last_notify: Notify | None = None
        self._last_job: _SentJob | None = None
        self._sent_exponent: int | None = None
        self._sent_at = -math.inf
        self._version_asked = False
        self._accepted = self._shares = self._blocks = 0
        self._rejected: dict[str, int] = {}
        self._connected_at = self._heard_at = now

    @property
    def is_authorized(self) -> bool:
        """Whether some user name has been accepted."""
        return bool(self._workers)

    @property
    def is_worth_resuming(self) -> bool:
        """Whether a miner that lost its connection could still have submissions for this session."""
        return self._subscribed and bool(self._jobs)

    def receive(self, data: bytes, now: float) -> bytes:
        """Take bytes as they came from the socket; returns the bytes to send, b"" for nothing. See `closing`."""
        if self.closing is not None:
            return b""
        self._buffer += data
        out: list[bytes] = []
        while self.closing is None:
            end = self._buffer.find(b"\n")
            if self._buffer[:1] == bytes([TLS_HANDSHAKE]):
                self.closing = "TLS on a plain port"
            elif end > MAX_LINE_BYTES or (end < 0 and len(self._buffer) > MAX_LINE_BYTES):
                self.closing = f"a line of more than {MAX_LINE_BYTES} bytes"
            elif end < 0:
                break
            else:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self.line_since = None
                self._heard_at = now
                out += self._on_line(line, now)
        if self.closing is not None:
            self._buffer.clear()
        if not self._buffer:
            self.line_since = None
        elif self.line_since is None:
            self.line_since = now
        return b"".join(out)

    def on_close(self) -> None:
        """The connection is gone: keep only what a miner that comes back needs."""
        self.closing = self.closing or "connection lost"
        self._buffer.clear()
        self._workers.clear()
        self._last_notify = None  # With a large coinbase it has 50 kB.

    def on_clean(self) -> None:
        """All jobs sent so far are stale: Bitcoin's tip moved. For a closed session; an open one has `on_new_work`."""
        self._generation += 1
        self._clean_due = True

    def on_new_work(self, clean: bool, now: float) -> bytes:
        """The bytes that bring the miner the desk's current job, b"" if it is not to have one (yet).

        Arguments:
            clean: Bitcoin's tip moved, so what the miner works on is worthless. A new sharechain tip is not that: work
                in flight can still become an uncle.
        """
        if clean:
            self.on_clean()
        return self._send_work(now) if self.closing is None else b""

    def on_tick(self, now: float) -> bytes:
        """To be called every few seconds: eases the difficulty of a silent miner, and is not silent itself."""
        if self._last_job is None or self.closing is not None:
            return b""
        self._vardiff.on_tick(now)
        return self._send_work(now) if now - self._sent_at >= KEEP_ALIVE_S else self._send_due_work(now)

    def statistics(self, now: float) -> SessionStatistics:
        return SessionStatistics(
            session_id=self.session_id,
            user=next(iter(self._workers), ""),
            user_agent=self._user_agent,
            difficulty=float(difficulty_of_exponent(self._last_job.exponent)) if self._last_job else 0.0,
            hash_rate=self._vardiff.hash_rate(now),
            accepted=self._accepted,
            rejected=dict(self._rejected),
            shares=self._shares,
            blocks=self._blocks,
            connected_at=self._connected_at,
            heard_at=self._heard_at,
        )

    # Lines

    def _on_line(self, line: bytes, now: float) -> list[bytes]:
        if line.startswith(_HTTP_METHODS):
            self.closing = "HTTP on a Stratum port"
            return [_HTTP_ANSWER]
        if not line.strip():
            return []
        try:
            # Firmware with a worker name in Latin-1 is a miner too.
            message = _DECODER.decode(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.closing = "not a JSON object"
            return []
        if "method" not in message:
            return self._on_answer(message, now)
        identity = _encode_id(message.get("id"))
        method, params = message["method"], message.get("params")
        try:
            handler = _METHODS.get(method) if isinstance(method, str) else None
            if handler is None:
                raise StratumError(OTHER, f"unknown method {_text(method)[:64]}")
            result = handler(self, params if isinstance(params, list) else [], now)
        except StratumError as error:
            answer = f'"result":null,"error":{json.dumps([error.code, error.message, None])}'
        else:
            answer = f'"result":{"true" if result is True else json.dumps(result)},"error":null'
        reply = [] if identity is None else [f'{{"id":{identity},{answer}}}\n'.encode()]
        work = self._send_work(now) if self._last_job is None else self._send_due_work(now)
        return [*reply, work, self._ask_version()]

    def _ask_version(self) -> bytes:
        """Ask a miner that did not say in its subscribe what it is: the size of the coinbase depends on it.

        Only behind the first job: before the authorize reply it would be taken for a failed authorization.
        """
        if self._user_agent or self._version_asked or self._last_job is None or self.closing is not None:
            return b""
        self._version_asked = True
        return f'{{"id":"{_VERSION_QUERY}","method":"client.get_version","params":[]}}\n'.encode()

    def _on_answer(self, message: Mapping[str, object], now: float) -> list[bytes]:
        """A miner's answer to us. Never answered; work on a coinbase of another size may follow."""
        agent = _text(message.get("result"))[:128]
        if message.get("id") != _VERSION_QUERY or not self._version_asked or self._user_agent or not agent:
            return []
        self._user_agent = agent
        try:
            self._authorize_again()
        except StratumError as error:
            self.closing = error.message
            return []
        return [self._send_work(now)]

    def _send_due_work(self, now: float) -> bytes:
        """Send the job in hand again where the miner itself changed what it must be told with it."""
        job, notify = self._last_job, self._last_notify
        if job is None or notify is None:
            return b""
        if job.version_mask != self._version_mask:
            return self._send_work(now)
        # A step of one waits for the next job. A larger one means a wrong start: the ramp does not wait.
        step = abs(self._vardiff.exponent_for(notify.limit) - job.exponent)
        return self._send_work(now) if step >= 2 and now - self._sent_at >= MIN_RESEND_S else b""

    def _send_work(self, now: float) -> bytes:
        if not self._subscribed or not self._workers:
            return b""
        worker, _ = next(iter(self._workers.values()))
        notify = self._desk.notify_for(worker)
        if notify is None:
            return b""
        if self._last_job is None:
            self._vardiff.start(now)
        exponent = self._vardiff.exponent_for(notify.limit)
        line = b""
        if exponent != self._sent_exponent:
            difficulty = difficulty_of_exponent(exponent)
            line = f'{{"id":null,"method":"mining.set_difficulty","params":[{difficulty!r}]}}\n'.encode()
            self._sent_exponent = exponent
        previous = next(reversed(self._jobs.values()), None)
        is_again = previous is not None and previous.desk_job_id == notify.job_id
        job = _SentJob(
            desk_job_id=notify.job_id,
            worker=worker,
            exponent=exponent,
            version=notify.version,
            version_mask=self._version_mask,
            generation=self._generation,
            seen=previous.seen if previous is not None and is_again else {},
        )
        job_id = f"{self._next_job:x}"
        self._next_job += 1
        self._jobs[job_id] = self._last_job = job
        if len(self._jobs) > MAX_JOBS_REMEMBERED:
            del self._jobs[next(iter(self._jobs))]
        line += notify.encode(job_id=job_id, version_mask=self._version_mask, clean=self._clean_due)
        self._clean_due = False
        self._last_notify = notify
        self._sent_at = now
        return line

    # Methods

    def _configure(self, params: list[object], now: float) -> object:
        extensions = params[0] if params and isinstance(params[0], list) else []
        options = params[1] if len(params) > 1 and isinstance(params[1], dict) else {}
        result: dict[str, object] = {}
        for extension in extensions:
            if not isinstance(extension, str):
                continue
            result[extension] = extension == "subscribe-extranonce"
            if extension == "version-rolling":
                # `min-bit-count` is for the pool to read, and an answer with it sends WhatsMiners into a loop.
                wanted = _hex_32_bits(options.get("version-rolling.mask", "ffffffff"))
                mask = self._pool_mask & (wanted or 0)
                if mask:
                    result[extension] = True
                    result["version-rolling.mask"] = f"{mask:08x}"
                self._version_mask = mask
        return result

    def _subscribe(self, params: list[object], now: float) -> object:
        if not self._subscribed:
            self._user_agent = _text(params[0])[:128] if params else ""
            closed = params[1] if len(params) > 1 else None
            # Who authorized before was judged without a user agent: again, and a refusal is the answer.
            self._authorize_again()
            self._subscribed = True
            if isinstance(closed, str) and self._resume is not None and (old := self._resume(closed)) is not None:
                self._take_over(old, now)
        sid = self.session_id
        subscriptions = [["mining.set_difficulty", sid], ["mining.notify", sid]]
        return [subscriptions, self.extranonce1.hex(), EXTRANONCE2_SIZE]

    def _take_over(self, old: Session, now: float) -> None:
        """Become the session that a miner lost: its submissions on the way are still good."""
        self.session_id, self.extranonce1 = old.session_id, old.extranonce1
        self._jobs, self._next_job, self._generation = old._jobs, old._next_job, old._generation
        self._clean_due = old._clean_due
        self._vardiff.suggest(old._vardiff.exponent_for(0), now)

    def _authorize(self, params: list[object], now: float) -> object:
        user = _text(params[0])[:256] if params else ""
        password = _text(params[1])[:256] if len(params) > 1 else ""
        if not user:
            raise StratumError(UNAUTHORIZED, "no user name: give a payout address")
        if user not in self._workers and len(self._workers) >= MAX_WORKERS:
            raise StratumError(UNAUTHORIZED, f"more than {MAX_WORKERS} user names on one connection")
        self._authorize_user(user, password)
        return True

    def _authorize_again(self) -> None:
        """The user agent has become known, and with it what the firmware takes."""
        for user, (_, password) in list(self._workers.items()):
            self._authorize_user(user, password)

    def _authorize_user(self, user: str, password: str) -> None:
        try:
            worker = self._desk.authorize(user=user, password=password, user_agent=self._user_agent)
            for other, _ in self._workers.values():
                if other.user != user and other.payout_script != worker.payout_script:
                    # A connection has one coinbase: this user's work would be paid to the other.
                    raise StratumError(
                        UNAUTHORIZED,
                        f"this connection mines for {other.address}: open another one for {worker.address}",
                    )
        except StratumError:
            self._workers.pop(user, None)
            raise
        else:
            self._workers[user] = (worker, password)
        finally:
            first, _ = next(iter(self._workers.values()), (None, ""))
            wanted = first.session_difficulty if first is not None else None
            self._vardiff.fix(None if wanted is None else exponent_of_difficulty(wanted))

    def _submit(self, params: list[object], now: float) -> object:
        user = _text(params[0])[:256] if params else ""
        worker, _ = self._workers.get(user) or next(iter(self._workers.values()), (None, ""))
        try:
            exponent, verdict = self._judge(user, params)
        except StratumError as error:
            reason = error.reason or reason_of(error.code)
            self._rejected[reason] = self._rejected.get(reason, 0) + 1
            if worker is not None:
                self._desk.note(worker, SubmissionOutcome(reason=reason))
            raise
        self._vardiff.on_submission(exponent, now)
        self._accepted += 1
        self._shares += verdict.is_share
        self._blocks += verdict.is_block
        assert worker is not None, "a submission of nobody is refused"
        self._desk.note(
            worker,
            SubmissionOutcome(
                reason=None,
                difficulty=float(difficulty_of_exponent(exponent)),
                best=DIFFICULTY_1_TARGET / max(verdict.hash_value, 1),
                is_share=verdict.is_share,
                is_block=verdict.is_block,
            ),
        )
        return True

    def _judge(self, user: str, params: list[object]) -> tuple[int, Verdict]:
        if not self._subscribed:
            raise StratumError(NOT_SUBSCRIBED, "not subscribed")
        if len(params) < 5:
            raise StratumError(OTHER, f"expected 5 or 6 parameters, got {len(params)}")
        job_id, extranonce2 = _text(params[1]), params[2]
        time, nonce = _hex_32_bits(params[3]), _hex_32_bits(params[4])
        version_bits = _hex_32_bits(params[5]) if len(params) > 5 and params[5] is not None else None
        if time is None or nonce is None or (version_bits is None and len(params) > 5 and params[5] is not None):
            raise StratumError(OTHER, "time, nonce and version bits: expected up to 8 hexadecimal digits each")
        if not isinstance(extranonce2, str) or not _EXTRANONCE2.fullmatch(extranonce2):
            raise StratumError(OTHER, f"extranonce2: expected {2 * EXTRANONCE2_SIZE} hexadecimal digits")
        job = self._jobs.get(job_id)
        if job is None:
            raise StratumError(STALE, "job not found") if self._workers else _not_authorized(user)
        submission = Submission(
            worker=user,
            job_id=job.desk_job_id,
            extranonce1=self.extranonce1,
            extranonce2=bytes.fromhex(extranonce2),
            time=time,
            nonce=nonce,
            version_bits=version_bits,
            version_mask=job.version_mask,
        )
        verdict = self._desk.judge(job.worker, submission)  # First of all: it could be a block.
        version = submission.header_version(job.version)
        key = submission.extranonce2 + (time << 64 | nonce << 32 | version).to_bytes(12, "big")
        if key in job.seen:
            raise StratumError(DUPLICATE, "duplicate")
        counts = verdict.is_share or verdict.is_block
        if not counts and verdict.hash_value > tolerant_target_of_exponent(job.exponent):
            raise StratumError(LOW_DIFFICULTY, "low difficulty")
        job.seen[key] = None
        if len(job.seen) > MAX_SUBMISSIONS_REMEMBERED:
            del job.seen[next(iter(job.seen))]
        if user not in self._workers:
            raise _not_authorized(user)
        if (verdict.stale or job.generation < self._generation) and not counts:
            raise StratumError(STALE, "stale")
        return job.exponent, verdict

    def _suggest_difficulty(self, params: list[object], now: float) -> object:
        difficulty = read_difficulty(_text(params[0])) if params else None
        if difficulty is None:
            raise StratumError(OTHER, "difficulty: expected a number above 0")
        self._vardiff.suggest(exponent_of_difficulty(difficulty), now)
        return True

    def _suggest_target(self, params: list[object], now: float) -> object:
        match = _HEX_256_BITS.fullmatch(_text(params[0])) if params else None
        if match is None or not (target := int(match[1], 16)):
            raise StratumError(OTHER, "target: expected up to 64 hexadecimal digits")
        self._vardiff.suggest(hardest_exponent_for(target), now)
        return True

    def _subscribe_extranonce(self, params: list[object], now: float) -> object:
        return True  # An extranonce1 lasts as long as its session: there is nothing to announce.

    def _ping(self, params: list[object], now: float) -> object:
        return "pong"

    def _get_transactions(self, params: list[object], now: float) -> object:
        return []


_METHODS: Final[Mapping[str, Callable[[Session, list[object], float], object]]] = {
    "mining.authorize": Session._authorize,
    "mining.configure": Session._configure,
    "mining.extranonce.subscribe": Session._subscribe_extranonce,
    "mining.get_transactions": Session._get_transactions,
    "mining.ping": Session._ping,
    "mining.submit": Session._submit,
    "mining.subscribe": Session._subscribe,
    "mining.suggest_difficulty": Session._suggest_difficulty,
    "mining.suggest_target": Session._suggest_target,
}


def _not_authorized(user: str) -> StratumError:
    return StratumError(UNAUTHORIZED, f"not authorized on this connection: {user}")


def _encode_id(identity: object) -> str | None:
    """A message's id as JSON, to be echoed with its type; None where it is not to be answered."""
    if type(identity) is int:
        return str(identity)
    if isinstance(identity, (str, bool)) or (isinstance(identity, float) and math.isfinite(identity)):
        return json.dumps(identity)
    return None


def _text(value: object) -> str:
    """A JSON string, or a number written as one, without what no log or page could print; "" for anything else."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _hex_32_bits(value: object) -> int | None:
    """One to eight hexadecimal digits: NerdMiner and others do not pad."""
    return int(value, 16) if isinstance(value, str) and _HEX_32_BITS.fullmatch(value) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
