"""Bitcoin blocks on their way between nodes: announced without what the other node has already, completed, passed on.

Theory of operation. Nodes of one pool see nearly the same transactions, so a found block travels as its header, its
coinbase and the wtxids of the rest; the receiver fills in what its own templates have held lately and asks for the
others. What is small enough comes with the announcement, so that a finder that dies right after it has said enough.

A false announcement under a real header must neither pass for the block nor keep the real one out. So a block is
remembered as handled only when every byte of it is bound to its header: the coinbase and all txids by the merkle root,
the witnesses by the coinbase's commitment, or else there are none. Until then an assembly belongs to one exact
announcement (coinbase and wtxids), and a peer with another list under the same header has an assembly of its own.
Transactions are checked against their announced wtxid before they are kept, so peers with the same list fill one
assembly together, and none can spoil it for the others.

Whether a complete block is valid is Bitcoin's to say: what is checked here is what makes a block worth the bandwidth
and safe to remember. Pure: ``now`` comes in by argument, and so does what Bitcoin knows of the parent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pool.bitcoin_backend import BlockTemplate, HeaderFacts, TemplateTransaction
from p2pool.bitcoin_backend.template import merkle_root
from p2pool.errors import PeerError
from p2pool.p2p.wire import MAX_BLOCK_SIZE, Announce, Transactions, Wanted
from sharechain.difficulty import MAX_U256, bits_to_target
from sharechain.errors import DecodeError
from sharechain.hasher import sha256d
from sharechain.params import MAX_MONEY
from sharechain.share import bip34_height

__all__ = ["BlockRelay", "CompletedBlock", "read_block"]

#: Bytes of transactions that come with an announcement.
INCLUDED_SIZE: Final = 256 * 1024
#: Bytes of one message of transactions, but for one that is larger alone.
MESSAGE_SIZE: Final = 1024 * 1024
#: Bytes of a message besides its transactions, and of a transaction's place in it: no less than CBOR takes.
_MESSAGE_OVERHEAD: Final = 64
_PLACE_OVERHEAD: Final = 12
#: Templates whose transactions are remembered: about a minute of them.
TEMPLATES: Final = 4
#: Whole blocks that can be asked for, 4 MB each at most.
KEPT_BLOCKS: Final = 4
#: Hashes of blocks that need not come again.
HANDLED: Final = 1_000
#: Announcements that wait for transactions: of all peers, and of one alone. Each holds 5 MB at most: block and list.
ASSEMBLIES: Final = 4
ASSEMBLIES_OF_PEER: Final = 2
#: Seconds that an announcement may wait for its transactions.
ASSEMBLY_S: Final = 60.0
#: Transactions that fit into a block: 4,000,000 weight units, and the smallest is 60 bytes of 4 units.
MAX_COUNT: Final = 4_000_000 // (4 * 60)

#: Bitcoin's target grows by this factor at most from one period of difficulty to the next.
RETARGET_FACTOR: Final = 4

_NULL_OUTPOINT: Final = bytes(32) + b"\xff\xff\xff\xff"
#: OP_RETURN, push of 36 bytes, header of BIP141.
_COMMITMENT_PREFIX: Final = bytes.fromhex("6a24aa21a9ed")
_NOTHING: Final = Wanted(positions=())


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedBlock:
    """A whole block, as a node submits it. Its fields are those of ``p2pool.blocks.FoundBlock``."""

    #: 32 bytes, internal order.
    block_hash: bytes
    #: As its coinbase says (BIP34).
    block_height: int
    #: Sat, of all outputs of its coinbase.
    value: int
    #: Outputs of its coinbase: a stranger cannot tell which of them are the window's.
    payouts: int
    #: Transactions besides the coinbase.
    transactions: int
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coinbase:
    """What a coinbase says. ``reserved`` is its witness, and None exactly if it commits to no witnesses."""

    raw: bytes
    txid: bytes
    block_height: int
    value: int
    outputs: int
    commitment: bytes | None
    reserved: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A whole block in its parts."""

    raw: bytes
    coinbase: bytes
    wtxids: tuple[bytes, ...]
    transactions: tuple[bytes, ...]


