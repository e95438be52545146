"""The CPU miner against the real Stratum server, and against pools that say odd things."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pool import miner as miner_module
from p2pool.errors import P2PoolError
from p2pool.miner import MAX_TIME_ROLL_S, MAX_UNANSWERED, USER_AGENT, Miner, MinerEvent, mine
from p2pool.stratum.login import payout_class_for
from p2pool.stratum.server import ServerSettings, StratumServer, open_listeners, serve
from p2pool.stratum.vardiff import VardiffSettings, target_of_exponent
from sharechain import hasher
from tests.p2pool.test_stratum_protocol import USER, ToyDesk

SETTINGS = ServerSettings(vardiff=VardiffSettings(start_difficulty=2.0**-22, target_interval_s=0.01, window_s=0.5))
"""Some thousand hashes a submission: many a second, whichever the hasher."""


class Watch:
    """Collects a miner's events; `until` waits for what they have come to."""

    def __init__(self) -> None:
        self.events: list[MinerEvent] = []
        self._came = trio.Event()

    def __call__(self, event: MinerEvent) -> None:
        self.events.append(event)
        self._came.set()
        self._came = trio.Event()

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    async def until(self, is_reached: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not is_reached():
                await self._came.wait()


@asynccontextmanager
async def pool_and_miner(
    desk: ToyDesk, settings: ServerSettings = SETTINGS, **options: Any
) -> AsyncIterator[tuple[StratumServer, Miner, Watch]]:
    watch = Watch()
    async with trio.open_nursery() as nursery:
        server: StratumServer = await nursery.start(partial(serve, desk, host="127.0.0.1", port=0, settings=settings))
        host, port = server.addresses[0]
        options = {"user": USER} | options
        miner: Miner = await nursery.start(partial(mine, host=host, port=port, on_event=watch, **options))
        yield server, miner, watch
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("threads", [1, 3])
async def test_everything_that_the_miner_submits_is_accepted_and_nothing_twice(threads: int) -> None:
    desk = ToyDesk()
    desk.share_target, desk.block_target = target_of_exponent(-20), target_of_exponent(-10)
    async with pool_and_miner(desk, threads=threads) as (server, miner, watch):
        await watch.until(lambda: watch.count("accepted") >= 20)
        statistics = miner.statistics()
        assert statistics.rejected == {}
        assert watch.count("rejected") == 0
        assert statistics.accepted == watch.count("accepted")
        assert statistics.hashes > 1000
        assert statistics.hash_rate > 0
        assert server.statistics().sessions[0].user_agent == USER_AGENT
    submissions = [submission for submission, _ in desk.judged]
    assert len({(s.job_id, s.extranonce2, s.time, s.nonce) for s in submissions}) == len(submissions)
    assert any(verdict.is_share for _, verdict in desk.judged)


@pytest.mark.skipif(hasher.IMPLEMENTATION == "python", reason="the twin's scanner has no threads")
async def test_threads_work_on_extranonces_of_their_own() -> None:
    desk = ToyDesk()
    async with pool_and_miner(desk, threads=2) as (_, _, watch):
        await watch.until(lambda: len({submission.extranonce2 for submission, _ in desk.judged}) >= 2)


async def test_a_new_job_ends_the_scan_of_the_old_one() -> None:
    desk = ToyDesk()
    desk.share_target = desk.block_target = 1
    hopeless = replace(SETTINGS, vardiff=replace(SETTINGS.vardiff, start_difficulty=2.0**100, target_interval_s=1e3))
    async with pool_and_miner(desk, hopeless) as (server, _, watch):
        await watch.until(lambda: watch.count("job") == 1)
        desk.share_target = target_of_exponent(-22)
        desk.new_tip()
        server.broadcast(clean=True)
        await watch.until(lambda: watch.count("accepted") >= 1)
        assert watch.count("rejected") == 0


async def test_many_new_jobs_cost_no_submission_but_stale_ones() -> None:
    desk = ToyDesk()
    async with pool_and_miner(desk, threads=2) as (server, miner, watch):
        for i in range(20):
            done = watch.count("accepted")
            await watch.until(lambda done=done: watch.count("accepted") > done)  # type: ignore[misc]
            if i % 2:
                desk.new_tip()
            else:
                desk.new_template()
            server.broadcast(clean=bool(i % 2))
        assert set(miner.statistics().rejected) <= {21}
        assert miner.statistics().difficulty > 0


async def test_a_refused_user_is_an_error_with_the_pools_text() -> None:
    with pytest.raises(P2PoolError, match="the pool refused nobody: not an address of regtest: nobody"):
        await scene_of_refusal()


async def scene_of_refusal() -> None:
    [listener] = open_listeners("127.0.0.1", 0)
    port = listener.getsockname()[1]
    refusal: P2PoolError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(StratumServer(ToyDesk(), SETTINGS).serve, [listener])
        try:
            await mine(host="127.0.0.1", port=port, user="nobody")
        except P2PoolError as error:
            refusal = error
        nursery.cancel_scope.cancel()
    assert refusal is not None
    raise refusal


def free_port() -> int:
    [listener] = open_listeners("127.0.0.1", 0)
    port: int = listener.getsockname()[1]
    listener.close()
    return port


async def test_without_reconnect_a_refused_connection_is_an_error() -> None:
    port = free_port()
    with pytest.raises(P2PoolError, match=f"pool at 127.0.0.1:{port}: cannot connect: .*"):
        await mine(host="127.0.0.1", port=port, user=USER, reconnect=False)


async def test_the_miner_waits_for_its_pool_and_comes_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miner_module, "FIRST_BACKOFF_S", 0.01)
    port = free_port()
    watch = Watch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(mine, host="127.0.0.1", port=port, user=USER, on_event=watch))
        await watch.until(lambda: watch.count("disconnected") >= 2)
        for _ in range(2):
            done, lost = watch.count("accepted"), watch.count("disconnected")
            async with trio.open_nursery() as pool:
                await pool.start(partial(serve, ToyDesk(), host="127.0.0.1", port=port, settings=SETTINGS))
                await watch.until(lambda done=done: watch.count("accepted") > done)  # type: ignore[misc]
                pool.cancel_scope.cancel()
            await watch.until(lambda lost=lost: watch.count("disconnected") > lost)  # type: ignore[misc]
        assert watch.count("connected") == 2
        nursery.cancel_scope.cancel()
    assert "cannot connect" in watch.events[0].text


