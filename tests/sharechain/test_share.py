"""The share's encoding: one form only, and nothing that a stranger sends raises anything but ``DecodeError``."""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
import struct
from contextlib import suppress
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharechain.chain import Accepted
from sharechain.errors import DecodeError, InvalidShare
from sharechain.share import (
    MAX_SHARE_SIZE,
    NULL_HASH,
    Share,
    ShareData,
    bip34_height,
    bip34_push,
    decode_share,
    encode_share,
    is_payout_script,
    pack_header,
    share_commitment,
    share_id,
)
from tests.builders import FINE, add, grow, mine, miner_script, new_chain


def _valid() -> Share:
    """A share with something in every field."""
    chain = new_chain(FINE)
    grow(chain, 4)
    assert chain.tip is not None
    add(chain, mine(chain, chain.tip.parent, miner=9))
    share = mine(
        chain,
        chain.tip,
        uncles=chain.uncle_candidates(chain.tip),
        witness_commitment=bytes(range(32)),
        branch=(bytes([7]) * 32, bytes([8]) * 32),
    )
    assert share.data.uncles
    return share


VALID = _valid()
RAW = encode_share(VALID)
VALUES: list[Any] = cbor2.loads(RAW)
#: The same as encoded elements: the five before ``data``, and those of ``data``.
OUTER = [cbor2.dumps(value) for value in VALUES[:5]]
DATA = [cbor2.dumps(value) for value in VALUES[5]]


def _with_element(position: int, encoded: bytes) -> bytes:
    """The valid share with one element's encoding replaced: 0 to 4 outside, 5 to 13 in its data."""
    outer, data = list(OUTER), list(DATA)
    if position < 5:
        outer[position] = encoded
    else:
        data[position - 5] = encoded
    return b"\x86" + b"".join(outer) + b"\x89" + b"".join(data)


def _tag(number: int, content: bytes) -> bytes:
    head = bytes([0xC0 | number]) if number < 24 else b"\xd9" + number.to_bytes(2, "big")
    return head + content


def _decodes_or_refuses(raw: bytes) -> None:
    try:
        share = decode_share(raw)
    except DecodeError:
        return
    assert encode_share(share) == raw


# -- one form --------------------------------------------------------------------------------------------------


def test_the_parts_make_the_whole() -> None:
    assert _with_element(0, OUTER[0]) == RAW


hashes = st.binary(min_size=32, max_size=32)
heights = st.integers(1, 2**31 - 1)
shares = st.builds(
    lambda height, rest, **fields: Share(coinbase_script=bip34_push(height) + rest, **fields),
    height=heights,
    rest=st.binary(min_size=1, max_size=90),
    header=st.binary(min_size=80, max_size=80),
    coinbase_value=st.integers(0, 21_000_000 * 10**8),
    witness_commitment=st.none() | hashes,
    merkle_branch=st.lists(hashes, max_size=16).map(tuple),
    data=st.builds(
        ShareData,
        version=st.just(1),
        parent=hashes,
        uncles=st.lists(hashes, max_size=4).map(tuple),
        bits=st.integers(0, 2**32 - 1),
        max_bits=st.integers(0, 2**32 - 1),
        height=st.integers(0, 2**48),
        total_work=st.integers(0, 2**256 - 1),
        payout_script=st.integers(0, 99).map(miner_script),
        payout_class=st.integers(0, 2**16 - 1),
    ),
)


@pytest.mark.slow
@given(shares)
def test_r1_decoding_what_was_encoded_gives_the_share(share: Share) -> None:
    raw = encode_share(share)
    assert decode_share(raw) == share
    assert len(raw) <= MAX_SHARE_SIZE
    assert cbor2.dumps(cbor2.loads(raw), canonical=True) == raw


