"""What is relayed, what is left alone, and who is to blame: each answer of the judge, with real shares."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pool.p2p import gossip
from p2pool.p2p.gossip import FLOOR_DIVISOR, MAX_AHEAD_S, MAX_DEPTH, MAX_SEEN, GossipJudge, Judgement
from sharechain.chain import Accepted, Outcome, Sharechain
from sharechain.difficulty import bits_to_target
from sharechain.errors import InvalidShare
from sharechain.params import Params
from sharechain.share import Share
from sharechain.validate import next_max_bits
from sharechain.waiting import MAX_BODIES
from tests.builders import FINE, GENESIS_FACTS, PARAMS, add, forged_under, grow, harder, mine, new_chain


class Node:
    """One judge and its chain. Mutable fields: both, ``now``, and ``is_synced``."""

    def __init__(self, params: Params = FINE) -> None:
        self.chain: Sharechain = new_chain(params)
        self.judge = GossipJudge(params)
        self.is_synced = True
        self.now = 0.0

    def accept(self, share: Share) -> Outcome:
        return self.chain.accept(share, self.now)

    def take(self, share: Share | bytes, *, is_author: bool = False, now: float | None = None) -> Judgement:
        raw = share if isinstance(share, bytes) else share.encoded
        self.now = now if now is not None else self.now if isinstance(share, bytes) else max(self.now, share.time)
        return self.judge.take(
            raw,
            is_author=is_author,
            is_synced=self.is_synced,
            chain=self.chain,
            accept=self.accept,
            now=self.now,
        )


def source(count: int, params: Params = FINE) -> tuple[Sharechain, list[Share]]:
    """Another node's chain and its shares."""
    chain = new_chain(params)
    return chain, grow(chain, count)


def test_a_share_that_joins_is_relayed_and_never_twice() -> None:
    node, (_, shares) = Node(), source(3)
    for share in shares:
        judgement = node.take(share)
        assert (judgement.relay, judgement.rule, judgement.missing) == (True, None, ())
        assert judgement.share == share
    assert node.chain.tip is not None
    assert node.chain.tip.hash == shares[-1].hash
    assert node.take(shares[-1]) == Judgement(relay=False, dropped="seen")


def test_an_own_share_that_comes_back_is_no_news() -> None:
    node, (_, shares) = Node(), source(1)
    node.judge.note(shares[0].encoded)
    assert node.take(shares[0]) == Judgement(relay=False, dropped="seen")
    assert len(node.chain) == 0


def test_a_share_that_the_sync_brought_before_is_known() -> None:
    node, (_, shares) = Node(), source(1)
    add(node.chain, shares[0])
    assert node.take(shares[0]) == Judgement(relay=False, dropped="known")


def test_a_share_that_waits_already_is_known() -> None:
    node, (_, shares) = Node(), source(2)
    node.chain.accept(shares[1], shares[1].time)
    assert node.take(shares[1]) == Judgement(relay=False, dropped="known")


def broken(rule: str) -> bytes:
    """A share that breaks one of the rules that its bearer must check."""
    chain, _ = source(1)
    share = mine(chain, chain.tip)
    if rule == "R1":
        return share.encoded[:-1]
    if rule == "R2":
        return mine(chain, chain.tip, bits=harder(share.data.bits, 1, 2)).encoded
    if rule == "R3":
        for nonce in range(1000):
            other = replace(share, header=share.header[:76] + nonce.to_bytes(4, "little"))
            if other.hash_value > bits_to_target(share.data.bits):
                return other.encoded
    return forged_under(share, uncles=(b"\x02" * 32, b"\x01" * 32)).encoded


@pytest.mark.parametrize("rule", ["R1", "R2", "R3", "R4"])
@pytest.mark.parametrize("is_author", [False, True])
@pytest.mark.parametrize("is_synced", [False, True])
def test_who_brings_what_breaks_r1_to_r4_is_to_blame(rule: str, is_author: bool, is_synced: bool) -> None:
    node = Node()
    node.is_synced = is_synced
    grow(node.chain, 1)
    raw = broken(rule)
    judgement = node.take(raw, is_author=is_author)
    assert (judgement.relay, judgement.rule, judgement.guilty) == (False, rule, True)
    assert judgement.detail
    assert node.take(raw) == Judgement(relay=False, dropped="seen")
    assert len(node.chain) == 1


def test_a_share_of_another_network_breaks_r3_or_r2() -> None:
    judgement = Node().take(source(1, PARAMS)[1][0])
    assert judgement.rule in ("R2", "R3")
    assert judgement.guilty
    assert not judgement.relay


