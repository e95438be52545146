"""The pinned libp2p made fit for the internet: how a host is put together, and every repair of the library.

Theory of operation. Nothing of the library is patched in place but its logger; the repairs are subclasses that
`open_host` puts together, so that other users of libp2p in the process are left alone. From the wire upwards:

- `_Listener`, `_Socket`: who may enter, how long a handshake may take and how much it may send, writes that end.
- `_Yamux`, `_Frames`: each frame of the multiplexer is looked at before the library sees it.
- `_Swarm`, `_Host`: whatever a peer's bytes raise ends that peer's connection and is blamed on it (`_Containment`).
- `_Pubsub`, `_GossipSub`: what an RPC may hold; one message after the other; nothing is remembered for strangers.

Each class says what the stock library does, what an attacker gains by it, and which tests in
``tests/p2pool/test_hardening.py`` show the attack. When a later libp2p does better, that class can go.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import libp2p.network.connection.swarm_connection as swarm_connection
import trio
from google.protobuf.message import DecodeError
from libp2p.abc import (
    IHost,
    IListener,
    IMultiselectCommunicator,
    INetConn,
    INetStream,
    IRawConnection,
    ISecureConn,
)
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import THandler, TProtocol
from libp2p.exceptions import BaseLibp2pError, ValidationError
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, IOException, MessageTooLarge
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError
from libp2p.stream_muxer.yamux import yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr

from p2pool.errors import ConfigError, PeerError
from p2pool.p2p import Traffic

__all__ = [
    "LIBRARY_VERSION",
    "Blame",
    "HardenedHost",
    "Limits",
    "check_library",
    "identity_of",
    "open_host",
    "run_host",
]

#: The one version that the repairs fit: they override private methods.
LIBRARY_VERSION: Final = "0.8.1"

#: Seconds that the library may take to end, when all sockets are closed already.
CLOSE_S: Final = 2.0
#: Addresses of which it is remembered how often they called lately.
MAX_CALLERS: Final = 4_096
#: Bytes that one read of a socket asks for.
READ_SIZE: Final = 64 * 1024
#: Bytes of one Noise message behind its length: no layer above the socket has reason to ask for more at once.
MAX_NOISE_SIZE: Final = 2**16 - 1
#: Bytes that a receive window grows to, of one stream of a connection: 10 MB/s at a round trip of 100 ms.
LARGEST_WINDOW: Final = 1024 * 1024
#: Bytes of the name of a topic, an id of a message, a sequence number.
MAX_TOPIC_SIZE: Final = 256
MAX_MESSAGE_ID_SIZE: Final = 128
MAX_SEQNO_SIZE: Final = 8
#: A peer id that holds an ed25519 key: identity multihash of 36 bytes, of the protobuf of a key of type 1, 32 bytes.
ED25519_ID_PREFIX: Final = bytes.fromhex("002408011220")
ED25519_ID_SIZE: Final = len(ED25519_ID_PREFIX) + 32

logger = logging.getLogger("p2pool.p2p")


class Blame(Protocol):
    """Told of every attack that the hardening notices, in one synchronous stretch.

    Rules: "handshake" (before there is a peer id), "negotiation" (of a stream's protocol), "yamux", "streams" (too
    many), "pubsub", and "fault": something that the peer sent raised an exception that nobody expected.
    """

    def __call__(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one peer, and all together, may cost. Honest nodes stay far below."""

    #: Seconds for TCP to become a multiplexed, encrypted connection, either direction; and bytes it may take.
    handshake_s: float = 10.0
    handshake_bytes: int = 8 * 1024
    #: Inbound connections whose handshake is not done: of all, of one IP. The oldest goes when one more comes.
    half_open: int = 64
    half_open_per_ip: int = 4
    #: Inbound handshakes per second (and in a burst), of all and of one IP: each costs some 20 ms of CPU.
    handshakes_per_s: float = 8.0
    handshakes_burst: int = 128
    handshakes_per_s_per_ip: float = 2.0
    handshakes_burst_per_ip: int = 64
    #: Seconds for a peer to take what is written to it, and to answer a ping; and between pings.
    write_s: float = 30.0
    pong_s: float = 20.0
    ping_every_s: float = 20.0
    #: Inbound streams of a connection: at a time, of one protocol at a time, new ones per second (and in a burst).
    streams: int = 128
    streams_per_protocol: int = 4
    streams_per_s: float = 16.0
    streams_burst: int = 128
    #: Seconds and bytes for the two sides of a stream to agree on its protocol.
    negotiation_s: int = 10
    negotiation_bytes: int = 1024
    #: Multiplexer: bytes received and not yet read of all streams of a connection; frames per second (and in a burst).
    unread_bytes: int = 4 * 1024 * 1024
    frames_per_s: float = 4_000.0
    frames_burst: int = 40_000
    #: Pings of a connection per second (and in a burst): each is answered, and a library sends one in 20 s or so.
    pings_per_s: float = 1.0
    pings_burst: int = 30
    #: One RPC of pubsub: bytes; messages; subscriptions; control entries; ids in IHAVE or IWANT that are looked at.
    rpc_bytes: int = 1024 * 1024
    rpc_messages: int = 64
    rpc_subscriptions: int = 64
    rpc_controls: int = 64
    rpc_ids: int = 256
    #: Changes of subscriptions of a peer per second (and in a burst); topics of a peer that are remembered.
    subscriptions_per_s: float = 1.0
    subscriptions_burst: int = 128
    subscriptions: int = 16
    #: Messages sent to a peer because it asked with IWANT, per second (and in a burst).
    wanted_per_s: float = 64.0
    wanted_burst: int = 256


