"""The share: a Bitcoin header that meets the share target, with what a peer needs to check it, and no more.

One encoding, canonical CBOR, for the wire, the store and the commitment: decoding encodes again and compares,
so that nothing that proof of work does not cover can be changed without making another share or an invalid one.
All hashes are 32 bytes in internal order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Final

import cbor2

from sharechain.cbor import decode_cbor
from sharechain.errors import DecodeError, show_value
from sharechain.hasher import sha256d
from sharechain.params import MAX_MONEY
from sharechain.tagged import tagged_hash

__all__ = [
    "MAX_SHARE_SIZE",
    "NULL_HASH",
    "SHARE_VERSION",
    "Share",
    "ShareData",
    "bip34_height",
    "bip34_push",
    "decode_share",
    "encode_share",
    "is_payout_script",
    "share_commitment",
    "share_id",
]

#: Bytes. Of a whole encoded share (R1).
MAX_SHARE_SIZE: Final = 16 * 1024
#: Hashes. 2^16 transactions are more than a block can hold.
MAX_BRANCH: Final = 16
#: Elements of a share's arrays together: its own, the branch's, those of ``data``, 100 uncles, and a large integer.
MAX_ITEMS: Final = 6 + MAX_BRANCH + 9 + 100 + 1
#: The only version of ``data`` that there is.
SHARE_VERSION: Final = 1
#: The parent of a chain's first share.
NULL_HASH: Final = bytes(32)

_HEADER: Final = struct.Struct("<i32s32sIII")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareData:
    """A share's own data: what the commitment in its coinbase covers."""

    version: int
    #: Hash of the share that this one builds on; ``NULL_HASH`` for the first of a chain.
    parent: bytes
    #: Hashes of the uncles that this share names, ascending.
    uncles: tuple[bytes, ...]
    #: Compact share target that the header meets: the miner's choice, no easier than R8 allows.
    bits: int
    #: Compact share target that the chain asks for (R7).
    max_bits: int
    #: 0 for the first share of a chain.
    height: int
    #: Work of this share, its ancestors and all uncles that they name.
    total_work: int
    #: scriptPubKey of the miner.
    payout_script: bytes
    #: How many window payouts the coinbase may have.
    payout_class: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A whole share. The coinbase is not in it: every peer rebuilds it from its own window (R10)."""

    #: 80 bytes.
    header: bytes
    #: The coinbase input's script, 2 to 100 bytes: BIP34 height, tag, extranonces.
    coinbase_script: bytes
    #: Sat. What the coinbase pays in all.
    coinbase_value: int
    #: 32 bytes (BIP141), or None if the block commits to no witness.
    witness_commitment: bytes | None
    #: From the coinbase's txid to the header's merkle root.
    merkle_branch: tuple[bytes, ...]
    data: ShareData
    #: The share's identity: its block hash.
    hash: bytes = field(init=False, compare=False)
    #: Of the header's Bitcoin block (BIP34).
    block_height: int = field(init=False, compare=False)
    #: Canonical CBOR: what goes over the wire and into the store.
    encoded: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the shape, nothing contextual.

        Raises:
            DecodeError: a field is of the wrong type, length or range.
        """
        _check_shape(self)
        object.__setattr__(self, "hash", sha256d(self.header))
        object.__setattr__(self, "block_height", bip34_height(self.coinbase_script))
        object.__setattr__(self, "encoded", _encode(self))

    @property
    def previous_block_hash(self) -> bytes:
        """The header's Bitcoin parent."""
        return self.header[4:36]

    @property
    def merkle_root(self) -> bytes:
        """The header's merkle root."""
        return self.header[36:68]

    @property
    def time(self) -> int:
        """The header's time, Unix seconds."""
        return int.from_bytes(self.header[68:72], "little")

    @property
    def block_bits(self) -> int:
        """The header's compact Bitcoin target."""
        return int.from_bytes(self.header[72:76], "little")

    @property
    def hash_value(self) -> int:
        """The hash as the number that is compared with targets."""
        return int.from_bytes(self.hash, "little")


def encode_data(data: ShareData) -> list[object]:
    """The share's own data as the array that is encoded and committed to."""
    return [
        data.version,
        data.parent,
        list(data.uncles),
        data.bits,
        data.max_bits,
        data.height,
        data.total_work,
        data.payout_script,
        data.payout_class,
    ]


def encode_share(share: Share) -> bytes:
    """Canonical CBOR of a share."""
    return share.encoded


def decode_share(raw: bytes) -> Share:
    """Read a share from untrusted bytes.

    Raises:
        DecodeError: rule R1: too large, not canonical CBOR, or a field out of shape.
    """
    if len(raw) > MAX_SHARE_SIZE:
        raise DecodeError(f"a share has at most {MAX_SHARE_SIZE} bytes, got {len(raw)}")
    values: Any = decode_cbor(raw, most_items=MAX_ITEMS, max_depth=4)
    if type(values) is not list or len(values) != 6:
        raise DecodeError("a share is an array of 6")
    header, coinbase_script, coinbase_value, witness_commitment, branch, data = values
    if type(branch) is not list or type(data) is not list or len(data) != 9 or type(data[2]) is not list:
        raise DecodeError("merkle branch, data and uncles are arrays; data has 9 elements")
    share = Share(
        header=header,
        coinbase_script=coinbase_script,
        coinbase_value=coinbase_value,
        witness_commitment=witness_commitment,
        merkle_branch=tuple(branch),
        data=ShareData(
            version=data[0],
            parent=data[1],
            uncles=tuple(data[2]),
            bits=data[3],
            max_bits=data[4],
            height=data[5],
            total_work=data[6],
            payout_script=data[7],
            payout_class=data[8],
        ),
    )
    if share.encoded != raw:
        raise DecodeError("not the canonical encoding")
    return share


