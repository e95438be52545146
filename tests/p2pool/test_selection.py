"""Templates of Bitcoin nodes, and the room for our coinbase: against a dumb twin, and judged by Bitcoin's own code."""

from __future__ import annotations

import copy
import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction
from bitcoin.core.script import CScript
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.selection import MAX_AUX_SIZE, coinbase_reserve, read_template, select_transactions
from p2pool.bitcoin_backend.template import (
    BlockTemplate,
    SubmitResult,
    TemplateTransaction,
    assemble_block,
    block_subsidy,
    build_template,
    merkle_branch,
    witness_commitment_of,
)
from p2pool.errors import BackendError
from p2pool.jobs import EXTRANONCE_SIZE
from sharechain.coinbase import COINBASE_TAG, build_coinbase
from sharechain.hasher import WeightTable
from sharechain.params import MAX_MONEY, NETWORKS
from sharechain.payout import build_payouts
from sharechain.share import bip34_push
from tests.p2pool.network import ANYBODY, ANYBODY_SCRIPT, mine_blocks, pay, sha256d, solved_block

MAINNET = NETWORKS["mainnet"]
HEADER_AND_COUNT = 4 * (80 + 1)
PREVIOUS = "00000000000000000001b5d1a6a1b3c7f2f9d3e1a45e6a7c8d9b0e1f2a3b4c5d"


# Bitcoin nodes, by hand.


def transaction_of(
    *,
    sources: Sequence[tuple[bytes, int]],
    values: Sequence[int],
    witness: bool = True,
    script: bytes = ANYBODY_SCRIPT,
    padding: int = 0,
) -> tuple[bytes, bytes]:
    """A transaction that spends outputs of `ANYBODY_SCRIPT`, and the same without its witnesses.

    With padding it has another output that nobody can spend, with a script of so many bytes, above 65,535.
    """
    inputs = b"".join(txid + struct.pack("<I", index) + b"\0\xff\xff\xff\xff" for txid, index in sources)
    outputs = [struct.pack("<q", value) + bytes([len(script)]) + script for value in values]
    if padding:
        outputs.append(bytes(8) + b"\xfe" + struct.pack("<I", padding) + b"\x6a" + bytes(padding - 1))
    body = bytes([len(sources)]) + inputs + bytes([len(outputs)]) + b"".join(outputs)
    plain = b"\x02\0\0\0" + body + bytes(4)
    if not witness:
        return plain, plain
    return b"\x02\0\0\0\0\x01" + body + (b"\x01\x01" + ANYBODY) * len(sources) + bytes(4), plain


def entry_of(raw: bytes, plain: bytes, *, fee: int, depends: Sequence[int] = (), sigops: int = 0) -> dict[str, Any]:
    """A transaction as nodes show it; `depends` counts from 1."""
    return {
        "data": raw.hex(),
        "txid": sha256d(plain)[::-1].hex(),
        "hash": sha256d(raw)[::-1].hex(),
        "depends": list(depends),
        "fee": fee,
        "sigops": sigops,
        "weight": 3 * len(plain) + len(raw),
    }


def entries(*, witness: bool = True) -> list[dict[str, Any]]:
    """Four transactions: a lone one, a parent, its child, which names it twice, and a lone one."""
    made = [
        transaction_of(sources=[(bytes([7]) * 32, 0)], values=[1_000], witness=witness),
        transaction_of(sources=[(bytes([8]) * 32, 1)], values=[2_000, 3_000], witness=False),
    ]
    parent = sha256d(made[1][1])
    made.append(transaction_of(sources=[(parent, 0), (parent, 1)], values=[4_500], witness=witness))
    made.append(transaction_of(sources=[(bytes([9]) * 32, 0)], values=[1_000], witness=False))
    facts = [(900, [], 4), (0, [], 8), (500, [2, 2], 0), (50, [], 1)]
    return [
        entry_of(*raws, fee=fee, depends=depends, sigops=sigops)
        for raws, (fee, depends, sigops) in zip(made, facts, strict=True)
    ]


def wtxids_of(transactions: Sequence[dict[str, Any]]) -> list[bytes]:
    return [bytes.fromhex(entry["hash"])[::-1] for entry in transactions]


def core_template(**changes: object) -> dict[str, Any]:
    """What Bitcoin Core answers on mainnet."""
    transactions = entries()
    made: dict[str, Any] = {
        "capabilities": ["proposal"],
        "version": 536870912,
        "rules": ["csv", "!segwit", "taproot"],
        "vbavailable": {},
        "vbrequired": 0,
        "previousblockhash": PREVIOUS,
        "transactions": transactions,
        "coinbaseaux": {},
        "coinbasevalue": 312_501_450,
        "longpollid": PREVIOUS + "42",
        "target": "00000000000000000002" + "b" * 44,
        "mintime": 1_732_000_001,
        "mutable": ["time", "transactions", "prevblock"],
        "noncerange": "00000000ffffffff",
        "sigoplimit": 80_000,
        "sizelimit": 4_000_000,
        "weightlimit": 4_000_000,
        "curtime": 1_732_000_600,
        "bits": "1702c4e4",
        "height": 871_234,
        "default_witness_commitment": "6a24aa21a9ed" + witness_commitment_of(wtxids_of(transactions)).hex(),
    }
    return made | changes


