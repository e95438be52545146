"""A regtest chain for tests of Bitcoin nodes: blocks by hand, a chain to begin with, and its coins to spend."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final, Protocol

from bitcoin.core import CBlock
from coincurve import PrivateKey

from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, assemble_block, block_subsidy, build_template
from sharechain import hasher
from sharechain.coinbase import build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target
from sharechain.hasher import sha256d
from sharechain.payout import Payouts
from sharechain.share import bip34_push, pack_header
from tests.p2pool.spending import Spent, p2tr_script, p2wpkh_script, spend_p2tr, spend_p2wpkh, txid_of

__all__ = [
    "FUNDED",
    "KEY",
    "MATURITY",
    "P2TR",
    "P2WPKH",
    "PREMINED",
    "REGTEST_BITS",
    "UNUSED",
    "EmbeddedNode",
    "Payment",
    "RegtestNode",
    "Wallet",
    "after",
    "build_block",
    "extend",
    "extend_empty",
    "pay",
    "premined",
    "premined_wallet",
    "take_premined",
]

#: Blocks after which a coinbase may be spent.
MATURITY: Final = 100
#: Length of the chain that nodes under test begin with, and how many of its blocks pay `KEY`.
PREMINED: Final = 440
FUNDED: Final = 30
#: Blocks between two halvings on regtest.
HALVING_INTERVAL: Final = 150
#: Bits of regtest: every second header is a block.
REGTEST_BITS: Final = 0x207FFFFF
#: Of BIP9, with the bits set by which btcd's regtest votes for CSV, segwit and taproot.
BLOCK_VERSION: Final = 0x20000007

_serial: Final = itertools.count()

KEY: Final = PrivateKey(b"\x01" * 32)
P2WPKH: Final = p2wpkh_script(KEY)
P2TR: Final = p2tr_script(KEY)
UNUSED: Final = b"\x00\x14" + bytes(20)


# Nodes.


class RegtestNode(Protocol):
    """What a test does with a Bitcoin node, past the pool."""

    def template(self) -> BlockTemplate:
        """A block to mine, as the node gives it."""

    def submit(self, raw: bytes) -> str | None:
        """Its answer to a block: None is good, or is not looked at any closer."""

    def tip(self) -> bytes:
        """The hash of its tip, internal order."""

    def block(self, block_hash: bytes) -> bytes:
        """A block that it has."""

    def send(self, raw: bytes) -> None:
        """Put a transaction into its mempool. Raises: RpcFault or BackendError, with its reason."""

    def mempool(self) -> set[bytes]:
        """The ids (internal order) of the transactions that wait to be mined."""


class EmbeddedNode:
    """The embedded Bitcoin as a `RegtestNode`."""

    def __init__(self, kernel: KernelBackend) -> None:
        """Close the kernel yourself."""
        self.kernel = kernel

    def template(self) -> BlockTemplate:
        """See `RegtestNode`."""
        return self.kernel.block_template_now()

    def submit(self, raw: bytes) -> str | None:
        """See `RegtestNode`. Wakes nobody."""
        return self.kernel.submit_block_now(raw).reason or None

    def tip(self) -> bytes:
        """See `RegtestNode`."""
        return self.kernel.tip_now().block_hash

    def block(self, block_hash: bytes) -> bytes:
        """See `RegtestNode`."""
        raw = self.kernel.block_now(block_hash)
        assert raw is not None
        return raw

    def send(self, raw: bytes) -> None:
        """See `RegtestNode`."""
        self.kernel.add_transaction(raw)

    def mempool(self) -> set[bytes]:
        """See `RegtestNode`."""
        return set(self.kernel.mempool_txids())


# Blocks.


def build_block(template: BlockTemplate, script: bytes = P2WPKH, *, extra: int = 0, solved: bool = True) -> bytes:
    """A whole block that pays everything to one script. No two are the same, whatever the arguments.

    Arguments:
        template: what is changed in it before is in the block: a wrong value, other bits, another time.
        script: an output script.
        extra: sat that are paid beyond what the template allows.
        solved: False for a header without proof of work.
    """
    value = template.coinbase_value + extra
    payouts = Payouts(outputs=b"", count=0, finder_amount=value, threshold=0)
    push = bip34_push(template.height) + b"/test/" + next(_serial).to_bytes(8, "big")
    coinbase = build_coinbase(push, payouts, script, template.witness_commitment, bytes(32))
    header = pack_header(
        version=template.version,
        previous_block_hash=template.previous_block_hash,
        merkle_root=fold_coinbase(coinbase, template.merkle_branch),
        time=template.time,
        bits=template.bits,
        nonce=0,
    )
    target = bits_to_target(template.bits)
    nonce = hasher.scan_nonces(header, 0, 2**32, target).nonce if solved else _bad_nonce(header, target)
    assert nonce is not None
    return assemble_block(header[:76] + nonce.to_bytes(4, "little"), coinbase, template)


def _bad_nonce(header: bytes, target: int) -> int:
    nonce = 0
    while int.from_bytes(sha256d(header[:76] + nonce.to_bytes(4, "little")), "little") <= target:
        nonce += 1
    return nonce


def after(raw: bytes, height: int) -> BlockTemplate:
    """An empty block on any block, a second later.

    Arguments:
        raw: the block below, or its header.
        height: of the block that is to come.
    """
    time = int.from_bytes(raw[68:72], "little") + 1
    return build_template(
        version=BLOCK_VERSION,
        previous_block_hash=sha256d(raw[:80]),
        height=height,
        bits=REGTEST_BITS,
        min_time=time,
        time=time,
        coinbase_value=block_subsidy(height, HALVING_INTERVAL),
        transactions=(),
    )


def extend(node: RegtestNode, count: int = 1, script: bytes = P2WPKH) -> list[bytes]:
    """Mine on a node's tip what it has to mine; give the blocks. It must take each."""
    blocks = []
    for _ in range(count):
        raw = build_block(node.template(), script)
        answer = node.submit(raw)
        assert answer is None, answer
        assert node.tip() == sha256d(raw[:80])
        blocks.append(raw)
    return blocks