def check_library() -> None:
    """The repairs fit one version of libp2p; any other is refused.

    Raises:
        ConfigError: another version is installed, or none.
    """
    try:
        found = version("libp2p")
    except PackageNotFoundError:
        found = "none"
    if found != LIBRARY_VERSION:
        raise ConfigError(
            f"The Python package libp2p must be of version {LIBRARY_VERSION}, found {found}. "
            f"Install it with: python -m pip install libp2p=={LIBRARY_VERSION}"
        )


def identity_of(seed: bytes) -> str:
    """The peer id of an ed25519 key, base58.

    Arguments:
        seed: the 32 secret bytes.
    """
    return str(ID.from_pubkey(create_new_key_pair(seed).public_key))


class _Bucket:
    """A rate with a burst. `_level` is what may be taken at the time `_at`."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._level: float = burst
        self._at = trio.current_time()

    def take(self) -> bool:
        """Take one; whether there was one."""
        now = trio.current_time()
        self._level = min(self._burst, self._level + (now - self._at) * self._per_s)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class _Guard:
    """What all parts of one host share. `sockets` are the open ones; `received` and `sent` only grow."""

    def __init__(self, limits: Limits, may_enter: Callable[[str], bool], blame: Blame) -> None:
        self.limits = limits
        self.may_enter = may_enter
        self.blame = blame
        self.sockets: set[_Socket] = set()
        self.rations = _Rations(limits)
        self.received = 0
        self.sent = 0


class _Containment:
    """Whatever is raised inside ends this connection, and nothing else.

    The stock library runs the handlers of streams, the multiplexer and pubsub in the nursery of the whole swarm: any
    exception that a peer's bytes provoke, or an application's handler lets through, ends the node. Shown by all tests
    named ``..._costs_the_attacker_its_connection``.

    A connection or stream that broke is nobody's fault and passes silently. ``PeerError`` is blamed by its rule,
    anything else as "fault". Cancellation passes through.
    """

    def __init__(self, guard: _Guard, tcp: _Socket, rule: str = "fault") -> None:
        self._guard = guard
        self._tcp = tcp
        self._rule = rule

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return True
        if isinstance(error, BaseExceptionGroup):
            faults, rest = error.split(Exception)
            if faults is not None:
                for fault in _leaves(faults):
                    self._judge(fault)
            if rest is not None:
                raise rest
            return True
        if not isinstance(error, Exception):
            return False
        self._judge(error)
        return True

    def _judge(self, error: Exception) -> None:
        if _is_hangup(error):
            return
        rule = error.rule if isinstance(error, PeerError) else self._rule
        detail = error.message if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"[:200]
        logger.debug("%s %s: %s: %s", self._tcp.peer_id, self._tcp.ip, rule, detail, exc_info=error)
        self._tcp.blame(rule, detail)


class _Translation:
    """Whatever a call into the library raises becomes one kind of error: what comes back is the peer's to choose."""

    def __init__(self, make: Callable[[str], Exception], what: str) -> None:
        self._make = make
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            cause = error.__cause__ or error
            raise self._make(f"{self._what}: {type(cause).__name__}: {cause}") from error


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _is_hangup(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, only says that the other end is gone, slow or closed."""
    while error is not None:
        if isinstance(error, MessageTooLarge | PeerError):
            return False
        if isinstance(error, IOException | trio.BrokenResourceError | trio.ClosedResourceError | OSError | EOFError):
            return True
        if isinstance(error, MuxedStreamError | MuxedConnError | SwarmException):
            return True
        error = error.__cause__
    return False


class _Socket(ReadWriteCloser):
    """One TCP connection, in place of the library's ``TrioTCPStream``.

    Stock: a read may ask for as many bytes as the peer says (a 2 GB buffer for five bytes of a peer that is not even
    authenticated); a write waits for ever for a peer that does not read, and holds the multiplexer's lock so long; a
    write that is cancelled halfway, or before its turn, breaks the encryption of an honest connection; the address of
    an IPv6 peer is unknown. Here: reads are bounded, of the handshake also in sum; reads return exactly what was asked
    (the library gives up on a Noise message that arrives in more than 101 pieces); writes are shielded, and end.
    Shown by ``test_garbage_...``, ``test_an_endless_handshake_...``, ``test_a_peer_that_does_not_read_...``,
    ``test_a_cancelled_write_...``.

    Mutable: `_unread`; `peer_id` and `is_handshake` change once, when the handshake is done; `_is_open`.
    """

    def __init__(self, stream: trio.SocketStream, guard: _Guard, *, inbound: bool) -> None:
        self._stream = stream
        self._guard = guard
        self._unread = bytearray()
        self._reading = trio.Lock()
        self._writing = trio.Lock()
        self._budget = guard.limits.handshake_bytes
        self._is_open = True
        self.is_handshake = True
        self.inbound = inbound
        self.peer_id: str | None = None
        address = stream.socket.getpeername()
        self.ip: str = _plain_ip(address[0])
        self.port: int = address[1]
        guard.sockets.add(self)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def read(self, n: int | None = None) -> bytes:
        """Exactly that many bytes, or fewer at the end; without a number, whatever there is."""
        async with self._reading:
            if n is not None and n > MAX_NOISE_SIZE:
                raise PeerError("handshake", f"announces {n} bytes, at most {MAX_NOISE_SIZE} are allowed")
            wanted = 1 if n is None else n
            while len(self._unread) < wanted:
                try:
                    data = await self._stream.receive_some(READ_SIZE)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise ConnectionClosedError(f"connection broke: {error}", transport="tcp") from error
                if not data:
                    break
                self._guard.received += len(data)
                self._unread += data
            size = len(self._unread) if n is None else n
            taken = bytes(self._unread[:size])
            del self._unread[:size]
            if self.is_handshake:
                self._budget -= len(taken)
                if self._budget < 0:
                    limit = self._guard.limits.handshake_bytes
                    raise PeerError("handshake", f"sent more than {limit} bytes before the handshake was done")
            return taken

    async def write(self, data: bytes) -> None:
        # Whoever calls has encrypted already: if the bytes do not go out, whole and in order, the connection is dead.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._guard.limits.write_s) as scope:
            async with self._writing:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise ConnectionClosedError(f"connection broke: {error}", transport="tcp") from error
                self._guard.sent += len(data)
        if scope.cancelled_caught:
            self.abort()
            raise ConnectionClosedError("the peer does not read", transport="tcp")

    async def close(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Close at once, without a farewell; whoever reads or writes learns of it."""
        self._is_open = False
        self._guard.sockets.discard(self)
        self._stream.socket.close()

    def blame(self, rule: str, detail: str) -> None:
        """End the connection for a reason that is the peer's fault. Told once: what follows is a consequence."""
        if self._is_open:
            self.abort()
            self._guard.blame(peer_id=self.peer_id, ip=self.ip, rule=rule, detail=detail)

    def get_remote_address(self) -> tuple[str, int]:
        return self.ip, self.port


def _plain_ip(ip: str) -> str:
    """An IPv4 address as such, also when it reached an IPv6 socket; without the zone of a link-local one."""
    return ip.removeprefix("::ffff:") if "." in ip else ip.partition("%")[0]


class _HalfOpen:
    """Inbound connections whose handshake is not done, and their number.

    Stock: any number, each for the whole deadline; 300 idle sockets keep everybody out. Here each IP has a few and
    all together some dozen; one more and the oldest goes: an attacker turns itself out first.
    Shown by ``test_half_open_...``.

    Mutable: `_scopes`, oldest first, of those whose handshake is running; cancelled and forgotten together.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scopes: dict[_Socket, trio.CancelScope] = {}

    @contextmanager
    def admit(self, tcp: _Socket) -> Iterator[None]:
        of_ip = [other for other in self._scopes if other.ip == tcp.ip]
        if len(of_ip) >= self._limits.half_open_per_ip:
            self._evict(of_ip[0])
        elif len(self._scopes) >= self._limits.half_open:
            self._evict(next(iter(self._scopes)))
        with trio.CancelScope() as scope:
            self._scopes[tcp] = scope
            try:
                yield
            finally:
                self._scopes.pop(tcp, None)
        if scope.cancelled_caught:
            raise SwarmException("turned out for a newer connection")

    def _evict(self, tcp: _Socket) -> None:
        self._scopes.pop(tcp).cancel()
        tcp.abort()


class _Rations:
    """How many handshakes may begin.

    Stock: any number, so that one machine that calls with ever new ids takes a whole core.
    Shown by ``test_handshakes_are_rationed_and_who_is_connected_is_served``.

    Mutable: `_all`, and `_by_ip`, the latest callers last.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all: _Bucket | None = None
        self._by_ip: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, ip: str) -> bool:
        """Whether one more may begin. What an address has too many of is not taken from all others."""
        limits = self._limits
        if self._all is None:  # not before there is a clock
            self._all = _Bucket(limits.handshakes_per_s, limits.handshakes_burst)
        of_ip = self._by_ip.pop(ip, None) or _Bucket(limits.handshakes_per_s_per_ip, limits.handshakes_burst_per_ip)
        self._by_ip[ip] = of_ip
        if len(self._by_ip) > MAX_CALLERS:
            self._by_ip.popitem(last=False)
        return of_ip.take() and self._all.take()


