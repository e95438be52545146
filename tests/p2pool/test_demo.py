"""The demonstration, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-c", "from p2pool.cli import main; main()", "demo"]
pytestmark = pytest.mark.slow


def demo(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run([*COMMAND, "--json", *arguments], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == code, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(summary, dict)
    assert len(done.stdout.splitlines()) == 1, "standard output holds the object alone"
    return summary


def test_a_demonstration_ends_with_one_json_object_and_goes_on_from_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    first = demo("--shares", "30", "--block-every", "4", "--data-dir", str(path))
    wanted = {"shares", "uncles", "stale", "blocks", "blocks_rejected", "payout_mismatches", "seconds", "hash_rate"}
    assert wanted <= first.keys()
    assert first["shares"] >= 30
    assert first["blocks"] > 0
    assert (first["blocks_rejected"], first["payout_mismatches"], first["invalid"]) == (0, 0, 0)
    assert first["verified_shares"] == first["shares"]
    assert first["seconds"] > 0
    assert first["hash_rate"] > 0
    assert sum(miner["shares"] for miner in first["miners"]) == first["shares"]
    second = demo("--shares", "5", "--data-dir", str(path))
    assert second["shares"] >= first["shares"] + 5
    assert second["blocks_audited"] >= first["blocks_audited"]
    assert second["verified_shares"] == second["shares"]
    read = subprocess.run(
        [*COMMAND[:-1], "verify", "--json", "--data-dir", str(path)], capture_output=True, text=True, timeout=60
    )
    assert json.loads(read.stdout)["shares"] == second["shares"]


def test_an_interrupted_demonstration_ends_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    process = subprocess.Popen(
        [*COMMAND, "--shares", "100000", "--json", "--data-dir", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "shares" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode in (0, 1, 130)
    assert output == "" or json.loads(output)
    assert not (path / "bitcoin" / "DIRTY").exists()
    assert (path / "sharechain.sums").exists()


def test_a_demonstration_does_not_touch_a_directory_of_another_network(tmp_path: Path) -> None:
    from tests.p2pool.test_cli import fill

    fill(tmp_path)
    done = subprocess.run([*COMMAND, "--data-dir", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "holds network 'test', not a demonstration" in done.stderr


def processes_of(path: Path, *, of: str = "") -> list[int]:
    """The processes with a path below ``path`` in their command line, ending as said."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if any(part.startswith(bytes(path)) and part.endswith(of.encode()) for part in command.split(b"\0")):
            found.append(int(process.name))
    return found


def start_several(path: Path) -> subprocess.Popen[str]:
    """A demonstration with two nodes that mine."""
    process = subprocess.Popen(
        [*COMMAND, "--nodes", "2", "--shares", "100000", "--data-dir", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "mining" not in process.stderr.readline():
        assert process.poll() is None
    return process


def test_several_nodes_agree_and_later_ones_join(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    first = demo("--nodes", "2", "--shares", "25", "--block-every", "4", "--data-dir", str(path))
    assert (first["ok"], first["converged"], first["equal_payouts"]) == (True, True, True)
    assert first["shares"] >= 25
    assert first["blocks"] > 0
    assert (first["blocks_rejected"], first["blocks_missing"], first["payout_mismatches"]) == (0, 0, 0)
    assert (first["invalid"], first["faults"]) == (0, 0)
    assert first["blocks_audited"] >= 2 * (first["blocks"] - first["blocks_stale"]) > 0
    assert first["fee_transactions"] > 0
    assert first["propagation_ms"]["p50"] >= 0
    assert [node["node"] for node in first["nodes"]] == [1, 2]
    assert len({node["tip"] for node in first["nodes"]}) == 1
    assert all(node["agrees"] and node["received_bytes"] > 0 for node in first["nodes"])
    assert sum(miner["shares"] for miner in first["miners"]) == first["shares"]
    second = demo("--nodes", "3", "--miners", "1", "--shares", "5", "--data-dir", str(path))
    assert second["ok"]
    assert second["nodes"][2]["height"] > first["nodes"][0]["height"]
    assert second["nodes"][2]["own_shares"] == 0
    done = subprocess.run(
        [*COMMAND, "--nodes", "2", "--data-dir", str(path / "node1")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "holds a single node" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_of_several_nodes_leaves_no_process(tmp_path: Path, number: int) -> None:
    process = start_several(tmp_path)
    assert len(processes_of(tmp_path, of="node.toml")) == 2
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert (process.returncode, output) == (130, "")
    assert errors.endswith("interrupted: all nodes are stopped\n")
    assert processes_of(tmp_path) == []
    for node in ("node1", "node2"):
        assert not (tmp_path / node / "bitcoin" / "DIRTY").exists()
        assert (tmp_path / node / "sharechain.sums").exists()


def test_a_node_that_dies_ends_the_demonstration_with_the_end_of_its_log(tmp_path: Path) -> None:
    process = start_several(tmp_path)
    os.kill(processes_of(tmp_path, of="node.toml")[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "has died (SIGKILL); the end of its log:\n    " in errors
    assert "miners connect to stratum+tcp://127.0.0.1:" in errors.partition("the end of its log:")[2]
    assert processes_of(tmp_path) == []