def share_id(raw: bytes) -> bytes:
    """What "seen" and "invalid" are remembered by: 32 bytes of the whole encoding.

    A share's hash only covers its header, so a forged body under a real header has the real share's hash; it
    must not poison it.
    """
    return sha256d(raw)


def share_commitment(network_id: bytes, data: ShareData) -> bytes:
    """The 32 bytes in the last output of the coinbase, which make proof of work cover ``data``."""
    return tagged_hash("p2pool/share", network_id + cbor2.dumps(encode_data(data)))


def pack_header(
    *, version: int, previous_block_hash: bytes, merkle_root: bytes, time: int, bits: int, nonce: int
) -> bytes:
    """The 80 bytes of a Bitcoin header. ``version`` is taken as 32 bits, signed or not."""
    signed = (version & 0xFFFFFFFF) - ((version & 0x80000000) << 1)
    return _HEADER.pack(signed, previous_block_hash, merkle_root, time, bits, nonce)


def is_payout_script(script: bytes) -> bool:
    """Whether a script is one of P2PKH, P2SH, P2WPKH, P2WSH and P2TR: types whose outputs every node relays."""
    size = len(script)
    if size == 22:
        return script[:2] == b"\x00\x14"
    if size == 34:
        return script[:2] in (b"\x00\x20", b"\x51\x20")
    if size == 25:
        return script[:3] == b"\x76\xa9\x14" and script[23:] == b"\x88\xac"
    return size == 23 and script[:2] == b"\xa9\x14" and script[22:] == b"\x87"


def bip34_push(height: int) -> bytes:
    """The start of a coinbase script: the block's height as Bitcoin Core writes and compares it.

    Args:
        height: 1 to 2^31 - 1.

    Source: BIP34; Bitcoin Core, ``CScript() << nHeight``.
    """
    if not 0 < height < 2**31:
        raise ValueError(f"block height {height} is not from 1 to 2^31 - 1")
    if height <= 16:
        return bytes([0x50 + height])
    number = height.to_bytes(height.bit_length() // 8 + 1, "little")  # a spare bit for the sign
    return bytes([len(number)]) + number


def bip34_height(coinbase_script: bytes) -> int:
    """The block height at the start of a coinbase script.

    Raises:
        DecodeError: the script does not start with a height as ``bip34_push`` writes it.
    """
    first = coinbase_script[0]
    if 0x51 <= first <= 0x60:
        return first - 0x50
    number = coinbase_script[1 : 1 + first]
    if not 1 <= first <= 4 or len(number) != first or number[-1] & 0x80:
        raise DecodeError("the coinbase script does not start with a block height")
    height = int.from_bytes(number, "little")
    if height <= 16 or len(number) != height.bit_length() // 8 + 1:
        raise DecodeError("the block height in the coinbase script is not minimally encoded")
    return height


def _encode(share: Share) -> bytes:
    # Arrays, byte strings and integers have one shortest form, which cbor2 writes with or without its (slower)
    # canonical mode.
    return cbor2.dumps(
        [
            share.header,
            share.coinbase_script,
            share.coinbase_value,
            share.witness_commitment,
            list(share.merkle_branch),
            encode_data(share.data),
        ]
    )


def _check_shape(share: Share) -> None:
    data = share.data
    _check_bytes("header", share.header, 80, 80)
    _check_bytes("coinbase_script", share.coinbase_script, 2, 100)
    _check_int("coinbase_value", share.coinbase_value, MAX_MONEY)
    if share.witness_commitment is not None:
        _check_bytes("witness_commitment", share.witness_commitment, 32, 32)
    if len(share.merkle_branch) > MAX_BRANCH:
        raise DecodeError(f"merkle_branch: at most {MAX_BRANCH} hashes, got {len(share.merkle_branch)}")
    if any(type(node) is not bytes or len(node) != 32 for node in share.merkle_branch):
        raise DecodeError("merkle_branch: hashes of 32 bytes are needed")
    _check_int("version", data.version, 0xFFFF)
    if data.version != SHARE_VERSION:
        raise DecodeError(f"version: {SHARE_VERSION} is known, got {show_value(data.version)}")
    _check_bytes("parent", data.parent, 32, 32)
    for uncle in data.uncles:
        _check_bytes("uncles", uncle, 32, 32)
    _check_int("bits", data.bits, 0xFFFFFFFF)
    _check_int("max_bits", data.max_bits, 0xFFFFFFFF)
    _check_int("height", data.height, 2**48)
    _check_int("total_work", data.total_work, 2**256 - 1)
    _check_int("payout_class", data.payout_class, 0xFFFF)
    _check_bytes("payout_script", data.payout_script, 22, 34)
    if not is_payout_script(data.payout_script):
        raise DecodeError("payout_script: one of P2PKH, P2SH, P2WPKH, P2WSH and P2TR is needed")


def _check_bytes(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not bytes or not least <= len(value) <= most:
        raise DecodeError(f"{name}: {least} to {most} bytes are needed, got {show_value(value)}")


def _check_int(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise DecodeError(f"{name}: an integer from 0 to {most} is needed, got {show_value(value)}")
