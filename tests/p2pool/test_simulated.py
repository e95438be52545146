"""The simulated network itself: its troubles happen, and happen the same way again."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pool.errors import PeerError
from p2pool.p2p import SYNC
from tests.p2pool.simulated import SimulatedNet, address_of, simulate
from tests.p2pool.test_transport import rule_of, running


async def ring(net: SimulatedNet, size: int, seconds: float) -> list[Any]:
    """What happens to nodes in a ring with chords that gossip and ask for a while."""
    events: list[Any] = []
    transports = [net.transport(number) for number in range(size)]
    async with running(*transports) as handlers, trio.open_nursery() as nursery:
        for number in range(size):
            for step in (1, 3):
                nursery.start_soon(transports[number].connect, address_of((number + step) % size))
        await trio.sleep(2)

        async def live(number: int) -> None:
            for turn in range(5):
                await trio.sleep(1)
                await transports[number].publish(b"%d of %d" % (turn, number))
                try:
                    await transports[number].request(transports[number - 1].peer_id, SYNC, b"?", 1)
                except PeerError as error:
                    events.append((trio.current_time(), number, error.rule))

        for number in range(size):
            nursery.start_soon(live, number)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    return [events, [handler.messages for handler in handlers], [handler.links for handler in handlers], net.counts]


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=3)
def test_a_seed_decides_everything(seed: int) -> None:
    def happens(seed: int) -> list[Any]:
        net = SimulatedNet(seed, loss=0.2, duplication=0.2, answer_loss=0.2)
        return simulate(ring, net, 5, 10.0)

    happened = happens(seed)
    assert happens(seed) == happened
    assert happens(seed + 1) != happened


def test_without_loss_gossip_reaches_everybody_once() -> None:
    net = SimulatedNet(1, duplication=0.5)
    events, messages, _, counts = simulate(ring, net, 7, 10.0)
    assert events == []
    for number, received in enumerate(messages):
        expected = {b"%d of %d" % (turn, other) for turn in range(5) for other in range(7) if other != number}
        assert {message.payload for message in received} == expected
        assert len(received) == len(expected)
    assert counts["seen"] > 0
    assert counts["lost"] == 0


def test_loss_loses_gossip_and_answers() -> None:
    net = SimulatedNet(1, loss=0.5, answer_loss=0.5)
    events, messages, _, counts = simulate(ring, net, 7, 20.0)
    assert {rule for _, _, rule in events} == {"timeout"}
    assert counts["lost"] > 0
    assert counts["lost answers"] == len(events)
    assert sum(map(len, messages)) < 5 * 7 * 6


def test_a_partition_cuts_until_it_is_healed() -> None:
    async def main() -> None:
        net = SimulatedNet(1)
        one, two, three = (net.transport(number) for number in (1, 2, 3))
        async with running(one, two, three) as (first, second, _):
            for caller, called in ((one, 2), (one, 3), (two, 3)):
                await caller.connect(address_of(called))
            net.partition([one, two])
            assert await rule_of(one.request(three.peer_id, SYNC, b"", 0.5)) == "timeout"
            await trio.sleep(10)
            assert first.closings == second.closings == [three.peer_id]
            assert await rule_of(one.request(three.peer_id, SYNC, b"", 5)) == "gone"
            assert await rule_of(three.connect(address_of(1))) == "unreachable"
            assert await one.request(two.peer_id, SYNC, b"still", 5) == b"still"
            net.heal()
            await trio.sleep(10)
            assert three.links == ()
            assert await three.connect(address_of(1)) == one.peer_id
            assert await one.request(three.peer_id, SYNC, b"again", 5) == b"again"

    simulate(main)


def test_a_crash_is_noticed_late_and_a_restart_at_once() -> None:
    async def main() -> None:
        net = SimulatedNet(1, notice_s=(5.0, 5.0))
        one, two, three = (net.transport(number) for number in (1, 2, 3))
        async with running(one, two, three) as (first, second, _):
            await one.connect(address_of(2))
            await one.connect(address_of(3))
            net.crash(one)
            assert one.links == ()
            await one.publish(b"from the dead")
            assert await rule_of(two.request(one.peer_id, SYNC, b"", 1)) == "timeout"
            assert await two.connect(address_of(1)) == one.peer_id  # Not noticed yet.
            again = net.transport(1)
            async with running(again):
                await again.connect(address_of(2))
                assert second.closings == [one.peer_id]
                assert len(second.links) == 2
                assert three.links
                await trio.sleep(5)
                assert three.links == ()
                assert len(again.links) == len(two.links) == 1
            assert await rule_of(one.connect(address_of(2))) == "unreachable"
            assert first.closings == []
            assert first.messages == second.messages == []

    simulate(main)


@pytest.mark.parametrize("schedule", range(5))
def test_whatever_runs_first_both_ends_agree_in_the_end(schedule: int) -> None:
    async def main() -> None:
        net = SimulatedNet(schedule, notice_s=(0.0, 3.0))
        transports = [net.transport(number) for number in range(4)]
        rules = set()
        async with running(*transports) as handlers, trio.open_nursery() as nursery:

            async def call(number: int) -> None:
                dice = net.dice("test", str(number))
                while True:
                    await trio.sleep(dice.uniform(0, 1))
                    other = transports[dice.randrange(4)]
                    if dice.random() < 0.3:
                        await transports[number].disconnect(other.peer_id)
                    else:
                        with trio.move_on_after(3):
                            await attempt(number, other.addresses[0])

            async def attempt(number: int, address: str) -> None:
                try:
                    await transports[number].connect(address)
                except PeerError as error:
                    rules.add(error.rule)

            for number in range(4):
                nursery.start_soon(call, number)
            for _ in range(20):
                net.partition(transports[:2], transports[2:])
                await trio.sleep(1)
                net.heal()
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(20)
                assert rules <= {"self", "unreachable"}
                for transport, handler in zip(transports, handlers, strict=True):
                    linked = {link.peer_id for link in transport.links}
                    assert linked == {other.peer_id for other in transports if has(other.links, transport.peer_id)}
                    assert len(handler.links) == len(handler.closings) + len(linked)

    def has(links: Any, peer_id: str) -> bool:
        return any(link.peer_id == peer_id for link in links)

    simulate(main, schedule=schedule)


def test_several_peers_may_share_an_ip() -> None:
    async def main() -> None:
        net = SimulatedNet(1)
        one, two, three = net.transport(1), net.transport(2), net.transport(3, ip="10.0.0.2", port=9338)
        async with running(one, two, three) as (first, _, third):
            await three.connect(one.addresses[0])
            await two.connect(one.addresses[0])
            assert [link.ip for link in first.links] == ["10.0.0.2"] * 2
            assert third.links[0].port == 9337

    simulate(main)
