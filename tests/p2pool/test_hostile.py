"""Attacks on a whole node over libp2p: who does it is banned by the rule it broke, who only stands by is not.

Each attack comes from an identity of its own, while an honest node is connected; afterwards the honest one is there
still, nothing is held against it, and what it mines arrives.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.io.exceptions import IOException

from p2pool.database import DataDirectory
from p2pool.errors import PeerError
from p2pool.node import Node
from p2pool.p2p import BLOCK, SYNC
from p2pool.p2p.conduct import BUDGETS, RULES
from p2pool.p2p.host import Libp2pTransport
from p2pool.p2p.network import Network, NetworkDesk
from p2pool.p2p.peers import PeerBook, PeerLimits
from p2pool.p2p.wire import (
    MAX_FRAME,
    MAX_PEERS,
    Announce,
    GetPeers,
    GetShares,
    Locate,
    Located,
    Peers,
    Shares,
    Status,
    encode_gossip,
    encode_message,
)
from sharechain.chain import Sharechain
from sharechain.difficulty import bits_to_target
from sharechain.share import Share, decode_share, share_id
from tests.builders import add, forged_under, mine, miner_script, solve
from tests.p2pool.attacker import Wire, lying, new_seed, status, wire
from tests.p2pool.fakebitcoin import BITS, FakeBitcoin
from tests.p2pool.network import EASY_SERVER, PARAMS, START, Rig, is_plain_share
from tests.p2pool.test_hardening import LIMITS, PING, SYN, frame, serving

pytestmark = pytest.mark.slow

PREFIX = f"/p2pool/{PARAMS.network_id.hex()}"
TOPIC = f"{PREFIX}/shares/1"
#: A hash that no share has.
NOTHING = b"\xaa" * 32


class Running:
    """A node on a loopback port."""

    def __init__(self, node: Node, transport: Libp2pTransport) -> None:
        self.node = node
        self.transport = transport
        self._rig = Rig(node)

    @property
    def network(self) -> Network:
        assert self.node.network is not None
        return self.node.network

    @property
    def address(self) -> str:
        return self.transport.addresses[0]

    @property
    def chain(self) -> Sharechain:
        return self.node.chain

    @property
    def tip(self) -> bytes:
        """Hash of the tip; empty for none."""
        return b"" if self.chain.tip is None else self.chain.tip.hash

    def mine(self, salt: int = 0) -> Share:
        """A share of an own miner."""
        self._rig._extranonce += salt
        candidate = self._rig.find(is_plain_share)
        self._rig.submit(candidate)
        return candidate.share()

    def bans(self) -> dict[str, str]:
        """The rule for which each peer is banned."""
        return {row["peer_id"]: row["rule"] for row in self.network.statistics().peers if row["state"] == "banned"}

    def score(self, peer_id: str) -> float | None:
        """Points of a connected peer."""
        rows = self.network.statistics().peers
        return next((row["score"] for row in rows if row["state"] == "connected" and row["peer_id"] == peer_id), None)


@dataclass(kw_only=True)
class Scene:
    """A node that is attacked, and an honest one that is connected to it."""

    node: Running
    honest: Running

    async def check_banned(self, peer_id: str, rule: str, seed: bytes) -> None:
        """The attacker is gone, banned, and is not let in again."""
        await until(lambda: peer_id in self.node.bans())
        assert self.node.bans() == {peer_id: rule}
        await until(lambda: self.node.score(peer_id) is None)
        with pytest.raises(PeerError):
            async with lying(self.node.address, PARAMS.network_id, seed):
                raise AssertionError("let in again")

    async def check_unhurt(self) -> None:
        """The honest node is connected still, blamed for nothing, and heard."""
        share = self.honest.mine(salt=1_000)
        await until(lambda: share.hash in self.node.chain)
        share = self.node.mine(salt=2_000)
        await until(lambda: share.hash in self.honest.chain)
        assert self.node.score(self.honest.transport.peer_id) == 0
        assert not self.honest.network.statistics().faults

    def on_tip(self, **changes: Any) -> Share:
        """A share on the node's tip, mined by the attacker."""
        return on(self.node.chain, self.node.chain.tip, **changes)


def on(chain: Sharechain, parent: Any, **changes: Any) -> Share:
    facts = {"block": FakeBitcoin.GENESIS, "block_bits": BITS, "miner": 66, "time": parent.time + 1}
    return mine(chain, parent, **{**facts, **changes})