def btcd_template(**changes: object) -> dict[str, Any]:
    """What btcd answers: no rules, a bare commitment if any, `bits` as short as they are."""
    transactions = entries(witness=False)
    made: dict[str, Any] = {
        "bits": "1d00ffff",
        "curtime": 1_732_000_600,
        "height": 12,
        "previousblockhash": PREVIOUS,
        "sigoplimit": 80_000,
        "sizelimit": 4_000_000,
        "weightlimit": 4_000_000,
        "transactions": transactions,
        "version": 536870912,
        "coinbaseaux": {"flags": "0b2f503253482f627463642f"},
        "coinbasevalue": 5_000_001_450,
        "longpollid": PREVIOUS + "-1732000600",
        "target": "00000000ffff" + "0" * 52,
        "maxtime": 1_732_007_800,
        "mintime": 1_732_000_001,
        "mutable": ["time", "transactions/add", "prevblock", "coinbase/append"],
        "noncerange": "00000000ffffffff",
        "capabilities": ["proposal"],
    }
    return made | changes


def read(
    result: object, *, network: str = "mainnet", reserved_weight: int = 1_000, reserved_sigops: int = 100
) -> BlockTemplate:
    return read_template(result, network=network, reserved_weight=reserved_weight, reserved_sigops=reserved_sigops)


def without(result: dict[str, Any], path: str) -> dict[str, Any]:
    return changed(result, path, None, remove=True)


def changed(result: dict[str, Any], path: str, value: object, *, remove: bool = False) -> dict[str, Any]:
    """A copy with another value at a path like `transactions.2.fee`."""
    made = copy.deepcopy(result)
    *way, last = path.split(".")
    table: Any = made
    for step in way:
        table = table[int(step)] if isinstance(table, list) else table[step]
    if remove:
        del table[last]
    else:
        table[last] = value
    return made


# Reading.


def test_a_template_of_bitcoin_core_is_read() -> None:
    result = core_template()
    late = (1_732_001_000, 0x1D00FFFF)
    template = read_template(result, network="mainnet", reserved_weight=8_000, reserved_sigops=400, late=late)
    assert (template.version, template.height, template.bits) == (0x20000000, 871_234, 0x1702C4E4)
    assert template.previous_block_hash == bytes.fromhex(PREVIOUS)[::-1]
    assert (template.min_time, template.time, template.late) == (1_732_000_001, 1_732_000_600, late)
    assert (template.coinbase_value, template.coinbase_aux) == (312_501_450, b"")
    assert [t.raw.hex() for t in template.transactions] == [e["data"] for e in result["transactions"]]
    assert [t.txid[::-1].hex() for t in template.transactions] == [e["txid"] for e in result["transactions"]]
    assert [t.wtxid[::-1].hex() for t in template.transactions] == [e["hash"] for e in result["transactions"]]
    assert [t.depends for t in template.transactions] == [(), (), (1,), ()]
    assert [(t.fee, t.sigops) for t in template.transactions] == [(900, 4), (0, 8), (500, 0), (50, 1)]
    assert [t.weight for t in template.transactions] == [e["weight"] for e in result["transactions"]]
    assert template.witness_commitment is not None
    assert result["default_witness_commitment"] == "6a24aa21a9ed" + template.witness_commitment.hex()
    assert template.merkle_branch == merkle_branch([t.txid for t in template.transactions])


def test_a_template_of_btcd_is_read() -> None:
    template = read(btcd_template())
    assert (template.bits, template.height) == (0x1D00FFFF, 12)
    assert template.coinbase_aux == b"\x0b/P2SH/btcd/"
    assert template.witness_commitment is None
    assert read(btcd_template(bits="207fffff")).bits == 0x207FFFFF
    assert read(btcd_template(bits="4123456")).bits == 0x04123456
    transactions = entries()
    bare = witness_commitment_of(wtxids_of(transactions))
    template = read(btcd_template(transactions=transactions, default_witness_commitment=bare.hex()))
    assert template.witness_commitment == bare


def test_an_empty_block_with_a_commitment_commits_to_nothing_itself() -> None:
    commitment = "6a24aa21a9ed" + witness_commitment_of([]).hex()
    template = read(core_template(transactions=[], coinbasevalue=312_500_000, default_witness_commitment=commitment))
    assert (template.transactions, template.witness_commitment, template.merkle_branch) == ((), None, ())


@pytest.mark.parametrize(
    ("given", "expected"), [(-1, 0xFFFFFFFF), (-(2**31), 0x80000000), (2**32 - 1, 0xFFFFFFFF), (0x20000004, 0x20000004)]
)
def test_a_version_is_unsigned_whatever_the_node_writes(given: int, expected: int) -> None:
    assert read(core_template(version=given)).version == expected


