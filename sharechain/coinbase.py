"""The coinbase transaction, byte by byte: built from a window by the miner and again by every peer.

    version 2 | one null input: script, sequence | window payouts | finder | witness commitment |
    share commitment | lock time 0

The script ends with the extranonces, so that the part before them is short; the payouts are the same bytes for
every miner of a payout class, so that the part behind them differs between miners in a few dozen bytes only.
"""

from __future__ import annotations

import struct
from typing import Final

from sharechain.hasher import fold_merkle, sha256d
from sharechain.payout import Payouts

__all__ = [
    "COINBASE_TAG",
    "build_coinbase",
    "coinbase_head",
    "coinbase_outputs",
    "coinbase_tail",
    "fold_coinbase",
]

#: Stands in the coinbase script behind the height: a courtesy to block explorers, not a rule.
COINBASE_TAG: Final = b"/p2pool/"

_HEAD: Final = struct.pack("<iB32sI", 2, 1, bytes(32), 0xFFFFFFFF)
_SEQUENCE: Final = b"\xff\xff\xff\xff"
_LOCK_TIME: Final = bytes(4)
#: OP_RETURN, push of 36 bytes, header of BIP141.
_WITNESS_COMMITMENT: Final = bytes.fromhex("6a24aa21a9ed")
#: OP_RETURN, push of 32 bytes.
_SHARE_COMMITMENT: Final = bytes.fromhex("6a20")


def coinbase_head(script_size: int) -> bytes:
    """What stands before the coinbase script, its length included."""
    return _HEAD + bytes([script_size])


def coinbase_outputs(
    payouts: Payouts, finder_script: bytes, witness_commitment: bytes | None, commitment: bytes
) -> bytes:
    """The outputs with their count.

    Args:
        payouts: of the window and the finder.
        finder_script: scriptPubKey of the share's miner.
        witness_commitment: 32 bytes, or None if the block commits to no witness.
        commitment: 32 bytes, ``share_commitment`` of the share's data.
    """
    parts = [payouts.outputs]
    count = payouts.count + 1
    if payouts.finder_amount or not payouts.count:
        parts.append(_output(payouts.finder_amount, finder_script))
        count += 1
    if witness_commitment is not None:
        parts.append(_output(0, _WITNESS_COMMITMENT + witness_commitment))
        count += 1
    parts.append(_output(0, _SHARE_COMMITMENT + commitment))
    return _compact_size(count) + b"".join(parts)


def coinbase_tail(payouts: Payouts, finder_script: bytes, witness_commitment: bytes | None, commitment: bytes) -> bytes:
    """What stands behind the coinbase script. Arguments as of ``coinbase_outputs``."""
    outputs = coinbase_outputs(payouts, finder_script, witness_commitment, commitment)
    return _SEQUENCE + outputs + _LOCK_TIME


def build_coinbase(
    coinbase_script: bytes,
    payouts: Payouts,
    finder_script: bytes,
    witness_commitment: bytes | None,
    commitment: bytes,
) -> bytes:
    """The whole coinbase as its txid is computed from it: without witness."""
    tail = coinbase_tail(payouts, finder_script, witness_commitment, commitment)
    return coinbase_head(len(coinbase_script)) + coinbase_script + tail


def fold_coinbase(coinbase: bytes, branch: tuple[bytes, ...]) -> bytes:
    """The merkle root of a block with this coinbase (without witness): 32 bytes, internal order."""
    return fold_merkle(sha256d(coinbase), branch)


def _output(amount: int, script: bytes) -> bytes:
    return struct.pack("<QB", amount, len(script)) + script


def _compact_size(count: int) -> bytes:
    return bytes([count]) if count < 0xFD else b"\xfd" + count.to_bytes(2, "little")
