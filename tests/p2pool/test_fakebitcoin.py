"""The Bitcoin of the simulated networks keeps the contract that the embedded kernel keeps: each test runs on both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from p2pool.bitcoin_backend import BitcoinBackend, BlockSource, BlockTemplate, SubmitResult
from p2pool.bitcoin_backend.kernel import KernelBackend
from sharechain.difficulty import bits_to_target
from sharechain.hasher import sha256d
from tests.p2pool.fakebitcoin import FakeBitcoin
from tests.p2pool.network import ANYBODY_SCRIPT, START, pay, solved_block

Open = Callable[[str], KernelBackend | FakeBitcoin]


@pytest.fixture(params=["kernel", "fake"])
async def open_backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens empty Bitcoins of one kind."""
    opened: list[KernelBackend | FakeBitcoin] = []

    def open_one(name: str) -> KernelBackend | FakeBitcoin:
        kernel = request.param == "kernel"
        opened.append(KernelBackend.open(tmp_path / name, clock=_clock) if kernel else FakeBitcoin(_clock))
        return opened[-1]

    yield open_one
    for backend in opened:
        await backend.aclose()


def _clock() -> float:
    return START


async def mined(backend: BitcoinBackend, script: bytes = ANYBODY_SCRIPT) -> bytes:
    """A block on the tip, as it goes over the wire."""
    template = await backend.block_template()
    return solved_block(template, pay(template, script))


async def extend(backend: BitcoinBackend, count: int, script: bytes = ANYBODY_SCRIPT) -> list[bytes]:
    """Blocks on the tip, accepted."""
    blocks = []
    for _ in range(count):
        blocks.append(await mined(backend, script))
        assert await backend.submit_block(blocks[-1]) == SubmitResult(accepted=True)
    return blocks


def shape(template: BlockTemplate) -> tuple[object, ...]:
    """What two Bitcoins on chains of their own must still agree on."""
    return template.version, template.height, template.bits, template.coinbase_value, template.merkle_branch


async def test_both_are_backends_that_can_give_blocks_and_are_on_regtest(open_backend: Open) -> None:
    backend = open_backend("one")
    assert isinstance(backend, BlockSource)
    assert backend.network == "regtest"


async def test_the_fake_gives_the_templates_of_the_kernel(tmp_path: Path) -> None:
    kernel, fake = KernelBackend.open(tmp_path, clock=_clock), FakeBitcoin(_clock)
    try:
        for _ in range(12):
            ours, theirs = await fake.block_template(), await kernel.block_template()
            assert shape(ours) == shape(theirs)
            assert (ours.min_time, ours.time) == (theirs.min_time, theirs.time)
            for backend in (kernel, fake):
                await extend(backend, 1)
            ours_facts, theirs_facts = await fake.tip(), await kernel.tip()
            assert ours_facts.height == theirs_facts.height
            assert (ours_facts.next_bits, ours_facts.median_time) == (theirs_facts.next_bits, theirs_facts.median_time)
    finally:
        await kernel.aclose()


async def test_a_block_on_the_tip_is_accepted_once_and_becomes_the_tip(open_backend: Open) -> None:
    backend = open_backend("one")
    template, raw = await backend.block_template(), await mined(backend)
    assert await backend.submit_block(raw) == SubmitResult(accepted=True)
    tip = await backend.tip()
    assert tip.height == template.height == 1
    assert await backend.header_facts(tip.block_hash) == tip
    assert await backend.is_on_chain(tip.block_hash)
    assert (await backend.block_template()).previous_block_hash == tip.block_hash
    assert (await backend.submit_block(raw)).reason == "duplicate"


async def test_what_is_unknown_is_answered_so(open_backend: Open) -> None:
    backend = open_backend("one")
    assert await backend.header_facts(bytes(31) + b"\x01") is None
    assert not await backend.is_on_chain(bytes(31) + b"\x01")


async def test_bad_blocks_are_refused_with_the_same_words(open_backend: Open) -> None:
    backend, other = open_backend("one"), open_backend("two")
    far = (await extend(other, 2))[1]
    assert (await backend.submit_block(far)).reason == "prev-blk-not-found"
    assert (await backend.submit_block(b"no block")).reason == "decode-failed"
    raw, nonce = await mined(backend), 0
    while int.from_bytes(sha256d(raw[:80]), "little") <= bits_to_target(0x207FFFFF):
        raw, nonce = raw[:76] + nonce.to_bytes(4, "little") + raw[80:], nonce + 1
    assert (await backend.submit_block(raw)).reason == "high-hash"


async def test_a_branch_is_inconclusive_until_it_is_longer(open_backend: Open) -> None:
    backend, other = open_backend("one"), open_backend("two")
    mine = await extend(backend, 1)
    first, second = await extend(other, 2, b"\x51\x20" + bytes(32))
    assert (await backend.submit_block(first)).reason == "inconclusive"
    assert (await backend.submit_block(first)).reason == "duplicate"
    before = await backend.tip()
    assert before.height == 1
    assert await backend.submit_block(second) == SubmitResult(accepted=True)
    assert (await backend.tip()).height == 2
    assert not await backend.is_on_chain(before.block_hash)
    assert await backend.header_facts(before.block_hash) == before
    assert mine != [first]


async def test_an_empty_chain_catches_up_by_locator(open_backend: Open) -> None:
    source, empty = open_backend("one"), open_backend("two")
    await extend(source, 40)
    rounds = 0
    while blocks := await source.blocks_after(await empty.block_locator(), 2_000):
        rounds += 1
        for raw in blocks:
            assert (await empty.submit_block(raw)).accepted
    assert rounds > 1
    assert await empty.tip() == await source.tip()
    assert await empty.blocks_after(await source.block_locator(), 2_000) == ()


async def test_one_block_is_given_however_little_fits(open_backend: Open) -> None:
    backend = open_backend("one")
    genesis = await backend.block_locator()
    blocks = await extend(backend, 3)
    assert await backend.blocks_after(genesis, 1) == (blocks[0],)
    assert await backend.blocks_after(genesis, 1_000_000) == tuple(blocks)


async def test_locators_have_the_same_shape(tmp_path: Path) -> None:
    kernel, fake = KernelBackend.open(tmp_path, clock=_clock), FakeBitcoin(_clock)
    try:
        for _ in range(45):
            await extend(kernel, 1)
            await extend(fake, 1)
            assert len(await kernel.block_locator()) == len(await fake.block_locator())
    finally:
        await kernel.aclose()


async def test_whoever_waits_for_a_tip_learns_of_it(open_backend: Open) -> None:
    backend = open_backend("one")
    known = (await backend.tip()).block_hash
    assert await backend.wait_for_tip(known, 0.01) == known
    heard: list[bytes] = []

    async def wait() -> None:
        heard.append(await backend.wait_for_tip(known))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await extend(backend, 1)
    assert heard == [(await backend.tip()).block_hash]
    assert await backend.wait_for_tip(known) == heard[0]


async def test_a_copy_goes_its_own_way() -> None:
    one = FakeBitcoin(_clock)
    await extend(one, 2)
    other = one.copy()
    assert await other.tip() == await one.tip()
    await extend(one, 1)
    assert (await other.tip()).height == 2
