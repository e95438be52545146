"""Whole nodes on a network that loses, doubles, delays, cuts and kills: they agree again, and know whom to blame."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import plyvel
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pool.bitcoin_backend import BlockSource, HeaderSource, SubmitResult
from p2pool.database import open_copy
from p2pool.errors import PeerError
from p2pool.p2p import BLOCK, SYNC, Gossip
from p2pool.p2p.blocks import MAX_HEADER_BRANCH
from p2pool.p2p.peers import PeerLimits
from p2pool.p2p.sync import ALONE_AFTER_S, NO_GAIN_S
from p2pool.p2p.wire import (
    Blocks,
    BlocksAfter,
    GetHeaders,
    Headers,
    Message,
    Refused,
    Status,
    decode_message,
    encode_gossip,
    encode_message,
)
from p2pool.relay import BlockRelay
from p2pool.report import load_chain
from sharechain.difficulty import bits_to_target
from sharechain.errors import StoreError
from sharechain.hasher import sha256d
from sharechain.params import Params
from sharechain.share import Share, decode_share, pack_header
from tests.builders import forged_under, mine, miner_script
from tests.p2pool import fleet as fleet_module
from tests.p2pool.fakebitcoin import BITS, GENESIS_TIME, FakeBitcoin, HeaderBitcoin
from tests.p2pool.fleet import (
    TWO_ROUNDS_S,
    Fleet,
    Member,
    Stranger,
    assert_stored,
    fleet,
    make_history,
    make_lie,
    now,
    verified,
)
from tests.p2pool.network import ANYBODY_SCRIPT, PARAMS, START, Rig, is_any_block, pay, solved_block
from tests.p2pool.simulated import SimulatedNet, address_of, peer_id_of, simulate

#: A window so short that two of them and the margin, all that a node keeps, are soon mined.
BRIEF = PARAMS.with_overrides({"name": "brief", "window_max_shares": 10})
#: One that is longer than what the tests mine: nothing is pruned.
WIDE = PARAMS.with_overrides({"name": "wide", "window_max_shares": 200})


def run(main: Callable[[Path], Awaitable[None]], *, schedule: int = 0) -> None:
    """A test in virtual time, with an empty directory."""
    with tempfile.TemporaryDirectory(prefix="p2pool-test-") as path:
        simulate(main, Path(path), schedule=schedule)


# -- agreement -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_nodes_agree_after_any_trouble(seed: int) -> None:
    async def main(path: Path) -> None:
        dice = random.Random(seed)
        net: dict[str, Any] = {"latency_s": (0.01, 1.0), "loss": 0.3, "duplication": 0.2, "answer_loss": 0.02}
        async with fleet(path, 4, seed=seed, **net) as nodes:
            await nodes.ready()
            down: set[int] = set()
            for _ in range(40):
                match dice.randrange(12):
                    case 0:
                        nodes.partition(dice.sample(sorted(nodes.members), len(nodes.members) // 2))
                    case 1 | 2:
                        nodes.net.heal()
                    case 3 if len(down) < 2:
                        number = dice.choice(sorted(nodes.members))
                        down.add(number)
                        await nodes.crash(number)
                    case 4 if down:
                        number = dice.choice(sorted(down))
                        down.remove(number)
                        await nodes.start(number)
                    case 5 if nodes.is_one_bitcoin() and (ready := nodes.serving()):
                        nodes.mine(dice.choice(ready), wanted=is_any_block)
                        await trio.sleep(3)
                    case _ if ready := nodes.serving():
                        nodes.mine(dice.choice(ready))
                await trio.sleep(dice.expovariate(1.0))
            nodes.net.heal()
            for number in down:
                await nodes.start(number)
            await nodes.ready(180)
            nodes.net.loss = nodes.net.answer_loss = 0.0
            await trio.sleep(60)  # the last connections come back
            for _ in range(2):  # the first may make two branches of the same work
                nodes.mine(1)
                await trio.sleep(TWO_ROUNDS_S)
            assert nodes.is_agreed(), nodes.standing()
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main, schedule=seed)


#: What may happen to three nodes, one thing after the other.
STEPS = st.one_of(
    st.tuples(st.just("mine"), st.integers(1, 3)),
    st.tuples(st.just("mine"), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 30])),
    st.tuples(st.just("crash"), st.integers(1, 3)),
    st.tuples(st.just("start"), st.integers(1, 3)),
    st.tuples(st.just("cut off"), st.integers(1, 3)),
    st.tuples(st.just("heal"), st.just(0)),
    st.tuples(st.just("lose"), st.sampled_from([0, 50, 100])),
)


async def step(nodes: Fleet, what: str, which: int, before: dict[int, set[bytes]]) -> None:
    """Let something happen, if it can at this moment; ``before`` has the shares of those that are down."""
    runs = which in nodes.members
    if what == "mine" and runs and nodes[which].network.is_ready:
        nodes.mine(which)
    elif what == "wait":
        await trio.sleep(which)
    elif what == "crash" and runs:
        assert_stored(nodes[which])
        before[which] = {entry.hash for entry in nodes[which].chain.entries()}
        await nodes.crash(which)
    elif what == "start" and which in before:
        await nodes.start(which)
        assert before.pop(which) <= {entry.hash for entry in nodes[which].chain.entries()}
    elif what == "cut off" and runs:
        nodes.partition((which,))
    elif what == "heal":
        nodes.net.heal()
    elif what == "lose":
        nodes.net.loss = which / 100


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 99), steps=st.lists(STEPS, min_size=8, max_size=30))
def test_nothing_is_lost_and_all_agree_in_the_end(seed: int, steps: list[tuple[str, int]]) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=seed) as nodes:
            await nodes.ready()
            before: dict[int, set[bytes]] = {}
            for what, which in steps:
                await step(nodes, what, which, before)
                await trio.sleep(0.3)
            nodes.net.heal()
            nodes.net.loss = 0.0
            for number in list(before):
                await step(nodes, "start", number, before)
            await nodes.ready(120)
            await nodes.until(lambda: all(len(member.linked()) == 2 for member in nodes.members.values()), 120)
            await trio.sleep(TWO_ROUNDS_S)
            last = nodes.mine(1)  # ends a tie
            await nodes.settle(TWO_ROUNDS_S)
            assert nodes[2].tip == last.hash
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main, schedule=seed)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.3, 1.0])
def test_what_gossip_loses_is_there_two_rounds_later(loss: float) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 4, seed=7, loss=loss) as nodes:
            await nodes.ready()
            await nodes.mine_for(25, (1, 2, 3, 4))
            await trio.sleep(TWO_ROUNDS_S)  # they agree but for branches of the same work
            last = nodes.mine(2)
            await nodes.settle(TWO_ROUNDS_S)
            assert nodes[1].tip == last.hash
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_nodes_agree_when_a_branch_builds_on_a_bitcoin_block_that_lost() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=4) as nodes:
            await nodes.ready()
            nodes.partition((1,), (2, 3))
            nodes.mine(1, wanted=is_any_block)
            await trio.sleep(1)
            await nodes.mine_for(6, (1,))
            for _ in range(2):
                nodes.mine(2, wanted=is_any_block)
                await trio.sleep(1)
            nodes.net.heal()
            await nodes.settle()
            nodes.assert_agreed()

    run(main)


# -- partitions ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shares", [10, 60, 110])
def test_a_partition_heals_to_the_heavier_side(shares: int) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 4, seed=shares) as nodes:
            await nodes.ready()
            await nodes.mine_for(5, (1, 2, 3, 4))
            await nodes.settle()
            nodes.partition((1, 2), (3, 4))
            await nodes.mine_for(shares, (1, 3), pause_s=0.5)
            for _ in range(2):
                nodes.mine(1)
                await trio.sleep(1)
            heavier = nodes[1].tip
            assert nodes[2].tip == heavier != nodes[3].tip == nodes[4].tip
            nodes.net.heal()
            winners = {peer_id_of(1), peer_id_of(2)}
            await nodes.until(lambda: nodes[3].linked() & winners and nodes[4].linked() & winners, 60)
            await nodes.settle(TWO_ROUNDS_S)
            assert nodes[1].tip == heavier
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


def test_the_fresh_share_of_the_losing_side_is_named_as_an_uncle() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=3, loss=1.0) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle(TWO_ROUNDS_S)
            uncle = nodes.mine(2)
            nodes.mine(1)
            nodes.mine(1)
            await nodes.settle(TWO_ROUNDS_S)
            await nodes.until(lambda: uncle.hash in nodes[1].chain, TWO_ROUNDS_S)
            nephew = nodes.mine(1)
            assert nephew.data.uncles == (uncle.hash,)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()

    run(main)


@pytest.mark.slow
def test_a_partition_longer_than_history_heals_by_going_over_to_the_heavier_history() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=9, params=BRIEF) as nodes:
            await nodes.ready()
            await nodes.mine_for(3, (1, 2, 3))
            await nodes.settle()
            nodes.partition((1, 2), (3,))
            for turn in range(560):
                nodes.mine(1)
                if turn < 545:
                    nodes.mine(3)
                await trio.sleep(0.2)
            heavier = nodes[1].tip
            assert nodes[3].chain.base_height > 3
            assert nodes[1].chain.base_height > 3
            nodes.net.heal()
            await nodes.until(lambda: nodes[3].linked() & {peer_id_of(1), peer_id_of(2)}, 60)
            await nodes.settle(3 * TWO_ROUNDS_S)
            assert nodes[3].tip == heavier
            nodes.assert_agreed()
            assert nodes.faults() == {}
            report = verified(nodes[3])
            assert report.shares == len(nodes[3].chain)
            await nodes.crash(3)
            await nodes.start(3)
            await nodes.ready()
            nodes.mine(3)
            await nodes.settle()
            nodes.assert_agreed()

    run(main)


# -- newcomers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nodes have of a network that has run for long: the lowest shares are pruned."""
    return make_history(tmp_path_factory.mktemp("history"), BRIEF, 700)


