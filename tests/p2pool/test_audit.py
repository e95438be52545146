"""Audits: every output of a pool's block is explained and derived, and what differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import trio
from bitcoin.core import CTransaction
from hypothesis import given
from hypothesis import strategies as st

from p2pool.audit import BlockAudit, OutputAudit, explain_block
from p2pool.audit_text import audit_lines
from p2pool.bitcoin_backend import BlockReader
from p2pool.bitcoin_backend.block import check_wanted, find_block, read_block
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import merkle_branch, witness_commitment_of
from p2pool.derivation import HistoryEnds, audit_block, audit_rows, derive
from p2pool.errors import BackendError, ConfigError
from p2pool.report import export_rows, load_chain
from sharechain.chain import Sharechain
from sharechain.coinbase import coinbase_head
from sharechain.hasher import sha256d
from sharechain.params import DUST, Params
from sharechain.payout import Payouts
from sharechain.share import Share, share_commitment
from sharechain.store import Store
from tests.builders import (
    PARAMS,
    START_TIME,
    VALUE,
    Step,
    add,
    forged_under,
    grow,
    grow_tree,
    harder,
    mine,
    miner_script,
    new_chain,
)
from tests.p2pool.network import PARAMS as NODE_PARAMS
from tests.p2pool.network import Rig, is_any_block, is_plain_share, mine_blocks, running, spend, until
from tests.p2pool.test_cli import Call, assert_clear, here
from tests.p2pool.test_report import STEPS, TIGHT, outputs_in, smuggled, store_of, verified, written
from tests.sharechain.test_store import FakeDatabase

__all__ = ["here"]

Outputs = list[tuple[bytes, int]]


def assembled(share: Share, outputs: Sequence[tuple[bytes, int]], transactions: Sequence[bytes] = ()) -> bytes:
    """A block as the network takes it: a share's header, its coinbase with these outputs, and transactions."""
    script = share.coinbase_script
    paid = b"".join(amount.to_bytes(8, "little") + bytes([len(script)]) + script for script, amount in outputs)
    coinbase = coinbase_head(len(script)) + script + b"\xff" * 4 + bytes([len(outputs)]) + paid
    if share.witness_commitment is not None:
        coinbase = coinbase[:4] + b"\x00\x01" + coinbase[4:] + b"\x01\x20" + bytes(32)
    return share.header + bytes([1 + len(transactions)]) + coinbase + bytes(4) + b"".join(transactions)


def audited(
    chain: Sharechain,
    store: Store,
    share: Share,
    *,
    outputs: Sequence[tuple[bytes, int]] | None = None,
    transactions: Sequence[bytes] = (),
) -> BlockAudit:
    """The audit of a share's block, whose coinbase may be given other outputs."""
    paid = outputs_in(share, chain) if outputs is None else outputs
    audit = explain_block(chain.params, store, chain, read_block(assembled(share, paid, transactions)))
    lines = list(audit_lines(audit))
    assert lines
    assert max(map(len, lines)) <= 100
    json.dumps(asdict(audit))
    return audit


#: Two transactions with witnesses, of coins that nobody has: only their hashes matter here.
SPENDS = (spend(bytes([1]) * 32, 0, 1_000), spend(bytes([2]) * 32, 1, 2_000))


def spending(transactions: Sequence[bytes] = SPENDS) -> dict[str, object]:
    """What a share's fields are if its block has these transactions."""
    parsed = [CTransaction.deserialize(raw) for raw in transactions]
    return {
        "branch": merkle_branch([one.GetTxid() for one in parsed]),
        "witness_commitment": witness_commitment_of([one.GetHash() for one in parsed]),
    }


#: A large miner, small ones and few payouts.
DRAWN = TIGHT.with_overrides({"name": "drawn", "window_max_shares": 30, "window_blocks": 20})


