"""The demonstration with several nodes: each a process of its own, one view of all, and an audit of each at the end.

What is claimed at the end is read back from the nodes' own disks after they have stopped, and compared: whoever reads
``all agree`` need not believe what a running node says of itself.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from bitcoin.core import CBlock
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from p2pool.bitcoin_backend.address import encode_address
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.blocks import STALE_BLOCK
from p2pool.cluster import Cluster, MinerProcess, NodeProcess, propagation_ms
from p2pool.config import load_config
from p2pool.database import open_copy
from p2pool.demo import (
    MinerPlan,
    coinbase_outputs,
    demo_params,
    plan_miner,
    premine,
    print_miners,
    spend_fees,
)
from p2pool.derivation import audit_block
from p2pool.errors import ConfigError, P2PoolError
from p2pool.report import VerifyReport, export_rows, load_chain, payout_report, verify_store
from p2pool.service import run_node, until_signal
from sharechain import hasher
from sharechain.params import Params

__all__ = ["run_cluster_demo"]

#: Wanted time between shares: for each node so much, since all share the machine, and never less than the minimum.
PERIOD_PER_NODE_MS: Final = 100
LEAST_PERIOD_MS: Final = 300
#: Between two pictures on a terminal, and between two lines elsewhere.
VIEW_INTERVAL_S: Final = 0.25
LINE_INTERVAL_S: Final = 2.0
#: Sat. A block's value that payouts are compared for.
VALUE: Final = 5_000_000_000
EXIT_INTERRUPTED: Final = 130


@dataclass(kw_only=True)
class _Run:
    """What a running demonstration knows, for the view and the summary."""

    params: Params
    cluster: Cluster
    plans: list[MinerPlan]
    shares: int
    miners: MinerProcess | None = None
    stage: str = "starting"
    began: float = field(default_factory=time.monotonic)
    #: Of mining; and when it began, in Unix milliseconds.
    seconds: float = 0.0
    began_ms: int = 0
    #: Shares that had joined each node's chain when mining began.
    before: list[int] = field(default_factory=list)
    #: Why the nodes did not come to agree, if so.
    failure: str = ""
    done: bool = False

    def mined(self) -> int:
        """Shares that are in the chain of some node."""
        joined = [(node.status() or {"joined": 0})["joined"] for node in self.cluster.nodes]
        return max((now - before for now, before in zip(joined, self.before, strict=False)), default=0)

    def miners_of(self, node: NodeProcess) -> list[int]:
        """The numbers of the miners that mine at a node."""
        return list(range(node.number - 1, len(self.plans), len(self.cluster.nodes)))

    def hash_rates(self) -> list[float]:
        """Of each miner."""
        reports = [] if self.miners is None else self.miners.reports()
        return [report.hash_rate for report in reports] or [0.0] * len(self.plans)


def run_cluster_demo(
    *, nodes: int, shares: int, block_every: int, miners: int, data_dir: Path | None, as_json: bool
) -> int:
    """Run the demonstration with several nodes and print its summary.

    Args:
        nodes: how many, each in a process of its own.
        shares: stop after so many have joined the chain.
        block_every: shares per Bitcoin block, on average.
        miners: how many, each with an address of its own; they take turns with the nodes.
        data_dir: kept, and gone on with if it holds an earlier demonstration; None for a temporary one.
        as_json: print one JSON object as the last line, and no table.

    Returns:
        Exit code: 0 only if all nodes agree and nothing was refused.

    Raises:
        P2PoolError: a node died, or the nodes did not find one another.
    """
    scratch = None if data_dir is not None else Path(tempfile.mkdtemp(prefix="p2pool-demo-"))
    directory = scratch if data_dir is None else data_dir
    assert directory is not None
    try:
        if (directory / "sharechain").exists():
            raise ConfigError(f"--data-dir: {directory} holds a single node; several need a directory of their own")
        period_ms = max(LEAST_PERIOD_MS, PERIOD_PER_NODE_MS * nodes)
        params = demo_params(directory / "node1", block_every, period_ms=period_ms, threads=miners)
        run = _Run(
            params=params,
            cluster=Cluster(
                directory,
                params,
                nodes,
                program=lambda number: (
                    f"from p2pool.cluster_demo import run_demo_node; run_demo_node(sys.argv[3], {number - 1}, {nodes})"
                ),
            ),
            plans=[plan_miner(number, threads=1) for number in range(miners)],
            shares=shares,
        )
        _begin_bitcoin(run.cluster.nodes)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that is closed is a Ctrl-C too
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            trio.run(until_signal, partial(_run, run, as_json))
        except* KeyboardInterrupt:  # the second, while the nodes stop: they have been killed
            run.done = False
        if not run.done:
            print("interrupted: all nodes are stopped", file=sys.stderr)
            return EXIT_INTERRUPTED
        summary = _audit(run)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    if as_json:
        print(json.dumps(summary))
    else:
        _print_summary(summary, data_dir)
    return 0 if summary["ok"] else 1


def run_demo_node(config_file: str, first: int, step: int) -> None:
    """What a node of the demonstration runs: ``p2pool run``, and beside it the spending of some old coinbases."""
    config = load_config({}, {}, Path(config_file))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        run_node(config, beside=partial(spend_fees, first=first, step=step))
    except* P2PoolError as group:
        sys.exit(f"error: {group.exceptions}")


def _begin_bitcoin(nodes: Sequence[NodeProcess]) -> None:
    """Give all nodes that have none the same first blocks, whose coinbases anybody may spend."""
    source = nodes[0].directory / "bitcoin"
    if not source.exists():
        with _bitcoin(nodes[0]) as backend:
            premine(backend)
    for node in nodes[1:]:
        if not (node.directory / "bitcoin").exists():
            shutil.copytree(source, node.directory / "bitcoin")


async def _run(run: _Run, as_json: bool) -> None:
    cluster = run.cluster
    async with cluster, trio.open_nursery() as nursery:
        nursery.start_soon(_show, run, as_json)
        await cluster.start()
        run.before = [(node.status() or {"joined": 0})["joined"] for node in cluster.nodes]
        run.stage = "mining"
        started, run.began_ms = time.monotonic(), int(time.time() * 1000)
        nodes = len(cluster.nodes)
        run.miners = cluster.mine(
            [(cluster.nodes[number % nodes], f"{p.address}.{p.name}") for number, p in enumerate(run.plans)]
        )

        def mined() -> bool:
            run.seconds = time.monotonic() - started
            return run.mined() >= run.shares

        await cluster.wait_until(mined, math.inf, "shares")
        try:
            await _compare(run)
        except P2PoolError as error:
            cluster.check()  # a node that died is another matter
            run.failure = str(error)
        run.done = True
        nursery.cancel_scope.cancel()


async def _compare(run: _Run) -> None:
    """Have the nodes agree. A tie is none of their doing: then there has to be another share."""
    miners, cluster = run.miners, run.cluster
    assert miners is not None, "mining has begun"
    while True:
        run.stage = "comparing"
        miners.signal(signal.SIGSTOP)
        tips = await cluster.wait_converged()
        if len(tips) <= 1:
            await miners.stop()
            return
        run.stage = "tie"
        wanted = run.mined() + 1
        miners.signal(signal.SIGCONT)
        await cluster.wait_until(partial(_has_mined, run, wanted), math.inf, "another share")


def _has_mined(run: _Run, wanted: int) -> bool:
    return run.mined() >= wanted


# -- while it runs ---------------------------------------------------------------------------------------------


async def _show(run: _Run, as_json: bool) -> None:
    """Show how it goes: a live table on a terminal, a line each few seconds elsewhere; always on standard error."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not as_json:
        with Live(_picture(run), console=console, transient=True, auto_refresh=False) as live:
            while True:
                live.update(_picture(run), refresh=True)
                await trio.sleep(VIEW_INTERVAL_S)
    while True:
        print(_line(run), file=sys.stderr, flush=True)
        await trio.sleep(LINE_INTERVAL_S)


