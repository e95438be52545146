"""The sync as a state machine: real chains on the other side, virtual time, and peers of every kind."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.p2p import sync as sync_module
from p2pool.p2p.sync import (
    ALONE_AFTER_S,
    COOLDOWN_S,
    MAX_MISSING,
    NO_GAIN_S,
    SLOW_S,
    STATUS_INTERVAL_S,
    TURN_S,
    Ask,
    Sync,
)
from p2pool.p2p.wire import Status
from sharechain.chain import Early, Orphaned, Sharechain
from sharechain.errors import InvalidShare
from sharechain.share import NULL_HASH, Share, decode_share, share_id
from tests.builders import PARAMS, add, forged_under, grow, mine, new_chain

START = 2_000_000_000.0
TICK_S = 0.1
#: As in the network: seconds that a peer may take, and failures in a row after which it is left.
TIMEOUT_S = 20.0
MAX_FAILURES = 3
BATCH = 10
LOCATED = 40

#: Every share that a test made, encoded, by hash.
ENCODED: dict[bytes, bytes] = {}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches small enough for a download of many to take no time."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "BATCH_SIZE", BATCH)
    monkeypatch.setattr(sync_module, "MIN_LISTED", BATCH * sync_module.MAX_AHEAD)
    monkeypatch.setattr(sync_module, "MIN_RATE", 1)


def keep(shares: Sequence[Share]) -> list[Share]:
    ENCODED.update((share.hash, share.encoded) for share in shares)
    return list(shares)


@cache
def history() -> tuple[Share, ...]:
    """The shares that the tests sync; uncles among them."""
    chain = new_chain()
    shares: list[Share] = []
    for number in range(60):
        shares += grow(chain, 4)
        if number % 5 == 0:
            tip = chain.tip
            assert tip is not None
            uncle = mine(chain, tip.parent, miner=3, salt=number + 1)
            add(chain, uncle)
            shares.append(uncle)
    return tuple(keep(shares))


def chain_of(shares: Sequence[Share]) -> Sharechain:
    chain = new_chain()
    for share in shares:
        add(chain, share)
    return chain


class Remote:
    """A peer. Mutable fields: its chain and how it behaves."""

    def __init__(self, chain: Sharechain, *, delay: float = 0.05) -> None:
        self.chain = chain
        self.delay = delay
        #: Kinds of requests that it never answers.
        self.silent: set[str] = set()
        #: What part of the requests fails, at once.
        self.fails = 0.0
        #: Shares that fit into one answer.
        self.fits = 1_000
        #: Called in place of the honest answer.
        self.claim: Callable[[], Status] | None = None
        self.locate: Callable[[Ask], Sequence[bytes]] | None = None
        self.give: Callable[[bytes], bytes | None] | None = None

    def status(self) -> Status:
        if self.claim is not None:
            return self.claim()
        tip = self.chain.tip
        if tip is None:
            return status_of(NULL_HASH, 0, 0)
        return status_of(tip.hash, tip.height, tip.total_work)

    def located(self, ask: Ask) -> Sequence[bytes]:
        return self.chain.after_locator(ask.hashes, LOCATED) if self.locate is None else self.locate(ask)

    def identity(self, share_hash: bytes) -> bytes:
        give = self.give or ENCODED.get
        return share_id(give(share_hash) or share_hash)

    def shares(self, hashes: Sequence[bytes]) -> list[bytes | None]:
        give = self.give or (lambda share_hash: ENCODED[share_hash] if share_hash in self.chain else None)
        return [give(share_hash) for share_hash in hashes[: self.fits]]


def status_of(tip: bytes, height: int, total_work: int) -> Status:
    return Status(
        tip=tip,
        height=height,
        total_work=total_work,
        listen_port=0,
        block_hash=bytes(32),
        block_height=0,
        software="test",
    )


class World:
    """A node under test among remotes. Mutable fields: all."""

    def __init__(
        self, remotes: dict[str, Remote], *, chain: Sharechain | None = None, expects_peers: bool = True, seed: int = 0
    ) -> None:
        self.now = START
        self.chain = new_chain() if chain is None else chain
        self.sync = Sync(uncle_depth=PARAMS.uncle_depth, expects_peers=expects_peers, now=self.now)
        self.remotes = remotes
        self.peers: set[str] = set()
        self.random = Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        #: Every request that was made, with its time.
        self.asked: list[tuple[float, Ask]] = []
        self.blamed: Counter[str] = Counter()
        self.unkept: Counter[str] = Counter()
        self.left: list[str] = []
        #: Seconds that taking one batch takes.
        self.intake_s = 0.0
        self.intake_free_at = START
        for peer in remotes:
            self.join(peer)

    def join(self, peer: str, machine: str = "") -> None:
        self.peers.add(peer)
        self.sync.connected(peer, self.now, machine=machine)

    def leave(self, peer: str) -> None:
        if peer in self.peers:
            self.peers.discard(peer)
            self.sync.gone(peer, self.now)

    def at(self, after: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + after, len(self.asked) * 1_000 + len(self.events), event))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Virtual seconds that passed."""
        started = self.now
        while self.now < started + seconds and not until():
            self.step()
        return self.now - started

    def step(self) -> None:
        self.now += TICK_S
        while self.events and self.events[0][0] <= self.now:
            heapq.heappop(self.events)[2]()
        for ask in self.sync.asks(self.chain, self.now):
            self.asked.append((self.now, ask))
            self.send(ask)
        for lead in self.sync.unkept:
            self.unkept[lead] += 1
        self.sync.unkept.clear()
        self.take_in()
        self.check()

    def check(self) -> None:
        """What holds at all times."""
        download = self.sync.download
        if download is not None:
            assert download.lead in self.peers
            listed = [share_hash for batch in download.batches for share_hash in batch.hashes]
            assert len(listed) == len(set(listed))
            assert len(listed) <= BATCH * sync_module.MAX_AHEAD + LOCATED
            fetched = [batch for batch in download.batches if batch.shares is not None or batch.asked is not None]
            assert len(fetched) <= 2 * sync_module.MAX_AHEAD
            assert all(batch.asked is None or batch.asked in self.peers for batch in download.batches)
        assert len(self.sync._missing) <= MAX_MISSING

    def send(self, ask: Ask) -> None:
        remote = self.remotes[ask.peer]
        if self.random.random() < remote.fails:
            self.at(remote.delay, lambda: self.fail(ask))
        elif ask.kind in remote.silent or (delay := remote.delay * (0.5 + self.random.random())) > TIMEOUT_S:
            self.at(TIMEOUT_S, lambda: self.fail(ask))
        else:
            self.at(delay, lambda: self.answer(ask))

    def fail(self, ask: Ask) -> None:
        self.sync.failed(ask, self.now)
        if self.sync.failures(ask.peer) >= MAX_FAILURES and ask.peer in self.peers:
            self.left.append(ask.peer)
            self.leave(ask.peer)

    def answer(self, ask: Ask) -> None:
        remote = self.remotes[ask.peer]
        if ask.peer not in self.peers:
            self.fail(ask)
        elif ask.kind == "status":
            self.sync.answered(ask)
            self.sync.told(ask.peer, remote.status(), self.now)
        elif ask.kind == "locate":
            hashes = remote.located(ask)
            self.sync.located(ask, hashes, [remote.identity(share_hash) for share_hash in hashes], self.chain)
        else:
            for raw in self.sync.fetched(ask, remote.shares(ask.hashes), self.now):
                outcome = self.chain.accept(decode_share(raw), START)
                if isinstance(outcome, Orphaned):
                    self.sync.orphaned(ask.peer, outcome.missing, self.now, asked=True)

    def take_in(self) -> None:
        while self.now >= self.intake_free_at and (ready := self.sync.next_batch()) is not None:
            download, batch = ready
            assert batch.shares is not None
            self.intake_free_at = max(self.intake_free_at, self.now) + self.intake_s
            try:
                for raw in batch.shares:
                    outcome = self.chain.accept(decode_share(raw), START)
                    if isinstance(outcome, Orphaned):
                        self.sync.orphaned(batch.giver, outcome.missing, self.now, asked=False)
            except InvalidShare:
                self.blamed[download.lead] += 1
                self.sync.abandon(download, self.now)
            else:
                self.sync.took(download, batch)
            self.blamed.update(self.sync.forgers)
            self.sync.forgers.clear()
        if (done := self.sync.next_done()) is not None:
            done.is_finished = True

    def gossip(self, share: Share, bearer: str) -> None:
        outcome = self.chain.accept(share, START)
        if isinstance(outcome, Orphaned):
            self.sync.orphaned(bearer, outcome.missing, self.now, asked=False)

    def has_tip_of(self, peer: str) -> bool:
        tip, theirs = self.chain.tip, self.remotes[peer].chain.tip
        return tip is not None and theirs is not None and tip.hash == theirs.hash

    def is_ready(self) -> bool:
        return self.sync.is_ready(self.chain, self.now)

    def asks_of(self, kind: str, peer: str | None = None) -> list[Ask]:
        return [ask for _, ask in self.asked if ask.kind == kind and peer in (None, ask.peer)]


