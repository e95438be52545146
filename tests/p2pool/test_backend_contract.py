"""What every Bitcoin backend promises, asked of each: embedded, and over RPC from a fake and from real nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from bitcoin.core import CBlock

from p2pool.bitcoin_backend import BitcoinBackend, BlockReader, HeaderSource, SubmitResult
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, block_subsidy, merkle_branch, witness_commitment_of
from p2pool.errors import BackendError
from sharechain.hasher import sha256d
from tests.p2pool.fakecore import open_fake_core
from tests.p2pool.realnodes import (
    PATIENCE_S,
    FullNode,
    over_rpc,
    running_node,
)
from tests.p2pool.regtest import (
    FUNDED,
    MATURITY,
    P2TR,
    P2WPKH,
    REGTEST_BITS,
    UNUSED,
    EmbeddedNode,
    Payment,
    Wallet,
    after,
    build_block,
    premined,
    premined_wallet,
    take_premined,
)

ACCEPTED = SubmitResult(accepted=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a Bitcoin chain is kept between the tests: a directory of the embedded node, or a node that runs.

    Arguments:
        kind: "kernel", "fake", "btcd" or "core".
        chain: the blocks that it began with, from height 1 on.
        wallet: the coins in them that no test has spent yet.
    """

    kind: str
    chain: Sequence[bytes]
    wallet: Wallet
    directory: Path | None = None
    node: FullNode | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitcoin:
    """A backend, and a way round it to the node that it stands for.

    Arguments:
        backend: under test.
        node: a process, or the embedded one.
        chain, wallet: of its place.
    """

    backend: BitcoinBackend
    node: FullNode | KernelBackend
    chain: Sequence[bytes]
    wallet: Wallet

    async def submit(self, raw: bytes) -> None:
        """Give the node a block of a stranger."""
        if isinstance(self.node, FullNode):
            await trio.to_thread.run_sync(self.node.submit, raw)
        else:
            await self.node.submit_block(raw)

    async def send(self, raw: bytes) -> None:
        """Put a transaction into the node's mempool."""
        add = self.node.send if isinstance(self.node, FullNode) else self.node.add_transaction
        await trio.to_thread.run_sync(add, raw)

    async def mine(self, script: bytes = UNUSED) -> bytes:
        """Have a stranger find an empty block; give it."""
        template = await self.backend.block_template()
        raw = build_block(without_transactions(template), script)
        await self.submit(raw)
        return raw

    async def pay(self, count: int) -> list[Payment]:
        """Fill the mempool; the next template has these payments. (btcd looks for new ones only at a new tip.)"""
        payments = self.wallet.payments(count)
        for payment in payments:
            await self.send(payment.raw)
        raw = await self.mine()
        with trio.fail_after(PATIENCE_S):
            await self.backend.wait_for_tip(raw[4:36])
        return payments


def without_transactions(template: BlockTemplate) -> BlockTemplate:
    value = block_subsidy(template.height, 150)
    return replace(template, transactions=(), merkle_branch=(), witness_commitment=None, coinbase_value=value)


def hash_of(raw: bytes) -> bytes:
    return sha256d(raw[:80])


# What is asked.


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("kernel")
    chain = premined()[: FUNDED + MATURITY]  # no more: it votes for nothing
    kernel = KernelBackend.open(directory)
    try:
        take_premined(EmbeddedNode(kernel), len(chain))
    finally:
        kernel.close()
    return Place(kind="kernel", chain=chain, wallet=premined_wallet(), directory=directory)


@pytest.fixture(scope="module")
def fake(embedded: Place) -> Place:
    """Core's words before the embedded node."""
    return replace(embedded, kind="fake")


@pytest.fixture(scope="module")
def btcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with running_node("btcd", tmp_path_factory.mktemp("btcd")) as node:
        take_premined(node)
        yield Place(kind="btcd", chain=premined(), wallet=premined_wallet(), node=node)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with running_node("core", tmp_path_factory.mktemp("core")) as node:
        take_premined(node)
        yield Place(kind="core", chain=premined(), wallet=premined_wallet(), node=node)


