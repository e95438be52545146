"""What a stored sharechain says, as plain values that become JSON, CSV and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from p2pool.bitcoin_backend.address import AddressError, decode_address, encode_address
from p2pool.errors import ConfigError
from sharechain.chain import Accepted, Sharechain
from sharechain.coinbase import coinbase_outputs
from sharechain.difficulty import bits_to_target, difficulty_of, work_of
from sharechain.entry import ChainEntry, ancestors
from sharechain.errors import InvalidShare, StoreError
from sharechain.params import DUST, MEDIAN_SPAN, Params
from sharechain.payout import decode_outputs, finder_bonus
from sharechain.share import Share, share_commitment
from sharechain.store import Store, StoredShare
from sharechain.validate import is_block, next_max_bits, window_work

__all__ = [
    "EXPORT_FIELDS",
    "PayoutReport",
    "VerifyReport",
    "explain_payouts",
    "export_rows",
    "load_chain",
    "payout_report",
    "share_row",
    "share_status",
    "status_report",
    "verify_store",
]

#: The columns of an export, in order.
EXPORT_FIELDS: Final = (
    "hash",
    "parent",
    "uncles",
    "height",
    "time",
    "bits",
    "max_bits",
    "work",
    "total_work",
    "payout_script",
    "address",
    "payout_class",
    "coinbase_value",
    "outputs",
    "status",
    "is_block",
    "block_outcome",
    "first_seen_ms",
    "block_height",
    "block_bits",
    "previous_block_hash",
    "header",
    "coinbase_script",
    "witness_commitment",
    "merkle_branch",
)


def load_chain(params: Params, store: Store, shares: Iterable[StoredShare] | None = None) -> Sharechain:
    """The chain as it was when it was stored.

    Args:
        params: the network's.
        store: where it is stored.
        shares: ``store.shares()``, for a caller that wants to see them pass.

    Raises:
        StoreError: damaged, or not one chain.
    """
    chain = Sharechain(params)
    try:
        stored_shares = store.shares() if shares is None else shares
        chain.restore(
            (stored.share for stored in stored_shares),
            facts=store.facts(),
            tip=store.tip(),
            short_history=store.short_history,
        )
    except InvalidShare as error:
        raise StoreError("shares", error.message) from None
    return chain


def share_status(chain: Sharechain, entry: ChainEntry) -> str:
    """ "main" for a share of the main chain, "uncle" for one that the main chain names, else "stale"."""
    if chain.is_main(entry):
        return "main"
    for height in range(entry.height + 1, entry.height + chain.params.uncle_depth + 1):
        nephew = chain.main_entry(height)
        if nephew is not None and any(uncle is entry for uncle in nephew.uncles):
            return "uncle"
    return "stale"


def share_row(chain: Sharechain, stored: StoredShare) -> dict[str, Any]:
    """One share with all its fields. Hashes as they are displayed (reversed); scripts and headers as hexadecimal.

    ``outputs`` is None where the window of the share reaches below the history that is kept.
    """
    share, params = stored.share, chain.params
    data = share.data
    entry = chain.entry(share.hash)
    assert entry is not None, "the chain was loaded from the same store"
    return {
        "hash": share.hash[::-1].hex(),
        "parent": data.parent[::-1].hex(),
        "uncles": [uncle[::-1].hex() for uncle in data.uncles],
        "height": data.height,
        "time": share.time,
        "bits": data.bits,
        "max_bits": data.max_bits,
        "work": work_of(bits_to_target(data.bits)),
        "total_work": data.total_work,
        "payout_script": data.payout_script.hex(),
        "address": encode_address(data.payout_script, params.bitcoin_network),
        "payout_class": data.payout_class,
        "coinbase_value": share.coinbase_value,
        "outputs": _outputs(chain, share, entry),
        "status": share_status(chain, entry),
        "is_block": is_block(params, share),
        "block_outcome": stored.block_outcome,
        "first_seen_ms": stored.first_seen_ms,
        "block_height": share.block_height,
        "block_bits": share.block_bits,
        "previous_block_hash": share.previous_block_hash[::-1].hex(),
        "header": share.header.hex(),
        "coinbase_script": share.coinbase_script.hex(),
        "witness_commitment": None if share.witness_commitment is None else share.witness_commitment.hex(),
        "merkle_branch": [node.hex() for node in share.merkle_branch],
    }


def _outputs(chain: Sharechain, share: Share, entry: ChainEntry) -> list[list[Any]] | None:
    data = share.data
    if entry.height and _reaches_below(chain, entry):
        return None
    payouts = chain.payouts(
        entry.parent,
        value=share.coinbase_value,
        payout_class=data.payout_class,
        max_bits=data.max_bits,
        block_bits=share.block_bits,
    )
    commitment = share_commitment(chain.params.network_id, data)
    raw = coinbase_outputs(payouts, data.payout_script, share.witness_commitment, commitment)
    outputs = raw[1:] if raw[0] < 0xFD else raw[3:]
    return [[script.hex(), amount] for script, amount in decode_outputs(outputs)]


def _reaches_below(chain: Sharechain, entry: ChainEntry) -> bool:
    return chain.base_height > 0 and entry.height <= chain.checkable_height


def export_rows(chain: Sharechain, store: Store) -> Iterator[dict[str, Any]]:
    """Every stored share, lowest first, each as ``share_row``."""
    for stored in store.shares():
        yield share_row(chain, stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutReport:
    """What a block found now would pay, by class, and why."""

    #: Sat.
    value: int
    payout_class: int
    threshold: int
    #: Sat. Bonus and remainder, for whoever finds it.
    finder_amount: int
    window_shares: int
    window_work: int
    #: For each miner of the window, most first: script, address, weight, shares and uncles in the window,
    #: entitlement (sat), how it is paid ("exact", "drawn" or "not drawn"), what it is paid (sat), the chance
    #: to be drawn at any parent.
    miners: list[dict[str, Any]]


def payout_report(chain: Sharechain, *, value: int, payout_class: int, block_bits: int) -> PayoutReport:
    """Who would be paid what by a block on the chain's tip.

    Args:
        chain: the sharechain.
        value: sat, of the block.
        payout_class: one of the network's.
        block_bits: compact target that Bitcoin demands of the block.
    """
    params, tip = chain.params, chain.tip
    max_bits = next_max_bits(params, tip)
    payouts = chain.payouts(tip, value=value, payout_class=payout_class, max_bits=max_bits, block_bits=block_bits)
    window = chain.window_at(tip, window_work(params, max_bits, block_bits))
    shared = value - finder_bonus(params, value)
    weights = dict(window.table.items())
    total = sum(weights.values())
    entitled = {script: shared * weight // total for script, weight in weights.items()}
    small = sum(amount for amount in entitled.values() if amount < payouts.threshold)
    lots = 0 if small < DUST else max(1, small // payouts.threshold)
    paid = dict(decode_outputs(payouts.outputs))
    counts: dict[bytes, list[int]] = {script: [0, 0] for script in weights}
    for entry in ancestors(tip, len(window)):
        counts.setdefault(entry.payout_script, [0, 0])[0] += 1
        for uncle in entry.uncles:
            counts.setdefault(uncle.payout_script, [0, 0])[1] += 1
    miners = [
        {
            "payout_script": script.hex(),
            "address": encode_address(script, params.bitcoin_network),
            "weight": weight,
            "weight_part": weight / total,
            "shares": counts[script][0],
            "uncles": counts[script][1],
            "entitlement": entitled[script],
            "paid_by": "exact"
            if entitled[script] >= payouts.threshold
            else ("drawn" if script in paid else "not drawn"),
            "paid": paid.get(script, 0),
            "chance": 1.0
            if entitled[script] >= payouts.threshold
            else (lots * entitled[script] / small if small else 0.0),
        }
        for script, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    ]
    return PayoutReport(
        value=value,
        payout_class=payout_class,
        threshold=payouts.threshold,
        finder_amount=payouts.finder_amount,
        window_shares=len(window),
        window_work=total,
        miners=miners,
    )


def explain_payouts(
    params: Params,
    store: Store,
    chain: Sharechain,
    *,
    address: str | None,
    payout_class: int | None,
    value: int | None,
) -> dict[str, Any]:
    """``payout_report`` as a table, with a sentence for each miner that says why it is paid what it is paid.

    Args:
        params, store, chain: of one data directory.
        address: tell of this one only; None for all.
        payout_class: None takes the largest.
        value: sat; None takes the newest share's.

    Raises:
        ConfigError: the class or the address is none of this network's.
    """
    payout_class = params.payout_classes[-1] if payout_class is None else payout_class
    if payout_class not in params.payout_classes:
        raise ConfigError(f"--class: one of {params.payout_classes} is needed, got {payout_class}")
    script = None
    if address is not None:
        try:
            script = decode_address(address, params.bitcoin_network).hex()
        except AddressError as error:
            raise ConfigError(f"--address: {error}") from None
    newest = None if chain.tip is None else store.share(chain.tip.hash)
    if newest is None:
        return {"network": params.name, "height": -1, "window_shares": 0, "miners": []}
    report = payout_report(
        chain,
        value=newest.share.coinbase_value if value is None else value,
        payout_class=payout_class,
        block_bits=newest.share.block_bits,
    )
    miners = [miner for miner in report.miners if script is None or miner["payout_script"] == script]
    if script is not None and not miners:
        miners = [_absent_miner(script, address)]
    for miner in miners:
        miner["weight_percent"] = 100 * miner["weight_part"]
        miner["why"] = _why(report, miner)
    return {
        "network": params.name,
        "height": newest.share.data.height,
        "value": report.value,
        "payout_class": report.payout_class,
        "threshold": report.threshold,
        "finder_amount": report.finder_amount,
        "window_shares": report.window_shares,
        "window_work": report.window_work,
        "miners": miners,
    }


def _absent_miner(script: str, address: str | None) -> dict[str, Any]:
    return {
        "payout_script": script,
        "address": address,
        "weight": 0,
        "weight_part": 0.0,
        "shares": 0,
        "uncles": 0,
        "entitlement": 0,
        "paid_by": "not in the window",
        "paid": 0,
        "chance": 0.0,
    }


def _why(report: PayoutReport, miner: Mapping[str, Any]) -> str:
    if not miner["weight"]:
        return (
            f"{miner['address']} has no share or uncle among the last {report.window_shares} shares, "
            "which are all that the next block pays. Shares older than the window, and stale shares that nobody named, "
            "are not paid."
        )
    owed = (
        f"{miner['address']} has {miner['shares']} shares and {miner['uncles']} uncles in the window: "
        f"{100 * miner['weight_part']:.3f} % of its work, so {miner['entitlement']:,} sat of the {report.value:,} "
        "less the finder's bonus."
    )
    if miner["paid_by"] == "exact":
        return f"{owed} That is at least the threshold of {report.threshold:,} sat: it is paid exactly."
    return (
        f"{owed} That is below the threshold of {report.threshold:,} sat for a coinbase of {report.payout_class} "
        f"payouts, so it takes part in the draw with a chance of {100 * miner['chance']:.3f} % per block; "
        f"on average it gets its {miner['entitlement']:,} sat. "
        + (
            f"On the present tip it is drawn and paid {miner['paid']:,} sat."
            if miner["paid"]
            else "On the present tip it is not drawn; the next share draws anew."
        )
    )


def status_report(params: Params, store: Store, chain: Sharechain, in_use: bool, now: float) -> dict[str, Any]:
    """The state of a sharechain in a few numbers.

    Args:
        params, store, chain: of one data directory.
        in_use: whether a node runs on it.
        now: Unix seconds.
    """
    tip = chain.tip
    statuses = Counter(share_status(chain, entry) for entry in chain.entries())
    outcomes = [stored.block_outcome for stored in store.shares() if is_block(params, stored.share)]
    recent = list(ancestors(tip, 1 + max(10, 600_000 // params.share_period_ms)))
    seconds = recent[0].time - recent[-1].time if recent else 0
    return {
        "network": params.name,
        "network_id": params.network_id.hex(),
        "params": asdict(params),
        "running": in_use,
        "height": -1 if tip is None else tip.height,
        "tip": None if tip is None else tip.hash[::-1].hex(),
        "tip_age_s": None if tip is None else round(now - tip.time, 1),
        "total_work": 0 if tip is None else tip.total_work,
        "shares": len(chain),
        "main": statuses["main"],
        "uncles": statuses["uncle"],
        "stale": statuses["stale"],
        "blocks": len(outcomes),
        "blocks_accepted": outcomes.count(""),
        "share_difficulty": None if tip is None else difficulty_of(bits_to_target(next_max_bits(params, tip))),
        "hash_rate": None if seconds <= 0 else sum(entry.unit_work for entry in recent[:-1]) / seconds,
        "miners_in_chain": len({entry.payout_script for entry in chain.entries()}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify_store`` looked at. That it exists means that nothing was wrong."""

    shares: int
    #: Shares whose every rule was checked again.
    fully_checked: int
    #: The oldest shares of a pruned history: what R5 to R12 need of their ancestors is no longer there.
    history_only: int
    blocks: int
    height: int
    tip: str | None


