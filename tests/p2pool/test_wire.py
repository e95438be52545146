"""The messages of the wire: one form each, and nothing that a peer can send costs much or raises anything else."""

from __future__ import annotations

import tracemalloc
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.errors import PeerError
from p2pool.p2p import wire
from p2pool.p2p.wire import (
    MAX_FRAME,
    Announce,
    Blocks,
    BlocksAfter,
    GetBlocks,
    GetHeaders,
    GetPeers,
    GetShares,
    Headers,
    Locate,
    Located,
    Peers,
    Refused,
    Shares,
    Status,
    Transactions,
    Wanted,
    decode_gossip,
    decode_message,
    encode_gossip,
    encode_message,
)
from sharechain.share import MAX_SHARE_SIZE
from tests.builders import mine, new_chain

KINDS: tuple[type[Any], ...] = (
    *(Status, Locate, Located, GetShares, Shares, GetPeers, Peers),
    *(Announce, Wanted, Transactions, BlocksAfter, GetBlocks, Blocks, GetHeaders, Headers, Refused),
)
HASH = st.binary(min_size=32, max_size=32)
TEXT = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=64)
POSITION = st.integers(0, wire.MAX_TRANSACTIONS)
PLACED = st.lists(st.tuples(POSITION, st.binary(min_size=60, max_size=300)), max_size=4).map(tuple)


def some(item: st.SearchStrategy[Any], most: int = 5) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(item, max_size=most).map(tuple)


MESSAGES: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        Status,
        tip=HASH,
        height=st.integers(0, 2**48),
        total_work=st.integers(0, 2**256 - 1),
        listen_port=st.integers(0, 65535),
        block_hash=HASH,
        block_height=st.integers(0, 2**31),
        software=TEXT,
    ),
    st.builds(Locate, locator=some(HASH)),
    st.builds(Located, hashes=some(HASH), identities=some(HASH)),
    st.builds(GetBlocks, hashes=some(HASH)),
    st.builds(GetShares, hashes=some(HASH)),
    st.builds(Shares, shares=some(st.none() | st.binary(min_size=1, max_size=300))),
    st.builds(GetPeers),
    st.builds(Peers, addresses=some(TEXT)),
    st.builds(
        Announce,
        header=st.binary(min_size=80, max_size=80),
        coinbase=st.binary(min_size=60, max_size=300),
        wtxids=some(HASH),
        included=PLACED,
    ),
    st.builds(Wanted, positions=some(POSITION)),
    st.builds(Transactions, block_hash=HASH, transactions=PLACED),
    st.builds(BlocksAfter, locator=some(HASH)),
    st.builds(Blocks, blocks=some(st.binary(min_size=81, max_size=300))),
    st.builds(GetHeaders, hashes=some(HASH)),
    st.builds(Headers, headers=some(st.none() | st.binary(min_size=80, max_size=80))),
    st.builds(Refused, reason=TEXT),
)


def judge(raw: bytes, *kinds: type[Any]) -> Any:
    """What ``raw`` says, which must encode to it again; None if it is refused with the one error that there is."""
    try:
        message = decode_message(raw, *kinds)
    except PeerError as error:
        if error.rule != "message":
            raise
        return None
    assert type(message) in kinds
    assert encode_message(message) == raw
    return message


@pytest.mark.slow
@given(message=MESSAGES)
def test_every_message_comes_back_as_it_was_sent(message: Any) -> None:
    raw = encode_message(message)
    assert decode_message(raw, type(message)) == message
    assert judge(raw, *KINDS) == message
    others = [kind for kind in KINDS if kind is not type(message)]
    assert judge(raw, *others) is None


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    judge(raw, *KINDS)


#: What an array after a version and a kind can hold, whole CBOR included: tags, floats, maps, odd lengths.
CBOR = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.builds(cbor2.CBORTag, st.sampled_from([0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 256, 258]), inner)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(kind=st.sampled_from([*wire._KINDS, 1, 99]), fields=st.lists(CBOR, max_size=8))
def test_any_cbor_is_a_message_or_refused(kind: int, fields: list[Any]) -> None:
    try:
        raw = cbor2.dumps([1, kind, *fields])
    except (cbor2.CBOREncodeError, ValueError, TypeError, OverflowError):
        return  # a tag that the encoder does not write
    judge(raw, *KINDS)


