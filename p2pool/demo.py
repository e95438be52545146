"""The demonstration: real miners, a real node and a real Bitcoin (regtest) in one process, and an audit at the end.

The share network is made to measure: the hasher is timed first, so that shares come every fifth of a second on this
machine from the start. Fees are real: the Bitcoin chain starts with coinbases that anybody may spend, and after each
block a few such spends go into the next template.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from bitcoin.core import CBlock
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from p2pool.bitcoin_backend.address import decode_address, encode_address
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, assemble_block
from p2pool.blocks import STALE_BLOCK
from p2pool.database import DataDirectory, open_copy
from p2pool.derivation import audit_block
from p2pool.errors import BackendError, ConfigError
from p2pool.miner import Miner, mine
from p2pool.node import Node, NodeStatistics
from p2pool.report import VerifyReport, export_rows, load_chain, verify_store
from p2pool.service import until_signal
from p2pool.stratum.server import ServerSettings, open_listeners
from p2pool.stratum.vardiff import VardiffSettings
from sharechain import hasher
from sharechain.coinbase import build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target
from sharechain.params import NETWORKS, Params
from sharechain.payout import Payouts
from sharechain.share import bip34_push, pack_header
from sharechain.tagged import tagged_hash

__all__ = [
    "MinerPlan",
    "coinbase_outputs",
    "demo_params",
    "plan_miner",
    "premine",
    "print_miners",
    "run_demo",
    "spend_fees",
]

logger = logging.getLogger("p2pool.demo")


SHARE_PERIOD_MS: Final = 200
#: Blocks at the start whose coinbases anybody may spend, 100 of which they must be old.
PREMINED: Final = 120
#: Sat.
FEE: Final = 2_000
#: A witness script that is true: whoever shows it may spend.
_ANYBODY: Final = b"\x51"
_ANYBODY_SCRIPT: Final = b"\x00\x20" + hashlib.sha256(_ANYBODY).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerPlan:
    """A miner of a demonstration."""

    name: str
    address: str
    threads: int


@dataclass(kw_only=True)
class _Run:
    """What a running demonstration knows: for the progress and the summary."""

    params: Params
    plans: list[MinerPlan]
    node: Node | None = None
    miners: list[Miner] = field(default_factory=list)
    seconds: float = 0.0
    statistics: NodeStatistics | None = None
    hashes: int = 0
    rejected: int = 0

    def hash_rate(self) -> float:
        return sum(miner.statistics().hash_rate for miner in self.miners)


def run_demo(*, shares: int, block_every: int, miners: int, data_dir: Path | None, as_json: bool) -> int:
    """Run the demonstration and print its summary.

    Args:
        shares: stop after so many have joined the chain.
        block_every: shares per Bitcoin block, on average.
        miners: how many, each with an address of its own.
        data_dir: kept, and gone on with if it holds an earlier demonstration; None for a temporary one.
        as_json: print one JSON object as the last line, and no table.

    Returns:
        Exit code: 0 only if Bitcoin accepted every block and every coinbase equals its recomputation.
    """
    logging.getLogger("p2pool").addHandler(logging.NullHandler())  # the summary tells what happened
    scratch = None if data_dir is not None else Path(tempfile.mkdtemp(prefix="p2pool-demo-"))
    directory = scratch if data_dir is None else data_dir
    assert directory is not None
    try:
        run = _Run(params=demo_params(directory, block_every), plans=[plan_miner(number) for number in range(miners)])
        trio.run(until_signal, partial(_mine_shares, run, directory, shares, as_json))
        summary = _audit(run, directory)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)
    if as_json:
        print(json.dumps(summary))
    else:
        _print_summary(run, summary, data_dir)
    sound = summary["blocks_rejected"] == 0 and summary["payout_mismatches"] == 0 and summary["invalid"] == 0
    return 0 if sound and summary["shares"] > 0 else 1


def demo_params(
    directory: Path, block_every: int, *, period_ms: int = SHARE_PERIOD_MS, threads: int | None = None
) -> Params:
    """The network to run on: that of an earlier demonstration in a data directory, else one made for this machine.

    Args:
        directory: the data directory of a node; need not exist.
        block_every: shares per Bitcoin block, on average.
        period_ms: wanted time between shares.
        threads: of all miners; None for more than there are cores.

    Raises:
        ConfigError: the directory holds another network.
    """
    try:
        with open_copy(directory) as (params, _):
            if params.name != "demo":
                raise ConfigError(f"--data-dir: {directory} holds network {params.name!r}, not a demonstration")
            if params.block_target_divisor != block_every:
                print(
                    f"going on with the demonstration in {directory}: a block every "
                    f"{params.block_target_divisor} shares",
                    file=sys.stderr,
                )
            return params
    except ConfigError:
        if (directory / "sharechain").exists():
            raise
    rate = _measure_hash_rate() * min(os.cpu_count() or 1, 4, threads or 4)
    expected = max(4, int(rate * period_ms / 1000 / 2))
    return NETWORKS["regtest"].with_overrides(
        {
            "name": "demo",
            "share_period_ms": period_ms,
            "half_life_s": max(8, 40 * period_ms // 1000),
            "stall_after_s": max(5, 25 * period_ms // 1000),
            "stall_doubling_s": max(2, 10 * period_ms // 1000),
            "max_target": min(2**255 - 1, 2**256 // expected),
            "block_target_divisor": block_every,
        }
    )


def _measure_hash_rate() -> float:
    header, hashes, started = bytes(80), 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.25:
        hashes += hasher.scan_nonces(header, hashes, 1 << 12, 0).hashes
    return hashes / seconds


def plan_miner(number: int, *, threads: int | None = None) -> MinerPlan:
    """Miner ``number``: all address types take turns, and so do one and two threads if no number is given."""
    key = tagged_hash("p2pool/demo-miner", number.to_bytes(4, "big"))
    script = (
        b"\x00\x14" + key[:20],
        b"\x51\x20" + key,
        b"\x76\xa9\x14" + key[:20] + b"\x88\xac",
        b"\xa9\x14" + key[:20] + b"\x87",
        b"\x00\x20" + key,
    )[number % 5]
    address = encode_address(script, "regtest")
    assert address is not None
    return MinerPlan(name=f"miner{number + 1}", address=address, threads=threads or 1 + number % 2)


async def _mine_shares(run: _Run, path: Path, shares: int, as_json: bool) -> None:
    directory = DataDirectory(path, run.params)
    try:
        backend = await trio.to_thread.run_sync(KernelBackend.open, path / "bitcoin")
        try:
            await trio.to_thread.run_sync(premine, backend)
            run.node = node = Node(
                directory=directory,
                params=run.params,
                backend=backend,
                stratum=ServerSettings(vardiff=VardiffSettings(target_interval_s=1.0)),
            )
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run, open_listeners("127.0.0.1", 0))
                nursery.start_soon(spend_fees, backend)
                host, port = node.server.addresses[0]
                for plan in run.plans:
                    miner = await nursery.start(
                        partial(mine, host=host, port=port, user=f"{plan.address}.{plan.name}", threads=plan.threads)
                    )
                    run.miners.append(miner)
                with _progress(run, shares, as_json) as show:
                    while node.statistics().shares < shares:
                        run.seconds = trio.current_time() - started
                        show()
                        await trio.sleep(0.1)
                run.seconds = trio.current_time() - started
                nursery.cancel_scope.cancel()
        finally:
            if run.node is not None:
                run.statistics = run.node.statistics()
                run.rejected = sum(run.node.server.statistics().rejected.values())
            run.hashes = sum(miner.statistics().hashes for miner in run.miners)
            with trio.CancelScope(shield=True):
                await backend.aclose()
    finally:
        directory.close()


def premine(backend: KernelBackend) -> None:
    """Give a new chain coinbases that are old enough to be spent, by anybody."""
    while (template := backend.block_template_now()).height <= PREMINED:
        script = bip34_push(template.height) + b"/premined/"
        payouts = Payouts(outputs=b"", count=0, finder_amount=template.coinbase_value, threshold=0)
        coinbase = build_coinbase(script, payouts, _ANYBODY_SCRIPT, None, bytes(32))
        block = _solved(template, coinbase)
        result = backend.submit_block_now(block)
        if not result.accepted:
            raise BackendError(f"the embedded Bitcoin refused block {template.height}: {result.reason}")


def _solved(template: BlockTemplate, coinbase: bytes) -> bytes:
    header = pack_header(
        version=template.version,
        previous_block_hash=template.previous_block_hash,
        merkle_root=fold_coinbase(coinbase, template.merkle_branch),
        time=template.min_time,  # not now: 120 blocks in a second would push the chain's time ahead of the clock
        bits=template.bits,
        nonce=0,
    )
    nonce = hasher.scan_nonces(header, 0, 2**32, bits_to_target(template.bits)).nonce
    assert nonce is not None, "regtest blocks need two hashes on average"
    return assemble_block(header[:76] + nonce.to_bytes(4, "little"), coinbase, template)


async def spend_fees(backend: KernelBackend, *, first: int = 0, step: int = 1) -> None:
    """After each block, spend some of the old coinbases to themselves, less a fee.

    Args:
        backend: with a chain that ``premine`` began.
        first, step: which of them: several nodes know different transactions, as Bitcoin nodes do.
    """
    number = 0
    while True:
        tip = (await backend.tip()).block_hash
        for spendable in backend.mature_coinbases(_ANYBODY_SCRIPT)[first::step][: 1 + number % 5]:
            try:
                backend.add_transaction(_spend(spendable.txid, spendable.vout, spendable.value - FEE))
            except BackendError as error:  # another node's block has come and spent it
                logger.debug("a spend came too late: %s", error)
                break
        number += 1
        await backend.wait_for_tip(tip)


def _spend(txid: bytes, index: int, value: int) -> bytes:
    """A transaction from an output that anybody may spend to another; its witness is the script."""
    source = b"\x01" + txid + index.to_bytes(4, "little") + b"\x00" + b"\xff\xff\xff\xff"
    target = b"\x01" + value.to_bytes(8, "little") + bytes([len(_ANYBODY_SCRIPT)]) + _ANYBODY_SCRIPT
    witness = b"\x01\x01" + _ANYBODY
    return b"\x02\x00\x00\x00" + b"\x00\x01" + source + target + witness + bytes(4)


def _audit(run: _Run, directory: Path) -> dict[str, Any]:
    """Read everything back from disk and recompute every coinbase that Bitcoin accepted."""
    statistics = run.statistics
    blocks = [] if statistics is None else list(statistics.blocks)
    refused = [block for block in blocks if not block.accepted and block.reason != STALE_BLOCK]
    mismatches: list[str] = []
    paid: dict[str, int] = {}
    with open_copy(directory) as (params, store):
        for verified in verify_store(params, store):
            if isinstance(verified, VerifyReport):
                verified_shares = verified.shares
        rows = {row["hash"]: row for row in export_rows(load_chain(params, store), store)}
    backend = KernelBackend.open(directory / "bitcoin")
    audited = 0
    try:
        for row in rows.values():
            # A row without outputs has its window below the history that is kept.
            if row["is_block"] and row["block_outcome"] == "" and row["outputs"] is not None:
                raw = backend.block_now(bytes.fromhex(row["hash"])[::-1])
                outputs = [] if raw is None else coinbase_outputs(raw)
                wrong = audit_block(params, rows, row["hash"], outputs)
                audited += 1
                if wrong is not None:
                    mismatches.append(wrong)
                for script, amount in outputs:
                    address = encode_address(script, "regtest")
                    if address is not None:
                        paid[address] = paid.get(address, 0) + amount
    finally:
        backend.close()
    status = [row["status"] for row in rows.values()]
    return {
        "shares": len(rows),
        "uncles": status.count("uncle"),
        "stale": status.count("stale"),
        "blocks": len(blocks),
        "blocks_rejected": len(refused),
        "blocks_stale": sum(block.reason == STALE_BLOCK for block in blocks),
        "reject_reasons": sorted({block.reason for block in refused}),
        "blocks_audited": audited,
        "payout_mismatches": len(mismatches),
        "mismatches": mismatches,
        "verified_shares": verified_shares,
        "invalid": 0 if statistics is None else sum(statistics.invalid.values()),
        "rejected_submissions": run.rejected,
        "fee_transactions": sum(block.transactions for block in blocks),
        "seconds": round(run.seconds, 2),
        "hash_rate": round(run.hashes / run.seconds) if run.seconds else 0,
        "hasher": hasher.IMPLEMENTATION,
        "miners": [
            {
                "name": plan.name,
                "address": plan.address,
                "threads": plan.threads,
                "shares": sum(row["address"] == plan.address for row in rows.values()),
                "paid": paid.get(plan.address, 0),
            }
            for plan in run.plans
        ],
    }


def coinbase_outputs(block: bytes) -> list[tuple[bytes, int]]:
    """The (script, sat) of the coinbase outputs of a whole block, read without any of our own codecs."""
    return [(bytes(output.scriptPubKey), output.nValue) for output in CBlock.deserialize(block).vtx[0].vout]


@contextmanager
def _progress(run: _Run, shares: int, as_json: bool) -> Iterator[Callable[[], None]]:
    """Show how it goes: a live table on a terminal, a line each few seconds elsewhere; always on standard error."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not as_json:
        with Live(_progress_table(run, shares), console=console, transient=True, auto_refresh=False) as live:
            yield lambda: live.update(_progress_table(run, shares), refresh=True)
        return
    shown_at = -math.inf

    def show() -> None:
        nonlocal shown_at
        if run.seconds - shown_at >= 2:
            shown_at = run.seconds
            print(_progress_line(run, shares), file=sys.stderr, flush=True)

    yield show


