"""The command line: exit codes, output that programs can read, and errors that people can."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from p2pool.cli import main
from p2pool.database import DataDirectory
from p2pool.report import EXPORT_FIELDS
from p2pool.stratum.accounting import Accounting
from p2pool.stratum.values import SubmissionOutcome
from sharechain import __version__, hasher
from sharechain.chain import Sharechain
from sharechain.share import Share
from tests.builders import GENESIS_BLOCK, GENESIS_FACTS, PARAMS, START_TIME, add, grow_tree, miner_script, new_chain
from tests.p2pool.network import address

COMMAND = [sys.executable, "-c", "from p2pool.cli import main; main()"]
REGTEST = ["--network", "regtest", "--stratum-port", "0"]


def p2pool(*arguments: str, timeout: float = 30, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("P2POOL_")}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, **options
    )


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The same in this process, for commands that leave signals and pipes alone."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        for key in [key for key in os.environ if key.startswith("P2POOL_")]:
            monkeypatch.delenv(key)
        monkeypatch.setattr(sys, "argv", ["p2pool", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return subprocess.CompletedProcess(list(arguments), code, captured.out, captured.err)

    return call


def assert_clear(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    """An error that a person understands: an exit code, nothing on standard output, a line without a traceback."""
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for text in texts:
        assert text in done.stderr


def fill_books(path: Path) -> None:
    """What a node leaves of its miners."""
    books = Accounting(time.time() - 3600)
    for number in range(20):
        outcome = SubmissionOutcome(reason=None, difficulty=1024.0, best=5e6, is_share=number == 5)
        books.note(address="bc1qa", worker="rig1", outcome=outcome, now=time.time() - 100 + 5 * number)
    for reason in ("stale", "duplicate", "low difficulty", "invalid share (R7)", "malformed"):
        outcome = SubmissionOutcome(reason=reason)
        books.note(address="bc1qb", worker="", outcome=outcome, now=time.time())
    (path / "workers.json").write_bytes(b"".join(books.encode(time.time())))


def test_workers_shows_what_miners_have_done(here: Call, tmp_path: Path) -> None:
    fill_books(tmp_path)
    shown = here("workers", "--data-dir", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    header, first, second = shown.stdout.splitlines()
    assert header.split()[:6] == ["address", "worker", "1m", "10m", "1h", "24h"]
    assert first.split()[:2] == ["bc1qa", "rig1"]
    assert "GH/s" in first
    assert second.split()[-10:-3] == ["1", "1", "1", "2", "0", "0", "0"]
    told = json.loads(here("workers", "--data-dir", str(tmp_path), "--json").stdout)
    assert [row["worker"] for row in told["workers"]] == ["rig1", ""]
    assert told["addresses"][1]["rejected"]["invalid share (R7)"] == 1
    assert told["totals"]["accepted"] == 20
    one = json.loads(here("workers", "--data-dir", str(tmp_path), "--json", "--address", "bc1qb").stdout)
    assert [row["address"] for row in one["workers"] + one["addresses"]] == ["bc1qb", "bc1qb"]


def test_workers_without_books_or_with_damaged_ones_says_so(here: Call, tmp_path: Path) -> None:
    assert_clear(here("workers", "--data-dir", str(tmp_path)), 1, "holds no books of miners")
    (tmp_path / "workers.json").write_bytes(b"[]")
    assert_clear(here("workers", "--data-dir", str(tmp_path)), 1, "workers.json is damaged")


def fill(path: Path) -> list[Share]:
    """A data directory as a node leaves it: a small tree of shares with uncles, stale ones and blocks."""
    directory = DataDirectory(path, PARAMS)
    chain: Sharechain = new_chain()
    steps = [(0, 0, 0, True), (0, 1, 0, True), (1, 2, 1, True), (0, 0, 2, True), (2, 3, 1, False), (0, 1, 0, True)]
    for number, share in enumerate(shares := grow_tree(new_chain(), steps * 2)):
        change = add(chain, share)
        directory.store.write(
            change, first_seen_ms=START_TIME * 1000 + number, facts={GENESIS_BLOCK: GENESIS_FACTS}, sync=False
        )
        directory.note_written()
    directory.close()
    return shares


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Share]]:
    path = tmp_path_factory.mktemp("filled")
    return path, fill(path)


# -- start ---------------------------------------------------------------------------------------------------


def test_version_names_the_hasher(here: Call) -> None:
    done = here("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"p2pool {__version__} (hasher: {hasher.IMPLEMENTATION}, Python 3.")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["verify", "-h"]])
def test_help_answers_without_loading_what_it_does_not_need(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom p2pool.cli import main\nsys.argv = ['p2pool', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n    print('LOADED', *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    loaded = done.stderr.partition("LOADED ")[2].split()
    heavy = {"trio", "plyvel", "plyvel_next", "pbk", "libp2p", "rich", "bitcoin", "asyncio", "sharechain.chain"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "No such command"),
        (["status", "--nonsense"], "No such option"),
        (["mine", "127.0.0.1:1"], "--user"),
        (["mine", "no-port", "--user", "x"], "HOST:PORT is needed"),
        (["mine", "host:0", "--user", "x"], "HOST:PORT is needed"),
        (["mine", "host:65536", "--user", "x"], "HOST:PORT is needed"),
        (["mine", "host:\N{SUPERSCRIPT TWO}", "--user", "x"], "HOST:PORT is needed"),
        (["mine", "127.0.0.1:1", "--user", "x", "--threads", "0"], "--threads"),
        (["mine", "127.0.0.1:1", "--user", "x", "--seconds", "-1"], "--seconds"),
        (["mine", "127.0.0.1:1", "--user", "x", "--seconds", "nan"], "--seconds"),
        (["shares", "--last", "0"], "--last"),
        (["export", "--format", "xml"], "--format"),
        (["bench", "nonsense"], "one of"),
        (["bench", "store", "--against", "true"], "only bench hasher compares"),
        (["demo", "--shares", "0"], "--shares"),
    ],
)
def test_a_wrong_call_is_exit_code_2(here: Call, arguments: list[str], text: str) -> None:
    assert_clear(here(*arguments), 2, text)


@pytest.mark.parametrize("command", ["status", "shares", "payouts", "verify", "export"])
def test_reading_a_directory_that_holds_nothing_is_an_error_that_names_it(
    here: Call, command: str, tmp_path: Path
) -> None:
    assert_clear(here(command, "--data-dir", str(tmp_path / "none")), 1, "p2pool: error: ", "holds no sharechain")
    assert not (tmp_path / "none").exists(), "reading makes nothing"


@pytest.mark.parametrize("command", ["status", "shares", "payouts", "verify", "export"])
def test_reading_a_directory_of_a_first_start_that_was_killed_is_a_clear_error(
    here: Call, command: str, tmp_path: Path
) -> None:
    (tmp_path / "sharechain").mkdir()
    (tmp_path / "lock").write_text("1")
    assert_clear(here(command, "--data-dir", str(tmp_path)), 1, "p2pool: error: ", str(tmp_path))


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["status"], ["verify"], ["payouts"], ["shares"], ["shares", "--last", "3"]])
def test_json_is_one_value_and_nothing_else_and_the_table_needs_no_terminal(
    here: Call, command: list[str], filled: tuple[Path, list[Share]]
) -> None:
    path, shares = filled
    done = here(*command, "--json", "--data-dir", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    value = json.loads(done.stdout)
    if command[0] == "shares":
        assert len(value) == (3 if "--last" in command else len(shares))
        assert all(tuple(row) == EXPORT_FIELDS for row in value)
    else:
        assert value["network"] == "test"
    if command[0] == "status":
        assert (value["shares"], value["running"]) == (len(shares), False)
        assert value["main"] + value["uncles"] + value["stale"] == len(shares)
    if command[0] == "verify":
        assert (value["ok"], value["shares"], value["fully_checked"], value["in_use"]) == (
            True,
            len(shares),
            len(shares),
            False,
        )
        assert value["files_compared"] > 0
    shown = here(*command, "--data-dir", str(path))
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert "\x1b" not in shown.stdout
    assert len(shown.stdout.splitlines()) > 3


def test_export_as_lines_and_as_csv_say_the_same(here: Call, filled: tuple[Path, list[Share]]) -> None:
    path, shares = filled
    lines = here("export", "--data-dir", str(path))
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert sorted(row["hash"] for row in rows) == sorted(share.hash[::-1].hex() for share in shares)
    assert [row["height"] for row in rows] == sorted(row["height"] for row in rows)
    table = here("export", "--format", "csv", "--data-dir", str(path))
    read = list(csv.DictReader(io.StringIO(table.stdout, newline="")))
    assert tuple(read[0]) == EXPORT_FIELDS
    for cells, row in zip(read, rows, strict=True):
        for key in EXPORT_FIELDS:
            cell: Any = cells[key]
            if isinstance(row[key], list | bool):
                assert json.loads(cell) == row[key]
            else:
                assert cell == ("" if row[key] is None else str(row[key]))


def test_payouts_explain_one_address(here: Call, filled: tuple[Path, list[Share]]) -> None:
    path, _ = filled
    done = here("payouts", "--address", address(0), "--data-dir", str(path))
    assert f"{address(0)} has " in done.stdout
    done = here("payouts", "--address", address(9), "--json", "--data-dir", str(path))
    (miner,) = json.loads(done.stdout)["miners"]
    assert miner["paid_by"] == "not in the window"
    assert_clear(here("payouts", "--address", "xyz", "--data-dir", str(path)), 1, "--address: ")
    assert_clear(here("payouts", "--class", "13", "--data-dir", str(path)), 1, "--class: ")


@pytest.mark.parametrize("value", ["0", "1", "545", "2100000000000000", "99999999999999999999"])
def test_payouts_of_any_value_are_shown_or_refused(here: Call, value: str, filled: tuple[Path, list[Share]]) -> None:
    done = here("payouts", "--json", "--value", value, "--data-dir", str(filled[0]))
    assert "Traceback" not in done.stderr, done.stderr[-1000:]
    if done.returncode == 0:
        report = json.loads(done.stdout)
        paid = sum(miner["paid"] for miner in report["miners"])
        assert paid + report["finder_amount"] == int(value)
    else:
        assert "--value" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["export"], ["status"], ["shares", "--json"]])
def test_a_reader_that_goes_away_is_no_error_message(command: list[str], filled: tuple[Path, list[Share]]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *command, "--data-dir", str(filled[0])],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_verify_names_the_file_that_was_changed(here: Call, tmp_path: Path) -> None:
    fill(tmp_path)
    file = next((tmp_path / "sharechain").glob("*.log"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert_clear(here("verify", "--json", "--data-dir", str(tmp_path)), 1, "p2pool: error: ", file.name)


def test_verify_shows_no_bar_where_there_is_no_terminal_and_changes_nothing(here: Call, tmp_path: Path) -> None:
    fill(tmp_path)
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    for command in ("status", "verify", "export"):
        assert here(command, "--data-dir", str(tmp_path)).returncode == 0
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before


# -- run -----------------------------------------------------------------------------------------------------


@contextmanager
def node(path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A node process and its Stratum port, once it listens."""
    log = path.with_name(path.name + ".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "run", *REGTEST, "--data-dir", str(path), *arguments], stdout=file, stderr=file, text=True
        )
        try:
            deadline = time.monotonic() + 20
            while "stratum+tcp://" not in (text := log.read_text()):
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.01)
            yield process, int(text.split("stratum+tcp://")[1].split(",")[0].rpartition(":")[2])
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_is_told_to_stop_closes_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "data"
    with node(path) as (process, _):
        process.send_signal(number)
        assert process.wait(20) == 0
    text = (tmp_path / "data.log").read_text()
    assert "Traceback" not in text
    assert f"{number.name}: stopping" in text
    assert (path / "sharechain.sums").exists()
    assert not (path / "bitcoin" / "DIRTY").exists()
    assert p2pool("verify", "--json", "--data-dir", str(path)).returncode == 0