@dataclass(slots=True, kw_only=True)
class _Assembly:
    """One exact announcement, by whomever it came, and what there is of its transactions.

    Mutable fields: ``parts`` (raw and txid of each transaction, None while lacking), ``lacking`` (how many are None),
    ``size`` (bytes of the block so far) and ``peers``, who announced just this and did nothing wrong since.
    """

    block_hash: bytes
    header: bytes
    coinbase: _Coinbase
    wtxids: tuple[bytes, ...]
    #: Whether the header's target is known to be Bitcoin's, so that the work in it was paid for.
    is_proven: bool
    started: float
    parts: list[tuple[bytes, bytes] | None]
    lacking: int
    size: int
    peers: set[str] = field(default_factory=set)

    def put(self, position: int, raw: bytes, txid: bytes) -> None:
        self.parts[position] = raw, txid
        self.lacking -= 1
        self.size += len(raw)


class BlockRelay:
    """What a node knows of blocks on their way.

    Mutable fields: ``_templates`` (transactions of the newest templates) and ``_known`` (the same by wtxid),
    ``_easiest_target`` (what a block on an unknown parent may have, by the newest template), ``_kept`` (the last whole
    blocks by hash, oldest first), ``_handled`` (hashes of blocks that were whole once, oldest first; those of ``_kept``
    among them) and ``_assemblies``, oldest first: no two of one announcement, none of a handled block, none complete,
    none without a peer.
    """

    def __init__(self) -> None:
        """Nothing is known at first."""
        self._templates: deque[tuple[TemplateTransaction, ...]] = deque(maxlen=TEMPLATES)
        self._known: dict[bytes, TemplateTransaction] = {}
        self._easiest_target = MAX_U256
        self._kept: dict[bytes, _Kept] = {}
        self._handled: dict[bytes, None] = {}
        self._assemblies: list[_Assembly] = []

    def learn(self, template: BlockTemplate) -> None:
        """Remember the transactions of a template: they need not travel when they come in a block."""
        self._templates.append(template.transactions)
        self._known = {part.wtxid: part for transactions in self._templates for part in transactions}
        self._easiest_target = RETARGET_FACTOR * bits_to_target(template.bits)

    def announcement(self, raw: bytes) -> Announce:
        """What tells other nodes of a block that this node has whole; its transactions can be asked for from now on.

        Args:
            raw: the block as the network takes it: found, or completed here.

        Raises:
            PeerError: "block", these bytes are no block.
        """
        block_hash = sha256d(raw[:80])
        kept = self._kept.get(block_hash)
        if kept is None or kept.raw != raw:
            kept = self._split(raw)
            self._keep(block_hash, kept)
        included, room = [], INCLUDED_SIZE
        for position, transaction in enumerate(kept.transactions):
            if len(transaction) <= room:
                included.append((position, transaction))
                room -= len(transaction)
        return Announce(header=raw[:80], coinbase=kept.coinbase, wtxids=kept.wtxids, included=tuple(included))

    def transactions(self, block_hash: bytes, positions: Sequence[int]) -> tuple[Transactions, ...]:
        """The messages that answer what a peer wants of a block that was announced to it.

        Args:
            block_hash: of one of the last blocks announced; nothing is given of others.
            positions: as ``Wanted`` has them.

        Raises:
            PeerError: "block", it wants what is not there, or something twice.
        """
        kept = self._kept.get(block_hash)
        if kept is None:
            return ()
        if len(set(positions)) < len(positions) or any(not 0 <= p < len(kept.transactions) for p in positions):
            raise PeerError("block", f"wants a transaction twice, or one that block {_shown(block_hash)} does not have")
        messages: list[Transactions] = []
        batch: list[tuple[int, bytes]] = []
        size = _MESSAGE_OVERHEAD
        for position in positions:
            transaction = kept.transactions[position]
            cost = len(transaction) + _PLACE_OVERHEAD
            if batch and size + cost > MESSAGE_SIZE:
                messages.append(Transactions(block_hash=block_hash, transactions=tuple(batch)))
                batch, size = [], _MESSAGE_OVERHEAD
            batch.append((position, transaction))
            size += cost
        if batch:
            messages.append(Transactions(block_hash=block_hash, transactions=tuple(batch)))
        return tuple(messages)

    def announced(
        self, peer_id: str, announce: Announce, now: float, facts: HeaderFacts | None = None
    ) -> Wanted | CompletedBlock:
        """A peer has a block.

        Args:
            peer_id: who says so.
            announce: what it says.
            now: seconds of a clock that does not jump.
            facts: what Bitcoin knows of the block that the header names as its parent, or None if it does not know it
                (yet). Then its work is measured by the newest template's, as far as Bitcoin's difficulty may have moved
                since: a block with less is not wanted. It may still be no block, so it is the first to give way.

        Returns:
            The answer to the peer; or the block, if all is at hand: then the answer is that nothing is wanted.

        Raises:
            PeerError: "block", the announcement is false; nothing of it is kept.
        """
        self._expire(now)
        block_hash = sha256d(announce.header)
        if block_hash in self._handled:
            return _NOTHING
        target = _check_header(announce.header, block_hash, facts)
        if facts is None and target > self._easiest_target:
            return _NOTHING
        coinbase = _read_coinbase(announce.coinbase)
        if facts is not None and coinbase.block_height != facts.height + 1:
            raise _fault(f"its coinbase says height {coinbase.block_height}, its parent's is {facts.height}")
        _check_list(announce, coinbase)
        assembly = self._join(peer_id, block_hash, announce, coinbase, facts is not None, now)
        if assembly is None:
            return _NOTHING
        return self._proceed(peer_id, assembly, announce.included)

    def filled(self, peer_id: str, message: Transactions, now: float) -> Wanted | CompletedBlock:
        """A peer sends transactions of a block that it announced.

        Args:
            peer_id: the peer.
            message: what it sends.
            now: seconds of the clock of ``announced``.

        Returns:
            The answer to the peer, or the block, as of ``announced``. Nothing is wanted of a block that is handled or
            was given up.

        Raises:
            PeerError: "block", these are not the transactions that the peer announced, or they and its announcement
                do not make the block; this peer's announcement is forgotten.
        """
        self._expire(now)
        for assembly in self._assemblies:
            if assembly.block_hash == message.block_hash and peer_id in assembly.peers:
                return self._proceed(peer_id, assembly, message.transactions)
        return _NOTHING

    def _join(
        self, peer_id: str, block_hash: bytes, announce: Announce, coinbase: _Coinbase, is_proven: bool, now: float
    ) -> _Assembly | None:
        """The assembly of an announcement, the peer's only one for this block; None if there is no room for it."""
        of_block = [assembly for assembly in self._assemblies if assembly.block_hash == block_hash]
        for assembly in of_block:
            if assembly.coinbase.raw == coinbase.raw and assembly.wtxids == announce.wtxids:
                assembly.peers.add(peer_id)
            elif peer_id in assembly.peers:
                self._leave(peer_id, assembly)
        joined = [assembly for assembly in of_block if peer_id in assembly.peers]
        if joined:
            return joined[0]
        alone = [assembly for assembly in self._assemblies if assembly.peers == {peer_id}]
        if len(alone) >= ASSEMBLIES_OF_PEER:
            self._assemblies.remove(alone[0])
        if len(self._assemblies) >= ASSEMBLIES:
            unproven = [assembly for assembly in self._assemblies if not assembly.is_proven]
            if not unproven and not is_proven:
                return None
            self._assemblies.remove((unproven or self._assemblies)[0])
        assembly = _Assembly(
            block_hash=block_hash,
            header=announce.header,
            coinbase=coinbase,
            wtxids=announce.wtxids,
            is_proven=is_proven,
            started=now,
            parts=[None] * len(announce.wtxids),
            lacking=len(announce.wtxids),
            size=80 + 9 + len(coinbase.raw),
            peers={peer_id},
        )
        for position, wtxid in enumerate(announce.wtxids):
            known = self._known.get(wtxid)
            if known is not None:
                assembly.put(position, known.raw, known.txid)
        self._assemblies.append(assembly)
        return assembly

    def _proceed(
        self, peer_id: str, assembly: _Assembly, transactions: Sequence[tuple[int, bytes]]
    ) -> Wanted | CompletedBlock:
        """Take transactions; complete the block if they were the last."""
        try:
            _check_places(transactions, len(assembly.wtxids))
            for position, raw in transactions:
                if sha256d(raw) != assembly.wtxids[position]:
                    raise _fault(f"transaction {position} is not the one that was announced")
                if assembly.parts[position] is None:
                    assembly.put(position, raw, _read_transaction(raw))
        except PeerError:
            self._leave(peer_id, assembly)
            raise
        if assembly.size > MAX_BLOCK_SIZE:
            self._assemblies.remove(assembly)
            raise _fault(f"it has more than {MAX_BLOCK_SIZE} bytes")
        if assembly.lacking:
            return Wanted(positions=tuple(at for at, part in enumerate(assembly.parts) if part is None))
        self._assemblies.remove(assembly)
        parts = [part for part in assembly.parts if part is not None]
        _check_roots(assembly, [txid for _, txid in parts])
        coinbase = assembly.coinbase
        raws = tuple(raw for raw, _ in parts)
        raw = b"".join([assembly.header, _compact_size(1 + len(raws)), coinbase.raw, *raws])
        kept = _Kept(raw=raw, coinbase=coinbase.raw, wtxids=assembly.wtxids, transactions=raws)
        self._keep(assembly.block_hash, kept)
        return _completed(assembly.block_hash, coinbase, len(raws), raw)

    def _leave(self, peer_id: str, assembly: _Assembly) -> None:
        assembly.peers.discard(peer_id)
        if not assembly.peers:
            self._assemblies.remove(assembly)

    def _keep(self, block_hash: bytes, kept: _Kept) -> None:
        self._kept.pop(block_hash, None)
        self._kept[block_hash] = kept
        self._handled[block_hash] = None
        while len(self._kept) > KEPT_BLOCKS:
            del self._kept[next(iter(self._kept))]
        while len(self._handled) > HANDLED:
            del self._handled[next(iter(self._handled))]
        self._assemblies = [assembly for assembly in self._assemblies if assembly.block_hash != block_hash]

    def _expire(self, now: float) -> None:
        self._assemblies = [assembly for assembly in self._assemblies if now - assembly.started < ASSEMBLY_S]

    def _split(self, raw: bytes) -> _Kept:
        """A block in its parts. One that was made from a template that is remembered costs no parsing."""
        count, start = _block_head(raw)
        at, _ = _transaction_at(raw, start)
        coinbase, rest = raw[start:at], raw[at:]
        for template in reversed(self._templates):
            if len(template) == count - 1 and b"".join(part.raw for part in template) == rest:
                transactions = tuple(part.raw for part in template)
                return _Kept(
                    raw=raw, coinbase=coinbase, wtxids=tuple(part.wtxid for part in template), transactions=transactions
                )
        parts = []
        for _ in range(count - 1):
            end, _ = _transaction_at(raw, at)
            parts.append(raw[at:end])
            at = end
        if at != len(raw):
            raise _fault("there are bytes behind its last transaction")
        return _Kept(
            raw=raw, coinbase=coinbase, wtxids=tuple(sha256d(part) for part in parts), transactions=tuple(parts)
        )