KINDS = [
    "embedded",
    "fake",
    pytest.param("btcd", marks=pytest.mark.slow),
    pytest.param("core", marks=pytest.mark.slow),
]
OVER_RPC = KINDS[1:]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Place:
    return cast("Place", request.getfixturevalue(request.param))


@pytest.fixture
async def bitcoin(place: Place) -> AsyncIterator[Bitcoin]:
    async with AsyncExitStack() as stack:
        if place.node is not None:
            backend = await stack.enter_async_context(over_rpc(place.node.endpoint))
            yield Bitcoin(backend=backend, node=place.node, chain=place.chain, wallet=place.wallet)
            return
        assert place.directory is not None
        kernel = KernelBackend.open(place.directory)
        stack.push_async_callback(kernel.aclose)
        if place.kind == "kernel":
            yield Bitcoin(backend=kernel, node=kernel, chain=place.chain, wallet=place.wallet)
            return
        server = await stack.enter_async_context(open_fake_core(kernel))
        backend = await stack.enter_async_context(over_rpc(server.endpoint))
        yield Bitcoin(backend=backend, node=kernel, chain=place.chain, wallet=place.wallet)


# Templates.


async def test_the_network_has_its_name(bitcoin: Bitcoin) -> None:
    assert bitcoin.backend.network == "regtest"


async def test_a_template_builds_on_the_tip(bitcoin: Bitcoin) -> None:
    tip = await bitcoin.backend.tip()
    template = await bitcoin.backend.block_template()
    assert (template.previous_block_hash, template.height) == (tip.block_hash, tip.height + 1)
    assert template.bits == template.bits_at(template.time) == tip.next_bits == REGTEST_BITS
    assert template.min_time == tip.median_time + 1
    assert template.time >= template.min_time
    assert template.version >= 0x20000000
    assert_is_sound(template)


async def test_a_template_has_the_transactions_that_pay_and_what_commits_to_them(bitcoin: Bitcoin) -> None:
    payments = await bitcoin.pay(4)
    template = await bitcoin.backend.block_template()
    fees = {transaction.txid: transaction.fee for transaction in template.transactions}
    assert fees == {payment.txid: payment.fee for payment in payments}
    assert {transaction.raw for transaction in template.transactions} == {payment.raw for payment in payments}
    assert_is_sound(template)
    # One that spends another's output comes after it, and says so.
    positions = {transaction.txid: position for position, transaction in enumerate(template.transactions)}
    parent, child = positions[payments[1].txid], positions[payments[2].txid]
    assert template.transactions[child].depends == (parent,)
    raw = build_block(template)
    assert await bitcoin.backend.submit_block(raw) == ACCEPTED
    following = await bitcoin.backend.block_template()
    assert (following.previous_block_hash, following.transactions) == (hash_of(raw), ())
    assert following.witness_commitment is None


def assert_is_sound(template: BlockTemplate) -> None:
    """All that is computed of a template agrees with its transactions, parsed anew."""
    transactions = template.transactions
    assert template.coinbase_value == block_subsidy(template.height, 150) + sum(each.fee for each in transactions)
    for position, each in enumerate(transactions):
        assert all(0 <= before < position for before in each.depends)
    block = CBlock.deserialize(build_block(template))
    for each, parsed in zip(transactions, block.vtx[1:], strict=True):
        assert (each.txid, each.wtxid) == (parsed.GetTxid(), parsed.GetHash())
        assert each.weight == parsed.calc_weight()
    assert template.merkle_branch == merkle_branch([each.txid for each in transactions])
    has_witness = any(each.txid != each.wtxid for each in transactions)
    commitment = witness_commitment_of([each.wtxid for each in transactions]) if has_witness else None
    assert template.witness_commitment == commitment


# Blocks and what is known of them.