class _Listener(IListener):
    """Serves one address.

    Stock: the port is bound with SO_REUSEPORT, so that a second node starts without an error and takes half of the
    connections, and a port that cannot be bound is only logged; accepted sockets are handed on without asking anybody.
    Here the port is ours alone, and ``may_enter`` is asked before a byte is read.
    Shown by ``test_a_port_in_use_...`` and ``test_who_may_not_enter_...``.
    """

    #: Set by the swarm before `listen`.
    background_nursery: trio.Nursery

    def __init__(self, handler: THandler, tcp: _Tcp, guard: _Guard) -> None:
        self._handler = handler
        self._tcp = tcp
        self._guard = guard
        self._listeners: list[trio.SocketListener] = []

    async def listen(self, maddr: Multiaddr) -> None:
        self._listeners = self._tcp.bound[str(maddr)]
        self.background_nursery.start_soon(trio.serve_listeners, self._enter, self._listeners)

    async def _enter(self, stream: trio.SocketStream) -> None:
        try:
            tcp = _Socket(stream, self._guard, inbound=True)
        except OSError:
            return  # Gone before it was looked at.
        if self._guard.may_enter(tcp.ip) and self._guard.rations.take(tcp.ip):
            await self._handler(tcp)
        tcp.abort()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        names = [listener.socket.getsockname() for listener in self._listeners]
        return tuple(_multiaddr(name[0], name[1]) for name in names)

    async def close(self) -> None:
        self._tcp.unbind()
        await trio.lowlevel.checkpoint()


