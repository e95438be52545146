"""The numbered rules: what makes a share valid, alone and in its chain.

Generating is verifying: ``derive_data`` and the coinbase of ``sharechain.coinbase`` make what a miner works on,
and the same two functions make what a peer compares a share with. Nothing here reads a clock, a configuration
or an arrival order. Each rule is stated with its reason in ``docs/reference/rules.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharechain.coinbase import build_coinbase, fold_coinbase
from sharechain.difficulty import (
    bits_to_target,
    is_canonical_bits,
    scale_target,
    target_to_bits,
    work_of,
)
from sharechain.entry import ChainEntry, ancestors
from sharechain.errors import InvalidShare
from sharechain.params import BLOCK_FALL, MEDIAN_SPAN, Params
from sharechain.payout import Payouts
from sharechain.share import NULL_HASH, SHARE_VERSION, Share, ShareData, share_commitment

__all__ = [
    "BlockFacts",
    "block_target",
    "check_alone",
    "check_base",
    "check_bitcoin",
    "check_coinbase",
    "check_in_chain",
    "derive_data",
    "easiest_target",
    "hardest_target",
    "is_block",
    "median_time",
    "next_max_bits",
    "window_work",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """What rule R11 needs of a Bitcoin block that a share's header builds on."""

    #: Of the Bitcoin block itself.
    height: int
    #: Compact target that Bitcoin demands of a block built on it.
    next_bits: int
    #: Test networks whose difficulty falls when nobody mines: a block built on it whose time is after the first number
    #: (Unix seconds) must have the second as its compact target instead. Source: Bitcoin Core, ``GetNextWorkRequired``.
    late: tuple[int, int] | None = None

    def bits_at(self, time: int) -> int:
        """The compact target that Bitcoin demands of a block built on it with header time ``time``."""
        return self.next_bits if self.late is None or time <= self.late[0] else self.late[1]


def check_alone(params: Params, share: Share) -> None:
    """R1 (what the network decides of it) to R4: the rules that need no chain and decide whether to relay.

    Raises:
        InvalidShare: R1, R2, R3 or R4.
    """
    data = share.data
    if data.payout_class not in params.payout_classes:
        raise InvalidShare("R1", f"payout class is one of {params.payout_classes} here, got {data.payout_class}")
    for name, bits in (("bits", data.bits), ("max_bits", data.max_bits)):
        if not is_canonical_bits(bits):
            raise InvalidShare("R2", f"{name} {bits:#010x} is not a canonical compact target")
    target = bits_to_target(data.bits)
    if target > params.max_target:
        raise InvalidShare("R2", f"bits {data.bits:#010x} is easier than the network's easiest target")
    if share.hash_value > target:
        raise InvalidShare("R3", f"hash {share.hash[::-1].hex()} is above the target of bits {data.bits:#010x}")
    if len(data.uncles) > params.uncle_max:
        raise InvalidShare("R4", f"at most {params.uncle_max} uncles, got {len(data.uncles)}")
    if any(left >= right for left, right in zip(data.uncles, data.uncles[1:], strict=False)):
        raise InvalidShare("R4", "uncles are not ascending and distinct")


def derive_data(
    params: Params,
    *,
    parent: ChainEntry | None,
    uncles: Sequence[ChainEntry],
    bits: int,
    payout_script: bytes,
    payout_class: int,
) -> ShareData:
    """The data of a share, from what its miner chooses and what its chain dictates (R5, R7).

    Args:
        params: the network's.
        parent: the share to build on; None for the first of a chain.
        uncles: the uncles to name, ascending by hash.
        bits: compact share target, the miner's choice within R8.
        payout_script: scriptPubKey to be credited.
        payout_class: one of ``params.payout_classes``.
    """
    own_work = work_of(bits_to_target(bits)) + sum(uncle.work for uncle in uncles)
    return ShareData(
        version=SHARE_VERSION,
        parent=NULL_HASH if parent is None else parent.hash,
        uncles=tuple(uncle.hash for uncle in uncles),
        bits=bits,
        max_bits=next_max_bits(params, parent),
        height=0 if parent is None else parent.height + 1,
        total_work=own_work + (0 if parent is None else parent.total_work),
        payout_script=payout_script,
        payout_class=payout_class,
    )


