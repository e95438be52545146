"""Builds real shares for tests: proof of work done, coinbase committed, every rule kept unless told otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from sharechain.chain import Accepted, Sharechain
from sharechain.coinbase import COINBASE_TAG, build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.entry import ChainEntry
from sharechain.hasher import scan_nonces
from sharechain.params import NETWORKS, Params
from sharechain.payout import Payouts
from sharechain.share import Share, ShareData, bip34_push, pack_header, share_commitment
from sharechain.validate import BlockFacts, derive_data, median_time, next_max_bits, window_work

#: A network on which nearly every header is a share, and the window is some ten shares long.
PARAMS = NETWORKS["regtest"].with_overrides(
    {
        "name": "test",
        "heaviest_share": 1000,
        "share_period_ms": 10_000,
        "half_life_s": 1200,
        "stall_after_s": 600,
        "stall_doubling_s": 60,
        "max_target": hex(2**255 - 1),
        "block_target_divisor": 3,
        "window_max_shares": 20,
    }
)
#: The same with a thousand hashes for a share: work is no longer a number of one digit, and a share whose header
#: was changed is no share.
FINE = PARAMS.with_overrides({"name": "fine", "max_target": hex(2**246 - 1)})
BLOCK_BITS = 0x207FFFFF
GENESIS_BLOCK = bytes(range(32))
GENESIS_FACTS = BlockFacts(height=100, next_bits=BLOCK_BITS)
START_TIME = 1_700_000_000
VALUE = 50 * 100_000_000


def miner_script(number: int) -> bytes:
    """The payout script of test miner ``number``: all five types take turns."""
    digest = hashlib.sha256(b"miner %d" % number).digest()
    return (
        b"\x00\x14" + digest[:20],
        b"\x51\x20" + digest,
        b"\x76\xa9\x14" + digest[:20] + b"\x88\xac",
        b"\xa9\x14" + digest[:20] + b"\x87",
        b"\x00\x20" + digest,
    )[number % 5]


def new_chain(params: Params = PARAMS, **options: int) -> Sharechain:
    """An empty chain that knows the Bitcoin block ``GENESIS_BLOCK``."""
    chain = Sharechain(params, **options)
    chain.learn_block(GENESIS_BLOCK, GENESIS_FACTS, START_TIME)
    return chain


def mine(
    chain: Sharechain,
    parent: ChainEntry | None,
    *,
    miner: int = 0,
    time: int | None = None,
    uncles: Sequence[ChainEntry] = (),
    bits: int | None = None,
    payout_class: int | None = None,
    value: int = VALUE,
    witness_commitment: bytes | None = None,
    branch: tuple[bytes, ...] = (),
    block: bytes = GENESIS_BLOCK,
    block_bits: int = BLOCK_BITS,
    block_height: int | None = None,
    salt: int = 0,
    payouts: Payouts | None = None,
    data: dict[str, object] | None = None,
) -> Share:
    """Mine one share on ``parent``, with its proof of work.

    Args:
        data: fields of the share's data to put in place of the right ones.
        salt: makes another share of the same fields.
        payouts: what to pay in place of what the window says.
        (the others): as the fields of a share; what is None is chosen as an honest miner would.
    """
    params = chain.params
    if time is None:
        time = START_TIME if parent is None else max(parent.time + 10, median_time(parent) + 1)
    if block_height is None:
        facts = chain.block_facts(block)
        block_height = (GENESIS_FACTS if facts is None else facts).height + 1
    derived = derive_data(
        params,
        parent=parent,
        uncles=uncles,
        bits=next_max_bits(params, parent),
        payout_script=miner_script(miner),
        payout_class=params.payout_classes[0] if payout_class is None else payout_class,
    )
    if bits is None:
        bits = derived.max_bits
    derived = derive_data(
        params,
        parent=parent,
        uncles=uncles,
        bits=bits,
        payout_script=derived.payout_script,
        payout_class=derived.payout_class,
    )
    derived = replace(derived, **(data or {}))  # type: ignore[arg-type]
    script = bip34_push(block_height) + COINBASE_TAG + salt.to_bytes(8, "little")
    if payouts is None:
        payouts = chain.payouts(
            parent,
            value=value,
            payout_class=derived.payout_class,
            max_bits=derived.max_bits,
            block_bits=block_bits,
        )
    coinbase = build_coinbase(
        script,
        payouts,
        derived.payout_script,
        witness_commitment,
        share_commitment(params.network_id, derived),
    )
    header = solve(
        pack_header(
            version=0x20000000,
            previous_block_hash=block,
            merkle_root=fold_coinbase(coinbase, branch),
            time=time,
            bits=block_bits,
            nonce=0,
        ),
        bits_to_target(bits),
    )
    return make_share(header, script, value, witness_commitment, branch, derived)


def make_share(
    header: bytes,
    script: bytes,
    value: int,
    witness_commitment: bytes | None,
    branch: tuple[bytes, ...],
    data: ShareData,
) -> Share:
    """A share from its parts."""
    return Share(
        header=header,
        coinbase_script=script,
        coinbase_value=value,
        witness_commitment=witness_commitment,
        merkle_branch=branch,
        data=data,
    )


def solve(header: bytes, target: int) -> bytes:
    """The header with the first nonce that meets the target."""
    nonce = scan_nonces(header, 0, 2**32, target).nonce
    assert nonce is not None
    return header[:76] + nonce.to_bytes(4, "little")


def add(chain: Sharechain, share: Share, now: float | None = None) -> Accepted:
    """Accept a share that must join the chain."""
    outcome = chain.accept(share, share.time if now is None else now)
    assert isinstance(outcome, Accepted), outcome
    return outcome


def grow(chain: Sharechain, count: int, *, miners: int = 5, parent: ChainEntry | None = None) -> list[Share]:
    """Extend the chain by ``count`` shares of ``miners`` miners, naming the uncles that there are."""
    shares = []
    parent = chain.tip if parent is None else parent
    for number in range(count):
        share = mine(chain, parent, miner=number % miners, uncles=chain.uncle_candidates(parent))
        add(chain, share)
        shares.append(share)
        parent = chain.entry(share.hash)
    return shares


def harder(bits: int, numerator: int, denominator: int = 1) -> int:
    """The compact target that is numerator / denominator times as hard."""
    return target_to_bits(bits_to_target(bits) * denominator // numerator)


def snapshot(chain: Sharechain) -> tuple[object, ...]:
    """All that nodes with the same shares must agree on: tip, main chain, window, payouts, uncles to name."""
    params, tip = chain.params, chain.tip
    if tip is None:
        return ()
    max_bits = next_max_bits(params, tip)
    window = chain.window_at(tip, window_work(params, max_bits, BLOCK_BITS))
    weights, units = window.table.items(), len(window)
    payouts = [
        chain.payouts(tip, value=VALUE, payout_class=size, max_bits=max_bits, block_bits=BLOCK_BITS)
        for size in params.payout_classes
    ]
    main = []
    for height in range(chain.base_height, tip.height + 1):
        entry = chain.main_entry(height)
        assert entry is not None
        main.append(entry.hash)
    return (
        tip.hash,
        tip.total_work,
        tuple(main),
        tuple(weights),
        units,
        tuple(payouts),
        tuple(uncle.hash for uncle in chain.uncle_candidates(tip)),
        chain.locator(),
    )


#: One share of a random tree: how many shares back its parent is, its miner, its hardness, whether it names uncles.
Step = tuple[int, int, int, bool]


def grow_tree(chain: Sharechain, steps: Sequence[Step]) -> list[Share]:
    """Shares as miners with different views would find them: siblings, forks, uncles, all hardnesses.

    ``chain`` accepts each at once, in the order in which they are returned.
    """
    shares: list[Share] = []
    for number, (back, miner, hardness, names) in enumerate(steps):
        parent = chain.entry(shares[max(0, len(shares) - 1 - back)].hash) if shares else None
        share = mine(
            chain,
            parent,
            miner=miner,
            uncles=chain.uncle_candidates(parent) if names else (),
            # Nearly all sums of work differ, so that the heaviest is one share and not the first seen of two.
            bits=harder(next_max_bits(chain.params, parent), 1_000 + 311 * hardness + number * number, 1_000),
            salt=number,
        )
        add(chain, share)
        shares.append(share)
    return shares


def forged_under(share: Share, **data: object) -> Share:
    """Another body under the same header: what anybody can make without work."""
    return replace(share, data=replace(share.data, **data))  # type: ignore[arg-type]
