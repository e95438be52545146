"""The sharechain: takes shares in any order and says which chain they make.

Theory of operation. Every valid share becomes an entry linked to its parent; the tip is the entry with the most
total work, the first seen of equals. ``accept`` is called with one share and the time, and returns what became
of it: it joined the chain (perhaps with shares that waited for it), it waits for something that this node does
not know yet, or it is known. A share that breaks a rule raises. What waits (``sharechain/waiting.py``) is bounded and
is tried again when what it waits for arrives: a missing share, a Bitcoin block, or the time in its header.

A share is only ever judged by its ancestors and constants. Windows are caches that are moved to wherever they
are needed; they hold nothing that entries do not say.

Pruning keeps two windows of history and a margin below the tip: one window that the next share is paid from,
and under it what is needed to check every share of that window again.

A node that joins late gets its history from nodes that have pruned theirs, so that the parent of its lowest share
is known to nobody. ``begin_history`` takes the lowest ``uncle_depth`` + 1 shares of the main chain on trust, the
*foot*. Above it, shares up to ``checkable_height`` are judged in part: by every rule that can read what it needs,
and never by R10, whose window would reach below. From there on every share is judged in full.

- The foot is one line, taken at once, and every tip descends from all of it. What it claims (total work, uncles
  that nobody has) is therefore the same for all branches and decides nothing between them. From the first share
  above it R5 is exact again.
- Beside the foot there are shares too, which those above it name as uncles. They may lack uncles of their own, so
  that the total work that they claim is nobody's proof. They count as uncles only: none is ever the tip, and what
  builds on one is buried.
- The windows that R10 judges by end above ``checkable_height``, so they hold no share of the foot and no uncle that
  is missing. What lies between is real proof of work (R3, R7), and is paid only through them.
- Histories that have no share in common are compared by ``proven_work``, which leaves the foot's claims out.

Judging in part ends as soon as history is as long as pruning would leave it. From then on the chain is like any
other: what forks off below ``checkable_height`` is buried. Until then (``short_history``) it is judged in part, as a
fork that others judge in full must be followed here too. Which of both it is goes into every change and from there
into the store; lengths do not tell, as a reorg may have made the main chain shorter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sharechain.entry import ChainEntry, ancestors
from sharechain.errors import InvalidShare, ParamsError
from sharechain.params import MEDIAN_SPAN, Params
from sharechain.payout import Payouts, build_payouts
from sharechain.share import NULL_HASH, Share, share_id
from sharechain.validate import (
    BlockFacts,
    check_alone,
    check_base,
    check_bitcoin,
    check_coinbase,
    check_in_chain,
    window_work,
)
from sharechain.waiting import MAX_WAITING, Early, Orphaned, Unanchored, WaitingShares
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

#: Early shares judged in one call: all of them may have one time.
MAX_RELEASED: Final = 64
#: Heights between two sweeps of what pruned shares leave behind.
_SWEEP_INTERVAL: Final = 256
#: Heights of history kept besides two windows: reorgs down to here are followed.
PRUNE_MARGIN: Final = 500
#: Heights above the base at which a node that knows nothing of our history is told to begin, if there are so many to
#: spare: the base moves up while it fetches.
BEGIN_ABOVE_BASE: Final = 100
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
    #: Whether history is short after it (``Sharechain.short_history``): the store must know.
    short_history: bool = False


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


class Sharechain:
    """The state of one share network in one node.

    Mutable fields: ``_entries`` (hash to entry) and ``_by_height`` (the same entries by height); ``_main`` (the
    main chain from ``_base_height`` up, whose last is the tip); ``_short`` (whether history was begun in the middle
    and is not yet as long as pruning leaves it); ``_scripts`` (one object per payout script);
    ``_facts`` (Bitcoin blocks by hash); ``_waiting`` (the shares that wait); ``_swept_height`` (the base at the last
    sweep); the windows and payouts, which are caches. Invariant: every entry's parent and uncles are entries, down to
    ``_base_height``; ``_main`` is linked by parents; while ``_short``, nothing has been pruned, and all entries above
    the foot descend from the whole foot.
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
        self._short = False
        self._scripts: dict[bytes, bytes] = {}
        self._facts: dict[bytes, BlockFacts] = {}
        self._margin = margin
        self._waiting = WaitingShares(max_waiting)
        self._swept_height = 0
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

    @property
    def _foot_height(self) -> int:
        """The highest height of the foot. Module docstring."""
        return self._base_height + self.params.uncle_depth

    @property
    def short_history(self) -> bool:
        """Whether history was begun on trust and is still shorter than pruning would leave it."""
        return self._short

    @property
    def judges_in_full(self) -> bool:
        """Whether children of the tip are judged by every rule, so that one may build on it."""
        tip = self.tip
        return self._base_height == 0 or (tip is not None and tip.height >= self.checkable_height)

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
        """What another node lacks above the first share of its locator that is on our main chain.

        The hashes are in an order in which each share can be judged at once: before each share of the main chain
        those that it names, and that these name. At the tip follow the shares that the next one could name, the
        heaviest first. If nothing of the locator is known and history is pruned, the first ``uncle_depth`` + 1
        hashes are the foot to begin with, a little above our base.

        Args:
            locator: the other node's, from its tip down to its base; or only the last hash that it was given. Unknown
                hashes and those of side branches are passed over.
            limit: at most so many hashes, and as few less as it takes to end with a share of the main chain. One
                that has more before it than fits comes with the highest of these; the rest is to be asked for.
        """
        if not self._main or limit < 1:
            return ()
        known = next((e for h in locator if (e := self._entries.get(h)) is not None and self.is_main(e)), None)
        given: dict[bytes, None] = {}
        if known is not None:
            lowest = self._entries.get(locator[-1]) if len(locator) > 1 else None
            first = known.height + 1
            least = lowest.height + 1 if lowest is not None and self.is_main(lowest) else self._base_height
        elif self._base_height == 0:
            first = least = 0
        else:
            spare = self._main[-1].height - self.params.window_max_shares - self.checkable_height
            start = self._base_height + max(0, min(BEGIN_ABOVE_BASE, spare))
            first = least = start + 1
            for entry in self._main[start - self._base_height :][: min(limit, self.params.uncle_depth + 1)]:
                given[entry.hash] = None
        index = first - self._base_height
        for entry in (*self._main[index : index + limit], *self._beside_tip(first + limit)):
            if len(given) >= limit or not self._give(entry, first, least, given, limit):
                break
        return tuple(given)

    def _give(self, entry: ChainEntry, first: int, least: int, given: dict[bytes, None], limit: int) -> bool:
        """Add a share to an answer, and before it what it needs; False if there is no room.

        Args:
            entry: on the main chain, or beside it.
            first: the other node has the main chain below this height.
            least: it takes no shares below this height: their parents are below its base.
            given: the answer so far.
            limit: of hashes in the answer.
        """
        if entry.hash in given:
            return True
        needed = {entry.hash: entry}
        queue = [entry]
        for each in queue:  # grows while it is walked
            for uncle in each.uncles:
                if uncle.height < least or uncle.hash not in self._entries or uncle.hash in given:
                    continue
                if uncle.hash not in needed and not self._is_held(uncle, first):
                    needed[uncle.hash] = uncle
                    queue.append(uncle)
            if len(given) + len(needed) > limit:
                if given:
                    return False
                break
        # All stand on the main chain, or one step off it: by height, each comes after what it needs.
        for each in sorted(needed.values(), key=lambda each: (each.height, each.hash))[-limit:]:
            given[each.hash] = None
        return True

    def _is_held(self, uncle: ChainEntry, first: int) -> bool:
        """Whether a share of the main chain below ``first`` names it, so that the other node took it with that one.

        If that one is of the other node's foot, which came without uncles, the uncle is still not needed: what else
        could name it (R9) stands beside the foot.
        """
        nephews = range(uncle.height + 1, min(uncle.height + self.params.uncle_depth + 1, first))
        return any(uncle in nephew.uncles for h in nephews if (nephew := self.main_entry(h)) is not None)

    def _beside_tip(self, reached: int) -> list[ChainEntry]:
        """Shares beside the main chain that a child of the tip could name, heaviest first.

        None if the tip is not below the height that an answer may have reached.
        """
        tip = self._main[-1]
        if tip.height >= reached:
            return []
        named = {uncle.hash for entry in ancestors(tip, self.params.uncle_depth) for uncle in entry.uncles}
        beside = [
            entry
            for height in range(tip.height - self.params.uncle_depth + 1, tip.height + 1)
            for entry in self._by_height.get(height, ())
            if entry.parent is not None
            and self.is_main(entry.parent)
            and not self.is_main(entry)
            and entry.hash not in named
        ]
        return sorted(beside, key=lambda entry: (-entry.work, entry.hash))

    def proven_work(self) -> int:
        """The work of the main chain as the shares that are held prove it: no more than was done.

        What the lowest shares claim may be nobody's proof (module docstring): of them only their own work counts.
        """
        if self._base_height == 0 or not self._main:
            return self._main[-1].total_work if self._main else 0
        foot = self._main[: self.params.uncle_depth + 1]
        return sum(entry.work for entry in foot) + self._main[-1].total_work - foot[-1].total_work

    def missing_shares(self) -> tuple[bytes, ...]:
        """Hashes of the shares that waiting shares lack."""
        return self._waiting.missing_shares()

    def missing_blocks(self) -> tuple[bytes, ...]:
        """Hashes of the Bitcoin blocks that waiting shares lack."""
        return self._waiting.missing_blocks()

    def statistics(self) -> ChainStatistics:
        """Counts of everything that the chain holds."""
        tip = self.tip
        return ChainStatistics(
            shares=len(self._entries),
            height=-1 if tip is None else tip.height,
            total_work=0 if tip is None else tip.total_work,
            base_height=self._base_height,
            waiting=len(self._waiting),
            waiting_dropped=self._waiting.dropped,
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
        if share.hash in self._entries or share in self._waiting:
            return Duplicate()
        old_tip = self.tip
        verdict = self._judge(share, now)
        if not isinstance(verdict, ChainEntry):
            if not isinstance(verdict, Buried):
                self._waiting.add(share_id(share.encoded), share, verdict, now)
            return verdict
        added, rejected = self._judge_again(self._waiting.share_came(share.hash), now)
        return self._adopt(old_tip, [share, *added], rejected)

    def begin_history(self, foot: Sequence[Share], now: float) -> Accepted | Early | Unanchored:
        """Begin history with shares whose ancestors nobody keeps any more, on trust. Module docstring: why.

        Nothing waits: what is early or unanchored is to be handed in again.

        Args:
            foot: ``uncle_depth`` + 1 shares of a main chain, each the parent of the next, the first of them above
                height 0: how ``after_locator`` begins.
            now: Unix seconds.

        Raises:
            InvalidShare: a share breaks a rule that can be judged; the chain is as before.
            ValueError: there is history already, or the foot is of another length.
        """
        if self._main or len(foot) != self.params.uncle_depth + 1:
            raise ValueError(f"history begins in an empty chain with {self.params.uncle_depth + 1} shares")
        line: list[ChainEntry] = []
        for share in foot:
            check_alone(self.params, share)
            if line and share.data.parent != line[-1].hash:
                raise InvalidShare("R5", f"share {share.hash[::-1].hex()} is no child of the one before it")
            if line:
                check_in_chain(self.params, share, line[-1], (), in_part=True)
            else:
                check_base(self.params, share)
            if share.time > now + self.params.future_limit_s:
                return Early(until=share.time - self.params.future_limit_s)
            facts = self._facts.get(share.previous_block_hash)
            if facts is None:
                return Unanchored(block_hash=share.previous_block_hash)
            check_bitcoin(share, facts)
            line.append(ChainEntry(share, line[-1] if line else None, (), share.data.payout_script))
        self._base_height = self._swept_height = line[0].height
        self._short = True
        self._main = list(line)
        wanting: set[bytes] = set()
        for share, entry in zip(foot, line, strict=True):
            self._register(entry)
            self._waiting.take(share_id(share.encoded))
            wanting |= self._waiting.share_came(entry.hash)
        added, rejected = self._judge_again(wanting, now)
        change = self._adopt(line[-1], added, rejected)
        connected = (*(entry.hash for entry in line), *change.connected)
        return replace(change, added=(*foot, *change.added), old_tip=None, connected=connected)

    def replace(self, other: Sharechain) -> None:
        """Become another chain, of which nothing is left: it must not be used any more.

        For a history that was built aside because it has no share in common with this one. What waits here is
        dropped, what was learned of Bitcoin blocks is kept.

        Raises:
            ValueError: the other is of another network or keeps another margin.
        """
        if (other.params, other._margin) != (self.params, self._margin):
            raise ValueError("only a chain of the same network and margin can take the place of this one")
        self._entries = other._entries
        self._by_height = other._by_height
        self._main = other._main
        self._base_height = other._base_height
        self._short = other._short
        self._scripts = other._scripts
        self._facts.update(other._facts)
        self._waiting.replace(other._waiting)
        self._swept_height = other._swept_height
        self._tip_window = other._tip_window
        self._side_window = other._side_window
        self._payouts = other._payouts

    def learn_block(self, block_hash: bytes, facts: BlockFacts, now: float) -> Outcome | None:
        """Take in what Bitcoin says of a block, and judge the shares that waited for it.

        Returns:
            An ``Accepted`` if shares joined or were rejected, else None.
        """
        self._facts[block_hash] = facts
        return self._retry(self._waiting.block_came(block_hash), now)

    def release(self, now: float) -> Outcome | None:
        """Judge some of the shares that waited for their header time, and drop what waited too long.

        Returns as ``learn_block``; to be called again as long as it returns something.
        """
        outcome = self._retry(self._waiting.time_came(now, MAX_RELEASED), now)
        self._waiting.expire(now)
        return outcome

    def restore(
        self,
        shares: Iterable[Share],
        *,
        facts: Mapping[bytes, BlockFacts],
        tip: bytes | None,
        short_history: bool = False,
    ) -> None:
        """Load shares that were valid when they were stored, without judging them again.

        Args:
            shares: lowest first; a parent or uncle that does not come before its child ends history there.
            facts: Bitcoin blocks by hash.
            tip: hash of the tip when stored: decides between equals. None takes the first of the heaviest.
            short_history: as it was when stored.

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
            # Right above the base there may be shares beside a foot, which decide nothing.
            decides = lowest == 0 or entry.height > lowest + self.params.uncle_depth or tip is None
            if decides and (best is None or entry.total_work > best.total_work):
                best = entry
        if lowest is None:
            return
        if tip is not None:
            stored = self._entries.get(tip)
            if stored is None:
                raise InvalidShare("R5", "the stored tip is not among the stored shares")
            if best is not None and stored.total_work < best.total_work:
                raise InvalidShare("R5", "a stored share has more work than the stored tip")
            best = stored
        assert best is not None, "without a stored tip every share decides"
        self._base_height = lowest
        self._short = short_history and lowest > 0
        self._main = list(ancestors(best, best.height - lowest + 1))[::-1]
        if self._short:
            for entry in self._main[: self.params.uncle_depth + 1]:  # as begin_history left them
                entry.drop_uncles()

    # -- inside --------------------------------------------------------------------------------------------

    def _judge(self, share: Share, now: float) -> ChainEntry | Orphaned | Early | Unanchored | Buried:
        """Check a share against its chain; links it if it is valid."""
        data = share.data
        base = self._base_height
        parent = self._entries.get(data.parent)
        uncles = tuple(entry for u in data.uncles if (entry := self._entries.get(u)) is not None)
        orphaned = parent is None and data.parent != NULL_HASH
        in_part = False
        if base and orphaned and data.height <= base:
            return Buried(base_height=base)
        if base and not orphaned and (parent is None or parent.height < self.checkable_height):
            if parent is None or not self._short:
                return Buried(base_height=base)
            if parent.height <= self._foot_height and not self.is_main(parent):
                return Buried(base_height=base)
            in_part = True
        # Its uncles may stand at the base or below, where nobody can fetch them; it is an uncle itself, no more.
        beside_foot = in_part and parent is not None and parent.height < self._foot_height
        if orphaned or (len(uncles) < len(data.uncles) and not beside_foot):
            wanted = (data.parent, *data.uncles) if orphaned else data.uncles
            return Orphaned(missing=tuple(h for h in wanted if h not in self._entries))
        check_in_chain(self.params, share, parent, uncles, in_part=in_part)
        if share.time > now + self.params.future_limit_s:  # what breaks a rule anyhow need not wait for its time
            return Early(until=share.time - self.params.future_limit_s)
        facts = self._facts.get(share.previous_block_hash)
        if facts is None:
            return Unanchored(block_hash=share.previous_block_hash)
        check_bitcoin(share, facts)
        if not in_part:
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
        entry = ChainEntry(share, parent, uncles, share.data.payout_script)
        self._register(entry)
        return entry

    def _register(self, entry: ChainEntry) -> None:
        entry.payout_script = self._scripts.setdefault(entry.payout_script, entry.payout_script)
        self._entries[entry.hash] = entry
        self._by_height.setdefault(entry.height, []).append(entry)

    def _by_parent(self, identities: Iterable[bytes]) -> list[bytes]:
        """Waiting shares in an order in which neighbours are judged by the same window: moving one far is dear."""
        keys: dict[bytes, tuple[int, bytes, bytes]] = {}
        for identity in identities:
            share = self._waiting.share(identity)
            if share is not None:
                parent = self._entries.get(share.data.parent)
                keys[identity] = (-1 if parent is None else parent.height, share.data.parent, identity)
        return sorted(keys, key=keys.__getitem__)

    def _judge_again(
        self, identities: Iterable[bytes], now: float
    ) -> tuple[list[Share], list[tuple[Share, InvalidShare]]]:
        """Judge waiting shares whose reason to wait is gone, then what waited for those that joined, and so on."""
        added: list[Share] = []
        rejected: list[tuple[Share, InvalidShare]] = []
        queue = self._by_parent(identities)
        for identity in queue:  # grows while it is walked
            waiting = self._waiting.take(identity)
            if waiting is None or waiting.share.hash in self._entries:
                continue
            try:
                verdict = self._judge(waiting.share, now)
            except InvalidShare as error:
                rejected.append((waiting.share, error))
                continue
            if isinstance(verdict, ChainEntry):
                added.append(waiting.share)
                queue += self._by_parent(self._waiting.share_came(verdict.hash))
            elif not isinstance(verdict, Buried):
                self._waiting.add(identity, waiting.share, verdict, waiting.since)
        return added, rejected

    def _retry(self, identities: Iterable[bytes], now: float) -> Outcome | None:
        old_tip = self.tip
        added, rejected = self._judge_again(identities, now)
        if not added and not rejected:
            return None
        return self._adopt(old_tip, added, rejected)

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
            if self._short and entry.height <= self._foot_height:
                continue
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
            short_history=self._short,
        )

    def _prune(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[bytes, ...]]:
        """Forget history that nothing can need any more: (height, hash) of shares, and hashes of Bitcoin blocks."""
        if not self._main:
            return (), ()
        base = self._main[-1].height - 2 * self.params.window_max_shares - self._margin
        self._short = self._short and base < self._base_height
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