@pytest.fixture(scope="module")
def lie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history that was mined cheaply, and claims the most work of all."""
    return make_lie(tmp_path_factory.mktemp("lie"), BRIEF, 100)


@pytest.mark.slow
def test_a_newcomer_gets_the_history_of_a_pruned_network(history: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=1, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            assert nodes[1].chain.base_height > 100
            fresh = await nodes.start(4, calls=(1, 2, 3))
            rig = Rig(fresh.node)
            assert rig.node.notify_for(rig.worker) is None
            await nodes.until(lambda: fresh.network.is_ready, 30)
            assert rig.node.notify_for(rig.worker) is not None
            assert fresh.tip == nodes[1].tip
            nodes.assert_agreed()
            assert fresh.chain.base_height > nodes[1].chain.base_height
            nodes.mine(4)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()
            assert nodes.faults() == {}
            assert verified(fresh).shares == len(fresh.chain)

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.5, 0.9, 1.3, 1.7])
def test_a_newcomer_goes_on_when_who_led_it_crashes(history: Path, after_s: float) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=2, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            fresh = await nodes.start(4, calls=(1, 2, 3))
            await nodes.until(lambda: fresh.network.sync.download is not None, 10)
            await trio.sleep(after_s - 0.5)
            download = fresh.network.sync.download
            lead = "" if download is None else download.lead
            await nodes.crash(next((n for n in (1, 2, 3) if peer_id_of(n) == lead), 1))
            await nodes.until(lambda: fresh.network.is_ready, 60)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.6, 1.0, 1.5])
def test_a_newcomer_that_crashes_goes_on_where_it_was(history: Path, after_s: float) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=3, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            await nodes.start(3, calls=(1, 2))
            await trio.sleep(after_s)
            await nodes.crash(3)
            fresh = await nodes.start(3)
            await nodes.until(lambda: fresh.network.is_ready, 60)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_liar_that_claims_work_is_banned_and_holds_nobody_up(history: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=4, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            liar = await nodes.add(Stranger(nodes.net, 9))
            liar.serves(nodes[1].node)
            liar.claims(tip=b"\xaa" * 32, height=10_000, total_work=2**200)
            fresh = await nodes.start(3, calls=(1, 2, 9))
            await nodes.until(lambda: fresh.network.is_ready, 60)
            nodes.assert_agreed()
            await nodes.until(lambda: peer_id_of(9) in banned(fresh), 120)
            assert all(set(faults) == {"unkept"} for faults in nodes.faults().values())
            assert fresh.linked() == {peer_id_of(1), peer_id_of(2)}
            await nodes.until(lambda: fresh.transport.peer_id in liar.lost, 10)

    run(main)


@pytest.mark.slow
def test_a_liar_that_tells_nothing_more_holds_nobody_up(history: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=4, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            liar = await nodes.add(Stranger(nodes.net, 9))
            liar.claims(tip=b"\xaa" * 32, height=10_000, total_work=2**200)
            fresh = await nodes.start(3, calls=(1, 2, 9))
            await nodes.until(lambda: fresh.tip == nodes[1].tip, 60)
            nodes.mine(1)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("leads", [True, False])
def test_forged_bodies_under_real_headers_are_their_givers_fault(history: Path, leads: bool) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=5, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            liar = await nodes.add(Stranger(nodes.net, 9))
            liar.serves(nodes[1].node, forged)
            tip = nodes[1].chain.tip
            assert tip is not None
            liar.claims(tip=tip.hash, height=tip.height, total_work=tip.total_work + leads)
            if leads:
                nodes.partition((1, 2))
            fresh = await nodes.start(3, calls=(1, 2, 9))
            if leads:
                await nodes.until(lambda: nodes.faults() == {3: {"R10": 1}}, 30)
                assert fresh.tip == b""  # nothing of it is kept
                nodes.net.heal()
            await nodes.until(lambda: fresh.network.is_ready, 120)
            await nodes.settle()
            nodes.assert_agreed()
            assert fresh.linked() >= {peer_id_of(1), peer_id_of(2)}
            assert set(nodes.faults()) <= {3}
            assert banned(fresh) <= {peer_id_of(9)}

    run(main)


@pytest.mark.slow
def test_a_history_that_claims_to_stand_on_much_work_is_left_for_one_that_proves_it(history: Path, lie: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=6, params=BRIEF) as nodes:
            await nodes.start(1, data=lie)
            fresh = await nodes.start(3, calls=(1,))
            await nodes.until(lambda: fresh.tip == nodes[1].tip, 60)
            assert fresh.chain.tip is not None
            assert fresh.chain.tip.total_work > 2**200
            await nodes.start(2, calls=(3,), data=history)
            await nodes.until(lambda: fresh.tip == nodes[2].tip, 120)
            assert_stored(fresh)
            assert verified(fresh).shares == len(fresh.chain)

    run(main)


@pytest.mark.slow
def test_a_newcomer_between_a_liar_and_an_honest_node_serves_no_miner_on_the_lie(history: Path, lie: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=6, params=BRIEF) as nodes:
            await nodes.start(1, data=lie)
            await nodes.start(2, data=history)
            fresh = await nodes.start(3, calls=(1, 2))
            await nodes.until(lambda: fresh.network.is_ready, 120)
            assert fresh.tip == nodes[2].tip

    run(main)


def banned(member: Member) -> set[str]:
    """Peer ids that a node bans."""
    return {row["peer_id"] for row in member.network.statistics().peers if row["state"] == "banned"}


def forged(raw: bytes) -> bytes:
    """Another body under the same header."""
    return forged_under(decode_share(raw), payout_script=miner_script(77)).encoded


# -- readiness -----------------------------------------------------------------------------------------------


def serves(member: Member) -> bool:
    """Whether a miner gets work."""
    rig = Rig(member.node)
    return rig.node.notify_for(rig.worker) is not None


def test_a_node_with_nobody_to_call_serves_at_once() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 1) as nodes:
            assert serves(nodes[1])

    run(main)


def test_a_node_whose_peers_are_not_there_serves_after_a_while() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 1, calls=(1, 2)) as nodes:
            await trio.sleep(ALONE_AFTER_S - 1)
            assert not serves(nodes[1])
            await trio.sleep(2)
            assert serves(nodes[1])

    run(main)


@pytest.mark.slow
def test_a_node_whose_peers_say_nothing_serves_after_a_while() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0) as nodes:
            await nodes.add(Stranger(nodes.net, 9))
            alone = await nodes.start(1, calls=(9,))
            await trio.sleep(ALONE_AFTER_S - 1)
            assert not serves(alone)
            await nodes.until(lambda: serves(alone), 3)

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("clean", [True, False])
def test_a_network_that_stood_still_for_a_day_goes_on(clean: bool) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 3, seed=8) as nodes:
            await nodes.ready()
            await nodes.mine_for(12, (1, 2, 3))
            for number in (1, 2, 3):
                await (nodes.stop(number) if clean else nodes.crash(number))
            await trio.sleep(86_400)
            for number in (1, 2, 3):
                await nodes.start(number)
            await nodes.ready()
            await nodes.mine_for(5, (3, 2, 1))
            await trio.sleep(TWO_ROUNDS_S)
            nodes.mine(2)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()
            assert nodes[1].height > 12
            assert nodes.faults() == {}

    run(main)


# -- clocks --------------------------------------------------------------------------------------------------


class WallClock:
    """A node's clock that is wrong by so many seconds, or stands still."""

    def __init__(self, wrong_s: float = 0.0, *, stands: bool = False) -> None:
        self.wrong_s = wrong_s
        self.stands = stands

    def __call__(self) -> float:
        return (START if self.stands else now()) + self.wrong_s