@pytest.mark.slow
def test_a_second_node_on_the_same_directory_is_refused_and_reading_is_not(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with node(path) as (process, port):
        assert_clear(p2pool("run", *REGTEST, "--data-dir", str(path)), 1, "in use by another node", str(process.pid))
        status = json.loads(p2pool("status", "--json", "--data-dir", str(path)).stdout)
        assert status["running"] is True
        verified = json.loads(p2pool("verify", "--json", "--data-dir", str(path)).stdout)
        assert verified["in_use"] is True
        other = [*REGTEST[:3], str(port), "--data-dir", str(tmp_path / "other")]
        assert_clear(p2pool("run", *other), 1, f"Stratum cannot listen on 127.0.0.1:{port}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_node_that_was_killed_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for _ in range(2):
        with node(path) as (process, _):
            process.kill()
            process.wait()
    assert p2pool("verify", "--json", "--data-dir", str(path)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--address", "nonsense"], ["--address: "]),
        (["--stratum-host", "no.such.host.invalid"], ["cannot listen"]),
        (["--stratum-port", "x"], ["--stratum-port: "]),
        (["--data-dir", "/proc/nothing/here"], ["cannot be used"]),
        (["--config", "/no/such/file"], ["--config: ", "No such file"]),
    ],
)
def test_what_the_operator_got_wrong_is_one_line(arguments: list[str], texts: list[str], tmp_path: Path) -> None:
    done = p2pool("run", *REGTEST, "--data-dir", str(tmp_path / "data"), *arguments)
    assert_clear(done, 1, "p2pool: error: ", *texts)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--bitcoind", "http://user:hunter2@nowhere:x"], "--bitcoind: a Bitcoin node's address is host:port"),
        (["--rpc-user", "somebody"], "--bitcoind: a user and a password for the Bitcoin node go together"),
        (["--zmq", "tcp://nothing"], "--zmq: tcp://nothing: "),
        (
            ["--address", "bcrt1q3467skzz9faljvpw57qsqval3220uq88kh4h5v"],
            "is a regtest address; this node mines mainnet",
        ),
    ],
)
def test_a_mistake_about_bitcoin_is_told_before_any_bitcoin_node_is_asked(
    here: Call, arguments: list[str], text: str, tmp_path: Path
) -> None:
    done = here("run", "--network", "mainnet", "--data-dir", str(tmp_path / "data"), *arguments)
    assert_clear(done, 1, "p2pool: error: ", text)
    assert "hunter2" not in done.stderr