class _Tcp(TCP):
    """TCP with our sockets and listeners. Mutable: `bound`, the listening sockets by address, from `bind` on."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self._guard = guard
        self.bound: dict[str, list[trio.SocketListener]] = {}

    async def bind(self, addresses: Iterable[Multiaddr]) -> None:
        try:
            for address in addresses:
                host, port = _host_and_port(address)
                self.bound[str(address)] = await trio.open_tcp_listeners(port, host=host)
        except (OSError, OpenConnectionError) as error:
            self.unbind()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigError(f"--p2p-host, --p2p-port: cannot listen on {address}: {reason}") from error

    def unbind(self) -> None:
        for listeners in self.bound.values():
            for listener in listeners:
                listener.socket.close()
        self.bound = {}

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> IRawConnection:
        host, port = _host_and_port(maddr)
        try:
            stream = await trio.open_tcp_stream(host, port)
            return RawConnection(_Socket(stream, self._guard, inbound=False), True)
        except OSError as error:
            raise OpenConnectionError(f"{maddr}: {error}") from error

    # The library's own classes are narrower than its interfaces say; so are the four more ignored types below.
    def create_listener(self, handler_function: THandler) -> IListener:  # type: ignore[override]
        return _Listener(handler_function, self, self._guard)


def _host_and_port(address: Multiaddr) -> tuple[str, int]:
    values = {part.name: value for part, value in address.items()}
    host, port = values.get("ip4") or values.get("ip6"), values.get("tcp")
    if host is None or port is None:
        raise OpenConnectionError(f"{address} has no IP or no TCP port")
    return str(host), int(port)


def _multiaddr(ip: str, port: int) -> Multiaddr:
    return Multiaddr(f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}")


class _Frames(ISecureConn):
    """What a connection's multiplexer reads from, with each frame looked at before the library acts on it.

    Stock: the receive window is not enforced (328 MB went into one of 256 kB); any number of streams can be opened,
    also under ids that are ours to give; frames without data cost the sender 12 bytes and us a round through the
    event loop. Shown by ``test_yamux_...`` and ``test_more_streams_...``.

    Mutable: `_body`, the bytes of data that follow before the next header.
    """

    def __init__(self, session: ISecureConn, muxer: _Yamux, guard: _Guard) -> None:
        self._session = session
        self._muxer = muxer
        self._limits = guard.limits
        self._body = 0
        self._frames = _Bucket(guard.limits.frames_per_s, guard.limits.frames_burst)
        self._streams = _Bucket(guard.limits.streams_per_s, guard.limits.streams_burst)
        self._pings = _Bucket(guard.limits.pings_per_s, guard.limits.pings_burst)
        self.is_initiator = session.is_initiator

    async def read(self, n: int | None = None) -> bytes:
        data = await self._session.read(n)
        if self._body:
            self._body -= len(data)
        elif len(data) == yamux.HEADER_SIZE:
            try:
                self._check(data)
            except PeerError as error:
                self._muxer.tcp.blame(error.rule, error.message)
                raise ConnectionClosedError(str(error)) from error
        return data

    def _check(self, header: bytes) -> None:
        frame_version, kind, flags, stream_id, length = struct.unpack(yamux.YAMUX_HEADER_FORMAT, header)
        if frame_version != 0 or kind > yamux.TYPE_GO_AWAY:
            raise PeerError("yamux", f"frame of version {frame_version}, type {kind}")
        if not self._frames.take():
            raise PeerError("yamux", f"more than {self._limits.frames_per_s:.0f} frames a second")
        if kind == yamux.TYPE_PING and flags & yamux.FLAG_SYN and not self._pings.take():
            raise PeerError("yamux", f"more than {self._limits.pings_per_s:.0f} pings a second")
        if kind not in (yamux.TYPE_DATA, yamux.TYPE_WINDOW_UPDATE):
            return
        muxer = self._muxer
        stream = muxer.streams.get(stream_id)
        if flags & yamux.FLAG_SYN:
            self._check_new(stream_id)
        if kind == yamux.TYPE_DATA:
            window = yamux.DEFAULT_WINDOW_SIZE if flags & yamux.FLAG_SYN else 2 * yamux.DEFAULT_WINDOW_SIZE
            if stream is not None:
                window = stream.recv_window
            if length > window:
                raise PeerError("yamux", f"frame of {length} bytes in a receive window of {window}")
            if length + sum(map(len, muxer.stream_buffers.values())) > self._limits.unread_bytes:
                raise PeerError("yamux", f"more than {self._limits.unread_bytes} bytes unread in all streams")
            self._body = length

    def _check_new(self, stream_id: int) -> None:
        # The initiator of the connection gives odd ids, the other side even ones.
        if stream_id == 0 or stream_id % 2 == self._muxer.is_initiator_value:
            raise PeerError("yamux", f"opens stream {stream_id}, an id that is not its to give")
        open_streams = sum(not stream.is_initiator for stream in self._muxer.streams.values())
        if open_streams >= self._limits.streams:
            raise PeerError("streams", f"more than {self._limits.streams} open streams")
        if not self._streams.take():
            raise PeerError("streams", f"more than {self._limits.streams_per_s:.0f} new streams a second")

    async def write(self, data: bytes) -> None:
        await self._session.write(data)

    async def close(self) -> None:
        await self._session.close()

    def get_local_peer(self) -> ID:
        return self._session.get_local_peer()

    def get_local_private_key(self) -> Any:
        return self._session.get_local_private_key()

    def get_remote_peer(self) -> ID:
        return self._session.get_remote_peer()

    def get_remote_public_key(self) -> Any:
        return self._session.get_remote_public_key()

    def get_remote_address(self) -> tuple[str, int]:
        return self._muxer.tcp.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        ip, port = self.get_remote_address()
        return [_multiaddr(ip, port)]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class _Yamux(yamux.Yamux):
    """The multiplexer of one connection.

    Stock: an exception in it ends the node; a peer that stands still is never noticed (pings are sent, the answer is
    not waited for); a window grows to 16 MB for a stream that is read promptly, so that a hundred streams can park
    gigabytes. Shown by ``test_a_peer_that_stands_still_...`` and ``test_yamux_...``.
    """

    def __init__(self, session: ISecureConn, peer_id: ID, tcp: _Socket, guard: _Guard) -> None:
        super().__init__(session, peer_id, is_initiator=session.is_initiator)
        self.tcp = tcp
        self._guard = guard
        self.secured_conn = _Frames(session, self, guard)

    def rtt(self) -> float:
        """The library doubles a window that was used up within four of these: enough is enough."""
        largest = max((stream.target_recv_window for stream in self.streams.values()), default=0)
        return super().rtt() if largest < LARGEST_WINDOW else 1e-9

    async def start(self) -> None:
        with _Containment(self._guard, self.tcp):
            await super().start()
        self.event_started.set()

    async def _measure_rtt_loop(self) -> None:
        limits = self._guard.limits
        while True:
            await trio.sleep(limits.ping_every_s)
            self._ping_id = (self._ping_id + 1) % 2**32
            self._ping_event = trio.Event()
            with trio.move_on_after(limits.pong_s) as scope:
                header = (0, yamux.TYPE_PING, yamux.FLAG_SYN, 0, self._ping_id)
                await self._write_frame(struct.pack(yamux.YAMUX_HEADER_FORMAT, *header))
                await self._ping_event.wait()
            if scope.cancelled_caught:
                self.tcp.abort()
                return


class _Swarm(Swarm):
    """All connections.

    Stock: each inbound connection takes one of (max - min) slots for as long as the node lives, so that after 250 it
    accepts no more; an outbound handshake has no deadline; what goes wrong in a handshake is not told. The library's
    resource manager, whose counters leak, is left out. Shown by ``test_inbound_slots_come_back``,
    ``test_garbage_...``, ``test_half_open_...``.
    """

    guard: _Guard
    half_open: _HalfOpen

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        tcp = read_write_closer
        assert isinstance(tcp, _Socket)
        with _Containment(self.guard, tcp, "handshake"):
            connection = await self._upgrade(RawConnection(tcp, False), tcp, None)
            await connection.muxed_conn.event_closed.wait()  # type: ignore[attr-defined]
        tcp.abort()

    async def upgrade_outbound_raw_conn(
        self, raw_conn: IRawConnection, peer_id: ID, pre_scope: Any = None
    ) -> SwarmConn:
        tcp = raw_conn.stream  # type: ignore[attr-defined]
        assert isinstance(tcp, _Socket)
        with _Translation(SwarmException, f"no handshake with {peer_id}"):
            return await self._upgrade(raw_conn, tcp, peer_id)

    async def _upgrade(self, raw: IRawConnection, tcp: _Socket, peer_id: ID | None) -> SwarmConn:
        """TCP to a connection in the swarm. ``peer_id`` is who must answer our call; None if we are called."""
        try:
            with trio.move_on_after(self.guard.limits.handshake_s) as scope:
                if peer_id is None:
                    with self.half_open.admit(tcp):
                        muxed = await self._shake_hands(raw, tcp, None)
                else:
                    muxed = await self._shake_hands(raw, tcp, peer_id)
            if scope.cancelled_caught:
                raise PeerError("handshake", f"not done within {self.guard.limits.handshake_s:g} s")
            tcp.peer_id = str(muxed.peer_id)
            tcp.is_handshake = False
            return await self.add_conn(muxed, direction="inbound" if peer_id is None else "outbound")
        except PeerError:
            raise  # Whoever judges it closes the socket; not before it is blamed.
        except BaseException:
            if peer_id is not None:
                tcp.abort()
            raise

    async def _shake_hands(self, raw: IRawConnection, tcp: _Socket, peer_id: ID | None) -> _Yamux:
        # The library's upgrader would make its own Yamux, whatever class it was given.
        secured = await self.upgrader.upgrade_security(raw, peer_id is not None, peer_id)
        await self.upgrader.muxer_multistream.select_transport(secured)
        return _Yamux(secured, secured.get_remote_peer(), tcp, self.guard)

    async def notify_disconnected(self, conn: INetConn) -> None:
        """Without the list of everybody who ever hung up, which the library keeps for its own redialling."""
        await self._notify("disconnected", conn)


class _Idle(AutoConnector):
    """Stock: calls whomever it has an address of, until half of the connections are in use.

    Shown by ``test_nobody_is_called_unasked``.
    """

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


class _Negotiation(ReadWriteCloser):
    """A stream while its two sides agree on a protocol.

    Stock: a name may be of any length (50 MB are read of each stream), and a name that is not UTF-8 ends the node.
    Shown by ``test_a_protocol_name_...`` and ``test_an_endless_negotiation_...``.
    """

    def __init__(self, stream: ReadWriteCloser, limits: Limits) -> None:
        self._stream = stream
        self._limit = limits.negotiation_bytes
        self._budget = self._limit

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n > self._budget:
            raise PeerError("negotiation", f"takes more than {self._limit} bytes to agree on a protocol")
        self._budget -= n
        return await self._stream.read(n)

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._stream.get_remote_address()


class _NegotiationClient(MultiselectClient):
    """The same for streams that we open."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    async def select_one_of(
        self, protocols: Sequence[TProtocol], communicator: IMultiselectCommunicator, negotiate_timeout: int = 10
    ) -> TProtocol:
        assert isinstance(communicator, MultiselectCommunicator)
        bounded = MultiselectCommunicator(_Negotiation(communicator.read_writer, self._limits))
        return await super().select_one_of(protocols, bounded, negotiate_timeout)


