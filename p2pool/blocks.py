"""Blocks that were found: submitted before anything else, kept on disk until Bitcoin has answered.

Theory of operation. A block is handed over synchronously and submitted by a task. Its share joins the chain when
Bitcoin has answered, or a moment later if it has not; a block without an answer is then also written to the data
directory. A Bitcoin node that does not answer is asked again for as long as this node runs, and once more at each
start. A stop waits a few seconds for answers; what has none by then is on disk.
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
from p2pool.outage import Outage
from sharechain.errors import SharechainError

__all__ = ["NO_PARENT", "STALE_BLOCK", "BlockSubmitter", "FoundBlock"]

logger = logging.getLogger("p2pool.node")

#: Seconds before a backend that failed is asked again; doubles from the first to the second. A block that is late by
#: the second number is worth 0.3 % less.
RETRY_S: Final = (0.5, 2.0)
#: Seconds that a block's share waits for Bitcoin's answer: nothing of ours competes with the submission meanwhile.
GRACE_S: Final = 0.02
#: Seconds that a stop waits for answers.
STOP_S: Final = 4.0
#: Bitcoin Core's word for a block that it stored beside its chain without looking into it.
STALE_BLOCK: Final = "inconclusive"
#: Bitcoin Core's word for a block whose parent it does not have. One of ours had it when it was found: after a crash
#: Bitcoin Core begins some blocks back. Until its chain is so many blocks past ours, it may come again.
NO_PARENT: Final = "prev-blk-not-found"
PAST_BLOCKS: Final = 6


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

    Mutable fields: ``_found`` (hashes handed over), ``_others`` (those of other nodes' blocks), the channel between
    ``submit`` and ``run``, ``_stopped`` and the scopes of the submissions that are under way.
    """

    def __init__(
        self,
        *,
        backend: BitcoinBackend,
        directory: DataDirectory,
        on_answer: Callable[[bytes, SubmitResult, FoundBlock | None], None],
    ) -> None:
        """Nothing is submitted before ``run``.

        Args:
            backend: the Bitcoin node.
            directory: where blocks are kept until they are answered.
            on_answer: told what Bitcoin said: the block's hash, the answer, and the block if this run submitted it.
        """
        self._backend = backend
        self._directory = directory
        self._on_answer = on_answer
        self._found: set[bytes] = set()
        self._others: set[bytes] = set()
        self._in, self._out = trio.open_memory_channel[tuple[FoundBlock, Callable[[], None]]](math.inf)
        self._stopped = trio.Event()
        self._scopes: set[trio.CancelScope] = set()

    def __contains__(self, block_hash: bytes) -> bool:
        """Whether a block was handed over before."""
        return block_hash in self._found

    def submit(self, block: FoundBlock, then: Callable[[], None], *, is_ours: bool = True) -> None:
        """Hand over a block; one that was handed over before is ignored.

        Args:
            block: the block.
            then: called after the submission: puts the block's share into the chain.
            is_ours: found here, so that it is kept on disk until it is answered. Others keep theirs.
        """
        if block.block_hash not in self._found:
            self._found.add(block.block_hash)
            if not is_ours:
                self._others.add(block.block_hash)
            self._in.send_nowait((block, then))

    async def run(self, unsettled: Sequence[bytes], *, task_status: trio.TaskStatus[None]) -> None:
        """Submit what is handed over until cancelled; first what earlier runs left unanswered.

        Args:
            unsettled: hashes of stored shares that are blocks, with no answer on record.
            task_status: started when the unsettled have been asked for once.
        """
        async with trio.open_nursery() as nursery:
            try:
                kept = self._read_kept()
                for block in kept:
                    logger.info("block %s was not answered before the last stop: submitted again", _shown(block))
                    self._found.add(block.block_hash)
                    nursery.start_soon(self._submit, block, _nothing)
                known = {block.block_hash for block in kept}
                await nursery.start(self._settle, [block_hash for block_hash in unsettled if block_hash not in known])
                task_status.started()
                async for block, then in self._out:
                    nursery.start_soon(self._submit, block, then)
            finally:
                self._stopped.set()
                for scope in self._scopes:
                    scope.deadline = trio.current_time() + STOP_S
                while True:  # what was handed over in the instant of the stop
                    try:
                        block, then = self._out.receive_nowait()
                    except trio.WouldBlock:
                        break
                    nursery.start_soon(self._submit, block, then)

    def _read_kept(self) -> list[FoundBlock]:
        blocks = []
        for file, raw in self._directory.kept_blocks():
            try:
                blocks.append(_decode(raw))
            except (cbor2.CBORError, ValueError, TypeError) as error:
                logger.error("%s is no block (%s): set aside", file, error)
                self._directory.set_aside(file)
        return blocks

    async def _submit(self, block: FoundBlock, then: Callable[[], None]) -> None:
        failure: SharechainError | None = None
        with trio.CancelScope(shield=True) as scope:
            if self._stopped.is_set():
                scope.deadline = trio.current_time() + STOP_S
            self._scopes.add(scope)
            try:
                async with trio.open_nursery() as nursery:
                    answered = trio.Event()
                    nursery.start_soon(self._submit_until_answered, block, answered)
                    with trio.move_on_after(GRACE_S):
                        await answered.wait()
                    if not answered.is_set():
                        self._keep(block)
                    try:
                        then()
                    except SharechainError as error:  # such as a full disk: must not end the submission
                        failure = error
            finally:
                self._scopes.discard(scope)
        if failure is not None:
            raise failure

    def _keep(self, block: FoundBlock) -> None:
        if block.block_hash in self._others:
            return
        try:
            self._directory.keep_block(block.block_hash, block.encode())
        except OSError as error:
            logger.error("block %s cannot be kept on disk: %s", _shown(block), error)

    async def _submit_until_answered(self, block: FoundBlock, answered: trio.Event) -> None:
        retry_s, outage = RETRY_S[0], Outage()
        while True:
            try:
                result = await self._backend.submit_block(block.raw)
                if result.reason == "duplicate":  # an earlier try got through, its answer did not
                    result = await self._fate(block.block_hash)
                if result.reason == NO_PARENT and await self._may_get_parent(block):
                    raise BackendError("the Bitcoin node does not have the block before it (any more)")
                break
            except BackendError as error:
                if (text := outage.failed(str(error), trio.current_time())) is not None:
                    logger.error("block %s: no answer, submitted again until there is one: %s", _shown(block), text)
            if self._stopped.is_set():
                self._keep(block)
                return
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
        answered.set()
        self._on_answer(block.block_hash, result, block)
        self._directory.drop_block(block.block_hash)

    async def _may_get_parent(self, block: FoundBlock) -> bool:
        """Whether the parent of a block of ours may come again. Raises: BackendError."""
        is_ours = block.block_hash not in self._others
        return is_ours and (await self._backend.tip()).height < block.block_height + PAST_BLOCKS

    async def _fate(self, block_hash: bytes) -> SubmitResult:
        """What became of a block that was submitted before. Raises: BackendError."""
        if await self._backend.is_on_chain(block_hash):
            return SubmitResult(accepted=True)
        if await self._backend.header_facts(block_hash) is not None:
            return SubmitResult(accepted=False, reason=STALE_BLOCK)
        return SubmitResult(accepted=False, reason="unknown to the Bitcoin node")

    async def _settle(
        self, unsettled: Sequence[bytes], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Find out what became of blocks whose answer no run has recorded."""
        waiting, retry_s, outage = list(unsettled), RETRY_S[0], Outage()
        while True:
            for block_hash in waiting[:]:
                try:
                    result = await self._fate(block_hash)
                except BackendError as error:
                    if (text := outage.failed(str(error), trio.current_time())) is not None:
                        logger.error("block %s: its fate is not known yet: %s", block_hash[::-1].hex(), text)
                    continue
                waiting.remove(block_hash)
                self._on_answer(block_hash, result, None)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            if not waiting:
                return
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S[1])


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