@pytest.mark.slow
def test_a_bitcoin_node_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    with socket.socket() as reserved:  # nobody listens there, and nobody else gets it
        reserved.bind(("127.0.0.1", 0))
        url = f"http://user:hunter2@127.0.0.1:{reserved.getsockname()[1]}"
        arguments = ("run", "--network", "mainnet", "--data-dir", str(tmp_path / "data"), "--bitcoind", url)
        with subprocess.Popen(
            [sys.executable, "-c", "from p2pool.cli import main; main()", *arguments], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(30) == 0
    assert "Bitcoin node cannot be used: 127.0.0.1:" in said
    assert "is the Bitcoin node running" in said
    assert "hunter2" not in said + rest


@pytest.mark.slow
def test_a_directory_of_another_network_is_refused(filled: tuple[Path, list[Share]], tmp_path: Path) -> None:
    fill(tmp_path / "data")
    done = p2pool("run", *REGTEST, "--data-dir", str(tmp_path / "data"))
    assert_clear(done, 1, "p2pool: error: ", "belongs to network 'test'")


# -- mine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_miner_mines_on_a_node_and_says_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with node(path) as (process, port):
        done = p2pool("mine", f"127.0.0.1:{port}", "--user", address(0), "--seconds", "1.5", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["accepted"] > 0
        assert result["hashes"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    rows = p2pool("export", "--data-dir", str(path)).stdout.splitlines()
    assert {json.loads(row)["payout_script"] for row in rows} == {miner_script(0).hex()}
    assert p2pool("verify", "--data-dir", str(path)).returncode == 0


@pytest.mark.slow
def test_a_miner_that_the_pool_refuses_says_why(tmp_path: Path) -> None:
    with node(tmp_path / "data") as (_, port):
        done = p2pool("mine", f"127.0.0.1:{port}", "--user", "nobody")
        assert "Traceback" not in done.stderr, done.stderr[-1000:]
        assert done.returncode == 1
        assert "the pool refused nobody" in done.stderr


@pytest.mark.slow
def test_a_miner_without_a_pool_prints_json_all_the_same(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        done = p2pool("mine", f"127.0.0.1:{port}", "--user", address(0), "--seconds", "0.3", "--json")
    assert json.loads(done.stdout)["accepted"] == 0
    done = p2pool("mine", f"127.0.0.1:{port}", "--user", address(0), "--seconds", "0", "--json")
    assert json.loads(done.stdout)["hashes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_miner_ends_without_a_traceback(number: signal.Signals) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        process = subprocess.Popen(
            [*COMMAND, "mine", f"127.0.0.1:{port}", "--user", address(0), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        sock.settimeout(20)
        connection, _ = sock.accept()
        with connection:
            connection.recv(100)
            process.send_signal(number)
            output, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert process.returncode in (0, 130)
    assert output == "" or json.loads(output)


@pytest.mark.slow
def test_bench_prints_a_json_object_a_line() -> None:
    done = p2pool("bench", "hasher", "--quick", "--json", timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    assert all({"bench", "case", "metric", "value", "unit"} <= row.keys() for row in rows)
