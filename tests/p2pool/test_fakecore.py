"""The fake Bitcoin Core answers as the real one does: the same questions to both, where there is a real one.

`BITCOIND=/path/to/bitcoind pytest tests/p2pool/test_fakecore.py` compares shapes, error codes and words.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pool.bitcoin_backend.jsonrpc import Endpoint, RpcClient
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, build_template
from p2pool.errors import BackendError, BackendRefusal
from sharechain.hasher import sha256d
from tests.p2pool.fakecore import THREADS, FakeCore, open_fake_core
from tests.p2pool.spending import Spent, p2wpkh_script, spend_p2wpkh, txid_of, unsigned
from tests.p2pool.test_kernel import KEY, build_block, mine

BITCOIND = os.environ.get("BITCOIND", "")
RULES = {"rules": ["segwit"]}
UNKNOWN = "ab" * 32


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[KernelBackend]:
    opened = KernelBackend.open(tmp_path / "kernel")
    yield opened
    opened.close()


@asynccontextmanager
async def asking(endpoint: Endpoint) -> AsyncIterator[RpcClient]:
    client = RpcClient(endpoint)
    try:
        yield client
    finally:
        await client.aclose()


def template_of(result: dict[str, Any]) -> BlockTemplate:
    """What a template without transactions says."""
    return build_template(
        version=result["version"],
        previous_block_hash=bytes.fromhex(result["previousblockhash"])[::-1],
        height=result["height"],
        bits=int(result["bits"], 16),
        min_time=result["mintime"],
        time=result["curtime"],
        coinbase_value=result["coinbasevalue"],
        transactions=[],
    )


def hash_of(raw: bytes) -> str:
    return sha256d(raw[:80])[::-1].hex()


def shape(value: object) -> object:
    """A result without its values."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    if value is None or isinstance(value, bool):
        return value if value is None else "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


async def interview(client: RpcClient) -> dict[str, object]:
    """Ask a node with an empty regtest chain everything; give what must not depend on which node it is."""
    said: dict[str, object] = {}

    async def ask(what: str, method: str, *params: object) -> Any:
        try:
            result = await client.call(method, *params)
        except BackendRefusal as refusal:
            words = str(refusal).partition(f": {method}: ")[2]
            said[what] = (
                refusal.code,
                words.partition("\n")[0].partition(" See Bitcoin")[0] if refusal.code != -1 else "",
            )
            return None
        said[what] = shape(result)
        return result

    # An empty chain.
    genesis = await ask("genesis", "getblockhash", 0)
    said["genesis itself"] = [genesis, await client.call("getblockheader", genesis, False)]
    for method in ("getblockchaininfo", "getnetworkinfo", "getmempoolinfo", "getmininginfo", "getblockcount"):
        await ask(f"{method} at first", method)
    said["genesis header"] = await client.call("getblockheader", genesis)
    await ask("genesis block", "getblock", genesis, 0)
    await ask("nothing to make a template of", "getblocktemplate")
    await ask("no rules", "getblocktemplate", {})
    await ask("wrong rules", "getblocktemplate", {"rules": []})
    await ask("wrong mode", "getblocktemplate", {"mode": "x", "rules": ["segwit"]})

    # Blocks: two on the chain, one beside it, one of which there is only a header.
    template = template_of(await ask("template", "getblocktemplate", RULES))
    first, beside, bare = (build_block(template, extra=extra) for extra in (b"", b"beside", b"bare"))
    said["accepted"] = await client.call("submitblock", first.hex())
    said["accepted again"] = await client.call("submitblock", first.hex())
    said["beside"] = await client.call("submitblock", beside.hex())
    said["beside again"] = await client.call("submitblock", beside.hex())
    said["header"] = await client.call("submitheader", bare[:80].hex())
    said["header again"] = await client.call("submitheader", bare[:80].hex())
    second = build_block(template_of(await client.call("getblocktemplate", RULES)))
    said["second"] = await client.call("submitblock", second.hex(), "ignored")
    said["tip"] = await client.call("getbestblockhash") == hash_of(second)

    # Blocks that are none.
    next_template = template_of(await client.call("getblocktemplate", RULES))
    greedy = build_block(replace(next_template, coinbase_value=next_template.coinbase_value + 1))
    orphan = build_block(replace(next_template, previous_block_hash=bytes(32)))
    said["greedy"] = await client.call("submitblock", greedy.hex())
    said["early"] = await client.call("submitblock", build_block(replace(next_template, time=1)).hex())
    said["orphan"] = await client.call("submitblock", orphan.hex())
    await ask("orphan header", "submitheader", orphan[:80].hex())
    for name, text in (("no hex", "xyz"), ("no block", "00" * 81), ("nothing", "")):
        await ask(f"block: {name}", "submitblock", text)
        await ask(f"transaction: {name}", "sendrawtransaction", text)
    for name, text in (("no hex", "xyz"), ("short", "00" * 79)):
        await ask(f"header: {name}", "submitheader", text)
    nowhere = unsigned([(bytes([7]) * 32, 0, 1_000)], [(900, p2wpkh_script(KEY))])
    await ask("transaction: of coins that are not there", "sendrawtransaction", nowhere.hex())

    # Headers and blocks by hash.
    for name, raw in (("first", first), ("second", second), ("beside", beside), ("bare", bare), ("greedy", greedy)):
        header = await ask(f"header of {name}", "getblockheader", hash_of(raw))
        if header is not None:
            said[f"place of {name}"] = [
                header[key] for key in ("confirmations", "height", "nTx", "chainwork", "difficulty")
            ]
        await ask(f"raw header of {name}", "getblockheader", hash_of(raw), False)
        await ask(f"block of {name}", "getblock", hash_of(raw), 0)
        await ask(f"precious: {name}", "preciousblock", hash_of(raw)) if name != "beside" else None
    for method in ("getblockheader", "getblock", "preciousblock"):
        await ask(f"{method}: unknown", method, UNKNOWN)
        await ask(f"{method}: short", method, "abc")
        await ask(f"{method}: no hex", method, "zz" * 32)
        await ask(f"{method}: a number", method, 7)
        await ask(f"{method}: nothing", method)
    for height in (-1, 2, 3, "1"):
        await ask(f"hash at {height}", "getblockhash", height)

    # Waiting.
    await ask("wait for a millisecond", "waitfornewblock", 1)
    await ask("wait, having missed one", "waitfornewblock", 0, hash_of(first))
    await ask("wait for a negative time", "waitfornewblock", -1)
    await ask("wait with too much", "waitfornewblock", 1, UNKNOWN, 3)
    await ask("wait for no hash", "waitfornewblock", 1, "abc")

    # The rest.
    for method in ("getblockchaininfo", "getmininginfo", "getrpcinfo", "nonsense"):
        await ask(method, method)
    said["help"] = await client.call("help", "nonsense")
    said["help for one"] = (await client.call("help", "waitfornewblock")).partition("\n")[0]
    batch = await client.batch([("getblockcount", ()), ("getblockhash", (9,)), ("nonsense", ())])
    said["batch"] = [one.code if isinstance(one, BackendRefusal) else one for one in batch]
    return said


