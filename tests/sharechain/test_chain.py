"""The chain: any order of arrival, forks, what waits, what is forgotten, and coming back from the disk."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sharechain.chain import Accepted, Buried, Duplicate, Early, Orphaned, Sharechain, Unanchored
from sharechain.entry import ChainEntry
from sharechain.errors import InvalidShare, ParamsError
from sharechain.params import MEDIAN_SPAN
from sharechain.payout import Payouts
from sharechain.share import Share
from sharechain.validate import BlockFacts, next_max_bits
from sharechain.waiting import MAX_WAIT_S
from tests.builders import (
    BLOCK_BITS,
    FINE,
    START_TIME,
    Step,
    add,
    forged_under,
    grow,
    grow_tree,
    harder,
    mine,
    miner_script,
    new_chain,
    snapshot,
)

#: Prunes after some thirty shares.
SMALL = FINE.with_overrides({"name": "small", "window_max_shares": 8})
MARGIN = 12
#: Forks this many shares below the tip are still judged.
FORK_DEPTH = SMALL.window_max_shares + MARGIN - MEDIAN_SPAN - SMALL.uncle_depth
NOW = START_TIME + 10**6

steps = st.lists(
    st.tuples(st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3, 5)), st.integers(0, 6), st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=28,
)


def entry_of(chain: Sharechain, share: Share) -> ChainEntry:
    entry = chain.entry(share.hash)
    assert entry is not None
    return entry


def one_heaviest(shares: Iterable[Share]) -> bool:
    """Whether no two shares tie for the tip (then the first seen would win, which depends on the order)."""
    works = sorted(share.data.total_work for share in shares)
    return len(works) < 2 or works[-1] > works[-2]


def long_tree(seed: int, count: int) -> list[Step]:
    rng = random.Random(seed)
    return [
        (rng.choice((0, 0, 0, 0, 0, 1, 1, 2)), rng.randrange(7), rng.randrange(4), rng.random() < 0.8)
        for _ in range(count)
    ]


# -- order of arrival ------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(steps=steps, order=st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_chain(steps: list[Step], order: random.Random) -> None:
    first = new_chain(FINE)
    shares = grow_tree(first, steps)
    assume(one_heaviest(shares))
    shuffled = list(shares)
    order.shuffle(shuffled)
    second = new_chain(FINE)
    joined: list[Share] = []
    for share in shuffled:
        outcome = second.accept(share, NOW)
        assert isinstance(outcome, Accepted | Orphaned)
        if isinstance(outcome, Accepted):
            assert not outcome.rejected
            joined += outcome.added
    assert sorted(share.hash for share in joined) == sorted(share.hash for share in shares)
    assert snapshot(second) == snapshot(first)
    assert second.statistics().waiting == 0
    assert second.missing_shares() == second.missing_blocks() == ()
    assert len(second) == len(first) == len(shares)


@pytest.mark.slow
@given(steps=steps, order=st.randoms(use_true_random=False))
def test_shares_that_wait_for_bitcoin_or_the_clock_end_in_the_same_chain(
    steps: list[Step], order: random.Random
) -> None:
    first = new_chain(FINE)
    shares = grow_tree(first, steps)
    assume(one_heaviest(shares))
    second = Sharechain(FINE)
    jobs: list[Share | int | None] = [*shares, None, *range(START_TIME, max(s.time for s in shares) + 40, 40)]
    order.shuffle(jobs)
    now = START_TIME - 200
    for job in jobs:
        if job is None:
            ((block, facts),) = first.known_blocks().items()
            second.learn_block(block, facts, now)
        elif isinstance(job, int):
            now = max(now, job)
            second.release(now)
        else:
            second.accept(job, now)
    second.release(NOW)
    assert snapshot(second) == snapshot(first)
    assert second.statistics().waiting == 0


@pytest.mark.slow
@given(steps=steps, order=st.randoms(use_true_random=False))
def test_changes_say_how_the_main_chain_moved(steps: list[Step], order: random.Random) -> None:
    shares = grow_tree(new_chain(FINE), steps)
    order.shuffle(shares)
    chain = new_chain(FINE)
    main: list[bytes] = []
    for share in shares:
        outcome = chain.accept(share, NOW)
        if not isinstance(outcome, Accepted):
            continue
        assert outcome.old_tip == (main[-1] if main else None)
        assert outcome.added[0] == share
        for left in outcome.disconnected:
            assert main.pop() == left
        main += outcome.connected
        assert outcome.new_tip == main[-1]
        assert chain.tip is not None
        assert main == [chain.main_entry(height).hash for height in range(chain.tip.height + 1)]  # type: ignore[union-attr]
        assert chain.tip.total_work == max(entry.total_work for entry in chain.entries())


def test_a_tie_is_won_by_the_first_seen() -> None:
    one, two = new_chain(FINE), new_chain(FINE)
    base = mine(one, None)
    add(one, base)
    add(two, base)
    left = mine(one, one.tip, miner=1)
    right = mine(one, one.tip, miner=2)
    assert left.data.total_work == right.data.total_work
    for chain, order in ((one, (left, right)), (two, (right, left))):
        assert add(chain, order[0]).new_tip == order[0].hash
        change = add(chain, order[1])
        assert (change.old_tip, change.new_tip) == (order[0].hash, order[0].hash)
        assert change.connected == change.disconnected == ()
        assert change.added == (order[1],)


def test_a_reorg_is_reported_from_the_tip_down_and_from_the_fork_up() -> None:
    chain = new_chain(FINE)
    fork, *old = grow(chain, 4)
    side: list[Share] = []
    parent = entry_of(chain, fork)
    for number in range(4):
        share = mine(chain, parent, miner=9, salt=number)
        change = add(chain, share)
        parent = entry_of(chain, share)
        side.append(share)
        if number < 3:
            assert change.connected == change.disconnected == ()
    assert change.disconnected == tuple(share.hash for share in reversed(old))
    assert change.connected == tuple(share.hash for share in side)
    assert chain.main_entry(1) is entry_of(chain, side[0])
    assert not chain.is_main(entry_of(chain, old[0]))


def test_a_heavier_sibling_takes_the_tip() -> None:
    chain = new_chain(FINE)
    grow(chain, 3)
    parent = chain.tip
    light = mine(chain, parent, miner=1)
    heavy = mine(chain, parent, miner=2, bits=harder(light.data.bits, 2))
    add(chain, light)
    change = add(chain, heavy)
    assert (change.disconnected, change.connected) == ((light.hash,), (heavy.hash,))
    # The light one is an uncle from the next share on, so its work is not lost.
    assert chain.uncle_candidates(chain.tip) == (entry_of(chain, light),)
    assert chain.uncle_candidates(parent) == ()


def test_uncles_make_a_chain_heavier() -> None:
    chain = new_chain(FINE)
    grow(chain, 3)
    parent = chain.tip
    assert parent is not None
    left, right = mine(chain, parent, miner=1), mine(chain, parent, miner=2)
    add(chain, left)
    add(chain, right)
    lonely = mine(chain, entry_of(chain, left), miner=3)
    add(chain, lonely)
    assert chain.uncle_candidates(entry_of(chain, left)) == (entry_of(chain, right),)
    naming = mine(chain, entry_of(chain, left), miner=4, uncles=[entry_of(chain, right)])
    change = add(chain, naming)
    assert change.new_tip == naming.hash
    assert naming.data.total_work == lonely.data.total_work + entry_of(chain, right).work


# -- what waits ------------------------------------------------------------------------------------------------


def test_duplicates_are_known_in_the_chain_and_while_they_wait() -> None:
    source = new_chain(FINE)
    first, second = grow(source, 2)
    chain = new_chain(FINE)
    assert isinstance(chain.accept(second, NOW), Orphaned)
    assert chain.accept(second, NOW) == Duplicate()
    add(chain, first)
    assert chain.accept(first, NOW) == Duplicate()
    assert chain.accept(second, NOW) == Duplicate()
    assert len(chain) == 2


def test_a_forged_body_before_or_after_does_not_poison_the_real_share() -> None:
    chain = new_chain(FINE)
    grow(chain, 4)
    real = mine(chain, chain.tip, miner=1)
    forged = forged_under(real, payout_script=miner_script(66))
    assert forged.hash == real.hash
    for _ in range(2):
        with pytest.raises(InvalidShare, match="R10"):
            chain.accept(forged, NOW)
    add(chain, real)
    assert entry_of(chain, real).payout_script == miner_script(1)
    assert chain.accept(forged, NOW) == Duplicate()
    assert entry_of(chain, real).payout_script == miner_script(1)


@pytest.mark.parametrize("forged_first", [True, False])
def test_a_forged_body_that_waits_does_not_poison_the_real_share(forged_first: bool) -> None:
    source = new_chain(FINE)
    grow(source, 3)
    parent = mine(source, source.tip)
    add(source, parent)
    real = mine(source, source.tip, miner=1)
    forged = forged_under(real, payout_script=miner_script(66))
    chain = new_chain(FINE)
    grow(chain, 3)
    for share in (forged, real) if forged_first else (real, forged):
        assert isinstance(chain.accept(share, NOW), Orphaned)
    change = add(chain, parent)
    assert real in change.added
    assert forged not in change.added
    assert [(share, error.rule) for share, error in change.rejected] in ([], [(forged, "R10")])
    assert chain.tip is not None
    assert chain.tip.hash == real.hash
    assert chain.tip.payout_script == miner_script(1)
    assert chain.statistics().waiting == 0


def test_a_forged_parent_or_uncle_does_not_poison_the_real_share() -> None:
    chain = new_chain(FINE)
    grow(chain, 4)
    real = mine(chain, chain.tip, miner=1)
    assert isinstance(chain.accept(forged_under(real, parent=bytes([1]) * 32), NOW), Orphaned)
    assert isinstance(chain.accept(forged_under(real, uncles=(bytes([2]) * 32,)), NOW), Orphaned)
    assert add(chain, real).new_tip == real.hash
    assert set(chain.missing_shares()) == {bytes([1]) * 32, bytes([2]) * 32}


def test_children_of_an_invalid_share_never_join() -> None:
    chain, other = new_chain(FINE), new_chain(FINE.with_overrides({"name": "other"}))
    foreign = grow(other, 3)
    for share in reversed(foreign[1:]):
        assert isinstance(chain.accept(share, NOW), Orphaned)
    with pytest.raises(InvalidShare, match="R10"):
        chain.accept(foreign[0], NOW)
    assert len(chain) == 0
    assert chain.tip is None


def test_the_waiting_pool_is_bounded_and_the_oldest_gives_way() -> None:
    source = new_chain(FINE)
    shares = grow(source, 12)
    chain = new_chain(FINE, max_waiting=5)
    for share in shares[2:]:
        assert isinstance(chain.accept(share, NOW), Orphaned)
    statistics = chain.statistics()
    assert (statistics.waiting, statistics.waiting_dropped) == (5, 5)
    assert len(chain.missing_shares()) == 5
    for share in shares:
        outcome = chain.accept(share, NOW)
        assert isinstance(outcome, Accepted | Duplicate)
    assert snapshot(chain) == snapshot(source)
    assert chain.statistics().waiting == 0


def test_early_shares_that_gave_way_leave_nothing_behind() -> None:
    source = new_chain(FINE)
    base = mine(source, None)
    chain = new_chain(FINE, max_waiting=4)
    add(chain, base)
    for number in range(60):
        share = mine(chain, chain.tip, salt=number, time=START_TIME + 500 + number)
        assert isinstance(chain.accept(share, START_TIME), Early)
        assert chain.statistics().waiting <= 4
    outcome = chain.release(NOW)
    assert isinstance(outcome, Accepted)
    assert len(outcome.added) == 4
    assert chain.release(NOW + 1) is None


def test_forged_bodies_under_one_header_do_not_fill_the_waiting_pool() -> None:
    """Forging costs no work: if each body takes a place, one old header empties every node's pool of orphans."""
    source = new_chain(FINE)
    shares = grow(source, 4)
    chain = new_chain(FINE, max_waiting=40)
    honest = shares[2:]
    for share in honest:
        assert isinstance(chain.accept(share, NOW), Orphaned)
    for number in range(100):
        chain.accept(forged_under(shares[0], parent=(1 + number).to_bytes(32, "little"), height=5), NOW)
    add(chain, shares[0])
    assert add(chain, shares[1]).added == tuple(shares[1:]), "the honest orphans were driven out without any work"