@pytest.mark.parametrize("is_author", [False, True])
def test_a_forged_body_on_a_known_parent_is_its_authors_fault_and_does_not_poison_the_real_one(
    is_author: bool,
) -> None:
    node, (chain, shares) = Node(), source(1)
    share = mine(chain, chain.tip, miner=1)
    node.take(shares[0])
    for number in range(2 * MAX_BODIES):
        forged = forged_under(share, payout_script=b"\x00\x14" + number.to_bytes(20, "big"))
        assert forged.hash == share.hash
        judgement = node.take(forged, is_author=is_author)
        assert (judgement.relay, judgement.rule, judgement.guilty) == (False, "R10", is_author)
    assert node.take(share).relay
    assert share.hash in node.chain


@pytest.mark.parametrize("height", [2, 4])
def test_a_relayer_of_a_share_that_only_the_chain_can_refute_is_never_to_blame(height: int) -> None:
    node, (chain, shares) = Node(), source(3)
    for share in shares:
        node.take(share)
    judgement = node.take(mine(chain, chain.tip, data={"height": height}))
    assert (judgement.relay, judgement.rule, judgement.guilty) == (False, "R5", False)


def test_a_share_whose_parent_is_not_here_is_relayed_and_its_parent_is_wanted() -> None:
    node, (_, shares) = Node(), source(3)
    node.take(shares[0])
    judgement = node.take(shares[2])
    assert (judgement.relay, judgement.missing, judgement.rule) == (True, (shares[1].hash,), None)
    assert node.take(shares[1]).relay
    assert shares[2].hash in node.chain


def test_no_more_than_a_few_bodies_under_one_header_are_relayed_unjudged() -> None:
    node, (_, shares) = Node(), source(3)
    node.take(shares[0])
    forged = [forged_under(shares[2], payout_script=b"\x00\x14" + n.to_bytes(20, "big")) for n in range(MAX_BODIES + 4)]
    judgements = [node.take(share) for share in forged]
    assert [judgement.relay for judgement in judgements] == [True] * MAX_BODIES + [False] * 4
    assert {judgement.dropped for judgement in judgements[MAX_BODIES:]} == {"bodies"}
    assert all(judgement.missing == (shares[1].hash,) for judgement in judgements)
    assert not any(judgement.guilty for judgement in judgements)


def test_the_real_share_is_accepted_and_relayed_after_any_number_of_forged_ones() -> None:
    node, (_, shares) = Node(), source(3)
    node.take(shares[0])
    for number in range(2 * MAX_BODIES):
        node.take(forged_under(shares[2], payout_script=b"\x00\x14" + number.to_bytes(20, "big")))
    assert node.take(shares[2]).dropped == "bodies"
    assert node.take(shares[1]).relay
    assert shares[2].hash not in node.chain
    judgement = node.take(shares[2])  # of another bearer
    assert (judgement.relay, judgement.dropped) == (True, None)
    assert shares[2].hash in node.chain


def test_the_real_share_joins_by_itself_if_it_was_among_the_first_bodies() -> None:
    node, (_, shares) = Node(), source(3)
    node.take(shares[0])
    node.take(forged_under(shares[2], payout_class=FINE.payout_classes[-1]))
    assert node.take(shares[2]).relay
    node.take(shares[1])
    entry = node.chain.entry(shares[2].hash)
    assert entry is not None
    assert entry.payout_script == shares[2].data.payout_script


def test_a_share_ahead_of_the_clock_is_relayed_and_one_far_ahead_is_its_authors_fault() -> None:
    node, (chain, shares) = Node(), source(1)
    node.take(shares[0])
    start = shares[0].time
    soon = mine(chain, chain.tip, time=start + FINE.future_limit_s + 100)
    far = mine(chain, chain.tip, time=start + MAX_AHEAD_S + 1)
    far_too = mine(chain, chain.tip, time=start + MAX_AHEAD_S + 2)
    assert node.take(soon, now=start) == Judgement(relay=True, share=soon)
    for share, is_author in ((far, False), (far_too, True)):
        judgement = node.take(share, is_author=is_author, now=start)
        assert (judgement.relay, judgement.rule, judgement.guilty) == (False, "future", is_author)


def test_a_share_on_an_unknown_bitcoin_block_is_relayed() -> None:
    node, (chain, shares) = Node(), source(1)
    node.take(shares[0])
    chain.learn_block(b"\x07" * 32, GENESIS_FACTS, shares[0].time)
    share = mine(chain, chain.tip, block=b"\x07" * 32)
    assert node.take(share) == Judgement(relay=True, share=share)


