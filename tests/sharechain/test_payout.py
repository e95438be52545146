"""Payouts: the parts make the whole, the class holds, nobody is paid twice, nobody's luck can be bought."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharechain.hasher import WeightTable
from sharechain.params import DUST, MAX_MONEY, NETWORKS
from sharechain.payout import build_payouts, decode_outputs, draw_seed, finder_bonus
from tests.builders import miner_script

MAINNET = NETWORKS["mainnet"]
PARENT = bytes(range(32))
SUBSIDY = 312_500_000


def table_of(weights: list[int]) -> WeightTable:
    table = WeightTable()
    for number, weight in enumerate(weights):
        table.add(miner_script(number), weight)
    return table


def entitlements(weights: list[int], value: int) -> dict[bytes, int]:
    rest = value - finder_bonus(MAINNET, value)
    return {miner_script(number): rest * weight // sum(weights) for number, weight in enumerate(weights)}


weights = st.lists(
    st.one_of(st.integers(1, 100), st.integers(1, 2**70), st.just(1), st.integers(2**60, 2**61)),
    min_size=1,
    max_size=80,
)
values = st.one_of(
    st.integers(0, MAX_MONEY), st.integers(0, 200_000), st.sampled_from((0, 1, 545, 546, 547, 10_000, SUBSIDY))
)
classes = st.sampled_from(MAINNET.payout_classes)


@pytest.mark.slow
@given(weights=weights, value=values, payout_class=classes, parent=st.binary(min_size=32, max_size=32))
@example(weights=[1], value=0, payout_class=12, parent=PARENT)
@example(weights=[1] * 80, value=MAX_MONEY, payout_class=12, parent=PARENT)
def test_the_parts_sum_to_the_value_within_the_class_and_nobody_is_paid_twice(
    weights: list[int], value: int, payout_class: int, parent: bytes
) -> None:
    payouts = build_payouts(MAINNET, table_of(weights), value=value, parent=parent, payout_class=payout_class)
    outputs = decode_outputs(payouts.outputs)
    scripts = [script for script, _ in outputs]
    amounts = [amount for _, amount in outputs]
    assert sum(amounts) + payouts.finder_amount == value
    assert payouts.count == len(outputs) <= payout_class
    assert len(set(scripts)) == len(scripts)
    assert outputs == sorted(outputs, key=lambda output: (-output[1], output[0]))
    assert all(amount >= DUST for amount in amounts)
    assert payouts.finder_amount == 0 or payouts.finder_amount >= DUST or not outputs
    assert payouts.threshold >= MAINNET.min_payout


@pytest.mark.slow
@given(weights=weights, value=values, payout_class=classes)
def test_large_entitlements_are_paid_exactly_and_small_ones_one_lot_or_nothing(
    weights: list[int], value: int, payout_class: int
) -> None:
    payouts = build_payouts(MAINNET, table_of(weights), value=value, parent=PARENT, payout_class=payout_class)
    outputs = decode_outputs(payouts.outputs)
    dust = value - payouts.finder_amount - sum(entitlements(weights, value).values())
    paid = dict(outputs)
    entitled = entitlements(weights, value)
    lots = set()
    for place, (script, amount) in enumerate(outputs):
        joined = place == 0 and payouts.finder_amount == 0
        if entitled[script] >= payouts.threshold:
            assert amount == entitled[script] or (joined and 0 <= amount - entitled[script] < DUST), dust
        elif not joined:
            lots.add(amount)
            assert amount >= entitled[script]
    assert len(lots) <= 1
    for script, amount in entitled.items():
        if amount >= payouts.threshold:
            assert script in paid


def test_with_room_for_all_everybody_is_paid_exactly() -> None:
    weights = [5, 3, 2]
    payouts = build_payouts(MAINNET, table_of(weights), value=SUBSIDY, parent=PARENT, payout_class=12)
    rest = SUBSIDY - SUBSIDY // 200
    assert decode_outputs(payouts.outputs) == [
        (miner_script(0), rest * 5 // 10),
        (miner_script(1), rest * 3 // 10),
        (miner_script(2), rest * 2 // 10),
    ]
    assert payouts.finder_amount == SUBSIDY // 200 + rest - rest * 5 // 10 - rest * 3 // 10 - rest * 2 // 10


def test_without_a_window_the_finder_is_paid_all() -> None:
    for value in (0, 1, 545, SUBSIDY):
        payouts = build_payouts(MAINNET, WeightTable(), value=value, parent=bytes(32), payout_class=12)
        assert (payouts.outputs, payouts.count, payouts.finder_amount) == (b"", 0, value)


def test_a_finder_amount_below_dust_joins_the_first_payout() -> None:
    value = 100_000
    assert finder_bonus(MAINNET, value) == 500 < DUST
    payouts = build_payouts(MAINNET, table_of([1, 1]), value=value, parent=PARENT, payout_class=12)
    (first, second) = decode_outputs(payouts.outputs)
    assert payouts.finder_amount == 0
    assert (first[1], second[1]) == (49_750 + 500, 49_750)
    larger = build_payouts(MAINNET, table_of([1, 1]), value=DUST * 200, parent=PARENT, payout_class=12)
    assert larger.finder_amount == DUST


def test_a_pool_below_dust_goes_to_the_finder() -> None:
    whale, shrimp = 10**9, 1_000  # the shrimp is entitled to some 311 sat
    payouts = build_payouts(MAINNET, table_of([whale, shrimp]), value=SUBSIDY, parent=PARENT, payout_class=12)
    rest = SUBSIDY - SUBSIDY // 200
    entitled = rest * whale // (whale + shrimp)
    assert rest - entitled < DUST
    assert decode_outputs(payouts.outputs) == [(miner_script(0), entitled)]
    assert payouts.finder_amount == SUBSIDY - entitled


def test_a_pool_of_dust_or_more_is_one_lot() -> None:
    payouts = build_payouts(MAINNET, table_of([10**9, 1_000, 1_000]), value=SUBSIDY, parent=PARENT, payout_class=12)
    outputs = decode_outputs(payouts.outputs)
    assert len(outputs) == 2
    assert DUST <= outputs[1][1] < MAINNET.min_payout


@pytest.mark.parametrize("value", [0, 1, 100, 545])
def test_a_value_below_dust_goes_to_the_finder(value: int) -> None:
    payouts = build_payouts(MAINNET, table_of([3, 2, 1]), value=value, parent=PARENT, payout_class=12)
    assert (payouts.outputs, payouts.count, payouts.finder_amount) == (b"", 0, value)


def test_the_seed_is_of_the_parent_and_the_class() -> None:
    seeds = {draw_seed(parent, size) for parent in (PARENT, bytes(32)) for size in MAINNET.payout_classes}
    assert len(seeds) == 2 * len(MAINNET.payout_classes)
    assert all(len(seed) == 32 for seed in seeds)


def zipf(count: int) -> list[int]:
    return [10**9 // rank for rank in range(1, count + 1)]


def parent_number(number: int) -> bytes:
    return hashlib.sha256(b"parent %d" % number).digest()


def test_the_finder_cannot_choose_the_winners_by_giving_up_a_few_satoshis() -> None:
    """A coinbase may pay less than it could. If each satoshi less drew other winners, a small miner would try values
    until it wins a lot, in each block that it finds, for nothing."""
    table = table_of(zipf(200))
    changed = 0
    for number in range(20):
        winners = set()
        for given_up in range(25):
            payouts = build_payouts(
                MAINNET, table, value=SUBSIDY - given_up, parent=parent_number(number), payout_class=12
            )
            winners.add(frozenset(script for script, _ in decode_outputs(payouts.outputs)))
        changed += len(winners) - 1
    assert changed <= 5, f"{changed} of 480 values lower by up to 24 sat drew other winners"


@pytest.mark.slow
def test_the_mean_over_many_seeds_is_the_entitlement() -> None:
    """Zipf's law, 200 miners, class 12, 2,000 seeds: who is drawn how often, as chi-square with fixed seeds."""
    weights = zipf(200)
    table = table_of(weights)
    entitled = entitlements(weights, SUBSIDY)
    draws = 2_000
    hits: dict[bytes, int] = {}
    received: dict[bytes, int] = {}
    lot = threshold = 0
    for number in range(draws):
        payouts = build_payouts(MAINNET, table, value=SUBSIDY, parent=parent_number(number), payout_class=12)
        threshold = payouts.threshold
        for script, amount in decode_outputs(payouts.outputs):
            received[script] = received.get(script, 0) + amount
            if entitled[script] < threshold:
                hits[script] = hits.get(script, 0) + 1
                lot = amount
    small = {script: amount for script, amount in entitled.items() if amount < threshold}
    assert len(small) > 150
    chi_square = 0.0
    for script, amount in small.items():
        expected = draws * amount / lot
        chi_square += (hits.get(script, 0) - expected) ** 2 / expected / (1 - amount / lot)
    # Mean len(small), standard deviation sqrt(2 len(small)), about 20; five of them is one case in millions.
    assert abs(chi_square - len(small)) < 5 * (2 * len(small)) ** 0.5
    total = sum(received.values())
    assert total <= draws * SUBSIDY
    assert total > 0.99 * draws * (SUBSIDY - SUBSIDY // 200)
    for script, amount in entitled.items():
        if amount >= threshold:
            assert received[script] == draws * amount