def test_a_share_that_lacks_parent_and_uncle_waits_for_both() -> None:
    source = new_chain(FINE)
    base = grow(source, 3)
    parent = mine(source, source.tip, miner=1)
    uncle = mine(source, source.tip, miner=2)
    add(source, parent)
    add(source, uncle)
    nephew = mine(source, entry_of(source, parent), miner=3, uncles=[entry_of(source, uncle)])
    for first, second in ((parent, uncle), (uncle, parent)):
        chain = new_chain(FINE)
        for share in base:
            add(chain, share)
        outcome = chain.accept(nephew, NOW)
        assert isinstance(outcome, Orphaned)
        assert set(outcome.missing) == {parent.hash, uncle.hash}
        assert add(chain, first).added == (first,)
        assert chain.missing_shares() == (second.hash,)
        assert add(chain, second).added == (second, nephew)


def test_waiting_for_a_share_and_for_a_bitcoin_block_of_the_same_hash() -> None:
    """A share that is a block has one hash for both; what waits for one must not be lost when the other comes."""
    source = new_chain(FINE)
    block_share = mine(source, None)
    add(source, block_share)
    facts = BlockFacts(height=101, next_bits=BLOCK_BITS)
    source.learn_block(block_share.hash, facts, NOW)
    child = mine(source, source.tip, block=block_share.hash)
    for block_first in (True, False):
        chain = new_chain(FINE)
        assert isinstance(chain.accept(child, NOW), Orphaned)
        if block_first:
            assert chain.learn_block(block_share.hash, facts, NOW) is None
            assert add(chain, block_share).added == (block_share, child)
        else:
            assert add(chain, block_share).added == (block_share,)
            outcome = chain.learn_block(block_share.hash, facts, NOW)
            assert isinstance(outcome, Accepted)
            assert outcome.added == (child,)