def test_the_miner_gets_the_largest_payout_class() -> None:
    assert payout_class_for(USER_AGENT, (12, 9999, 47)) == 9999


# Against a pool that says what it is told to

SUBSCRIBED = b'{"id":1,"result":[[["mining.notify","s"]],"0badcafe",8],"error":null}\n'
AUTHORIZED = b'{"id":2,"result":true,"error":null}\n'
EASY = b'{"id":null,"method":"mining.set_difficulty","params":[4.656612873077393e-10]}\n'
NOTIFY: dict[str, Any] = {
    "id": None,
    "method": "mining.notify",
    "params": ["a", "00" * 32, "01", "02", ["03" * 32], "20000000", "207fffff", "65000000", True],
}
JOB = json.dumps(NOTIFY).encode() + b"\n"
OPENING = SUBSCRIBED + AUTHORIZED + EASY + JOB


@asynccontextmanager
async def scripted_pool(script: bytes) -> AsyncIterator[tuple[int, trio.MemoryReceiveChannel[dict[str, Any]]]]:
    """A pool that says its script to each connection, then only listens; yields its port and what it hears."""
    send, receive = trio.open_memory_channel[dict[str, Any]](math.inf)

    async def talk(stream: trio.SocketStream) -> None:
        buffer = b""
        try:
            await stream.send_all(script)
            if not script:
                return
            async for data in stream:
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    send.send_nowait(json.loads(line))
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, talk, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1], receive
        nursery.cancel_scope.cancel()


