"""Who may connect, from where and for how long: several ports, proxies, TLS, limits by address."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pool.errors import ConfigError, StratumError
from p2pool.stratum.proxy import MAX_HEADER_BYTES, SIGNATURE, ProxyReader
from p2pool.stratum.server import LINGER_S, STORM_S, ServerSettings, StratumServer, open_listeners
from p2pool.stratum.tls import Tls, TlsError, load_certificate
from tests.p2pool.test_stratum_protocol import SHARE, USER, VARDIFF, ToyDesk, find_nonce
from tests.p2pool.test_stratum_server import Client, until_connections

SETTINGS = ServerSettings(vardiff=VARDIFF)
BEHIND_PROXY = replace(SETTINGS, proxies=(ipaddress.ip_network("127.0.0.0/8"),))
Connect = Callable[..., Awaitable[Client]]


def v1(address: str) -> bytes:
    kind = b"TCP6" if ":" in address else b"TCP4"
    return b"PROXY " + kind + b" " + address.encode() + b" 192.0.2.1 40000 3333\r\n"


def v2(address: str, *, extra: bytes = b"", kind: int = 0x21) -> bytes:
    ip = ipaddress.ip_address(address)
    body = ip.packed + ip.packed + struct.pack(">HH", 40000, 3333) + extra
    return SIGNATURE + struct.pack(">BBH", kind, 0x11 if ip.version == 4 else 0x21, len(body)) + body


@asynccontextmanager
async def serving(settings: ServerSettings, ports: int = 1) -> AsyncIterator[tuple[StratumServer, Connect]]:
    clients: list[Client] = []
    server = StratumServer(ToyDesk(), settings)
    async with trio.open_nursery() as nursery:
        listeners = [listener for _ in range(ports) for listener in open_listeners("127.0.0.1", 0)]
        await nursery.start(server.serve, listeners)

        async def connect(first: bytes = b"", port: int = 0) -> Client:
            clients.append(Client(await trio.open_tcp_stream(*server.addresses[port])))
            if first:
                await clients[-1].stream.send_all(first)
            return clients[-1]

        try:
            yield server, connect
        finally:
            for client in clients:
                client.stream.socket.close()
        nursery.cancel_scope.cancel()


# The PROXY header


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (v1("198.51.100.7"), "198.51.100.7"),
        (v1("2001:db8::7"), "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
        (v2("198.51.100.7"), "198.51.100.7"),
        (v2("2001:db8::7"), "2001:db8::7"),
        (v2("198.51.100.7", extra=b"\x04\x00\x03abc"), "198.51.100.7"),
        (v2("198.51.100.7", kind=0x20), None),
        (SIGNATURE + b"\x20\x00\x00\x00", None),
        (SIGNATURE + b"\x21\x00\x00\x00", None),
    ],
)
def test_a_proxy_header_names_the_miner_whole_or_in_pieces(header: bytes, address: str | None) -> None:
    whole, bytewise = ProxyReader(), ProxyReader()
    assert whole.receive(header + b'{"id":1') == b'{"id":1'
    assert whole.address == address
    for byte in header[:-1]:
        assert bytewise.receive(bytes([byte])) is None
    assert bytewise.receive(header[-1:]) == b""
    assert bytewise.address == address


@pytest.mark.parametrize(
    "header",
    [
        b'{"id":1}\n',
        b"\x16\x03\x01",
        b"PROXZ",
        b"PROXY TCP4 nowhere 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 \xff 192.0.2.1 1 2\r\n",
        b"PROXY TCP5 192.0.2.2 192.0.2.1 1 2\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY " + b" " * 200,
        b"\r\n\r\n{",
        SIGNATURE + b"\x11\x11\x00\x0c",
        SIGNATURE + b"\x21\x11\x00\x04aaaa",
        SIGNATURE + struct.pack(">BBH", 0x21, 0x11, MAX_HEADER_BYTES + 1),
    ],
)
def test_what_is_no_proxy_header_is_refused(header: bytes) -> None:
    with pytest.raises(StratumError, match="no PROXY header"):
        ProxyReader().receive(header)


@pytest.mark.slow
@given(
    st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]),
    st.binary(max_size=300),
    st.lists(st.integers(0, 320), max_size=4),
)
def test_arbitrary_bytes_split_anywhere_are_a_header_or_refused(start: bytes, data: bytes, cuts: list[int]) -> None:
    def read(pieces: list[bytes]) -> object:
        reader, rest = ProxyReader(), b""
        try:
            for i, piece in enumerate(pieces):
                got = reader.receive(piece)
                if got is not None:
                    rest = got + b"".join(pieces[i + 1 :])
                    return reader.address, rest
        except StratumError:
            return "refused"
        return "incomplete"

    data = start + data
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert read([data]) == read([data[a:b] for a, b in pairwise(edges)])


async def test_a_named_proxy_tells_whom_it_speaks_for_and_the_session_goes_on() -> None:
    async with serving(BEHIND_PROXY) as (server, connect):
        for header in (v1("198.51.100.7"), v2("198.51.100.8"), v2("198.51.100.9", kind=0x20)):
            client = await (await connect(header)).start()
            assert (await client.ask("mining.ping"))["result"] == "pong"
        assert server.statistics().dropped == {}


async def test_a_named_proxy_that_says_nothing_of_the_miner_is_closed() -> None:
    async with serving(BEHIND_PROXY) as (server, connect):
        assert await (await connect(b'{"id":1,"method":"mining.ping"}\n')).is_closed()
        assert server.statistics().dropped == {"no PROXY header": 1}


async def test_nobody_else_is_believed_to_be_a_proxy() -> None:
    settings = replace(SETTINGS, proxies=(ipaddress.ip_network("198.51.100.0/24"),))
    async with serving(settings) as (server, connect):
        assert await (await connect(v1("203.0.113.1"))).is_closed()
        await (await connect()).start()
        assert server.statistics().dropped == {"not a JSON object": 1}


# Limits


async def test_an_address_has_so_many_connections_and_others_are_not_hurt() -> None:
    async with serving(replace(BEHIND_PROXY, max_per_ip=2)) as (server, connect):
        first = await (await connect(v1("198.51.100.7"))).start()
        await (await connect(v1("198.51.100.7"))).start()
        assert await (await connect(v1("198.51.100.7"))).is_closed()
        await (await connect(v2("198.51.100.8"))).start()
        assert server.statistics().dropped == {"too many connections of one address": 1}
        await first.stream.aclose()
        await until_connections(server, 2)
        await (await connect(v1("198.51.100.7"))).start()


async def test_addresses_of_one_ipv6_subnet_count_as_one() -> None:
    async with serving(replace(BEHIND_PROXY, max_per_ip=1)) as (_, connect):
        await (await connect(v2("2001:db8::1"))).start()
        assert await (await connect(v2("2001:db8::ffff:2"))).is_closed()
        await (await connect(v2("2001:db8:0:1::1"))).start()


async def test_an_ipv4_address_written_as_ipv6_is_that_address() -> None:
    async with serving(replace(BEHIND_PROXY, max_per_ip=1)) as (_, connect):
        await (await connect(v2("::ffff:198.51.100.7"))).start()
        assert await (await connect(v1("198.51.100.7"))).is_closed()
        await (await connect(v2("::ffff:198.51.100.8"))).start()


async def test_an_address_has_few_connections_without_a_user() -> None:
    async with serving(replace(BEHIND_PROXY, max_strangers_per_ip=2)) as (server, connect):
        idle = await connect(v1("198.51.100.7"))
        await (await connect(v1("198.51.100.7"))).start()
        await idle.ask("mining.ping")
        await (await connect(v1("198.51.100.7"))).start()
        second = await connect(v1("198.51.100.7"))
        await second.ask("mining.ping")
        assert await (await connect(v1("198.51.100.7"))).is_closed()
        assert server.statistics().dropped == {"too many of one address without a user": 1}
        await second.start()
        await (await connect(v1("198.51.100.7"))).start()


async def test_a_storm_of_one_address_is_calmed_and_passes(mock_clock: MockClock) -> None:
    async with serving(replace(BEHIND_PROXY, max_opened_per_ip=5)) as (server, connect):
        for _ in range(5):
            client = await (await connect(v1("198.51.100.7"))).start()
            await client.stream.aclose()
        await until_connections(server, 0)
        assert await (await connect(v1("198.51.100.7"))).is_closed()
        await (await connect(v1("198.51.100.8"))).start()
        assert server.statistics().dropped == {"a storm of one address": 1}
        mock_clock.jump(STORM_S + 2)
        await trio.lowlevel.checkpoint()
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        await (await connect(v1("198.51.100.7"))).start()


async def test_the_machine_itself_may_open_more() -> None:
    settings = replace(SETTINGS, max_per_ip=1, max_strangers_per_ip=1, max_opened_per_ip=1)
    async with serving(settings) as (_, connect):
        for _ in range(3):
            await (await connect()).start()


async def test_strangers_that_linger_make_room_for_newcomers_and_miners_do_not(mock_clock: MockClock) -> None:
    async with serving(replace(SETTINGS, max_connections=2)) as (server, connect):
        miner, stranger = await (await connect()).start(), await connect()
        await stranger.ask("mining.ping")
        assert await (await connect()).is_closed()
        assert server.statistics().dropped == {"too many connections": 1}
        mock_clock.jump(LINGER_S)
        newcomer = await (await connect()).start()
        assert await stranger.is_closed()
        assert await (await connect()).is_closed()
        assert server.statistics().dropped == {"too many connections": 2, "makes room": 1}
        for client in (miner, newcomer):
            assert (await client.ask("mining.ping"))["result"] == "pong"


async def test_who_loses_its_user_is_a_stranger_again(mock_clock: MockClock) -> None:
    desk = ToyDesk()
    server = StratumServer(desk, SETTINGS)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, open_listeners("127.0.0.1", 0))
        client = await Client(await trio.open_tcp_stream(*server.addresses[0])).start()
        mock_clock.jump(1000)

        def refuse(*, user: str, password: str, user_agent: str) -> object:
            raise StratumError(24, "no more")

        desk.authorize = refuse  # type: ignore[method-assign, assignment]
        while (await client.ask("mining.authorize", USER, "x")).get("error") is None:
            pass
        mock_clock.jump(SETTINGS.unauthorized_limit_s - 1)
        await client.ask("mining.ping")
        mock_clock.jump(3)
        assert await client.is_closed()
        assert server.statistics().dropped == {"not authorized in time": 1}
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


async def test_each_port_has_its_own_start_difficulty() -> None:
    desk = ToyDesk()
    listeners = [*open_listeners("127.0.0.1", 0), *open_listeners("127.0.0.1", 0)]
    hard = listeners[1].getsockname()[1]
    server = StratumServer(desk, replace(SETTINGS, start_difficulties={hard: 2.0**-25}))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        heard = []
        for address in server.addresses:
            client = Client(await trio.open_tcp_stream(*address))
            await client.ask("mining.subscribe", "x")
            await client.send("mining.authorize", USER, "x")
            while (message := await client.receive()).get("method") != "mining.set_difficulty":
                pass
            heard.append(message["params"][0])
            await client.stream.aclose()
        assert heard == [2.0**-28, 2.0**-25]
        nursery.cancel_scope.cancel()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(built.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


class SecureClient(Client):
    """A miner that speaks TLS."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream  # type: ignore[assignment]
        self.buffer = b""
        self.extranonce1 = ""
        self.session_id = ""
        self.notify = []