def test_the_time_is_never_before_the_least_that_is_valid() -> None:
    assert read(core_template(curtime=1_731_999_000)).time == 1_732_000_001


def test_what_is_not_needed_may_be_missing_or_anything() -> None:
    expected = read(core_template())
    for name in ("capabilities", "vbavailable", "vbrequired", "longpollid", "target", "mutable", "noncerange"):
        assert read(without(core_template(), name)) == expected
        assert read(core_template(**{name: 7})) == expected
    for name in ("rules", "coinbaseaux", "sigoplimit", "weightlimit", "sizelimit", "default_witness_commitment"):
        assert read(without(core_template(), name)) == expected


NEEDED = (
    *("version", "previousblockhash", "height", "bits", "mintime", "curtime", "coinbasevalue", "transactions"),
    *(f"transactions.2.{name}" for name in ("data", "txid", "hash", "fee", "weight", "sigops", "depends")),
)


def named(path: str) -> str:
    """How an error names a field, as a regular expression."""
    return "getblocktemplate: " + path.replace(".2.", r"\[2\]\.") + ": "


@pytest.mark.parametrize("path", NEEDED)
def test_a_missing_field_is_named(path: str) -> None:
    with pytest.raises(BackendError, match=named(path) + r".*got nothing"):
        read(without(core_template(), path))


WRONG: tuple[object, ...] = (None, True, 1.5, "x", "12 34", -(2**40), 2**70, [None], {}, {"a": 1}, b"\x01")


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        *itertools.product(NEEDED, WRONG),
        *((path, []) for path in NEEDED if path not in ("transactions", "transactions.2.depends")),
    ],
)
def test_a_field_of_another_type_is_named(path: str, wrong: object) -> None:
    result = changed(core_template(), path, wrong)
    if path == "transactions" and wrong == [None]:
        path = r"transactions\[0\]"
    with pytest.raises(BackendError, match=named(path)):
        read(result)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("height", 0),
        ("height", 2**31),
        ("curtime", -1),
        ("curtime", 2**32),
        ("mintime", 2**32),
        ("version", 2**32),
        ("version", -(2**31) - 1),
        ("coinbasevalue", -1),
        ("coinbasevalue", MAX_MONEY + 1),
        ("coinbasevalue", 1_449),
        ("bits", ""),
        ("bits", "0x1d00ffff"),
        ("bits", "1d00_fff"),
        ("bits", "+1d00fff"),
        ("bits", " 1d00fff"),
        ("bits", "101d00ffff"),
        ("bits", "1d000000"),
        ("bits", "1d80ffff"),
        ("bits", "ff00ffff"),
        ("previousblockhash", PREVIOUS[2:]),
        ("previousblockhash", PREVIOUS + "00"),
        ("previousblockhash", " " + PREVIOUS[1:]),
        ("previousblockhash", PREVIOUS[:-3] + " ab"),
        ("weightlimit", 0),
        ("weightlimit", "4000000"),
        ("sigoplimit", True),
        ("rules", "csv"),
        ("rules", [7]),
        ("coinbaseaux", "0b2f"),
        ("coinbaseaux", {"a": "00" * 30, "b": "00" * 11}),
        ("default_witness_commitment", "6a24aa21a9ed" + "00" * 31),
        ("default_witness_commitment", "6a24aa21a9ee" + "00" * 32),
        ("default_witness_commitment", 7),
        ("transactions.2.fee", -1),
        ("transactions.2.sigops", -1),
        ("transactions.2.weight", 0),
        ("transactions.2.depends", [0]),
        ("transactions.2.depends", [3]),
        ("transactions.2.depends", [True]),
        ("transactions.2.depends", ["1"]),
        ("transactions.2.txid", "00"),
        ("transactions.2.hash", "00" * 33),
        ("transactions.2.data", "0"),
    ],
)
def test_a_value_out_of_bounds_is_named(path: str, value: object) -> None:
    with pytest.raises(BackendError, match=named(path)):
        read(changed(core_template(), path, value))


def test_a_coinbaseaux_part_that_is_no_hex_is_named() -> None:
    with pytest.raises(BackendError, match=r"coinbaseaux\.flags: hex digits are needed, got 'xy'"):
        read(core_template(coinbaseaux={"flags": "xy"}))
    parts = {"a": "00" * 30, "b": "01" * 10}
    assert read(core_template(coinbaseaux=parts)).coinbase_aux == bytes(30) + b"\x01" * 10


@pytest.mark.parametrize("result", [None, [], "template", 7, True])
def test_an_answer_that_is_no_object_is_refused(result: object) -> None:
    with pytest.raises(BackendError, match="getblocktemplate: an object is needed"):
        read(result)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("off_by", [-1_000, 4, 1_000])
def test_a_weight_that_the_bytes_cannot_have_is_refused(position: int, off_by: int) -> None:
    result = core_template()
    entry = result["transactions"][position]
    most = 2 * len(entry["data"])
    wrong = entry["weight"] + off_by if entry["weight"] == most or off_by < 0 else most + off_by
    with pytest.raises(BackendError, match=rf"transactions\[{position}\]\.weight"):
        read(changed(result, f"transactions.{position}.weight", wrong))


