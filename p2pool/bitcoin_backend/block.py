"""Whole blocks of the past, as an audit reads them: from a file or from a Bitcoin node.

Pure, and slow but sure: the transactions are read by none of our own codecs.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError, VarIntSerializer

from p2pool.bitcoin_backend import BlockReader
from p2pool.errors import BackendError, ConfigError
from sharechain.errors import DecodeError
from sharechain.hasher import sha256d
from sharechain.share import bip34_height

__all__ = ["BitcoinBlock", "check_wanted", "find_block", "read_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitcoinBlock:
    """What an audit reads of a whole Bitcoin block. Hashes are 32 bytes in internal order."""

    hash: bytes
    #: 80 bytes.
    header: bytes
    #: Of the coinbase's input.
    coinbase_script: bytes
    #: (script, sat) of the coinbase.
    outputs: tuple[tuple[bytes, int], ...]
    #: The only item of the coinbase's witness (BIP141), or None.
    reserved: bytes | None
    #: Of all transactions, the coinbase's first; without and with their witnesses.
    txids: tuple[bytes, ...]
    wtxids: tuple[bytes, ...]

    @property
    def time(self) -> int:
        """The header's time, Unix seconds."""
        return int.from_bytes(self.header[68:72], "little")

    @property
    def height(self) -> int | None:
        """The height that the coinbase's script begins with (BIP34), or None."""
        try:
            return bip34_height(self.coinbase_script)
        except (DecodeError, IndexError):
            return None


def read_block(raw: bytes) -> BitcoinBlock:
    """Read a whole block: as bytes, or as the hexadecimal text that ``bitcoin-cli getblock HASH 0`` prints.

    Raises:
        ConfigError: it is not exactly one block.
    """
    text = raw.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]+", text) and len(text) % 2 == 0:
        raw = bytes.fromhex(text.decode("ascii"))
    stream = io.BytesIO(raw)
    stream.seek(80)
    try:
        count = VarIntSerializer.stream_deserialize(stream)
        transactions: list[CTransaction] = []
        while len(transactions) < count:
            transactions.append(CTransaction.stream_deserialize(stream))
        written = VarIntSerializer.serialize(count) + b"".join(one.serialize() for one in transactions)
    except (SerializationError, ValueError, struct.error) as error:
        raise ConfigError(f"these {len(raw):,} bytes are no Bitcoin block: {error}") from None
    if raw[80:] != written or not transactions or not transactions[0].is_coinbase():
        raise ConfigError(f"these {len(raw):,} bytes are not exactly one Bitcoin block")
    txids = tuple(one.GetTxid() for one in transactions)
    if len(set(txids)) < len(txids):  # the same merkle root as without the second: CVE-2012-2459
        raise ConfigError(f"these {len(raw):,} bytes are no Bitcoin block: a transaction is there twice")
    coinbase = transactions[0]
    witness = [item for each in coinbase.wit.vtxinwit for item in each.scriptWitness.stack]
    return BitcoinBlock(
        hash=sha256d(raw[:80]),
        header=raw[:80],
        coinbase_script=bytes(coinbase.vin[0].scriptSig),
        outputs=tuple((bytes(output.scriptPubKey), output.nValue) for output in coinbase.vout),
        reserved=witness[0] if len(witness) == 1 and len(witness[0]) == 32 else None,
        txids=txids,
        wtxids=tuple(one.GetHash() for one in transactions),
    )


async def find_block(reader: BlockReader, wanted: str) -> tuple[BitcoinBlock, bool]:
    """Fetch a block from a Bitcoin node.

    Args:
        reader: the node.
        wanted: a block hash as displayed, or a height of the node's best chain.

    Returns:
        The block, and whether it is in the node's best chain.

    Raises:
        BackendError: the node does not have it.
        ConfigError: neither a hash nor a height.
    """
    block_hash: bytes | None
    if re.fullmatch(r"[0-9A-Fa-f]{64}", wanted):
        block_hash = bytes.fromhex(wanted)[::-1]
    elif re.fullmatch(r"[0-9]{1,9}", wanted):
        block_hash = await reader.block_hash_at(int(wanted))
        if block_hash is None:
            raise BackendError(f"the Bitcoin node's chain does not reach height {wanted}")
    else:
        raise ConfigError(f"a block hash (64 hexadecimal digits) or a height is needed, got {wanted[:80]!r}")
    raw = await reader.block(block_hash)
    if raw is None:
        raise BackendError(
            f"the Bitcoin node does not have block {block_hash[::-1].hex()} (unknown, or pruned away): "
            "get it elsewhere and give it with --block FILE"
        )
    block = read_block(raw)
    height = int(wanted) if len(wanted) < 64 else block.height
    on_chain = height is not None and await reader.block_hash_at(height) == block.hash
    return block, on_chain


def check_wanted(block: BitcoinBlock, wanted: str | None) -> None:
    """Compare a block from a file with the hash or the height that was asked for; None is content with any.

    Raises:
        ConfigError: it is another block.
    """
    if wanted is not None and wanted.lower() != block.hash[::-1].hex() and wanted != str(block.height):
        raise ConfigError(f"--block: {wanted[:80]} was asked for, the file holds {block.hash[::-1].hex()}")