def drawn_block(params: Params = DRAWN) -> tuple[Sharechain, Store, Share]:
    """A block that pays exactly, by lot, and some not at all; with uncles in its window and transactions in it."""
    chain, store = new_chain(params), Store(FakeDatabase(), params)
    for number in range(20):
        tip = chain.tip
        miner = 0 if number % 2 else number
        written(chain, store, mine(chain, tip, miner=miner, uncles=chain.uncle_candidates(tip), salt=number))
        if number in (5, 9):
            assert tip is not None
            written(chain, store, mine(chain, tip, miner=1, salt=100 + number))
    block = mine(chain, chain.tip, miner=40, payout_class=3, **spending())  # type: ignore[arg-type]
    written(chain, store, block)
    return chain, store, block


# -- the twin ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(STEPS)
def test_the_audit_recomputes_every_coinbase_of_any_tree(steps: list[Step]) -> None:
    shares = grow_tree(new_chain(TIGHT), steps)
    chain, store = store_of(shares, TIGHT)
    rows = {row["hash"]: row for row in export_rows(chain, store)}
    for share in shares:
        name = share.hash[::-1].hex()
        outputs = outputs_in(share, chain)
        assert audit_block(TIGHT, rows, name, outputs) is None
        assert rows[name]["outputs"] == [[script.hex(), amount] for script, amount in outputs]


@pytest.mark.slow
@given(
    miners=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    value=st.integers(0, 20 * DUST) | st.integers(0, VALUE) | st.sampled_from([0, 1, DUST - 1, DUST, 9_999, 10_000]),
    size=st.sampled_from(TIGHT.payout_classes),
    commitment=st.none() | st.binary(min_size=32, max_size=32),
    finder_bonus=st.sampled_from([[0, 1], [1, 200], [1, 2], [1, 1]]),
)
def test_the_audit_recomputes_coinbases_of_any_value_and_class(
    miners: list[int], value: int, size: int, commitment: bytes | None, finder_bonus: list[int]
) -> None:
    params = TIGHT.with_overrides({"finder_bonus": finder_bonus})
    chain, store = new_chain(params), Store(FakeDatabase(), params)
    for number, miner in enumerate(miners):
        hard = harder(chain.tip.max_bits, 1 + number % 3) if chain.tip is not None else None
        written(chain, store, mine(chain, chain.tip, miner=miner, salt=number, bits=hard))
    last = mine(chain, chain.tip, miner=31, value=value, payout_class=size, witness_commitment=commitment)
    written(chain, store, last)
    rows = {row["hash"]: row for row in export_rows(chain, store)}
    outputs = outputs_in(last, chain)
    assert audit_block(params, rows, last.hash[::-1].hex(), outputs) is None
    assert sum(amount for _, amount in outputs) == value


def test_the_audit_needs_no_more_than_the_window_of_a_pruned_history() -> None:
    chain, store = new_chain(TIGHT, margin=12), Store(FakeDatabase(), TIGHT)
    shares = []
    for number in range(60):
        share = mine(chain, chain.tip, miner=number % 7, uncles=chain.uncle_candidates(chain.tip))
        shares.append(share)
        written(chain, store, share)
        if number % 5 == 4:
            tip = chain.tip
            assert tip is not None
            written(chain, store, mine(chain, tip.parent, miner=9, salt=number, time=tip.time))
    assert chain.base_height > 0
    rows = {row["hash"]: row for row in export_rows(chain, store)}
    assert len(rows) == len(chain)
    for share in shares[-10:]:
        assert audit_block(TIGHT, rows, share.hash[::-1].hex(), outputs_in(share, chain)) is None
    oldest = rows[min(rows, key=lambda name: rows[name]["height"])]
    assert oldest["outputs"] is None, "its window is no longer there"
    again = load_chain(TIGHT, store)
    assert list(export_rows(again, store)) == list(rows.values())
    report = verified(TIGHT, store)
    assert report.shares == len(rows)
    assert 0 < report.history_only < len(rows)