@pytest.mark.slow
@given(message=MESSAGES, data=st.data())
def test_a_message_with_a_changed_byte_is_another_or_refused(message: Any, data: st.DataObject) -> None:
    raw = encode_message(message)
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))
    assert judge(raw[:at] + bytes([byte]) + raw[at + 1 :], *KINDS) != message


@pytest.mark.slow
@given(message=MESSAGES, data=st.data())
def test_a_message_cut_or_extended_is_refused(message: Any, data: st.DataObject) -> None:
    raw = encode_message(message)
    assert judge(raw[: data.draw(st.integers(0, len(raw) - 1))], *KINDS) is None
    assert judge(raw + data.draw(st.binary(min_size=1, max_size=5)), *KINDS) is None


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_gossip_or_refused(raw: bytes) -> None:
    judge_gossip(raw)


def judge_gossip(raw: bytes) -> tuple[bytes, ...] | None:
    try:
        shares = decode_gossip(raw)
    except PeerError as error:
        if error.rule != "message":
            raise
        return None
    assert encode_gossip(shares) == raw
    return shares


@pytest.mark.slow
@given(shares=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), data=st.data())
def test_gossip_comes_back_as_it_was_sent_and_no_other_way(shares: list[bytes], data: st.DataObject) -> None:
    raw = encode_gossip(shares)
    assert decode_gossip(raw) == tuple(shares)
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))
    assert judge_gossip(raw[:at] + bytes([byte]) + raw[at + 1 :]) != tuple(shares)
    assert judge_gossip(raw[:at]) is None
    assert judge_gossip(raw + b"\x00") is None


@pytest.mark.parametrize(
    "shares",
    [[], [b""], [b"x"] * 5, [bytes(MAX_SHARE_SIZE + 1)], [bytes(MAX_SHARE_SIZE)] * 4],
    ids=["none", "empty", "five", "a large one", "too much in all"],
)
def test_gossip_out_of_shape_is_refused(shares: list[bytes]) -> None:
    assert judge_gossip(encode_gossip(shares)) is None


def test_gossip_may_hold_real_shares() -> None:
    share = mine(new_chain(), None)
    assert decode_gossip(encode_gossip([share.encoded] * 4)) == (share.encoded,) * 4


@pytest.mark.parametrize(
    "field",
    [
        b"\x9b" + b"\xff" * 8,
        b"\x9a\x7f\xff\xff\xff",
        b"\x5b" + b"\xff" * 8,
        b"\x5a\x7f\xff\xff\xff",
        b"\x7b\x7f" + b"\xff" * 7,
        b"\xbb" + b"\xff" * 8,
        b"\x9f\xff",
        b"\x5f\x41a\xff",
        b"\xff",
        b"\x1c",
        b"\x81" * 2_000,
        b"\xc1" * 2_000,
        b"\xc2" * 2_000 + b"\x41a",
        b"\xc2\x41a",
        b"\xc2\x42\x00\x01",
        b"\xc3\x49" + b"\xff" * 9,
        b"\xc4\x82\x1a\x7f\xff\xff\xff\x01",
        b"\xc5\x82\x1a\x7f\xff\xff\xff\x01",
        b"\xd8\x1e\x82\x01\x00",
        b"\xd8\x23\x72(a+)+(b+)+(((((((((",
        b"\xd8\x1c\x81\xd8\x1d\x00",
        b"\xd9\x01\x00\x82\x43aaa\xd8\x19\x00",
        b"\xd9\x01\x02\x82\x80\x80",
        b"\xa1\x80\x80",
        b"\xa2\x01\x02\x01\x03",
        b"\xf9\x7e\x00",
        b"\xfb\x7f\xf0\x00\x00\x00\x00\x00\x00",
        b"\xf7",
        b"\xf5",
        b"\x20",
        b"\x63\xed\xa0\x80",
        b"\x62\xff\xff",
        b"\x98\x00",
        b"\x81\x58\x01a",
    ],
    ids=lambda field: field[:8].hex(),
)
@pytest.mark.parametrize("kind", [11, 21, 31, 91])
def test_odd_cbor_is_refused(kind: int, field: bytes) -> None:
    assert judge(cbor2.dumps([1, kind, 0])[:-1] + field, *KINDS) is None


