"""Templates: the branch against a whole tree, commitment and subsidy against Bitcoin's own numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import pytest
from bitcoin.core import CBlock, CTransaction
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.template import (
    BlockTemplate,
    HeaderFacts,
    TemplateTransaction,
    assemble_block,
    block_subsidy,
    build_template,
    empty_template,
    merkle_branch,
    merkle_root,
    witness_commitment_of,
)

COINBASE = bytes.fromhex("0200000001" + "00" * 32 + "ffffffff03510100ffffffff01" + "00" * 8 + "015100000000")


def sha256d(data: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def whole_tree(hashes: Sequence[bytes]) -> bytes:
    """The dumb twin: every level of the tree, as Satoshi built it."""
    level = list(hashes)
    while len(level) > 1:
        if len(level) % 2:
            level.append(level[-1])
        level = [sha256d(level[i] + level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def build(transactions: Sequence[TemplateTransaction]) -> BlockTemplate:
    return build_template(
        version=0x20000000,
        previous_block_hash=bytes(32),
        height=1,
        bits=0x207FFFFF,
        min_time=1,
        time=2,
        coinbase_value=50,
        transactions=transactions,
    )


def transaction(seed: int, *, witness: bool) -> TemplateTransaction:
    body = b"\x01" + sha256d(bytes([seed])) + bytes(4) + b"\x00" + b"\xff" * 4 + b"\x01" + bytes(8) + b"\x01\x51"
    plain = b"\x02\0\0\0" + body + bytes(4)
    raw = b"\x02\0\0\0" + b"\x00\x01" + body + b"\x01\x01\x07" + bytes(4) if witness else plain
    weight = 3 * len(plain) + len(raw)
    return TemplateTransaction(raw=raw, txid=sha256d(plain), wtxid=sha256d(raw), fee=seed, weight=weight)


@pytest.mark.parametrize("count", range(1, 41))
def test_the_branch_leads_to_the_root_of_the_whole_tree(count: int) -> None:
    txids = [sha256d(bytes([count, i])) for i in range(count)]
    root = txids[0]
    for sibling in merkle_branch(txids[1:]):
        root = sha256d(root + sibling)
    assert root == merkle_root(txids) == whole_tree(txids)
    assert len(merkle_branch(txids[1:])) == (count - 1).bit_length()


def test_a_tree_needs_a_hash() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merkle_root([])


@pytest.mark.parametrize(
    ("height", "interval", "subsidy"),
    [
        (0, 210_000, 5_000_000_000),
        (209_999, 210_000, 5_000_000_000),
        (210_000, 210_000, 2_500_000_000),
        (840_000, 210_000, 312_500_000),
        (6_930_000 - 1, 210_000, 1),
        (6_930_000, 210_000, 0),
        (149, 150, 5_000_000_000),
        (150, 150, 2_500_000_000),
        (150 * 64, 150, 0),
        (150 * 1_000, 150, 0),
    ],
)
def test_the_subsidy_halves(height: int, interval: int, subsidy: int) -> None:
    assert block_subsidy(height, interval) == subsidy


def test_a_block_without_witnesses_commits_to_none() -> None:
    template = build([transaction(1, witness=False), transaction(2, witness=False)])
    assert template.witness_commitment is None
    block = assemble_block(bytes(80), COINBASE, template)
    assert block == bytes(80) + b"\x03" + COINBASE + template.transactions[0].raw + template.transactions[1].raw


def test_where_blocks_must_always_commit_an_empty_one_does() -> None:
    facts = HeaderFacts(block_hash=bytes([1]) * 32, height=149, next_bits=0x207FFFFF, median_time=1_000)
    empty = partial(empty_template, facts, version=4, halving_interval=150, now=2_000.7)
    plain, committed = empty(), empty(commits_always=True)
    assert (plain.height, plain.min_time, plain.time, plain.bits) == (150, 1_001, 2_000, 0x207FFFFF)
    assert plain.coinbase_value == 25 * 100_000_000
    assert plain.witness_commitment is None
    assert committed.witness_commitment == witness_commitment_of([])
    assert empty(now=5.0).time == 1_001


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_an_assembled_block_reads_back_with_its_roots(witnesses: list[bool]) -> None:
    template = build([transaction(i, witness=witness) for i, witness in enumerate(witnesses)])
    block = CBlock.deserialize(assemble_block(bytes(80), COINBASE, template))
    assert [tx.serialize() for tx in block.vtx[1:]] == [tx.raw for tx in template.transactions]
    assert [tx.GetTxid() for tx in block.vtx[1:]] == [tx.txid for tx in template.transactions]
    assert block.vtx[0].GetTxid() == CTransaction.deserialize(COINBASE).GetTxid()
    root = block.vtx[0].GetTxid()
    for sibling in template.merkle_branch:
        root = sha256d(root + sibling)
    assert root == block.calc_merkle_root()
    assert (template.witness_commitment is not None) == any(witnesses)
    if template.witness_commitment is not None:
        (reserved,) = block.vtx[0].wit.vtxinwit[0].scriptWitness.stack
        assert template.witness_commitment == sha256d(block.calc_witness_merkle_root() + reserved)


def test_the_commitment_of_a_block_of_only_a_coinbase() -> None:
    # The commitment in every block that Bitcoin Core mines without transactions.
    expected = "e2f61c3f71d1defd3fa999dfa36953755c690689799962b48bebd836974e8cf9"
    assert witness_commitment_of([]).hex() == expected


@pytest.mark.parametrize("count", [252, 253, 300])
def test_a_block_of_many_transactions_counts_them_as_bitcoin_does(count: int) -> None:
    template = build([transaction(7, witness=False)] * (count - 1))
    block = assemble_block(bytes(80), COINBASE, template)
    assert len(CBlock.deserialize(block).vtx) == count


@pytest.mark.slow
def test_a_block_of_seventy_thousand_transactions_has_a_five_byte_count() -> None:
    template = build([TemplateTransaction(raw=b"", txid=bytes(32), wtxid=bytes(32), fee=0, weight=0)] * 70_000)
    assert assemble_block(bytes(80), COINBASE, template)[80:85] == b"\xfe" + (70_001).to_bytes(4, "little")


def test_assembling_refuses_what_cannot_be_a_block() -> None:
    template = build([])
    with pytest.raises(ValueError, match="80 bytes, got 79"):
        assemble_block(bytes(79), COINBASE, template)
    with pytest.raises(ValueError, match="without a witness"):
        assemble_block(bytes(80), COINBASE[:4] + b"\x00\x01" + COINBASE[4:], template)
