"""The command line. Each command reads its options, calls one function, and prints what it returns.

Heavy imports stand inside the commands, so that ``p2pool --help`` and the reading commands start at once.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from p2pool.config import OPTIONS, Config, load_config
from p2pool.errors import ConfigError, P2PoolError
from sharechain import __version__
from sharechain.errors import SharechainError
from sharechain.params import MAX_MONEY

if TYPE_CHECKING:
    from p2pool.bitcoin_backend.block import BitcoinBlock
    from p2pool.finding import Finding
    from sharechain.chain import Sharechain
    from sharechain.params import Params
    from sharechain.store import Store

__all__ = ["main"]

#: Shell convention: ended by SIGINT.
_EXIT_INTERRUPTED: Final = 130
#: Bytes. What is read of a file with a block: twice the largest block in hexadecimal.
_MAX_BLOCK_FILE: Final = 16_000_000


def main() -> None:
    """Entry point of ``p2pool``: errors that we foresee become one line each and exit code 1."""
    try:
        _run_click()
    except* (P2PoolError, SharechainError, OSError) as group:  # trio wraps what a task raises
        for error in dict.fromkeys(map(str, _leaves(group))):
            click.echo(f"p2pool: error: {error}", err=True)
        sys.exit(1)


def _run_click() -> None:
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(_EXIT_INTERRUPTED)
    except OSError as error:  # such as a full disk behind standard output
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"p2pool: error: {where}{error.strerror or error}", err=True)
        sys.exit(1)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from sharechain import hasher

    click.echo(f"p2pool {__version__} (hasher: {hasher.IMPLEMENTATION}, Python {sys.version.split()[0]})")
    context.exit()


def _config_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flags of some of ``OPTIONS``, and ``--config``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for option in OPTIONS if option.name in names]):
            text = option.help if option.default is None else f"{option.help} [default: {option.default}]"
            form: dict[str, Any] = {"metavar": option.metavar, "multiple": option.is_list}
            if option.values > 1:
                form["nargs"] = option.values
            if option.is_switch:
                text, form = option.help, {"is_flag": True, "default": None}
            command = click.option(option.flag, option.name, help=text, **form)(command)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            envvar="P2POOL_CONFIG",
            help="TOML file with options, underscores for dashes. Flags and P2POOL_... variables win over it.",
        )(command)

    return decorate


def _load(config_file: Path | None, flags: Mapping[str, object]) -> Config:
    return load_config(flags, os.environ, config_file)


#: What ``peers`` shows of each kind of peer.
_PEER_COLUMNS: Final = {
    "connected": ("peer_id", "direction", "ip", "port", "height", "bitcoin_height", "since", "score", "software"),
    "known": ("address", "configured", "reached", "failures"),
    "banned": ("peer_id", "ip", "rule", "since", "detail"),
}

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and which hasher is in use.",
)
def cli() -> None:
    """A Bitcoin mining pool without an operator: nodes share a chain of low-difficulty blocks, and every coinbase pays
    the miners of its window directly."""


@cli.command()
@_config_options(*(option.name for option in OPTIONS))
def run(config_file: Path | None, **flags: str | None) -> None:
    """Run a node: serve miners, keep the sharechain with other nodes, build and submit blocks.

    Work comes from a Bitcoin node over RPC: Bitcoin Core 25 or newer. On regtest, without --bitcoind, a Bitcoin of our
    own is embedded and kept in the data directory.
    """
    config = _load(config_file, flags)
    _log_to_terminal(config.log_level)
    from p2pool.service import run_node

    run_node(config)


@cli.command()
@click.argument("pool", metavar="HOST:PORT")
@click.option("--user", required=True, metavar="ADDRESS[.WORKER]", help="Bitcoin address to be paid.")
@click.option("--password", default="x", show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024))
@click.option("--seconds", type=float, help="Stop after so long. [default: when interrupted]")
@_json_option
def mine(pool: str, user: str, password: str, threads: int, seconds: float | None, as_json: bool) -> None:
    """Mine with the CPU, as an ordinary Stratum client: for test networks and for trying things."""
    from p2pool.service import run_miner

    host, _, port = pool.removeprefix("stratum+tcp://").rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise click.BadParameter(f"HOST:PORT is needed, got {pool!r}", param_hint="HOST:PORT")
    if seconds is not None and not 0 <= seconds < 1e9:
        raise click.BadParameter(f"a number of seconds from 0 is needed, got {seconds}", param_hint="--seconds")
    statistics = run_miner(
        host=host.strip("[]"), port=int(port), user=user, password=password, threads=threads, seconds=seconds
    )
    result = {
        "hashes": statistics.hashes,
        "hash_rate": statistics.hash_rate,
        "accepted": statistics.accepted,
        "rejected": sum(statistics.rejected.values()),
    }
    _print_one(result, as_json)


@cli.command()
@click.option("--shares", default=200, show_default=True, type=click.IntRange(1, 1_000_000), help="Stop after so many.")
@click.option(
    "--block-every",
    default=10,
    show_default=True,
    type=click.IntRange(2, 10_000),
    help="Shares per Bitcoin block, on average.",
)
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1, 32), help="Each in a process of its own.")
@click.option("--miners", type=click.IntRange(1, 64), help="[default: 3, or one for each of several nodes]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep everything there. [default: thrown away]")
@_json_option
def demo(shares: int, block_every: int, nodes: int, miners: int | None, data_dir: Path | None, as_json: bool) -> None:
    """Mine on an embedded regtest Bitcoin with real miners over TCP, and check every coinbase.

    With several nodes, each with a Bitcoin of its own, also check that they agree.
    """
    if nodes > 1:
        from p2pool.cluster_demo import run_cluster_demo

        run_several = partial(run_cluster_demo, nodes=nodes, miners=miners or nodes)
        sys.exit(run_several(shares=shares, block_every=block_every, data_dir=data_dir, as_json=as_json))
    from p2pool.demo import run_demo

    sys.exit(run_demo(shares=shares, block_every=block_every, miners=miners or 3, data_dir=data_dir, as_json=as_json))


@cli.command()
@_config_options(*(option.name for option in OPTIONS))
@_json_option
def doctor(config_file: Path | None, as_json: bool, **flags: str | None) -> None:
    """Look at everything that keeps a node from working, and say what to do about it. Changes nothing.

    Takes the options that `p2pool run` is to be started with; a node may be running. Exit code 0 if there is no
    problem, whatever the warnings; else 1.
    """
    import trio

    from p2pool.doctor import Subject, diagnose, option_sources
    from p2pool.finding import problem

    try:
        subject = Subject(
            config=_load(config_file, flags), sources=option_sources(flags, os.environ, config_file), clock=time.time
        )
    except ConfigError as error:
        findings = [problem("options", str(error), "correct it: nothing else can be looked at before")]
    else:
        findings = trio.run(diagnose, subject)
    problems, warnings = (sum(one.level == level for one in findings) for level in ("problem", "warning"))
    if as_json:
        rows = [asdict(one) for one in findings]
        click.echo(json.dumps({"ok": not problems, "problems": problems, "warnings": warnings, "findings": rows}))
    else:
        for one in findings:
            _print_finding(one)
        counted = ((problems, "problem"), (warnings, "warning"))
        click.echo("\n" + ", ".join(f"{count} {word}" + "s" * (count != 1) for count, word in counted))
    sys.exit(1 if problems else 0)


@cli.command()
@_config_options("network", "data_dir")
@_json_option
def status(config_file: Path | None, as_json: bool, **flags: str | None) -> None:
    """What the sharechain of a data directory looks like; a node may be running on it."""
    with _reading(_load(config_file, flags)) as (params, store, chain, data_dir):
        from p2pool.database import is_in_use
        from p2pool.report import status_report

        running = is_in_use(data_dir)
        report = status_report(params, store, chain, running, time.time())
        report |= _live_status(data_dir, running)
        if not as_json:
            del report["params"]
            report.pop("faults", None)
            report.pop("gossip", None)
        _print_one(report, as_json)


@cli.command()
@_config_options("network", "data_dir")
@_json_option
def peers(config_file: Path | None, as_json: bool, **flags: str | None) -> None:
    """The nodes that a running node is connected to, those that it knows, and those that it sent away."""
    config = _load(config_file, flags)
    from p2pool.database import is_in_use, read_status

    status = read_status(config.data_dir) if is_in_use(config.data_dir) else None
    if status is None or status.get("network") is None:
        raise ConfigError(f"no node runs on {config.data_dir}, or it has just been started")
    network = status["network"]
    if as_json:
        click.echo(json.dumps(network))
        return
    for address in network["addresses"]:
        click.echo(f"we are {address}")
    now = time.time()
    for state, columns in _PEER_COLUMNS.items():
        rows = [row for row in network["peers"] if row["state"] == state]
        click.echo(f"\n{state}: {len(rows)}")
        if rows:
            shown = [{key: row.get(key) for key in columns} for row in rows[:50]]
            for row in shown:
                row |= {key: _ago(now - row[key]) for key in ("since", "reached") if row.get(key) is not None}
            _print_table(shown)


@cli.command()
@_config_options("network", "data_dir")
@click.option("--address", metavar="ADDRESS", help="Only the workers of this address.")
@_json_option
def workers(config_file: Path | None, address: str | None, as_json: bool, **flags: str | None) -> None:
    """What each miner has done here: hash rates, submissions, the best of them, last seen.

    Kept over restarts, and for a week after a worker was heard last; a running node writes it every ten seconds.
    """
    config = _load(config_file, flags)
    from p2pool.database import load_workers
    from p2pool.stratum.accounting import Accounting

    encoded = load_workers(config.data_dir)
    if encoded is None:
        raise ConfigError(f"data directory {config.data_dir} holds no books of miners: no node has run on it")
    try:
        books = Accounting.decode(encoded)
    except ValueError as error:
        raise ConfigError(f"{config.data_dir}/workers.json is damaged: {error}") from None
    now = time.time()
    rows = {"workers": books.workers(now), "addresses": books.addresses(now)}
    for name, some in rows.items():
        rows[name] = [row for row in some if address in (None, row["address"])]
    if as_json:
        click.echo(json.dumps({"time": now, "totals": books.totals(now), **rows}))
        return
    _print_table([_worker_row(row, now) for row in rows["workers"]])


@cli.command()
@_config_options("network", "data_dir")
@click.option("--last", default=20, show_default=True, type=click.IntRange(1), help="How many, from the tip down.")
@_json_option
def shares(config_file: Path | None, last: int, as_json: bool, **flags: str | None) -> None:
    """The newest shares: main chain, uncles and stale ones."""
    with _reading(_load(config_file, flags)) as (_, store, chain, _data_dir):
        from p2pool.report import share_row

        newest = list(chain.entries())[-last:]
        rows = [share_row(chain, stored) for entry in newest if (stored := store.share(entry.hash)) is not None]
        if as_json:
            click.echo(json.dumps(rows))
            return
        shown = [
            {
                "height": row["height"],
                "hash": row["hash"][:16],
                "status": row["status"],
                "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"])),
                "difficulty": _difficulty(row["bits"]),
                "uncles": len(row["uncles"]),
                "block": _block_word(row),
                "address": row["address"],
            }
            for row in rows
        ]
        _print_table(shown)


@cli.command()
@_config_options("network", "data_dir")
@click.option("--address", metavar="ADDRESS", help="Tell all of one miner: why it is paid, or why not.")
@click.option("--class", "payout_class", type=int, help="Payout class. [default: the largest]")
@click.option("--value", type=click.IntRange(0, MAX_MONEY), help="Sat in the block. [default: as in the newest share]")
@_json_option
def payouts(
    config_file: Path | None,
    address: str | None,
    payout_class: int | None,
    value: int | None,
    as_json: bool,
    **flags: str | None,
) -> None:
    """What the next block would pay, and to whom."""
    with _reading(_load(config_file, flags)) as (params, store, chain, _):
        from p2pool.report import explain_payouts

        report = explain_payouts(params, store, chain, address=address, payout_class=payout_class, value=value)
        if as_json:
            click.echo(json.dumps(report))
            return
        rows = report.pop("miners")
        _print_fields(report)
        click.echo()
        columns = ("address", "shares", "uncles", "weight_percent", "entitlement", "paid_by", "paid", "chance")
        _print_table([{key: row[key] for key in columns} for row in rows])
        for row in rows if address is not None else ():
            click.echo(row["why"])


@cli.command()
@click.argument("wanted", metavar="BLOCK", required=False)
@_config_options("network", "data_dir", "bitcoind", "cookie_file", "rpc_user", "rpc_password")
@click.option(
    "--block",
    "file",
    type=click.File("rb"),
    metavar="FILE",
    help="Read the whole block from there, as bytes or hexadecimal (- is standard input), and ask no Bitcoin node.",
)
@_json_option
def audit(
    config_file: Path | None, wanted: str | None, file: BinaryIO | None, as_json: bool, **flags: str | None
) -> None:
    """Derive the coinbase of a Bitcoin block again from the sharechain, and say why each output gets what it gets.

    BLOCK is its hash, or its height in Bitcoin's chain. Exit code 0 only if all is as the rules say; 1 if something
    differs or the block is not of this pool; 3 if the history that is kept does not reach back far enough to tell.
    """
    if wanted is None and file is None:
        raise click.UsageError("BLOCK (a hash or a height) or --block FILE is needed")
    config = _load(config_file, flags)
    from p2pool.audit import AUDIT_EXIT_CODES, explain_block
    from p2pool.bitcoin_backend.block import check_wanted, read_block

    if file is None:
        assert wanted is not None
        block, on_chain = _fetch_block(config, wanted)
    else:
        block, on_chain = read_block(file.read(_MAX_BLOCK_FILE)), None
        check_wanted(block, wanted)
    with _reading(config) as (params, store, chain, _):
        report = explain_block(params, store, chain, block, on_chain=on_chain)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        from p2pool.audit_text import audit_lines

        for line in audit_lines(report):
            click.echo(line)
    sys.exit(AUDIT_EXIT_CODES[report.verdict])


@cli.command()
@_config_options("network", "data_dir")
@_json_option
def verify(config_file: Path | None, as_json: bool, **flags: str | None) -> None:
    """Read the database again from scratch and check every file, record and rule.

    Exit code 0 only if nothing is wrong; what is damaged is named.
    """
    config = _load(config_file, flags)
    from p2pool.database import check_files, is_in_use, open_copy
    from p2pool.report import VerifyReport, verify_store

    in_use = is_in_use(config.data_dir)
    files = 0 if in_use else check_files(config.data_dir)
    with open_copy(config.data_dir) as (params, store), _progress("verifying", store.count()) as advance:
        report = None
        for report in verify_store(params, store):
            if isinstance(report, int):
                advance(report)
    assert isinstance(report, VerifyReport)
    result: dict[str, Any] = {
        "ok": True,
        "network": params.name,
        "shares": report.shares,
        "fully_checked": report.fully_checked,
        "history_only": report.history_only,
        "blocks": report.blocks,
        "height": report.height,
        "tip": report.tip,
        "files_compared": files,
        "in_use": in_use,
    }
    _print_one(result, as_json)


@cli.command()
@_config_options("network", "data_dir")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
def export(config_file: Path | None, form: str, **flags: str | None) -> None:
    """Print every share with all its fields, oldest first: one JSON object a line, or CSV.

    In CSV, lists stand as JSON.
    """
    with _reading(_load(config_file, flags)) as (_, store, chain, _data_dir):
        from p2pool.report import EXPORT_FIELDS, export_rows

        if form == "jsonl":
            for row in export_rows(chain, store):
                sys.stdout.write(json.dumps(row) + "\n")
            return
        writer = csv.writer(sys.stdout)
        writer.writerow(EXPORT_FIELDS)
        for row in export_rows(chain, store):
            cells = (row[key] for key in EXPORT_FIELDS)
            writer.writerow([json.dumps(cell) if isinstance(cell, list | bool) else cell for cell in cells])


@cli.command()
@click.argument("name", metavar="NAME")
@click.option("--quick", is_flag=True, help="A tenth of the size: to see that it runs.")
@click.option("--rounds", type=click.IntRange(1), help="template: of each case. [default: 20]")
@click.option("--connections", type=click.IntRange(1), help="template: miners. [default: 1,000]")
@click.option("--transactions", type=click.IntRange(1), help="template: in a block. [default: 4,000]")
@click.option("--against", metavar="COMMAND", help="hasher: a miner's benchmark command, run in turns with ours.")
@_json_option
def bench(name: str, quick: bool, as_json: bool, against: str | None, **flags: int | None) -> None:
    """Measure: accept, payout, store, hasher, sync, stratum or template; `all` for all.

    Each result is a row of bench, case, metric, value and unit; what it is compared with is a row of the same run.
    """
    from p2pool.bench import BENCHES, run_bench

    names = list(BENCHES) if name == "all" else [name]
    if name != "all" and name not in BENCHES:
        raise click.BadParameter(f"one of {', '.join(BENCHES)}, all is needed, got {name!r}", param_hint="NAME")
    choices: dict[str, Any] = {flag: value for flag, value in flags.items() if value is not None}
    if choices and "template" not in names:
        raise click.UsageError(f"--{next(iter(choices))} is for the benchmark template, not for {name}")
    if against is not None and names != ["hasher"]:
        raise click.BadParameter("only bench hasher compares with a command", param_hint="--against")
    rows = []
    for one in names:
        with ExitStack() as stack:
            given = choices if one == "template" else {}
            if against is not None:
                given = {"against": against}
            if one == "template":
                from p2pool.bench_template import rounds_of

                total = rounds_of(quick, flags["rounds"])
                given = given | {"advance": stack.enter_context(_progress("rounds", total))}
            for row in run_bench(one, quick=quick, **given):
                rows.append(row)
                if as_json:
                    click.echo(json.dumps(row))
    if not as_json:
        _print_table(rows)


def _live_status(data_dir: Path, running: bool) -> dict[str, Any]:
    """What a running node says of its network, in a few numbers."""
    from p2pool.database import read_status

    status = read_status(data_dir) if running else None
    if status is None:
        return {}
    miners = _miners_status(status["miners"]) if "miners" in status else {}
    if status.get("network") is None:
        return miners
    network = status["network"]
    return miners | {
        "sync_state": network["state"],
        "sync_target": network["sync_target"],
        "inbound_peers": network["inbound"],
        "outbound_peers": network["outbound"],
        "orphans": status["waiting"],
        "received_bytes": network["received_bytes"],
        "sent_bytes": network["sent_bytes"],
        "received_per_s": network["received_per_s"],
        "sent_per_s": network["sent_per_s"],
        "gossip": network["gossip"],
        "faults": network["faults"],
        "banned": sum(row["state"] == "banned" for row in network["peers"]),
    }


def _fetch_block(config: Config, wanted: str) -> tuple[BitcoinBlock, bool]:
    """A block of the configured Bitcoin node, and whether it is in its best chain."""
    import trio

    from p2pool.bitcoin_backend.block import find_block
    from p2pool.service import open_bitcoin

    async def fetch() -> tuple[BitcoinBlock, bool]:
        async with open_bitcoin(config, wait=False) as backend:
            return await find_block(backend, wanted)

    _log_to_terminal("warning")
    return trio.run(fetch)


#: What `workers` and `status` name of the reasons for a refusal; all others are `invalid`.
_REASONS: Final = {"stale": "stale", "duplicate": "duplicate", "low difficulty": "low"}


def _refusals(rejected: Mapping[str, int]) -> dict[str, int]:
    counts = {name: rejected.get(reason, 0) for reason, name in _REASONS.items()}
    return counts | {"invalid": sum(rejected.values()) - sum(counts.values())}


def _miners_status(miners: Mapping[str, Any]) -> dict[str, Any]:
    """What the miners of a running node have done, in a few numbers."""
    counts = {f"submissions_{name}": count for name, count in _refusals(miners["rejected"]).items()}
    return {
        "miner_connections": miners["connections"],
        "miners": miners["workers"],
        "miners_hash_rate": miners["hash_rate_10m"],
        "submissions_accepted": miners["accepted"],
        **counts,
        "best_submission": miners["best"],
    }


def _worker_row(row: Mapping[str, Any], now: float) -> dict[str, Any]:
    return {
        "address": row["address"],
        "worker": row["worker"],
        **{span: _hash_rate(row[f"hash_rate_{span}"]) for span in ("1m", "10m", "1h", "24h")},
        "accepted": row["accepted"],
        **_refusals(row["rejected"]),
        "shares": row["shares"],
        "blocks": row["blocks"],
        "best": float(row["best"]),
        "seen": _ago(now - row["last_seen"]),
    }


def _hash_rate(rate: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if rate < 1000:
            return f"{rate:.3g} {unit}H/s"
        rate /= 1000
    return f"{rate:,.3g} EH/s"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


@contextmanager
def _reading(config: Config) -> Iterator[tuple[Params, Store, Sharechain, Path]]:
    from p2pool.database import open_copy
    from p2pool.report import load_chain

    with open_copy(config.data_dir) as (params, store):
        yield params, store, load_chain(params, store), config.data_dir


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, nothing where there is none."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _print_finding(one: Finding) -> None:
    """A finding in as many lines as it takes: mark, check, what was found; below, what to do."""
    colour = {"ok": "green", "warning": "yellow", "problem": "red"}[one.level]
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    indent = " " * 26
    found = textwrap.wrap(one.found, max(width, 60), initial_indent=indent, subsequent_indent=indent)
    # click leaves the colours out where there is no terminal.
    click.echo(f"{click.style(f'{one.level:<8}', fg=colour)} {one.check:<16} {found[0].strip()}")
    advice = textwrap.wrap(one.advice, max(width, 60), initial_indent=indent + "-> ", subsequent_indent=indent + "   ")
    for line in found[1:] + advice:
        click.echo(line)


def _print_one(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_fields(result)


def _print_fields(result: Mapping[str, Any]) -> None:
    """One field a line."""
    _print_grid(None, [[key.replace("_", " "), _cell(value)] for key, value in result.items()])


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a line, under the names of the columns."""
    if not rows:
        click.echo("(nothing)")
        return
    keys = list(rows[0])
    right = [all(isinstance(row[key], int | float | None) for row in rows) for key in keys]
    columns = [
        (key.replace("_", " "), "right" if numeric else "left") for key, numeric in zip(keys, right, strict=True)
    ]
    _print_grid(columns, [[_cell(row[key]) for key in keys] for row in rows])


def _print_grid(columns: list[tuple[str, Any]] | None, cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no edge to wrap at
    table = Table(box=None, pad_edge=False, show_header=columns is not None, header_style="bold")
    for name, justify in columns or [("", "left"), ("", "left")]:
        table.add_column(name, justify=justify, no_wrap=not console.is_terminal, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _difficulty(bits: int) -> float:
    from sharechain.difficulty import bits_to_target, difficulty_of

    return difficulty_of(bits_to_target(bits))


def _block_word(row: Mapping[str, Any]) -> str | None:
    if not row["is_block"]:
        return None
    outcome = row["block_outcome"]
    return "submitted" if outcome is None else (outcome or "accepted")


def _log_to_terminal(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
