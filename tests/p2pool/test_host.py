"""The libp2p transport alone: peers that break the rules of the wire, faults of our own, and the local network."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError

from p2pool.errors import ConfigError, PeerError
from p2pool.p2p import BLOCK, SYNC, Link, Traffic
from p2pool.p2p.frames import Room, encode_frame
from p2pool.p2p.hardening import HardenedHost, open_host, run_host
from p2pool.p2p.host import MAX_STREAMS, Deadlines, Libp2pTransport, Limits
from p2pool.p2p.lan import follow_lan
from p2pool.p2p.wire import MAX_FRAME
from tests.p2pool.test_transport import NETWORK_ID, TIMEOUT_S, Libp2pWorld, Recorder, rule_of, running, until

pytestmark = pytest.mark.slow

WORLD = Libp2pWorld()
PROTOCOL = f"/p2pool/{NETWORK_ID.hex()}/{SYNC}"


@asynccontextmanager
async def stranger(transport: Libp2pTransport) -> AsyncIterator[HardenedHost]:
    """A libp2p host that is connected and speaks what it likes."""
    blame: Any = lambda **what: None  # noqa: E731
    host = open_host(
        seed=b"s" * 32,
        listen=["/ip4/127.0.0.1/tcp/0"],
        max_connections=5,
        may_enter=lambda ip: True,
        blame=blame,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(run_host, host)
        await host.connect(transport.addresses[0])
        await until(lambda: bool(transport.links))
        yield host
        host.drop(transport.peer_id)
        await until(lambda: not host.swarm.get_connections())
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def attacked(**more: Any) -> AsyncIterator[tuple[Libp2pTransport, Recorder, HardenedHost]]:
    transport = WORLD.transport(1, **more)
    async with running(transport) as (handler,), stranger(transport) as host:
        yield transport, handler, host


async def wait_end(stream: Any) -> None:
    """Read a stream until the other side has closed or reset it."""
    with trio.fail_after(TIMEOUT_S), suppress(StreamError):
        while True:
            await stream.read(1000)


@pytest.mark.parametrize(
    "raw",
    [encode_frame(bytes(MAX_FRAME[SYNC][0] + 1))[:10], b"\xff\xff\xff\xff\xff", b"\x80\x00"],
    ids=["too large", "too long", "not the shortest"],
)
def test_a_bad_length_costs_the_peer(raw: bytes) -> None:
    async def main() -> None:
        async with attacked() as (transport, handler, host):
            stream = await host.new_stream(transport.peer_id, PROTOCOL)
            await stream.write(raw)
            await wait_end(stream)
            assert handler.blames == [(host.peer_id, "frame")]
            assert handler.requests == []

    WORLD.run(main)


def test_requests_come_byte_by_byte_or_several_at_once() -> None:
    async def main() -> None:
        async with attacked() as (transport, handler, host):
            stream = await host.new_stream(transport.peer_id, PROTOCOL)
            for byte in encode_frame(b"slowly"):
                await stream.write(bytes([byte]))
            await stream.write(encode_frame(b"both") + encode_frame(b"at once"))
            await until(lambda: len(handler.requests) == 3)
            assert [request for _, _, request in handler.requests] == [b"slowly", b"both", b"at once"]
            assert handler.blames == []

    WORLD.run(main)


@pytest.mark.parametrize("protocol", [SYNC, BLOCK])
def test_a_peer_has_so_many_streams_and_gets_them_back(protocol: str) -> None:
    async def main() -> None:
        async with attacked() as (transport, handler, host):
            name = PROTOCOL.replace(SYNC, protocol)
            for _ in range(2):
                streams = [await host.new_stream(transport.peer_id, name) for _ in range(MAX_STREAMS[protocol])]
                for stream in streams:
                    await stream.write(encode_frame(b"here"))
                    assert await stream.read(1000) == encode_frame(b"here")
                with suppress(PeerError):  # Refused at the opening, or at the first use.
                    await wait_end(await host.new_stream(transport.peer_id, name))
                for stream in streams:
                    await stream.close()
                    await wait_end(stream)
            assert len(handler.requests) == 2 * MAX_STREAMS[protocol]

    WORLD.run(main)


def test_whoever_does_not_end_its_request_or_read_its_answer_is_slow() -> None:
    async def main() -> None:
        deadlines = Deadlines(request_s=0.2, answer_s=0.2)
        async with attacked(deadlines=deadlines) as (transport, handler, host):

            async def answer(request: bytes) -> bytes:
                return bytes(MAX_FRAME[SYNC][1])

            handler.answer = answer
            sending = await host.new_stream(transport.peer_id, PROTOCOL)
            await sending.write(encode_frame(b"begun")[:-1])
            await wait_end(sending)
            assert handler.blames == [(host.peer_id, "slow")]
            reading = await host.new_stream(transport.peer_id, PROTOCOL)
            await reading.write(encode_frame(b""))
            await until(lambda: handler.blames == [(host.peer_id, "slow")] * 2)

    WORLD.run(main)


def test_whoever_fills_the_room_for_requests_loses_one_and_is_slow() -> None:
    async def main() -> None:
        async with attacked() as (transport, handler, host):
            transport._room = Room(50_000)
            begun = [await host.new_stream(transport.peer_id, PROTOCOL) for _ in range(2)]
            for stream in begun:
                await stream.write(encode_frame(bytes(30_000))[:-1])
            await until(lambda: handler.blames == [(host.peer_id, "slow")])
            await wait_end(begun[1])
            await begun[0].write(b"\0")
            await until(lambda: handler.requests == [(host.peer_id, SYNC, bytes(30_000))])
            assert transport._room.size == 0
            assert len(handler.blames) == 1

    WORLD.run(main)


def test_a_second_answer_is_an_error_and_blaming_it_is_left_to_whoever_asked() -> None:
    async def main() -> None:
        async with attacked() as (transport, handler, host):

            async def answer_twice(stream: Any) -> None:
                await stream.read(1000)
                await stream.write(encode_frame(b"one") + encode_frame(b"two"))
                await wait_end(stream)

            host.host.set_stream_handler(TProtocol(PROTOCOL), answer_twice)
            assert await rule_of(transport.request(host.peer_id, SYNC, b"", TIMEOUT_S)) == "frame"
            assert handler.blames == []

    WORLD.run(main)


def test_a_stream_that_is_idle_ends_and_the_next_request_has_another() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2, deadlines=Deadlines(idle_s=0.3))
        async with running(one, two) as (_, second):
            await one.connect(two.addresses[0])
            for _ in range(2):
                await until(lambda: one._peers[two.peer_id].streams[SYNC].is_ended)
                assert await one.request(two.peer_id, SYNC, b"hello", TIMEOUT_S) == b"hello"
            assert second.blames == []

    WORLD.run(main)


def test_a_request_that_takes_too_long_to_serve_gives_its_stream_back() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2, deadlines=Deadlines(serve_s=0.05))
        async with running(one, two) as (first, second):
            await one.connect(two.addresses[0])

            async def answer(request: bytes) -> bytes:
                if request:
                    await trio.sleep_forever()
                return request

            second.answer = answer
            for _ in range(2 * MAX_STREAMS[SYNC]):
                assert await rule_of(one.request(two.peer_id, SYNC, b"slow", TIMEOUT_S)) == "gone"
            assert await one.request(two.peer_id, SYNC, b"", TIMEOUT_S) == b""
            assert first.blames == second.blames == []

    WORLD.run(main)


def test_a_fault_of_the_handler_ends_one_session_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2)
        async with running(one, two) as (_, second):
            await one.connect(two.addresses[0])

            async def answer(request: bytes) -> bytes:
                if request == b"fault":
                    raise KeyError("ours")
                return b"fine"

            def relays(payload: bytes) -> bool:
                raise KeyError("also ours")

            second.answer, second.relays = answer, relays
            assert await rule_of(one.request(two.peer_id, SYNC, b"fault", TIMEOUT_S)) == "gone"
            with trio.fail_after(TIMEOUT_S):
                while not second.messages:
                    await one.publish(b"gossip")
                    await trio.sleep(0.05)
            assert await one.request(two.peer_id, SYNC, b"", TIMEOUT_S) == b"fine"
            assert second.blames == []

    with caplog.at_level(logging.ERROR, "p2pool.p2p"):
        WORLD.run(main)
    faults = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert faults[0] == "'ours'"
    assert set(faults[1:]) == {"'also ours'"}


def test_a_node_of_another_network_is_refused() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2, network_id=b"other")
        async with running(one, two) as (_, second):
            assert await rule_of(one.connect(two.addresses[0])) == "refused"
            await until(lambda: not one.links and not two.links)
            assert second.requests == []

    WORLD.run(main)


class Asker(Recorder):
    """Asks each peer at once when it is there, as a node does."""

    def __init__(self, transport: Libp2pTransport, nursery: trio.Nursery) -> None:
        super().__init__()
        self._transport = transport
        self._nursery = nursery
        self.rules: list[str] = []

    def opened(self, link: Link) -> bool:
        self._nursery.start_soon(self._ask, link.peer_id)
        return super().opened(link)

    async def _ask(self, peer_id: str) -> None:
        try:
            await self._transport.request(peer_id, SYNC, b"first", TIMEOUT_S)
        except PeerError as error:
            self.rules.append(error.rule)


def test_a_node_of_another_network_is_refused_also_if_it_is_asked_at_once() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2, network_id=b"other")
        async with running(two), trio.open_nursery() as nursery:
            asker = Asker(one, nursery)
            await nursery.start(one.run, asker)
            assert await rule_of(one.connect(two.addresses[0])) == "refused"
            await until(lambda: not one.links and bool(asker.rules))
            assert asker.closings == [two.peer_id]
            nursery.cancel_scope.cancel()

    WORLD.run(main)


def test_a_call_ends_before_the_first_answer_is_there() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2)
        async with running(two) as (second,), trio.open_nursery() as nursery:

            async def answer(request: bytes) -> bytes:
                await released.wait()
                return request

            released, second.answer = trio.Event(), answer
            asker = Asker(one, nursery)
            await nursery.start(one.run, asker)
            assert await one.connect(two.addresses[0]) == two.peer_id
            released.set()
            assert await one.request(two.peer_id, SYNC, b"second", TIMEOUT_S) == b"second"
            assert [request for _, _, request in second.requests] == [b"first", b"second"]
            assert asker.rules == []
            nursery.cancel_scope.cancel()

    WORLD.run(main)


def test_names_are_looked_up() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2)
        async with running(one, two):
            for name in ("nobody.invalid", "a" * 64):
                address = two.addresses[0].replace("/ip4/127.0.0.1/", f"/dns/{name}/")
                assert await rule_of(one.connect(address)) == "unreachable"
            address = two.addresses[0].replace("/ip4/127.0.0.1/", "/dns4/localhost/")
            assert await one.connect(address) == two.peer_id

    WORLD.run(main)


def test_everything_is_closed_at_the_end() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1), WORLD.transport(2)
        assert not one.addresses
        assert not one.links
        assert one.traffic == Traffic(received=0, sent=0)
        async with running(one, two) as (first, second):
            await one.connect(two.addresses[0])
            await until(lambda: bool(two.links))
            port = int(two.addresses[0].split("/")[4])
        assert first.closings == [two.peer_id]
        assert second.closings == [one.peer_id]
        with pytest.raises(OSError, match="attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))

    WORLD.run(main)


def test_a_peer_that_is_frozen_is_noticed() -> None:
    async def main() -> None:
        limits = Limits(ping_every_s=0.05, pong_s=0.3)
        one, two = WORLD.transport(1, limits=limits), WORLD.transport(2)
        async with running(one, two) as (first, _), trio.open_nursery() as nursery:
            scopes: list[trio.CancelScope] = []

            async def forward(source: trio.SocketStream, target: trio.SocketStream) -> None:
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    async for data in source:
                        await target.send_all(data)

            async def relay(client: trio.SocketStream) -> None:
                async with client, await trio.open_tcp_stream("127.0.0.1", one_port(two)) as server:
                    nursery.start_soon(forward, server, client)
                    await forward(client, server)
                    await trio.sleep_forever()

            listeners: Any = await nursery.start(partial(trio.serve_tcp, relay, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            await one.connect(two.addresses[0].replace(f"/{one_port(two)}/", f"/{port}/"))
            await trio.sleep(0.5)
            assert first.closings == []
            for scope in scopes:
                scope.cancel()
            await until(lambda: first.closings == [two.peer_id])
            nursery.cancel_scope.cancel()

    WORLD.run(main)


def one_port(transport: Libp2pTransport) -> int:
    return int(transport.addresses[0].split("/")[4])


def test_listening_everywhere_names_each_interface() -> None:
    async def main() -> None:
        one, two = WORLD.transport(1, listen_host="0.0.0.0"), WORLD.transport(2)
        async with running(one, two):
            assert one.addresses
            for address in one.addresses:
                assert "/0.0.0.0/" not in address
                assert address.endswith(f"/p2p/{one.peer_id}")
            assert one.addresses is one.addresses  # Kept: finding them out takes long.
            assert await two.connect(one.addresses[0]) == one.peer_id
            (link,) = two.links
            assert link == Link(
                peer_id=one.peer_id, ip=one.addresses[0].split("/")[2], port=one_port(one), inbound=False
            )

    WORLD.run(main)


def test_a_host_to_listen_on_is_an_ip_address() -> None:
    with pytest.raises(ConfigError, match=r"--p2p-host: an IP address such as 0\.0\.0\.0 is needed, got 'localhost'"):
        WORLD.transport(1, listen_host="localhost")


def test_nodes_on_the_local_network_find_one_another_and_no_others() -> None:
    async def main() -> None:
        found: dict[str, set[str]] = {name: set() for name in ("one", "two", "other")}
        async with trio.open_nursery() as nursery:
            for name, network in (("one", b"12345"), ("two", b"12345"), ("other", b"67890")):
                nursery.start_soon(
                    partial(
                        follow_lan,
                        network_id=network,
                        peer_id=name,
                        addresses=[f"/ip4/192.168.0.9/tcp/9/p2p/{name}"],
                        found=found[name].add,
                        interfaces=["127.0.0.1"],
                    )
                )
            await until(lambda: bool(found["one"] and found["two"]))
            nursery.cancel_scope.cancel()
        assert found["one"] == {"/ip4/192.168.0.9/tcp/9/p2p/two"}
        assert found["two"] == {"/ip4/192.168.0.9/tcp/9/p2p/one"}
        assert found["other"] == set()

    WORLD.run(main)
