"""The Stratum server on loopback: many miners, and those that a server must survive."""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pool.errors import ConfigError
from p2pool.stratum.server import ServerSettings, StratumServer, open_listeners, serve
from p2pool.stratum.values import Submission, Verdict, Worker
from tests.p2pool.test_stratum_protocol import SHARE, USER, VARDIFF, ToyDesk, find_nonce

Message = dict[str, Any]
SETTINGS = ServerSettings(vardiff=VARDIFF)


class Client:
    """A miner's end of a connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""
        self.extranonce1 = ""
        self.session_id = ""
        self.notify: list[Any] = []

    async def send(self, method: str, *params: object, id: int = 1) -> None:
        await self.stream.send_all(json.dumps({"id": id, "method": method, "params": params}).encode() + b"\n")

    async def receive(self) -> Message:
        while b"\n" not in self.buffer:
            data = await self.stream.receive_some()
            assert data, "the server closed the connection"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: Message = json.loads(line)
        if message.get("method") == "mining.notify":
            self.notify = message["params"]
        return message

    async def ask(self, method: str, *params: object) -> Message:
        await self.send(method, *params)
        return await self.receive()

    async def start(self, user: str = USER, session_id: str | None = None) -> Client:
        answer = await self.ask("mining.subscribe", "cpuminer/2.5.1", session_id)
        self.session_id, self.extranonce1 = answer["result"][0][1][1], answer["result"][1]
        assert (await self.ask("mining.authorize", user, "x"))["result"] is True
        while not self.notify:
            await self.receive()
        return self

    async def is_closed(self) -> bool:
        """Wait for the end of the connection, through whatever is still to be read."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return True


Connect = Callable[[], Awaitable[Client]]


@asynccontextmanager
async def serving(
    desk: ToyDesk | None = None, settings: ServerSettings = SETTINGS
) -> AsyncIterator[tuple[StratumServer, Connect]]:
    clients: list[Client] = []
    async with trio.open_nursery() as nursery:
        start = partial(serve, desk or ToyDesk(), host="127.0.0.1", port=0, settings=settings)
        server: StratumServer = await nursery.start(start)

        async def connect() -> Client:
            clients.append(Client(await trio.open_tcp_stream(*server.addresses[0])))
            return clients[-1]

        try:
            yield server, connect
        finally:
            for client in clients:
                client.stream.socket.close()
        nursery.cancel_scope.cancel()


async def until_connections(server: StratumServer, count: int) -> None:
    """Let the server find out who is gone."""
    while server.statistics().connections != count:
        await trio.lowlevel.checkpoint()


async def test_a_miner_is_served_from_subscribe_to_an_accepted_share() -> None:
    desk = ToyDesk()
    async with serving(desk) as (server, connect):
        client = await (await connect()).start()
        nonce = find_nonce(client.notify, client.extranonce1, at_most=SHARE)
        answer = await client.ask("mining.submit", USER, client.notify[0], "00" * 8, client.notify[7], f"{nonce:08x}")
        assert answer["result"] is True
        assert desk.judged[0][1].is_share
        statistics = server.statistics()
        assert (statistics.connections, statistics.accepted, statistics.rejected) == (1, 1, {})
        assert [session.user for session in statistics.sessions] == [USER]


async def test_counts_outlive_the_connection() -> None:
    async with serving() as (server, connect):
        client = await (await connect()).start()
        await client.ask("mining.submit", USER, "none", "00" * 8, "0", "0")
        await client.stream.aclose()
        await until_connections(server, 0)
        assert server.statistics().rejected == {"stale": 1}
        assert server.statistics().sessions == ()


async def test_a_broadcast_brings_every_miner_the_new_work_at_once() -> None:
    desk = ToyDesk()
    async with serving(desk) as (server, connect):
        clients = [await (await connect()).start(f"bcrt1q{i}") for i in range(20)]
        desk.new_tip()
        server.broadcast(clean=True)
        for client in clients:
            message = await client.receive()
            assert message["method"] == "mining.notify"
            assert message["params"][8] is True


async def test_new_work_made_by_a_submission_follows_its_answer_and_reaches_everybody() -> None:
    class Node(ToyDesk):
        server: StratumServer | None = None

        def judge(self, worker: Worker, submission: Submission) -> Verdict:
            verdict = super().judge(worker, submission)
            assert self.server is not None
            self.new_template()
            self.server.broadcast(clean=False)
            self.new_tip()
            self.server.broadcast(clean=True)
            return verdict

    desk = Node()
    async with serving(desk) as (server, connect):
        desk.server = server
        finder, other = await (await connect()).start(), await (await connect()).start("bcrt1qother")
        nonce = find_nonce(finder.notify, finder.extranonce1, at_most=SHARE)
        words = [USER, finder.notify[0], "00" * 8, finder.notify[7], f"{nonce:08x}"]
        assert (await finder.ask("mining.submit", *words))["error"] is None
        for client in (finder, other):
            message = await client.receive()
            assert (message["method"], message["params"][8]) == ("mining.notify", True)