class _Host(BasicHost):
    """Streams and their protocols.

    Stock: an exception in a stream's handler ends the node; a stream whose handler returned stays open; each peer is
    asked who it is (identify), and whatever number of addresses it answers with is kept, as is what it pushes later.
    We answer identify, for other implementations need it, and never ask: nothing here uses the answer.
    Shown by ``test_an_exception_in_a_handler_...``, ``test_nobody_is_asked_...``.

    Mutable: `_serving` counts running handlers by connection and protocol.
    """

    guard: _Guard
    _serving: Counter[tuple[_Socket, str]]

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        muxer = net_stream.muxed_conn
        assert isinstance(muxer, _Yamux)
        with _Containment(self.guard, muxer.tcp):
            try:
                await self._serve_stream(net_stream, muxer.tcp)
            finally:
                if not net_stream.muxed_stream.send_closed:  # type: ignore[attr-defined]
                    with trio.CancelScope(shield=True), suppress(BaseLibp2pError):
                        await net_stream.reset()

    async def _serve_stream(self, stream: INetStream, tcp: _Socket) -> None:
        limits = self.guard.limits
        communicator = MultiselectCommunicator(_Negotiation(stream, limits))
        try:
            protocol, handler = await self.multiselect.negotiate(communicator, limits.negotiation_s)
        except UnicodeDecodeError as error:
            raise PeerError("negotiation", "protocol name is not UTF-8") from error
        except MultiselectError as error:
            if error.__cause__ is not None and not _is_hangup(error.__cause__):
                raise PeerError("negotiation", "not multistream-select") from error
            return  # It hung up, or took too long; or the greeting is another version's.
        if protocol is None or handler is None:
            return
        stream.set_protocol(protocol)
        key = (tcp, str(protocol))
        if self._serving[key] >= limits.streams_per_protocol:
            return
        self._serving[key] += 1
        try:
            await handler(stream)
        finally:
            self._serving[key] -= 1
            if not self._serving[key]:
                del self._serving[key]

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Nobody is asked."""

    async def _push_identify_to_all_peers(self) -> None:
        """Nobody is told without having asked."""


class _Pubsub(Pubsub):
    """What peers send on pubsub's streams.

    Stock: bytes that are not protobuf, and a message whose key cannot be read, end the node; each message of an RPC
    becomes a task of its own, and the list of tasks is searched for each (thousands of tiny messages stall it); an
    answer of a validator is remembered for longer than a message is, so that an old message comes through without
    being asked about; each read of a few bytes answers with a window update, that is an encrypted packet; two tasks
    that write long messages into one stream mix them up, and the honest sender looks hostile; the record of addresses
    that each RPC carries is verified and kept. Here messages are handled one after the other in the task of the
    stream, so that a peer that sends faster than we work waits.
    Shown by ``test_pubsub_...``.

    Mutable: `_writing`, a lock for each open outbound stream.
    """

    def __init__(self, host: IHost, router: GossipSub, guard: _Guard, topics: frozenset[str] | None) -> None:
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_subscriptions_per_rpc=guard.limits.rpc_subscriptions,
            max_subscriptions_per_peer=guard.limits.subscriptions,
            max_inbound_rpc_size=guard.limits.rpc_bytes,
            allowed_topics=topics,
        )
        self._limits = guard.limits
        self._writing: WeakKeyDictionary[INetStream, trio.Lock] = WeakKeyDictionary()

    async def stream_handler(self, stream: INetStream) -> None:
        await self.continuously_read_stream(stream)

    async def continuously_read_stream(self, stream: INetStream) -> None:
        peer_id = stream.muxed_conn.peer_id
        changes = _Bucket(self._limits.subscriptions_per_s, self._limits.subscriptions_burst)
        unread = bytearray()
        while True:
            frame = await self._read_frame(stream, unread)
            try:
                rpc = rpc_pb2.RPC.FromString(frame)
            except DecodeError as error:
                raise PeerError("pubsub", "RPC is not protobuf") from error
            self._check(rpc)
            for message in rpc.publish:
                if message.topicIDs[0] in self.topic_ids:
                    await self.push_msg(peer_id, message)
            for subscription in rpc.subscriptions:
                if not changes.take():
                    raise PeerError("pubsub", "changes its subscriptions too often")
                self.handle_subscription(peer_id, subscription)
            if rpc.HasField("control"):
                await self.router.handle_rpc(rpc, peer_id)

    async def _read_frame(self, stream: INetStream, unread: bytearray) -> bytes:
        """One RPC, without its length. What was read beyond it is left in ``unread``."""
        while True:
            size, used = _decode_length(unread)
            if size > self._limits.rpc_bytes:
                raise PeerError("pubsub", f"RPC of {size} bytes, at most {self._limits.rpc_bytes} are allowed")
            if used and len(unread) >= used + size:
                frame = bytes(unread[used : used + size])
                del unread[: used + size]
                return frame
            unread += await stream.read(READ_SIZE)

    def _check(self, rpc: rpc_pb2.RPC) -> None:
        limits, control = self._limits, rpc.control
        if len(rpc.publish) > limits.rpc_messages:
            raise PeerError("pubsub", f"{len(rpc.publish)} messages in an RPC, at most {limits.rpc_messages}")
        if len(rpc.subscriptions) > limits.rpc_subscriptions:
            raise PeerError("pubsub", f"{len(rpc.subscriptions)} subscriptions in an RPC")
        controls = len(control.ihave) + len(control.iwant) + len(control.graft) + len(control.prune)
        controls += len(control.idontwant)
        if controls > limits.rpc_controls:
            raise PeerError("pubsub", f"{controls} control entries in an RPC, at most {limits.rpc_controls}")
        if any(len(subscription.topicid) > MAX_TOPIC_SIZE for subscription in rpc.subscriptions):
            raise PeerError("pubsub", "name of a topic is too long")
        for message in rpc.publish:
            if len(message.topicIDs) != 1:
                raise PeerError("pubsub", f"message for {len(message.topicIDs)} topics")
            if len(message.from_id) != ED25519_ID_SIZE or not message.from_id.startswith(ED25519_ID_PREFIX):
                raise PeerError("pubsub", "author is not an ed25519 key")
            if not message.seqno or len(message.seqno) > MAX_SEQNO_SIZE:
                raise PeerError("pubsub", f"sequence number of {len(message.seqno)} bytes")

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Judge one message, hand it to its topic, and relay it."""
        if msg_forwarder != self.my_id and msg.from_id == self.my_id.to_bytes():
            return
        if self._is_msg_seen(msg):
            return
        if not signature_validator(msg):
            raise PeerError("pubsub", "message with a wrong signature")
        try:
            await self.validate_msg(msg_forwarder, msg)
        except ValidationError:
            return  # Whoever wrote the validator has judged the peer.
        self._mark_msg_seen(msg)
        self.notify_subscriptions(msg)
        await self.router.publish(msg_forwarder, msg)

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        for topic in self.get_msg_validators(msg):
            if topic.is_async or not topic.validator(msg_forwarder, msg):
                raise ValidationError("refused")

    def get_hello_packet(self) -> rpc_pb2.RPC:
        return rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in self.topic_ids]
        )

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        data = rpc_msg.SerializeToString()
        lock = self._writing.setdefault(stream, trio.Lock())
        try:
            async with lock:
                await stream.write(encode_uvarint(len(data)) + data)
        except BaseLibp2pError:
            # The stream may have half of a message in it.
            self._handle_dead_peer(stream.muxed_conn.peer_id)
            with suppress(BaseLibp2pError):
                await stream.reset()
            return False
        return True