def test_the_audit_says_what_differs() -> None:
    shares = grow(new_chain(), 6)
    chain, store = store_of(shares)
    rows = {row["hash"]: row for row in export_rows(chain, store)}
    name = shares[-1].hash[::-1].hex()
    outputs = outputs_in(shares[-1], chain)
    script, amount = outputs[0]
    for wrong in (
        [(script, amount + 1), *outputs[1:]],
        [(miner_script(77), amount), *outputs[1:]],
        outputs[1:],
        [outputs[1], outputs[0], *outputs[2:]],
        [*outputs[:-1], (miner_script(1), 1), outputs[-1]],
    ):
        found = audit_block(PARAMS, rows, name, wrong)
        assert found is not None
        assert name in found
    for wrong in (outputs[:-1], [], [*outputs[:-1], (outputs[-1][0], 1)]):
        assert "no share commitment" in (audit_block(PARAMS, rows, name, wrong) or "")
    assert [[s.hex(), a] for s, a in outputs[:-1]] == audit_rows(PARAMS, rows, name)


def test_rows_that_end_too_early_are_said_to() -> None:
    shares = grow(new_chain(), 8)
    chain, store = store_of(shares)
    rows = {row["hash"]: row for row in export_rows(chain, store)}
    name = shares[-1].hash[::-1].hex()
    there = {key: row for key, row in rows.items() if row["height"] >= 5}
    with pytest.raises(HistoryEnds) as ended:
        derive(PARAMS, there, name)
    assert ended.value.lacking == (shares[4].hash[::-1].hex(),)
    assert (ended.value.height, ended.value.shares) == (5, 2)
    assert ended.value.work + ended.value.missing == derive(PARAMS, rows, name).window.wanted


# -- a right block -------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(STEPS)
def test_every_block_of_any_tree_is_right_and_each_output_explained(steps: list[Step]) -> None:
    shares = grow_tree(new_chain(TIGHT), steps)
    chain, store = store_of(shares, TIGHT)
    for share in shares:
        audit = audited(chain, store, share)
        assert (audit.verdict, audit.differences) == ("right", ())
        assert [(bytes.fromhex(one.script), one.derived) for one in audit.outputs] == outputs_in(share, chain)
        assert sum(one.derived or 0 for one in audit.outputs) == share.coinbase_value == audit.coinbase_value
        assert all(one.ok and one.why and one.found == one.derived for one in audit.outputs)
        assert all(check.ok for check in audit.checks)
        assert audit.window is not None
        paid = [one for one in audit.outputs if one.role == "window payout"]
        assert sum(one.weight for one in (*paid, *audit.not_paid)) == audit.window["work"]
        assert sum(one.shares for one in (*paid, *audit.not_paid)) == audit.window["shares"]
        assert sum(one.uncles for one in (*paid, *audit.not_paid)) == audit.window["uncles"]


def test_each_output_is_told_how_it_came_about() -> None:
    chain, store, block = drawn_block()
    audit = audited(chain, store, block, transactions=SPENDS)
    assert (audit.verdict, audit.text) == ("right", "every output is as the rules say")
    assert (audit.transactions, audit.share_status, audit.finder_script) == (3, "main", miner_script(40).hex())
    roles = [one.role for one in audit.outputs]
    assert roles[-3:] == ["finder", "witness commitment", "share commitment"]
    by_payment = {one.paid_by: one for one in (*audit.outputs, *audit.not_paid)}
    exact, drawn, not_drawn = by_payment["exact"], by_payment["drawn"], by_payment["not drawn"]
    assert exact.script == miner_script(0).hex()
    assert f"Entitled to {exact.entitlement:,} sat of the window's " in exact.why
    assert "paid exactly" in exact.why
    assert exact.found == exact.entitlement
    assert audit.draw is not None
    assert drawn.found == audit.draw["lot"]
    assert f"drawn, with a chance of {100 * (drawn.chance or 0):.3f} % to get {drawn.found:,} sat" in drawn.why
    assert "not drawn, with a chance of" in not_drawn.why
    assert not_drawn.found is None
    twice = next(one for one in (*audit.outputs, *audit.not_paid) if one.script == miner_script(1).hex())
    assert twice.why.startswith("0 shares and 2 uncles in the window: ")
    finder = audit.outputs[-3]
    assert f"bonus of {audit.draw['bonus']:,} sat, 1/200 of the value" in finder.why
    assert finder.found == audit.draw["finder_amount"]
    text = "\n".join(audit_lines(audit))
    assert f"Not paid: {len(audit.not_paid)} miners of the window" in text
    assert "2 lots" in text or "1 lot " in text


