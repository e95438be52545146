"""The sockets of Stratum: one listener, a task for each miner that reads, and writes that never wait.

Theory of operation. A connection's task waits until its socket is readable, hands the bytes to the `Session` and writes
what it returns, without an `await` in between. A write goes straight to the non-blocking socket; what the kernel does
not take is kept in the connection's own buffer, which a second task drains and which exists only as long as it is
needed. So `broadcast` reaches all miners in one synchronous stretch, and one that does not read costs the others
nothing: it is dropped when its buffer or its time is used up. One ticker looks after all deadlines and difficulties;
there are no timeouts on single reads.

Before the session's first byte may come two layers, both without sockets of their own: a PROXY header from a load
balancer that the operator named, and TLS, which is told from plain Stratum by its first byte and served on the same
port if there is a certificate. A connection without a user is a stranger: it may idle for a while, as backup pools
are kept, but gives its place to a newcomer when all are taken.

`broadcast` may be called while a session is being served (its submission moved the sharechain): the miner gets its
answer first, then everybody the new work.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from p2pool.errors import ConfigError, StratumError
from p2pool.stratum.protocol import MAX_LINE_BYTES, TLS_HANDSHAKE, Session
from p2pool.stratum.proxy import ProxyReader
from p2pool.stratum.tls import Tls, TlsError
from p2pool.stratum.values import DEFAULT_VERSION_MASK, EXTRANONCE1_SIZE, Desk, SessionStatistics
from p2pool.stratum.vardiff import VardiffSettings

logger = logging.getLogger("p2pool.stratum")

READ_BYTES = 2 * MAX_LINE_BYTES
"""Of one miner before the next has its turn."""
ACCEPT_BATCH = 64
"""New connections before the miners that are already there have their turn."""
TICK_BATCH = 250
"""Connections that are looked after in one stretch, a millisecond."""
BACKLOG = 1024
"""What a farm does after a power cut: everybody at once."""
MAX_CLOSED_SESSIONS = 10_000
"""Sessions kept for their miners to come back to; the oldest are forgotten first."""

STORM_S = 10.0
"""Over which connections of one address are counted, to tell a storm."""
LINGER_S = 10.0
"""For a stranger to keep its place when all are taken."""

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the operator may choose about the Stratum port."""

    vardiff: VardiffSettings = field(default_factory=VardiffSettings)
    version_mask: int = DEFAULT_VERSION_MASK
    """The version bits that miners may roll."""
    start_difficulties: Mapping[int, float] = field(default_factory=dict)
    """By port, what a session hears first, where it is not as in `vardiff`."""
    tls: ssl.SSLContext | None = None
    """For miners that speak TLS; None closes their connections, whereupon some come back in plain text."""
    proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    """Load balancers, whose connections begin with a PROXY header; nobody else is asked for one, or believed."""
    max_connections: int = 10_000
    """When they are reached, strangers make room; when there are none, new ones are closed at once."""
    max_per_ip: int = 5_000
    """Connections from one address (IPv6: one /64); a farm is behind one. The machine's own may open more."""
    max_strangers_per_ip: int = 1_000
    """Of these, connections without a user."""
    max_opened_per_ip: int = 3_000
    """New connections from one address in `STORM_S`; further ones are closed at once."""
    max_unsent_bytes: int = 256 * 1024
    """Of one miner that does not read: some thirty jobs at the usual size."""
    write_deadline_s: float = 30.0
    """For a miner that reads slowly to have caught up."""
    line_deadline_s: float = 30.0
    """For a line that was begun to be complete."""
    unauthorized_limit_s: float = 120.0
    """For a connection without a user. Miners hold an idle one to their backup pool for 60 s at a time."""
    resume_s: float = 600.0
    """For a miner to come back to its session."""
    tick_s: float = 1.0
    """How often the deadlines and difficulties are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """The server at one moment.

    Attributes:
        connections: open ones, with or without a user.
        sessions: of the connections that have a user.
        accepted: submissions since the start, of all connections.
        rejected: the same, by reason.
        dropped: connections that the server ended, by reason.
    """

    connections: int
    sessions: tuple[SessionStatistics, ...]
    accepted: int
    rejected: Mapping[str, int]
    dropped: Mapping[str, int]


class _Connection:
    """A socket and its session. `unsent` is what the kernel did not take; while it is not empty, a task drains it.

    `origin` is what limits by address are counted for, "" where none are; `proxy` reads the PROXY header that is still
    to come; `tls` is None for plain text, and until the first byte; `stranger_since` is None while there is a user.
    """

    def __init__(self, sock: socket.socket, session: Session, *, now: float) -> None:
        self.sock = sock
        self.session = session
        self.origin = ""
        self.proxy: ProxyReader | None = None
        self.tls: Tls | None = None
        self.is_fresh = True
        self.stranger_since: float | None = now
        self.unsent = bytearray()
        self.unsent_since: float | None = None
        self.scope = trio.CancelScope()
        self.is_open = True


class StratumServer:
    """Serves miners over TCP; see `serve`.

    Mutable state: `_connections` are the open ones; `_closed` are the sessions that can be resumed, by id, with the
    time of their closing, oldest first. The extranonce1 of a session in either is in `_extranonces` and nowhere twice.
    `_strangers` are the open connections without a user, oldest first; `_per_ip` and `_strangers_per_ip` count open
    connections by their origin, `_opened` those of the last `STORM_S`, which began at `_storm_since`.
    `_is_serving` is set while a session is being served; `_broadcast_due` then holds the cleanness of a waiting
    broadcast.
    """

    def __init__(
        self,
        desk: Desk,
        settings: ServerSettings | None = None,
        *,
        draw: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """
        Arguments:
            draw: gives that many random bytes, for session ids (which nobody may guess) and extranonces.
        """
        self._desk = desk
        self._settings = settings or ServerSettings()
        self._draw = draw
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, None] = {}
        self._per_ip: Counter[str] = Counter()
        self._strangers_per_ip: Counter[str] = Counter()
        self._opened: Counter[str] = Counter()
        self._storm_since = -STORM_S
        self._closed: dict[str, tuple[Session, float]] = {}
        self._extranonces: set[bytes] = set()
        self._is_serving = False
        self._broadcast_due: bool | None = None
        self._nursery: trio.Nursery | None = None
        self._past_accepted = 0
        self._past_rejected: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self.addresses: tuple[tuple[str, int], ...] = ()
        """Host and port of each listener, while serving."""

    async def serve(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[StratumServer] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, then close every connection and the listeners.

        Arguments:
            listeners: listening, non-blocking sockets, as `open_listeners` makes them; closed when the server ends.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.addresses = tuple(listener.getsockname()[:2] for listener in listeners)
                for listener in listeners:
                    nursery.start_soon(self._accept, listener)
                nursery.start_soon(self._tick)
                task_status.started(self)
        finally:
            self._nursery = None
            for listener in listeners:
                trio.lowlevel.notify_closing(listener)
                listener.close()

    def broadcast(self, *, clean: bool) -> None:
        """Send every miner the desk's current work, now. Never blocks.

        Arguments:
            clean: Bitcoin's tip moved; a new sharechain tip or a refreshed template is not that.
        """
        if self._is_serving:
            self._broadcast_due = clean or bool(self._broadcast_due)
            return
        now = trio.current_time()
        if clean:
            for session, _ in self._closed.values():
                session.on_clean()
        for connection in list(self._connections):
            self._write(connection, connection.session.on_new_work(clean, now))

    @property
    def connections(self) -> int:
        """How many are open, with or without a user."""
        return len(self._connections)

    def statistics(self) -> ServerStatistics:
        now = trio.current_time()
        sessions = [connection.session.statistics(now) for connection in self._connections]
        accepted, rejected = self._past_accepted, Counter(self._past_rejected)
        for session in sessions:
            accepted += session.accepted
            rejected.update(session.rejected)
        named = [session for session in sessions if session.user]
        return ServerStatistics(
            connections=len(self._connections),
            sessions=tuple(sorted(named, key=lambda session: (session.connected_at, session.session_id))),
            accepted=accepted,
            rejected=dict(rejected),
            dropped=dict(self._dropped),
        )

    # Tasks

    async def _accept(self, listener: socket.socket) -> None:
        assert self._nursery is not None
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPT_BATCH):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno not in _OUT_OF_RESOURCES:
                        continue  # The miner went away before its turn, e.g. ECONNABORTED.
                    logger.error("cannot accept a miner: %s", error)
                    await trio.sleep(self._settings.tick_s)
                    break
                connection = self._open(sock, address[0], listener.getsockname()[1])
                if connection is not None:
                    logger.debug("%s connected as session %s", address, connection.session.session_id)
                    self._nursery.start_soon(self._read, connection)

    def _make_room(self) -> bool:
        """Whether there is a place for one more connection; a stranger that lingers gives up its own."""
        if len(self._connections) < self._settings.max_connections:
            return True
        oldest = next(iter(self._strangers), None)
        now = trio.current_time()
        if oldest is None or oldest.stranger_since is None or now - oldest.stranger_since < LINGER_S:
            return False
        self._forget_stranger(oldest)  # its task closes it when it has its turn: a place more for a moment
        self._drop(oldest, "makes room")
        return True

    async def _read(self, connection: _Connection) -> None:
        sock, session = connection.sock, connection.session
        try:
            with connection.scope:
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    try:
                        data = sock.recv(READ_BYTES)
                    except BlockingIOError:
                        continue
                    except OSError:
                        return  # Reset, or timed out in the kernel: the miner is gone.
                    if not data:
                        return
                    try:
                        data = self._unwrap(connection, data)
                    except (StratumError, TlsError) as error:
                        self._count_drop("no PROXY header" if connection.proxy else "failed TLS", error)
                        return
                    if data:
                        self._serve(connection, partial(session.receive, data))
                        self._note_stranger(connection)
                    if session.closing is not None:
                        return
        finally:
            self._close(connection)

    def _unwrap(self, connection: _Connection, data: bytes) -> bytes:
        """What the session is to see of bytes from the socket."""
        if connection.proxy is not None:
            rest = connection.proxy.receive(data)
            if rest is None:
                return b""
            address, connection.proxy = connection.proxy.address, None
            data = rest
            if address is not None:
                self._admit(connection, address)
                if connection.session.closing is not None:
                    return b""
        if connection.is_fresh and data:
            connection.is_fresh = False
            if data[0] == TLS_HANDSHAKE and self._settings.tls is not None:
                connection.tls = Tls(self._settings.tls)
        if connection.tls is not None:
            data, reply = connection.tls.receive(data)
            self._send(connection, reply)
        return data

    async def _drain(self, connection: _Connection) -> None:
        """Send what the kernel did not take at once, as it takes it."""
        while connection.is_open and connection.unsent:
            try:
                await trio.lowlevel.wait_writable(connection.sock)
                sent = connection.sock.send(connection.unsent)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                connection.scope.cancel()
                return
            del connection.unsent[:sent]
        connection.unsent_since = None

    async def _tick(self) -> None:
        settings = self._settings
        while True:
            await trio.sleep(settings.tick_s)
            now = trio.current_time()
            if now - self._storm_since >= STORM_S:
                self._opened.clear()
                self._storm_since = now
            for number, connection in enumerate(list(self._connections), 1):
                if number % TICK_BATCH == 0:
                    await trio.lowlevel.checkpoint()
                if not connection.is_open:
                    continue
                session = connection.session
                if connection.unsent_since is not None and now - connection.unsent_since > settings.write_deadline_s:
                    self._drop(connection, "reads too slowly")
                elif session.line_since is not None and now - session.line_since > settings.line_deadline_s:
                    self._drop(connection, "sends too slowly")
                elif connection.stranger_since is not None and (
                    now - connection.stranger_since > settings.unauthorized_limit_s
                ):
                    self._drop(connection, "not authorized in time")
                else:
                    self._serve(connection, session.on_tick)
            for session_id, (session, closed_at) in list(self._closed.items()):
                if now - closed_at <= settings.resume_s and len(self._closed) <= MAX_CLOSED_SESSIONS:
                    break
                del self._closed[session_id]
                self._extranonces.discard(session.extranonce1)

    # One connection

    def _open(self, sock: socket.socket, address: str, port: int) -> _Connection | None:
        """A connection for a new socket; None, with the socket closed, if there is no place for it."""
        settings = self._settings
        origin = ipaddress.ip_address(address.partition("%")[0])
        behind_proxy = any(origin in network for network in settings.proxies)
        reason = None if behind_proxy else self._too_many(_origin_of(address))
        if reason is None and not self._make_room():
            reason = "too many connections"
        if reason is not None:
            self._count_drop(reason, address)
            sock.close()
            return None
        sock.setblocking(False)
        with suppress(OSError):  # Already reset by the miner: the first read will tell.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # A half-open connection does not acknowledge the next job.
                timeout_ms = int(settings.write_deadline_s * 1000)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        extranonce1 = self._draw(EXTRANONCE1_SIZE)
        while extranonce1 in self._extranonces:
            extranonce1 = self._draw(EXTRANONCE1_SIZE)
        self._extranonces.add(extranonce1)
        vardiff, start = settings.vardiff, settings.start_difficulties.get(port)
        if start is not None:
            vardiff = replace(vardiff, start_difficulty=start)
        now = trio.current_time()
        session = Session(
            session_id=self._draw(8).hex(),
            extranonce1=extranonce1,
            desk=self._desk,
            now=now,
            vardiff=vardiff,
            version_mask=settings.version_mask,
            resume=lambda session_id: self._resume(session_id, extranonce1),
        )
        connection = _Connection(sock, session, now=now)
        self._connections.add(connection)
        self._strangers[connection] = None
        if behind_proxy:
            connection.proxy = ProxyReader()
        else:
            self._admit(connection, address)
        return connection

    def _too_many(self, origin: str) -> str | None:
        """Why one more connection from an address is refused."""
        settings = self._settings
        if not origin:
            return None
        if self._opened[origin] >= settings.max_opened_per_ip:
            return "a storm of one address"
        if self._per_ip[origin] >= settings.max_per_ip:
            return "too many connections of one address"
        if self._strangers_per_ip[origin] >= settings.max_strangers_per_ip:
            return "too many of one address without a user"
        return None

    def _admit(self, connection: _Connection, address: str) -> None:
        """Count a connection for the address of its miner, or have it closed."""
        origin = _origin_of(address)
        connection.session.closing = self._too_many(origin)
        if origin and connection.session.closing is None:
            connection.origin = origin
            self._opened[origin] += 1
            self._per_ip[origin] += 1
            self._strangers_per_ip[origin] += 1

    def _note_stranger(self, connection: _Connection) -> None:
        """A connection is a stranger while its session has no user: it may gain one, and lose it again."""
        if connection.session.is_authorized:
            self._forget_stranger(connection)
        elif connection.stranger_since is None:
            connection.stranger_since = trio.current_time()
            self._strangers[connection] = None
            _count(self._strangers_per_ip, connection.origin, 1)

    def _forget_stranger(self, connection: _Connection) -> None:
        if connection.stranger_since is not None:
            connection.stranger_since = None
            del self._strangers[connection]
            _count(self._strangers_per_ip, connection.origin, -1)

    def _resume(self, session_id: str, given_up: bytes) -> Session | None:
        """Hand out a closed session, whose extranonce1 takes the place of the one the connection was opened with."""
        session, closed_at = self._closed.get(session_id, (None, 0.0))
        if session is None or trio.current_time() - closed_at > self._settings.resume_s:
            return None
        del self._closed[session_id]
        self._extranonces.discard(given_up)
        return session

    def _serve(self, connection: _Connection, step: Callable[[float], bytes]) -> None:
        """Let a session take a step and send what it says, then what the step made the node want to broadcast."""
        self._is_serving = True
        try:
            self._write(connection, step(trio.current_time()))
        finally:
            self._is_serving = False
        if self._broadcast_due is not None:
            clean, self._broadcast_due = self._broadcast_due, None
            self.broadcast(clean=clean)

    def _write(self, connection: _Connection, data: bytes) -> None:
        if not data or not connection.is_open or connection.scope.cancel_called:
            return
        if connection.tls is not None:
            try:
                data = connection.tls.encrypt(data)
            except TlsError as error:
                logger.debug("session %s: %s", connection.session.session_id, error)
                connection.scope.cancel()
                return
        self._send(connection, data)

    def _send(self, connection: _Connection, data: bytes) -> None:
        if not data:
            return
        sent = 0
        if not connection.unsent:
            try:
                sent = connection.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                connection.scope.cancel()
                return
        if sent == len(data):
            return
        connection.unsent += data[sent:]
        if len(connection.unsent) > self._settings.max_unsent_bytes:
            self._drop(connection, "does not read")
        elif connection.unsent_since is None:
            assert self._nursery is not None
            connection.unsent_since = trio.current_time()
            self._nursery.start_soon(self._drain, connection)

    def _drop(self, connection: _Connection, reason: str) -> None:
        if not connection.scope.cancel_called:
            self._count_drop(reason, connection.session.session_id)
            connection.scope.cancel()

    def _count_drop(self, reason: str, who: object) -> None:
        self._dropped[reason] += 1
        # The first tells the operator; a storm must not fill the disk.
        level = logging.INFO if self._dropped[reason] == 1 else logging.DEBUG
        logger.log(level, "closed the connection of %s: %s", who, reason)

    def _close(self, connection: _Connection) -> None:
        session = connection.session
        connection.is_open = False
        self._connections.discard(connection)
        self._forget_stranger(connection)
        _count(self._per_ip, connection.origin, -1)
        if session.closing is not None:
            self._count_drop(session.closing, session.session_id)
        now = trio.current_time()
        statistics = session.statistics(now)
        self._past_accepted += statistics.accepted
        self._past_rejected.update(statistics.rejected)
        if session.is_worth_resuming:
            session.on_close()
            self._closed[session.session_id] = (session, now)
        else:
            self._extranonces.discard(session.extranonce1)
        trio.lowlevel.notify_closing(connection.sock)
        connection.sock.close()
        logger.debug("session %s closed", session.session_id)


def _origin_of(address: str) -> str:
    """What connections are counted for: an IPv4 address, an IPv6 /64; "" for the machine itself, which has no limit."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:  # as proxies that listen on both tell it
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return ""
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def _count(counter: Counter[str], origin: str, step: int) -> None:
    if origin:
        counter[origin] += step
        if not counter[origin]:
            del counter[origin]


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of a host.

    Arguments:
        host: a name or an address; "" stands for all addresses.
        port: 0 lets the system choose.

    Raises:
        ConfigError: the address cannot be had, with the system's reason.
    """
    listeners: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in infos:
            try:
                listener = socket.socket(family, kind, protocol)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(infos) > 1:
                    continue  # A machine without IPv6 names its addresses all the same.
                raise
            listeners.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ConfigError(f"Stratum cannot listen on {host or '*'}:{port}: {error}") from error
    return listeners


async def serve(
    desk: Desk,
    *,
    host: str = "",
    port: int = 3333,
    settings: ServerSettings | None = None,
    task_status: trio.TaskStatus[StratumServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve miners on a host and port until cancelled; the value started with is the `StratumServer`.

    Raises:
        ConfigError: the address cannot be had.
    """
    await StratumServer(desk, settings).serve(open_listeners(host, port), task_status=task_status)