async def start_by(nodes: Fleet, number: int, clock: WallClock, **options: Any) -> Member:
    """Start a node that has a clock of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_module, "now", clock)
        return await nodes.start(number, **options)


@pytest.fixture(scope="module")
def long_history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nodes have of a network with a longer window: several batches of a download."""
    return make_history(tmp_path_factory.mktemp("long"), PARAMS, 700)


@pytest.fixture(scope="module")
def whole_history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As long, and nothing is pruned."""
    return make_history(tmp_path_factory.mktemp("whole"), WIDE, 700)


@pytest.mark.slow
@pytest.mark.parametrize("stands", [False, True], ids=["it goes", "it stands"])
@pytest.mark.parametrize(
    ("data", "params", "behind_s"),
    [
        ("whole_history", WIDE, 400.0),
        ("long_history", PARAMS, 400.0),
        ("history", BRIEF, 170.0),
        ("history", BRIEF, 3_600.0),
    ],
    ids=["in all", "in a pruned history", "in a short one", "before it"],
)
def test_a_newcomer_whose_clock_is_behind_serves_nobody_and_has_the_chain_once_it_is_right(
    data: str,
    params: Params,
    behind_s: float,
    stands: bool,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 1, seed=21, params=params, data=request.getfixturevalue(data)) as nodes:
            await nodes.ready()
            clock = WallClock(-behind_s, stands=stands)
            fresh = await start_by(nodes, 2, clock, calls=(1,))
            await trio.sleep(60)
            assert fresh.height < nodes[1].height
            assert not serves(fresh)
            clock.wrong_s, clock.stands = 0.0, False
            await nodes.until(lambda: fresh.network.is_ready, 30)
            assert fresh.tip == nodes[1].tip
            assert nodes.faults() == {}

    run(main)
    assert any("ahead of our clock" in record.getMessage() for record in caplog.records), caplog.messages


@pytest.mark.slow
def test_a_newcomer_whose_clock_stays_wrong_does_not_wait_for_ever(history: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 1, seed=21, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            fresh = await start_by(nodes, 2, WallClock(-86_400.0), calls=(1,))
            await trio.sleep(NO_GAIN_S - 5)
            assert not serves(fresh)
            await nodes.until(lambda: serves(fresh), 10)

    run(main)


@pytest.mark.slow
def test_a_step_of_the_wall_clock_makes_no_newcomer_ready(history: Path) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 1, seed=22, params=BRIEF, data=history) as nodes:
            await nodes.ready()
            clock = WallClock()
            fresh = await start_by(nodes, 2, clock, calls=(1,))
            await nodes.until(lambda: fresh.network.sync.download is not None, 10)
            assert fresh.tip == b""
            clock.wrong_s = 3_600.0
            await nodes.until(lambda: fresh.network.is_ready, 60)
            assert fresh.tip == nodes[1].tip

    run(main)


# -- disks ---------------------------------------------------------------------------------------------------


class FullDisk:
    """A database that takes so many writes not, and then all again: somebody has made room."""

    def __init__(self, database: Any, *, refuses: int) -> None:
        self._database = database
        self._refuses = refuses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def write_batch(self, **options: Any) -> Any:
        self._refuses -= 1
        return FullBatch() if self._refuses >= 0 else self._database.write_batch(**options)


class FullBatch:
    def put(self, key: bytes, value: bytes) -> None:
        pass

    def delete(self, key: bytes) -> None:
        pass

    def write(self) -> None:
        raise plyvel.IOError("No space left on device")


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, however deep."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


@pytest.mark.slow
def test_a_store_that_fails_while_gossip_is_judged_ends_the_node_and_what_is_stored_loads() -> None:
    left: list[Path] = []

    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=23) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            judge = nodes[2].network.gossip

            def gossip(message: Gossip) -> bool:
                try:  # as the transport does: a peer must not end the node
                    return judge(message)
                except StoreError:
                    return False

            nodes[2].network.gossip = gossip  # type: ignore[method-assign]
            await nodes.until(lambda: not nodes[2].node._unsynced, 5)
            database = nodes[2].directory.store._database
            database._db = FullDisk(database._db, refuses=1)  # type: ignore[attr-defined]
            left.append(nodes[2].path)
            for _ in range(3):
                nodes.mine(1)
                await trio.sleep(0.01)
            await trio.sleep(30)

    with tempfile.TemporaryDirectory(prefix="p2pool-test-") as path:
        with pytest.raises(BaseExceptionGroup) as ended:
            simulate(main, Path(path))
        assert ["No space left" in str(error) for error in leaves(ended.value)] == [True]
        with open_copy(left[0]) as (params, store):
            assert len(load_chain(params, store)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peers.json", "status.json"])
def test_what_is_kept_for_convenience_and_cannot_be_written_does_not_end_the_node(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=24) as nodes:
            await nodes.ready()
            file = nodes[2].path / name
            file.unlink(missing_ok=True)
            file.mkdir()
            await trio.sleep(70)
            nodes.mine(2)
            await nodes.settle()
            nodes.assert_agreed()

    run(main)
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    assert 1 <= len(said) <= 8, "it is told, and not again and again"


def test_own_shares_that_waited_for_their_bitcoin_block_are_published_when_they_join() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=25) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            del nodes[1].chain._facts[nodes[1].node.bitcoin_tip()[0]]  # as if Bitcoin had not told it yet
            share = nodes.mine(1)
            assert nodes[1].chain.statistics().waiting == 1
            assert nodes[1].tip != share.hash
            nodes[2].network.sync.asks = lambda chain, now: []  # type: ignore[method-assign]  # gossip alone
            await nodes.until(lambda: nodes[2].tip == share.hash, 5)
            assert nodes[1].tip == share.hash

    run(main)


# -- Bitcoin blocks ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.25])
def test_a_block_reaches_every_bitcoin_though_its_finder_dies(after_s: float) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 4, seed=11, calls=(2,)) as nodes:
            await nodes.ready()
            await nodes.until(lambda: len(nodes[2].linked()) == 3, 10)
            block = nodes.mine(1, wanted=is_any_block)
            await trio.sleep(0.05 + after_s)  # it is on its way
            await nodes.crash(1)
            await nodes.until(
                lambda: all(one.node.bitcoin_tip()[0] == block.hash for one in nodes.members.values()), 10
            )
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_fresh_bitcoin_catches_up_and_shares_that_build_on_it_are_judged() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=12) as nodes:
            await nodes.ready()
            for turn in range(30):
                nodes.mine(1 + turn % 2, wanted=is_any_block)
                await trio.sleep(1)
            assert nodes[1].node.bitcoin_tip()[1] >= 20
            fresh = await nodes.start(3, calls=(1, 2))
            await nodes.until(lambda: fresh.network.is_ready, 60)
            await nodes.until(lambda: fresh.node.bitcoin_tip() == nodes[1].node.bitcoin_tip(), 10)
            nodes.mine(3, wanted=is_any_block)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_share_on_an_unknown_bitcoin_block_waits_for_it() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=13) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle(TWO_ROUNDS_S)
            raw = await stranger_block(nodes[1])
            await nodes[1].backend.submit_block(raw)  # only this one hears of it
            await trio.sleep(0.01)
            share = nodes.mine(1)
            assert share.previous_block_hash == sha256d(raw[:80])
            await nodes.until(lambda: nodes[2].chain.statistics().waiting, 1)
            assert nodes[2].tip != share.hash
            await nodes[2].backend.submit_block(raw)
            await nodes.until(lambda: nodes[2].tip == share.hash, 1)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_peer_that_gives_blocks_that_we_have_does_not_hold_up_others() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=26) as nodes:
            stranger = await quiet_stranger(nodes, 9, block_hash=b"\xaa" * 32)
            await nodes.start(2, calls=(9,))
            await nodes.ready()
            old = await stranger_block(nodes[2])
            await nodes[2].backend.submit_block(old)
            stranger.answers[BlocksAfter] = lambda _: Blocks(blocks=(old,))
            await nodes.until(lambda: any(isinstance(heard, BlocksAfter) for heard in stranger.heard), 10)
            await nodes.start(1, calls=(2,))
            await nodes.ready()
            await nodes.until(lambda: nodes[1].node.bitcoin_tip() == nodes[2].node.bitcoin_tip(), 10)
            fresh = await stranger_block(nodes[1])
            await nodes[1].backend.submit_block(fresh)  # only this one hears of it
            await nodes.until(lambda: nodes[2].node.bitcoin_tip()[0] == sha256d(fresh[:80]), 10)

    run(main)


class SlowBitcoin(FakeBitcoin):
    """It takes its time over a block; what the node keeps on disk meanwhile is noted."""

    def __init__(self, directory: Callable[[], Any]) -> None:
        super().__init__(now)
        self._directory = directory
        self.kept: list[Any] = []

    async def submit_block(self, raw: bytes) -> SubmitResult:
        await trio.sleep(0.1)  # longer than BlockSubmitter's patience
        self.kept += self._directory().kept_blocks()
        return await super().submit_block(raw)


@pytest.mark.slow
def test_the_blocks_below_one_that_bitcoin_refuses_late_are_asked_of_its_bearer() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=27) as nodes:
            bearer = await quiet_stranger(nodes, 9, block_hash=FakeBitcoin.GENESIS)  # its status is no help
            slow = SlowBitcoin(lambda: nodes[1].directory)
            node = await nodes.start(1, calls=(9,), backend=slow)
            await nodes.ready()
            theirs, relay, blocks = FakeBitcoin(now), BlockRelay(), []
            for _ in range(2):
                template = await theirs.block_template()
                relay.learn(template)
                blocks.append(solved_block(template, pay(template, ANYBODY_SCRIPT)))
                await theirs.submit_block(blocks[-1])
            bearer.answers[BlocksAfter] = lambda _: Blocks(blocks=tuple(blocks))
            await bearer.ask(node, relay.announcement(blocks[1]), BLOCK)
            await nodes.until(lambda: node.node.bitcoin_tip()[0] == sha256d(blocks[1][:80]), 10)
            assert slow.kept == []

    run(main)


def on_block(member: Member, block: bytes, salt: int) -> Share:
    """A share that builds on a Bitcoin block which its node does not know."""
    chain, options = member.chain, {"block_bits": BITS, "block_height": 2, "salt": salt}
    return mine(chain, chain.tip, block=block, time=int(now()), **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("knows", [1, 2], ids=["our Bitcoin", "that of a peer"])
def test_bitcoin_blocks_that_do_not_exist_hide_none_that_does(knows: int) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 2, seed=28) as nodes:
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            await trio.sleep(5)
            for number in range(100):
                nodes[1].node.accept(on_block(nodes[1], number.to_bytes(32, "big"), number))
            assert len(nodes[1].chain.missing_blocks()) == 100
            template = await nodes[1].backend.block_template()
            losing = solved_block(template, pay(template, miner_script(1)))
            share = on_block(nodes[1], sha256d(losing[:80]), 100)
            nodes[1].node.accept(share)
            winning = await stranger_block(nodes[1])
            for member in nodes.members.values():  # so that nobody's tip leads to the other
                await member.backend.submit_block(winning)
            await nodes[knows].backend.submit_block(losing)
            await nodes.until(lambda: share.hash in nodes[1].chain, 60)

    run(main)


async def stranger_block(member: Member) -> bytes:
    """A block on a node's Bitcoin, found by somebody else."""
    template = await member.backend.block_template()
    return solved_block(template, pay(template, ANYBODY_SCRIPT))


