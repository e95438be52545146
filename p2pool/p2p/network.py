"""One node among others: connections, gossip, sync and block relay over a ``Transport``. Joins the pure parts.

Theory of operation. The transport calls in with what arrives; each message is decided upon in one synchronous stretch.
Around that run a few tasks: one calls peers, one asks them what ``sync`` wants to know, one takes fetched shares in,
one follows Bitcoin blocks for backends that have no network of their own, and short ones that announce blocks. Shares
enter the chain by ``desk.accept`` only: the node stays the single writer. What a peer does wrong is told to ``peers``,
which may ban it; the log names the peer and the rule, the first time, the second, the fourth and so on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from p2pool.errors import PeerError
from p2pool.p2p import SYNC, Gossip, Link, Transport
from p2pool.p2p.blocks import BLOCK_REQUESTS, NO_FAULTS, BlockDesk, BlockNews
from p2pool.p2p.gossip import GossipJudge, Judgement
from p2pool.p2p.intake import Intake
from p2pool.p2p.peers import PeerBook
from p2pool.p2p.sync import Ask, Sync
from p2pool.p2p.wire import (
    MAX_LOCATED,
    MAX_SHARES_SIZE,
    Announce,
    BlocksAfter,
    GetBlocks,
    GetHeaders,
    GetPeers,
    GetShares,
    Locate,
    Located,
    Message,
    Peers,
    Shares,
    Status,
    Transactions,
    decode_gossip,
    decode_message,
    encode_gossip,
    encode_message,
)
from sharechain.chain import Outcome, Sharechain
from sharechain.errors import DecodeError, InvalidShare
from sharechain.params import Params
from sharechain.share import NULL_HASH, Share, decode_share, share_id

__all__ = ["Network", "NetworkDesk", "NetworkStatistics"]

logger = logging.getLogger("p2pool.p2p")

#: Seconds between two looks at what is due; what arrives is acted on at once.
TICK_S: Final = 0.1
#: Seconds that a peer may take for an answer. A batch of shares from a slow line is the longest.
REQUEST_TIMEOUT_S: Final = 20.0
#: Requests in a row without an answer after which a peer is left.
MAX_FAILURES: Final = 3
#: Seconds between two requests for a peer's addresses, and between two savings of our own.
PEERS_INTERVAL_S: Final = 300.0
SAVE_INTERVAL_S: Final = 30.0
#: Seconds between two lines about the progress of a sync.
PROGRESS_INTERVAL_S: Final = 5.0
#: Lines a minute about who comes and goes.
MAX_SAID: Final = 60
#: Shares read and hashed for an answer between two looks at what else is to be done.
LOCATED_SLICE: Final = 64
#: Own shares that wait for the transport.
MAX_PUBLISH: Final = 64
#: What dear requests cost besides the one that each costs: a block announced without one behind it takes 50 ms.
COSTS: Final = {Announce: 20, Transactions: 5, Locate: 10, BlocksAfter: 4, GetBlocks: 4}
#: And for each header that it names: to a Bitcoin node over RPC each is a question.
HEADER_COST: Final = 10


class NetworkDesk(Protocol):
    """What the network asks of the node."""

    @property
    def params(self) -> Params:
        """The network's."""

    @property
    def chain(self) -> Sharechain:
        """For reading."""

    @property
    def blocks(self) -> BlockDesk:
        """The desk for Bitcoin blocks."""

    def accept(self, share: Share) -> Outcome:
        """Take a share in. Raises: InvalidShare."""

    def replace_chain(self, chain: Sharechain, shares: Iterable[Share]) -> None:
        """Go over to another history, which was judged aside: ``shares`` are all of it, lowest first."""

    def encoded(self, share_hash: bytes) -> bytes | None:
        """A share of the chain as it goes over the wire, or None."""

    def bitcoin_tip(self) -> tuple[bytes, int]:
        """Hash and height of Bitcoin's tip; 32 zero bytes and 0 before it is known."""

    async def learn_blocks(self, block_hashes: Iterable[bytes]) -> bool:
        """Look up Bitcoin blocks that shares build on. Returns whether all of them are known."""

    def ready(self) -> None:
        """Miners may be served from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkStatistics:
    """The network as this node sees it at one moment; made for JSON."""

    peer_id: str
    addresses: tuple[str, ...]
    #: "waiting", "syncing" or "synced".
    state: str
    sync_height: int
    sync_target: int
    inbound: int
    outbound: int
    received_bytes: int
    sent_bytes: int
    #: Shares by what became of those that gossip brought: "joined", "seen", "floor", ...
    gossip: Mapping[str, int]
    #: What peers did wrong, by rule.
    faults: Mapping[str, int]
    #: See ``PeerBook.rows``.
    peers: Sequence[Mapping[str, Any]]


class Network:
    """The network side of one node.

    Mutable fields: the pure parts (``sync``, ``_book``, ``_judge``, ``_intake``), ``_counts`` and ``_faults``,
    ``_wasteful`` (until when a peer's gossip is left alone), ``_asked_peers_at``, ``_ready``, and what the tasks wait
    for. Invariant: a peer is in ``sync`` exactly while the book has its link.
    """

    def __init__(
        self,
        desk: NetworkDesk,
        transport: Transport,
        book: PeerBook,
        *,
        clock: Callable[[], float],
        choose: Any,
        listens: bool = True,
        expects_peers: bool = False,
        save: Callable[[bytes], None] | None = None,
    ) -> None:
        """Nothing happens before ``run``.

        Args:
            desk: the node.
            transport: not running yet.
            book: what is known of peers.
            clock: Unix seconds.
            choose: a ``random.Random``.
            listens: whether others can call us where we listen.
            expects_peers: whether peers may turn up that the book does not know yet.
            save: takes the peer file.
        """
        self._desk = desk
        self._transport = transport
        self._book = book
        self._clock = clock
        self._choose = choose
        self._listens = listens
        self._save = save
        self.sync = Sync(
            uncle_depth=desk.params.uncle_depth,
            expects_peers=expects_peers or book.expects_peers,
            now=trio.current_time(),
        )
        self._judge = GossipJudge(desk.params)
        self._intake = Intake(desk, self.sync, clock=clock, moment=trio.current_time, blame=self.blame)
        #: Bitcoin blocks from and for other nodes.
        self.blocks: Final = BlockNews(
            desk, transport, self._intake, clock=clock, blame=self.blame, status_of=self.sync.status_of
        )
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._wasteful: dict[str, float] = {}
        self._said = (-math.inf, 0)
        self._asked_peers_at: dict[str, float] = {}
        self._wake = trio.Event()
        self._publish_in, self._publish_out = trio.open_memory_channel[bytes](MAX_PUBLISH)
        self._leave_in, self._leave_out = trio.open_memory_channel[str](1_000)
        self._ready = False
        self._progress_at = -1e9
        self._software = f"p2pool/{importlib.metadata.version('p2pool')}"

    # -- for the node ------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where other nodes can call us."""
        return self._transport.addresses

    @property
    def is_ready(self) -> bool:
        """Whether miners may be served."""
        return self._ready

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._transport.run, self)
            nursery.start_soon(self._call_peers, nursery)
            nursery.start_soon(self._ask_peers, nursery)
            nursery.start_soon(self._intake.run)
            nursery.start_soon(self._publish)
            nursery.start_soon(self._leave, nursery)
            nursery.start_soon(self.blocks.run)
            nursery.start_soon(self._keep_peers)
            self._look_ready()
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._save_peers()  # while the peers are still there: they are the anchors of the next start

    def share_found(self, share: Share) -> None:
        """A share of an own miner joined the chain: tell everybody."""
        self._judge.note(share.encoded)
        try:
            self._publish_in.send_nowait(encode_gossip([share.encoded]))
        except trio.WouldBlock:
            self._counts["not published"] += 1

    def heard_of(self, address: str) -> None:
        """An address turned up on the local network."""
        self._book.heard([address], "127.0.0.1", self._clock())

    def statistics(self) -> NetworkStatistics:
        """A frozen value."""
        now, traffic = self._clock(), self._transport.traffic
        links = self._transport.links
        sync = self.sync.statistics(self._desk.chain)
        rows = self._book.rows(now)
        for row in rows:
            if row["state"] != "connected":
                continue
            status = self.sync.status_of(row["peer_id"])
            row["height"] = None if status is None else status.height
            row["software"] = None if status is None else status.software
            row["bitcoin_height"] = None if status is None else status.block_height
        return NetworkStatistics(
            peer_id=self._transport.peer_id,
            addresses=self._transport.addresses,
            state=sync.state,
            sync_height=sync.height,
            sync_target=sync.target_height,
            inbound=sum(link.inbound for link in links),
            outbound=sum(not link.inbound for link in links),
            received_bytes=traffic.received,
            sent_bytes=traffic.sent,
            gossip=dict(self._counts),
            faults=dict(self._faults),
            peers=rows,
        )

    # -- the transport calls -----------------------------------------------------------------------------------

    def may_enter(self, ip: str) -> bool:
        """See ``TransportHandler``."""
        return self._book.may_enter(ip, self._clock())

    def opened(self, link: Link) -> bool:
        """See ``TransportHandler``."""
        now = self._clock()
        reason = self._book.opened(link, now)
        if reason is not None:
            logger.debug("peer %s at %s refused: %s", link.peer_id, link.ip, reason)
            return False
        self._say("peer %s at %s:%d %s", link.peer_id, link.ip, link.port, "called" if link.inbound else "answered")
        self.sync.connected(link.peer_id, trio.current_time(), machine=link.ip, chosen=not link.inbound)
        self._wake.set()
        return True

    def closed(self, peer_id: str) -> None:
        """See ``TransportHandler``."""
        self._book.closed(peer_id, self._clock())
        self.sync.gone(peer_id, trio.current_time())
        self._asked_peers_at.pop(peer_id, None)
        self._wasteful.pop(peer_id, None)
        self.blocks.closed(peer_id)
        self._say("peer %s is gone", peer_id)

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        """See ``TransportHandler``."""
        ban = self._book.blame(peer_id=peer_id, ip=ip, rule=rule, detail=detail, now=self._clock())
        self._faults[rule] += 1
        count = self._faults[rule]
        if ban is not None or count & (count - 1) == 0:
            verb = "banned" if ban is not None else "noted"
            logger.warning("peer %s broke rule %s (number %d): %s; %s", peer_id or ip, rule, count, detail, verb)
        for link in self._book.banned_links(self._clock()) if ban is not None else ():
            try:
                self._leave_in.send_nowait(link.peer_id)
            except trio.WouldBlock:
                self._counts["not left"] += 1

    def gossip(self, message: Gossip) -> bool:
        """See ``TransportHandler``."""
        now, moment, bearer = self._clock(), trio.current_time(), message.bearer
        if self._book.spend(bearer, "gossip", 1, moment) > 0:
            self._counts["over budget"] += 1
            self.blame(peer_id=bearer, ip=None, rule="flood", detail="more messages than a network of shares can have")
            return False
        if self._wasteful.get(bearer, -1e9) > moment:
            self._counts["over budget"] += 1
            return False
        try:
            shares = decode_gossip(message.payload)
        except PeerError as error:
            self.blame(peer_id=bearer, ip=None, rule=error.rule, detail=error.message)
            return False
        judgements = [self._judge_share(raw, message, now) for raw in shares]
        return all(judgement.relay for judgement in judgements)

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        """See ``TransportHandler``."""
        await self._pay(peer_id, "request", 1)
        kinds = (Status, Locate, GetShares, GetPeers) if protocol == SYNC else BLOCK_REQUESTS
        try:
            message = decode_message(request, *kinds)
            hashes = len(getattr(message, "hashes", ()))
            more = hashes * HEADER_COST if isinstance(message, GetHeaders) else hashes // 50
            await self._pay(peer_id, "request", COSTS.get(type(message), 0) + more)
            answer = await self._answer(peer_id, message)
        except PeerError as error:
            self.blame(peer_id=peer_id, ip=None, rule=error.rule, detail=error.message)
            raise
        raw = encode_message(answer)
        await self._pay(peer_id, "served", len(raw))
        return raw

    # -- answers -----------------------------------------------------------------------------------------------

    async def _answer(self, peer_id: str, message: Any) -> Message:
        match message:
            case Status():
                self._hear_status(peer_id, message)
                return self._status()
            case Locate():
                hashes = self._desk.chain.after_locator(message.locator, MAX_LOCATED)
                return await self._located(hashes)
            case GetShares():
                return Shares(shares=tuple(self._shares(message.hashes)))
            case GetPeers():
                ip = next((link.ip for link in self._transport.links if link.peer_id == peer_id), "")
                return Peers(addresses=self._book.offer(ip, self._choose))
            case _:
                return await self.blocks.answer(peer_id, message)

    async def _located(self, hashes: Sequence[bytes]) -> Located:
        identities: list[bytes] = []
        for number, share_hash in enumerate(hashes):
            if number % LOCATED_SLICE == LOCATED_SLICE - 1:
                await trio.lowlevel.checkpoint()
            raw = self._desk.encoded(share_hash)
            if raw is None:  # pruned or left behind by a reorg while we looked
                break
            identities.append(share_id(raw))
        return Located(hashes=tuple(hashes[: len(identities)]), identities=tuple(identities))

    def _shares(self, hashes: Sequence[bytes]) -> Iterator[bytes | None]:
        size = 0
        for share_hash in hashes:
            raw = self._desk.encoded(share_hash)
            size += 0 if raw is None else len(raw)
            if size > MAX_SHARES_SIZE:
                return
            yield raw

    def _status(self) -> Status:
        tip = self._desk.chain.tip
        block_hash, block_height = self._desk.bitcoin_tip()
        port = int(self._transport.addresses[0].split("/tcp/")[1].split("/")[0]) if self._transport.addresses else 0
        return Status(
            tip=NULL_HASH if tip is None else tip.hash,
            height=0 if tip is None else tip.height,
            total_work=0 if tip is None else tip.total_work,
            listen_port=port if self._listens else 0,
            block_hash=block_hash,
            block_height=block_height,
            software=self._software,
        )

    def _hear_status(self, peer_id: str, status: Status) -> None:
        known = self._desk.chain.entry(status.tip)
        if known is not None and (known.height, known.total_work) != (status.height, status.total_work):
            detail = f"says that share {status.tip[::-1].hex()} has another height or total work than it says itself"
            self.blame(peer_id=peer_id, ip=None, rule="claim", detail=detail)
            return
        if status.listen_port:
            self._book.listens(peer_id, status.listen_port, self._clock())
        self.sync.told(peer_id, status, trio.current_time())
        self._wake.set()

    async def _pay(self, peer_id: str, kind: str, amount: int) -> None:
        wait_s = self._book.spend(peer_id, kind, amount, trio.current_time())
        while wait_s > 0:  # slower, not refused: an honest peer that catches up asks for much
            self._counts["slowed down"] += 1
            await trio.sleep(wait_s)
            wait_s = self._book.spend(peer_id, kind, amount, trio.current_time())

    # -- gossip ------------------------------------------------------------------------------------------------

    def _judge_share(self, raw: bytes, message: Gossip, now: float) -> Judgement:
        desk, bearer = self._desk, message.bearer
        judgement = self._judge.take(
            raw,
            is_author=bearer == message.author,
            is_synced=self._ready,
            chain=desk.chain,
            accept=desk.accept,
            now=now,
        )
        if judgement.rule is not None:
            self._counts["invalid"] += 1
            if judgement.guilty:
                self.blame(peer_id=bearer, ip=None, rule=judgement.rule, detail=judgement.detail)
            else:
                # Never held against it, but what it brings is left to the sync protocol while it brings too much.
                moment = trio.current_time()
                self._wasteful[bearer] = moment + self._book.spend(bearer, "wasted", 1, moment)
                logger.debug("peer %s relayed what breaks %s: %s", bearer, judgement.rule, judgement.detail)
        else:
            self._counts[judgement.dropped or ("waiting" if judgement.missing else "joined")] += 1
        if judgement.missing:
            self.sync.orphaned(bearer, judgement.missing, trio.current_time(), asked=False)
            self._wake.set()
        return judgement

    async def _publish(self) -> None:
        async for payload in self._publish_out:
            await self._transport.publish(payload)

    # -- tasks -------------------------------------------------------------------------------------------------

    async def _call_peers(self, nursery: trio.Nursery) -> None:
        while True:
            for address in self._book.next_calls(self._clock(), self._choose):
                self._book.calling(address, self._clock())
                nursery.start_soon(self._call, address)
            await trio.sleep(2 * TICK_S)

    async def _call(self, address: str) -> None:
        try:
            peer_id = await self._transport.connect(address)
        except PeerError as error:
            level = logging.INFO if error.rule == "refused" else logging.DEBUG  # it is there, but not one of us
            logger.log(level, "%s: %s", address, error)
            self._book.failed(address, self._clock())
        else:
            self._book.called(address, peer_id, self._clock())

    async def _leave(self, nursery: trio.Nursery) -> None:
        async for peer_id in self._leave_out:
            nursery.start_soon(self._transport.disconnect, peer_id)

    async def _ask_peers(self, nursery: trio.Nursery) -> None:
        while True:
            now = trio.current_time()
            for ask in self.sync.asks(self._desk.chain, now):
                nursery.start_soon(self._ask, ask)
            for link in self._transport.links:
                if now - self._asked_peers_at.get(link.peer_id, -1e9) >= PEERS_INTERVAL_S:
                    self._asked_peers_at[link.peer_id] = now
                    nursery.start_soon(self._ask_for_peers, link)
            for lead in self.sync.unkept:
                self.blame(peer_id=lead, ip=None, rule="unkept", detail="its chain does not lead to the tip it claims")
            self.sync.unkept.clear()
            for forger in self.sync.forgers:
                self.blame(peer_id=forger, ip=None, rule="R10", detail="gave a forged body under a real header")
            self.sync.forgers.clear()
            self._look_ready()
            self._show_progress(now)
            with trio.move_on_after(TICK_S):
                await self._wake.wait()
            self._wake = trio.Event()

    async def _ask(self, ask: Ask) -> None:
        try:
            if ask.kind == "status":
                status = await self._request(ask.peer, SYNC, self._status(), Status)
                self.sync.answered(ask)
                self._hear_status(ask.peer, status)
            elif ask.kind == "locate":
                located = await self._request(ask.peer, SYNC, Locate(locator=ask.hashes), Located)
                if len(located.identities) != len(located.hashes):
                    raise PeerError("message", "as many identities as hashes are needed")
                self.sync.located(ask, located.hashes, located.identities, self._desk.chain)
            else:
                answer = await self._request(ask.peer, SYNC, GetShares(hashes=ask.hashes), Shares)
                if len(answer.shares) > len(ask.hashes):
                    raise PeerError("unasked", f"{len(answer.shares)} shares for {len(ask.hashes)} hashes")
                for raw in self.sync.fetched(ask, answer.shares, trio.current_time()):
                    self._take_stray(ask, raw)
        except PeerError as error:
            logger.debug("peer %s: no answer to %s: %s", ask.peer, ask.kind, error)
            if error.rule not in NO_FAULTS:
                self.blame(peer_id=ask.peer, ip=None, rule=error.rule, detail=error.message)
            self.sync.failed(ask, trio.current_time())
            # Who called and does not speak the sync protocol may listen to gossip all the same.
            inbound = any(link.inbound for link in self._transport.links if link.peer_id == ask.peer)
            if not (inbound and error.rule == "stream") and self.sync.failures(ask.peer) >= MAX_FAILURES:
                logger.info("peer %s does not answer: left", ask.peer)
                await self._transport.disconnect(ask.peer)
        self._intake.poke()
        self._wake.set()

    async def _request(self, peer_id: str, protocol: str, message: Message, kind: type[Any]) -> Any:
        raw = await self._transport.request(peer_id, protocol, encode_message(message), REQUEST_TIMEOUT_S)
        return decode_message(raw, kind)

    def _take_stray(self, ask: Ask, raw: bytes) -> None:
        """A share that was asked for by its hash. Raises: PeerError."""
        try:
            share = decode_share(raw)
            if share.hash not in ask.hashes:
                raise PeerError("unasked", f"share {share.hash[::-1].hex()} was not asked for")
            outcome = self._desk.accept(share)
        except DecodeError as error:
            raise PeerError("R1", str(error)) from None
        except InvalidShare as error:
            raise PeerError(error.rule, str(error)) from None
        missing = getattr(outcome, "missing", ())
        if missing:
            self.sync.orphaned(ask.peer, missing, trio.current_time(), asked=True)

    async def _ask_for_peers(self, link: Link) -> None:
        try:
            answer = await self._request(link.peer_id, SYNC, GetPeers(), Peers)
        except PeerError as error:
            logger.debug("peer %s tells no addresses: %s", link.peer_id, error)
            if error.rule not in NO_FAULTS:
                self.blame(peer_id=link.peer_id, ip=None, rule=error.rule, detail=error.message)
        else:
            broken = self._book.heard(answer.addresses, link.ip, self._clock())
            if broken:
                self.blame(peer_id=link.peer_id, ip=None, rule="address", detail=f"{broken} addresses that are none")

    def _look_ready(self) -> None:
        if not self._ready and self.sync.is_ready(self._desk.chain, trio.current_time()):
            self._ready = True
            logger.info("%s: miners are served", self.sync.why_ready)
            self._desk.ready()

    def _show_progress(self, now: float) -> None:
        download = self.sync.download
        if download is None or now - self._progress_at < PROGRESS_INTERVAL_S or now - download.started_at < 1:
            return
        self._progress_at = now
        seconds = max(now - download.started_at, 1e-3)
        height = self._intake.height(download)
        logger.info(
            "syncing: height %d of %d, %d shares at %.0f shares/s", height, download.status.height, download.taken,
            download.taken / seconds,
        )  # fmt: skip

    async def _keep_peers(self) -> None:
        while True:
            await trio.sleep(SAVE_INTERVAL_S)
            self._save_peers()

    def _save_peers(self) -> None:
        if self._save is None:
            return
        try:
            self._save(self._book.encode())
        except OSError as error:
            self._counts["peers not saved"] += 1
            if self._counts["peers not saved"] == 1:
                logger.error("what is known of other nodes cannot be saved: %s", error)

    def _say(self, text: str, *details: object) -> None:
        """Log who comes and goes, as long as these are few."""
        moment = trio.current_time()
        if moment - self._said[0] >= 60:
            self._said = (moment, 0)
        self._said = (self._said[0], self._said[1] + 1)
        logger.log(logging.INFO if self._said[1] <= MAX_SAID else logging.DEBUG, text, *details)
