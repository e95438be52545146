"""Whole nodes on a simulated network, in virtual time: started, killed, started again from disk, cut off, compared.

    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=1) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            nodes.assert_agreed()

Nodes are called by number, from 1 on, as in ``tests.p2pool.simulated``.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import trio

from p2pool.database import DataDirectory, open_copy
from p2pool.errors import PeerError
from p2pool.jobs import Candidate
from p2pool.node import Node
from p2pool.p2p import SYNC, Gossip, Link
from p2pool.p2p.network import Network, NetworkDesk
from p2pool.p2p.peers import PeerBook, PeerLimits
from p2pool.p2p.sync import STATUS_INTERVAL_S
from p2pool.p2p.wire import (
    MAX_LOCATED,
    Announce,
    BlocksAfter,
    GetPeers,
    GetShares,
    Locate,
    Located,
    Message,
    Peers,
    Shares,
    Status,
    Transactions,
    decode_message,
    encode_message,
)
from p2pool.report import VerifyReport, load_chain, verify_store
from sharechain.chain import Accepted, Sharechain
from sharechain.entry import ChainEntry
from sharechain.params import Params
from sharechain.share import Share, share_id
from sharechain.validate import BlockFacts
from tests.builders import add, mine, snapshot
from tests.p2pool.fakebitcoin import BITS, FakeBitcoin
from tests.p2pool.network import EASY_SERVER, PARAMS, START, Rig, is_plain_share
from tests.p2pool.simulated import PORT, SimulatedNet, SimulatedTransport, address_of

#: Two rounds of statuses, and the trip of the answers.
TWO_ROUNDS_S = 2 * STATUS_INTERVAL_S + 1.0


def now() -> float:
    """Unix seconds of the simulated world."""
    return START + trio.current_time()


@dataclass(eq=False, kw_only=True)
class Member:
    """One node that runs."""

    number: int
    path: Path
    backend: FakeBitcoin
    transport: SimulatedTransport
    directory: DataDirectory
    book: PeerBook
    node: Node
    scope: trio.CancelScope
    ended: trio.Event

    @property
    def chain(self) -> Sharechain:
        return self.node.chain

    @property
    def network(self) -> Network:
        assert self.node.network is not None
        return self.node.network

    @property
    def height(self) -> int:
        """Of its tip; -1 for none."""
        return -1 if self.chain.tip is None else self.chain.tip.height

    @property
    def tip(self) -> bytes:
        """Its hash; empty for none."""
        return b"" if self.chain.tip is None else self.chain.tip.hash

    def linked(self) -> set[str]:
        """Peer ids of who is connected."""
        return {link.peer_id for link in self.transport.links}


class Fleet:
    """Nodes of one share network.

    Mutable fields: ``members`` (who runs, by number), ``_left`` (data directory and Bitcoin of those who do not),
    ``_fixed`` (whom each is told to call), ``_salt`` and ``_lives``, which make extranonces and directories differ.
    """

    def __init__(self, path: Path, net: SimulatedNet, nursery: trio.Nursery, *, params: Params = PARAMS) -> None:
        self.net = net
        self.params = params
        self.members: dict[int, Member] = {}
        self._path = path
        self._nursery = nursery
        self._left: dict[int, tuple[Path, FakeBitcoin]] = {}
        self._fixed: dict[int, Sequence[str]] = {}
        self._salt = count(1)
        self._lives = count()

    def __getitem__(self, number: int) -> Member:
        return self.members[number]

    async def start(
        self,
        number: int,
        *,
        calls: Iterable[int] = (),
        data: Path | None = None,
        backend: FakeBitcoin | None = None,
        limits: PeerLimits | None = None,
    ) -> Member:
        """Start a node, again if it ran before: then on what it left, and with the peers that it was told then.

        Args:
            calls: the nodes that it is told to call.
            data: a data directory to begin with; it is copied.
            backend: its Bitcoin, in place of a fresh one.
        """
        if number not in self._left:
            self._left[number] = self._path / f"{number}-{next(self._lives)}", backend or FakeBitcoin(now)
            if data is not None:
                shutil.copytree(data, self._left[number][0])
        path, backend = self._left.pop(number)
        fixed = self._fixed.setdefault(number, [address_of(other) for other in calls if other != number])
        transport = self.net.transport(number)
        directory = DataDirectory(path, self.params)
        encoded, limits = directory.load_peers(), limits or PeerLimits()
        if encoded is None:
            book = PeerBook(limits, own_id=transport.peer_id, fixed=fixed)
        else:
            book = PeerBook.decode(encoded, limits, own_id=transport.peer_id, fixed=fixed)

        def network(desk: NetworkDesk) -> Network:
            choose = random.Random(f"{self.net.seed}/{number}")
            return Network(desk, transport, book, clock=now, choose=choose, save=directory.save_peers)

        node = Node(
            directory=directory, params=self.params, backend=backend, stratum=EASY_SERVER, clock=now, network=network
        )
        member = self.members[number] = Member(
            number=number,
            path=path,
            backend=backend,
            transport=transport,
            directory=directory,
            book=book,
            node=node,
            scope=trio.CancelScope(),
            ended=trio.Event(),
        )
        await self._nursery.start(self._run, member)
        return member

    async def _run(self, member: Member, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with member.scope:
                await member.node.run([], task_status=task_status)
        finally:
            member.directory.close()
            member.ended.set()

    async def stop(self, number: int) -> None:
        """As an operator does."""
        member = self.members.pop(number)
        member.scope.cancel()
        await member.ended.wait()
        self._left[number] = member.path, member.backend

    async def crash(self, number: int, *, keeps_bitcoin: bool = True) -> None:
        """As ``kill -9`` does: nobody is told, and what is on disk at this instant is what is left."""
        member = self.members.pop(number)
        self.net.crash(member.transport)
        left = self._path / f"{number}-{next(self._lives)}"
        shutil.copytree(member.path, left)
        self._left[number] = left, member.backend.copy() if keeps_bitcoin else FakeBitcoin(now)
        member.scope.cancel()
        await member.ended.wait()

    async def add(self, stranger: Stranger) -> Stranger:
        """Let a peer run that is no node."""
        await self._nursery.start(stranger.transport.run, stranger)
        return stranger

    def partition(self, *groups: Iterable[int]) -> None:
        """Cut the net between groups of nodes that run."""
        self.net.partition(*([self[number].transport for number in group] for group in groups))

    def mine(
        self, number: int, *, miner: int | None = None, wanted: Callable[[Candidate], bool] = is_plain_share
    ) -> Share:
        """A miner at a node's desk finds a share, or what else is wanted, and the node takes it."""
        rig = Rig(self[number].node, number if miner is None else miner)
        rig._extranonce = next(self._salt)
        candidate = rig.find(wanted)
        rig.submit(candidate)
        return candidate.share()

    async def mine_for(self, count: int, miners: Sequence[int], *, pause_s: float = 1.0) -> None:
        """Nodes take turns in finding shares."""
        for turn in range(count):
            self.mine(miners[turn % len(miners)])
            await trio.sleep(pause_s)

    async def until(self, reached: Callable[[], Any], within_s: float) -> None:
        """Wait for something to be so, in virtual time; fails with where the nodes stand."""
        deadline = trio.current_time() + within_s
        while not reached():
            assert trio.current_time() < deadline, self.standing()
            await trio.sleep(0.1)

    async def ready(self, within_s: float = 60.0) -> None:
        """Wait until every node serves miners."""
        await self.until(lambda: len(self.serving()) == len(self.members), within_s)

    async def settle(self, within_s: float = 120.0) -> None:
        """Wait until all tips are one."""
        await self.until(self.is_agreed, within_s)

    def is_agreed(self) -> bool:
        """Whether all nodes have one tip."""
        return (
            len({None if member.chain.tip is None else member.chain.tip.hash for member in self.members.values()}) == 1
        )

    def serving(self) -> list[int]:
        """Who has work for miners."""
        return [number for number, member in sorted(self.members.items()) if member.network.is_ready]

    def is_one_bitcoin(self) -> bool:
        """Whether all Bitcoins that run have one tip, and the net is whole."""
        tips = {member.node.bitcoin_tip() for member in self.members.values()}
        return len(tips) == 1 and not self.net.is_partitioned

    def standing(self) -> dict[int, str]:
        """For people: where the nodes stand."""
        return {
            number: f"height {member.height}, base {member.chain.base_height}, "
            f"tip {member.tip[:4].hex()}, work {0 if member.chain.tip is None else member.chain.tip.total_work}, "
            f"{member.network.sync.statistics(member.chain)}, {len(member.linked())} links, "
            f"ready {member.network.is_ready}, {member.network.statistics().gossip}, "
            f"{member.network.statistics().faults}"
            for number, member in sorted(self.members.items())
        }

    def assert_agreed(self) -> None:
        """All nodes have the same tip, main chain, window, payouts and uncles to name; the store holds each chain."""
        base = max(member.chain.base_height for member in self.members.values())
        views = {number: view(member.chain, base) for number, member in self.members.items()}
        first = next(iter(views.values()))
        assert all(one == first for one in views.values()), self.standing()
        for member in self.members.values():
            assert_stored(member)

    def faults(self) -> dict[int, dict[str, int]]:
        """What each node holds against others, by rule; nodes that hold nothing are left out."""
        found = {number: dict(member.network.statistics().faults) for number, member in self.members.items()}
        return {number: faults for number, faults in found.items() if faults}