async def test_a_storm_of_connections_is_served_each_with_its_own_extranonce1() -> None:
    async with serving() as (server, connect):
        clients: list[Client] = []

        async def one(i: int) -> None:
            clients.append(await (await connect()).start(f"bcrt1q{i}"))

        async with trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(one, i)
        assert len({client.extranonce1 for client in clients}) == 100
        assert len({client.session_id for client in clients}) == 100
        assert server.statistics().connections == 100


async def test_connections_above_the_limit_are_closed_at_once() -> None:
    async with serving(settings=replace(SETTINGS, max_connections=2)) as (server, connect):
        first = await (await connect()).start()
        await (await connect()).start()
        assert await (await connect()).is_closed()
        assert server.statistics().dropped == {"too many connections": 1}
        await first.stream.aclose()
        await until_connections(server, 1)
        await (await connect()).start()


async def test_a_miner_that_never_reads_is_dropped_and_costs_the_others_nothing() -> None:
    desk = ToyDesk()
    desk.padding = bytes(16_000)
    async with serving(desk, replace(SETTINGS, max_unsent_bytes=100_000)) as (server, connect):
        deaf, good = await (await connect()).start(), await (await connect()).start()
        deaf.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = 0
        while server.statistics().connections == 2:
            server.broadcast(clean=False)
            sent += 1
            assert sent < 2_000
            assert (await good.receive())["method"] == "mining.notify"
        assert server.statistics().dropped == {"does not read": 1}
        assert (await good.ask("mining.ping"))["result"] == "pong"


async def test_a_backlog_is_sent_in_order_once_the_miner_reads() -> None:
    desk = ToyDesk()
    desk.padding = bytes(16_000)
    async with serving(desk, replace(SETTINGS, max_unsent_bytes=1 << 30)) as (server, connect):
        client = await (await connect()).start()
        for _ in range(400):
            server.broadcast(clean=False)
        ids = [int((await client.receive())["params"][0], 16) for _ in range(400)]
        assert ids == list(range(2, 402))
        assert server.statistics().dropped == {}


async def test_a_miner_that_reads_too_slowly_is_dropped(mock_clock: MockClock) -> None:
    desk = ToyDesk()
    desk.padding = bytes(16_000)
    async with serving(desk, replace(SETTINGS, max_unsent_bytes=1 << 30)) as (server, connect):
        client = await (await connect()).start()
        for _ in range(400):
            server.broadcast(clean=False)
        mock_clock.jump(SETTINGS.write_deadline_s + 1)
        assert await client.is_closed()
        assert server.statistics().dropped == {"reads too slowly": 1}


async def test_a_slow_loris_is_closed(mock_clock: MockClock) -> None:
    async with serving() as (server, connect):
        client = await (await connect()).start()
        await client.stream.send_all(b'{"id":1,"method":"mining.ping"}\n{"id":')
        await client.receive()
        mock_clock.jump(SETTINGS.line_deadline_s + 1)
        assert await client.is_closed()
        assert server.statistics().dropped == {"sends too slowly": 1}


async def test_a_connection_may_idle_a_while_without_a_user_and_not_for_ever(mock_clock: MockClock) -> None:
    async with serving() as (server, connect):
        idle, miner = await connect(), await (await connect()).start()
        await idle.ask("mining.subscribe", "backup")
        mock_clock.jump(61)
        assert (await idle.ask("mining.ping"))["result"] == "pong"
        mock_clock.jump(SETTINGS.unauthorized_limit_s)
        assert await idle.is_closed()
        assert server.statistics().dropped == {"not authorized in time": 1}
        assert server.statistics().connections == 1
        await miner.send("mining.ping")


async def test_a_silent_miner_is_eased_by_the_ticker(mock_clock: MockClock) -> None:
    async with serving(settings=ServerSettings(vardiff=replace(VARDIFF, start_difficulty=2.0**-25))) as (_, connect):
        client = await (await connect()).start()
        mock_clock.jump(25)
        assert (await client.receive())["params"] == [2.0**-27]
        assert (await client.receive())["method"] == "mining.notify"


async def test_a_tls_hello_is_closed_and_the_miner_may_come_back_in_plain_text() -> None:
    async with serving() as (server, connect):
        client = await connect()
        await client.stream.send_all(bytes.fromhex("16030100c8010000c40303"))
        assert await client.is_closed()
        assert server.statistics().dropped == {"TLS on a plain port": 1}
        await (await connect()).start()


