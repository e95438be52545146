"""Attacks on a real node over loopback, one after the other: what each costs the attacker, and what it costs the node.

    python tests/bench/hostile.py
    python tests/bench/hostile.py --only stream-flood --seconds 10

Two nodes (``p2pool run``, each with its own embedded regtest Bitcoin) share a network of their own and a history of 700
shares; a miner with a known, small hash rate mines at both, and measures how long each submission waits for its answer.
The first node is attacked, each time by identities that it has never seen; the second is the honest one: it must stay
connected, and in sync. Memory is the kernel's own high-water mark, set back before each attack.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import cbor2
import trio
from libp2p.io.exceptions import IOException

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trio.lowlevel

from p2pool.cluster import Cluster, NodeProcess
from p2pool.database import DataDirectory, open_copy
from p2pool.errors import PeerError
from p2pool.miner import Miner
from p2pool.p2p import BLOCK, SYNC
from p2pool.p2p.frames import encode_frame
from p2pool.p2p.hardening import identity_of
from p2pool.p2p.wire import (
    MAX_GOSSIP,
    MAX_LOCATED,
    MAX_LOCATOR,
    MAX_PEERS,
    MAX_SHARES,
    Announce,
    BlocksAfter,
    GetPeers,
    GetShares,
    Locate,
    Located,
    Peers,
    Shares,
    Status,
    decode_message,
    encode_message,
)
from p2pool.report import load_chain
from sharechain.chain import Sharechain
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.entry import ancestors
from sharechain.hasher.twin import Find, Scanner
from sharechain.params import NETWORKS
from sharechain.share import Share, share_id
from sharechain.validate import BlockFacts
from tests.builders import add, forged_under, mine, solve
from tests.p2pool.attacker import Wire, address_parts, lying, new_seed, status, wire
from tests.p2pool.test_hardening import PING, RST, SYN, WINDOW_UPDATE, frame, multistream

#: 2,048 hashes for the easiest share. The miners' 65,000 hashes per second make the chain ask for 32 times that.
PARAMS = NETWORKS["regtest"].with_overrides(
    {
        "name": "hostile",
        "share_period_ms": 1_000,
        "half_life_s": 60,
        "stall_after_s": 600,
        "stall_doubling_s": 60,
        "max_target": hex(2**245 - 1),
        "block_target_divisor": 200,
    }
)
GENESIS: Final = bytes.fromhex("0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206")[::-1]
BITS: Final = 0x207FFFFF
HISTORY: Final = 700
HASHES_PER_S: Final = 65_536
#: Hashes of one stretch of the miner, and for one submission on average.
STRETCH: Final = 2_048
USER: Final = f"bcrt1q3467skzz9faljvpw57qsqval3220uq88kh4h5v+{STRETCH / 2**32:.3e}"
#: Seconds of quiet before each attack, and after it, to see what it leaves.
QUIET_S: Final = 3.0
#: These use up the handshakes that one address may make: they come last, for all addresses here are one.
LAST: Final = ("tcp-garbage", "noise-garbage", "idle-sockets", "many-handshakes", "identity-churn")
#: What a connection raises that the node has ended, or does not take.
ENDED: Final = (PeerError, IOException, OSError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError)

PREFIX: Final = f"/p2pool/{PARAMS.network_id.hex()}"
TOPIC: Final = f"{PREFIX}/shares/1"


# The miner, a process of its own


class Probe(Miner):
    """A miner that hashes slowly and writes down how long each of its submissions waited."""

    sent: dict[object, float]
    lines: Any

    async def _follow_scanner(self, pool: Any) -> None:
        self.sent = {}
        timed: Any = _Timed(pool, self.sent)
        await super()._follow_scanner(timed)

    def _on_answer(self, message: Any) -> None:
        began = self.sent.pop(message.get("id"), None)
        if began is not None:
            self.lines.write(f"{time.time():.4f} {1000 * (time.perf_counter() - began):.3f}\n")
        super()._on_answer(message)


class SlowScanner(Scanner):
    def wait(self, patience_ms: int) -> list[Find]:
        before = self.hashes
        finds = super().wait(patience_ms)
        time.sleep(max(self.hashes - before, 1) / HASHES_PER_S)
        return finds


class _Timed:
    def __init__(self, pool: Any, sent: dict[object, float]) -> None:
        self._pool, self._sent = pool, sent

    async def submit(self, message: dict[str, object]) -> None:
        self._sent[message["id"]] = time.perf_counter()
        await self._pool.submit(message)


def run_probe(port: int, file: str) -> None:
    """Mine for ever at one node. Ends with its parent's wish."""

    with Path(file).open("a", buffering=1) as lines:

        async def main() -> None:
            slow: Any = SlowScanner(1)
            probe = Probe(user=USER, password="x", scanner=slow, on_event=None)
            probe.lines = lines
            while True:
                await probe.run_connection("127.0.0.1", port, lambda: None)
                await trio.sleep(0.2)

        trio.run(main)