def test_a_finder_whose_part_would_be_dust_adds_it_to_the_first_output() -> None:
    params = TIGHT.with_overrides({"name": "no-bonus", "finder_bonus": [0, 1], "window_max_shares": 30})
    chain, store = new_chain(params), Store(FakeDatabase(), params)
    for number in range(7):
        written(chain, store, mine(chain, chain.tip, miner=number % 3, salt=number))
    block = mine(chain, chain.tip, miner=9, payout_class=5)
    written(chain, store, block)
    audit = audited(chain, store, block)
    assert audit.verdict == "right"
    assert "finder" not in {one.role for one in audit.outputs}
    first = audit.outputs[0]
    assert "would be dust alone and is added to this output" in first.why
    assert first.found is not None
    assert 0 < first.found - first.entitlement < DUST


def test_the_first_share_of_a_chain_pays_its_finder() -> None:
    (first,) = grow(new_chain(), 1)
    chain, store = store_of([first])
    audit = audited(chain, store, first)
    assert (audit.verdict, [one.role for one in audit.outputs]) == ("right", ["finder", "share commitment"])
    assert "nobody worked before it" in audit.outputs[0].why
    assert any("first share of its chain" in line for line in audit_lines(audit))


def test_a_stale_share_is_still_a_block() -> None:
    chain, store = store_of(grow(new_chain(), 6))
    beside = mine(chain, chain.main_entry(3), miner=3, salt=77)
    written(chain, store, beside)
    audit = audited(chain, store, beside)
    assert (audit.verdict, audit.share_status) == ("right", "stale")
    assert any("stale: the sharechain went on without it" in line for line in audit_lines(audit))


# -- a wrong one ---------------------------------------------------------------------------------------------


CHANGED = drawn_block()


def moved(outputs: Outputs) -> Outputs:
    (one, first), (two, second), *rest = outputs
    return [(one, first - 7), (two, second + 7), *rest]


def stolen(outputs: Outputs) -> Outputs:
    (_, first), *rest = outputs
    return [(miner_script(900), first), *rest]


def left_out(outputs: Outputs) -> Outputs:
    (_, lost), (finder, amount), *rest = outputs[-4:]
    return [*outputs[:-4], (finder, amount + lost), *rest]


def added(outputs: Outputs) -> Outputs:
    *payouts, (finder, amount), witness, commitment = outputs
    return [*payouts, (miner_script(900), 5), (finder, amount - 5), witness, commitment]


def swapped(outputs: Outputs) -> Outputs:
    return [outputs[1], outputs[0], *outputs[2:]]


def other_witness(outputs: Outputs) -> Outputs:
    *payouts, (script, _), commitment = outputs
    return [*payouts, (script[:-1] + bytes([script[-1] ^ 1]), 0), commitment]


def other_share(outputs: Outputs) -> Outputs:
    *rest, (script, _) = outputs
    return [*rest, (script[:-1] + bytes([script[-1] ^ 1]), 0)]


@pytest.mark.parametrize(
    ("change", "count", "checks"),
    [
        (moved, 2, []),
        (stolen, 2, []),
        (left_out, 2, []),
        (added, 2, []),
        (swapped, 1, []),
        (other_witness, 1, []),
        (other_share, 1, ["share commitment"]),
    ],
)
def test_a_coinbase_that_was_changed_is_wrong_and_only_the_changed_outputs_are_named(
    change: Callable[[Outputs], Outputs], count: int, checks: list[str]
) -> None:
    chain, store, block = drawn_block()
    right = outputs_in(block, chain)
    changed = change(right)
    audit = audited(chain, store, block, outputs=changed, transactions=SPENDS)
    assert audit.verdict == "wrong"
    bad = [one for one in audit.outputs if not one.ok]
    assert len(bad) == count
    touched = {script for script, _ in set(right) ^ set(changed)} or {right[0][0], right[1][0]}
    assert {bytes.fromhex(one.script) for one in bad} <= touched
    assert all(one.difference in audit.differences for one in bad)
    assert {check.name for check in audit.checks if not check.ok} == {"merkle root", "coinbase", *checks}
    assert "was changed since" in next(check.text for check in audit.checks if check.name == "coinbase")
    text = "\n".join(audit_lines(audit))
    assert text.count("WRONG ") == len(bad) + 2 + len(checks)
    assert "WRONG: not as the rules say" in text