def test_an_unanchored_share_holds_its_children_back_until_bitcoin_is_known() -> None:
    source = new_chain(FINE)
    block = bytes([3]) * 32
    facts = BlockFacts(height=100, next_bits=BLOCK_BITS)
    source.learn_block(block, facts, NOW)
    first = mine(source, None, block=block)
    add(source, first)
    rest = grow(source, 3)
    chain = new_chain(FINE)
    assert isinstance(chain.accept(first, NOW), Unanchored)
    for share in rest:
        assert isinstance(chain.accept(share, NOW), Orphaned)
    outcome = chain.learn_block(block, facts, NOW)
    assert isinstance(outcome, Accepted)
    assert outcome.added == (first, *rest)


# -- finding a fork --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_locator_reaches_from_the_tip_to_the_base_in_few_steps() -> None:
    chain = new_chain(FINE)
    assert chain.locator() == ()
    shares = grow(chain, 150)
    locator = chain.locator()
    hashes = [share.hash for share in shares]
    places = [hashes.index(each) for each in locator]
    assert places[0] == 149
    assert places[-1] == 0
    assert places == sorted(places, reverse=True)
    assert places[:10] == list(range(149, 139, -1))
    assert len(locator) == len(set(locator)) <= 20
    assert chain.after_locator(locator, 10) == ()
    assert chain.after_locator((hashes[100],), 10) == tuple(hashes[101:111])
    assert chain.after_locator((bytes(32), hashes[100], hashes[120]), 3) == tuple(hashes[101:104])
    assert chain.after_locator((), 3) == chain.after_locator((bytes(32),), 3) == tuple(hashes[:3])


