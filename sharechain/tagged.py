"""Tagged hashes: one hash function for each purpose, so that a hash of one kind never stands for another."""

from __future__ import annotations

import hashlib
from functools import cache

__all__ = ["tagged_hash"]


def tagged_hash(tag: str, message: bytes) -> bytes:
    """SHA-256(SHA-256(tag) || SHA-256(tag) || message): 32 bytes.

    Source: BIP340.
    """
    return hashlib.sha256(_prefix(tag) + message).digest()


@cache
def _prefix(tag: str) -> bytes:
    return hashlib.sha256(tag.encode()).digest() * 2