def test_a_synced_node_leaves_cheap_shares_alone_and_one_that_syncs_does_not() -> None:
    fast = FINE.with_overrides({"name": "fast", "half_life_s": 10})
    chain = new_chain(fast)
    for _ in range(10):  # much too fast: the chain asks for more and more
        parent = chain.tip
        add(chain, mine(chain, parent, time=None if parent is None else parent.time + 3))
    cheap = mine(chain, chain.main_entry(0), miner=3)
    asked = bits_to_target(next_max_bits(fast, chain.tip))
    assert bits_to_target(cheap.data.bits) > FLOOR_DIVISOR * asked
    now = float(cheap.time)
    judge = GossipJudge(fast)

    def take(share: Share, *, is_synced: bool) -> Judgement:
        return judge.take(
            share.encoded,
            is_author=False,
            is_synced=is_synced,
            chain=chain,
            accept=lambda share: chain.accept(share, now + 60),
            now=now,
        )

    assert take(cheap, is_synced=True) == Judgement(relay=False, dropped="floor")
    other = mine(chain, chain.main_entry(0), miner=4)
    assert take(other, is_synced=False).relay


def test_after_a_silence_the_floor_falls_with_what_the_chain_asks() -> None:
    fast = FINE.with_overrides({"name": "fast", "half_life_s": 10})
    chain = new_chain(fast)
    for _ in range(10):
        parent = chain.tip
        add(chain, mine(chain, parent, time=None if parent is None else parent.time + 3))
    tip = chain.tip
    assert tip is not None
    late = tip.time + fast.stall_after_s + 30 * fast.stall_doubling_s
    share = mine(chain, tip, time=late, bits=next_max_bits(fast, None))
    judgement = GossipJudge(fast).take(
        share.encoded,
        is_author=False,
        is_synced=True,
        chain=chain,
        accept=lambda share: chain.accept(share, late),
        now=late,
    )
    assert judgement.relay


def test_what_is_far_below_the_tip_is_left_to_the_sync() -> None:
    node = Node(PARAMS)
    shares = grow(node.chain, MAX_DEPTH + 3)
    sides = {height: mine(node.chain, node.chain.entry(shares[height - 1].hash), miner=4, salt=9) for height in (1, 2)}
    node.now = shares[-1].time
    assert node.take(sides[1]) == Judgement(relay=False, dropped="deep")
    assert node.take(sides[2]).relay
    node.is_synced = False
    assert node.take(mine(node.chain, node.chain.entry(shares[0].hash), miner=5, salt=8)).relay


def test_what_forks_off_below_history_is_dropped_without_blame() -> None:
    chain = new_chain(PARAMS, margin=10)
    shares = grow(chain, 60)
    side = new_chain(PARAMS)
    for share in shares[:12]:
        add(side, share)
    buried = mine(side, side.tip, miner=4, salt=7)
    assert chain.base_height > 0
    judgement = GossipJudge(PARAMS).take(
        buried.encoded,
        is_author=True,
        is_synced=True,
        chain=chain,
        accept=lambda share: chain.accept(share, shares[-1].time),
        now=shares[-1].time,
    )
    assert judgement == Judgement(relay=False, dropped="buried")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SEEN >= 1_000
    monkeypatch.setattr(gossip, "MAX_SEEN", 8)
    node, (_, shares) = Node(PARAMS), source(40, PARAMS)
    for share in shares[:0:-1]:
        node.take(share, now=shares[-1].time)
        assert len(node.judge._seen) <= 8
        assert len(node.judge._unjudged) <= 8
    for number in range(40):
        node.judge.note(b"%d" % number)
    assert len(node.judge._seen) == 8
    assert node.take(shares[-1]).dropped == "known"


def test_an_invalid_share_is_not_judged_again() -> None:
    node, (chain, shares) = Node(), source(1)
    node.take(shares[0])
    bad = mine(chain, chain.tip, data={"total_work": 1})
    calls: list[Share] = []

    def accept(share: Share) -> Outcome:
        calls.append(share)
        return node.accept(share)

    for _ in range(3):
        node.judge.take(bad.encoded, is_author=False, is_synced=True, chain=node.chain, accept=accept, now=bad.time)
    assert len(calls) == 1
    with pytest.raises(InvalidShare):
        node.accept(bad)
    assert isinstance(node.accept(mine(chain, chain.tip)), Accepted)