# -- whose fault it is ---------------------------------------------------------------------------------------


async def quiet_stranger(nodes: Fleet, number: int, *, block_hash: bytes = bytes(32)) -> Stranger:
    """A peer that has no share."""
    stranger = await nodes.add(Stranger(nodes.net, number))
    stranger.claims(tip=bytes(32), height=0, total_work=0, block_hash=block_hash)
    return stranger


def invalid(member: Member, *, salt: int = 0) -> Share:
    """A share with its work done that lies about its height, which only the chain tells."""
    chain = member.chain
    assert chain.tip is not None
    data: dict[str, object] = {"height": chain.tip.height + 9}
    return mine(chain, chain.tip, block=FakeBitcoin.GENESIS, time=int(now()), salt=salt, data=data)


@pytest.mark.slow
def test_who_relays_what_it_cannot_check_is_not_blamed() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=14) as nodes:
            author = await quiet_stranger(nodes, 9)
            relay = await nodes.start(1, calls=(9, 2))
            judge = await nodes.start(2, calls=(1,), limits=PeerLimits(max_outbound=0))  # does not meet the author
            await nodes.ready()
            nodes.mine(2)
            await nodes.settle(TWO_ROUNDS_S)
            await nodes.until(lambda: len(relay.linked()) == 2, 10)
            for salt in range(3):
                nodes.net.loss = 1.0
                parent = nodes.mine(2)
                await trio.sleep(0.2)
                nodes.net.loss = 0.0
                assert parent.hash not in relay.chain
                share = invalid(judge, salt=salt)
                await author.transport.publish(encode_gossip([share.encoded]))
                await trio.sleep(0.5)
                assert judge.network.statistics().gossip["invalid"] == salt + 1
                await nodes.settle(TWO_ROUNDS_S)
            assert relay.transport.peer_id in judge.linked()
            assert nodes.faults() == {}
            assert relay.linked() == {peer_id_of(2), peer_id_of(9)}

    run(main)


