"""Difficulties as exponents, and the loop that finds the right one for a miner of any size."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.stratum.vardiff import (
    EASIEST_EXPONENT,
    HARDEST_EXPONENT,
    HASHES_PER_DIFFICULTY,
    Vardiff,
    VardiffSettings,
    difficulty_of_exponent,
    exponent_of_difficulty,
    hardest_exponent_for,
    target_of_difficulty,
    target_of_exponent,
    tolerant_target_of_exponent,
)
from sharechain.difficulty import DIFFICULTY_1_TARGET

exponents = st.integers(EASIEST_EXPONENT, HARDEST_EXPONENT)


class PoissonMiner:
    """A miner of a constant speed, which takes up a new difficulty at once."""

    def __init__(self, hash_rate: float, vardiff: Vardiff, *, limit: int = 0, seed: int = 1) -> None:
        self.rate = hash_rate / HASHES_PER_DIFFICULTY
        self.vardiff = vardiff
        self.limit = limit
        self.random = random.Random(seed)
        self.now = 0.0
        self.submissions: list[float] = []
        self.changes: list[tuple[float, int]] = []

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        next_tick = self.now + 1.0
        while self.now < end:
            exponent = self.vardiff.exponent_for(self.limit)
            rate = self.rate / 2.0**exponent
            wait = self.random.expovariate(rate) if rate else math.inf
            if self.now + wait < next_tick:
                self.now += wait
                self.submissions.append(self.now)
                self.vardiff.on_submission(exponent, self.now)
            else:  # The exponential distribution has no memory: the wait may start again.
                self.now = next_tick
                next_tick += 1.0
                self.vardiff.on_tick(self.now)
            if self.vardiff.exponent_for(self.limit) != exponent:
                self.changes.append((self.now, self.vardiff.exponent_for(self.limit)))


def test_difficulty_1_is_the_target_of_bitcoin_core() -> None:
    assert target_of_exponent(0) == DIFFICULTY_1_TARGET == 0xFFFF << 208
    assert target_of_difficulty(1.0) == DIFFICULTY_1_TARGET


@given(exponents)
def test_target_of_exponent_agrees_with_the_difficulty_a_miner_reads(exponent: int) -> None:
    difficulty = json.loads(json.dumps(difficulty_of_exponent(exponent)))
    assert target_of_difficulty(difficulty) == target_of_exponent(exponent)
    assert exponent_of_difficulty(difficulty) == exponent
    assert isinstance(difficulty, int) == (exponent >= 0)


@given(st.integers(1, 2**255 - 2**239))
def test_hardest_exponent_is_the_last_whose_target_covers_the_limit(limit: int) -> None:
    exponent = hardest_exponent_for(limit)
    assert target_of_exponent(exponent) >= limit
    assert exponent == HARDEST_EXPONENT or target_of_exponent(exponent + 1) < limit


@pytest.mark.parametrize("limit", [2**255 - 1, 0x7FFFFF << 232, 2**256 - 1])
def test_regtest_targets_get_the_easiest_difficulty_that_miners_can_represent(limit: int) -> None:
    assert hardest_exponent_for(limit) == EASIEST_EXPONENT
    assert difficulty_of_exponent(EASIEST_EXPONENT) == 4.656612873077393e-10


@given(exponents)
def test_tolerance_covers_miners_that_take_2_to_the_224_for_difficulty_1(exponent: int) -> None:
    tolerant, exact = tolerant_target_of_exponent(exponent), target_of_exponent(exponent)
    assert tolerant == 2 ** (224 - exponent) - 1
    assert exact <= tolerant <= exact * 65537 // 65535


@given(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False))
def test_any_difficulty_that_a_miner_names_becomes_a_power_of_two_not_above_it(difficulty: float) -> None:
    exponent = exponent_of_difficulty(difficulty)
    assert EASIEST_EXPONENT <= exponent <= HARDEST_EXPONENT
    if 2.0**EASIEST_EXPONENT <= difficulty < 2.0**HARDEST_EXPONENT:
        assert 2.0**exponent <= difficulty < 2.0 ** (exponent + 1)
    assert 0 < target_of_difficulty(difficulty) < 2**256 or difficulty > 2.0**220


@pytest.mark.parametrize("hash_rate", [1e6, 5e11, 1e12, 2e14, 1e18])
@pytest.mark.parametrize("seed", range(3))
def test_a_miner_of_any_size_comes_to_speak_every_five_seconds(hash_rate: float, seed: int) -> None:
    miner = PoissonMiner(hash_rate, Vardiff(VardiffSettings(), 0.0), seed=seed)
    miner.run(600)
    before = len(miner.submissions)
    miner.run(3000)
    interval = 3000 / (len(miner.submissions) - before)
    assert 2.0 < interval < 12.5
    wanted = math.log2(hash_rate / HASHES_PER_DIFFICULTY * 5.0)
    assert abs(miner.vardiff.exponent_for(0) - wanted) < 2.0


@pytest.mark.parametrize("seed", range(5))
def test_the_difficulty_of_a_steady_miner_stays_put(seed: int) -> None:
    miner = PoissonMiner(1e13, Vardiff(VardiffSettings(), 0.0), seed=seed)
    miner.run(600)
    settled = len(miner.changes)
    miner.run(4 * 3600)
    assert len(miner.changes) - settled <= 4, "one change an hour is noise enough"


@pytest.mark.parametrize("hash_rate", [2e14, 1e15, 1e17])
def test_the_ramp_for_a_huge_miner_takes_seconds_and_few_submissions(hash_rate: float) -> None:
    miner = PoissonMiner(hash_rate, Vardiff(VardiffSettings(), 0.0))
    miner.run(15)
    wanted = math.log2(hash_rate / HASHES_PER_DIFFICULTY * 5.0)
    assert abs(miner.vardiff.exponent_for(0) - wanted) < 2.0
    assert len(miner.submissions) < 80


def test_a_silent_miner_is_eased_ever_faster_until_it_is_heard() -> None:
    vardiff = Vardiff(VardiffSettings(start_difficulty=2.0**20), 0.0)
    seen = []
    for second in range(1, 121):
        vardiff.on_tick(float(second))
        seen.append(vardiff.exponent_for(0))
    assert seen[:19] == [20] * 19, "four intervals of silence are no news"
    assert seen[19::20] == [18, 14, 6, -10, -26, EASIEST_EXPONENT]


def test_a_miner_that_slows_down_is_eased_and_one_that_speeds_up_is_raised() -> None:
    miner = PoissonMiner(1e13, Vardiff(VardiffSettings(), 0.0))
    miner.run(600)
    fast = miner.vardiff.exponent_for(0)
    miner.rate /= 64
    miner.run(600)
    slow = miner.vardiff.exponent_for(0)
    assert 4 <= fast - slow <= 8
    miner.rate *= 64
    miner.run(600)
    assert 4 <= miner.vardiff.exponent_for(0) - slow <= 8


def test_the_difficulty_never_exceeds_what_share_and_block_target_allow() -> None:
    limit = target_of_exponent(3)
    miner = PoissonMiner(1e12, Vardiff(VardiffSettings(), 0.0), limit=limit)
    miner.run(30)
    assert {exponent for _, exponent in miner.changes} <= set(range(EASIEST_EXPONENT, 4))
    assert miner.vardiff.exponent_for(limit) == 3
    assert miner.vardiff.exponent_for(limit + 1) == 2


def test_a_burst_of_queued_submissions_is_not_a_huge_miner() -> None:
    vardiff = Vardiff(VardiffSettings(start_difficulty=1.0), 0.0)
    vardiff.start(100.0)
    for _ in range(8):
        vardiff.on_submission(0, 100.001)
    assert vardiff.exponent_for(0) <= 4


def test_submissions_of_older_jobs_count_at_their_own_difficulty() -> None:
    vardiff = Vardiff(VardiffSettings(start_difficulty=1024.0), 0.0)
    for i in range(30):
        vardiff.on_submission(0, 0.1 * i)
    assert vardiff.exponent_for(0) == 10
    assert vardiff.hash_rate(10.0) == pytest.approx(30 / 9.4 * 2**32, rel=0.15)


def test_a_fixed_difficulty_stays_where_the_owner_put_it_within_the_limit() -> None:
    vardiff = Vardiff(VardiffSettings(), 0.0)
    vardiff.fix(5)
    for i in range(100):
        vardiff.on_submission(5, 0.01 * i)
    vardiff.on_tick(1000.0)
    assert vardiff.exponent_for(0) == 5
    assert vardiff.exponent_for(target_of_exponent(-2)) == -2
    vardiff.fix(None)
    assert vardiff.exponent_for(0) != 5


def test_a_suggestion_moves_the_difficulty_and_measuring_goes_on() -> None:
    vardiff = Vardiff(VardiffSettings(), 0.0)
    vardiff.suggest(-3, 1.0)
    assert vardiff.exponent_for(0) == -3
    vardiff.suggest(10_000, 1.0)
    assert vardiff.exponent_for(0) == HARDEST_EXPONENT


def test_a_new_miner_has_no_hash_rate() -> None:
    assert Vardiff(VardiffSettings(), 5.0).hash_rate(5.0) == 0.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["target_interval_s", "window_s", "start_difficulty"])
def test_settings_refuse_what_is_not_a_positive_number(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        VardiffSettings(**{name: value})


@given(
    st.lists(
        st.tuples(exponents, st.floats(0, 1e6, allow_nan=False), st.sampled_from(["submission", "tick", "suggest"])),
        max_size=50,
    )
)
def test_no_sequence_of_events_leads_out_of_the_representable_range(events: list[tuple[int, float, str]]) -> None:
    vardiff = Vardiff(VardiffSettings(), 0.0)
    now = 0.0
    for exponent, wait, kind in events:
        now += wait
        if kind == "submission":
            vardiff.on_submission(exponent, now)
        elif kind == "suggest":
            vardiff.suggest(exponent, now)
        else:
            vardiff.on_tick(now)
        assert EASIEST_EXPONENT <= vardiff.exponent_for(0) <= HARDEST_EXPONENT
        assert vardiff.hash_rate(now) >= 0.0
