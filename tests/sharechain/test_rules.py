"""Each rule under its number: what is just valid, and what breaks it. All through ``Sharechain.accept``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sharechain.chain import Accepted, Early, Orphaned, Sharechain, Unanchored
from sharechain.difficulty import bits_to_target, scale_target, target_to_bits, work_of
from sharechain.entry import ChainEntry, ancestors
from sharechain.errors import DecodeError, InvalidShare
from sharechain.params import BLOCK_FALL, MEDIAN_SPAN, Params
from sharechain.payout import Payouts
from sharechain.share import NULL_HASH, Share, decode_share, encode_share
from sharechain.validate import (
    BlockFacts,
    block_target,
    check_alone,
    easiest_target,
    is_block,
    median_time,
    next_max_bits,
    window_work,
)
from tests.builders import (
    BLOCK_BITS,
    FINE,
    GENESIS_BLOCK,
    GENESIS_FACTS,
    START_TIME,
    VALUE,
    add,
    forged_under,
    grow,
    harder,
    mine,
    miner_script,
    new_chain,
)

#: Reacts within a few shares, so that tests reach targets far from the easiest.
NERVOUS = FINE.with_overrides({"name": "nervous", "half_life_s": 20})


def refused(chain: Sharechain, share: Share, rule: str, now: float | None = None) -> InvalidShare:
    """The share breaks a rule, this one, and leaves no trace."""
    before = (chain.tip, len(chain), chain.statistics().waiting)
    with pytest.raises(InvalidShare) as caught:
        chain.accept(share, share.time if now is None else now)
    assert caught.value.rule == rule, str(caught.value)
    assert str(caught.value).startswith(rule)
    assert (chain.tip, len(chain), chain.statistics().waiting) == before
    return caught.value


def joined(chain: Sharechain, share: Share) -> ChainEntry:
    add(chain, share)
    entry = chain.entry(share.hash)
    assert entry is not None
    return entry


def line(chain: Sharechain, count: int, **options: Any) -> list[ChainEntry]:
    """The chain extended by ``count`` shares that name no uncles."""
    entries = []
    for _ in range(count):
        entries.append(joined(chain, mine(chain, chain.tip, **options)))
    return entries


def ascending(*entries: ChainEntry) -> Sequence[ChainEntry]:
    return sorted(entries, key=lambda entry: entry.hash)


# -- R1 to R4: alone -------------------------------------------------------------------------------------------


def test_r1_payout_class_is_one_of_the_networks() -> None:
    chain = new_chain(FINE)
    for size in FINE.payout_classes:
        add(chain, mine(chain, chain.tip, payout_class=size))
    for size in (0, 1, 11, 13, 368, 65_535):
        refused(chain, forged_under(mine(chain, chain.tip), payout_class=size), "R1")


def test_r1_a_share_out_of_shape_does_not_decode() -> None:
    share = mine(new_chain(FINE), None)
    raw = encode_share(share)
    assert decode_share(raw) == share
    with pytest.raises(DecodeError) as caught:
        replace(share, data=replace(share.data, payout_script=b"\x6a" + bytes(24)))
    assert caught.value.rule == "R1"


def test_r2_bits_are_canonical() -> None:
    chain = new_chain(FINE)
    share = mine(chain, None)
    # Negative, zero, above 256 bits, another form of the same target, a mantissa with its sign bit free.
    size, mantissa = share.data.bits >> 24, share.data.bits & 0xFFFFFF
    for bits in (0x1D80FFFF, 0, 0x1D000000, 0xFF7FFFFF, 0x22010000, (size + 1) << 24 | mantissa >> 8, 0x01000001):
        refused(chain, replace(share, data=replace(share.data, bits=bits)), "R2")
        refused(chain, replace(share, data=replace(share.data, max_bits=bits)), "R2")


def test_r2_bits_are_no_easier_than_the_network_allows() -> None:
    chain = new_chain(FINE)
    easiest = target_to_bits(FINE.max_target)
    add(chain, mine(chain, None, bits=easiest))
    refused(chain, mine(chain, None, bits=easiest + 1, salt=1), "R2")
    refused(chain, mine(chain, None, bits=0x207FFFFF, salt=1), "R2")


def test_r3_the_hash_is_at_most_the_target() -> None:
    chain = new_chain(FINE)
    share = mine(chain, None)
    below = target_to_bits(share.hash_value)  # rounds down
    assert bits_to_target(below) < share.hash_value < bits_to_target(below + 1)
    check_alone(FINE, replace(share, data=replace(share.data, bits=below + 1)))
    refused(chain, replace(share, data=replace(share.data, bits=below)), "R3")
    header = share.header[:79] + bytes([share.header[79] ^ 1])
    refused(chain, replace(share, header=header), "R3")


def test_r4_uncles_are_few_ascending_and_distinct() -> None:
    chain = new_chain(FINE)
    share = mine(chain, None)
    names = [bytes([number]) * 32 for number in range(1, 6)]

    def naming(*uncles: bytes) -> Share:
        return replace(share, data=replace(share.data, uncles=uncles))

    assert FINE.uncle_max == 3
    check_alone(FINE, naming(*names[:3]))
    refused(chain, naming(*names[:4]), "R4")
    refused(chain, naming(names[1], names[0]), "R4")
    refused(chain, naming(names[0], names[0]), "R4")
    refused(chain, naming(names[0], names[2], names[1]), "R4")


# -- R5 to R9, R12: in chain -----------------------------------------------------------------------------------


def test_r5_height_is_parents_plus_one() -> None:
    chain = new_chain(FINE)
    refused(chain, mine(chain, None, data={"height": 1}), "R5")
    first, second = line(chain, 2)
    assert (first.height, second.height) == (0, 1)
    for height in (0, 1, 3, 2**48):
        refused(chain, mine(chain, second, data={"height": height}), "R5")


def test_r5_total_work_counts_ancestors_own_work_and_uncles() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 3)
    uncle = joined(chain, mine(chain, entries[1], miner=7, bits=harder(entries[2].max_bits, 3, 2)))
    nephew = mine(chain, chain.entry(entries[2].hash), uncles=[uncle])
    own = work_of(bits_to_target(nephew.data.bits))
    assert uncle.work > own
    assert nephew.data.total_work == entries[2].total_work + own + uncle.work
    assert entries[2].total_work == sum(entry.work for entry in entries)
    for wrong in (1, -1, -uncle.work, 2**200):
        total_work = nephew.data.total_work + wrong
        refused(chain, mine(chain, entries[2], uncles=[uncle], data={"total_work": total_work}), "R5")
    add(chain, nephew)


def test_r6_time_is_after_the_median_of_the_last_11_ancestors() -> None:
    chain = new_chain(FINE)
    times = [START_TIME + offset for offset in (*range(0, 110, 10), 65, 140, 80, 85, 91)]
    for time in times:
        joined(chain, mine(chain, chain.tip, time=time))
    assert chain.tip is not None
    median = sorted(times[-11:])[5]
    assert median_time(chain.tip) == median
    refused(chain, mine(chain, chain.tip, time=median), "R6")
    refused(chain, mine(chain, chain.tip, time=median - 1_000), "R6")
    joined(chain, mine(chain, chain.tip, time=median + 1))


def test_r6_the_median_of_fewer_than_11_is_the_upper_of_all() -> None:
    chain = new_chain(FINE)
    times: list[int] = []
    for offset in (0, 30, 10, 25, 40, 15, 50, 22, 60, 35, 70, 45):
        parent = chain.tip
        if parent is not None:
            median = sorted(times[-MEDIAN_SPAN:])[len(times[-MEDIAN_SPAN:]) // 2]
            refused(chain, mine(chain, parent, time=median), "R6")
            assert median_time(parent) == median
        times.append(max(START_TIME + offset, 0 if parent is None else median_time(parent) + 1))
        joined(chain, mine(chain, parent, time=times[-1]))


def test_r6_the_median_is_of_the_shares_own_ancestors_not_of_the_main_chain() -> None:
    chain = new_chain(FINE)
    fork = line(chain, 3)[-1]
    late = fork
    for _ in range(12):
        late = joined(chain, mine(chain, late, miner=1, time=late.time + 60))
    early = fork
    for _ in range(12):  # all before the main chain's median
        early = joined(chain, mine(chain, early, miner=2, time=early.time + 1))
    assert early.time < median_time(late)
    refused(chain, mine(chain, early, miner=2, time=median_time(early)), "R6")
    joined(chain, mine(chain, early, miner=2, time=median_time(early) + 1))


def asert(params: Params, parent: ChainEntry) -> int:
    """R7 from the text of the rule."""
    assert parent.parent is not None
    elapsed_ms = 1_000 * (parent.time - parent.parent.time)
    late_ms = elapsed_ms - params.share_period_ms * (1 + len(parent.uncles))
    target = scale_target(bits_to_target(parent.max_bits), late_ms, 1_000 * params.half_life_s, params.max_target)
    return target_to_bits(target)


def test_r7_max_bits_is_asert_of_the_parent() -> None:
    chain = new_chain(NERVOUS)
    assert next_max_bits(NERVOUS, None) == target_to_bits(NERVOUS.max_target)
    first = joined(chain, mine(chain, None))
    assert next_max_bits(NERVOUS, first) == first.max_bits
    for gap in (1, 1, 3, 30, 9, 10, 11, 2, 100, 1, 1):
        parent = joined(chain, mine(chain, chain.tip, time=max(chain.tip.time + gap, 0) if chain.tip else None))
        right = asert(NERVOUS, parent)
        assert next_max_bits(NERVOUS, parent) == right
        refused(chain, mine(chain, parent, bits=right, data={"max_bits": right - 1}), "R7")
        refused(chain, mine(chain, parent, bits=right, data={"max_bits": target_to_bits(2**245)}), "R7")
    assert parent.max_bits < target_to_bits(NERVOUS.max_target)


def test_r7_one_half_life_early_halves_and_late_doubles() -> None:
    chain = new_chain(NERVOUS.with_overrides({"name": "even", "share_period_ms": 30_000}))
    first = joined(chain, mine(chain, None))
    second = joined(chain, mine(chain, first, time=first.time + 10))
    third = joined(chain, mine(chain, second, time=second.time + 50))
    assert third.max_bits == harder(second.max_bits, 2)
    fourth_target = bits_to_target(next_max_bits(chain.params, third))
    assert fourth_target <= bits_to_target(second.max_bits)  # compact targets round down
    assert fourth_target == pytest.approx(bits_to_target(second.max_bits), rel=1e-6)


def test_r7_uncles_count_as_shares() -> None:
    chain = new_chain(NERVOUS)
    entries = line(chain, 5, bits=None)
    uncle = joined(chain, mine(chain, entries[-2], miner=7))
    parent = joined(chain, mine(chain, chain.tip, uncles=[uncle], time=entries[-1].time + 20))
    assert next_max_bits(NERVOUS, parent) == parent.max_bits  # two shares in two periods
    alone = joined(chain, mine(chain, entries[-1], miner=8, time=entries[-1].time + 10))
    assert next_max_bits(NERVOUS, alone) == alone.max_bits  # one share in one
    quick = joined(chain, mine(chain, entries[-1], uncles=[uncle], miner=9, time=entries[-1].time + 10))
    assert next_max_bits(NERVOUS, quick) == target_to_bits(
        scale_target(bits_to_target(quick.max_bits), -10, 20, NERVOUS.max_target)
    )
    forgotten = target_to_bits(bits_to_target(quick.max_bits))  # as if the uncle had not been one
    refused(chain, mine(chain, quick, bits=next_max_bits(NERVOUS, quick), data={"max_bits": forgotten}), "R7")


def test_r7_a_target_is_never_easier_than_the_networks_easiest() -> None:
    chain = new_chain(NERVOUS)
    for gap in (10, 100_000, 10, 10, 2**30, 10):
        time = START_TIME if chain.tip is None else chain.tip.time + gap
        entry = joined(chain, mine(chain, chain.tip, time=time))
        assert entry.max_bits == target_to_bits(NERVOUS.max_target)


def hardened() -> Sharechain:
    """A chain whose target is some doublings below the easiest."""
    chain = new_chain(NERVOUS)
    for _ in range(9):
        joined(chain, mine(chain, chain.tip, time=START_TIME if chain.tip is None else chain.tip.time + 1))
    assert chain.tip is not None
    assert bits_to_target(next_max_bits(NERVOUS, chain.tip)) < NERVOUS.max_target // 8
    return chain


def test_r8_bits_are_no_easier_than_max_bits() -> None:
    chain = hardened()
    assert chain.tip is not None
    max_bits = next_max_bits(NERVOUS, chain.tip)
    refused(chain, mine(chain, chain.tip, bits=max_bits + 1), "R8")
    joined(chain, mine(chain, chain.tip, bits=harder(max_bits, 2)))
    parent = chain.tip
    joined(chain, mine(chain, parent, bits=next_max_bits(NERVOUS, parent)))


def test_r8_a_share_is_at_most_heaviest_share_times_harder() -> None:
    """One share of k + 1 times the work, mined on the ancestor k back, undoes k shares by luck alone."""
    params = NERVOUS.with_overrides({"name": "light", "heaviest_share": 4})
    chain = new_chain(params)
    for _ in range(12):
        add(chain, mine(chain, chain.tip, time=START_TIME if chain.tip is None else chain.tip.time + 1))
    parent = chain.tip
    assert parent is not None
    max_bits = next_max_bits(params, parent)
    hardest = target_to_bits(bits_to_target(max_bits) // 4)
    refused(chain, mine(chain, parent, bits=hardest - 1), "R8")
    joined(chain, mine(chain, parent, bits=hardest))


@pytest.mark.parametrize(
    ("late_s", "factor"),
    [(0, 1), (1, 2 ** (1 / 60)), (60, 2), (61, 2 ** (61 / 60)), (120, 4), (150, 2**2.5)],
)
def test_r8_the_target_eases_after_a_stall_from_the_second_on(late_s: int, factor: float) -> None:
    chain = hardened()
    parent = chain.tip
    assert parent is not None
    max_bits = next_max_bits(NERVOUS, parent)
    time = parent.time + NERVOUS.stall_after_s + late_s
    eased = easiest_target(NERVOUS, parent, max_bits, time)
    assert eased / bits_to_target(max_bits) == pytest.approx(factor, rel=2e-4)
    bits = target_to_bits(eased)
    refused(chain, mine(chain, parent, time=time, bits=bits + 1), "R8")
    if late_s:
        refused(chain, mine(chain, parent, time=time - late_s, bits=bits), "R8")
    share = mine(chain, parent, time=time, bits=bits)
    add(chain, share)
    # Easing a share does not ease the chain: ASERT goes on from what the chain asked for.
    assert share.data.max_bits == max_bits


@pytest.mark.parametrize("silence_s", [1_700, 10**6, 2**31])
def test_r8_easing_ends_at_the_easiest_target(silence_s: int) -> None:
    chain = hardened()
    parent = chain.tip
    assert parent is not None
    time = parent.time + silence_s
    easiest = target_to_bits(NERVOUS.max_target)
    refused(chain, mine(chain, parent, time=time, bits=easiest + 1), "R2")
    add(chain, mine(chain, parent, time=time, bits=easiest))


def test_r9_an_unknown_uncle_is_waited_for() -> None:
    chain, other = new_chain(FINE), new_chain(FINE)
    entries = line(chain, 3)
    for entry in entries:
        add(other, _share_of(chain, entry))
    uncle = joined(other, mine(other, other.entry(entries[1].hash), miner=7))
    nephew = mine(other, other.entry(entries[2].hash), uncles=[uncle])
    assert chain.accept(nephew, nephew.time) == Orphaned(missing=(uncle.hash,))
    assert nephew.hash not in chain
    outcome = add(chain, _share_of(other, uncle))
    assert [share.hash for share in outcome.added] == [uncle.hash, nephew.hash]
    assert chain.tip is not None
    assert chain.tip.uncles == (chain.entry(uncle.hash),)


def _share_of(chain: Sharechain, entry: ChainEntry) -> Share:
    """The share of an entry, mined again: builders are deterministic."""
    number = next(n for n in range(50) if miner_script(n) == entry.payout_script)
    share = mine(chain, entry.parent, miner=number, time=entry.time, uncles=entry.uncles)
    assert share.hash == entry.hash
    return share


def test_r9_an_uncle_is_not_an_ancestor() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 6)
    for entry in entries[-4:]:
        refused(chain, mine(chain, entries[-1], uncles=[entry]), "R9")


def test_r9_an_uncle_is_named_once() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 4)
    uncle = joined(chain, mine(chain, entries[2], miner=7))
    sibling = joined(chain, mine(chain, entries[2], miner=8))
    assert uncle.height == entries[3].height
    namer = joined(chain, mine(chain, entries[3], uncles=[uncle]))
    refused(chain, mine(chain, namer, uncles=[uncle]), "R9")
    between = joined(chain, mine(chain, namer, uncles=[sibling]))
    refused(chain, mine(chain, between, uncles=[uncle]), "R9")
    refused(chain, mine(chain, between, uncles=[sibling]), "R9")
    # On another branch nobody has named it yet.
    joined(chain, mine(chain, entries[3], miner=9, uncles=ascending(uncle, sibling)))


def test_r9_no_ancestor_that_could_have_named_an_uncle_is_out_of_reach() -> None:
    """From the first height at which it can be named to the last: whoever named it, nobody may do it again."""
    for named_at in range(FINE.uncle_depth):
        chain = new_chain(FINE)
        entries = line(chain, 4)
        uncle = joined(chain, mine(chain, entries[2], miner=7))
        for step in range(FINE.uncle_depth + 2):
            assert chain.tip is not None
            if step > named_at:
                refused(chain, mine(chain, chain.tip, uncles=[uncle]), "R9")
            joined(chain, mine(chain, chain.tip, uncles=[uncle] if step == named_at else []))


def test_r9_an_uncle_is_no_sibling_of_the_share() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 4)
    sibling = joined(chain, mine(chain, entries[2], miner=7))
    refused(chain, mine(chain, entries[2], miner=8, uncles=[sibling]), "R9")
    refused(chain, mine(chain, entries[2], miner=8, uncles=[entries[3]]), "R9")


def test_r9_an_uncle_stands_at_most_uncle_depth_below() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 9)
    uncles = {
        below: joined(chain, mine(chain, entries[8 - below], miner=10 + below))
        for below in range(1, FINE.uncle_depth + 3)
    }
    parent = entries[-1]
    for below, uncle in uncles.items():
        distance = parent.height + 1 - uncle.height
        assert distance == below
        if below <= FINE.uncle_depth:
            check = mine(chain, parent, uncles=[uncle], salt=below)
            add(chain, check)
        else:
            refused(chain, mine(chain, parent, uncles=[uncle]), "R9")
    joined(chain, mine(chain, parent, uncles=ascending(*(uncles[below] for below in (1, 2, 3))), salt=99))


def test_r9_building_and_checking_agree_on_every_uncle() -> None:
    """What ``uncle_candidates`` leaves out for a reason other than room is what ``accept`` refuses."""
    chain = new_chain(FINE)
    entries = line(chain, 8)
    for parent in entries[2:-1]:
        for miner in (7, 8):
            joined(chain, mine(chain, parent, miner=miner))
    parent = entries[-1]
    allowed = chain.uncle_candidates(parent)
    assert len(allowed) == FINE.uncle_max
    for entry in list(chain.entries()):
        share = mine(chain, parent, uncles=[entry], miner=9)
        good = (
            not chain.is_main(entry)
            and entry.parent is not None
            and entry.parent is not parent
            and parent.height + 1 - entry.height <= FINE.uncle_depth
        )
        if good:
            add(chain, share)
        else:
            refused(chain, share, "R9")
            assert entry not in allowed


def test_r9_a_child_of_a_side_share_is_no_uncle() -> None:
    chain = new_chain(FINE)
    entries = line(chain, 6)
    side = joined(chain, mine(chain, entries[3], miner=7))
    second = joined(chain, mine(chain, side, miner=7))
    refused(chain, mine(chain, entries[5], uncles=[second]), "R9")
    refused(chain, mine(chain, entries[5], uncles=ascending(side, second)), "R9")
    joined(chain, mine(chain, entries[5], uncles=[side]))


def test_r9_the_first_share_names_no_uncles() -> None:
    chain = new_chain(FINE)
    other = joined(chain, mine(chain, None, miner=7))
    refused(chain, mine(chain, None, uncles=[other]), "R9")
    refused(chain, mine(chain, other, uncles=[joined(chain, mine(chain, None, miner=8))]), "R9")


def test_r12_block_height_falls_by_a_day_at_most() -> None:
    chain = new_chain(FINE)
    blocks = {}
    for height in (200, 201, 200 - BLOCK_FALL, 199 - BLOCK_FALL, 20):
        blocks[height] = bytes([height]) * 32
        chain.learn_block(blocks[height], BlockFacts(height=height, next_bits=BLOCK_BITS), START_TIME)
    joined(chain, mine(chain, None, block=blocks[200]))
    parent = joined(chain, mine(chain, chain.tip, block=blocks[200]))
    assert parent.block_height == 201
    refused(chain, mine(chain, parent, block=blocks[199 - BLOCK_FALL]), "R12")
    refused(chain, mine(chain, parent, block=blocks[20]), "R12")
    joined(chain, mine(chain, parent, block=blocks[201], miner=1))
    joined(chain, mine(chain, parent, block=blocks[200 - BLOCK_FALL], miner=2))


# -- R10: the coinbase -----------------------------------------------------------------------------------------


def _mature() -> tuple[Sharechain, Share]:
    chain = new_chain(FINE)
    grow(chain, 6)
    return chain, mine(chain, chain.tip, witness_commitment=bytes(32), branch=(bytes([1]) * 32, bytes([2]) * 32))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"coinbase_value": VALUE + 1}, id="a satoshi more"),
        pytest.param({"coinbase_value": VALUE - 1}, id="a satoshi less"),
        pytest.param({"coinbase_value": 0}, id="no value"),
        pytest.param({"witness_commitment": None}, id="no witness commitment"),
        pytest.param({"witness_commitment": bytes([1]) * 32}, id="another witness commitment"),
        pytest.param({"merkle_branch": ()}, id="no branch"),
        pytest.param({"merkle_branch": (bytes([1]) * 32,)}, id="shorter branch"),
        pytest.param({"merkle_branch": (bytes([2]) * 32, bytes([1]) * 32)}, id="branch in another order"),
        pytest.param({"merkle_branch": (bytes([1]) * 32, bytes([2]) * 32, bytes(32))}, id="longer branch"),
    ],
)
def test_r10_nothing_of_the_coinbase_can_be_changed(change: dict[str, Any]) -> None:
    chain, share = _mature()
    refused(chain, replace(share, **change), "R10")
    add(chain, share)


@pytest.mark.parametrize("change", [{"payout_script": miner_script(77)}, {"payout_class": 47}])
def test_r10_nothing_of_the_data_can_be_changed(change: dict[str, Any]) -> None:
    chain, share = _mature()
    refused(chain, replace(share, data=replace(share.data, **change)), "R10")
    add(chain, share)


def test_r10_the_extranonce_cannot_be_changed() -> None:
    chain, share = _mature()
    script = share.coinbase_script[:-1] + bytes([share.coinbase_script[-1] ^ 1])
    refused(chain, replace(share, coinbase_script=script), "R10")
    refused(chain, replace(share, coinbase_script=share.coinbase_script + b"\x00"), "R10")
    refused(chain, replace(share, coinbase_script=share.coinbase_script[:-1]), "R10")


def test_r10_the_finder_does_not_pay_himself_alone() -> None:
    chain, _ = _mature()
    greedy = Payouts(outputs=b"", count=0, finder_amount=VALUE, threshold=0)
    refused(chain, mine(chain, chain.tip, payouts=greedy), "R10")


def test_r10_a_class_pays_what_that_class_pays() -> None:
    chain = new_chain(FINE.with_overrides({"name": "narrow", "payout_classes": [2, 12]}))
    grow(chain, 6)
    tip = chain.tip
    assert tip is not None
    of_other = chain.payouts(
        tip, value=VALUE, payout_class=2, max_bits=next_max_bits(chain.params, tip), block_bits=BLOCK_BITS
    )
    refused(chain, mine(chain, tip, payout_class=12, payouts=of_other), "R10")
    add(chain, mine(chain, tip, payout_class=2, payouts=of_other))


def test_r10_the_window_is_the_parents_own_not_the_tips() -> None:
    chain = new_chain(FINE)
    grow(chain, 12, miners=3)
    tip = chain.tip
    assert tip is not None
    assert tip.parent is not None
    grow(chain, 3, miners=3)
    assert chain.tip is not None
    of_tip = chain.payouts(
        chain.tip, value=VALUE, payout_class=12, max_bits=next_max_bits(FINE, chain.tip), block_bits=BLOCK_BITS
    )
    refused(chain, mine(chain, tip.parent, miner=8, payouts=of_tip), "R10")
    joined(chain, mine(chain, tip.parent, miner=8))


def test_r10_the_window_is_as_long_as_the_headers_bits_say() -> None:
    """With another Bitcoin target the window holds other work: shares of the wrong one pay the wrong miners."""
    chain = new_chain(FINE)
    grow(chain, 18, miners=18)
    tip = chain.tip
    assert tip is not None
    easier = target_to_bits(block_target(FINE, next_max_bits(FINE, tip), BLOCK_BITS) * 2)
    assert window_work(FINE, next_max_bits(FINE, tip), easier) == window_work(
        FINE, next_max_bits(FINE, tip), BLOCK_BITS
    )  # the divisor decides
    twice = target_to_bits(block_target(FINE, next_max_bits(FINE, tip), BLOCK_BITS) // 2)
    block = bytes([9]) * 32
    chain.learn_block(block, BlockFacts(height=100, next_bits=twice), START_TIME)
    of_short = chain.payouts(
        tip, value=VALUE, payout_class=47, max_bits=next_max_bits(FINE, tip), block_bits=BLOCK_BITS
    )
    refused(chain, mine(chain, tip, block=block, block_bits=twice, payout_class=47, payouts=of_short), "R10")
    joined(chain, mine(chain, tip, block=block, block_bits=twice, payout_class=47))


# -- R11: Bitcoin ----------------------------------------------------------------------------------------------


def test_r11_height_and_bits_are_what_bitcoin_demands() -> None:
    chain = new_chain(FINE)
    for height in (99, 100, 102, 2**31 - 1):
        refused(chain, mine(chain, None, block_height=height), "R11")
    refused(chain, mine(chain, None, block_bits=0x207FFFFE), "R11")
    refused(chain, mine(chain, None, block_bits=0x1D00FFFF), "R11")
    joined(chain, mine(chain, None, block_height=GENESIS_FACTS.height + 1))


def test_r11_header_bits_that_are_no_target_are_refused_not_computed_with() -> None:
    chain = new_chain(FINE)
    good = mine(chain, None)
    for bits in (0, 0xFFFFFFFF, 0x1D800000):
        header = good.header[:72] + bits.to_bytes(4, "little")
        for nonce in range(10**6):
            share = replace(good, header=header + nonce.to_bytes(4, "little"))
            if share.hash_value <= FINE.max_target:
                break
        refused(chain, share, "R11")


def test_r11_a_share_on_an_unknown_block_waits_and_joins() -> None:
    chain = new_chain(FINE)
    line(chain, 2)
    block = bytes([5]) * 32
    share = mine(chain, chain.tip, block=block, block_height=701)
    assert chain.accept(share, share.time) == Unanchored(block_hash=block)
    assert chain.missing_blocks() == (block,)
    assert share.hash not in chain
    assert chain.learn_block(bytes([6]) * 32, BlockFacts(height=700, next_bits=BLOCK_BITS), share.time) is None
    outcome = chain.learn_block(block, BlockFacts(height=700, next_bits=BLOCK_BITS), share.time)
    assert isinstance(outcome, Accepted)
    assert outcome.added == (share,)
    assert outcome.new_tip == share.hash
    assert chain.missing_shares() == chain.missing_blocks() == ()


@pytest.mark.parametrize("facts", [BlockFacts(height=701, next_bits=BLOCK_BITS), BlockFacts(height=700, next_bits=1)])
def test_r11_a_share_on_an_unknown_block_waits_and_is_refused(facts: BlockFacts) -> None:
    chain = new_chain(FINE)
    line(chain, 2)
    tip = chain.tip
    block = bytes([5]) * 32
    share = mine(chain, tip, block=block, block_height=701)
    assert isinstance(chain.accept(share, share.time), Unanchored)
    outcome = chain.learn_block(block, facts, share.time)
    assert isinstance(outcome, Accepted)
    assert outcome.added == ()
    ((rejected, error),) = outcome.rejected
    assert (rejected, error.rule) == (share, "R11")
    assert chain.tip is tip
    assert chain.statistics().waiting == 0


# -- the clock, which is no rule -------------------------------------------------------------------------------


def test_a_share_from_the_future_waits_until_its_time_has_come() -> None:
    chain = new_chain(FINE)
    now = START_TIME + 1_000
    line(chain, 2)
    edge = mine(chain, chain.tip, time=now + FINE.future_limit_s)
    assert isinstance(chain.accept(edge, now), Accepted)
    early = mine(chain, chain.tip, time=now + FINE.future_limit_s + 1)
    assert chain.accept(early, now) == Early(until=now + 1)
    assert chain.release(now) is None
    assert chain.release(now + 0.999) is None
    assert early.hash not in chain
    outcome = chain.release(now + 1)
    assert isinstance(outcome, Accepted)
    assert outcome.added == (early,)
    assert chain.tip is not None
    assert chain.tip.hash == early.hash


def test_a_header_time_far_ahead_waits_and_eases_nothing() -> None:
    """A time of now + 2^32 once overflowed a difficulty to the minimum elsewhere."""
    chain = hardened()
    assert chain.tip is not None
    share = mine(chain, chain.tip, time=2**32 - 1, bits=target_to_bits(NERVOUS.max_target))
    assert isinstance(chain.accept(share, START_TIME + 1_000), Early)
    assert share.hash not in chain


def test_a_share_is_a_block_when_it_meets_the_block_target() -> None:
    chain = new_chain(FINE)
    found = 0
    for number in range(30):
        share = mine(chain, None, salt=number)
        target = block_target(FINE, share.data.max_bits, share.block_bits)
        assert target == bits_to_target(share.data.max_bits) // 3
        assert is_block(FINE, share) == (share.hash_value <= target)
        found += is_block(FINE, share)
    assert 0 < found < 30
    real = FINE.with_overrides({"name": "real", "block_target_divisor": 1})
    assert block_target(real, share.data.max_bits, 0x1D00FFFF) == 0xFFFF << 208


def test_the_first_share_needs_no_parent() -> None:
    chain = new_chain(FINE)
    share = mine(chain, None)
    assert share.data.parent == NULL_HASH
    assert add(chain, share).connected == (share.hash,)
    assert chain.tip is not None
    assert list(ancestors(chain.tip, 5)) == [chain.tip]
    assert share.previous_block_hash == GENESIS_BLOCK
