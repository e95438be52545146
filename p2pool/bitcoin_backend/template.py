"""What a Bitcoin node tells a pool, as values: a block to mine, facts about a header, a verdict on a block.

Everything here is pure and has one byte order, the internal one. Whatever the backend is, a template carries
what a coinbase needs and no more: the value it may pay, the commitment that it must carry, and the merkle
branch that joins it to the transactions. The branch is computed once per template, however many coinbases
are tried with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharechain.hasher import sha256d

COIN = 100_000_000  # sat
_WITNESS_RESERVED_VALUE = bytes(32)  # BIP141: the coinbase's witness, free for future commitments, zero today


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFacts:
    """What a Bitcoin node knows of a block header, as far as a share built on it depends on it.

    Arguments:
        block_hash: of the header, 32 bytes, internal order.
        height: of the block in Bitcoin's chain.
        next_bits: the compact target that Bitcoin demands of a block built on this one.
        late: where difficulty falls when nobody mines (testnet4): the Unix time after which a block built on this one
            must have another compact target, and that target.
        median_time: median of the times of this block and the ten before it, Unix seconds (BIP113). A block
            built on this one needs a greater time.
    """

    block_hash: bytes
    height: int
    next_bits: int
    median_time: int
    late: tuple[int, int] | None = None

    def bits_at(self, time: int) -> int:
        """Give the compact target that Bitcoin demands of a block built on this one with header time `time`."""
        return self.next_bits if self.late is None or time <= self.late[0] else self.late[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitResult:
    """What the Bitcoin node said to a block.

    Arguments:
        accepted: True if the block is valid and the node's chain now ends in it (or went through it).
        reason: empty if accepted, else Bitcoin Core's own word for it: "bad-cb-amount", "high-hash",
            "duplicate", ... "inconclusive" means that it was stored on a side branch without being validated.
    """

    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTransaction:
    """One transaction of a template.

    Arguments:
        raw: the whole transaction with its witness.
        txid: without the witness, 32 bytes, internal order.
        wtxid: with the witness, 32 bytes, internal order; equal to `txid` if there is none.
        fee: sat.
        weight: BIP141 weight units.
        depends: positions in the template of the transactions that must come before this one, counted from 0.
        sigops: cost of its signature checks (BIP141), or None if the backend does not say.
    """

    raw: bytes
    txid: bytes
    wtxid: bytes
    fee: int
    weight: int
    depends: tuple[int, ...] = ()
    sigops: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTemplate:
    """A block that Bitcoin would accept, but for its coinbase and its nonce. See `build_template`.

    Arguments:
        version: of the header.
        previous_block_hash: 32 bytes, internal order.
        height: of the block to be mined.
        bits: its compact target.
        min_time: the least header time that is valid, Unix seconds.
        time: the header time to use now, Unix seconds.
        coinbase_value: subsidy and fees, sat: what the coinbase may pay at most.
        transactions: all but the coinbase, in block order.
        witness_commitment: the 32 bytes that a coinbase output must commit to (BIP141), or None if no
            transaction has a witness: then the coinbase needs neither that output nor a witness of its own.
        merkle_branch: from the coinbase's txid up to the merkle root, 32 bytes each, internal order.
        late: as in `HeaderFacts`, of the block that this one is built on.
        coinbase_aux: what the Bitcoin node wants at the end of the coinbase's script (BIP22), mostly nothing.
    """

    version: int
    previous_block_hash: bytes
    height: int
    bits: int
    min_time: int
    time: int
    coinbase_value: int
    transactions: tuple[TemplateTransaction, ...]
    witness_commitment: bytes | None
    merkle_branch: tuple[bytes, ...]
    late: tuple[int, int] | None = None
    coinbase_aux: bytes = b""

    def bits_at(self, time: int) -> int:
        """Give the compact target that Bitcoin demands of this block with header time `time`."""
        return self.bits if self.late is None or time <= self.late[0] else self.late[1]


def build_template(
    *,
    version: int,
    previous_block_hash: bytes,
    height: int,
    bits: int,
    min_time: int,
    time: int,
    coinbase_value: int,
    transactions: Sequence[TemplateTransaction],
    late: tuple[int, int] | None = None,
    coinbase_aux: bytes = b"",
    commits_always: bool = False,
) -> BlockTemplate:
    """Make a template of what a Bitcoin node says; compute the commitment and the branch from it.

    Arguments: as the fields of `BlockTemplate` that bear their names, and
        commits_always: commit to the witnesses even if there are none, as signet's blocks must (BIP325).
    """
    commitment = None
    if commits_always or any(transaction.wtxid != transaction.txid for transaction in transactions):
        commitment = witness_commitment_of([transaction.wtxid for transaction in transactions])
    return BlockTemplate(
        version=version,
        previous_block_hash=previous_block_hash,
        height=height,
        bits=bits,
        min_time=min_time,
        time=time,
        coinbase_value=coinbase_value,
        transactions=tuple(transactions),
        witness_commitment=commitment,
        merkle_branch=merkle_branch([transaction.txid for transaction in transactions]),
        late=late,
        coinbase_aux=coinbase_aux,
    )


def empty_template(
    facts: HeaderFacts, *, version: int, halving_interval: int, now: float, commits_always: bool = False
) -> BlockTemplate:
    """Make a template without transactions of nothing but what is known of the block before it.

    While a Bitcoin node takes its time with the first template on a new tip, miners can work on this one. Not for the
    first block of a retarget period where BIP94 is in force: its time depends on more than the facts say.

    Arguments:
        facts: of the block to build on.
        version: of the header: that of the last template.
        halving_interval: blocks between two halvings.
        now: Unix seconds.
        commits_always: see `build_template`.
    """
    min_time = facts.median_time + 1
    return build_template(
        version=version,
        previous_block_hash=facts.block_hash,
        height=facts.height + 1,
        bits=facts.next_bits,
        min_time=min_time,
        time=max(min_time, int(now)),
        coinbase_value=block_subsidy(facts.height + 1, halving_interval),
        transactions=(),
        late=facts.late,
        commits_always=commits_always,
    )


def block_subsidy(height: int, halving_interval: int) -> int:
    """Give the new coins that a block at `height` may create, in sat.

    Arguments:
        height: of the block.
        halving_interval: blocks between two halvings: 210,000 on mainnet, 150 on regtest.

    Source: GetBlockSubsidy in Bitcoin Core's validation.cpp.
    """
    halvings = height // halving_interval
    return 50 * COIN >> halvings if halvings < 64 else 0


def merkle_root(hashes: Sequence[bytes]) -> bytes:
    """Give the root of the merkle tree over the hashes of all transactions of a block, the coinbase's first.

    Arguments:
        hashes: at least one, 32 bytes each, internal order.

    Raises:
        ValueError: there is no hash.

    Source: BlockMerkleRoot in Bitcoin Core's consensus/merkle.cpp.
    """
    if not hashes:
        raise ValueError("a merkle tree needs at least one hash")
    root = hashes[0]
    for sibling in merkle_branch(hashes[1:]):
        root = sha256d(root + sibling)
    return root


def merkle_branch(txids: Sequence[bytes]) -> tuple[bytes, ...]:
    """Give the siblings on the way from a block's coinbase up to its merkle root.

    A coinbase's txid, hashed with each of them in turn (`root = sha256d(root + sibling)`), gives the merkle
    root. So a pool hashes the transactions once and each coinbase a dozen times at most.

    Arguments:
        txids: of all transactions after the coinbase, in block order; 32 bytes each, internal order.

    Source: TransactionMerklePath in Bitcoin Core's consensus/merkle.cpp, for position 0.
    """
    branch = []
    # `level` lacks its first node, the one that depends on the coinbase.
    level = list(txids)
    while level:
        branch.append(level[0])
        if len(level) % 2 == 0:
            level.append(level[-1])
        level = [sha256d(level[i] + level[i + 1]) for i in range(1, len(level), 2)]
    return tuple(branch)


def witness_commitment_of(wtxids: Sequence[bytes]) -> bytes:
    """Give the 32 bytes by which a coinbase commits to the witnesses of a block.

    The output's script is `OP_RETURN 0x24 0xaa21a9ed <these 32 bytes>`.

    Arguments:
        wtxids: of all transactions after the coinbase, in block order; 32 bytes each, internal order. The
            coinbase counts as 32 zero bytes.

    Source: BIP141, "Commitment structure".
    """
    return sha256d(merkle_root([bytes(32), *wtxids]) + _WITNESS_RESERVED_VALUE)


def assemble_block(header: bytes, coinbase: bytes, template: BlockTemplate) -> bytes:
    """Join a solved header, its coinbase and a template's transactions to the block that goes to the network.

    Arguments:
        header: 80 bytes.
        coinbase: the coinbase transaction without a witness, as its txid is computed. If the template has a
            witness commitment, the coinbase's own witness (32 zero bytes, BIP141) is put in here.
        template: the one that the header and the coinbase were made for.

    Raises:
        ValueError: the header is not 80 bytes, or the coinbase has a witness already.
    """
    if len(header) != 80:
        raise ValueError(f"a block header has 80 bytes, got {len(header)}")
    if len(coinbase) < 10 or coinbase[4] == 0:
        raise ValueError("expected a coinbase without a witness")
    if template.witness_commitment is not None:
        witness = b"\x01\x20" + _WITNESS_RESERVED_VALUE
        coinbase = coinbase[:4] + b"\x00\x01" + coinbase[4:-4] + witness + coinbase[-4:]
    count = _compact_size(1 + len(template.transactions))
    return b"".join([header, count, coinbase, *(transaction.raw for transaction in template.transactions)])


def _compact_size(number: int) -> bytes:
    if number < 0xFD:
        return bytes([number])
    if number <= 0xFFFF:
        return b"\xfd" + number.to_bytes(2, "little")
    return b"\xfe" + number.to_bytes(4, "little")