# The world


@dataclass(kw_only=True)
class World:
    """What an attack needs to know. Mutable: ``seeds``, of the identities of the attack at hand, and ``notes``."""

    node: NodeProcess
    honest: NodeProcess
    seconds: float
    seeds: dict[str, bytes] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def address(self) -> str:
        return self.node.address

    def chain(self) -> Sharechain:
        """The network's chain at this moment, as the honest node has it."""
        with open_copy(self.honest.directory) as (params, store):
            return load_chain(params, store)

    def seed(self) -> bytes:
        """Of another identity of the attacker."""
        seed = new_seed()
        self.seeds[identity_of(seed)] = seed
        return seed

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The node may end this; then that is noted."""
        try:
            yield
        except* ENDED as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.notes[f"ended: {str(error)[:60]}" if isinstance(error, PeerError) else "connection ended"] += 1

    async def wires(self, job: Callable[[Wire], Awaitable[None]], *, reads: bool = True) -> None:
        """One bare connection that does a job; then wait for the node to end it, for as long as an attack lasts."""
        with self.attempt():
            async with wire(self.address, self.seed(), reads=reads) as attacker:
                with trio.move_on_after(self.seconds) as scope:
                    async with trio.open_nursery() as nursery:

                        async def work() -> None:
                            with self.attempt():
                                await job(attacker)

                        nursery.start_soon(work)
                        if reads:
                            await attacker.closed.wait()
                            nursery.cancel_scope.cancel()
                self.notes["still connected" if scope.cancelled_caught else "connection ended"] += 1

    async def liar(
        self,
        job: Callable[[Any], Awaitable[None]] | None = None,
        answers: dict[type[Any], Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """One lying peer that does a job until the node ends the connection, or for as long as an attack lasts."""
        with self.attempt():
            async with lying(self.address, PARAMS.network_id, self.seed(), answers=answers) as liar:
                with trio.move_on_after(seconds or self.seconds) as scope:
                    if job is not None:
                        with self.attempt():
                            await job(liar)
                    await liar.lost.wait()
                self.notes["still connected" if scope.cancelled_caught else "connection ended"] += 1
                for kind, count in Counter(type(message).__name__ for message in liar.heard).items():
                    self.notes[f"asked {kind}"] += count


ATTACKS: dict[str, Callable[[World], Awaitable[None]]] = {}


def attack(job: Callable[[World], Awaitable[None]]) -> Callable[[World], Awaitable[None]]:
    ATTACKS[job.__name__.replace("_", "-")] = job
    return job


async def for_a_while(world: World, job: Callable[[], Awaitable[None]], width: int = 1) -> None:
    """Again and again, so many at once, for as long as an attack lasts."""

    async def repeat() -> None:
        while True:
            with world.attempt():
                await job()
            await trio.lowlevel.checkpoint()

    with trio.move_on_after(world.seconds):
        async with trio.open_nursery() as nursery:
            for _ in range(width):
                nursery.start_soon(repeat)


# Below the protocols


@attack
async def tcp_garbage(world: World) -> None:
    async def job() -> None:
        async with await trio.open_tcp_stream(*address_parts(world.address)[:2]) as tcp:
            await tcp.send_all(os.urandom(4096))
            with trio.fail_after(20):
                while await tcp.receive_some():
                    pass
        world.notes["connections"] += 1

    await for_a_while(world, job, 4)


@attack
async def noise_garbage(world: World) -> None:
    async def job() -> None:
        async with await trio.open_tcp_stream(*address_parts(world.address)[:2]) as tcp:
            await tcp.send_all(multistream("/noise") + b"\x00\x60" + os.urandom(96) + b"\xff\xff" + os.urandom(2**16))
            with trio.fail_after(20):
                while await tcp.receive_some():
                    pass
        world.notes["connections"] += 1

    await for_a_while(world, job, 4)


@attack
async def yamux_garbage(world: World) -> None:
    async def job() -> None:
        async with wire(world.address, world.seed()) as attacker:
            await attacker.session.write(os.urandom(4096))
            await attacker.wait_closed()
            world.notes["connections"] += 1

    await for_a_while(world, job)


@attack
async def yamux_flood(world: World) -> None:
    async def job(attacker: Wire) -> None:
        pings = b"".join(frame(PING, SYN, 0, number) for number in range(1_000))
        while True:
            await attacker.session.write(pings)
            world.notes["frames"] += 1_000

    await world.wires(job)


@attack
async def stream_flood(world: World) -> None:
    async def job(attacker: Wire) -> None:
        for number in itertools.count(1, 2):
            await attacker.session.write(frame(WINDOW_UPDATE, SYN, number, 0) + frame(WINDOW_UPDATE, RST, number, 0))
            world.notes["streams"] += 1

    await world.wires(job)


@attack
async def streams_left_open(world: World) -> None:
    async def job(attacker: Wire) -> None:
        for number in range(127):
            if number % 2:
                await attacker.open(f"{PREFIX}/{SYNC}")
            else:
                await attacker.session.write(frame(WINDOW_UPDATE, SYN, next(attacker.ids), 0))
        world.notes["streams"] += 127
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(world.wires, job)


@attack
async def idle_sockets(world: World) -> None:
    async def idle() -> None:
        with world.attempt(), trio.move_on_after(world.seconds):
            async with await trio.open_tcp_stream(*address_parts(world.address)[:2]) as tcp:
                while await tcp.receive_some():
                    pass
                world.notes["sockets ended"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(idle)
        await trio.sleep(world.seconds / 2)
        await honest_enters(world)


@attack
async def many_handshakes(world: World) -> None:
    async def hold() -> None:
        with world.attempt(), trio.move_on_after(world.seconds):
            async with wire(world.address, world.seed()) as attacker:
                world.notes["handshakes done"] += 1
                await attacker.wait_closed()

    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(hold)
            await trio.sleep(0.01)
        await trio.sleep(world.seconds / 2)
        await honest_enters(world)


async def honest_enters(world: World) -> None:
    """Whether a newcomer at another address is served meanwhile; loopback has many addresses, all of them one."""
    began = trio.current_time()
    with world.attempt(), trio.move_on_after(15) as scope:
        async with lying(world.address, PARAMS.network_id) as newcomer:
            await newcomer.ask(status())
            world.notes[f"a newcomer was served after {trio.current_time() - began:.1f} s"] += 1
    if scope.cancelled_caught:
        world.notes["a newcomer was not served in 15 s"] += 1


@attack
async def identity_churn(world: World) -> None:
    async def one() -> None:
        with world.attempt():
            async with wire(world.address, world.seed()) as attacker:
                await attacker.send(await attacker.open(f"{PREFIX}/{SYNC}"), b"\x05garbage")
                world.notes["identities"] += 1
                await trio.sleep(0.05)

    numbers = iter(range(1_000))

    async def repeat() -> None:
        for _ in numbers:
            await one()

    with trio.move_on_after(4 * world.seconds):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(repeat)


# Requests


async def repeat_bytes(world: World, protocol: str, data: bytes) -> None:
    async def job(attacker: Wire) -> None:
        while True:
            stream_id = await attacker.open(f"{PREFIX}/{protocol}")
            for start in range(0, len(data), 2**16):
                await attacker.send(stream_id, data[start : start + 2**16])
            world.notes["requests"] += 1
            await trio.sleep(0.1)

    await world.wires(job)


@attack
async def sync_garbage(world: World) -> None:
    await repeat_bytes(world, SYNC, encode_frame(os.urandom(30_000)))


@attack
async def block_garbage(world: World) -> None:
    await repeat_bytes(world, BLOCK, encode_frame(os.urandom(200_000)))


@attack
async def oversize_frames(world: World) -> None:
    await repeat_bytes(world, SYNC, b"\xff\xff\xff\x7f" + bytes(200))


@attack
async def cbor_bombs(world: World) -> None:
    bombs = [
        b"\x9b" + b"\xff" * 8,
        b"\x81" * 32_000,
        b"\x9a\x00\x00\x7d\x00" + b"\x80" * 32_000,
        b"\xbf" * 32_000,
        b"\xc2\x59\x75\x30" + b"\xff" * 30_000,
        b"\x82\x01" + b"\xd9\xd9\xf7" * 10_000,
    ]
    for bomb in bombs:
        await repeat_bytes(world, SYNC, encode_frame(bomb))
    for bomb in (b"\x81" * 4_000_000, b"\x9a\x00\x3d\x09\x00" + b"\x80" * 4_000_000):
        await repeat_bytes(world, BLOCK, encode_frame(bomb))


@attack
async def slow_writers(world: World) -> None:
    """Frames that are begun and never end, a byte each half second."""

    async def job(attacker: Wire) -> None:
        streams = [await attacker.open(f"{PREFIX}/{protocol}") for protocol in (SYNC, BLOCK) for _ in range(4)]
        for stream_id in streams:
            await attacker.send(stream_id, b"\x80\x80\x01")
        while True:
            for stream_id in streams:
                await attacker.send(stream_id, b"x")
            await trio.sleep(0.5)

    world.seconds = max(world.seconds, 75)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(world.wires, job)


@attack
async def slow_readers(world: World) -> None:
    """Ask for as much as there is on every stream, and never read it."""
    entries = list(ancestors(world.chain().tip, MAX_SHARES))
    much = encode_frame(encode_message(GetShares(hashes=tuple(entry.hash for entry in entries))))
    blocks = encode_frame(encode_message(BlocksAfter(locator=(GENESIS,))))

    async def job(attacker: Wire) -> None:
        for _ in range(4):
            for protocol, request in ((SYNC, much), (BLOCK, blocks)):
                stream_id = await attacker.open(f"{PREFIX}/{protocol}")
                for _ in range(20):
                    await attacker.send(stream_id, request)
                    world.notes["requests"] += 1
        await trio.sleep_forever()

    world.seconds = max(world.seconds, 60)
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(partial(world.wires, job, reads=number % 2 == 0))


@attack
async def locator_abuse(world: World) -> None:
    async def job(liar: Any) -> None:
        while True:
            locator = tuple(os.urandom(32) for _ in range(MAX_LOCATOR))
            located = decode_message(await liar.ask(Locate(locator=locator)), Located)
            world.notes["locators"] += 1
            world.notes["hashes located"] += len(located.hashes)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(world.liar, job)


@attack
async def everything_again(world: World) -> None:
    entries = list(ancestors(world.chain().tip, MAX_SHARES))
    much = GetShares(hashes=tuple(entry.hash for entry in entries))

    async def job(liar: Any) -> None:
        while True:
            world.notes["MB asked"] += len(await liar.ask(much)) // 1_000
            world.notes["requests"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(world.liar, job)
    world.notes["MB asked"] //= 1_000


@attack
async def false_blocks(world: World) -> None:
    """Announcements with the work that regtest asks, none, and lists as long as they may be."""
    header = bytes(4) + os.urandom(64) + int(time.time()).to_bytes(4, "little")
    worked = solve(header + BITS.to_bytes(4, "little") + bytes(4), bits_to_target(BITS))
    false = header + (0x1D00FFFF).to_bytes(4, "little") + bytes(4)
    wtxids = tuple(os.urandom(32) for _ in range(16_666))
    coinbase = bytes.fromhex("01000000010000000000000000000000000000000000000000000000000000000000000000ffffffff")
    coinbase += b"\x03\x02\xe8\x03" + b"\xff" * 4 + b"\x01" + bytes(8) + b"\x01\x51" + bytes(4)

    for announce in (
        Announce(header=false, coinbase=coinbase, wtxids=(), included=()),
        Announce(header=worked, coinbase=coinbase, wtxids=(), included=()),
        Announce(header=worked, coinbase=coinbase, wtxids=wtxids, included=()),
        Announce(header=worked, coinbase=coinbase, wtxids=wtxids, included=((0, bytes(4_000_000 - 600_000)),)),
    ):
        await repeat_bytes(world, BLOCK, encode_frame(encode_message(announce)))


@attack
async def false_addresses(world: World) -> None:
    """Each of many peers answers with 32 addresses that lead nowhere, and says ever another port."""

    def peers(_: Any) -> Peers:
        return Peers(
            addresses=tuple(
                f"/ip4/127.0.{number}.{os.urandom(1)[0]}/tcp/1/p2p/{identity_of(os.urandom(32))}"
                for number in range(MAX_PEERS)
            )
        )

    async def job(liar: Any) -> None:
        for port in itertools.count(1):
            await liar.ask(status(listen_port=1 + port % 60_000))
            world.notes["ports claimed"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(world.liar, job, {GetPeers: peers})


# Claims


async def _claim_much(world: World, give: Callable[[], bytes | None]) -> None:
    """Claim 2^255 work, and list hashes without end; ``give`` makes what is given for each."""

    def located(_: Any) -> Located:
        hashes = tuple(os.urandom(32) for _ in range(MAX_LOCATED))
        return Located(hashes=hashes, identities=hashes)

    def claim(_: Any) -> Status:
        return status(tip=os.urandom(32), height=10**6, total_work=2**255)

    def shares(request: Any) -> Shares:
        return Shares(shares=tuple(give() for _ in request.hashes))

    world.seconds = max(world.seconds, 60)
    await world.liar(answers={Status: claim, Locate: located, GetShares: shares})


@attack
async def endless_chain(world: World) -> None:
    """Claims 2^255 work, lists hashes without end, and has no share."""
    await _claim_much(world, lambda: None)


@attack
async def garbage_history(world: World) -> None:
    """The same, with bytes for shares."""
    await _claim_much(world, lambda: os.urandom(500))


@attack
async def cheap_history(world: World) -> None:
    """A history of 2,000 shares, each valid, with a thousandth of the work; it claims the most of all."""
    chain = Sharechain(PARAMS)
    chain.learn_block(GENESIS, BlockFacts(height=0, next_bits=BITS), time.time())
    shares: list[Share] = []
    began = int(time.time()) - 30_000
    for number in range(2_000):
        share = mine(chain, chain.tip, miner=9, time=began + 10 * number, block=GENESIS, block_bits=BITS)
        add(chain, share, time.time())
        shares.append(share)
        await trio.lowlevel.checkpoint()
    raw = {share.hash: share.encoded for share in shares}
    hashes = tuple(raw)
    position = {share_hash: number for number, share_hash in enumerate(hashes)}

    def located(request: Locate) -> Located:
        start = next((position[known] + 1 for known in request.locator if known in position), 0)
        listed = hashes[start : start + MAX_LOCATED]
        return Located(hashes=listed, identities=tuple(share_id(raw[one]) for one in listed))

    claim = status(tip=hashes[-1], height=len(hashes) - 1, total_work=2**255)
    answers: dict[type[Any], Any] = {
        Status: lambda _: claim,
        Locate: located,
        GetShares: lambda request: Shares(shares=tuple(raw.get(one) for one in request.hashes)),
    }
    world.seconds = max(world.seconds, 60)
    await world.liar(answers=answers)


# Gossip


async def gossip(
    world: World, payloads: Callable[[], list[bytes]], *, author: bool = True, pause_s: float = 0.0
) -> None:
    """Send messages of the topic again and again."""

    async def job(attacker: Wire) -> None:
        stream_id = await attacker.open_topic(TOPIC)
        other = None if author else new_seed()
        while batch := payloads():
            await attacker.publish(stream_id, TOPIC, batch, other)
            world.notes["messages"] += len(batch)
            await trio.sleep(pause_s)
        await trio.sleep_forever()

    await world.wires(job)


@attack
async def gossip_garbage(world: World) -> None:
    await gossip(world, lambda: [os.urandom(1000)], pause_s=0.2)


@attack
async def gossip_large(world: World) -> None:
    await gossip(world, lambda: [os.urandom(MAX_GOSSIP) for _ in range(8)], pause_s=0.2)


@attack
async def gossip_no_work(world: World) -> None:
    chain = world.chain()
    share = mine_on(chain, chain.tip)
    header = share.header[:76] + (int.from_bytes(share.header[76:], "little") ^ 1).to_bytes(4, "little")
    bad = cbor2.dumps([1, [replace(share, header=header).encoded]])
    await gossip(world, lambda: [bad], pause_s=0.2)


@attack
async def gossip_flood(world: World) -> None:
    """One message as often as it goes: small, well-formed, and old news."""
    tip = world.chain().tip
    assert tip is not None
    with open_copy(world.honest.directory) as (_, store):
        raw = store.encoded(tip.hash)
    assert raw is not None
    message = cbor2.dumps([1, [raw]])
    await gossip(world, lambda: [message] * 64)


def mine_on(chain: Sharechain, parent: Any, **changes: Any) -> Share:
    """A share of the attacker's: all of it valid, but for the changes."""
    assert parent is not None
    facts = BlockFacts(height=parent.block_height - 1, next_bits=BITS)
    block = next((known for known, fact in chain.known_blocks().items() if fact.height == facts.height), GENESIS)
    at = {"block": block, "block_bits": BITS, "miner": 66, "time": max(parent.time + 1, int(time.time()))}
    return mine(chain, parent, **{**at, **changes})