def read_block(raw: bytes) -> CompletedBlock:
    """What a whole block says of itself, for one that did not come by an announcement. Nothing is verified.

    Raises:
        PeerError: "block", these bytes do not start as a block.
    """
    count, start = _block_head(raw)
    end, _ = _transaction_at(raw, start)
    return _completed(sha256d(raw[:80]), _read_coinbase(raw[start:end]), count - 1, raw)


def _completed(block_hash: bytes, coinbase: _Coinbase, transactions: int, raw: bytes) -> CompletedBlock:
    return CompletedBlock(
        block_hash=block_hash,
        block_height=coinbase.block_height,
        value=coinbase.value,
        payouts=coinbase.outputs,
        transactions=transactions,
        raw=raw,
    )


# What binds a block to its header.


def _check_header(header: bytes, block_hash: bytes, facts: HeaderFacts | None) -> int:
    """What a header says alone and of its parent; gives its target."""
    bits = int.from_bytes(header[72:76], "little")
    try:
        target = bits_to_target(bits)
    except ValueError as error:
        raise _fault(str(error)) from None
    if int.from_bytes(block_hash, "little") > target:
        raise _fault(f"the work in its header does not meet its target {bits:#010x}")
    if facts is None:
        return target
    if header[4:36] != facts.block_hash:
        raise ValueError("the facts are those of another block than the parent")
    time = int.from_bytes(header[68:72], "little")
    if bits != (wanted := facts.bits_at(time)):
        raise _fault(f"its bits are {bits:#010x}, Bitcoin demands {wanted:#010x}")
    if time <= facts.median_time:
        raise _fault("its time is not after the median of the blocks before it")
    return target