@pytest.mark.slow
@given(left=shares, right=shares)
def test_equal_encodings_are_equal_shares(left: Share, right: Share) -> None:
    assert (encode_share(left) == encode_share(right)) == (left == right)
    assert (share_id(encode_share(left)) == share_id(encode_share(right))) == (left == right)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(RAW + b"\x00", id="trailing byte"),
        pytest.param(RAW + RAW, id="two shares"),
        pytest.param(RAW[:-1], id="a byte short"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x9f" + RAW[1:] + b"\xff", id="indefinite array"),
        pytest.param(b"\x98\x06" + RAW[1:], id="length of the array not shortest"),
        pytest.param(_tag(55799, RAW), id="self-described CBOR"),
        pytest.param(_with_element(0, b"\x59\x00\x50" + OUTER[0][2:]), id="length of a string not shortest"),
        pytest.param(_with_element(0, b"\x5f" + OUTER[0] + b"\xff"), id="string in chunks"),
        pytest.param(_with_element(4, b"\x9f" + OUTER[4][1:] + b"\xff"), id="indefinite merkle branch"),
        pytest.param(_with_element(7, b"\x9f" + DATA[2][1:] + b"\xff"), id="indefinite uncles"),
        pytest.param(_with_element(10, b"\x18" + DATA[5]), id="height not shortest"),
        pytest.param(_with_element(10, b"\xc2\x41" + DATA[5]), id="small bignum for an int"),
        pytest.param(_with_element(11, b"\xc2\x59\x00\x20" + bytes(31) + b"\x05"), id="bignum with leading zeros"),
        pytest.param(_with_element(5, b"\xf5"), id="True for version 1"),
        pytest.param(_with_element(10, b"\xf4"), id="False for a height"),
        pytest.param(_with_element(5, cbor2.dumps(1.0)), id="1.0 for version 1"),
        pytest.param(_with_element(3, b"\xf7"), id="undefined for null"),
        pytest.param(_with_element(4, cbor2.dumps({})), id="map for an array"),
        pytest.param(_with_element(4, _tag(258, OUTER[4])), id="set for an array"),
        pytest.param(_with_element(1, b"\x78" + OUTER[1][1:]), id="text for bytes"),
        pytest.param(_with_element(5, cbor2.dumps(2)), id="unknown version"),
        pytest.param(_with_element(2, cbor2.dumps(21_000_000 * 10**8 + 1)), id="more money than there is"),
        pytest.param(_with_element(2, b"\x20"), id="negative value"),
        pytest.param(_with_element(11, cbor2.dumps(2**256)), id="work of 257 bits"),
        pytest.param(_with_element(4, cbor2.dumps([bytes(32)] * 17)), id="17 levels of merkle branch"),
        pytest.param(_with_element(4, cbor2.dumps([bytes(31)])), id="branch of 31 bytes"),
        pytest.param(_with_element(1, cbor2.dumps(bip34_push(100) + bytes(99))), id="101 bytes of script"),
        pytest.param(_with_element(1, cbor2.dumps(b"\x51")), id="1 byte of script"),
        pytest.param(_with_element(12, cbor2.dumps(b"\x52\x20" + bytes(32))), id="witness version 2"),
        pytest.param(_with_element(7, cbor2.dumps([bytes(32)] * 600)), id="above 16 KiB"),
    ],
)
def test_r1_any_other_form_is_refused(raw: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_share(raw)
    assert caught.value.rule == "R1"


# -- strangers -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_decode_errors(raw: bytes) -> None:
    _decodes_or_refuses(raw)
    for position in (0, 4, 5, 7, 13):
        _decodes_or_refuses(_with_element(position, raw))


#: Anything that cbor2 can write.
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**300), 2**300)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20)
    | st.just(cbor2.undefined)
    | st.integers(0, 255).filter(lambda value: not 20 <= value < 32).map(cbor2.CBORSimpleValue)
    | st.uuids()
    | st.ip_addresses()
    | st.decimals()
    | st.fractions()
    | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(st.integers() | st.binary(max_size=3), inner, max_size=5)
        | st.builds(cbor2.CBORTag, st.integers(0, 2**64 - 1), inner)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(value=anything, position=st.integers(0, 13))
@example(value=math.nan, position=2)
@example(value=decimal.Decimal("NaN"), position=2)
@example(value=fractions.Fraction(1, 3), position=2)
def test_any_object_in_place_of_an_element_raises_only_decode_errors(value: object, position: int) -> None:
    _decodes_or_refuses(_with_element(position, cbor2.dumps(value)))