@pytest.mark.slow
def test_the_author_of_invalid_shares_is_banned_by_name_and_rule(caplog: pytest.LogCaptureFixture) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=15) as nodes:
            author = await quiet_stranger(nodes, 9)
            node = await nodes.start(1, calls=(9,))
            await nodes.ready()
            nodes.mine(1)
            for salt in range(2):
                assert node.linked() == {peer_id_of(9)}
                await author.transport.publish(encode_gossip([invalid(node, salt=salt).encoded]))
                await trio.sleep(0.5)
            assert node.linked() == set()
            assert banned(node) == {peer_id_of(9)}
            assert nodes.faults() == {1: {"R5": 2}}
            assert node.network.statistics().gossip == {"invalid": 2}
            await trio.sleep(120)
            assert node.linked() == set()

    run(main)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(peer_id_of(9) in line and "R5" in line and "banned" in line for line in said), said


def no_work(share: Share) -> bytes:
    """The share with a nonce that is no work."""
    nonce = 0
    while True:
        raw = replace(share, header=share.header[:76] + nonce.to_bytes(4, "little"))
        if int.from_bytes(raw.hash, "little") >> 250:
            return raw.encoded
        nonce += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "times"), [("R3", 1), ("R1", 1), ("message", 2)], ids=["no proof of work", "no share", "no message"]
)
def test_who_brings_what_everybody_can_check_is_banned(rule: str, times: int) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=16) as nodes:
            bearer = await quiet_stranger(nodes, 9)
            node = await nodes.start(1, calls=(9,))
            await nodes.ready()
            nodes.mine(1)
            payloads = {
                "R3": encode_gossip([no_work(invalid(node))]),
                "R1": encode_gossip([b"no share"]),
                "message": b"garbage",
            }
            for number in range(times):
                assert node.linked() == {peer_id_of(9)}
                await bearer.transport.publish(payloads[rule] + bytes(number))
                await trio.sleep(0.5)
            assert nodes.faults() == {1: {rule: times}}
            assert banned(node) == {peer_id_of(9)}
            assert node.linked() == set()

    run(main)


