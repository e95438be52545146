"""The sharechain on disk: one LevelDB database, one atomic batch for each accepted change.

Keys (``docs/reference/store.md``):

    m/schema, m/params         schema version; canonical CBOR of the network's parameters
    m/sequence                 number of the last batch
    m/short                    there while history is short: begun on trust, and not as long as pruning leaves it
    s + hash                   a share: [encoding, first seen (Unix ms), outcome as a Bitcoin block or null]
    h + height + hash          index by height (8 bytes, big endian)
    b + block hash             Bitcoin block that shares build on: [height, next bits], and [time, bits] of late ones
    t                          hash of the tip

Every value ends with its CRC-32. The database is handed in by whoever may touch the disk; anything with
plyvel's interface will do. A batch is all or nothing, so a kill at any moment leaves a state that loads.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import cbor2

from sharechain.chain import Accepted
from sharechain.errors import DecodeError, StoreError
from sharechain.params import Params, decode_params
from sharechain.share import Share, decode_share
from sharechain.validate import BlockFacts

__all__ = ["SCHEMA", "Database", "Store", "StoredShare", "read_params"]

#: Version of the key schema; a database with a newer one is refused.
SCHEMA: Final = 1

_SCHEMA_KEY: Final = b"m/schema"
_PARAMS_KEY: Final = b"m/params"
_SEQUENCE_KEY: Final = b"m/sequence"
_SHORT_KEY: Final = b"m/short"
_TIP_KEY: Final = b"t"


class WriteBatch(Protocol):
    """What the store needs of a plyvel write batch."""

    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def write(self) -> None: ...


class Database(Protocol):
    """What the store needs of a plyvel database."""

    def get(self, key: bytes) -> bytes | None: ...
    def iterator(self, *, prefix: bytes, include_value: bool = True) -> Any: ...
    def write_batch(self, *, transaction: bool = False, sync: bool = False) -> WriteBatch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShare:
    """A share as the store keeps it."""

    share: Share
    #: Unix milliseconds, by this node's clock.
    first_seen_ms: int
    #: What Bitcoin said of it as a block ("" for accepted), or None if it was not one.
    block_outcome: str | None = None


def read_params(database: Database) -> Params | None:
    """The parameters of the network that a database belongs to; None if it is new.

    Raises:
        StoreError: damaged, or written by a newer version.
    """
    raw = database.get(_SCHEMA_KEY)
    if raw is None:
        if next(iter(database.iterator(prefix=b"", include_value=False)), None) is not None:
            raise StoreError("m/schema", "missing: this is a damaged database, or not one of a sharechain")
        return None
    schema = _decode("m/schema", raw)
    if schema != SCHEMA:
        raise StoreError("m/schema", f"schema {schema} was written by another version; this one knows {SCHEMA}")
    params = database.get(_PARAMS_KEY)
    if params is None:
        raise StoreError("m/params", "missing: the database is damaged")
    try:
        return decode_params(_unseal("m/params", params))
    except DecodeError as error:
        raise StoreError("m/params", str(error)) from None


class Store:
    """Reads and writes one network's sharechain.

    Mutable fields: ``sequence``, the number of batches written, and ``short_history``, whether the history that is
    stored was begun on trust and is short. Both are also in the database.
    """

    def __init__(self, database: Database, params: Params) -> None:
        """Open, and stamp a new database with the network.

        Raises:
            StoreError: the database is of another network, damaged, or of a newer schema.
        """
        self._database = database
        known = read_params(database)
        if known is None:
            batch = database.write_batch(transaction=False, sync=True)
            batch.put(_SCHEMA_KEY, _encode(SCHEMA))
            batch.put(_PARAMS_KEY, _seal(params.encoded))
            batch.put(_SEQUENCE_KEY, _encode(0))
            batch.write()
        elif known != params:
            raise StoreError(
                "m/params",
                f"the database belongs to network {known.name!r} ({known.network_id.hex()}), "
                f"not to {params.name!r} ({params.network_id.hex()})"
                + (": its parameters are others" if known.name == params.name else ""),
            )
        sequence = self._database.get(_SEQUENCE_KEY)
        if sequence is None:
            raise StoreError("m/sequence", "missing: the database is damaged")
        number = _decode("m/sequence", sequence)
        if type(number) is not int:
            raise StoreError("m/sequence", f"not a number: {type(number).__name__}")
        self.sequence = number
        short = self._database.get(_SHORT_KEY)
        if short is not None and _decode("m/short", short) is not True:
            raise StoreError("m/short", "not true")
        self.short_history = short is not None

    def write(
        self,
        change: Accepted,
        *,
        first_seen_ms: int,
        facts: Mapping[bytes, BlockFacts] | None = None,
        block_outcomes: Mapping[bytes, str] | None = None,
        sync: bool,
    ) -> None:
        """Write what a change added and removed, as one atomic batch.

        Args:
            change: from ``Sharechain.accept``.
            first_seen_ms: Unix milliseconds.
            facts: of the Bitcoin blocks that the added shares build on.
            block_outcomes: by share hash, for shares that are blocks.
            sync: wait for the disk: survives a power cut and not only a kill.
        """
        outcomes = block_outcomes or {}
        batch = self._database.write_batch(transaction=False, sync=sync)
        for block_hash, fact in (facts or {}).items():
            batch.put(b"b" + block_hash, _encode_facts(fact))
        for share in change.added:
            record = [share.encoded, first_seen_ms, outcomes.get(share.hash)]
            batch.put(b"s" + share.hash, _encode(record))
            batch.put(_height_key(share.data.height, share.hash), _seal(b""))
        for height, share_hash in change.pruned:
            batch.delete(b"s" + share_hash)
            batch.delete(_height_key(height, share_hash))
        for block_hash in change.forgotten_blocks:
            batch.delete(b"b" + block_hash)
        if change.new_tip is not None:
            batch.put(_TIP_KEY, _seal(change.new_tip))
        self._commit(batch, short_history=change.short_history)

    def replace(
        self,
        shares: Iterable[Share],
        *,
        facts: Mapping[bytes, BlockFacts],
        tip: bytes,
        short_history: bool,
        first_seen_ms: int,
        sync: bool,
    ) -> None:
        """Write another history in the place of the one stored, as one atomic batch.

        A share that is in both keeps what is stored of it, with the time when it was first seen and its outcome as a
        block.

        Args:
            shares: all of the new history.
            facts: of the Bitcoin blocks that they build on.
            tip: hash of the new tip.
            short_history: of the new chain.
            first_seen_ms: Unix milliseconds, for the shares that are new.
            sync: wait for the disk.
        """
        batch = self._database.write_batch(transaction=False, sync=sync)
        gone = set(self._database.iterator(prefix=b"h", include_value=False))
        gone |= {b"s" + key[9:] for key in gone}
        gone |= set(self._database.iterator(prefix=b"s", include_value=False))
        gone |= set(self._database.iterator(prefix=b"b", include_value=False))
        for share in shares:
            key = b"s" + share.hash
            if self._database.get(key) is None:
                batch.put(key, _encode([share.encoded, first_seen_ms, None]))
            batch.put(_height_key(share.data.height, share.hash), _seal(b""))
            gone -= {key, _height_key(share.data.height, share.hash)}
        for block_hash, fact in facts.items():
            batch.put(b"b" + block_hash, _encode_facts(fact))
            gone.discard(b"b" + block_hash)
        for key in gone:
            batch.delete(key)
        batch.put(_TIP_KEY, _seal(tip))
        self._commit(batch, short_history=short_history)

    def write_block_outcome(self, share_hash: bytes, outcome: str, *, sync: bool) -> None:
        """Note what Bitcoin said of a stored share as a block."""
        stored = self.share(share_hash)
        if stored is None:
            return
        record = [stored.share.encoded, stored.first_seen_ms, outcome]
        batch = self._database.write_batch(transaction=False, sync=sync)
        batch.put(b"s" + share_hash, _encode(record))
        self._commit(batch)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        self._commit(self._database.write_batch(transaction=False, sync=True))

    def share(self, share_hash: bytes) -> StoredShare | None:
        """One share, or None.

        Raises:
            StoreError: the record is damaged.
        """
        raw = self._database.get(b"s" + share_hash)
        return None if raw is None else _stored_share(share_hash, raw)

    def encoded(self, share_hash: bytes) -> bytes | None:
        """The encoding of one share as peers are sent it, or None. Only the record's checksum is looked at.

        Raises:
            StoreError: the record is damaged.
        """
        raw = self._database.get(b"s" + share_hash)
        if raw is None:
            return None
        where = f"s/{share_hash[::-1].hex()}"
        value = _decode(where, raw)
        if type(value) is not list or len(value) != 3 or type(value[0]) is not bytes:
            raise StoreError(where, "not a share record")
        return value[0]

    def shares(self) -> Iterator[StoredShare]:
        """All shares, lowest first.

        Raises:
            StoreError: a record is damaged, or misses its counterpart; ``where`` names it.
        """
        for key, value in self._database.iterator(prefix=b"h"):
            height, share_hash = int.from_bytes(key[1:9], "big"), key[9:]
            where = f"h/{height}/{share_hash[::-1].hex()}"
            if len(key) != 41 or _unseal(where, value):
                raise StoreError(where, "not an entry of the index by height")
            stored = self.share(share_hash)
            if stored is None:
                raise StoreError(where, "the share itself is missing")
            if stored.share.data.height != height:
                raise StoreError(where, f"the share stands at height {stored.share.data.height}")
            yield stored

    def count(self) -> int:
        """How many share records there are, indexed or not."""
        return sum(1 for _ in self._database.iterator(prefix=b"s", include_value=False))

    def facts(self) -> dict[bytes, BlockFacts]:
        """The Bitcoin blocks that shares build on.

        Raises:
            StoreError: a record is damaged.
        """
        found = {}
        for key, raw in self._database.iterator(prefix=b"b"):
            where = f"b/{key[1:][::-1].hex()}"
            found[key[1:]] = _decode_facts(where, raw)
        return found

    def tip(self) -> bytes | None:
        """Hash of the tip, or None if there is no share.

        Raises:
            StoreError: the record is damaged.
        """
        raw = self._database.get(_TIP_KEY)
        return None if raw is None else _unseal("t", raw)

    def _commit(self, batch: WriteBatch, *, short_history: bool | None = None) -> None:
        short = self.short_history if short_history is None else short_history
        if short and not self.short_history:
            batch.put(_SHORT_KEY, _encode(True))
        if self.short_history and not short:
            batch.delete(_SHORT_KEY)
        batch.put(_SEQUENCE_KEY, _encode(self.sequence + 1))
        batch.write()
        self.sequence += 1
        self.short_history = short


def _height_key(height: int, share_hash: bytes) -> bytes:
    return b"h" + height.to_bytes(8, "big") + share_hash


def _stored_share(share_hash: bytes, raw: bytes) -> StoredShare:
    where = f"s/{share_hash[::-1].hex()}"
    value = _decode(where, raw)
    if type(value) is not list or len(value) != 3 or type(value[0]) is not bytes or type(value[1]) is not int:
        raise StoreError(where, "not a share record")
    if value[2] is not None and type(value[2]) is not str:
        raise StoreError(where, "not a share record: the outcome is no text")
    try:
        share = decode_share(value[0])
    except DecodeError as error:
        raise StoreError(where, f"the share does not decode: {error}") from None
    if share.hash != share_hash:
        raise StoreError(where, f"the record holds share {share.hash[::-1].hex()}")
    return StoredShare(share=share, first_seen_ms=value[1], block_outcome=value[2])


def _encode_facts(facts: BlockFacts) -> bytes:
    return _encode([facts.height, facts.next_bits, *([] if facts.late is None else [list(facts.late)])])


def _decode_facts(where: str, raw: bytes) -> BlockFacts:
    value = _decode(where, raw)
    match value:
        case [int(height), int(next_bits)]:
            late = None
        case [int(height), int(next_bits), [int(time), int(bits)]]:
            late = (time, bits)
        case _:
            raise StoreError(where, "not a height and a compact target")
    return BlockFacts(height=height, next_bits=next_bits, late=late)


def _seal(value: bytes) -> bytes:
    return value + zlib.crc32(value).to_bytes(4, "little")


def _unseal(where: str, raw: bytes) -> bytes:
    value = raw[:-4]
    if len(raw) < 4 or zlib.crc32(value).to_bytes(4, "little") != raw[-4:]:
        raise StoreError(where, "checksum mismatch: the record is damaged")
    return value


def _encode(value: object) -> bytes:
    return _seal(cbor2.dumps(value))


def _decode(where: str, raw: bytes) -> Any:
    try:
        return cbor2.loads(_unseal(where, raw))
    except (cbor2.CBORError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise StoreError(where, f"not CBOR: {error}") from None
