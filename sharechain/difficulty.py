"""Targets, work and the share difficulty, in exact integers.

A target is a 256-bit number that a header's hash must not exceed; ``bits`` is its compact form of 32 bits,
which keeps the 23 to 24 highest bits. Work is the expected number of hashes to meet a target. Difficulty is a
float for people and for Stratum; nothing that nodes agree on is computed from it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = [
    "DIFFICULTY_1_TARGET",
    "MAX_U256",
    "bits_to_target",
    "difficulty_of",
    "is_canonical_bits",
    "scale_target",
    "target_to_bits",
    "work_of",
]

MAX_U256: Final = 2**256 - 1
#: The target of difficulty 1. Source: Bitcoin, ``0x1d00ffff``.
DIFFICULTY_1_TARGET: Final = 0xFFFF << 208


@lru_cache(maxsize=4096)
def bits_to_target(bits: int) -> int:
    """Expand a compact target.

    Args:
        bits: 32-bit unsigned, as in a block header.

    Raises:
        ValueError: negative, zero, or above 2^256 - 1.

    Source: Bitcoin Core, ``arith_uint256::SetCompact``.
    """
    if not 0 <= bits <= 0xFFFFFFFF:
        raise ValueError(f"compact target {bits:#x} has more than 32 bits")
    size, mantissa = bits >> 24, bits & 0x007FFFFF
    if bits & 0x00800000:
        raise ValueError(f"compact target {bits:#010x} is negative")
    target = mantissa >> (8 * (3 - size)) if size <= 3 else mantissa << (8 * (size - 3))
    if target == 0:
        raise ValueError(f"compact target {bits:#010x} is zero")
    if target > MAX_U256:
        raise ValueError(f"compact target {bits:#010x} is above 2^256 - 1")
    return target


def target_to_bits(target: int) -> int:
    """The compact form of a target, rounded down to what its 23 to 24 bits can say.

    Args:
        target: 1 to 2^256 - 1.

    Source: Bitcoin Core, ``arith_uint256::GetCompact``.
    """
    if not 0 < target <= MAX_U256:
        raise ValueError(f"target {target:#x} is not a positive 256-bit number")
    size = (target.bit_length() + 7) // 8
    mantissa = target << (8 * (3 - size)) if size <= 3 else target >> (8 * (size - 3))
    if mantissa & 0x00800000:
        mantissa >>= 8
        size += 1
    return size << 24 | mantissa


def is_canonical_bits(bits: int) -> bool:
    """Whether ``bits`` is the one compact form of a valid target: many forms of one target would be malleable."""
    try:
        return target_to_bits(bits_to_target(bits)) == bits
    except ValueError:
        return False


def work_of(target: int) -> int:
    """The expected number of hashes to meet a target: 2^256 / (target + 1), rounded down.

    Source: Bitcoin Core, ``GetBlockProof``.
    """
    return (1 << 256) // (target + 1)


def difficulty_of(target: int) -> float:
    """How many times harder than difficulty 1 a target is: for display and Stratum only."""
    return DIFFICULTY_1_TARGET / target


def scale_target(target: int, numerator: int, denominator: int, limit: int) -> int:
    """``target`` x 2^(numerator / denominator), by the integer arithmetic of aserti3-2d.

    The exponent is a fixed-point number with 16 bits of fraction, truncated towards zero; 2^fraction is a cubic
    approximation with an error under 0.013 %.

    Args:
        target: 1 to 2^256 - 1.
        numerator, denominator: the exponent, in equal units; the denominator is positive.
        limit: the easiest target that may come out.

    Returns:
        1 to ``limit``. A schedule that is arbitrarily far behind or ahead clamps, it never wraps.

    Source: the specification "aserti3-2d" of Bitcoin Cash, 2020-11-15.
    """
    magnitude = abs(numerator) * 65536 // denominator
    exponent = magnitude if numerator >= 0 else -magnitude
    shift, fraction = exponent >> 16, exponent & 0xFFFF
    factor = 65536 + ((195_766_423_245_049 * fraction + 971_821_376 * fraction**2 + 5_127 * fraction**3 + 2**47) >> 48)
    if shift > 272:  # 2^256 x 2^16 is above any limit; a shift by a wild header time would exhaust memory
        return limit
    scaled = target * factor
    shift -= 16
    scaled = scaled >> -shift if shift <= 0 else scaled << shift
    return min(max(scaled, 1), limit)
