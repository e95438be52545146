"""What a stored chain says: forgeries are found, the numbers add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.address import encode_address
from p2pool.errors import ConfigError
from p2pool.report import (
    EXPORT_FIELDS,
    VerifyReport,
    explain_payouts,
    export_rows,
    payout_report,
    status_report,
    verify_store,
)
from sharechain.chain import Accepted, Sharechain
from sharechain.coinbase import build_coinbase, coinbase_outputs, fold_coinbase
from sharechain.errors import StoreError
from sharechain.params import Params
from sharechain.payout import decode_outputs
from sharechain.share import Share, share_commitment
from sharechain.store import Store
from tests.builders import (
    BLOCK_BITS,
    FINE,
    GENESIS_BLOCK,
    GENESIS_FACTS,
    PARAMS,
    START_TIME,
    VALUE,
    Step,
    add,
    grow,
    grow_tree,
    mine,
    miner_script,
    new_chain,
)
from tests.sharechain.test_store import FakeDatabase

#: Small classes and windows, so that draws, cuts and dust happen all the time.
TIGHT = FINE.with_overrides(
    {"name": "tight", "payout_classes": [2, 3, 5], "window_max_shares": 8, "window_blocks": 2, "heaviest_share": 1000}
)
FACTS = {GENESIS_BLOCK: GENESIS_FACTS}


def written(chain: Sharechain, store: Store, share: Share) -> None:
    """Accept a share and write it down."""
    store.write(add(chain, share), first_seen_ms=START_TIME * 1000, facts=FACTS, sync=False)


def store_of(shares: list[Share], params: Params = PARAMS, *, margin: int = 500) -> tuple[Sharechain, Store]:
    chain, store = new_chain(params, margin=margin), Store(FakeDatabase(), params)
    for share in shares:
        written(chain, store, share)
    return chain, store


def smuggled(shares: list[Share], params: Params = PARAMS) -> Store:
    """A store that holds shares which no chain has accepted."""
    store = Store(FakeDatabase(), params)
    best = max(shares, key=lambda share: share.data.total_work)
    change = Accepted(added=tuple(shares), old_tip=None, new_tip=best.hash)
    store.write(change, first_seen_ms=1, facts=FACTS, sync=False)
    return store


def verified(params: Params, store: Store) -> VerifyReport:
    *_, report = verify_store(params, store)
    assert isinstance(report, VerifyReport)
    return report


def outputs_in(share: Share, chain: Sharechain) -> list[tuple[bytes, int]]:
    """The outputs that the header commits to: rebuilt, and checked against the merkle root."""
    data = share.data
    entry = chain.entry(share.hash)
    assert entry is not None
    payouts = chain.payouts(
        entry.parent,
        value=share.coinbase_value,
        payout_class=data.payout_class,
        max_bits=data.max_bits,
        block_bits=share.block_bits,
    )
    commitment = share_commitment(chain.params.network_id, data)
    coinbase = build_coinbase(share.coinbase_script, payouts, data.payout_script, share.witness_commitment, commitment)
    assert fold_coinbase(coinbase, share.merkle_branch) == share.merkle_root
    raw = coinbase_outputs(payouts, data.payout_script, share.witness_commitment, commitment)
    return decode_outputs(raw[1:])


STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4), st.booleans()), min_size=1, max_size=14
)


# -- verify --------------------------------------------------------------------------------------------------


def test_a_sound_store_is_verified_whole() -> None:
    shares = grow_tree(new_chain(), [(0, 0, 0, True), (1, 1, 0, True), (0, 2, 1, True)] * 4)
    chain, store = store_of(shares)
    report = verified(PARAMS, store)
    assert chain.tip is not None
    assert (report.shares, report.fully_checked, report.history_only) == (12, 12, 0)
    assert (report.height, report.tip) == (chain.tip.height, chain.tip.hash[::-1].hex())
    status = status_report(PARAMS, store, chain, False, 0)
    assert report.blocks == status["blocks"]


def test_an_empty_store_is_sound() -> None:
    report = verified(PARAMS, Store(FakeDatabase(), PARAMS))
    assert (report.shares, report.height, report.tip) == (0, -1, None)


def named(share: Share) -> str:
    return "s/" + share.hash[::-1].hex()


def test_verify_finds_a_share_that_paid_the_wrong_miners() -> None:
    chain = new_chain()
    shares = grow(chain, 6)
    payouts = chain.payouts(
        chain.tip, value=VALUE, payout_class=12, max_bits=shares[-1].data.max_bits, block_bits=BLOCK_BITS
    )
    thief = mine(chain, chain.tip, payouts=replace(payouts, outputs=b"", count=0, finder_amount=VALUE), miner=8)
    with pytest.raises(StoreError, match="breaks a rule: R10") as found:
        verified(PARAMS, smuggled([*shares, thief]))
    assert found.value.where == named(thief)


@pytest.mark.parametrize(
    ("data", "rule"), [({"total_work": 2**200}, "R5"), ({"height": 6}, "R5"), ({"max_bits": 0x207FFFFE}, "R7")]
)
def test_verify_finds_forged_data_with_real_work_behind_it(data: dict[str, object], rule: str) -> None:
    chain = new_chain()
    shares = grow(chain, 5)
    forged = mine(chain, chain.tip, data=data, miner=8)
    with pytest.raises(StoreError, match=f"breaks a rule: {rule}") as found:
        verified(PARAMS, smuggled([*shares, forged]))
    assert found.value.where == named(forged)


def test_verify_finds_a_missing_uncle_and_a_missing_parent() -> None:
    chain = new_chain()
    shares = grow(chain, 3)
    tip = chain.tip
    assert tip is not None
    uncle = mine(chain, tip.parent, miner=7, salt=1, time=tip.time)
    add(chain, uncle)
    nephew = mine(chain, chain.tip, uncles=chain.uncle_candidates(chain.tip))
    assert nephew.data.uncles == (uncle.hash,)
    assert verified(PARAMS, smuggled([*shares, uncle, nephew])).shares == 5
    with pytest.raises(StoreError, match="cannot be checked: Orphaned") as found:
        verified(PARAMS, smuggled([*shares, nephew]))
    assert found.value.where == named(nephew)
    with pytest.raises(StoreError, match="cannot be checked: Orphaned"):
        verified(PARAMS, smuggled([shares[0], shares[2]]))


def test_verify_finds_a_bitcoin_block_that_is_missing_or_forged() -> None:
    shares = grow(new_chain(), 3)
    change = Accepted(added=tuple(shares), old_tip=None, new_tip=shares[-1].hash)
    for facts, text in (
        ({}, "cannot be checked: Unanchored"),
        ({GENESIS_BLOCK: replace(GENESIS_FACTS, height=99)}, "breaks a rule: R11"),
        ({GENESIS_BLOCK: replace(GENESIS_FACTS, next_bits=0x1D00FFFF)}, "breaks a rule: R11"),
    ):
        store = Store(FakeDatabase(), PARAMS)
        store.write(change, first_seen_ms=1, facts=facts, sync=False)
        with pytest.raises(StoreError, match=text) as found:
            verified(PARAMS, store)
        assert found.value.where == named(shares[0])


def test_verify_finds_a_wrong_tip() -> None:
    shares = grow(new_chain(), 4)
    for tip, text in ((shares[1].hash, "has more work than the tip"), (bytes(32), "not a stored share")):
        store = Store(FakeDatabase(), PARAMS)
        store.write(Accepted(added=tuple(shares), old_tip=None, new_tip=tip), first_seen_ms=1, facts=FACTS, sync=False)
        with pytest.raises(StoreError, match=text):
            verified(PARAMS, store)
    store = Store(FakeDatabase(), PARAMS)
    store.write(Accepted(added=tuple(shares), old_tip=None, new_tip=None), first_seen_ms=1, facts=FACTS, sync=False)
    with pytest.raises(StoreError, match="shares without a tip"):
        verified(PARAMS, store)


def test_verify_finds_a_share_that_the_index_does_not_name() -> None:
    chain, store = store_of(grow(new_chain(), 4))
    assert chain.tip is not None
    top = chain.tip
    database = store._database
    batch = database.write_batch()
    batch.delete(b"h" + top.height.to_bytes(8, "big") + top.hash)
    batch.write()
    with pytest.raises(StoreError, match="names 3 shares, the database holds 4"):
        verified(PARAMS, store)


# -- exports -------------------------------------------------------------------------------------------------


def test_a_row_has_all_documented_fields_in_order_with_their_values() -> None:
    chain = new_chain()
    shares = grow(chain, 4)
    branch, commitment = (bytes([1]) * 32, bytes([2]) * 32), bytes([3]) * 32
    last = mine(chain, chain.tip, miner=3, branch=branch, witness_commitment=commitment, payout_class=47, value=12_345)
    chain, store = store_of([*shares, last])
    rows: list[dict[str, Any]] = list(export_rows(chain, store))
    assert all(tuple(row) == EXPORT_FIELDS for row in rows)
    row = rows[-1]
    assert row["hash"] == last.hash[::-1].hex()
    assert row["parent"] == shares[-1].hash[::-1].hex() == rows[-2]["hash"]
    assert row["address"] == encode_address(miner_script(3), "regtest")
    assert (row["payout_class"], row["coinbase_value"], row["height"]) == (47, 12_345, 4)
    assert (row["block_height"], row["block_bits"], row["first_seen_ms"]) == (101, BLOCK_BITS, START_TIME * 1000)
    assert row["merkle_branch"] == [node.hex() for node in branch]
    assert row["witness_commitment"] == commitment.hex()
    assert row["header"] == last.header.hex()
    assert row["total_work"] == sum(one["work"] for one in rows)
    assert sum(amount for _, amount in row["outputs"]) == 12_345
    assert row["outputs"][-1][0].startswith("6a20")
    assert rows[0]["parent"] == "00" * 32
    assert [one["status"] for one in rows] == ["main"] * 5


def test_statuses_tell_main_uncle_and_stale_apart_and_add_up() -> None:
    chain = new_chain()
    shares = grow(chain, 3)
    tip = chain.tip
    assert tip is not None
    uncle = mine(chain, tip.parent, miner=7, salt=1, time=tip.time)
    add(chain, uncle)
    shares.append(uncle)
    shares.append(mine(chain, chain.tip, uncles=chain.uncle_candidates(chain.tip)))
    add(chain, shares[-1])
    stale = mine(chain, tip, miner=6, salt=2)
    shares.append(stale)
    chain, store = store_of(shares)
    statuses = {row["hash"]: row["status"] for row in export_rows(chain, store)}
    assert statuses[uncle.hash[::-1].hex()] == "uncle"
    assert statuses[stale.hash[::-1].hex()] == "stale"
    assert sorted(statuses.values()) == ["main"] * 4 + ["stale", "uncle"]
    report = status_report(PARAMS, store, chain, True, START_TIME + 100.0)
    assert (report["shares"], report["main"], report["uncles"], report["stale"]) == (6, 4, 1, 1)
    assert (report["network"], report["running"], report["height"]) == ("test", True, 3)
    assert report["tip_age_s"] == round(START_TIME + 100.0 - shares[4].time, 1)
    assert report["miners_in_chain"] == len({share.data.payout_script for share in shares})


def test_status_counts_blocks_and_those_that_bitcoin_accepted() -> None:
    shares = grow(new_chain(), 12)
    chain, store = store_of(shares)
    blocks = [row["hash"] for row in export_rows(chain, store) if row["is_block"]]
    assert len(blocks) >= 2
    store.write_block_outcome(bytes.fromhex(blocks[0])[::-1], "", sync=False)
    store.write_block_outcome(bytes.fromhex(blocks[1])[::-1], "bad-cb-amount", sync=False)
    report = status_report(PARAMS, store, chain, False, START_TIME)
    assert (report["blocks"], report["blocks_accepted"]) == (len(blocks), 1)
    rows = {row["hash"]: row["block_outcome"] for row in export_rows(chain, store)}
    assert (rows[blocks[0]], rows[blocks[1]]) == ("", "bad-cb-amount")


def test_the_status_of_a_new_node_has_no_numbers_and_no_error() -> None:
    report = status_report(PARAMS, Store(FakeDatabase(), PARAMS), new_chain(), False, START_TIME)
    assert (report["height"], report["tip"], report["hash_rate"], report["shares"]) == (-1, None, None, 0)


# -- payouts explained ---------------------------------------------------------------------------------------


def explained(chain: Sharechain, store: Store, **options: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {"address": None, "payout_class": None, "value": None}
    return explain_payouts(chain.params, store, chain, **{**wanted, **options})


@pytest.mark.slow
@given(STEPS, st.sampled_from(TIGHT.payout_classes), st.integers(0, VALUE))
def test_what_is_explained_adds_up_to_the_value_and_is_what_the_next_coinbase_pays(
    steps: list[Step], size: int, value: int
) -> None:
    chain, store = store_of(grow_tree(new_chain(TIGHT), steps), TIGHT)
    report = explained(chain, store, payout_class=size, value=value)
    tip_outputs = outputs_of_next(chain, size, value)
    paid = {miner["payout_script"]: miner["paid"] for miner in report["miners"] if miner["paid"]}
    assert paid == {script.hex(): amount for script, amount in tip_outputs}
    assert sum(paid.values()) + report["finder_amount"] == value
    assert sum(miner["weight"] for miner in report["miners"]) == report["window_work"]
    assert sum(miner["weight_percent"] for miner in report["miners"]) == pytest.approx(100)
    for miner in report["miners"]:
        assert 0 <= miner["chance"] <= 1
        assert miner["shares"] + miner["uncles"] > 0
        assert (miner["paid_by"] == "not drawn") == (miner["paid"] == 0 and miner["paid_by"] != "exact")


def outputs_of_next(chain: Sharechain, size: int, value: int) -> list[tuple[bytes, int]]:
    report = payout_report(chain, value=value, payout_class=size, block_bits=BLOCK_BITS)
    share = mine(chain, chain.tip, miner=500, payout_class=size, value=value, salt=9)
    add(chain, share)
    own = miner_script(500)
    outputs = [(script, amount) for script, amount in outputs_in(share, chain)[:-1] if script != own]
    assert report.value == value
    return outputs


def miner_of(report: Mapping[str, Any], script: bytes) -> dict[str, Any]:
    (found,) = [miner for miner in report["miners"] if miner["payout_script"] == script.hex()]
    assert isinstance(found, dict)
    return found


def test_each_miner_reads_why_it_is_paid_what_it_is_paid() -> None:
    params = TIGHT.with_overrides({"name": "explained", "window_max_shares": 30, "window_blocks": 20})
    chain, store = new_chain(params), Store(FakeDatabase(), params)
    for number in range(20):
        written(chain, store, mine(chain, chain.tip, miner=0 if number % 2 else number, salt=number))
    report = explained(chain, store, payout_class=3)
    large = miner_of(report, miner_script(0))
    assert large["paid_by"] == "exact"
    assert "it is paid exactly" in large["why"]
    assert f"{large['entitlement']:,} sat of the {VALUE:,}" in large["why"]
    kinds = {miner["paid_by"]: miner for miner in report["miners"]}
    assert set(kinds) == {"exact", "drawn", "not drawn"}
    assert f"is drawn and paid {kinds['drawn']['paid']:,} sat" in kinds["drawn"]["why"]
    assert "not drawn; the next share draws anew" in kinds["not drawn"]["why"]
    assert "below the threshold" in kinds["not drawn"]["why"]
    text = encode_address(miner_script(900), "regtest")
    (absent,) = explained(chain, store, address=text)["miners"]
    assert absent["why"].startswith(f"{text} has no share or uncle among the last ")
    (one,) = explained(chain, store, address=large["address"])["miners"]
    assert one["payout_script"] == large["payout_script"]


def test_a_wrong_address_or_class_is_the_operators_mistake() -> None:
    chain, store = store_of(grow(new_chain(), 2))
    with pytest.raises(ConfigError, match="--class: one of"):
        explained(chain, store, payout_class=13)
    with pytest.raises(ConfigError, match="--address: "):
        explained(chain, store, address="1BoatSLRHtKNngkdXEeobR76b53LETtpyT")


def test_payouts_of_an_empty_chain_name_nobody() -> None:
    report = explained(new_chain(), Store(FakeDatabase(), PARAMS))
    assert report["miners"] == []
