"""Real nodes as real processes: that they are started, seen, ended, and that they agree."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pool.cluster import (
    Cluster,
    MinerProcess,
    NodeProcess,
    _Child,
    _free_ports,
    _to_toml,
    earlier_nodes,
    propagation_ms,
)
from p2pool.config import load_config
from p2pool.demo import plan_miner
from p2pool.errors import P2PoolError
from sharechain.params import NETWORKS

#: Shares of some 130,000 hashes: a few a second.
PARAMS = NETWORKS["regtest"].with_overrides(
    {
        "name": "cluster",
        "share_period_ms": 300,
        "half_life_s": 20,
        "stall_after_s": 5,
        "max_target": 2**239,
        "block_target_divisor": 4,
        "payout_classes": [3, 12],
    }
)


def test_the_configuration_file_of_a_node_says_the_same_network(tmp_path: Path) -> None:
    options = {"network": "regtest", "data_dir": str(tmp_path / 'a "b"'), "peer": [], "mdns": True, "p2p_port": 1}
    file = tmp_path / "node.toml"
    file.write_text(_to_toml(options, PARAMS))
    config = load_config({}, {}, file)
    assert config.params == PARAMS
    assert config.data_dir == tmp_path / 'a "b"'
    assert (config.peer, config.mdns, config.p2p_port) == ((), True, 1)


@pytest.mark.parametrize("count", [1, 2, 6, 32])
def test_every_node_is_told_of_nodes_before_it_and_all_hang_together(count: int) -> None:
    for number in range(1, count + 1):
        told = earlier_nodes(number)
        assert len(set(told)) == len(told) <= 4
        assert all(1 <= other < number for other in told)
        assert told or number == 1
    assert earlier_nodes(5) == (1, 2, 3, 4)


def test_free_ports_are_different_and_a_taken_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = list(_free_ports(20))
    assert len(set(ports)) == 20
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        monkeypatch.setattr("p2pool.cluster.PORTS", range(ports[0], ports[0] + 1))
        with pytest.raises(P2PoolError, match="1 free ports are needed"):
            _free_ports(1)


def test_propagation_is_counted_from_whoever_saw_a_share_first() -> None:
    first = [{"hash": "a", "first_seen_ms": 10}, {"hash": "b", "first_seen_ms": 50}]
    second = [{"hash": "a", "first_seen_ms": 14}, {"hash": "b", "first_seen_ms": 30}]
    third = [{"hash": "a", "first_seen_ms": 10}]
    assert propagation_ms([first, second, third]) == [0, 4, 20]
    assert propagation_ms([first, second, third], since_ms=11) == [20]


async def test_a_process_that_ends_by_itself_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = _Child("the child", tmp_path / "log")
    child.spawn("import sys; print('last words'); sys.exit(3)", [])
    with trio.fail_after(30):
        assert await child.wait() == 3
    with pytest.raises(P2PoolError, match=r"the child has died \(exit code 3\).*\n    last words"):
        child.check()


async def test_a_process_that_does_not_stop_is_killed_and_one_that_was_stopped_is_no_fault(tmp_path: Path) -> None:
    child = _Child("the child", tmp_path / "log")
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    child.spawn(code, [])
    with trio.fail_after(30):
        while "deaf" not in child.log_tail():
            child.check()
            await trio.sleep(0.01)
        assert child.usage().rss_bytes > 0
        assert await child.stop(patience_s=0.1) == -signal.SIGKILL
    child.check()
    assert not child.is_running


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not end children with their parent")
def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from p2pool.cluster import _CHILD, _Child
child = _Child("child", Path({str(tmp_path / "log")!r}))
child.spawn(_CHILD + "import time; print('up', flush=True); time.sleep(600)", [])
while "up" not in child.log_tail():
    child.check()
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    stat = Path(f"/proc/{pid}/stat")

    def is_there() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    async def wait_gone() -> None:
        with trio.fail_after(30):
            while is_there():  # noqa: ASYNC110 - a process of others tells nobody of its end
                await trio.sleep(0.01)

    trio.run(wait_gone)


def saying(tip: str, work: int) -> str:
    """The program of a node that does nothing but say, again and again, where its chain ends."""
    return f"""
