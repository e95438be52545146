"""A found block is never lost: not by a full disk, a broken share, a silent Bitcoin node, a stop or a damaged file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2pool import blocks
from p2pool.bitcoin_backend import BlockTemplate, HeaderFacts, SubmitResult
from p2pool.blocks import BlockSubmitter, FoundBlock
from p2pool.database import DataDirectory
from p2pool.errors import BackendError
from sharechain.errors import StoreError
from tests.builders import PARAMS

BLOCK = FoundBlock(block_hash=b"\x07" * 32, block_height=5, value=50, payouts=3, transactions=2, raw=b"block" * 20)


class SlowBackend:
    """A Bitcoin node that answers when it is let: every call is a cancellable wait, as over RPC."""

    network = "regtest"

    def __init__(self) -> None:
        self.answers = trio.Event()
        self.is_down = False
        self.on_chain: set[bytes] = set()
        self.headers: set[bytes] = set()
        self.log: list[str] = []
        self.result = SubmitResult(accepted=True)
        self.height = 0

    async def submit_block(self, raw: bytes) -> SubmitResult:
        self.log.append("submit")
        if self.is_down:
            raise BackendError("connection refused")
        try:
            await self.answers.wait()
        except trio.Cancelled:
            self.log.append("cancelled")
            raise
        return self.result

    async def is_on_chain(self, block_hash: bytes) -> bool:
        return block_hash in self.on_chain

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        known = block_hash in self.headers
        return HeaderFacts(block_hash=block_hash, height=1, next_bits=0x207FFFFF, median_time=0) if known else None

    async def block_template(self) -> BlockTemplate:
        raise AssertionError("the submitter asks no such thing")

    async def tip(self) -> HeaderFacts:
        return HeaderFacts(block_hash=bytes(32), height=self.height, next_bits=0x207FFFFF, median_time=0)

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        raise AssertionError("the submitter asks no such thing")

    async def aclose(self) -> None:
        pass


class Desk:
    """A submitter on a slow backend, and what it was told."""

    def __init__(self, path: Path) -> None:
        self.directory = DataDirectory(path, PARAMS)
        self.backend = SlowBackend()
        self.answers: list[tuple[bytes, str, FoundBlock | None]] = []
        self.submitter = BlockSubmitter(
            backend=self.backend,
            directory=self.directory,
            on_answer=lambda block_hash, result, block: self.answers.append((block_hash, result.reason, block)),
        )


async def until(reached: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not reached():  # noqa: ASYNC110 - what moves is the submitter's own task
            await trio.sleep(0.001)


def nothing() -> None:
    pass


async def test_the_share_waits_for_the_answer_but_not_for_long(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, lambda: desk.backend.log.append("share"))
        await until(lambda: "share" in desk.backend.log)
        assert desk.backend.log == ["submit", "share"]
        assert [raw for _, raw in desk.directory.kept_blocks()] == [BLOCK.encode()]
        desk.backend.answers.set()
        await until(lambda: bool(desk.answers))
        assert desk.answers == [(BLOCK.block_hash, "", BLOCK)]
        assert desk.directory.kept_blocks() == []
        nursery.cancel_scope.cancel()
    desk.directory.close()


async def test_a_block_whose_parent_bitcoin_lost_is_submitted_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "RETRY_S", (0.001, 0.002))
    desk = Desk(tmp_path)
    desk.backend.result = SubmitResult(accepted=False, reason=blocks.NO_PARENT)
    desk.backend.answers.set()
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, nothing)
        await until(lambda: desk.backend.log.count("submit") > 20)
        assert desk.answers == []
        await until(lambda: [raw for _, raw in desk.directory.kept_blocks()] == [BLOCK.encode()])
        desk.backend.result = SubmitResult(accepted=True)
        await until(lambda: bool(desk.answers))
        assert desk.answers == [(BLOCK.block_hash, "", BLOCK)]
        assert desk.directory.kept_blocks() == []
        nursery.cancel_scope.cancel()
    desk.directory.close()


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_block_without_a_parent_is_given_up_when_bitcoin_is_past_it_or_it_was_never_ours(
    tmp_path: Path, is_ours: bool
) -> None:
    desk = Desk(tmp_path)
    desk.backend.result = SubmitResult(accepted=False, reason=blocks.NO_PARENT)
    desk.backend.height = BLOCK.block_height + (blocks.PAST_BLOCKS if is_ours else 0)
    desk.backend.answers.set()
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, nothing, is_ours=is_ours)
        await until(lambda: bool(desk.answers))
        assert desk.answers == [(BLOCK.block_hash, blocks.NO_PARENT, BLOCK)]
        nursery.cancel_scope.cancel()
    desk.directory.close()


async def test_a_block_of_another_node_is_not_kept_on_disk(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, lambda: desk.backend.log.append("passed on"), is_ours=False)
        await until(lambda: "passed on" in desk.backend.log)
        assert desk.directory.kept_blocks() == []
        desk.backend.answers.set()
        await until(lambda: bool(desk.answers))
        assert desk.answers == [(BLOCK.block_hash, "", BLOCK)]
        nursery.cancel_scope.cancel()
    desk.directory.close()


async def test_a_disk_that_takes_nothing_does_not_end_a_submission(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    (tmp_path / "blocks").write_text("a file where the directory should be: nothing can be kept")

    def broken() -> None:
        desk.backend.log.append("share")
        raise StoreError("sharechain", "does not take a write: no space left")

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(desk.submitter.run, [])
            desk.submitter.submit(BLOCK, broken)
            await until(lambda: "share" in desk.backend.log)
            await trio.sleep(0.01)
            assert desk.backend.log == ["submit", "share"], "not cancelled"
            desk.backend.answers.set()
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup):
        await run()
    assert [reason for _, reason, _ in desk.answers] == [""]
    desk.directory.close()


async def test_a_stop_waits_for_answers_and_leaves_the_rest_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "STOP_S", 0.05)
    desk = Desk(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, nothing)  # and the stop comes before anything else runs
        nursery.cancel_scope.cancel()
    assert desk.backend.log == ["submit", "cancelled"]
    assert [raw for _, raw in desk.directory.kept_blocks()] == [BLOCK.encode()]
    desk.backend.answers.set()
    again = BlockSubmitter(
        backend=desk.backend,
        directory=desk.directory,
        on_answer=lambda block_hash, result, block: desk.answers.append((block_hash, result.reason, block)),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(again.run, [BLOCK.block_hash])
        await until(lambda: bool(desk.answers))
        nursery.cancel_scope.cancel()
    assert desk.answers == [(BLOCK.block_hash, "", BLOCK)]
    desk.directory.close()


async def test_a_backend_that_is_down_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.backend.is_down = True
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        desk.submitter.submit(BLOCK, nothing)
        await until(lambda: bool(desk.backend.log))
        nursery.cancel_scope.cancel()
    assert [raw for _, raw in desk.directory.kept_blocks()] == [BLOCK.encode()]
    desk.directory.close()


async def test_a_kept_file_that_is_no_block_is_set_aside(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.directory.keep_block(b"\x01" * 32, b"")
    desk.directory.keep_block(b"\x02" * 32, b"\x81\x01")
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [])
        nursery.cancel_scope.cancel()
    assert desk.directory.kept_blocks() == []
    assert len(list((tmp_path / "blocks").glob("*.damaged"))) == 2
    desk.directory.close()


async def test_what_became_of_an_unanswered_block_is_asked_at_the_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    won, lost, gone = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
    desk.backend.on_chain, desk.backend.headers = {won}, {won, lost}
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.submitter.run, [won, lost, gone])
        nursery.cancel_scope.cancel()
    assert desk.answers == [
        (won, "", None),
        (lost, "inconclusive", None),
        (gone, "unknown to the Bitcoin node", None),
    ]
    desk.directory.close()
