"""The embedded Bitcoin, real: what Core accepts, what it refuses and with which word, and what survives a kill."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from bitcoin.core import CBlock
from coincurve import PrivateKey

from p2pool.bitcoin_backend import (
    BitcoinBackend,
    BlockSource,
    BlockTemplate,
    SubmitResult,
    TemplateTransaction,
    mempool,
)
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.mempool import Spendable
from p2pool.bitcoin_backend.template import (
    assemble_block,
    block_subsidy,
    build_template,
    merkle_branch,
    witness_commitment_of,
)
from p2pool.errors import BackendError
from tests.p2pool.spending import (
    Spent,
    p2tr_script,
    p2wpkh_script,
    sha256d,
    spend_p2tr,
    spend_p2wpkh,
    txid_of,
    unsigned,
)

KEY = PrivateKey(b"\x01" * 32)
ANYONE = b"\x51"  # OP_TRUE
ACCEPTED = SubmitResult(accepted=True)
ROOT = Path(__file__).parents[2]


def push_height(height: int) -> bytes:
    if height <= 16:
        return bytes([0x50 + height]) if height else b"\0"
    number = height.to_bytes(height.bit_length() // 8 + 1, "little")
    return bytes([len(number)]) + number


def build_coinbase(
    template: BlockTemplate,
    *,
    script: bytes = ANYONE,
    value: int | None = None,
    height: int | None = None,
    extra: bytes = b"",
) -> bytes:
    """A coinbase without a witness; `value` and `height` differ from the template's to break a rule."""
    message = push_height(template.height if height is None else height) + b"\x06p2pool" + extra
    outputs = [struct.pack("<q", template.coinbase_value if value is None else value), bytes([len(script)]), script]
    count = 1
    if template.witness_commitment is not None:
        count = 2
        outputs += [bytes(8), b"\x26\x6a\x24\xaa\x21\xa9\xed", template.witness_commitment]
    head = b"\x02\0\0\0\x01" + bytes(32) + b"\xff" * 4 + bytes([len(message)]) + message + b"\xff" * 4
    return head + bytes([count]) + b"".join(outputs) + bytes(4)


def solve(template: BlockTemplate, coinbase: bytes, *, root: bytes | None = None, solved: bool = True) -> bytes:
    """A header for the coinbase, with a nonce that meets the template's target, or one that does not."""
    if root is None:
        root = sha256d(coinbase)
        for sibling in template.merkle_branch:
            root = sha256d(root + sibling)
    start = struct.pack(
        "<i32s32sII", template.version, template.previous_block_hash, root, template.time, template.bits
    )
    target = (template.bits & 0x7FFFFF) << 8 * ((template.bits >> 24) - 3)
    for nonce in range(1 << 32):
        header = start + struct.pack("<I", nonce)
        if (int.from_bytes(sha256d(header), "little") <= target) == solved:
            return header
    raise AssertionError("no nonce")


def build_block(template: BlockTemplate, *, script: bytes = ANYONE, extra: bytes = b"") -> bytes:
    coinbase = build_coinbase(template, script=script, extra=extra)
    return assemble_block(solve(template, coinbase), coinbase, template)


def mine(backend: KernelBackend, count: int = 1, *, script: bytes = ANYONE) -> bytes:
    """Mine on the tip and have Core accept it; give the hash of the last block."""
    for _ in range(count):
        assert backend.submit_block_now(build_block(backend.block_template_now(), script=script)) == ACCEPTED
    return backend.tip_now().block_hash


