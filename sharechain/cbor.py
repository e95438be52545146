"""CBOR from strangers: nothing is made of it before its size and its kinds of items are known to be harmless.

A decoder of all of CBOR makes objects of whatever it is told to: millions of empty arrays, regular expressions, numbers
with a million digits. What nodes say to one another needs unsigned integers, byte and text strings, arrays and null.
"""

from __future__ import annotations

from typing import Any

import cbor2

from sharechain.errors import DecodeError

__all__ = ["decode_cbor"]


def decode_cbor(raw: bytes, *, most_items: int, max_depth: int) -> Any:
    """Read one CBOR item.

    Args:
        raw: untrusted bytes, of a size that the caller has checked.
        most_items: elements of all arrays together.
        max_depth: arrays within arrays.

    Raises:
        DecodeError: not CBOR, or more than is asked for.
    """
    _check_heads(raw, most_items)
    try:
        return cbor2.loads(raw, max_depth=max_depth, allow_indefinite=False)
    except (cbor2.CBORError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise DecodeError(f"not CBOR: {error}") from None


def _check_heads(raw: bytes, most_items: int) -> None:
    """Read only the heads of the items. What is cut off or goes on behind its end is left to the decoder."""
    at, left, items, size = 0, 1, 0, len(raw)
    while left and at < size:
        head = raw[at]
        major, value, width = head >> 5, head & 31, 0
        if 24 <= value <= 27:
            width = 1 << value - 24
            value = int.from_bytes(raw[at + 1 : at + 1 + width], "big")
        elif value > 27:
            raise DecodeError("an indefinite length")
        left -= 1
        at += 1 + width
        if major in (2, 3):
            at += value
        elif major == 4 or head == 0xC2:  # an array; the tag of an integer above 64 bits, and its bytes
            items += value if major == 4 else 1
            left += value if major == 4 else 1
            if items > most_items:
                raise DecodeError(f"arrays of more than {most_items} in all")
        elif major != 0 and head != 0xF6:
            raise DecodeError("only integers, bytes, texts, arrays and null are spoken here")
