"""Shares that cannot be judged yet, and what each of them waits for.

Nothing is known of such a share but its own proof of work, and under one header any number of bodies can be forged
without any. So all of it is bounded: how many wait, how many under one header, and how long. What gives way is found
again by a later sync, with what it waited for. The limits are local, never consensus: they change when a share is
judged, not how.

A share is judged again when one thing that it waits for has come, even if others are still missing: then it waits
anew, for these. The pool only says whose turn it is; the chain judges.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from sharechain.share import Share, share_id

__all__ = ["Early", "Orphaned", "Unanchored", "WaitingShare", "WaitingShares"]

#: Shares that may wait at once, for anything. The one that began to wait first gives way.
MAX_WAITING: Final = 2_000
#: Seconds that a share may wait. What it waits for does not exist, or is found again with it by a later sync.
MAX_WAIT_S: Final = 1_800
#: Bodies that may wait under one header. Forging one costs no work, so that more would drive honest shares out.
MAX_BODIES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphaned:
    """The share waits for shares that are not known: its parent or an uncle. Not an error."""

    missing: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Early:
    """The share's header time is ahead of this node's clock; it waits until then (Unix seconds)."""

    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unanchored:
    """The share's header builds on a Bitcoin block that this node does not know yet; it waits."""

    block_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingShare:
    """A share that waits."""

    share: Share
    #: Hashes of the shares that it lacks.
    shares: tuple[bytes, ...]
    #: Hash of the Bitcoin block that it lacks.
    block: bytes | None
    #: Unix seconds.
    since: float


class WaitingShares:
    """The shares of one chain that wait, by their ids (``share_id``).

    Mutable fields: ``_waiting`` (by id, the first to give way first) with its indexes ``_wanted`` (missing share, to
    ids), ``_unanchored`` (missing Bitcoin block, to ids), ``_bodies`` (share hash, to the ids that wait under it) and
    ``_early`` (a heap of times and ids); ``dropped`` (how many were given up for a limit, ever). Invariant: ids in
    ``_wanted``, ``_unanchored`` and ``_bodies`` wait, and no key there is left without ids. An id that waits is in
    ``_bodies``, and under everything that it lacks until that has come; whoever says that it has come takes the ids
    out at once. ``_early`` may hold ids that wait no longer: they are passed over, and swept when they are many.
    """

    def __init__(self, limit: int) -> None:
        self._limit: Final = limit
        self._waiting: OrderedDict[bytes, WaitingShare] = OrderedDict()
        self._wanted: dict[bytes, set[bytes]] = {}
        self._unanchored: dict[bytes, set[bytes]] = {}
        self._bodies: dict[bytes, list[bytes]] = {}
        self._early: list[tuple[int, bytes]] = []
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, share: Share) -> bool:
        """Whether this very share waits: another body under its header does not count."""
        bodies = self._bodies.get(share.hash)
        return bodies is not None and share_id(share.encoded) in bodies

    def missing_shares(self) -> tuple[bytes, ...]:
        """Hashes of the shares that are lacking."""
        return tuple(self._wanted)

    def missing_blocks(self) -> tuple[bytes, ...]:
        """Hashes of the Bitcoin blocks that are lacking."""
        return tuple(self._unanchored)

    def add(self, identity: bytes, share: Share, reason: Orphaned | Early | Unanchored, since: float) -> None:
        """Let a share wait. It is dropped if others wait under its header, and another if too many wait.

        Args:
            identity: the share's id; it does not wait yet.
            share: it passed the rules that need no chain.
            reason: what it waits for.
            since: Unix seconds; if it was judged again, when it first began to wait.
        """
        bodies = self._bodies.setdefault(share.hash, [])
        if len(bodies) >= MAX_BODIES:  # the first were there before a forger could see the header
            self.dropped += 1
            return
        bodies.append(identity)
        missing = reason.missing if isinstance(reason, Orphaned) else ()
        block = reason.block_hash if isinstance(reason, Unanchored) else None
        if isinstance(reason, Early):
            heapq.heappush(self._early, (reason.until, identity))
        for share_hash in missing:
            self._wanted.setdefault(share_hash, set()).add(identity)
        if block is not None:
            self._unanchored.setdefault(block, set()).add(identity)
        self._waiting[identity] = WaitingShare(share=share, shares=missing, block=block, since=since)
        if len(self._waiting) > self._limit:
            self.take(next(iter(self._waiting)))
            self.dropped += 1

    def share(self, identity: bytes) -> Share | None:
        """A waiting share, which goes on waiting; None if it does not wait."""
        waiting = self._waiting.get(identity)
        return None if waiting is None else waiting.share

    def take(self, identity: bytes) -> WaitingShare | None:
        """Take a share out of all fields; None if it does not wait."""
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            bodies = self._bodies[waiting.share.hash]
            bodies.remove(identity)
            if not bodies:
                del self._bodies[waiting.share.hash]
            for share_hash in waiting.shares:
                _discard(self._wanted, share_hash, identity)
            if waiting.block is not None:
                _discard(self._unanchored, waiting.block, identity)
        if len(self._early) > 2 * self._limit:  # dropped shares left their times behind
            self._early = [(until, key) for until, key in self._early if key in self._waiting]
            heapq.heapify(self._early)
        return waiting

    def share_came(self, share_hash: bytes) -> set[bytes]:
        """A share joined the chain. Returns the ids that lacked it: each is to be taken, and judged again."""
        return self._wanted.pop(share_hash, set())

    def block_came(self, block_hash: bytes) -> set[bytes]:
        """A Bitcoin block became known. Returns as ``share_came``."""
        return self._unanchored.pop(block_hash, set())

    def time_came(self, now: float, limit: int) -> list[bytes]:
        """Returns up to ``limit`` ids of early shares whose time has come, as ``share_came``, perhaps among others.

        The others were early once, and wait for something else now, or no longer: no harm to judge those that do.
        """
        due: list[bytes] = []
        while self._early and self._early[0][0] <= now and len(due) < limit:
            due.append(heapq.heappop(self._early)[1])
        return due

    def expire(self, now: float) -> None:
        """Drop what has waited for more than ``MAX_WAIT_S``."""
        for identity in [key for key, waiting in self._waiting.items() if now - waiting.since > MAX_WAIT_S]:
            self.take(identity)
            self.dropped += 1

    def replace(self, other: WaitingShares) -> None:
        """Drop all that waits, and take over what waits in another pool, which must not be used any more.

        The limit stays; the drops of both are counted.
        """
        self._waiting = other._waiting
        self._wanted = other._wanted
        self._unanchored = other._unanchored
        self._bodies = other._bodies
        self._early = other._early
        self.dropped += other.dropped


def _discard(index: dict[bytes, set[bytes]], key: bytes, identity: bytes) -> None:
    """Take an identity from an index, and the key with the last one."""
    found = index.get(key)
    if found is not None:
        found.discard(identity)
        if not found:
            del index[key]