def on(template: BlockTemplate, block_hash: bytes, height: int) -> BlockTemplate:
    """The template of an empty block at another place of the chain."""
    value = block_subsidy(height, 150)
    moment = template.time + height - template.height
    return replace(template, previous_block_hash=block_hash, height=height, time=moment, coinbase_value=value)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[KernelBackend]:
    opened = KernelBackend.open(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def mature_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of 110 blocks, the even ones paying KEY's P2WPKH script and the odd ones its P2TR script."""
    directory = tmp_path_factory.mktemp("mature")
    backend = KernelBackend.open(directory)
    for _ in range(55):
        mine(backend, script=p2tr_script(KEY))
        mine(backend, script=p2wpkh_script(KEY))
    backend.close()
    return directory


@pytest.fixture
def mature(mature_chain: Path, tmp_path: Path) -> Iterator[KernelBackend]:
    """A copy of the mature chain, opened. (The kernel preallocates its block files: only what is used is copied.)"""
    subprocess.run(["cp", "-r", "--sparse=always", f"{mature_chain}/.", tmp_path], check=True)
    opened = KernelBackend.open(tmp_path)
    yield opened
    opened.close()


# Mining.


async def test_a_mined_block_is_accepted_and_becomes_the_tip(backend: KernelBackend) -> None:
    checked: BitcoinBackend = backend  # the protocol, as mypy sees it
    assert checked.network == "regtest"
    genesis = await checked.tip()
    assert (genesis.height, genesis.next_bits, genesis.median_time) == (0, 0x207FFFFF, 1296688602)
    template = await checked.block_template()
    assert template.previous_block_hash == genesis.block_hash
    assert (template.height, template.coinbase_value) == (1, 5_000_000_000)
    assert template.min_time == genesis.median_time + 1
    assert abs(template.time - time.time()) < 5
    block = build_block(template)
    assert await checked.submit_block(block) == ACCEPTED
    tip = await checked.tip()
    assert (tip.block_hash, tip.height) == (sha256d(block[:80]), 1)
    assert await checked.header_facts(tip.block_hash) == tip
    assert await checked.header_facts(genesis.block_hash) == genesis


async def test_an_unknown_header_has_no_facts(backend: KernelBackend) -> None:
    assert await backend.header_facts(b"\x07" * 32) is None


def test_the_median_time_is_that_of_eleven_blocks(backend: KernelBackend) -> None:
    times = [1296688602]
    for height in range(1, 15):
        facts = backend.tip_now()
        assert facts.median_time == sorted(times[-11:])[len(times[-11:]) // 2]
        template = backend.block_template_now()
        chosen = template.min_time + height * 7 % 5 * 60
        coinbase = build_coinbase(template)
        header = solve(replace(template, time=chosen), coinbase)
        assert backend.submit_block_now(assemble_block(header, coinbase, template)) == ACCEPTED
        times.append(chosen)


def test_the_clock_is_an_argument_and_never_too_old(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path, clock=lambda: 1_000.0)
    for _ in range(20):
        template = backend.block_template_now()
        assert template.time == template.min_time
        mine(backend)
    backend.close()


@pytest.mark.slow
def test_templates_are_right_through_halvings_and_retargets(backend: KernelBackend) -> None:
    for height in range(1, 311):
        template = backend.block_template_now()
        assert template.height == height
        assert template.coinbase_value == 5_000_000_000 >> height // 150
        mine(backend)
    # The end of a day of blocks may not lie far in the future: Core says whether the template knows.
    while (backend.tip_now().height + 1) % 144:
        mine(backend)
    template = backend.block_template_now()
    early = replace(template, time=template.min_time)
    assert backend.submit_block_now(build_block(early)) == ACCEPTED


# Refusals.


def refusal(backend: KernelBackend, template: BlockTemplate, coinbase: bytes, header: bytes) -> str:
    before = backend.tip_now()
    result = backend.submit_block_now(assemble_block(header, coinbase, template))
    assert not result.accepted
    assert backend.tip_now() == before
    return result.reason


def test_a_coinbase_that_pays_one_satoshi_too_much_is_refused(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template, value=template.coinbase_value + 1)
    header = solve(template, coinbase)
    assert refusal(backend, template, coinbase, header) == "bad-cb-amount"
    assert refusal(backend, template, coinbase, header) == "duplicate-invalid"
    child = on(template, sha256d(header), 2)
    coinbase = build_coinbase(child)
    assert refusal(backend, child, coinbase, solve(child, coinbase)) == "bad-prevblk"
    mine(backend)


def test_a_coinbase_that_pays_less_is_accepted(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template, value=1)
    assert backend.submit_block_now(assemble_block(solve(template, coinbase), coinbase, template)) == ACCEPTED


def test_a_coinbase_of_another_height_is_refused(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template, height=2)
    assert refusal(backend, template, coinbase, solve(template, coinbase)) == "bad-cb-height"


def test_a_header_over_other_transactions_is_refused_and_the_right_block_accepted(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template)
    header = solve(template, coinbase)
    other = build_coinbase(template, extra=b"\x00")
    assert refusal(backend, template, other, header) == "bad-txnmrklroot"
    assert backend.submit_block_now(assemble_block(header, coinbase, template)) == ACCEPTED


def test_a_witness_that_nothing_commits_to_is_refused_and_the_block_without_it_accepted(
    backend: KernelBackend,
) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template)
    header = solve(template, coinbase)
    with_witness = replace(template, witness_commitment=bytes(32))
    assert refusal(backend, with_witness, coinbase, header) == "unexpected-witness"
    assert backend.submit_block_now(assemble_block(header, coinbase, template)) == ACCEPTED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"time": 1_000}, "time-too-old"),
        ({"time": int(time.time()) + 3 * 3600}, "time-too-new"),
        ({"bits": 0x207FFFFE}, "bad-diffbits"),
        ({"bits": 0x1D00FFFF}, "high-hash"),
        ({"version": 3}, "bad-version(0x00000003)"),
        ({"previous_block_hash": b"\x07" * 32}, "prev-blk-not-found"),
    ],
)
def test_a_bad_header_is_refused(backend: KernelBackend, changes: dict[str, int], reason: str) -> None:
    template = replace(backend.block_template_now(), **changes)  # type: ignore[arg-type]
    coinbase = build_coinbase(template)
    header = solve(template, coinbase, solved=reason != "high-hash")
    assert refusal(backend, template, coinbase, header) == reason