def differences(audit: BlockAudit) -> list[OutputAudit]:
    return [one for one in audit.outputs if not one.ok]


def test_what_differs_is_said_in_numbers() -> None:
    chain, store, block = drawn_block()
    right = outputs_in(block, chain)
    first, second = differences(audited(chain, store, block, outputs=moved(right), transactions=SPENDS))
    assert first.difference == (
        f"output 0, {first.address}: pays {right[0][1] - 7:,} sat, derived are {right[0][1]:,} (-7)"
    )
    assert second.difference.endswith("(+7)")
    extra, lost = differences(audited(chain, store, block, outputs=stolen(right), transactions=SPENDS))
    assert (extra.role, extra.position, extra.derived) == ("unexplained", 0, None)
    assert extra.difference.startswith(f"output 0 pays {right[0][1]:,} sat to {extra.address}, which the rules do not")
    assert (lost.position, lost.found, lost.derived) == (None, None, right[0][1])
    assert lost.difference == f"output 0 is missing: {right[0][1]:,} sat to {lost.address}"
    (elsewhere,) = differences(audited(chain, store, block, outputs=swapped(right), transactions=SPENDS))
    assert "should be output" in elsewhere.difference


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from([miner_script(n) for n in (0, 2, 4, 900)]), st.integers(0, 9)), max_size=8))
def test_any_outputs_at_all_are_compared_and_each_is_named_once(outputs: Outputs) -> None:
    chain, store, block = CHANGED
    audit = audited(chain, store, block, outputs=outputs, transactions=SPENDS)
    assert audit.verdict == "wrong"
    found = [(bytes.fromhex(one.script), one.found) for one in audit.outputs if one.position is not None]
    assert found == outputs
    assert [one.position for one in audit.outputs if one.position is not None] == list(range(len(outputs)))
    derived = sorted((one.derived or 0) for one in audit.outputs if one.derived is not None)
    assert derived == sorted(amount for _, amount in outputs_in(block, chain))


def test_transactions_that_were_changed_are_not_what_the_work_was_done_for() -> None:
    chain, store, block = drawn_block()
    audit = audited(chain, store, block, transactions=SPENDS[:1])
    assert {check.name for check in audit.checks if not check.ok} == {"merkle root", "witness commitment"}
    assert all(one.ok for one in audit.outputs)
    other = SPENDS[0].replace(b"\x01\x01\x51", b"\x01\x01\x52")
    assert other != SPENDS[0]
    audit = audited(chain, store, block, transactions=[other, SPENDS[1]])
    assert [check.name for check in audit.checks if not check.ok] == ["witness commitment"]
    assert audit.verdict == "wrong"


def test_witnesses_without_a_commitment_and_one_without_a_reserved_value_are_wrong() -> None:
    chain, store = store_of(grow(new_chain(), 4))
    bare = mine(chain, chain.tip, branch=spending()["branch"])  # type: ignore[arg-type]
    written(chain, store, bare)
    audit = audited(chain, store, bare, transactions=SPENDS)
    assert [check.text for check in audit.checks if not check.ok] == [
        "there is none, but 2 transactions with witnesses"
    ]
    chain, store, block = drawn_block()
    raw = assembled(block, outputs_in(block, chain), SPENDS)
    stripped = replace(read_block(raw), reserved=None)
    audit = explain_block(chain.params, store, chain, stripped)
    assert [check.name for check in audit.checks if not check.ok] == ["witness commitment"]


