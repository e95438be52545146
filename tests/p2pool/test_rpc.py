"""Real Bitcoin nodes as a backend, when things go wrong: nodes that end, hang, lag, start, lie or are another's.

What they do as long as all is well is in test_backend_contract.py. Time stands still here but for what a test says, and
sockets are real.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import p2pool.bitcoin_backend.rpc
from p2pool.bitcoin_backend import BitcoinBackend, BlockTemplate, SubmitResult
from p2pool.bitcoin_backend.headers import CHAIN_RULES
from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.nodes import ASK_TIMEOUT_S, AVOID_S, LAG_S, MAX_LACKING, RETRY_INTERVAL_S, WATCH_INTERVAL_S
from p2pool.bitcoin_backend.rpc import OTHERS_S, WAIT_S, RpcBackend, connect_bitcoin
from p2pool.bitcoin_backend.template import HeaderFacts
from p2pool.errors import BackendError, BackendRefusal, ConfigError
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.hasher import sha256d
from tests.p2pool.fakecore import FakeCore, RpcFault, open_fake_core
from tests.p2pool.network import ANYBODY_SCRIPT, mine_blocks, running, spend
from tests.p2pool.network import until as until_passing
from tests.p2pool.test_kernel import build_block, mine, on

#: Unix seconds of the backend's clock: soon after the blocks that are mined here.
NOW = time.time()
ACCEPTED = SubmitResult(accepted=True)
SECRET = "correct horse"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[KernelBackend]:
    opened = KernelBackend.open(tmp_path / "kernel")
    yield opened
    opened.close()


@pytest.fixture
def clock(mock_clock: MockClock) -> MockClock:
    """Time that moves only when a test says so."""
    return mock_clock


@pytest.fixture(autouse=True)
def _nothing_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG, "p2pool.bitcoin")
    yield
    for word in (SECRET, "__cookie__", "Basic "):
        assert word not in caplog.text


@pytest.fixture
def no_regtest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mainnet with regtest's blocks: on regtest nobody asks whether a node has its blocks yet."""
    rules = CHAIN_RULES | {"mainnet": replace(CHAIN_RULES["regtest"], network="mainnet")}  # type: ignore[operator]
    monkeypatch.setattr(p2pool.bitcoin_backend.rpc, "CHAIN_RULES", rules)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What an operator has read since the last look, with the level's first letter before it."""
    lines = [
        f"{record.levelname[0]} {record.getMessage()}"
        for record in caplog.records
        if record.name == "p2pool.bitcoin" and record.levelno >= logging.INFO
    ]
    caplog.clear()
    return lines


async def until(reached: Callable[[], bool]) -> None:
    """Let tasks and sockets go on without any time passing."""
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline, "not reached in 20 s"
        await trio.lowlevel.checkpoint()


async def settle() -> None:
    """Let tasks and sockets go on until nothing moves."""
    await trio.testing.wait_all_tasks_blocked(0.005)


async def pass_time(clock: MockClock, seconds: float, *, step: float = 5.0) -> None:
    """Let time pass, slowly enough for questions to be answered in it."""
    while seconds > 0:
        await settle()
        clock.jump(min(step, seconds))
        seconds -= step
    await settle()


@asynccontextmanager
async def connected(
    *endpoints: Endpoint, network: str = "regtest", wait: bool = True, zmq: Sequence[str] = ()
) -> AsyncIterator[RpcBackend]:
    async with connect_bitcoin(
        endpoints,
        network=network,
        reserved_weight=20_000,
        reserved_sigops=400,
        wait=wait,
        zmq=zmq,
        clock=lambda: NOW,
    ) as backend:
        yield backend


@asynccontextmanager
async def two(kernel: KernelBackend) -> AsyncIterator[tuple[RpcBackend, FakeCore, FakeCore]]:
    """A backend over two nodes with the same chain."""
    async with (
        open_fake_core(kernel) as first,
        open_fake_core(kernel) as second,
        connected(first.endpoint, second.endpoint) as backend,
    ):
        yield backend, first, second


def name(core: FakeCore) -> str:
    return core.endpoint.name


def answer(core: FakeCore, method: str, reply: Callable[..., Any]) -> None:
    """Have a server answer a method with whatever a function of the parameters gives."""

    async def give(*params: object) -> Any:
        await trio.lowlevel.checkpoint()
        return reply(*params)

    core._methods[method] = (give, 0, 9)


def hash_of(raw: bytes) -> bytes:
    return sha256d(raw[:80])


async def outcome(question: Callable[[], Awaitable[Any]], into: list[Any]) -> None:
    """Put an answer, or the error instead of it, into a list."""
    try:
        into.append(await question())
    except BackendError as error:
        into.append(error)


# The start.


