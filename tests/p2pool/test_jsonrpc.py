"""JSON-RPC to one node: addresses, passwords, connections, answers of every kind, and that nothing secret is told."""

from __future__ import annotations

import base64
import gc
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pool.bitcoin_backend import jsonrpc
from p2pool.bitcoin_backend.jsonrpc import Endpoint, RpcClient, parse_endpoint
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.errors import BackendError, BackendRefusal
from tests.p2pool.fakecore import open_fake_core

PASSWORD = "s3cr3t/p@ss:w0rd"
ENCODED = "s3cr3t%2Fp%40ss%3Aw0rd"
Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[KernelBackend]:
    opened = KernelBackend.open(tmp_path / "kernel")
    yield opened
    opened.close()


@asynccontextmanager
async def client_of(endpoint: Endpoint, timeout_s: float = 20.0) -> AsyncIterator[RpcClient]:
    client = RpcClient(endpoint, timeout_s=timeout_s)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Endpoint]:
    """A server that does to each connection what a few lines say."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield Endpoint(url=f"http://127.0.0.1:{port}", user="u", password=PASSWORD)
        nursery.cancel_scope.cancel()


async def read_request(stream: trio.SocketStream) -> Any:
    """The JSON of the next request, or None if there is none."""
    buffer = b""
    while True:
        head, found, body = buffer.partition(b"\r\n\r\n")
        if found:
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            if len(body) >= length:
                return json.loads(body)
        received = await stream.receive_some()
        if not received:
            return None
        buffer += received


def answer(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def result_of(question: dict[str, Any], result: object = 7) -> bytes:
    return json.dumps({"result": result, "error": None, "id": question["id"]}).encode()


def always(raw: bytes) -> Handler:
    """Answer every request with the same bytes, then close."""

    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await read_request(stream)
            await stream.send_all(raw)

    return handler


async def failure(client: RpcClient, method: str = "getblockcount") -> BackendError:
    with pytest.raises(BackendError) as caught:
        await client.call(method)
    assert str(caught.value).startswith(f"{client.endpoint.name}: {method}: ")
    return caught.value


# Addresses.


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8332"),
        ("127.0.0.1:18443", "http://127.0.0.1:18443"),
        ("http://node.example", "http://node.example:8332"),
        ("HTTP://node.example:1/", "http://node.example:1"),
        ("https://node.example:8334/wallet/w", "https://node.example:8334/wallet/w"),
        ("[::1]", "http://[::1]:8332"),
        ("http://[::1]:18443/", "http://[::1]:18443"),
        (" localhost ", "http://localhost:8332"),
    ],
)
def test_an_address_may_leave_out_what_is_usual(text: str, url: str) -> None:
    endpoint = parse_endpoint(text, network="mainnet")
    assert endpoint.url == url
    assert endpoint.name == url.split("/")[2]


@pytest.mark.parametrize(
    ("network", "port", "cookie"),
    [
        ("mainnet", 8332, ".bitcoin/.cookie"),
        ("testnet4", 48332, ".bitcoin/testnet4/.cookie"),
        ("signet", 38332, ".bitcoin/signet/.cookie"),
        ("regtest", 18443, ".bitcoin/regtest/.cookie"),
    ],
)
def test_each_network_has_its_port_and_its_cookie(
    network: str, port: int, cookie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = Endpoint(url=f"http://127.0.0.1:{port}", cookie_file=tmp_path / cookie)
    assert parse_endpoint("127.0.0.1", network=network) == expected


def test_credentials_in_the_address_win_then_those_apart_then_the_cookie(tmp_path: Path) -> None:
    cookie = tmp_path / "cookie"
    text = f"http://us%65r:{ENCODED}@h:1"
    within = parse_endpoint(text, network="mainnet", user="other", password="x", cookie_file=cookie)
    assert (within.url, within.user, within.password, within.cookie_file) == ("http://h:1", "user", PASSWORD, None)
    apart = parse_endpoint("h:1", network="mainnet", user="other", password="x", cookie_file=cookie)
    assert (apart.user, apart.password, apart.cookie_file) == ("other", "x", None)
    neither = parse_endpoint("h:1", network="mainnet", cookie_file=cookie)
    assert (neither.user, neither.password, neither.cookie_file) == (None, None, cookie)


def test_a_directory_stands_for_the_cookie_in_it(tmp_path: Path) -> None:
    assert parse_endpoint("h", network="mainnet", cookie_file=tmp_path).cookie_file == tmp_path / ".cookie"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        "ftp://u:secret@h:1",
        "u:secret@",
        "http://u:secret@h:0",
        "http://u:secret@h:65536",
        "http://u:secret@h:port",
        "http://u:sec/ret@h:1",
        "http://u:secret@ret@h:x",
        "http://u:secret#@h:1",
        "http://u:secret?@h:1",
        "http://u:sec ret@h:1",
        "http://u:secret%ff@h:1",
        "http://secret@h:1",
        "http://secret:@h:1",
        "http://:secret@h:1",
        "http://us%3Aer:secret@h:1",
        "http://u:secret@a..b:1",
        "http://u:secret@" + "a" * 64 + ":1",
        "http://u:secret@[::secret]:1",
        "http://u:secret@[1:2]:1",
        "http://u:secret@h:1?secret",
        "h:secret",
        "u:secret:h:1",
    ],
)
def test_a_bad_address_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"Bitcoin node|IPv6") as caught:
        parse_endpoint(text, network="mainnet")
    assert "sec" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_half_a_pair_of_credentials_and_an_unknown_network_are_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        parse_endpoint("h", network="mainnet", user="u")
    with pytest.raises(ValueError, match="go together"):
        parse_endpoint("h", network="mainnet", password="p")
    with pytest.raises(ValueError, match="expected a Bitcoin network"):
        parse_endpoint("h", network="testnet3")


def test_the_password_is_not_shown() -> None:
    endpoint = parse_endpoint(f"u:{ENCODED}@h", network="mainnet")
    assert endpoint.password == PASSWORD
    assert PASSWORD not in repr(endpoint)
    assert ENCODED not in repr(endpoint)
    assert PASSWORD not in endpoint.name + endpoint.url


# Calls.


async def test_a_call_gives_the_result(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        assert await client.call("getblockcount") == 0
        assert await client.call("getblockhash", 0) == await client.call("getbestblockhash")
        assert core.calls == {"getblockcount": 1, "getblockhash": 1, "getbestblockhash": 1}


async def test_a_refusal_has_the_nodes_code_and_words(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        with pytest.raises(BackendRefusal, match="getblockhash: Block height out of range") as caught:
            await client.call("getblockhash", 1)
        assert caught.value.code == -8
        with pytest.raises(BackendRefusal, match="nonsense: Method not found") as caught:
            await client.call("nonsense")
        assert caught.value.code == -32601


async def test_errors_of_json_rpc_2_are_understood() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        question = await read_request(stream)
        error = {"code": -5, "message": "Block not found"}
        await stream.send_all(answer(json.dumps({"jsonrpc": "2.0", "error": error, "id": question["id"]}).encode()))

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        refusal = await failure(client)
    assert isinstance(refusal, BackendRefusal)
    assert refusal.code == -5


async def test_a_node_that_starts_is_unavailable_and_says_in_which_step(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.warmup = "Verifying blocks..."
        for ask in (client.call("getblockcount"), client.batch([("getblockcount", ()), ("getblockcount", ())])):
            with pytest.raises(BackendError, match=r"is starting: Verifying blocks\.\.\.") as caught:
                await ask
            assert not isinstance(caught.value, BackendRefusal)


async def test_a_full_work_queue_is_unavailable(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.fail = True
        error = await failure(client)
        assert "HTTP 503" in str(error)
        assert not isinstance(error, BackendRefusal)


@pytest.mark.parametrize(
    ("raw", "words", "code"),
    [
        (answer(b"<html>hello</html>"), "is not JSON", None),
        (answer(b"\xff\xfe"), "is not JSON", None),
        (answer(b""), "is not JSON", None),
        (answer(b"[" * 100_000), "is not JSON", None),
        (answer(b'{"result": ' + b"9" * 10_000 + b"}"), "is not JSON", None),
        (answer(b"7"), "no JSON-RPC", None),
        (answer(b"[]"), "no JSON-RPC", None),
        (answer(b"{}"), "no JSON-RPC", None),
        (answer(b'{"result": 7, "error": null, "id": 999}'), "another question", None),
        (answer(b'{"result": 7, "error": null, "id": null}'), "another question", None),
        (answer(b'{"result": null, "error": {"code": -32700, "message": "Parse error"}, "id": null}'), "Parse", -32700),
        (answer(b'{"result": null, "error": "odd", "id": 1}'), "odd", -1),
        (answer(b'{"result": null, "error": {"code": "x"}, "id": 1}'), "error -1", -1),
        (answer(b"oops", status="500 Internal Server Error"), "HTTP status 500", None),
        (answer(b"", status="302 Found", more="Location: http://127.0.0.1:1/\r\n"), "HTTP status 302", None),
        (answer(b"", status="403 Forbidden"), "rpcallowip", 403),
        (answer(b"", status="404 Not Found"), "path", 404),
        (answer(b"garbage" * 9, more="Content-Encoding: gzip\r\n"), "is not JSON", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "the connection broke", None),
        (b"", "the connection broke", None),
        (b"HTTP/1.1 200 OK\r\nContent-", "the connection broke", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "the connection broke", None),
    ],
)
async def test_an_answer_that_is_none_says_what_it_is(raw: bytes, words: str, code: int | None) -> None:
    async with serving(always(raw)) as endpoint, client_of(endpoint) as client:
        error = await failure(client)
    assert words in str(error)
    assert (error.code if isinstance(error, BackendRefusal) else None) == code


async def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            question = await read_request(stream)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + result_of(question))

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        assert [await client.call("getblockcount") for _ in range(3)] == [7, 7, 7]


@pytest.mark.slow
async def test_a_huge_answer_is_read() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        question = await read_request(stream)
        await stream.send_all(answer(result_of(question, ["00" * 10_000_000])))

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        assert len((await client.call("getblocktemplate"))[0]) == 20_000_000


async def test_nobody_listens() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    async with client_of(Endpoint(url=f"http://127.0.0.1:{port}", user="u", password=PASSWORD)) as client:
        error = await failure(client)
        assert "cannot connect" in str(error)
        assert not isinstance(error, BackendRefusal)


async def test_a_silent_node_is_given_up_after_the_time_that_the_call_has(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint, timeout_s=0.05) as client:
        core.dead = True
        assert "no answer in 0.05 s" in str(await failure(client))
        with pytest.raises(BackendError, match=r"no answer in 0\.01 s"):
            await client.call("getblockcount", timeout_s=0.01)


async def test_the_environment_does_not_send_calls_through_a_proxy(
    kernel: KernelBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        assert await client.call("getblockcount") == 0


# Batches.


async def test_a_batch_gives_results_in_order_with_refusals_in_their_places(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        genesis, refusal, count = await client.batch(
            [("getblockhash", (0,)), ("getblockhash", (1,)), ("getblockcount", ())]
        )
        assert genesis == await client.call("getbestblockhash")
        assert isinstance(refusal, BackendRefusal)
        assert refusal.code == -8
        assert "getblockhash: Block height out of range" in str(refusal)
        assert count == 0


async def test_a_large_batch_is_several_requests_and_an_empty_one_is_none(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        assert await client.batch([]) == []
        assert core.requests == 0
        assert await client.batch([("getblockcount", ())] * 1001) == [0] * 1001
        assert core.requests == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda replies: replies[::-1], None),
        (lambda replies: replies[:1], "do not belong"),
        (lambda replies: [replies[0], replies[0]], "do not belong"),
        (lambda replies: [replies[0], {**replies[1], "id": [1]}], "do not belong"),
        (lambda replies: [replies[0], 7], "do not belong"),
        (lambda replies: replies[0], "another question"),
        (lambda replies: {"result": 7, "error": None}, "got one answer"),
    ],
)
async def test_answers_to_a_batch_are_told_apart_by_number(change: Callable[[Any], Any], words: str | None) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        questions = await read_request(stream)
        replies = [{"result": question["params"][0], "error": None, "id": question["id"]} for question in questions]
        await stream.send_all(answer(json.dumps(change(replies)).encode()))

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        if words is None:
            assert await client.batch([("a", (1,)), ("b", (2,))]) == [1, 2]
        else:
            with pytest.raises(BackendError, match=words):
                await client.batch([("a", (1,)), ("b", (2,))])


# Who we are.


async def test_the_cookie_is_read_again_after_a_restart(kernel: KernelBackend, tmp_path: Path) -> None:
    async with open_fake_core(kernel, cookie_file=tmp_path / ".cookie") as core, client_of(core.endpoint) as client:
        assert await client.call("getblockcount") == 0
        await core.stop()
        assert "cannot connect" in str(await failure(client))
        assert "is bitcoind running" in str(await failure(client))
        await core.start()
        assert await client.call("getblockcount") == 0
        assert core.requests == 2


async def test_a_cookie_that_changed_unnoticed_costs_one_more_request(kernel: KernelBackend, tmp_path: Path) -> None:
    async with open_fake_core(kernel, cookie_file=tmp_path / ".cookie") as core, client_of(core.endpoint) as client:
        assert await client.call("getblockcount") == 0
        await core.stop()
        await core.start()
        assert await client.call("getblockcount") == 0
        assert core.requests == 3


async def test_the_wrong_cookie_is_refused_with_its_file(kernel: KernelBackend, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("__cookie__:c0ffee")
    async with open_fake_core(kernel) as core, client_of(Endpoint(url=core.url, cookie_file=other)) as client:
        refusal = await failure(client)
        assert isinstance(refusal, BackendRefusal)
        assert refusal.code == 401
        assert str(other) in str(refusal)
        assert "at each start" in str(refusal)
        assert core.requests == 1  # the same cookie is not tried twice


@pytest.mark.parametrize("content", [None, b"", b"c0ffee"])
async def test_a_missing_or_foreign_cookie_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "cookie"
    if content is not None:
        file.write_bytes(content)
    async with client_of(Endpoint(url="http://127.0.0.1:1", cookie_file=file)) as client:
        error = await failure(client)
    assert str(file) in str(error)
    assert not isinstance(error, BackendRefusal)


async def test_a_wrong_password_is_refused_with_its_user(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.password = "another"
        refusal = await failure(client)
        assert isinstance(refusal, BackendRefusal)
        assert refusal.code == 401
        assert "'pool'" in str(refusal)
        assert "rpcauth" in str(refusal)
        assert core.requests == 1


async def test_without_credentials_the_node_says_that_it_wants_some(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(Endpoint(url=core.url)) as client:
        assert "wants a user and a password" in str(await failure(client))


@pytest.mark.slow
async def test_no_failure_tells_a_password_or_a_cookie(
    kernel: KernelBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cookie_file = tmp_path / ".cookie"
    told: list[BaseException] = []

    async def fail(client: RpcClient) -> None:
        told.append(await failure(client))
        with pytest.raises(BackendError) as caught:
            await client.batch([("getblockcount", ()), ("getblockcount", ())])
        told.append(caught.value)

    async with open_fake_core(kernel, cookie_file=cookie_file) as core:
        cookie = cookie_file.read_text()
        core.password = PASSWORD
        endpoints = [core.endpoint, Endpoint(url=core.url, user="pool", password=PASSWORD)]
        for endpoint in endpoints:
            async with client_of(endpoint) as client:
                assert await client.call("getblockcount") == 0
                for fault in ("warmup", "fail", "drop", "forbidden", "dead"):
                    setattr(core, fault, "words" if fault == "warmup" else True)
                    client._timeout_s = 0.05 if fault == "dead" else 20.0
                    await fail(client)
                    setattr(core, fault, None if fault == "warmup" else False)
        async with client_of(replace(endpoints[1], password=PASSWORD + "x")) as client:
            await fail(client)
        async with client_of(Endpoint(url=core.url + "/wallet/w", user="pool", password=PASSWORD)) as client:
            await fail(client)
        cookie_file.write_text(cookie + "0")
        async with client_of(core.endpoint) as client:
            await fail(client)
        await core.stop()
        for endpoint in endpoints:
            async with client_of(endpoint) as client:
                await fail(client)
        await core.start()
    text = caplog.text + "".join(f"{error} {error!r} {error.__context__!r}" for error in told)
    secrets = [PASSWORD, cookie.partition(":")[2]]
    secrets += [base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()[:-4] for user in ("pool",)]
    secrets += [base64.b64encode(cookie.encode()).decode()[:-4]]
    assert [secret for secret in secrets if secret in text] == []
    assert len(told) == 30


def test_the_http_library_does_not_log_a_line_for_each_call() -> None:
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)


# Connections.


async def test_calls_share_a_connection(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        for _ in range(20):
            await client.call("getblockcount")
        with pytest.raises(BackendRefusal):
            await client.call("nonsense")
        assert (core.connected, core.connections) == (1, 1)


async def test_calls_at_the_same_time_have_at_most_eight_connections(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.delay_s["getblockcount"] = 0.01
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client.call, "getblockcount")
        assert core.calls["getblockcount"] == 20
        assert core.connected == jsonrpc._CONNECTIONS == 8


async def test_connections_that_the_node_closed_are_not_used(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        await client.call("getblockcount")
        assert await core.close_idle() == 1
        assert await client.call("getblockcount") == 0
        assert (core.connected, core.requests) == (2, 2)


async def test_a_call_that_crosses_a_close_is_put_once_more_on_a_new_connection(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.delay_s["getblockcount"] = 0.01
        async with trio.open_nursery() as nursery:  # three connections that have served
            for _ in range(3):
                nursery.start_soon(client.call, "getblockcount")
        assert core.connected == 3
        core.hang_ups = 1
        assert await client.call("getblockhash", 0) == await client.call("getbestblockhash")
        assert core.connected == 4
        assert core.calls["getblockhash"] == 1


async def test_a_connection_that_never_served_is_not_replaced(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.hang_ups = 9
        assert "the connection broke" in str(await failure(client))
        assert (core.connected, core.requests) == (1, 1)


async def test_the_second_try_is_the_last(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        await client.call("getblockcount")
        core.hang_ups = 9
        assert "the connection broke" in str(await failure(client))
        assert (core.connected, core.requests) == (2, 3)


async def test_an_answer_that_began_is_not_asked_for_again(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        await client.call("getblockcount")
        core.drop = True
        assert "the connection broke" in str(await failure(client))
        assert core.requests == 2


async def test_a_node_without_kept_connections_is_no_error(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        core.keep_alive = False
        assert [await client.call("getblockcount") for _ in range(3)] == [0, 0, 0]
        assert core.connected == 3


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_a_cancelled_call_closes_its_connection_and_harms_no_other(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, client_of(core.endpoint) as client:
        await client.call("getblockcount")
        core.delay_s["getbestblockhash"] = 0.05
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, "getbestblockhash")
            await until(lambda: core.calls["getbestblockhash"] == 1)
            nursery.cancel_scope.cancel()
        assert await client.call("getblockcount") == 0
        await until(lambda: core.connections == 1)
        assert core.connected == 2


@pytest.mark.slow
async def test_a_call_may_be_given_up_while_it_is_being_sent() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        with pytest.raises(BackendError, match="no answer"):
            await client.call("submitblock", "00" * 4_000_000, timeout_s=0.05)
    gc.collect()  # a generator that was left behind would warn now


@pytest.mark.slow
async def test_a_node_that_hangs_up_while_a_call_is_being_sent() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some(10)
        await stream.aclose()

    async with serving(handler) as endpoint, client_of(endpoint) as client:
        with pytest.raises(BackendError, match="the connection broke"):
            await client.call("submitblock", "00" * 4_000_000)
    gc.collect()


async def test_whoever_waits_when_the_client_closes_gets_an_error(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core:
        client = RpcClient(core.endpoint, timeout_s=math.inf)
        errors: list[BackendError] = []

        async def wait() -> None:
            errors.append(await failure(client, "waitfornewblock"))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(12):  # four more than there are connections
                    nursery.start_soon(wait)
                await until(lambda: core.long_polls == 8)
                await client.aclose()
            assert "was closed" in str(await failure(client))
        await client.aclose()
        assert [str(error).rpartition(": ")[2] for error in errors] == [
            "the connection to the Bitcoin node was closed by this node"
        ] * 12
        assert core.connections <= 8
