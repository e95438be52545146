"""Real Bitcoin full nodes on regtest, each a process of its own: btcd always, Bitcoin Core if BITCOIND names one.

Theory of operation. `contrib/btcd` builds btcd once and keeps it outside the tree. Where that cannot be done (no Go, no
network) the tests that want it are skipped with the reason, and fail if CI is set. A node has free ports of 127.0.0.1
and a directory of its own. Beside each stands a guard, a shell that kills the node when this process has ended in
whatever way, so that none outlives a test run.

All calls are synchronous and short: there is nothing on the other side that needs this process to go on.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.rpc import RpcBackend, connect_bitcoin
from p2pool.bitcoin_backend.template import BlockTemplate, TemplateTransaction, build_template

__all__ = [
    "PATIENCE_S",
    "RESERVED_SIGOPS",
    "RESERVED_WEIGHT",
    "FullNode",
    "RpcFault",
    "over_rpc",
    "running_node",
    "software",
    "wait_until",
]

ROOT: Final = Path(__file__).parents[2]
#: Seconds that a node may take to start and to stop, on the slowest of machines.
START_S: Final = 90.0
STOP_S: Final = 60.0
#: Seconds that one call may take.
CALL_S: Final = 60.0
#: Seconds after which a test gives up what must happen: other processes have to answer, on a machine of any speed.
PATIENCE_S: Final = 90.0
#: Weight units and signature operations that are kept for the coinbase.
RESERVED_WEIGHT: Final = 40_000
RESERVED_SIGOPS: Final = 400
#: Seconds for building btcd inside a test: less than after what pytest takes the test for hanging.
BUILD_S: Final = 100.0
#: Ports that are free are no promise: another program may take one before the node does.
START_TRIES: Final = 3


class RpcFault(Exception):
    """A node's error to a call.

    Arguments:
        code: of JSON-RPC.
        message: the node's words.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


# What there is to run.


def software(name: str) -> Path:
    """The binary of "btcd" or "core"; skips the test, or fails it in CI, if there must be one and is not.

    Bitcoin Core is too large to be built for a test: without BITCOIND its tests are skipped everywhere.
    """
    if name == "btcd":
        path, fault = _btcd()
        if path is None:
            reason = f"there is no btcd to mine on: {fault}"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        return path
    named = os.environ.get("BITCOIND")
    if not named:
        pytest.skip("set BITCOIND to a bitcoind (Bitcoin Core 25 or later) to run this test on it")
    found = shutil.which(named)
    if found is None:
        pytest.fail(f"BITCOIND: {named} is no program", pytrace=False)
    return Path(found)