def test_a_share_that_was_taken_on_trust_and_pays_otherwise_breaks_r10() -> None:
    chain = new_chain()
    shares = grow(chain, 6)
    mine_all = Payouts(outputs=b"", count=0, finder_amount=VALUE, threshold=0)
    greedy = mine(chain, chain.tip, miner=66, payouts=mine_all)
    store = smuggled([*shares, greedy])
    loaded = load_chain(PARAMS, store)
    outputs = [(miner_script(66), VALUE), (b"\x6a\x20" + commitment_of(greedy), 0)]
    audit = audited(loaded, store, greedy, outputs=outputs)
    assert audit.verdict == "wrong"
    assert [check.name for check in audit.checks if not check.ok] == ["coinbase"]
    assert "the share breaks rule R10" in next(check.text for check in audit.checks if not check.ok)
    finder = next(one for one in audit.outputs if one.role == "finder")
    assert (finder.found, finder.ok) == (VALUE, False)
    assert sum(one.position is None for one in audit.outputs) >= 3, "those who were not paid"


def test_a_record_that_was_changed_under_the_chain_is_noticed_by_the_twin() -> None:
    shares = grow(new_chain(), 6)
    chain, _ = store_of(shares)
    forged = forged_under(shares[-2], payout_script=miner_script(900))
    store = smuggled([*shares[:-2], forged, shares[-1]])
    audit = audited(chain, store, shares[-1])
    assert [check.name for check in audit.checks if not check.ok] == ["twin"]
    assert audit.verdict == "wrong"


def test_where_history_was_begun_on_trust_the_twin_stands_alone() -> None:
    chain, store, block = drawn_block()
    outputs = outputs_in(block, chain)
    loaded = load_chain(DRAWN, store)
    nephew = next(entry for entry in loaded.entries() if entry.uncles)
    nephew.drop_uncles()
    audit = audited(loaded, store, block, outputs=outputs, transactions=SPENDS)
    assert (audit.verdict, audit.differences) == ("right", ())
    assert "only the plain twin" in audit.checks[-1].text
    audit = audited(loaded, store, block, outputs=moved(outputs), transactions=SPENDS)
    assert len(differences(audit)) == 2


def commitment_of(share: Share) -> bytes:
    return share_commitment(PARAMS.network_id, share.data)


# -- what cannot be judged -----------------------------------------------------------------------------------


def test_a_block_of_another_network_or_of_none_is_not_of_this_pool() -> None:
    theirs = grow(other := new_chain(PARAMS.with_overrides({"name": "other"})), 5)
    chain, store = store_of(grow(new_chain(), 5))
    audit = audited(chain, store, theirs[-1], outputs=outputs_in(theirs[-1], other))
    assert audit.verdict == "not of this pool"
    assert "a share commitment and p2pool's tag" in audit.text
    assert "another share network" in audit.text
    plain = audited(chain, store, theirs[-1], outputs=[(miner_script(1), VALUE)])
    assert plain.verdict == "not of this pool"
    assert "does not end with a share commitment" in plain.text
    assert "/p2pool/" in plain.text
    nothing = audited(chain, store, theirs[-1], outputs=[])
    assert nothing.verdict == "not of this pool"
    block = replace(read_block(assembled(theirs[-1], [(miner_script(1), 5)])), coinbase_script=b"")
    audit = explain_block(PARAMS, store, chain, block)
    assert (audit.verdict, audit.block_height, audit.subsidy) == ("not of this pool", None, None)
    assert any("of unknown height" in line for line in audit_lines(audit))


