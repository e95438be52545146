"""A Bitcoin Core that answers RPC over real HTTP, with real consensus behind it and faults at will.

Theory of operation. Blocks, headers and transactions are judged by Core's own code (the embedded `KernelBackend`);
this module is what Core puts in front of it: HTTP with a password or a cookie, JSON-RPC, and each method's result in
Core's shape with Core's error codes. `test_fakecore.py` holds it to a real Bitcoin Core. Faults are attributes, and a
test sets them while the server runs.

What it does not have: other nodes, so nothing is ever downloaded; `preciousblock` checks its argument and prefers
nothing, since the embedded node cannot; the reasons for which headers are refused are fewer.

Source: src/httprpc.cpp, src/rpc/*.cpp of Bitcoin Core 31.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import h11
import trio

from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import witness_commitment_of
from p2pool.errors import BackendError
from sharechain.hasher import sha256d

T = TypeVar("T")

#: Core's threads for RPC, and calls that may wait for one of them.
THREADS: Final = 16
WORK_QUEUE: Final = 64
_SIGNET_CHALLENGE: Final = "51"
_WARNING: Final = (
    "This is a pre-release test build - use at your own risk - do not use for mining or merchant applications"
)


class RpcFault(Exception):
    """What Core throws: a JSON-RPC error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


@dataclass
class Faults:
    """What is wrong with the server, or else about it. All of it may be changed at any time.

    `warmup`: Core's words while it starts (error -28), or None. `fail`: HTTP 503 to everything. `dead`: takes
    connections and requests and answers none. `drop`: sends half of each answer and hangs up. `hang_ups`: so many
    requests are met by a closed connection, without an answer. `delay_s`: seconds by method, before the answer.
    `without`: methods that it does not know. `current_tip_unknown`: `waitfornewblock` takes only a timeout (before
    Core 30). `keep_alive`: False closes each connection after the answer (btcd). `forbidden`: HTTP 403.
    """

    warmup: str | None = None
    fail: bool = False
    dead: bool = False
    drop: bool = False
    hang_ups: int = 0
    delay_s: dict[str, float] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    current_tip_unknown: bool = False
    keep_alive: bool = True
    forbidden: bool = False


