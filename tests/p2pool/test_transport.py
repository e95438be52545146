"""What every transport promises, asked of libp2p on loopback and of the simulated network alike."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, Protocol

import pytest
import trio

from p2pool.errors import ConfigError, PeerError
from p2pool.p2p import BLOCK, SYNC, Gossip, Link, Transport
from p2pool.p2p.host import MAX_STREAMS, Libp2pTransport
from p2pool.p2p.wire import MAX_FRAME, MAX_GOSSIP
from tests.p2pool.simulated import SimulatedNet, SimulatedTransport, simulate

NETWORK_ID = b"\x01\x02\x03\x04"
TIMEOUT_S = 10.0


class Recorder:
    """A handler that takes everybody, answers with what was asked, and remembers."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.closings: list[str] = []
        self.messages: list[Gossip] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.blames: list[tuple[str | None, str]] = []
        self.takes = True
        self.lets_in = True
        self.relays: Callable[[bytes], bool] = lambda payload: True
        self.answer: Callable[[bytes], Awaitable[bytes]] = self.echo

    @staticmethod
    async def echo(request: bytes) -> bytes:
        return request

    @property
    def payloads(self) -> set[bytes]:
        return {message.payload for message in self.messages}

    def may_enter(self, ip: str) -> bool:
        return self.lets_in

    def opened(self, link: Link) -> bool:
        self.links.append(link)
        return self.takes

    def closed(self, peer_id: str) -> None:
        self.closings.append(peer_id)

    def gossip(self, message: Gossip) -> bool:
        self.messages.append(message)
        return self.relays(message.payload)

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        self.requests.append((peer_id, protocol, request))
        return await self.answer(request)

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        self.blames.append((peer_id, rule))


class World(Protocol):
    """Where transports of one kind live."""

    #: Seconds after which everything that was under way has arrived.
    settle_s: float

    def transport(self, number: int, *, like: Transport | None = None) -> Transport: ...

    def run(self, main: Callable[[], Awaitable[None]]) -> None: ...


class SimulatedWorld:
    settle_s = 5.0

    def __init__(self) -> None:
        self.net = SimulatedNet(1)

    def transport(self, number: int, *, like: Transport | None = None) -> SimulatedTransport:
        port = int(like.addresses[0].split("/")[4]) if like else 9337
        ip = like.addresses[0].split("/")[2] if like else None
        return self.net.transport(number, ip=ip, port=port)

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        simulate(main)


class Libp2pWorld:
    settle_s = 0.3

    def transport(self, number: int, *, like: Transport | None = None, **more: Any) -> Libp2pTransport:
        port = int(like.addresses[0].split("/")[4]) if like else 0
        plain = {"network_id": NETWORK_ID, "listen_host": "127.0.0.1", "listen_port": port, "max_connections": 20}
        return Libp2pTransport(seed=bytes([number]) * 32, **{**plain, **more})

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        async def in_time() -> None:
            with trio.fail_after(60):
                await main()

        trio.run(in_time)


