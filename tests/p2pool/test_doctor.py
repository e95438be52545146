"""The doctor: what is well is said to be, what is not is named with what to do, and nothing is changed by looking."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pool.bitcoin_backend.headers import CHAIN_RULES
from p2pool.bitcoin_backend.jsonrpc import Endpoint
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.selection import coinbase_reserve, read_template
from p2pool.cli import main
from p2pool.config import Config, load_config
from p2pool.database import DataDirectory
from p2pool.doctor import CHECKS, Subject, diagnose, option_sources
from p2pool.doctor_bitcoin import NodeAnswers, ask_nodes, judge_nodes, judge_zmq
from p2pool.finding import Finding, Level
from sharechain import hasher
from sharechain.params import NETWORKS
from tests.p2pool.fakecore import FakeCore, open_fake_core
from tests.p2pool.network import address
from tests.p2pool.test_selection import entry_of

REGTEST, MAINNET, SIGNET = NETWORKS["regtest"], NETWORKS["mainnet"], NETWORKS["signet"]
NOW = 1_700_000_000.0
MAINNET_ADDRESS = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"


def configured(data_dir: Path, **flags: Any) -> Config:
    given = {"network": "regtest", "data_dir": str(data_dir), "stratum_port": "0", "p2p_port": "0"} | flags
    return load_config(given, {}, None)


def look(name: str, config: Config, **subject: Any) -> list[Finding]:
    """What one check of this machine finds."""
    return list(CHECKS[name](Subject(config=config, **subject)))


def one(findings: Sequence[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def assert_is(finding: Finding, level: Level, *texts: str) -> None:
    assert finding.level == level, finding
    for text in texts:
        assert text in f"{finding.found} -> {finding.advice}", finding


def levels(findings: Sequence[Finding]) -> dict[str, str]:
    """What is not well, by check."""
    return {finding.check: finding.level for finding in findings if finding.level != "ok"}


# Bitcoin nodes.


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[KernelBackend]:
    opened = KernelBackend.open(tmp_path / "kernel", clock=lambda: NOW)
    yield opened
    opened.close()


@asynccontextmanager
async def fake(kernel: KernelBackend, **options: Any) -> AsyncIterator[FakeCore]:
    async with open_fake_core(kernel) as core:
        for name, value in options.items():
            assert hasattr(core, name)
            setattr(core, name, value)
        yield core


async def ask(
    *endpoints: Endpoint, now: float = NOW, network: str = "regtest", limit_s: float = 20
) -> list[NodeAnswers]:
    return await ask_nodes(endpoints, network=network, limit_s=limit_s, clock=lambda: now)


def with_result(node: NodeAnswers, method: str, result: object) -> NodeAnswers:
    return replace(node, answers=dict(node.answers) | {method: replace(node[method], result=result)})


def as_on(node: NodeAnswers, network: str, **info: object) -> NodeAnswers:
    """The answers as a node on another network gives them: the fake is always on regtest."""
    genesis = CHAIN_RULES[network].genesis_hash[::-1].hex()
    info = node["getblockchaininfo"].table | {"time": int(NOW)} | info
    return with_result(with_result(node, "getblockhash", genesis), "getblockchaininfo", info)


async def test_a_good_node_has_nothing_to_complain_of(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert levels(findings) == {}
    assert_is(one(findings, "bitcoin node"), "ok", "Bitcoin Core 31.0", f"127.0.0.1:{core.port}")
    assert_is(one(findings, "bitcoin template"), "ok", "block 1", "0 transactions")
    assert_is(one(findings, "new blocks"), "ok", "at once")
    assert {finding.check for finding in findings} == {
        *("bitcoin node", "bitcoin network", "bitcoin sync", "bitcoin peers", "bitcoin blocks", "bitcoin template"),
        *("coinbase room", "new blocks", "submitblock", "clock"),
    }


async def test_asking_changes_nothing_and_leaves_no_question_behind(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        before = kernel.tip_now()
        await ask(core.endpoint)
        assert kernel.tip_now() == before
        assert core.long_polls == 0
        assert set(core.calls) <= {
            *("getblockchaininfo", "getblockhash", "getnetworkinfo", "getblocktemplate", "waitfornewblock"),
            *("submitblock", "preciousblock", "getzmqnotifications"),
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"password": "another"}, ("does not accept the password of user 'pool'", "rpcauth")),
        ({"warmup": "Loading block index"}, ("is starting: Loading block index", "wait")),
        ({"fail": True}, ("too busy", "rpcworkqueue")),
        ({"forbidden": True}, ("takes no calls from this machine", "rpcallowip")),
        ({"drop": True}, ("broke",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_a_node_that_does_not_answer_is_one_problem_with_its_reason(
    kernel: KernelBackend, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    async with fake(kernel, **options) as core:
        (finding,) = judge_nodes(await ask(core.endpoint), REGTEST)
    assert_is(finding, "problem", *words)
    assert "correct horse" not in finding.found + finding.advice


async def test_a_node_that_is_stopped_and_one_that_hangs(kernel: KernelBackend) -> None:
    async with fake(kernel, dead=True) as core:
        (finding,) = judge_nodes(await ask(core.endpoint, limit_s=0.05), REGTEST)
        assert_is(finding, "problem", "no answer in 0.05 s")
        await core.stop()
        (finding,) = judge_nodes(await ask(core.endpoint), REGTEST)
        assert_is(finding, "problem", "cannot connect", "server=1")


async def test_one_of_two_nodes_that_is_away_is_a_warning_and_both_are_named(kernel: KernelBackend) -> None:
    async with fake(kernel) as core, fake(kernel) as gone:
        await gone.stop()
        findings = judge_nodes(await ask(gone.endpoint, core.endpoint), REGTEST)
    assert levels(findings) == {"bitcoin node": "warning"}
    assert findings[0].found.startswith(f"127.0.0.1:{gone.port}: ")
    assert all(finding.found.startswith(f"127.0.0.1:{core.port}: ") for finding in findings[1:])


async def test_a_password_that_is_wrong_is_a_problem_even_beside_a_good_node(kernel: KernelBackend) -> None:
    async with fake(kernel) as core, fake(kernel, password="another") as closed:
        findings = judge_nodes(await ask(core.endpoint, closed.endpoint), REGTEST)
    assert levels(findings) == {"bitcoin node": "problem"}


async def test_a_node_of_another_network_is_told_and_nothing_else_of_it(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        findings = judge_nodes(await ask(core.endpoint), MAINNET)
    assert [finding.check for finding in findings] == ["bitcoin node", "bitcoin network"]
    assert_is(findings[1], "problem", "on regtest, wanted is mainnet", "--network")


async def test_an_old_version_is_a_problem(kernel: KernelBackend) -> None:
    async with fake(kernel, version=240100) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert levels(findings) == {"bitcoin node": "problem"}
    assert_is(one(findings, "bitcoin node"), "problem", "Bitcoin Core 24.1", "25 or newer")


async def test_a_node_without_getnetworkinfo_is_for_tests(kernel: KernelBackend) -> None:
    async with fake(kernel, without={"getnetworkinfo", "preciousblock", "waitfornewblock"}) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert levels(findings) == dict.fromkeys(("bitcoin node", "new blocks", "submitblock"), "warning")
    assert_is(one(findings, "bitcoin node"), "warning", "btcd", "for tests")
    assert_is(one(findings, "new blocks"), "warning", "quarter of a second")


async def test_waiting_as_before_core_30_is_well_enough(kernel: KernelBackend) -> None:
    async with fake(kernel, current_tip_unknown=True, version=280000) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert levels(findings) == {}
    assert_is(one(findings, "new blocks"), "ok", "half a second late")


async def test_a_node_that_takes_no_blocks_is_a_problem(kernel: KernelBackend) -> None:
    async with fake(kernel, without={"submitblock"}) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert levels(findings) == {"submitblock": "problem"}


async def test_initial_block_download_is_a_problem_where_it_ends(kernel: KernelBackend) -> None:
    async with fake(kernel, initialblockdownload=True, headers_ahead=1_000, chain="main") as core:
        (node,) = await ask(core.endpoint)
    findings = judge_nodes([as_on(node, "mainnet")], MAINNET)
    assert levels(findings) == dict.fromkeys(("bitcoin sync", "bitcoin template"), "problem")
    assert_is(one(findings, "bitcoin sync"), "problem", "block 0 of 1,000", "initial block download")
    assert_is(one(findings, "bitcoin template"), "problem", "initial sync", "error -10", "then it gives work")


async def test_a_node_on_regtest_is_never_through_with_it_and_can_be_used(kernel: KernelBackend) -> None:
    async with fake(kernel, initialblockdownload=True) as core:
        assert levels(judge_nodes(await ask(core.endpoint), REGTEST)) == {}


async def test_blocks_that_lag_or_are_old_are_a_warning(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    assert levels(judge_nodes([as_on(node, "mainnet")], MAINNET)) == {}
    behind = as_on(node, "mainnet", headers=20)
    assert_is(one(judge_nodes([behind], MAINNET), "bitcoin sync"), "warning", "block 0 of 20", "catching up")
    silent = as_on(node, "mainnet", time=int(NOW) - 3 * 3600)
    assert_is(one(judge_nodes([silent], MAINNET), "bitcoin sync"), "warning", "3 h old")


async def test_a_node_without_connections_is_a_problem_but_on_regtest(kernel: KernelBackend) -> None:
    async with fake(kernel, peers=0) as core:
        (node,) = await ask(core.endpoint)
    assert levels(judge_nodes([node], REGTEST)) == {}
    assert levels(judge_nodes([as_on(node, "mainnet")], MAINNET)) == {"bitcoin peers": "problem"}


async def test_a_pruned_node_is_fine_and_said_to_be_one(kernel: KernelBackend) -> None:
    async with fake(kernel, pruned=True) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
    assert_is(one(findings, "bitcoin blocks"), "ok", "pruned", "audited")


async def test_a_signet_says_whether_we_may_make_blocks(kernel: KernelBackend) -> None:
    async with fake(kernel, chain="signet") as core:
        (node,) = await ask(core.endpoint, network="signet")
    ours = as_on(node, "signet")
    assert_is(one(judge_nodes([ours], SIGNET), "bitcoin network"), "ok", "everybody")
    theirs = as_on(
        node, "signet", signet_challenge="512103ad5e0edad18cb1f0fc0d28a3d4f1f3e445640337489abb10404f2d1e086be430"
    )
    assert levels(judge_nodes([theirs], SIGNET)) == {"bitcoin network": "warning"}


@pytest.mark.parametrize(
    ("version", "setting"), [(310000, "blockreservedweight=65000"), (280000, "blockmaxweight=3939000")]
)
async def test_too_little_room_for_the_coinbase_says_what_is_lost_and_the_setting(
    kernel: KernelBackend, version: int, setting: str
) -> None:
    async with fake(kernel, version=version) as core:
        (node,) = await ask(core.endpoint)
    rows = [entry_of(bytes([number]) * 250, bytes([number]) * 250, fee=1_000 + number) for number in range(40)]
    weight, sigops = coinbase_reserve(max(REGTEST.payout_classes))
    template = node["getblocktemplate"].table | {"transactions": rows, "coinbasevalue": 50 * 10**8}
    del template["default_witness_commitment"]
    tight = template | {"weightlimit": 40 * 1_000 + 8_000 + weight // 2}
    findings = judge_nodes([with_result(node, "getblocktemplate", tight)], REGTEST)
    assert levels(findings) == {"coinbase room": "warning"}
    ours = read_template(tight, network="regtest", reserved_weight=weight, reserved_sigops=sigops)
    dropped = 40 - len(ours.transactions)
    assert 0 < dropped < 40
    lost = sum(sorted(row["fee"] for row in rows)[:dropped])  # all of one weight: the cheapest go
    finding = one(findings, "coinbase room")
    assert_is(
        finding, "warning", f"{dropped} transactions", f"{dropped * 1000:,} weight units", f"{lost:,} sat", setting
    )
    roomy = template | {"weightlimit": 40 * 1_000 + 65_000}
    assert levels(judge_nodes([with_result(node, "getblocktemplate", roomy)], REGTEST)) == {}


async def test_the_setting_that_is_advised_leaves_room_enough(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    parts = [number.to_bytes(2, "big") * 625 for number in range(788)]
    *rows, extra = [entry_of(part, part, fee=1) for part in parts]  # all that 4,000,000 - 65,000 takes, and one more
    template = node["getblocktemplate"].table | {"transactions": rows}
    del template["default_witness_commitment"]
    assert levels(judge_nodes([with_result(node, "getblocktemplate", template)], REGTEST)) == {}
    template["transactions"] = [*rows, extra]
    assert levels(judge_nodes([with_result(node, "getblocktemplate", template)], REGTEST)) == {
        "coinbase room": "warning"
    }


async def test_a_template_that_cannot_be_had_or_read_or_is_slow(kernel: KernelBackend) -> None:
    async with fake(kernel, without={"getblocktemplate"}) as core:
        findings = judge_nodes(await ask(core.endpoint), REGTEST)
        assert_is(one(findings, "bitcoin template"), "problem", "Method not found", "rpcwhitelist")
        core.without.clear()
        (node,) = await ask(core.endpoint)
    strange = node["getblocktemplate"].table | {"rules": ["!unheard-of"]}
    finding = one(judge_nodes([with_result(node, "getblocktemplate", strange)], REGTEST), "bitcoin template")
    assert_is(finding, "problem", "unheard-of")
    slow = replace(
        node, answers=dict(node.answers) | {"getblocktemplate": replace(node["getblocktemplate"], seconds=3.0)}
    )
    assert_is(one(judge_nodes([slow], REGTEST), "bitcoin template"), "warning", "3.00 s")


@pytest.mark.parametrize(
    ("off_s", "level", "words"),
    [
        (0, "ok", "agrees"),
        (9, "ok", "agrees"),
        (-9, "ok", "agrees"),
        (30, "warning", "29 s ahead of the Bitcoin node's clock"),
        (-30, "warning", "29 s behind the Bitcoin node's clock"),
        (300, "problem", "5 min ahead"),
        (-300, "problem", "5 min behind"),
    ],
)
async def test_a_clock_that_differs_from_the_nodes_is_measured(
    kernel: KernelBackend, off_s: float, level: Level, words: str
) -> None:
    async with fake(kernel) as core:
        findings = judge_nodes(await ask(core.endpoint, now=NOW + off_s), REGTEST)
    assert_is(one(findings, "clock"), level, words)


async def test_a_clock_that_differs_from_those_of_the_nodes_peers(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    peers_are_behind = node["getnetworkinfo"].table | {"timeoffset": -200}
    finding = one(judge_nodes([with_result(node, "getnetworkinfo", peers_are_behind)], REGTEST), "clock")
    assert_is(finding, "problem", "3 min ahead of those of the Bitcoin node's peers")


async def test_a_clock_before_bitcoins_own_time_is_a_problem(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    for table in ({"mediantime": int(NOW) + 90}, {"time": int(NOW) + 7_290}):
        ahead = with_result(node, "getblockchaininfo", node["getblockchaininfo"].table | table)
        assert_is(one(judge_nodes([ahead], REGTEST), "clock"), "problem", "at least 90 s behind")


async def test_answers_that_make_no_sense_are_problems_and_no_crash(kernel: KernelBackend) -> None:
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    for method in node.answers:
        values: tuple[object, ...] = (None, [], {}, "words", 7, {"blocks": "x", "version": {}, "curtime": "now"})
        for nonsense in values:
            for finding in judge_nodes([with_result(node, method, nonsense)], REGTEST):
                assert finding.check


async def test_zmq_must_be_installed_and_announced(kernel: KernelBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zmq")
    async with fake(kernel) as core:
        (node,) = await ask(core.endpoint)
    (finding,) = judge_zmq([node], ["tcp://127.0.0.1:28332"])
    assert_is(finding, "warning", "zmqpubhashblock=tcp://127.0.0.1:28332")
    rows = [{"type": "pubhashtx", "address": "tcp://0.0.0.0:28333", "hwm": 1}]
    rows += [{"type": "pubhashblock", "address": "tcp://0.0.0.0:28332", "hwm": 1}]
    told = with_result(node, "getzmqnotifications", rows)
    assert [finding.level for finding in judge_zmq([told], ["tcp://127.0.0.1:28332", "tcp://127.0.0.1:28333"])] == [
        "ok",
        "warning",
    ]
    (finding,) = judge_zmq([told], ["tcp://nowhere"])
    assert_is(finding, "problem", "tcp://nowhere")
    monkeypatch.setitem(sys.modules, "zmq", None)
    (finding,) = judge_zmq([told], ["tcp://127.0.0.1:28332"])
    assert_is(finding, "problem", "pip install 'p2pool[zmq]'")


@pytest.mark.slow
async def test_the_embedded_bitcoin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path)

    async def node() -> Finding:
        return one(await diagnose(Subject(config=config)), "bitcoin node")

    assert_is(await node(), "ok", "embedded", "a new chain")
    assert not (tmp_path / "bitcoin").exists()
    KernelBackend.open(tmp_path / "bitcoin").close()
    assert_is(await node(), "ok", "its chain is in")
    (tmp_path / "bitcoin" / "DIRTY").touch()
    assert_is(await node(), "warning", "not closed in order")
    holder = DataDirectory(tmp_path, REGTEST)
    assert_is(await node(), "ok", "held by the running node")
    holder.close()
    monkeypatch.setitem(sys.modules, "pbk", None)
    assert_is(await node(), "problem", "pip install 'p2pool[kernel]'")


# This machine.


def test_the_address_must_be_of_the_network(tmp_path: Path) -> None:
    assert_is(one(look("options", configured(tmp_path)), "address"), "ok", "none")
    ours = address(1)
    assert_is(one(look("options", configured(tmp_path, address=ours)), "address"), "ok", ours)
    wrong = look("options", configured(tmp_path, address=MAINNET_ADDRESS))
    assert_is(one(wrong, "address"), "problem", "mainnet address", "of regtest")


def test_options_tell_their_source_and_no_password(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('address = "x"\nrpc_user = "me"\nrpc_password = "secret-one"\n[params]\nname = "ours"\n')
    file.chmod(0o600)
    flags = {"network": "regtest", "data_dir": str(tmp_path), "bitcoind": ("http://a:secret-two@127.0.0.1",)}
    environment = {"P2POOL_MDNS": "yes", "P2POOL_ADDRESS": address(1)}
    sources = option_sources(flags, environment, file)
    assert sources == {
        "network": "--network",
        "data_dir": "--data-dir",
        "bitcoind": "--bitcoind",
        "address": "P2POOL_ADDRESS",
        "mdns": "P2POOL_MDNS",
        **dict.fromkeys(("rpc_user", "rpc_password", "params"), str(file)),
    }
    config = load_config(flags, environment, file)
    findings = look("options", config, sources=sources)
    assert "secret" not in repr(findings)
    assert levels(findings) == {"options": "warning"}
    assert any("on the command line, where everybody" in finding.found for finding in findings)
    file.chmod(0o644)
    findings = look("options", config, sources=sources)
    assert any(finding.advice == f"chmod 600 {file}" for finding in findings)
    assert_is(one(findings, "network"), "ok", "ours", config.params.network_id.hex())


def test_the_data_directory_can_be_made_and_has_room(tmp_path: Path) -> None:
    (finding,) = look("data directory", configured(tmp_path / "to" / "be" / "made"))
    assert finding.level in ("ok", "warning")  # as full as the disk of this machine is
    assert "made at the first start" in finding.found
    assert not (tmp_path / "to").exists()
    (tmp_path / "file").touch()
    (finding,) = look("data directory", configured(tmp_path / "file" / "below"))
    assert_is(finding, "problem", f"{tmp_path / 'file'} is not a directory")


def test_a_disk_without_room_is_a_problem() -> None:
    (finding,) = look("data directory", configured(Path("/proc/self")))
    assert_is(finding, "problem", "make room" if os.access("/proc/self", os.W_OK) else "--data-dir")


def test_the_database_must_be_of_the_network_and_whole(tmp_path: Path) -> None:
    assert_is(look("sharechain", configured(tmp_path))[0], "ok", "none yet")
    DataDirectory(tmp_path, REGTEST).close()
    assert_is(look("sharechain", configured(tmp_path))[0], "ok", "0 shares of regtest")
    (finding,) = look("sharechain", configured(tmp_path, network="mainnet"))
    assert_is(finding, "problem", "holds network regtest", "wanted is mainnet", "--network regtest")
    (tmp_path / "sharechain" / "CURRENT").write_text("nonsense")
    assert_is(look("sharechain", configured(tmp_path))[0], "problem", "p2pool verify")


def test_a_database_that_was_deleted_without_its_count_is_a_problem(tmp_path: Path) -> None:
    DataDirectory(tmp_path, REGTEST).close()
    for file in (tmp_path / "sharechain").iterdir():
        file.unlink()
    (tmp_path / "sharechain").rmdir()
    assert_is(look("sharechain", configured(tmp_path))[0], "problem", "is missing", "sharechain.batches")


def test_the_identity_must_be_whole_and_closed_to_others(tmp_path: Path) -> None:
    config, path = configured(tmp_path), tmp_path / "identity.key"
    assert_is(look("identity", config)[0], "ok", "none yet")
    path.write_bytes(bytes(32))
    path.chmod(0o600)
    assert_is(look("identity", config)[0], "ok", "its owner only")
    path.chmod(0o640)
    assert_is(look("identity", config)[0], "problem", "mode 640", f"chmod 600 {path}")
    path.chmod(0o600)
    path.write_bytes(bytes(31))
    assert_is(look("identity", config)[0], "problem", "31 bytes")


def test_a_running_node_is_seen_and_whether_it_still_speaks(tmp_path: Path) -> None:
    config = configured(tmp_path)
    holder = DataDirectory(tmp_path, REGTEST)
    assert_is(look("running node", config)[0], "ok", f"process {os.getpid()}, just started")
    holder.write_status({"pid": os.getpid(), "time": NOW, "height": 7, "shares": 9, "network": {"state": "synced"}})
    assert_is(look("running node", config, clock=lambda: NOW + 2)[0], "ok", "height 7, 9 shares, synced")
    assert_is(look("running node", config, clock=lambda: NOW + 300)[0], "warning", "said nothing for 300 s")
    holder.keep_block(bytes(32), b"block")
    holder.close()
    assert_is(look("running node", config)[0], "warning", "1 found", "start the node")
    assert_is(look("running node", configured(tmp_path / "none"))[0], "ok", "none")


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stratum", "p2p"])
def test_a_port_is_free_or_somebody_has_it(tmp_path: Path, name: str) -> None:
    def found(host: str, port: int, data_dir: Path = tmp_path) -> Finding:
        (finding,) = look(f"{name} port", configured(data_dir, **{f"{name}_host": host, f"{name}_port": str(port)}))
        return finding

    with listening() as port:
        assert_is(found("127.0.0.1", port), "problem", f"in use by process {os.getpid()}", f"--{name}-port")
        assert_is(found("0.0.0.0", port), "problem", "in use by")
        holder = DataDirectory(tmp_path, REGTEST)
        assert_is(found("127.0.0.1", port), "ok", f"in use by the running node (process {os.getpid()})")
        assert_is(found("127.0.0.1", port, tmp_path / "other"), "problem", "in use by")
        holder.close()
    assert_is(found("127.0.0.1", port), "ok", "this machine only")
    with socket.create_server(("127.0.0.1", port)):  # looking left nothing behind
        pass
    assert_is(found("0.0.0.0", port), "ok")
    assert_is(found("127.0.0.1", 0), "ok", "any free one")
    assert_is(found("192.0.2.1", port), "problem", "no address of this machine")


def test_the_p2p_port_says_what_to_open_and_wants_an_ip_address_of_its_own(tmp_path: Path) -> None:
    with listening() as port:
        pass
    (finding,) = look("p2p port", configured(tmp_path, p2p_port=str(port)))
    assert_is(finding, "ok", f"let TCP port {port} through")
    (finding,) = look("p2p port", configured(tmp_path, p2p_host="example.org"))
    assert_is(finding, "problem", "not an IP address")
    (finding,) = look("p2p port", configured(tmp_path, p2p_port="3333", stratum_port="3333"))
    assert_is(finding, "problem", "Stratum port as well")


def test_a_node_that_knows_nobody_is_told(tmp_path: Path) -> None:
    peer = "/ip4/198.51.100.7/tcp/9338/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    assert_is(look("other nodes", configured(tmp_path))[0], "ok", "alone")
    assert_is(look("other nodes", configured(tmp_path, network="signet"))[0], "warning", "--peer")
    assert_is(look("other nodes", configured(tmp_path, network="signet", peer=(peer,)))[0], "ok", "1 named")
    assert_is(look("other nodes", configured(tmp_path, network="signet", mdns="yes"))[0], "ok", "--mdns")
    (tmp_path / "peers.json").touch()
    assert_is(look("other nodes", configured(tmp_path, network="signet"))[0], "ok", "met before")


def test_the_limit_of_open_files_is_told_in_miners(tmp_path: Path) -> None:
    config = configured(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4_200:
        pytest.skip(f"this machine lets nobody open more than {hard} files")
    try:
        for limit, level, words in (
            (4_200, "ok", "4,200"),
            (1_000, "warning", "800 miners"),
            (190, "problem", "need 200"),
        ):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert_is(look("open files", config)[0], level, words)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("script", "level", "words"),
    [
        ("echo NTPSynchronized=yes", "ok", "is kept by NTP"),
        ("echo NTPSynchronized=no", "warning", "set-ntp true"),
        ("echo 'System has not been booted with systemd' >&2; exit 1", "ok", "cannot be seen"),
        (None, "ok", "cannot be seen"),
    ],
)
def test_whether_the_clock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, level: Level, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "timedatectl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "timedatectl").chmod(0o755)
    assert_is(look("clock service", configured(tmp_path))[0], level, words)


@pytest.mark.slow
def test_the_python_twin_of_the_hasher_is_a_warning(tmp_path: Path) -> None:
    program = (
        "import sys; {}; from p2pool.config import load_config; from p2pool.doctor import CHECKS, Subject; "
        "print(*(one.level for one in CHECKS['hasher'](Subject(config=load_config({{}}, {{}}, None)))))"
    )
    blocked = program.format("sys.modules['sharechain._native'] = None")
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.stdout.split() == ["warning"], done.stderr
    assert_is(look("hasher", configured(tmp_path))[0], "ok" if hasher.IMPLEMENTATION == "rust" else "warning")


def test_a_package_of_the_wrong_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path)
    assert levels(look("versions", config)) == {}
    for name, version in (("libp2p", "0.9.0"), ("trio", "0.34.9")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = [finding for finding in look("versions", config) if finding.level == "problem"]
    assert sorted(finding.found for finding in wrong) == [
        "The Python package libp2p must be of version 0.8.1, found 0.9.0",
        "trio is 0.34.9, needed is >= 0.35",
    ]


# All of it.


def files_below(path: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in [path, *path.rglob("*")]
    }


@pytest.mark.slow
async def test_looking_changes_no_file(kernel: KernelBackend, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    DataDirectory(data_dir, REGTEST).close()
    (data_dir / "identity.key").write_bytes(bytes(32))
    (data_dir / "identity.key").chmod(0o600)
    KernelBackend.open(data_dir / "bitcoin").close()
    before = files_below(data_dir)
    async with fake(kernel) as core:
        for bitcoind in ((), (f"http://pool:correct%20horse@127.0.0.1:{core.port}",)):
            findings = await diagnose(Subject(config=configured(data_dir, bitcoind=bitcoind), clock=lambda: NOW))
            assert not [finding for finding in findings if finding.level == "problem"], findings
    assert files_below(data_dir) == before


async def test_a_check_that_hangs_is_left_alone_and_told(tmp_path: Path) -> None:
    holder = DataDirectory(tmp_path, REGTEST)
    status = tmp_path / "status.json"
    os.mkfifo(status)  # reading it waits for a writer: like a disk of another machine that has gone
    try:
        findings = await diagnose(Subject(config=configured(tmp_path)), limit_s=0.2)
        assert_is(one(findings, "running node"), "problem", "no result in 0.2 s")
    finally:
        status.open("w").close()
        holder.close()
        await trio.lowlevel.checkpoint()


Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """`p2pool doctor` in this process: exit code and output."""

    def call(*arguments: str) -> tuple[int, str]:
        for key in [key for key in os.environ if key.startswith("P2POOL_")]:
            monkeypatch.delenv(key)
        monkeypatch.setenv("COLUMNS", "100")
        given = ["--network", "regtest", "--data-dir", str(tmp_path / "data"), "--stratum-port", "0", "--p2p-port", "0"]
        monkeypatch.setattr(sys, "argv", ["p2pool", "doctor", *given, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert captured.err == ""
        return int(stop.value.code or 0), captured.out

    return call


def test_the_command_ends_with_0_if_there_is_no_problem(doctor: Doctor) -> None:
    code, text = doctor()
    assert code == 0
    assert text.splitlines()[0].startswith("ok       network          regtest (id ")
    assert text.splitlines()[-1].startswith("0 problems, ")
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\x1b" not in text


def test_the_command_ends_with_1_if_there_is_one_and_says_what_to_do(doctor: Doctor) -> None:
    code, text = doctor("--address", MAINNET_ADDRESS)
    assert code == 1
    lines = text.splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("problem  address")]
    assert any(line.strip().startswith("-> give an address of regtest") for line in lines[row:])
    assert lines[-1].startswith("1 problem, ")


def test_json_holds_every_finding(doctor: Doctor) -> None:
    code, text = doctor("--json", "--address", MAINNET_ADDRESS)
    report = json.loads(text)
    assert (code, report["ok"], report["problems"]) == (1, False, 1)
    assert all(row.keys() == {"check", "level", "found", "advice"} for row in report["findings"])
    assert all(row["advice"] for row in report["findings"] if row["level"] != "ok")


def test_an_option_that_is_wrong_is_a_finding_too(doctor: Doctor) -> None:
    code, text = doctor("--json", "--stratum-port", "many")
    report = json.loads(text)
    assert code == 1
    (row,) = report["findings"]
    assert row["check"] == "options"
    assert "--stratum-port: a port number is needed" in row["found"]


def test_a_finding_that_is_not_well_must_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="wants advice"):
        Finding(check="x", level="warning", found="bad")