def test_a_rule_that_must_be_known_and_is_not_is_named() -> None:
    with pytest.raises(BackendError, match=r"rules: '!drivechain' is in force, which p2pool does not know on mainnet"):
        read(core_template(rules=["csv", "!segwit", "!drivechain"]))
    assert read(core_template(rules=["csv", "!segwit", "taproot", "drivechain", "!testdummy"])).height == 871_234


def test_a_block_of_signet_commits_to_witnesses_that_are_not_there() -> None:
    result = core_template(transactions=[], default_witness_commitment=None)
    assert read(result).witness_commitment is None
    assert read(result, network="signet").witness_commitment == witness_commitment_of([])


def test_the_rule_of_signets_is_known_on_signet_alone() -> None:
    result = core_template(rules=["csv", "!segwit", "taproot", "!signet"], signet_challenge="51")
    assert read(result, network="signet").height == 871_234
    with pytest.raises(BackendError, match="'!signet' is in force, which p2pool does not know on mainnet"):
        read(result)


def test_a_commitment_that_is_not_that_of_the_transactions_is_refused() -> None:
    ours = witness_commitment_of(wtxids_of(entries())).hex()
    for theirs in ("6a24aa21a9ed" + "07" * 32, "07" * 32):
        with pytest.raises(BackendError, match=f"{ours}, the Bitcoin node says {'07' * 32}"):
            read(core_template(default_witness_commitment=theirs))
    with pytest.raises(BackendError, match=f"the Bitcoin node says {'07' * 32}"):
        read(btcd_template(default_witness_commitment="07" * 32))


# Room.


def test_dropped_transactions_take_their_fees_along() -> None:
    result = core_template()
    total = sum(entry["weight"] for entry in result["transactions"])
    room = 4_000_000 - HEADER_AND_COUNT - total
    assert read(result, reserved_weight=room) == read(result)
    template = read(result, reserved_weight=room + 1)
    assert [t.fee for t in template.transactions] == [900, 0, 500]
    assert template.coinbase_value == 312_501_400
    assert template.merkle_branch == merkle_branch([t.txid for t in template.transactions])
    assert template.witness_commitment == witness_commitment_of(wtxids_of(result["transactions"][:3]))
    template = read(result, reserved_weight=room + total)
    assert (template.transactions, template.coinbase_value) == ((), 312_500_000)


def test_signature_checks_are_a_limit_of_their_own() -> None:
    result = core_template(sigoplimit=100)
    assert read(result, reserved_sigops=87) == read(result, reserved_sigops=0)
    template = read(result, reserved_sigops=88)
    assert [t.fee for t in template.transactions] == [900, 0, 500]
    template = read(result, reserved_sigops=96)
    assert [t.fee for t in template.transactions] == [900]
    assert template.coinbase_value == 312_500_900


def test_no_room_for_a_coinbase_is_an_error() -> None:
    with pytest.raises(BackendError, match="leave no room for a coinbase"):
        read(core_template(), reserved_weight=4_000_000)
    with pytest.raises(BackendError, match="leave no room for a coinbase"):
        read(core_template(), reserved_sigops=80_001)
    with pytest.raises(BackendError, match="leave no room for a coinbase"):
        read(core_template(weightlimit=1_000))


@pytest.mark.parametrize("count", [252, 253])
def test_the_count_of_transactions_weighs_what_it_takes(count: int) -> None:
    """With the coinbase 252 transactions are counted in one byte, 253 in three."""
    parts = [transaction_of(sources=[(bytes(32), index)], values=[1]) for index in range(count - 1)]
    transactions = [entry_of(raw, plain, fee=1) for raw, plain in parts]
    total = sum(entry["weight"] for entry in transactions)
    commitment = "6a24aa21a9ed" + witness_commitment_of(wtxids_of(transactions)).hex()
    result = core_template(transactions=transactions, default_witness_commitment=commitment)
    room = 4_000_000 - 4 * (80 + (1 if count < 253 else 3)) - total
    assert len(read(result, reserved_weight=room).transactions) == count - 1
    assert len(read(result, reserved_weight=room + 1).transactions) == count - 2


# Selection.


def chosen(fee: int, weight: int, depends: tuple[int, ...] = (), sigops: int | None = 0) -> TemplateTransaction:
    return TemplateTransaction(
        raw=b"", txid=bytes(32), wtxid=bytes(32), fee=fee, weight=weight, depends=depends, sigops=sigops
    )


@st.composite
def blocks(draw: st.DrawFn, most: int = 12, *, related: bool = True) -> tuple[TemplateTransaction, ...]:
    """Transactions with few different rates, so that ties are common, told apart by their txid."""
    made = []
    for position in range(draw(st.integers(1, most))):
        ancestors = st.sets(st.integers(0, position - 1), max_size=3) if position and related else st.just(set[int]())
        made.append(
            replace(
                chosen(
                    fee=draw(st.one_of(st.integers(0, 20), st.integers(0, 2_000))),
                    weight=draw(st.one_of(st.integers(1, 20), st.integers(1, 500))),
                    depends=tuple(sorted(draw(ancestors))),
                    sigops=draw(st.one_of(st.none(), st.integers(0, 8))),
                ),
                txid=position.to_bytes(32, "little"),
            )
        )
    return tuple(made)