def _check_list(announce: Announce, coinbase: _Coinbase) -> None:
    """What can be said of an announcement before its transactions are there."""
    wtxids = announce.wtxids
    if len(wtxids) > MAX_COUNT:
        raise _fault(f"no block has more than {MAX_COUNT} transactions, got {len(wtxids)}")
    if len(set(wtxids)) < len(wtxids):  # besides: with one twice, two lists have one merkle root
        raise _fault("it has a transaction twice")
    if coinbase.commitment is None:
        # Nothing may have a witness then, so that wtxids are txids.
        if merkle_root([coinbase.txid, *wtxids]) != announce.header[36:68]:
            raise _fault("its header commits to other transactions")
    elif sha256d(merkle_root([bytes(32), *wtxids]) + (coinbase.reserved or b"")) != coinbase.commitment:
        raise _fault("its coinbase commits to other witnesses")


def _check_places(transactions: Sequence[tuple[int, bytes]], count: int) -> None:
    places = [position for position, _ in transactions]
    if len(set(places)) < len(places):
        raise _fault("a position comes twice in one message")
    if any(not 0 <= position < count for position in places):
        raise _fault(f"a position is not below {count}")


def _check_roots(assembly: _Assembly, txids: list[bytes]) -> None:
    if assembly.coinbase.commitment is None and tuple(txids) != assembly.wtxids:
        raise _fault("a transaction has a witness that nothing commits to")
    if merkle_root([assembly.coinbase.txid, *txids]) != assembly.header[36:68]:
        raise _fault("its header commits to other transactions")