@pytest.mark.slow
@given(value=anything)
def test_any_object_in_place_of_a_share_raises_only_decode_errors(value: object) -> None:
    raw = cbor2.dumps(value)
    _decodes_or_refuses(raw)
    _decodes_or_refuses(b"\x86" + raw * 6)
    _decodes_or_refuses(b"\x86" + raw * 5 + b"\x89" + raw * 9)


@pytest.mark.slow
@given(number=st.integers(0, 300), value=anything, position=st.integers(0, 13))
def test_any_tag_on_any_element_raises_only_decode_errors(number: int, value: object, position: int) -> None:
    _decodes_or_refuses(_with_element(position, _tag(number, cbor2.dumps(value))))


HOSTILE = {
    "bignum of 16 kbit": cbor2.dumps(2**16_000),
    "negative bignum of 16 kbit": cbor2.dumps(-(2**16_000)),
    "bignum in a list": cbor2.dumps([2**16_000]),
    "bignum in a map": cbor2.dumps({2**16_000: 1}),
    "bignum in an unknown tag": _tag(99, cbor2.dumps(2**16_000)),
    "array of 2^63 elements": b"\x9b\x7f" + b"\xff" * 7,
    "array of 2^64 elements": b"\x9b" + b"\xff" * 8,
    "array of 2^31 elements": b"\x9a\x7f\xff\xff\xff",
    "map of 2^63 entries": b"\xbb\x7f" + b"\xff" * 7,
    "string of 2^63 bytes": b"\x5b\x7f" + b"\xff" * 7,
    "string of 2^31 bytes": b"\x5a\x7f\xff\xff\xff",
    "text of 2^31 bytes": b"\x7a\x7f\xff\xff\xff",
    "text that is not UTF-8": b"\x62\xff\xff",
    "time beyond all calendars": _tag(1, cbor2.dumps(2**62)),
    "time of infinity": _tag(1, cbor2.dumps(math.inf)),
    "time of NaN": _tag(1, cbor2.dumps(math.nan)),
    "date that is none": _tag(0, cbor2.dumps("2020-13-40T00:00:00Z")),
    "day far away": _tag(100, cbor2.dumps(2**40)),
    "decimal with a huge exponent": _tag(4, cbor2.dumps([2**62, 5])),
    "float with a huge exponent": _tag(5, cbor2.dumps([2**62, 5])),
    "float with a large exponent": _tag(5, cbor2.dumps([10**6, 2**300])),
    "rational over zero": _tag(30, cbor2.dumps([1, 0])),
    "rational of a bignum": _tag(30, cbor2.dumps([2**16_000, 3])),
    "regular expression that is none": _tag(35, cbor2.dumps("(")),
    "regular expression of depth 300": _tag(35, cbor2.dumps("(" * 300)),
    "mail that is none": _tag(36, cbor2.dumps(b"\xff")),
    "uuid of one byte": _tag(37, cbor2.dumps(b"a")),
    "address that is none": _tag(260, cbor2.dumps(b"abc")),
    "network that is none": _tag(261, cbor2.dumps({b"abc": 300})),
    "set of lists": _tag(258, cbor2.dumps([[1]])),
    "list that holds itself": _tag(28, b"\x81" + _tag(29, b"\x00")),
    "reference to nothing": _tag(29, b"\x05"),
    "string reference to nothing": _tag(25, b"\x05"),
    "map with an unhashable key": b"\xa1\x80\x00",
    "map with a key twice": b"\xa2\x01\x02\x01\x03",
    "nesting of 5,000": b"\x81" * 5_000 + b"\x00",
    "tags of 5,000": b"\xc6" * 5_000 + b"\x00",
    "break": b"\xff",
    "signalling NaN": b"\xfb" + struct.pack(">Q", 0x7FF0000000000001),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_cbor_raises_only_decode_errors(name: str) -> None:
    for position in range(14):
        with pytest.raises(DecodeError):
            decode_share(_with_element(position, HOSTILE[name]))
    with pytest.raises(DecodeError):
        decode_share(HOSTILE[name])


# -- malleability ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_any_bit_flipped_it_is_invalid_or_another_share() -> None:
    chain = new_chain(FINE)
    grow(chain, 4)
    assert chain.tip is not None
    add(chain, mine(chain, chain.tip.parent, miner=9))
    assert VALID.data.parent == chain.tip.hash
    size = len(chain)
    for at in range(len(RAW)):
        for bit in (0, 3, 7):
            flipped = bytearray(RAW)
            flipped[at] ^= 1 << bit
            try:
                share = decode_share(bytes(flipped))
                assert share != VALID, "two encodings of one share"
                outcome = chain.accept(share, VALID.time)
            except (DecodeError, InvalidShare):
                continue
            if isinstance(outcome, Accepted):
                assert share.hash != VALID.hash, f"byte {at}, bit {bit}: other content joined under the same hash"
    assert VALID.hash not in chain
    assert chain.statistics().waiting > 0  # flipped parents and uncles wait for what nobody has
    assert len(chain) == size
    add(chain, VALID)


def test_the_commitment_covers_all_of_the_data_and_the_network() -> None:
    data = VALID.data
    changed = [
        replace(data, parent=bytes(32)),
        replace(data, uncles=()),
        replace(data, bits=data.bits - 1),
        replace(data, max_bits=data.max_bits - 1),
        replace(data, height=data.height + 1),
        replace(data, total_work=data.total_work + 1),
        replace(data, payout_script=miner_script(77)),
        replace(data, payout_class=47),
    ]
    commitments = {share_commitment(FINE.network_id, each) for each in [data, *changed]}
    assert len(commitments) == 1 + len(changed)
    assert share_commitment(bytes(8), data) not in commitments


# -- the pieces ------------------------------------------------------------------------------------------------

BOUNDARIES = sorted(
    {1, 2, 15, 16, 17, 2**31 - 1, 2**31 - 2} | {2**n + d for n in (7, 8, 15, 16, 23, 24, 30) for d in (-1, 0, 1)}
)


@pytest.mark.parametrize("height", BOUNDARIES)
def test_bip34_height_is_read_as_it_is_written(height: int) -> None:
    push = bip34_push(height)
    assert bip34_height(push + b"tag") == height
    assert bip34_height(push + b"\x00") == height


def test_bip34_height_is_written_as_bitcoin_core_does() -> None:
    assert bip34_push(1) == b"\x51"
    assert bip34_push(16) == b"\x60"
    assert bip34_push(17) == b"\x01\x11"
    assert bip34_push(127) == b"\x01\x7f"
    assert bip34_push(128) == b"\x02\x80\x00"
    assert bip34_push(227_931) == bytes.fromhex("035b7a03")
    assert bip34_push(2**23) == bytes.fromhex("0400008000")
    assert bip34_push(2**31 - 1) == bytes.fromhex("04ffffff7f")


@pytest.mark.parametrize("height", [0, -1, 2**31])
def test_bip34_height_out_of_range_is_not_written(height: int) -> None:
    with pytest.raises(ValueError, match="not from 1 to"):
        bip34_push(height)


@pytest.mark.parametrize(
    "script",
    ["00ff", "0110", "0201", "02ff80", "021100", "03ffff", "0500000000ff", "4f00", "6100", "01ff", "0100"],
)
def test_bip34_height_in_another_form_is_refused(script: str) -> None:
    with pytest.raises(DecodeError):
        bip34_height(bytes.fromhex(script))


@given(st.binary(min_size=2, max_size=8))
def test_bip34_has_one_form_of_each_height(script: bytes) -> None:
    with suppress(DecodeError):
        assert script.startswith(bip34_push(bip34_height(script)))


def test_r1_all_five_payout_script_types_and_no_other() -> None:
    for number in range(5):
        script = miner_script(number)
        assert is_payout_script(script)
        assert not is_payout_script(script[:-1])
        assert not is_payout_script(script + b"\x00")
        assert not is_payout_script(b"\x6a" + script[1:])
    assert not is_payout_script(b"")
    assert not is_payout_script(b"\x51\x02\x4e\x73")


def test_the_header_takes_rolled_versions_signed_or_not() -> None:
    for version in (0x20000000, -1, 0xFFFFFFFF, 0x80000000, -(2**31)):
        raw = pack_header(
            version=version, previous_block_hash=NULL_HASH, merkle_root=NULL_HASH, time=0, bits=0, nonce=0
        )
        assert int.from_bytes(raw[:4], "little") == version & 0xFFFFFFFF