@attack
async def gossip_forged_bodies(world: World) -> None:
    """500 bodies under the header of a good share; then the share itself, from somebody else."""
    chain = world.chain()
    share = mine_on(chain, chain.tip)
    forged = [
        cbor2.dumps([1, [forged_under(share, payout_script=b"\x00\x14" + os.urandom(20)).encoded]]) for _ in range(500)
    ]
    batches = iter([forged[start : start + 20] for start in range(0, 500, 20)])
    await gossip(world, lambda: next(batches, []), author=False, pause_s=0.05)
    await send_real(world, share)


@attack
async def gossip_forged_by_author(world: World) -> None:
    """The same, signed by who sends them."""
    chain = world.chain()
    share = mine_on(chain, chain.tip)
    forged = [
        cbor2.dumps([1, [forged_under(share, payout_script=b"\x00\x14" + os.urandom(20)).encoded]]) for _ in range(10)
    ]
    batches = iter([[one] for one in forged])
    await gossip(world, lambda: next(batches, []), pause_s=0.2)
    await send_real(world, share)


@attack
async def gossip_forged_orphans(world: World) -> None:
    """Bodies under the header of a share whose parent the node does not have yet; then the parent and the share."""
    chain = world.chain()
    parent = mine_on(chain, chain.tip)
    add(chain, parent, time.time() + 100)
    share = mine_on(chain, chain.entry(parent.hash), time=parent.time + 1)
    forged = [
        cbor2.dumps([1, [forged_under(share, payout_script=b"\x00\x14" + os.urandom(20)).encoded]]) for _ in range(500)
    ]
    batches = iter([forged[start : start + 20] for start in range(0, 500, 20)])
    await gossip(world, lambda: next(batches, []), author=False, pause_s=0.05)
    await send_real(world, parent, share)


