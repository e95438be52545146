"""Questions to one Bitcoin node over JSON-RPC: where it listens, who we are, what went wrong and what to do.

Theory of operation. A call is one HTTP request whose body is JSON; the node answers on a connection that is kept for
the next call. Four things make that harder than it sounds:

* The password. Bitcoin Core writes a new one into its cookie file at each start. So the file is read when it is needed,
  and again when the node does not accept what was read. No password and no cookie is ever part of a message or a log.
* Connections that are gone. Bitcoin Core closes one that was idle for 30 s, and all when it stops. We let go of them
  earlier, but a call can still cross a close. If a connection that had served before ends before it answers anything,
  the question is put once more on a new one. All that we ask may be asked twice, `submitblock` included.
* Answers that come too late. A call that is cancelled or that timed out closes its connection, so that its answer never
  stands before the next one's; each answer is compared with the number of its question besides.
* Whose move it is. `BackendError` says that asking again may help: nobody listens, the node is starting or busy, what
  answers is no Bitcoin node. `BackendRefusal` says that the node understood and will say the same again.

Source: JSON-RPC 1.0 as Bitcoin Core's httprpc.cpp and btcd's rpcserver.go speak it; version 2.0's way to answer errors
(HTTP 200) is understood as well.
"""

from __future__ import annotations

import base64
import ipaddress
import itertools
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import httpx
import trio

from p2pool.errors import BackendError, BackendRefusal

__all__ = ["Endpoint", "RpcClient", "parse_endpoint"]

#: The port and, below ~/.bitcoin, the directory that Bitcoin Core uses on each network.
_NETWORKS: Final = {
    "mainnet": (8332, ""),
    "testnet4": (48332, "testnet4"),
    "signet": (38332, "signet"),
    "regtest": (18443, "regtest"),
}
#: Seconds within which a connection must stand; a node on this machine needs none, one behind a firewall never does.
_CONNECT_S: Final = 10.0
#: Seconds after which we let go of an idle connection. Bitcoin Core does after 30, btcd after each answer.
_IDLE_S: Final = 20.0
#: Connections at a time: Bitcoin Core answers with 16 threads (4 in older versions) and lets few more wait.
_CONNECTIONS: Final = 8
#: Calls in one HTTP request.
_BATCH_CALLS: Final = 500
#: Bytes of an answer that is read in a thread: a template with 4 MB of transactions comes as 9 MB of JSON.
_LARGE_BYTES: Final = 256 * 1024
#: Characters of a node's own words that we repeat.
_WORDS_CHARACTERS: Final = 500
#: Bitcoin Core's error code while it starts (RPC_IN_WARMUP).
_IN_WARMUP: Final = -28

#: A host and perhaps a port; names have labels of 1 to 63 characters, or the resolver throws what nobody expects.
_AUTHORITY: Final = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?)(?::([0-9]{1,5}))?"
)