async def interview_about_transactions(client: RpcClient) -> dict[str, object]:
    """Mine coins until they may be spent, spend them in two steps; give what the node says of it."""
    said: dict[str, object] = {}
    script = p2wpkh_script(KEY)
    coins: list[Spent] = []
    for _ in range(101):
        template = template_of(await client.call("getblocktemplate", RULES))
        raw = build_block(template, script=script)
        coins.append((sha256d(raw[81:]), 0, template.coinbase_value))
        assert await client.call("submitblock", raw.hex()) is None
    value = coins[0][2]
    parent = spend_p2wpkh(KEY, coins[:1], [(value - 1_000, script)])
    child = spend_p2wpkh(KEY, [(txid_of(parent), 0, value - 1_000)], [(value - 3_000, script)])
    unripe = spend_p2wpkh(KEY, coins[-1:], [(value - 1_000, script)])
    greedy = spend_p2wpkh(KEY, [(txid_of(parent), 0, value - 1_000)], [(value, script)])
    for name, transaction in {"parent": parent, "child": child, "again": parent, "unripe": unripe}.items():
        (answer,) = await client.batch([("sendrawtransaction", (transaction.hex(),))])
        if isinstance(answer, BackendRefusal):
            said[name] = (answer.code, str(answer).partition(": sendrawtransaction: ")[2].partition(",")[0][:30])
        else:
            said[name] = answer == txid_of(transaction)[::-1].hex()
    (answer,) = await client.batch([("sendrawtransaction", (greedy.hex(),))])
    said["greedy"] = answer.code
    template_result = await client.call("getblocktemplate", RULES)
    for entry in template_result["transactions"]:
        assert isinstance(entry.pop("sigops"), int)  # the embedded node does not count them
    said["template"] = [
        template_result[key]
        for key in ("transactions", "coinbasevalue", "default_witness_commitment", "version", "rules", "mutable")
    ]
    said["mempool"] = [(await client.call("getmempoolinfo"))[key] for key in ("size", "bytes", "total_fee")]
    return said


