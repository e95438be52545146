"""Bitcoin blocks between this node's backend and the other nodes: the network's desk for everything about blocks.

Theory of operation. A block that a peer announces is completed by ``BlockRelay``, submitted by ``BlockSubmitter`` like
one of our own, and announced to the other peers unless Bitcoin refuses it. A backend without a network of its own (the
embedded one) also gets whole stretches of the chain from peers, one with its own network headers of blocks that lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from p2pool.bitcoin_backend import (
    BitcoinBackend,
    BlockSource,
    BlockTemplate,
    HeaderFacts,
    HeaderSource,
    SubmitResult,
)
from p2pool.blocks import NO_PARENT, STALE_BLOCK, BlockSubmitter, FoundBlock
from p2pool.errors import BackendError
from p2pool.outage import Outage
from p2pool.p2p.network import Network
from p2pool.p2p.wire import Announce, Transactions, Wanted
from p2pool.relay import BlockRelay, CompletedBlock
from sharechain.hasher import sha256d

__all__ = ["BlockExchange"]

logger = logging.getLogger("p2pool.node")

#: Blocks that our Bitcoin may be behind that of most connected nodes, and for how many seconds.
BEHIND_BLOCKS: Final = 2
BEHIND_S: Final = 120.0


class BlockExchange:
    """See ``p2pool.p2p.network.BlockDesk``.

    Mutable fields: ``network`` (set once, None for a node that is alone), ``_relay``, ``_tip_facts`` (of the block that
    the newest template builds on) and ``_relayed`` (blocks of other nodes that Bitcoin has not answered yet, None once
    they were passed on, and who brought them); ``_behind`` and ``_behind_since``: that our Bitcoin is behind theirs;
    ``_header_lookups``: one at a time.
    """

    def __init__(self, *, backend: BitcoinBackend, submitter: BlockSubmitter, on_news: Callable[[], None]) -> None:
        """
        Args:
            backend: the Bitcoin node.
            submitter: of blocks to it.
            on_news: told when the backend may know blocks that it did not know before.
        """
        self.network: Network | None = None
        self._backend = backend
        self._submitter = submitter
        self._on_news = on_news
        self._relay = BlockRelay()
        self._tip_facts: HeaderFacts | None = None
        self._relayed: dict[bytes, tuple[FoundBlock | None, str]] = {}
        self._header_lookups = trio.CapacityLimiter(1)
        self._behind, self._behind_since = Outage(), math.inf

    def learn(self, template: BlockTemplate, facts: HeaderFacts | None) -> None:
        """The newest template, and what is known of the block that it builds on."""
        self._relay.learn(template)
        self._tip_facts = facts

    def compare(self, height: int, others: Sequence[int], now: float) -> None:
        """Tell the operator if our Bitcoin stays behind that of most nodes that we are connected to.

        Args:
            height: of our Bitcoin's chain, below 0 if that is not known yet.
            others: of theirs, as they say.
            now: seconds, of any clock that only moves forward.
        """
        most = sorted(others)[(len(others) - 1) // 2] if others and height >= 0 else height
        if most < height + BEHIND_BLOCKS:
            self._behind_since = math.inf
            if (text := self._behind.ended(now)) is not None:
                logger.info("our Bitcoin node has caught up with those of other nodes, %s", text)
            return
        self._behind_since = min(self._behind_since, now)
        if now - self._behind_since >= BEHIND_S:
            text = self._behind.failed("our Bitcoin node is behind those of other nodes", now)
            if text is not None:
                logger.warning(
                    "%s: at block %d, most of theirs are at %d or further: is it connected, does it still work?",
                    text,
                    height,
                    most,
                )

    def found(self, block_hash: bytes, raw: bytes) -> None:
        """A block of our own was handed to Bitcoin: tell everybody."""
        if self.network is not None:
            self.network.blocks.found(block_hash, self._relay.announcement(raw))

    def answered(self, block_hash: bytes, result: SubmitResult) -> bool:
        """What Bitcoin said of a block. Returns whether the block was another node's."""
        if block_hash not in self._relayed:
            return False
        if result.accepted or result.reason == STALE_BLOCK:
            self._pass_on(block_hash)
            self._on_news()
        elif result.reason == NO_PARENT and self.network is not None:
            self.network.blocks.lacks_blocks_of(self._relayed[block_hash][1])
        del self._relayed[block_hash]
        return True

    def announced(self, peer_id: str, announce: Announce) -> Wanted:
        """A peer announces a block. Raises: PeerError."""
        facts = self._tip_facts
        if facts is not None and facts.block_hash != announce.header[4:36]:
            facts = None
        return self._answer(peer_id, self._relay.announced(peer_id, announce, trio.current_time(), facts))

    def filled(self, peer_id: str, transactions: Transactions) -> Wanted:
        """A peer sends what was lacking of a block. Raises: PeerError."""
        return self._answer(peer_id, self._relay.filled(peer_id, transactions, trio.current_time()))

    def lacking(self, block_hash: bytes, positions: Sequence[int]) -> Iterable[Transactions]:
        """What a peer lacks of a block that we announced. Raises: PeerError."""
        return self._relay.transactions(block_hash, positions)

    async def knows(self, block_hash: bytes) -> bool:
        """Whether the backend has a block."""
        try:
            return await self._backend.header_facts(block_hash) is not None
        except BackendError:
            return True  # nobody can be helped now

    async def locator(self) -> tuple[bytes, ...] | None:
        """Of the backend's chain; None if it follows Bitcoin by itself. Raises: BackendError."""
        return await self._backend.block_locator() if isinstance(self._backend, BlockSource) else None

    async def after(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...] | None:
        """Blocks of the backend's chain; None if it follows Bitcoin by itself. Raises: BackendError."""
        if not isinstance(self._backend, BlockSource):
            return None
        return await self._backend.blocks_after(locator, max_bytes)

    async def give(self, block_hashes: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...] | None:
        """Blocks that the backend has, on any branch; None if it follows Bitcoin by itself. Raises: BackendError."""
        if not isinstance(self._backend, BlockSource):
            return None
        found: list[bytes] = []
        for block_hash in block_hashes:
            raw = await self._backend.block(block_hash)
            if raw is not None and (not found or sum(map(len, found)) + len(raw) <= max_bytes):
                found.append(raw)
        return tuple(found)

    async def take(self, blocks: Sequence[bytes]) -> int:
        """Hand blocks to the backend; how many it knows now, from the first on. Raises: BackendError."""
        for number, raw in enumerate(blocks):
            result = await self._backend.submit_block(raw)
            if not result.accepted and result.reason not in ("duplicate", STALE_BLOCK):
                logger.debug("Bitcoin refuses a block of a peer: %s", result.reason)
                return number
        self._on_news()
        return len(blocks)

    async def headers(self, block_hashes: Sequence[bytes]) -> tuple[bytes | None, ...] | None:
        """Headers that the backend knows, None for others; None alone if it takes none. Raises: BackendError."""
        if not isinstance(self._backend, HeaderSource):
            return None
        found = []
        async with self._header_lookups:  # one at a time: blocks and templates must not stand in line behind them
            for block_hash in block_hashes:
                found.append(await self._backend.header(block_hash))
        return tuple(found)

    async def learn_headers(self, headers: Sequence[bytes]) -> tuple[bytes, ...]:
        """Hand headers to the backend, parents first. Returns those that it cannot but refuse. Raises: BackendError."""
        assert isinstance(self._backend, HeaderSource), "who takes no headers asks for none"
        refused: list[bytes] = []
        for header in headers:
            if await self._backend.header_facts(sha256d(header)) is not None:
                continue  # another peer gave it, or our Bitcoin has caught up
            if await self._backend.learn_header(header):
                continue
            if await self._backend.header_facts(header[4:36]) is not None:
                refused.append(header)  # else it cannot be judged: our Bitcoin may be behind
        self._on_news()
        return tuple(refused)

    def _answer(self, peer_id: str, answer: Wanted | CompletedBlock) -> Wanted:
        if isinstance(answer, Wanted):
            return answer
        if answer.block_hash in self._submitter:
            return Wanted(positions=())
        block = FoundBlock(
            block_hash=answer.block_hash,
            block_height=answer.block_height,
            value=answer.value,
            payouts=answer.payouts,
            transactions=answer.transactions,
            raw=answer.raw,
        )
        self._relayed[block.block_hash] = (block, peer_id)
        # A Bitcoin node that takes its time does not hold up what was paid for with work.
        self._submitter.submit(block, lambda: self._pass_on(block.block_hash), is_ours=False)
        return Wanted(positions=())

    def _pass_on(self, block_hash: bytes) -> None:
        """Announce another node's block, once, unless Bitcoin has refused it."""
        block, bearer = self._relayed.get(block_hash, (None, ""))
        if block is not None and self.network is not None:
            self._relayed[block_hash] = (None, bearer)
            self.network.blocks.found(block_hash, self._relay.announcement(block.raw), bearer=bearer)