def test_after_a_locator_of_another_branch_come_the_shares_behind_the_fork() -> None:
    one, two = new_chain(FINE), new_chain(FINE)
    common = grow(one, 5)
    for share in common:
        add(two, share)
    grow(one, 3, miners=1)
    for number in range(6):
        add(two, mine(two, two.tip, miner=8, salt=number))
    wanted = two.after_locator(one.locator(), 100)
    assert [entry.hash for entry in map(two.main_entry, range(5, 11)) if entry] == list(wanted)


def test_statistics_count_what_there_is() -> None:
    chain = new_chain(FINE)
    empty = chain.statistics()
    assert (empty.shares, empty.height, empty.total_work, empty.waiting) == (0, -1, 0, 0)
    grow(chain, 3)
    add(chain, mine(chain, chain.main_entry(1), miner=9))
    statistics = chain.statistics()
    assert chain.tip is not None
    assert (statistics.shares, statistics.height) == (4, 2)
    assert (statistics.total_work, statistics.base_height) == (chain.tip.total_work, 0)
    assert len(list(chain.entries())) == 4


# -- pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pruned_chain_is_the_same_chain() -> None:
    """Fresh, long-running and never forgetting nodes agree at every share."""
    whole = new_chain(SMALL, margin=10**6)
    pruned = new_chain(SMALL, margin=MARGIN)
    for share in grow_tree(whole, long_tree(1, 220)):
        add(pruned, share, NOW)
    assert pruned.tip is not None
    assert whole.base_height == 0
    assert pruned.base_height == pruned.tip.height - 2 * SMALL.window_max_shares - MARGIN > 0
    left, right = snapshot(whole), snapshot(pruned)
    assert left[:2] == right[:2]
    assert left[3:7] == right[3:7]
    assert left[2][pruned.base_height :] == right[2]  # type: ignore[index]