@cache
def whole() -> Sharechain:
    """For reading."""
    return chain_of(history())


def honest(**options: float) -> Remote:
    return Remote(whole(), **options)


def liar(height: int = 10_000) -> Remote:
    """Claims much work and has nothing: its tip is another each time it is asked."""
    remote, count = Remote(new_chain()), iter(range(10**9))
    remote.claim = lambda: status_of(b"liar" + next(count).to_bytes(28, "big"), height, 2**200)
    remote.give = lambda share_hash: None
    return remote


# -- converging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_fresh_node_gets_all_shares_each_once(count: int) -> None:
    world = World({f"peer{n}": honest() for n in range(count)})
    assert world.run(60, lambda: world.has_tip_of("peer0")) < 30
    assert len(world.chain) == len(history())
    wanted = [share_hash for ask in world.asks_of("shares") for share_hash in ask.hashes]
    assert len(wanted) == len(set(wanted))
    world.run(1)
    assert world.is_ready()
    assert world.sync.download is None
    assert not world.unkept


def test_a_download_is_spread_over_all_peers_that_have_it() -> None:
    world = World({f"peer{n}": honest(delay=0.3) for n in range(4)})
    world.run(60, lambda: world.has_tip_of("peer0"))
    batches = Counter(ask.peer for ask in world.asks_of("shares"))
    assert set(batches) == set(world.remotes)
    assert min(batches.values()) >= 3


