"""A small mempool for the embedded Bitcoin: the unspent outputs of its chain, and transactions added by hand.

It exists so that templates have fees, witness commitments and merkle branches that are not empty. Pure: the
kernel backend brings it the blocks.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError, VarIntSerializer

from p2pool.bitcoin_backend.template import TemplateTransaction
from p2pool.errors import BackendError
from sharechain.params import MAX_MONEY

COINBASE_MATURITY = 100  # blocks
_WEIGHT_LIMIT = 3_600_000  # of a block's 4,000,000 weight units: a tenth is left to the coinbase
_UNDO_DEPTH = 100  # blocks; a deeper reorg collects the unspent outputs anew and forgets what was undone


class Spendable(NamedTuple):
    """An output that may be spent now: its transaction's id (internal order), position and value (sat)."""

    txid: bytes
    vout: int
    value: int


class Coin(NamedTuple):
    """An unspent output: value in sat, script, and the height and kind of the transaction that made it."""

    value: int
    script: bytes
    height: int
    is_coinbase: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A transaction as the mempool sees it. Inputs: (outpoint, sequence); outputs: (value, script)."""

    raw: bytes
    txid: bytes
    wtxid: bytes
    weight: int
    version: int
    inputs: tuple[tuple[bytes, int], ...]
    outputs: tuple[tuple[int, bytes], ...]
    lock_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """How to undo a block: what it spent, what it made, and its transactions, which may be mined again."""

    spent: tuple[tuple[bytes, Coin], ...]
    made: tuple[bytes, ...]
    transactions: tuple[Transaction, ...]


class Mempool:
    """The unspent outputs of the chain, and the transactions that wait to be mined. Pure.

    State: `block_hashes` are the blocks connected, by height; `coins` are the unspent outputs after the last
    of them, by outpoint (36 bytes: txid, index); `recent` can undo the last of them; `pool` are the waiting
    transactions by txid, parents first, with their fees; `claimed` are the outpoints that they spend,
    `weight` is their sum;
    `median_time` is the tip's.
    Each transaction in `pool` spends only what is in `coins` or made by one before it, and no outpoint twice.
    """

    def __init__(self, genesis_hash: bytes) -> None:
        # Bitcoin's first coinbase cannot be spent.
        self.block_hashes = [genesis_hash]
        self.coins: dict[bytes, Coin] = {}
        self.recent: list[Connected] = []
        self.pool: dict[bytes, tuple[Transaction, int]] = {}
        self.claimed: set[bytes] = set()
        self.weight = 0
        self.median_time = 0

    def connect(self, block_hash: bytes, raw: bytes) -> None:
        height = len(self.block_hashes)
        spent: list[tuple[bytes, Coin]] = []
        made: list[bytes] = []
        transactions = read_block_transactions(raw)
        for transaction in transactions:
            is_coinbase = transaction is transactions[0]
            if not is_coinbase:
                spent += [(outpoint, self.coins.pop(outpoint)) for outpoint, _ in transaction.inputs]
            for outpoint, coin in _made_by(transaction, height, is_coinbase):
                self.coins[outpoint] = coin
                made.append(outpoint)
        self.block_hashes.append(block_hash)
        self.recent.append(Connected(spent=tuple(spent), made=tuple(made), transactions=tuple(transactions[1:])))
        del self.recent[:-_UNDO_DEPTH]

    def disconnect(self) -> list[Transaction]:
        """Undo the last block and give its transactions; if that is too deep, begin again at genesis."""
        if not self.recent:
            del self.block_hashes[1:]
            self.coins.clear()
            return []
        last = self.recent.pop()
        self.block_hashes.pop()
        self.coins.update(last.spent)
        for outpoint in last.made:
            self.coins.pop(outpoint, None)
        return list(last.transactions)

    def judge_anew(self, undone: Iterable[Transaction], median_time: int) -> None:
        """Keep of the pool and of the undone blocks what the next block may still contain."""
        self.median_time = median_time
        candidates = [*undone, *(transaction for transaction, _ in self.pool.values())]
        self.pool.clear()
        self.claimed.clear()
        self.weight = 0
        for transaction in candidates:
            with contextlib.suppress(BackendError):  # what is no longer possible is dropped
                self.add(transaction, self.check(transaction))

    def check(self, transaction: Transaction) -> list[Coin]:
        """Give the coins that a transaction spends, after every check but that of the scripts.

        Source: CheckTransaction, CheckTxInputs, IsFinalTx and SequenceLocks of Bitcoin Core.
        """
        height = len(self.block_hashes)  # of the next block
        outpoints = [outpoint for outpoint, _ in transaction.inputs]
        values = [value for value, _ in transaction.outputs]
        if transaction.txid in self.pool:
            raise BackendError("txn-already-in-mempool: it was added before")
        if not values or len(set(outpoints)) < len(outpoints):
            raise BackendError("bad-txns: no output, or an input twice")
        if min(values) < 0 or sum(values) > MAX_MONEY:
            raise BackendError("bad-txns-vout-toolarge: an output is negative, or all are more than there is")
        if self.weight + transaction.weight > _WEIGHT_LIMIT:
            raise BackendError("mempool-full: the next block has no room for it")
        if transaction.lock_time and any(sequence != 0xFFFFFFFF for _, sequence in transaction.inputs):
            reached = height if transaction.lock_time < 500_000_000 else self.median_time
            if transaction.lock_time >= reached:
                raise BackendError(f"bad-txns-nonfinal: locked until {transaction.lock_time}, now {reached}")
        coins = []
        for outpoint, sequence in transaction.inputs:
            coin = self._coin(outpoint, height)
            if coin.is_coinbase and height - coin.height < COINBASE_MATURITY:
                raise BackendError(
                    f"bad-txns-premature-spend-of-coinbase: mined at {coin.height}, tried to spend at {height}, "
                    f"matures after {COINBASE_MATURITY} blocks"
                )
            if transaction.version >= 2 and not sequence & 1 << 31:  # BIP68
                if sequence & 1 << 22:
                    raise BackendError("non-BIP68-final: relative locks by time are not supported here")
                if coin.height + (sequence & 0xFFFF) > height:
                    raise BackendError(f"non-BIP68-final: locked for {sequence & 0xFFFF} blocks")
            coins.append(coin)
        paid = sum(coin.value for coin in coins)
        if paid < sum(values):
            raise BackendError(f"bad-txns-in-belowout: inputs of {paid} sat, outputs of {sum(values)} sat")
        return coins

    def add(self, transaction: Transaction, coins: list[Coin]) -> None:
        """Let a transaction wait, for which `check` gave these coins."""
        fee = sum(coin.value for coin in coins) - sum(value for value, _ in transaction.outputs)
        self.pool[transaction.txid] = transaction, fee
        self.claimed.update(outpoint for outpoint, _ in transaction.inputs)
        self.weight += transaction.weight

    def forget_culprit(self, state: str, raw_block: bytes) -> None:
        """Remove the transaction that Core blames for an invalid block.

        If it names none and the block held only ours, all of them go. A foreign transaction, or a tampered
        copy of ours, costs us nothing.
        """
        if not re.match(r"bad-txns-|bad-blk-|.*script-verify-flag-failed", state):
            return
        ours = {transaction.wtxid for transaction, _ in self.pool.values()}
        in_block = {transaction.wtxid for transaction in read_block_transactions(raw_block)[1:]}
        named = re.findall(r"(?:wtxid|tx hash|transaction) ([0-9a-f]{64})", state)
        guilty = {bytes.fromhex(name)[::-1] for name in named} & in_block
        if not named and in_block <= ours:
            guilty = in_block
        kept = [transaction for transaction, _ in self.pool.values() if transaction.wtxid not in guilty]
        self.pool.clear()
        self.judge_anew(kept, self.median_time)

    def template_transactions(self) -> list[TemplateTransaction]:
        positions = {txid: position for position, txid in enumerate(self.pool)}
        return [
            TemplateTransaction(
                raw=transaction.raw,
                txid=transaction.txid,
                wtxid=transaction.wtxid,
                fee=fee,
                weight=transaction.weight,
                depends=tuple(sorted({positions[o[:32]] for o, _ in transaction.inputs if o[:32] in positions})),
            )
            for transaction, fee in self.pool.values()
        ]

    def mature_coinbases(self, script: bytes) -> Iterator[Spendable]:
        mature = len(self.block_hashes) - COINBASE_MATURITY
        for outpoint, coin in self.coins.items():
            is_mature = coin.is_coinbase and coin.height <= mature
            if is_mature and coin.script == script and outpoint not in self.claimed:
                yield Spendable(outpoint[:32], int.from_bytes(outpoint[32:], "little"), coin.value)

    def _coin(self, outpoint: bytes, height: int) -> Coin:
        name = f"{outpoint[31::-1].hex()}:{int.from_bytes(outpoint[32:], 'little')}"
        if outpoint in self.claimed:
            raise BackendError(f"txn-mempool-conflict: another transaction spends {name}")
        coin = self.coins.get(outpoint)
        if coin is None and outpoint[:32] in self.pool:
            coin = dict(_made_by(self.pool[outpoint[:32]][0], height, is_coinbase=False)).get(outpoint)
        if coin is None:
            raise BackendError(f"bad-txns-inputs-missingorspent: there is no unspent output {name}")
        return coin


def _made_by(transaction: Transaction, height: int, is_coinbase: bool) -> Iterator[tuple[bytes, Coin]]:
    for index, (value, script) in enumerate(transaction.outputs):
        if not script.startswith(b"\x6a"):  # OP_RETURN: not an unspent output
            yield transaction.txid + index.to_bytes(4, "little"), Coin(value, script, height, is_coinbase)


def read_block_transactions(raw: bytes) -> list[Transaction]:
    """The transactions of a block that Core has decoded before."""
    stream = io.BytesIO(raw)
    stream.seek(80)
    count = VarIntSerializer.stream_deserialize(stream)
    return [_transaction_of(CTransaction.stream_deserialize(stream)) for _ in range(count)]


def read_transaction(raw: bytes) -> Transaction:
    """A whole transaction.

    Raises:
        BackendError: "decode-failed", these bytes are not one transaction in its one serialisation.
    """
    stream = io.BytesIO(raw)
    try:
        transaction = _transaction_of(CTransaction.stream_deserialize(stream))
    except (SerializationError, ValueError) as error:
        raise BackendError(f"decode-failed: {error}") from None
    if transaction.raw != raw:
        raise BackendError("decode-failed: not one transaction in its canonical serialisation")
    return transaction


def _transaction_of(parsed: CTransaction) -> Transaction:
    raw = parsed.serialize()
    stripped = CTransaction(parsed.vin, parsed.vout, parsed.nLockTime, parsed.nVersion).serialize()
    return Transaction(
        raw=raw,
        txid=parsed.GetTxid(),
        wtxid=parsed.GetHash(),
        weight=3 * len(stripped) + len(raw),
        version=parsed.nVersion & 0xFFFFFFFF,
        inputs=tuple((source.prevout.serialize(), source.nSequence) for source in parsed.vin),
        outputs=tuple((output.nValue, bytes(output.scriptPubKey)) for output in parsed.vout),
        lock_time=parsed.nLockTime,
    )