@pytest.fixture(params=[SimulatedWorld, pytest.param(Libp2pWorld, marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.param()
    return made


@asynccontextmanager
async def running(*transports: Transport) -> AsyncIterator[list[Recorder]]:
    """Run transports, each with a handler of its own, and stop them at the end."""
    async with trio.open_nursery() as nursery:
        handlers = []
        for transport in transports:
            handlers.append(Recorder())
            await nursery.start(transport.run, handlers[-1])
        yield handlers
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def pair(world: World) -> AsyncIterator[tuple[Transport, Recorder, Transport, Recorder]]:
    """Two transports; the first has called the second."""
    one, two = world.transport(1), world.transport(2)
    async with running(one, two) as (first, second):
        assert await one.connect(two.addresses[0]) == two.peer_id
        await until(lambda: bool(two.links))
        yield one, first, two, second


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def rule_of(call: Awaitable[object]) -> str:
    """The rule that a call says was broken."""
    with pytest.raises(PeerError) as caught:
        await call
    return caught.value.rule


async def publish_until(transport: Transport, is_there: Callable[[], bool]) -> None:
    """Gossip until it arrives: meshes take a while to form."""
    with trio.fail_after(20):
        for number in range(10_000):
            if is_there():
                return
            await transport.publish(b"are you there? %d" % number)
            await trio.sleep(0.1)


# Connections


def test_both_sides_see_the_connection(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):
            assert one.links == tuple(first.links)
            assert two.links == tuple(second.links)
            (there,), (here,) = one.links, two.links
            assert (there.peer_id, there.inbound) == (two.peer_id, False)
            assert (here.peer_id, here.inbound) == (one.peer_id, True)
            assert two.addresses == (f"/ip4/{there.ip}/tcp/{there.port}/p2p/{two.peer_id}",)
            assert await one.connect(two.addresses[0]) == two.peer_id
            assert await two.connect(one.addresses[0]) == one.peer_id
            assert len(first.links) == len(second.links) == 1

    world.run(main)


def test_disconnecting_closes_both_sides_once(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):
            await one.disconnect("12D3KooWEA7Ga6BshpLxqe9kQBsiUu37DGH2cNWDkEGQR9r97BDh")
            await one.disconnect(two.peer_id)
            await until(lambda: bool(first.closings and second.closings))
            assert first.closings == [two.peer_id]
            assert second.closings == [one.peer_id]
            assert one.links == two.links == ()
            assert await one.connect(two.addresses[0]) == two.peer_id
            assert len(first.links) == 2
        assert first.closings == [two.peer_id] * 2

    world.run(main)


def test_whoever_is_refused_is_gone(world: World) -> None:
    async def main() -> None:
        one, two = world.transport(1), world.transport(2)
        async with running(one, two) as (first, second):
            second.takes = False
            assert await rule_of(one.connect(two.addresses[0])) == "refused"
            await until(lambda: not one.links)
            assert len(second.links) == 1
            assert (two.links, second.closings, second.requests) == ((), [], [])
            second.takes, first.takes = True, False
            assert await rule_of(one.connect(two.addresses[0])) == "refused"
            await until(lambda: not two.links)
            first.takes = True
            assert await one.connect(two.addresses[0]) == two.peer_id

    world.run(main)


def test_an_address_that_may_not_enter_is_not_even_greeted(world: World) -> None:
    async def main() -> None:
        one, two = world.transport(1), world.transport(2)
        async with running(one, two) as (_, second):
            second.lets_in = False
            assert await rule_of(one.connect(two.addresses[0])) in {"refused", "unreachable"}
            assert one.links == two.links == ()
            assert second.links == []

    world.run(main)


def test_somebody_else_at_the_address_is_not_taken(world: World) -> None:
    async def main() -> None:
        one, two, three = world.transport(1), world.transport(2), world.transport(3)
        async with running(one, two) as (first, second):
            address = two.addresses[0].replace(two.peer_id, three.peer_id)
            assert await rule_of(one.connect(address)) == "unreachable"
            await trio.sleep(world.settle_s)
            assert first.links == second.links == []

    world.run(main)


def test_calls_to_ourselves_to_nobody_and_to_no_address_fail(world: World) -> None:
    async def main() -> None:
        one, two = world.transport(1), world.transport(2)
        async with running(two):
            address = two.addresses[0]
        async with running(one):
            assert await rule_of(one.connect(one.addresses[0])) == "self"
            assert await rule_of(one.connect(address)) == "unreachable"
            for bad in ("", "/", "nonsense", "/ip4/127.0.0.1/tcp/1", f"/ip4/127.0.0.1/tcp/x/p2p/{two.peer_id}"):
                assert await rule_of(one.connect(bad)) == "unreachable"
            assert one.links == ()

    world.run(main)


def test_two_that_call_one_another_at_once_are_connected_once(world: World) -> None:
    async def main() -> None:
        one, two = world.transport(1), world.transport(2)
        async with running(one, two) as (first, second):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, two.addresses[0])
                nursery.start_soon(two.connect, one.addresses[0])
            await until(lambda: len(one.links) == len(two.links) == 1)
            assert await one.request(two.peer_id, SYNC, b"1", TIMEOUT_S) == b"1"
            assert await two.request(one.peer_id, SYNC, b"2", TIMEOUT_S) == b"2"
            await one.disconnect(two.peer_id)
            await until(lambda: bool(first.closings and second.closings))
            await trio.sleep(world.settle_s)
            assert len(first.closings) == len(first.links)
            assert len(second.closings) == len(second.links)
            assert one.links == two.links == ()

    world.run(main)


def test_a_port_in_use_is_the_operators_error(world: World) -> None:
    async def main() -> None:
        one = world.transport(1)
        async with running(one):
            with pytest.raises(ConfigError, match="in use"):
                await world.transport(2, like=one).run(Recorder())
            assert one.addresses

    world.run(main)


def test_a_peer_that_comes_back_at_its_address_is_found_again(world: World) -> None:
    async def main() -> None:
        one, two = world.transport(1), world.transport(2)
        async with running(one) as (first,):
            async with running(two):
                again = world.transport(2, like=two)
                address = two.addresses[0]
                await one.connect(address)
            assert not two.addresses
            assert not two.links
            await until(lambda: not one.links)
            assert await rule_of(one.request(two.peer_id, SYNC, b"", TIMEOUT_S)) == "gone"
            assert await rule_of(one.connect(address)) == "unreachable"
            async with running(again):
                assert again.addresses == (address,)
                assert await one.connect(address) == two.peer_id
                assert await one.request(two.peer_id, SYNC, b"hello", TIMEOUT_S) == b"hello"
            await until(lambda: first.closings == [two.peer_id] * 2)

    world.run(main)


# Requests


def test_requests_are_answered_in_both_directions(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):
            before = one.traffic.sent
            assert await one.request(two.peer_id, SYNC, b"from one", TIMEOUT_S) == b"from one"
            assert await two.request(one.peer_id, BLOCK, b"", TIMEOUT_S) == b""
            assert second.requests == [(one.peer_id, SYNC, b"from one")]
            assert first.requests == [(two.peer_id, BLOCK, b"")]
            assert one.traffic.sent > before
            assert two.traffic.received > 0

    world.run(main)


def test_requests_of_one_protocol_queue_in_order(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, _, two, second), trio.open_nursery() as nursery:

            async def ask(number: int) -> None:
                answers.append(await one.request(two.peer_id, SYNC, b"%d" % number, TIMEOUT_S))

            answers: list[bytes] = []
            for number in range(10):
                nursery.start_soon(ask, number)
                await trio.lowlevel.checkpoint()
            await until(lambda: len(answers) == 10)
            assert answers == [b"%d" % number for number in range(10)]
            assert [request for _, _, request in second.requests] == answers

    world.run(main)


def test_fifty_requests_at_once_each_get_their_own_answer(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, _, two, _), trio.open_nursery() as nursery:

            async def ask(asker: Transport, asked: Transport, number: int) -> None:
                request = b"%d" % number * 100
                protocol = SYNC if number % 2 else BLOCK
                assert await asker.request(asked.peer_id, protocol, request, TIMEOUT_S) == request

            for number in range(25):
                nursery.start_soon(ask, one, two, number)
                nursery.start_soon(ask, two, one, number)

    world.run(main)


def test_an_answer_may_be_as_large_as_the_protocol_allows_and_no_larger(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):
            limit = MAX_FRAME[SYNC][1]

            async def answer(request: bytes) -> bytes:
                return os.urandom(16) * (limit // 16) + bytes(len(request))

            second.answer = answer
            assert len(await one.request(two.peer_id, SYNC, b"", TIMEOUT_S)) == limit
            assert await rule_of(one.request(two.peer_id, SYNC, b"x", TIMEOUT_S)) == "frame"
            assert first.blames == []  # That is left to whoever asked.
            assert len(await one.request(two.peer_id, SYNC, b"", TIMEOUT_S)) == limit

    world.run(main)


def test_a_request_that_is_too_large_is_not_served(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, _, two, second):
            limit = MAX_FRAME[SYNC][0]
            assert await one.request(two.peer_id, SYNC, bytes(limit), TIMEOUT_S) == bytes(limit)
            assert await rule_of(one.request(two.peer_id, SYNC, bytes(limit + 1), TIMEOUT_S)) == "gone"
            assert second.blames == [(one.peer_id, "frame")]
            assert len(second.requests) == 1

    world.run(main)


def test_no_answer_in_time_is_a_timeout_and_the_next_request_is_answered(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):

            async def answer(request: bytes) -> bytes:
                await trio.sleep(float(request))
                return request

            second.answer = answer
            assert await rule_of(one.request(two.peer_id, SYNC, b"59", 0.5)) == "timeout"
            assert await one.request(two.peer_id, SYNC, b"0", TIMEOUT_S) == b"0"
            assert first.blames == second.blames == []

    world.run(main)


def test_a_request_that_breaks_the_protocol_gets_no_answer(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, first, two, second):

            async def answer(request: bytes) -> bytes:
                if request == b"bad":
                    raise PeerError("message", "bad")
                return b"good"

            second.answer = answer
            for _ in range(2 * MAX_STREAMS[SYNC]):
                assert await rule_of(one.request(two.peer_id, SYNC, b"bad", TIMEOUT_S)) == "gone"
                assert await one.request(two.peer_id, SYNC, b"", TIMEOUT_S) == b"good"
            assert first.blames == second.blames == []

    world.run(main)


def test_a_request_ends_when_the_peer_goes(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, _, two, second), trio.open_nursery() as nursery:
            rules = []

            async def answer(request: bytes) -> bytes:
                await trio.sleep(59)
                return request

            async def ask() -> None:
                rules.append(await rule_of(one.request(two.peer_id, SYNC, b"", 50)))

            second.answer = answer
            nursery.start_soon(ask)
            nursery.start_soon(ask)  # Waits in the queue.
            await until(lambda: bool(second.requests))
            await two.disconnect(one.peer_id)
            await until(lambda: rules == ["gone", "gone"])
            assert await rule_of(one.request(two.peer_id, SYNC, b"", TIMEOUT_S)) == "gone"

    world.run(main)


# Gossip


def test_gossip_travels_along_a_line(world: World) -> None:
    async def main() -> None:
        line = [world.transport(number) for number in range(1, 5)]
        async with running(*line) as handlers:
            for near, far in pairwise(line):
                await near.connect(far.addresses[0])
            await publish_until(line[0], lambda: bool(handlers[3].messages))
            for number in range(1, 4):
                message = handlers[number].messages[0]
                assert message.author == line[0].peer_id
                assert message.bearer == line[number - 1].peer_id
            assert handlers[0].messages == []

    world.run(main)


def test_gossip_that_the_handler_rejects_goes_no_further(world: World) -> None:
    async def main() -> None:
        line = [world.transport(number) for number in range(1, 4)]
        async with running(*line) as (_, middle, last):
            for near, far in pairwise(line):
                await near.connect(far.addresses[0])
            middle.relays = lambda payload: payload != b"bad"
            await publish_until(line[0], lambda: bool(last.messages))
            await line[0].publish(b"bad")
            await line[0].publish(b"good")
            await until(lambda: {b"bad", b"good"} <= middle.payloads and b"good" in last.payloads)
            await trio.sleep(world.settle_s)
            assert b"bad" not in last.payloads

    world.run(main)


def test_gossip_has_a_largest_size(world: World) -> None:
    async def main() -> None:
        async with pair(world) as (one, _, _, second):
            await publish_until(one, lambda: bool(second.messages))
            await one.publish(bytes(MAX_GOSSIP))
            await until(lambda: bytes(MAX_GOSSIP) in second.payloads)
            with pytest.raises(ValueError, match="at most"):
                await one.publish(bytes(MAX_GOSSIP + 1))

    world.run(main)