def test_one_peer_is_asked_for_one_batch_at_a_time() -> None:
    world = World({"one": honest(delay=1.0), "two": honest(delay=1.0)})
    under_way: Counter[str] = Counter()
    send, answer = world.send, world.answer

    def counted_send(ask: Ask) -> None:
        under_way[ask.peer] += ask.kind == "shares"
        assert under_way[ask.peer] <= 1
        send(ask)

    def counted_answer(ask: Ask) -> None:
        under_way[ask.peer] -= ask.kind == "shares"
        answer(ask)

    world.send, world.answer = counted_send, counted_answer  # type: ignore[method-assign]
    world.run(120, lambda: world.has_tip_of("one"))
    assert world.has_tip_of("one")


def test_answers_that_hold_a_part_of_a_batch_are_made_whole() -> None:
    remote = honest()
    remote.fits = 3
    world = World({"peer": remote})
    world.run(60, lambda: world.has_tip_of("peer"))
    assert len(world.chain) == len(history())


def test_what_has_arrived_is_bounded_while_the_node_is_slow_itself() -> None:
    world = World({f"peer{n}": honest() for n in range(3)})
    world.intake_s = 8.0
    world.run(60)
    download = world.sync.download
    assert download is not None, "its own slowness is not the lead's"
    arrived = [batch for batch in download.batches if batch.shares is not None]
    assert len(arrived) == sync_module.MAX_AHEAD
    world.intake_s = 0.0
    world.run(60, lambda: world.has_tip_of("peer0"))
    assert world.has_tip_of("peer0")