limits = st.fractions(0, Fraction(6, 5), max_denominator=40)


def weight_of(transactions: Sequence[TemplateTransaction]) -> int:
    return sum(transaction.weight for transaction in transactions)


def sigops_of(transactions: Sequence[TemplateTransaction]) -> int:
    return sum(transaction.sigops or 0 for transaction in transactions)


def fees_of(transactions: Sequence[TemplateTransaction]) -> int:
    return sum(transaction.fee for transaction in transactions)


def descendants(transactions: Sequence[TemplateTransaction], position: int) -> set[int]:
    found = {position}
    for later in range(position + 1, len(transactions)):
        if found.intersection(transactions[later].depends):
            found.add(later)
    return found


def dumb_selection(
    transactions: Sequence[TemplateTransaction], max_weight: int, max_sigops: int
) -> tuple[TemplateTransaction, ...]:
    """The dumb twin: measures every package anew in each round, and compares fractions."""
    everything = set(range(len(transactions)))

    def of(positions: set[int]) -> list[TemplateTransaction]:
        return [transactions[position] for position in positions]

    over_weight = weight_of(transactions) > max_weight
    over_sigops = sigops_of(transactions) > max_sigops
    if not over_weight and not over_sigops:
        return tuple(transactions)

    def cost(positions: set[int]) -> int:
        weight, sigops = weight_of(of(positions)), sigops_of(of(positions))
        if over_weight and over_sigops:
            return weight * max(1, max_sigops) + sigops * max(1, max_weight)
        return weight if over_weight else sigops

    def excess(positions: set[int]) -> int:
        weight, sigops = weight_of(of(positions)) - max_weight, sigops_of(of(positions)) - max_sigops
        if over_weight and over_sigops:
            return max(weight, 0) * max(1, max_sigops) + max(sigops, 0) * max(1, max_weight)
        return max(weight if over_weight else sigops, 0)

    def fits(positions: set[int]) -> bool:
        return weight_of(of(positions)) <= max_weight and sigops_of(of(positions)) <= max_sigops

    kept, aside, ends = set(everything), set[int](), list[set[int]]()
    while True:
        packages = {position: descendants(transactions, position) & kept for position in kept - aside}
        rates = [
            (Fraction(fees_of(of(package)), cost(package)), -position)
            for position, package in packages.items()
            if cost(package)
        ]
        if not rates:
            break
        rate, place = min(rates)
        position = -place
        if ends and fees_of(of(everything - kept)) + rate * excess(kept) >= min(
            fees_of(of(everything - end)) for end in ends
        ):
            break
        if fits(kept - packages[position]):
            aside.add(position)
            ends.append(kept - packages[position])
        else:
            kept -= packages[position]
    kept = max(ends, key=lambda end: (fees_of(of(end)), -ends.index(end)))
    while True:
        free = [
            position
            for position in sorted(everything - kept)
            if kept.issuperset(transactions[position].depends) and fits(kept | {position})
        ]
        if not free:
            break
        kept.add(
            max(
                free,
                key=lambda p: (
                    cost({p}) == 0,
                    Fraction(transactions[p].fee, cost({p})) if cost({p}) else 0,
                    -p,
                ),
            )
        )
    order = sorted(kept)
    return tuple(
        replace(transactions[position], depends=tuple(order.index(parent) for parent in transactions[position].depends))
        for position in order
    )


@pytest.mark.slow
@given(blocks(), limits, limits)
def test_the_selection_is_closed_in_order_within_the_limits_and_nothing_more_fits(
    transactions: tuple[TemplateTransaction, ...], weight_part: Fraction, sigops_part: Fraction
) -> None:
    max_weight = int(weight_of(transactions) * weight_part)
    max_sigops = int(sigops_of(transactions) * sigops_part)
    result = select_transactions(transactions, max_weight=max_weight, max_sigops=max_sigops)
    assert weight_of(result) <= max_weight
    assert sigops_of(result) <= max_sigops
    positions = [int.from_bytes(transaction.txid, "little") for transaction in result]
    assert positions == sorted(set(positions))
    for position, transaction in zip(positions, result, strict=True):
        assert tuple(positions[parent] for parent in transaction.depends) == transactions[position].depends
        assert replace(transaction, depends=transactions[position].depends) == transactions[position]
    for position in set(range(len(transactions))).difference(positions):
        lacking = {position}
        for earlier in range(position, -1, -1):
            if earlier in lacking:
                lacking.update(set(transactions[earlier].depends).difference(positions))
        more = [transactions[place] for place in lacking]
        assert weight_of([*result, *more]) > max_weight or sigops_of([*result, *more]) > max_sigops


