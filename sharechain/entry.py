"""A share in its chain: the little that the rules read of an ancestor, linked to its parent.

A node keeps one entry for each share of its history (some hundred bytes), and the whole shares on disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from sharechain.difficulty import bits_to_target, work_of
from sharechain.share import Share

__all__ = ["ChainEntry", "ancestors"]


class ChainEntry:
    """One valid share, linked to its ancestors.

    Nothing changes after construction, but that ``parent`` and ``uncles`` are cut off where history ends.
    """

    __slots__ = (
        "block_height",
        "hash",
        "height",
        "max_bits",
        "parent",
        "payout_script",
        "previous_block_hash",
        "time",
        "total_work",
        "uncle_count",
        "uncles",
        "unit_work",
        "work",
    )

    def __init__(
        self, share: Share, parent: ChainEntry | None, uncles: tuple[ChainEntry, ...], payout_script: bytes
    ) -> None:
        """Link a share.

        Args:
            share: valid in its chain.
            parent: its parent's entry; None for the first of a chain, or where history ends.
            uncles: the entries of the uncles that it names, in its order; without those that history does not hold.
            payout_script: equal to the share's; handed in so that one miner's shares keep one object.
        """
        data = share.data
        self.hash = share.hash
        self.parent = parent
        self.height = data.height
        self.time = share.time
        self.max_bits = data.max_bits
        #: Expected hashes of the share alone ...
        self.work = work_of(bits_to_target(data.bits))
        #: ... and with the uncles that it names: what it adds to the chain and to a window.
        self.unit_work = self.work + sum(uncle.work for uncle in uncles)
        self.total_work = data.total_work
        self.uncles = uncles
        #: How many uncles it names, whether history holds them or not.
        self.uncle_count = len(data.uncles)
        self.payout_script = payout_script
        self.block_height = share.block_height
        self.previous_block_hash = share.previous_block_hash

    def drop_uncles(self) -> None:
        """Be as if history held none of the uncles that the share names."""
        self.uncles = ()
        self.unit_work = self.work

    def __repr__(self) -> str:
        return f"<ChainEntry {self.hash[::-1].hex()[:16]} at {self.height}>"


def ancestors(entry: ChainEntry | None, count: int) -> Iterator[ChainEntry]:
    """``entry``, its parent and so on: at most ``count``, fewer where history ends."""
    while entry is not None and count > 0:
        yield entry
        entry = entry.parent
        count -= 1
