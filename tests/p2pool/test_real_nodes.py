"""The pool on real Bitcoin nodes: from transactions in a mempool to a miner who spends what the pool paid."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from bitcoin.core import CBlock

from p2pool.bitcoin_backend import BitcoinBackend
from p2pool.bitcoin_backend.address import encode_address
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import block_subsidy
from p2pool.database import DataDirectory
from p2pool.errors import BackendError
from p2pool.miner import mine
from p2pool.node import Node
from p2pool.stratum.server import open_listeners
from sharechain.hasher import sha256d
from tests.p2pool.network import EASY_SERVER, PARAMS
from tests.p2pool.realnodes import (
    PATIENCE_S,
    FullNode,
    RpcFault,
    over_rpc,
    running_node,
    wait_until,
)
from tests.p2pool.regtest import (
    FUNDED,
    MATURITY,
    P2TR,
    P2WPKH,
    UNUSED,
    EmbeddedNode,
    RegtestNode,
    Wallet,
    build_block,
    extend,
    extend_empty,
    pay,
    premined_wallet,
    take_premined,
)
from tests.p2pool.spending import Spent

pytestmark = pytest.mark.slow

#: Some 16,000 hashes for a share, 20 shares for a block: a moment, and no flood of blocks for a slow node.
POOL = PARAMS.with_overrides({"name": "real", "max_target": hex(2**242 - 1), "block_target_divisor": 20})
IN_THREAD = trio.to_thread.run_sync


def hash_of(raw: bytes) -> bytes:
    return sha256d(raw[:80])


@asynccontextmanager
async def pool_on(backend: BitcoinBackend, path: Path) -> AsyncIterator[Node]:
    """A node of the pool with its Stratum port, as long as the context lasts."""
    directory = DataDirectory(path, POOL)
    try:
        node = Node(directory=directory, params=POOL, backend=backend, stratum=EASY_SERVER)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, open_listeners("127.0.0.1", 0))
            yield node
            nursery.cancel_scope.cancel()
    finally:
        directory.close()


async def mine_until(node: Node, reached: Callable[[], bool]) -> None:
    """Mine over Stratum for a P2WPKH and for a P2TR address of the same key, until something is so."""
    host, port = node.server.addresses[0]
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for script in (P2WPKH, P2TR):
                user = encode_address(script, "regtest")
                await nursery.start(partial(mine, host=host, port=port, user=f"{user}.rig"))
            while not reached():  # noqa: ASYNC110 - the node tells nobody
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def node_and_backend(kind: str, path: Path) -> AsyncIterator[tuple[RegtestNode, BitcoinBackend]]:
    """A Bitcoin node of some kind with the premined chain, and the pool's way to it."""
    if kind == "embedded":
        kernel = KernelBackend.open(path)
        try:
            node = EmbeddedNode(kernel)
            take_premined(node, FUNDED + MATURITY)
            yield node, kernel
        finally:
            await kernel.aclose()
        return
    with running_node(kind, path) as full:
        await IN_THREAD(take_premined, full)
        async with over_rpc(full.endpoint) as backend:
            yield full, backend


