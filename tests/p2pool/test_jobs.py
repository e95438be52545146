"""Jobs: what a miner makes of one is a share by everybody's rules, and a block by Bitcoin's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, build_template
from p2pool.errors import StratumError
from p2pool.jobs import (
    EXTRANONCE_SIZE,
    Candidate,
    Job,
    JobBook,
    Work,
    build_job,
    next_heaviness,
    next_work,
    shares_in_window,
)
from sharechain.chain import Accepted, Sharechain
from sharechain.coinbase import build_coinbase
from sharechain.difficulty import DIFFICULTY_1_TARGET, bits_to_target, target_to_bits, work_of
from sharechain.errors import InvalidShare
from sharechain.params import NETWORKS
from sharechain.payout import decode_outputs
from sharechain.share import Share, decode_share, share_commitment
from sharechain.validate import BlockFacts, hardest_target, median_time, next_max_bits
from tests.builders import (
    BLOCK_BITS,
    FINE,
    GENESIS_BLOCK,
    GENESIS_FACTS,
    PARAMS,
    START_TIME,
    VALUE,
    add,
    grow,
    mine,
    miner_script,
    new_chain,
)
from tests.p2pool.network import ANYBODY_SCRIPT, is_any_block, is_plain_share, mine_blocks, solve, spend

MAINNET = NETWORKS["mainnet"]
EXTRANONCES = st.binary(min_size=EXTRANONCE_SIZE, max_size=EXTRANONCE_SIZE)


def template(**changes: object) -> BlockTemplate:
    made = build_template(
        version=0x20000000,
        previous_block_hash=GENESIS_BLOCK,
        height=GENESIS_FACTS.height + 1,
        bits=BLOCK_BITS,
        min_time=START_TIME - 1000,
        time=START_TIME,
        coinbase_value=VALUE,
        transactions=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def book_on(chain: Sharechain, *, now: float | None = None, first_id: int = 0, capacity: int = 1_000) -> JobBook:
    """A book with work on the chain's tip."""
    book = JobBook(chain, first_id=first_id, capacity=capacity)
    tip = chain.tip
    book.renew(next_work(chain, template(), (START_TIME if tip is None else tip.time + 10) if now is None else now))
    return book


def job_on(book: JobBook, miner: int = 0, payout_class: int | None = None, share_target: int | None = None) -> Job:
    size = PARAMS.payout_classes[-1] if payout_class is None else payout_class
    job = book.job_for(miner_script(miner), size, share_target)
    assert job is not None
    return job


def copy_of(chain: Sharechain, shares: list[Share]) -> Sharechain:
    """Another node's chain, which has heard the same shares."""
    other = new_chain(chain.params)
    for share in shares:
        add(other, share)
    return other


# -- what jobs assembles, validate accepts -------------------------------------------------------------------


@pytest.mark.slow
@given(
    length=st.integers(0, 8),
    miner=st.integers(0, 9),
    size=st.sampled_from(PARAMS.payout_classes),
    extranonce=EXTRANONCES,
    version=st.integers(0, 2**32 - 1),
    later=st.integers(0, 60),
    branch=st.lists(st.binary(min_size=32, max_size=32), max_size=3),
    commitment=st.none() | st.binary(min_size=32, max_size=32),
    value=st.integers(0, VALUE * 2),
)
def test_whatever_a_miner_fills_in_another_node_accepts_the_share(
    length: int,
    miner: int,
    size: int,
    extranonce: bytes,
    version: int,
    later: int,
    branch: list[bytes],
    commitment: bytes | None,
    value: int,
) -> None:
    chain = new_chain()
    shares = grow(chain, length, miners=3)
    now = START_TIME + 1000
    book = JobBook(chain, first_id=7)
    filled = template(merkle_branch=tuple(branch), witness_commitment=commitment, coinbase_value=value)
    book.renew(next_work(chain, filled, now))
    job = job_on(book, miner, size)
    candidate = solve(
        book, job, lambda c: c.is_share, extranonce=extranonce, version=version, time=job.work.time + later
    )
    share = candidate.share()
    assert share.hash == candidate.hash
    assert decode_share(share.encoded) == share
    other = copy_of(chain, shares)
    assert isinstance(other.accept(share, now), Accepted)
    assert other.tip is not None
    assert other.tip.hash == candidate.hash
    assert other.tip.payout_script == miner_script(miner)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=2, max_size=8), EXTRANONCES)
