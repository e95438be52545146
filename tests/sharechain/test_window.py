"""The window against its dumb twin, which walks back from the parent and starts from nothing each time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharechain.chain import Sharechain
from sharechain.entry import ChainEntry
from sharechain.params import Params
from sharechain.window import Window, unit_parts
from tests.builders import FINE, START_TIME, Step, add, grow, grow_tree, harder, mine, miner_script, new_chain

LONG = FINE.with_overrides({"name": "long", "window_max_shares": 1_000})


def twin(params: Params, tip: ChainEntry | None, wanted: int) -> tuple[list[tuple[bytes, int]], int]:
    """The weights by script, and the number of main-chain shares, of a window: section 5 of the protocol, in words."""
    weights: dict[bytes, int] = {}
    work = units = 0
    numerator, denominator = params.uncle_weight
    while tip is not None and work < wanted and units < params.window_max_shares:
        whole = tip.work + sum(uncle.work for uncle in tip.uncles)
        kept = min(whole, wanted - work)
        left = kept
        for uncle in tip.uncles:
            part = (uncle.work * numerator // denominator) * kept // whole
            weights[uncle.payout_script] = weights.get(uncle.payout_script, 0) + part
            left -= part
        weights[tip.payout_script] = weights.get(tip.payout_script, 0) + left
        work += kept
        units += 1
        tip = tip.parent
    return sorted((script, weight) for script, weight in weights.items() if weight), units


def check(window: Window, params: Params, tip: ChainEntry | None, wanted: int) -> None:
    window.move_to(tip, wanted)
    weights, units = twin(params, tip, wanted)
    assert window.table.items() == weights
    assert window.table.total == sum(weight for _, weight in weights)
    assert len(window) == units


steps = st.lists(
    st.tuples(st.sampled_from((0, 0, 0, 1, 1, 2, 4)), st.integers(0, 4), st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=24,
)
#: (which share to move to, wanted work in tenths of an easy share's)
moves = st.lists(st.tuples(st.integers(0, 23), st.integers(1, 300)), min_size=1, max_size=30)


@pytest.mark.slow
@given(steps=steps, moves=moves, most=st.sampled_from((1, 2, 5, 1_000)))
def test_moved_anyhow_it_equals_the_window_made_from_nothing(
    steps: list[Step], moves: Sequence[tuple[int, int]], most: int
) -> None:
    chain = new_chain(FINE)
    entries = [chain.entry(share.hash) for share in grow_tree(chain, steps)]
    params = FINE.with_overrides({"window_max_shares": most})
    window = Window(params)
    for target, tenths in moves:
        check(window, params, entries[target % len(entries)], 1 + tenths * 1024 // 10)
    check(window, params, None, 1)
    check(window, params, entries[-1], 10**9)


@pytest.mark.slow
@given(steps=steps)
def test_following_the_tip_through_reorgs_it_equals_the_window_made_from_nothing(steps: list[Step]) -> None:
    chain = new_chain(FINE)
    window = Window(FINE)
    shares = grow_tree(new_chain(FINE), steps)
    for share in shares:
        add(chain, share)
        check(window, FINE, chain.tip, 5 * 1024 + share.data.height * 77)


def entries_of(chain: Sharechain) -> list[ChainEntry]:
    return list(chain.entries())


def test_the_weights_add_up_to_what_is_wanted_exactly() -> None:
    chain = new_chain(LONG)
    grow_tree(chain, [(n % 3 == 1, n % 5, n % 4, True) for n in range(40)])
    assert chain.tip is not None
    assert any(entry.uncles for entry in entries_of(chain))
    window = Window(LONG)
    for wanted in (1, 2, 1_023, 1_024, 1_025, 9_999, chain.tip.total_work - 1, chain.tip.total_work):
        window.move_to(chain.tip, wanted)
        assert window.table.total == wanted
    window.move_to(chain.tip, chain.tip.total_work + 1)
    assert window.table.total == chain.tip.total_work
    assert window.oldest is chain.main_entry(0)


def test_every_amount_of_wanted_work_is_cut_exactly() -> None:
    """Down to the last hash, where rounding of an uncle's part could take more than there is."""
    params = FINE.with_overrides({"name": "tiny", "max_target": hex(2**252 - 1)})
    chain = new_chain(params)
    grow(chain, 3)
    parent = chain.tip
    for miner in (5, 6, 7):
        add(chain, mine(chain, parent, miner=miner))
    grow(chain, 3)
    tip = chain.tip
    assert tip is not None
    assert any(len(entry.uncles) > 1 for entry in entries_of(chain))
    window = Window(params)
    for wanted in [*range(1, tip.total_work + 2), *range(tip.total_work, 0, -7)]:
        check(window, params, tip, wanted)
        assert window.table.total == min(wanted, tip.total_work)