async def test_a_browser_is_told_400() -> None:
    async with serving() as (_, connect):
        client = await connect()
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n")
        assert (await client.stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        assert await client.is_closed()


@pytest.mark.parametrize("junk", [b"\x00" * 100_000, b"[" * 9000, b"hello\n", b"\xff\xfe\n", b'{"id":1}' * 3000])
async def test_junk_ends_its_own_connection_and_no_other(junk: bytes) -> None:
    async with serving() as (_, connect):
        good, bad = await (await connect()).start(), await connect()
        with suppress(trio.BrokenResourceError):
            await bad.stream.send_all(junk)
        assert await bad.is_closed()
        assert (await good.ask("mining.ping"))["result"] == "pong"


async def test_a_reset_connection_is_nothing_special() -> None:
    async with serving() as (server, connect):
        good, gone = await (await connect()).start(), await (await connect()).start()
        gone.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.stream.socket.close()
        server.broadcast(clean=False)
        await good.receive()
        await until_connections(server, 1)
        assert (await good.ask("mining.ping"))["result"] == "pong"


async def test_a_miner_that_lost_its_connection_comes_back_to_its_extranonce1_and_jobs(mock_clock: MockClock) -> None:
    async with serving() as (server, connect):
        lost = await (await connect()).start()
        nonce = find_nonce(lost.notify, lost.extranonce1, at_most=SHARE)
        await lost.stream.aclose()
        await until_connections(server, 0)
        mock_clock.jump(SETTINGS.resume_s - 1)
        back = await (await connect()).start(session_id=lost.session_id)
        assert (back.session_id, back.extranonce1) == (lost.session_id, lost.extranonce1)
        words = [USER, lost.notify[0], "00" * 8, lost.notify[7], f"{nonce:08x}"]
        assert (await back.ask("mining.submit", *words))["result"] is True


async def test_a_session_is_held_by_one_live_connection_only() -> None:
    async with serving() as (_, connect):
        held = await (await connect()).start()
        thief = await (await connect()).start(session_id=held.session_id)
        assert thief.extranonce1 != held.extranonce1
        assert thief.session_id != held.session_id


async def test_after_ten_minutes_a_session_is_forgotten(mock_clock: MockClock) -> None:
    async with serving() as (server, connect):
        lost = await (await connect()).start()
        await lost.stream.aclose()
        await until_connections(server, 0)
        mock_clock.jump(SETTINGS.resume_s + 1)
        back = await (await connect()).start(session_id=lost.session_id)
        assert back.extranonce1 != lost.extranonce1


async def test_extranonces_of_live_and_of_closed_sessions_are_never_given_twice() -> None:
    extranonces = iter([b"aaaa", b"aaaa", b"bbbb", b"aaaa", b"bbbb", b"cccc"])
    session_ids = iter([b"s1", b"s2", b"s3"])
    server = StratumServer(ToyDesk(), SETTINGS, draw=lambda size: next(extranonces if size == 4 else session_ids))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, open_listeners("127.0.0.1", 0))
        clients: list[Client] = []
        for left in (None, None, 1):
            if left is not None:
                await clients[0].stream.aclose()
                await until_connections(server, left)
            clients.append(await Client(await trio.open_tcp_stream(*server.addresses[0])).start())
        drawn = [bytes.fromhex(client.extranonce1) for client in clients]
        assert drawn == [b"aaaa", b"bbbb", b"cccc"]
        nursery.cancel_scope.cancel()
    for client in clients:
        client.stream.socket.close()


async def test_cancelling_closes_every_connection_and_frees_the_port() -> None:
    async with trio.open_nursery() as nursery:
        server: StratumServer = await nursery.start(partial(serve, ToyDesk(), host="127.0.0.1", port=0))
        host, port = server.addresses[0]
        client = Client(await trio.open_tcp_stream(host, port))
        await client.start()
        nursery.cancel_scope.cancel()
    assert await client.is_closed()
    await client.stream.aclose()
    for listener in open_listeners(host, port):
        listener.close()


def test_a_port_in_use_is_the_operators_to_know() -> None:
    [listener] = open_listeners("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"Stratum cannot listen on 127\.0\.0\.1:{port}: .*in use"):
        open_listeners("127.0.0.1", port)
    listener.close()


def test_a_host_that_is_none_is_the_operators_to_know() -> None:
    with pytest.raises(ConfigError, match=r"Stratum cannot listen on 203\.0\.113\.1:0"):
        open_listeners("203.0.113.1", 0)


async def test_a_machine_out_of_file_descriptors_goes_on_accepting_later() -> None:
    [plain] = open_listeners("127.0.0.1", 0)

    class Exhausted(socket.socket):
        refusals = iter((errno.EMFILE, errno.ECONNABORTED))

        def accept(self) -> tuple[socket.socket, Any]:
            for refusal in self.refusals:
                raise OSError(refusal, "no")
            return super().accept()

    listener = Exhausted(fileno=plain.detach())
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        server = StratumServer(ToyDesk(), replace(SETTINGS, tick_s=0.01))
        await nursery.start(server.serve, [listener])
        client = Client(await trio.open_tcp_stream(*server.addresses[0]))
        await client.start()
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_fault_of_the_node_is_not_taken_for_the_miners() -> None:
    class Broken(ToyDesk):
        def judge(self, worker: Worker, submission: Submission) -> Verdict:
            raise ZeroDivisionError

    async def scene() -> None:
        async with serving(Broken()) as (_, connect):
            client = await (await connect()).start()
            await client.send("mining.submit", USER, client.notify[0], "00" * 8, "0", "0")
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await scene()
    assert caught.value.subgroup(ZeroDivisionError)
