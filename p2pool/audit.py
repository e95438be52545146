"""A Bitcoin block of the pool, explained: why each output of its coinbase got what it got, or what is wrong.

Nobody has to be believed. A block's hash is its share's hash, so that the proof of work in its header covers the
share; the coinbase follows from the share's ancestors, which have proofs of work of their own. It is derived twice
here: by the code that all nodes run, and by ``p2pool/derivation.py``, which shares none with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from difflib import SequenceMatcher
from typing import Any, Final

from bitcoin.core import CTransaction

from p2pool.bitcoin_backend.address import encode_address
from p2pool.bitcoin_backend.block import BitcoinBlock
from p2pool.bitcoin_backend.template import block_subsidy, merkle_root
from p2pool.derivation import Derivation, HistoryEnds, StoredRows, derive, is_share_commitment
from p2pool.report import share_status
from sharechain.chain import Sharechain
from sharechain.coinbase import COINBASE_TAG, build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target
from sharechain.entry import ancestors
from sharechain.hasher import sha256d
from sharechain.params import Params
from sharechain.payout import Payouts
from sharechain.share import Share, share_commitment
from sharechain.store import Store

__all__ = [
    "AUDIT_EXIT_CODES",
    "BlockAudit",
    "Check",
    "OutputAudit",
    "explain_block",
    "show_count",
    "show_sat",
    "show_when",
]

#: Start of the script of a witness commitment. Source: BIP141.
_WITNESS_PREFIX: Final = "6a24aa21a9ed"
#: What the command line returns for each verdict.
AUDIT_EXIT_CODES: Final = {"right": 0, "wrong": 1, "not of this pool": 1, "not to be judged": 3}
#: Blocks between two halvings of the subsidy. Source: Bitcoin Core, ``nSubsidyHalvingInterval``.
_HALVING_INTERVALS: Final = {"mainnet": 210_000, "testnet4": 210_000, "signet": 210_000, "regtest": 150}


# -- the audit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that a block commits to, compared with what it should be."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputAudit:
    """An output of a coinbase, found in a block or derived or both."""

    #: In the block, counted from 0; None if it is missing there.
    position: int | None
    #: Hexadecimal: as found, or as derived if it is missing.
    script: str
    address: str | None
    #: Sat; None if it is not in the block, or cannot or should not be there.
    found: int | None
    derived: int | None
    #: "window payout", "finder", "witness commitment", "share commitment" or "unexplained".
    role: str
    #: As in ``p2pool payouts``, of a window payout: else 0, None.
    shares: int = 0
    uncles: int = 0
    weight: int = 0
    weight_percent: float = 0.0
    entitlement: int = 0
    paid_by: str | None = None
    chance: float | None = None
    #: Why it gets what is derived, in sentences.
    why: str = ""
    #: None if it cannot be judged.
    ok: bool | None = None
    #: What differs; empty if nothing does.
    difference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAudit:
    """All that an audit says of a block. Hashes as they are displayed."""

    #: "right", "wrong", "not of this pool" or "not to be judged".
    verdict: str
    #: The verdict in sentences.
    text: str
    network: str
    block_hash: str
    #: By the coinbase's script; None if it does not say.
    block_height: int | None
    #: Whether the Bitcoin node has it in its best chain; None if it was not asked.
    on_chain: bool | None
    #: The header's, Unix seconds.
    time: int
    transactions: int
    #: Printable characters of the coinbase's script.
    coinbase_text: str
    #: Sat, sum of the outputs.
    coinbase_value: int
    #: Sat, of a block at this height; the rest of the value are fees.
    subsidy: int | None
    #: What follows is None, or empty, if there is no share.
    share_height: int | None = None
    #: As in ``p2pool shares``.
    share_status: str | None = None
    finder_script: str | None = None
    finder_address: str | None = None
    payout_class: int | None = None
    #: What follows is None, or empty, if history does not hold the share's window.
    window: dict[str, Any] | None = None
    draw: dict[str, Any] | None = None
    outputs: tuple[OutputAudit, ...] = ()
    #: Miners of the window that were not drawn.
    not_paid: tuple[OutputAudit, ...] = ()
    checks: tuple[Check, ...] = ()
    #: What differs, a sentence each.
    differences: tuple[str, ...] = ()
    #: What of the share's window is not there; None if nothing or if there is no share.
    lacking: dict[str, Any] | None = None


def explain_block(
    params: Params, store: Store, chain: Sharechain, block: BitcoinBlock, *, on_chain: bool | None = None
) -> BlockAudit:
    """Derive a block's coinbase from the sharechain and say of each output why it is there, or what is wrong.

    The coinbase is derived twice, by the code that all nodes run and by ``derive``, which shares none with it.

    Args:
        params, store, chain: of one data directory.
        block: a block of Bitcoin's.
        on_chain: whether it is in Bitcoin's best chain; None if nobody was asked.
    """
    height = block.height
    audit = BlockAudit(
        verdict="",
        text="",
        network=params.name,
        block_hash=block.hash[::-1].hex(),
        block_height=height,
        on_chain=on_chain,
        time=block.time,
        transactions=len(block.txids),
        coinbase_text="".join(chr(byte) if 32 <= byte < 127 else "." for byte in block.coinbase_script),
        coinbase_value=sum(amount for _, amount in block.outputs),
        subsidy=None if height is None else block_subsidy(height, _HALVING_INTERVALS[params.bitcoin_network]),
    )
    stored, entry = store.share(block.hash), chain.entry(block.hash)
    if stored is None or entry is None:
        return _of_no_share(audit, chain, block)
    share = stored.share
    finder = share.data.payout_script
    audit = replace(
        audit,
        share_height=entry.height,
        share_status=share_status(chain, entry),
        finder_script=finder.hex(),
        finder_address=encode_address(finder, params.bitcoin_network),
        payout_class=share.data.payout_class,
    )
    checks = _block_checks(params, share, block)
    try:
        derived = derive(params, StoredRows(store), audit.block_hash)
    except HistoryEnds as end:
        return _without_window(params, audit, block, checks, end)
    # Where history was begun on trust, entries lack uncles that the store may have: the twin then stands alone.
    is_whole = all(
        len(each.uncles) == each.uncle_count for each in ancestors(entry.parent, sum(derived.window.shares.values()))
    )
    payouts = _twins_payouts(derived)
    if is_whole:
        payouts = chain.payouts(
            entry.parent,
            value=share.coinbase_value,
            payout_class=share.data.payout_class,
            max_bits=share.data.max_bits,
            block_bits=share.block_bits,
        )
    commitment = share_commitment(params.network_id, share.data)
    coinbase = build_coinbase(share.coinbase_script, payouts, finder, share.witness_commitment, commitment)
    checks.append(_coinbase_check(share, block, coinbase))
    checks.append(_twin_check(coinbase, [*derived.outputs, ("6a20" + commitment.hex(), 0)], is_whole))
    expected, not_paid = _explained(params, share, derived)
    outputs = tuple(_compared(params, block.outputs, expected))
    differences = (
        *(one.difference for one in outputs if not one.ok),
        *(f"{check.name}: {check.text}" for check in checks if not check.ok),
    )
    return replace(
        audit,
        verdict="wrong" if differences else "right",
        text="not as the rules say" if differences else "every output is as the rules say",
        window=_window_facts(derived),
        draw=_draw_facts(derived),
        outputs=outputs,
        not_paid=not_paid,
        checks=tuple(checks),
        differences=differences,
    )


# -- what is derived -----------------------------------------------------------------------------------------


def _window_facts(derived: Derivation) -> dict[str, Any]:
    window = derived.window
    return {
        "first_height": window.first,
        "last_height": window.last,
        "shares": sum(window.shares.values()),
        "uncles": sum(window.uncles.values()),
        "miners": len(window.weights),
        "work": window.work,
        "wanted_work": window.wanted,
        "oldest_part": window.oldest_part,
    }


def _draw_facts(derived: Derivation) -> dict[str, Any]:
    draw = derived.draw
    return {
        "seed": derived.seed.hex(),
        "threshold": draw.threshold,
        "pool": draw.pool,
        "lots": draw.lots,
        "lot": draw.pool // draw.lots if draw.lots else 0,
        "bonus": derived.bonus,
        "finder_amount": 0 if derived.is_rest_merged else derived.rest,
    }


def _explained(params: Params, share: Share, derived: Derivation) -> tuple[list[OutputAudit], tuple[OutputAudit, ...]]:
    """The outputs that are derived, in order, and the miners of the window that get none, heaviest first."""
    paid = derived.draw.paid
    expected: list[OutputAudit] = []
    for number, (script, amount) in enumerate(derived.outputs):
        if number < len(paid):
            one = _payout(params, share, derived, script)
            if number == 0 and derived.is_rest_merged:
                joins = (
                    f" The finder's part, {show_sat(derived.rest)}, would be dust alone and is added to this output."
                )
                one = replace(one, why=one.why + joins)
        elif script.startswith(_WITNESS_PREFIX):
            one = _output(
                params, script, "witness commitment", "Commits to the witnesses of all transactions (BIP141)."
            )
        else:
            one = _output(params, script, "finder", _finder_why(params, share, derived))
        expected.append(replace(one, derived=amount))
    commitment = "6a20" + share_commitment(params.network_id, share.data).hex()
    why = (
        "Commits to the share: its parent, uncles, target, height, work, miner and class, and the network "
        f"({params.name}, {params.network_id.hex()})."
    )
    expected.append(replace(_output(params, commitment, "share commitment", why), derived=0))
    unpaid = [script for script in derived.window.weights if script not in paid]
    unpaid.sort(key=lambda script: (-derived.window.weights[script], script))
    return expected, tuple(_payout(params, share, derived, script) for script in unpaid)


def _payout(params: Params, share: Share, derived: Derivation, script: str) -> OutputAudit:
    window, draw = derived.window, derived.draw
    entitlement, weight = derived.entitled[script], window.weights[script]
    shares, uncles = window.shares.get(script, 0), window.uncles.get(script, 0)
    percent = 100 * weight / window.work
    is_exact = entitlement >= draw.threshold
    chance = 1.0 if is_exact else draw.lots * entitlement / draw.pool if draw.pool else 0.0
    why = (
        f"{show_count(shares, 'share')} and {show_count(uncles, 'uncle')} in the window: {percent:.3f} % of its work. "
        f"Entitled to {show_sat(entitlement)} of the window's {share.coinbase_value - derived.bonus:,}, "
    )
    if is_exact:
        why += f"at least the threshold of {draw.threshold:,}: paid exactly."
    elif not draw.lots:
        why += (
            f"below the threshold of {draw.threshold:,}; all below it have {show_sat(draw.pool)}, dust: not drawn for."
        )
    else:
        why += (
            f"below the threshold of {draw.threshold:,}: {'drawn' if script in draw.paid else 'not drawn'}, "
            f"with a chance of {100 * chance:.3f} % to get {show_sat(draw.pool // draw.lots)}."
        )
    return replace(
        _output(params, script, "window payout", why),
        shares=shares,
        uncles=uncles,
        weight=weight,
        weight_percent=percent,
        entitlement=entitlement,
        paid_by="exact" if is_exact else "drawn" if script in draw.paid else "not drawn",
        chance=chance,
    )


def _finder_why(params: Params, share: Share, derived: Derivation) -> str:
    if not derived.entitled:
        return "The first share of its chain: nobody worked before it, so that its finder gets all."
    numerator, denominator = params.finder_bonus
    why = f"To the finder: its bonus of {show_sat(derived.bonus)}, {numerator}/{denominator} of the value"
    left = derived.rest - derived.bonus
    why += f", and {show_sat(left)} that rounding left" if left else ""
    if derived.draw.pool and not derived.draw.lots:
        why += f" ({show_sat(derived.draw.pool)} of it were too little to be drawn for)"
    return why + "."


def _output(params: Params, script: str, role: str, why: str) -> OutputAudit:
    address = encode_address(bytes.fromhex(script), params.bitcoin_network)
    return OutputAudit(position=None, script=script, address=address, found=None, derived=None, role=role, why=why)


# -- what is found -------------------------------------------------------------------------------------------


def _compared(
    params: Params, found: Sequence[tuple[bytes, int]], expected: Sequence[OutputAudit]
) -> Iterator[OutputAudit]:
    """Each output of the block beside the derived one that it is, and those that it lacks, in the block's order.

    Outputs that both have in one order are pairs, so that one which is left out does not make all behind it wrong.
    """
    mine = [_key(script.hex()) for script, _ in found]
    theirs = [_key(one.script) for one in expected]
    steps = SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes()
    pairs = {i1 + n: j1 + n for kind, i1, i2, j1, _ in steps if kind == "equal" for n in range(i2 - i1)}
    paired = set(pairs.values())
    left = {position: key for position, key in enumerate(theirs) if position not in paired}
    for position, key in enumerate(mine):  # what stands elsewhere
        if position not in pairs and key in left.values():
            pairs[position] = next(at for at, other in left.items() if other == key)
            del left[pairs[position]]
    stands = {at: position for position, at in pairs.items()}
    moved = {position for kind, i1, i2, _, _ in steps if kind != "equal" for position in range(i1, i2)}
    for kind, i1, i2, j1, j2 in steps:
        for position in range(i1, i2):
            script, amount = found[position]
            if position not in pairs:
                extra = _output(params, script.hex(), "unexplained", "The rules have no such output.")
                difference = f"output {position} pays {show_sat(amount)} to {_named(extra)}, which the rules do not"
                yield replace(extra, position=position, found=amount, ok=False, difference=difference)
                continue
            one = expected[pairs[position]]
            differs = []
            if script.hex() != one.script:
                differs.append(f"has script {script.hex()}, derived is {one.script}")
            if amount != one.derived:
                assert one.derived is not None
                differs.append(f"pays {show_sat(amount)}, derived are {one.derived:,} ({amount - one.derived:+,})")
            if position in moved:
                differs.append(f"should be output {pairs[position]}")
            yield replace(
                one,
                position=position,
                script=script.hex(),
                found=amount,
                ok=not differs,
                difference=f"output {position}, {_named(one)}: {'; '.join(differs)}" if differs else "",
            )
        for at in range(j1, j2) if kind in ("insert", "replace") else ():
            if at not in stands:
                one = expected[at]
                difference = f"output {at} is missing: {show_sat(one.derived or 0)} to {_named(one)}"
                yield replace(one, ok=False, difference=difference)


def _key(script: str) -> str:
    """What makes an output of a block the same as a derived one: its script, or that it is a commitment."""
    if script.startswith(_WITNESS_PREFIX) and len(script) == 76:
        return "witness commitment"
    return "share commitment" if is_share_commitment(script) else script


def _named(one: OutputAudit) -> str:
    if one.role.endswith("commitment"):
        return f"the {one.role}"
    return one.address or f"script {one.script}"


def _block_checks(params: Params, share: Share, block: BitcoinBlock) -> list[Check]:
    """What can be checked without a window."""
    target = bits_to_target(share.block_bits)
    root, count = merkle_root(block.txids), len(block.txids)
    value = sum(amount for _, amount in block.outputs)
    commitment = "6a20" + share_commitment(params.network_id, share.data).hex()
    committed = block.outputs[-1] if block.outputs else (b"", 0)
    checks = [
        (
            "header",
            share.hash_value <= target,
            "its hash is the share's and meets Bitcoin's target",
            f"its hash is the share's, but above Bitcoin's target of bits {share.block_bits:#010x}: a share, no block",
        ),
        (
            "merkle root",
            root == share.merkle_root,
            f"the header's is that of the {show_count(count, 'transaction')}",
            f"the {show_count(count, 'transaction')} give {root[::-1].hex()}, the header has "
            f"{share.merkle_root[::-1].hex()}: these are not what the work was done for",
        ),
        (
            "height",
            block.height == share.block_height,
            f"the coinbase says {share.block_height:,} (BIP34), as the share does",
            f"the coinbase says {block.height} (BIP34), the share {share.block_height}",
        ),
        (
            "value",
            value == share.coinbase_value,
            f"the outputs add up to {show_sat(share.coinbase_value)}, as in the share; that this is no more than "
            "subsidy and fees is Bitcoin's to check",
            f"the outputs add up to {show_sat(value)}, the share says {share.coinbase_value:,}",
        ),
        (
            "share commitment",
            committed == (bytes.fromhex(commitment), 0),
            "the last output commits to this share and this network",
            f"the last output should have script {commitment} and 0 sat, but has {committed[0].hex()} and "
            f"{committed[1]:,}",
        ),
    ]
    return [
        *(Check(name=name, ok=ok, text=right if ok else wrong) for name, ok, right, wrong in checks),
        _witness_check(share, block),
    ]


def _witness_check(share: Share, block: BitcoinBlock) -> Check:
    """Source: BIP141; Bitcoin Core, ``CheckWitnessMalleation``."""
    name, wanted = "witness commitment", share.witness_commitment
    if wanted is None:
        spends = sum(txid != wtxid for txid, wtxid in zip(block.txids, block.wtxids, strict=True))
        if spends:
            return Check(
                name=name, ok=False, text=f"there is none, but {show_count(spends, 'transaction')} with witnesses"
            )
        return Check(name=name, ok=True, text="there is none, and no transaction has a witness")
    if block.reserved is None:
        return Check(name=name, ok=False, text="the coinbase has no witness of 32 bytes, which it is made with")
    made = sha256d(merkle_root([bytes(32), *block.wtxids[1:]]) + block.reserved)
    if made != wanted:
        text = f"the transactions give {made.hex()}, the share has {wanted.hex()}"
        return Check(name=name, ok=False, text=text)
    return Check(name=name, ok=True, text=f"it is that of the {show_count(len(block.txids), 'transaction')}")


def _coinbase_check(share: Share, block: BitcoinBlock, coinbase: bytes) -> Check:
    """What a coinbase that was rebuilt from the sharechain says of the block's and of the share."""
    is_worked = fold_coinbase(coinbase, share.merkle_branch) == share.merkle_root
    is_found = sha256d(coinbase) == block.txids[0]
    if is_worked and is_found:
        text = "rebuilt from the sharechain, it is the block's byte for byte, and what the work was done for"
    elif is_worked:
        text = "rebuilt from the sharechain, it is what the work was done for: the one given here was changed since"
    else:
        text = "rebuilt from the sharechain, it is not what the work was done for: the share breaks rule R10"
    return Check(name="coinbase", ok=is_worked and is_found, text=text)


