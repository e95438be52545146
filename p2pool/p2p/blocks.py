"""Bitcoin blocks between this node and the others: the tasks round ``BlockDesk``.

Theory of operation. A block that was found is announced to every peer, each of which says what it lacks of it. An
embedded backend has no network of its own: it gets stretches of the chain from any peer whose Bitcoin is ahead, and
single blocks that shares build on from whoever has them, since a block that lost its race is on nobody's chain. A
backend that follows Bitcoin by itself may never hear of such a block. Its header is enough to judge the share, and has
its own proof: those are asked for one by one, with the headers below them that are not known either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import trio

from p2pool.errors import BackendError, PeerError
from p2pool.p2p import BLOCK, Transport
from p2pool.p2p.wire import (
    MAX_HEADERS,
    MAX_LOCATOR,
    MAX_SHARES_SIZE,
    Announce,
    Blocks,
    BlocksAfter,
    GetBlocks,
    GetHeaders,
    Headers,
    Message,
    Refused,
    Status,
    Transactions,
    Wanted,
    decode_message,
    encode_message,
)
from sharechain.difficulty import bits_to_target
from sharechain.hasher import sha256d

__all__ = ["BLOCK_REQUESTS", "NO_FAULTS", "BlockDesk", "BlockNews"]

logger = logging.getLogger("p2pool.p2p")

#: What peers may ask for.
BLOCK_REQUESTS: Final = (Announce, Transactions, BlocksAfter, GetBlocks, GetHeaders)
#: How a request can fail without the peer's fault: our line may be as bad as its.
NO_FAULTS: Final = ("gone", "timeout", "stream", "unreachable")
#: Seconds that a peer may take for an answer, and for an announcement.
REQUEST_TIMEOUT_S: Final = 20.0
ANNOUNCE_TIMEOUT_S: Final = 60.0
#: Seconds between two looks for Bitcoin blocks that the backend lacks.
BLOCKS_INTERVAL_S: Final = 0.5
#: The same for one block that nobody seems to have, at most; how many are looked for; how long a branch is followed.
MAX_HUNT_S: Final = 60.0
MAX_HUNTED: Final = MAX_HEADERS
MAX_BRANCH: Final = 500
#: The same for headers: Bitcoin's work is in each. And seconds that one peer may take for all of them.
MAX_HEADER_BRANCH: Final = 100
HEADERS_TIMEOUT_S: Final = 60.0
#: How far ahead a header's time may be (Bitcoin Core, ``MAX_FUTURE_BLOCK_TIME``). Beyond, our clock may be wrong.
MAX_AHEAD_S: Final = 7_200
#: Requests for blocks of one peer in a row; then it is the next one's turn.
MAX_ROUNDS: Final = 50


class BlockDesk(Protocol):
    """What the network asks of the node about Bitcoin blocks."""

    def announced(self, peer_id: str, announce: Announce) -> Wanted:
        """A peer announces a block: what is lacking of it. Raises: PeerError."""

    def filled(self, peer_id: str, transactions: Transactions) -> Wanted:
        """A peer sends what was lacking: what still is. Raises: PeerError."""

    def lacking(self, block_hash: bytes, positions: Sequence[int]) -> Iterable[Transactions]:
        """The transactions of a block that we announced. Raises: PeerError."""

    async def knows(self, block_hash: bytes) -> bool:
        """Whether the backend has a block."""

    async def locator(self) -> tuple[bytes, ...] | None:
        """Of the backend's chain; None if the backend follows Bitcoin by itself. Raises: BackendError."""

    async def after(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...] | None:
        """Blocks of the backend's chain; None as above. Raises: BackendError."""

    async def give(self, block_hashes: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...] | None:
        """Blocks that the backend has, on any branch; None as above. Raises: BackendError."""

    async def take(self, blocks: Sequence[bytes]) -> int:
        """Hand blocks to the backend. Returns how many it knows now, from the first on. Raises: BackendError."""

    async def headers(self, block_hashes: Sequence[bytes]) -> tuple[bytes | None, ...] | None:
        """Headers that the backend knows, in that order, None for others; None alone if it does not take single
        headers. Raises: BackendError.
        """

    async def learn_headers(self, headers: Sequence[bytes]) -> tuple[bytes, ...]:
        """Hand headers to the backend, parents first. Returns those that it refuses although it knows their parents:
        those that it cannot judge are not refused. Raises: BackendError.
        """