def _line(run: _Run) -> str:
    statuses = [status for node in run.cluster.nodes if (status := node.status()) is not None]
    heights = [status["height"] for status in statuses]
    blocks = _blocks(statuses)
    links = sum(status["network"]["outbound"] for status in statuses if status["network"])
    where = f"height {min(heights)} to {max(heights)}" if heights else "no node is up"
    return (
        f"{time.monotonic() - run.began:5.1f} s  {run.stage:9}  {sum(run.hash_rates()) / 1e6:6.2f} MH/s  "
        f"{len(statuses)} nodes, {links} links  shares {run.mined()}/{run.shares}  {where}  "
        f"blocks {blocks[0]} accepted, {blocks[1]} stale, {blocks[2]} refused"
    )


def _blocks(statuses: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Blocks found by the nodes: accepted by their own Bitcoin, stale, refused."""
    counts: Counter[str] = Counter()
    for status in statuses:
        counts.update(status["blocks"])
    accepted, stale = counts.pop("", 0), counts.pop(STALE_BLOCK, 0)
    return accepted, stale, sum(counts.values())


_COLUMNS: Final = (
    *("node", "state", "peers", "height", "shares", "side", "waiting", "blocks", "in", "out", "MH/s", "CPU s", "MB"),
    "tip",
)


def _picture(run: _Run) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "state", "tip") else "right", no_wrap=True)
    rates = run.hash_rates()
    for node in run.cluster.nodes:
        status, usage = node.status(), node.usage()
        rate = sum(rates[number] for number in run.miners_of(node))
        taken = (f"{usage.cpu_s:.1f}", f"{usage.rss_bytes / 2**20:.0f}")
        if status is None:
            table.add_row(node.name, "starting", *[""] * 9, *taken, "")
            continue
        network = status["network"]
        table.add_row(
            node.name,
            network["state"],
            str(network["inbound"] + network["outbound"]),
            str(status["height"]),
            str(status["shares"]),
            str(status["shares"] - status["height"] - 1) if status["shares"] > status["height"] else "-",
            str(status["waiting"]),
            "/".join(map(str, _blocks([status]))),
            _per_s(network["received_per_s"]),
            _per_s(network["sent_per_s"]),
            f"{rate / 1e6:.2f}",
            *taken,
            (status["tip"] or "")[-8:],
        )
    mined = run.mined()
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        f"{time.monotonic() - run.began:.1f} s, {run.stage}",
        ProgressBar(total=run.shares, completed=min(run.shares, mined), width=40),
        f"{mined} of {run.shares} shares, {sum(rates) / 1e6:.2f} MH/s",
    )
    note = (
        "side: uncles and stale shares; waiting: for an ancestor; blocks: accepted/stale/refused; in, out: per second"
    )
    return Group(grid, "", table, "", Text(note, style="dim"))


def _per_s(rate: float) -> str:
    return f"{rate / 1000:.1f} kB"


# -- after it --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _NodeAudit:
    """What a node's disk holds."""

    node: NodeProcess
    rows: dict[str, dict[str, Any]]
    tip: str | None
    verified: int
    #: What the next block would pay, as a text to compare.
    payouts: str
    bitcoin_tip: str
    #: Blocks that are shares and that the node's Bitcoin does not know, of those that any node has.
    blocks_missing: int = 0
    #: Blocks on the Bitcoin chain, those of them whose coinbase was recomputed, and what differs.
    on_chain: int = 0
    audited: int = 0
    #: Transactions in these blocks besides the coinbases.
    transactions: int = 0
    mismatches: list[str] = field(default_factory=list)
    #: Sat by address.
    paid: Counter[str] = field(default_factory=Counter)


@contextmanager
def _bitcoin(node: NodeProcess) -> Iterator[KernelBackend]:
    backend = KernelBackend.open(node.directory / "bitcoin")
    try:
        yield backend
    finally:
        backend.close()


def _read(node: NodeProcess) -> _NodeAudit:
    """Read a node's database back, checking every rule again."""
    verified = 0
    with open_copy(node.directory) as (params, store):
        for report in verify_store(params, store):
            if isinstance(report, VerifyReport):
                verified = report.shares
        chain = load_chain(params, store)
        rows = {row["hash"]: row for row in export_rows(chain, store)}
        tip = None if chain.tip is None else chain.tip.hash[::-1].hex()
        payouts = ""
        if tip is not None:
            payout_class, bits = params.payout_classes[-1], rows[tip]["block_bits"]
            payouts = json.dumps(
                asdict(payout_report(chain, value=VALUE, payout_class=payout_class, block_bits=bits)), sort_keys=True
            )
    with _bitcoin(node) as backend:
        bitcoin_tip = backend.tip_now().block_hash[::-1].hex()
    return _NodeAudit(node=node, rows=rows, tip=tip, verified=verified, payouts=payouts, bitcoin_tip=bitcoin_tip)


def _check_blocks(audit: _NodeAudit, params: Params, blocks: Sequence[str]) -> None:
    """Ask the node's Bitcoin for each block, and recompute the coinbases of those on its chain."""
    with _bitcoin(audit.node) as backend:
        for block_hash in blocks:
            internal = bytes.fromhex(block_hash)[::-1]
            if backend.header_facts_now(internal) is None:
                audit.blocks_missing += 1
            raw = backend.block_now(internal)
            audit.on_chain += raw is not None
            row = audit.rows.get(block_hash)
            # A row without outputs has its window below the history that is kept.
            if raw is None or row is None or row["outputs"] is None:
                continue
            outputs = coinbase_outputs(raw)
            audit.audited += 1
            audit.transactions += len(CBlock.deserialize(raw).vtx) - 1
            wrong = audit_block(params, audit.rows, block_hash, outputs)
            if wrong is not None:
                audit.mismatches.append(f"{audit.node.name}: {wrong}")
            for script, amount in outputs:
                address = encode_address(script, "regtest")
                if address is not None:
                    audit.paid[address] += amount


def _audit(run: _Run) -> dict[str, Any]:
    """Read everything back from every disk, and compare."""
    audits = [_read(node) for node in run.cluster.nodes]
    blocks = sorted({key for audit in audits for key, row in audit.rows.items() if row["is_block"]})
    for audit in audits:
        _check_blocks(audit, run.params, blocks)
    refused = sorted(
        {
            f"{audit.node.name}: block {key}: {row['block_outcome']}"
            for audit in audits
            for key, row in audit.rows.items()
            if row["is_block"] and row["block_outcome"] not in (None, "", STALE_BLOCK)
        }
    )
    first = audits[0]
    status = Counter(row["status"] for row in first.rows.values())
    main = [{key for key, row in audit.rows.items() if row["status"] == "main"} for audit in audits]
    delays = propagation_ms([list(audit.rows.values()) for audit in audits], since_ms=run.began_ms)
    nodes = [_node_row(audit, first, run) for audit in audits]
    reports = [] if run.miners is None else run.miners.reports()
    mismatches = [text for audit in audits for text in audit.mismatches]
    mismatches += [
        f"{audit.node.name}: share {key} pays otherwise than at {first.node.name}"
        for audit in audits[1:]
        for key, row in audit.rows.items()
        if key in first.rows and row["outputs"] != first.rows[key]["outputs"]
    ]
    seconds = run.seconds
    total = len(first.rows)
    one_tip = len({audit.tip for audit in audits}) == 1 and first.tip is not None and all(m == main[0] for m in main)
    one_payout = len({audit.payouts for audit in audits}) == 1
    invalid = sum(row["invalid"] for row in nodes)
    faults = sum(row["faults"] for row in nodes)
    missing = sum(audit.blocks_missing for audit in audits)
    return {
        "ok": one_tip
        and one_payout
        and not (run.failure or refused or mismatches or invalid or faults or missing)
        and (first.on_chain > 0 or not blocks),
        "converged": one_tip and not run.failure,
        "equal_payouts": one_payout,
        "failure": run.failure,
        "shares": total,
        "uncles": status["uncle"],
        "stale": status["stale"],
        "uncle_rate": round(status["uncle"] / total, 4) if total else 0.0,
        "stale_rate": round(status["stale"] / total, 4) if total else 0.0,
        "propagation_ms": {
            "p50": _percentile(delays, 50),
            "p99": _percentile(delays, 99),
            "most": delays[-1] if delays else None,
        },
        "blocks": len(blocks),
        "blocks_rejected": len(refused),
        "blocks_stale": len(blocks) - first.on_chain,
        "blocks_missing": missing,
        "bitcoin_tips": len({audit.bitcoin_tip for audit in audits}),
        "reject_reasons": refused,
        "blocks_audited": sum(audit.audited for audit in audits),
        "payout_mismatches": len(mismatches),
        "mismatches": mismatches,
        "verified_shares": sum(audit.verified for audit in audits),
        "invalid": invalid,
        "faults": faults,
        "fee_transactions": first.transactions,
        "rejected_submissions": sum(report.rejected for report in reports),
        "seconds": round(seconds, 2),
        "hash_rate": round(sum(report.hashes for report in reports) / seconds) if seconds else 0,
        "hasher": hasher.IMPLEMENTATION,
        "share_period_ms": run.params.share_period_ms,
        "cores": os.cpu_count(),
        "nodes": nodes,
        "miners": [
            {
                "name": plan.name,
                "address": plan.address,
                "threads": plan.threads,
                "node": run.cluster.nodes[number % len(nodes)].number,
                "shares": sum(row["address"] == plan.address for row in first.rows.values()),
                "paid": first.paid[plan.address],
            }
            for number, plan in enumerate(run.plans)
        ],
    }


def _node_row(audit: _NodeAudit, first: _NodeAudit, run: _Run) -> dict[str, Any]:
    usage, status = audit.node.usage(), audit.node.status() or {}
    network = status.get("network") or {}
    own = {run.plans[number].address for number in run.miners_of(audit.node)}
    return {
        "node": audit.node.number,
        "peer_id": audit.node.peer_id,
        "tip": audit.tip,
        "height": audit.rows[audit.tip]["height"] if audit.tip is not None else -1,
        "shares": len(audit.rows),
        "agrees": audit.tip == first.tip and audit.payouts == first.payouts,
        "own_shares": sum(row["address"] in own for row in audit.rows.values()),
        "blocks_found": sum(status.get("blocks", {}).values()),
        "blocks_missing": audit.blocks_missing,
        "bitcoin_tip": audit.bitcoin_tip,
        "invalid": sum(status.get("invalid", {}).values()),
        "faults": sum(network.get("faults", {}).values()),
        "peers": network.get("inbound", 0) + network.get("outbound", 0),
        "gossip": network.get("gossip", {}),
        "received_bytes": network.get("received_bytes", 0),
        "sent_bytes": network.get("sent_bytes", 0),
        "cpu_s": round(usage.cpu_s, 2),
        "rss_bytes": usage.rss_bytes,
    }


def _percentile(values: Sequence[int], percent: int) -> int | None:
    """The nearest rank of sorted values."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def _print_summary(summary: dict[str, Any], data_dir: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("node", "agrees", "peers", "height", "shares", "own", "blocks", "received", "sent", "CPU s", "MB", "tip")
    for name in columns:
        table.add_column(name, justify="left" if name == "tip" else "right", no_wrap=True)
    for row in summary["nodes"]:
        table.add_row(
            str(row["node"]),
            "yes" if row["agrees"] else "[bold red]NO[/]",
            str(row["peers"]),
            str(row["height"]),
            str(row["shares"]),
            str(row["own_shares"]),
            str(row["blocks_found"]),
            f"{row['received_bytes'] / 1000:.0f} kB",
            f"{row['sent_bytes'] / 1000:.0f} kB",
            f"{row['cpu_s']:.1f}",
            f"{row['rss_bytes'] / 2**20:.0f}",
            (row["tip"] or "")[-16:],
        )
    console.print(table)
    console.print()
    print_miners(console, summary["miners"])
    console.print()
    facts = Table(box=None, pad_edge=False, show_header=False)
    spread, count = summary["propagation_ms"], len(summary["nodes"])
    on_chain = summary["blocks"] - summary["blocks_stale"]
    for name, value in (
        ("convergence", f"{_agreed(summary)} ({count} nodes)"),
        (
            "shares",
            f"{summary['shares']} ({summary['uncles']} uncles, {100 * summary['uncle_rate']:.1f} %; "
            f"{summary['stale']} stale, {100 * summary['stale_rate']:.1f} %)",
        ),
        ("propagation", f"half within {spread['p50']} ms, 99 % within {spread['p99']} ms, all within {spread['most']}"),
        (
            "blocks",
            f"{on_chain} in Bitcoin's chain, {summary['blocks_stale']} stale, {summary['blocks_rejected']} refused; "
            + ("every node's Bitcoin has all" if not summary["blocks_missing"] else "[bold red]some are missing[/]"),
        ),
        ("fee transactions", f"{summary['fee_transactions']} mined"),
        (
            "audit",
            f"{summary['blocks_audited']} coinbases recomputed, {summary['payout_mismatches']} differ; "
            f"{summary['verified_shares']} shares verified from {count} disks",
        ),
        (
            "time",
            f"{summary['seconds']:.1f} s at {summary['hash_rate'] / 1e6:.2f} MH/s ({summary['hasher']} hasher), "
            f"a share each {summary['share_period_ms']} ms wanted",
        ),
        ("kept in", "nothing kept; see --data-dir" if data_dir is None else str(data_dir)),
    ):
        facts.add_row(name, value)
    console.print(facts)
    for text in (summary["failure"], *summary["mismatches"], *summary["reject_reasons"]):
        if text:
            console.print(f"WRONG: {text}", style="bold red", markup=False)
    for row in summary["nodes"]:
        if row["faults"] or row["invalid"]:
            console.print(
                f"WRONG: node {row['node']}: {row['faults']} faults of peers, {row['invalid']} invalid shares",
                style="bold red",
                markup=False,
            )


def _agreed(summary: dict[str, Any]) -> str:
    if not summary["converged"]:
        return "[bold red]the nodes do not agree on a tip[/]"
    if not summary["equal_payouts"]:
        return "[bold red]one tip, but different payouts[/]"
    return "one tip, equal payouts at all nodes"