@pytest.mark.slow
async def test_the_fake_has_consensus(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, asking(core.endpoint) as client:
        said = await interview(client)
    expected = {
        "accepted": None,
        "accepted again": "duplicate",
        "beside": "inconclusive",
        "beside again": "duplicate",
        "second": None,
        "tip": True,
        "greedy": "bad-cb-amount",
        "early": "time-too-old",
        "orphan": "prev-blk-not-found",
        "block of bare": (-1, ""),
        "getblockheader: unknown": (-5, "Block not found (error -5)"),
        "hash at 3": (-8, "Block height out of range (error -8)"),
        "batch": [2, -8, -32601],
    }
    assert {what: said[what] for what in expected} == expected
    places = [said[f"place of {name}"][:2] for name in ("first", "second", "beside", "bare")]  # type: ignore[index]
    assert places == [[2, 1], [1, 2], [-1, 1], [-1, 1]]


@pytest.mark.slow
@pytest.mark.skipif(not BITCOIND, reason="BITCOIND does not name a bitcoind to compare with")
async def test_the_fake_answers_as_bitcoin_core_does(kernel: KernelBackend, tmp_path: Path) -> None:
    async with open_fake_core(kernel) as core, asking(core.endpoint) as client:
        fake = await interview(client) | await interview_about_transactions(client)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    options = ["-regtest", f"-datadir={tmp_path}", f"-rpcport={port}", "-listen=0", "-connect=0", "-printtoconsole=0"]
    async with trio.open_nursery() as nursery:
        command = partial(trio.run_process, [BITCOIND, *options], check=False, stdout=subprocess.DEVNULL)
        process = await nursery.start(command)
        try:
            cookie_file = tmp_path / "regtest" / ".cookie"
            async with asking(Endpoint(url=f"http://127.0.0.1:{port}", cookie_file=cookie_file)) as client:
                with trio.fail_after(60):
                    await _until_it_answers(client)
                real = await interview(client) | await interview_about_transactions(client)
        finally:
            process.terminate()
    differences = [
        f"{what}: the fake says {fake.get(what)!r}, Bitcoin Core {real.get(what)!r}"
        for what in fake | real
        if fake.get(what) != real.get(what)
    ]
    assert not differences, "\n".join(differences)


async def _until_it_answers(client: RpcClient) -> None:
    while True:
        try:
            await client.call("getblockcount")
        except BackendError:
            await trio.sleep(0.05)
        else:
            return


async def _until(core: FakeCore, long_polls: int) -> None:
    with trio.fail_after(10):
        while core.long_polls != long_polls:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_waiting_ends_with_a_block(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, asking(core.endpoint) as client, trio.open_nursery() as nursery:
        answers: list[dict[str, Any]] = []

        async def wait() -> None:
            answers.append(await client.call("waitfornewblock", 60_000, await client.call("getbestblockhash")))

        nursery.start_soon(wait)
        await _until(core, 1)
        block = build_block(kernel.block_template_now())
        await client.call("submitblock", block.hex())
        await _until(core, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert answers == [{"hash": hash_of(block), "height": 1}]


@pytest.mark.slow
async def test_long_polls_that_were_abandoned_use_up_all_threads(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core:
        for count in range(1, THREADS + 1):
            async with asking(core.endpoint) as client:
                with pytest.raises(BackendError, match="no answer"):
                    await client.call("waitfornewblock", 60_000, timeout_s=0.02)
            await _until(core, count)
        async with asking(core.endpoint) as client:
            with pytest.raises(BackendError, match="no answer"):
                await client.call("getblockcount", timeout_s=0.05)
            assert core.long_polls == THREADS


async def test_an_older_core_waits_without_being_told_for_what(kernel: KernelBackend) -> None:
    mine(kernel, 1)
    async with open_fake_core(kernel) as core, asking(core.endpoint) as client:
        core.current_tip_unknown = True
        assert (await client.call("waitfornewblock", 1))["height"] == 1
        assert "current_tip" not in await client.call("help", "waitfornewblock")
        with pytest.raises(BackendRefusal) as caught:
            await client.call("waitfornewblock", 1, UNKNOWN)
        assert caught.value.code == -1
        core.without = {"waitfornewblock"}
        with pytest.raises(BackendRefusal) as caught:
            await client.call("waitfornewblock", 1)
        assert caught.value.code == -32601


async def test_other_networks_want_what_they_want_in_core(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core, asking(core.endpoint) as client:

        async def code() -> int:
            try:
                await client.call("getblocktemplate", RULES)
            except BackendRefusal as refusal:
                return refusal.code
            return 0

        core.chain = "signet"
        assert await code() == -8
        assert "signet_challenge" in await client.call("getblocktemplate", {"rules": ["segwit", "signet"]})
        core.chain = "main"
        assert await code() == 0
        core.initialblockdownload = True
        assert await code() == -10
        core.peers = 0
        assert await code() == -9
        core.headers_ahead, core.pruned = 5, True
        info = await client.call("getblockchaininfo")
        seen = [info[key] for key in ("chain", "blocks", "headers", "initialblockdownload", "pruned")]
        assert seen == ["main", 0, 5, True, True]


async def test_the_newer_json_rpc_gives_errors_with_http_200(kernel: KernelBackend) -> None:
    async with open_fake_core(kernel) as core:
        old = await core._execute(b'{"id": 1, "method": "nonsense"}')
        new = await core._execute(b'{"jsonrpc": "2.0", "id": 1, "method": "nonsense"}')
    assert old == (404, b'{"result":null,"error":{"code":-32601,"message":"Method not found"},"id":1}\n')
    assert new == (200, b'{"jsonrpc":"2.0","error":{"code":-32601,"message":"Method not found"},"id":1}\n')
