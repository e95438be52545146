"""Who has mined how much: hash rates, outcomes and records of each worker, each address and the node. Pure.

Theory of operation. An accepted submission is worth the difficulty of its job. A `Meter` keeps four decaying sums of
it, one for each span; a sum over the time that it stands for is a mean hash rate in which what is older than the span
weighs little. Time that nobody ran the node counts as time without work.

The books are kept over restarts: `encode` and `decode` are lines of JSON, the node's own first. They are bounded: a
miner may invent worker names, so those unheard of for longest are forgotten first, and everyone after `FORGET_S`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

from p2pool.stratum.values import SubmissionOutcome
from p2pool.stratum.vardiff import HASHES_PER_DIFFICULTY

SPANS_S: Final[Mapping[str, float]] = {"1m": 60.0, "10m": 600.0, "1h": 3600.0, "24h": 86400.0}
"""The hash rates that are kept, by name, with the time constant of each mean."""
LEAST_SEEN_S: Final = 10.0
"""Of a worker just met: its first submissions, a moment after it came, say little of its speed."""
MAX_ROWS: Final = 10_000
"""Of workers, and of addresses."""
FORGET_S: Final = 7 * 86400.0
"""Without a submission."""
RECENT_S: Final = 600.0
"""A worker heard within is counted as one that mines."""

FOLD_S: Final = 1.0
"""Accepted work is gathered for so long before it enters the sums, as that takes four exponentials."""
ROWS_A_PART: Final = 200
"""Encoded in one stretch: a millisecond or two."""

_VERSION: Final = 1
_Key = TypeVar("_Key")


class Meter:
    """The mean difficulty per second over each of `SPANS_S`.

    Mutable state: `sums`, decayed to `updated_at`; `_fresh` is work that came less than `FOLD_S` later and is not in
    them yet; `started_at` is when measuring began. Unix seconds.
    """

    __slots__ = ("_fresh", "started_at", "sums", "updated_at")

    def __init__(self, started_at: float, updated_at: float, sums: list[float]) -> None:
        self.started_at = started_at
        self.updated_at = updated_at
        self.sums = sums
        self._fresh = 0.0

    def add(self, difficulty: float, now: float) -> None:
        """Count an accepted submission."""
        self._fresh += difficulty
        if now - self.updated_at >= FOLD_S:
            passed_s = now - self.updated_at
            self.sums = [
                total * math.exp(-passed_s / span_s) + self._fresh
                for total, span_s in zip(self.sums, SPANS_S.values(), strict=True)
            ]
            self.updated_at, self._fresh = now, 0.0

    def settle(self) -> None:
        """Enter all work in the sums."""
        self.sums = [total + self._fresh for total in self.sums]
        self._fresh = 0.0

    def rates(self, now: float) -> dict[str, float]:
        """Hashes per second, by the name of the span."""
        passed_s = max(0.0, now - self.updated_at)
        seen_s = max(now - self.started_at, LEAST_SEEN_S)
        rates = {}
        for total, (name, span_s) in zip(self.sums, SPANS_S.items(), strict=True):
            stands_for_s = -span_s * math.expm1(-seen_s / span_s)
            rates[name] = (total + self._fresh) * math.exp(-passed_s / span_s) / stands_for_s * HASHES_PER_DIFFICULTY
        return rates


class Record:
    """The books of one worker, one address, or all. Every attribute is mutable.

    Attributes:
        meter: of the accepted work.
        accepted, shares, blocks: submissions, and how many of them were one.
        difficulty: of all accepted submissions together.
        rejected: submissions by reason.
        best, best_at: the highest difficulty that a hash met, and when; 0.0 and None before.
        first_seen, last_seen: submissions of any outcome.
    """

    __slots__ = (
        *("accepted", "best", "best_at", "blocks", "difficulty"),
        *("first_seen", "last_seen", "meter", "rejected", "shares"),
    )

    def __init__(self, now: float) -> None:
        self.meter = Meter(now, now, [0.0] * len(SPANS_S))
        self.accepted = self.shares = self.blocks = 0
        self.difficulty = 0.0
        self.rejected: dict[str, int] = {}
        self.best = 0.0
        self.best_at: float | None = None
        self.first_seen = self.last_seen = now

    def note(self, outcome: SubmissionOutcome, now: float) -> None:
        """Enter a submission."""
        self.last_seen = max(self.last_seen, now)
        if outcome.reason is not None:
            self.rejected[outcome.reason] = self.rejected.get(outcome.reason, 0) + 1
            return
        self.accepted += 1
        self.shares += outcome.is_share
        self.blocks += outcome.is_block
        self.difficulty += outcome.difficulty
        self.meter.add(outcome.difficulty, now)
        if outcome.best > self.best:
            self.best, self.best_at = outcome.best, now

    def row(self, now: float) -> dict[str, Any]:
        """For people and programs."""
        return {
            **{f"hash_rate_{name}": rate for name, rate in self.meter.rates(now).items()},
            "accepted": self.accepted,
            "rejected": dict(self.rejected),
            "shares": self.shares,
            "blocks": self.blocks,
            "difficulty": self.difficulty,
            "best": self.best,
            "best_at": self.best_at,
            "first_seen": self.first_seen,
            "last_seen": self.last_seen,
        }

    def encode(self) -> list[Any]:
        """As JSON keeps it."""
        meter = self.meter
        meter.settle()
        return [
            *(meter.started_at, meter.updated_at, meter.sums, self.accepted, self.shares, self.blocks),
            *(self.difficulty, self.rejected, self.best, self.best_at, self.first_seen, self.last_seen),
        ]

    @classmethod
    def decode(cls, raw: object) -> Record:
        """The inverse of `encode`. Raises: ValueError."""
        match raw:
            case [started, updated, [*sums], accepted, shares, blocks, difficulty, dict(rejected), best, at, *seen]:
                record = cls(0.0)
                record.meter = Meter(_number(started), _number(updated), [_number(total) for total in sums])
                record.accepted, record.shares, record.blocks = _count(accepted), _count(shares), _count(blocks)
                record.difficulty, record.best = _number(difficulty), _number(best)
                record.rejected = {str(reason): _count(count) for reason, count in rejected.items()}
                record.best_at = None if at is None else _number(at)
                if len(sums) == len(SPANS_S) and len(seen) == 2:
                    record.first_seen, record.last_seen = _number(seen[0]), _number(seen[1])
                    return record
        raise ValueError("not the books of a worker")


class Accounting:
    """The books of a node.

    Mutable state: `_workers` by address and worker name, and `_addresses`, both with whoever was heard last at the
    end, and at most `MAX_ROWS`; `_all`, the node's own.
    """

    def __init__(self, now: float) -> None:
        self._workers: dict[tuple[str, str], Record] = {}
        self._addresses: dict[str, Record] = {}
        self._all = Record(now)

    def note(self, *, address: str, worker: str, outcome: SubmissionOutcome, now: float) -> None:
        """Enter a submission.

        Arguments:
            address: who is paid for it.
            worker: the name behind the address; may be empty.
            now: Unix seconds.
        """
        key = (address, worker)
        record = self._workers.pop(key, None) or Record(now)
        self._workers[key] = record
        record.note(outcome, now)
        of_address = self._addresses.pop(address, None) or Record(now)
        self._addresses[address] = of_address
        of_address.note(outcome, now)
        self._all.note(outcome, now)
        if len(self._workers) > MAX_ROWS:
            del self._workers[next(iter(self._workers))]
        if len(self._addresses) > MAX_ROWS:
            del self._addresses[next(iter(self._addresses))]

    def hash_rate(self, address: str, now: float) -> float:
        """Of an address, in hashes per second over ten minutes; 0.0 for an unknown one."""
        record = self._addresses.get(address)
        return 0.0 if record is None else record.meter.rates(now)["10m"]

    def totals(self, now: float) -> dict[str, Any]:
        """The node's own row, with the number of workers that mine."""
        recent = 0
        for record in reversed(self._workers.values()):
            if now - record.last_seen > RECENT_S:
                break
            recent += 1
        return {"workers": recent, **self._all.row(now)}

    def addresses(self, now: float) -> list[dict[str, Any]]:
        """A row for each address, in order."""
        return [{"address": address, **record.row(now)} for address, record in sorted(self._addresses.items())]

    def workers(self, now: float) -> list[dict[str, Any]]:
        """A row for each worker, in order of address and name."""
        return [
            {"address": address, "worker": worker, **record.row(now)}
            for (address, worker), record in sorted(self._workers.items())
        ]

    def __len__(self) -> int:
        return len(self._workers)

    def encode(self, now: float) -> Iterator[bytes]:
        """What `decode` reads back when joined. Between two parts other things may be done, entries among them.

        Forgets who was not heard for long.
        """
        _forget(self._workers, now)
        _forget(self._addresses, now)
        yield _line([_VERSION, self._all.encode()])
        addresses, workers = list(self._addresses.items()), list(self._workers.items())
        for start in range(0, len(addresses), ROWS_A_PART):
            part = addresses[start : start + ROWS_A_PART]
            yield b"".join(_line([address, record.encode()]) for address, record in part)
        for start in range(0, len(workers), ROWS_A_PART):
            rows = workers[start : start + ROWS_A_PART]
            yield b"".join(_line([address, worker, record.encode()]) for (address, worker), record in rows)

    @classmethod
    def decode(cls, encoded: bytes) -> Accounting:
        """Books that were kept.

        Raises:
            ValueError: these are none.
        """
        first, *lines = encoded.splitlines() or [b""]
        match _value(first):
            case [1, whole]:
                books = cls(0.0)
                books._all = Record.decode(whole)
            case _:
                raise ValueError("not the books of a node, or of another version")
        for line in lines[: 2 * MAX_ROWS]:
            match _value(line):
                case [str(address), record]:
                    books._addresses[address] = Record.decode(record)
                case [str(address), str(worker), record]:
                    books._workers[address, worker] = Record.decode(record)
                case _:
                    raise ValueError("not the books of a worker")
        return books


def _line(row: list[Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _value(line: bytes) -> object:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("not the books of a node") from None


def _forget(table: dict[_Key, Record], now: float) -> None:
    for key, record in list(table.items()):
        if now - record.last_seen <= FORGET_S:
            break
        del table[key]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise ValueError(f"a number from 0 is needed, got {value!r}")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"a count is needed, got {value!r}")
    return value