@pytest.mark.parametrize("kind", ["embedded", "btcd", "core"])
async def test_a_miner_spends_what_the_pool_paid(tmp_path: Path, kind: str) -> None:
    async with node_and_backend(kind, tmp_path / "bitcoin") as (bitcoin, backend):
        payments = premined_wallet().payments(7)
        for payment in payments:
            bitcoin.send(payment.raw)
        assert bitcoin.mempool() == {payment.txid for payment in payments}
        extend_empty(bitcoin)

        # The pool finds blocks until all of them are mined and both miners are paid in one block.
        def is_all_paid() -> bool:
            paid = {script for _, script in paid_in(bitcoin.block(bitcoin.tip()))}
            return not bitcoin.mempool() and paid == {P2WPKH, P2TR}

        async with pool_on(backend, tmp_path / "pool") as node:
            await mine_until(node, is_all_paid)
        statistics = node.statistics()
        assert not statistics.invalid
        assert all(each.accepted or each.reason == "inconclusive" for each in statistics.blocks)
        # Some may have lost against a sibling, which the pool found at the same time.
        hashes = [bytes.fromhex(each.block_hash)[::-1] for each in statistics.blocks]
        blocks = [bitcoin.block(each) for each in hashes if await backend.is_on_chain(each)]
        mined = {transaction.GetTxid() for raw in blocks for transaction in CBlock.deserialize(raw).vtx}
        assert {payment.txid for payment in payments} <= mined
        heights = {each.block_hash: each.block_height for each in statistics.blocks}
        subsidies = [block_subsidy(heights[hash_of(raw)[::-1].hex()], 150) for raw in blocks]
        values = [output.nValue for raw in blocks for output in CBlock.deserialize(raw).vtx[0].vout]
        assert sum(values) == sum(subsidies) + sum(payment.fee for payment in payments)

        # A hundred blocks later the miners spend what they got.
        earned = [coin for raw in blocks for coin in paid_in(raw)]
        assert {script for _, script in earned} == {P2WPKH, P2TR}
        immature, _ = pay(earned[-1], 1_000)
        with pytest.raises((RpcFault, BackendError), match="matur"):
            bitcoin.send(immature.raw)
        await IN_THREAD(partial(extend, bitcoin, MATURITY, UNUSED))
        spending = [pay(coin, 1_000)[0] for coin in earned]
        for payment in spending:
            bitcoin.send(payment.raw)
        extend_empty(bitcoin)
        (last,) = extend(bitcoin, 1, UNUSED)
        in_last = {transaction.GetTxid() for transaction in CBlock.deserialize(last).vtx}
        assert {payment.txid for payment in spending} <= in_last
        assert not bitcoin.mempool()
        assert (await backend.tip()).block_hash == hash_of(last)


def accepted(node: Node) -> int:
    """How many blocks of the pool Bitcoin has accepted."""
    return sum(block.accepted for block in node.statistics().blocks)


def paid_in(raw: bytes) -> list[tuple[Spent, bytes]]:
    """The outputs of a block's coinbase that pay us."""
    wallet = Wallet()
    wallet.found(raw)
    return wallet.coins


@pytest.mark.parametrize("kind", ["btcd", "core"])
async def test_what_the_pool_finds_reaches_other_nodes_and_their_longer_chain_reaches_the_pool(
    tmp_path: Path, kind: str
) -> None:
    async with node_and_backend(kind, tmp_path / "ours") as (ours, backend):
        assert isinstance(ours, FullNode)
        with running_node(kind, tmp_path / "theirs") as theirs:
            await IN_THREAD(take_premined, theirs)
            ours.connect(theirs)
            raw = build_block(await backend.block_template())
            assert (await backend.submit_block(raw)).accepted
            await IN_THREAD(wait_until, lambda: theirs.tip() == hash_of(raw))
            ours.disconnect(theirs)

            lost = build_block(await backend.block_template())
            assert (await backend.submit_block(lost)).accepted
            longer = extend(theirs, 2)
            assert await backend.is_on_chain(hash_of(lost))
            assert await backend.header_facts(hash_of(longer[-1])) is None
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(IN_THREAD, ours.connect, theirs))
                    assert await backend.wait_for_tip(hash_of(lost)) == hash_of(longer[-1])
            assert not await backend.is_on_chain(hash_of(lost))
            facts = await backend.header_facts(hash_of(longer[-1]))
            assert facts is not None
            assert (await backend.block_template()).height == facts.height + 1


@pytest.mark.parametrize("kind", ["btcd", "core"])
async def test_the_pool_outlives_a_restart_of_its_node(tmp_path: Path, kind: str) -> None:
    async with node_and_backend(kind, tmp_path / "bitcoin") as (bitcoin, backend):
        assert isinstance(bitcoin, FullNode)
        async with pool_on(backend, tmp_path / "pool") as node:
            await mine_until(node, lambda: accepted(node) > 0)
            await IN_THREAD(bitcoin.restart)
            before = accepted(node)
            await mine_until(node, lambda: accepted(node) > before)


@pytest.mark.parametrize("kind", ["btcd", "core"])
async def test_the_pool_goes_on_with_its_second_node_when_the_first_is_killed(tmp_path: Path, kind: str) -> None:
    with running_node(kind, tmp_path / "first") as first, running_node(kind, tmp_path / "second") as second:
        for each in (first, second):
            await IN_THREAD(take_premined, each)
        async with (
            over_rpc(first.endpoint, second.endpoint) as backend,
            pool_on(backend, tmp_path / "pool") as node,
        ):
            await mine_until(node, lambda: accepted(node) > 0)
            await IN_THREAD(wait_until, lambda: first.tip() == second.tip())
            first.kill()
            before = accepted(node)
            await mine_until(node, lambda: accepted(node) > before)
