"""The coinbase as python-bitcoinlib reads it, and its size in each payout class."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from bitcoin.core import CTransaction
from hypothesis import given
from hypothesis import strategies as st

from sharechain.coinbase import COINBASE_TAG, build_coinbase, coinbase_head, coinbase_tail, fold_coinbase
from sharechain.hasher import WeightTable, sha256d
from sharechain.params import NETWORKS
from sharechain.payout import Payouts, build_payouts, decode_outputs
from sharechain.share import bip34_push
from tests.builders import miner_script

MAINNET = NETWORKS["mainnet"]
PARENT = bytes(range(32))
WITNESS = bytes([0xAA]) * 32
COMMITMENT = bytes([0xCC]) * 32
SCRIPT = bip34_push(900_000) + COINBASE_TAG + bytes(12)


def payouts_of(miners: int, value: int = 312_500_000, payout_class: int = 12, parent: bytes = PARENT) -> Payouts:
    table = WeightTable()
    for number in range(miners):
        table.add(miner_script(number), 1_000 + number)
    return build_payouts(MAINNET, table, value=value, parent=parent, payout_class=payout_class)


def parsed(raw: bytes) -> Any:
    transaction = CTransaction.deserialize(raw)
    assert transaction.serialize() == raw
    return transaction


@pytest.mark.slow
@given(
    miners=st.integers(0, 30),
    value=st.integers(0, 10**9),
    payout_class=st.sampled_from(MAINNET.payout_classes),
    witness=st.none() | st.just(WITNESS),
    script=st.binary(min_size=2, max_size=100),
)
def test_every_output_stands_where_it_should(
    miners: int, value: int, payout_class: int, witness: bytes | None, script: bytes
) -> None:
    payouts = payouts_of(miners, value, payout_class)
    finder = miner_script(99)
    transaction = parsed(build_coinbase(script, payouts, finder, witness, COMMITMENT))
    assert transaction.nVersion == 2
    assert transaction.nLockTime == 0
    (spent,) = transaction.vin
    assert transaction.is_coinbase()
    assert bytes(spent.scriptSig) == script
    assert spent.nSequence == 0xFFFFFFFF
    expected = decode_outputs(payouts.outputs)
    if payouts.finder_amount or not expected:
        expected.append((finder, payouts.finder_amount))
    if witness is not None:
        expected.append((bytes.fromhex("6a24aa21a9ed") + witness, 0))
    expected.append((b"\x6a\x20" + COMMITMENT, 0))
    assert [(bytes(out.scriptPubKey), out.nValue) for out in transaction.vout] == expected
    assert sum(out.nValue for out in transaction.vout) == value


def test_more_than_252_outputs_are_counted_in_three_bytes() -> None:
    payouts = payouts_of(367, 10**10, 367)
    assert payouts.count == 367
    assert len(parsed(build_coinbase(SCRIPT, payouts, miner_script(0), WITNESS, COMMITMENT)).vout) == 370


@pytest.mark.parametrize("miners", [0, 1, 12, 40, 300])
@pytest.mark.parametrize("witness", [None, WITNESS])
def test_head_script_and_tail_make_the_coinbase(miners: int, witness: bytes | None) -> None:
    payouts = payouts_of(miners, payout_class=367)
    finder = miner_script(3)
    whole = build_coinbase(SCRIPT, payouts, finder, witness, COMMITMENT)
    assert coinbase_head(len(SCRIPT)) + SCRIPT + coinbase_tail(payouts, finder, witness, COMMITMENT) == whole
    assert whole.endswith(b"\x22\x6a\x20" + COMMITMENT + bytes(4))


def test_the_payouts_are_the_same_bytes_for_every_miner_of_a_class() -> None:
    payouts = payouts_of(40)
    tails = [
        coinbase_tail(payouts, miner_script(number), WITNESS, hashlib.sha256(bytes([number])).digest())
        for number in range(5)
    ]
    start = 4 + 1 + len(payouts.outputs)
    assert len({tail[:start] for tail in tails}) == 1
    assert all(len(tail) - start <= 8 + 1 + 34 + 47 + 43 + 4 for tail in tails)


@pytest.mark.parametrize(("payout_class", "most"), [(12, 755), (47, 2_250), (146, 6_500), (367, 16_000)])
def test_a_class_keeps_its_size_with_the_widest_outputs(payout_class: int, most: int) -> None:
    assert payout_class in MAINNET.payout_classes
    widest = b"\x51\x20" + bytes(32)
    payouts = Payouts(
        outputs=(bytes(8) + b"\x22" + widest) * payout_class, count=payout_class, finder_amount=1, threshold=1
    )
    script = bip34_push(2**31 - 1) + COINBASE_TAG + bytes(12)
    assert len(script) == 25
    assert len(build_coinbase(script, payouts, widest, WITNESS, COMMITMENT)) <= most


@pytest.mark.slow
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=16))
def test_folding_is_bitcoins_merkle_root_of_the_first_transaction(branch: list[bytes]) -> None:
    coinbase = build_coinbase(SCRIPT, payouts_of(3), miner_script(0), WITNESS, COMMITMENT)
    root = sha256d(coinbase)
    for node in branch:
        root = sha256d(root + node)
    assert fold_coinbase(coinbase, tuple(branch)) == root


def test_the_txid_does_not_cover_the_witness() -> None:
    coinbase = build_coinbase(SCRIPT, payouts_of(3), miner_script(0), WITNESS, COMMITMENT)
    assert parsed(coinbase).GetTxid() == sha256d(coinbase) == fold_coinbase(coinbase, ())