def test_a_job_names_the_uncles_that_there_are_and_the_share_is_accepted(
    siblings: list[tuple[int, int]], extranonce: bytes
) -> None:
    chain = new_chain()
    shares = grow(chain, 3)
    for salt, (back, miner) in enumerate(siblings, 1):
        tip = chain.tip
        assert tip is not None
        parent = chain.main_entry(tip.height - back)
        assert parent is not None
        share = mine(chain, parent.parent, miner=miner, salt=salt, time=parent.time)
        shares.append(share)
        add(chain, share)
    book = book_on(chain)
    job = job_on(book)
    assert job.data.uncles == tuple(uncle.hash for uncle in chain.uncle_candidates(chain.tip))
    share = solve(book, job, lambda c: c.is_share, extranonce=extranonce).share()
    other = copy_of(chain, shares)
    assert isinstance(other.accept(share, share.time), Accepted)
    entry = other.entry(share.hash)
    assert entry is not None
    assert [uncle.hash for uncle in entry.uncles] == list(job.data.uncles)


@given(EXTRANONCES, st.integers(0, 4))
def test_the_two_parts_round_the_extranonces_are_the_coinbase_that_peers_rebuild(
    extranonce: bytes, length: int
) -> None:
    chain = new_chain()
    grow(chain, length)
    book = book_on(chain)
    job = job_on(book, miner=3)
    candidate = book.candidate(job, extranonce=extranonce, version=1, time=job.work.time, nonce=0)
    rebuilt = build_coinbase(
        job.script_head + extranonce,
        job.payouts,
        miner_script(3),
        None,
        share_commitment(chain.params.network_id, job.data),
    )
    assert job.coinb1 + extranonce + job.coinb2 == rebuilt == candidate.coinbase
    assert candidate.coinbase_script == job.script_head + extranonce


@pytest.mark.parametrize("position", range(EXTRANONCE_SIZE))
def test_any_byte_of_the_extranonces_makes_another_candidate_and_no_other_body_fits_the_header(position: int) -> None:
    chain = new_chain(FINE)
    grow(chain, 2)
    book = book_on(chain)
    job = job_on(book)
    found = solve(book, job, lambda c: c.is_share)
    changed = bytearray(EXTRANONCE_SIZE)
    changed[position] ^= 1
    time, nonce = (int.from_bytes(found.header[a:b], "little") for a, b in ((68, 72), (76, 80)))
    other = book.candidate(job, extranonce=bytes(changed), version=job.work.template.version, time=time, nonce=nonce)
    assert other.hash != found.hash
    assert other.header[36:68] != found.header[36:68]
    forged = replace(found.share(), coinbase_script=other.coinbase_script)
    with pytest.raises(InvalidShare, match="R10"):
        chain.accept(forged, found.job.work.time)


@pytest.mark.parametrize("position", range(80))
def test_any_byte_of_the_header_makes_another_candidate_which_is_no_share(position: int) -> None:
    chain = new_chain(FINE)
    grow(chain, 2)
    book = book_on(chain)
    found = solve(book, job_on(book), lambda c: c.is_share)
    header = bytearray(found.header)
    header[position] ^= 1
    forged = replace(found.share(), header=bytes(header))
    assert forged.hash != found.hash
    with pytest.raises(InvalidShare):
        chain.accept(forged, found.job.work.time)