def view(chain: Sharechain, base: int) -> tuple[object, ...]:
    """What nodes must agree on, above a height that all of them hold."""
    tip, work, main, weights, units, payouts, uncles, _ = snapshot(chain) or (None, 0, (), (), 0, (), (), ())
    assert isinstance(main, tuple)
    return tip, work, main[base - chain.base_height :], weights, units, payouts, uncles


def assert_stored(member: Member) -> None:
    """What would be loaded after a kill at this instant is the chain as it is."""
    with open_copy(member.path) as (params, store):
        stored = load_chain(params, store)
    assert {entry.hash for entry in stored.entries()} == {entry.hash for entry in member.chain.entries()}
    assert stored.base_height == member.chain.base_height
    assert stored.short_history == member.chain.short_history
    assert snapshot(stored)[:7] == snapshot(member.chain)[:7]


def verified(member: Member) -> VerifyReport:
    """What ``p2pool verify`` says of a node's store."""
    with open_copy(member.path) as (params, store):
        *_, report = verify_store(params, store)
    assert isinstance(report, VerifyReport)
    return report


def make_history(path: Path, params: Params, count: int, *, miners: int = 5, until: int = START) -> Path:
    """A data directory in which so many shares were mined until a moment, with an uncle now and then."""
    facts = {FakeBitcoin.GENESIS: BlockFacts(height=0, next_bits=BITS)}
    chain = Sharechain(params)
    chain.learn_block(FakeBitcoin.GENESIS, facts[FakeBitcoin.GENESIS], until)
    directory = DataDirectory(path, params)
    for number in range(count):
        parent = chain.tip
        for miner in (number % miners, miners) if number % 20 == 7 else (number % miners,):
            share = mine(
                chain,
                parent,
                miner=miner,
                time=until - count + number,
                uncles=chain.uncle_candidates(parent),
                block=FakeBitcoin.GENESIS,
                block_bits=BITS,
            )
            directory.store.write(add(chain, share), first_seen_ms=share.time * 1000, facts=facts, sync=False)
    directory.note_written()
    directory.close()
    return path


