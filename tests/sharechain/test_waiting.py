"""The pool of waiting shares against a plain list that is searched. What the chain makes of it: ``test_chain.py``."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharechain.share import Share, share_id
from sharechain.waiting import MAX_BODIES, MAX_WAIT_S, Early, Orphaned, Unanchored, WaitingShares
from tests.builders import FINE, forged_under, mine, new_chain

Reason = Orphaned | Early | Unanchored

LIMIT = 6
#: Of shares and of Bitcoin blocks: the same, as a share that is a block has one hash for both.
HASHES = tuple(bytes([number]) * 32 for number in range(3))

reasons: st.SearchStrategy[Reason] = st.one_of(
    st.sets(st.sampled_from(HASHES), min_size=1).map(lambda missing: Orphaned(missing=tuple(sorted(missing)))),
    st.sampled_from((0, 300, 900, 1_200)).map(lambda until: Early(until=until)),
    st.sampled_from(HASHES).map(lambda block: Unanchored(block_hash=block)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 11), reasons),
        st.tuples(st.just("add"), st.integers(0, 11), reasons),  # oftener than the others: the limits are to be met
        st.tuples(st.just("take"), st.integers(0, 11), st.none()),
        st.tuples(st.just("share"), st.integers(0, 2), st.none()),
        st.tuples(st.just("block"), st.integers(0, 2), st.none()),
        st.tuples(st.just("time"), st.sampled_from((0, 300, 600)), st.none()),
        st.tuples(st.just("expire"), st.sampled_from((0, 600, 900)), st.none()),
    ),
    min_size=20,
    max_size=40,
)


@cache
def bodies() -> tuple[Share, ...]:
    """Two headers with six bodies each."""
    chain = new_chain(FINE)
    headers = [mine(chain, None, salt=number) for number in range(2)]
    return tuple(
        forged_under(share, payout_script=b"\x00\x14" + bytes([n]) * 20) for share in headers for n in range(8)
    )


class Plain:
    """What ``WaitingShares`` promises, without an index. Mutable fields: ``rows`` and ``dropped``."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, Share, Reason, float]] = []
        self.dropped = 0

    def add(self, share: Share, reason: Reason, since: float) -> None:
        if sum(row[1].hash == share.hash for row in self.rows) == MAX_BODIES:
            self.dropped += 1
            return
        self.rows.append((share_id(share.encoded), share, reason, since))
        if len(self.rows) > LIMIT:
            del self.rows[0]
            self.dropped += 1

    def take(self, identity: bytes) -> None:
        self.rows = [row for row in self.rows if row[0] != identity]

    def expire(self, now: float) -> None:
        kept = [row for row in self.rows if now - row[3] <= MAX_WAIT_S]
        self.dropped += len(self.rows) - len(kept)
        self.rows = kept

    def that_lack(self, *, share: bytes | None = None, block: bytes | None = None, until: float = -1) -> set[bytes]:
        return {
            identity
            for identity, _, reason, _ in self.rows
            if (isinstance(reason, Orphaned) and share in reason.missing)
            or (isinstance(reason, Unanchored) and block == reason.block_hash)
            or (isinstance(reason, Early) and reason.until <= until)
        }


@pytest.mark.slow
@given(steps)
def test_the_pool_does_what_a_plain_list_does(script: list[tuple[str, int, Reason | None]]) -> None:
    pool, plain, now = WaitingShares(LIMIT), Plain(), 0.0
    for verb, number, reason in script:
        came: set[bytes] = set()
        if verb == "add" and reason is not None and bodies()[number] not in pool:
            share = bodies()[number]
            pool.add(share_id(share.encoded), share, reason, now)
            plain.add(share, reason, now)
        elif verb == "take":
            came = {share_id(bodies()[number].encoded)}
        elif verb == "share":
            came = pool.share_came(HASHES[number])
            assert came == plain.that_lack(share=HASHES[number])
        elif verb == "block":
            came = pool.block_came(HASHES[number])
            assert came == plain.that_lack(block=HASHES[number])
        elif verb == "time":
            now += number
            came = set(pool.time_came(now, 1_000))
            assert came >= plain.that_lack(until=now)
        elif verb == "expire":
            now += number
            pool.expire(now)
            plain.expire(now)
        held = {row[0]: row for row in plain.rows}
        for identity in sorted(came):
            taken, row = pool.take(identity), held.get(identity)
            assert (taken is None) == (row is None)
            if taken is not None and row is not None:
                assert (taken.share, taken.since) == (row[1], row[3])
            plain.take(identity)
        assert (len(pool), pool.dropped) == (len(plain.rows), plain.dropped)
        assert [share for share in bodies() if share in pool] == [
            share for share in bodies() if any(row[1] is share for row in plain.rows)
        ]
        assert set(pool.missing_shares()) == {each for each in HASHES if plain.that_lack(share=each)}
        assert set(pool.missing_blocks()) == {each for each in HASHES if plain.that_lack(block=each)}


def test_a_pool_that_replaces_another_keeps_its_limit_and_counts_the_drops_of_both() -> None:
    shares = bodies()
    pool, other = WaitingShares(2), WaitingShares(3)
    for share in shares[:3]:
        pool.add(share_id(share.encoded), share, Orphaned(missing=HASHES[:1]), 0)
    for share in shares[3:7]:
        other.add(share_id(share.encoded), share, Early(until=5), 0)
    assert (pool.dropped, other.dropped) == (1, 1)
    pool.replace(other)
    assert (len(pool), pool.dropped, pool.missing_shares()) == (3, 2, ())
    assert [share for share in shares if share in pool] == list(shares[4:7])
    pool.add(share_id(shares[0].encoded), shares[0], Unanchored(block_hash=HASHES[1]), 0)
    assert (pool.dropped, shares[4] in pool) == (3, False)
    assert set(pool.time_came(math.inf, 1_000)) >= {share_id(share.encoded) for share in shares[5:7]}