BOMBS = [
    pytest.param(b"\x80", id="arrays"),
    pytest.param(b"\xa0", id="maps"),
    pytest.param(b"\x40", id="bytes"),
    pytest.param(b"\xf6", id="nulls"),
    pytest.param(b"\x82\x80\x80", id="pairs"),
    pytest.param(b"\x19\x10\x11", id="integers"),
    pytest.param(b"\xf9\x10\x11", id="floats"),
    pytest.param(b"\xc2\x41\x01", id="tags"),
]


def weigh(raw: bytes, *kinds: type[Any]) -> int:
    """Bytes that it takes at most to refuse a frame."""
    tracemalloc.start()
    try:
        with pytest.raises(PeerError) as caught:
            decode_message(raw, *kinds)
        assert caught.value.rule == "message"
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("item", BOMBS)
@pytest.mark.parametrize(
    ("kinds", "protocol", "answer"),
    [
        ((Status, Locate, GetShares, GetPeers), "sync/1", False),
        ((Located,), "sync/1", True),
        ((Shares,), "sync/1", True),
        ((Announce, Transactions, BlocksAfter), "block/1", False),
        ((Blocks, Refused), "block/1", True),
        ((Headers, Refused), "block/1", True),
    ],
    ids=["requests", "located", "shares", "block requests", "blocks", "headers"],
)
@pytest.mark.parametrize("kind", [20, 21, 40, 50, 61])
def test_a_full_frame_of_many_things_is_refused_before_they_are_made(
    kinds: tuple[type[Any], ...], protocol: str, answer: bool, kind: int, item: bytes
) -> None:
    count = (MAX_FRAME[protocol][answer] - 16) // len(item)
    head = cbor2.dumps([1, kind, 0])[:-1]
    assert weigh(head + b"\x9a" + count.to_bytes(4, "big") + item * count, *kinds) < 100_000


def test_things_in_many_small_arrays_are_counted_together() -> None:
    hundred = b"\x98\x64" + b"\x80" * 100
    count = 30 * 1024 // len(hundred)
    raw = cbor2.dumps([1, 20, 0])[:-1] + b"\x99" + count.to_bytes(2, "big") + hundred * count
    assert weigh(raw, Status, Locate, GetShares, GetPeers) < 100_000


