"""The transport over libp2p: connections, requests on kept streams, one topic of gossip.

Theory of operation. ``run`` puts a hardened host together and serves it. The swarm tells of connections; all
connections to one peer are one ``_Peer``, which the handler is asked about when the first is there and told about when
the last is gone. A request takes the one stream kept for its protocol, writes a frame and reads a frame; whatever goes
wrong resets the stream, and the next request opens another. A stream that a peer opens is served in a loop of the same
shape, with a deadline for each step.

Faults of a peer end its stream or its connection. Faults of our own code below a stream are logged with their traceback
and end that stream; the rest of the node never sees an exception of libp2p.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import trio
from libp2p.abc import INetConn, INetStream, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from p2pool.errors import ConfigError, PeerError
from p2pool.p2p import BLOCK, SYNC, Gossip, Link, Traffic, TransportHandler
from p2pool.p2p.addresses import parse_address
from p2pool.p2p.frames import FrameStream, Room
from p2pool.p2p.hardening import HardenedHost, Limits, identity_of, open_host, run_host
from p2pool.p2p.identity import load_identity
from p2pool.p2p.lan import follow_lan
from p2pool.p2p.wire import MAX_FRAME, MAX_GOSSIP

__all__ = ["Deadlines", "Libp2pTransport", "Limits", "load_identity"]

logger = logging.getLogger("p2pool.p2p")

#: For a call to end in a connection, all its addresses together.
CONNECT_DEADLINE_S: Final = 15.0
#: For a stream to be closed or reset: longer, and nothing moves on the whole connection.
END_DEADLINE_S: Final = 2.0
#: For a stream of ours to be used again: half of what others leave it open, so that no request meets its end.
KEEP_S: Final = 30.0
#: For all connections to be closed at the end.
CLOSE_DEADLINE_S: Final = 2.0
#: Streams that one peer may hold open, by protocol. An honest one needs one, and two while it replaces it.
MAX_STREAMS: Final = {SYNC: 4, BLOCK: 2}
#: Bytes of requests that are not whole yet, of all peers together: those of block/1 have megabytes.
MAX_COMING_BYTES: Final = 64 * 1024 * 1024
#: Between two looks at which network interfaces there are.
LOOK_AROUND_S: Final = 60.0
#: Addresses tried of one name.
MAX_ADDRESSES: Final = 4

#: What comes out of libp2p when a connection or a stream is not there any more, at whichever layer it is noticed.
_BROKEN: Final = (
    BaseLibp2pError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds for each step of serving a stream that a peer has opened."""

    #: Between two requests; then the stream is reset, and the peer opens another when it needs one.
    idle_s: float = 60.0
    #: From the first byte of a request to its last.
    request_s: float = 20.0
    #: For an answer to be found. A peer that asks and goes away must not hold its streams here for good.
    serve_s: float = 60.0
    #: For an answer to be taken.
    answer_s: float = 30.0