def _decode_length(data: bytes | bytearray) -> tuple[int, int]:
    """The unsigned varint at the start, and its size; (0, 0) if it is not complete."""
    size = 0
    for index, byte in enumerate(data[:10]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size, index + 1
    if len(data) >= 10:
        raise PeerError("pubsub", "length of an RPC is not a varint")
    return 0, 0


class _GossipSub(GossipSub):
    """Who gets which message.

    Stock: remembers topics, back-offs and messages of anybody who names them, for ever; an IWANT that names one id a
    thousand times gets the message a thousand times; a PRUNE may name peers that we then call, wherever they are
    (PX); each RPC is stamped with a record of our addresses, which costs a fifth of the CPU. Its scores, which
    would silently stop relaying to honest peers, are the application's affair.
    Shown by ``test_gossip_...``.

    Mutable: `_wanted`, what each peer may still ask for.
    """

    guard: _Guard
    _wanted: dict[ID, _Bucket]

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        limit = self.guard.limits.rpc_ids
        for ihave in rpc.control.ihave:
            if ihave.topicID in self.mesh:
                ids = _some_ids(ihave.messageIDs, limit)
                await self.handle_ihave(rpc_pb2.ControlIHave(topicID=ihave.topicID, messageIDs=ids), sender_peer_id)
        for iwant in rpc.control.iwant:
            ids = _some_ids(iwant.messageIDs, limit)
            await self.handle_iwant(rpc_pb2.ControlIWant(messageIDs=ids), sender_peer_id)
        for graft in rpc.control.graft:
            if graft.topicID in self.mesh:
                await self.handle_graft(graft, sender_peer_id)
        for prune in rpc.control.prune:
            if prune.topicID in self.mesh:
                backoff = min(prune.backoff, self.prune_back_off)
                await self.handle_prune(rpc_pb2.ControlPrune(topicID=prune.topicID, backoff=backoff), sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        if sender_peer_id not in self.peer_protocol or not self._check_iwant_rate_limit(sender_peer_id):
            return
        limits = self.guard.limits
        bucket = self._wanted.setdefault(sender_peer_id, _Bucket(limits.wanted_per_s, limits.wanted_burst))
        found = (self.mcache.get(message_id) for message_id in iwant_msg.messageIDs)
        self._send_messages(sender_peer_id, [message for message in found if message is not None and bucket.take()])

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        found = (self.mcache.get(message_id) for message_id in self.mcache.window(topic))
        self._send_messages(peer_id, [message for message in found if message is not None])

    def _send_messages(self, peer_id: ID, messages: Sequence[rpc_pb2.Message]) -> None:
        step = self.guard.limits.rpc_messages // 2
        for start in range(0, len(messages), step):
            self.send_rpc(peer_id, rpc_pb2.RPC(publish=messages[start : start + step]))

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Relay to the mesh. A message of our own goes to everybody who subscribed, for no one else can repair it."""
        pubsub = self.pubsub
        assert pubsub is not None
        self.mcache.put(pubsub_msg)
        topic = pubsub_msg.topicIDs[0]
        is_own = msg_forwarder == pubsub.my_id
        to = pubsub.peer_topics.get(topic, set()) if is_own else self.mesh.get(topic, set())
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        for peer_id in to - {msg_forwarder, ID(pubsub_msg.from_id)}:
            self.send_rpc(peer_id, rpc)
        self.time_since_last_publish[topic] = int(time.time())

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    def remove_peer(self, peer_id: ID) -> None:
        super().remove_peer(peer_id)
        self._wanted.pop(peer_id, None)
        now = int(time.time())
        for topic, peers in self.back_off.items():
            self.back_off[topic] = {peer: until for peer, until in peers.items() if until > now}


def _some_ids(ids: Iterable[bytes | str], limit: int) -> list[bytes]:
    """The first so many different ids."""
    encoded = (item.encode() if isinstance(item, str) else item for item in ids)
    return list(dict.fromkeys(item for item in encoded if len(item) <= MAX_MESSAGE_ID_SIZE))[:limit]


class HardenedHost:
    """A libp2p host with all repairs; it lives in `run_host`."""

    def __init__(
        self, *, host: _Host, swarm: _Swarm, pubsub: _Pubsub, gossip: _GossipSub, tcp: _Tcp, listen: Sequence[str]
    ) -> None:
        self.host: IHost = host
        self.pubsub: Pubsub = pubsub
        self.gossip: GossipSub = gossip
        self.swarm: Swarm = swarm
        self._host = host
        self._tcp = tcp
        self._listen = tuple(Multiaddr(address) for address in listen)
        self._guard = swarm.guard

    @property
    def peer_id(self) -> str:
        """Base58."""
        return str(self._host.get_id())

    @property
    def traffic(self) -> Traffic:
        """Bytes of TCP, of all connections since the start."""
        return Traffic(received=self._guard.received, sent=self._guard.sent)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens: whole multiaddrs, ending in ``/p2p/<peer id>``. Empty before it runs."""
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self._host.get_transport_addrs())

    def endpoint(self, connection: INetConn) -> tuple[str, int, bool]:
        """The other end of a connection: IP, port, and whether it called us."""
        muxer = connection.muxed_conn
        assert isinstance(muxer, _Yamux)
        return muxer.tcp.ip, muxer.tcp.port, muxer.tcp.inbound

    def drop(self, peer_id: str) -> None:
        """End all connections to a peer at once, without a farewell; ``disconnected`` is notified soon after."""
        for tcp in [tcp for tcp in self._guard.sockets if tcp.peer_id == peer_id]:
            tcp.abort()

    async def connect(self, address: str) -> str:
        """Call a peer.

        Arguments:
            address: a whole multiaddr, ending in ``/p2p/<peer id>``.

        Returns:
            Its peer id. At once if it is connected already.

        Raises:
            PeerError: it cannot be reached, is somebody else, or does not speak our protocols.
        """
        with _Translation(partial(PeerError, "connect"), address):
            info = info_from_p2p_addr(Multiaddr(address))
            if not self.swarm.get_connections(info.peer_id):
                with trio.fail_after(2 * self._guard.limits.handshake_s):
                    await self.swarm.dial_addr(info.addrs[0], info.peer_id)
            return str(info.peer_id)

    async def new_stream(self, peer_id: str, protocol: str) -> INetStream:
        """Open a stream to a connected peer.

        Raises:
            PeerError: there is no connection, or the peer does not speak the protocol.
        """
        with _Translation(partial(PeerError, "stream"), f"{peer_id}: {protocol}"):
            peer = ID.from_base58(peer_id)
            if not self.swarm.get_connections(peer):
                raise SwarmException("not connected")
            with trio.fail_after(2 * self._guard.limits.negotiation_s):
                return await self._host.new_stream(peer, [TProtocol(protocol)])


def open_host(
    *,
    seed: bytes,
    listen: Sequence[str],
    max_connections: int,
    may_enter: Callable[[str], bool],
    blame: Blame,
    topics: Iterable[str] | None = None,
    limits: Limits | None = None,
) -> HardenedHost:
    """Put a host together; nothing runs yet.

    Arguments:
        seed: 32 secret bytes, the node's identity.
        listen: multiaddrs such as ``/ip4/0.0.0.0/tcp/9337``.
        max_connections: of both directions together.
        may_enter: whether an IP may connect at this moment; asked before a byte is read.
        blame: told of attacks, when the connection has been closed already.
        topics: the only ones of which it is remembered who subscribed; None for any few of each peer.

    Raises:
        ConfigError: the library is not of the version that the repairs fit.
    """
    check_library()
    _quieten()
    limits = limits or Limits()
    guard = _Guard(limits, may_enter, blame)
    keys = create_new_key_pair(seed)
    peer_id = ID.from_pubkey(keys.public_key)
    store = PeerStore()
    store.add_key_pair(peer_id, keys)
    tcp = _Tcp(guard)
    # Without options of its own the library also offers plaintext: anybody could claim any peer id.
    noise = NoiseTransport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE_ID: noise}, {TProtocol(yamux.PROTOCOL_ID): yamux.Yamux})
    connections = ConnectionConfig(
        max_connections=max_connections,
        high_watermark=max_connections,
        low_watermark=0,
        min_connections=0,
        max_connections_per_peer=3,
        inbound_stream_protocol_negotiation_timeout=limits.negotiation_s,
        outbound_stream_protocol_negotiation_timeout=limits.negotiation_s,
    )
    swarm = _Swarm(
        peer_id, store, upgrader, [tcp], retry_config=RetryConfig(max_retries=0), connection_config=connections
    )
    swarm.guard, swarm.half_open = guard, _HalfOpen(limits)
    swarm.auto_connector = _Idle(swarm)
    host = _Host(swarm, negotiate_timeout=limits.negotiation_s, disable_identify_address_discovery=True)
    host.guard, host._serving = guard, Counter()
    host.multiselect_client = _NegotiationClient(limits)
    host.remove_stream_handler(ID_PUSH)
    gossip = _GossipSub(
        protocols=[PROTOCOL_ID_V11],
        degree=8,
        degree_low=6,
        degree_high=max(max_connections, 12),  # After a prune IHAVE repairs no more: nobody is pruned.
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
    )
    gossip.guard, gossip._wanted, gossip.scorer = guard, {}, None
    pubsub = _Pubsub(host, gossip, guard, None if topics is None else frozenset(topics))
    return HardenedHost(host=host, swarm=swarm, pubsub=pubsub, gossip=gossip, tcp=tcp, listen=listen)


