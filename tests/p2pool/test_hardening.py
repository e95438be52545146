"""Attacks on a node's libp2p over loopback, one for each repair in ``p2pool.p2p.hardening``.

Each attack shows three things: the node lives and serves an honest peer, the attacker's connection has ended, and the
attack was blamed. The attacker has sockets, and the library's own Noise; the frames of the multiplexer and of pubsub
are made by hand.
"""

from __future__ import annotations

import itertools
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import trio
from libp2p.abc import INetStream, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.pb import crypto_pb2
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerstore import create_signed_peer_record
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr

import p2pool.p2p.hardening as hardening
from p2pool.errors import ConfigError, PeerError
from p2pool.p2p.hardening import HardenedHost, Limits, check_library, identity_of, open_host, run_host

ECHO = "/test/echo/1"
IDLE = "/test/idle/1"
TOPIC = "/test/shares/1"
MESHSUB = "/meshsub/1.1.0"
#: Generous for a loaded machine; nothing waits for it unless something is wrong.
PATIENCE_S = 20
LIMITS = Limits(handshake_s=PATIENCE_S)
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
WINDOW = 256 * 1024

seeds = (number.to_bytes(32, "big") for number in itertools.count(1))


@dataclass
class Node:
    """A hardened host that runs, what it blamed, and what came through its topic."""

    hardened: HardenedHost = field(init=False)
    blamed: list[tuple[str | None, str | None, str]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    judge: Callable[[bytes], bool] = lambda data: True
    may_enter: Callable[[str], bool] = lambda ip: True

    @property
    def address(self) -> tuple[str, int]:
        _, _, host, _, port, *_ = self.hardened.addresses[0].split("/")
        return host, int(port)

    @property
    def rules(self) -> list[str]:
        return [rule for _, _, rule in self.blamed]

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        self.blamed.append((peer_id, ip, rule))
        self.details.append(detail)


async def echo(stream: INetStream) -> None:
    data = await stream.read(1024)
    if data == b"raise":
        raise ZeroDivisionError("a fault of the application")
    if data == b"refuse":
        raise PeerError("R3", "not a share")
    await stream.write(data)
    await stream.close()


def open_toy(node: Node, limits: Limits, listen: str, max_connections: int = 20) -> HardenedHost:
    return open_host(
        seed=next(seeds),
        listen=[listen],
        max_connections=max_connections,
        may_enter=lambda ip: node.may_enter(ip),
        blame=node.blame,
        limits=limits,
    )


@asynccontextmanager
async def serving(
    limits: Limits = LIMITS, *, listen: str = "/ip4/127.0.0.1/tcp/0", max_connections: int = 20
) -> AsyncIterator[Node]:
    node = Node()
    node.hardened = hardened = open_toy(node, limits, listen, max_connections)

    def validate(bearer: ID, message: rpc_pb2.Message) -> bool:
        if not node.judge(message.data):
            return False
        node.received.append(message.data)
        return True

    hardened.host.set_stream_handler(ECHO, echo)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run_host, hardened))
        await hardened.pubsub.subscribe(TOPIC)
        hardened.pubsub.set_topic_validator(TOPIC, validate, False)
        yield node
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what moves is in the library
            await trio.sleep(0.005)


async def ask_echo(asking: HardenedHost, peer_id: str) -> None:
    with trio.fail_after(PATIENCE_S):
        stream = await asking.new_stream(peer_id, ECHO)
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        await stream.close()


async def check_serves(node: Node) -> None:
    """An honest node, new to it, connects, is answered, and its message comes through."""
    async with serving() as honest:
        with trio.fail_after(PATIENCE_S):
            assert await honest.hardened.connect(node.hardened.addresses[0]) == node.hardened.peer_id
        await ask_echo(honest.hardened, node.hardened.peer_id)
        me = ID.from_base58(node.hardened.peer_id)
        await until(lambda: me in honest.hardened.pubsub.peer_topics.get(TOPIC, ()))
        await honest.hardened.pubsub.publish(TOPIC, b"from " + honest.hardened.peer_id.encode())
        await until(lambda: b"from " + honest.hardened.peer_id.encode() in node.received)
        assert not honest.blamed


