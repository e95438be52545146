"""Network parameters: what makes a network another network, and what an operator is told of a bad one."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharechain.errors import DecodeError, ParamsError
from sharechain.params import NETWORKS, Params, decode_params

MAINNET = NETWORKS["mainnet"]

#: Another valid value of each parameter.
OTHER: dict[str, Any] = {
    "name": "other",
    "bitcoin_network": "signet",
    "share_period_ms": 10_001,
    "half_life_s": 1_201,
    "stall_after_s": 601,
    "heaviest_share": 5,
    "stall_doubling_s": 61,
    "max_target": 2**224,
    "window_blocks": 5,
    "window_max_shares": 60_481,
    "uncle_depth": 4,
    "uncle_max": 4,
    "uncle_weight": (8, 9),
    "finder_bonus": (1, 201),
    "payout_classes": (12, 47, 146, 368),
    "min_payout": 10_001,
    "future_limit_s": 61,
    "block_target_divisor": 2,
}


def test_network_ids_are_what_they_were() -> None:
    """A change here founds a new network: all nodes of the old one are left behind."""
    assert {name: params.network_id.hex() for name, params in NETWORKS.items()} == {
        "mainnet": "03826ff5ef4b251c",
        "testnet4": "59c7c60f248bc296",
        "signet": "f3ee194706b5e706",
        "regtest": "0d1cce644fce1a55",
    }


def test_network_ids_are_distinct() -> None:
    assert len({params.network_id for params in NETWORKS.values()}) == len(NETWORKS)
    for name, params in NETWORKS.items():
        assert params.name == params.bitcoin_network == name
        assert len(params.network_id) == 8


def test_a_change_of_any_parameter_is_another_network() -> None:
    assert set(OTHER) == {field.name for field in fields(Params)}
    regtest = replace(MAINNET, bitcoin_network="regtest")
    ids = {regtest.network_id, *(replace(regtest, **{name: value}).network_id for name, value in OTHER.items())}
    assert len(ids) == 1 + len(OTHER)


def test_a_fraction_of_equal_value_is_another_network() -> None:
    assert replace(MAINNET, uncle_weight=(18, 20)).network_id != MAINNET.network_id


@pytest.mark.parametrize("name", NETWORKS)
def test_decoding_what_was_encoded_gives_the_parameters(name: str) -> None:
    params = NETWORKS[name]
    assert decode_params(params.encoded) == params
    assert decode_params(params.encoded).network_id == params.network_id
    assert params.with_overrides({}) == params


@pytest.mark.slow
@given(st.integers(1, 2**256 - 1), st.integers(0, 100), st.lists(st.integers(2, 2_000), min_size=1, unique=True))
def test_any_parameters_survive_encoding(max_target: int, depth: int, classes: list[int]) -> None:
    params = replace(MAINNET, max_target=max_target, uncle_depth=depth, payout_classes=tuple(sorted(classes)))
    assert decode_params(params.encoded) == params


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_decode_errors(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_params(raw)


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "x",
        [],
        [1],
        {},
        math.nan,
        2**16_000,
        [1] * 18,
        [2**16_000] * 18,
        [1, "x", "mainnet", *[2**16_000] * 15],
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, int | list) else type(value).__name__,
)
def test_cbor_that_is_no_parameters_raises_only_decode_errors(value: object) -> None:
    with pytest.raises(DecodeError):
        decode_params(cbor2.dumps(value))


def test_any_flipped_byte_is_no_longer_the_same_parameters() -> None:
    raw = MAINNET.encoded
    for at in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[at] ^= 1 << bit
            try:
                params = decode_params(bytes(flipped))
            except DecodeError:
                continue
            assert params.network_id != MAINNET.network_id


def test_parameters_in_another_encoding_are_refused() -> None:
    raw = MAINNET.encoded
    for other in (
        raw + b"\x00",
        raw[:-1],
        b"\x98" + bytes([raw[0] & 0x1F]) + raw[1:],
        cbor2.dumps([*cbor2.loads(raw), 1]),
    ):
        with pytest.raises(DecodeError):
            decode_params(other)


# -- a private network's table ---------------------------------------------------------------------------------


def test_a_table_overrides_as_toml_gives_it() -> None:
    table = {
        "name": "mine",
        "share_period_ms": 2_000,
        "max_target": "0x" + "ff" * 28,
        "uncle_weight": [8, 9],
        "payout_classes": [5, 50],
    }
    params = MAINNET.with_overrides(table)
    assert (params.name, params.share_period_ms) == ("mine", 2_000)
    assert params.max_target == 2**224 - 1
    assert params.uncle_weight == (8, 9)
    assert params.payout_classes == (5, 50)
    assert params.half_life_s == MAINNET.half_life_s
    assert (
        MAINNET.with_overrides({"max_target": "ff"}).max_target
        == MAINNET.with_overrides({"max_target": 255}).max_target
    )
    assert hash(params) == hash(MAINNET.with_overrides(table))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("share_periodms", 1),
        ("share_period_ms", 0),
        ("share_period_ms", 2.5),
        ("share_period_ms", "10"),
        ("share_period_ms", True),
        ("share_period_ms", None),
        ("half_life_s", -1),
        ("half_life_s", 2**31 + 1),
        ("stall_after_s", 0),
        ("stall_doubling_s", 0),
        ("max_target", 0),
        ("max_target", 2**256),
        ("max_target", "1" + "0" * 64),
        ("max_target", "12g"),
        ("max_target", ""),
        ("max_target", [1]),
        ("window_blocks", 0),
        ("window_max_shares", 0),
        ("uncle_depth", -1),
        ("uncle_depth", 101),
        ("uncle_max", 101),
        ("uncle_weight", [9]),
        ("uncle_weight", [9, 10, 11]),
        ("uncle_weight", [10, 9]),
        ("uncle_weight", [0, 0]),
        ("uncle_weight", [-1, 2]),
        ("uncle_weight", [0.9, 1]),
        ("uncle_weight", "9/10"),
        ("uncle_weight", 0.9),
        ("finder_bonus", [2, 1]),
        ("finder_bonus", [1, 2**31]),
        ("payout_classes", []),
        ("payout_classes", [1, 12]),
        ("payout_classes", [12, 12]),
        ("payout_classes", [47, 12]),
        ("payout_classes", [12, 2_001]),
        ("payout_classes", [12, "47"]),
        ("payout_classes", 12),
        ("min_payout", 545),
        ("future_limit_s", 0),
        ("future_limit_s", 7_201),
        ("block_target_divisor", 0),
        ("block_target_divisor", 2),
        ("bitcoin_network", "testnet3"),
        ("bitcoin_network", 1),
        ("bitcoin_network", ["mainnet"]),
        ("name", ""),
        ("name", "n" * 65),
        ("name", "a\nb"),
        ("name", "\ud800"),
        ("name", 5),
    ],
)
def test_a_bad_option_is_named(option: str, value: object) -> None:
    with pytest.raises(ParamsError) as caught:
        MAINNET.with_overrides({option: value})
    assert caught.value.option == option
    assert str(caught.value).startswith(option)


def test_only_regtest_may_divide_block_targets() -> None:
    assert NETWORKS["regtest"].block_target_divisor > 1
    for name in ("mainnet", "testnet4", "signet"):
        with pytest.raises(ParamsError):
            NETWORKS[name].with_overrides({"block_target_divisor": 2})