# Bytes of strangers. All that goes wrong is a ``PeerError``; no loop is longer than the bytes.


def _block_head(raw: bytes) -> tuple[int, int]:
    """How many transactions a block has, and where the first one starts."""
    try:
        count, start = _size_at(raw, 80)
    except IndexError:
        raise _fault("it has no transactions") from None
    if not count:
        raise _fault("it has no transactions")
    return count, start


def _read_transaction(raw: bytes) -> bytes:
    """The txid of one whole transaction."""
    end, txid = _transaction_at(raw, 0)
    if end != len(raw):
        raise _fault("there are bytes behind a transaction")
    return txid


def _transaction_at(raw: bytes, start: int) -> tuple[int, bytes]:
    """Where the transaction that starts somewhere ends, and its txid. Source: BIP144; Bitcoin Core reads no others."""
    has_witness = raw[start + 4 : start + 6] == b"\x00\x01"
    body = at = start + (6 if has_witness else 4)
    try:
        inputs, at = _size_at(raw, at)
        for _ in range(inputs):
            size, at = _size_at(raw, at + 36)
            at += size + 4
        outputs, at = _size_at(raw, at)
        for _ in range(outputs):
            size, at = _size_at(raw, at + 8)
            at += size
        body_end = at
        if has_witness:
            most = 0
            for _ in range(inputs):
                items, at = _size_at(raw, at)
                most = max(most, items)
                for _ in range(items):
                    size, at = _size_at(raw, at)
                    at += size
            if not most:
                raise _fault("a transaction has a witness without any part")
    except IndexError:
        raise _fault("a transaction is cut off") from None
    at += 4
    if at > len(raw):
        raise _fault("a transaction is cut off")
    if not inputs or not outputs:
        raise _fault("a transaction has no input or no output")
    if not has_witness:
        return at, sha256d(raw[start:at])
    return at, sha256d(raw[start : start + 4] + raw[body:body_end] + raw[at - 4 : at])


