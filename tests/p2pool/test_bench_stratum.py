"""The benchmark of Stratum runs, and measures what it says."""

from __future__ import annotations

import pytest

from p2pool.bench_stratum import _bench


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bare", "node"])
def test_every_submission_of_the_load_is_accepted(kind: str) -> None:
    rows = {row["metric"]: row["value"] for row in _bench(kind, 3, 0.2, "three")}
    assert rows["refused"] == 0
    assert rows["closed loop"] > 0
    assert 0 < rows["closed loop, p50"] <= rows["closed loop, p99"] <= rows["closed loop, most"]
    if kind == "node":
        assert rows["size of a job"] > 1_000
        assert rows["job to the last of all, median"] > 0
