"""Joining late: a history that begins in the middle, partly on trust, ends as one that was there all along."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain as chain_of

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharechain.chain import BEGIN_ABOVE_BASE, Accepted, Buried, Duplicate, Early, Orphaned, Sharechain, Unanchored
from sharechain.difficulty import bits_to_target, work_of
from sharechain.entry import ChainEntry
from sharechain.errors import InvalidShare
from sharechain.params import MEDIAN_SPAN
from sharechain.share import Share
from sharechain.store import Store
from sharechain.validate import BlockFacts, next_max_bits
from tests.builders import (
    BLOCK_BITS,
    FINE,
    GENESIS_BLOCK,
    GENESIS_FACTS,
    START_TIME,
    VALUE,
    Step,
    add,
    grow,
    grow_tree,
    harder,
    mine,
    miner_script,
    new_chain,
    snapshot,
)
from tests.sharechain.test_store import FakeDatabase

SMALL = FINE.with_overrides({"name": "late", "window_max_shares": 8})
MARGIN = 24
#: Heights of a history that pruning leaves.
WHOLE = 2 * SMALL.window_max_shares + MARGIN
#: Heights above the base from which on all is judged.
CHECKABLE = SMALL.window_max_shares + MEDIAN_SPAN + SMALL.uncle_depth
FOOT = SMALL.uncle_depth + 1
NOW = START_TIME + 10**6

Outcomes = list[tuple[Share, object]]


class Running:
    """A node that ran all along, and every share that it has seen."""

    def __init__(self) -> None:
        self.chain = new_chain(SMALL, margin=MARGIN)
        self.shares: dict[bytes, Share] = {}

    def take(self, shares: Iterable[Share]) -> None:
        self.shares.update((share.hash, share) for share in shares)


def grown(steps: Sequence[Step]) -> Running:
    running = Running()
    running.take(grow_tree(running.chain, steps))
    return running


def tree(seed: int, count: int) -> list[Step]:
    """A tree that forks and names often, and goes back seldom so far that a side branch overtakes."""
    rng = random.Random(seed)
    return [
        (rng.choice((0, 0, 0, 0, 1, 1, 2, 4)), rng.randrange(7), rng.randrange(4), rng.random() < 0.7)
        for _ in range(count)
    ]


def with_siblings(count: int) -> Running:
    """At each height two shares, of which the next names the lighter; and some of these name one another."""
    running = Running()
    chain = running.chain
    for number in range(count):
        parent = chain.tip
        uncles = chain.uncle_candidates(parent)
        heavy = harder(next_max_bits(SMALL, parent), 2)
        pair = [
            mine(chain, parent, miner=number % 5, uncles=uncles, bits=heavy, salt=number),
            mine(chain, parent, miner=5 + number % 3, uncles=uncles if number % 2 else (), salt=number),
        ]
        for share in pair:
            add(chain, share, NOW)
        running.take(pair)
    return running


def agreed(chain: Sharechain) -> tuple[object, ...]:
    """What nodes must agree on, however far back their histories reach."""
    tip, work, _main, weights, units, payouts, uncles, _locator = snapshot(chain)
    return tip, work, weights, units, payouts, uncles


def begins(client: Sharechain, share: Share) -> bool:
    return client.tip is None and share.data.height > 0


def take_in(client: Sharechain, answer: Sequence[bytes], running: Running) -> Iterator[tuple[Share, object]]:
    """Judge what a peer listed, in its order."""
    shares = [running.shares[each] for each in answer]
    if shares and begins(client, shares[0]):
        yield shares[0], client.begin_history(shares[:FOOT], NOW)
        shares = shares[FOOT:]
    for share in shares:
        yield share, client.accept(share, NOW)


def fetch_missing(client: Sharechain, running: Running) -> Iterator[tuple[Share, object]]:
    """Ask for what waiting shares lack, until nothing comes any more."""
    while wanted := [each for each in client.missing_shares() if each in running.chain]:
        for each in wanted:
            yield running.shares[each], client.accept(running.shares[each], NOW)


def sync(client: Sharechain, running: Running, limits: Iterator[int]) -> Outcomes:
    """What a joining node does with one peer."""
    seen: Outcomes = []
    while True:
        answer = running.chain.after_locator(client.locator(), next(limits))
        if all(each in client for each in answer):
            return seen
        seen += take_in(client, answer, running)
        seen += fetch_missing(client, running)


def limits_of(rng: random.Random, least: int, most: int) -> Iterator[int]:
    while True:
        yield rng.randint(least, most)


def joined(running: Running, limit: int = 4_000) -> Sharechain:
    client = new_chain(SMALL, margin=MARGIN)
    for share, outcome in sync(client, running, limits_of(random.Random(0), limit, limit)):
        assert isinstance(outcome, Accepted), (share.data.height, outcome)
    return client


def foot_of(running: Running) -> list[Share]:
    return [running.shares[each] for each in running.chain.after_locator((), FOOT)]


def entry_of(chain: Sharechain, share_hash: bytes) -> ChainEntry:
    entry = chain.entry(share_hash)
    assert entry is not None
    return entry


# -- fresh sync == long running --------------------------------------------------------------------------------


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), count=st.integers(1, 130), more=st.integers(0, 60))
def test_fresh_sync_equals_long_running(seed: int, count: int, more: int) -> None:
    """In answers of any size; then both take the same shares and stay equal."""
    rng = random.Random(seed)
    running = grown(tree(seed, count))
    client = new_chain(SMALL, margin=MARGIN)
    sync(client, running, limits_of(rng, FOOT, 20))
    sync(client, running, limits_of(rng, 500, 500))
    assert client.judges_in_full
    assert agreed(client) == agreed(running.chain)
    tip = running.chain.tip
    for number in range(more):
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            tip = tip if tip is None or tip.parent is None else tip.parent
        uncles = running.chain.uncle_candidates(tip) if rng.random() < 0.7 else ()
        bits = harder(next_max_bits(SMALL, tip), 1_000 + rng.randrange(1_500), 1_000)
        share = mine(running.chain, tip, miner=rng.randrange(7), uncles=uncles, bits=bits, salt=number)
        add(running.chain, share, NOW)
        running.take([share])
        outcome = client.accept(share, NOW)
        if isinstance(outcome, Orphaned):  # it builds on a side branch, which nobody fetches before it is needed
            list(fetch_missing(client, running))
        tip = running.chain.tip
    assert agreed(client) == agreed(running.chain)


@pytest.mark.slow
@pytest.mark.parametrize("with_uncles", [True, False])
def test_fresh_sync_equals_long_running_at_every_length(with_uncles: bool) -> None:
    """Across every boundary: a window, the checkable height, two windows and the margin, and beyond."""
    running = Running()
    chain = running.chain
    sides = with_siblings(WHOLE + 30) if with_uncles else None
    pending = list(sides.shares.values()) if sides else []
    for height in range(WHOLE + 30):
        if sides is not None:
            for share in pending[2 * height : 2 * height + 2]:
                add(chain, share, NOW)
                running.take([share])
        else:
            running.take(grow(chain, 1))
        client = joined(running)
        assert agreed(client) == agreed(chain)
        assert chain.tip is not None
        assert client.base_height == chain.base_height + (
            min(BEGIN_ABOVE_BASE, WHOLE - CHECKABLE - SMALL.window_max_shares) if chain.base_height else 0
        )
        assert client.short_history == (client.base_height > 0)


@pytest.mark.slow
def test_two_nodes_become_equal_in_all_once_both_have_pruned() -> None:
    running = with_siblings(WHOLE + 20)
    client = joined(running)
    assert client.tip is not None
    for height in range(client.tip.height + 1, client.base_height + WHOLE + 1):
        assert client.short_history
        share = mine(running.chain, running.chain.tip, uncles=running.chain.uncle_candidates(running.chain.tip))
        running.take([share])
        add(running.chain, share, NOW)
        change = add(client, share, NOW)
        assert change.short_history == client.short_history == (height < client.base_height + WHOLE)
    assert snapshot(client) == snapshot(running.chain)
    assert client.checkable_height == running.chain.checkable_height
    share = grow(running.chain, 1)[0]
    assert add(client, share, NOW).pruned
    assert snapshot(client) == snapshot(running.chain)


@pytest.mark.slow
def test_a_node_that_joined_serves_one_that_joins_later() -> None:
    running = with_siblings(WHOLE + 40)
    for _ in range(3):
        client = joined(running)
        assert agreed(client) == agreed(running.chain)
        following = Running()
        following.shares = running.shares
        following.chain = client
        running = following


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), count=st.integers(60, 130), stops=st.integers(1, 5))
def test_a_fresh_node_that_stops_anywhere_and_comes_back_ends_equal(seed: int, count: int, stops: int) -> None:
    rng = random.Random(seed)
    running = grown(tree(seed, count))
    database = FakeDatabase()
    store = Store(database, SMALL)
    client = new_chain(SMALL, margin=MARGIN)
    seen = 0
    for stop in range(stops + 1):
        most = rng.randrange(1, 40) if stop < stops else 10**6
        for share, outcome in sync_until(client, running, limits_of(rng, 8, 30)):
            if isinstance(outcome, Accepted):
                store.write(outcome, first_seen_ms=0, facts={GENESIS_BLOCK: GENESIS_FACTS}, sync=False)
            assert not isinstance(outcome, Buried), share.data.height
            seen += 1
            if seen % most == 0:
                break
        before = client
        database.batches = [list(database._now().items())]  # keep the fake quick
        store = Store(database, SMALL)
        assert store.short_history == before.short_history
        client = Sharechain(SMALL, margin=MARGIN)
        shares = [stored.share for stored in store.shares()]
        client.restore(shares, facts=store.facts(), tip=store.tip(), short_history=store.short_history)
        client.learn_block(GENESIS_BLOCK, GENESIS_FACTS, NOW)
        assert snapshot(client) == snapshot(before)
        assert client.proven_work() == before.proven_work()
        assert linked(client) == linked(before)
    sync(client, running, limits_of(rng, 500, 500))
    assert agreed(client) == agreed(running.chain)


def linked(chain: Sharechain) -> list[tuple[bytes, int, list[bytes]]]:
    """The main chain with what each share adds to a window; from the lowest that has all its uncles on."""
    main = [entry for height in range(10**4) if (entry := chain.main_entry(height)) is not None]
    main = main if chain.short_history else main[SMALL.uncle_depth + 1 :]
    return [(entry.hash, entry.unit_work, [uncle.hash for uncle in entry.uncles]) for entry in main]


def sync_until(client: Sharechain, running: Running, limits: Iterator[int]) -> Iterator[tuple[Share, object]]:
    """As ``sync``, one share at a time."""
    while True:
        answer = running.chain.after_locator(client.locator(), next(limits))
        if all(each in client for each in answer):
            return
        yield from take_in(client, answer, running)
        yield from fetch_missing(client, running)


# -- the order in which shares are served ----------------------------------------------------------------------


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), count=st.integers(1, 130))
def test_shares_are_served_in_an_order_in_which_each_is_judged_at_once(seed: int, count: int) -> None:
    rng = random.Random(seed)
    running = grown(tree(seed, count))
    client = new_chain(SMALL, margin=MARGIN)
    for share, outcome in sync(client, running, chain_of([FOOT], limits_of(rng, 12, 60))):
        assert isinstance(outcome, Accepted | Duplicate), (share.data.height, outcome)
        assert isinstance(outcome, Duplicate) or outcome.added[0] == share
    assert client.missing_shares() == client.missing_blocks() == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7])
def test_an_answer_keeps_its_limit_and_ends_with_a_share_of_the_main_chain(limit: int) -> None:
    running = with_siblings(12)
    chain = running.chain
    locator: tuple[bytes, ...] = ()
    heights = []
    for _ in range(40):
        answer = chain.after_locator(locator, limit)
        assert len(answer) <= limit
        assert len(set(answer)) == len(answer)
        mains = [each for each in answer if chain.is_main(entry_of(chain, each))]
        if not mains:
            break
        if limit > 1:
            last = max(entry_of(chain, each).height for each in mains)
            assert chain.is_main(entry_of(chain, answer[-1])) or last == 11
        heights += [entry_of(chain, each).height for each in mains]
        locator = (mains[-1],)
    assert heights == list(range(12))
    assert chain.after_locator((), 0) == ()


def test_uncles_of_uncles_come_first_however_far_back_they_go() -> None:
    """A line of side shares, each naming the one below, that the main chain names at last only."""
    running = Running()
    chain = running.chain
    line: list[Share] = []
    mains: list[Share] = []
    for number in range(9):
        parent = chain.tip
        known = chain.entry(line[-1].hash) if line else None
        share = mine(chain, parent, bits=harder(next_max_bits(SMALL, parent), 3), salt=number)
        side = mine(chain, parent, miner=7, uncles=() if known is None or number < 2 else [known], salt=number)
        for each in (share, side):
            add(chain, each)
            running.take([each])
        line.append(side)
        mains.append(share)
    nephew = mine(chain, chain.tip, uncles=[entry_of(chain, line[-2].hash)])
    add(chain, nephew)
    running.take([nephew])
    tip = chain.tip
    assert tip is not None
    assert tip.parent is not None
    for locator in ((tip.parent.hash,), (tip.parent.hash, line[0].data.parent), (tip.parent.hash, mains[0].hash)):
        assert chain.after_locator(locator, 100) == (*(share.hash for share in line[1:-1]), nephew.hash, line[-1].hash)
    assert chain.after_locator((tip.parent.hash, mains[5].hash), 100) == (
        *(share.hash for share in line[6:-1]),
        nephew.hash,
        line[-1].hash,
    )
    client = new_chain(SMALL, margin=MARGIN)
    for share, outcome in sync(client, running, limits_of(random.Random(0), 100, 100)):
        assert isinstance(outcome, Accepted), share.data.height
    assert agreed(client) == agreed(chain)
    # With no room for the whole line its upper end comes, and the rest is asked for.
    client = new_chain(SMALL, margin=MARGIN)
    sync(client, running, limits_of(random.Random(0), 3, 3))
    assert client.tip is not None
    assert client.tip.hash == tip.hash
    assert client.statistics().waiting == 0


def test_at_the_tip_come_the_shares_that_the_next_one_could_name() -> None:
    running = Running()
    chain = running.chain
    running.take(grow(chain, 10))
    parent = chain.tip
    rivals = [
        mine(chain, parent, miner=number, bits=harder(next_max_bits(SMALL, parent), 9 - number)) for number in range(5)
    ]
    for share in rivals:
        add(chain, share)
    running.take(rivals)
    assert chain.tip is not None
    assert chain.tip.hash == rivals[0].hash
    answer = chain.after_locator(chain.locator(), 100)
    assert answer == tuple(share.hash for share in rivals[1:]), "heaviest first"
    assert chain.after_locator(chain.locator(), 2) == answer[:2]
    client = joined(running)
    assert [uncle.work for uncle in client.uncle_candidates(client.tip)] != []
    running.take(grow(chain, 1))
    client = joined(running)
    assert agreed(client) == agreed(chain)
    naming = mine(chain, chain.tip, uncles=chain.uncle_candidates(chain.tip))
    assert isinstance(client.accept(naming, NOW), Accepted)


def test_a_short_answer_costs_no_walk_over_the_history() -> None:
    running = Running()
    grow(running.chain, 60)
    main = running.chain._main

    class Counting(list[ChainEntry]):
        touched = 0

        def __getitem__(self, key: object) -> object:  # type: ignore[override]
            found = super().__getitem__(key)  # type: ignore[call-overload]
            Counting.touched += len(found) if isinstance(found, list) else 1
            return found

    running.chain._main = Counting(main)
    assert len(running.chain.after_locator((main[5].hash,), 3)) == 3
    assert Counting.touched < 30


# -- beginning -------------------------------------------------------------------------------------------------


def test_history_begins_with_the_whole_foot_or_not_at_all() -> None:
    running = Running()
    running.take(grow(running.chain, WHOLE + 10))
    foot = foot_of(running)
    assert [share.data.height for share in foot] == list(range(foot[0].data.height, foot[0].data.height + FOOT))
    client = new_chain(SMALL, margin=MARGIN)
    for wrong in (foot[:-1], [*foot, foot[-1]], []):
        with pytest.raises(ValueError, match="empty chain with 4 shares"):
            client.begin_history(wrong, NOW)
    for broken in ([*foot[:2], foot[3], foot[2]], [foot[0]] * FOOT, foot[::-1]):
        with pytest.raises(InvalidShare, match="R5"):
            client.begin_history(broken, NOW)
    assert len(client) == 0
    change = client.begin_history(foot, NOW)
    assert isinstance(change, Accepted)
    assert change.added == tuple(foot)
    assert change.connected == tuple(share.hash for share in foot)
    assert (change.old_tip, change.new_tip, change.disconnected) == (None, foot[-1].hash, ())
    assert change.short_history
    assert client.short_history
    assert not client.judges_in_full
    assert client.base_height == foot[0].data.height
    with pytest.raises(ValueError, match="empty chain"):
        client.begin_history(foot, NOW)


def test_a_first_share_begins_no_history_on_trust() -> None:
    shares = grow(new_chain(SMALL), FOOT)
    client = new_chain(SMALL)
    with pytest.raises(InvalidShare, match="R5"):
        client.begin_history(shares, NOW)
    assert len(client) == 0


def test_a_foot_that_is_early_or_on_unknown_blocks_changes_nothing_and_may_come_again() -> None:
    running = Running()
    running.take(grow(running.chain, WHOLE + 10))
    foot = foot_of(running)
    client = Sharechain(SMALL, margin=MARGIN)
    assert client.begin_history(foot, NOW) == Unanchored(block_hash=GENESIS_BLOCK)
    client.learn_block(GENESIS_BLOCK, GENESIS_FACTS, NOW)
    first = foot[0].time - SMALL.future_limit_s
    assert client.begin_history(foot, first - 1) == Early(until=first)
    assert isinstance(client.begin_history(foot, first), Early), "a later one of them is"
    assert (len(client), client.tip, client.base_height, client.short_history) == (0, None, 0, False)
    assert client.missing_shares() == client.missing_blocks() == ()
    assert isinstance(client.begin_history(foot, NOW), Accepted)


def test_what_waited_for_the_foot_joins_with_it() -> None:
    running = Running()
    running.take(grow(running.chain, WHOLE + 10))
    foot = foot_of(running)
    rest = [running.shares[each] for each in running.chain.after_locator((foot[-1].hash,), 5)]
    client = new_chain(SMALL, margin=MARGIN)
    for share in (*rest, *foot):
        assert isinstance(client.accept(share, NOW), Orphaned)
    change = client.begin_history(foot, NOW)
    assert isinstance(change, Accepted)
    assert change.added == (*foot, *rest)
    assert change.connected == tuple(share.hash for share in (*foot, *rest))
    assert change.new_tip == rest[-1].hash
    assert client.statistics().waiting == 0


def test_what_builds_below_the_base_of_a_begun_history_is_buried() -> None:
    running = with_siblings(WHOLE + 20)
    client = joined(running)
    for entry in running.chain.entries():
        if entry.height <= client.base_height and entry.hash not in client:
            assert isinstance(client.accept(running.shares[entry.hash], NOW), Buried)
    assert isinstance(client.accept(mine(new_chain(SMALL), None), NOW), Buried)
    assert client.statistics().waiting == 0


# -- forgeries -------------------------------------------------------------------------------------------------


def begun() -> tuple[Running, Sharechain]:
    """A node that has taken the foot and some more, so that whatever is judged in part can be."""
    running = with_siblings(WHOLE + 20)
    client = new_chain(SMALL, margin=MARGIN)
    answer = running.chain.after_locator((), FOOT + 2 * MEDIAN_SPAN)
    for _share, outcome in take_in(client, answer, running):
        assert isinstance(outcome, Accepted)
    assert client.tip is not None
    assert client.tip.height < client.checkable_height
    assert client.tip.height > client.base_height + MEDIAN_SPAN
    return running, client


FORGERIES = [
    pytest.param({"height": 1}, "R5", id="a height that is wrong"),
    pytest.param({"total_work": 2**200}, "R5", id="total work that was not done"),
    pytest.param({"total_work": 1}, "R5", id="too little total work"),
    pytest.param({"max_bits": 0x1F0FFFFF}, "R7", id="another difficulty"),
]


@pytest.mark.parametrize(("forged", "rule"), FORGERIES)
def test_forged_data_in_a_history_on_trust_is_refused(forged: dict[str, object], rule: str) -> None:
    _running, client = begun()
    before = snapshot(client)
    with pytest.raises(InvalidShare) as caught:
        client.accept(mine(client, client.tip, data=forged), NOW)
    assert caught.value.rule == rule
    assert snapshot(client) == before


def test_a_forged_time_in_a_history_on_trust_is_refused() -> None:
    _running, client = begun()
    assert client.tip is not None
    old = client.main_entry(client.tip.height - MEDIAN_SPAN)
    assert old is not None
    with pytest.raises(InvalidShare, match="R6"):
        client.accept(mine(client, client.tip, time=old.time), NOW)


def test_a_forged_target_in_a_history_on_trust_is_refused() -> None:
    _running, client = begun()
    for _ in range(3):  # quickly, so that the chain asks for more than the network's easiest target
        assert client.tip is not None
        add(client, mine(client, client.tip, time=client.tip.time + 1), NOW)
    asked = next_max_bits(SMALL, client.tip)
    assert client.tip is not None
    assert client.tip.height < client.checkable_height
    with pytest.raises(InvalidShare, match="R8"):
        client.accept(mine(client, client.tip, bits=harder(asked, 1_000, 1_001)), NOW)


def test_a_forged_uncle_in_a_history_on_trust_is_refused() -> None:
    _running, client = begun()
    tip = client.tip
    assert tip is not None
    assert tip.parent is not None
    named = tip.uncles[0]
    for wrong in (named, tip.parent):
        with pytest.raises(InvalidShare, match="R9"):
            client.accept(mine(client, tip, uncles=[wrong]), NOW)
    unknown = mine(client, tip, data={"uncles": (bytes([7]) * 32,), "total_work": 2**200})
    assert client.accept(unknown, NOW) == Orphaned(missing=(bytes([7]) * 32,)), (
        "above the foot, all uncles are waited for"
    )


def test_forged_bitcoin_facts_in_a_history_on_trust_are_refused() -> None:
    _running, client = begun()
    with pytest.raises(InvalidShare, match="R11"):
        client.accept(mine(client, client.tip, block_height=50), NOW)
    with pytest.raises(InvalidShare, match="R11"):
        client.accept(mine(client, client.tip, block_height=150), NOW)
    with pytest.raises(InvalidShare, match="R11"):
        client.accept(mine(client, client.tip, block_bits=0x1F7FFFFF), NOW)


def test_a_wrong_coinbase_is_refused_from_the_checkable_height_on() -> None:
    running = with_siblings(WHOLE + 20)
    client = joined(running)
    foreign = new_chain(SMALL).payouts(None, value=VALUE, payout_class=12, max_bits=BLOCK_BITS, block_bits=BLOCK_BITS)
    for height in range(client.base_height + FOOT, client.checkable_height + 5):
        parent = client.main_entry(height)
        share = mine(client, parent, payouts=foreign, salt=height)
        if height < client.checkable_height:
            assert isinstance(client.accept(share, NOW), Accepted)
            continue
        with pytest.raises(InvalidShare, match="R10"):
            client.accept(share, NOW)
    assert agreed(client) == agreed(running.chain)


@pytest.mark.parametrize(
    ("place", "forged", "rule"),
    [
        (0, {"height": 0}, "R5"),
        (0, {"parent": bytes(32)}, "R5"),
        (0, {"total_work": 5}, "R5"),
        (1, {"height": 5}, "R5"),
        (2, {"total_work": 2**200}, "R5"),
        (3, {"max_bits": 0x1F0FFFFF}, "R7"),
        (1, {"bits": 0x1E00FFFF}, "R3"),
    ],
)
def test_a_forged_foot_is_refused(place: int, forged: dict[str, object], rule: str) -> None:
    running = Running()
    running.take(grow(running.chain, WHOLE + 10))
    foot = foot_of(running)
    old = entry_of(running.chain, foot[place].hash)
    foot[place] = mine(running.chain, old.parent, miner=9, data=forged)
    client = new_chain(SMALL, margin=MARGIN)
    with pytest.raises(InvalidShare) as caught:
        client.begin_history(foot, NOW)
    assert caught.value.rule == rule
    assert len(client) == 0


def test_a_history_begins_with_at_least_the_work_of_its_height() -> None:
    easiest = work_of(SMALL.max_target)
    client = new_chain(SMALL, margin=MARGIN)
    with pytest.raises(InvalidShare, match="R5: total work is at least"):
        client.begin_history(fake_history(FOOT, 5_001 * easiest - 1), NOW)
    assert isinstance(client.begin_history(fake_history(FOOT, 5_001 * easiest), NOW), Accepted)


def test_a_share_beside_the_foot_claims_more_work_than_without_the_uncles_that_it_lacks() -> None:
    _running, client = begun()
    parent = client.main_entry(client.base_height + 1)
    assert parent is not None
    least = parent.total_work + work_of(bits_to_target(next_max_bits(SMALL, parent)))
    with pytest.raises(InvalidShare, match="R5: total work is more than"):
        client.accept(beside_share(client, parent.height + 1, least), NOW)
    assert isinstance(client.accept(beside_share(client, parent.height + 1, least + 1), NOW), Accepted)


def beside_share(client: Sharechain, height: int, work: int) -> Share:
    """A share beside the foot, with an uncle that nobody has and as much total work as it likes to claim."""
    parent = client.main_entry(height - 1)
    return mine(client, parent, miner=8, data={"uncles": (bytes([9]) * 32,), "total_work": work}, salt=height)


@pytest.mark.slow
def test_shares_beside_the_foot_never_decide_whatever_they_claim() -> None:
    """Not at once, not by children, not after any restart until they are pruned."""
    running = with_siblings(WHOLE + 10)
    client = joined(running)
    base, expected = client.base_height, agreed(client)
    forged = [beside_share(client, base + above, 2**250) for above in range(1, FOOT)]
    for share in forged:
        assert add(client, share, NOW).new_tip == expected[0]
    running.take(forged)
    assert agreed(client) == expected
    for share in forged:
        child = mine(client, entry_of(client, share.hash), miner=8)
        assert isinstance(client.accept(child, NOW), Buried)
    above = mine(client, client.main_entry(base + FOOT - 1), data={"uncles": (bytes([9]) * 32,), "total_work": 2**250})
    assert isinstance(client.accept(above, NOW), Orphaned)
    while client.base_height <= base + FOOT:
        share = mine(running.chain, running.chain.tip, uncles=running.chain.uncle_candidates(running.chain.tip))
        running.take([share])
        add(running.chain, share, NOW)
        add(client, share, NOW)
        again = Sharechain(SMALL, margin=MARGIN)
        held = sorted((running.shares[entry.hash] for entry in client.entries()), key=lambda s: (s.data.height, s.hash))
        assert client.tip is not None
        again.restore(held, facts=client.known_blocks(), tip=client.tip.hash, short_history=client.short_history)
        assert snapshot(again) == snapshot(client)
        assert again.proven_work() == client.proven_work()
    assert agreed(client) == agreed(running.chain)


@pytest.mark.slow
def test_a_long_running_node_buries_what_a_fresh_one_judges_in_part() -> None:
    running = with_siblings(WHOLE + 20)
    client = joined(running)
    chain = running.chain
    for height in range(client.base_height + FOOT, chain.checkable_height):
        share = mine(chain, chain.main_entry(height), miner=8, salt=height)
        assert chain.accept(share, NOW) == Buried(base_height=chain.base_height)
        assert isinstance(client.accept(share, NOW), Accepted)
    again = Sharechain(SMALL, margin=MARGIN)
    held = sorted((running.shares[entry.hash] for entry in chain.entries()), key=lambda s: (s.data.height, s.hash))
    again.restore(held, facts=chain.known_blocks(), tip=None)
    share = mine(chain, chain.main_entry(chain.checkable_height - 1), miner=8)
    assert again.accept(share, NOW) == Buried(base_height=chain.base_height)


@pytest.mark.slow
def test_a_fresh_node_buries_like_any_other_once_its_history_is_whole() -> None:
    running = with_siblings(WHOLE + 20)
    client = joined(running)
    while client.short_history:
        (share,) = grow(running.chain, 1)
        running.take([share])
        add(client, share, NOW)
    for height in range(client.base_height, client.checkable_height + 1):
        share = mine(running.chain, client.main_entry(height), miner=8, salt=height)
        expected = Buried if height < client.checkable_height else Accepted
        assert isinstance(client.accept(share, NOW), expected)
        assert isinstance(running.chain.accept(share, NOW), expected)


# -- proven work -----------------------------------------------------------------------------------------------


def fake_history(count: int, claim: int) -> list[Share]:
    """A history from nowhere: real proof of work on a first share that claims what it likes."""
    maker = new_chain(SMALL)
    shares: list[Share] = []
    parent: ChainEntry | None = None
    for _ in range(count):
        data: dict[str, object] = {}
        if parent is None:
            data = {"height": 5_000, "parent": bytes([5]) * 32, "total_work": claim}
        share = mine(maker, parent, miner=6, data=data)
        parent = ChainEntry(share, parent, (), miner_script(6))
        shares.append(share)
    return shares


def test_a_fake_history_with_more_claimed_and_less_done_proves_less() -> None:
    running = Running()
    running.take(grow(running.chain, WHOLE + 10))
    fake = fake_history(20, 2**200)
    client = new_chain(SMALL, margin=MARGIN)
    assert isinstance(client.begin_history(fake[:FOOT], NOW), Accepted)
    for share in fake[FOOT:]:
        add(client, share, NOW)
    assert client.tip is not None
    assert running.chain.tip is not None
    assert client.tip.total_work > running.chain.tip.total_work
    assert client.proven_work() < running.chain.proven_work()
    assert client.proven_work() == sum(entry.work for entry in client.entries())


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), count=st.integers(1, 130))
def test_proven_work_is_the_sum_of_what_the_shares_of_the_main_chain_prove(seed: int, count: int) -> None:
    running = grown(tree(seed, count))
    for chain in (running.chain, joined(running, 500)):
        proven = 0
        entry: ChainEntry | None = chain.tip
        while entry is not None:
            in_foot = chain.base_height and entry.height < chain.base_height + FOOT
            proven += entry.work + (0 if in_foot else sum(uncle.work for uncle in entry.uncles))
            entry = entry.parent
        assert chain.proven_work() == proven
        assert chain.tip is not None
        assert (proven == chain.tip.total_work) == (chain.base_height == 0)


def test_an_empty_chain_proves_nothing() -> None:
    assert new_chain(SMALL).proven_work() == 0


# -- taking another history's place ----------------------------------------------------------------------------


def test_a_chain_becomes_another_in_place_and_goes_on_as_it() -> None:
    fake = fake_history(20, 2**200)
    chain = new_chain(SMALL, margin=MARGIN)
    chain.begin_history(fake[:FOOT], NOW)
    for share in fake[FOOT:]:
        add(chain, share, NOW)
    chain.accept(mine(chain, chain.tip, data={"parent": bytes([8]) * 32}), NOW)
    block = bytes([3]) * 32
    chain.learn_block(block, BlockFacts(height=100, next_bits=GENESIS_FACTS.next_bits), NOW)
    facts = chain.known_blocks()
    running = with_siblings(WHOLE + 10)
    other, twin = joined(running), joined(running)
    chain.replace(other)
    assert chain.proven_work() == twin.proven_work()
    assert chain.short_history
    assert chain.missing_shares() == ()
    assert not any(share.hash in chain for share in fake)
    assert facts is chain.known_blocks()
    assert chain.block_facts(block) is not None, "what was learned of Bitcoin stays"
    for _ in range(30):
        share = mine(running.chain, running.chain.tip, uncles=running.chain.uncle_candidates(running.chain.tip))
        add(running.chain, share)
        assert add(chain, share, NOW) == add(twin, share, NOW)
        assert snapshot(chain) == snapshot(twin)
    assert agreed(chain) == agreed(running.chain)


def test_a_chain_does_not_become_one_of_another_network() -> None:
    chain = new_chain(SMALL, margin=MARGIN)
    for other in (new_chain(FINE, margin=MARGIN), new_chain(SMALL, margin=MARGIN + 1)):
        with pytest.raises(ValueError, match="same network and margin"):
            chain.replace(other)