async def send_real(world: World, *shares: Share) -> None:
    """Send shares as a stranger; they must join."""
    with world.attempt():
        async with wire(world.address) as other:
            await other.publish_shares(await other.open_topic(TOPIC), TOPIC, [share.encoded for share in shares])
            for _ in range(50):
                await trio.sleep(0.2)
                with open_copy(world.node.directory) as (_, store):
                    if all(store.encoded(share.hash) is not None for share in shares):
                        world.notes["the real one joined"] += 1
                        return
    world.notes["THE REAL ONE DID NOT JOIN"] += 1


@attack
async def gossip_future(world: World) -> None:
    """Shares that are hours ahead, each with its work."""
    chain = world.chain()
    tip = chain.tip
    raws = [mine_on(chain, tip, time=int(time.time()) + 3 * 3_600, salt=salt).encoded for salt in range(40)]
    batches = iter([[cbor2.dumps([1, [raw]])] for raw in raws])
    await gossip(world, lambda: next(batches, []), pause_s=0.05)


@attack
async def gossip_deep(world: World) -> None:
    """Shares on a parent 300 below the tip."""
    chain = world.chain()
    assert chain.tip is not None
    parent = chain.main_entry(chain.tip.height - 300)
    assert parent is not None
    raws = [mine_on(chain, parent, time=parent.time + 5, salt=salt).encoded for salt in range(40)]
    batches = iter([[cbor2.dumps([1, [raw]])] for raw in raws])
    await gossip(world, lambda: next(batches, []), pause_s=0.02)