def test_after_the_lead_left_another_goes_on_where_it_was() -> None:
    world = World({"lead": honest(delay=0.2), "other": honest(delay=0.2)})
    world.run(60, lambda: len(world.chain) >= 100)
    download = world.sync.download
    assert download is not None
    had = {entry.hash for entry in world.chain.entries()}
    world.asked.clear()
    world.leave(download.lead)
    world.run(60, lambda: len(world.chain) == len(history()))
    assert len(world.chain) == len(history())
    assert not had & {share_hash for ask in world.asks_of("shares") for share_hash in ask.hashes}


def test_a_node_goes_on_when_all_left_and_one_comes_back() -> None:
    world = World({"peer": honest(delay=0.2)})
    world.run(60, lambda: len(world.chain) >= 100)
    world.leave("peer")
    assert world.sync.download is None
    world.run(60)
    world.join("peer")
    world.run(60, lambda: world.has_tip_of("peer"))
    assert world.has_tip_of("peer")


def test_an_answer_from_before_a_peer_left_is_nothing_to_its_next_connection() -> None:
    world = World({"lead": honest(delay=1.0), "giver": honest(delay=1.0)})
    world.sync.told("lead", world.remotes["lead"].status(), world.now)
    world.run(60, lambda: bool(world.asks_of("shares", "giver")))
    old = world.asks_of("shares", "giver")[-1]
    world.leave("giver")
    world.join("giver")
    world.sync.told("giver", world.remotes["giver"].status(), world.now)
    world.run(10, lambda: world.asks_of("shares", "giver")[-1] is not old)
    new = world.asks_of("shares", "giver")[-1]
    download = world.sync.download
    assert new is not old
    assert download is not None
    assert download is old.download
    world.sync.failed(old, world.now)
    assert world.sync.failures("giver") == 0
    assert world.sync.fetched(old, [b"x"], world.now) == []
    assert [batch.asked for batch in download.batches if batch.hashes == new.hashes] == ["giver"]
    world.run(60, lambda: world.has_tip_of("lead"))
    assert world.has_tip_of("lead")


def test_a_slow_peer_holds_up_no_more_than_its_batch_for_a_moment() -> None:
    fast = World({"fast": honest(delay=0.2)})
    alone_s = fast.run(120, lambda: fast.has_tip_of("fast"))
    for delay in (12.0, 50.0):  # answers late, and never in time
        world = World({"fast": honest(delay=0.2), "slow": honest(delay=delay)})
        for peer, remote in world.remotes.items():
            world.sync.told(peer, remote.status(), world.now)
        taken_s = world.run(120, partial(world.has_tip_of, "fast"))
        assert world.asks_of("shares", "slow")
        assert taken_s < alone_s + 3 * SLOW_S


def test_a_lead_that_is_slow_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "MIN_RATE", 5)
    slow = honest(delay=12.0)
    world = World({"slow": slow, "fast": honest(delay=0.2)})
    world.sync.told("slow", slow.status(), world.now)
    world.run(1)
    download = world.sync.download
    assert download is not None
    assert download.lead == "slow"
    assert world.run(120, lambda: world.has_tip_of("fast")) < 60


def test_a_peer_that_has_a_part_only_is_no_obstacle() -> None:
    poor = Remote(chain_of(history()[:50]))
    poor.claim = honest().status
    world = World({"poor": poor, "rich": honest()})
    world.run(120, lambda: world.has_tip_of("rich"))
    assert world.has_tip_of("rich")


def test_a_giver_of_forged_bodies_is_blamed_and_the_lead_gives_them() -> None:
    forger = honest()
    forger.give = lambda h: forged_under(decode_share(ENCODED[h]), payout_script=b"\x00\x14" + bytes(20)).encoded
    lead = honest(delay=0.3)
    world = World({"lead": lead, "forger": forger})
    lead.claim = lambda: status_of(history()[-1].hash, 239, 2**60)  # the most work: it leads
    forger.claim = lambda: status_of(history()[-1].hash, 239, 2**60)
    world.run(60, lambda: len(world.chain) == len(history()))
    assert len(world.chain) == len(history())
    assert set(world.blamed) == {"forger"}


# -- healing ---------------------------------------------------------------------------------------------------


def extend(world: World, *peers: str, miner: int = 0) -> Share:
    """One more share on the chain of a peer; others take it in too."""
    chain = world.remotes[peers[0]].chain
    share = mine(chain, chain.tip, miner=miner, uncles=chain.uncle_candidates(chain.tip))
    keep([share])
    for peer in peers:
        add(world.remotes[peer].chain, share)
    return share


