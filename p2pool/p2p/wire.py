"""The messages of the wire, and their bytes. Pure: bytes in, values or ``PeerError`` out.

Every message is a canonical CBOR array: the version of the protocol, the kind, the fields. A frame on a stream is such
an array behind its length (an unsigned varint, as libp2p writes lengths). Decoding encodes again and compares, so that
each message has one form. Sizes are checked before anything is decoded, and so is what the arrays hold: a frame of
the allowed size could otherwise be four million objects. ``docs/reference/wire.md`` has all of it in CDDL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from p2pool.errors import PeerError
from sharechain.cbor import decode_cbor
from sharechain.errors import DecodeError
from sharechain.share import MAX_SHARE_SIZE

__all__ = [
    "MAX_FRAME",
    "Announce",
    "Blocks",
    "BlocksAfter",
    "GetBlocks",
    "GetHeaders",
    "GetPeers",
    "GetShares",
    "Headers",
    "Locate",
    "Located",
    "Message",
    "Peers",
    "Refused",
    "Shares",
    "Status",
    "Transactions",
    "Wanted",
    "decode_gossip",
    "decode_message",
    "encode_gossip",
    "encode_message",
]

VERSION: Final = 1
#: Bytes of one frame, by protocol: (request, answer).
MAX_FRAME: Final = {"sync/1": (32 * 1024, 1_200 * 1024), "block/1": (4_200 * 1024, 4_200 * 1024)}
#: Bytes of one message of the topic: some shares.
MAX_GOSSIP: Final = 64 * 1024
#: Shares in one message of the topic.
MAX_GOSSIP_SHARES: Final = 4
#: Hashes in a locator: 10 and one for each doubling reach further than any history.
MAX_LOCATOR: Final = 64
#: Hashes in one answer to a locator.
MAX_LOCATED: Final = 1_000
#: Shares in one request.
MAX_SHARES: Final = 500
#: Bytes of shares, or blocks, in one answer: what does not fit is asked again. The first always fits.
MAX_SHARES_SIZE: Final = 1024 * 1024
#: Addresses in one answer, and bytes of each.
MAX_PEERS: Final = 32
MAX_ADDRESS: Final = 256
#: Transactions of a block: 4,000,000 weight units, and none has fewer than 60 bytes of 4 each.
MAX_TRANSACTIONS: Final = 16_666
MAX_BLOCK_SIZE: Final = 4_000_000
#: Whole blocks in one answer.
MAX_GET_BLOCKS: Final = 8
MAX_BLOCKS: Final = 2_000
#: Headers of blocks in one request, and its answer.
MAX_HEADERS: Final = 16
#: Bytes of a coinbase.
MAX_COINBASE: Final = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a node stands; the answer is another. Each side learns the other's."""

    #: Hash of the tip, and its height and total work; 32 zero bytes, 0 and 0 if there is no share.
    tip: bytes
    height: int
    total_work: int
    #: Where the node can be called at the address that it calls from; 0 if nowhere.
    listen_port: int
    #: Bitcoin's tip as this node sees it.
    block_hash: bytes
    block_height: int
    #: Name and version of the software, for people.
    software: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Locate:
    """Asks for the shares after the first one known of a locator (see ``Sharechain.locator``)."""

    locator: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Hashes in an order in which they can be accepted: parents and uncles first. Empty if there are none.

    Behind them as many identities of the same shares (``sharechain.share.share_id``): a hash tells a header, an
    identity the whole share, so that its body can be fetched from anybody.
    """

    hashes: tuple[bytes, ...]
    identities: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetShares:
    """Asks for shares."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The shares asked for, in that order, None for those that are not known; may end early to fit the frame."""

    shares: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetPeers:
    """Asks for addresses of other nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Whole multiaddrs of other nodes."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """A Bitcoin block was found. Answered by ``Wanted``."""

    #: 80 bytes.
    header: bytes
    #: With its witness if it has one.
    coinbase: bytes
    #: Of all other transactions, in block order.
    wtxids: tuple[bytes, ...]
    #: Some of the transactions: (position among the wtxids, raw).
    included: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Positions of the transactions that the answering node lacks; none if it has the block."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transactions:
    """Transactions of a block that was announced: (position, raw). Answered by ``Wanted``: what is lacking still."""

    block_hash: bytes
    transactions: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksAfter:
    """Asks for whole Bitcoin blocks after the first one known of a locator. For embedded Bitcoins, which have no
    network of their own; others answer ``Refused``.
    """

    locator: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetBlocks:
    """Asks for whole Bitcoin blocks by their hashes, on whatever branch. As ``BlocksAfter``."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Whole blocks, lowest first; as many as fit."""

    blocks: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetHeaders:
    """Asks for single headers of Bitcoin blocks by their hashes, on whatever branch. For Bitcoins that have a network
    of their own and may never have heard of a block that lost; embedded ones answer ``Refused``.
    """

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The headers asked for, as many and in that order; None for those that are not known."""

    headers: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The request was understood and is not served."""

    reason: str