@attack
async def gossip_below_floor(world: World) -> None:
    """Shares of the easiest target there is, on the tip."""
    chain = world.chain()
    tip = chain.tip
    easy = target_to_bits(PARAMS.max_target)
    raws = [mine_on(chain, tip, bits=easy, salt=salt).encoded for salt in range(400)]
    batches = iter([[cbor2.dumps([1, raws[start : start + 4]])] for start in range(0, 400, 4)])
    await gossip(world, lambda: next(batches, []), author=False, pause_s=0.02)


@attack
async def gossip_orphans(world: World) -> None:
    """Shares with work, whose parents do not exist: they wait, and are asked for."""
    chain = world.chain()
    tip = chain.tip
    raws = [mine_on(chain, tip, salt=salt, data={"parent": os.urandom(32)}).encoded for salt in range(60)]
    batches = iter([[cbor2.dumps([1, [raw]])] for raw in raws])
    await gossip(world, lambda: next(batches, []), pause_s=0.02)


# Measuring


@dataclass(kw_only=True, slots=True)
class Row:
    """What one attack did."""

    name: str
    seconds: float
    attacker: str
    bans: dict[str, int]
    again: str
    rss_mb: tuple[float, float, float]
    cpu_s: float
    load: float
    before_ms: tuple[float, float, float]
    during_ms: tuple[float, float, float]
    honest: str
    counters: dict[str, int]