def test_an_uncle_gets_nine_tenths_and_the_nephew_the_rest() -> None:
    chain = new_chain(FINE)
    grow(chain, 3, miners=1)
    parent = chain.tip
    light = mine(chain, parent, miner=1)
    add(chain, light)
    add(chain, mine(chain, parent, miner=2, bits=harder(light.data.bits, 3)))
    heavy = chain.tip
    assert heavy is not None
    uncle = chain.entry(light.hash)
    assert uncle is not None
    nephew_share = mine(chain, heavy, miner=3, uncles=[uncle])
    add(chain, nephew_share)
    nephew = chain.entry(nephew_share.hash)
    assert nephew is not None
    part = uncle.work * 9 // 10
    assert unit_parts(FINE, nephew) == [
        (miner_script(3), nephew.work + uncle.work - part),
        (miner_script(1), part),
    ]
    window = Window(FINE)
    window.move_to(nephew, nephew.unit_work)
    assert window.table.weight(miner_script(1)) == part
    assert window.table.weight(miner_script(3)) == nephew.unit_work - part
    assert window.table.weight(miner_script(2)) == 0


def test_the_oldest_unit_is_cut_pro_rata() -> None:
    chain = new_chain(FINE)
    grow(chain, 3, miners=1)
    parent = chain.tip
    light = mine(chain, parent, miner=1)
    add(chain, light)
    add(chain, mine(chain, parent, miner=2, bits=harder(light.data.bits, 3)))
    uncle = chain.entry(light.hash)
    assert uncle is not None
    add(chain, mine(chain, chain.tip, miner=3, uncles=[uncle]))
    nephew = chain.tip
    assert nephew is not None
    add(chain, mine(chain, nephew, miner=4))
    tip = chain.tip
    assert tip is not None
    window = Window(FINE)
    half = nephew.unit_work // 2
    window.move_to(tip, tip.work + half)
    assert window.table.weight(miner_script(4)) == tip.work
    part = uncle.work * 9 // 10 * half // nephew.unit_work
    assert window.table.weight(miner_script(1)) == part
    assert window.table.weight(miner_script(3)) == half - part
    assert len(window) == 2


def test_a_share_heavier_than_the_window_fills_it_alone() -> None:
    chain = new_chain(FINE)
    grow(chain, 4)
    add(chain, mine(chain, chain.tip, miner=8, bits=harder(0x1F3FFFFF, 20)))
    window = Window(FINE)
    window.move_to(chain.tip, 12 * 1024)
    assert window.table.items() == [(miner_script(8), 12 * 1024)]
    check(window, FINE, chain.tip.parent if chain.tip else None, 12 * 1024)


def test_no_more_shares_than_the_most() -> None:
    chain = new_chain(FINE)
    grow(chain, 30)
    assert chain.tip is not None
    window = Window(FINE)
    window.move_to(chain.tip, 10**9)
    assert len(window) == FINE.window_max_shares == 20
    assert window.table.total == sum(entry.unit_work for entry in entries_of(chain)[-20:])


def test_weights_do_not_depend_on_times() -> None:
    totals = set()
    for gap in (1, 10, 60):
        chain = new_chain(FINE)
        for number in range(6):
            time = START_TIME + gap * number
            add(chain, mine(chain, chain.tip, miner=number % 2, time=time, bits=0x1F0FFFFF))
        window = Window(FINE)
        window.move_to(chain.tip, 10**6)
        totals.add(tuple(window.table.items()))
    assert len(totals) == 1