async def test_one_port_serves_tls_and_plain_text(certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with serving(replace(SETTINGS, tls=load_certificate(*certificate))) as (server, connect):
        plain = await (await connect()).start()
        raw = await connect()
        stream = trio.SSLStream(raw.stream, trust, server_hostname="localhost")
        secure = SecureClient(stream)
        await secure.start()
        for client in (plain, secure):
            nonce = find_nonce(client.notify, client.extranonce1, at_most=SHARE)
            words = [USER, client.notify[0], "00" * 8, client.notify[7], f"{nonce:08x}"]
            assert (await client.ask("mining.submit", *words))["result"] is True
        server.broadcast(clean=True)
        for client in (plain, secure):
            assert (await client.receive())["method"] == "mining.notify"
        assert server.statistics().dropped == {}


async def test_tls_behind_a_proxy(certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with serving(replace(BEHIND_PROXY, tls=load_certificate(*certificate))) as (_, connect):
        raw = await connect(v2("198.51.100.7"))
        await SecureClient(trio.SSLStream(raw.stream, trust, server_hostname="localhost")).start()


async def test_what_begins_like_tls_and_is_none_ends_its_own_connection(certificate: tuple[Path, Path]) -> None:
    async with serving(replace(SETTINGS, tls=load_certificate(*certificate))) as (server, connect):
        good = await (await connect()).start()
        assert await (await connect(b"\x16\x03\x01\x00\x05hello" + bytes(40))).is_closed()
        assert server.statistics().dropped == {"failed TLS": 1}
        assert (await good.ask("mining.ping"))["result"] == "pong"


async def test_a_handshake_that_never_ends_is_closed(certificate: tuple[Path, Path], mock_clock: MockClock) -> None:
    async with serving(replace(SETTINGS, tls=load_certificate(*certificate))) as (server, connect):
        slow = await connect(b"\x16\x03\x01\x02\x00\x01")
        good = await (await connect()).start()
        mock_clock.jump(SETTINGS.unauthorized_limit_s + 1)
        assert await slow.is_closed()
        assert server.statistics().dropped == {"not authorized in time": 1}
        await good.send("mining.ping")


@pytest.mark.slow
@given(st.binary(max_size=300))
def test_arbitrary_bytes_for_tls_are_taken_or_refused(certificate: tuple[Path, Path], data: bytes) -> None:
    tls = Tls(load_certificate(*certificate))
    try:
        plain, _ = tls.receive(b"\x16" + data)
    except TlsError:
        pass
    else:
        assert plain == b""
        assert not tls.is_open


def test_a_certificate_that_cannot_be_used_is_the_operators_to_know(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    for pair in ((tmp_path / "none.pem", certificate[1]), (certificate[0], tmp_path / "junk.pem"), certificate[::-1]):
        with pytest.raises(ConfigError, match=r"certificate .* with key"):
            load_certificate(pair[0], pair[1])


@pytest.mark.slow
async def test_hundreds_that_connect_and_go_leave_nothing_behind() -> None:
    async with serving(SETTINGS) as (server, connect):
        good = await (await connect()).start()
        for _ in range(5):
            gone = [await connect() for _ in range(60)]
            for i, client in enumerate(gone):
                if i % 2:
                    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.stream.socket.close()
        await until_connections(server, 1)
        assert (await good.ask("mining.ping"))["result"] == "pong"
        assert server.statistics().dropped == {}