@pytest.mark.slow
def test_a_garbled_request_and_a_garbled_answer_are_their_senders_fault() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=17) as nodes:
            peer = await quiet_stranger(nodes, 9)
            node = await nodes.start(1, calls=(9,))
            await nodes.ready()
            with pytest.raises(PeerError):
                await peer.transport.request(node.transport.peer_id, SYNC, b"garbage", 5)
            assert nodes.faults() == {1: {"message": 1}}
            peer.answers[Status] = lambda _: b"garbage"
            await nodes.until(lambda: not node.linked(), 10)
            assert set(nodes.faults()[1]) == {"message"}
            assert banned(node) == {peer_id_of(9)}

    run(main)


@pytest.mark.slow
def test_a_ban_of_an_address_ends_all_its_connections() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=18) as nodes:
            one = await nodes.add(Stranger(nodes.net, 8, ip="8.8.8.8", port=1))
            two = await nodes.add(Stranger(nodes.net, 9, ip="8.8.8.8", port=2))
            for stranger in (one, two):
                stranger.claims(tip=bytes(32), height=0, total_work=0)
            node = await nodes.start(1)
            for stranger in (one, two):
                await stranger.transport.connect(address_of(1))
            for number in range(3):
                await one.transport.publish(b"garbage" + bytes(number))
                await trio.sleep(0.5)
            await nodes.until(lambda: not node.linked(), 5)

    run(main)


# -- Bitcoin headers -----------------------------------------------------------------------------------------


async def branch(count: int, salt: int) -> list[bytes]:
    """So many blocks on genesis."""
    bitcoin, blocks = FakeBitcoin(now), list[bytes]()
    for _ in range(count):
        template = await bitcoin.block_template()
        blocks.append(solved_block(template, pay(template, miner_script(salt))))
        await bitcoin.submit_block(blocks[-1])
    return blocks


def bitcoin_of(member: Member) -> HeaderBitcoin:
    """Its Bitcoin, which follows a network of its own."""
    assert isinstance(member.backend, HeaderBitcoin)
    return member.backend


