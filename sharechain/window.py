"""The PPLNS window: whose work the next coinbase pays, kept up to date in a few steps per share.

Theory of operation. A share and the uncles that it names make a *unit*. A window ends at some share and reaches
back, unit by unit, until the work in it adds up to what is wanted; the oldest unit is cut pro rata, so that the
sum is exact. The units stand in a deque and their weights in a table; moving to another share takes back the
units of the old branch and adds those of the new one, so that following a chain costs the same at any window
length. The wanted work may change with each share (it follows Bitcoin's difficulty): the old end then moves
too, in either direction. ``tests/sharechain/test_window.py`` holds the dumb twin, which starts from nothing
each time.
"""

from __future__ import annotations

from collections import deque

from sharechain.entry import ChainEntry
from sharechain.hasher import WeightTable
from sharechain.params import Params

__all__ = ["Window", "unit_parts"]


def unit_parts(params: Params, entry: ChainEntry, kept: int | None = None) -> list[tuple[bytes, int]]:
    """How the work of a share and its uncles is credited: (payout script, weight), the share's own first.

    An uncle's miner gets ``uncle_weight`` of its work, the nephew the rest: that it was named at all is the
    nephew's doing.

    Args:
        params: the network's.
        entry: the nephew.
        kept: how much of ``entry.unit_work`` is inside the window; None for all.

    Returns:
        Weights that add up to ``kept`` exactly; what rounding leaves is the nephew's.
    """
    numerator, denominator = params.uncle_weight
    whole = entry.unit_work
    kept = whole if kept is None else kept
    uncles = [(uncle.payout_script, uncle.work * numerator // denominator * kept // whole) for uncle in entry.uncles]
    return [(entry.payout_script, kept - sum(weight for _, weight in uncles)), *uncles]


class Window:
    """The weights of a window that ends at a share, and can be moved to any other share.

    Mutable fields: ``_units`` (the entries inside, oldest first, each the parent of the next), ``_work`` (sum
    of their ``unit_work``), ``_cut`` (what is currently taken off the oldest) and
    ``table``. Invariant: ``table`` holds the
    parts of all units less ``_cut``.
    """

    def __init__(self, params: Params) -> None:
        self._params = params
        self._units: deque[ChainEntry] = deque()
        self._work = 0
        self._cut: list[tuple[bytes, int]] = []
        #: Weight of each payout script.
        self.table = WeightTable()

    def __len__(self) -> int:
        """Main-chain shares inside; the oldest may be cut."""
        return len(self._units)

    @property
    def oldest(self) -> ChainEntry | None:
        """The share at the far end, or None if the window is empty."""
        return self._units[0] if self._units else None

    def move_to(self, tip: ChainEntry | None, wanted_work: int) -> None:
        """Make this the window that ends at ``tip`` and holds ``wanted_work``, or all there is.

        Args:
            tip: the share that the window ends at, inside; None for a window with nothing in it.
            wanted_work: expected hashes, positive.
        """
        for script, weight in self._cut:
            self.table.add(script, weight)
        self._cut = []
        self._follow(tip)
        units, most = self._units, self._params.window_max_shares
        while units and (len(units) > most or self._work - units[0].unit_work >= wanted_work):
            self._remove(units.popleft())
        while units and self._work < wanted_work and len(units) < most and units[0].parent is not None:
            units.appendleft(units[0].parent)
            self._add(units[0])
        excess = self._work - wanted_work
        if units and excess > 0:
            whole = unit_parts(self._params, units[0])
            kept = unit_parts(self._params, units[0], units[0].unit_work - excess)
            self._cut = [(script, full - part) for (script, full), (_, part) in zip(whole, kept, strict=True)]
            for script, weight in self._cut:
                self.table.add(script, -weight)

    def _follow(self, tip: ChainEntry | None) -> None:
        units = self._units
        if tip is None:
            self.clear()
            return
        joined: list[ChainEntry] = []
        entry: ChainEntry | None = tip
        while entry is not None and units and entry is not units[-1]:
            if units[-1].height >= entry.height:
                self._remove(units.pop())
            else:
                joined.append(entry)
                entry = entry.parent
        if not units or entry is None:  # no common share inside: start from the new tip
            self.clear()
            joined = [tip]
        for entry in reversed(joined):
            units.append(entry)
            self._add(entry)

    def _add(self, entry: ChainEntry) -> None:
        self._work += entry.unit_work
        for script, weight in unit_parts(self._params, entry):
            self.table.add(script, weight)

    def _remove(self, entry: ChainEntry) -> None:
        self._work -= entry.unit_work
        for script, weight in unit_parts(self._params, entry):
            self.table.add(script, -weight)

    def clear(self) -> None:
        """Make this an empty window again."""
        self._units.clear()
        self._work = 0
        self._cut = []
        self.table = WeightTable()