def make_lie(path: Path, params: Params, count: int) -> Path:
    """A data directory with the history that a liar mines alone: it claims to stand on more work than all others."""
    facts = {FakeBitcoin.GENESIS: BlockFacts(height=0, next_bits=BITS)}
    chain = Sharechain(params)
    chain.learn_block(FakeBitcoin.GENESIS, facts[FakeBitcoin.GENESIS], START)
    foot: list[Share] = []
    parent: ChainEntry | None = None
    for number in range(count):
        claim = {"parent": b"\xee" * 32, "height": 300, "total_work": 2**200} if parent is None else None
        share = mine(
            chain,
            parent,
            time=START - 4 * (count - number),
            block=FakeBitcoin.GENESIS,
            block_bits=BITS,
            data=claim,
        )
        if len(foot) <= params.uncle_depth:
            foot.append(share)
            parent = ChainEntry(share, parent, (), share.data.payout_script)
            if len(foot) == params.uncle_depth + 1:
                change = chain.begin_history(foot, START)
                assert isinstance(change, Accepted)
                directory = DataDirectory(path, params)
                directory.store.write(change, first_seen_ms=START * 1000, facts=facts, sync=False)
                parent = chain.tip
        else:
            directory.store.write(add(chain, share), first_seen_ms=START * 1000, facts=facts, sync=False)
            parent = chain.tip
    directory.note_written()
    directory.close()
    return path