def test_a_header_without_work_is_refused(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    coinbase = build_coinbase(template)
    assert refusal(backend, template, coinbase, solve(template, coinbase, solved=False)) == "high-hash"


def test_a_version_with_its_highest_bit_set_is_accepted(backend: KernelBackend) -> None:
    template = replace(backend.block_template_now(), version=0x3FFFE000)
    assert backend.submit_block_now(build_block(template)) == ACCEPTED


def test_bytes_that_are_no_block_are_answered(backend: KernelBackend) -> None:
    block = build_block(backend.block_template_now())
    for raw in (b"", b"\x00", bytes(80), bytes(81), b"\xff" * 200, block[:-1], block[:80]):
        result = backend.submit_block_now(raw)
        assert not result.accepted
        assert result.reason in ("decode-failed", "bad-blk-length", "high-hash"), raw
    assert backend.submit_block_now(block[:-1]).reason == "decode-failed"
    assert backend.submit_block_now(block) == ACCEPTED


def test_the_same_block_twice_is_a_duplicate(backend: KernelBackend) -> None:
    block = build_block(backend.block_template_now())
    assert backend.submit_block_now(block) == ACCEPTED
    assert backend.submit_block_now(block) == SubmitResult(accepted=False, reason="duplicate")


def test_two_backends_hear_each_their_own_reasons(tmp_path: Path) -> None:
    backends = [KernelBackend.open(tmp_path / name) for name in "ab"]
    answers: dict[int, set[str]] = {}

    def submit(which: int) -> None:
        backend = backends[which]
        for i in range(50):
            template = backend.block_template_now()
            coinbase = build_coinbase(template, value=[5_000_000_001, 1][which], height=[1, 2][which], extra=bytes([i]))
            block = assemble_block(solve(template, coinbase), coinbase, template)
            answers.setdefault(which, set()).add(backend.submit_block_now(block).reason)

    threads = [threading.Thread(target=submit, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for backend in backends:
        backend.close()
    assert answers == {0: {"bad-cb-amount"}, 1: {"bad-cb-height"}}


def test_the_library_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = KernelBackend.open(tmp_path)
    mine(backend, 2)
    template = backend.block_template_now()
    backend.submit_block_now(assemble_block(bytes(80), build_coinbase(template), template))
    backend.close()
    assert capfd.readouterr() == ("", "")


# Branches.


def test_a_side_branch_is_inconclusive_until_it_is_the_longest(backend: KernelBackend) -> None:
    mine(backend, 2)
    fork = backend.tip_now()
    template = backend.block_template_now()
    ours = mine(backend)
    theirs = build_block(template, extra=b"\x01")
    assert backend.submit_block_now(theirs) == SubmitResult(accepted=False, reason="inconclusive")
    assert backend.submit_block_now(theirs) == SubmitResult(accepted=False, reason="duplicate")
    assert backend.tip_now().block_hash == ours
    side = backend.header_facts_now(sha256d(theirs[:80]))
    assert side is not None
    assert side.height == fork.height + 1
    longer = build_block(on(template, side.block_hash, side.height + 1))
    assert backend.submit_block_now(longer) == ACCEPTED
    assert backend.tip_now().block_hash == sha256d(longer[:80])
    assert backend.block_template_now().height == fork.height + 3


def test_a_branch_that_turns_out_invalid_leaves_the_old_tip(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    ours = mine(backend)
    coinbase = build_coinbase(template, value=template.coinbase_value + 1)
    greedy = assemble_block(solve(template, coinbase), coinbase, template)
    assert backend.submit_block_now(greedy).reason == "inconclusive"
    child = build_block(on(template, sha256d(greedy[:80]), 2))
    assert not backend.submit_block_now(child).accepted
    assert backend.tip_now().block_hash == ours


def test_a_block_of_the_active_chain_can_be_read_back(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    block, rival = build_block(template), build_block(template, extra=b"\x01")
    assert backend.submit_block_now(block) == ACCEPTED
    assert backend.submit_block_now(rival).reason == "inconclusive"
    assert backend.block_now(sha256d(block[:80])) == block
    assert backend.block_now(sha256d(rival[:80])) is None
    assert backend.block_now(b"\x07" * 32) is None


# Blocks for other nodes.


def follow(behind: KernelBackend, ahead: KernelBackend, max_bytes: int = 2**20) -> int:
    """What a node does whose peer may have more blocks; gives how many it was sent."""
    sent: list[bytes] = []
    while True:
        last = (sha256d(sent[-1][:80]),) if sent else ()
        blocks = ahead.blocks_after_now((*last, *behind.block_locator_now()), max_bytes)
        if not blocks:
            return len(sent)
        for raw in blocks:
            assert behind.submit_block_now(raw).reason in ("", "inconclusive", "duplicate")
        sent += blocks


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[KernelBackend, KernelBackend]]:
    opened = [KernelBackend.open(tmp_path / name) for name in "ab"]
    yield opened[0], opened[1]
    for backend in opened:
        backend.close()


def test_a_locator_grows_apart_and_ends_at_genesis(backend: KernelBackend) -> None:
    checked: BlockSource = backend  # the protocol, as mypy sees it
    assert isinstance(checked, BlockSource)
    genesis = backend.tip_now().block_hash
    assert backend.block_locator_now() == (genesis,)
    chain = [genesis, *(mine(backend) for _ in range(60))]
    heights = [chain.index(block_hash) for block_hash in backend.block_locator_now()]
    assert heights == [60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 49, 45, 37, 21, 0]
    newest = mine(backend)
    assert backend.block_locator_now()[:2] == (newest, chain[60])


async def test_two_nodes_with_one_tip_have_nothing_to_send(backend: KernelBackend) -> None:
    mine(backend, 3)
    locator = await backend.block_locator()
    assert locator == await backend.block_locator() == backend.block_locator_now()
    assert await backend.blocks_after(locator, 1_000) == ()
    assert backend.blocks_after_now(locator, 1_000) == ()
    assert len(await backend.blocks_after(locator[1:], 1_000)) == 1


def test_an_answer_has_as_many_blocks_as_fit_and_never_none(backend: KernelBackend) -> None:
    blocks = []
    for _ in range(70):
        blocks.append(build_block(backend.block_template_now()))
        assert backend.submit_block_now(blocks[-1]) == ACCEPTED
    tip = backend.tip_now().block_hash
    genesis = backend.block_locator_now()[-1]
    three = sum(map(len, blocks[:3]))
    assert backend.blocks_after_now((genesis,), three) == tuple(blocks[:3])
    assert backend.blocks_after_now((genesis,), three - 1) == tuple(blocks[:2])
    assert backend.blocks_after_now((genesis,), 0) == tuple(blocks[:1])
    assert backend.blocks_after_now((genesis,), 2**20) == tuple(blocks)
    assert backend.blocks_after_now((b"\x07" * 32,), 2**20) == tuple(blocks)
    assert backend.blocks_after_now((), 2**20) == tuple(blocks)
    assert backend.blocks_after_now((b"\x07" * 32, tip, genesis), 2**20) == ()
    assert backend.blocks_after_now((sha256d(blocks[9][:80]), genesis), 2**20) == tuple(blocks[10:])


def test_blocks_of_a_side_branch_are_not_given(backend: KernelBackend) -> None:
    template = backend.block_template_now()
    ours = build_block(template)
    theirs = build_block(template, extra=b"\x01")
    assert backend.submit_block_now(ours) == ACCEPTED
    assert backend.submit_block_now(theirs).reason == "inconclusive"
    assert backend.blocks_after_now((sha256d(theirs[:80]), template.previous_block_hash), 2**20) == (ours,)


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [2**20, 5_000, 0])
def test_two_branches_end_on_the_heavier_one(pair: tuple[KernelBackend, KernelBackend], max_bytes: int) -> None:
    """Also if an answer does not reach as far as the branch that it is to overtake."""
    first, second = pair
    mine(first, 5)
    assert follow(second, first) == 5
    mine(first, 40)
    heavier = mine(second, 41, script=p2wpkh_script(KEY))
    assert follow(second, first, max_bytes) >= 40
    assert second.tip_now().block_hash == heavier
    assert follow(first, second, max_bytes) >= 41
    assert first.tip_now().block_hash == heavier
    assert follow(first, second, max_bytes) == follow(second, first, max_bytes) == 0
    assert first.block_locator_now() == second.block_locator_now()


@pytest.mark.slow
def test_an_empty_chain_catches_up(pair: tuple[KernelBackend, KernelBackend]) -> None:
    ahead, behind = pair
    mine(ahead, 300)
    first = ahead.blocks_after_now(behind.block_locator_now(), 2**20)
    mine(ahead, 10)
    assert [behind.submit_block_now(raw) for raw in first] == [ACCEPTED] * 300
    assert follow(behind, ahead) == 10
    assert behind.tip_now() == ahead.tip_now()


class Interrupted(KernelBackend):
    """Something happens once, the next time that the library is let go."""

    interruption: Callable[[], object] | None = None

    @contextmanager
    def _library(self) -> Iterator[None]:
        with super()._library():
            yield
        happens, self.interruption = self.interruption, None
        if happens is not None:
            happens()


@pytest.mark.slow
def test_an_answer_never_joins_two_branches(tmp_path: Path) -> None:
    """The chain changes while blocks are read: what was read so far is one branch, and is given alone."""
    backend, rival = Interrupted.open(tmp_path / "a"), KernelBackend.open(tmp_path / "b")
    assert isinstance(backend, Interrupted)
    mine(backend, 60)
    blocks = backend.blocks_after_now((), 2**20)
    mine(rival, 61, script=p2wpkh_script(KEY))
    backend.interruption = lambda: follow(backend, rival)
    given = backend.blocks_after_now((), 2**20)
    assert 0 < len(given) < 60
    assert given == blocks[: len(given)]
    assert backend.blocks_after_now((), 2**20) == rival.blocks_after_now((), 2**20)
    backend.interruption = lambda: mine(backend)
    assert len(backend.blocks_after_now((), 2**20)) == 62
    for opened in (backend, rival):
        opened.close()


# Waiting.


async def test_whoever_waits_for_a_tip_learns_of_it_at_once(backend: KernelBackend) -> None:
    known = (await backend.tip()).block_hash
    seen: list[bytes] = []

    async def follow() -> None:
        seen.append(await backend.wait_for_tip(known))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked()
            block = build_block(await backend.block_template())
            assert await backend.submit_block(block) == ACCEPTED
    assert seen == [sha256d(block[:80])] * 3
    assert await backend.wait_for_tip(known) == seen[0]


async def test_a_wait_ends_with_its_timeout(backend: KernelBackend, autojump_clock: trio.testing.MockClock) -> None:
    known = (await backend.tip()).block_hash
    assert await backend.wait_for_tip(known, timeout=60) == known
    assert trio.current_time() >= 60


async def test_closing_tells_those_who_wait(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    known = (await backend.tip()).block_hash
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                with pytest.raises(BackendError, match="closed"):
                    await backend.wait_for_tip(known)

            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked()
            await backend.aclose()
    await backend.aclose()
    with pytest.raises(BackendError, match="closed"):
        await backend.tip()
    with pytest.raises(BackendError, match="closed"):
        await backend.submit_block(b"")


# Transactions.


def spendable(backend: KernelBackend, script: bytes, position: int = 0) -> Spendable:
    return backend.mature_coinbases(script)[position]


def test_a_signed_payment_is_mined_with_its_fee_and_a_witness_commitment(mature: KernelBackend) -> None:
    coin = spendable(mature, p2wpkh_script(KEY))
    before = len(mature.mature_coinbases(p2wpkh_script(KEY)))
    payment = spend_p2wpkh(KEY, [coin], [(coin.value - 1_234, ANYONE)])
    mature.add_transaction(payment)
    assert mature.mempool_txids() == (txid_of(payment),)
    assert len(mature.mature_coinbases(p2wpkh_script(KEY))) == before - 1
    template = mature.block_template_now()
    (transaction,) = template.transactions
    assert (transaction.raw, transaction.fee, transaction.txid) == (payment, 1_234, txid_of(payment))
    assert transaction.wtxid == sha256d(payment)
    assert transaction.weight == len(payment) + 3 * len(unsigned([coin], [(0, ANYONE)]))
    assert template.coinbase_value == block_subsidy(template.height, 150) + 1_234
    assert template.witness_commitment is not None
    coinbase = build_coinbase(template, value=template.coinbase_value + 1)
    assert refusal(mature, template, coinbase, solve(template, coinbase)) == "bad-cb-amount"
    block = build_block(template)
    assert mature.submit_block_now(block) == ACCEPTED
    assert mature.mempool_txids() == ()
    assert mature.block_template_now().witness_commitment is None
    assert CBlock.deserialize(block).vtx[1].GetTxid() == txid_of(payment)


def test_a_taproot_payment_is_verified_and_mined(mature: KernelBackend) -> None:
    coins = mature.mature_coinbases(p2tr_script(KEY))[:2]
    total = sum(coin.value for coin in coins)
    payment = spend_p2tr(KEY, coins, [(total - 500, p2wpkh_script(KEY))])
    mature.add_transaction(payment)
    mine(mature)
    assert mature.mempool_txids() == ()


def test_payments_that_build_on_each_other_are_mined_in_order(mature: KernelBackend) -> None:
    coin = spendable(mature, p2wpkh_script(KEY))
    script = p2wpkh_script(KEY)
    first = spend_p2wpkh(KEY, [coin], [(coin.value // 2, script), (coin.value // 2 - 100, script)])
    second = spend_p2wpkh(KEY, [(txid_of(first), 0, coin.value // 2)], [(coin.value // 2 - 10, ANYONE)])
    third_spends: list[Spent] = [(txid_of(first), 1, coin.value // 2 - 100), (txid_of(second), 0, coin.value // 2 - 10)]
    with pytest.raises(BackendError, match="bad-txns-inputs-missingorspent"):
        mature.add_transaction(second)
    mature.add_transaction(first)
    mature.add_transaction(second)
    assert [t.depends for t in mature.block_template_now().transactions] == [(), (0,)]
    with pytest.raises(BackendError, match="bad signature or script in input 1"):
        mature.add_transaction(spend_p2wpkh(KEY, third_spends, [(1, ANYONE)]))
    mature.add_transaction(unsigned(third_spends[1:], [(coin.value // 2 - 20, ANYONE)]))
    template = mature.block_template_now()
    assert [t.depends for t in template.transactions] == [(), (0,), (1,)]
    assert [t.fee for t in template.transactions] == [coin.value - coin.value // 2 * 2 + 100, 10, 10]
    mine(mature)
    assert mature.mempool_txids() == ()


def test_a_wrong_commitment_or_a_stripped_witness_is_refused(mature: KernelBackend) -> None:
    coin = spendable(mature, p2wpkh_script(KEY))
    mature.add_transaction(spend_p2wpkh(KEY, [coin], [(coin.value - 1, ANYONE)]))
    template = mature.block_template_now()
    wrong = replace(template, witness_commitment=b"\x07" * 32)
    coinbase = build_coinbase(wrong)
    assert refusal(mature, wrong, coinbase, solve(wrong, coinbase)) == "bad-witness-merkle-match"
    none = replace(template, witness_commitment=None)
    coinbase = build_coinbase(none)
    assert refusal(mature, none, coinbase, solve(none, coinbase)) == "unexpected-witness"
    coinbase = build_coinbase(template)
    header = solve(template, coinbase)
    plain = unsigned([coin], [(coin.value - 1, ANYONE)])
    stripped = replace(template, transactions=(replace(template.transactions[0], raw=plain),))
    assert refusal(mature, stripped, coinbase, header) == "bad-witness-merkle-match"
    assert mature.submit_block_now(assemble_block(header, coinbase, template)) == ACCEPTED


def test_what_cannot_be_mined_is_not_added(mature: KernelBackend) -> None:
    script = p2wpkh_script(KEY)
    coin, other = mature.mature_coinbases(script)[:2]
    output = [(coin.value - 1, ANYONE)]
    payment = spend_p2wpkh(KEY, [coin], output)
    block = mature.block_template_now()
    newest = mine(mature, script=script)
    immature: Spent = (sha256d(build_coinbase(block, script=script)), 0, block.coinbase_value)
    assert newest == mature.tip_now().block_hash
    height = mature.tip_now().height + 1
    mature.add_transaction(spend_p2wpkh(KEY, [other], [(other.value, ANYONE)]))
    refused: list[tuple[bytes, str]] = [
        (b"", "decode-failed"),
        (payment[:-1], "decode-failed"),
        (payment + b"\0", "decode-failed: not one transaction"),
        (spend_p2wpkh(KEY, [coin], [(coin.value + 1, ANYONE)]), "bad-txns-in-belowout"),
        (spend_p2wpkh(KEY, [coin], [(-1, ANYONE)]), "bad-txns-vout-toolarge"),
        (spend_p2wpkh(KEY, [coin, coin], output), "bad-txns: no output, or an input twice"),
        (spend_p2wpkh(KEY, [coin], []), "bad-txns: no output, or an input twice"),
        (spend_p2wpkh(KEY, [(b"\x07" * 32, 0, 1)], [(1, ANYONE)]), f"there is no unspent output {'07' * 32}:0"),
        (spend_p2wpkh(KEY, [(coin.txid, 1, 1)], [(1, ANYONE)]), "bad-txns-inputs-missingorspent"),
        (spend_p2wpkh(KEY, [immature], [(1, ANYONE)]), "bad-txns-premature-spend-of-coinbase: mined at 111"),
        (spend_p2wpkh(KEY, [other], [(1, ANYONE)]), "txn-mempool-conflict"),
        (spend_p2wpkh(KEY, [other], [(other.value, ANYONE)]), "txn-already-in-mempool"),
        (spend_p2wpkh(KEY, [coin], output, sequence=0, lock_time=height), "bad-txns-nonfinal"),
        (spend_p2wpkh(KEY, [coin], output, sequence=0, lock_time=2**32 - 1), "bad-txns-nonfinal"),
        (spend_p2wpkh(KEY, [coin], output, sequence=height), "non-BIP68-final: locked for"),
        (spend_p2wpkh(KEY, [coin], output, sequence=1 << 22), "non-BIP68-final: relative locks by time"),
        (spend_p2wpkh(PrivateKey(b"\x02" * 32), [coin], output), "block-script-verify-flag-failed"),
        (unsigned([coin], output), "block-script-verify-flag-failed"),
    ]
    for raw, reason in refused:
        with pytest.raises(BackendError, match=reason):
            mature.add_transaction(raw)
    # The last block height and sequence that are not too late, as Core sees it.
    mature.add_transaction(spend_p2wpkh(KEY, [coin], output, sequence=height - 2, lock_time=height - 1))
    mine(mature)
    assert mature.mempool_txids() == ()


def test_core_refuses_a_bad_signature_and_the_chain_goes_on_without_it(mature_chain: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", "--sparse=always", f"{mature_chain}/.", tmp_path], check=True)
    backend = KernelBackend.open(tmp_path, check_scripts=False)
    good, bad = backend.mature_coinbases(p2wpkh_script(KEY))[:2]
    honest = spend_p2wpkh(KEY, [good], [(good.value - 1, ANYONE)])
    forged = spend_p2wpkh(PrivateKey(b"\x02" * 32), [bad], [(bad.value, ANYONE)])
    child = unsigned([(txid_of(forged), 0, bad.value)], [(1, ANYONE)])
    for raw in (honest, forged, child):
        backend.add_transaction(raw)
    result = backend.submit_block_now(build_block(backend.block_template_now()))
    assert not result.accepted
    assert result.reason.startswith("block-script-verify-flag-failed (")
    assert backend.mempool_txids() == (txid_of(honest),)
    mine(backend)
    backend.close()


def test_a_block_with_a_tampered_copy_does_not_cost_the_honest_transaction(mature: KernelBackend) -> None:
    coin = spendable(mature, p2wpkh_script(KEY))
    honest = spend_p2wpkh(KEY, [coin], [(coin.value - 1, ANYONE)])
    mature.add_transaction(honest)
    tampered = bytearray(honest)
    tampered[-60] ^= 1  # in the signature or the public key: the same txid, another wtxid
    template = mature.block_template_now()
    fake = replace(template.transactions[0], raw=bytes(tampered), wtxid=sha256d(bytes(tampered)))
    commitment = witness_commitment_of([fake.wtxid])
    result = mature.submit_block_now(
        build_block(replace(template, transactions=(fake,), witness_commitment=commitment))
    )
    assert result.reason.startswith("block-script-verify-flag-failed")
    assert mature.mempool_txids() == (txid_of(honest),)


def test_a_transaction_that_makes_blocks_invalid_in_an_unnamed_way_is_removed(mature: KernelBackend) -> None:
    coin = spendable(mature, p2wpkh_script(KEY))
    too_many_signature_checks = [(1, b"\xac" * 250)] * 100
    mature.add_transaction(spend_p2wpkh(KEY, [coin], too_many_signature_checks))
    block = build_block(mature.block_template_now())
    assert mature.submit_block_now(block) == SubmitResult(accepted=False, reason="bad-blk-sigops")
    assert mature.mempool_txids() == ()
    mine(mature)


def test_a_foreign_bad_transaction_does_not_cost_ours(mature: KernelBackend) -> None:
    ours, theirs = mature.mature_coinbases(p2wpkh_script(KEY))[:2]
    honest = spend_p2wpkh(KEY, [ours], [(ours.value, ANYONE)])
    mature.add_transaction(honest)
    template = mature.block_template_now()
    early = spend_p2wpkh(KEY, [theirs], [(1, ANYONE)], sequence=0, lock_time=5_000)
    foreign = replace(template.transactions[0], raw=early, txid=txid_of(early), wtxid=sha256d(early))
    transactions = (*template.transactions, foreign)
    commitment = witness_commitment_of([transaction.wtxid for transaction in transactions])
    branch = merkle_branch([transaction.txid for transaction in transactions])
    mixed = replace(template, transactions=transactions, witness_commitment=commitment, merkle_branch=branch)
    assert mature.submit_block_now(build_block(mixed)).reason == "bad-txns-nonfinal"
    assert mature.mempool_txids() == (txid_of(honest),)
    mine(mature)
    assert mature.mempool_txids() == ()


@pytest.mark.parametrize("undo_depth", [100, 2])
def test_a_reorg_puts_back_what_is_still_valid(
    mature: KernelBackend, monkeypatch: pytest.MonkeyPatch, undo_depth: int
) -> None:
    """One that is deeper than the blocks that can be undone forgets them, but collects the right coins."""
    monkeypatch.setattr(mempool, "_UNDO_DEPTH", undo_depth)
    script = p2wpkh_script(KEY)
    coins = mature.mature_coinbases(script)
    parent = spend_p2wpkh(KEY, [coins[0]], [(coins[0].value - 1, script)])
    child = spend_p2wpkh(KEY, [(txid_of(parent), 0, coins[0].value - 1)], [(coins[0].value - 2, script)])
    loser = spend_p2wpkh(KEY, [coins[1]], [(coins[1].value - 3, ANYONE)])
    rival = spend_p2wpkh(KEY, [coins[1]], [(coins[1].value - 4, script)])
    fork = mature.block_template_now()
    for raw in (parent, loser):
        mature.add_transaction(raw)
    mine(mature)
    mature.add_transaction(child)
    mine(mature, 2)
    assert mature.mempool_txids() == ()
    other = TemplateTransaction(raw=rival, txid=txid_of(rival), wtxid=sha256d(rival), fee=4, weight=len(rival) * 4)
    template = build_template(
        version=fork.version,
        previous_block_hash=fork.previous_block_hash,
        height=fork.height,
        bits=fork.bits,
        min_time=fork.min_time,
        time=fork.time,
        coinbase_value=fork.coinbase_value,
        transactions=[other],
    )
    block = build_block(template)
    assert mature.submit_block_now(block).reason == "inconclusive"
    for height in range(fork.height + 1, fork.height + 4):
        block = build_block(on(fork, sha256d(block[:80]), height))
        result = mature.submit_block_now(block)
    assert result == ACCEPTED
    expected = (txid_of(parent), txid_of(child)) if undo_depth == 100 else ()
    assert mature.mempool_txids() == expected
    assert_coins_are_the_chains(mature)
    mine(mature)
    assert mature.mempool_txids() == ()
    assert_coins_are_the_chains(mature)


def assert_coins_are_the_chains(backend: KernelBackend) -> None:
    """What was followed block by block is what one collects anew."""
    followed = backend._mempool
    vars(backend)["_mempool"] = None
    backend.mature_coinbases(b"")
    collected = backend._mempool
    assert followed is not None
    assert collected is not None
    assert followed.coins == collected.coins
    assert followed.block_hashes == collected.block_hashes
    backend._mempool = followed


# Durability.


def test_a_closed_chain_opens_where_it_was(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    tip = mine(backend, 5)
    facts = backend.tip_now()
    backend.close()
    backend.close()
    assert not (tmp_path / "DIRTY").exists()
    again = KernelBackend.open(tmp_path)
    assert (again.tip_now(), again.tip_now().block_hash) == (facts, tip)
    mine(again)
    again.close()


@pytest.mark.slow
def test_a_second_open_is_refused_here_and_in_another_process(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(BackendError, match="already open in this process"):
            KernelBackend.open(path)
    child = run_child("open", tmp_path)
    assert child.wait() == 1
    assert child.stdout is not None
    assert "is in use by another process" in child.stdout.read()
    child.stdout.close()
    mine(backend)
    backend.close()
    KernelBackend.open(tmp_path).close()


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendError, match="cannot use"):
        KernelBackend.open(tmp_path / "file")
    with pytest.raises(BackendError, match="cannot use"):
        KernelBackend.open(tmp_path / "file" / "below")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "blocks").write_bytes(b"a file where a directory should be")
    for _ in range(2):  # the lock was let go
        with pytest.raises(BackendError, match="cannot open the Bitcoin node"):
            KernelBackend.open(damaged)


def test_without_the_library_the_operator_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pbk", None)
    with pytest.raises(BackendError, match=r"pip install 'p2pool\[kernel\]'"):
        KernelBackend.open(tmp_path)


def test_a_marker_left_in_an_empty_directory_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "DIRTY").write_bytes(b"")
    backend = KernelBackend.open(tmp_path)
    mine(backend)
    backend.close()


@pytest.mark.slow
def test_every_block_survives_kills(tmp_path: Path) -> None:
    """Killed with -9 while mining, again and again, also right after the start: each block once accepted is there."""
    accepted: list[str] = []
    for wanted in (120, 1, 60):
        child = run_child("mine", tmp_path)
        assert child.stdout is not None
        accepted += [child.stdout.readline().strip() for _ in range(wanted)]
        os.kill(child.pid, signal.SIGKILL)
        accepted += [line.strip() for line in child.stdout if len(line) == 65]
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
    backend = KernelBackend.open(tmp_path)
    assert backend.tip_now().height >= len(accepted) > 180
    for height, block_hash in enumerate(accepted, start=1):
        facts = backend.header_facts_now(bytes.fromhex(block_hash)[::-1])
        assert facts is not None
        assert facts.height >= height
    mine(backend, 3)
    backend.close()


def run_child(what: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, what, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def child_main(arguments: Sequence[str]) -> None:
    """What runs in another process: open a directory, or mine in it until killed and print each accepted block."""
    try:
        backend = KernelBackend.open(Path(arguments[1]))
    except BackendError as error:
        print(error)
        sys.exit(1)
    while arguments[0] == "mine":
        print(mine(backend)[::-1].hex(), flush=True)


if __name__ == "__main__":
    child_main(sys.argv[1:])
