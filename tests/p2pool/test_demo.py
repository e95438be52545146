"""The demonstration, as a newcomer runs it."""

from __future__ import annotations

import json
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