@pytest.mark.slow
@given(blocks(), limits, limits)
def test_the_selection_is_that_of_the_dumb_twin(
    transactions: tuple[TemplateTransaction, ...], weight_part: Fraction, sigops_part: Fraction
) -> None:
    max_weight = int(weight_of(transactions) * weight_part)
    max_sigops = int(sigops_of(transactions) * sigops_part)
    result = select_transactions(transactions, max_weight=max_weight, max_sigops=max_sigops)
    assert result == dumb_selection(transactions, max_weight, max_sigops)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_large_families_are_measured_as_the_dumb_twin_measures_them(seed: int) -> None:
    """Above two dozen members sets are summed by their bits."""
    transactions = family(90, seed)
    total = weight_of(transactions)
    for max_weight in (total - 1, total - 2_000, total // 2, total // 20):
        result = select_transactions(transactions, max_weight=max_weight, max_sigops=10**6)
        assert result == dumb_selection(transactions, max_weight, 10**6)
        assert result != transactions


def family(count: int, seed: int) -> tuple[TemplateTransaction, ...]:
    """Transactions that nearly all are related, with common descendants."""

    def number(*key: int) -> int:
        return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "little")

    return tuple(
        chosen(
            fee=number(position, 0) % 3_000,
            weight=400 + number(position, 1) % 2_000,
            depends=tuple(sorted({number(position, 2, parent) % position for parent in range(1 + seed % 3)}))
            if position % 20
            else (),
            sigops=number(position, 3) % 8,
        )
        for position in range(count)
    )


@pytest.mark.slow
@given(blocks(10, related=False), st.fractions(0, Fraction(39, 40), max_denominator=40))
def test_lone_transactions_cost_at_most_twice_the_fees_that_the_best_choice_costs(
    transactions: tuple[TemplateTransaction, ...], part: Fraction
) -> None:
    max_weight = int(weight_of(transactions) * part)
    best = max(
        fees_of(kept)
        for count in range(len(transactions) + 1)
        for kept in itertools.combinations(transactions, count)
        if weight_of(kept) <= max_weight
    )
    result = select_transactions(transactions, max_weight=max_weight, max_sigops=10**6)
    assert fees_of(transactions) - fees_of(result) <= 2 * (fees_of(transactions) - best)


def test_what_fits_is_given_as_it_is() -> None:
    transactions = [chosen(1, 100), chosen(2, 50, (0,), None), chosen(3, 1, (), 7)]
    result = select_transactions(transactions, max_weight=151, max_sigops=7)
    assert all(one is other for one, other in zip(result, transactions, strict=True))
    assert select_transactions([], max_weight=0, max_sigops=0) == ()


def test_a_child_pays_for_its_parent() -> None:
    parent, child, lone = chosen(0, 100), chosen(1_000, 100, (0,)), chosen(100, 100)
    assert select_transactions([parent, child, lone], max_weight=200, max_sigops=0) == (parent, child)


def test_a_poor_child_goes_without_its_parent() -> None:
    parent, poor, rich = chosen(10, 100), chosen(1, 100, (0,)), chosen(500, 100, (0,))
    result = select_transactions([parent, poor, rich], max_weight=200, max_sigops=0)
    assert result == (parent, rich)
    assert result[1] is rich


def test_a_large_poor_transaction_stays_if_a_small_one_is_enough() -> None:
    large, small, others = chosen(100_000, 400_000), chosen(110, 400), [chosen(5_000, 400)] * 3
    transactions = [*others, small, large]
    result = select_transactions(transactions, max_weight=weight_of(transactions) - 100, max_sigops=0)
    assert result == (*others, large)


def test_what_was_dropped_for_too_long_comes_back() -> None:
    first, large, small = chosen(900, 300), chosen(100, 300), chosen(20, 100)
    assert select_transactions([first, large, small], max_weight=450, max_sigops=0) == (first, small)


def test_transactions_that_cost_nothing_of_what_is_short_are_never_dropped_for_it() -> None:
    transactions = [chosen(0, 100), chosen(500, 100, (), 80), chosen(90, 100, (), 4), chosen(70, 100, (0,), None)]
    result = select_transactions(transactions, max_weight=400, max_sigops=80)
    assert [transaction.fee for transaction in result] == [0, 500, 70]


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="limits are 0 or more"):
        select_transactions([], max_weight=-1, max_sigops=0)
    with pytest.raises(ValueError, match="limits are 0 or more"):
        select_transactions([], max_weight=0, max_sigops=-1)


# The reserve.


