"""The benchmark of the hasher against other programs."""

from __future__ import annotations

import shlex
import sys

import pytest

from p2pool.bench_hasher import bench_hasher, read_hash_rate
from p2pool.errors import ConfigError
from sharechain import hasher


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("[2024-01-01 12:00:00] thread 0: 2097152 hashes, 10.40 Mhash/s\n", 10.4e6),
        ("Total: 9.1 Mhash/s\nTotal: 26.1 MH/s, Temp: 50C", 26.1e6),
        ("900 kH/s", 900e3),
        ("1.5 GHash/s", 1.5e9),
        ("7 H/s", 7.0),
        ("12 hashes, no rate", None),
        ("", None),
    ],
)
def test_a_miners_rate_is_read_from_its_last_line(text: str, rate: float | None) -> None:
    assert read_hash_rate(text) == rate


@pytest.mark.slow
def test_kernels_are_compared_with_each_other_and_with_a_command() -> None:
    fake = "import time; print('Total: 2.0 Mhash/s', flush=True); time.sleep(60)"
    rows = list(bench_hasher(True, f"{shlex.quote(sys.executable)} -c {shlex.quote(fake)}"))
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    assert all(value > 0 for value in values.values())
    for kernel in hasher.kernels():
        assert (f"one thread, kernel {kernel}", "scan") in values
    [theirs] = [value for (case, _), value in values.items() if "Mhash" in case]
    assert theirs == 2.0
    [ours] = [value for (case, metric), value in values.items() if "wall clock, kernel" in case and metric == "scan"]
    [ratio] = [value for (_, metric), value in values.items() if metric == "ratio to the reference"]
    assert ratio == pytest.approx(ours / 2.0)


@pytest.mark.parametrize(
    ("command", "text"), [("/no/such/miner", "cannot run"), ("echo hello", "printed no hash rate")]
)
@pytest.mark.slow
def test_a_command_that_is_no_benchmark_is_a_clear_error(command: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        list(bench_hasher(True, command))
