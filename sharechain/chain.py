"""The sharechain: takes shares in any order and says which chain they make.

Theory of operation. Every valid share becomes an entry linked to its parent; the tip is the entry with the most
total work, the first seen of equals. ``accept`` is called with one share and the time, and returns what became
of it: it joined the chain (perhaps with shares that waited for it), it waits for something that this node does
not know yet, or it is known. A share that breaks a rule raises. What waits is bounded and is tried again when
what it waits for arrives: a missing share, a Bitcoin block, or the time in its header.

A share is only ever judged by its ancestors and constants. Windows are caches that are moved to wherever they
are needed; they hold nothing that entries do not say.

Pruning keeps two windows of history and a margin below the tip: one window that the next share is paid from,
and under it what is needed to check every share of that window again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sharechain.entry import ChainEntry, ancestors
from sharechain.errors import InvalidShare, ParamsError
from sharechain.params import MEDIAN_SPAN, Params
from sharechain.payout import Payouts, build_payouts
from sharechain.share import NULL_HASH, Share, share_id
from sharechain.validate import (
    BlockFacts,
    check_alone,
    check_bitcoin,
    check_coinbase,
    check_in_chain,
    window_work,
)
from sharechain.window import Window

__all__ = [
    "Accepted",
    "Buried",
    "ChainStatistics",
    "Duplicate",
    "Early",
    "Orphaned",
    "Outcome",
    "Sharechain",
    "Unanchored",
]

#: Shares that may wait at once, for anything. The one that began to wait first gives way.
MAX_WAITING: Final = 2_000
#: Seconds that a share may wait. What it waits for does not exist, or is found again with it by a later sync.
MAX_WAIT_S: Final = 1_800
#: Bodies that may wait under one header. Forging one costs no work, so that more would drive honest shares out.
MAX_BODIES: Final = 4
#: Heights between two sweeps of what pruned shares leave behind.
_SWEEP_INTERVAL: Final = 256
#: Heights of history kept besides two windows: reorgs down to here are followed.
PRUNE_MARGIN: Final = 500
#: Payouts of recent windows kept, so that siblings and jobs do not draw twice.
_PAYOUT_CACHE: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A share joined the chain, and what that changed."""

    #: The shares that joined, parents first: the one given and those that had waited for it.
    added: tuple[Share, ...]
    #: Hash of the tip before and after; None if there was no share.
    old_tip: bytes | None
    new_tip: bytes | None
    #: Hashes that left the main chain by a reorg, highest first.
    disconnected: tuple[bytes, ...] = ()
    #: Hashes that joined the main chain, lowest first.
    connected: tuple[bytes, ...] = ()
    #: Shares that had waited for this one and turned out to break a rule.
    rejected: tuple[tuple[Share, InvalidShare], ...] = ()
    #: (height, hash) of shares that history no longer holds.
    pruned: tuple[tuple[int, bytes], ...] = ()
    #: Hashes of Bitcoin blocks that no share of history builds on any more.
    forgotten_blocks: tuple[bytes, ...] = ()


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
class Duplicate:
    """The share is in the chain, or waits already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buried:
    """The share forks off below the history that is kept: it cannot be checked, and cannot win."""

    base_height: int


Outcome = Accepted | Orphaned | Early | Unanchored | Duplicate | Buried


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStatistics:
    """What a chain holds, at one moment."""

    shares: int
    height: int
    total_work: int
    base_height: int
    waiting: int
    waiting_dropped: int
    window_shares: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    share: Share
    keys: tuple[bytes, ...]
    since: float


class Sharechain:
    """The state of one share network in one node.

    Mutable fields: ``_entries`` (hash to entry) and ``_by_height`` (the same entries by height); ``_main`` (the
    main chain from ``_base_height`` up, whose last is the tip); ``_scripts`` (one object per payout script);
    ``_facts`` (Bitcoin blocks by hash); ``_waiting`` (by share id) with its indexes ``_wanted`` (what is missing,
    to share ids), ``_bodies`` (share hash to the ids that wait under it) and ``_early`` (a heap by time); the
    windows and payouts, which are caches. Invariant: every entry's parent and uncles are entries, down to
    ``_base_height``; ``_main`` is linked by parents.
    """

    def __init__(self, params: Params, *, max_waiting: int = MAX_WAITING, margin: int = PRUNE_MARGIN) -> None:
        if params.window_max_shares + margin < MEDIAN_SPAN + params.uncle_depth:
            raise ParamsError(
                "window_max_shares", "the window and the margin are shorter than what R6 and R9 look back"
            )
        self.params: Final = params
        self._entries: dict[bytes, ChainEntry] = {}
        self._by_height: dict[int, list[ChainEntry]] = {}
        self._main: list[ChainEntry] = []
        self._base_height = 0
        self._scripts: dict[bytes, bytes] = {}
        self._facts: dict[bytes, BlockFacts] = {}
        self._max_waiting = max_waiting
        self._margin = margin
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self._wanted: dict[bytes, set[bytes]] = {}
        self._bodies: dict[bytes, list[bytes]] = {}
        self._early: list[tuple[int, bytes]] = []
        self._swept_height = 0
        self._dropped = 0
        self._tip_window = Window(params)
        self._side_window = Window(params)
        self._payouts: OrderedDict[tuple[bytes, int, int, int], Payouts] = OrderedDict()

    # -- reading -------------------------------------------------------------------------------------------

    @property
    def tip(self) -> ChainEntry | None:
        """The valid share with the most total work, or None."""
        return self._main[-1] if self._main else None

    @property
    def base_height(self) -> int:
        """The lowest height that history holds."""
        return self._base_height

    @property
    def checkable_height(self) -> int:
        """The lowest height of a parent whose children can be checked: nothing that they need is below the base."""
        return self._base_height + self.params.window_max_shares + MEDIAN_SPAN + self.params.uncle_depth

    def __contains__(self, share_hash: bytes) -> bool:
        return share_hash in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, share_hash: bytes) -> ChainEntry | None:
        """The entry of a valid share, or None."""
        return self._entries.get(share_hash)

    def entries(self) -> Iterator[ChainEntry]:
        """All valid shares that history holds, lowest first, in the order seen within a height."""
        for height in sorted(self._by_height):
            yield from self._by_height[height]

    def main_entry(self, height: int) -> ChainEntry | None:
        """The main chain's share at a height, or None."""
        index = height - self._base_height
        return self._main[index] if 0 <= index < len(self._main) else None

    def is_main(self, entry: ChainEntry) -> bool:
        """Whether an entry is on the main chain."""
        return self.main_entry(entry.height) is entry

    def block_facts(self, block_hash: bytes) -> BlockFacts | None:
        """What was learned of a Bitcoin block, or None."""
        return self._facts.get(block_hash)

    def known_blocks(self) -> Mapping[bytes, BlockFacts]:
        """All Bitcoin blocks learned, by hash."""
        return self._facts

    def uncle_candidates(self, parent: ChainEntry | None) -> tuple[ChainEntry, ...]:
        """The uncles that a child of ``parent`` should name: the heaviest that R4 and R9 allow, ascending."""
        if parent is None or self.params.uncle_max == 0:
            return ()
        reach = list(ancestors(parent, self.params.uncle_depth + 1))
        allowed = {entry.hash for entry in reach[1:]}
        taken = {entry.hash for entry in reach} | {u.hash for entry in reach for u in entry.uncles}
        found = [
            entry
            for height in range(parent.height - self.params.uncle_depth + 1, parent.height + 1)
            for entry in self._by_height.get(height, ())
            if entry.hash not in taken and entry.parent is not None and entry.parent.hash in allowed
        ]
        found.sort(key=lambda entry: (-entry.work, entry.hash))
        return tuple(sorted(found[: self.params.uncle_max], key=lambda entry: entry.hash))

    def window_at(self, parent: ChainEntry | None, wanted_work: int) -> Window:
        """The window that ends at a share. It is the chain's own: read it before the next call.

        Args:
            parent: the share that it ends at, inside.
            wanted_work: ``window_work`` of the share to be paid for.
        """
        window = self._tip_window if parent is self.tip else self._side_window
        window.move_to(parent, wanted_work)
        return window

    def payouts(
        self, parent: ChainEntry | None, *, value: int, payout_class: int, max_bits: int, block_bits: int
    ) -> Payouts:
        """What the coinbase of a child of ``parent`` pays.

        Args:
            parent: the share to build on; None for the first of a chain.
            value: sat, of the whole coinbase.
            payout_class: one of the network's.
            max_bits: R7 of the child.
            block_bits: of the child's header.
        """
        wanted = window_work(self.params, max_bits, block_bits)
        parent_hash = NULL_HASH if parent is None else parent.hash
        key = (parent_hash, value, payout_class, wanted)
        cached = self._payouts.get(key)
        if cached is None:
            table = self.window_at(parent, wanted).table
            cached = build_payouts(self.params, table, value=value, parent=parent_hash, payout_class=payout_class)
            self._payouts[key] = cached
            if len(self._payouts) > _PAYOUT_CACHE:
                self._payouts.popitem(last=False)
        return cached

    def locator(self) -> tuple[bytes, ...]:
        """Hashes of the main chain from the tip down, ever further apart: enough to find a fork quickly."""
        hashes, index, step = [], len(self._main) - 1, 1
        while index > 0:
            hashes.append(self._main[index].hash)
            if len(hashes) >= 10:
                step *= 2
            index -= step
        if self._main:
            hashes.append(self._main[0].hash)
        return tuple(hashes)

    def after_locator(self, locator: Sequence[bytes], limit: int) -> tuple[bytes, ...]:
        """Hashes of the main chain above the first known share of another node's locator, lowest first."""
        start = 0
        for share_hash in locator:
            entry = self._entries.get(share_hash)
            if entry is not None and self.is_main(entry):
                start = entry.height - self._base_height + 1
                break
        return tuple(entry.hash for entry in self._main[start : start + limit])

    def missing(self) -> tuple[bytes, ...]:
        """Hashes that waiting shares lack: of shares and of Bitcoin blocks."""
        return tuple(self._wanted)

    def statistics(self) -> ChainStatistics:
        """Counts of everything that the chain holds."""
        tip = self.tip
        return ChainStatistics(
            shares=len(self._entries),
            height=-1 if tip is None else tip.height,
            total_work=0 if tip is None else tip.total_work,
            base_height=self._base_height,
            waiting=len(self._waiting),
            waiting_dropped=self._dropped,
            window_shares=len(self._tip_window),
        )

    # -- changing ------------------------------------------------------------------------------------------

    def accept(self, share: Share, now: float) -> Outcome:
        """Take a share in.

        Args:
            share: decoded or just mined.
            now: Unix seconds.

        Returns:
            What became of it.

        Raises:
            InvalidShare: it breaks a rule; the chain is as before.
        """
        check_alone(self.params, share)
        if share.hash in self._entries or self._is_waiting(share):
            return Duplicate()
        old_tip = self.tip
        verdict = self._judge(share, now)
        if not isinstance(verdict, ChainEntry):
            if not isinstance(verdict, Buried):
                self._wait(share_id(share.encoded), share, verdict, now)
            return verdict
        added, rejected = self._judge_again(self._wanted.pop(share.hash, ()), now)
        return self._adopt(old_tip, [share, *added], rejected)

    def learn_block(self, block_hash: bytes, facts: BlockFacts, now: float) -> Outcome | None:
        """Take in what Bitcoin says of a block, and judge the shares that waited for it.

        Returns:
            An ``Accepted`` if shares joined or were rejected, else None.
        """
        self._facts[block_hash] = facts
        return self._retry(self._wanted.pop(block_hash, set()), now)

    def release(self, now: float) -> Outcome | None:
        """Judge the shares that waited for their header time, and drop what waited too long.

        Returns as ``learn_block``.
        """
        due: list[bytes] = []
        while self._early and self._early[0][0] <= now:
            due.append(heapq.heappop(self._early)[1])
        outcome = self._retry(due, now)
        for identity in [key for key, waiting in self._waiting.items() if now - waiting.since > MAX_WAIT_S]:
            self._forget(identity)
            self._dropped += 1
        return outcome

    def restore(
        self,
        shares: Iterable[Share],
        *,
        facts: Mapping[bytes, BlockFacts],
        tip: bytes | None,
    ) -> None:
        """Load shares that were valid when they were stored, without judging them again.

        Args:
            shares: lowest first; a parent or uncle that does not come before its child ends history there.
            facts: Bitcoin blocks by hash.
            tip: hash of the tip when stored: decides between equals. None takes the first of the heaviest.

        Raises:
            InvalidShare: R5, if the shares do not make one chain up to ``tip``.
        """
        self._facts.update(facts)
        lowest: int | None = None
        best: ChainEntry | None = None
        for share in shares:
            lowest = share.data.height if lowest is None else lowest
            parent = self._entries.get(share.data.parent)
            uncles = tuple(entry for u in share.data.uncles if (entry := self._entries.get(u)) is not None)
            if parent is None and share.data.height > lowest:
                raise InvalidShare("R5", f"share {share.hash[::-1].hex()} is stored without its parent")
            entry = self._link(share, parent, uncles)
            if best is None or entry.total_work > best.total_work:
                best = entry
        if lowest is None or best is None:
            return
        if tip is not None:
            stored = self._entries.get(tip)
            if stored is None:
                raise InvalidShare("R5", "the stored tip is not among the stored shares")
            if stored.total_work < best.total_work:
                raise InvalidShare("R5", "a stored share has more work than the stored tip")
            best = stored
        self._base_height = lowest
        self._main = list(ancestors(best, best.height - lowest + 1))[::-1]

    # -- inside --------------------------------------------------------------------------------------------

    def _judge(self, share: Share, now: float) -> ChainEntry | Orphaned | Early | Unanchored | Buried:
        """Check a share against its chain; links it if it is valid."""
        data = share.data
        if share.time > now + self.params.future_limit_s:
            return Early(until=share.time - self.params.future_limit_s)
        parent = self._entries.get(data.parent)
        uncles = tuple(entry for u in data.uncles if (entry := self._entries.get(u)) is not None)
        if (parent is None and data.parent != NULL_HASH) or len(uncles) < len(data.uncles):
            if data.height < self._base_height:
                return Buried(base_height=self._base_height)
            wanted = (data.parent, *data.uncles) if data.parent != NULL_HASH else data.uncles
            return Orphaned(missing=tuple(h for h in wanted if h not in self._entries))
        if self._base_height and (parent is None or parent.height < self.checkable_height):
            return Buried(base_height=self._base_height)
        check_in_chain(self.params, share, parent, uncles)
        facts = self._facts.get(share.previous_block_hash)
        if facts is None:
            return Unanchored(block_hash=share.previous_block_hash)
        check_bitcoin(share, facts)
        payouts = self.payouts(
            parent,
            value=share.coinbase_value,
            payout_class=data.payout_class,
            max_bits=data.max_bits,
            block_bits=share.block_bits,
        )
        check_coinbase(self.params, share, payouts)
        return self._link(share, parent, uncles)

    def _link(self, share: Share, parent: ChainEntry | None, uncles: tuple[ChainEntry, ...]) -> ChainEntry:
        script = self._scripts.setdefault(share.data.payout_script, share.data.payout_script)
        entry = ChainEntry(share, parent, uncles, script)
        self._entries[entry.hash] = entry
        self._by_height.setdefault(entry.height, []).append(entry)
        return entry

    def _judge_again(
        self, identities: Iterable[bytes], now: float
    ) -> tuple[list[Share], list[tuple[Share, InvalidShare]]]:
        """Judge waiting shares whose reason to wait is gone, then what waited for those that joined, and so on."""
        added: list[Share] = []
        rejected: list[tuple[Share, InvalidShare]] = []
        queue = sorted(identities)
        for identity in queue:  # grows while it is walked
            waiting = self._forget(identity)
            if waiting is None or waiting.share.hash in self._entries:
                continue
            try:
                verdict = self._judge(waiting.share, now)
            except InvalidShare as error:
                rejected.append((waiting.share, error))
                continue
            if isinstance(verdict, ChainEntry):
                added.append(waiting.share)
                queue += sorted(self._wanted.pop(verdict.hash, ()))
            elif not isinstance(verdict, Buried):
                self._wait(identity, waiting.share, verdict, waiting.since)
        return added, rejected

    def _retry(self, identities: Iterable[bytes], now: float) -> Outcome | None:
        old_tip = self.tip
        added, rejected = self._judge_again(identities, now)
        if not added and not rejected:
            return None
        return self._adopt(old_tip, added, rejected)

    def _is_waiting(self, share: Share) -> bool:
        bodies = self._bodies.get(share.hash)
        return bodies is not None and share_id(share.encoded) in bodies

    def _wait(self, identity: bytes, share: Share, verdict: Orphaned | Early | Unanchored, since: float) -> None:
        bodies = self._bodies.setdefault(share.hash, [])
        if len(bodies) >= MAX_BODIES:  # the first were there before a forger could see the header
            self._dropped += 1
            return
        bodies.append(identity)
        if isinstance(verdict, Early):
            heapq.heappush(self._early, (verdict.until, identity))
            keys: tuple[bytes, ...] = ()
        elif isinstance(verdict, Orphaned):
            keys = verdict.missing
        else:
            keys = (verdict.block_hash,)
        for key in keys:
            self._wanted.setdefault(key, set()).add(identity)
        self._waiting[identity] = _Waiting(share=share, keys=keys, since=since)
        if len(self._waiting) > self._max_waiting:
            self._forget(next(iter(self._waiting)))
            self._dropped += 1

    def _forget(self, identity: bytes) -> _Waiting | None:
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            bodies = self._bodies[waiting.share.hash]
            bodies.remove(identity)
            if not bodies:
                del self._bodies[waiting.share.hash]
        for key in waiting.keys if waiting is not None else ():
            wanting = self._wanted.get(key)
            if wanting is not None:
                wanting.discard(identity)
                if not wanting:
                    del self._wanted[key]
        if len(self._early) > 2 * self._max_waiting:  # dropped shares left their times behind
            self._early = [(until, key) for until, key in self._early if key in self._waiting]
            heapq.heapify(self._early)
        return waiting

    def _adopt(
        self,
        old_tip: ChainEntry | None,
        added: Sequence[Share],
        rejected: Sequence[tuple[Share, InvalidShare]],
    ) -> Accepted:
        """Choose the tip among the old one and the shares added, and move the main chain to it."""
        best = old_tip
        for share in added:
            entry = self._entries[share.hash]
            if best is None or entry.total_work > best.total_work:
                best = entry
        disconnected: list[ChainEntry] = []
        connected: list[ChainEntry] = []
        if best is not old_tip:
            fork = best
            while fork is not None and not self.is_main(fork):
                connected.append(fork)
                fork = fork.parent
            keep = 0 if fork is None else fork.height - self._base_height + 1
            disconnected = self._main[keep:][::-1]
            self._main[keep:] = connected[::-1]
        pruned, forgotten = self._prune()
        return Accepted(
            added=tuple(added),
            old_tip=None if old_tip is None else old_tip.hash,
            new_tip=None if best is None else best.hash,
            disconnected=tuple(entry.hash for entry in disconnected),
            connected=tuple(entry.hash for entry in reversed(connected)),
            rejected=tuple(rejected),
            pruned=pruned,
            forgotten_blocks=forgotten,
        )

    def _prune(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[bytes, ...]]:
        """Forget history that nothing can need any more: (height, hash) of shares, and hashes of Bitcoin blocks."""
        if not self._main:
            return (), ()
        base = self._main[-1].height - 2 * self.params.window_max_shares - self._margin
        pruned: list[tuple[int, bytes]] = []
        while self._base_height < base:
            for entry in self._by_height.pop(self._base_height, ()):
                del self._entries[entry.hash]
                pruned.append((entry.height, entry.hash))
            self._base_height += 1
            for entry in self._by_height.get(self._base_height, ()):
                # Lets go of everything below. No window reaches down here: see checkable_height.
                entry.parent = None
                entry.uncles = ()
        if not pruned:
            return (), ()
        del self._main[: self._base_height - self._main[0].height]
        for window in (self._tip_window, self._side_window):
            if window.oldest is not None and window.oldest.height <= self._base_height:
                window.clear()  # was left behind on an old fork
        return tuple(pruned), self._sweep()

    def _sweep(self) -> tuple[bytes, ...]:
        if self._base_height - self._swept_height < _SWEEP_INTERVAL:
            return ()
        self._swept_height = self._base_height
        self._scripts = {entry.payout_script: entry.payout_script for entry in self._entries.values()}
        lowest = min(entry.block_height for entry in self._entries.values()) - 1
        forgotten = tuple(block for block, facts in self._facts.items() if facts.height < lowest)
        for block in forgotten:
            del self._facts[block]
        return forgotten
