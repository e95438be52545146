"""The audit of a block as text that a miner reads on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from p2pool.audit import BlockAudit, OutputAudit, show_count, show_sat, show_when

__all__ = ["audit_lines"]

#: Columns. What a terminal of 100 shows without breaking lines.
_WIDTH: Final = 100
_STATUS: Final = {
    "main": "on the main chain",
    "uncle": "an uncle",
    "stale": "stale: the sharechain went on without it, which is nothing to Bitcoin",
}


def audit_lines(audit: BlockAudit) -> Iterator[str]:
    """The audit as text of at most 100 columns."""
    place = {
        None: " (no Bitcoin node was asked for it)",
        True: ", in Bitcoin's best chain",
        False: ", NOT in Bitcoin's best chain: it pays nobody",
    }
    height = "of unknown height" if audit.block_height is None else f"{audit.block_height:,}"
    facts = [
        ("block", audit.block_hash),
        ("", f"Bitcoin block {height}{place[audit.on_chain]}"),
        ("time", show_when(audit.time)),
    ]
    if audit.share_height is not None:
        facts.append(("share", f"height {audit.share_height:,} of {audit.network}, {_STATUS[str(audit.share_status)]}"))
        facts.append(("finder", audit.finder_address or str(audit.finder_script)))
    value = show_sat(audit.coinbase_value)
    if audit.subsidy is not None and audit.coinbase_value >= audit.subsidy:
        value += f" = subsidy {audit.subsidy:,} + fees {audit.coinbase_value - audit.subsidy:,}"
    facts.append(("coinbase", f"{value}; {show_count(audit.transactions - 1, 'other transaction')}"))
    facts += [*_window_lines(audit), *_draw_lines(audit)]
    for name, text in facts:
        yield from _wrapped(f"{name:<10}", text)
    if audit.outputs:
        yield ""
        yield f"{'output':>6} {'sat':>21}  paid to"
    for one in audit.outputs:
        yield from _output_lines(one)
    if audit.not_paid:
        yield ""
        sum_of = sum(one.entitlement for one in audit.not_paid)
        count = show_count(len(audit.not_paid), "miner")
        yield from _wrapped(
            "",
            f"Not paid: {count} of the window, entitled to {show_sat(sum_of)} in all, below the threshold and not "
            "drawn. Each draw is new: on average they get what they are entitled to. --json names them.",
        )
    if audit.checks:
        yield ""
    for check in audit.checks:
        yield from _wrapped(f"{'ok' if check.ok else 'WRONG':<6} {check.name:<19}", check.text)
    yield ""
    yield from _wrapped(f"{audit.verdict.upper() if audit.verdict == 'wrong' else audit.verdict}: ", audit.text)
    for text in audit.differences:
        yield from _wrapped("  - ", text)


def _window_lines(audit: BlockAudit) -> Iterator[tuple[str, str]]:
    window = audit.window
    if window is None:
        return
    if not window["shares"]:
        yield "window", "empty: the first share of its chain"
        return
    text = (
        f"shares {window['first_height']:,} to {window['last_height']:,}: {show_count(window['shares'], 'share')} and "
        f"{show_count(window['uncles'], 'uncle')} of {show_count(window['miners'], 'miner')}, "
        f"{_work(window['work'])} hashes"
    )
    if window["oldest_part"] < 1:
        text += f"; {100 * window['oldest_part']:.1f} % of the oldest share counts"
    yield "window", text


def _draw_lines(audit: BlockAudit) -> Iterator[tuple[str, str]]:
    draw = audit.draw
    if draw is None or not draw["threshold"]:
        return
    text = f"at most {audit.payout_class} payouts; {draw['threshold']:,} sat and more are paid exactly"
    if draw["lots"]:
        text += f"; {show_count(draw['lots'], 'lot')} of {draw['lot']:,} sat drawn among those below"
    yield "class", text
    yield "seed", f"{draw['seed']} (hash of the parent share and the class)"


def _output_lines(one: OutputAudit) -> Iterator[str]:
    position = "-" if one.position is None else str(one.position)
    found = "missing" if one.found is None else f"{one.found:,}"
    target = one.role if one.role.endswith("commitment") else one.address or one.script
    if len(target) > _WIDTH - 30:
        target = target[: _WIDTH - 33] + "..."
    yield f"{position:>6} {found:>21}  {target}"
    if one.ok is False:
        yield from _wrapped("       WRONG ", one.difference)
    yield from _wrapped("       ", one.why)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _work(hashes: int) -> str:
    return f"{hashes:,}" if hashes < 10**9 else f"{float(hashes):.4g}"