def verify_store(params: Params, store: Store) -> Iterator[int | VerifyReport]:
    """Reload a store and check every rule again from scratch.

    Yields:
        The number of shares checked so far, from time to time; at last the report.

    Raises:
        StoreError: a record is damaged, missing or too many; ``where`` names it.
    """
    facts, tip = store.facts(), store.tip()
    chain = Sharechain(params, margin=2**62)
    for block_hash, fact in facts.items():
        chain.learn_block(block_hash, fact, 0)
    shares = store.shares()
    first = next(shares, None)
    count = history_only = blocks = 0
    if first is not None and first.share.data.height > 0:
        trusted_to = first.share.data.height + params.window_max_shares + MEDIAN_SPAN + params.uncle_depth
        history = [first.share]
        for stored in shares:
            history.append(stored.share)
            if stored.share.data.height > trusted_to:
                break
        chain.restore(history, facts={}, tip=None)
        count = history_only = len(history)
        first = next(shares, None)
    while first is not None:
        share = first.share
        where = f"s/{share.hash[::-1].hex()}"
        try:
            outcome = chain.accept(share, share.time)
        except InvalidShare as error:
            raise StoreError(where, f"breaks a rule: {error}") from None
        if not isinstance(outcome, Accepted):
            raise StoreError(where, f"cannot be checked: {outcome}")
        count += 1
        blocks += is_block(params, share)
        if count % 100 == 0:
            yield count
        first = next(shares, None)
    records = store.count()
    if records != count:
        raise StoreError("h", f"the index by height names {count} shares, the database holds {records}")
    _check_tip(chain, tip)
    yield VerifyReport(
        shares=count,
        fully_checked=count - history_only,
        history_only=history_only,
        blocks=blocks,
        height=-1 if chain.tip is None else chain.tip.height,
        tip=None if tip is None else tip[::-1].hex(),
    )


def _check_tip(chain: Sharechain, tip: bytes | None) -> None:
    if chain.tip is None or tip is None:
        if chain.tip is not None or tip is not None:
            raise StoreError("t", "there is a tip without shares, or shares without a tip")
        return
    stored = chain.entry(tip)
    if stored is None:
        raise StoreError("t", f"the tip {tip[::-1].hex()} is not a stored share")
    if stored.total_work < chain.tip.total_work:
        raise StoreError("t", f"share {chain.tip.hash[::-1].hex()} has more work than the tip {tip[::-1].hex()}")