def largest_coinbase(
    payout_class: int, kind: str, *, height: int = 2**31 - 1, value: int = 312_500_000, commitment: bytes = bytes(32)
) -> bytes:
    """A coinbase with a payout for everybody whom the class has room for, all of one type.

    The script of those who are paid to P2PKH reads as if it checked signatures wherever it can; else it is as long
    as Bitcoin allows.
    """
    table = WeightTable()

    def script_of(number: int) -> bytes:
        digest = hashlib.sha256(b"%d" % number).digest()
        if kind == "P2PKH":
            return b"\x76\xa9\x14" + digest[:20] + b"\x88\xac"
        return {"P2TR": b"\x51\x20", "P2WSH": b"\x00\x20"}[kind] + digest

    for number in range(payout_class):
        table.add(script_of(number), 1_000)
    payouts = build_payouts(MAINNET, table, value=value, parent=bytes(32), payout_class=payout_class)
    assert payouts.count == payout_class
    assert payouts.finder_amount > 0
    script = bip34_push(height) + COINBASE_TAG
    if kind == "P2PKH":
        script += b"\xae" * (MAX_AUX_SIZE + EXTRANONCE_SIZE)
    else:
        script += bytes(100 - len(script))
    return build_coinbase(script, payouts, script_of(payout_class), commitment, bytes(32))


@pytest.mark.parametrize("kind", ["P2TR", "P2WSH", "P2PKH"])
@pytest.mark.parametrize("payout_class", [2, 12, 47, 146, 249, 250, 367])
def test_the_reserve_is_the_weight_of_the_largest_coinbase(payout_class: int, kind: str) -> None:
    coinbase = largest_coinbase(payout_class, kind)
    raw, plain = transaction_of(sources=[(bytes(32), 0)], values=[1])
    with_witness = TemplateTransaction(raw=raw, txid=sha256d(plain), wtxid=sha256d(raw), fee=0, weight=1)
    template = build_template(
        version=1,
        previous_block_hash=bytes(32),
        height=1,
        bits=0x207FFFFF,
        min_time=1,
        time=1,
        coinbase_value=1,
        transactions=[with_witness],
    )
    size = len(assemble_block(bytes(80), coinbase, template)) - 81 - len(raw)
    weight = 3 * len(coinbase) + size
    reserve, _ = coinbase_reserve(payout_class)
    assert weight <= reserve
    if kind != "P2PKH":
        assert weight == reserve, "the bound is reached"


@pytest.mark.parametrize("payout_class", [2, 12, 47, 146, 367])
def test_the_reserve_covers_the_signature_checks_of_any_coinbase(payout_class: int) -> None:
    """Every byte that is not ours reads as OP_CHECKMULTISIG, every payout has an OP_CHECKSIG."""
    coinbase = CTransaction.deserialize(largest_coinbase(payout_class, "P2PKH"))
    scripts = [coinbase.vin[0].scriptSig, *(output.scriptPubKey for output in coinbase.vout)]
    checks = sum(CScript(script).GetSigOpCount(False) for script in scripts)
    assert 4 * checks == coinbase_reserve(payout_class)[1]


@pytest.mark.parametrize("size", [MAX_AUX_SIZE - 13, MAX_AUX_SIZE - 12, MAX_AUX_SIZE - 11, MAX_AUX_SIZE])
@pytest.mark.parametrize("height", [1, 16, 17, 128, 871_234, 2**31 - 1])
def test_the_tag_swallows_what_the_node_wants_in_the_script(size: int, height: int) -> None:
    script = bip34_push(height) + COINBASE_TAG + b"\xae" * (size + EXTRANONCE_SIZE)
    if len(script) - len(bip34_push(height)) < 48:  # a push that is cut off: Bitcoin stops counting, the library raises
        script += bytes(48)
    assert CScript(script).GetSigOpCount(False) <= 20 * EXTRANONCE_SIZE


# Bitcoin judges.


def coins(backend: KernelBackend, count: int) -> list[tuple[bytes, int]]:
    return [(coin.txid, coin.value) for coin in backend.mature_coinbases(ANYBODY_SCRIPT)[:count]]


def as_core_says(template: BlockTemplate, added: list[dict[str, Any]]) -> dict[str, Any]:
    """The node's next block with transactions, as Bitcoin Core would propose it."""
    return core_template(
        version=template.version,
        previousblockhash=template.previous_block_hash[::-1].hex(),
        height=template.height,
        bits=f"{template.bits:08x}",
        mintime=template.min_time,
        curtime=template.time,
        coinbasevalue=block_subsidy(template.height, 150) + sum(entry["fee"] for entry in added),
        transactions=added,
        default_witness_commitment="6a24aa21a9ed" + witness_commitment_of(wtxids_of(added)).hex(),
    )


def chains_of_payments(found: Sequence[tuple[bytes, int]]) -> list[dict[str, Any]]:
    """For each coin a parent that pays little, two children and a grandchild of both, in turns."""
    generations: list[list[dict[str, Any]]] = [[], [], [], []]
    count = len(found)
    for number, (txid, value) in enumerate(found):
        half = (value - number) // 2
        parent = transaction_of(sources=[(txid, 0)], values=[half, half])
        generations[0].append(entry_of(*parent, fee=value - 2 * half))
        fees = 300 + 100 * number, 50_000 // (1 + number)
        children = [
            transaction_of(sources=[(sha256d(parent[1]), which)], values=[half - fee], witness=True)
            for which, fee in enumerate(fees)
        ]
        for which, child in enumerate(children):
            place = 1 + which
            generations[place].append(entry_of(*child, fee=fees[which], depends=[number + 1]))
        last = transaction_of(
            sources=[(sha256d(child[1]), 0) for child in children], values=[2 * half - sum(fees) - 700]
        )
        generations[3].append(entry_of(*last, fee=700, depends=[count + number + 1, 2 * count + number + 1]))
    return [entry for generation in generations for entry in generation]