def synced(count: int = 2) -> World:
    world = World({f"peer{n}": Remote(chain_of(history())) for n in range(count)}, chain=chain_of(history()))
    world.run(5)
    assert world.is_ready()
    world.asked.clear()
    return world


def test_a_share_that_gossip_lost_is_healed_within_a_round() -> None:
    world = synced()
    share = extend(world, "peer0", "peer1")
    taken_s = world.run(60, lambda: share.hash in world.chain)
    assert taken_s < STATUS_INTERVAL_S + 1
    assert not world.asks_of("locate")


def test_a_share_beside_the_tip_that_gossip_lost_is_healed_too() -> None:
    world = synced()
    tip = world.chain.tip
    assert tip is not None
    share = mine(world.chain, tip.parent, miner=2, salt=77)
    other = world.remotes["peer0"].chain = chain_of([*history()[:-1], share, history()[-1]])
    keep([share])
    assert other.tip is not None
    assert other.tip.hash == share.hash
    assert world.run(60, lambda: share.hash in world.chain) < STATUS_INTERVAL_S + 1


def test_the_missing_parent_of_a_gossiped_share_is_asked_of_its_bearer() -> None:
    world = synced()
    lost = extend(world, "peer1")
    share = extend(world, "peer1")
    world.gossip(share, "peer1")
    assert world.run(60, lambda: share.hash in world.chain) < 1
    assert lost.hash in world.chain
    assert [ask.peer for ask in world.asks_of("shares")] == ["peer1"]
    assert world.sync.statistics(world.chain).missing <= 1
    world.run(1)
    assert world.sync.statistics(world.chain).missing == 0


def test_a_parent_that_gossip_brings_late_is_not_asked_for() -> None:
    world = synced()
    late = extend(world, "peer0", "peer1")
    world.gossip(extend(world, "peer0", "peer1"), "peer1")
    world.run(0.2)
    world.gossip(late, "peer0")
    world.run(5)
    assert not world.asks_of("shares")


def test_a_deep_gap_becomes_a_download() -> None:
    world = synced()
    for _ in range(30):
        share = extend(world, "peer1")
    world.gossip(share, "peer1")
    world.run(60, lambda: share.hash in world.chain)
    assert share.hash in world.chain
    assert world.asks_of("locate")
    assert len(world.asks_of("shares")) < 12


def test_a_fork_that_is_as_high_as_ours_is_fetched_whole() -> None:
    world = synced()
    other = chain_of(history()[:-20])
    keep(grow(other, 15, miners=2))
    while other.tip is not None and world.chain.tip is not None and other.tip.height < world.chain.tip.height:
        keep(grow(other, 1, miners=2))
    theirs = other.tip
    assert theirs is not None
    assert theirs.hash not in world.chain
    world.remotes["peer0"].chain = other
    world.run(60, lambda: theirs.hash in world.chain)
    assert theirs.hash in world.chain


def test_hashes_that_nobody_has_are_given_up() -> None:
    world = synced()
    world.sync.orphaned("peer0", [bytes([n]) * 32 for n in range(200)], world.now, asked=False)
    world.run(60)
    assert world.sync.statistics(world.chain).missing == 0
    assert len(world.asks_of("shares")) <= 6
    world.sync.orphaned("peer0", [n.to_bytes(32, "big") for n in range(3 * MAX_MISSING)], world.now, asked=False)
    world.leave("peer0")
    world.run(5)
    assert world.sync.statistics(world.chain).missing == 0


def test_poke_exchanges_statuses_at_once() -> None:
    world = synced()
    world.run(0.5)
    world.asked.clear()
    world.sync.poke()
    world.run(0.2)
    assert {ask.peer for ask in world.asks_of("status")} == {"peer0", "peer1"}


# -- peers that lie --------------------------------------------------------------------------------------------


def hot(world: World, seconds: float) -> float:
    """Requests in a second, over some time."""
    world.asked.clear()
    world.run(seconds)
    return len(world.asked) / seconds


