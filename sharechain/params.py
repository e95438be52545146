"""Network parameters: everything that two nodes must agree on, in one frozen value.

The parameters are hashed into the network id, which is part of every topic, protocol id and share
commitment: nodes with other parameters are on another network and never meet. That is why nothing in this
file may be a node's own choice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Final

import cbor2

from sharechain.errors import DecodeError, ParamsError, show_value

__all__ = ["BITCOIN_NETWORKS", "BLOCK_FALL", "DUST", "MAX_MONEY", "MEDIAN_SPAN", "NETWORKS", "Params", "decode_params"]

BITCOIN_NETWORKS: Final = ("mainnet", "testnet4", "signet", "regtest")

#: Shares whose times make the median of rule R6. Source: Bitcoin Core, ``nMedianTimeSpan``.
MEDIAN_SPAN: Final = 11
#: Sat. The largest dust limit of the script types that rule R1 allows (P2PKH): a smaller output is not relayed
#: by Bitcoin nodes. Source: Bitcoin Core, ``GetDustThreshold`` at 3 sat/vB.
DUST: Final = 546
#: Blocks by which the Bitcoin height of a share may fall below its parent's (R12): about a day. A reorg to a chain with
#: more work and fewer blocks, as testnet4 sees them, must not stop the sharechain.
BLOCK_FALL: Final = 144
#: Sat. No sum of outputs is larger. Source: Bitcoin Core, ``MAX_MONEY``.
MAX_MONEY: Final = 21_000_000 * 100_000_000

_ENCODING_VERSION: Final = 1
#: Names are used as names of directories.
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Params:
    """One share network's constants. Units stand in the names; why each has its value: ``docs/reference/rules.md``.

    Raises:
        ParamsError: on construction, naming the parameter that makes no sense.
    """

    #: A private network chooses its own name, so that it never meets another with equal numbers.
    name: str
    #: Which Bitcoin the shares are headers of: one of ``BITCOIN_NETWORKS``.
    bitcoin_network: str
    #: Wanted mean time between shares, uncles counted (R7).
    share_period_ms: int = 10_000
    #: ASERT: how long the share rate must be off by one period each period to double the target (R7).
    half_life_s: int = 1_200
    #: Silence after which the share target starts to ease (R8) ...
    stall_after_s: int = 600
    #: ... doubling each time this has passed (R8).
    stall_doubling_s: int = 60
    #: How many times harder than the chain asks a share may be (R8). Fork choice counts a share's whole work, so that
    #: one share of k + 1 times the work would undo k others: the fewer, the less luck can rewrite.
    heaviest_share: int = 4
    #: The easiest share target: 256-bit number (R2), and that of a new chain. Until the difficulty has caught up with
    #: the hash rate there is a storm of shares: test networks begin where one core finds some in a second.
    max_target: int = 2**224 - 1
    #: Length of the PPLNS window in expected Bitcoin blocks of work: a share is never paid with e^-window_blocks.
    window_blocks: int = 4
    #: Most main-chain shares in a window: 7 days at 10 s. Bounds history and memory.
    window_max_shares: int = 60_480
    #: How many heights below its nephew an uncle may stand, at most (R9).
    uncle_depth: int = 3
    #: How many uncles one share may name, at most (R4).
    uncle_max: int = 3
    #: The part of an uncle's work that its own miner is paid for, as (numerator, denominator).
    uncle_weight: tuple[int, int] = (9, 10)
    #: The part of a block's value that its finder gets before all, as (numerator, denominator).
    finder_bonus: tuple[int, int] = (1, 200)
    #: How many window payouts a coinbase may have: what firmware takes. A coinbase of class 12 has at most 755
    #: bytes, 47: 2,250, 146: 6,500, 367: 16,000, at 43 bytes an output and some 200 of the rest.
    payout_classes: tuple[int, ...] = (12, 47, 146, 367)
    #: Sat. Nobody is paid less than this in a coinbase, unless all that is left is less.
    min_payout: int = 10_000
    #: A share whose header time is further ahead of a node's clock waits there.
    future_limit_s: int = 60
    #: Test networks only (1 on real ones): a share is a block if its hash meets share target / divisor.
    block_target_divisor: int = 1

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def encoded(self) -> bytes:
        """Canonical CBOR: a version, then every field in the order of this class."""
        values = [getattr(self, f.name) for f in fields(self)]
        return cbor2.dumps([_ENCODING_VERSION, *values], canonical=True)

    @cached_property
    def network_id(self) -> bytes:
        """8 bytes: the start of SHA-256 over the canonical encoding."""
        return hashlib.sha256(self.encoded).digest()[:8]

    def with_overrides(self, table: Mapping[str, object]) -> Params:
        """Another network: these parameters with some replaced, as a TOML table gives them.

        Args:
            table: parameter name to value; fractions as ``[9, 10]``, ``max_target`` as an integer or as a
                hexadecimal text, since TOML integers end at 2^63.

        Raises:
            ParamsError: an unknown name, a wrong type or a value out of range.
        """
        known = {f.name: f for f in fields(self)}
        changes: dict[str, object] = {}
        for key, value in table.items():
            if key not in known:
                raise ParamsError(key, f"unknown parameter; known are {', '.join(known)}")
            if key == "max_target" and isinstance(value, str):
                try:
                    value = int(value, 16)
                except ValueError:
                    raise ParamsError(key, f"not a hexadecimal number: {value!r}") from None
            if isinstance(value, list):
                value = tuple(value)
            changes[key] = value
        return replace(self, **changes)  # type: ignore[arg-type]  # _check looks at every type


def decode_params(raw: bytes) -> Params:
    """Read parameters back from their canonical encoding, as a database stores them.

    Raises:
        DecodeError: the bytes are not the encoding of valid parameters.
    """
    try:
        values = cbor2.loads(raw)
    except (cbor2.CBORError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise DecodeError(f"parameters are not CBOR: {error}") from None
    names = [f.name for f in fields(Params)]
    if type(values) is not list or len(values) != len(names) + 1 or values[0] != _ENCODING_VERSION:
        raise DecodeError("parameters are not an array of the known version and length")
    values = [tuple(value) if type(value) is list else value for value in values[1:]]
    try:
        params = Params(**dict(zip(names, values, strict=True)))
    except ParamsError as error:
        raise DecodeError(f"parameters are out of range: {error}") from None
    if params.encoded != raw:
        raise DecodeError("parameters are not canonically encoded")
    return params


_RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "share_period_ms": (1, 2**31),
    "half_life_s": (1, 2**31),
    "stall_after_s": (1, 2**31),
    "stall_doubling_s": (1, 2**31),
    "heaviest_share": (1, 1000),
    "max_target": (1, 2**256 - 1),
    "window_blocks": (1, 2**31),
    "window_max_shares": (1, 2**31),
    "uncle_depth": (0, 100),
    "uncle_max": (0, 100),
    "min_payout": (DUST, MAX_MONEY),
    "future_limit_s": (1, 7200),
    "block_target_divisor": (1, 2**128),
}


def _check(params: Params) -> None:
    for key in ("name", "bitcoin_network"):
        if type(getattr(params, key)) is not str:
            raise ParamsError(key, f"a text is needed, got {show_value(getattr(params, key))}")
    if not _NAME.fullmatch(params.name):
        raise ParamsError("name", "1 to 64 letters, digits, dots, dashes and underscores are needed, no dot first")
    if params.bitcoin_network not in BITCOIN_NETWORKS:
        raise ParamsError("bitcoin_network", f"one of {', '.join(BITCOIN_NETWORKS)} is needed")
    for key, (least, most) in _RANGES.items():
        value = getattr(params, key)
        if type(value) is not int or not least <= value <= most:
            raise ParamsError(key, f"an integer from {least} to {most} is needed, got {show_value(value)}")
    for key in ("uncle_weight", "finder_bonus"):
        value = getattr(params, key)
        if type(value) is not tuple or len(value) != 2 or any(type(part) is not int for part in value):
            raise ParamsError(key, f"a numerator and a denominator are needed, got {show_value(value)}")
        if not 0 <= value[0] <= value[1] or not 0 < value[1] < 2**31:
            raise ParamsError(key, f"a fraction from 0 to 1 is needed, got {show_value(value)}")
    classes = params.payout_classes
    if type(classes) is not tuple or not classes or any(type(size) is not int for size in classes):
        raise ParamsError("payout_classes", f"a list of integers is needed, got {show_value(classes)}")
    if list(classes) != sorted(set(classes)) or not 2 <= classes[0] <= classes[-1] <= 2_000:
        # A class of 1 would let a finder choose, seed in hand, between all and nothing.
        raise ParamsError("payout_classes", f"ascending integers from 2 to 2,000 are needed, got {show_value(classes)}")
    if params.bitcoin_network != "regtest" and params.block_target_divisor != 1:
        raise ParamsError("block_target_divisor", f"is 1 on {params.bitcoin_network}")


#: The networks that have a name. A private one: ``NETWORKS["regtest"].with_overrides({"name": "mine", ...})``.
NETWORKS: Final[Mapping[str, Params]] = {
    "mainnet": Params(name="mainnet", bitcoin_network="mainnet"),
    "testnet4": Params(name="testnet4", bitcoin_network="testnet4", max_target=2**236 - 1),
    "signet": Params(name="signet", bitcoin_network="signet", max_target=2**236 - 1),
    "regtest": Params(
        name="regtest",
        bitcoin_network="regtest",
        share_period_ms=1_000,
        half_life_s=20,
        stall_after_s=15,
        stall_doubling_s=5,
        max_target=2**240 - 1,
        window_max_shares=2_000,
        block_target_divisor=20,
    ),
}
