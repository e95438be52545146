"""What the node says of its Bitcoin beside those of other nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pool.blocks import BlockSubmitter
from p2pool.database import DataDirectory
from p2pool.exchange import BEHIND_BLOCKS, BEHIND_S, BlockExchange
from tests.p2pool.fakebitcoin import FakeBitcoin
from tests.p2pool.network import PARAMS, START, Clock


@pytest.fixture
def exchange(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> BlockExchange:
    caplog.set_level("INFO", "p2pool.node")
    directory = DataDirectory(tmp_path, PARAMS)
    backend = FakeBitcoin(Clock(START))
    submitter = BlockSubmitter(backend=backend, directory=directory, on_answer=lambda *_: None)
    directory.close()
    return BlockExchange(backend=backend, submitter=submitter, on_news=lambda: None)


async def test_a_bitcoin_that_stays_behind_most_others_is_told_of_once_and_so_is_that_it_caught_up(
    exchange: BlockExchange, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(int(BEHIND_S) + 60):
        exchange.compare(100, [100, 100 + BEHIND_BLOCKS, 100 + BEHIND_BLOCKS], second)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "at block 100, most of theirs are at 102 or further" in caplog.text
    exchange.compare(102, [100, 102, 102], 300.0)
    exchange.compare(102, [100, 102, 102], 301.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    ("height", "others"),
    [
        (100, []),
        (100, [101, 101, 101]),
        (100, [100, 100, 2**31]),
        (100, [100, 2**31]),
        (-1, [100, 100]),
    ],
    ids=["alone", "one block is nothing", "one of three is no majority", "half is none", "not known yet"],
)
async def test_what_is_no_reason_to_worry(
    exchange: BlockExchange, caplog: pytest.LogCaptureFixture, height: int, others: list[int]
) -> None:
    for second in range(int(BEHIND_S) + 60):
        exchange.compare(height, others, second)
    assert not caplog.records


async def test_a_short_lag_is_not_told(exchange: BlockExchange, caplog: pytest.LogCaptureFixture) -> None:
    for second in range(1000):
        is_behind = second % 100 < 90
        exchange.compare(100, [110] if is_behind else [100], second)
    assert not caplog.records