def _progress_line(run: _Run, shares: int) -> str:
    assert run.node is not None
    statistics = run.node.statistics()
    return (
        f"{run.seconds:5.1f} s  {run.hash_rate() / 1e6:6.2f} MH/s  shares {statistics.shares}/{shares}  "
        f"height {statistics.chain.height}  {_blocks_line(statistics)}"
    )


def _blocks_line(statistics: NodeStatistics) -> str:
    accepted = sum(block.accepted for block in statistics.blocks)
    stale = sum(block.reason == STALE_BLOCK for block in statistics.blocks)
    return f"blocks {accepted} accepted, {stale} stale, {len(statistics.blocks) - accepted - stale} refused"


def _progress_table(run: _Run, shares: int) -> Group:
    assert run.node is not None
    chain, statistics = run.node.chain, run.node.statistics()
    bar = ProgressBar(total=shares, completed=min(shares, statistics.shares), width=40)
    credited: Counter[bytes] = Counter()
    uncles = 0
    for entry in chain.entries():
        credited[entry.payout_script] += 1
        uncles += len(entry.uncles) if chain.is_main(entry) else 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("miner", "threads", "MH/s", "shares", "address"):
        table.add_column(name, justify="left" if name in ("miner", "address") else "right", overflow="fold")
    for plan, miner in zip(run.plans, run.miners, strict=False):
        table.add_row(
            plan.name,
            str(plan.threads),
            f"{miner.statistics().hash_rate / 1e6:.2f}",
            str(credited[decode_address(plan.address, "regtest")]),
            plan.address,
        )
    grid = Table.grid(padding=(0, 2))
    grid.add_row(f"{run.seconds:.1f} s, {run.hash_rate() / 1e6:.2f} MH/s", bar)
    grid.add_row("shares", f"{statistics.shares} of {shares}, {uncles} uncles, height {statistics.chain.height}")
    grid.add_row("blocks", _blocks_line(statistics).removeprefix("blocks "))
    if statistics.blocks:
        last = statistics.blocks[-1]
        grid.add_row(
            "last block",
            f"{last.payouts} payouts and {last.transactions} transactions at height {last.block_height}",
        )
    return Group(grid, "", table)