async def end_of_mining(script: bytes) -> str:
    """The text of the error that a pool's script comes to."""
    async with scripted_pool(script) as (port, _):
        with trio.fail_after(20):
            try:
                await mine(host="127.0.0.1", port=port, user=USER, reconnect=False)
            except P2PoolError as error:
                return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (b"", "the pool closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n", "not a JSON object"),
        (b"[]\n", "not a JSON object"),
        (b'{"id":1,"result":null,"error":[25,"full",null]}\n', "refused to subscribe us: full"),
        (b'{"id":1,"result":[],"error":null}\n', "not Stratum"),
        (b'{"id":1,"result":[[],"zz",8],"error":null}\n', "not Stratum"),
        (b'{"id":1,"result":[[],"00",99],"error":null}\n', "not Stratum"),
        (SUBSCRIBED + b'{"id":2,"result":false,"error":null}\n', "refused bcrt1qminer.rig1: no reason given"),
        (
            SUBSCRIBED + b'{"id":2,"result":null,"error":{"code":24,"message":"no such"}}\n',
            "refused bcrt1qminer.rig1: no such",
        ),
        (b'{"method":"mining.set_difficulty","params":[]}\n', "not Stratum"),
        (b'{"method":"mining.set_difficulty","params":[0]}\n', "not Stratum"),
        (b'{"method":"mining.set_difficulty","params":["1"]}\n', "not Stratum"),
        (b'{"method":"mining.notify","params":["a"]}\n', "not Stratum"),
        (JOB.replace(b"20000000", b"120000000"), "not Stratum"),
        (JOB.replace(b"03" * 32, b"03"), "not Stratum"),
        (JOB.replace(b'"01"', b"1"), "not Stratum"),
        (JOB.replace(b'["' + b"03" * 32 + b'"]', b"5"), "not Stratum"),
        (b" " * (2 << 20), "a line of more than"),
    ],
)
async def test_what_is_no_pool_ends_the_miner_with_a_clear_error(script: bytes, text: str) -> None:
    assert text in await end_of_mining(script)


async def test_other_messages_of_a_pool_are_passed_over_and_its_question_is_answered() -> None:
    script = (
        b'{"id":9,"method":"client.get_version","params":[]}\n'
        b'{"id":null,"method":"client.show_message","params":["hello"]}\n'
        b'{"id":null,"method":"mining.set_extranonce"}\n'
        b'{"id":77,"result":true,"error":null}\n'
        b'{"id":"x"}\n'
    )
    async with scripted_pool(script + OPENING) as (port, heard), trio.open_nursery() as nursery:
        await nursery.start(partial(mine, host="127.0.0.1", port=port, user=USER, password="secret"))
        messages = [await heard.receive() for _ in range(4)]
        assert messages[0] == {"id": 1, "method": "mining.subscribe", "params": [USER_AGENT]}
        assert messages[1] == {"id": 2, "method": "mining.authorize", "params": [USER, "secret"]}
        assert messages[2] == {"id": 9, "result": USER_AGENT, "error": None}
        assert messages[3]["method"] == "mining.submit"
        nursery.cancel_scope.cancel()


async def test_a_pool_that_does_not_answer_is_not_flooded() -> None:
    async with scripted_pool(OPENING) as (port, heard), trio.open_nursery() as nursery:
        miner: Miner = await nursery.start(partial(mine, host="127.0.0.1", port=port, user=USER, threads=2))
        messages = [await heard.receive() for _ in range(2 + MAX_UNANSWERED)]
        assert [message["method"] for message in messages[2:]] == ["mining.submit"] * MAX_UNANSWERED
        with trio.move_on_after(0.05):
            await heard.receive()
            raise AssertionError("one more")
        assert miner.statistics().accepted == 0
        nursery.cancel_scope.cancel()


async def test_the_time_of_a_header_follows_the_clock_but_not_for_ever(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miner_module, "MAX_UNANSWERED", 1_000_000)
    async with scripted_pool(OPENING) as (port, heard), trio.open_nursery() as nursery:
        await nursery.start(partial(mine, host="127.0.0.1", port=port, user=USER))

        async def expect(time: int) -> None:
            """What was found before the clock was looked at comes first; nothing is ever later."""
            with trio.fail_after(1000):
                while (seen := int((await submitted())["params"][3], 16) - 0x65000000) != time:
                    assert seen < time

        async def submitted() -> dict[str, Any]:
            while True:
                message = await heard.receive()
                if message["method"] == "mining.submit":
                    return message

        await expect(0)
        mock_clock.jump(30)
        await expect(30)
        mock_clock.jump(100)
        await expect(MAX_TIME_ROLL_S)
        nursery.cancel_scope.cancel()


async def test_a_pool_that_falls_silent_is_left(mock_clock: MockClock) -> None:
    watch = Watch()
    async with scripted_pool(SUBSCRIBED + AUTHORIZED) as (port, _), trio.open_nursery() as nursery:
        await nursery.start(partial(mine, host="127.0.0.1", port=port, user=USER, on_event=watch))
        mock_clock.jump(miner_module.SILENCE_S)
        await watch.until(lambda: watch.count("disconnected") == 1)
        assert "said nothing for 180 s" in watch.events[-1].text
        nursery.cancel_scope.cancel()