Message = (
    Status
    | Locate
    | Located
    | GetShares
    | Shares
    | GetPeers
    | Peers
    | Announce
    | Wanted
    | Transactions
    | BlocksAfter
    | GetBlocks
    | Blocks
    | GetHeaders
    | Headers
    | Refused
)

#: Kind numbers; a request and its answer have the same tens.
_KINDS: Final[dict[int, type[Any]]] = {
    0: Status,
    10: Locate,
    11: Located,
    20: GetShares,
    21: Shares,
    30: GetPeers,
    31: Peers,
    40: Announce,
    41: Wanted,
    42: Transactions,
    50: BlocksAfter,
    51: Blocks,
    52: GetBlocks,
    60: GetHeaders,
    61: Headers,
    91: Refused,
}
_NUMBERS: Final = {kind: number for number, kind in _KINDS.items()}
#: What the arrays of a message hold in all, the outer one included: its longest list, and 16 for the fields.
_MAX_ITEMS: Final[dict[type[Any], int]] = {
    Locate: 16 + MAX_LOCATOR,
    Located: 16 + 2 * MAX_LOCATED,
    GetShares: 16 + MAX_SHARES,
    Shares: 16 + MAX_SHARES,
    Peers: 16 + MAX_PEERS,
    Announce: 16 + 4 * MAX_TRANSACTIONS,  # a hash each; a pair and its two each
    Wanted: 16 + MAX_TRANSACTIONS,
    Transactions: 16 + 3 * MAX_TRANSACTIONS,
    BlocksAfter: 16 + MAX_LOCATOR,
    GetBlocks: 16 + MAX_GET_BLOCKS,
    Blocks: 16 + MAX_BLOCKS,
    GetHeaders: 16 + MAX_HEADERS,
    Headers: 16 + MAX_HEADERS,
}


def encode_message(message: Message) -> bytes:
    """The bytes of a message, without the length before them."""
    fields = [_plain(getattr(message, name)) for name in message.__slots__]
    return cbor2.dumps([VERSION, _NUMBERS[type(message)], *fields])


def decode_message(raw: bytes, *kinds: type[Any]) -> Any:
    """Read a message from untrusted bytes.

    Args:
        raw: one frame without its length; the transport has checked its size.
        kinds: what is expected.

    Raises:
        PeerError: "message": not canonical CBOR, not one of the kinds, or a field out of shape.
    """
    values = _loads(raw, max((_MAX_ITEMS.get(kind, 16) for kind in kinds), default=16))
    if len(values) < 2 or type(values[1]) is not int or values[1] not in _KINDS:
        raise PeerError("message", "unknown kind")
    kind = _KINDS[values[1]]
    if kind not in kinds:
        raise PeerError("message", f"{kind.__name__} is not expected here")
    if len(values) - 2 != len(kind.__slots__):
        raise PeerError("message", f"{kind.__name__} has {len(kind.__slots__)} fields, got {len(values) - 2}")
    fields = dict(zip(kind.__slots__, values[2:], strict=True))
    for name, value in fields.items():
        fields[name] = _READERS[kind, name](f"{kind.__name__}.{name}", value)
    message = kind(**fields)
    if encode_message(message) != raw:
        raise PeerError("message", "not the canonical encoding")
    return message


def encode_gossip(shares: Sequence[bytes]) -> bytes:
    """A message of the topic: encoded shares."""
    return cbor2.dumps([VERSION, list(shares)])