async def share_on_each(nodes: Fleet, losing: list[bytes]) -> list[Share]:
    """Shares that the nodes' miners find on blocks which their Bitcoins hear of, and which then lose."""
    shares = []
    for block in losing:
        for member in nodes.members.values():
            await bitcoin_of(member).hears(block)
        await trio.sleep(1)
        shares.append(nodes.mine(1))
        assert shares[-1].previous_block_hash == sha256d(block[:80])
        await nodes.settle(TWO_ROUNDS_S)
    for block in await branch(len(losing) + 1, 99):
        await bitcoin_of(nodes[1]).submit_block(block)
    await trio.sleep(1)
    await nodes.mine_for(2, sorted(nodes.members))
    await nodes.settle(TWO_ROUNDS_S)
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_newcomer_judges_shares_on_bitcoin_blocks_that_lost_before_it_came(length: int) -> None:
    async def main(path: Path) -> None:
        bitcoins: list[HeaderBitcoin] = []
        async with fleet(path, 0, seed=29) as nodes:
            for number in (1, 2):
                await nodes.start(number, calls=(1, 2), backend=HeaderBitcoin(now, bitcoins))
            await nodes.ready()
            shares = await share_on_each(nodes, await branch(length, 1))
            newcomer = await nodes.start(3, calls=(1, 2), backend=HeaderBitcoin(now, bitcoins))
            assert await newcomer.backend.header_facts(shares[0].previous_block_hash) is None
            await nodes.settle(30)
            assert all(share.hash in newcomer.chain for share in shares)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_share_on_a_bitcoin_branch_of_which_one_node_alone_heard_is_judged_by_all(length: int) -> None:
    async def main(path: Path) -> None:
        bitcoins: list[HeaderBitcoin] = []
        async with fleet(path, 0, seed=30) as nodes:
            for number in (1, 2, 3):
                await nodes.start(number, calls=(1, 2, 3), backend=HeaderBitcoin(now, bitcoins))
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            for block in await branch(length, 1):
                await bitcoin_of(nodes[1]).hears(block)
            await trio.sleep(0.1)
            share = nodes.mine(1)
            assert share.previous_block_hash == nodes[1].node.bitcoin_tip()[0]
            await nodes.until(lambda: nodes[2].chain.statistics().waiting, 1)
            await nodes.until(lambda: all(share.hash in one.chain for one in nodes.members.values()), 40)
            await nodes.settle(TWO_ROUNDS_S)
            nodes.assert_agreed()
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_embedded_bitcoins_and_others_ask_each_other_for_nothing_twice() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=31) as nodes:
            stranger = await header_stranger(nodes, lambda request: Refused(reason="none here"))
            node = await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now))
            await nodes.start(2, calls=(9, 1))
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            await trio.sleep(1)
            node.node.accept(on_block(node, b"\x55" * 32, 1))
            await trio.sleep(100)
            assert len(stranger.asked) == 1
            assert isinstance(decode_message(await ask_for_headers(stranger, nodes[2]), Refused), Refused)
            answer = decode_message(await ask_for_headers(stranger, node), Headers)
            assert answer == Headers(headers=(None, None))
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_headers_on_any_branch_are_served_in_the_order_asked() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=32) as nodes:
            stranger = await header_stranger(nodes, lambda request: Refused(reason="none here"))
            node = await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now))
            kind: object = node.backend
            assert (isinstance(kind, HeaderSource), isinstance(kind, BlockSource)) == (True, False)
            await nodes.ready()
            losing, winning = await branch(1, 1), await branch(2, 2)
            for block in (*losing, *winning):
                await bitcoin_of(node).hears(block)
            learned = header(sha256d(winning[1][:80]))
            assert await bitcoin_of(node).learn_header(learned)
            wanted = [winning[1][:80], None, losing[0][:80], learned]
            hashes = tuple(b"\x55" * 32 if raw is None else sha256d(raw) for raw in wanted)
            raw = await stranger.ask(node, GetHeaders(hashes=hashes), BLOCK)
            assert decode_message(raw, Headers).headers == tuple(wanted)

    run(main)


def header(parent: bytes, *, bits: int = BITS, works: bool = True, time: int = START, salt: int = 0) -> bytes:
    """A header that meets the target of its bits, or does not."""
    fields: dict[str, Any] = {"version": 4, "previous_block_hash": parent, "merkle_root": salt.to_bytes(32, "big")}
    nonce = 0
    while True:
        raw = pack_header(**fields, time=time, bits=bits, nonce=nonce)
        if (int.from_bytes(sha256d(raw), "little") <= bits_to_target(bits)) == works:
            return raw
        nonce += 1


class HeaderStranger(Stranger):
    """One that is asked for headers. Mutable: ``asked`` (when, and for what), ``pause_s`` before each answer."""

    pause_s = 0.0

    def __init__(self, net: SimulatedNet, number: int) -> None:
        super().__init__(net, number)
        self.asked: list[tuple[float, GetHeaders]] = []

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        try:
            message = decode_message(request, GetHeaders)
        except PeerError:
            return await super().serve(peer_id, protocol, request)
        self.asked.append((trio.current_time(), message))
        await trio.sleep(self.pause_s)
        answer = self.answers[GetHeaders](message)
        return answer if isinstance(answer, bytes) else encode_message(answer)


async def header_stranger(
    nodes: Fleet, answer: Callable[[GetHeaders], Message | bytes], *, number: int = 9
) -> HeaderStranger:
    """A peer that has no share and answers a node that asks for headers."""
    stranger = HeaderStranger(nodes.net, number)
    await nodes.add(stranger)
    stranger.claims(tip=bytes(32), height=0, total_work=0)
    stranger.answers[GetHeaders] = answer
    return stranger


def ask_for_headers(stranger: Stranger, member: Member) -> Awaitable[bytes]:
    return stranger.ask(member, GetHeaders(hashes=(b"\x55" * 32, b"\x66" * 32)), BLOCK)


GOOD = header(FakeBitcoin.GENESIS)
IDLE = header(FakeBitcoin.GENESIS, works=False)
LEADING_ON = header(b"\xee" * 32, works=False)
EASY = header(FakeBitcoin.GENESIS, bits=0x207FFFFE)
EARLY = header(FakeBitcoin.GENESIS, time=GENESIS_TIME)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "answer", "rule"),
    [
        pytest.param(GOOD, Headers(headers=(header(FakeBitcoin.GENESIS, salt=1),)), "block", id="another header"),
        pytest.param(GOOD, Headers(headers=(GOOD, GOOD)), "unasked", id="too many"),
        pytest.param(GOOD, Headers(headers=()), "unasked", id="too few"),
        pytest.param(IDLE, Headers(headers=(IDLE,)), "block", id="no work"),
        pytest.param(LEADING_ON, Headers(headers=(LEADING_ON,)), "block", id="no work, and more of it below"),
        pytest.param(EASY, Headers(headers=(EASY,)), "block", id="another target than Bitcoin's"),
        pytest.param(EARLY, Headers(headers=(EARLY,)), "block", id="before the median of its time"),
        pytest.param(GOOD, b"garbage", "message", id="garbage"),
        pytest.param(GOOD, Blocks(blocks=(GOOD + b"\x00",)), "message", id="a block"),
    ],
)
def test_who_gives_a_false_header_is_banned(wanted: bytes, answer: Message | bytes, rule: str) -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=33) as nodes:
            stranger = await header_stranger(nodes, lambda request: answer)
            node = await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now))
            await nodes.ready()
            nodes.mine(1)
            await trio.sleep(1)
            share = on_block(node, sha256d(wanted), 1)
            node.node.accept(share)
            await nodes.until(lambda: not node.linked(), 30)
            assert set(nodes.faults()[1]) == {rule}
            assert banned(node) == {peer_id_of(9)}
            assert {request.hashes for _, request in stranger.asked} == {(sha256d(wanted),)}
            assert share.hash not in node.chain
            assert await node.backend.header_facts(sha256d(wanted)) is None

    run(main)