@cache
def _btcd() -> tuple[Path | None, str]:
    """Where btcd is, or why there is none."""
    with subprocess.Popen(
        [ROOT / "contrib" / "btcd"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as build:
        try:
            told, complaint = build.communicate(timeout=BUILD_S)
        except subprocess.TimeoutExpired:
            os.killpg(build.pid, signal.SIGKILL)
            return None, f"building it takes more than {BUILD_S:.0f} s: run contrib/btcd once"
    if build.returncode != 0:
        return None, complaint.strip().rpartition("\n")[2]
    return Path(told.strip()), ""


# Nodes.


class FullNode:
    """A Bitcoin node on regtest, a process of its own. Made by `running_node`.

    Mutable fields: ``_process`` and ``_guard`` (both None while it does not run), ``_connection`` (None, or kept for
    the next call; btcd keeps none), ``rpc_port`` and ``peer_port`` (found at the first start, then they stay).
    """

    def __init__(self, name: str, binary: Path, directory: Path, options: Sequence[str]) -> None:
        """Start nothing yet.

        Arguments:
            name: "btcd" or "core".
            binary: of the node.
            directory: everything that it writes goes there.
            options: more of its command line.
        """
        self.name = name
        self.directory = directory
        self.rpc_port = self.peer_port = 0
        self._binary = binary
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._connection: http.client.HTTPConnection | None = None

    @property
    def url(self) -> str:
        """Where its RPC server listens."""
        return f"http://127.0.0.1:{self.rpc_port}"

    @property
    def cookie_file(self) -> Path | None:
        """Bitcoin Core writes one; btcd has a user and a password."""
        return self.directory / "regtest" / ".cookie" if self.name == "core" else None

    @property
    def endpoint(self) -> Endpoint:
        """How the pool is to reach it."""
        if self.cookie_file is not None:
            return Endpoint(url=self.url, cookie_file=self.cookie_file)
        return Endpoint(url=self.url, user="user", password="pass:word")

    # Its life.

    def start(self) -> None:
        """Start it and wait until it answers. Raises: AssertionError, with the end of its log."""
        assert self._process is None, "it runs"
        for tries_left in reversed(range(START_TRIES)):
            is_first = self.rpc_port == 0
            if is_first:
                self.rpc_port, self.peer_port = _free_ports(2)
            try:
                self._start_once()
            except AssertionError as error:
                # A node whose ports others know keeps them.
                if not (is_first and tries_left and "address already in use" in str(error).lower()):
                    raise
                self.rpc_port = 0
            else:
                return

    def _start_once(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,  # an interrupt from the keyboard is ours, who stops it in order
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -9 "$1"', "guard", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.rpc("getblockcount")
            except (OSError, http.client.HTTPException, RpcFault) as error:
                if self._process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)  # another process; nothing tells when it listens
                    continue
                self.kill()
                raise AssertionError(f"{self.name} did not start ({error!r}); its log ends:\n{self.log()}") from error
            return

    def stop(self) -> None:
        """Ask it to end, and wait; kill it if it does not. Harmless if it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop in {STOP_S:.0f} s; its log ends:\n{self.log()}") from None
        self.kill()

    def kill(self) -> None:
        """End it as a power cut does. Harmless if it does not run."""
        self._forget_connection()
        if self._guard is not None:
            self._guard.kill()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._guard = None

    def restart(self) -> None:
        """Stop it and start it on the same ports, with the chain that it had."""
        # btcd throws its regtest chain away at each start.
        count = self.rpc("getblockcount") if self.name == "btcd" else 0
        hashes = [self.rpc("getblockhash", height) for height in range(1, count + 1)]
        blocks = [self.rpc("getblock", block_hash, 0) for block_hash in hashes]
        self.stop()
        self.start()
        for raw in blocks:
            self.rpc("submitblock", raw)  # one may be there already: the pool repeats what had no answer
        assert self.rpc("getblockcount") >= count

    def log(self) -> str:
        """The end of what it printed."""
        with suppress(FileNotFoundError):
            return (self.directory / "output").read_text(errors="replace")[-4_000:]
        return "(nothing)"

    def _command(self) -> list[str]:
        rpc, peers = f"127.0.0.1:{self.rpc_port}", f"127.0.0.1:{self.peer_port}"
        if self.name == "btcd":
            own = [
                "--configfile=/dev/null",
                "--regtest",
                "--notls",
                "--rpcuser=user",
                "--rpcpass=pass:word",
                f"--rpclisten={rpc}",
                f"--listen={peers}",
                f"--datadir={self.directory}/data",
                f"--logdir={self.directory}/log",
                "--nodnsseed",
                "--nobanning",
                "--trickleinterval=100ms",
                # Of the 250 that it makes room for at its start: half a second less.
                "--utxocachemaxsize=8",
                "--rpcmaxclients=100",
            ]
        else:
            own = [
                "-regtest",
                f"-datadir={self.directory}",
                "-conf=/dev/null",
                "-printtoconsole=1",
                "-debuglogfile=0",
                "-server=1",
                f"-rpcport={self.rpc_port}",
                "-rpcbind=127.0.0.1",
                "-rpcallowip=127.0.0.1",
                f"-bind={peers}",
                "-listen=1",
                "-connect=0",
                "-dnsseed=0",
                "-fixedseeds=0",
                "-listenonion=0",
                "-natpmp=0",
                "-dbcache=4",
                "-maxmempool=20",
            ]
        return [str(self._binary), *own, *self._options]

    # Calls.

    def rpc(self, method: str, *params: object) -> Any:
        """Call it. Raises: RpcFault; OSError or HTTPException, it cannot be reached."""
        body = json.dumps({"jsonrpc": "1.0", "id": 0, "method": method, "params": list(params)})
        headers = {"authorization": self._authorization(), "content-type": "application/json"}
        while True:
            is_new = self._connection is None
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self.rpc_port, timeout=CALL_S)
            try:
                self._connection.request("POST", "/", body, headers)
                response = self._connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException):
                self._forget_connection()
                if is_new:
                    raise
                continue  # it was idle for too long
            if response.will_close:
                self._forget_connection()
            break
        if response.status in (401, 403):
            raise http.client.HTTPException(f"{method}: HTTP status {response.status}")
        answer = json.loads(content)
        fault = answer.get("error")
        if fault is not None:
            raise RpcFault(fault["code"], f"{method}: {fault['message']}")
        return answer["result"]

    def _authorization(self) -> str:
        cookie = b"user:pass:word" if self.cookie_file is None else self.cookie_file.read_bytes()
        return "Basic " + base64.b64encode(cookie).decode()

    def _forget_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def template(self) -> BlockTemplate:
        """A block to mine, as the node gives it. btcd gives the same for a minute, unless its tip changes."""
        told = self.rpc("getblocktemplate", {"rules": ["segwit"]})
        return build_template(
            version=told["version"],
            previous_block_hash=bytes.fromhex(told["previousblockhash"])[::-1],
            height=told["height"],
            bits=int(told["bits"], 16),
            min_time=told["mintime"],
            time=max(told["mintime"], told["curtime"]),
            coinbase_value=told["coinbasevalue"],
            transactions=[
                TemplateTransaction(
                    raw=bytes.fromhex(row["data"]),
                    txid=bytes.fromhex(row["txid"])[::-1],
                    wtxid=bytes.fromhex(row["hash"])[::-1],
                    fee=row["fee"],
                    weight=row["weight"],
                    depends=tuple(position - 1 for position in row["depends"]),
                )
                for row in told["transactions"]
            ],
        )

    def submit(self, raw: bytes) -> str | None:
        """Its answer to a block: None is good, or is not looked at any closer."""
        answer: str | None = self.rpc("submitblock", raw.hex())
        return answer

    def tip(self) -> bytes:
        """The hash of its tip, internal order."""
        return bytes.fromhex(self.rpc("getbestblockhash"))[::-1]

    def block(self, block_hash: bytes) -> bytes:
        """A block that it has."""
        return bytes.fromhex(self.rpc("getblock", block_hash[::-1].hex(), 0))

    def send(self, raw: bytes) -> None:
        """Put a transaction into its mempool. Raises: RpcFault, with its reason."""
        self.rpc("sendrawtransaction", raw.hex())

    def mempool(self) -> set[bytes]:
        """The ids (internal order) of the transactions that wait to be mined."""
        return {bytes.fromhex(txid)[::-1] for txid in self.rpc("getrawmempool")}

    def connect(self, other: FullNode) -> None:
        """Make it a peer of another node; returns when both know."""
        # Bitcoin Core looks at what was added once a minute.
        self.rpc("addnode", f"127.0.0.1:{other.peer_port}", "onetry" if self.name == "core" else "add")
        wait_until(lambda: all(node.rpc("getconnectioncount") for node in (self, other)))

    def disconnect(self, other: FullNode) -> None:
        """End what `connect` began; returns when both know."""
        address = f"127.0.0.1:{other.peer_port}"
        if self.name == "core":
            self.rpc("disconnectnode", address)
        else:
            self.rpc("addnode", address, "remove")
        wait_until(lambda: not any(node.rpc("getconnectioncount") for node in (self, other)))


@contextmanager
def running_node(name: str, directory: Path, *options: str) -> Iterator[FullNode]:
    """A node of the given software ("btcd", "core") as long as the context lasts."""
    with ExitStack() as stack:
        node = FullNode(name, software(name), directory, options)
        stack.callback(node.kill)
        node.start()
        yield node
        node.stop()


@asynccontextmanager
async def over_rpc(*endpoints: Endpoint) -> AsyncIterator[RpcBackend]:
    """The pool's backend over nodes that must be there."""
    with trio.fail_after(PATIENCE_S) as patience:
        async with connect_bitcoin(
            endpoints, network="regtest", reserved_weight=RESERVED_WEIGHT, reserved_sigops=RESERVED_SIGOPS
        ) as backend:
            patience.deadline = math.inf
            yield backend


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait for another process, which tells nothing by itself."""
    deadline = time.monotonic() + CALL_S
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {CALL_S:.0f} s"
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