def _read_coinbase(raw: bytes) -> _Coinbase:
    txid = _read_transaction(raw)
    has_witness = raw[4] == 0
    at = 6 if has_witness else 4
    if raw[at] != 1 or raw[at + 1 : at + 37] != _NULL_OUTPOINT:
        raise _fault("its first transaction is no coinbase")
    size, at = _size_at(raw, at + 37)
    if not 2 <= size <= 100:
        raise _fault(f"the coinbase script has 2 to 100 bytes, got {size}")
    try:
        block_height = bip34_height(raw[at : at + size])
    except DecodeError as error:
        raise _fault(str(error)) from None
    outputs, at = _size_at(raw, at + size + 4)
    value, commitment = 0, None
    for _ in range(outputs):
        value += int.from_bytes(raw[at : at + 8], "little")
        size, at = _size_at(raw, at + 8)
        if size >= 38 and raw[at : at + 6] == _COMMITMENT_PREFIX:  # the last one counts
            commitment = raw[at + 6 : at + 38]
        at += size
    if value > MAX_MONEY:
        raise _fault(f"its coinbase pays {value} sat, more than there is")
    reserved = raw[at + 2 : -4] if has_witness else None
    if has_witness != (commitment is not None) or (
        has_witness and (raw[at : at + 2], len(raw) - at) != (b"\x01\x20", 38)
    ):
        raise _fault("its coinbase must have a witness of 32 bytes if it commits to witnesses, and none otherwise")
    return _Coinbase(
        raw=raw,
        txid=txid,
        block_height=block_height,
        value=value,
        outputs=outputs,
        commitment=commitment,
        reserved=reserved,
    )


def _size_at(raw: bytes, at: int) -> tuple[int, int]:
    """A compact size, and where it ends. Raises: IndexError, nothing is there; PeerError."""
    first = raw[at]
    if first < 0xFD:
        return first, at + 1
    width = 2 << (first - 0xFD)
    number = int.from_bytes(raw[at + 1 : at + 1 + width], "little")
    if number < (0xFD if width == 2 else 1 << 4 * width):
        raise _fault("a size is not in its shortest form")
    return number, at + 1 + width


def _compact_size(number: int) -> bytes:
    return bytes([number]) if number < 0xFD else b"\xfd" + number.to_bytes(2, "little")


def _fault(message: str) -> PeerError:
    return PeerError("block", message)


def _shown(block_hash: bytes) -> str:
    return block_hash[::-1].hex()