# The attacker


def delimited(text: bytes) -> bytes:
    return encode_uvarint(len(text) + 1) + text + b"\n"


def multistream(protocol: str) -> bytes:
    return delimited(b"/multistream/1.0.0") + delimited(protocol.encode())


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body


class Attacker:
    """A connection past the handshake, whose frames are made by hand. It calls, so its stream ids are odd."""

    def __init__(self, session: ISecureConn, peer_id: str) -> None:
        self.session = session
        self.peer_id = peer_id
        self.ids = itertools.count(1, 2)

    async def send(self, stream_id: int, data: bytes) -> None:
        await self.session.write(frame(DATA, 0, stream_id, len(data), data))

    async def open(self, protocol: str) -> int:
        """A stream with a protocol. What the node answers is left unread."""
        stream_id = next(self.ids)
        await self.session.write(frame(WINDOW_UPDATE, SYN, stream_id, 0))
        await self.send(stream_id, multistream(protocol))
        return stream_id

    async def open_pubsub(self) -> int:
        stream_id = await self.open(MESHSUB)
        await self.send_rpc(stream_id, subscribe(TOPIC))
        return stream_id

    async def send_rpc(self, stream_id: int, rpc: rpc_pb2.RPC | bytes) -> None:
        data = rpc if isinstance(rpc, bytes) else rpc.SerializeToString()
        data = encode_uvarint(len(data)) + data
        for start in range(0, len(data), WINDOW // 4):
            await self.send(stream_id, data[start : start + WINDOW // 4])

    async def wait_closed(self) -> None:
        with trio.fail_after(PATIENCE_S), suppress(IOException):
            while await self.session.read(1):
                pass


def subscribe(*topics: str) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in topics])


@asynccontextmanager
async def attacking(node: Node, seed: bytes | None = None) -> AsyncIterator[Attacker]:
    keys = create_new_key_pair(seed or next(seeds))
    noise = NoiseTransport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    async with await trio.open_tcp_stream(*node.address) as tcp:
        raw = RawConnection(TrioTCPStream(tcp), True)
        with trio.fail_after(PATIENCE_S):
            await raw.write(multistream("/noise"))
            await skip(raw.read, len(multistream("/noise")))
            session = await noise.secure_outbound(raw, ID.from_base58(node.hardened.peer_id))
            await session.write(multistream("/yamux/1.0.0"))
            await skip(session.read, len(multistream("/yamux/1.0.0")))
        yield Attacker(session, str(ID.from_pubkey(keys.public_key)))


async def skip(read: Callable[[int], Awaitable[bytes]], size: int) -> None:
    while size:
        data = await read(size)
        assert data
        size -= len(data)


def signed(seed: bytes, number: int, data: bytes = b"data", topic: str = TOPIC) -> rpc_pb2.Message:
    keys = create_new_key_pair(seed)
    message = rpc_pb2.Message(
        from_id=ID.from_pubkey(keys.public_key).to_bytes(), data=data, topicIDs=[topic], seqno=number.to_bytes(8, "big")
    )
    message.signature = keys.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
    return message


async def check_blamed(node: Node, attacker: Attacker, rule: str) -> None:
    await attacker.wait_closed()
    await until(lambda: node.blamed)
    assert node.blamed == [(attacker.peer_id, "127.0.0.1", rule)], node.details
    await check_serves(node)
    assert len(node.blamed) == 1, node.details


# Start and end


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_library()
    monkeypatch.setattr(hardening, "version", lambda name: "0.9.0")
    with pytest.raises(ConfigError, match=r"must be of version 0\.8\.1, found 0\.9\.0.*pip install libp2p==0\.8\.1"):
        check_library()


def test_an_identity_is_the_same_for_the_same_seed() -> None:
    assert identity_of(b"a" * 32) == identity_of(b"a" * 32) != identity_of(b"b" * 32)
    assert identity_of(b"a" * 32).startswith("12D3KooW")


async def test_an_honest_peer_is_served_and_its_traffic_counted() -> None:
    async with serving() as node:
        await check_serves(node)
        assert node.hardened.traffic.received > 1000 < node.hardened.traffic.sent
        assert not node.blamed


@pytest.mark.parametrize("reuse", [False, True], ids=["taken", "taken-with-reuseport"])
async def test_a_port_in_use_is_the_operators_fault(reuse: bool) -> None:
    """The stock library binds a port that another node has bound, if with SO_REUSEPORT, and only logs another."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: "):
            await run_host(open_toy(Node(), LIMITS, address))


async def test_an_address_that_cannot_be_listened_on_is_the_operators_fault() -> None:
    for address in ("/ip4/192.0.2.1/tcp/0", "/ip4/127.0.0.1", "/dns4/localhost/tcp/0"):
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: "):
            await run_host(open_toy(Node(), LIMITS, address))


@pytest.mark.slow
async def test_the_port_is_free_and_connections_closed_after_the_end() -> None:
    async with serving() as honest:
        async with serving() as node:
            address = node.hardened.addresses[0]
            await honest.hardened.connect(address)
            listen = address.rpartition("/p2p/")[0]
        await until(lambda: not honest.hardened.swarm.get_connections())
        async with serving(listen=listen) as node:
            await check_serves(node)


async def test_the_root_logger_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with serving() as node:
            await check_serves(node)
            with pytest.raises(PeerError, match="connect"):
                await node.hardened.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{identity_of(b'z' * 32)}")
    assert not [record for record in caplog.records if record.name == "root" or record.name.startswith("libp2p")]


# Before the handshake is done


async def test_who_may_not_enter_is_turned_away_before_a_byte() -> None:
    async with serving() as node:
        asked = ["nobody"]
        node.may_enter = lambda ip: asked.append(ip) is not None  # type: ignore[func-returns-value]
        async with await trio.open_tcp_stream(*node.address) as tcp:
            assert await tcp.receive_some() == b""
        assert asked == ["nobody", "127.0.0.1"]
        node.may_enter = lambda ip: True
        await check_serves(node)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: p2pool\r\n\r\n" * 10,
        b"\x05\xff\xfe\xfd\xfc\n" * 10,
        delimited(b"/multistream/1.0.0") + delimited(b"\xff\xfe\xfd"),
        multistream("/noise") + b"\x00\x20" + b"\x07" * 32 + b"\x00\x60" + b"\x07" * 96,
        encode_uvarint(2**31) + b"x",
    ],
    ids=["http", "not-utf8", "protocol-not-utf8", "noise", "2-GB-name"],
)
async def test_garbage_in_the_handshake_costs_the_attacker_its_connection(garbage: bytes) -> None:
    async with serving() as node:
        async with await trio.open_tcp_stream(*node.address) as tcp:
            await tcp.send_all(garbage)
            with trio.fail_after(PATIENCE_S):
                while await receive(tcp):
                    pass
            await until(lambda: node.blamed)
        assert node.blamed == [(None, "127.0.0.1", "handshake")], node.details
        await check_serves(node)


async def receive(tcp: trio.SocketStream) -> bytes:
    try:
        return bytes(await tcp.receive_some())
    except trio.BrokenResourceError:
        return b""


async def test_a_handshake_that_does_not_end_is_ended() -> None:
    async with serving(replace(LIMITS, handshake_s=0.1)) as node:
        async with await trio.open_tcp_stream(*node.address) as tcp:
            await tcp.send_all(delimited(b"/multistream/1.0.0"))
            with trio.fail_after(PATIENCE_S):
                while await receive(tcp):
                    pass
            await until(lambda: node.blamed)
        assert node.blamed == [(None, "127.0.0.1", "handshake")]


async def test_an_endless_handshake_is_ended_by_its_size() -> None:
    async with serving() as node:
        async with await trio.open_tcp_stream(*node.address) as tcp:
            await tcp.send_all(delimited(b"/multistream/1.0.0"))
            with trio.fail_after(PATIENCE_S), suppress(trio.BrokenResourceError):
                while True:
                    await tcp.send_all(delimited(b"/unknown") * 100)
            await until(lambda: node.blamed)
        assert node.blamed == [(None, "127.0.0.1", "handshake")]
        assert "bytes before the handshake" in node.details[0]
        await check_serves(node)


@pytest.mark.parametrize("limits", [{"half_open_per_ip": 3}, {"half_open": 3, "half_open_per_ip": 99}], ids=str)
async def test_half_open_connections_make_room_for_new_ones(limits: dict[str, int]) -> None:
    async with serving(replace(LIMITS, **limits)) as node:
        idle = [await trio.open_tcp_stream(*node.address) for _ in range(10)]
        await check_serves(node)
        with trio.fail_after(PATIENCE_S):
            for tcp in idle[:7]:
                while await receive(tcp):
                    pass
        for tcp in idle:
            await tcp.aclose()
        assert not node.blamed


async def test_who_hangs_up_in_the_handshake_is_not_blamed() -> None:
    async with serving() as node:
        for data in (b"", delimited(b"/multistream/1.0.0"), multistream("/noise") + b"\x00\x20abc"):
            async with await trio.open_tcp_stream(*node.address) as tcp:
                await tcp.send_all(data)
        await check_serves(node)
        assert not node.blamed, node.details


@pytest.mark.slow
async def test_inbound_slots_come_back() -> None:
    """Stock: each inbound connection takes a slot for as long as the node lives."""
    async with serving(max_connections=3) as node:
        for _ in range(8):
            async with attacking(node) as attacker:
                peer_id = ID.from_base58(attacker.peer_id)
                await until(lambda peer_id=peer_id: node.hardened.swarm.get_connections(peer_id))  # type: ignore[misc]
            await until(lambda: not node.hardened.swarm.get_connections())
        await check_serves(node)


# The multiplexer


async def wait_for_ever(stream: INetStream) -> None:
    await trio.sleep_forever()


async def test_yamux_receive_windows_are_enforced() -> None:
    async with serving() as node:
        node.hardened.host.set_stream_handler(IDLE, wait_for_ever)  # type: ignore[arg-type]
        async with attacking(node) as attacker:
            stream_id = await attacker.open(IDLE)
            with suppress(IOException):
                for _ in range(2**21 // (WINDOW // 4)):
                    await attacker.send(stream_id, bytes(WINDOW // 4))
            await check_blamed(node, attacker, "yamux")
            assert "receive window" in node.details[0]


async def test_yamux_receive_windows_stop_growing() -> None:
    """Stock: a stream that is read promptly gets a window of 16 MB, which its sender can fill when reading stops."""
    async with serving() as node, serving() as honest:
        done = trio.Event()

        async def drain(stream: INetStream) -> None:
            for _ in range(64):
                await stream.read(1024)
            done.set()
            await trio.sleep_forever()

        node.hardened.host.set_stream_handler(IDLE, drain)  # type: ignore[arg-type]
        await honest.hardened.connect(node.hardened.addresses[0])
        stream = await honest.hardened.new_stream(node.hardened.peer_id, IDLE)
        with trio.fail_after(PATIENCE_S):
            await stream.write(bytes(64 * 1024))
            await done.wait()
        (connection,) = node.hardened.swarm.get_connections()
        muxer = connection.muxed_conn
        assert isinstance(muxer, Yamux)
        assert max(stream.target_recv_window for stream in muxer.streams.values()) <= 2**20


async def test_yamux_one_frame_beyond_the_window_is_enough() -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.session.write(frame(DATA, SYN, 1, WINDOW + 1))
        await check_blamed(node, attacker, "yamux")


async def test_yamux_data_of_all_streams_together_is_bounded() -> None:
    async with serving(replace(LIMITS, unread_bytes=WINDOW)) as node:
        node.hardened.host.set_stream_handler(IDLE, wait_for_ever)  # type: ignore[arg-type]
        async with attacking(node) as attacker:
            ids = [await attacker.open(IDLE) for _ in range(3)]
            with suppress(IOException):
                for stream_id in ids:
                    await attacker.send(stream_id, bytes(WINDOW // 2 - 100))
            await check_blamed(node, attacker, "yamux")
            assert "unread in all streams" in node.details[0]


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("!BBHII", 1, PING, SYN, 0, 0),
        frame(9, 0, 0, 0),
        frame(WINDOW_UPDATE, SYN, 2, 0),
        frame(WINDOW_UPDATE, SYN, 0, 0),
    ],
    ids=["version", "type", "our-stream-id", "stream-0"],
)
async def test_yamux_frames_that_cannot_be_cost_the_attacker_its_connection(header: bytes) -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.session.write(header)
        await check_blamed(node, attacker, "yamux")


async def test_yamux_frames_without_data_are_rationed() -> None:
    async with serving(replace(LIMITS, frames_per_s=1, frames_burst=200)) as node, attacking(node) as attacker:
        await attacker.session.write(frame(DATA, 0, 1, 0) * 300)
        await attacker.wait_closed()
        await until(lambda: node.blamed)
        assert node.rules == ["yamux"]


async def test_more_streams_than_allowed_cost_the_attacker_its_connection() -> None:
    async with serving(replace(LIMITS, streams=8)) as node, attacking(node) as attacker:
        await attacker.session.write(b"".join(frame(WINDOW_UPDATE, SYN, 2 * i + 1, 0) for i in range(9)))
        await check_blamed(node, attacker, "streams")


async def test_new_streams_are_rationed() -> None:
    async with serving(replace(LIMITS, streams_per_s=1e-3, streams_burst=20)) as node, attacking(node) as attacker:
        opened = (frame(WINDOW_UPDATE, SYN, 2 * i + 1, 0) + frame(WINDOW_UPDATE, RST, 2 * i + 1, 0) for i in range(21))
        await attacker.session.write(b"".join(opened))
        await check_blamed(node, attacker, "streams")


@pytest.mark.slow
async def test_a_peer_that_stands_still_is_noticed() -> None:
    async with serving(replace(LIMITS, ping_every_s=0.05, pong_s=0.1)) as node, attacking(node) as attacker:
        await attacker.wait_closed()
        await until(lambda: not node.hardened.swarm.get_connections())
        assert not node.blamed


@pytest.mark.slow
async def test_a_peer_that_does_not_read_is_noticed() -> None:
    async with serving(replace(LIMITS, write_s=0.1)) as node:
        node.hardened.host.set_stream_handler("/test/much", lambda stream: stream.write(bytes(2**25)))  # type: ignore[arg-type]
        async with attacking(node) as attacker:
            await until(node.hardened.swarm.get_connections)
            await attacker.session.write(frame(WINDOW_UPDATE, 0, await attacker.open("/test/much"), 2**31))
            await until(lambda: not node.hardened.swarm.get_connections())
        await check_serves(node)


async def test_a_cancelled_write_leaves_the_connection_whole() -> None:
    """Stock: a write that is cancelled halfway leaves half of an encrypted packet, and the honest peer hangs up."""
    async with serving() as node, serving() as honest:
        await honest.hardened.connect(node.hardened.addresses[0])
        stream = await honest.hardened.new_stream(node.hardened.peer_id, ECHO)
        for steps in range(1, 12):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.write, bytes(20_000))
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        await ask_echo(honest.hardened, node.hardened.peer_id)
        assert len(node.hardened.swarm.get_connections()) == 1


# Streams


async def test_an_exception_in_a_handler_costs_the_attacker_its_connection() -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.send(await attacker.open(ECHO), b"raise")
        await check_blamed(node, attacker, "fault")


async def test_a_peer_error_in_a_handler_is_blamed_by_its_rule() -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.send(await attacker.open(ECHO), b"refuse")
        await check_blamed(node, attacker, "R3")


@pytest.mark.parametrize(
    "garbage",
    [
        delimited(b"/multistream/1.0.0") + delimited(b"\xff\xfe\xfd"),
        delimited(b"/multistream/1.0.0") + encode_uvarint(2**40) + b"x" * 1000,
        b"\x03abc",
    ],
    ids=["not-utf8", "endless", "not-delimited"],
)
async def test_a_protocol_name_that_cannot_be_costs_the_attacker_its_connection(garbage: bytes) -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.session.write(frame(DATA, SYN, 1, len(garbage), garbage))
        await check_blamed(node, attacker, "negotiation")


@pytest.mark.slow
async def test_an_endless_negotiation_of_a_stream_is_ended() -> None:
    async with serving() as node, attacking(node) as attacker:
        stream_id = await attacker.open("/unknown")
        await attacker.send(stream_id, delimited(b"/unknown") * 1000)
        await check_blamed(node, attacker, "negotiation")


async def test_streams_of_one_protocol_are_few() -> None:
    """Else each could hold a request that is almost complete."""
    async with serving() as node:
        running: Counter[str] = Counter()
        done = trio.Event()

        async def finish(stream: INetStream) -> None:
            done.set()

        async def idle(stream: INetStream) -> None:
            running["idle"] += 1
            try:
                await stream.read(1)
            finally:
                running["idle"] -= 1

        node.hardened.host.set_stream_handler(IDLE, idle)  # type: ignore[arg-type]
        node.hardened.host.set_stream_handler("/test/done/1", finish)  # type: ignore[arg-type]
        async with attacking(node) as attacker:
            for _ in range(10):
                await attacker.open(IDLE)
            await until(lambda: running["idle"])
            await attacker.send(await attacker.open("/test/done/1"), b"hello")
            with trio.fail_after(PATIENCE_S):
                await done.wait()
            await until(lambda: len(idle_streams(node)) == LIMITS.streams_per_protocol)
            assert running["idle"] == LIMITS.streams_per_protocol
        await until(lambda: not running["idle"])
        assert not node.blamed


def streams_of(node: Node) -> list[INetStream]:
    return [stream for connection in node.hardened.swarm.get_connections() for stream in connection.get_streams()]


def idle_streams(node: Node) -> list[INetStream]:
    return [stream for stream in streams_of(node) if stream.get_protocol() == IDLE]


async def test_nobody_is_asked_for_its_addresses_nor_may_push_them() -> None:
    """Stock: whatever number of addresses a peer answers with, or pushes, is kept."""
    async with serving() as node, serving() as hostile:
        asked: list[str] = []

        async def answer(stream: INetStream) -> None:
            asked.append("who are you?")

        hostile.hardened.host.set_stream_handler("/ipfs/id/1.0.0", answer)  # type: ignore[arg-type]
        await hostile.hardened.connect(node.hardened.addresses[0])
        await ask_echo(hostile.hardened, node.hardened.peer_id)
        await ask_echo(node.hardened, hostile.hardened.peer_id)
        await until(lambda: node.hardened.pubsub.peers and hostile.hardened.pubsub.peers)
        with pytest.raises(PeerError, match="not supported"):
            await hostile.hardened.new_stream(node.hardened.peer_id, "/ipfs/id/push/1.0.0")
        assert not asked
        assert ID.from_base58(hostile.hardened.peer_id) not in node.hardened.host.get_peerstore().peer_ids()


async def test_nobody_is_called_unasked() -> None:
    async with serving() as node, serving() as other:
        address = Multiaddr(other.hardened.addresses[0].rpartition("/p2p/")[0])
        node.hardened.host.get_peerstore().add_addrs(ID.from_base58(other.hardened.peer_id), [address], 3600)
        await node.hardened.swarm.auto_connector.maybe_connect()
        await check_serves(other)
        assert not node.hardened.swarm.get_connections()


# Pubsub


def rsa_message() -> rpc_pb2.RPC:
    key = crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=b"not a key").SerializeToString()
    message = rpc_pb2.Message(from_id=b"\x12\x20" + bytes(32), data=b"x", topicIDs=[TOPIC], seqno=bytes(8), key=key)
    message.signature = b"signature"
    return rpc_pb2.RPC(publish=[message])


def many_messages() -> rpc_pb2.RPC:
    return rpc_pb2.RPC(publish=[signed(b"m" * 32, number) for number in range(65)])


def wrong_signature() -> rpc_pb2.RPC:
    message = signed(b"m" * 32, 1)
    message.data = b"other"
    return rpc_pb2.RPC(publish=[message])


def many_topics() -> rpc_pb2.RPC:
    message = signed(b"m" * 32, 1)
    message.topicIDs.append("another")
    return rpc_pb2.RPC(publish=[message])


def many_controls() -> rpc_pb2.RPC:
    grafts = [rpc_pb2.ControlGraft(topicID=f"topic {number}") for number in range(65)]
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(graft=grafts))


@pytest.mark.parametrize(
    "rpc",
    [
        b"\xff\xff\xff\xff\xff\xff",
        rsa_message(),
        many_messages(),
        wrong_signature(),
        many_topics(),
        many_controls(),
        subscribe(*(f"topic {number}" for number in range(65))),
        subscribe("t" * 257),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(from_id=signed(b"m" * 32, 1).from_id, topicIDs=[TOPIC])]),
    ],
    ids=[
        "not-protobuf",
        "bad-rsa-key",
        "many-messages",
        "wrong-signature",
        "many-topics",
        "many-controls",
        "many-subscriptions",
        "long-topic",
        "no-sequence-number",
    ],
)
async def test_pubsub_an_rpc_that_cannot_be_costs_the_attacker_its_connection(rpc: rpc_pb2.RPC | bytes) -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.send_rpc(await attacker.open_pubsub(), rpc)
        await check_blamed(node, attacker, "pubsub")


async def test_pubsub_an_rpc_too_large_costs_the_attacker_its_connection() -> None:
    async with serving() as node, attacking(node) as attacker:
        await attacker.send(await attacker.open_pubsub(), encode_uvarint(LIMITS.rpc_bytes + 1))
        await check_blamed(node, attacker, "pubsub")


async def test_pubsub_an_exception_in_a_validator_costs_the_attacker_its_connection() -> None:
    async with serving() as node, attacking(node) as attacker:
        node.judge = lambda data: bool(1 // (data != b"zero"))
        await attacker.send_rpc(await attacker.open_pubsub(), rpc_pb2.RPC(publish=[signed(b"m" * 32, 1, b"zero")]))
        await check_blamed(node, attacker, "fault")


async def test_pubsub_subscriptions_are_few_and_rarely_change() -> None:
    async with serving(replace(LIMITS, subscriptions_per_s=1e-3)) as node, attacking(node) as attacker:
        stream_id = await attacker.open_pubsub()
        peer_id = ID.from_base58(attacker.peer_id)
        for number in range(4):
            await attacker.send_rpc(stream_id, subscribe(*(f"topic {64 * number + index}" for index in range(30))))
        await until(lambda: peer_id in node.hardened.pubsub.peer_topics.get(TOPIC, ()))
        await until(lambda: sum(peer_id in peers for peers in node.hardened.pubsub.peer_topics.values()) == 16)
        await attacker.send_rpc(stream_id, subscribe(*(f"topic {index}" for index in range(30))))
        await check_blamed(node, attacker, "pubsub")


async def test_pubsub_a_validator_is_asked_about_an_old_message_again() -> None:
    """Stock: its answer is remembered for 300 s, but that a message was seen for only 120 s."""
    async with serving() as node, attacking(node) as attacker:
        stream_id = await attacker.open_pubsub()
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(publish=[signed(b"m" * 32, 1)]))
        await until(lambda: len(node.received) == 1)
        node.hardened.pubsub.seen_messages.cache.clear()
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(publish=[signed(b"m" * 32, 1)]))
        await until(lambda: len(node.received) == 2)


async def test_pubsub_many_small_messages_arrive_in_order() -> None:
    async with serving() as node, attacking(node) as attacker:
        stream_id = await attacker.open_pubsub()
        for start in range(0, 256, 64):
            batch = [signed(b"m" * 32, number, b"%d" % number) for number in range(start, start + 64)]
            await attacker.send_rpc(stream_id, rpc_pb2.RPC(publish=batch))
        await until(lambda: len(node.received) == 256)
        assert node.received == [b"%d" % number for number in range(256)]
        assert not node.blamed


# Gossip


async def test_gossip_about_strange_topics_is_not_remembered() -> None:
    async with serving() as node, attacking(node) as attacker:
        stream_id = await attacker.open_pubsub()
        gossip = node.hardened.gossip
        peer_id = ID.from_base58(attacker.peer_id)
        control = rpc_pb2.ControlMessage(
            prune=[rpc_pb2.ControlPrune(topicID=f"topic {number}", backoff=2**40) for number in range(20)],
            graft=[rpc_pb2.ControlGraft(topicID=f"topic {number}") for number in range(20)],
            ihave=[rpc_pb2.ControlIHave(topicID=f"topic {number}", messageIDs=[b"id"]) for number in range(20)],
        )
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(control=control))
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(publish=[signed(b"m" * 32, 1)]))
        await until(lambda: node.received)
        assert not gossip.back_off
        assert not gossip.ihave_message_limits.get(peer_id)
        assert not gossip.graft_flood_tracking.get(peer_id)


async def test_gossip_does_not_call_whom_a_prune_names() -> None:
    async with serving() as node, attacking(node) as attacker:
        called = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = called[0].socket.getsockname()[1]
        stream_id = await attacker.open_pubsub()
        keys = create_new_key_pair(next(seeds))
        victim = ID.from_pubkey(keys.public_key)
        record = create_signed_peer_record(victim, [Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")], keys.private_key)
        info = rpc_pb2.PeerInfo(peerID=victim.to_bytes(), signedPeerRecord=record.marshal_envelope())
        prune = rpc_pb2.ControlPrune(topicID=TOPIC, peers=[info])
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(control=rpc_pb2.ControlMessage(prune=[prune])))
        await attacker.send_rpc(stream_id, rpc_pb2.RPC(publish=[signed(b"m" * 32, 1)]))
        await until(lambda: node.received)
        await until(lambda: node.hardened.gossip.back_off)
        assert victim not in node.hardened.host.get_peerstore().peer_ids()
        for listener in called:
            await listener.aclose()


async def test_gossip_one_id_wanted_often_is_sent_once() -> None:
    async with serving() as node, serving() as honest:
        await honest.hardened.connect(node.hardened.addresses[0])
        asking, asked = ID.from_base58(honest.hardened.peer_id), node.hardened.gossip
        await until(lambda: asking in node.hardened.pubsub.peer_topics.get(TOPIC, ()))
        await until(lambda: asking in asked.peer_protocol)
        await node.hardened.pubsub.publish(TOPIC, b"own")
        await until(lambda: honest.received)
        sent: list[rpc_pb2.RPC] = []
        asked.send_rpc = lambda peer_id, rpc, priority=False: sent.append(rpc)  # type: ignore[method-assign]
        ids = asked.mcache.window(TOPIC) * 1000
        control = rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=ids)])
        await asked.handle_rpc(rpc_pb2.RPC(control=control), asking)
        assert [len(rpc.publish) for rpc in sent] == [1]


async def test_gossip_messages_of_our_own_reach_everybody() -> None:
    async with serving() as node, serving() as one, serving() as two:
        for honest in (one, two):
            await honest.hardened.connect(node.hardened.addresses[0])
        await until(lambda: len(node.hardened.pubsub.peer_topics.get(TOPIC, ())) == 2)
        await until(lambda: len(node.hardened.pubsub.peers) == 2)
        node.hardened.gossip.mesh[TOPIC].clear()
        await node.hardened.pubsub.publish(TOPIC, b"own")
        await until(lambda: one.received and two.received)
