"""The dumb twin of all that pays: a coinbase recomputed from plain rows, in the plainest way.

Everything is done from nothing: the window is walked, the weights are added up, the threshold is tried and the lots
are laid out one by one. It shares no code with what builds coinbases, but for compact targets and the seed's hash, so
that a mistake has to be made twice to go unseen.

Source: ``docs/explanation/payouts.md``.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from p2pool.errors import P2PoolError
from sharechain.difficulty import bits_to_target, work_of
from sharechain.params import DUST, Params
from sharechain.payout import draw_seed
from sharechain.share import NULL_HASH
from sharechain.store import Store
from sharechain.validate import block_target

__all__ = [
    "Derivation",
    "DerivedDraw",
    "DerivedWindow",
    "HistoryEnds",
    "Row",
    "StoredRows",
    "audit_block",
    "audit_rows",
    "derive",
    "is_share_commitment",
]

#: A share as ``p2pool export`` prints it.
Row = Mapping[str, Any]

#: Start of the script of a witness commitment. Source: BIP141.
_WITNESS_PREFIX: Final = "6a24aa21a9ed"


class HistoryEnds(P2PoolError):
    """A window reaches below the shares that are there.

    Arguments:
        lacking: hashes of the lacking shares, as displayed.
        height: of the share that names them.
        shares: of the window, that are there.
        work: expected hashes of these.
        missing: expected hashes that the window still wants.
    """

    def __init__(self, lacking: Sequence[str], *, height: int, shares: int, work: int, missing: int) -> None:
        super().__init__(f"share {lacking[0]}, which one at height {height} names, is not there")
        self.lacking = tuple(lacking)
        self.height = height
        self.shares = shares
        self.work = work
        self.missing = missing


class StoredRows(dict[str, Row]):
    """Of stored shares, what ``derive`` reads, each when it is asked for."""

    def __init__(self, store: Store) -> None:
        """Nothing is read yet."""
        super().__init__()
        self._store = store

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._read(str(name))

    def __missing__(self, name: str) -> Row:
        if not self._read(name):
            raise KeyError(name)
        return self[name]

    def _read(self, name: str) -> bool:
        stored = self._store.share(bytes.fromhex(name)[::-1])
        if stored is None:
            return False
        share, data = stored.share, stored.share.data
        self[name] = {
            "parent": data.parent[::-1].hex(),
            "uncles": [uncle[::-1].hex() for uncle in data.uncles],
            "height": data.height,
            "max_bits": data.max_bits,
            "work": work_of(bits_to_target(data.bits)),
            "payout_script": data.payout_script.hex(),
            "payout_class": data.payout_class,
            "coinbase_value": share.coinbase_value,
            "block_bits": share.block_bits,
            "witness_commitment": None if share.witness_commitment is None else share.witness_commitment.hex(),
        }
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedWindow:
    """The shares that a coinbase pays for, walked one by one. Scripts are hexadecimal."""

    #: Weight by script, expected hashes; what rounding leaves of an uncle's is its nephew's.
    weights: Mapping[str, int]
    #: Main-chain shares and uncles by script.
    shares: Mapping[str, int]
    uncles: Mapping[str, int]
    #: Heights of the oldest and the newest share; -1 and -1 for none.
    first: int
    last: int
    #: Expected hashes that the window wants: less are there at a chain's start, or if it has as many shares as it may.
    wanted: int
    #: The part of the oldest share's work that is inside, 0 to 1.
    oldest_part: float

    @property
    def work(self) -> int:
        """Expected hashes inside."""
        return sum(self.weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedDraw:
    """Who is paid exactly and who won a lot."""

    #: Sat by script (hexadecimal).
    paid: Mapping[str, int]
    #: Sat. Entitlements from here on are paid exactly.
    threshold: int
    #: Sat. Sum of the entitlements below the threshold, which are drawn for.
    pool: int
    #: How many are drawn, each for an equal part of the pool.
    lots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """A coinbase, and how it came about."""

    window: DerivedWindow
    #: Sat by script (hexadecimal); empty for the first share of a chain.
    entitled: Mapping[str, int]
    draw: DerivedDraw
    seed: bytes
    #: Sat. The part of the value that its finder gets before all.
    bonus: int
    #: Sat. Bonus and what else is not paid to the window.
    rest: int
    #: Whether the rest would be dust and so joins the first payout.
    is_rest_merged: bool
    #: (script hexadecimal, sat) of each output, the share commitment's left out.
    outputs: tuple[tuple[str, int], ...]


def derive(params: Params, rows: Mapping[str, Row], block_hash: str) -> Derivation:
    """Recompute the coinbase of a share from rows alone.

    Args:
        params: the network's.
        rows: exported rows by hash, as displayed.
        block_hash: hash of the share, as displayed.

    Raises:
        HistoryEnds: the rows do not reach back beyond the share's window.
    """
    row = rows[block_hash]
    value = int(row["coinbase_value"])
    window = _walk_window(params, rows, row)
    seed = draw_seed(bytes.fromhex(row["parent"])[::-1], int(row["payout_class"]))
    witness = row["witness_commitment"]
    tail = [] if witness is None else [(_WITNESS_PREFIX + witness, 0)]
    total = window.work
    if total == 0:
        nothing = DerivedDraw(paid={}, threshold=0, pool=0, lots=0)
        outputs = ((row["payout_script"], value), *tail)
        return Derivation(
            window=window,
            entitled={},
            draw=nothing,
            seed=seed,
            bonus=value,
            rest=value,
            is_rest_merged=False,
            outputs=outputs,
        )
    bonus = value * params.finder_bonus[0] // params.finder_bonus[1]
    entitled = {script: (value - bonus) * weight // total for script, weight in window.weights.items()}
    draw = _draw(params, entitled, seed, int(row["payout_class"]))
    payouts = sorted(draw.paid.items(), key=lambda item: (-item[1], item[0]))
    rest = value - sum(draw.paid.values())
    is_rest_merged = rest < DUST and bool(payouts)
    if is_rest_merged:
        payouts[0] = (payouts[0][0], payouts[0][1] + rest)
    else:
        payouts.append((row["payout_script"], rest))
    return Derivation(
        window=window,
        entitled=entitled,
        draw=draw,
        seed=seed,
        bonus=bonus,
        rest=rest,
        is_rest_merged=is_rest_merged,
        outputs=(*payouts, *tail),
    )


def _walk_window(params: Params, rows: Mapping[str, Row], row: Row) -> DerivedWindow:
    wanted = params.window_blocks * work_of(block_target(params, row["max_bits"], row["block_bits"]))
    weights: dict[str, int] = {}
    shares: Counter[str] = Counter()
    uncles_of: Counter[str] = Counter()
    missing, oldest_part, first = wanted, 1.0, -1
    at, count, nephew = str(row["parent"]), 0, int(row["height"])
    while at != NULL_HASH.hex() and missing > 0 and count < params.window_max_shares:
        if at not in rows:
            raise HistoryEnds([at], height=nephew, shares=count, work=wanted - missing, missing=missing)
        share = rows[at]
        nephew = int(share["height"])
        lacking = [uncle for uncle in share["uncles"] if uncle not in rows]
        if lacking:
            raise HistoryEnds(lacking, height=nephew, shares=count, work=wanted - missing, missing=missing)
        uncles = [rows[uncle] for uncle in share["uncles"]]
        unit = share["work"] + sum(uncle["work"] for uncle in uncles)
        kept = min(unit, missing)
        left = kept
        for uncle in uncles:
            part = uncle["work"] * params.uncle_weight[0] // params.uncle_weight[1] * kept // unit
            weights[uncle["payout_script"]] = weights.get(uncle["payout_script"], 0) + part
            uncles_of[uncle["payout_script"]] += 1
            left -= part
        weights[share["payout_script"]] = weights.get(share["payout_script"], 0) + left
        shares[share["payout_script"]] += 1
        missing -= kept
        oldest_part, first = kept / unit, nephew
        at, count = share["parent"], count + 1
    return DerivedWindow(
        weights=weights,
        shares=shares,
        uncles=uncles_of,
        first=first,
        last=int(row["height"]) - 1 if count else -1,
        wanted=wanted,
        oldest_part=oldest_part,
    )


def _draw(params: Params, entitled: Mapping[str, int], seed: bytes, payout_class: int) -> DerivedDraw:
    amounts = sorted(entitled.values())
    sums = [0, *accumulate(amounts)]

    def needed(threshold: int) -> int:
        smaller = bisect_left(amounts, threshold)
        rest = sums[smaller]
        lots = 0 if rest < DUST else max(1, rest // threshold)
        return len(amounts) - smaller + lots

    # `needed` falls between entitlements and may rise by one just above each: look between them, lowest first.
    threshold = None
    edges = [params.min_payout, *sorted({e + 1 for e in entitled.values() if e + 1 > params.min_payout})]
    for low, next_edge in zip(edges, [*edges[1:], None], strict=True):
        high = next_edge - 1 if next_edge is not None else low + sum(entitled.values())
        if needed(high) > payout_class:
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if needed(middle) <= payout_class else (middle + 1, high)
        threshold = low
        break
    assert threshold is not None, "one lot fits every class"
    paid = {script: amount for script, amount in entitled.items() if amount >= threshold}
    small = {script: amount for script, amount in entitled.items() if amount < threshold}
    pool = sum(small.values())
    if pool < DUST:
        return DerivedDraw(paid=paid, threshold=threshold, pool=pool, lots=0)
    lots = max(1, pool // threshold)
    tag = hashlib.sha256(b"p2pool/offset").digest()
    offset = pool * int.from_bytes(hashlib.sha256(tag + tag + seed).digest(), "big") // 2**256
    order = sorted(small, key=lambda script: hashlib.sha256(seed + bytes.fromhex(script)).digest())
    points = [offset + number * pool for number in range(lots)]
    at = 0
    for script in order:
        end = at + lots * small[script]
        while points and points[0] < end:
            points.pop(0)
            paid[script] = pool // lots
        at = end
    return DerivedDraw(paid=paid, threshold=threshold, pool=pool, lots=lots)


def audit_rows(params: Params, rows: Mapping[str, Row], block_hash: str) -> list[list[Any]]:
    """The coinbase outputs of a share, recomputed from exported rows alone by ``derive``.

    Returns:
        [script hex, sat] of each output, the share commitment's left out.
    """
    return [[script, amount] for script, amount in derive(params, rows, block_hash).outputs]


def audit_block(
    params: Params, rows: Mapping[str, Row], block_hash: str, outputs: Sequence[tuple[bytes, int]]
) -> str | None:
    """Compare a Bitcoin block's coinbase outputs with their recomputation.

    Args:
        params: the network's.
        rows: all exported rows by hash.
        block_hash: as displayed.
        outputs: (script, sat) of the coinbase that Bitcoin has.

    Returns:
        What differs, or None.
    """
    expected = audit_rows(params, rows, block_hash)
    found: list[list[Any]] = [[script.hex(), amount] for script, amount in outputs]
    if not found or not is_share_commitment(found[-1][0]) or found[-1][1] != 0:
        return f"block {block_hash}: the last output is no share commitment"
    if found[:-1] != expected:
        return f"block {block_hash}: coinbase pays {found[:-1]}, recomputed {expected}"
    return None


def is_share_commitment(script: str) -> bool:
    """Whether a script (hexadecimal) has the form of a share commitment: OP_RETURN and a push of 32 bytes."""
    return script.startswith("6a20") and len(script) == 68
