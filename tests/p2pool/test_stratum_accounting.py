"""The books of miners: rates that mean something, bounded memory, and nothing lost over a restart."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.stratum import accounting
from p2pool.stratum.accounting import FORGET_S, SPANS_S, Accounting, Meter
from p2pool.stratum.values import SubmissionOutcome
from p2pool.stratum.vardiff import HASHES_PER_DIFFICULTY

START = 1_700_000_000.0
ACCEPTED = SubmissionOutcome(reason=None, difficulty=8.0, best=9.5)
STALE = SubmissionOutcome(reason="stale")


def note(books: Accounting, outcome: SubmissionOutcome, now: float, worker: str = "rig", address: str = "a") -> None:
    books.note(address=address, worker=worker, outcome=outcome, now=now)


def test_every_outcome_is_entered_for_worker_address_and_node() -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START + 1)
    note(books, SubmissionOutcome(reason=None, difficulty=2.0, best=64.0, is_share=True, is_block=True), START + 2)
    note(books, STALE, START + 3)
    note(books, ACCEPTED, START + 4, worker="other")
    [other, rig] = books.workers(START + 5)
    assert (rig["address"], rig["worker"], rig["accepted"], rig["difficulty"]) == ("a", "rig", 2, 10.0)
    assert (rig["shares"], rig["blocks"], rig["rejected"]) == (1, 1, {"stale": 1})
    assert (rig["best"], rig["best_at"], rig["first_seen"], rig["last_seen"]) == (64.0, START + 2, START + 1, START + 3)
    assert (other["worker"], other["accepted"], other["rejected"]) == ("other", 1, {})
    [address] = books.addresses(START + 5)
    assert (address["address"], address["accepted"], address["rejected"]) == ("a", 3, {"stale": 1})
    totals = books.totals(START + 5)
    assert (totals["workers"], totals["accepted"], totals["best"]) == (2, 3, 64.0)


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", [2.0**-28, 1.0, 1024.0])
def test_the_rates_of_a_steady_miner_are_its_hash_rate_over_every_span(difficulty: float) -> None:
    meter = Meter(START, START, [0.0] * len(SPANS_S))
    chance, now = random.Random(7), START
    while now < START + 86_400:
        now += chance.expovariate(1 / 5.0)
        meter.add(difficulty, now)
    wanted = difficulty / 5.0 * HASHES_PER_DIFFICULTY
    rates = meter.rates(now)
    for name, tolerance in {"1m": 0.6, "10m": 0.25, "1h": 0.1, "24h": 0.03}.items():
        assert rates[name] == pytest.approx(wanted, rel=tolerance), name


def test_a_young_worker_has_its_whole_rate_in_every_span_and_a_gone_one_fades() -> None:
    books = Accounting(START)
    for second in range(0, 60, 5):
        note(books, ACCEPTED, START + second)
    wanted = 8.0 / 5.0 * HASHES_PER_DIFFICULTY
    [row] = books.workers(START + 60)
    for name in SPANS_S:
        assert row[f"hash_rate_{name}"] == pytest.approx(wanted, rel=0.15)
    [later] = books.workers(START + 3660)
    assert later["hash_rate_1m"] < wanted * 1e-20
    assert later["hash_rate_10m"] < wanted * 0.01
    assert later["hash_rate_24h"] == pytest.approx(wanted * 60 / 3660, rel=0.2)


def test_the_first_submission_of_a_worker_is_no_huge_rate() -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START)
    assert books.hash_rate("a", START) <= 8.0 / 10.0 * HASHES_PER_DIFFICULTY * 1.01
    assert books.hash_rate("nobody", START) == 0.0


def test_who_was_not_heard_for_ten_minutes_does_not_mine() -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START, worker="gone")
    note(books, ACCEPTED, START + 500)
    assert books.totals(START + 600)["workers"] == 2
    assert books.totals(START + 601)["workers"] == 1


def test_invented_names_push_out_those_unheard_of_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "MAX_ROWS", 3)
    books = Accounting(START)
    for number, name in enumerate(["one", "two", "three", "one", "four"]):
        note(books, ACCEPTED, START + number, worker=name, address=name)
    assert [row["worker"] for row in books.workers(START)] == ["four", "one", "three"]
    assert [row["address"] for row in books.addresses(START)] == ["four", "one", "three"]
    assert books.totals(START)["accepted"] == 5


def test_a_week_of_silence_is_forgotten() -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START, worker="gone", address="old")
    note(books, ACCEPTED, START + 10)
    kept = Accounting.decode(b"".join(books.encode(START + FORGET_S + 5)))
    assert [row["worker"] for row in kept.workers(START)] == ["rig"]
    assert [row["address"] for row in kept.addresses(START)] == ["a"]


outcomes = st.one_of(
    st.builds(
        SubmissionOutcome,
        reason=st.none(),
        difficulty=st.floats(2.0**-31, 2.0**60),
        best=st.floats(0, 2.0**60),
        is_share=st.booleans(),
        is_block=st.booleans(),
    ),
    st.builds(SubmissionOutcome, reason=st.sampled_from(["stale", "duplicate", "low difficulty"])),
)
events = st.lists(
    st.tuples(st.sampled_from("ab"), st.text(max_size=4), outcomes, st.floats(-100, 1e5, allow_nan=False)), max_size=20
)


@pytest.mark.slow
@given(events)
def test_books_that_were_kept_are_the_same_books(entries: list[tuple[str, str, SubmissionOutcome, float]]) -> None:
    books, now = Accounting(START), START
    for address, worker, outcome, step in entries:
        now = max(now + step, START - 50)
        note(books, outcome, now, worker=worker, address=address)
    kept = Accounting.decode(b"".join(books.encode(now)))
    moment = now + 30
    assert kept.workers(moment) == books.workers(moment)
    assert kept.addresses(moment) == books.addresses(moment)
    assert kept.totals(moment) == books.totals(moment)
    assert b"".join(kept.encode(now)) == b"".join(books.encode(now))
    for row in [*kept.workers(moment), kept.totals(moment)]:
        assert all(math.isfinite(row[f"hash_rate_{name}"]) and row[f"hash_rate_{name}"] >= 0 for name in SPANS_S)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.slow
@given(st.one_of(st.binary(max_size=50), json_values.map(lambda value: json.dumps(value).encode())))
def test_what_are_no_books_is_a_value_error(encoded: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Accounting.decode(encoded)


@pytest.mark.slow
@given(st.data())
def test_damaged_books_are_books_or_a_value_error(data: st.DataObject) -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START)
    note(books, STALE, START)
    encoded = bytearray(b"".join(books.encode(START)))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.sampled_from(b'0129e-+"[]{},:nulx'))
    with suppress(ValueError):
        Accounting.decode(bytes(encoded)).workers(START)


def test_rates_never_rise_while_nothing_comes() -> None:
    books = Accounting(START)
    note(books, ACCEPTED, START)
    rates = [books.hash_rate("a", START + second) for second in range(0, 5000, 50)]
    assert all(later <= earlier for earlier, later in pairwise(rates))