@pytest.mark.slow
def test_pruning_keeps_memory_bounded_and_says_what_went() -> None:
    chain = new_chain(SMALL, margin=MARGIN)
    known: set[bytes] = set()
    for number, step in enumerate(long_tree(2, 240)):
        parent = chain.tip
        for _ in range(step[0]):
            if parent is not None and parent.parent is not None:
                parent = parent.parent
        share = mine(chain, parent, miner=step[1], uncles=chain.uncle_candidates(parent), salt=number)
        change = add(chain, share)
        known.add(share.hash)
        for height, share_hash in change.pruned:
            assert height < chain.base_height
            known.remove(share_hash)
            assert share_hash not in chain
        assert known == {entry.hash for entry in chain.entries()}
        assert min(entry.height for entry in chain.entries()) == chain.base_height
        assert len(chain) <= 4 * (2 * SMALL.window_max_shares + MARGIN + 1)


def _alive() -> int:
    gc.collect()
    return sum(1 for each in gc.get_objects() if isinstance(each, ChainEntry))


@pytest.mark.slow
def test_pruned_ancestors_are_free_to_go() -> None:
    before = _alive()
    chain = new_chain(SMALL, margin=MARGIN)
    grow(chain, 300)
    assert _alive() - before <= len(chain) + 2 * SMALL.window_max_shares


@pytest.mark.slow
def test_pruned_uncles_of_uncles_are_free_to_go() -> None:
    """An uncle may itself have named an uncle, and so on: such a line must not reach back for ever."""
    before = _alive()
    chain = new_chain(SMALL, margin=MARGIN)
    grow(chain, 2)
    for _ in range(200):  # at each height a sibling, which names the sibling below
        parent = chain.tip
        uncles = chain.uncle_candidates(parent)
        add(chain, mine(chain, parent, miner=1, uncles=uncles))
        add(chain, mine(chain, parent, miner=2, uncles=uncles))
    assert chain.tip is not None
    assert chain.tip.uncles
    assert _alive() - before <= len(chain) + 4 * SMALL.window_max_shares


@pytest.mark.slow
def test_pruning_forgets_payout_scripts() -> None:
    """Who was last paid years ago takes no memory: a script for each share costs an attacker nothing extra."""
    chain = new_chain(SMALL, margin=MARGIN)
    for number in range(300):
        add(chain, mine(chain, chain.tip, miner=number))
    assert len(chain._scripts) <= 2 * len(chain)


