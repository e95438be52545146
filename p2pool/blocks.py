"""Blocks that were found: submitted before anything else, kept on disk until Bitcoin has answered.

Theory of operation. A block is handed over synchronously and submitted by a task. As soon as the submission is
under way the block is written to the data directory, and only then does its share join the chain. A Bitcoin node
that does not answer is asked again for as long as this node runs, and once more at each start. A stop waits a few
seconds for answers; what has none by then is on disk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cbor2
import trio

from p2pool.bitcoin_backend import BitcoinBackend, SubmitResult
from p2pool.database import DataDirectory
from p2pool.errors import BackendError

__all__ = ["STALE_BLOCK", "BlockSubmitter", "FoundBlock"]

logger = logging.getLogger("p2pool.node")

#: Seconds before a backend that failed is asked again; doubles from the first to the second.
RETRY_S: Final = (0.5, 30.0)
#: Seconds that a stop waits for answers.
STOP_S: Final = 10.0
#: Bitcoin Core's word for a block that it stored beside its chain without looking into it.
STALE_BLOCK: Final = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBlock:
    """A block that was found, as the network takes it, and what a person would want to know of it."""

    #: 32 bytes, internal order.
    block_hash: bytes
    block_height: int
    #: Sat.
    value: int
    #: Window payouts in its coinbase.
    payouts: int
    #: Transactions besides the coinbase.
    transactions: int
    raw: bytes

    def encode(self) -> bytes:
        """For the disk."""
        return cbor2.dumps([self.block_hash, self.block_height, self.value, self.payouts, self.transactions, self.raw])


class BlockSubmitter:
    """Submits blocks to one backend.

    Mutable fields: ``_found`` (hashes handed over), the channel between ``submit`` and ``run``, ``_stopped`` and the
    scopes of the submissions that are under way.
    """

    def __init__(
        self,
        *,
        backend: BitcoinBackend,
        directory: DataDirectory,
        on_answer: Callable[[FoundBlock, SubmitResult], None],
    ) -> None:
        """Nothing is submitted before ``run``.

        Args:
            backend: the Bitcoin node.
            directory: where blocks are kept until they are answered.
            on_answer: told what Bitcoin said, once for each block.
        """
        self._backend = backend
        self._directory = directory
        self._on_answer = on_answer
        self._found: set[bytes] = set()
        self._in, self._out = trio.open_memory_channel[tuple[FoundBlock, Callable[[], None]]](math.inf)
        self._stopped = trio.Event()
        self._scopes: set[trio.CancelScope] = set()

    def submit(self, block: FoundBlock, then: Callable[[], None]) -> None:
        """Hand over a block; one that was handed over before is ignored.

        Args:
            block: the block.
            then: called when the submission is under way and the block is on disk: puts its share into the chain.
        """
        if block.block_hash not in self._found:
            self._found.add(block.block_hash)
            self._in.send_nowait((block, then))

    async def run(self, unsettled: Sequence[bytes], *, task_status: trio.TaskStatus[None]) -> None:
        """Submit what is handed over until cancelled; first what earlier runs left unanswered.

        Args:
            unsettled: hashes of stored shares that are blocks, with no answer on record.
            task_status: started when the unsettled have been asked for once.
        """
        async with trio.open_nursery() as nursery:
            kept = [_decode(raw) for raw in self._directory.kept_blocks()]
            for block in kept:
                logger.info(
                    "block %s was not answered before the last stop: submitted again", block.block_hash[::-1].hex()
                )
                self._found.add(block.block_hash)
                nursery.start_soon(self._submit, block, _nothing)
            known = {block.block_hash for block in kept}
            await nursery.start(self._settle, [block_hash for block_hash in unsettled if block_hash not in known])
            task_status.started()
            try:
                async for block, then in self._out:
                    nursery.start_soon(self._submit, block, then)
            except trio.Cancelled:
                self._stopped.set()
                for scope in self._scopes:
                    scope.deadline = trio.current_time() + STOP_S
                while True:  # what was handed over in the instant of the stop
                    try:
                        block, then = self._out.receive_nowait()
                    except trio.WouldBlock:
                        break
                    nursery.start_soon(self._submit, block, then)
                raise

    async def _submit(self, block: FoundBlock, then: Callable[[], None]) -> None:
        with trio.CancelScope(shield=True) as scope:
            if self._stopped.is_set():
                scope.deadline = trio.current_time() + STOP_S
            self._scopes.add(scope)
            try:
                async with trio.open_nursery() as nursery:
                    # Returns as soon as the submission is under way in its thread or on its socket.
                    await nursery.start(self._submit_until_answered, block)
                    self._directory.keep_block(block.block_hash, block.encode())
                    then()
            finally:
                self._scopes.discard(scope)

    async def _submit_until_answered(
        self, block: FoundBlock, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        task_status.started()
        retry_s = RETRY_S[0]
        while True:
            try:
                result = await self._backend.submit_block(block.raw)
                if result.reason == "duplicate" and await self._backend.is_on_chain(block.block_hash):
                    result = SubmitResult(accepted=True)  # an earlier try got through, its answer did not
                break
            except BackendError as error:
                logger.error("block %s: no answer, asked again in %.1f s: %s", _shown(block), retry_s, error)
            if self._stopped.is_set():
                return  # it is on disk
            with trio.move_on_after(retry_s):
                await self._stopped.wait()
            retry_s = min(2 * retry_s, RETRY_S[1])
        if result.accepted:
            level, said = logging.INFO, "accepted by Bitcoin"
        elif result.reason == STALE_BLOCK:
            level, said = logging.WARNING, "stale: Bitcoin's chain already ends in another block of that height"
        else:
            level, said = logging.ERROR, f"refused by Bitcoin: {result.reason}"
        logger.log(level, "block %s at height %d: %s", _shown(block), block.block_height, said)
        await trio.lowlevel.checkpoint()  # the share has joined the chain: see _submit
        self._on_answer(block, result)
        self._directory.drop_block(block.block_hash)

    async def _settle(
        self, unsettled: Sequence[bytes], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Find out what became of blocks whose answer no run has recorded."""
        waiting, retry_s = list(unsettled), RETRY_S[0]
        while True:
            for block_hash in waiting[:]:
                try:
                    if await self._backend.is_on_chain(block_hash):
                        result = SubmitResult(accepted=True)
                    elif await self._backend.header_facts(block_hash) is not None:
                        result = SubmitResult(accepted=False, reason=STALE_BLOCK)
                    else:
                        result = SubmitResult(accepted=False, reason="unknown to the Bitcoin node")
                except BackendError as error:
                    logger.error("block %s: its fate is not known yet: %s", block_hash[::-1].hex(), error)
                    continue
                waiting.remove(block_hash)
                self._on_answer(_remembered(block_hash), result)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            if not waiting:
                return
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S[1])


def _remembered(block_hash: bytes) -> FoundBlock:
    return FoundBlock(block_hash=block_hash, block_height=0, value=0, payouts=0, transactions=0, raw=b"")


def _decode(raw: bytes) -> FoundBlock:
    block_hash, height, value, payouts, transactions, block = cbor2.loads(raw)
    return FoundBlock(
        block_hash=block_hash,
        block_height=height,
        value=value,
        payouts=payouts,
        transactions=transactions,
        raw=block,
    )


def _nothing() -> None:
    pass


def _shown(block: FoundBlock) -> str:
    return block.block_hash[::-1].hex()
