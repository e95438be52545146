"""What a wallet does, for tests: transactions that spend outputs, signed by BIP143 (P2WPKH) and BIP341 (P2TR)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from bitcoin.core import Hash160
from coincurve import PrivateKey

Output = tuple[int, bytes]
"""Value in sat, output script."""

Spent = tuple[bytes, int, int]
"""Of an output to be spent: txid (internal order), index, value in sat."""


def sha256d(data: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def p2wpkh_script(key: PrivateKey) -> bytes:
    return b"\x00\x14" + bytes(Hash160(key.public_key.format()))


def p2tr_script(key: PrivateKey) -> bytes:
    """The output key is the key itself, without a script tree and without BIP341's recommended tweak."""
    return b"\x51\x20" + key.public_key.format()[1:]


def txid_of(raw: bytes) -> bytes:
    """The id of a transaction in either serialisation of this module: one signature set per input."""
    if raw[4] != 0:
        return sha256d(raw)
    inputs = raw[6]
    at = 7 + 41 * inputs
    outputs, at = raw[at], at + 1
    for _ in range(outputs):
        at += 9 + raw[at + 8]
    return sha256d(raw[:4] + raw[6:at] + raw[-4:])


def unsigned(
    spent: Sequence[Spent], outputs: Sequence[Output], *, sequence: int = 0xFFFFFFFF, lock_time: int = 0
) -> bytes:
    """A transaction with empty input scripts and no witness, as OP_TRUE outputs are spent."""
    body = _serialise_inputs(spent, sequence) + _serialise_outputs(outputs)
    return b"\x02\0\0\0" + body + struct.pack("<I", lock_time)


def spend_p2wpkh(
    key: PrivateKey,
    spent: Sequence[Spent],
    outputs: Sequence[Output],
    *,
    sequence: int = 0xFFFFFFFF,
    lock_time: int = 0,
) -> bytes:
    """Spend outputs that pay `p2wpkh_script(key)`."""
    outpoints = b"".join(_outpoint(output) for output in spent)
    sequences = struct.pack("<I", sequence) * len(spent)
    outputs_hash = sha256d(_serialise_outputs(outputs)[1:])
    script_code = b"\x19\x76\xa9\x14" + p2wpkh_script(key)[2:] + b"\x88\xac"
    witnesses = []
    for output in spent:
        preimage = b"".join(
            [
                b"\x02\0\0\0",
                sha256d(outpoints),
                sha256d(sequences),
                _outpoint(output),
                script_code,
                struct.pack("<q", output[2]),
                struct.pack("<I", sequence),
                outputs_hash,
                struct.pack("<II", lock_time, 1),
            ]
        )
        signature = key.sign(sha256d(preimage), hasher=None) + b"\x01"
        witnesses.append([signature, key.public_key.format()])
    return _with_witnesses(unsigned(spent, outputs, sequence=sequence, lock_time=lock_time), witnesses)


def spend_p2tr(key: PrivateKey, spent: Sequence[Spent], outputs: Sequence[Output]) -> bytes:
    """Spend outputs that pay `p2tr_script(key)`, by the key."""
    sequence = 0xFFFFFFFF
    script = p2tr_script(key)
    common = b"".join(
        [
            b"\x00\x00\x02\0\0\0\0\0\0\0",  # epoch, SIGHASH_DEFAULT, version, lock time
            hashlib.sha256(b"".join(_outpoint(output) for output in spent)).digest(),
            hashlib.sha256(b"".join(struct.pack("<q", output[2]) for output in spent)).digest(),
            hashlib.sha256((bytes([len(script)]) + script) * len(spent)).digest(),
            hashlib.sha256(struct.pack("<I", sequence) * len(spent)).digest(),
            hashlib.sha256(_serialise_outputs(outputs)[1:]).digest(),
            b"\x00",
        ]
    )
    tag = hashlib.sha256(b"TapSighash").digest()
    witnesses = []
    for position in range(len(spent)):
        digest = hashlib.sha256(tag + tag + common + struct.pack("<I", position)).digest()
        witnesses.append([key.sign_schnorr(digest)])
    return _with_witnesses(unsigned(spent, outputs, sequence=sequence), witnesses)


def _outpoint(output: Spent) -> bytes:
    return output[0] + struct.pack("<I", output[1])


def _serialise_inputs(spent: Sequence[Spent], sequence: int) -> bytes:
    inputs = b"".join(_outpoint(output) + b"\x00" + struct.pack("<I", sequence) for output in spent)
    return bytes([len(spent)]) + inputs


def _serialise_outputs(outputs: Sequence[Output]) -> bytes:
    parts = [struct.pack("<q", value) + bytes([len(script)]) + script for value, script in outputs]
    return bytes([len(outputs)]) + b"".join(parts)


def _with_witnesses(plain: bytes, witnesses: Sequence[Sequence[bytes]]) -> bytes:
    stacks = [bytes([len(stack)]) + b"".join(bytes([len(item)]) + item for item in stack) for stack in witnesses]
    return plain[:4] + b"\x00\x01" + plain[4:-4] + b"".join(stacks) + plain[-4:]