def test_version_time_and_nonce_stand_in_the_header_where_a_miner_put_them() -> None:
    book = book_on(new_chain())
    job = job_on(book)
    candidate = book.candidate(job, extranonce=bytes(12), version=0xFFFFFFFF, time=0xFFFFFFFE, nonce=0xFFFFFFFD)
    assert candidate.header[:4] == b"\xff\xff\xff\xff"
    assert candidate.header[68:72] == b"\xfe\xff\xff\xff"
    assert candidate.header[76:] == b"\xfd\xff\xff\xff"


def test_extranonces_of_another_length_are_refused() -> None:
    book = book_on(new_chain())
    with pytest.raises(StratumError) as refused:
        book.candidate(job_on(book), extranonce=bytes(11), version=1, time=1, nonce=1)
    assert refused.value.code == 20


# -- time and targets ----------------------------------------------------------------------------------------


def test_a_job_starts_after_everything_that_its_time_must_be_after() -> None:
    chain = new_chain()
    assert next_work(chain, template(min_time=START_TIME + 5), START_TIME).time == START_TIME + 5
    assert next_work(chain, template(), START_TIME + 0.9).time == START_TIME
    grow(chain, 12)
    assert chain.tip is not None
    least = median_time(chain.tip) + 1
    assert next_work(chain, template(), START_TIME - 500).time == least
    share = solve(b := book_on(chain, now=START_TIME - 500), job_on(b), lambda c: c.is_share).share()
    assert isinstance(chain.accept(share, START_TIME + 1000), Accepted)


def test_a_share_before_the_median_of_its_ancestors_is_refused() -> None:
    chain = new_chain()
    grow(chain, 12)
    book = book_on(chain)
    assert chain.tip is not None
    late = solve(book, job_on(book), lambda c: c.is_share, time=median_time(chain.tip))
    with pytest.raises(InvalidShare, match="R6"):
        chain.accept(late.share(), START_TIME + 1000)


@pytest.mark.parametrize(("late_s", "doublings"), [(600, 0), (660, 1), (720, 2), (780, 3)])
def test_the_share_target_eases_after_a_stall_and_others_accept_the_easier_share(late_s: int, doublings: int) -> None:
    chain = new_chain(FINE)
    for number in range(8):  # shares faster than wanted make the target harder, so that there is room to ease
        add(chain, mine(chain, chain.tip, time=START_TIME + 2 * number))
    assert chain.tip is not None
    now = chain.tip.time + late_s
    normal = bits_to_target(next_max_bits(FINE, chain.tip))
    book = book_on(chain, now=now)
    job = job_on(book)
    expected = min(normal << doublings, FINE.max_target)
    assert job.share_target <= expected
    assert job.share_target >= expected * 255 // 256
    assert job.data.max_bits == next_max_bits(FINE, chain.tip)
    share = solve(book, job, lambda c: c.is_share and c.hash_value > (normal if doublings else 0)).share()
    assert isinstance(chain.accept(share, now), Accepted)


def test_a_share_of_an_eased_job_whose_time_was_turned_back_is_refused() -> None:
    chain = new_chain(FINE)
    for number in range(8):
        add(chain, mine(chain, chain.tip, time=START_TIME + 2 * number))
    assert chain.tip is not None
    book = book_on(chain, now=chain.tip.time + 700)
    early = solve(book, job_on(book), lambda c: c.is_share, time=chain.tip.time + 10)
    with pytest.raises(InvalidShare, match="R8"):
        chain.accept(early.share(), START_TIME + 1000)