def memory_mb(pid: int, name: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def latencies(file: Path, since: float, until: float) -> tuple[float, float, float]:
    """Of the submissions answered in a time: median, 99 %, the longest; milliseconds."""
    pairs = [line.split() for line in file.read_text().splitlines()]
    found = sorted(float(pair[1]) for pair in pairs if len(pair) == 2 and since <= float(pair[0]) < until)
    if not found:
        return (float("nan"),) * 3
    return found[len(found) // 2], found[min(len(found) - 1, int(len(found) * 0.99))], found[-1]


def counters(network: dict[str, Any]) -> Counter[str]:
    return Counter({**network["gossip"], **{f"rule {rule}": count for rule, count in network["faults"].items()}})


def network_of(node: NodeProcess) -> dict[str, Any]:
    status = node.status()
    assert status is not None
    network: dict[str, Any] = status["network"]
    return network


def link_of(world: World) -> float | None:
    """Since when the honest node is connected."""
    rows = network_of(world.node)["peers"]
    ids = {row["peer_id"]: row for row in rows if row["state"] == "connected"}
    row = ids.get(world.honest.peer_id)
    return None if row is None else row["since"]


async def measure(world: World, name: str, probe: Path) -> Row:
    pid = world.node.pid
    assert pid is not None
    world.seeds.clear()
    world.notes.clear()
    seconds = world.seconds
    quiet_from = time.time()
    await trio.sleep(QUIET_S)
    before, linked = counters(network_of(world.node)), link_of(world)
    rss = memory_mb(pid, "VmRSS")
    forget_peak(pid)
    cpu, began = world.node.usage().cpu_s, time.time()
    await ATTACKS[name](world)
    ended = time.time()
    world.seconds = seconds
    cpu = world.node.usage().cpu_s - cpu
    peak = memory_mb(pid, "VmHWM")
    ids = set(world.seeds)
    await trio.sleep(QUIET_S)
    world.node.check()
    network = network_of(world.node)
    banned = {row["peer_id"]: row["rule"] for row in network["peers"] if row["state"] == "banned"}
    bans = Counter(rule for peer_id, rule in banned.items() if peer_id in ids)
    again = await come_again(world, next((seed for peer_id, seed in world.seeds.items() if peer_id in banned), None))
    mine, theirs = world.node.status(), world.honest.status()
    assert mine is not None
    assert theirs is not None
    stays = "stayed" if link_of(world) == linked is not None else "LOST ITS LINK"
    return Row(
        name=name,
        seconds=ended - began,
        attacker=", ".join(f"{note}: {count}" for note, count in world.notes.most_common(6)),
        bans=dict(bans),
        again=again,
        rss_mb=(rss, peak, memory_mb(pid, "VmRSS")),
        cpu_s=cpu,
        load=os.getloadavg()[0],
        before_ms=latencies(probe, quiet_from, began),
        during_ms=latencies(probe, began, ended),
        honest=f"{stays}, heights {mine['height']}/{theirs['height']}",
        counters=dict(sorted((counters(network) - before).items())),
    )


async def come_again(world: World, seed: bytes | None) -> str:
    """Whether a banned identity is let in again."""
    if seed is None:
        return "nobody is banned"
    try:
        async with lying(world.address, PARAMS.network_id, seed):
            return "LET IN AGAIN"
    except PeerError as error:
        return f"coming again: {error.rule}"


def make_history(path: Path) -> None:
    """Shares up to now: first three a second, so that the chain asks for more work than the least; then one."""
    facts = {GENESIS: BlockFacts(height=0, next_bits=BITS)}
    chain = Sharechain(PARAMS)
    chain.learn_block(GENESIS, facts[GENESIS], time.time())
    directory = DataDirectory(path, PARAMS)
    times = [*range(20), *(20 + number // 3 for number in range(430))]
    now = int(time.time())
    times += range(times[-1] + 1, times[-1] + 1 + HISTORY - len(times))
    for number, moment in enumerate(times):
        at = now - times[-1] + moment
        share = mine(chain, chain.tip, miner=number % 20, time=at, block=GENESIS, block_bits=BITS)
        directory.store.write(add(chain, share, at + 60), first_seen_ms=at * 1000, facts=facts, sync=False)
    directory.note_written()
    directory.close()


async def run(names: list[str], seconds: float, scratch: Path, show: Callable[[Row], None]) -> None:
    make_history(scratch / "node1")
    shutil.copytree(scratch / "node1", scratch / "node2")
    async with Cluster(scratch, PARAMS, 2, options={"log_level": "info"}) as cluster:
        await cluster.start()
        probes = []
        try:
            for node in cluster.nodes:
                code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import hostile; "
                code += f"hostile.run_probe({node.stratum_port}, {str(scratch / f'probe{node.number}')!r})"
                probes.append(subprocess.Popen([sys.executable, "-c", code]))  # noqa: ASYNC220 - an instant; what it runs is waited for elsewhere
            world = World(node=cluster.nodes[0], honest=cluster.nodes[1], seconds=seconds)
            probe = scratch / "probe1"
            await cluster.wait_until(lambda: probe.exists() and probe.stat().st_size > 500, 60, "the miner")
            for name in names:
                show(await measure(world, name, probe))
        finally:
            for process in probes:
                process.terminate()
                process.wait()


def print_table(rows: list[Row]) -> None:
    """For people: three lines for each attack."""
    for row in rows:
        before, during = (" / ".join(f"{ms:.1f}" for ms in side) for side in (row.before_ms, row.during_ms))
        memory = " -> ".join(f"{mb:.0f}" for mb in row.rss_mb)
        bans = ", ".join(f"{count} x {rule}" for rule, count in row.bans.items()) or "none"
        print(f"{row.name}: {row.seconds:.0f} s, node {memory} MB, {row.cpu_s:.1f} s CPU (load {row.load:.0f})")
        print(f"    attacker: {row.attacker}; banned: {bans}; {row.again}")
        print(f"    miner ms (50 % / 99 % / most): {before} before, {during} during; honest node {row.honest}")
        print(f"    counters: {row.counters}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=list(ATTACKS), help="one attack; may be given more than once"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack; some take longer by nature")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="p2pool-hostile-"))
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        if not arguments.json:
            print_table([row])
            sys.stdout.flush()

    names = arguments.only or sorted(ATTACKS, key=LAST.__contains__)
    trio.run(run, names, arguments.seconds, scratch, show)
    if arguments.json:
        print(json.dumps([{name: getattr(row, name) for name in Row.__slots__} for row in rows]))
    print(f"logs in {scratch}", file=sys.stderr)
    return 0 if all("stayed" in row.honest for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