@pytest.mark.slow
def test_forks_are_judged_down_to_a_depth_and_buried_below() -> None:
    whole = new_chain(SMALL, margin=10**6)
    chain = new_chain(SMALL, margin=MARGIN)
    for share in grow(whole, 60):
        add(chain, share)
    assert chain.tip is not None
    tip = chain.tip.height
    for depth in range(1, FORK_DEPTH + 8):
        share = mine(whole, whole.main_entry(tip - depth), miner=9, salt=depth)
        outcome = chain.accept(share, NOW)
        if depth <= FORK_DEPTH:
            assert isinstance(outcome, Accepted), depth
        else:
            assert outcome == Buried(base_height=chain.base_height), depth
            assert share.hash not in chain
    assert isinstance(chain.accept(mine(whole, None, miner=9), NOW), Buried)
    gone = mine(whole, whole.main_entry(chain.base_height - 5), miner=9)
    assert isinstance(chain.accept(gone, NOW), Buried)
    assert chain.statistics().waiting == 0
    assert chain.tip.height == tip


@pytest.mark.slow
def test_a_deep_reorg_within_the_kept_history_gives_the_same_chain() -> None:
    whole = new_chain(SMALL, margin=10**6)
    chain = new_chain(SMALL, margin=MARGIN)
    for share in grow(whole, 60):
        add(chain, share)
    parent = whole.main_entry(59 - FORK_DEPTH)
    for number in range(FORK_DEPTH + 3):
        share = mine(whole, parent, miner=10 + number % 3, salt=number)
        add(whole, share)
        add(chain, share)
        parent = entry_of(whole, share)
    assert chain.tip is not None
    assert chain.tip.hash == parent.hash if parent else False
    assert snapshot(chain)[3:7] == snapshot(whole)[3:7]


@pytest.mark.slow
def test_bitcoin_blocks_that_no_share_builds_on_are_forgotten() -> None:
    chain = new_chain(SMALL, margin=MARGIN)
    for number in range(400):
        block = (1 + number).to_bytes(32, "big")
        chain.learn_block(block, BlockFacts(height=100 + number, next_bits=BLOCK_BITS), NOW)
        add(chain, mine(chain, chain.tip, block=block), NOW)
    assert len(chain.known_blocks()) < 400
    assert all(entry.previous_block_hash in chain.known_blocks() for entry in chain.entries())


# -- coming back -----------------------------------------------------------------------------------------------


def stored(chain: Sharechain, shares: Sequence[Share]) -> list[Share]:
    """What a store would give back: shares that are still in history, by height, then hash."""
    kept = [share for share in shares if share.hash in chain]
    return sorted(kept, key=lambda share: (share.data.height, share.hash))


def restored(chain: Sharechain, shares: Sequence[Share], *, with_tip: bool = True, margin: int = MARGIN) -> Sharechain:
    fresh = Sharechain(chain.params, margin=margin)
    tip = chain.tip.hash if with_tip and chain.tip is not None else None
    fresh.restore(stored(chain, shares), facts=chain.known_blocks(), tip=tip)
    return fresh


def test_restoring_nothing_gives_an_empty_chain() -> None:
    chain = new_chain(FINE)
    chain.restore([], facts={}, tip=None)
    assert chain.tip is None
    assert len(chain) == 0
    add(chain, mine(chain, None))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_restored_chain_goes_on_like_the_one_that_ran_all_along(seed: int) -> None:
    whole = new_chain(SMALL, margin=10**6)
    shares = grow_tree(whole, long_tree(10 + seed, 120))
    chain = new_chain(SMALL, margin=MARGIN)
    followers: list[Sharechain] = []
    for number, share in enumerate(shares):
        change = add(chain, share, NOW)
        for follower in followers:
            copy = add(follower, share, NOW)
            assert sorted(copy.pruned) == sorted(change.pruned)
            assert replace(copy, pruned=change.pruned) == change
        if number % 24 == 5:
            followers.append(restored(chain, shares[: number + 1]))
            assert snapshot(followers[-1]) == snapshot(chain)
            assert followers[-1].statistics().shares == len(chain)
    for follower in followers:
        assert snapshot(follower) == snapshot(chain)
        assert {entry.hash for entry in follower.entries()} == {entry.hash for entry in chain.entries()}