def decode_gossip(raw: bytes) -> tuple[bytes, ...]:
    """The encoded shares of a message of the topic.

    Raises:
        PeerError: "message".
    """
    if len(raw) > MAX_GOSSIP:
        raise PeerError("message", f"a message of the topic has at most {MAX_GOSSIP} bytes, got {len(raw)}")
    values = _loads(raw, 2 + MAX_GOSSIP_SHARES)
    if len(values) != 2:
        raise PeerError("message", "a message of the topic has 2 elements")
    shares: tuple[bytes, ...] = _list_of(_bytes(1, MAX_SHARE_SIZE), MAX_GOSSIP_SHARES)("shares", values[1])
    if not shares or encode_gossip(shares) != raw:
        raise PeerError("message", "no share, or not the canonical encoding")
    return shares


def _loads(raw: bytes, most: int) -> list[Any]:
    try:
        values = decode_cbor(raw, most_items=most, max_depth=5)
    except DecodeError as error:
        raise PeerError("message", str(error)) from None
    if type(values) is not list or not values or type(values[0]) is not int:
        raise PeerError("message", "an array with a version first is needed")
    if values[0] != VERSION:
        raise PeerError("message", f"version {VERSION} is spoken here")
    return values


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if type(value) is tuple else value


def _bytes(least: int, most: int) -> Any:
    def read(name: str, value: object) -> bytes:
        if type(value) is not bytes or not least <= len(value) <= most:
            raise PeerError("message", f"{name}: {least} to {most} bytes are needed")
        return value

    return read


def _int(most: int) -> Any:
    def read(name: str, value: object) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise PeerError("message", f"{name}: an integer from 0 to {most} is needed")
        return value

    return read


def _text(most: int) -> Any:
    def read(name: str, value: object) -> str:
        if type(value) is not str or len(value) > most or not value.isprintable():
            raise PeerError("message", f"{name}: a printable text of at most {most} letters is needed")
        return value

    return read


def _list_of(item: Any, most: int) -> Any:
    def read(name: str, value: object) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > most:
            raise PeerError("message", f"{name}: an array of at most {most} is needed")
        return tuple(item(name, element) for element in value)

    return read


def _or_none(item: Any) -> Any:
    def read(name: str, value: object) -> Any:
        return None if value is None else item(name, value)

    return read


def _placed(name: str, value: object) -> tuple[int, bytes]:
    if type(value) is not list or len(value) != 2:
        raise PeerError("message", f"{name}: pairs of a position and a transaction are needed")
    return _int(MAX_TRANSACTIONS)(name, value[0]), _bytes(60, MAX_BLOCK_SIZE)(name, value[1])


_HASH: Final = _bytes(32, 32)
_HASHES: Final = _list_of(_HASH, MAX_LOCATED)
_READERS: Final[dict[tuple[type[Any], str], Any]] = {
    (Status, "tip"): _HASH,
    (Status, "height"): _int(2**48),
    (Status, "total_work"): _int(2**256 - 1),
    (Status, "listen_port"): _int(65535),
    (Status, "block_hash"): _HASH,
    (Status, "block_height"): _int(2**31),
    (Status, "software"): _text(64),
    (Locate, "locator"): _list_of(_HASH, MAX_LOCATOR),
    (Located, "hashes"): _HASHES,
    (Located, "identities"): _HASHES,
    (GetShares, "hashes"): _list_of(_HASH, MAX_SHARES),
    (Shares, "shares"): _list_of(_or_none(_bytes(1, MAX_SHARE_SIZE)), MAX_SHARES),
    (Peers, "addresses"): _list_of(_text(MAX_ADDRESS), MAX_PEERS),
    (Announce, "header"): _bytes(80, 80),
    (Announce, "coinbase"): _bytes(60, MAX_COINBASE),
    (Announce, "wtxids"): _list_of(_HASH, MAX_TRANSACTIONS),
    (Announce, "included"): _list_of(_placed, MAX_TRANSACTIONS),
    (Wanted, "positions"): _list_of(_int(MAX_TRANSACTIONS), MAX_TRANSACTIONS),
    (Transactions, "block_hash"): _HASH,
    (Transactions, "transactions"): _list_of(_placed, MAX_TRANSACTIONS),
    (BlocksAfter, "locator"): _list_of(_HASH, MAX_LOCATOR),
    (GetBlocks, "hashes"): _list_of(_HASH, MAX_GET_BLOCKS),
    (Blocks, "blocks"): _list_of(_bytes(81, MAX_BLOCK_SIZE), MAX_BLOCKS),
    (GetHeaders, "hashes"): _list_of(_HASH, MAX_HEADERS),
    (Headers, "headers"): _list_of(_or_none(_bytes(80, 80)), MAX_HEADERS),
    (Refused, "reason"): _text(200),
}
