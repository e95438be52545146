"""One or several Bitcoin nodes over JSON-RPC, as one `BitcoinBackend`.

Theory of operation. Questions go to one node at a time (`nodes.py` chooses it), blocks to all at once; one that takes
it is enough.

The tip is followed on the active node, by `waitfornewblock` where there is one, else by asking. Each wait is short: a
question that we no longer wait for must not hold one of the node's few threads. A block of our own, a message on the
node's ZMQ socket or a change of the active node end the wait at once.

What a block demands of the next (`HeaderFacts`) is computed here from headers (`headers.py`), which are asked for once.
Headers of blocks that no Bitcoin node of ours has heard of may come from other nodes of the pool (`HeaderSource`).

Source: Bitcoin Core's rpc/mining.cpp and rpc/blockchain.cpp, BIP22, BIP23, BIP145; for btcd its rpcserver.go.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from p2pool.bitcoin_backend.headers import CHAIN_RULES, Header, HeaderIndex, MissingHeader, check_header
from p2pool.bitcoin_backend.jsonrpc import Endpoint, RpcClient
from p2pool.bitcoin_backend.nodes import NodeState, RpcNodes, unhex
from p2pool.bitcoin_backend.selection import read_template
from p2pool.bitcoin_backend.template import BlockTemplate, HeaderFacts, SubmitResult
from p2pool.errors import BackendError, BackendRefusal
from sharechain.difficulty import bits_to_target
from sharechain.hasher import sha256d

__all__ = ["RpcBackend", "connect_bitcoin"]

logger = logging.getLogger("p2pool.bitcoin")

#: Seconds that a template may take, and the verdict on a block.
TEMPLATE_TIMEOUT_S: Final = 60.0
SUBMIT_TIMEOUT_S: Final = 120.0
#: Seconds of one `waitfornewblock`: an answer that nobody waits for any more costs the node a thread for so long.
WAIT_S: Final = 5.0
#: The same where it does not take the tip that we know: a block that comes between two waits is seen so late.
BLIND_WAIT_S: Final = 0.5
#: Seconds between two questions for the tip where there is no waiting, or where it ends at once and without a reason.
POLL_INTERVAL_S: Final = 0.25
#: Seconds that the other nodes have for a block once one has accepted it.
OTHERS_S: Final = 5.0
#: Headers whose facts are kept (200 bytes each), and headers and blocks of the pool that are remembered.
MAX_FACTS: Final = 20_000
MAX_RAW: Final = 1_000
#: Headers that are walked down one by one at most: a branch off the best chain, or a Bitcoin node without the latter.
MAX_WALK: Final = 2_100
#: JSON-RPC error codes of Bitcoin Core.
_MISC: Final = -1
_INVALID_PARAMETER: Final = -8
_NOT_FOUND: Final = -5
_UNDECODABLE: Final = -22
#: Reasons that leave it open whether the block is good: another node may know more.
_OPEN_REASONS: Final = ("inconclusive", "prev-blk-not-found", "duplicate-inconclusive")

#: What btcd says in a refusal, and Bitcoin Core's word for it.
_BTCD_REASONS: Final = (
    ("already have block", "duplicate"),
    ("is higher than expected max", "high-hash"),
    ("previous block", "prev-blk-not-found"),
    ("coinbase transaction for block pays", "bad-cb-amount"),
    ("merkle root is invalid", "bad-txnmrklroot"),
    ("witness commitment", "bad-witness-merkle-match"),
    ("is not after expected", "time-too-old"),
    ("is too far in the future", "time-too-new"),
    ("difficulty", "bad-diffbits"),
)


class RpcBackend:
    """See `BitcoinBackend`, `BlockReader` and `HeaderSource`. Made by `connect_bitcoin`.

    Mutable fields: ``_index`` (headers), ``_facts`` of headers, ``_raw`` (headers that other nodes of the pool
    brought), ``_pool_blocks`` (hashes of blocks that were accepted) and ``_warned`` (of what would be told with every
    template).
    """

    def __init__(
        self,
        clients: Sequence[RpcClient],
        *,
        network: str,
        reserved_weight: int,
        reserved_sigops: int,
        clock: Callable[[], float],
    ) -> None:
        """Use `connect_bitcoin`."""
        self._rules = CHAIN_RULES[network]
        self.nodes: Final = RpcNodes(clients, rules=self._rules, clock=clock)
        self._reserved_weight = reserved_weight
        self._reserved_sigops = reserved_sigops
        self._clock = clock
        self._index = HeaderIndex(self._rules)
        self._facts: dict[bytes, HeaderFacts] = {}
        self._raw: dict[bytes, bytes] = {}
        self._pool_blocks: dict[bytes, None] = {}
        self._warned: set[str] = set()

    # The protocol.

    @property
    def network(self) -> str:
        """The Bitcoin network that all nodes are on."""
        return self._rules.network

    async def block_template(self) -> BlockTemplate:
        """See `BitcoinBackend`. Leaves room for the largest coinbase."""
        template = await self.nodes.on_first(self._read_template)
        facts = await self.header_facts(template.previous_block_hash)
        if facts is None:
            return template
        if template.height != facts.height + 1:
            raise BackendError(f"{self.nodes.active.name}: getblocktemplate: block {template.height} on {facts.height}")
        if template.bits != (wanted := facts.bits_at(template.time)) and "bits" not in self._warned:
            self._warned.add("bits")
            logger.error(
                "%s wants the target %#010x of block %d, by the rules of %s it is %#010x: shares will be refused",
                self.nodes.active.name,
                template.bits,
                template.height,
                self._rules.network,
                wanted,
            )
        return template if facts.late is None else replace(template, bits=facts.next_bits, late=facts.late)

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        """See `BitcoinBackend`. Asked for once: headers do not change."""
        self.nodes.check_open()
        known = self._facts.get(block_hash)
        if known is not None:
            await trio.lowlevel.checkpoint()
            return known
        return await self.nodes.on_first(partial(self._read_facts, block_hash=block_hash))

    async def is_on_chain(self, block_hash: bytes) -> bool:
        """See `BitcoinBackend`."""
        return await self.nodes.on_first(partial(self._is_on_chain_of, block_hash=block_hash))

    async def submit_block(self, raw: bytes) -> SubmitResult:
        """Hand a block to all nodes at once; one that accepts it is enough.

        Raises:
            BackendError: no node has accepted it, and not all have answered.
        """
        self.nodes.check_open()
        if len(raw) < 81:
            await trio.lowlevel.checkpoint()
            return SubmitResult(accepted=False, reason="decode-failed")
        answers: dict[NodeState, SubmitResult | BackendError] = {}
        block_hash = sha256d(raw[:80])
        async with trio.open_nursery() as nursery:

            async def submit(node: NodeState) -> None:
                try:
                    async with node.submissions:
                        answers[node] = result = await self._submit_to(node, raw.hex(), block_hash)
                except BackendError as error:
                    answers[node] = error
                    return
                if result.accepted:  # it tells the other nodes of Bitcoin
                    self.nodes.wake()
                    nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + OTHERS_S)

            async def learn() -> None:
                with suppress(BackendError):
                    await self.learn_header(raw[:80])  # btcd does not speak of blocks beside its chain

            for node in self.nodes.nodes:
                if node.fault is None:
                    nursery.start_soon(submit, node)
            nursery.start_soon(learn)
        for node, answer in answers.items() if len(self.nodes.nodes) > 1 else ():
            level, said = logging.DEBUG, str(answer)  # its outage is told
            if isinstance(answer, SubmitResult):
                level, said = logging.INFO, answer.reason or "accepted"
            logger.log(level, "block %s: %s says: %s", block_hash[::-1].hex(), node.name, said)
        return _verdict([answers[node] for node in self.nodes.nodes if node in answers])

    async def tip(self) -> HeaderFacts:
        """See `BitcoinBackend`."""
        facts = await self.header_facts(await self.nodes.ask("getbestblockhash", read=unhex))
        if facts is None:
            raise BackendError(f"{self.nodes.active.name}: getblockheader: the node does not know its own tip")
        return facts

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """See `BitcoinBackend`."""
        pause_s = 0.0
        with trio.move_on_after(math.inf if timeout is None else timeout):
            while True:
                news, node = self.nodes.news, self.nodes.active
                tip = await self.nodes.ask("getbestblockhash", read=unhex)
                self.nodes.active.tip = tip  # the watch has nothing to tell of it
                if tip != known:
                    return tip
                told: bytes | None = None
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, news.wait, nursery.cancel_scope)
                    await trio.sleep(pause_s)
                    began = trio.current_time()
                    told = await self._wait_on(node, known)
                    pause_s = POLL_INTERVAL_S if trio.current_time() - began < POLL_INTERVAL_S else 0.0
                    nursery.cancel_scope.cancel()
                if told is not None and told != known and node is self.nodes.active:
                    node.tip = told
                    return told
        return known

    async def aclose(self) -> None:
        """End all connections; who waits gets a `BackendError`."""
        await self.nodes.aclose()

    # `BlockReader`.

    async def block(self, block_hash: bytes) -> bytes | None:
        """See `BlockReader`."""
        try:
            return await self.nodes.ask("getblock", block_hash[::-1].hex(), 0, read=partial(_bytes, block_hash))
        except BackendRefusal as refusal:
            if _is_unknown(refusal):
                return None
            if refusal.code == _MISC and "pruned" in refusal.message.lower():
                return None
            raise

    async def block_hash_at(self, height: int) -> bytes | None:
        """See `BlockReader`."""
        try:
            return await self.nodes.ask("getblockhash", height, read=unhex)
        except BackendRefusal as refusal:
            if refusal.code in (_INVALID_PARAMETER, _MISC):  # btcd's is -1
                return None
            raise

    # `HeaderSource`.

    async def header(self, block_hash: bytes) -> bytes | None:
        """See `HeaderSource`."""
        known = self._raw.get(block_hash)
        if known is not None:
            await trio.lowlevel.checkpoint()
            return known
        try:
            return await self.nodes.ask(
                "getblockheader", block_hash[::-1].hex(), False, read=partial(_bytes, block_hash)
            )
        except BackendRefusal as refusal:
            if _is_unknown(refusal):
                return None
            raise

    async def learn_header(self, raw: bytes) -> bool:
        """See `HeaderSource`. What is learnt so is not told to the Bitcoin nodes: they do not need it."""
        parent_facts = await self.header_facts(raw[4:36]) if len(raw) == 80 else None
        parent = self._index.get(raw[4:36])
        if parent_facts is None or parent is None:
            return False
        try:
            header = check_header(self._rules, raw, parent, parent_facts, self._clock())
        except ValueError as error:
            logger.debug("header %s of another node of the pool: %s", sha256d(raw)[::-1].hex(), error)
            return False
        self._index.add(header)
        self._raw[header.block_hash] = raw
        while len(self._raw) > MAX_RAW:
            del self._raw[next(iter(self._raw))]
        return True

    # Inside: the chain of one node.

    async def _read_template(self, node: NodeState) -> BlockTemplate:
        """A node's template, with room for the largest coinbase."""
        rules = ["segwit", "signet"] if self._rules.network == "signet" else ["segwit"]
        result = await node.client.call("getblocktemplate", {"rules": rules}, timeout_s=TEMPLATE_TIMEOUT_S)
        read = partial(
            read_template,
            result,
            network=self._rules.network,
            reserved_weight=self._reserved_weight,
            reserved_sigops=self._reserved_sigops,
        )
        try:
            template = await trio.to_thread.run_sync(read)
        except BackendError as error:
            raise BackendError(f"{node.name}: {error}") from None
        if self._rules.network == "signet" and result.get("signet_challenge") != "51" and "signet" not in self._warned:
            self._warned.add("signet")
            logger.warning(
                "this signet wants blocks signed by its operators: shares are made and paid for as anywhere, but no "
                "block of ours will be accepted"
            )
        return template

    async def _is_on_chain_of(self, node: NodeState, block_hash: bytes) -> bool:
        try:
            row = await self.nodes.call(node, "getblockheader", block_hash[::-1].hex(), True)
            header = _header(row, node, block_hash)
            return await self._hash_at(node, header.height) == block_hash
        except BackendRefusal as refusal:
            if _is_unknown(refusal) or refusal.code in (_INVALID_PARAMETER, _MISC):
                return False
            raise

    async def _hash_at(self, node: NodeState, height: int) -> bytes:
        return unhex(await self.nodes.call(node, "getblockhash", height))

    async def _wait_on(self, node: NodeState, known: bytes) -> bytes | None:
        """Wait until a node's tip may be another, or for some seconds; give the tip if the node told.

        Whether it answers at all is found out by whoever asks next.
        """
        if node.waits == "polled":
            await trio.sleep(POLL_INTERVAL_S)
            return None
        # No longer than we wait. To Bitcoin Core 0 is for ever.
        wait_s = min(WAIT_S, max(trio.current_effective_deadline() - trio.current_time(), 0.001))
        params: tuple[object, ...] = (int(wait_s * 1000), known[::-1].hex())
        if node.waits == "blind":
            wait_s = min(wait_s, BLIND_WAIT_S)
            params = (int(wait_s * 1000),)
        try:
            result = await self.nodes.call(node, "waitfornewblock", *params, more_s=wait_s)
            return unhex(result.get("hash")) if isinstance(result, dict) else None
        except BackendRefusal as refusal:
            # Bitcoin Core before 30 takes no tip; btcd has no such method, and an operator may have forbidden it.
            takes_no_tip = node.waits == "known" and refusal.code in (_MISC, _INVALID_PARAMETER)
            node.waits = "blind" if takes_no_tip else "polled"
            logger.debug("%s: waits are %s: %s", node.name, node.waits, refusal)
        except BackendError as error:
            logger.debug("%s: the wait for a block broke off: %s", node.name, error)
        return None

    # Inside: headers.

    async def _read_facts(self, node: NodeState, block_hash: bytes) -> HeaderFacts | None:
        """What a header demands of the next, from headers that we have and those that a node gives."""
        header = await self._read_header(node, block_hash)
        if header is None:
            return None
        for _ in range(MAX_WALK):
            try:
                facts = self._index.facts(header)
            except MissingHeader as missing:
                await self._fetch(node, missing)
                continue
            while len(self._facts) >= MAX_FACTS:
                del self._facts[next(iter(self._facts))]
            self._facts[block_hash] = facts
            return facts
        raise BackendError(f"{node.name}: getblockheader: the branch of {block_hash[::-1].hex()} has no end")

    async def _fetch(self, node: NodeState, missing: MissingHeader) -> None:
        """Get a header that is lacking: the one far below if the node has both on its best chain, else the next."""
        below, height = missing.below, missing.height
        if missing.is_alone and height < below.height - 1:
            with suppress(BackendRefusal):  # the node's chain is not that high
                at = await self._hash_at(node, height)
                far = await self._read_header(node, at)
                # Asked after the other: if the node's chain still goes through here, it also did through there.
                is_both = await self._is_on_chain_of(node, below.block_hash) and await self._hash_at(node, height) == at
                if is_both and far is not None and far.height == height:
                    self._index.add_period_start(far, below)
                    return
        if await self._read_header(node, below.previous_block_hash) is None:
            raise BackendError(f"{node.name}: getblockheader: the parent of {below.block_hash[::-1].hex()} is unknown")

    async def _read_header(self, node: NodeState, block_hash: bytes) -> Header | None:
        known = self._index.get(block_hash)
        if known is not None:
            return known
        try:
            row = await self.nodes.call(node, "getblockheader", block_hash[::-1].hex(), True)
        except BackendRefusal as refusal:
            if _is_unknown(refusal):
                return None
            raise
        header = _header(row, node, block_hash)
        self._index.add(header)
        return header

    # Inside: blocks.

    async def _submit_to(self, node: NodeState, raw_hex: str, block_hash: bytes) -> SubmitResult:
        """One node's verdict on a block. Raises: BackendError."""
        call = node.client.call
        try:
            reason = await call("submitblock", raw_hex, timeout_s=SUBMIT_TIMEOUT_S)
        except BackendRefusal as refusal:
            if refusal.code == _UNDECODABLE:
                return SubmitResult(accepted=False, reason="decode-failed")
            raise
        if reason is None:
            # Bitcoin Core: it is the tip. btcd says so of any block that it stored, even one without a parent.
            if await self._is_on_chain_of(node, block_hash):
                return self._accepted(block_hash)
            try:
                await self.nodes.call(node, "getblockheader", block_hash[::-1].hex(), False)
            except BackendRefusal as refusal:
                if refusal.code == _NOT_FOUND:
                    return SubmitResult(accepted=False, reason="prev-blk-not-found")
            return SubmitResult(accepted=False, reason="inconclusive")
        reason = _core_reason(str(reason))
        if reason in ("inconclusive", "duplicate-inconclusive"):
            tip = unhex(await self.nodes.call(node, "getbestblockhash"))
            if tip not in self._pool_blocks:
                # A stranger's block of that height came first. Ours is worth more to the pool's miners.
                try:
                    await call("preciousblock", block_hash[::-1].hex(), timeout_s=SUBMIT_TIMEOUT_S)
                except BackendRefusal as refusal:
                    logger.debug("%s: preciousblock: %s", node.name, refusal)
                if await self._is_on_chain_of(node, block_hash):
                    return self._accepted(block_hash)
        return SubmitResult(accepted=False, reason=reason)

    def _accepted(self, block_hash: bytes) -> SubmitResult:
        self._pool_blocks[block_hash] = None
        while len(self._pool_blocks) > MAX_RAW:
            del self._pool_blocks[next(iter(self._pool_blocks))]
        return SubmitResult(accepted=True)


