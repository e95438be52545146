"""From weights to amounts: who is paid what by a coinbase.

Every miner of the window is entitled to value x weight / total. A coinbase has room for ``payout_class``
payouts: the largest entitlements are paid exactly, and what does not fit is drawn in equal lots, without bias
and verifiably (``WeightTable.draw``). There is no ledger and nothing is owed: the expected payout of everybody
is the entitlement.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from sharechain.hasher import WeightTable
from sharechain.params import DUST, Params
from sharechain.tagged import tagged_hash

__all__ = ["Payouts", "build_payouts", "decode_outputs", "draw_seed", "finder_bonus"]

_AMOUNT: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Payouts:
    """What a coinbase pays to the window and to the finder. The same for every miner of a payout class."""

    #: Serialised transaction outputs, value descending, then script ascending.
    outputs: bytes
    #: Number of ``outputs``.
    count: int
    #: Sat. For the finder: bonus and remainder; 0 means that the finder has no output of its own.
    finder_amount: int
    #: Sat. Entitlements from here on are paid exactly, smaller ones are drawn.
    threshold: int


def draw_seed(parent: bytes, payout_class: int) -> bytes:
    """The seed of a coinbase's draw: 32 bytes, from the parent share's hash and the class.

    Whoever wants another seed must throw a share away, or choose another class (see
    ``docs/explanation/payouts.md`` for what that is worth).
    """
    return tagged_hash("p2pool/draw", parent + payout_class.to_bytes(4, "little"))


def finder_bonus(params: Params, value: int) -> int:
    """Sat. What the finder gets before the window shares the rest: a reason not to withhold a block."""
    numerator, denominator = params.finder_bonus
    return value * numerator // denominator


def build_payouts(params: Params, table: WeightTable, *, value: int, parent: bytes, payout_class: int) -> Payouts:
    """Split a block's value between a window and the finder. The parts add up to the value exactly.

    Args:
        params: the network's.
        table: the window's weights; empty means that there is no window yet: the finder is paid all.
        value: sat, subsidy and fees.
        parent: hash of the share that the window ends at.
        payout_class: how many window payouts there may be.
    """
    if len(table) == 0:
        return Payouts(outputs=b"", count=0, finder_amount=value, threshold=0)
    drawn = table.draw(
        value - finder_bonus(params, value),
        payout_class,
        params.min_payout,
        DUST,
        draw_seed(parent, payout_class),
    )
    outputs, finder_amount = drawn.outputs, value - drawn.paid
    if drawn.count and finder_amount < DUST:  # would be dust: joins the first payout
        (first,) = _AMOUNT.unpack_from(outputs)
        outputs = _AMOUNT.pack(first + finder_amount) + outputs[_AMOUNT.size :]
        finder_amount = 0
    return Payouts(outputs=outputs, count=drawn.count, finder_amount=finder_amount, threshold=drawn.threshold)


def decode_outputs(outputs: bytes) -> list[tuple[bytes, int]]:
    """Serialised transaction outputs as (script, sat); scripts are shorter than 253 bytes."""
    decoded, at = [], 0
    while at < len(outputs):
        (amount,) = _AMOUNT.unpack_from(outputs, at)
        end = at + 9 + outputs[at + 8]
        decoded.append((outputs[at + 9 : end], amount))
        at = end
    return decoded
