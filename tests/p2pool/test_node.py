"""The node: real Bitcoin consensus underneath, real shares and blocks, and what becomes of them when things fail."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

import p2pool.blocks
from p2pool.bitcoin_backend import BitcoinBackend, BlockTemplate, HeaderFacts, SubmitResult
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.database import DataDirectory, open_copy
from p2pool.errors import BackendError, BackendRefusal, ConfigError, StratumError
from p2pool.jobs import Candidate
from p2pool.miner import Miner, mine
from p2pool.node import Node
from p2pool.report import VerifyReport, load_chain, verify_store
from p2pool.stratum.server import open_listeners
from p2pool.stratum.values import SubmissionOutcome
from sharechain.chain import Unanchored
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.errors import StoreError
from sharechain.hasher import sha256d
from sharechain.params import BLOCK_FALL
from sharechain.share import Share
from tests.builders import miner_script
from tests.p2pool.network import (
    PARAMS,
    START,
    Clock,
    Rig,
    address,
    is_any_block,
    is_plain_share,
    mine_blocks,
    pay,
    remember,
    running,
    solved_block,
    spend,
    until,
)


def outcome_of(node: Node, share_hash: bytes) -> str | None:
    stored = node._store.share(share_hash)
    assert stored is not None
    return stored.block_outcome


def is_settled(node: Node, candidate: Candidate) -> bool:
    stored = node._store.share(candidate.hash)
    return stored is not None and stored.block_outcome is not None


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, however deep."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


def verified(path: Path) -> VerifyReport:
    """Check all that is on disk from scratch."""
    with open_copy(path) as (params, store):
        *_, report = verify_store(params, store)
    assert isinstance(report, VerifyReport)
    return report


class Unreliable:
    """A Bitcoin node behind a bad connection: what is named in ``down`` raises BackendError, the rest is passed on."""

    def __init__(self, inner: KernelBackend, down: set[str] | None = None, error: BackendError | None = None) -> None:
        self.inner = inner
        self.down = set() if down is None else down
        self.error = BackendError("connection refused") if error is None else error
        self.calls: list[str] = []
        self.submitted: list[bytes] = []
        #: Submissions that get through and whose answer is lost.
        self.lost_answers = 0

    def _pass(self, name: str) -> None:
        self.calls.append(name)
        if name in self.down:
            raise self.error

    @property
    def network(self) -> str:
        return self.inner.network

    async def block_template(self) -> BlockTemplate:
        self._pass("block_template")
        return await self.inner.block_template()

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        self._pass("header_facts")
        return await self.inner.header_facts(block_hash)

    async def is_on_chain(self, block_hash: bytes) -> bool:
        self._pass("is_on_chain")
        return await self.inner.is_on_chain(block_hash)

    async def submit_block(self, raw: bytes) -> SubmitResult:
        self._pass("submit_block")
        self.submitted.append(raw)
        result = await self.inner.submit_block(raw)
        if self.lost_answers:
            self.lost_answers -= 1
            raise BackendError("timed out")
        return result

    async def tip(self) -> HeaderFacts:
        self._pass("tip")
        return await self.inner.tip()

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        self._pass("wait_for_tip")
        return await self.inner.wait_for_tip(known, timeout)

    async def aclose(self) -> None:
        await self.inner.aclose()


@asynccontextmanager
async def unreliable(path: Path, *, clock: Clock | None = None) -> AsyncIterator[tuple[Node, Unreliable]]:
    made: list[Unreliable] = []

    def wrap(kernel: KernelBackend) -> BitcoinBackend:
        made.append(Unreliable(kernel))
        return made[0]

    async with running(path, clock=clock, wrap=wrap) as (node, _):
        yield node, made[0]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the pauses that a real Bitcoin node deserves."""
    monkeypatch.setattr(p2pool.blocks, "RETRY_S", (0.001, 0.002))


# -- shares --------------------------------------------------------------------------------------------------