class Libp2pTransport:
    """``Transport`` over py-libp2p: TCP, Noise, Yamux, gossipsub.

    Mutable state: ``_handler`` and ``_hardened`` are set while ``run`` runs. ``_peers`` are the connected peers that
    the handler took, by id; each has at least one connection. ``_refused`` are connections that the handler did not
    take and that are not yet gone. ``_dials`` keeps two calls to one peer from overlapping. ``_parted`` is set, and
    replaced, when a connection is gone. ``_addresses`` are where we listen, looked up now and then. ``_room`` is where
    requests come in.
    """

    def __init__(
        self,
        *,
        seed: bytes,
        network_id: bytes,
        listen_host: str,
        listen_port: int,
        max_connections: int,
        mdns: bool = False,
        found: Callable[[str], None] | None = None,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            seed: 32 secret bytes, our identity; see ``load_identity``.
            network_id: of the sharechain. Nodes with another one speak other protocols.
            listen_host: an IP address; "0.0.0.0" and "::" stand for all.
            listen_port: 0 lets the system choose.
            max_connections: of both directions together.
            mdns: look for nodes on the local network, and be found there.
            found: called with each address found.
            deadlines: for peers that are served.
            limits: what a peer may cost, and how soon one that is frozen is noticed.
        """
        self._seed = seed
        self._peer_id = identity_of(seed)
        prefix = f"/p2pool/{network_id.hex()}"
        self._protocols = {SYNC: TProtocol(f"{prefix}/{SYNC}"), BLOCK: TProtocol(f"{prefix}/{BLOCK}")}
        self._topic = f"{prefix}/shares/1"
        self._network_id = network_id
        self._listen = _listen_address(listen_host, listen_port)
        self._max_connections = max_connections
        self._mdns = mdns
        self._found = found
        self._deadlines = deadlines or Deadlines()
        self._limits = limits
        self._handler: TransportHandler | None = None
        self._hardened: HardenedHost | None = None
        self._peers: dict[str, _Peer] = {}
        self._refused: set[INetConn] = set()
        self._dials: dict[str, trio.Lock] = {}
        self._parted = trio.Event()
        self._addresses: tuple[str, ...] = ()
        self._room = Room(MAX_COMING_BYTES)

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(peer.link for peer in self._peers.values())

    @property
    def traffic(self) -> Traffic:
        return Traffic(received=0, sent=0) if self._hardened is None else self._hardened.traffic

    async def run(
        self, handler: TransportHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        hardened = open_host(
            seed=self._seed,
            listen=[self._listen],
            max_connections=self._max_connections,
            may_enter=handler.may_enter,
            blame=handler.blame,
            topics=[self._topic],
            limits=self._limits,
        )
        self._handler = handler
        hardened.swarm.register_notifee(_Notifee(self))
        for protocol in self._protocols:
            hardened.host.set_stream_handler(self._protocols[protocol], self._stream_handler(protocol))
        hardened.pubsub.set_topic_validator(self._topic, self._on_gossip, is_async_validator=False)
        hosting = trio.CancelScope()
        try:
            async with trio.open_nursery() as nursery:
                self._hardened = hardened
                await nursery.start(_host, hardened, hosting)
                hosting.shield = True
                try:
                    self._addresses = tuple(_expand(hardened.addresses))
                    nursery.start_soon(self._look_around, hardened)
                    nursery.start_soon(_discard, await hardened.pubsub.subscribe(self._topic))
                    if self._mdns:
                        nursery.start_soon(self._follow_lan)
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    await self._close(hardened)
                    hosting.cancel()
        except BaseExceptionGroup as group:
            configuration = group.subgroup(ConfigError)
            if configuration is None:
                raise
            raise _first(configuration) from None
        finally:
            for peer in list(self._peers.values()):
                self._forget(peer)
            self._hardened = self._handler = None
            self._addresses = ()

    async def _close(self, hardened: HardenedHost) -> None:
        """Close while the tasks of the host still run: cancelled in the midst, they would leave connections open."""
        with trio.move_on_after(CLOSE_DEADLINE_S, shield=True):
            for connection in hardened.swarm.get_connections():
                hardened.drop(str(connection.muxed_conn.peer_id))
            while hardened.swarm.get_connections():
                await self._parted.wait()
            await hardened.host.close()

    async def connect(self, address: str) -> str:
        try:
            place = parse_address(address)
            peer_id = str(ID.from_base58(place.peer_id))
        except (ValueError, BaseLibp2pError) as error:
            raise PeerError("unreachable", str(error)) from None
        if peer_id == self._peer_id:
            raise PeerError("self", "this is our own address")
        lock = self._dials.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if peer_id not in self._peers:
                    with trio.move_on_after(CONNECT_DEADLINE_S) as scope:
                        await self._dial(place.host, place.port, peer_id)
                    if scope.cancelled_caught:
                        self._drop(peer_id)
                        raise PeerError("unreachable", f"{address}: no answer in {CONNECT_DEADLINE_S:g} s")
        finally:
            if not lock.locked():
                self._dials.pop(peer_id, None)
        return peer_id

    async def disconnect(self, peer_id: str) -> None:
        await trio.lowlevel.checkpoint()
        self._drop(peer_id)

    async def request(self, peer_id: str, protocol: str, request: bytes, timeout_s: float) -> bytes:
        peer = self._peers.get(peer_id)
        if peer is None:
            raise PeerError("gone", f"{peer_id} is not connected")
        async with peer.queues[protocol]:
            if peer.is_gone:
                raise PeerError("gone", f"{peer_id} was disconnected")
            scope = trio.CancelScope(deadline=trio.current_time() + timeout_s)
            peer.scopes.add(scope)
            try:
                with scope:
                    return await self._ask(peer, protocol, request)
            finally:
                peer.scopes.discard(scope)
        if peer.is_gone:
            raise PeerError("gone", f"{peer_id} was disconnected")
        raise PeerError("timeout", f"no answer in {timeout_s:g} s")

    async def publish(self, payload: bytes) -> None:
        if len(payload) > MAX_GOSSIP:
            raise ValueError(f"a message of the topic has at most {MAX_GOSSIP} bytes, got {len(payload)}")
        assert self._hardened is not None
        await self._hardened.pubsub.publish(self._topic, payload)

    # Connections

    async def _dial(self, host: str, port: int, peer_id: str) -> None:
        """Try the addresses of a host one by one; the library would try only one of them."""
        assert self._hardened is not None
        swarm, wanted = self._hardened.swarm, ID.from_base58(peer_id)
        swarm.unblock_peer(wanted)
        error: Exception | None = None
        for ip in await _resolve(host, port):
            kind = "ip6" if ":" in ip else "ip4"
            try:
                await swarm.dial_addr(Multiaddr(f"/{kind}/{ip}/tcp/{port}"), wanted)
            except _BROKEN as broken:
                error = broken
                continue
            peer = self._peers.get(peer_id)
            if peer is None:
                raise PeerError("refused", f"the connection to {ip} port {port} was not taken")
            await self._greet(peer)
            return
        if peer_id not in self._peers:  # It may have called us in the meantime.
            raise PeerError("unreachable", f"{host} port {port}: {_reason(error)}")

    async def _greet(self, peer: _Peer) -> None:
        """Open the stream that is needed first. A peer that refused us has closed the connection by now; one of another
        network, or no node at all, does not speak the protocol. The handler may ask already: then its stream is waited
        for, but not the answer.
        """
        async with peer.openings[SYNC]:
            if SYNC in peer.spoken:
                return
            try:
                peer.keep(SYNC, await self._open(peer, SYNC))
            except PeerError as error:
                self._drop(peer.link.peer_id)
                raise PeerError("refused", error.message) from None

    def _drop(self, peer_id: str) -> None:
        if self._hardened is not None:
            self._hardened.drop(peer_id)
        peer = self._peers.get(peer_id)
        for conn in list(peer.conns) if peer is not None else ():
            if conn.is_closed:
                self._on_disconnected(conn)  # The library's notice comes later, or is lost when it is interrupted.

    def _on_connected(self, conn: Any) -> None:
        """See a connection, from the swarm's notice or from the first stream on it, whichever comes first."""
        assert self._handler is not None
        assert self._hardened is not None
        peer_id = str(conn.muxed_conn.peer_id)
        peer = self._peers.get(peer_id)
        if peer is not None:
            if conn not in peer.conns and not conn.is_closed:
                peer.conns.append(conn)
            return
        if conn.is_closed or conn in self._refused:
            return
        ip, port, inbound = self._hardened.endpoint(conn)
        link = Link(peer_id=peer_id, ip=ip, port=port, inbound=inbound)
        is_taken = False
        if peer_id != self._peer_id:
            with _Session(peer_id):
                is_taken = self._handler.opened(link)
        if not is_taken:
            self._refused.add(conn)
            self._drop(peer_id)
            return
        self._peers[peer_id] = _Peer(link, conn)

    def _on_disconnected(self, conn: INetConn) -> None:
        self._refused.discard(conn)
        self._parted.set()
        self._parted = trio.Event()
        peer = self._peers.get(str(conn.muxed_conn.peer_id))
        if peer is not None and conn in peer.conns:
            peer.conns.remove(conn)
            if not peer.conns:
                self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        assert self._handler is not None
        del self._peers[peer.link.peer_id]
        peer.end()
        with _Session(peer.link.peer_id):
            self._handler.closed(peer.link.peer_id)

    async def _look_around(self, hardened: HardenedHost) -> None:
        """Interfaces come and go, and naming them takes too long to do it for each who asks."""
        while True:
            await trio.sleep(LOOK_AROUND_S)
            self._addresses = tuple(_expand(hardened.addresses))

    async def _follow_lan(self) -> None:
        await follow_lan(
            network_id=self._network_id,
            peer_id=self._peer_id,
            addresses=self.addresses,
            found=self._found or (lambda address: None),
        )

    # Requests of ours

    async def _ask(self, peer: _Peer, protocol: str, request: bytes) -> bytes:
        frames = peer.streams.pop(protocol, None)
        answer = None
        try:
            if frames is not None and (frames.is_ended or trio.current_time() - peer.used_at[protocol] > KEEP_S):
                await self._end(frames)
                frames = None
            if frames is None:
                async with peer.openings[protocol]:
                    frames = peer.streams.pop(protocol, None) or await self._open(peer, protocol)
            await frames.write(request)
            answer = await frames.read(MAX_FRAME[protocol][1])
            if answer is None:
                raise PeerError("gone", "the stream ended before the answer")
            if frames.has_more:
                answer = None
                raise PeerError("frame", "more than one answer to a request")
        except _BROKEN as error:
            raise PeerError("gone", f"the stream broke: {_reason(error)}") from None
        finally:
            if answer is not None and frames is not None:
                peer.keep(protocol, frames)
            elif frames is not None:
                await self._end(frames)
        return answer

    async def _open(self, peer: _Peer, protocol: str) -> FrameStream:
        assert self._hardened is not None
        try:
            stream = await self._hardened.new_stream(peer.link.peer_id, self._protocols[protocol])
        except PeerError as error:
            is_there = any(not conn.is_closed and not conn.muxed_conn.is_closed for conn in peer.conns)
            raise PeerError("stream" if is_there else "gone", error.message) from error.__cause__
        peer.spoken.add(protocol)
        return FrameStream(stream, peer.link.peer_id)

    async def _end(self, frames: FrameStream, *, gracefully: bool = False) -> None:
        """Close or reset a stream, also when the task is being cancelled: one that leaks holds its slot for good."""
        with trio.move_on_after(END_DEADLINE_S, shield=True) as scope, suppress(*_BROKEN):
            await (frames.stream.close() if gracefully else frames.stream.reset())
        if scope.cancelled_caught:
            self._drop(frames.peer_id)

    # Streams of peers

    def _stream_handler(self, protocol: str) -> Callable[[INetStream], Any]:
        async def serve(stream: INetStream) -> None:
            conn = getattr(stream, "swarm_conn", None)
            if conn is not None:
                self._on_connected(conn)
            frames = FrameStream(stream, str(stream.muxed_conn.peer_id))
            peer = self._peers.get(frames.peer_id)
            if peer is None or peer.inbound[protocol] >= MAX_STREAMS[protocol]:
                await self._end(frames)
                return
            peer.inbound[protocol] += 1
            is_whole = False
            try:
                with _Session(frames.peer_id):
                    is_whole = await self._serve(peer, protocol, frames)
            finally:
                peer.inbound[protocol] -= 1
                await self._end(frames, gracefully=is_whole)

        return serve

    async def _serve(self, peer: _Peer, protocol: str, frames: FrameStream) -> bool:
        """Answer the requests of a stream until it ends. Whether it ended as it should."""
        assert self._handler is not None
        while True:
            request = await self._next_request(peer, protocol, frames)
            if request is None:
                return frames.is_over
            answer = None
            with trio.move_on_after(self._deadlines.serve_s), suppress(PeerError):  # The handler has judged the peer.
                answer = await self._handler.serve(peer.link.peer_id, protocol, request)
            if answer is None or not await self._answer(peer, frames, answer):
                return False

    async def _next_request(self, peer: _Peer, protocol: str, frames: FrameStream) -> bytes | None:
        """None if there is none: the stream is over, or was idle, or the peer has been blamed."""
        try:
            with trio.move_on_after(self._deadlines.idle_s):
                await frames.wait()
            if frames.has_more:
                with trio.fail_after(self._deadlines.request_s) as scope:
                    return await self._room.read(frames, MAX_FRAME[protocol][0], scope)
        except trio.TooSlowError:  # Also if the room for requests is full, and this peer has most of it.
            self._blame(peer, "slow", "a request that was begun and not ended")
        except PeerError as error:
            self._blame(peer, error.rule, error.message)
        except _BROKEN:
            pass
        return None

    async def _answer(self, peer: _Peer, frames: FrameStream, answer: bytes) -> bool:
        try:
            with trio.fail_after(self._deadlines.answer_s):
                await frames.write(answer)
        except _BROKEN as error:
            if isinstance(error, trio.TooSlowError) or _is_window_timeout(error):
                self._blame(peer, "slow", "an answer is not read")
            return False
        return True

    def _blame(self, peer: _Peer, rule: str, detail: str) -> None:
        if self._handler is not None and not peer.is_gone:
            self._handler.blame(peer_id=peer.link.peer_id, ip=None, rule=rule, detail=detail)

    # Gossip

    def _on_gossip(self, forwarder: ID, message: Any) -> bool:
        bearer = str(forwarder)
        if bearer == self._peer_id:
            return True
        peer = self._peers.get(bearer)
        if peer is None or self._handler is None:
            return False
        if len(message.data) > MAX_GOSSIP:
            self._blame(peer, "frame", f"a message of the topic of {len(message.data)} bytes")
            return False
        author = str(ID(message.from_id))
        if author == self._peer_id:
            return False
        with _Session(bearer):
            return self._handler.gossip(Gossip(bearer=bearer, author=author, payload=message.data))
        return False


class _Peer:
    """A peer that was taken.

    Mutable state: ``conns`` are its connections, the latest last; none are left when ``is_gone``. ``streams`` are ours,
    one for each protocol, while no request is on it, and ``used_at`` tells when the last one was; ``queues`` keep
    requests in order. ``openings`` let one stream be opened at a time, and ``spoken`` are the protocols of which one
    could be. ``inbound`` counts its own streams. ``scopes`` are those of requests under way, cancelled when it
    is gone.
    """

    def __init__(self, link: Link, conn: INetConn) -> None:
        self.link = link
        self.conns = [conn]
        self.streams: dict[str, FrameStream] = {}
        self.used_at: dict[str, float] = {}
        self.queues: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self.openings: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self.spoken: set[str] = set()
        self.inbound: Counter[str] = Counter()
        self.is_gone = False
        self.scopes: set[trio.CancelScope] = set()

    def keep(self, protocol: str, frames: FrameStream) -> None:
        self.streams[protocol] = frames
        self.used_at[protocol] = trio.current_time()

    def end(self) -> None:
        self.is_gone = True
        self.conns.clear()
        for scope in self.scopes:
            scope.cancel()


class _Session(AbstractContextManager[None]):
    """Ends a peer's session at a fault of our own code: logged, not passed on to the library, which would stop."""

    def __init__(self, peer_id: str) -> None:
        self._peer_id = peer_id

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        logger.error("a fault while %s was served", self._peer_id, exc_info=error)
        return True


class _Notifee(INotifee):
    """The swarm's notices, passed on."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self._transport = transport

    async def connected(self, network: Any, conn: INetConn) -> None:
        self._transport._on_connected(conn)

    async def disconnected(self, network: Any, conn: INetConn) -> None:
        self._transport._on_disconnected(conn)

    async def opened_stream(self, network: Any, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: Any, stream: INetStream) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Multiaddr) -> None:
        pass


def _listen_address(host: str, port: int) -> str:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"--p2p-host: an IP address such as 0.0.0.0 is needed, got {host!r}") from None
    return f"/ip{ip.version}/{ip}/tcp/{port}"


def _expand(addresses: Iterable[str]) -> Iterable[str]:
    """Name each interface instead of "all"."""
    for address in addresses:
        transport, separator, peer_id = address.partition("/p2p/")
        if transport.startswith(("/ip4/0.0.0.0/", "/ip6/::/")):
            for expanded in expand_wildcard_address(Multiaddr(transport)):
                yield f"{expanded}{separator}{peer_id}"
        else:
            yield address


async def _resolve(host: str, port: int) -> list[str]:
    try:
        infos = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # The latter is IDNA's.
        raise PeerError("unreachable", f"{host}: {error}") from None
    return list(dict.fromkeys(str(info[4][0]) for info in infos))[:MAX_ADDRESSES]


def _reason(error: BaseException | None) -> str:
    """The innermost cause: the layers of the library wrap it in words of their own."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _is_window_timeout(error: BaseException) -> bool:
    """Whether the library gave up a write because the peer reads nothing."""
    return "window update" in str(error.__cause__ or error)


def _first(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigError)
    return error


async def _host(
    hardened: HardenedHost, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with scope:
        await run_host(hardened, task_status=task_status)


async def _discard(subscription: Any) -> None:
    """Empty the subscription: the validator has seen all of it, and a full one costs a warning for each message."""
    async for _ in subscription:
        pass