def next_max_bits(params: Params, parent: ChainEntry | None) -> int:
    """R7: the compact share target that the chain asks of a child of ``parent``, by relative ASERT.

    Uncles count as shares, so that the rate of all shares is held at the period: a network with many uncles
    does not pay for them with a higher rate.
    """
    if parent is None:
        return target_to_bits(params.max_target)
    if parent.parent is None:
        return parent.max_bits
    elapsed_ms = (parent.time - parent.parent.time) * 1000
    wanted_ms = params.share_period_ms * (1 + parent.uncle_count)
    target = scale_target(
        bits_to_target(parent.max_bits), elapsed_ms - wanted_ms, params.half_life_s * 1000, params.max_target
    )
    return target_to_bits(target)


def easiest_target(params: Params, parent: ChainEntry | None, max_bits: int, time: int) -> int:
    """R8: the easiest share target that a share may claim with header time ``time``.

    After ``stall_after_s`` of silence it doubles each ``stall_doubling_s``: no network gets stuck when hash
    rate leaves.
    """
    target = bits_to_target(max_bits)
    if parent is None:
        return target
    late_s = time - parent.time - params.stall_after_s
    if late_s <= 0:
        return target
    return scale_target(target, late_s, params.stall_doubling_s, params.max_target)


def hardest_target(params: Params, max_bits: int) -> int:
    """R8: the hardest share target that a share may claim: ``heaviest_share`` times harder than the chain asks."""
    return bits_to_target(target_to_bits(max(1, bits_to_target(max_bits) // params.heaviest_share)))


def median_time(parent: ChainEntry) -> int:
    """R6: the median time of a share's last 11 ancestors, ``parent`` included; fewer at a chain's start.

    Source: Bitcoin Core, ``CBlockIndex::GetMedianTimePast``.
    """
    times = sorted(entry.time for entry in ancestors(parent, MEDIAN_SPAN))
    return times[len(times) // 2]


def block_target(params: Params, max_bits: int, block_bits: int) -> int:
    """The target that makes a share a Bitcoin block.

    On real networks Bitcoin's own. A test network whose Bitcoin target is trivial divides the share target
    (the chain's, not the miner's choice: it must be equal for all miners) to have realistic shares per block.
    """
    bitcoin_target = bits_to_target(block_bits)
    if params.block_target_divisor == 1:
        return bitcoin_target
    return min(bitcoin_target, max(1, bits_to_target(max_bits) // params.block_target_divisor))


def is_block(params: Params, share: Share) -> bool:
    """Whether a valid share is to be submitted to Bitcoin."""
    return share.hash_value <= block_target(params, share.data.max_bits, share.block_bits)


def window_work(params: Params, max_bits: int, block_bits: int) -> int:
    """How much work the window of a share holds: ``window_blocks`` expected blocks."""
    return params.window_blocks * work_of(block_target(params, max_bits, block_bits))


def check_base(params: Params, share: Share) -> None:
    """What R5 and R8 say of a share whose parent nobody has any more: the first of a history taken on trust.

    Args:
        params: the network's.
        share: has passed ``check_alone``.

    Raises:
        InvalidShare: R5 or R8.
    """
    data = share.data
    if data.height == 0 or data.parent == NULL_HASH:
        raise InvalidShare("R5", "history begins on trust with a share above height 0 that has a parent")
    # Each ancestor adds the work of a share, which is at least that of the easiest target.
    least = work_of(bits_to_target(data.bits)) + data.height * work_of(params.max_target)
    if data.total_work < least:
        raise InvalidShare("R5", f"total work is at least {least} here, got {data.total_work}")
    _check_hardest(params, share)


def check_in_chain(
    params: Params,
    share: Share,
    parent: ChainEntry | None,
    uncles: Sequence[ChainEntry],
    *,
    in_part: bool = False,
) -> None:
    """R5 to R9 and R12: the rules that read ancestors only.

    Args:
        params: the network's.
        share: has passed ``check_alone``.
        parent: its parent, a valid share; None if the share names none.
        uncles: the valid shares that it names, in its order.
        in_part: history ends so close below that some of what the rules read is not there. R5 then takes the work
            of unknown uncles as claimed, R6 waits for 11 ancestors, R7 for a grandparent. All else is judged.

    Raises:
        InvalidShare: R5, R6, R7, R8, R9 or R12.
    """
    data = share.data
    derived = derive_data(
        params,
        parent=parent,
        uncles=uncles,
        bits=data.bits,
        payout_script=data.payout_script,
        payout_class=data.payout_class,
    )
    if data.height != derived.height:
        raise InvalidShare("R5", f"height is {derived.height} here, got {data.height}")
    if in_part and len(uncles) < len(data.uncles):
        if data.total_work <= derived.total_work:
            raise InvalidShare("R5", f"total work is more than {derived.total_work} here, got {data.total_work}")
    elif data.total_work != derived.total_work:
        raise InvalidShare("R5", f"total work is {derived.total_work} here, got {data.total_work}")
    judges_time = not in_part or sum(1 for _ in ancestors(parent, MEDIAN_SPAN)) == MEDIAN_SPAN
    if judges_time and parent is not None and share.time <= (least := median_time(parent)):
        raise InvalidShare("R6", f"time must be after the median of the ancestors, {least}; got {share.time}")
    judges_difficulty = not in_part or (parent is not None and parent.parent is not None)
    if judges_difficulty and data.max_bits != derived.max_bits:
        raise InvalidShare("R7", f"max_bits is {derived.max_bits:#010x} here, got {data.max_bits:#010x}")
    if bits_to_target(data.bits) > easiest_target(params, parent, data.max_bits, share.time):
        raise InvalidShare("R8", f"bits {data.bits:#010x} is easier than max_bits allows at time {share.time}")
    _check_hardest(params, share)
    if uncles:
        _check_uncles(params, parent, uncles)
    if parent is not None and share.block_height < (least := parent.block_height - BLOCK_FALL):
        raise InvalidShare("R12", f"block height is at least {least} here, got {share.block_height}")


def _check_hardest(params: Params, share: Share) -> None:
    data = share.data
    if bits_to_target(data.bits) < hardest_target(params, data.max_bits):
        raise InvalidShare("R8", f"bits {data.bits:#010x} is over {params.heaviest_share} times harder than max_bits")


def _check_uncles(params: Params, parent: ChainEntry | None, uncles: Sequence[ChainEntry]) -> None:
    # An uncle stands 1 to uncle_depth heights below its nephew, so its parent is within one more. A sibling of
    # the share itself is not an uncle: naming it would let a late share outweigh it.
    reach = list(ancestors(parent, params.uncle_depth + 1))
    reached = {entry.hash for entry in reach}
    named = {uncle.hash for entry in reach for uncle in entry.uncles}
    for uncle in uncles:
        shown = uncle.hash[::-1].hex()
        if uncle.hash in reached:
            raise InvalidShare("R9", f"uncle {shown} is an ancestor")
        if uncle.hash in named:
            raise InvalidShare("R9", f"uncle {shown} was named by an ancestor")
        if uncle.parent is None or uncle.parent.hash not in reached or uncle.parent is parent:
            raise InvalidShare("R9", f"uncle {shown} is no child of an ancestor up to {params.uncle_depth} below")


def check_coinbase(params: Params, share: Share, payouts: Payouts) -> None:
    """R10: the coinbase, rebuilt from the parent's window, is the one that the header commits to.

    Args:
        params: the network's.
        share: the share to check.
        payouts: ``build_payouts`` of the window that ends at its parent, with its value and class.

    Raises:
        InvalidShare: R10.
    """
    coinbase = build_coinbase(
        share.coinbase_script,
        payouts,
        share.data.payout_script,
        share.witness_commitment,
        share_commitment(params.network_id, share.data),
    )
    root = fold_coinbase(coinbase, share.merkle_branch)
    if root != share.merkle_root:
        raise InvalidShare(
            "R10",
            f"the coinbase rebuilt from the window gives merkle root {root[::-1].hex()}, "
            f"the header has {share.merkle_root[::-1].hex()}",
        )


def check_bitcoin(share: Share, facts: BlockFacts) -> None:
    """R11: the header claims the height and the target that Bitcoin demands on its Bitcoin parent.

    This is what stops a forged window length. Needs the Bitcoin header: a share whose Bitcoin parent is not
    known yet waits, and is then judged.

    Args:
        share: the share to check.
        facts: of the block that its header builds on.

    Raises:
        InvalidShare: R11.
    """
    if share.block_height != facts.height + 1:
        raise InvalidShare("R11", f"block height is {facts.height + 1} here, got {share.block_height}")
    wanted = facts.bits_at(share.time)
    if share.block_bits != wanted:
        raise InvalidShare("R11", f"header bits is {wanted:#010x} here, got {share.block_bits:#010x}")