@pytest.mark.slow
def test_a_window_that_reaches_below_history_is_said_to_and_what_is_there_is_judged() -> None:
    chain, store = new_chain(TIGHT, margin=12), Store(FakeDatabase(), TIGHT)
    shares = []
    for number in range(60):
        shares.append(mine(chain, chain.tip, miner=number % 7, salt=number, uncles=chain.uncle_candidates(chain.tip)))
        written(chain, store, shares[-1])
    assert chain.base_height > 8
    base = shares[chain.base_height]
    honest = new_chain(TIGHT)
    for share in shares:
        add(honest, share)
    for share in shares[chain.base_height :]:
        audit = audited(chain, store, share, outputs=outputs_in(share, honest))
        assert audit.verdict in ("right", "not to be judged")
        assert (audit.verdict == "right") == (audit.window is not None)
    assert audit.verdict == "right", "the newest"
    audit = audited(chain, store, base, outputs=outputs_in(base, honest))
    assert (audit.verdict, audit.differences) == ("not to be judged", ())
    assert audit.lacking is not None
    assert audit.lacking["hashes"] == [base.data.parent[::-1].hex()]
    assert audit.lacking["last_height"] == base.data.height - 1
    assert audit.lacking["first_height"] >= base.data.height - TIGHT.window_max_shares
    assert f"those below {base.data.height} are lacking" in audit.text
    assert [one.found for one in audit.outputs] == [amount for _, amount in outputs_in(base, honest)]
    assert all(check.ok for check in audit.checks)
    wrong = audited(chain, store, base, outputs=other_share(outputs_in(base, honest)))
    assert wrong.verdict == "wrong"
    older = audited(chain, store, shares[1], outputs=outputs_in(shares[1], honest))
    assert older.verdict == "not to be judged"
    assert "older than the history that this node keeps" in older.text


# -- reading blocks ------------------------------------------------------------------------------------------


def test_a_block_is_read_as_bytes_and_as_the_text_that_bitcoin_cli_prints() -> None:
    chain, _, share = drawn_block()
    raw = assembled(share, outputs_in(share, chain), SPENDS)
    block = read_block(raw)
    assert block == read_block(raw.hex().encode() + b"\n") == read_block(raw.hex().upper().encode())
    assert (block.hash, block.height, len(block.txids)) == (share.hash, share.block_height, 3)
    assert block.time == share.time >= START_TIME
    for wrong in (raw[:-1], raw + b"\x00", raw[:81], raw[:80] + b"\x00", raw[:80], b"", b"no block", raw[:80] * 2):
        with pytest.raises(ConfigError, match="Bitcoin block"):
            read_block(wrong)
    with pytest.raises(ConfigError, match="a transaction is there twice"):
        read_block(assembled(share, outputs_in(share, chain), [*SPENDS, SPENDS[-1]]))


@pytest.mark.slow
@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_a_block_or_a_clear_error(noise: bytes, at: int) -> None:
    chain, _, share = CHANGED
    raw = assembled(share, outputs_in(share, chain), SPENDS)
    for mixed in (noise, raw[:80] + noise, raw[:at] + noise + raw[at + len(noise) :]):
        try:
            block = read_block(mixed)
        except ConfigError:
            continue
        assert block.hash == sha256d(mixed[:80])


def test_a_file_with_another_block_than_the_one_asked_for_is_refused() -> None:
    chain, _, share = drawn_block()
    block = read_block(assembled(share, outputs_in(share, chain), SPENDS))
    for wanted in (None, block.hash[::-1].hex(), block.hash[::-1].hex().upper(), str(share.block_height)):
        check_wanted(block, wanted)
    for wanted in ("00" * 32, str(share.block_height + 1), "x"):
        with pytest.raises(ConfigError, match="was asked for"):
            check_wanted(block, wanted)