async def test_a_share_is_stored_moves_the_tip_and_gives_everybody_a_new_job(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        job = rig.job()
        candidate = rig.find()
        verdict = rig.submit(candidate)
        assert (verdict.is_share, verdict.is_block, verdict.stale) == (True, False, False)
        assert node.chain.tip is not None
        assert node.chain.tip.hash == candidate.hash
        stored = node._store.share(candidate.hash)
        assert stored is not None
        assert stored.share == candidate.share()
        assert stored.first_seen_ms == START * 1000
        assert stored.block_outcome is None
        assert rig.job().job_id != job.job_id
        assert rig.job().data.parent == candidate.hash
        statistics = node.statistics()
        assert (statistics.shares, statistics.chain.height, statistics.invalid) == (1, 0, {})


async def test_what_is_no_share_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        job = rig.job()
        book = node._book
        nonce = 0
        while True:
            low = book.candidate(job, extranonce=bytes(12), version=1 << 29, time=job.work.time, nonce=nonce)
            if not low.is_share:
                break
            nonce += 1
        verdict = rig.submit(low)
        assert (verdict.is_share, verdict.is_block, verdict.hash_value) == (False, False, low.hash_value)
        assert node.chain.tip is None
        assert rig.job() is job


async def test_the_same_share_twice_is_one_share(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        candidate = rig.find()
        rig.submit(candidate)
        rig.submit(candidate)
        assert node.statistics().shares == 1
        assert len(node.chain) == 1


async def test_a_share_of_the_job_before_becomes_an_uncle(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        first, late = Rig(node, 0), Rig(node, 1)
        first.submit(first.find())
        job = late.job()
        first.submit(first.find())
        uncle = late.find(job=job)
        assert late.submit(uncle).is_share
        assert first.job().data.uncles == (uncle.hash,), "at once: the sooner it is named, the heavier the chain"
        first.submit(first.find())
        tip = node.chain.tip
        assert tip is not None
        assert [entry.hash for entry in tip.uncles] == [uncle.hash]


async def test_the_miner_of_a_share_that_breaks_a_rule_is_told_which(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        for _ in range(3):
            clock.now += 5
            node._renew_work(clean=False)
            rig.submit(rig.find())
        before = remember(node)
        with pytest.raises(StratumError, match="R6: time must be after the median") as refused:
            rig.submit(rig.find(time=START - 100))
        assert refused.value.code == 20
        assert remember(node) == before
        assert node.statistics().invalid == {"R6": 1}


async def test_a_share_too_far_ahead_of_the_clock_is_refused_with_the_limit(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        limit = PARAMS.future_limit_s
        with pytest.raises(StratumError, match=f"{limit + 1} s ahead of the clock.*{limit} s") as refused:
            rig.submit(rig.find(time=START + limit + 1))
        assert refused.value.code == 20
        assert node.chain.statistics().waiting == 0
        assert rig.submit(rig.find(time=START + limit)).is_share
        assert node.statistics().shares == 1


async def test_what_miners_have_done_is_known_after_a_restart_and_told_in_the_status(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node, options=".rig1")
        node.note(rig.worker, SubmissionOutcome(reason=None, difficulty=0.5, best=2.0, is_share=True))
        node.note(rig.worker, SubmissionOutcome(reason="stale"))
        told = node._status(clock())["miners"]
        assert (told["connections"], told["workers"], told["accepted"], told["rejected"]) == (0, 1, 1, {"stale": 1})
        before = node._accounting.workers(clock())
    clock.now += 60
    async with running(tmp_path, clock=clock) as (node, _):
        [row] = node._accounting.workers(clock())
        assert (row["address"], row["worker"], row["accepted"], row["best"]) == (address(0), "rig1", 1, 2.0)
        assert 0 < row["hash_rate_10m"] < before[0]["hash_rate_10m"]


async def test_damaged_books_begin_anew_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path):
        pass
    (tmp_path / "workers.json").write_bytes(b"{}")
    async with running(tmp_path) as (node, _):
        assert node._accounting.workers(START) == []
    assert "workers.json is damaged" in caplog.text


async def test_a_big_miner_gets_heavier_shares_and_may_ask_for_others(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        big, small, chosen = Rig(node), Rig(node, 1), Rig(node, options="/1e-30")
        easiest = small.job().share_target
        assert big.job() is not small.job()
        assert big.job().share_target == easiest
        for _ in range(3):
            node.note(big.worker, SubmissionOutcome(reason=None, difficulty=1e6))
        node._renew_work(clean=False)
        hardest = bits_to_target(target_to_bits(easiest // PARAMS.heaviest_share))
        assert big.job().share_target == hardest
        assert small.job().share_target == chosen.job().share_target == easiest
        node._shares_per_window = 0
        node._renew_work(clean=False)
        assert big.job().share_target == easiest


async def test_the_operators_payout_class_wins_over_the_table(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        node._payout_classes = (("cpuminer", 12),)
        assert Rig(node).worker.payout_class == 12


def test_a_payout_class_that_the_chain_does_not_have_is_a_mistake_of_the_operator(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    backend = KernelBackend.open(tmp_path / "bitcoin")
    try:
        with pytest.raises(ConfigError, match=r"--payout-class: one of .* is needed, got 13"):
            Node(directory=directory, params=PARAMS, backend=backend, payout_classes=(("", 13),))
    finally:
        trio.run(backend.aclose)
        directory.close()


async def test_a_job_of_before_a_restart_is_unknown(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        candidate = rig.find()
    clock.now += 1
    async with running(tmp_path, clock=clock) as (node, _):
        again = Rig(node)
        again.job()
        with pytest.raises(StratumError) as refused:
            again.submit(candidate)
        assert refused.value.code == 21


@pytest.mark.slow
async def test_silence_eases_the_share_target_of_new_jobs(tmp_path: Path, autojump_clock: MockClock) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        for _ in range(30):
            rig.submit(rig.find())
        hard = rig.job().share_target
        clock.now += PARAMS.stall_after_s + PARAMS.stall_doubling_s
        await until(lambda: rig.job().share_target > hard)
        eased = rig.find()
        rig.submit(eased)
        assert node.chain.tip is not None
        assert node.chain.tip.hash == eased.hash


# -- blocks --------------------------------------------------------------------------------------------------


async def test_a_block_is_submitted_and_recorded_and_becomes_a_share(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, backend):
        rig = Rig(node)
        rig.submit(rig.find())
        block = rig.find(is_any_block)
        verdict = rig.submit(block)
        assert verdict.is_block
        await until(lambda: is_settled(node, block))
        assert outcome_of(node, block.hash) == ""
        assert backend.tip_now().block_hash == block.hash
        await until(lambda: node.statistics().bitcoin_height == 1)
        assert node.chain.tip is not None
        assert node.chain.tip.hash == block.hash
        (found,) = node.statistics().blocks
        assert (found.block_hash, found.accepted, found.reason) == (block.hash[::-1].hex(), True, "")
        assert (found.block_height, found.value, found.payouts) == (1, 50 * 100_000_000, 1)
    assert verified(tmp_path).blocks == 1


async def test_a_block_submitted_twice_goes_to_bitcoin_once(tmp_path: Path) -> None:
    async with unreliable(tmp_path) as (node, backend):
        rig = Rig(node)
        block = rig.find(is_any_block)
        assert rig.submit(block).is_block
        assert rig.submit(block).is_block
        await until(lambda: is_settled(node, block))
        rig.submit(block)
        mine_blocks(backend.inner, 1)
        assert backend.submitted == [block.block()]
        assert len(node.statistics().blocks) == 1


async def test_a_block_that_is_no_share_by_its_miners_harder_target_is_submitted(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, backend):
        rig = Rig(node, options="/1")
        block = rig.find(lambda candidate: candidate.is_block and not candidate.is_share)
        assert rig.submit(block).is_block
        await until(lambda: len(node.statistics().blocks) == 1)
        assert backend.tip_now().block_hash == block.hash
        assert node.chain.tip is None


async def test_a_late_block_is_submitted_and_the_pool_keeps_mining_on_the_winner(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, backend):
        rig = Rig(node)
        job = rig.job()
        mine_blocks(backend, 1)
        backend._announce_tip()
        await until(lambda: node.statistics().bitcoin_height == 1)
        late = rig.find(is_any_block, job=job)
        assert rig.submit(late).is_block
        await until(lambda: len(node.statistics().blocks) == 1)
        (found,) = node.statistics().blocks
        assert (found.accepted, found.reason) == (False, "inconclusive")
        await until(lambda: node.chain.tip is not None)
        assert node.chain.tip is not None
        assert node.chain.tip.hash == late.hash, "its work counts as a share all the same"


async def test_what_bitcoin_refuses_is_recorded_with_its_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        block = rig.find(is_any_block, time=START + 3 * 10**8)  # Bitcoin takes two hours ahead of the real clock
        rig.submit(block)
        await until(lambda: len(node.statistics().blocks) == 1)
        (found,) = node.statistics().blocks
        assert (found.accepted, found.reason) == (False, "time-too-new")


async def test_a_block_with_fees_pays_them_out(tmp_path: Path) -> None:
    from tests.p2pool.network import ANYBODY_SCRIPT

    async with running(tmp_path) as (node, backend):
        rig = Rig(node)
        mine_blocks(backend, 101)
        coin = backend.mature_coinbases(ANYBODY_SCRIPT)[0]
        backend.add_transaction(spend(coin.txid, coin.vout, coin.value - 12_345))
        backend._announce_tip()
        await until(lambda: rig.job().work.template.height == 102)
        block = rig.find(is_any_block)
        rig.submit(block)
        await until(lambda: is_settled(node, block))
        (found,) = node.statistics().blocks
        assert (found.accepted, found.transactions, found.value) == (True, 1, 50 * 100_000_000 + 12_345)


@pytest.mark.slow
async def test_a_block_whose_share_waits_for_the_clock_has_its_outcome_when_it_joins(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        block = rig.find(is_any_block, time=START + PARAMS.future_limit_s + 10)
        rig.submit(block)
        await until(lambda: len(node.statistics().blocks) == 1)
        assert node.statistics().blocks[0].accepted
        clock.now += 11
        await until(lambda: node._store.share(block.hash) is not None)
        assert outcome_of(node, block.hash) == ""


async def test_a_block_found_in_the_moment_of_the_stop_still_goes_to_bitcoin(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        block = rig.find(is_any_block)
        rig.submit(block)  # and the node is cancelled before anything else runs
    backend = KernelBackend.open(tmp_path / "bitcoin")
    try:
        assert backend.tip_now().block_hash == block.hash
    finally:
        backend.close()


async def test_a_block_whose_answer_was_lost_on_the_way_counts_as_accepted(tmp_path: Path, impatient: None) -> None:
    async with unreliable(tmp_path) as (node, backend):
        rig = Rig(node)
        backend.lost_answers = 1
        block = rig.find(is_any_block)
        rig.submit(block)
        await until(lambda: is_settled(node, block))
        assert backend.inner.tip_now().block_hash == block.hash
        assert outcome_of(node, block.hash) == ""
        assert node.statistics().blocks[0].accepted


async def test_a_block_is_submitted_again_until_bitcoin_answers(tmp_path: Path, impatient: None) -> None:
    async with unreliable(tmp_path) as (node, backend):
        rig = Rig(node)
        backend.down.add("submit_block")
        block = rig.find(is_any_block)
        rig.submit(block)
        await until(lambda: backend.calls.count("submit_block") >= 3)
        await until(lambda: node.chain.tip is not None)  # the share does not wait for Bitcoin
        assert node.chain.tip is not None
        assert node.chain.tip.hash == block.hash
        backend.down.clear()
        await until(lambda: is_settled(node, block))
        assert outcome_of(node, block.hash) == ""


async def test_a_bitcoin_node_that_is_away_for_ten_minutes_still_gets_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bitcoind that restarts after a crash checks its blocks for minutes; what the block is worth can wait.
    monkeypatch.setattr(p2pool.blocks, "RETRY_S", (0.0005, 0.001))
    async with unreliable(tmp_path) as (node, backend):
        rig = Rig(node)
        backend.down.add("submit_block")
        block = rig.find(is_any_block)
        rig.submit(block)
        tries_in_ten_minutes = 6 + 20  # 0.5 + 1 + ... + 16 s, then each 30 s
        await until(
            lambda: backend.calls.count("submit_block") >= tries_in_ten_minutes or bool(node.statistics().blocks)
        )
        backend.down.clear()
        await until(lambda: is_settled(node, block))
        assert outcome_of(node, block.hash) == ""


# -- Bitcoin's chain moves -----------------------------------------------------------------------------------


async def test_a_bitcoin_block_of_others_makes_the_next_job_clean_and_older_ones_stale(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, backend):
        rig = Rig(node)
        job = rig.job()
        template = backend.block_template_now()
        await backend.submit_block(solved_block(template, pay(template, miner_script(9))))
        await until(lambda: node.statistics().bitcoin_height == 1)
        assert rig.job().work.template.previous_block_hash != job.work.template.previous_block_hash
        late = rig.find(job=job)
        assert not rig.submit(late).stale, "a share on the block before is good for the sharechain"
        assert node.chain.tip is not None
        assert node.chain.tip.hash == late.hash
        book = node._book
        low = book.candidate(job, extranonce=b"\xff" * 12, version=1 << 29, time=job.work.time, nonce=1)
        assert not low.is_share
        assert rig.submit(low).stale


async def test_a_failing_bitcoin_node_is_asked_again_and_mining_goes_on_meanwhile(
    tmp_path: Path, impatient: None
) -> None:
    async with unreliable(tmp_path) as (node, backend):
        rig = Rig(node)
        backend.down |= {"block_template", "wait_for_tip", "header_facts", "tip"}
        backend.inner._announce_tip()
        mine_blocks(backend.inner, 1)
        backend.inner._announce_tip()
        await until(lambda: backend.calls.count("block_template") >= 4)
        rig.submit(rig.find())
        assert node.statistics().shares == 1
        backend.down.clear()
        await until(lambda: node.statistics().bitcoin_height == 1)


@pytest.mark.parametrize("method", ["block_template", "header_facts"])
async def test_a_bitcoin_node_that_refuses_at_the_start_ends_the_node_in_its_words(tmp_path: Path, method: str) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    kernel = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    listeners = open_listeners("127.0.0.1", 0)
    try:
        backend = Unreliable(kernel, {method}, error=BackendRefusal(-8, "rules are missing"))
        node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
        with pytest.raises((BackendError, ExceptionGroup)) as failed:
            await node.run(listeners)
        assert [str(error) for error in leaves(failed.value)] == ["rules are missing"]
        assert all(listener.fileno() < 0 for listener in listeners), "the port is free again"
    finally:
        for listener in listeners:
            listener.close()
        kernel.close()
        directory.close()


@pytest.mark.parametrize("method", ["block_template", "header_facts"])
async def test_a_bitcoin_node_that_is_not_there_at_the_start_is_waited_for_and_told_of_once(
    tmp_path: Path, method: str, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "p2pool.node")
    directory = DataDirectory(tmp_path, PARAMS)
    kernel = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    try:
        backend = Unreliable(kernel, {method})
        node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run, open_listeners("127.0.0.1", 0))
            await until(lambda: backend.calls.count(method) >= 5)
            assert node.statistics().bitcoin_height == -1
            backend.down.clear()
            await until(lambda: node.statistics().bitcoin_height == 0)
            nursery.cancel_scope.cancel()
    finally:
        kernel.close()
        directory.close()
    assert [record.levelname for record in caplog.records if "gives" in record.message] == ["ERROR", "INFO"]


async def test_a_bitcoin_node_that_fails_while_old_blocks_are_settled_is_asked_again(
    tmp_path: Path, impatient: None
) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    kernel = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    node = Node(directory=directory, params=PARAMS, backend=kernel, clock=Clock())
    found = await _found_without_outcome(node, kernel, submit=True)
    kernel.close()
    directory.close()

    class FailsOnce(Unreliable):
        async def is_on_chain(self, block_hash: bytes) -> bool:
            if block_hash == found.hash and "failed" not in self.calls:
                self.calls.append("failed")
                raise BackendError("connection reset")
            return await super().is_on_chain(block_hash)

    # The tip moves on, so that the first thing asked of this block is its outcome.
    with KernelBackendOpen(tmp_path / "bitcoin") as again:
        mine_blocks(again, 1)
    async with running(tmp_path, wrap=FailsOnce) as (node, _):
        await until(lambda: outcome_of(node, found.hash) == "")


async def test_miners_stay_on_their_work_while_bitcoin_is_far_below_the_sharechain(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        rig.submit(rig.find())
        tip, template = node.chain.tip, node._template
        assert tip is not None
        assert template is not None
        fallen = replace(template, height=tip.block_height - BLOCK_FALL, previous_block_hash=bytes([7]) * 32)
        with pytest.raises(BackendError, match="it has to catch up"):
            node._take_template(replace(fallen, height=fallen.height - 1), None)
        assert node._template is template
        node._take_template(fallen, None)
        assert node._template is fallen


class KernelBackendOpen:
    """An embedded Bitcoin for a moment."""

    def __init__(self, path: Path) -> None:
        self.backend = KernelBackend.open(path, clock=Clock())

    def __enter__(self) -> KernelBackend:
        return self.backend

    def __exit__(self, *_: object) -> None:
        self.backend.close()


class OnMainnet(Unreliable):
    @property
    def network(self) -> str:
        return "mainnet"


def test_a_bitcoin_node_of_another_network_is_refused(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    kernel = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    try:
        with pytest.raises(ConfigError, match="is on mainnet, the share network on regtest"):
            Node(directory=directory, params=PARAMS, backend=OnMainnet(kernel))
    finally:
        kernel.close()
        directory.close()


# -- miners --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("rig1", "not an address"),
        ("1BoatSLRHtKNngkdXEeobR76b53LETtpyT", "mainnet"),
        ("bcrt1q3467skzz9faljvpw57qsqval3220uq88kh4h5w", "checksum"),
        ("", "empty"),
        ("\N{SNOWMAN}", "not ASCII"),
        ("x" * 256, "at most 90"),
    ],
)
async def test_a_user_name_that_cannot_be_paid_is_refused_with_the_reason(tmp_path: Path, user: str, text: str) -> None:
    async with running(tmp_path) as (node, _):
        with pytest.raises(StratumError, match=text) as refused:
            node.authorize(user=user, password="x", user_agent="")
        assert refused.value.code == 24
        assert refused.value.message.startswith("user name: ")


async def test_the_default_address_is_paid_for_names_but_never_for_a_mistyped_address(tmp_path: Path) -> None:
    async with running(tmp_path, default_address=address(3)) as (node, _):
        worker = node.authorize(user="rig1", password="x", user_agent="")
        assert (worker.payout_script, worker.name, worker.address) == (miner_script(3), "rig1", address(3))
        assert node.authorize(user="rig1.2+64", password="x", user_agent="").name == "rig1.2"
        named = node.authorize(user=address(1) + ".rig1", password="x", user_agent="")
        assert (named.payout_script, named.name) == (miner_script(1), "rig1")
        with pytest.raises(StratumError, match="checksum"):
            node.authorize(user=address(1)[:-1] + "q", password="x", user_agent="")


def test_a_default_address_that_is_none_is_a_mistake_of_the_operator(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    kernel = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    try:
        with pytest.raises(ConfigError, match=r"--address: .*mainnet"):
            Node(
                directory=directory,
                params=PARAMS,
                backend=kernel,
                default_address="1BoatSLRHtKNngkdXEeobR76b53LETtpyT",
            )
    finally:
        kernel.close()
        directory.close()


@pytest.mark.parametrize("difficulty", ["1e-300", "5e-324", "1e-9", "1", "1e9", "1e60", "1e300", "0.00000000001"])
async def test_no_difficulty_that_a_miner_asks_for_can_end_the_node(tmp_path: Path, difficulty: str) -> None:
    async with running(tmp_path) as (node, _):
        for symbol in "/+":
            rig = Rig(node, options=f"{symbol}{difficulty}")
            assert 0 < rig.job().share_target <= PARAMS.max_target
        rig.submit(rig.find(is_any_block))
        await until(lambda: len(node.statistics().blocks) == 1)


async def test_nothing_that_a_miner_sends_over_the_wire_ends_the_node(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        host, port = node.server.addresses[0]
        lines = [
            b'{"id":1,"method":"mining.subscribe","params":["x/1"]}',
            b'{"id":2,"method":"mining.authorize","params":["%s/1e-300","x"]}' % address(0).encode(),
            b'{"id":3,"method":"mining.authorize","params":["%s/1e300","x"]}' % address(1).encode(),
            b'{"id":4,"method":"mining.submit","params":["a","1","0000000000000000","ffffffff","ffffffff"]}',
            b'{"id":5,"method":"mining.submit","params":["a","1","0000000000000000","0","0","ffffffff"]}',
            b'{"id":6,"method":"mining.submit","params":["a","2","","",""]}',
            b'{"id":7,"method":"mining.ping","params":[]}',
        ]
        stream = await trio.open_tcp_stream(host, port)
        async with stream:
            await stream.send_all(b"\n".join(lines) + b"\n")
            answer = b""
            with trio.fail_after(5):
                while b'"id":7' not in answer:
                    chunk = await stream.receive_some()
                    assert chunk, answer
                    answer += chunk


async def test_real_miners_over_tcp_fill_the_chain_and_find_blocks(tmp_path: Path) -> None:
    async with running(tmp_path, clock=None) as (node, backend):
        host, port = node.server.addresses[0]
        async with trio.open_nursery() as nursery:
            miners: list[Miner] = [
                await nursery.start(partial(mine, host=host, port=port, user=f"{address(number)}.rig"))
                for number in range(2)
            ]
            await until(lambda: node.statistics().shares >= 20 and len(node.statistics().blocks) >= 2)
            nursery.cancel_scope.cancel()
        assert sum(miner.statistics().accepted for miner in miners) > 0
        assert node.statistics().invalid == {}
        assert {block.reason for block in node.statistics().blocks} <= {"", "inconclusive"}
        assert backend.tip_now().height >= 1
        credited = {entry.payout_script for entry in node.chain.entries()}
        assert credited <= {miner_script(0), miner_script(1)}
    assert verified(tmp_path).shares == len(node.chain)


class Wire:
    """A raw Stratum connection that collects the notifies."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def clean_flags(self, count: int) -> list[bool]:
        flags: list[bool] = []
        with trio.fail_after(10):
            while len(flags) < count:
                while b"\n" not in self.buffer:
                    self.buffer += await self.stream.receive_some()
                line, _, self.buffer = self.buffer.partition(b"\n")
                if b'"method":"mining.notify"' in line:
                    flags.append(line.endswith(b"true]}"))
        return flags


async def test_a_share_renews_jobs_gently_and_a_bitcoin_block_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, backend):
        host, port = node.server.addresses[0]
        stream = await trio.open_tcp_stream(host, port)
        async with stream:
            wire = Wire(stream)
            await stream.send_all(
                b'{"id":1,"method":"mining.subscribe","params":["cpuminer/2.5"]}\n'
                b'{"id":2,"method":"mining.authorize","params":["%s","x"]}\n' % address(1).encode()
            )
            assert await wire.clean_flags(1) == [True], "the first job"
            rig = Rig(node)
            rig.submit(rig.find())
            assert await wire.clean_flags(1) == [False]
            template = backend.block_template_now()
            await backend.submit_block(solved_block(template, pay(template, miner_script(9))))
            assert await wire.clean_flags(1) == [True]


# -- the end, and the next start -----------------------------------------------------------------------------


async def test_a_restart_goes_on_at_the_same_tip(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        for number in range(6):
            clock.now += 1
            rig.submit(rig.find(is_any_block if number == 3 else is_plain_share))
            await until(lambda number=number: len(node.chain) == number + 1)  # type: ignore[misc]
        before = remember(node)
        facts = dict(node.chain.known_blocks())
    async with running(tmp_path, clock=clock) as (node, _):
        assert remember(node) == before
        assert facts.items() <= node.chain.known_blocks().items()
        rig = Rig(node)
        rig.submit(rig.find())
        assert remember(node)[1][1:] == before[1]
    assert verified(tmp_path).shares == 7


async def test_a_block_whose_outcome_a_kill_cut_off_is_settled_at_the_next_start(tmp_path: Path) -> None:
    # The node stops after Bitcoin took the block and the share was stored, before the answer was written.
    directory = DataDirectory(tmp_path, PARAMS)
    backend = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
    known = await _found_without_outcome(node, backend, submit=True)
    backend.close()
    directory.close()
    async with running(tmp_path) as (node, _):
        assert outcome_of(node, known.hash) == ""
    async with running(tmp_path) as (node, _):
        assert node._unsettled == []


async def test_a_block_that_bitcoin_never_heard_of_is_not_called_accepted(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    backend = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
    lost = await _found_without_outcome(node, backend, submit=False)
    backend.close()
    directory.close()
    async with running(tmp_path) as (node, _):
        assert "unknown" in (outcome_of(node, lost.hash) or "")


async def test_a_stale_block_that_bitcoin_only_stored_is_not_settled_as_accepted(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    backend = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
    stale = await _found_without_outcome(node, backend, submit=True, late=True)
    assert backend.tip_now().block_hash != stale.hash
    backend.close()
    directory.close()
    async with running(tmp_path) as (node, _):
        assert outcome_of(node, stale.hash) != ""


async def _found_without_outcome(node: Node, backend: KernelBackend, *, submit: bool, late: bool = False) -> Share:
    """What a kill leaves between the two writes of a block: its share, and no outcome."""
    async with trio.open_nursery() as nursery:
        await nursery.start(node._follow_bitcoin)
        block = Rig(node).find(is_any_block)
        if late:
            mine_blocks(backend, 1)
        if submit:
            backend.submit_block_now(block.block())
        node.accept(block.share())
        nursery.cancel_scope.cancel()
    return block.share()


@pytest.mark.slow
async def test_after_a_write_that_failed_nothing_more_is_written(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path, PARAMS)
    backend = KernelBackend.open(tmp_path / "bitcoin", clock=Clock())
    node = Node(directory=directory, params=PARAMS, backend=backend, clock=Clock())
    async with trio.open_nursery() as nursery:
        await nursery.start(node._follow_bitcoin)
        rig = Rig(node)
        waiting, lost = rig.find().share(), rig.find().share()
        tip = await backend.tip()
        facts = node.chain._facts.pop(tip.block_hash)  # as if Bitcoin had not told it yet
        assert isinstance(node.accept(waiting), Unanchored)
        node.chain._facts[tip.block_hash] = facts
        whole = os.dup(directory._batches)
        broken = os.open(os.devnull, os.O_RDONLY)
        os.dup2(broken, directory._batches)
        with pytest.raises(StoreError, match="does not take a write"):
            node.accept(lost)
        os.dup2(whole, directory._batches)
        written = directory.store.count()
        with pytest.raises(StoreError, match="does not take a write"):
            node.accept(rig.find().share())
        del node.chain._facts[tip.block_hash]
        with pytest.raises(StoreError, match="does not take a write"):
            node._learn(tip)  # the share that waited joins the chain
        assert directory.store.count() == written
        nursery.cancel_scope.cancel()
    for descriptor in (whole, broken):
        os.close(descriptor)
    backend.close()
    directory.close()


async def test_a_stopped_node_leaves_no_port_and_no_lock(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        host, port = node.server.addresses[0]
    with pytest.raises(OSError, match="refused"), socket.create_connection((host, port), timeout=5):
        pass
    DataDirectory(tmp_path, PARAMS).close()
    KernelBackend.open(tmp_path / "bitcoin").close()


async def test_what_was_written_is_synced_to_the_disk_within_a_second(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    clock = Clock()
    async with running(tmp_path, clock=clock) as (node, _):
        rig = Rig(node)
        rig.submit(rig.find())
        rig.submit(rig.find())
        assert node._unsynced
        clock.now += 1
        await until(lambda: not node._unsynced)


def test_the_hash_of_a_candidate_is_the_block_hash_that_bitcoin_knows_it_by(tmp_path: Path) -> None:
    kernel = KernelBackend.open(tmp_path, clock=Clock())
    try:
        template = kernel.block_template_now()
        raw = solved_block(template, pay(template, miner_script(1)))
        assert kernel.submit_block_now(raw).accepted
        assert kernel.tip_now().block_hash == sha256d(raw[:80])
    finally:
        kernel.close()


async def test_loading_gives_what_the_node_had(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, _):
        rig = Rig(node)
        for _ in range(4):
            rig.submit(rig.find())
        with open_copy(tmp_path) as (params, store):
            assert params == PARAMS
            copy = load_chain(params, store)
        assert copy.tip is not None
        assert node.chain.tip is not None
        assert copy.tip.hash == node.chain.tip.hash