def _twin_check(coinbase: bytes, derived: Sequence[tuple[str, int]], is_whole: bool) -> Check:
    """Whether both derivations give the same. Args: coinbase: rebuilt. derived: its outputs, as the twin says."""
    built = [(bytes(out.scriptPubKey).hex(), out.nValue) for out in CTransaction.deserialize(coinbase).vout]
    text = "the code that all nodes run and its plain twin derive the same outputs"
    if not is_whole:
        text = "history was begun on trust inside this window: only the plain twin, which reads the shares, derived it"
    elif built != list(derived):
        text = "what all nodes run and its plain twin contradict each other: please report it"
    return Check(name="twin", ok=built == list(derived), text=text)


def _twins_payouts(derived: Derivation) -> Payouts:
    count = len(derived.draw.paid)
    paid = [(bytes.fromhex(script), amount) for script, amount in derived.outputs[:count]]
    return Payouts(
        outputs=b"".join(amount.to_bytes(8, "little") + bytes([len(script)]) + script for script, amount in paid),
        count=count,
        finder_amount=0 if derived.is_rest_merged else derived.rest,
        threshold=derived.draw.threshold,
    )


# -- what cannot be judged -----------------------------------------------------------------------------------


def _of_no_share(audit: BlockAudit, chain: Sharechain, block: BitcoinBlock) -> BlockAudit:
    has_tag = COINBASE_TAG in block.coinbase_script
    has_commitment = bool(block.outputs) and is_share_commitment(block.outputs[-1][0].hex())
    said = f"its coinbase says {audit.coinbase_text!r}"
    if not has_commitment:
        tagged = ", which has p2pool's tag, but anybody can write that" if has_tag else ""
        text = f"no p2pool block: its coinbase does not end with a share commitment; {said}{tagged}"
        return replace(audit, verdict="not of this pool", text=text)
    oldest = next(chain.entries(), None)
    kind = f"a share commitment {'and' if has_tag else 'without'} p2pool's tag"
    if chain.base_height and oldest is not None and block.time <= oldest.time:
        text = (
            f"it carries {kind} and is older than the history that this node keeps, which begins at share height "
            f"{chain.base_height:,} ({show_when(oldest.time)}): only a node that keeps more can tell"
        )
        return replace(audit, verdict="not to be judged", text=text)
    text = (
        f"it carries {kind}, but no share of the sharechain here ({audit.network}) is this block. Either it is of "
        "another share network, or it breaks our rules (on test networks a block may have less work than a share), or "
        f"this node never got the share; {said}"
    )
    return replace(audit, verdict="not of this pool", text=text)