def near_liar() -> Remote:
    """Claims a tip right above ours that does not exist."""
    return liar(height=len(history()) * 4 // 5)


def invents_hashes() -> Remote:
    remote, count = liar(), iter(range(10**9))
    remote.locate = lambda ask: [b"hash" + next(count).to_bytes(28, "big") for _ in range(LOCATED)]
    return remote


def repeats_hashes() -> Remote:
    """Lists real shares that wait for ever, in turns: the work is done, and none ever joins."""
    remote, turns = liar(), iter(range(10**9))
    shares = orphans()
    halves = ([share.hash for share in shares[:20]], [share.hash for share in shares[20:]])
    remote.locate = lambda ask: halves[next(turns) % 2]
    remote.give = ENCODED.get
    return remote


@cache
def orphans() -> tuple[Share, ...]:
    chain = new_chain()
    keep(grow(chain, 1, miners=1))
    first = mine(chain, None, miner=4, salt=99)
    add(chain, first)
    return tuple(keep(grow(chain, 40, parent=chain.entry(first.hash))))


def lists_what_we_have() -> Remote:
    remote = liar()
    remote.locate = lambda ask: [share.hash for share in history()[:LOCATED]]
    return remote


def answers_nothing_but_status() -> Remote:
    remote = liar()
    remote.silent = {"locate", "shares"}
    return remote


def drips() -> Remote:
    """Lists hashes that do not exist and never answers for shares."""
    remote = invents_hashes()
    remote.silent = {"shares"}
    return remote


LIARS = [liar, near_liar, invents_hashes, repeats_hashes, lists_what_we_have, answers_nothing_but_status, drips]


@pytest.mark.parametrize("kind", LIARS)
def test_a_liar_does_not_keep_a_synced_node_from_being_ready(kind: Callable[[], Remote]) -> None:
    world = World({"liar": kind(), "peer": honest()}, chain=chain_of(history()))
    assert world.run(600, world.is_ready) < NO_GAIN_S + 1


def test_who_did_not_keep_its_claim_once_keeps_no_miner_waiting() -> None:
    world = World({"liar": liar(), "peer": honest()}, chain=chain_of(history()))
    assert world.run(600, world.is_ready) < 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIARS)
@pytest.mark.parametrize("count", [1, 4])
def test_liars_do_not_keep_a_fresh_node_from_the_real_chain(kind: Callable[[], Remote], count: int) -> None:
    world = World({**{f"liar{n}": kind() for n in range(count)}, "peer": honest()})
    world.run(600, lambda: world.has_tip_of("peer"))
    assert world.has_tip_of("peer")
    world.run(NO_GAIN_S + 1, world.is_ready)
    assert world.is_ready()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIARS)
def test_a_liar_alone_causes_few_requests_and_no_memory(kind: Callable[[], Remote]) -> None:
    world = World({"liar": kind()}, chain=chain_of(history()))
    world.run(30)
    assert hot(world, 300) < 3
    assert world.run(1, world.is_ready) < 1
    assert len(world.chain) == len(history())


@pytest.mark.parametrize("kind", LIARS)
def test_a_liar_that_tells_its_status_all_the_time_gains_nothing_by_it(kind: Callable[[], Remote]) -> None:
    world = World({"liar": kind(), "peer": honest()}, chain=chain_of(history()))
    world.asked.clear()
    for _ in range(1_300):
        world.sync.told("liar", world.remotes["liar"].status(), world.now)
        world.step()
    assert len(world.asked) < 3 * 130
    assert world.is_ready()