async def until(reached: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not reached():  # noqa: ASYNC110 - what moves is no task of ours
            await trio.sleep(0.01)


@asynccontextmanager
async def running(path: Path, number: int, clock: Callable[[], float], calls: Sequence[str]) -> AsyncIterator[Running]:
    transport = Libp2pTransport(
        seed=new_seed(), network_id=PARAMS.network_id, listen_host="127.0.0.1", listen_port=0, max_connections=80
    )
    book = PeerBook(PeerLimits(), own_id=transport.peer_id, fixed=calls)
    directory = DataDirectory(path, PARAMS)

    def network(desk: NetworkDesk) -> Network:
        return Network(desk, transport, book, clock=clock, choose=random.Random(number))

    node = Node(
        directory=directory,
        params=PARAMS,
        backend=FakeBitcoin(clock),
        stratum=EASY_SERVER,
        clock=clock,
        network=network,
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, [])
            yield Running(node, transport)
            nursery.cancel_scope.cancel()
    finally:
        directory.close()


@asynccontextmanager
async def scene(path: Path) -> AsyncIterator[Scene]:
    began = trio.current_time()

    def clock() -> float:
        return START + trio.current_time() - began

    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(running(path / "node", 1, clock, ()))
        for _ in range(3):
            node.mine()
        honest = await stack.enter_async_context(running(path / "honest", 2, clock, (node.address,)))
        await until(lambda: honest.network.is_ready and honest.tip == node.tip)
        yield Scene(node=node, honest=honest)


# Frames and messages

#: What no request is: (protocol, bytes on the stream, the rule).
HOSTILE_BYTES = {
    "garbage-on-sync": (SYNC, b"\x20" + b"\xee" * 32, "message"),
    "garbage-on-block": (BLOCK, b"\x20" + b"\xee" * 32, "message"),
    "oversize": (SYNC, b"\x81\x80\x02" + bytes(100), "frame"),
    "endless-length": (BLOCK, b"\xff" * 20, "frame"),
    "bomb": (SYNC, b"\x09\x9b" + b"\xff" * 8, "message"),
    "nested": (SYNC, b"\xff\x01" + b"\x81" * 255, "message"),
    "map": (SYNC, b"\x05\xbf" + bytes(4), "message"),
    "negative": (SYNC, b"\x03\x82\x01\x20", "message"),
}


@pytest.mark.parametrize("attack", HOSTILE_BYTES)
async def test_bytes_that_are_no_request_end_in_a_ban(tmp_path: Path, attack: str) -> None:
    protocol, data, rule = HOSTILE_BYTES[attack]
    async with scene(tmp_path) as at:
        seed = new_seed()
        async with wire(at.node.address, seed) as attacker:
            for _ in range(2):
                await attacker.send(await attacker.open(f"{PREFIX}/{protocol}"), data)
            await attacker.wait_closed()
        await at.check_banned(attacker.peer_id, rule, seed)
        await at.check_unhurt()


async def test_an_address_that_was_never_banned_is_not_punished_for_one_that_was(tmp_path: Path) -> None:
    """All of loopback is one machine: the ban is the identity's alone."""
    async with scene(tmp_path) as at:
        async with wire(at.node.address) as attacker:
            await attacker.publish(await attacker.open_topic(TOPIC), TOPIC, [b"garbage", b"more of it"])
            await attacker.wait_closed()
        assert [row["ip"] for row in at.node.network.statistics().peers if row["state"] == "banned"] == [None]
        async with lying(at.node.address, PARAMS.network_id) as newcomer:
            await newcomer.ask(status())
        await at.check_unhurt()


# Answers

#: What a peer that claims much answers, and the rule.
HOSTILE_ANSWERS: dict[str, tuple[dict[type[Any], Callable[[Any], Any]], str]] = {
    "garbage-status": ({Status: lambda _: b"\xee" * 100}, "message"),
    "large-status": ({Status: lambda _: bytes(MAX_FRAME[SYNC][1] + 1)}, "frame"),
    "garbage-shares": ({GetShares: lambda asked: Shares(shares=(b"garbage",) * len(asked.hashes))}, "R1"),
}


@pytest.mark.parametrize("attack", HOSTILE_ANSWERS)
async def test_answers_that_cannot_be_end_in_a_ban(tmp_path: Path, attack: str) -> None:
    more, rule = HOSTILE_ANSWERS[attack]
    answers = {
        Status: lambda _: status(tip=random.randbytes(32), height=10**6, total_work=2**255),
        Locate: lambda _: Located(hashes=(NOTHING,), identities=(share_id(b"garbage"),)),
        **more,
    }
    async with scene(tmp_path) as at:
        seed = new_seed()
        async with lying(at.node.address, PARAMS.network_id, seed, answers=answers) as liar:
            with trio.fail_after(60):
                await liar.lost.wait()
        await at.check_banned(liar.peer_id, rule, seed)
        await at.check_unhurt()


@pytest.mark.parametrize(
    ("answer", "rule"),
    [(lambda _: b"\xee" * 100, "message"), (lambda _: Peers(addresses=("nowhere",) * MAX_PEERS), "address")],
    ids=["garbage", "no-addresses"],
)
async def test_addresses_that_are_none_are_held_against_who_tells_them(
    tmp_path: Path, answer: Callable[[Any], Any], rule: str
) -> None:
    async with scene(tmp_path) as at, lying(at.node.address, PARAMS.network_id, answers={GetPeers: answer}) as liar:
        await until(lambda: at.node.network.statistics().faults)
        assert at.node.network.statistics().faults == {rule: 1}
        assert at.node.score(liar.peer_id) == RULES[rule]


# Blocks


def announcement(header: bytes) -> Announce:
    return Announce(header=header, coinbase=bytes(100), wtxids=(NOTHING,), included=())


@pytest.mark.parametrize("has_work", [True, False])
async def test_false_blocks_end_in_a_ban(tmp_path: Path, has_work: bool) -> None:
    async with scene(tmp_path) as at:
        seed = new_seed()
        async with lying(at.node.address, PARAMS.network_id, seed) as liar:
            header = bytes(4) + FakeBitcoin.GENESIS + bytes(32) + int(START).to_bytes(4, "little")
            bits = BITS if has_work else 0x1D00FFFF
            header = solve(header + bits.to_bytes(4, "little") + bytes(4), bits_to_target(BITS))
            await liar.ask_until_lost(announcement(header), BLOCK)
        await at.check_banned(liar.peer_id, "block", seed)
        await at.check_unhurt()


# Gossip


@asynccontextmanager
async def gossiping(at: Scene, seed: bytes | None = None) -> AsyncIterator[tuple[Wire, Callable[..., Awaitable[None]]]]:
    """An attacker on the topic, and how it sends shares there: as their author, or for another."""
    async with wire(at.node.address, seed) as attacker:
        stream_id = await attacker.open_topic(TOPIC)

        async def send(shares: Sequence[Share], author: bytes | None = None) -> None:
            await attacker.publish_shares(stream_id, TOPIC, [share.encoded for share in shares], author)

        yield attacker, send


def forgeries(share: Share, count: int) -> list[Share]:
    return [forged_under(share, payout_script=miner_script(100 + number)) for number in range(count)]


async def test_garbage_in_gossip_ends_in_a_ban(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        seed = new_seed()
        async with wire(at.node.address, seed) as attacker:
            stream_id = await attacker.open_topic(TOPIC)
            await attacker.publish(stream_id, TOPIC, [b"garbage", encode_gossip([b"x"]) + b"more"])
            await attacker.wait_closed()
        await at.check_banned(attacker.peer_id, "message", seed)
        await at.check_unhurt()


async def test_a_share_without_work_ends_in_a_ban_also_for_who_relays_it(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        share = at.on_tip()
        while int.from_bytes(share.hash, "little") <= bits_to_target(share.data.bits):
            nonce = int.from_bytes(share.header[76:], "little") + 1
            share = replace(share, header=share.header[:76] + nonce.to_bytes(4, "little"))
        seed = new_seed()
        async with gossiping(at, seed) as (attacker, send):
            await send([share], new_seed())
            await attacker.wait_closed()
        await at.check_banned(attacker.peer_id, "R3", seed)
        await at.check_unhurt()


async def test_forged_bodies_are_not_their_bearers_fault_and_keep_nothing_out(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        share = at.on_tip()
        async with gossiping(at) as (attacker, send):
            await send(forgeries(share, 60), new_seed())
            await send([share], new_seed())
            await until(lambda: share.hash in at.node.chain)
            await until(lambda: share.hash in at.honest.chain)
            assert at.node.score(attacker.peer_id) == 0
        assert not at.node.network.statistics().faults
        await at.check_unhurt()


async def test_forged_bodies_end_in_a_ban_for_who_signs_them(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        share = at.on_tip()
        seed = new_seed()
        async with gossiping(at, seed) as (attacker, send):
            await send(forgeries(share, 2))
            await attacker.wait_closed()
        await at.check_banned(attacker.peer_id, "R10", seed)
        async with gossiping(at) as (_, send):
            await send([share])
            await until(lambda: share.hash in at.node.chain)
        await at.check_unhurt()


async def test_forged_bodies_of_an_orphan_keep_the_real_one_out_only_until_its_parent_is_here(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        parent = at.on_tip()
        aside = Sharechain(PARAMS)
        for entry in at.node.chain.entries():
            facts = at.node.chain.block_facts(entry.previous_block_hash)
            assert facts is not None
            aside.learn_block(entry.previous_block_hash, facts, entry.time)
        for raw in [at.node.node.encoded(entry.hash) for entry in at.node.chain.entries()]:
            assert raw is not None
            add(aside, decode_share(raw))
        add(aside, parent)
        share = on(aside, aside.entry(parent.hash))
        async with gossiping(at) as (attacker, send):
            await send(forgeries(share, 60), new_seed())
            await until(lambda: sum(at.node.network.statistics().gossip.values()) >= 60)
            await send([parent, share], new_seed())
            await until(lambda: share.hash in at.node.chain)
            await until(lambda: share.hash in at.honest.chain)
            assert not at.node.bans()
            assert attacker.peer_id in {link.peer_id for link in at.node.transport.links}
        await at.check_unhurt()


async def test_shares_of_the_future_end_in_a_ban_for_their_author_alone(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        shares = [at.on_tip(time=START + 10_000, salt=salt) for salt in range(20)]
        seed = new_seed()
        async with gossiping(at) as (bearer, pass_on), gossiping(at, seed) as (attacker, send):
            await pass_on(shares[:10], seed)
            await until(lambda: at.node.network.statistics().gossip.get("invalid") == 10)
            assert at.node.score(bearer.peer_id) == 0
            await send(shares[10:])
            await attacker.wait_closed()
            await at.check_banned(attacker.peer_id, "future", seed)
        await at.check_unhurt()


async def test_more_messages_than_a_network_can_have_end_in_a_ban(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        tip = at.node.chain.tip
        assert tip is not None
        raw = at.node.node.encoded(tip.hash)
        assert raw is not None
        seed = new_seed()
        async with wire(at.node.address, seed) as attacker:
            stream_id = await attacker.open_topic(TOPIC)
            while not attacker.closed.is_set():
                with suppress(IOException, trio.BrokenResourceError):
                    await attacker.publish_shares(stream_id, TOPIC, [raw] * 64)
        assert at.node.network.statistics().gossip["seen"] >= BUDGETS["gossip"].burst - 1
        await at.check_banned(attacker.peer_id, "flood", seed)
        await at.check_unhurt()


# Requests in measure, but without end


async def test_who_asks_for_much_is_slowed_down_and_others_are_not(tmp_path: Path) -> None:
    async with scene(tmp_path) as at, lying(at.node.address, PARAMS.network_id) as greedy:
        locator = encode_message(Locate(locator=tuple(random.randbytes(32) for _ in range(64))))
        async with trio.open_nursery() as nursery:

            async def ask_on() -> None:
                while True:
                    await greedy.ask(locator, timeout_s=60)

            nursery.start_soon(ask_on)
            await until(lambda: at.node.network.statistics().gossip.get("slowed down"))
            async with lying(at.node.address, PARAMS.network_id) as other:
                await other.ask(status())
            nursery.cancel_scope.cancel()
        assert not at.node.network.statistics().faults
        await at.check_unhurt()


# Connections


async def test_handshakes_are_rationed_and_who_is_connected_is_served() -> None:
    """Stock: 40 handshakes a second, each by another id, take a whole core."""
    limits = replace(LIMITS, handshakes_per_s_per_ip=1e-3, handshakes_burst_per_ip=3)
    async with serving(limits) as node, AsyncExitStack() as stack:
        address = node.hardened.addresses[0]
        for _ in range(3):
            await stack.enter_async_context(wire(address))
        with pytest.raises((IOException, OSError, trio.BrokenResourceError)):
            await stack.enter_async_context(wire(address))
        await until(lambda: len(node.hardened.swarm.get_connections()) == 3)
        assert not node.blamed


async def test_a_flood_of_pings_costs_the_attacker_its_connection() -> None:
    """Stock: each is answered, an encrypted packet for 12 bytes; 15,000 a second take a whole core."""
    async with serving() as node:
        async with wire(node.hardened.addresses[0]) as attacker:
            with suppress(IOException, trio.BrokenResourceError):
                await attacker.session.write(b"".join(frame(PING, SYN, 0, number) for number in range(100)))
            await attacker.wait_closed()
        assert node.blamed == [(attacker.peer_id, "127.0.0.1", "yamux")]