@pytest.mark.slow
def test_a_header_that_nobody_has_is_asked_for_ever_more_rarely() -> None:
    async def main(path: Path) -> None:
        async with fleet(path, 0, seed=34) as nodes:
            peers = [
                await header_stranger(nodes, lambda request: Headers(headers=(None,) * len(request.hashes)), number=one)
                for one in (8, 9)
            ]
            node = await nodes.start(1, calls=(8, 9), backend=HeaderBitcoin(now))
            await nodes.ready()
            await nodes.until(lambda: len(node.linked()) == 2, 10)
            nodes.mine(1)
            await trio.sleep(1)
            wanted = [bytes([0x55, salt]) * 16 for salt in range(20)]
            for salt, block in enumerate(wanted):
                node.node.accept(on_block(node, block, salt))
            await trio.sleep(400)
            for block in wanted:
                times = sorted(at for peer in peers for at, request in peer.asked if block in request.hashes)
                pauses = [after - before for before, after in pairwise(times)]
                assert 0.2 < pauses[0] < 2 < 50 < max(pauses) < 63
                assert 12 < len(times) < 24
                assert all(any(block in request.hashes for _, request in peer.asked) for peer in peers)
            assert max(len(request.hashes) for peer in peers for _, request in peer.asked) > 5
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_header_whose_parent_nobody_knows_is_nobodys_fault() -> None:
    async def main(path: Path) -> None:
        headers: dict[bytes, bytes] = {}
        parent = b"\xee" * 32
        for _ in range(2 * MAX_HEADER_BRANCH):
            raw = header(parent)
            headers[parent := sha256d(raw)] = raw
        async with fleet(path, 0, seed=35, latency_s=(0.01, 0.02)) as nodes:
            given = [
                await header_stranger(
                    nodes, lambda request: Headers(headers=tuple(map(headers.get, request.hashes))), number=number
                )
                for number in (8, 9)
            ]
            node = await nodes.start(1, calls=(8, 9), backend=HeaderBitcoin(now))
            await nodes.ready()
            nodes.mine(1)
            await trio.sleep(1)
            node.node.accept(on_block(node, parent, 1))
            missing = list(headers)[MAX_HEADER_BRANCH // 2]  # it leads down to where nobody knows anything
            node.node.accept(on_block(node, missing, 2))
            await trio.sleep(30)
            firsts = [sum(parent in request.hashes for _, request in peer.asked) for peer in given]
            assert all(firsts), "each is asked in its turn"
            assert sum(len(peer.asked) for peer in given) <= 2 * sum(firsts) * MAX_HEADER_BRANCH
            assert len({block for peer in given for _, one in peer.asked for block in one.hashes}) <= 152
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_peer_that_takes_its_time_over_headers_holds_up_no_other() -> None:
    async def main(path: Path) -> None:
        bitcoins: list[HeaderBitcoin] = []
        async with fleet(path, 0, seed=36) as nodes:
            slow = await header_stranger(nodes, lambda request: Headers(headers=(None,) * len(request.hashes)))
            slow.pause_s = 19.0
            await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now, bitcoins))
            await nodes.ready()  # the slow one is the first of its peers
            await nodes.start(2, calls=(1,), backend=HeaderBitcoin(now, bitcoins))
            await nodes.ready()
            nodes.mine(1)
            await nodes.settle()
            for salt in range(8):
                await trio.sleep(2)
                [losing] = await branch(1, salt)
                await bitcoin_of(nodes[2]).hears(losing)
                share = on_block(nodes[1], sha256d(losing[:80]), salt)
                nodes[1].node.accept(share)
                await nodes.until(lambda share=share: share.hash in nodes[1].chain, 3)  # type: ignore[misc]
            await trio.sleep(60)
            assert 1 <= len(slow.asked) <= 2, "what it has not answered does not pile up"
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
def test_a_header_from_after_our_clock_may_be_our_clocks_fault() -> None:
    async def main(path: Path) -> None:
        ahead = header(FakeBitcoin.GENESIS, time=START + 7_200 + 60)
        async with fleet(path, 0, seed=37) as nodes:
            await header_stranger(nodes, lambda request: Headers(headers=(ahead,)))
            node = await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now))
            await nodes.ready()
            nodes.mine(1)
            await trio.sleep(1)
            share = on_block(node, sha256d(ahead), 1)
            node.node.accept(share)
            await trio.sleep(40)
            assert share.hash not in node.chain
            await nodes.until(lambda: share.hash in node.chain, 90)
            assert nodes.faults() == {}

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_headers_of_one_branch_that_are_asked_for_together_are_taken_parents_first(order: tuple[int, ...]) -> None:
    async def main(path: Path) -> None:
        headers = {sha256d(block[:80]): block[:80] for block in await branch(4, 1)}
        async with fleet(path, 0, seed=38) as nodes:
            peer = await header_stranger(
                nodes, lambda request: Headers(headers=tuple(map(headers.get, request.hashes)))
            )
            node = await nodes.start(1, calls=(9,), backend=HeaderBitcoin(now))
            await nodes.ready()
            nodes.mine(1)
            await trio.sleep(1)
            for salt in order:
                node.node.accept(on_block(node, list(headers)[salt], salt))
            await nodes.until(lambda: not node.chain.missing_blocks(), 3)
            assert all([await node.backend.header_facts(block) for block in headers])
            assert [len(request.hashes) for _, request in peer.asked] == [4]
            assert nodes.faults() == {}

    run(main)