class _Hunt:
    """When blocks are looked for that perhaps nobody has: ever more rarely, and in turns.

    Mutable fields: ``_hunted`` (for each block: how often it was asked for, and when next), ``_turn``.
    """

    def __init__(self) -> None:
        """Nothing is looked for."""
        self._hunted: dict[bytes, tuple[int, float]] = {}
        self._turn = 0

    def due(self, wanted: Collection[bytes], peers: int, now: float, *, alike: int = 1) -> Iterator[tuple[bytes, int]]:
        """What to ask for now, and how often it was before.

        Args:
            wanted: all that is looked for; what is not in it is forgotten.
            peers: how many can be asked; nothing is due without one.
            now: Unix seconds.
            alike: requests between two doublings of the pause.
        """
        self._hunted = {block: hunt for block, hunt in self._hunted.items() if block in wanted}
        start = self._turn % len(wanted) if wanted else 0  # in turns: what does not exist must not hide what does
        self._turn += MAX_HUNTED
        for block in (*list(wanted)[start:], *list(wanted)[:start])[:MAX_HUNTED]:
            tries, due = self._hunted.get(block, (0, now + BLOCKS_INTERVAL_S))
            if now >= due and peers > 0:
                pause_s = min(BLOCKS_INTERVAL_S * 2 ** min(tries // alike, 10), MAX_HUNT_S)
                self._hunted[block] = (tries + 1, now + pause_s)
                yield block, tries
            else:
                self._hunted[block] = (tries, due)


class BlockNews:
    """Announces, fetches and serves blocks.

    Mutable fields: ``_no_source`` and ``_no_headers`` (peers that give no blocks, or no headers), ``_lagging`` (peers
    whose Bitcoin is ahead of ours), ``_asked`` (peers that are asked for headers at the moment), ``_block_hunt`` and
    ``_header_hunt`` (for what shares wait for).
    """

    def __init__(
        self,
        desk: Any,
        transport: Transport,
        intake: Any,
        *,
        clock: Callable[[], float],
        blame: Callable[..., None],
        status_of: Callable[[str], Status | None],
    ) -> None:
        """The arguments are those of ``Network``, and parts of it."""
        self._desk = desk
        self._transport = transport
        self._intake = intake
        self._clock = clock
        self._blame = blame
        self._status_of = status_of
        self._no_source: set[str] = set()
        self._no_headers: set[str] = set()
        self._lagging: set[str] = set()
        self._asked: set[str] = set()
        self._block_hunt, self._header_hunt = _Hunt(), _Hunt()
        self._announce_in, self._announce_out = trio.open_memory_channel[tuple[bytes, bytes, str]](16)

    def found(self, block_hash: bytes, announce: Announce, *, bearer: str = "") -> None:
        """A block was found, or completed from a peer's announcement: tell everybody but its bearer."""
        try:
            self._announce_in.send_nowait((block_hash, encode_message(announce), bearer))
        except trio.WouldBlock:
            logger.warning("block %s is not announced: too many at once", block_hash[::-1].hex())

    def lacks_blocks_of(self, peer_id: str) -> None:
        """Our Bitcoin misses blocks that a peer's has: fetch them, if our backend has no network of its own."""
        self._lagging.add(peer_id)

    def closed(self, peer_id: str) -> None:
        """A peer is gone."""
        self._no_source.discard(peer_id)
        self._no_headers.discard(peer_id)
        self._lagging.discard(peer_id)

    async def run(self) -> None:
        """Announce and fetch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, nursery)
            nursery.start_soon(self._follow_blocks)
            nursery.start_soon(self._follow_headers, nursery)

    async def answer(self, peer_id: str, message: Any) -> Message:
        """Answer one of ``BLOCK_REQUESTS``. Raises: PeerError."""
        desk: BlockDesk = self._desk.blocks
        if isinstance(message, Announce):
            return desk.announced(peer_id, message)
        if isinstance(message, Transactions):
            return desk.filled(peer_id, message)
        if isinstance(message, GetHeaders):
            try:
                headers = await desk.headers(message.hashes)
            except BackendError:
                headers = (None,) * len(message.hashes)
            return Refused(reason="Bitcoin headers: none here") if headers is None else Headers(headers=headers)
        try:
            if isinstance(message, GetBlocks):
                blocks = await desk.give(message.hashes, MAX_SHARES_SIZE)
            else:
                blocks = await desk.after(message.locator, MAX_SHARES_SIZE)
        except BackendError:
            blocks = ()  # now; it may have some later
        return Refused(reason="Bitcoin blocks: ask Bitcoin") if blocks is None else Blocks(blocks=blocks)

    async def _announce(self, nursery: trio.Nursery) -> None:
        async for block_hash, raw, bearer in self._announce_out:
            for link in self._transport.links:
                if link.peer_id != bearer:
                    nursery.start_soon(self._announce_to, link.peer_id, block_hash, raw)

    async def _announce_to(self, peer_id: str, block_hash: bytes, raw: bytes) -> None:
        request = partial(self._transport.request, peer_id, BLOCK, timeout_s=ANNOUNCE_TIMEOUT_S)
        try:
            wanted = decode_message(await request(request=raw), Wanted)
            for message in self._desk.blocks.lacking(block_hash, wanted.positions) if wanted.positions else ():
                wanted = decode_message(await request(request=encode_message(message)), Wanted)
        except PeerError as error:
            logger.debug("peer %s does not take block %s: %s", peer_id, block_hash[::-1].hex(), error)
            if error.rule not in NO_FAULTS:
                self._blame(peer_id=peer_id, ip=None, rule=error.rule, detail=error.message)

    async def _follow_blocks(self) -> None:
        if await self._desk.blocks.locator() is None:
            return  # the backend follows Bitcoin by itself
        while True:
            for link in self._transport.links:
                status = self._status_of(link.peer_id)
                if status is None or link.peer_id in self._no_source or not any(status.block_hash):
                    continue
                try:
                    behind = link.peer_id in self._lagging or not await self._desk.blocks.knows(status.block_hash)
                    self._lagging.discard(link.peer_id)
                    if behind:
                        await self._fetch_blocks(link.peer_id)
                except BackendError as error:
                    logger.error("the Bitcoin node does not take blocks of peers: %s", error)
            try:
                await self._look_for_blocks()
            except BackendError as error:
                logger.error("the Bitcoin node does not take blocks of peers: %s", error)
            await trio.sleep(BLOCKS_INTERVAL_S)

    async def _look_for_blocks(self) -> None:
        """Ask for the blocks that waiting shares build on: they may be on a branch that lost."""
        links = self._transport.links
        for block, tries in self._block_hunt.due(self._missing_blocks(), len(links), self._clock()):
            link = links[tries % len(links)]
            if link.peer_id not in self._no_source and not await self._desk.blocks.knows(block):
                await self._fetch_branch(link.peer_id, block)

    def _missing_blocks(self) -> Collection[bytes]:
        return dict.fromkeys((*self._desk.chain.missing_blocks(), *self._intake.missing_blocks))

    async def _fetch_branch(self, peer_id: str, block_hash: bytes) -> None:
        """Fetch one block, and those below it that our Bitcoin does not know."""
        branch: list[bytes] = []
        while len(branch) < MAX_BRANCH and not await self._desk.blocks.knows(block_hash):
            answer = await self._request_blocks(peer_id, GetBlocks(hashes=(block_hash,)))
            if not answer or sha256d(answer[0][:80]) != block_hash:
                return
            branch.append(answer[0])
            block_hash = answer[0][4:36]
        await self._desk.blocks.take(branch[::-1])
        self._intake.poke()

    async def _fetch_blocks(self, peer_id: str) -> None:
        last: tuple[bytes, ...] = ()
        for _ in range(MAX_ROUNDS):
            locator = await self._desk.blocks.locator()
            assert locator is not None, "a backend does not change its kind"
            blocks = await self._request_blocks(peer_id, BlocksAfter(locator=(last + locator)[:MAX_LOCATOR]))
            if not blocks or await self._desk.blocks.knows(sha256d(blocks[-1][:80])):
                return
            taken = await self._desk.blocks.take(blocks)
            self._intake.poke()
            if taken < len(blocks):
                detail = f"the Bitcoin node refuses block {taken + 1} of {len(blocks)}"
                self._blame(peer_id=peer_id, ip=None, rule="block", detail=detail)
                return
            last = (sha256d(blocks[-1][:80]),)

    async def _request_blocks(self, peer_id: str, request: Message) -> tuple[bytes, ...]:
        """Blocks that a peer gives; none if it gives none."""
        answer = await self._request(peer_id, request, Blocks, REQUEST_TIMEOUT_S)
        if isinstance(answer, Refused):
            self._no_source.add(peer_id)
        return answer.blocks if isinstance(answer, Blocks) else ()

    async def _request(self, peer_id: str, request: Message, kind: type[Any], timeout_s: float) -> Any:
        """What a peer answers: of that kind, or ``Refused``; None if it does not."""
        try:
            raw = await self._transport.request(peer_id, BLOCK, encode_message(request), timeout_s)
            return decode_message(raw, kind, Refused)
        except PeerError as error:
            logger.debug("peer %s gives no Bitcoin blocks: %s", peer_id, error)
            if error.rule not in NO_FAULTS:
                self._blame(peer_id=peer_id, ip=None, rule=error.rule, detail=error.message)
            return None

    async def _follow_headers(self, nursery: trio.Nursery) -> None:
        """Ask for the headers of blocks that waiting shares build on; a slow peer holds up nobody else."""
        if await self._desk.blocks.headers(()) is None:
            return  # the backend has whole blocks, or knows all that there is
        while True:
            for peer_id, block_hashes in (await self._headers_due()).items():
                self._asked.add(peer_id)
                nursery.start_soon(self._fetch_headers, peer_id, block_hashes)
            await trio.sleep(BLOCKS_INTERVAL_S)

    async def _headers_due(self) -> Mapping[str, list[bytes]]:
        """Whom to ask for which headers now."""
        free = [link.peer_id for link in self._transport.links if link.peer_id not in self._no_headers | self._asked]
        asks: dict[str, list[bytes]] = {}
        # Each peer in its turn, then all over again and slower: whoever has the share can have the header.
        due = self._header_hunt.due(self._missing_blocks(), len(free), self._clock(), alike=max(1, len(free)))
        for block, tries in due:
            if not await self._desk.blocks.knows(block):
                asks.setdefault(free[tries % len(free)], []).append(block)
        return asks

    async def _fetch_headers(self, peer_id: str, block_hashes: Sequence[bytes]) -> None:
        """Fetch headers, and those below them that our Bitcoin does not know, and hand all to it."""
        desk: BlockDesk = self._desk.blocks
        left_s, deadline = HEADERS_TIMEOUT_S, trio.current_time() + HEADERS_TIMEOUT_S
        found: dict[bytes, bytes] = {}
        wanted = list(block_hashes)
        try:
            for _ in range(MAX_HEADER_BRANCH):
                given = await self._request_headers(peer_id, wanted, min(REQUEST_TIMEOUT_S, left_s))
                found |= given
                below = dict.fromkeys(header[4:36] for header in given.values())
                wanted = [parent for parent in below if parent not in found and not await desk.knows(parent)]
                left_s = deadline - trio.current_time()
                if not wanted or left_s <= 0:
                    break
            if found:
                for header in await desk.learn_headers(_parents_first(found)):
                    if int.from_bytes(header[68:72], "little") <= self._clock() + MAX_AHEAD_S:
                        self._blame_for_header(peer_id, header, "Bitcoin does not allow it after its parent")
                self._intake.poke()
        except BackendError as error:
            logger.error("the Bitcoin node does not take headers of peers: %s", error)
        finally:
            self._asked.discard(peer_id)

    async def _request_headers(self, peer_id: str, hashes: Sequence[bytes], timeout_s: float) -> dict[bytes, bytes]:
        """Headers that a peer gives, by hash; none if one of them is none."""
        answer = await self._request(peer_id, GetHeaders(hashes=tuple(hashes)), Headers, timeout_s)
        if isinstance(answer, Refused):
            self._no_headers.add(peer_id)
        if not isinstance(answer, Headers):
            return {}
        if len(answer.headers) != len(hashes):
            detail = f"{len(answer.headers)} headers for {len(hashes)} hashes"
            self._blame(peer_id=peer_id, ip=None, rule="unasked", detail=detail)
            return {}
        given = {block: header for block, header in zip(hashes, answer.headers, strict=True) if header is not None}
        for block, header in given.items():
            if sha256d(header) != block:
                self._blame_for_header(peer_id, header, "it was not asked for")
                return {}
            if not _has_work(header):  # before a peer can lead us down a branch that costs it nothing
                self._blame_for_header(peer_id, header, "its work does not meet its target")
                return {}
        return given

    def _blame_for_header(self, peer_id: str, header: bytes, why: str) -> None:
        detail = f"gave header {sha256d(header)[::-1].hex()}: {why}"
        self._blame(peer_id=peer_id, ip=None, rule="block", detail=detail)


def _has_work(header: bytes) -> bool:
    """Whether a header meets the target that it names itself."""
    try:
        target = bits_to_target(int.from_bytes(header[72:76], "little"))
    except ValueError:
        return False
    return int.from_bytes(sha256d(header), "little") <= target


def _parents_first(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Headers by hash, in an order in which each comes after its parent if that is among them."""
    ordered: dict[bytes, bytes] = {}
    for block_hash in headers:
        branch: list[bytes] = []
        while block_hash in headers and block_hash not in ordered:
            branch.append(block_hash)
            block_hash = headers[block_hash][4:36]
        ordered.update((one, headers[one]) for one in reversed(branch))
    return list(ordered.values())