@asynccontextmanager
async def connect_bitcoin(
    endpoints: Sequence[Endpoint],
    *,
    network: str,
    reserved_weight: int,
    reserved_sigops: int,
    zmq: Sequence[str] = (),
    wait: bool = True,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[RpcBackend]:
    """Use Bitcoin nodes as long as the context lasts; it begins when one of them can be used.

    Arguments:
        endpoints: at least one; the first is used while it can be.
        network: the Bitcoin network that all of them must be on.
        reserved_weight: weight units of a block that are kept for header and coinbase.
        reserved_sigops: signature operations that are kept for the coinbase.
        zmq: addresses on which the nodes publish ``hashblock``.
        wait: until a node can be used; else there is an error if none can be.
        clock: Unix seconds.

    Raises:
        ConfigError: a node is on another network, too old, or does not let us in.
        BackendError: no node can be used and none is waited for.
    """
    backend = RpcBackend(
        [RpcClient(endpoint) for endpoint in endpoints],
        network=network,
        reserved_weight=reserved_weight,
        reserved_sigops=reserved_sigops,
        clock=clock,
    )
    try:
        await backend.nodes.start(wait=wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.nodes.watch)
            for address in zmq:
                from p2pool.bitcoin_backend.hashblock import follow_blocks

                nursery.start_soon(follow_blocks, address, backend.nodes.wake)
            yield backend
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await backend.aclose()


async def _cancel_after(event: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await event()
    scope.cancel()


def _verdict(answers: Sequence[SubmitResult | BackendError]) -> SubmitResult:
    """The verdict of several nodes. Raises: BackendError, it is open."""
    results = [answer for answer in answers if isinstance(answer, SubmitResult)]
    for wanted in ("", "duplicate"):  # what became of a duplicate can be asked
        for result in results:
            if result.reason == wanted:
                return result
    final = [result for result in results if result.reason not in _OPEN_REASONS]
    if final:
        return final[0]
    for answer in answers:
        if isinstance(answer, BackendError):
            raise answer
    if not results:
        raise BackendError("no Bitcoin node can be used")
    return results[0]


def _core_reason(reason: str) -> str:
    """Bitcoin Core's word for why a block is refused; btcd has sentences."""
    if not reason.startswith("rejected: "):
        return reason
    text = reason.removeprefix("rejected: ")
    for part, word in _BTCD_REASONS:
        if part in text:
            return word
    return text


def _is_unknown(refusal: BackendRefusal) -> bool:
    """Whether a node does not know a block, or will not speak of it since it is not on its best chain (btcd)."""
    return refusal.code == _NOT_FOUND or "not in the main chain" in refusal.message


def _header(row: Any, node: NodeState, block_hash: bytes) -> Header:
    """What `getblockheader` answers. Raises: BackendError, it is no header or another one."""
    try:
        header = Header(
            block_hash=unhex(row["hash"]),
            previous_block_hash=unhex(row.get("previousblockhash") or "00" * 32),
            height=int(row["height"]),
            time=int(row["time"]),
            bits=int(row["bits"], 16),
            median_time=None if row.get("mediantime") is None else int(row["mediantime"]),
        )
        bits_to_target(header.bits)
    except (TypeError, KeyError, ValueError, OverflowError, BackendError) as error:
        raise BackendError(f"{node.name}: getblockheader: not as Bitcoin Core answers it: {error!r}") from None
    ranges = ((header.height, 2**31), (header.time, 2**32), (header.median_time or 0, 2**32))
    if header.block_hash != block_hash or not all(0 <= number < end for number, end in ranges):
        raise BackendError(f"{node.name}: getblockheader: the answer is another header, or none")
    return header


def _bytes(block_hash: bytes, text: Any) -> bytes:
    """A header or a block in hex. Raises: BackendError, it is none or another one."""
    try:
        raw = bytes.fromhex(text)
    except (TypeError, ValueError):
        raw = b""
    if sha256d(raw[:80]) != block_hash:
        raise BackendError(f"expected what was asked for in hexadecimal text, got {str(text)[:80]!r}")
    return raw