async def test_a_node_that_is_not_there_yet_is_waited_for_and_told_once(
    kernel: KernelBackend, tmp_path: Path, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_fake_core(kernel, cookie_file=tmp_path / ".cookie") as core, trio.open_nursery() as nursery:
        await core.stop()
        tips: list[HeaderFacts] = []

        async def use() -> None:
            async with connected(core.endpoint) as backend:
                tips.append(await backend.tip())

        nursery.start_soon(use)
        await pass_time(clock, 60)
        (line,) = told(caplog)
        assert line.startswith(f"E Bitcoin node cannot be used: {name(core)}: ")
        assert "is bitcoind running" in line
        core.warmup = "Loading block index…"
        await core.start()
        await pass_time(clock, 60)
        (line,) = told(caplog)
        assert "the Bitcoin node is starting: Loading block index…" in line
        core.warmup = None
        await pass_time(clock, RETRY_INTERVAL_S)
        await until(lambda: bool(tips))
        (line,) = told(caplog)
        assert line.startswith(f"I Bitcoin node {name(core)} can be used again, after 2 min and ")


async def test_a_node_in_initial_block_download_is_waited_for(
    kernel: KernelBackend, clock: MockClock, no_regtest: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_fake_core(kernel) as core, trio.open_nursery() as nursery:
        core.initialblockdownload, core.headers_ahead = True, 900_000
        usable = trio.Event()

        async def use() -> None:
            async with connected(core.endpoint, network="mainnet"):
                usable.set()

        nursery.start_soon(use)
        await pass_time(clock, 60)
        (line,) = told(caplog)
        assert line.startswith(f"E Bitcoin node cannot be used: {name(core)}: still in initial block download")
        assert line.endswith("at block 0 of 900,000")
        assert not usable.is_set()
        core.initialblockdownload, core.headers_ahead = False, 0
        await pass_time(clock, RETRY_INTERVAL_S)
        await until(usable.is_set)


async def test_whoever_does_not_wait_is_told_at_once(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core:
        core.warmup = "Verifying blocks…"
        with pytest.raises(BackendError, match="no Bitcoin node can be used"):
            async with connected(core.endpoint, wait=False):
                pass


async def test_one_node_that_can_be_used_is_enough(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as first, open_fake_core(kernel) as second:
        await first.stop()
        async with connected(first.endpoint, second.endpoint, wait=False) as backend:
            assert (await backend.tip()).height == 0
            assert backend.nodes.active.name == name(second)


def _of_another_network(core: FakeCore) -> None:
    answer(core, "getblockhash", lambda _: CHAIN_RULES["testnet4"].genesis_hash[::-1].hex())


def _of_no_network(core: FakeCore) -> None:
    answer(core, "getblockhash", lambda _: "ab" * 32)


def _too_old(core: FakeCore) -> None:
    core.version = 240_100


def _other_password(core: FakeCore) -> None:
    core.password = "wrong"


def _forbidden(core: FakeCore) -> None:
    core.forbidden = True


MISTAKES = [
    (_of_another_network, "is on Bitcoin network testnet4, this node is to run on regtest: name another"),
    (_of_no_network, "is on Bitcoin network of another kind, this node is to run on regtest"),
    (_too_old, "is Bitcoin Core 24: 25 or newer is needed"),
    (_other_password, "does not accept the password of user 'pool' .*rpcauth"),
    (_forbidden, "HTTP 403.*rpcallowip"),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
async def test_at_the_start_the_operator_is_told_what_to_do(
    kernel: KernelBackend, mistake: Callable[[FakeCore], None], words: str
) -> None:
    async with open_fake_core(kernel) as good, open_fake_core(kernel) as core:
        mistake(core)
        with pytest.raises(ConfigError, match=f"^--bitcoind: {name(core)}.*{words}"):
            async with connected(good.endpoint, core.endpoint):
                pass


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
async def test_later_a_node_that_is_not_ours_is_not_used(
    kernel: KernelBackend,
    clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    mistake: Callable[[FakeCore], None],
    words: str,
) -> None:
    async with two(kernel) as (backend, first, second):
        await first.stop()
        await pass_time(clock, WATCH_INTERVAL_S)
        assert backend.nodes.active.name == name(second)
        told(caplog)
        mistake(first)
        await first.start()
        await pass_time(clock, 60)
        await second.stop()
        asked = first.calls["getblocktemplate"], first.calls["submitblock"]
        with pytest.raises(BackendError):
            await backend.block_template()
        assert (first.calls["getblocktemplate"], first.calls["submitblock"]) == asked
        assert backend.nodes.active.name == name(second)
        assert len([line for line in told(caplog) if name(first) in line]) == 1


async def test_a_node_that_is_alone_and_no_longer_ours_is_not_asked(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        await core.stop()
        await pass_time(clock, WATCH_INTERVAL_S)
        _of_another_network(core)
        await core.start()
        await pass_time(clock, RETRY_INTERVAL_S)
        with pytest.raises(BackendError, match="is on Bitcoin network testnet4"):
            await backend.block_template()
        with pytest.raises(BackendError, match="no Bitcoin node can be used"):
            await backend.submit_block(build_block(kernel.block_template_now()))
        assert core.calls["getblocktemplate"] == core.calls["submitblock"] == 0


# One node after another.


async def test_another_node_takes_over_and_the_first_comes_back(
    kernel: KernelBackend, tmp_path: Path, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        open_fake_core(kernel, cookie_file=tmp_path / ".cookie") as first,
        open_fake_core(kernel) as second,
        connected(first.endpoint, second.endpoint) as backend,
    ):
        await first.stop()
        assert (await backend.block_template()).height == 1
        (line,) = told(caplog)
        assert line.startswith(f"W Bitcoin node {name(second)} is used now: {name(first)}: getblocktemplate: ")
        await pass_time(clock, WATCH_INTERVAL_S)
        (line,) = told(caplog)
        assert line.startswith(f"E Bitcoin node cannot be used: {name(first)}")
        await first.start()  # with another cookie
        await pass_time(clock, AVOID_S + WATCH_INTERVAL_S)
        again, back = told(caplog)
        assert again.startswith(f"I Bitcoin node {name(first)} can be used again, after ")
        assert back == f"W Bitcoin node {name(first)} is used now: it is the first that can be used"
        assert (await backend.block_template()).height == 1
        assert first.calls["getblocktemplate"] == 1


async def test_a_restart_between_two_questions_is_not_noticed(
    kernel: KernelBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        open_fake_core(kernel, cookie_file=tmp_path / ".cookie") as core,
        connected(core.endpoint) as backend,
    ):
        await backend.block_template()
        await core.stop()
        await core.start()
        assert (await backend.block_template()).height == 1
        assert told(caplog) == []


async def test_a_node_that_does_not_answer_in_time_is_left_alone_for_a_while(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(kernel) as (backend, first, second), trio.open_nursery() as nursery:
        first.delay_s["getbestblockhash"] = 1_000
        tips: list[Any] = []
        await pass_time(clock, 3)
        nursery.start_soon(outcome, backend.tip, tips)
        await pass_time(clock, ASK_TIMEOUT_S, step=1)
        await until(lambda: bool(tips))
        assert tips[0].height == 0
        (line,) = told(caplog)
        assert line == (
            f"W Bitcoin node {name(second)} is used now: {name(first)}: getbestblockhash: no answer in 20 s: the "
            "Bitcoin node is busy, hangs, or cannot be reached"
        )
        await pass_time(clock, AVOID_S - 2)
        assert backend.nodes.active.name == name(second)
        first.delay_s.clear()
        await pass_time(clock, 2 + WATCH_INTERVAL_S)
        assert backend.nodes.active.name == name(first)


@pytest.mark.slow
async def test_a_node_that_fails_again_and_again_is_tried_less_and_less(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(kernel) as (backend, first, _):
        answer(first, "getblocktemplate", lambda _: "no template")
        for _ in range(60):
            await backend.block_template()
            await pass_time(clock, 60, step=60)
        asked = first.calls["getblocktemplate"]
        assert 4 <= asked <= 6, "in one hour"
        assert len(told(caplog)) <= 2 * asked
        first._methods["getblocktemplate"] = (first._getblocktemplate, 1, 1)
        await pass_time(clock, 3_600 + WATCH_INTERVAL_S, step=60)
        await backend.block_template()
        assert backend.nodes.active.name == name(first)


GARBAGE = ["garbage", None, 7, True, [], {}, "ab" * 31, {"result": None}, ["ab" * 32]]


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
async def test_another_node_answers_for_one_that_talks_nonsense(kernel: KernelBackend, garbage: object) -> None:
    tip = mine(kernel)
    async with two(kernel) as (backend, first, second):
        questions: dict[str, tuple[Callable[[], Awaitable[Any]], Any]] = {
            "getbestblockhash": (lambda: backend.wait_for_tip(bytes(32)), tip),
            "getblockheader": (lambda: backend.header_facts(tip), kernel.tip_now()),
            "getblocktemplate": (backend.block_template, replace(kernel.block_template_now(), late=None)),
            "getblockhash": (lambda: backend.block_hash_at(1), tip),
            "getblock": (lambda: backend.block(tip), kernel.block_now(tip)),
        }
        for method, (question, expected) in questions.items():
            known = first._methods[method]
            answer(first, method, lambda *_: garbage)
            backend.nodes.active = backend.nodes.nodes[0]
            result = await question()
            if method == "getblocktemplate":
                result = replace(result, time=expected.time)
            assert result == expected, method
            assert backend.nodes.active.name == name(second), method
            first._methods[method] = known
        known = first._methods["getblockheader"]
        answer(first, "getblockheader", lambda *_: garbage)
        backend.nodes.active = backend.nodes.nodes[0]
        assert await backend.is_on_chain(tip)
        first._methods["getblockheader"] = known
        answer(first, "submitblock", lambda *_: garbage)
        block = build_block(kernel.block_template_now())
        assert await backend.submit_block(block) == ACCEPTED


@pytest.mark.parametrize("method", ["getblockchaininfo", "getnetworkinfo", "getblockhash"])
@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
async def test_a_node_that_talks_nonsense_of_itself_is_not_used(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture, garbage: object, method: str
) -> None:
    async with two(kernel) as (backend, first, second):
        await first.stop()
        await pass_time(clock, WATCH_INTERVAL_S)
        told(caplog)
        answer(first, method, lambda *_: garbage)
        await first.start()
        await pass_time(clock, 20)
        if method == "getnetworkinfo":
            return  # btcd has none: it does not matter what it says
        assert backend.nodes.active.name == name(second)
        assert len(told(caplog)) == 1


async def test_numbers_that_no_header_has_are_nonsense(kernel: KernelBackend) -> None:
    tip = mine(kernel)
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        row = await core._getblockheader(tip[::-1].hex())
        for change in (
            {"height": -1},
            {"height": 2**40},
            {"bits": "1"},
            {"bits": "ff" * 8},
            {"bits": "04800001"},
            {"time": 2**40},
            {"mediantime": "x"},
            {"previousblockhash": "00"},
            {"hash": "cd" * 32},
        ):
            answer(core, "getblockheader", lambda *_, change=change: row | change)
            with pytest.raises(BackendError, match="getblockheader"):
                await backend.header_facts(tip)
        answer(core, "getblockheader", lambda *_: row)
        assert await backend.header_facts(tip) == kernel.tip_now()


@pytest.mark.parametrize("fault", ["drop", "fail", "hang_ups"])
async def test_a_broken_connection_is_an_answer_of_the_other_node(kernel: KernelBackend, fault: str) -> None:
    async with two(kernel) as (backend, first, second):
        setattr(first, fault, 1_000 if fault == "hang_ups" else True)
        assert (await backend.block_template()).height == 1
        assert backend.nodes.active.name == name(second)


async def test_the_late_answer_of_a_node_that_was_left_changes_nothing(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(kernel) as (backend, first, second), trio.open_nursery() as nursery:
        first.delay_s["getblocktemplate"] = 30
        templates: list[Any] = []
        nursery.start_soon(outcome, backend.block_template, templates)
        await settle()
        first.delay_s["getbestblockhash"] = 1_000
        tips: list[Any] = []
        nursery.start_soon(outcome, backend.tip, tips)
        await pass_time(clock, 25)
        assert tips[0].height == 0
        await pass_time(clock, 10)
        assert templates[0].height == 1
        assert backend.nodes.active.name == name(second)
        (line,) = told(caplog)
        assert line.startswith(f"W Bitcoin node {name(second)} is used now: ")


async def test_if_no_node_answers_the_first_ones_error_is_told(kernel: KernelBackend) -> None:
    async with two(kernel) as (backend, first, second):
        await first.stop()
        await second.stop()
        with pytest.raises(BackendError, match=f"^{name(first)}: getblocktemplate: cannot connect"):
            await backend.block_template()
        assert backend.nodes.active.name == name(first)


async def test_a_refusal_is_an_answer(kernel: KernelBackend) -> None:
    async with two(kernel) as (backend, first, second):
        first.without.add("getblocktemplate")
        with pytest.raises(BackendRefusal, match="Method not found"):
            await backend.block_template()
        assert second.calls["getblocktemplate"] == 0


async def test_a_node_without_work_is_one_that_does_not_answer(kernel: KernelBackend, no_regtest: None) -> None:
    async with (
        open_fake_core(kernel) as first,
        open_fake_core(kernel) as second,
        connected(first.endpoint, second.endpoint, network="mainnet") as backend,
    ):
        first.chain, first.peers = "main", 0
        assert (await backend.block_template()).height == 1
        assert backend.nodes.active.name == name(second)
        second.chain, second.initialblockdownload = "main", True
        with pytest.raises(BackendError) as caught:
            await backend.block_template()
        assert not isinstance(caught.value, BackendRefusal)
        assert "waiting for blocks" in str(caught.value)


async def test_a_node_that_falls_back_into_block_download_is_left(
    kernel: KernelBackend, clock: MockClock, no_regtest: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        open_fake_core(kernel) as first,
        open_fake_core(kernel) as second,
        connected(first.endpoint, second.endpoint, network="mainnet") as backend,
    ):
        first.initialblockdownload = True
        await pass_time(clock, WATCH_INTERVAL_S)
        assert backend.nodes.active.name == name(second)
        cannot, used = [line for line in told(caplog) if "no new block" not in line]
        assert "still in initial block download" in cannot
        assert used == f"W Bitcoin node {name(second)} is used now: it is the first that can be used"


@pytest.mark.slow
async def test_a_node_without_new_blocks_is_told_of_at_two_four_and_eight_hours(
    kernel: KernelBackend, clock: MockClock, no_regtest: None, caplog: pytest.LogCaptureFixture
) -> None:
    mine(kernel)  # now
    hours = 0.0
    async with (
        open_fake_core(kernel) as core,
        connect_bitcoin(
            [core.endpoint],
            network="mainnet",
            reserved_weight=20_000,
            reserved_sigops=400,
            clock=lambda: NOW + 3_600 * hours,
        ),
    ):
        told(caplog)
        lines: list[str] = []
        for tenth in range(100):
            hours = tenth / 10
            await pass_time(clock, WATCH_INTERVAL_S, step=WATCH_INTERVAL_S)
            lines += told(caplog)
        assert [line.partition(": ")[0] for line in lines] == [
            f"W Bitcoin node {name(core)} has had no new block for {count} h" for count in (2, 4, 8)
        ]
        answer(
            core,
            "getblockchaininfo",
            lambda: {"blocks": 2, "headers": 2, "bestblockhash": "ab" * 32, "time": NOW + 36_000},
        )
        await pass_time(clock, WATCH_INTERVAL_S)
        hours += 3
        await pass_time(clock, WATCH_INTERVAL_S)
        (line,) = told(caplog)
        assert "for 3 h" in line


# One that lags.


def at_height(core: FakeCore, height: int) -> None:
    """Have a server say of its chain that it ends at a height."""

    def info() -> dict[str, Any]:
        return {"blocks": height, "headers": height, "bestblockhash": f"{height:064x}", "time": 0}

    answer(core, "getblockchaininfo", info)


async def test_a_node_that_stays_behind_another_is_left_until_it_has_caught_up(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(kernel) as (backend, first, second):
        at_height(first, 100)
        at_height(second, 101)
        await pass_time(clock, WATCH_INTERVAL_S + LAG_S + WATCH_INTERVAL_S)
        assert told(caplog) == [
            f"W Bitcoin node {name(second)} is used now: it is at block 101, {name(first)} only at 100"
        ]
        await pass_time(clock, 60)
        assert told(caplog) == []
        at_height(first, 101)
        await pass_time(clock, WATCH_INTERVAL_S)
        assert told(caplog) == [f"W Bitcoin node {name(first)} is used now: it is the first that can be used"]
        assert backend.nodes.active.name == name(first)


@pytest.mark.slow
async def test_a_node_that_is_looked_at_before_the_other_does_not_lag(
    kernel: KernelBackend, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(kernel) as (_, first, second):
        first.delay_s["getblockchaininfo"] = 4.0  # so its looks are not those of the other, and each takes a while
        height = 100
        for _ in range(60):
            height += 1
            at_height(first, height)
            at_height(second, height)
            await pass_time(clock, 7)
        assert told(caplog) == []


# Waiting for a tip.


def _as_today(_: FakeCore) -> None:
    pass


def _before_core_30(core: FakeCore) -> None:
    core.current_tip_unknown = True


def _without_waiting(core: FakeCore) -> None:
    core.without.add("waitfornewblock")


WAYS = [(_as_today, "known"), (_before_core_30, "blind"), (_without_waiting, "polled")]


@pytest.mark.parametrize(("age", "way"), WAYS)
async def test_a_new_block_ends_the_wait(
    kernel: KernelBackend, clock: MockClock, age: Callable[[FakeCore], None], way: str
) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        age(core)
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
        await pass_time(clock, 20)
        assert seen == []
        assert backend.nodes.active.waits == way
        asked = core.calls["getbestblockhash"]
        await pass_time(clock, 10)
        assert core.calls["getbestblockhash"] - asked <= (3 if way == "known" else 50)
        block = build_block(kernel.block_template_now())
        assert (await kernel.submit_block(block)).accepted
        if way == "polled":
            await pass_time(clock, 1)
        await until(lambda: bool(seen))
        assert seen == [hash_of(block)]


@pytest.mark.slow
@pytest.mark.parametrize(("age", "way"), WAYS)
async def test_a_wait_that_is_given_up_leaves_no_wait_behind_in_the_node(
    kernel: KernelBackend, clock: MockClock, age: Callable[[FakeCore], None], way: str
) -> None:
    most = 0
    async with open_fake_core(kernel) as core:
        age(core)
        async with connected(core.endpoint) as backend:
            tip = (await backend.tip()).block_hash
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    seen: list[Any] = []
                    nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip, 12), seen)
                    for _ in range(12):
                        await pass_time(clock, 1)
                        most = max(most, core.long_polls)
                    await until(lambda: bool(seen))  # noqa: B023
                    assert seen == [tip]
                    await settle()
                    assert core.long_polls == 0
            assert most == (0 if way == "polled" else 1)
            with trio.move_on_after(1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.wait_for_tip, tip)
                    await pass_time(clock, 2)
            assert core.long_polls <= 1
        await pass_time(clock, WAIT_S)
        assert core.long_polls == core.connections == 0


async def test_a_wait_of_no_time_asks_the_node_to_wait_for_no_time(kernel: KernelBackend, clock: MockClock) -> None:
    """To Bitcoin Core a timeout of 0 is none."""
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        tip = (await backend.tip()).block_hash
        for timeout in (0.0, 0.0001, 0.0009):
            with trio.move_on_after(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(backend.wait_for_tip, tip, timeout))
                    await pass_time(clock, 1)
        await pass_time(clock, WAIT_S)
        assert core.long_polls == 0


async def test_a_node_that_ends_ends_the_wait_with_an_error(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
        await until(lambda: core.long_polls == 1)
        await core.stop()
        await until(lambda: bool(seen))
        assert "getbestblockhash: cannot connect" in str(seen[0])


async def test_the_wait_goes_on_at_another_node(kernel: KernelBackend) -> None:
    async with two(kernel) as (backend, first, second), trio.open_nursery() as nursery:
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
        await until(lambda: first.long_polls == 1)
        await first.stop()
        await until(lambda: second.long_polls == 1)
        block = build_block(kernel.block_template_now())
        await kernel.submit_block(block)
        await until(lambda: bool(seen))
        assert seen == [hash_of(block)]


@pytest.mark.slow
async def test_a_node_that_refuses_to_wait_is_not_asked_to_in_a_circle(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        answer(core, "waitfornewblock", lambda *_: 1 // 0 if core.drop else None)
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip, 10), seen)
        await pass_time(clock, 10, step=0.25)
        await until(lambda: bool(seen))
        assert seen == [tip]
        assert core.calls["waitfornewblock"] <= 41


async def test_a_node_that_was_updated_is_asked_to_wait_again(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        core.without.add("waitfornewblock")
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip, 1), seen)
        await pass_time(clock, 1)
        assert backend.nodes.active.waits == "polled"
        await core.stop()
        await pass_time(clock, WATCH_INTERVAL_S)
        core.without.clear()
        await core.start()
        await pass_time(clock, RETRY_INTERVAL_S)
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip, 1), seen)
        await until(lambda: core.long_polls == 1)
        nursery.cancel_scope.cancel()


async def test_the_watch_disturbs_no_wait_for_a_block_that_is_known(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        await pass_time(clock, 7)
        tip = await backend.wait_for_tip(bytes(32))
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
        await until(lambda: core.long_polls == 1)
        block = build_block(kernel.block_template_now())
        await kernel.submit_block(block)
        await until(lambda: bool(seen))
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(hash_of(block)), seen)
        await pass_time(clock, 4)  # the watch looks
        assert (core.calls["waitfornewblock"], core.calls["getblockchaininfo"]) == (2, 2)
        nursery.cancel_scope.cancel()


async def test_the_watch_finds_a_block_that_the_wait_does_not(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        core.delay_s["waitfornewblock"] = 20
        await pass_time(clock, WATCH_INTERVAL_S)
        tip = (await backend.tip()).block_hash
        seen: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
        await until(lambda: core.calls["waitfornewblock"] == 1)
        block = build_block(kernel.block_template_now())
        await kernel.submit_block(block)
        await pass_time(clock, WATCH_INTERVAL_S)
        await until(lambda: bool(seen))
        assert seen == [hash_of(block)]


# Blocks.


async def test_all_nodes_get_a_block_and_one_that_hangs_holds_nobody_up_for_long(
    kernel: KernelBackend, clock: MockClock
) -> None:
    async with two(kernel) as (backend, first, second), trio.open_nursery() as nursery:
        first.delay_s["submitblock"] = 1_000
        block = build_block(kernel.block_template_now())
        verdicts: list[Any] = []
        tip = (await backend.tip()).block_hash
        tips: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), tips)
        nursery.start_soon(outcome, lambda: backend.submit_block(block), verdicts)
        await until(lambda: bool(tips))  # at once
        await pass_time(clock, OTHERS_S)
        await until(lambda: bool(verdicts))
        assert verdicts == [ACCEPTED]
        assert (first.calls["submitblock"], second.calls["submitblock"]) == (1, 1)


async def test_a_block_is_accepted_if_one_node_does(kernel: KernelBackend, caplog: pytest.LogCaptureFixture) -> None:
    async with two(kernel) as (backend, first, second):
        answer(first, "submitblock", lambda *_: "bad-cb-amount")
        block = build_block(kernel.block_template_now())
        assert await backend.submit_block(block) == ACCEPTED
        shown = hash_of(block)[::-1].hex()
        assert sorted(told(caplog)) == sorted(
            [
                f"I block {shown}: {name(first)} says: bad-cb-amount",
                f"I block {shown}: {name(second)} says: accepted",
            ]
        )


@pytest.mark.parametrize(
    ("first_says", "second_says", "verdict"),
    [
        ("bad-cb-amount", "high-hash", "bad-cb-amount"),
        ("bad-cb-amount", BackendError, "bad-cb-amount"),
        ("bad-cb-amount", "prev-blk-not-found", "bad-cb-amount"),
        (BackendError, "bad-cb-amount", "bad-cb-amount"),
        ("duplicate", BackendError, "duplicate"),
        ("duplicate", "bad-cb-amount", "duplicate"),
        ("prev-blk-not-found", "duplicate", "duplicate"),
        ("prev-blk-not-found", "prev-blk-not-found", "prev-blk-not-found"),
        ("prev-blk-not-found", BackendError, BackendError),
        (BackendError, BackendError, BackendError),
    ],
)
async def test_the_verdict_of_two_nodes(
    kernel: KernelBackend, first_says: object, second_says: object, verdict: object
) -> None:
    """A duplicate is known, and what became of it can be asked; without an answer it is asked again."""
    async with two(kernel) as (backend, first, second):
        for core, says in ((first, first_says), (second, second_says)):
            if says is BackendError:
                core.hang_ups = 1_000
            else:
                answer(core, "submitblock", lambda *_, says=says: says)
        block = build_block(replace(kernel.block_template_now(), previous_block_hash=b"\x07" * 32))
        if verdict is BackendError:
            with pytest.raises(BackendError):
                await backend.submit_block(block)
        else:
            assert await backend.submit_block(block) == SubmitResult(accepted=False, reason=str(verdict))


async def test_a_block_that_no_node_takes_is_no_verdict(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        block = build_block(kernel.block_template_now())
        await core.stop()
        with pytest.raises(BackendError, match="submitblock: cannot connect"):
            await backend.submit_block(block)
        await core.start()
        assert await backend.submit_block(block) == ACCEPTED


async def test_a_header_that_cannot_be_learnt_does_not_delay_its_block(kernel: KernelBackend, clock: MockClock) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        block = build_block(kernel.block_template_now())
        core.delay_s["getblockheader"] = 15  # of the parent, which was not asked for before
        verdicts: list[Any] = []
        nursery.start_soon(outcome, lambda: backend.submit_block(block), verdicts)
        await until(lambda: core.calls["submitblock"] == 1)
        await pass_time(clock, 40)
        assert verdicts == [ACCEPTED]


async def test_a_node_is_asked_to_prefer_our_block_to_another_of_its_height(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        ours = build_block(kernel.block_template_now(), extra=b"ours")
        mine(kernel)
        assert await backend.submit_block(ours) == SubmitResult(accepted=False, reason="inconclusive")
        assert core.calls["preciousblock"] == 1
        # A node that does prefer it.
        prefers = False

        def prefer(_: str) -> None:
            nonlocal prefers
            prefers = True

        other = build_block(on(kernel.block_template_now(), kernel.tip_now().block_hash, 2), extra=b"other")
        mine(kernel)
        answer(core, "preciousblock", prefer)
        answer(
            core,
            "getblockhash",
            lambda height: (hash_of(other) if prefers else kernel.tip_now().block_hash)[::-1].hex(),
        )
        assert await backend.submit_block(other) == ACCEPTED
        core.without.add("preciousblock")
        prefers = False
        template = kernel.block_template_now()
        third = build_block(replace(on(template, hash_of(ours), 2), time=template.time), extra=b"third")
        assert (await backend.submit_block(third)).reason == "inconclusive"


async def test_a_block_twice_is_a_duplicate(kernel: KernelBackend) -> None:
    async with two(kernel) as (backend, _, second):
        block = build_block(kernel.block_template_now())
        await second.stop()
        assert await backend.submit_block(block) == ACCEPTED
        assert await backend.submit_block(block) == SubmitResult(accepted=False, reason="duplicate")
        assert await backend.is_on_chain(hash_of(block))


@pytest.mark.slow
async def test_hundreds_of_blocks_at_once_leave_the_node_threads_to_answer_with(
    kernel: KernelBackend, clock: MockClock
) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend, trio.open_nursery() as nursery:
        core.delay_s |= {"submitblock": 1, "preciousblock": 1}
        template = kernel.block_template_now()
        mine(kernel)  # a stranger's came first
        blocks = [build_block(template, extra=b"%d" % number) for number in range(40)]
        verdicts: list[Any] = []
        for block in blocks:
            nursery.start_soon(outcome, partial(backend.submit_block, block), verdicts)
        await settle()
        for _ in range(3):
            assert core.calls["submitblock"] <= 4 + core.calls["preciousblock"]
            seen: list[Any] = []
            nursery.start_soon(outcome, backend.tip, seen)
            await until(lambda: bool(seen))  # noqa: B023
            assert seen[0].height == 1
            await pass_time(clock, 1)
        await pass_time(clock, 24, step=1)
        await until(lambda: len(verdicts) == 40)
        assert [verdict for verdict in verdicts if isinstance(verdict, BackendError)] == []


# Headers.


async def test_a_header_of_another_node_is_taken_if_bitcoin_would(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        template = kernel.block_template_now()
        header = build_block(template, extra=b"unknown")[:80]
        assert await backend.header(hash_of(header)) is None
        assert await backend.header_facts(hash_of(header)) is None
        assert await backend.learn_header(header)
        assert await backend.header(hash_of(header)) == header
        asked = core.calls["getblockheader"]
        facts = await backend.header_facts(hash_of(header))
        assert facts is not None
        assert (facts.height, facts.next_bits) == (1, template.bits)
        assert core.calls["getblockheader"] == asked, "the node does not have it"
        child = build_block(on(template, hash_of(header), 2))[:80]
        assert await backend.learn_header(child)
        for bad in (
            build_block(replace(template, previous_block_hash=b"\x07" * 32))[:80],
            build_block(replace(template, bits=0x207FFFFE))[:80],
            build_block(replace(template, time=template.min_time - 1))[:80],
            build_block(replace(template, time=int(NOW) + 7_300))[:80],
        ):
            assert not await backend.learn_header(bad)
            assert await backend.header_facts(hash_of(bad)) is None
        for bad in (b"", header[:79], header + b"\0"):
            assert not await backend.learn_header(bad)


async def test_facts_are_asked_for_once(kernel: KernelBackend) -> None:
    tip = mine(kernel, 3)
    async with open_fake_core(kernel) as core, connected(core.endpoint) as backend:
        for _ in range(3):
            assert await backend.header_facts(tip) == kernel.tip_now()
        assert core.calls["getblockheader"] == 1
        assert await backend.header_facts(b"\x07" * 32) is None
        assert await backend.header_facts(b"\x07" * 32) is None
        assert core.calls["getblockheader"] == 3, "what is not known may be known later"


Row = dict[str, Any]


def row_on(network: str, parent: Row | None, *, seconds: int = 600, bits: int | None = None, fork: int = 0) -> Row:
    """A header as Bitcoin Core shows it; nobody asks for its work."""
    rules = CHAIN_RULES[network]
    if parent is None:
        shown = rules.genesis_hash[::-1].hex()
        return {"hash": shown, "height": 0, "time": 1_700_000_000, "bits": "1d00ffff", "mediantime": 1_700_000_000}
    moment = parent["time"] + seconds
    return {
        "hash": sha256d(f"{parent['hash']}{fork}".encode()).hex(),
        "previousblockhash": parent["hash"],
        "height": parent["height"] + 1,
        "time": moment,
        "bits": parent["bits"] if bits is None else f"{bits:08x}",
        "mediantime": moment - 5 * 600,
    }


def rows_on(network: str, rows: Sequence[Row], count: int, **options: Any) -> list[Row]:
    """A chain, and so many headers more."""
    grown = list(rows)
    for _ in range(count):
        grown.append(row_on(network, grown[-1] if grown else None, **options))
    return grown


def serve(core: FakeCore, chain: list[Row], *branches: Sequence[Row]) -> None:
    """Have a server tell of a chain, which may be changed, and of branches beside it."""
    known = {row["hash"]: row for rows in (chain, *branches) for row in rows}

    def header(block_hash: str, _verbose: bool = True) -> Row:
        return known[block_hash]

    answer(core, "getblockheader", header)

    def hash_at(height: int) -> str:
        if height >= len(chain):
            raise RpcFault(-8, "Block height out of range")
        shown: str = chain[height]["hash"]
        return shown

    answer(core, "getblockhash", hash_at)
    answer(core, "getbestblockhash", lambda: chain[-1]["hash"])
    answer(
        core,
        "getblockchaininfo",
        lambda: {"blocks": len(chain) - 1, "headers": len(chain) - 1, "bestblockhash": chain[-1]["hash"]},
    )


def internal(row: Row) -> bytes:
    return bytes.fromhex(row["hash"])[::-1]


HARD = 0x1B0404CB


async def test_a_retarget_needs_one_header_of_two_thousand(kernel: KernelBackend) -> None:
    chain = rows_on("mainnet", rows_on("mainnet", [], 2016), 2016, seconds=300, bits=HARD)
    async with open_fake_core(kernel) as core:
        serve(core, chain)
        async with connected(core.endpoint, network="mainnet") as backend:
            core.calls.clear()
            facts = await backend.header_facts(internal(chain[-1]))
            assert facts is not None
            expected = bits_to_target(HARD) * (2015 * 300) // (14 * 24 * 3600)
            assert (facts.height, facts.next_bits, facts.late) == (4031, target_to_bits(expected), None)
            assert core.calls["getblockheader"] <= 3
            facts = await backend.header_facts(internal(chain[3000]))
            assert facts is not None
            assert facts.next_bits == HARD
            assert core.calls["getblockheader"] <= 4


@pytest.mark.parametrize("lag", [2, 5])
async def test_a_branch_from_before_its_period_is_walked_down(kernel: KernelBackend, lag: int) -> None:
    """Its first block has another target than the chain's at that height; a cheap block asks for it."""
    common = rows_on("testnet4", [], 2016)
    chain = rows_on("testnet4", common, 10, bits=HARD)
    branch = rows_on("testnet4", rows_on("testnet4", common, 1, bits=HARD + 1, fork=1), lag, bits=0x1D00FFFF)
    async with open_fake_core(kernel) as core:
        serve(core, chain, branch)
        async with connected(core.endpoint, network="testnet4") as backend:
            facts = await backend.header_facts(internal(branch[-1]))
            assert facts is not None
            assert facts.next_bits == HARD + 1
            assert facts.late == (branch[-1]["time"] + 1200, 0x1D00FFFF)


@pytest.mark.parametrize("before", [True, False], ids=["to the branch", "from the branch"])
async def test_a_reorg_in_the_midst_does_not_mix_two_branches(kernel: KernelBackend, before: bool) -> None:
    common = rows_on("testnet4", [], 2016)
    one = rows_on("testnet4", rows_on("testnet4", common, 1, bits=HARD), 5, bits=0x1D00FFFF)
    other = rows_on("testnet4", rows_on("testnet4", common, 1, bits=HARD + 1, fork=1), 5, bits=0x1D00FFFF)
    chain = list(one if before else other)
    async with open_fake_core(kernel) as core:
        serve(core, chain, one, other)
        async with connected(core.endpoint, network="testnet4") as backend:

            def hash_at(height: int) -> str:
                shown: str = chain[height]["hash"]
                chain[:] = other if before else one  # once asked, it is another chain
                return shown

            answer(core, "getblockhash", hash_at)
            facts = await backend.header_facts(internal(one[-1]))
            assert facts is not None
            assert facts.next_bits == HARD


async def test_a_branch_without_an_end_is_an_error(kernel: KernelBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p2pool.bitcoin_backend.rpc, "MAX_WALK", 5)
    common = rows_on("testnet4", [], 2016)
    chain = rows_on("testnet4", common, 3, bits=HARD)
    branch = rows_on("testnet4", rows_on("testnet4", common, 1, fork=1), 9, bits=0x1D00FFFF)
    async with open_fake_core(kernel) as core:
        serve(core, chain, branch)
        async with connected(core.endpoint, network="testnet4") as backend:
            with pytest.raises(BackendError, match="has no end"):
                await backend.header_facts(internal(branch[-1]))


# Templates.


def template_on(row: Row, **changes: Any) -> Row:
    return {
        "version": 0x20000000,
        "rules": ["csv", "!segwit", "taproot"],
        "previousblockhash": row["hash"],
        "height": row["height"] + 1,
        "bits": row["bits"],
        "mintime": row["mediantime"] + 1,
        "curtime": row["time"] + 60,
        "coinbasevalue": 50 * 10**8,
        "transactions": [],
    } | changes


@pytest.mark.parametrize("seconds", [60, 1200, 1201, 5000])
async def test_a_template_of_testnet4_says_when_it_becomes_cheap(kernel: KernelBackend, seconds: int) -> None:
    """Whether the Bitcoin node would make a cheap block now or not."""
    chain = rows_on("testnet4", rows_on("testnet4", [], 2016), 5, bits=HARD)
    tip = chain[-1]
    cheap = seconds > 1200
    bits = "1d00ffff" if cheap else f"{HARD:08x}"
    async with open_fake_core(kernel) as core:
        serve(core, chain)
        answer(core, "getblocktemplate", lambda _: template_on(tip, curtime=tip["time"] + seconds, bits=bits))
        async with connected(core.endpoint, network="testnet4") as backend:
            template = await backend.block_template()
            assert (template.bits, template.late) == (HARD, (tip["time"] + 1200, 0x1D00FFFF))
            assert template.bits_at(template.time) == int(bits, 16)


async def test_a_template_that_breaks_the_rules_of_its_network_is_told_once(
    kernel: KernelBackend, caplog: pytest.LogCaptureFixture
) -> None:
    chain = rows_on("mainnet", [], 20, bits=HARD)
    async with open_fake_core(kernel) as core:
        serve(core, chain)
        answer(core, "getblocktemplate", lambda _: template_on(chain[-1], bits="1d00ffff"))
        async with connected(core.endpoint, network="mainnet") as backend:
            for _ in range(5):
                assert (await backend.block_template()).bits == 0x1D00FFFF
        (line,) = [line for line in told(caplog) if "no new block" not in line]
        assert line == (
            f"E {name(core)} wants the target 0x1d00ffff of block 20, by the rules of mainnet it is {HARD:#010x}: "
            "shares will be refused"
        )


async def test_a_signet_with_a_challenge_is_told_once(kernel: KernelBackend, caplog: pytest.LogCaptureFixture) -> None:
    chain = rows_on("signet", [], 20, bits=0x1E0377AE)
    chain[0]["bits"] = "1e0377ae"
    asked: list[Any] = []
    async with open_fake_core(kernel) as core:
        serve(core, chain)

        def template(options: object) -> Row:
            asked.append(options)
            return template_on(chain[-1], rules=["segwit", "!signet"], signet_challenge="5121ab")

        answer(core, "getblocktemplate", template)
        async with connected(core.endpoint, network="signet") as backend:
            for _ in range(3):
                await backend.block_template()
        assert asked[0] == {"rules": ["segwit", "signet"]}
        (line,) = [line for line in told(caplog) if "no new block" not in line]
        assert line.startswith("W this signet wants blocks signed by its operators")


# The end.


async def test_who_waits_when_it_ends_gets_an_error_and_no_connection_stays(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, trio.open_nursery() as nursery:
        seen: list[Any] = []
        async with connected(core.endpoint) as backend:
            core.delay_s["getblocktemplate"] = 1_000
            tip = (await backend.tip()).block_hash
            nursery.start_soon(outcome, lambda: backend.wait_for_tip(tip), seen)
            nursery.start_soon(outcome, backend.block_template, seen)
            await until(lambda: core.long_polls == 1 and core.calls["getblocktemplate"] == 1)
        await until(lambda: len(seen) == 2)
        assert all("closed" in str(error) for error in seen)
        nursery.cancel_scope.cancel()


async def test_no_error_shows_a_password_or_a_cookie(kernel: KernelBackend, tmp_path: Path) -> None:
    cookie_file = tmp_path / ".cookie"
    errors: list[Any] = []
    async with open_fake_core(kernel, cookie_file=cookie_file) as core:
        with_password = Endpoint(url=core.url, user="pool", password=SECRET)
        for endpoint in (core.endpoint, with_password):
            async with connected(endpoint) as backend:
                for fault in ("drop", "fail", "forbidden", "hang_ups"):
                    setattr(core, fault, 1_000 if fault == "hang_ups" else True)
                    await outcome(backend.tip, errors)
                    await outcome(backend.block_template, errors)
                    setattr(core, fault, 0 if fault == "hang_ups" else False)
        core.password = "battery staple"
        with pytest.raises(ConfigError) as refused:
            async with connected(with_password):
                pass
        errors.append(refused.value)
        cookie_file.write_text("__cookie__:wrong")
        with pytest.raises(ConfigError) as refused:
            async with connected(core.endpoint):
                pass
        errors.append(refused.value)
    assert len(errors) == 18
    for error in errors:
        assert isinstance(error, BackendError | ConfigError)
        for word in (SECRET, "__cookie__", "staple", "Basic"):
            assert word not in str(error)
            assert word not in repr(error)


# A whole node on one that takes its time.


class Gate:
    """An embedded Bitcoin that gives templates only while it is told to. Mutable fields: ``opened``."""

    def __init__(self, inner: KernelBackend) -> None:
        self.inner = inner
        self.opened = trio.Event()
        self.opened.set()

    def __getattr__(self, member: str) -> Any:
        return getattr(self.inner, member)

    async def block_template(self) -> BlockTemplate:
        await self.opened.wait()
        return await self.inner.block_template()


async def test_an_empty_block_is_mined_no_longer_than_until_there_is_a_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "p2pool.node")
    gates: list[Gate] = []

    def wrap(kernel: KernelBackend) -> BitcoinBackend:
        gates.append(Gate(kernel))
        return cast("BitcoinBackend", gates[0])

    async with running(tmp_path, wrap=wrap) as (node, kernel):
        mine_blocks(kernel, 101)
        kernel._announce_tip()
        await until_passing(lambda: node.bitcoin_tip()[1] == 101)
        gates[0].opened = trio.Event()
        mine_blocks(kernel, 1)
        coin = kernel.mature_coinbases(ANYBODY_SCRIPT)[0]
        kernel.add_transaction(spend(coin.txid, coin.vout, coin.value - 1_000))  # a millionth of the block's value
        kernel._announce_tip()
        await until_passing(lambda: node.bitcoin_tip()[1] == 102)
        template = node._template
        assert template is not None
        assert template.transactions == ()
        gates[0].opened.set()
        await until_passing(lambda: node._template is not template)
        assert node._template is not None
        assert len(node._template.transactions) == 1
        assert caplog.messages == [], "a template takes so long on any small machine"


async def test_a_node_that_knows_of_blocks_that_it_lacks_is_left_until_it_has_them(
    kernel: KernelBackend, clock: MockClock, no_regtest: None, caplog: pytest.LogCaptureFixture
) -> None:
    mine_blocks(kernel, 1)
    async with open_fake_core(kernel) as core, connected(core.endpoint, network="mainnet") as backend:
        active = backend.nodes.active
        core.headers_ahead = MAX_LACKING
        await pass_time(clock, 2 * WATCH_INTERVAL_S)
        assert active.usable is True
        core.headers_ahead = MAX_LACKING + 1
        await pass_time(clock, WATCH_INTERVAL_S)
        assert active.usable is True, "the headers came a moment ago"
        await pass_time(clock, LAG_S + WATCH_INTERVAL_S)
        await until(lambda: not active.usable)
        with pytest.raises(BackendError, match="it is catching up, or stuck"):
            await backend.tip()
        core.headers_ahead = 0
        await pass_time(clock, WATCH_INTERVAL_S)
        await until(lambda: active.usable)
    assert [line[0] for line in told(caplog) if "no new block" not in line] == ["E", "I"]
