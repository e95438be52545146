"""The benchmark of a new Bitcoin block: the real backend can use its Bitcoin, and a small run gives figures."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from p2pool.bench_bitcoin import FAMILY_SIZE, FILLED_WEIGHT, ImaginaryBitcoin, made_transactions, tip_hash
from p2pool.bench_template import allow_files, stratum_hash
from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.rpc import RpcBackend, connect_bitcoin
from p2pool.errors import ConfigError
from p2pool.stratum.values import Notify


@asynccontextmanager
async def backend_of(bitcoin: ImaginaryBitcoin) -> AsyncIterator[RpcBackend]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, bitcoin.serve, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        with trio.fail_after(20):
            async with connect_bitcoin(
                [Endpoint(url=url)], network="regtest", reserved_weight=4_000, reserved_sigops=400
            ) as backend:
                yield backend
        nursery.cancel_scope.cancel()


@pytest.mark.slow
def test_four_thousand_made_transactions_fill_a_block() -> None:
    entries = made_transactions(4_000, seed=1)
    weight = sum(entry["weight"] for entry in entries)
    assert 0.97 * FILLED_WEIGHT < weight <= FILLED_WEIGHT
    assert {150 <= len(entry["data"]) // 2 <= 2_000 for entry in entries} == {True}
    assert max(len(entry["data"]) for entry in entries) > 2 * 1_500


def test_made_transactions_are_the_same_each_time_and_others_for_another_seed() -> None:
    assert made_transactions(20, seed=1) == made_transactions(20, seed=1)
    assert sum(entry["fee"] for entry in made_transactions(20, seed=1)) > 5_000_000
    ids = {entry["txid"] for seed in (1, 2) for entry in made_transactions(20, seed)}
    assert len(ids) == 40


def test_made_transactions_hang_together_in_families_that_bitcoin_would_relay() -> None:
    entries = made_transactions(1_000, seed=1)
    family = list(range(1_001))  # its first member, by position
    for position, entry in enumerate(entries, 1):
        assert all(0 < parent < position for parent in entry["depends"])
        roots = {family[parent] for parent in entry["depends"]}
        assert len(roots) <= 1
        family[position] = min(roots, default=position)
    sizes = [family.count(root) for root in set(family[1:])]
    assert 5 < max(sizes) <= FAMILY_SIZE


async def test_the_backend_takes_the_imaginary_bitcoin_for_a_real_one() -> None:
    bitcoin = ImaginaryBitcoin(30)
    bitcoin.move_to(1, full=True)
    async with backend_of(bitcoin) as backend:
        template = await backend.block_template()
        assert template.previous_block_hash == tip_hash(1)
        assert len(template.transactions) == 30
        assert template.coinbase_value > 312_500_000
        assert (await backend.tip()).height == template.height - 1
        assert await backend.header_facts(b"\x01" * 32) is None
        assert not await backend.is_on_chain(b"\x01" * 32)
        bitcoin.move_to(2, full=False)
        template = await backend.block_template()
        assert (template.previous_block_hash, template.transactions) == (tip_hash(2), ())


async def test_the_imaginary_bitcoin_says_when_it_has_a_new_tip_and_notes_when_it_said_so() -> None:
    bitcoin = ImaginaryBitcoin(1)
    async with backend_of(bitcoin) as backend, trio.open_nursery() as nursery:
        heard: list[bytes] = []

        async def wait() -> None:
            heard.append(await backend.wait_for_tip(tip_hash(0)))
            await backend.block_template()

        nursery.start_soon(wait)
        while not bitcoin.waiting:  # noqa: ASYNC110 - the server has no event for it
            await trio.sleep(0.001)
        bitcoin.move_to(1, full=True)
        while "answered" not in bitcoin.marks:  # noqa: ASYNC110 - the server has no event for it
            await trio.sleep(0.001)
    assert heard == [tip_hash(1)]
    assert bitcoin.marks["announced"] < bitcoin.marks["requested"] <= bitcoin.marks["answered"]


def test_miners_look_for_the_hash_that_the_server_writes() -> None:
    notify = Notify(
        job_id="1",
        previous_block_hash=tip_hash(7),
        coinb1=b"",
        coinb2=b"",
        branch=(),
        version=0,
        bits=0,
        time=0,
        share_target=1,
        block_target=1,
    )
    line = notify.encode(job_id="1", version_mask=0, clean=True)
    assert json.loads(line)["params"][1] == stratum_hash(tip_hash(7))
    assert b",[]," in line  # by which the miners know an empty block


def test_more_files_than_the_system_allows_are_a_clear_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    if limits[1] == resource.RLIM_INFINITY:
        pytest.skip("the system allows any number")
    with pytest.raises(ConfigError, match="ask for fewer --connections"):
        allow_files(limits[1] + 1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from p2pool.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_a_small_run_measures_every_part_and_its_references() -> None:
    done = run_cli("bench", "template", "--rounds", "2", "--connections", "7", "--transactions", "40", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["bench"] == "template" for row in rows)
    spans = [row for row in rows if row["unit"] == "ms"]
    assert all(0 <= row["value"] < 60_000 for row in spans), spans
    cases = {row["case"] for row in rows}
    for whose in ("an address each", "one address"):
        for what in ("40 transactions", "empty"):
            assert f"new tip, 7 connections, {whose}, {what}" in cases
    assert sum("reference" in case for case in cases) == 2
    one = {row["metric"]: row["value"] for row in rows if row["case"] == "template of 40 transactions, one miner"}
    for end in ("median", "worst"):
        assert one[f"answer begins to first byte, {end}"] <= one[f"request to first byte, {end}"]


@pytest.mark.slow
def test_its_options_are_for_no_other_benchmark() -> None:
    done = run_cli("bench", "hasher", "--rounds", "2")
    assert done.returncode == 2
    assert "--rounds is for the benchmark template" in done.stderr