HASHES = tuple(number.to_bytes(32, "big") for number in range(wire.MAX_TRANSACTIONS))
LARGEST = [
    pytest.param(GetShares(hashes=HASHES[: wire.MAX_SHARES]), "sync/1", False, id="get shares"),
    pytest.param(Locate(locator=HASHES[: wire.MAX_LOCATOR]), "sync/1", False, id="locate"),
    pytest.param(
        Located(hashes=HASHES[: wire.MAX_LOCATED], identities=HASHES[: wire.MAX_LOCATED]), "sync/1", True, id="located"
    ),
    pytest.param(
        Shares(shares=(bytes(wire.MAX_SHARES_SIZE // wire.MAX_SHARES),) * wire.MAX_SHARES), "sync/1", True, id="shares"
    ),
    pytest.param(
        Shares(shares=(bytes(MAX_SHARE_SIZE),) * (wire.MAX_SHARES_SIZE // MAX_SHARE_SIZE)), "sync/1", True, id="heavy"
    ),
    pytest.param(Peers(addresses=("\u00fc" * wire.MAX_ADDRESS,) * wire.MAX_PEERS), "sync/1", True, id="peers"),
    pytest.param(
        Announce(header=bytes(80), coinbase=bytes(wire.MAX_COINBASE), wtxids=HASHES, included=()),
        "block/1",
        False,
        id="announce",
    ),
    pytest.param(
        Announce(
            header=bytes(80),
            coinbase=bytes(60),
            wtxids=HASHES,
            included=tuple((number, bytes(60)) for number in range(len(HASHES))),
        ),
        "block/1",
        False,
        id="announce all",
        marks=pytest.mark.slow,
    ),
    pytest.param(Wanted(positions=tuple(range(wire.MAX_TRANSACTIONS))), "block/1", True, id="wanted"),
    pytest.param(
        Transactions(block_hash=bytes(32), transactions=((0, bytes(wire.MAX_BLOCK_SIZE)),)),
        "block/1",
        False,
        id="one transaction",
    ),
    pytest.param(
        Transactions(block_hash=bytes(32), transactions=tuple((n, bytes(240)) for n in range(len(HASHES)))),
        "block/1",
        False,
        id="all transactions",
        marks=pytest.mark.slow,
    ),
    pytest.param(Blocks(blocks=(bytes(wire.MAX_BLOCK_SIZE),)), "block/1", True, id="a block"),
    pytest.param(Blocks(blocks=(bytes(500),) * wire.MAX_BLOCKS), "block/1", True, id="blocks"),
    pytest.param(BlocksAfter(locator=HASHES[: wire.MAX_LOCATOR]), "block/1", False, id="blocks after"),
    pytest.param(GetHeaders(hashes=HASHES[: wire.MAX_HEADERS]), "block/1", False, id="get headers"),
    pytest.param(Headers(headers=(bytes(80),) * wire.MAX_HEADERS), "block/1", True, id="headers"),
]


@pytest.mark.parametrize(("message", "protocol", "answer"), LARGEST)
def test_the_largest_message_of_each_kind_fits_its_frame(message: Any, protocol: str, answer: bool) -> None:
    raw = encode_message(message)
    assert len(raw) <= MAX_FRAME[protocol][answer]
    assert decode_message(raw, type(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        GetShares(hashes=HASHES[: wire.MAX_SHARES + 1]),
        Locate(locator=HASHES[: wire.MAX_LOCATOR + 1]),
        Located(hashes=HASHES[: wire.MAX_LOCATED + 1], identities=()),
        Located(hashes=(bytes(31),), identities=()),
        Located(hashes=(), identities=(bytes(31),)),
        GetBlocks(hashes=HASHES[: wire.MAX_GET_BLOCKS + 1]),
        Shares(shares=(None,) * (wire.MAX_SHARES + 1)),
        Shares(shares=(b"",)),
        Shares(shares=(bytes(MAX_SHARE_SIZE + 1),)),
        Peers(addresses=("a",) * (wire.MAX_PEERS + 1)),
        Peers(addresses=("a" * (wire.MAX_ADDRESS + 1),)),
        Peers(addresses=("a\nb",)),
        Refused(reason="\u202e"),
        Refused(reason="a" * 201),
        Wanted(positions=(-1,)),
        Wanted(positions=(True,)),
        Wanted(positions=(wire.MAX_TRANSACTIONS + 1,)),
        Transactions(block_hash=bytes(32), transactions=((0, bytes(59)),)),
        Announce(header=bytes(81), coinbase=bytes(60), wtxids=(), included=()),
        Blocks(blocks=(bytes(80),)),
        GetHeaders(hashes=HASHES[: wire.MAX_HEADERS + 1]),
        GetHeaders(hashes=(bytes(31),)),
        Headers(headers=(None,) * (wire.MAX_HEADERS + 1)),
        Headers(headers=(bytes(79),)),
        Headers(headers=(bytes(81),)),
        Headers(headers=(b"",)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_field_beyond_its_limit_is_refused(message: Any) -> None:
    assert judge(encode_message(message), *KINDS) is None


def test_another_version_is_refused() -> None:
    assert judge(cbor2.dumps([2, 30]), *KINDS) is None
    assert judge(cbor2.dumps([True, 30]), *KINDS) is None
    assert judge(cbor2.dumps([1]), *KINDS) is None
    assert judge(cbor2.dumps([1, True]), *KINDS) is None
    assert judge_gossip(cbor2.dumps([2, [b"x"]])) is None