def test_a_liar_that_comes_under_ever_new_names_does_not_keep_a_node_from_being_ready() -> None:
    world = World({"peer": honest()}, chain=chain_of(history()))
    for number in range(40):
        name = f"liar{number}"
        world.remotes[name] = answers_nothing_but_status()
        world.join(name)
        world.sync.told(name, world.remotes[name].status(), world.now)
        world.run(10, lambda: False)
        if world.is_ready():
            break
        world.leave(name)
    assert world.is_ready()
    assert world.now - START < NO_GAIN_S + 20


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["before the honest peer", "after it"])
def test_a_machine_that_lies_under_ever_new_names_does_not_keep_an_honest_peer_from_leading(is_first: bool) -> None:
    world = World({})
    names = (f"liar{number}" for number in range(10**9))

    def lie() -> None:
        name = next(names)
        world.remotes[name] = answers_nothing_but_status()
        world.join(name, machine="one machine")
        world.sync.told(name, world.remotes[name].status(), world.now)

    def fail(ask: Ask) -> None:
        World.fail(world, ask)
        if ask.peer in world.peers:
            world.leave(ask.peer)
            lie()

    def tell() -> None:
        """As gossip and statuses do: what it claims is new each time."""
        extend(world, "peer")
        world.sync.told("peer", world.remotes["peer"].status(), world.now)
        world.at(STATUS_INTERVAL_S, tell)

    world.fail = fail  # type: ignore[method-assign]
    for is_honest in (False, True, False) if is_first else (True, False, False):
        if is_honest:
            world.remotes["peer"] = Remote(chain_of(history()))
            world.join("peer")
            tell()
        else:
            lie()
    taken_s = world.run(1_800, lambda: len(world.chain) >= len(history()))
    assert taken_s < 5 * TIMEOUT_S
    assert len([peer for peer in world.remotes if peer != "peer"]) > 2, "it came under new names"


def test_a_claim_that_is_not_kept_is_told() -> None:
    world = World({"liar": liar()}, chain=chain_of(history()))
    world.run(60)
    assert 2 <= world.unkept["liar"] <= 60 / COOLDOWN_S + 1


def test_a_lead_whose_tip_is_listed_but_must_wait_has_kept_its_claim() -> None:
    chain = chain_of(history())
    early = mine(chain, chain.tip, time=int(START) + 3_000)
    assert isinstance(chain_of(history()).accept(early, START), Early)
    keep([early])
    chain.accept(early, START + 4_000)
    world = World({"peer": Remote(chain)})
    world.run(60)
    assert len(world.chain) == len(history())
    assert not world.unkept
    assert hot(world, 60) < 2


def test_a_lead_that_reorganizes_during_its_download_has_kept_its_claim() -> None:
    remote = honest(delay=0.2)
    world = World({"peer": remote})
    world.run(60, lambda: len(world.chain) >= 100)
    other = chain_of(history()[:150])
    keep(grow(other, 200, miners=3))
    remote.chain = other
    world.run(120, lambda: world.has_tip_of("peer"))
    assert world.has_tip_of("peer")
    assert sum(world.unkept.values()) == 0


def test_a_peer_that_answers_nothing_but_its_status_is_left() -> None:
    world = World({"liar": answers_nothing_but_status()}, chain=chain_of(history()))
    world.run(200)
    assert world.left == ["liar"]


@pytest.mark.slow
def test_a_lead_that_never_ends_gives_way_to_another() -> None:
    """Its shares are real, and there are always more of them: it has its turns, and so have others."""
    endless = chain_of(history()[:1])
    remote = Remote(endless, delay=0.5)
    remote.claim = lambda: status_of(bytes(31) + b"\x01", 2**40, 2**200)
    peer = honest()

    def locate(ask: Ask) -> Sequence[bytes]:
        keep(grow(endless, LOCATED, miners=2))
        return endless.after_locator(ask.hashes, LOCATED)

    remote.locate = locate
    world = World({"endless": remote}, seed=1)
    world.intake_s = 4.0
    world.run(20)
    world.remotes["peer"] = peer
    world.join("peer")
    world.run(TURN_S + 60, lambda: world.sync.download is not None and world.sync.download.lead == "peer")
    assert world.sync.download is not None
    assert world.sync.download.lead == "peer"


# -- ready -----------------------------------------------------------------------------------------------------


def test_a_node_that_expects_nobody_is_ready_at_once() -> None:
    assert World({}, expects_peers=False).is_ready()


def test_a_node_whose_peers_do_not_answer_goes_on_alone_after_a_while() -> None:
    world = World({})
    assert ALONE_AFTER_S - 0.5 < world.run(60, world.is_ready) < ALONE_AFTER_S + 0.5