@pytest.mark.slow
@given(steps=steps)
def test_a_restored_chain_is_the_same_even_in_a_tie(steps: list[Step]) -> None:
    chain = new_chain(FINE)
    shares: list[Share] = []
    for number, (back, miner, _, _) in enumerate(steps):
        parent = entry_of(chain, shares[max(0, len(shares) - 1 - back)]) if shares else None
        shares.append(mine(chain, parent, miner=miner, bits=0x1F0FFFFF, salt=number))
        add(chain, shares[-1])
    assert snapshot(restored(chain, shares)) == snapshot(chain)


def test_the_stored_tip_decides_between_equals() -> None:
    chain = new_chain(FINE)
    base = mine(chain, None)
    add(chain, base)
    shares = [base, *(mine(chain, chain.tip, miner=number) for number in range(5))]
    for share in shares[1:]:
        add(chain, share)
    for share in shares[1:]:
        fresh = Sharechain(FINE)
        fresh.restore(stored(chain, shares), facts=chain.known_blocks(), tip=share.hash)
        assert fresh.tip is not None
        assert fresh.tip.hash == share.hash


def test_restoring_what_is_no_chain_is_refused() -> None:
    chain = new_chain(FINE)
    shares = grow(chain, 5)
    facts = chain.known_blocks()
    with pytest.raises(InvalidShare, match="without its parent"):
        Sharechain(FINE).restore([shares[0], *shares[2:]], facts=facts, tip=shares[4].hash)
    with pytest.raises(InvalidShare, match="not among"):
        Sharechain(FINE).restore(shares[:4], facts=facts, tip=shares[4].hash)
    with pytest.raises(InvalidShare, match="more work"):
        Sharechain(FINE).restore(shares, facts=facts, tip=shares[3].hash)


def test_jobs_on_any_recent_share_can_be_made_at_any_time() -> None:
    """The windows are caches: asking for any share's payouts in any order changes nothing."""
    chain = new_chain(FINE)
    grow_tree(chain, long_tree(3, 40))
    before = snapshot(chain)
    asked: dict[tuple[bytes, int], Payouts] = {}
    rng = random.Random(4)
    entries = list(chain.entries())
    for _ in range(3):
        rng.shuffle(entries)
        for entry in entries:
            max_bits = next_max_bits(FINE, entry)
            for value in (10**9, 10**6):
                payouts = chain.payouts(entry, value=value, payout_class=12, max_bits=max_bits, block_bits=BLOCK_BITS)
                assert asked.setdefault((entry.hash, value), payouts) == payouts
    assert snapshot(chain) == before


def test_a_share_of_another_network_never_joins() -> None:
    one, two = new_chain(FINE), new_chain(FINE.with_overrides({"name": "two"}))
    share = mine(two, None)
    with pytest.raises(InvalidShare, match="R10"):
        one.accept(share, NOW)
    with pytest.raises(InvalidShare, match="R10"):
        one.accept(replace(share, coinbase_value=share.coinbase_value - 1), NOW)


def test_what_waits_too_long_is_forgotten() -> None:
    """A parent that nobody has must not hold a place for ever."""
    source = new_chain(FINE)
    shares = grow(source, 3)
    chain = new_chain(FINE)
    assert isinstance(chain.accept(shares[2], NOW), Orphaned)
    chain.release(NOW + MAX_WAIT_S)
    assert chain.statistics().waiting == 1
    chain.release(NOW + MAX_WAIT_S + 1)
    assert chain.statistics().waiting == 0
    assert chain.missing_shares() == ()
    assert chain.statistics().waiting_dropped == 1


def test_a_window_shorter_than_the_rules_look_back_is_refused() -> None:
    with pytest.raises(ParamsError, match="window_max_shares"):
        Sharechain(FINE.with_overrides({"window_max_shares": 5}), margin=8)