async def test_a_solved_block_is_accepted_and_is_the_tip(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    before = await backend.tip()
    raw = build_block(await backend.block_template(), P2TR)
    assert await backend.header_facts(hash_of(raw)) is None
    assert await backend.submit_block(raw) == ACCEPTED
    tip = await backend.tip()
    assert (tip.block_hash, tip.height, tip.next_bits) == (hash_of(raw), before.height + 1, REGTEST_BITS)
    assert tip.median_time >= before.median_time
    assert await backend.header_facts(tip.block_hash) == tip
    assert await backend.header_facts(before.block_hash) == before
    assert (await backend.block_template()).previous_block_hash == tip.block_hash


async def test_a_rolled_version_is_accepted(bitcoin: Bitcoin) -> None:
    template = await bitcoin.backend.block_template()
    rolled = replace(template, version=template.version | 0x1FFFE000)
    assert await bitcoin.backend.submit_block(build_block(rolled)) == ACCEPTED


async def test_the_facts_of_an_old_header_are_what_its_chain_says(bitcoin: Bitcoin) -> None:
    times = [1296688602, *(int.from_bytes(raw[68:72], "little") for raw in bitcoin.chain)]
    for height in (len(bitcoin.chain), 1, 0, 5, 12, 11):
        span = sorted(times[max(0, height - 10) : height + 1])
        block_hash = hash_of(bitcoin.chain[height - 1]) if height else bitcoin.chain[0][4:36]
        facts = await bitcoin.backend.header_facts(block_hash)
        assert facts is not None
        assert (facts.block_hash, facts.height) == (block_hash, height)
        assert facts.median_time == span[len(span) // 2]
        much_later = times[height] + 10**6
        assert facts.next_bits == facts.bits_at(much_later) == REGTEST_BITS


async def test_nothing_is_known_of_an_unknown_block(bitcoin: Bitcoin) -> None:
    assert await bitcoin.backend.header_facts(b"\x07" * 32) is None
    assert not await bitcoin.backend.is_on_chain(b"\x07" * 32)


async def test_a_block_of_a_side_branch_is_known_and_not_on_the_chain(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    template = await backend.block_template()
    main, side = build_block(template, P2WPKH), build_block(template, UNUSED)
    for raw in (main, build_block(after(main, template.height + 1))):
        assert await backend.submit_block(raw) == ACCEPTED
    assert await backend.submit_block(side) == SubmitResult(accepted=False, reason="inconclusive")
    assert await backend.is_on_chain(hash_of(main))
    assert await backend.is_on_chain(template.previous_block_hash)
    assert not await backend.is_on_chain(hash_of(side))
    of_main, of_side = await backend.header_facts(hash_of(main)), await backend.header_facts(hash_of(side))
    assert of_main is not None
    assert of_side == replace(of_main, block_hash=hash_of(side))


async def test_the_answer_to_a_sibling_of_the_tip_says_which_of_the_two_is_the_tip(bitcoin: Bitcoin) -> None:
    """Bitcoin Core can be asked to prefer it; the others keep what came first."""
    backend = bitcoin.backend
    template = await backend.block_template()
    first, second = build_block(template, P2WPKH), build_block(template, UNUSED)
    assert await backend.submit_block(first) == ACCEPTED
    result = await backend.submit_block(second)
    assert result in (ACCEPTED, SubmitResult(accepted=False, reason="inconclusive"))
    assert (await backend.tip()).block_hash == hash_of(second if result.accepted else first)
    assert await backend.is_on_chain(hash_of(second)) == result.accepted


async def test_a_longer_branch_takes_over(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    template = await backend.block_template()
    loser, winner = build_block(template, P2WPKH), build_block(template, UNUSED)
    assert await backend.submit_block(loser) == ACCEPTED
    await bitcoin.submit(winner)
    assert await backend.submit_block(build_block(after(winner, template.height + 1))) == ACCEPTED
    assert not await backend.is_on_chain(hash_of(loser))
    assert await backend.is_on_chain(hash_of(winner))
    facts = await backend.header_facts(hash_of(loser))
    assert facts is not None
    assert facts.height == template.height


# Refusals, in Bitcoin Core's words.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"previous_block_hash": b"\x07" * 32}, "prev-blk-not-found"),
        ({"bits": 0x207FFFFE}, "bad-diffbits"),
        ({"merkle_branch": (bytes(32),)}, "bad-txnmrklroot"),
        ({"time": 1_300_000_000}, "time-too-old"),
        ({"time": 4_000_000_000}, "time-too-new"),
    ],
)
async def test_a_block_that_breaks_a_rule_is_refused_with_its_name(
    bitcoin: Bitcoin, changes: dict[str, object], reason: str
) -> None:
    template = without_transactions(await bitcoin.backend.block_template())
    bad = build_block(replace(template, **changes))  # type: ignore[arg-type]
    await assert_refused(bitcoin, bad, reason)


async def test_one_satoshi_too_much_is_refused(bitcoin: Bitcoin) -> None:
    bad = build_block(await bitcoin.backend.block_template(), extra=1)
    await assert_refused(bitcoin, bad, "bad-cb-amount")


async def test_a_header_without_work_is_refused(bitcoin: Bitcoin) -> None:
    bad = build_block(await bitcoin.backend.block_template(), solved=False)
    await assert_refused(bitcoin, bad, "high-hash")


async def test_a_wrong_witness_commitment_is_refused(bitcoin: Bitcoin) -> None:
    await bitcoin.pay(1)
    template = await bitcoin.backend.block_template()
    bad = build_block(replace(template, witness_commitment=b"\x07" * 32))
    await assert_refused(bitcoin, bad, "bad-witness-merkle-match")
    assert await bitcoin.backend.submit_block(build_block(template)) == ACCEPTED


@pytest.mark.parametrize("length", [0, 1, 79, 80, 81, -1])
async def test_bytes_that_are_no_block_are_refused(bitcoin: Bitcoin, length: int) -> None:
    raw = build_block(await bitcoin.backend.block_template())
    await assert_refused(bitcoin, raw[:length], "decode-failed")


async def test_the_same_block_twice_is_a_duplicate(bitcoin: Bitcoin) -> None:
    raw = build_block(await bitcoin.backend.block_template())
    assert await bitcoin.backend.submit_block(raw) == ACCEPTED
    await assert_refused(bitcoin, raw, "duplicate")
    await assert_refused(bitcoin, bitcoin.chain[10], "duplicate")


async def assert_refused(bitcoin: Bitcoin, raw: bytes, reason: str) -> None:
    before = await bitcoin.backend.tip()
    result = await bitcoin.backend.submit_block(raw)
    assert (result.accepted, result.reason.partition("(")[0]) == (False, reason)
    assert await bitcoin.backend.tip() == before


# Waiting for a tip.


async def test_who_is_behind_the_tip_does_not_wait(bitcoin: Bitcoin) -> None:
    tip = await bitcoin.backend.tip()
    raw = await bitcoin.mine()
    assert await bitcoin.backend.wait_for_tip(tip.block_hash) == hash_of(raw)
    assert await bitcoin.backend.wait_for_tip(bytes(32), 0) in (hash_of(raw), bytes(32))


async def test_a_block_of_a_stranger_ends_the_wait(bitcoin: Bitcoin) -> None:
    async with awaited_tip(bitcoin) as seen:
        raw = await bitcoin.mine()
    assert seen == [hash_of(raw)]


async def test_a_block_of_our_own_ends_the_wait(bitcoin: Bitcoin) -> None:
    raw = build_block(await bitcoin.backend.block_template())
    async with awaited_tip(bitcoin) as seen:
        assert await bitcoin.backend.submit_block(raw) == ACCEPTED
    assert seen == [hash_of(raw)]


async def test_a_reorg_ends_the_wait(bitcoin: Bitcoin) -> None:
    template = await bitcoin.backend.block_template()
    loser, winner = build_block(template, P2WPKH), build_block(template, UNUSED)
    assert await bitcoin.backend.submit_block(loser) == ACCEPTED
    last = build_block(after(winner, template.height + 1))
    async with awaited_tip(bitcoin) as seen:
        for raw in (winner, last):
            await bitcoin.submit(raw)
    assert seen == [hash_of(last)]


async def test_the_wait_ends_with_what_is_known_if_nothing_comes(bitcoin: Bitcoin) -> None:
    tip = await bitcoin.backend.tip()
    assert await bitcoin.backend.wait_for_tip(tip.block_hash, 0.05) == tip.block_hash
    assert await bitcoin.backend.wait_for_tip(tip.block_hash, 0) == tip.block_hash


@asynccontextmanager
async def awaited_tip(bitcoin: Bitcoin) -> AsyncIterator[list[bytes]]:
    """What a task saw that waited for another tip than that of the beginning; the context ends with its wait."""
    seen: list[bytes] = []
    tip = await bitcoin.backend.tip()

    async def wait() -> None:
        seen.append(await bitcoin.backend.wait_for_tip(tip.block_hash))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            yield seen


# Reading.


async def test_blocks_can_be_read_back(bitcoin: Bitcoin) -> None:
    reader = cast("BlockReader", bitcoin.backend)
    await bitcoin.pay(2)
    raw = build_block(await bitcoin.backend.block_template())
    assert await bitcoin.backend.submit_block(raw) == ACCEPTED
    tip = await bitcoin.backend.tip()
    assert await reader.block_hash_at(tip.height) == tip.block_hash
    assert await reader.block(tip.block_hash) == raw
    assert await reader.block_hash_at(1) == hash_of(bitcoin.chain[0])
    assert await reader.block(hash_of(bitcoin.chain[100])) == bitcoin.chain[100]
    assert await reader.block_hash_at(0) == bitcoin.chain[0][4:36]
    assert await reader.block_hash_at(tip.height + 1) is None
    assert await reader.block(b"\x07" * 32) is None


@pytest.mark.parametrize("place", OVER_RPC, indirect=True)
async def test_a_header_that_no_node_has_seen_can_be_learnt(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    assert isinstance(backend, HeaderSource)
    template = await backend.block_template()
    main = build_block(template, P2WPKH)
    assert await backend.submit_block(main) == ACCEPTED
    stale = build_block(template, UNUSED)[:80]
    assert await backend.header(hash_of(main)) == main[:80]
    assert await backend.header(hash_of(stale)) is None
    assert await backend.header_facts(hash_of(stale)) is None
    assert await backend.learn_header(stale)
    assert await backend.header(hash_of(stale)) == stale
    of_main = await backend.header_facts(hash_of(main))
    assert of_main is not None
    assert await backend.header_facts(hash_of(stale)) == replace(of_main, block_hash=hash_of(stale))
    assert not await backend.is_on_chain(hash_of(stale))
    # One on top of it, which the node cannot know either.
    next_stale = build_block(after(stale, template.height + 1))[:80]
    assert await backend.learn_header(next_stale)
    facts = await backend.header_facts(hash_of(next_stale))
    assert facts is not None
    assert facts.height == template.height + 1
    assert await backend.learn_header(main[:80])


@pytest.mark.parametrize("place", OVER_RPC, indirect=True)
async def test_a_header_that_bitcoin_would_not_take_is_not_learnt(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    assert isinstance(backend, HeaderSource)
    template = await backend.block_template()
    for bad in (
        build_block(replace(template, previous_block_hash=b"\x07" * 32)),
        build_block(replace(template, bits=0x207FFFFE)),
        build_block(replace(template, time=template.min_time - 1)),
        build_block(replace(template, time=4_000_000_000)),
        build_block(template, solved=False),
    ):
        assert not await backend.learn_header(bad[:80])
        assert await backend.header(hash_of(bad)) is None
        assert await backend.header_facts(hash_of(bad)) is None
    assert not await backend.learn_header(b"")
    assert not await backend.learn_header(bitcoin.chain[0])


# The end.


async def test_after_the_close_nothing_is_answered(bitcoin: Bitcoin) -> None:
    backend = bitcoin.backend
    raw = build_block(await backend.block_template())
    tip = await backend.tip()
    waited: list[BackendError] = []

    async def wait() -> None:
        try:
            await backend.wait_for_tip(tip.block_hash)
        except BackendError as error:
            waited.append(error)

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await backend.aclose()
    assert waited
    questions: list[Callable[[], Awaitable[object]]] = [
        backend.block_template,
        partial(backend.header_facts, tip.block_hash),
        partial(backend.is_on_chain, tip.block_hash),
        partial(backend.submit_block, raw),
        partial(backend.submit_block, b""),
        backend.tip,
        partial(backend.wait_for_tip, tip.block_hash),
        partial(backend.wait_for_tip, bytes(32), 0),
    ]
    for question in questions:
        with pytest.raises(BackendError):
            await question()
    await backend.aclose()