@asynccontextmanager
async def fleet(
    path: Path,
    size: int,
    *,
    seed: int = 0,
    params: Params = PARAMS,
    calls: Iterable[int] | None = None,
    data: Path | None = None,
    **net: Any,
) -> AsyncIterator[Fleet]:
    """So many nodes, each told to call all others.

    Args:
        path: an empty directory.
        seed: of the network's chance.
        calls: whom each is told to call, in place of all others.
        data: a data directory that each begins with.
        net: options of ``SimulatedNet``.
    """
    async with trio.open_nursery() as nursery:
        nodes = Fleet(path, SimulatedNet(seed, **net), nursery, params=params)
        for number in range(1, size + 1):
            await nodes.start(number, calls=range(1, size + 1) if calls is None else calls, data=data)
        yield nodes
        for number in list(nodes.members):
            await nodes.stop(number)
        nursery.cancel_scope.cancel()


class Stranger:
    """A peer that says what a test wants; it is no node.

    Mutable fields: ``answers`` (by kind of request, what makes the answer), ``heard`` (all requests and gossip), and
    ``lost``, the peers that hung up.
    """

    def __init__(self, net: SimulatedNet, number: int, *, ip: str | None = None, port: int = PORT) -> None:
        self.transport = net.transport(number, ip=ip, port=port)
        self.answers: dict[type[Any], Callable[[Any], Message | bytes]] = {GetPeers: lambda _: Peers(addresses=())}
        self.heard: list[Any] = []
        self.lost: list[str] = []

    def may_enter(self, ip: str) -> bool:
        return True

    def opened(self, link: Link) -> bool:
        return True

    def closed(self, peer_id: str) -> None:
        self.lost.append(peer_id)

    def gossip(self, message: Gossip) -> bool:
        self.heard.append(message)
        return False

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        raise AssertionError(f"{peer_id} broke {rule}: {detail}")

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        message = decode_message(request, Status, Locate, GetShares, GetPeers, Announce, Transactions, BlocksAfter)
        self.heard.append(message)
        if type(message) not in self.answers:
            raise PeerError("gone", "says nothing")
        answer = self.answers[type(message)](message)
        return answer if isinstance(answer, bytes) else encode_message(answer)

    async def ask(self, member: Member, message: Message, protocol: str = SYNC) -> bytes:
        """Ask a node something."""
        return await self.transport.request(member.transport.peer_id, protocol, encode_message(message), 20.0)

    def claims(self, *, tip: bytes, height: int, total_work: int, block_hash: bytes = bytes(32)) -> None:
        """Answer statuses so from now on."""
        status = Status(
            tip=tip,
            height=height,
            total_work=total_work,
            listen_port=0,
            block_hash=block_hash,
            block_height=0,
            software="stranger",
        )
        self.answers[Status] = lambda _: status

    def serves(self, node: Node, change: Callable[[bytes], bytes] = lambda raw: raw) -> None:
        """Answer with what a node has, whose shares are changed on their way."""
        chain = node.chain

        def shares(request: GetShares) -> Shares:
            known = [node.encoded(share_hash) for share_hash in request.hashes]
            return Shares(shares=tuple(None if raw is None else change(raw) for raw in known))

        def located(request: Locate) -> Located:
            hashes = chain.after_locator(request.locator, MAX_LOCATED)
            bodies = [raw for share_hash in hashes if (raw := node.encoded(share_hash)) is not None]
            return Located(hashes=hashes, identities=tuple(share_id(change(raw)) for raw in bodies))

        self.answers[Locate] = located
        self.answers[GetShares] = shares
        tip = chain.tip
        assert tip is not None
        self.claims(tip=tip.hash, height=tip.height, total_work=tip.total_work)