class FakeCore(Faults):
    """The server. See `open_fake_core`.

    Mutable fields: those of `Faults`; what it pretends to be (`chain`: Core's name of it, `initialblockdownload`,
    `pruned`, `headers_ahead`, `peers`, `version`, `user`, `password`); what it counted: `calls` by method, `requests`
    of HTTP, `connections` open now and `connected` in all, `idle` of those that are open, `long_polls` that wait now;
    and what `start` and `stop` set. A waiting long poll counts until it ends by itself, whether its caller is still
    there or not, as in Core, where it holds a thread.
    """

    def __init__(self, kernel: KernelBackend, nursery: trio.Nursery, cookie_file: Path | None) -> None:
        """Use `open_fake_core`."""
        super().__init__()
        self.kernel = kernel
        self.cookie_file = cookie_file
        self.chain = "regtest"
        self.initialblockdownload = False
        self.pruned = False
        self.headers_ahead = 0
        self.peers = 8
        self.version = 310000
        self.user = "pool"
        self.password = "correct horse"
        self.calls: Counter[str] = Counter()
        self.requests = 0
        self.connections = 0
        self.connected = 0
        self.long_polls = 0
        self.port = 0
        self._nursery = nursery
        self._scope: trio.CancelScope | None = None
        self._stopped = trio.Event()
        self._idle: set[trio.SocketStream] = set()
        self._cookie: str | None = None
        self._starts = 0
        self._busy = 0
        self._threads = trio.Semaphore(THREADS)
        self._methods: dict[str, tuple[Callable[..., Awaitable[Any]], int, int]] = {
            "getbestblockhash": (self._getbestblockhash, 0, 0),
            "getblock": (self._getblock, 1, 2),
            "getblockchaininfo": (self._getblockchaininfo, 0, 0),
            "getblockcount": (self._getblockcount, 0, 0),
            "getblockhash": (self._getblockhash, 1, 1),
            "getblockheader": (self._getblockheader, 1, 2),
            "getblocktemplate": (self._getblocktemplate, 1, 1),
            "getmempoolinfo": (self._getmempoolinfo, 0, 0),
            "getmininginfo": (self._getmininginfo, 0, 0),
            "getnetworkinfo": (self._getnetworkinfo, 0, 0),
            "getrpcinfo": (self._getrpcinfo, 0, 0),
            "help": (self._help, 0, 1),
            "preciousblock": (self._preciousblock, 1, 1),
            "sendrawtransaction": (self._sendrawtransaction, 1, 3),
            "submitblock": (self._submitblock, 1, 2),
            "submitheader": (self._submitheader, 1, 1),
            "waitfornewblock": (self._waitfornewblock, 0, 2),
        }

    @property
    def url(self) -> str:
        """Where it listens, without credentials."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def endpoint(self) -> Endpoint:
        """With the cookie file if there is one, else with the user and the password that are right at first."""
        if self.cookie_file is not None:
            return Endpoint(url=self.url, cookie_file=self.cookie_file)
        return Endpoint(url=self.url, user="pool", password="correct horse")

    async def start(self) -> None:
        """Listen, on the port of the last time, with a new cookie."""
        assert self._scope is None, "it runs"
        self._starts += 1
        if self.cookie_file is not None:
            self._cookie = "__cookie__:" + hashlib.sha256(b"start %d" % self._starts).hexdigest()
            self.cookie_file.write_text(self._cookie)
        await self._nursery.start(self._run)

    async def stop(self) -> None:
        """Close all connections and the port; remove the cookie file. Whoever waits gets no answer."""
        assert self._scope is not None, "it does not run"
        self._scope.cancel()
        await self._stopped.wait()
        if self.cookie_file is not None:
            self.cookie_file.unlink()

    async def close_idle(self) -> int:
        """Close the connections on which nobody asks anything, as Core does after 30 s; give their number."""
        idle = list(self._idle)
        for stream in idle:
            await stream.aclose()
        return len(idle)

    async def _run(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self._stopped = trio.Event()
        self._threads, self._busy = trio.Semaphore(THREADS), 0
        try:
            with trio.CancelScope() as self._scope:
                await trio.serve_listeners(self._serve, listeners, task_status=task_status)
        finally:
            self._scope = None
            self._stopped.set()

    # HTTP.

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        self.connections += 1
        self.connected += 1
        try:
            while True:
                self._idle.add(stream)
                read = await _read_request(stream, connection)
                self._idle.discard(stream)
                if read is None:
                    return
                request, body = read
                self.requests += 1
                if self.dead:
                    await trio.sleep_forever()
                if self.hang_ups:
                    self.hang_ups -= 1
                    return
                status, content = await self._answer(request, body)
                headers = [("Content-Length", str(len(content))), ("Content-Type", "application/json")]
                if status == 401:
                    headers.append(("WWW-Authenticate", 'Basic realm="jsonrpc"'))
                if not self.keep_alive:
                    headers.append(("Connection", "close"))
                raw = b"".join(
                    connection.send(event) or b""
                    for event in (
                        h11.Response(status_code=status, headers=headers),
                        h11.Data(data=content),
                        h11.EndOfMessage(),
                    )
                )
                if self.drop:
                    await stream.send_all(raw[: len(raw) - len(content) // 2 - 1])
                    return
                await stream.send_all(raw)
                if connection.our_state is h11.MUST_CLOSE:
                    return
                connection.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass
        finally:
            self._idle.discard(stream)
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    async def _answer(self, request: h11.Request, body: bytes) -> tuple[int, bytes]:
        if self.forbidden:
            return 403, b""
        if self.fail or self._busy >= THREADS + WORK_QUEUE:
            return 503, b"Work queue depth exceeded"
        if request.method != b"POST":
            return 405, b"JSONRPC server handles only POST requests"
        if request.target != b"/":
            return 404, b""
        credentials = [f"{self.user}:{self.password}"] + ([self._cookie] if self._cookie else [])
        header = dict(request.headers).get(b"authorization", b"")
        if header not in [b"Basic " + base64.b64encode(known.encode()) for known in credentials]:
            return 401, b""
        self._busy += 1
        try:
            async with self._threads:
                return await self._execute(body)
        finally:
            self._busy -= 1

    # JSON-RPC.

    async def _execute(self, body: bytes) -> tuple[int, bytes]:
        try:
            question = json.loads(body)
        except ValueError:
            return 500, _encode({"result": None, "error": {"code": -32700, "message": "Parse error"}, "id": None})
        if isinstance(question, list):
            return 200, _encode([(await self._reply(one))[1] for one in question])
        if not isinstance(question, dict):
            fault = {"code": -32700, "message": "Top-level object parse error"}
            return 500, _encode({"result": None, "error": fault, "id": None})
        status, reply = await self._reply(question)
        return status, _encode(reply)

    async def _reply(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number, is_new = question.get("id"), question.get("jsonrpc") == "2.0"
        try:
            result = await self._call(question)
        except RpcFault as fault:
            error = {"code": fault.code, "message": fault.message}
            if is_new:
                return 200, {"jsonrpc": "2.0", "error": error, "id": number}
            status = {-32600: 400, -32601: 404}.get(fault.code, 500)
            return status, {"result": None, "error": error, "id": number}
        if is_new:
            return 200, {"jsonrpc": "2.0", "result": result, "id": number}
        return 200, {"result": result, "error": None, "id": number}

    async def _call(self, question: dict[str, Any]) -> Any:
        method = question.get("method")
        if not isinstance(method, str):
            raise RpcFault(-32600, "Missing method" if method is None else "Method must be a string")
        params = question.get("params", [])
        if not isinstance(params, list):
            raise RpcFault(-32600, "Params must be an array or object")
        self.calls[method] += 1
        if method in self.delay_s:
            await trio.sleep(self.delay_s[method])
        if self.warmup is not None:
            raise RpcFault(-28, self.warmup)
        if method not in self._methods or method in self.without:
            raise RpcFault(-32601, "Method not found")
        ask, least, most = self._methods[method]
        if method == "waitfornewblock" and self.current_tip_unknown:
            most = 1
        if not least <= len(params) <= most:
            raise RpcFault(-1, self._usage(method))
        while params and params[-1] is None:
            params = params[:-1]
        return await ask(*params)

    def _usage(self, method: str) -> str:
        arguments = {
            "getblock": '"blockhash" ( verbosity )',
            "getblockhash": "height",
            "getblockheader": '"blockhash" ( verbose )',
            "getblocktemplate": '{"mode":"str","capabilities":["str",...],"rules":["segwit","str",...]}',
            "help": '( "command" )',
            "preciousblock": '"blockhash"',
            "sendrawtransaction": '"hexstring" ( maxfeerate maxburnamount )',
            "submitblock": '"hexdata" ( "dummy" )',
            "submitheader": '"hexdata"',
            "waitfornewblock": "( timeout )" if self.current_tip_unknown else '( timeout "current_tip" )',
        }.get(method, "")
        return f"{method} {arguments}".strip() + "\n\nSee Bitcoin Core's own help.\n"

    # The methods.

    async def _getbestblockhash(self) -> str:
        return _shown(self.kernel.tip_now().block_hash)

    async def _getblockcount(self) -> int:
        return self.kernel.tip_now().height

    async def _getblockhash(self, height: object) -> str:
        height = _typed(height, int, "height", 1)
        chain = self._chain()
        if not 0 <= height < len(chain):
            raise RpcFault(-8, "Block height out of range")
        return _shown(bytes(chain[height].block_hash))

    async def _getblockheader(self, block_hash: object, verbose: object = True) -> Any:
        wanted = _hash(block_hash, "blockhash", "hash")
        verbose = _typed(verbose, bool, "verbose", 2)
        entry = self._entry(wanted)
        raw = bytes(entry.block_header)
        if not verbose:
            return raw.hex()
        facts, chain = self.kernel.header_facts_now(wanted), self._chain()
        assert facts is not None
        on_chain = self.kernel.is_on_chain_now(wanted)
        version, bits = int.from_bytes(raw[:4], "little", signed=True), int.from_bytes(raw[72:76], "little")
        header = {
            "hash": _shown(wanted),
            "confirmations": len(chain) - facts.height if on_chain else -1,
            "height": facts.height,
            "version": version,
            "versionHex": f"{version & 0xFFFFFFFF:08x}",
            "merkleroot": _shown(raw[36:68]),
            "time": int.from_bytes(raw[68:72], "little"),
            "mediantime": facts.median_time,
            "nonce": int.from_bytes(raw[76:80], "little"),
            "bits": f"{bits:08x}",
            "target": f"{_target(bits):064x}",
            "difficulty": _difficulty(bits),
            "chainwork": _work(facts.height),
            "nTx": await self._transactions(wanted, facts.height),
        }
        if facts.height:
            header["previousblockhash"] = _shown(raw[4:36])
        if on_chain and facts.height + 1 < len(chain):
            header["nextblockhash"] = _shown(bytes(chain[facts.height + 1].block_hash))
        return header

    async def _getblock(self, block_hash: object, verbosity: object = 1) -> str:
        wanted = _hash(block_hash, "blockhash", "blockhash")
        self._entry(wanted)
        raw = await self._block(wanted)
        if raw is None:
            raise RpcFault(-1, "Block not available (not fully downloaded)")
        if verbosity not in (0, False):
            raise NotImplementedError("this fake gives blocks as hex only: verbosity 0")
        return raw.hex()

    async def _getblockchaininfo(self) -> dict[str, Any]:
        tip = self.kernel.tip_now()
        header = bytes(self._entry(tip.block_hash).block_header)
        info: dict[str, Any] = {
            "chain": self.chain,
            "blocks": tip.height,
            "headers": tip.height + self.headers_ahead,
            "bestblockhash": _shown(tip.block_hash),
            "bits": f"{tip.next_bits:08x}",
            "target": f"{_target(tip.next_bits):064x}",
            "difficulty": _difficulty(tip.next_bits),
            "time": int.from_bytes(header[68:72], "little"),
            "mediantime": tip.median_time,
            "verificationprogress": (tip.height + 1) / (tip.height + 1 + self.headers_ahead),
            "initialblockdownload": self.initialblockdownload,
            "chainwork": _work(tip.height),
            "size_on_disk": 293 + 250 * tip.height,
            "pruned": self.pruned,
        }
        if self.pruned:
            info |= {"pruneheight": 0, "automatic_pruning": True, "prune_target_size": 576716800}
        if self.chain == "signet":
            info["signet_challenge"] = _SIGNET_CHALLENGE
        return info | {"warnings": [_WARNING]}

    async def _getnetworkinfo(self) -> dict[str, Any]:
        major, minor = self.version // 10_000, self.version // 100 % 100
        names = ("ipv4", "ipv6", "onion", "i2p", "cjdns")
        return {
            "version": self.version,
            "subversion": f"/Satoshi:{major}.{minor}.0/",
            "protocolversion": 70016,
            "localservices": "0000000000000c09",
            "localservicesnames": ["NETWORK", "WITNESS", "NETWORK_LIMITED", "P2P_V2"],
            "localrelay": True,
            "timeoffset": 0,
            "networkactive": True,
            "connections": self.peers,
            "connections_in": 0,
            "connections_out": self.peers,
            "networks": [
                {
                    "name": name,
                    "limited": name in names[2:],
                    "reachable": name in names[:2],
                    "proxy": "",
                    "proxy_randomize_credentials": False,
                }
                for name in names
            ],
            "relayfee": 0.000001,
            "incrementalfee": 0.000001,
            "localaddresses": [],
            "warnings": [_WARNING],
        }

    async def _getmempoolinfo(self) -> dict[str, Any]:
        waiting = self.kernel.block_template_now().transactions
        return {
            "loaded": True,
            "size": len(waiting),
            "bytes": sum((transaction.weight + 3) // 4 for transaction in waiting),
            "usage": sum(1_000 + len(transaction.raw) for transaction in waiting),
            "total_fee": sum(transaction.fee for transaction in waiting) / 1e8,
            "maxmempool": 300_000_000,
            "mempoolminfee": 0.000001,
            "minrelaytxfee": 0.000001,
            "incrementalrelayfee": 0.000001,
            "unbroadcastcount": len(waiting),
            "permitbaremultisig": True,
            "maxdatacarriersize": 100_000,
            "limitclustercount": 64,
            "limitclustersize": 101_000,
            "optimal": True,
        }

    async def _getmininginfo(self) -> dict[str, Any]:
        tip = self.kernel.tip_now()
        demand = {
            "bits": f"{tip.next_bits:08x}",
            "difficulty": _difficulty(tip.next_bits),
            "target": f"{_target(tip.next_bits):064x}",
        }
        info: dict[str, Any] = {
            "blocks": tip.height,
            **demand,
            "networkhashps": 0.0,
            "pooledtx": len(self.kernel.mempool_txids()),
            "blockmintxfee": 0.00000001,
            "chain": self.chain,
            "next": {"height": tip.height + 1, **demand},
        }
        if self.calls["getblocktemplate"]:
            info |= {"currentblockweight": 8_000, "currentblocktx": 0}
        if self.chain == "signet":
            info["signet_challenge"] = _SIGNET_CHALLENGE
        return info | {"warnings": [_WARNING]}

    async def _getblocktemplate(self, options: object) -> Any:
        options = _typed(options, dict, "template_request", 1)
        if options.get("mode", "template") != "template":
            raise RpcFault(-8, "Invalid mode")
        if self.chain == "main" and not self.peers:
            raise RpcFault(-9, "Bitcoin Core is not connected!")
        if self.chain == "main" and self.initialblockdownload:
            raise RpcFault(-10, "Bitcoin Core is in initial sync and waiting for blocks...")
        watched = options.get("longpollid")
        if watched is not None:
            await self._wait(_hash(watched[:64], "longpollid", "longpollid"), math.inf)
        rules = options.get("rules", [])
        if self.chain == "signet" and "signet" not in rules:
            raise RpcFault(
                -8,
                'getblocktemplate must be called with the signet rule set (call with {"rules": ["segwit", "signet"]})',
            )
        if "segwit" not in rules:
            raise RpcFault(
                -8, 'getblocktemplate must be called with the segwit rule set (call with {"rules": ["segwit"]})'
            )
        template = self.kernel.block_template_now()
        commitment = witness_commitment_of([transaction.wtxid for transaction in template.transactions])
        result: dict[str, Any] = {
            "capabilities": ["proposal"],
            "version": template.version,
            "rules": ["csv", "!segwit", "taproot", *(["!signet"] if self.chain == "signet" else [])],
            "vbavailable": {},
            "vbrequired": 0,
            "previousblockhash": _shown(template.previous_block_hash),
            "transactions": [
                {
                    "data": transaction.raw.hex(),
                    "txid": _shown(transaction.txid),
                    "hash": _shown(transaction.wtxid),
                    "depends": [1 + place for place in transaction.depends],
                    "fee": transaction.fee,
                    "sigops": transaction.sigops or 0,
                    "weight": transaction.weight,
                }
                for transaction in template.transactions
            ],
            "coinbaseaux": {},
            "coinbasevalue": template.coinbase_value,
            "longpollid": _shown(template.previous_block_hash) + str(len(template.transactions)),
            "target": f"{_target(template.bits):064x}",
            "mintime": template.min_time,
            "mutable": ["time", "transactions", "prevblock"],
            "noncerange": "00000000ffffffff",
            "sigoplimit": 80_000,
            "sizelimit": 4_000_000,
            "weightlimit": 4_000_000,
            "curtime": template.time,
            "bits": f"{template.bits:08x}",
            "height": template.height,
        }
        if self.chain == "signet":
            result["signet_challenge"] = _SIGNET_CHALLENGE
        return result | {"default_witness_commitment": "6a24aa21a9ed" + commitment.hex()}

    async def _submitblock(self, hexdata: object, _dummy: object = None) -> str | None:
        raw = _bytes(_typed(hexdata, str, "hexdata", 1))
        verdict = await self.kernel.submit_block(raw) if raw is not None else None
        if verdict is None or verdict.reason == "decode-failed":
            raise RpcFault(-22, "Block decode failed")
        return None if verdict.accepted else verdict.reason

    async def _submitheader(self, hexdata: object) -> None:
        raw = _bytes(_typed(hexdata, str, "hexdata", 1))
        if raw is None or len(raw) < 80:
            raise RpcFault(-22, "Block header decode failed")
        raw = raw[:80]
        if self.kernel._entry_of(raw[4:36]) is None:
            raise RpcFault(-25, f"Must submit previous header ({_shown(raw[4:36])}) first")
        if int.from_bytes(sha256d(raw), "little") > _target(self.kernel.tip_now().next_bits):
            raise RpcFault(-25, "high-hash")
        pbk = self.kernel._pbk
        with self.kernel._library():
            try:
                state = self.kernel._manager.process_block_header(pbk.BlockHeader(raw))
            except pbk.ProcessBlockHeaderException:
                raise RpcFault(-25, "bad-header") from None
        if state.validation_mode != pbk.ValidationMode.VALID:
            raise RpcFault(-25, str(state.block_validation_result.name).lower().replace("_", "-"))

    async def _preciousblock(self, block_hash: object) -> None:
        self._entry(_hash(block_hash, "blockhash", "blockhash"))

    async def _waitfornewblock(self, timeout_ms: object = 0, current_tip: object = None) -> dict[str, Any]:
        timeout_ms = _typed(timeout_ms, int, "timeout", 1)
        if timeout_ms < 0:
            raise RpcFault(-1, "Negative timeout")
        known = self.kernel.tip_now().block_hash
        if current_tip is not None:
            known = _hash(current_tip, "current_tip", "current_tip", 2)
        await self._wait(known, timeout_ms / 1_000 or math.inf)
        tip = self.kernel.tip_now()
        return {"hash": _shown(tip.block_hash), "height": tip.height}

    async def _wait(self, known: bytes, limit_s: float) -> None:
        self.long_polls += 1
        try:
            await self.kernel.wait_for_tip(known, limit_s)
        finally:
            self.long_polls -= 1

    async def _sendrawtransaction(self, hexstring: object, _rate: object = None, _burn: object = None) -> str:
        raw = _bytes(_typed(hexstring, str, "hexstring", 1))
        known = set(self.kernel.mempool_txids())
        try:
            if raw is None:
                raise BackendError("decode-failed")
            self.kernel.add_transaction(raw)
        except BackendError as error:
            reason = str(error).partition(":")[0]
            if reason == "decode-failed":
                raise RpcFault(-22, "TX decode failed. Make sure the tx has at least one input.") from None
            if reason != "txn-already-in-mempool":
                raise RpcFault(-25 if reason == "bad-txns-inputs-missingorspent" else -26, reason) from None
            assert raw is not None
            return next(
                _shown(transaction.txid)
                for transaction in self.kernel.block_template_now().transactions
                if transaction.raw == raw
            )
        (txid,) = set(self.kernel.mempool_txids()) - known
        return _shown(txid)

    async def _getrpcinfo(self) -> dict[str, Any]:
        return {"active_commands": [{"method": "getrpcinfo", "duration": 1}], "logpath": "/nowhere/debug.log"}

    async def _help(self, command: object = "") -> str:
        command = _typed(command, str, "command", 1)
        known = sorted(self._methods.keys() - self.without)
        if not command:
            return "\n".join(self._usage(method).partition("\n")[0] for method in known)
        return self._usage(command).strip() if command in known else f"help: unknown command: {command}"

    # The embedded node.

    def _chain(self) -> Any:
        return self.kernel._manager.get_active_chain().block_tree_entries

    def _entry(self, block_hash: bytes) -> Any:
        entry = self.kernel._entry_of(block_hash)
        if entry is None:
            raise RpcFault(-5, "Block not found")
        return entry

    async def _block(self, block_hash: bytes) -> bytes | None:
        with self.kernel._library():
            try:
                return self.kernel._read_block(self._entry(block_hash))
            except (BackendError, RuntimeError):  # only its header is known
                return None

    async def _transactions(self, block_hash: bytes, height: int) -> int:
        raw = await self._block(block_hash) if height else b""
        if raw is None:
            return 0
        width = {0xFD: 2, 0xFE: 4}.get(raw[80], 0) if raw else 0
        return int.from_bytes(raw[81 : 81 + width], "little") if width else raw[80] if raw else 1


@asynccontextmanager
async def open_fake_core(kernel: KernelBackend, *, cookie_file: Path | None = None) -> AsyncIterator[FakeCore]:
    """Run a server on a port of its own, in a nursery of its own.

    Arguments:
        kernel: judges; stays open at the end.
        cookie_file: written at each start; without one, only a user and a password are taken.
    """
    async with trio.open_nursery() as nursery:
        core = FakeCore(kernel, nursery, cookie_file)
        await core.start()
        try:
            yield core
        finally:
            nursery.cancel_scope.cancel()


async def _read_request(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes] | None:
    request, parts = None, []
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65_536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, b"".join(parts)
        else:  # closed
            return None


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _shown(block_hash: bytes) -> str:
    return block_hash[::-1].hex()


def _bytes(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _typed(value: object, kind: type[T], name: str, position: int) -> T:
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {bool: "bool", int: "number", float: "number", str: "string", dict: "object", list: "array"}
    got, expected = names.get(type(value), "null"), names[kind]
    text = json.dumps(
        {f"Position {position} ({name})": f"JSON value of type {got} is not of expected type {expected}"}, indent=4
    )
    raise RpcFault(-3, f"Wrong type passed:\n{text}")


def _hash(value: object, argument: str, name: str, position: int = 1) -> bytes:
    text = _typed(value, str, argument, position)
    if len(text) != 64:
        raise RpcFault(-8, f"{name} must be of length 64 (not {len(text)}, for '{text}')")
    raw = _bytes(text)
    if raw is None:
        raise RpcFault(-8, f"{name} must be hexadecimal string (not '{text}')")
    return raw[::-1]


def _target(bits: int) -> int:
    return (bits & 0x7FFFFF) << 8 * ((bits >> 24) - 3)


def _difficulty(bits: int) -> float:
    return float(f"{_target(0x1D00FFFF) / _target(bits):.16g}")  # as many digits as Core writes


def _work(height: int) -> str:
    return f"{2 * (height + 1):064x}"  # on regtest each block needs two hashes