def test_a_miner_may_ask_for_a_harder_share_and_is_credited_its_work() -> None:
    chain = new_chain()
    grow(chain, 2)
    book = book_on(chain)
    normal = job_on(book)
    harder = job_on(book, share_target=normal.share_target // 10)
    assert harder.share_target <= normal.share_target // 10
    assert harder.data.max_bits == normal.data.max_bits
    assert harder.block_target == normal.block_target, "what is a block is no miner's choice"
    share = solve(book, harder, lambda c: c.is_share).share()
    add(chain, share)
    assert chain.tip is not None
    assert chain.tip.work == work_of(harder.share_target) > work_of(normal.share_target)


@pytest.mark.parametrize("factor", [1, 2, 2**200])
def test_a_miner_that_asks_for_an_easier_share_gets_what_the_chain_asks_for(factor: int) -> None:
    book = book_on(new_chain())
    normal = job_on(book)
    easier = job_on(book, share_target=normal.share_target * factor)
    assert easier.share_target == normal.share_target


def test_a_miner_that_asks_for_too_hard_a_share_gets_the_hardest_that_others_accept() -> None:
    chain = new_chain()
    grow(chain, 3)
    book = book_on(chain)
    job = job_on(book, share_target=1)
    assert job.share_target == hardest_target(PARAMS, job.data.max_bits)
    block = solve(book, job, lambda c: c.is_block and not c.is_share)
    assert block.is_block, "whatever a miner asks for"
    assert isinstance(chain.accept(solve(book, job, lambda c: c.is_share).share(), START_TIME + 1000), Accepted)


def work_of_mainnet(share_difficulty: float, block_difficulty: float) -> Work:
    chain = new_chain()
    book = book_on(chain)
    assert book.work is not None
    bits = [target_to_bits(int(DIFFICULTY_1_TARGET / value)) for value in (share_difficulty, block_difficulty)]
    return replace(book.work, max_bits=bits[0], bits=bits[1])


def test_a_window_holds_four_blocks_of_work_or_a_week_of_shares() -> None:
    assert shares_in_window(MAINNET, work_of_mainnet(1e6, 1e10)) == pytest.approx(40_000, rel=1e-3)
    assert shares_in_window(MAINNET, work_of_mainnet(1e6, 1e14)) == 60_480


@pytest.mark.parametrize(
    ("part", "heaviness"), [(0.001, 1), (0.0033, 1), (0.0045, 2), (0.0066, 2), (0.01, 4), (0.1, 4), (1.0, 4), (0.0, 1)]
)
def test_a_miner_of_so_much_of_the_pool_gets_shares_so_much_heavier(part: float, heaviness: int) -> None:
    """A window of 60,480 shares a week: up to 200 of a miner are as the chain asks; 800 are the end by R8."""
    work = work_of_mainnet(1e6, 1e14)
    pool = 1e6 * 2**32 / 10.0
    got = next_heaviness(MAINNET, work, hash_rate=part * pool, shares_per_window=200)
    assert got == heaviness
    if part <= 0.0132:
        assert part * 60_480 / got <= 200 * 1.25


def test_heaviness_stays_while_a_rate_wavers_round_a_limit() -> None:
    work = work_of_mainnet(1e6, 1e14)
    rate_of_200 = 200 / 60_480 * 1e6 * 2**32 / 10.0

    def heaviness(times: float, present: int) -> int:
        return next_heaviness(MAINNET, work, hash_rate=times * rate_of_200, shares_per_window=200, present=present)

    assert [heaviness(times, 1) for times in (0.5, 1.1, 1.2, 1.3)] == [1, 1, 1, 2]
    assert [heaviness(times, 2) for times in (0.7, 0.9, 1.5, 2.4, 2.6)] == [1, 2, 2, 2, 4]
    assert [heaviness(times, 4) for times in (1.5, 1.7, 4.0, 40.0)] == [2, 4, 4, 4]


def test_on_a_small_chain_no_share_is_heavier() -> None:
    chain = new_chain()
    work = book_on(chain).work
    assert work is not None
    assert shares_in_window(PARAMS, work) < 200
    assert next_heaviness(PARAMS, work, hash_rate=work_of(bits_to_target(work.max_bits)), shares_per_window=200) == 1


def test_the_class_bounds_the_payouts_of_the_job() -> None:
    params = PARAMS.with_overrides({"payout_classes": [2, 5, 12], "block_target_divisor": 20})
    chain = new_chain(params)
    grow(chain, 9, miners=9)
    book = book_on(chain)
    counts = [job_on(book, payout_class=size).payouts.count for size in (2, 5, 12)]
    assert counts == [2, 5, 9]


# -- the book ------------------------------------------------------------------------------------------------


def test_a_job_that_was_never_given_is_error_21() -> None:
    book = book_on(new_chain(), first_id=5)
    assert book.job(job_on(book).job_id).job_id == "5"
    for unknown in ("6", "", "no", "05", "\N{SNOWMAN}"):
        with pytest.raises(StratumError, match="not found") as refused:
            book.job(unknown)
        assert refused.value.code == 21


def test_without_work_there_is_no_job() -> None:
    book = JobBook(new_chain(), first_id=0)
    assert book.work is None
    assert book.job_for(miner_script(0), 12) is None


def test_equal_miners_share_one_job_until_there_is_new_work() -> None:
    chain = new_chain()
    book = book_on(chain)
    first = job_on(book)
    assert job_on(book) is first
    assert job_on(book, miner=1).job_id != first.job_id
    assert job_on(book, payout_class=12).job_id != first.job_id
    assert job_on(book, share_target=5).job_id != first.job_id
    book.renew(next_work(chain, template(), START_TIME + 1))
    second = job_on(book)
    assert second.job_id != first.job_id
    assert book.job(first.job_id) is first, "work in flight is still good"


def test_job_ids_go_round_after_32_bits() -> None:
    book = book_on(new_chain(), first_id=2**32 - 1)
    assert job_on(book, miner=0).job_id == "ffffffff"
    assert job_on(book, miner=1).job_id == "0"


def test_the_book_forgets_its_oldest_jobs() -> None:
    chain = new_chain()
    book = book_on(chain, capacity=10)
    ids = []
    for number in range(30):
        book.renew(next_work(chain, template(), START_TIME + number))
        ids.append(job_on(book).job_id)
    for old in ids[:20]:
        with pytest.raises(StratumError):
            book.job(old)
    assert [book.job(new).job_id for new in ids[20:]] == ids[20:]


def test_no_miner_loses_the_job_that_it_works_on_when_work_is_renewed_however_many_miners_there_are() -> None:
    # A miner's answer to the job before is still on its way, and may be a block.
    chain = new_chain()
    book = book_on(chain, capacity=10)
    before = [job_on(book, miner=number).job_id for number in range(25)]
    book.renew(next_work(chain, template(), START_TIME + 1))
    for number in range(25):
        job_on(book, miner=number)
        assert [book.job(job_id).job_id for job_id in before] == before


# -- Bitcoin's own verdict -----------------------------------------------------------------------------------


@pytest.fixture
def bitcoin(tmp_path: Path) -> Iterator[KernelBackend]:
    backend = KernelBackend.open(tmp_path / "bitcoin", clock=lambda: START_TIME)
    yield backend
    backend.close()


def chain_paying(backend: KernelBackend, payees: int) -> tuple[Sharechain, list[Share]]:
    """A chain whose window holds one share of each of so many miners of all address types."""
    params = PARAMS.with_overrides(
        {
            "name": "payees",
            "payout_classes": [max(2, payees)],
            "window_max_shares": 400,
            "block_target_divisor": 200,
            "share_period_ms": 1_000,
        }
    )
    chain = Sharechain(params)
    facts = backend.tip_now()
    chain.learn_block(facts.block_hash, BlockFacts(height=facts.height, next_bits=facts.next_bits), START_TIME)
    shares = []
    for number in range(payees):
        share = mine(chain, chain.tip, miner=number, block=facts.block_hash, time=START_TIME + number, salt=number)
        shares.append(share)
        add(chain, share)
    return chain, shares


def found_block(chain: Sharechain, made: BlockTemplate, finder: int = 10_000) -> Candidate:
    book = JobBook(chain, first_id=0)
    book.renew(next_work(chain, made, START_TIME + 500))
    return solve(book, job_on(book, finder, chain.params.payout_classes[-1]), is_any_block)


@pytest.mark.parametrize(
    "payees",
    [1, 2, 12, 47, pytest.param(146, marks=pytest.mark.slow), pytest.param(367, marks=pytest.mark.slow)],
)
def test_bitcoin_accepts_a_block_that_pays_so_many_miners_of_all_address_types(
    bitcoin: KernelBackend, payees: int
) -> None:
    chain, shares = chain_paying(bitcoin, payees)
    candidate = found_block(chain, bitcoin.block_template_now())
    assert candidate.job.payouts.count == payees
    paid = decode_outputs(candidate.job.payouts.outputs)
    assert {script for script, _ in paid} == {miner_script(number) for number in range(payees)}
    assert sum(amount for _, amount in paid) + candidate.job.payouts.finder_amount == 50 * 100_000_000
    result = bitcoin.submit_block_now(candidate.block())
    assert result.accepted, result
    assert bitcoin.tip_now().block_hash == candidate.hash
    other = Sharechain(chain.params)
    for block_hash, facts in chain.known_blocks().items():
        other.learn_block(block_hash, facts, START_TIME)
    for share in shares:
        add(other, share)
    assert isinstance(other.accept(candidate.share(), START_TIME + 500), Accepted), "and it is a share as well"


def test_bitcoin_accepts_the_first_block_of_a_chain_without_a_window(bitcoin: KernelBackend) -> None:
    chain, _ = chain_paying(bitcoin, 0)
    candidate = found_block(chain, bitcoin.block_template_now())
    assert candidate.job.payouts.count == 0
    assert candidate.job.payouts.finder_amount == 50 * 100_000_000
    assert bitcoin.submit_block_now(candidate.block()).accepted


def test_bitcoin_refuses_a_coinbase_of_one_satoshi_too_much(bitcoin: KernelBackend) -> None:
    chain, _ = chain_paying(bitcoin, 3)
    made = bitcoin.block_template_now()
    wrong = found_block(chain, replace(made, coinbase_value=made.coinbase_value + 1))
    result = bitcoin.submit_block_now(wrong.block())
    assert (result.accepted, result.reason) == (False, "bad-cb-amount")
    right = found_block(chain, bitcoin.block_template_now())
    assert bitcoin.submit_block_now(right.block()).accepted


@pytest.mark.slow
def test_bitcoin_takes_a_block_with_witnesses_only_with_the_right_commitment(bitcoin: KernelBackend) -> None:
    mine_blocks(bitcoin, 101)
    (coin,) = bitcoin.mature_coinbases(ANYBODY_SCRIPT)[:1]
    bitcoin.add_transaction(spend(coin.txid, coin.vout, coin.value - 7_000))
    chain, _ = chain_paying(bitcoin, 3)
    made = bitcoin.block_template_now()
    assert made.witness_commitment is not None
    assert made.coinbase_value == 50 * 100_000_000 + 7_000
    for commitment in (bytes(32), made.witness_commitment[::-1]):
        wrong = found_block(chain, replace(made, witness_commitment=commitment))
        result = bitcoin.submit_block_now(wrong.block())
        assert (result.accepted, result.reason) == (False, "bad-witness-merkle-match")
    right = found_block(chain, made)
    assert len(right.job.work.template.transactions) == 1
    result = bitcoin.submit_block_now(right.block())
    assert result.accepted, result


def test_regtest_itself_would_take_a_share_that_is_no_block(bitcoin: KernelBackend) -> None:
    made = bitcoin.block_template_now()
    chain, _ = chain_paying(bitcoin, 2)
    book = JobBook(chain, first_id=0)
    book.renew(next_work(chain, made, START_TIME + 500))
    candidate = solve(book, job_on(book, 5, 2), is_plain_share)
    assert bitcoin.submit_block_now(candidate.block()).accepted, "the divisor is the share network's own"


def test_a_job_can_be_built_without_a_book() -> None:
    chain = new_chain()
    work = next_work(chain, template(), START_TIME)
    job = build_job(chain, work, job_id="x", payout_script=miner_script(0), payout_class=12)
    assert (job.job_id, job.work) == ("x", work)