import json, os, pathlib, time, tomllib
directory = pathlib.Path(tomllib.loads(pathlib.Path(sys.argv[3]).read_text())["data_dir"])
while True:
    status = dict(time=time.time(), pid=os.getpid(), tip={tip!r}, total_work={work}, height=1, waiting=0)
    status |= dict(bitcoin_height=0, network=None)
    (directory / "status.new").write_text(json.dumps(status))
    (directory / "status.new").replace(directory / "status.json")
    time.sleep(0.05)
"""


@pytest.mark.slow
async def test_equal_work_is_a_tie_and_unequal_work_no_agreement(tmp_path: Path) -> None:
    chains = {1: ("aa", 7), 2: ("bb", 7), 3: ("bb", 8)}
    async with Cluster(tmp_path, PARAMS, 3, program=lambda number: saying(*chains[number])) as cluster:
        first, second, third = cluster.nodes
        cluster.start_node(first)
        cluster.start_node(second)
        with trio.fail_after(60):
            assert await cluster.wait_converged() == ("aa", "bb")
        second.kill()
        cluster.start_node(third)
        with pytest.raises(P2PoolError, match=r"node 1: alone, 0 peers, tip aa .* node 3: "):
            await cluster.wait_converged(patience_s=2)
        first.kill()
        with trio.fail_after(60):
            assert await cluster.wait_converged() == ("bb",)


def shares_of(node: NodeProcess) -> int:
    status = node.status()
    return 0 if status is None else int(status["shares"])


def has_more_work(node: NodeProcess, work: int) -> bool:
    status = node.status()
    return status is not None and status["total_work"] > work


@pytest.mark.slow
async def test_nodes_agree_on_shares_and_blocks_also_after_one_was_killed_and_came_back(tmp_path: Path) -> None:
    async with Cluster(tmp_path, PARAMS, 2) as cluster:
        first, second = cluster.nodes
        await cluster.start()

        async def mine_until(shares: int) -> MinerProcess:
            targets = [(node, plan_miner(number).address) for number, node in enumerate(cluster.nodes)]
            miners = cluster.mine(targets)
            await cluster.wait_until(lambda: shares_of(first) >= shares, 60, "shares")
            return miners

        miners = await mine_until(10)
        second.kill()
        assert not second.is_running
        said = second.status()
        assert said is None or said["pid"] == second.pid
        cluster.check()
        await cluster.wait_until(lambda: shares_of(first) >= 15, 60, "shares of the other node")
        cluster.start_node(second)
        await cluster.wait_until(lambda: shares_of(second) >= 20, 60, "shares of the node that came back")
        miners.signal(signal.SIGSTOP)
        while len(tips := await cluster.wait_converged()) > 1:
            work = max((node.status() or {})["total_work"] for node in cluster.nodes)
            miners.signal(signal.SIGCONT)
            await cluster.wait_until(partial(has_more_work, first, work), 60, "a share that decides")
            miners.signal(signal.SIGSTOP)
        await miners.stop()
        assert sum(report.accepted for report in miners.reports()) >= 20
        assert all(node.usage().cpu_s > 0 for node in cluster.nodes)
        rows = [node.rows() for node in cluster.nodes]
    main = [[row["hash"] for row in one if row["status"] == "main"] for one in rows]
    assert main[0] == main[1]
    assert main[0][-1] == tips[0]
    assert len(propagation_ms(rows)) >= 20
    for node in cluster.nodes:
        assert not node.is_running
        assert not (node.directory / "bitcoin" / "DIRTY").exists()
        assert (node.directory / "sharechain.sums").exists()


@pytest.mark.slow
async def test_what_is_waited_for_in_vain_and_a_node_that_dies_end_the_wait(tmp_path: Path) -> None:
    async with Cluster(tmp_path, PARAMS, 2) as cluster:
        with pytest.raises(P2PoolError, match=r"waited 0 s for the nodes to connect.*node 2: nothing"):
            await cluster.start(patience_s=0)
        assert cluster.nodes[0].pid is not None
        os.kill(cluster.nodes[0].pid, signal.SIGKILL)
        with pytest.raises(P2PoolError, match=r"node 1 has died \(SIGKILL\)"):
            await cluster.wait_until(lambda: False, 60, "nothing")
    assert not any(node.is_running for node in cluster.nodes)