# httpx would log a line at INFO for each request: several a second, for ever.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a Bitcoin node takes questions, and who asks. See `parse_endpoint`.

    Arguments:
        url: scheme://host:port[/path], without credentials.
        user: the name that goes with `password`, or None.
        password: never shown, or None.
        cookie_file: where Bitcoin Core writes a user and a password for programs on its machine; used if there is no
            password. With neither, none are sent.
    """

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    cookie_file: Path | None = None

    @property
    def name(self) -> str:
        """For logs: "127.0.0.1:8332"."""
        return self.url.partition("://")[2].partition("/")[0]


def parse_endpoint(
    text: str,
    *,
    network: str,
    cookie_file: Path | None = None,
    user: str | None = None,
    password: str | None = None,
) -> Endpoint:
    """Read what an operator writes for a Bitcoin node: "http://user:password@127.0.0.1:8332", or only "127.0.0.1".

    A user and a password in the text win, then those given apart, then the cookie file, and if nothing is given the
    place where Bitcoin Core puts its cookie.

    Arguments:
        text: [http://][user:password@]host[:port][/path]. Special characters of user and password are
            percent-encoded, an IPv6 address stands in square brackets. https:// is taken as well.
        network: mainnet, testnet4, signet or regtest; says which port and which cookie are meant if none is given.
        cookie_file: or the directory in which it is called ".cookie".
        user: goes with `password`.
        password: goes with `user`.

    Raises:
        ValueError: the text does not have that form, or the network is none of these. The message repeats nothing of
            the text, where there may be a password.
    """
    if network not in _NETWORKS:
        raise ValueError(f"expected a Bitcoin network ({', '.join(_NETWORKS)}), got {network!r}")
    default_port, directory = _NETWORKS[network]
    scheme, separator, rest = text.strip().rpartition("://")
    scheme = scheme.lower() if separator else "http"
    if scheme not in ("http", "https"):
        raise ValueError("a Bitcoin node's address begins with http:// or https://, or with the host")
    # The last @: so that one in a password which was not encoded cuts nothing else off.
    credentials, at, place = rest.rpartition("@")
    authority, slash, path = place.partition("/")
    if "/" in credentials or set("?#") & set(rest) or re.search(r"[\s\x00-\x1f\x7f]", rest):
        raise ValueError(
            "a Bitcoin node's address has no space, ? or #, and a path only at the end; percent-encode such characters"
            " in a user or a password (/ is %2F, @ is %40, # is %23, ? is %3F)"
        )
    host, port = _split_authority(authority, default_port)
    if at:
        user, password = _split_credentials(credentials)
    elif (user is None) != (password is None):
        raise ValueError("a user and a password for the Bitcoin node go together: only one of them was given")
    if user is not None and ":" in user:
        raise ValueError("the name of a user of the Bitcoin node has no colon")
    if user is not None:
        cookie_file = None
    elif cookie_file is None:
        cookie_file = Path.home() / ".bitcoin" / directory / ".cookie"
    else:
        cookie_file = cookie_file.expanduser()
        cookie_file = cookie_file / ".cookie" if cookie_file.is_dir() else cookie_file
    url = f"{scheme}://{host}:{port}" + (slash + path if path else "")
    return Endpoint(url=url, user=user, password=password, cookie_file=cookie_file)


def _split_authority(authority: str, default_port: int) -> tuple[str, int]:
    found = _AUTHORITY.fullmatch(authority)
    if not found:
        raise ValueError(
            "a Bitcoin node's address is host:port, like 127.0.0.1:8332 or [::1]:8332; with a user and a password it is"
            " http://user:password@host:port, where special characters of the two are percent-encoded"
        )
    host, port = found[1], int(found[2] or default_port)
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError("what stands in square brackets is not an IPv6 address") from None
    if not 1 <= port <= 65535:
        raise ValueError("the port of a Bitcoin node is a number from 1 to 65535")
    return host, port


def _split_credentials(credentials: str) -> tuple[str, str]:
    user, colon, password = credentials.partition(":")
    if not (user and colon and password):
        raise ValueError("before the @ of a Bitcoin node's address stand a user, a colon and a password")
    try:
        return unquote_to_bytes(user).decode(), unquote_to_bytes(password).decode()
    except UnicodeDecodeError:
        raise ValueError("the user or the password for the Bitcoin node is not percent-encoded UTF-8") from None


class RpcClient:
    """Puts questions to one Bitcoin node.

    Mutable fields: ``_cookie`` (what the cookie file held when it was last read, as it goes into a header, or None),
    ``_scopes`` (of the questions that wait for an answer), ``_closed``. After the close nobody waits.
    """

    endpoint: Endpoint

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 30.0) -> None:
        """Connect to nothing yet.

        Arguments:
            endpoint: the node.
            timeout_s: seconds that a call without its own limit may take.
        """
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._cookie: bytes | None = None
        self._scopes: set[trio.CancelScope] = set()
        self._closed = False
        verify: bool | ssl.SSLContext = False
        if endpoint.url.startswith("https:"):
            verify = ssl.create_default_context()
        self._kept, self._new = (
            httpx.AsyncClient(
                verify=verify,
                trust_env=False,
                follow_redirects=False,
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                limits=httpx.Limits(
                    max_connections=_CONNECTIONS, max_keepalive_connections=kept, keepalive_expiry=_IDLE_S
                ),
                headers={"user-agent": "p2pool", "accept": "application/json", "accept-encoding": "identity"},
            )
            for kept in (_CONNECTIONS, 0)
        )

    async def call(self, method: str, *params: object, timeout_s: float | None = None) -> Any:
        """Ask one thing and give the result.

        Arguments:
            method: Bitcoin Core's name of it.
            params: in its order.
            timeout_s: seconds for everything, a second try included; the client's own limit if None.

        Raises:
            BackendRefusal: the node refuses this call, or us; the code is that of the JSON-RPC error, or 401, 403, 404.
            BackendError: there is no usable answer now.
        """
        number = next(self._ids)
        answer = await self._ask(method, _question(number, method, params), timeout_s)
        result = self._result(method, answer, number)
        if isinstance(result, BackendRefusal):
            raise result
        return result

    async def batch(self, calls: Sequence[tuple[str, tuple[object, ...]]], timeout_s: float | None = None) -> list[Any]:
        """Ask many things at once: one HTTP request for 500 of them.

        Arguments:
            calls: methods and their parameters.
            timeout_s: seconds for each HTTP request.

        Returns: the results in the order of the calls; where the node refused one, a `BackendRefusal` as a value.

        Raises:
            BackendRefusal: the node refuses us, or the batch as a whole.
            BackendError: there is no usable answer now.
        """
        results: list[Any] = []
        for start in range(0, len(calls), _BATCH_CALLS):
            results += await self._ask_batch(calls[start : start + _BATCH_CALLS], timeout_s)
        return results

    async def aclose(self) -> None:
        """Let go of all connections, also when cancelled; who waits for an answer gets a `BackendError`."""
        self._closed = True
        for scope in self._scopes:
            scope.cancel()
        with trio.CancelScope(shield=True):
            await self._kept.aclose()
            await self._new.aclose()

    # One request.

    async def _ask_batch(self, calls: Sequence[tuple[str, tuple[object, ...]]], timeout_s: float | None) -> list[Any]:
        what = calls[0][0] if len(calls) == 1 else f"{calls[0][0]} and {len(calls) - 1} more"
        numbers = [next(self._ids) for _ in calls]
        questions = [_question(number, *call) for number, call in zip(numbers, calls, strict=True)]
        answers = await self._ask(what, questions, timeout_s)
        if not isinstance(answers, list):
            result = self._result(what, answers, None)
            if isinstance(result, BackendRefusal):
                raise result
            raise self._error(what, "expected the answers to a batch of calls, got one answer")
        by_number = {
            answer.get("id"): answer
            for answer in answers
            if isinstance(answer, dict) and isinstance(answer.get("id"), int)
        }
        if len(answers) != len(calls) or by_number.keys() != set(numbers):
            raise self._error(what, f"the {len(answers)} answers do not belong to the {len(calls)} calls")
        return [
            self._result(method, by_number[number], number) for number, (method, _) in zip(numbers, calls, strict=True)
        ]

    async def _ask(self, what: str, question: object, timeout_s: float | None) -> Any:
        """Send a body and give the JSON of the answer, all within the time limit."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        body = json.dumps(question, separators=(",", ":")).encode()
        with trio.move_on_after(limit) as scope:
            if not self._closed:
                self._scopes.add(scope)
                try:
                    return await self._ask_authorized(what, body)
                finally:
                    self._scopes.discard(scope)
        if self._closed:
            raise self._error(what, "the connection to the Bitcoin node was closed by this node")
        raise self._error(what, f"no answer in {limit:g} s: the Bitcoin node is busy, hangs, or cannot be reached")

    async def _ask_authorized(self, what: str, body: bytes) -> Any:
        credentials = self._credentials(what)
        status, content = await self._send(what, body, credentials)
        if status == 401 and self.endpoint.password is None and self.endpoint.cookie_file is not None:
            self._cookie = None
            renewed = self._credentials(what)
            if renewed != credentials:
                status, content = await self._send(what, body, renewed)
        return await self._read(what, status, content)

    def _credentials(self, what: str) -> bytes | None:
        """Give the value of the Authorization header."""
        endpoint = self.endpoint
        if endpoint.password is not None:
            return _basic(f"{endpoint.user or ''}:{endpoint.password}".encode())
        if self._cookie is None and endpoint.cookie_file is not None:
            try:
                content = endpoint.cookie_file.read_bytes().strip()
            except OSError as error:
                raise self._error(
                    what,
                    f"cannot read the cookie file {endpoint.cookie_file} ({error.strerror}): is bitcoind running, is"
                    " this its data directory, and may this user read the file? Or give the node's user and password",
                ) from None
            if b":" not in content:
                raise self._error(what, f"{endpoint.cookie_file} is not a cookie file of Bitcoin Core")
            self._cookie = _basic(content)
        return self._cookie

    async def _send(self, what: str, body: bytes, credentials: bytes | None) -> tuple[int, bytes]:
        """Give the HTTP status and the body that come back.

        Sends on a connection that may have served before; if that one turns out to be gone, on a new one.
        """
        seen: set[str] = set()

        async def watch(event: str, _info: object) -> None:
            seen.add(event)

        headers = {b"content-type": b"application/json"}
        if credentials is not None:
            headers[b"authorization"] = credentials
        for client in (self._kept, self._new):
            try:
                request = client.build_request(
                    "POST", self.endpoint.url, content=body, headers=headers, extensions={"trace": watch}
                )
                request.stream = _Body(body)
                response = await client.send(request, stream=True)
                try:
                    # Raw: httpx leaves a generator behind if it has to decompress what is not compressed.
                    return response.status_code, b"".join([part async for part in response.aiter_raw()])
                finally:
                    await response.aclose()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self._cookie = None  # a node that starts again has a new one
                raise self._error(what, _why_not_connected(error)) from None
            except httpx.RequestError as error:
                is_new = "connection.connect_tcp.started" in seen
                is_answered = "http11.receive_response_headers.complete" in seen
                if is_new or is_answered:
                    raise self._error(
                        what, f"the connection broke before the whole answer was there ({_words(str(error))})"
                    ) from None
        raise AssertionError("a new connection is new")

    async def _read(self, what: str, status: int, content: bytes) -> Any:
        """Give the JSON of an answer, or say what an answer without any means."""
        if status == 401:
            raise BackendRefusal(401, self._message(what, self._why_unauthorized()))
        try:
            if len(content) > _LARGE_BYTES:
                return await trio.to_thread.run_sync(json.loads, content)
            return json.loads(content)
        except (ValueError, RecursionError):
            pass
        if status == 403:
            raise BackendRefusal(
                403,
                self._message(
                    what,
                    "the Bitcoin node takes no calls from this machine, or not this one from this user (HTTP 403): see"
                    " rpcallowip, rpcbind and rpcwhitelist in its bitcoin.conf",
                ),
            )
        if status == 404:
            raise BackendRefusal(
                404,
                self._message(
                    what,
                    "there is nothing at this address (HTTP 404): is the path, or the wallet in it, right, and is this"
                    " the RPC port of a Bitcoin node?",
                ),
            )
        if status == 503:
            raise self._error(
                what,
                "the Bitcoin node is stopping, or too busy to take the call (HTTP 503): other programs ask it, or"
                " rpcthreads and rpcworkqueue are too small",
            )
        if status == 200:
            raise self._error(
                what, f"the answer ({len(content)} bytes) is not JSON: is this the RPC port of a Bitcoin node?"
            )
        raise self._error(
            what, f"the answer is HTTP status {status} and no JSON: is this the RPC port of a Bitcoin node?"
        )

    def _result(self, method: str, answer: object, number: int | None) -> Any:
        """Give the result in an answer, or a `BackendRefusal` as a value; a node that starts is unavailable."""
        if not isinstance(answer, dict) or not ("result" in answer or "error" in answer):
            raise self._error(method, "the answer is JSON but no JSON-RPC: is this the RPC port of a Bitcoin node?")
        fault = answer.get("error")
        # A node that could not read the question cannot say which one it was.
        if answer.get("id") != number and not (fault is not None and answer.get("id") is None):
            raise self._error(method, "the answer belongs to another question")
        if fault is None:
            return answer.get("result")
        code, words = -1, str(fault)
        if isinstance(fault, dict):
            code = fault["code"] if isinstance(fault.get("code"), int) else -1
            words = str(fault.get("message", ""))
        if code == _IN_WARMUP:
            raise self._error(method, f"the Bitcoin node is starting: {_words(words)}")
        return BackendRefusal(code, self._message(method, f"{_words(words)} (error {code})"))

    # Words.

    def _why_unauthorized(self) -> str:
        endpoint = self.endpoint
        if endpoint.password is not None:
            return (
                f"the Bitcoin node does not accept the password of user {endpoint.user!r} (HTTP 401): compare it with"
                " rpcauth (or rpcuser and rpcpassword) in the node's bitcoin.conf"
            )
        if endpoint.cookie_file is not None:
            return (
                f"the Bitcoin node does not accept the cookie in {endpoint.cookie_file} (HTTP 401): the cookie changes"
                " at each start of Bitcoin Core, so this one is old or another node's. Name the cookie file in that"
                " node's data directory, or a user and a password that it knows by rpcauth"
            )
        return "the Bitcoin node wants a user and a password (HTTP 401), or the cookie in its data directory"

    def _message(self, what: str, words: str) -> str:
        return f"{self.endpoint.name}: {what}: {words}"

    def _error(self, what: str, words: str) -> BackendError:
        return BackendError(self._message(what, words))


class _Body(httpx.AsyncByteStream):
    """A request's body. That of httpx is a generator, which trio complains of when a call is cancelled in its midst."""

    def __init__(self, raw: bytes) -> None:
        self._parts = [raw]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Parts(iter(self._parts))


class _Parts:
    def __init__(self, parts: Iterator[bytes]) -> None:
        self._rest = parts

    def __aiter__(self) -> _Parts:
        return self

    async def __anext__(self) -> bytes:
        for part in self._rest:
            return part
        raise StopAsyncIteration


def _question(number: int, method: str, params: Sequence[object]) -> dict[str, object]:
    return {"jsonrpc": "1.0", "id": number, "method": method, "params": list(params)}


def _basic(credentials: bytes) -> bytes:
    return b"Basic " + base64.b64encode(credentials)


def _words(text: str) -> str:
    """Give a node's or a library's words in one line of bearable length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_WORDS_CHARACTERS]


def _why_not_connected(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection in {_CONNECT_S:g} s: is the address right, and is there a firewall?"
    return (
        f"cannot connect ({_words(str(error))}): is the Bitcoin node running, with server=1, and is this its RPC port?"
    )