def extend_empty(node: RegtestNode) -> bytes:
    """Mine an empty block on a node's tip: btcd looks for new transactions only when it has a new tip."""
    template = node.template()
    tip, height = template.previous_block_hash, template.height
    raw = build_block(after(node.block(tip), height), UNUSED)
    answer = node.submit(raw)
    assert answer is None, answer
    return raw


def take_premined(node: RegtestNode, count: int = PREMINED) -> None:
    """Bring a fresh node to where the chain of `premined`, or the beginning of it, ends."""
    for raw in premined()[:count]:
        answer = node.submit(raw)
        assert answer is None, answer
    assert node.tip() == sha256d(premined()[count - 1][:80])


@cache
def premined() -> tuple[bytes, ...]:
    """The chain that each node under test begins with: blocks from height 1 on, a second apart, the last an hour ago.

    It is as young as this because btcd gives no template on a tip of yesterday, and so long because segwit and taproot
    are in force on btcd's regtest only when the blocks of one period of 144 have voted for them, and another period has
    passed. The first `FUNDED` blocks pay `P2WPKH` and `P2TR` by turns, the others a script that nobody uses.
    """
    genesis = pack_header(
        version=1,
        previous_block_hash=bytes(32),
        merkle_root=bytes.fromhex("3ba3edfd7a7b12b27ac72c3e67768f617fc81bc3888a51323a9fb8aa4b1e5e4a"),
        time=1296688602,
        bits=REGTEST_BITS,
        nonce=2,
    )
    blocks: list[bytes] = []
    start = int(time.time()) - 3_600 - PREMINED
    for height in range(1, PREMINED + 1):
        template = after(blocks[-1] if blocks else genesis, height)
        template = replace(template, time=start + height)
        script = (P2WPKH, P2TR)[height % 2] if height <= FUNDED else UNUSED
        blocks.append(build_block(template, script))
    return tuple(blocks)


# Transactions.


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A signed transaction."""

    raw: bytes
    txid: bytes
    fee: int


@dataclass(kw_only=True)
class Wallet:
    """The coins of `KEY`, and what spends them.

    Mutable fields: ``coins``, not spent yet, the oldest first; each with the script that it pays.
    """

    coins: list[tuple[Spent, bytes]] = field(default_factory=list)

    def found(self, raw: bytes) -> None:
        """Take in the coinbase outputs of a block that pay `P2WPKH` or `P2TR`, mature or not."""
        coinbase = CBlock.deserialize(raw).vtx[0]
        for index, output in enumerate(coinbase.vout):
            script = bytes(output.scriptPubKey)
            if script in (P2WPKH, P2TR):
                self.coins.append(((coinbase.GetTxid(), index, output.nValue), script))

    def payments(self, count: int, *, fee: int = 5_000) -> list[Payment]:
        """Sign transactions by turns from a P2WPKH coin, from a P2TR coin, and from the output of the one before.

        Arguments:
            count: how many.
            fee: of the first, sat; each further one pays 100 more.
        """
        payments: list[Payment] = []
        change: tuple[Spent, bytes] | None = None
        for number in range(count):
            coin = change if number % 3 == 2 and change is not None else self._take(P2TR if number % 3 else P2WPKH)
            payment, change = pay(coin, fee + 100 * number)
            payments.append(payment)
        return payments

    def _take(self, script: bytes) -> tuple[Spent, bytes]:
        coin = next(coin for coin in self.coins if coin[1] == script)
        self.coins.remove(coin)
        return coin


def premined_wallet() -> Wallet:
    """All coins of the chain of `premined`."""
    wallet = Wallet()
    for raw in premined()[:FUNDED]:
        wallet.found(raw)
    return wallet


def pay(coin: tuple[Spent, bytes], fee: int, script: bytes = P2WPKH) -> tuple[Payment, tuple[Spent, bytes]]:
    """Spend a coin of `KEY`; give the transaction, and the coin that it makes."""
    spent, paid = coin
    value = spent[2] - fee
    raw = (spend_p2tr if paid == P2TR else spend_p2wpkh)(KEY, [spent], [(value, script)])
    return Payment(raw=raw, txid=txid_of(raw), fee=fee), ((txid_of(raw), 0, value), script)