def _quieten() -> None:
    """Stock: failed calls are errors in the log, and one module writes to the root logger, configuring it by that.

    Shown by ``test_the_root_logger_is_left_alone``.
    """
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    logging.getLogger("multiaddr").setLevel(logging.INFO)
    swarm_connection.logging = logging.getLogger(swarm_connection.__name__)  # type: ignore[assignment,attr-defined]


async def run_host(hardened: HardenedHost, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Listen and serve until cancelled; then close the listeners and every connection.

    Raises:
        ConfigError: an address is in use, or cannot be listened on.
    """
    await hardened._tcp.bind(hardened._listen)
    try:
        # Pubsub learns of connections from its first moment on, or not at all.
        async with (
            background_trio_service(hardened.pubsub),
            background_trio_service(hardened.gossip),
            hardened.host.run(listen_addrs=hardened._listen),
            _closing(hardened),
        ):
            task_status.started()
            await trio.sleep_forever()
    finally:
        hardened._tcp.unbind()


@asynccontextmanager
async def _closing(hardened: HardenedHost) -> AsyncIterator[None]:
    """Stock: a bare cancel leaves listeners and sockets open, and ``close`` takes a fifth of a second for each."""
    try:
        yield
    finally:
        hardened._tcp.unbind()
        for tcp in list(hardened._guard.sockets):
            tcp.abort()
        hardened.swarm.connections.clear()
        with trio.move_on_after(CLOSE_S, shield=True):
            await hardened.host.close()