def _print_summary(run: _Run, summary: dict[str, Any], data_dir: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    print_miners(console, summary["miners"])
    console.print()
    facts = Table(box=None, pad_edge=False, show_header=False)
    refused = summary["blocks_rejected"]
    accepted = summary["blocks"] - refused - summary["blocks_stale"]
    for name, value in (
        ("shares", f"{summary['shares']} ({summary['uncles']} uncles, {summary['stale']} stale)"),
        ("blocks", f"{accepted} accepted by Bitcoin, {refused} refused, {summary['blocks_stale']} stale"),
        ("fee transactions", f"{summary['fee_transactions']} mined"),
        (
            "audit",
            f"{summary['blocks_audited']} coinbases recomputed, {summary['payout_mismatches']} differ; "
            f"{summary['verified_shares']} shares verified from disk",
        ),
        ("time", f"{summary['seconds']:.1f} s at {summary['hash_rate'] / 1e6:.2f} MH/s ({summary['hasher']} hasher)"),
        ("kept in", "nothing kept; see --data-dir" if data_dir is None else str(data_dir)),
    ):
        facts.add_row(name, value)
    console.print(facts)
    for text in (*summary["mismatches"], *summary["reject_reasons"]):
        console.print(f"WRONG: {text}", style="bold red", markup=False)


def print_miners(console: Console, miners: list[dict[str, Any]]) -> None:
    """The table of what miners were paid."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("miner", "threads", "shares", "paid (BTC)", "address"):
        table.add_column(name, justify="left" if name in ("miner", "address") else "right", overflow="fold")
    for miner in miners:
        table.add_row(
            miner["name"], str(miner["threads"]), str(miner["shares"]), f"{miner['paid'] / 1e8:.8f}", miner["address"]
        )
    console.print(table)