async def test_a_bitcoin_node_is_asked_by_hash_and_by_height(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    reader: BlockReader = backend
    try:
        mine_blocks(backend, 3)
        tip = backend.tip_now()
        assert await reader.block_hash_at(3) == tip.block_hash
        assert [await reader.block_hash_at(height) for height in (-1, 4, 2**31)] == [None, None, None]
        assert (await find_block(reader, "3"))[0].hash == tip.block_hash
        block, on_chain = await find_block(reader, tip.block_hash[::-1].hex().upper())
        assert (block.hash, block.height, on_chain) == (tip.block_hash, 3, True)
        with pytest.raises(BackendError, match="does not reach height 4"):
            await find_block(reader, "4")
        with pytest.raises(BackendError, match="--block FILE"):
            await find_block(reader, "ab" * 32)
        for wanted in ("", "-1", "0x12", "ab", "\N{SUPERSCRIPT TWO}", "9" * 30):
            with pytest.raises(ConfigError, match="a block hash"):
                await find_block(reader, wanted)
    finally:
        backend.close()


# -- the command, on what a node leaves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[bytes]]:
    """A node's data directory, and blocks that it found: their hashes and bytes."""
    path = tmp_path_factory.mktemp("left")

    async def run() -> tuple[list[bytes], list[bytes]]:
        async with running(path) as (node, backend):
            rigs = [Rig(node, number) for number in range(3)]
            for number in range(9):
                rig, before = rigs[number % 3], len(node.chain)
                tip = backend.tip_now().block_hash
                is_block = number % 3 == 2
                rig.submit(rig.find(is_any_block if is_block else is_plain_share))
                await until(lambda before=before: len(node.chain) > before)  # type: ignore[misc]
                if is_block:
                    await until(lambda tip=tip, rig=rig: rig.job().work.template.previous_block_hash != tip)  # type: ignore[misc]
            hashes = [hash_ for height in (1, 2, 3) if (hash_ := backend.block_hash_at_now(height))]
            return hashes, [raw for hash_ in hashes if (raw := backend.block_now(hash_))]

    hashes, raws = trio.run(run)
    assert len(raws) == 3
    return path, hashes, raws


@pytest.mark.slow
def test_the_command_audits_blocks_of_the_node_by_hash_height_and_file(
    here: Call, left: tuple[Path, list[bytes], list[bytes]], tmp_path: Path
) -> None:
    path, hashes, raws = left
    options = ["--network", "regtest", "--data-dir", str(path)]
    file = tmp_path / "block.hex"
    for number, (block_hash, raw) in enumerate(zip(hashes, raws, strict=True)):
        file.write_text(raw.hex() + "\n")
        for source in ([str(number + 1)], [block_hash[::-1].hex()], ["--block", str(file)]):
            done = here("audit", *source, *options, "--json")
            assert (done.returncode, done.stderr) == (0, "")
            report = json.loads(done.stdout)
            assert (report["verdict"], report["block_hash"]) == ("right", block_hash[::-1].hex())
            assert report["network"] == NODE_PARAMS.name
            assert report["on_chain"] == (None if "--block" in source else True)
            assert len(report["outputs"]) >= 3
    done = here("audit", "3", *options)
    assert done.returncode == 0
    assert "every output is as the rules say" in done.stdout
    assert "in Bitcoin's best chain" in done.stdout


@pytest.mark.slow
def test_the_command_says_what_is_wrong_by_its_exit_code(
    here: Call, left: tuple[Path, list[bytes], list[bytes]], tmp_path: Path
) -> None:
    path, hashes, raws = left
    options = ["--network", "regtest", "--data-dir", str(path)]
    file = tmp_path / "block"
    first = read_block(raws[2]).outputs[0]
    at = raws[2].index(first[1].to_bytes(8, "little") + bytes([len(first[0])]) + first[0])
    file.write_bytes(raws[2][:at] + (first[1] + 1).to_bytes(8, "little") + raws[2][at + 8 :])
    done = here("audit", "--block", str(file), *options)
    assert (done.returncode, done.stderr) == (1, "")
    assert "(+1)" in done.stdout
    assert "WRONG: not as the rules say" in done.stdout
    file.write_bytes(b"nonsense")
    assert_clear(here("audit", "--block", str(file), *options), 1, "p2pool: error: ", "no Bitcoin block")
    file.write_bytes(raws[0])
    assert_clear(here("audit", "00" * 32, "--block", str(file), *options), 1, "was asked for, the file holds")
    assert_clear(here("audit", "77", *options), 1, "does not reach height 77")
    assert_clear(here("audit", *options), 2, "BLOCK")
    assert_clear(here("audit", "--block", str(tmp_path / "none"), *options), 2, "--block")
    backend = KernelBackend.open(path / "bitcoin")
    try:
        assert_clear(here("audit", hashes[0][::-1].hex(), *options), 1, "open")
        assert here("audit", "--block", str(file), *options).returncode == 0
    finally:
        backend.close()