def refused_for_the_value(backend: KernelBackend, template: BlockTemplate) -> str:
    greedy = replace(template, coinbase_value=template.coinbase_value + 1)
    return backend.submit_block_now(solved_block(greedy, pay(greedy, ANYBODY_SCRIPT))).reason


@pytest.mark.slow
@pytest.mark.parametrize("keep", range(0, 17, 2))
def test_bitcoin_accepts_a_block_whose_transactions_were_trimmed(tmp_path: Path, keep: int) -> None:
    backend = KernelBackend.open(tmp_path)
    mine_blocks(backend, 104)
    added = chains_of_payments(coins(backend, 4))
    assert len(added) == 16
    room = sum(entry["weight"] for entry in added) * keep // 16
    template = read_template(
        as_core_says(backend.block_template_now(), added),
        network="regtest",
        reserved_weight=4_000_000 - HEADER_AND_COUNT - room,
        reserved_sigops=0,
    )
    assert weight_of(template.transactions) <= room
    assert (len(template.transactions) == 16) == (keep == 16)
    assert refused_for_the_value(backend, template) == "bad-cb-amount", "every satoshi of the fees is counted"
    block = solved_block(template, pay(template, ANYBODY_SCRIPT))
    assert backend.submit_block_now(block) == SubmitResult(accepted=True)
    backend.close()


@pytest.mark.slow
def test_bitcoin_refuses_too_many_signature_checks_and_accepts_the_trimmed_block(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    mine_blocks(backend, 109)
    checks = b"\xac" * 250
    added = []
    for number, (txid, value) in enumerate(coins(backend, 9)):
        outputs = [1] * 8 + [value - 1_008 - number]
        raws = transaction_of(sources=[(txid, 0)], values=outputs, script=checks)
        added.append(entry_of(*raws, fee=1_000 + number, sigops=4 * 9 * 250))
    weight, sigops = coinbase_reserve(12)
    result = as_core_says(backend.block_template_now(), added)
    untrimmed = read_template(
        result | {"sigoplimit": 10**6}, network="regtest", reserved_weight=weight, reserved_sigops=0
    )
    assert len(untrimmed.transactions) == 9
    block = solved_block(untrimmed, pay(untrimmed, ANYBODY_SCRIPT))
    assert backend.submit_block_now(block) == SubmitResult(accepted=False, reason="bad-blk-sigops")
    template = read_template(result, network="regtest", reserved_weight=weight, reserved_sigops=sigops)
    assert [transaction.fee for transaction in template.transactions] == [1_001 + number for number in range(8)]
    block = solved_block(template, pay(template, ANYBODY_SCRIPT))
    assert backend.submit_block_now(block) == SubmitResult(accepted=True)
    backend.close()


@pytest.mark.slow
def test_bitcoin_accepts_the_largest_coinbase_in_a_block_filled_to_the_last_unit(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    mine_blocks(backend, 104)
    node, found = backend.block_template_now(), coins(backend, 4)
    weight, sigops = coinbase_reserve(367)

    def proposed(last: int) -> list[dict[str, Any]]:
        added = []
        for (txid, value), padding in zip(found, (240_000, 240_000, 240_000, last), strict=True):
            added.append(entry_of(*transaction_of(sources=[(txid, 0)], values=[value - 100], padding=padding), fee=100))
        return added

    def block_of(added: list[dict[str, Any]], reserved_weight: int) -> tuple[BlockTemplate, bytes]:
        template = read_template(
            as_core_says(node, added), network="regtest", reserved_weight=reserved_weight, reserved_sigops=sigops
        )
        assert template.witness_commitment is not None
        coinbase = largest_coinbase(
            367,
            "P2TR",
            height=template.height,
            value=template.coinbase_value,
            commitment=template.witness_commitment,
        )
        return template, solved_block(template, coinbase)

    free = 4_000_000 - HEADER_AND_COUNT - weight - sum(entry["weight"] for entry in proposed(70_000))
    fills, rest = divmod(free, 4)
    assert rest == 0
    template, block = block_of(proposed(70_000 + fills + 1), weight - 4)
    assert len(template.transactions) == 4
    assert backend.submit_block_now(block) == SubmitResult(accepted=False, reason="bad-blk-weight")
    template, block = block_of(proposed(70_000 + fills + 1), weight)
    assert len(template.transactions) == 3
    template, block = block_of(proposed(70_000 + fills), weight)
    assert len(template.transactions) == 4
    assert backend.submit_block_now(block) == SubmitResult(accepted=True)
    backend.close()


def test_a_transaction_that_is_there_twice_is_refused() -> None:
    result = core_template()
    rows = result["transactions"]
    assert isinstance(rows, list)
    with pytest.raises(BackendError, match="one is there twice"):
        read(changed(result, "transactions", [*rows, rows[-1]]))