def test_a_node_with_peers_that_tell_no_status_goes_on_after_a_while() -> None:
    remote = honest()
    remote.silent = {"status"}
    world = World({"peer": remote})
    assert ALONE_AFTER_S - 0.5 < world.run(60, world.is_ready) < ALONE_AFTER_S + 0.5


def test_a_node_that_syncs_is_not_ready_before_it_has_what_its_peers_claim() -> None:
    world = World({"one": honest(delay=2.0), "two": honest(delay=2.0)})
    world.run(300, world.is_ready)
    assert world.has_tip_of("one")


def test_a_node_whose_only_lead_fails_once_is_not_ready_with_a_part() -> None:
    remote = honest(delay=1.0)
    world = World({"peer": remote})
    world.run(60, lambda: len(world.chain) >= 100)
    remote.silent = {"shares"}
    world.run(TIMEOUT_S + 2)
    assert world.sync.download is None
    assert not world.is_ready()
    remote.silent = set()
    world.run(120, world.is_ready)
    assert world.has_tip_of("peer")


def test_a_node_that_stands_still_for_a_day_with_its_peers_is_ready() -> None:
    world = World({"peer": honest()}, chain=chain_of(history()))
    world.run(STATUS_INTERVAL_S)
    world.sync = Sync(uncle_depth=PARAMS.uncle_depth, expects_peers=True, now=world.now)
    world.now += 86_400
    world.join("peer")
    assert world.run(60, world.is_ready) < STATUS_INTERVAL_S
    assert hot(world, 60) < 0.5


def test_a_node_with_peers_that_have_nothing_is_ready() -> None:
    world = World({"peer": Remote(new_chain())})
    assert world.run(60, world.is_ready) < 1


def test_once_ready_a_node_stays_so() -> None:
    world = synced()
    keep(grow(world.remotes["peer0"].chain, 50))
    world.run(4)
    world.leave("peer1")
    assert world.is_ready()


def test_statistics_say_where_it_stands() -> None:
    world = World({"peer": honest(delay=0.5)})
    assert world.sync.statistics(world.chain).state == "waiting"
    world.run(60, lambda: len(world.chain) >= 100)
    statistics = world.sync.statistics(world.chain)
    assert statistics.state == "syncing"
    assert statistics.taken >= 100
    assert statistics.target_height > statistics.height > 0
    world.run(120, world.is_ready)
    assert world.sync.statistics(world.chain).state == "synced"


# -- any failures ----------------------------------------------------------------------------------------------


@cache
def short() -> Sharechain:
    """For reading."""
    return chain_of(history()[:84])


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    fails=st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.9]), min_size=1, max_size=4),
    delays=st.lists(st.sampled_from([0.01, 0.3, 2.0, 19.0]), min_size=4, max_size=4),
    fits=st.sampled_from([1, 3, 1_000]),
    absences=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 40), st.floats(0.1, 30)), max_size=5),
    begin=st.integers(0, 84),
)
def test_after_any_failures_that_end_a_node_converges(
    seed: int,
    fails: list[float],
    delays: list[float],
    fits: int,
    absences: list[tuple[int, float, float]],
    begin: int,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        world = World({}, chain=chain_of(history()[:begin]), seed=seed)
        for number, (rate, delay) in enumerate(zip(fails, delays, strict=False)):
            name = f"peer{number}"
            remote = world.remotes[name] = Remote(short(), delay=delay)
            remote.fails, remote.fits = rate, fits
            world.join(name)
        for number, after, length in absences:
            name = f"peer{number % len(fails)}"
            world.at(after, lambda name=name: world.leave(name))  # type: ignore[misc]
            world.at(after + length, lambda name=name: world.join(name))  # type: ignore[misc]
        world.run(60)
        for remote in world.remotes.values():
            remote.fails, remote.delay, remote.fits = 0.0, 0.05, 1_000
        world.run(TIMEOUT_S + 1)  # what was under way may fail yet, and its peer be left
        for name in world.remotes:
            world.join(name)
        world.run(60, lambda: world.has_tip_of("peer0"))
        assert world.has_tip_of("peer0")
        assert len(world.chain) == len(short())
        assert world.run(30, world.is_ready) < 30
        assert not world.unkept
        assert not world.blamed