def _without_window(
    params: Params, audit: BlockAudit, block: BitcoinBlock, checks: Sequence[Check], end: HistoryEnds
) -> BlockAudit:
    most = params.window_max_shares - end.shares
    about = -(-end.missing * end.shares // end.work) if end.work else most
    first = max(0, end.height - max(1, min(about, most)))
    differences = tuple(f"{check.name}: {check.text}" for check in checks if not check.ok)
    text = (
        f"its window reaches below the history that this node keeps: of shares {first:,} (or so) to "
        f"{audit.share_height - 1 if audit.share_height else 0:,}, those below {end.height:,} are lacking. "
        "A node that keeps more can tell, or an export from when they were there"
    )
    outputs = []
    for position, (script, amount) in enumerate(block.outputs):
        one = _output(params, script.hex(), "unexplained", "Not derived: the window is not there.")
        outputs.append(replace(one, position=position, found=amount))
    return replace(
        audit,
        verdict="wrong" if differences else "not to be judged",
        text=f"not as the rules say; besides, {text}" if differences else text,
        outputs=tuple(outputs),
        checks=tuple(checks),
        differences=differences,
        lacking={
            "hashes": list(end.lacking),
            "named_at": end.height,
            "first_height": first,
            "last_height": end.height - 1,
            "work": end.missing,
        },
    )


def show_when(time: int) -> str:
    """Unix seconds as people read them."""
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def show_sat(amount: int) -> str:
    """An amount with its unit."""
    return f"{amount:,} sat"


def show_count(count: int, noun: str) -> str:
    """A number of things, which get an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
