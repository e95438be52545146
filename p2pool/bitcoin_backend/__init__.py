"""What the pool needs of a Bitcoin node, and nothing else.

Two backends implement it: Bitcoin Core over JSON-RPC, and Bitcoin Core's consensus code embedded in this
process. The rest of the node never asks which. Importing this package loads neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from p2pool.bitcoin_backend.template import BlockTemplate, HeaderFacts, SubmitResult, TemplateTransaction

__all__ = [
    "BitcoinBackend",
    "BlockReader",
    "BlockSource",
    "BlockTemplate",
    "HeaderFacts",
    "HeaderSource",
    "SubmitResult",
    "TemplateTransaction",
]


class BitcoinBackend(Protocol):
    """A Bitcoin node: it gives templates and facts about headers, takes blocks, tells when its chain grows.

    Every method may raise `BackendError`: the node cannot be reached, is closed or does not make sense. That
    a block or a header is bad or unknown is no error but an answer.
    """

    @property
    def network(self) -> str:
        """The Bitcoin network that the node is on: mainnet, testnet4, signet or regtest."""

    async def block_template(self) -> BlockTemplate:
        """Give a block to mine on the current tip, with the best-paying transactions that the node knows."""

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        """Give what the node knows of a header, on whatever branch, or None if it does not know it (yet).

        Arguments:
            block_hash: 32 bytes, internal order.
        """

    async def is_on_chain(self, block_hash: bytes) -> bool:
        """Whether a block is part of the node's best chain.

        Arguments:
            block_hash: 32 bytes, internal order.
        """

    async def submit_block(self, raw: bytes) -> SubmitResult:
        """Hand a block to the node and wait for its verdict.

        Arguments:
            raw: the whole block as the network takes it (see `assemble_block`). Bytes that are no block give
                the reason "decode-failed".
        """

    async def tip(self) -> HeaderFacts:
        """Give the block in which the node's best chain ends."""

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Wait until the node's best chain ends in another block than `known`, at once if it does already.

        A lower tip counts as well: what matters is that work on `known` is stale.

        Arguments:
            known: the hash of the tip that the caller builds on, 32 bytes, internal order.
            timeout: give up after so many seconds, or never.

        Returns: the hash of the tip, 32 bytes, internal order; `known` itself after the timeout.
        """

    async def aclose(self) -> None:
        """Let go of the node: end connections, write what is due; who waits gets a `BackendError`."""


class BlockReader(Protocol):
    """Reads blocks of the past: what an audit needs of a Bitcoin node. Both methods may raise `BackendError`."""

    async def block(self, block_hash: bytes) -> bytes | None:
        """Give a whole block, on whatever branch, or None if it is not known (or was pruned away)."""

    async def block_hash_at(self, height: int) -> bytes | None:
        """Give the hash (internal order) of the best chain's block at a height, or None if it is not that high."""


@runtime_checkable
class HeaderSource(Protocol):
    """A backend that takes single headers of other nodes.

    A share may build on a Bitcoin block that lost its race so early that our Bitcoin node never heard of it. Such a
    header has its own proof: what Bitcoin demands of it can be computed from its parent. So nodes of the pool ask
    each other for it. Both methods may raise `BackendError`.
    """

    async def header(self, block_hash: bytes) -> bytes | None:
        """Give a header that is known, on whatever branch, 80 bytes, or None."""

    async def learn_header(self, raw: bytes) -> bool:
        """Take a header of 80 bytes whose parent is known; `header_facts` knows it from then on.

        Returns: False if its parent is not known, or if it does not have the work, the target and the time that
            Bitcoin demands after its parent.
        """


@runtime_checkable
class BlockSource(Protocol):
    """A backend without a Bitcoin network of its own: its blocks go from node to node of the pool.

    One side says where its chain is (`block_locator`), the other gives what comes after (`blocks_after`), the first
    submits it, until nothing comes. Blocks of a branch are "inconclusive" until the branch has more work than the
    chain, and the locator stays as it was. So whoever asks for more puts the hash of the last block that it was given
    before its locator, or a long branch would begin anew with each answer.

    Both methods may raise `BackendError`. They cost next to nothing where both sides have the same tip.
    """

    async def block_locator(self) -> tuple[bytes, ...]:
        """Give hashes of the best chain (internal order): the newest ten, then ever further apart, genesis last."""

    async def block(self, block_hash: bytes) -> bytes | None:
        """Give a whole block, on whatever branch, or None if it is not known."""

    async def blocks_after(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...]:
        """Give whole blocks of the best chain, lowest first; none if it ends where the locator says.

        Arguments:
            locator: the blocks come after its first hash that is on the best chain, or after genesis if none is.
            max_bytes: as many blocks as fit, at least one, at most 1,000.
        """
