"""A Bitcoin of regtest rules in memory, without threads: what whole nodes run on under virtual time.

It knows headers, heights and which chain is longest, and believes the rest. ``tests/p2pool/test_fakebitcoin.py`` holds
it to what the embedded kernel says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from p2pool.bitcoin_backend import BlockTemplate, HeaderFacts, SubmitResult
from p2pool.bitcoin_backend.template import build_template
from sharechain.difficulty import bits_to_target
from sharechain.hasher import sha256d

BITS = 0x207FFFFF
GENESIS_TIME = 1_296_688_602
HALVING_INTERVAL = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    hash: bytes
    parent: bytes
    height: int
    time: int
    raw: bytes


class FakeBitcoin:
    """One node's Bitcoin: ``BitcoinBackend`` and ``BlockSource``.

    Mutable fields: ``_blocks`` by hash, ``_tip`` and the event of its next change.
    """

    network = "regtest"
    #: Hash of the lowest block.
    GENESIS = bytes([7]) * 32

    def __init__(self, clock: Callable[[], float]) -> None:
        genesis = _Block(hash=self.GENESIS, parent=bytes(32), height=0, time=GENESIS_TIME, raw=bytes(81))
        self._clock = clock
        self._blocks = {genesis.hash: genesis}
        self._tip = genesis
        self._moved = trio.Event()

    def copy(self) -> FakeBitcoin:
        """Another with the same blocks: what a machine finds on its disk after a crash."""
        other = FakeBitcoin(self._clock)
        other._blocks, other._tip = dict(self._blocks), self._tip
        return other

    async def block_template(self) -> BlockTemplate:
        await trio.lowlevel.checkpoint()
        height, median = self._tip.height + 1, self._median_time(self._tip)
        return build_template(
            version=0x20000000,
            previous_block_hash=self._tip.hash,
            height=height,
            bits=BITS,
            min_time=median + 1,
            time=max(median + 1, int(self._clock())),
            coinbase_value=50 * 100_000_000 >> (height // HALVING_INTERVAL),
            transactions=(),
        )

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        await trio.lowlevel.checkpoint()
        block = self._blocks.get(block_hash)
        return None if block is None else self._facts(block)

    async def is_on_chain(self, block_hash: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        return any(block.hash == block_hash for block in self._chain())

    async def submit_block(self, raw: bytes) -> SubmitResult:
        await trio.lowlevel.checkpoint()
        if len(raw) <= 80:
            return SubmitResult(accepted=False, reason="decode-failed")
        block_hash, parent = sha256d(raw[:80]), self._blocks.get(raw[4:36])
        if block_hash in self._blocks:
            return SubmitResult(accepted=False, reason="duplicate")
        if int.from_bytes(block_hash, "little") > bits_to_target(BITS):
            return SubmitResult(accepted=False, reason="high-hash")
        if parent is None:
            return SubmitResult(accepted=False, reason="prev-blk-not-found")
        time = int.from_bytes(raw[68:72], "little")
        block = _Block(hash=block_hash, parent=parent.hash, height=parent.height + 1, time=time, raw=raw)
        self._blocks[block_hash] = block
        if block.height <= self._tip.height:
            return SubmitResult(accepted=False, reason="inconclusive")
        self._tip = block
        self._moved.set()
        self._moved = trio.Event()
        return SubmitResult(accepted=True)

    async def tip(self) -> HeaderFacts:
        await trio.lowlevel.checkpoint()
        return self._facts(self._tip)

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            while self._tip.hash == known:
                await self._moved.wait()
        return self._tip.hash

    async def aclose(self) -> None:
        """There is nothing to let go of."""
        await trio.lowlevel.checkpoint()

    async def block_locator(self) -> tuple[bytes, ...]:
        await trio.lowlevel.checkpoint()
        chain, index, step, hashes = self._chain(), 0, 1, []
        while index < len(chain) - 1:
            hashes.append(chain[index].hash)
            step *= 2 if len(hashes) >= 10 else 1
            index += step
        return (*hashes, chain[-1].hash)

    async def block(self, block_hash: bytes) -> bytes | None:
        block = self._blocks.get(block_hash)
        return None if block is None or not block.height else block.raw

    async def blocks_after(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...]:
        await trio.lowlevel.checkpoint()
        chain = {block.hash: block for block in self._chain()}
        fork = next((chain[block_hash].height for block_hash in locator if block_hash in chain), 0)
        given: list[bytes] = []
        for block in reversed(chain.values()):
            if block.height > fork:
                max_bytes -= len(block.raw)
                if (given and max_bytes < 0) or len(given) == 1_000:
                    break
                given.append(block.raw)
        return tuple(given)

    def _chain(self) -> list[_Block]:
        """Of the best chain, the tip first."""
        chain = [self._tip]
        while chain[-1].height:
            chain.append(self._blocks[chain[-1].parent])
        return chain

    def _median_time(self, block: _Block) -> int:
        times = [block.time]
        while len(times) < 11 and block.height:
            block = self._blocks[block.parent]
            times.append(block.time)
        return sorted(times)[len(times) // 2]

    def _facts(self, block: _Block) -> HeaderFacts:
        return HeaderFacts(
            block_hash=block.hash, height=block.height, next_bits=BITS, median_time=self._median_time(block)
        )


class HeaderBitcoin(FakeBitcoin):
    """One node's Bitcoin that has a network of its own: ``HeaderSource`` and, unlike the other, no ``BlockSource``.

    What is submitted to one is heard by all of its network, and so are the blocks below it. A block of which one alone
    hears (``hears``) stays with it, unless its chain wins.

    Mutable fields: ``_learned`` (headers of blocks that it does not have, by hash, with what follows from them).
    """

    block_locator = None  # type: ignore[assignment]
    block = None  # type: ignore[assignment]
    blocks_after = None  # type: ignore[assignment]

    def __init__(self, clock: Callable[[], float], network: list[HeaderBitcoin] | None = None) -> None:
        """It has the best chain of a network, and of what lost nothing; ``network`` is extended by it."""
        super().__init__(clock)
        self._learned: dict[bytes, _Block] = {}
        self._network = [] if network is None else network
        if self._network:
            best = max(self._network, key=lambda other: other._tip.height)
            self._blocks = {block.hash: block for block in reversed(best._chain())}
            self._tip = best._tip
        self._network.append(self)

    def copy(self) -> HeaderBitcoin:
        """As a restarted process finds it: what peers told of headers is forgotten."""
        other = HeaderBitcoin(self._clock)
        other._blocks, other._tip = dict(self._blocks), self._tip
        other._network = self._network
        self._network[self._network.index(self)] = other
        return other

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        await trio.lowlevel.checkpoint()
        block = self._any(block_hash)
        return None if block is None else self._facts(block)

    async def header(self, block_hash: bytes) -> bytes | None:
        await trio.lowlevel.checkpoint()
        block = self._any(block_hash)
        return None if block is None or not block.height else block.raw[:80]

    async def learn_header(self, raw: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        block_hash, parent = sha256d(raw), self._any(raw[4:36])
        if parent is None or int.from_bytes(raw[72:76], "little") != BITS:
            return False
        if int.from_bytes(block_hash, "little") > bits_to_target(BITS):
            return False
        time = int.from_bytes(raw[68:72], "little")
        if not self._median_time(parent) < time <= self._clock() + 7_200:
            return False
        self._learned[block_hash] = _Block(
            hash=block_hash, parent=parent.hash, height=parent.height + 1, time=time, raw=raw
        )
        return True

    async def submit_block(self, raw: bytes) -> SubmitResult:
        result = await self.hears(raw)
        for other in self._network if result.accepted else ():
            for block in reversed(self._chain()):
                if block.hash not in other._blocks:
                    await other.hears(block.raw)
        return result

    async def hears(self, raw: bytes) -> SubmitResult:
        """A block arrives, and goes nowhere from here."""
        return await super().submit_block(raw)

    def _any(self, block_hash: bytes) -> _Block | None:
        return self._blocks.get(block_hash) or self._learned.get(block_hash)

    def _median_time(self, block: _Block) -> int:
        times = [block.time]
        while len(times) < 11 and block.height:
            parent = self._any(block.parent)
            assert parent is not None
            block = parent
            times.append(block.time)
        return sorted(times)[len(times) // 2]
