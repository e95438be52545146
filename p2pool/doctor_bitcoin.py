"""What `p2pool doctor` asks a Bitcoin node, and what it makes of the answers.

Theory of operation. A node is asked everything at once, each question with a limit of its own; none of them changes
anything (a block of one byte is submitted: it cannot be read, so the call is there). Then each check is a function of
the answers. A refusal is an answer too: what it means depends on the question.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import trio

from p2pool.bitcoin_backend.headers import CHAIN_RULES, MAX_FUTURE_S, network_of
from p2pool.bitcoin_backend.jsonrpc import Endpoint, RpcClient
from p2pool.bitcoin_backend.nodes import MIN_VERSION, NOT_READY, STUCK_S, unhex
from p2pool.bitcoin_backend.selection import WEIGHT_LIMIT, coinbase_reserve, read_template
from p2pool.errors import BackendError, BackendRefusal, ConfigError
from p2pool.finding import Finding, ok, problem, warning
from sharechain.params import Params

__all__ = ["Answer", "NodeAnswers", "ask_nodes", "judge_nodes", "judge_zmq"]

#: Blocks that a node may lag behind the headers that it knows: one is always being checked.
_LAG_BLOCKS: Final = 2
#: Seconds. A clock that is off by more is worth a word.
_CLOCK_S: Final = 10
#: Seconds for a template beyond which miners wait noticeably after each block.
_SLOW_S: Final = 2.0
#: Weight units: what "blockreservedweight" is rounded up to.
_ROUND_WEIGHT: Final = 1_000
#: The version from which Bitcoin Core knows "blockreservedweight"; before, "blockmaxweight" does the same, and Core
#: itself takes off so much for header and coinbase.
_RESERVED_WEIGHT_VERSION: Final = 290_000
_OLD_RESERVE: Final = 4_000
#: The script of a signet on which everybody may make blocks: OP_TRUE.
_OPEN_CHALLENGE: Final = "51"
#: JSON-RPC error codes of Bitcoin Core, and HTTP's for a method that is not on a user's whitelist.
_MISC: Final = -1
_INVALID_PARAMETER: Final = -8
_FORBIDDEN: Final = 403
#: JSON-RPC's code for a method that is not there.
_UNKNOWN_METHOD: Final = -32601
_UNKNOWN_BLOCK: Final = "00" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back on one question.

    Arguments:
        result: as `json` parses it; None with an error.
        error: the node's refusal, or why there is no answer.
        sent, received: Unix seconds, by our clock.
        seconds: that it took.
    """

    result: Any
    error: BackendError | None
    sent: float
    received: float
    seconds: float

    @property
    def table(self) -> dict[str, Any]:
        """The result if it is an object, else an empty one."""
        return self.result if isinstance(self.result, dict) else {}

    @property
    def is_missing(self) -> bool:
        """Whether the node does not know the method, or does not let us have it."""
        if not isinstance(self.error, BackendRefusal):
            return False
        is_unimplemented = self.error.code == _MISC and "unimplemented" in self.error.message.lower()  # btcd
        return is_unimplemented or self.error.code in (_UNKNOWN_METHOD, _FORBIDDEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAnswers:
    """One Bitcoin node's answers, by method; only that to ``getblockchaininfo`` if it is an error."""

    name: str
    answers: Mapping[str, Answer]

    def __getitem__(self, method: str) -> Answer:
        return self.answers[method]

    @property
    def version(self) -> int | None:
        """As Bitcoin Core counts (310000); None for others."""
        info = self["getnetworkinfo"].table
        version = info.get("version")
        return version if isinstance(version, int) and "Satoshi" in str(info.get("subversion")) else None


async def ask_nodes(
    endpoints: Sequence[Endpoint], *, network: str, limit_s: float, clock: Callable[[], float]
) -> list[NodeAnswers]:
    """Ask Bitcoin nodes all that the checks want to know; takes twice the limit at most.

    Arguments:
        endpoints: where they are.
        network: the Bitcoin network that they should be on.
        limit_s: seconds that each answer may take.
        clock: Unix seconds.

    Returns: the answers in the order of the endpoints.
    """
    answers: list[NodeAnswers | None] = [None] * len(endpoints)

    async def ask_one(place: int, endpoint: Endpoint) -> None:
        client = RpcClient(endpoint, timeout_s=limit_s)
        try:
            answers[place] = NodeAnswers(name=endpoint.name, answers=await _interview(client, network, clock))
        finally:
            await client.aclose()

    async with trio.open_nursery() as nursery:
        for place, endpoint in enumerate(endpoints):
            nursery.start_soon(ask_one, place, endpoint)
    return [one for one in answers if one is not None]


async def _interview(client: RpcClient, network: str, clock: Callable[[], float]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}

    async def ask(method: str, *params: object) -> Answer:
        sent, begun = clock(), time.perf_counter()
        result, fault = None, None
        try:
            result = await client.call(method, *params)
        except BackendError as error:
            fault = error
        answer = Answer(result=result, error=fault, sent=sent, received=clock(), seconds=time.perf_counter() - begun)
        answers[method] = answer
        return answer

    info = await ask("getblockchaininfo")
    if info.error is not None:
        return answers

    async def wait() -> None:
        # One millisecond: nobody waits, but the node says whether it can.
        known = await ask("waitfornewblock", 1, str(info.table.get("bestblockhash")))
        answers["waitfornewblock with a tip"] = known
        if isinstance(known.error, BackendRefusal) and known.error.code in (_MISC, _INVALID_PARAMETER):
            await ask("waitfornewblock", 1)

    async with trio.open_nursery() as nursery:
        rules = ["segwit", "signet"] if network == "signet" else ["segwit"]
        nursery.start_soon(ask, "getblockhash", 0)
        nursery.start_soon(ask, "getnetworkinfo")
        nursery.start_soon(ask, "getblocktemplate", {"rules": rules})
        nursery.start_soon(wait)
        nursery.start_soon(ask, "submitblock", "00")
        nursery.start_soon(ask, "preciousblock", _UNKNOWN_BLOCK)
        nursery.start_soon(ask, "getzmqnotifications")
    return answers


def judge_nodes(nodes: Sequence[NodeAnswers], params: Params) -> list[Finding]:
    """What the answers of all nodes mean. One that is not there is no problem while another is.

    Arguments:
        nodes: as `ask_nodes` gives them.
        params: of the share network that they shall serve.
    """
    is_any_there = any(node["getblockchaininfo"].error is None for node in nodes)
    findings: list[Finding] = []
    for node in nodes:
        for one in _judge_node(node, params):
            finding = one if len(nodes) == 1 else replace(one, found=f"{node.name}: {one.found}")
            error = node["getblockchaininfo"].error
            if is_any_there and error is not None and not isinstance(error, BackendRefusal):
                finding = replace(finding, level="warning")
            findings.append(finding)
    return findings


def judge_zmq(nodes: Sequence[NodeAnswers], addresses: Sequence[str]) -> Iterator[Finding]:
    """Whether what --zmq names can be listened to, and some node announces blocks there."""
    from p2pool.bitcoin_backend.hashblock import check_zmq

    rows: list[Any] = []
    for node in nodes:
        notifications = node.answers.get("getzmqnotifications")
        if notifications is not None and isinstance(notifications.result, list):
            rows += [row for row in notifications.result if isinstance(row, dict)]
    for address in addresses:
        try:
            check_zmq(address)
        except ConfigError as error:
            words = str(error).removeprefix("--zmq: ")
            yield problem("zmq", f"{address}: {words}", "do that, or leave --zmq out: blocks are seen over RPC as well")
            continue
        if any(_is_same_place(address, str(row.get("address"))) for row in rows if row.get("type") == "pubhashblock"):
            yield ok("zmq", f"{address}: the Bitcoin node announces blocks there")
        else:
            yield warning(
                "zmq",
                f"{address}: no Bitcoin node says that it announces blocks there",
                f"put zmqpubhashblock={address} into its bitcoin.conf, or leave --zmq out: blocks are seen over RPC as "
                "well, half a millisecond later",
            )


def _judge_node(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    info = node["getblockchaininfo"]
    if info.error is not None:
        found, advice = _words_of(info.error, node.name, "getblockchaininfo")
        yield problem("bitcoin node", found, advice)
        return
    yield from _check_version(node)
    network = list(_check_network(node, params))
    yield from network
    if any(finding.level == "problem" for finding in network):
        return  # all else that could be said would be of another network
    for check in NODE_CHECKS:
        yield from check(node, params)


def _check_version(node: NodeAnswers) -> Iterator[Finding]:
    answer, speed = node["getnetworkinfo"], f"answers in {node['getblockchaininfo'].seconds * 1000:.0f} ms"
    if answer.is_missing:
        yield warning(
            "bitcoin node",
            f"{node.name} {speed}; it has no getnetworkinfo, or may not be asked for it (btcd? rpcwhitelist?)",
            "for tests that is enough; to mine for money use Bitcoin Core",
        )
        return
    if answer.error is not None:
        yield problem("bitcoin node", *_words_of(answer.error, node.name, "getnetworkinfo"))
        return
    version, agent = answer.table.get("version"), answer.table.get("subversion")
    if node.version is None:
        yield warning(
            "bitcoin node",
            f"{node.name} {speed} and calls itself {agent!r}, version {version!r}",
            "only Bitcoin Core is known to work",
        )
    elif node.version < MIN_VERSION:
        yield problem(
            "bitcoin node",
            f"{node.name} is Bitcoin Core {_core_version(node.version)}",
            f"install Bitcoin Core {MIN_VERSION // 10_000} or newer",
        )
    else:
        yield ok("bitcoin node", f"{node.name} {speed}: Bitcoin Core {_core_version(node.version)} ({agent})")


def _check_network(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    answer, wanted = node["getblockhash"], params.bitcoin_network
    if answer.error is not None:
        yield problem("bitcoin network", *_words_of(answer.error, node.name, "getblockhash"))
        return
    try:
        genesis = unhex(answer.result)
    except BackendError as error:
        yield problem("bitcoin network", str(error), "is this the RPC port of a Bitcoin node?")
        return
    if genesis != CHAIN_RULES[wanted].genesis_hash:
        yield problem(
            "bitcoin network",
            f"the node is on {network_of(genesis) or 'a network that p2pool does not know'}, wanted is {wanted}",
            "name another Bitcoin node with --bitcoind, or another --network",
        )
        return
    if wanted != "signet":
        yield ok("bitcoin network", wanted)
        return
    challenge = str(
        node["getblockchaininfo"].table.get("signet_challenge")
        or node["getblocktemplate"].table.get("signet_challenge")
        or ""
    )
    if challenge == _OPEN_CHALLENGE:
        yield ok("bitcoin network", "signet, one on which everybody may make blocks")
    else:
        yield warning(
            "bitcoin network",
            f"signet; its operators sign each block (challenge {challenge[:16] or 'unknown'}...)",
            "good for trying p2pool: shares are made and paid for, but no block of ours will be accepted. For blocks "
            "use testnet4, or a signet of your own with signetchallenge=51",
        )


def _check_sync(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    answer = node["getblockchaininfo"]
    info, network = answer.table, params.bitcoin_network
    height, headers, time_ = (_number(info, key) for key in ("blocks", "headers", "time"))
    if height is None or headers is None:
        yield problem(
            "bitcoin sync",
            "getblockchaininfo does not say blocks and headers",
            "is this a Bitcoin Core, or something that stands before it?",
        )
        return
    age_s = answer.received - time_ if time_ else 0.0
    found = f"block {height:,} of {headers:,}" + (
        f", the last one {_age(age_s)} old" if time_ and network != "regtest" else ""
    )
    if info.get("initialblockdownload") and network != "regtest":
        part = info.get("verificationprogress")
        done = f" ({part:.1%} done)" if isinstance(part, float) else ""
        yield problem(
            "bitcoin sync",
            f"{found}; the node is still in initial block download{done}",
            "wait until it is through: it gives no work before. p2pool run waits for it as well",
        )
    elif headers - height > _LAG_BLOCKS:
        yield warning(
            "bitcoin sync",
            f"{found}: it is catching up",
            "wait: work on an old block earns nothing. If it stays, look into the node's debug.log",
        )
    elif age_s > STUCK_S and network not in ("regtest", "testnet4"):
        yield warning(
            "bitcoin sync",
            found,
            "is the node connected to others (bitcoin-cli getpeerinfo), and is the clock right?",
        )
    else:
        yield ok("bitcoin sync", found)


def _check_connections(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    info = node["getnetworkinfo"].table
    count = _number(info, "connections")
    if count is None:
        return  # btcd
    inbound = _number(info, "connections_in")
    found = f"{count} connections to other Bitcoin nodes" + ("" if inbound is None else f", {inbound} of them inbound")
    if count or params.bitcoin_network == "regtest":
        yield ok("bitcoin peers", found)
        return
    yield problem(
        "bitcoin peers",
        "the Bitcoin node is connected to no other" + (": its network is off" if not info.get("networkactive") else ""),
        "a block that is found would reach nobody. Switch it on (bitcoin-cli setnetworkactive true), look for connect= "
        "and proxy= in bitcoin.conf, and whether it may call out to the internet",
    )


def _check_storage(node: NodeAnswers, _params: Params) -> Iterator[Finding]:
    info = node["getblockchaininfo"].table
    if info.get("pruned"):
        lowest = _number(info, "pruneheight")
        below = f" below {lowest:,}" if lowest else " that it has deleted"
        yield ok("bitcoin blocks", f"pruned: enough to mine with, but blocks{below} cannot be audited from it")
    elif "pruned" in info:
        yield ok("bitcoin blocks", "all are kept. A wallet and a transaction index are not needed")


def _check_template(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    answer = node["getblocktemplate"]
    if answer.error is not None:
        found, advice = _words_of(answer.error, node.name, "getblocktemplate")
        if answer.is_missing:
            advice = "allow getblocktemplate (rpcwhitelist in bitcoin.conf): without it there is nothing to mine"
        yield problem("bitcoin template", found, advice)
        return
    weight, sigops = coinbase_reserve(max(params.payout_classes))
    read = partial(read_template, answer.result, network=params.bitcoin_network)
    try:
        whole = read(reserved_weight=0, reserved_sigops=0)
        ours = read(reserved_weight=weight, reserved_sigops=sigops)
    except BackendError as error:
        yield problem(
            "bitcoin template",
            str(error).removeprefix("getblocktemplate: "),
            "p2pool cannot mine on this: is there a newer p2pool, or something between it and the Bitcoin node?",
        )
        return
    fees = sum(transaction.fee for transaction in whole.transactions)
    found = (
        f"block {whole.height:,} in {answer.seconds:.2f} s: {len(whole.transactions):,} transactions, "
        f"{fees:,} sat of fees"
    )
    if answer.seconds > _SLOW_S:
        yield warning(
            "bitcoin template",
            found,
            "miners work on an empty or old block for so long: give the Bitcoin node more CPU, memory (dbcache) or a "
            "faster disk, or let fewer programs ask it",
        )
    else:
        yield ok("bitcoin template", found)
    size = 80 + 9  # a header and the largest count of transactions
    needed = -(-(weight + 4 * size) // _ROUND_WEIGHT) * _ROUND_WEIGHT
    dropped = len(whole.transactions) - len(ours.transactions)
    if not dropped:
        yield ok("coinbase room", f"the largest coinbase ({weight:,} weight units) fits beside the transactions")
        return
    lost = whole.coinbase_value - ours.coinbase_value
    parts = sum(transaction.weight for transaction in whole.transactions)
    parts -= sum(transaction.weight for transaction in ours.transactions)
    yield warning(
        "coinbase room",
        f"the largest coinbase ({weight:,} weight units) does not fit: p2pool drops {dropped:,} transactions "
        f"({parts:,} weight units, {lost:,} sat of fees) of each such block",
        f"put {_room_setting(node.version, needed)} into bitcoin.conf: then the node chooses for that room itself",
    )


def _check_clock(node: NodeAnswers, params: Params) -> Iterator[Finding]:
    info, answer = node["getblockchaininfo"], node["getblocktemplate"]
    limit_s = params.future_limit_s
    cost = (
        f"shares of a clock more than {limit_s} s ahead wait at other nodes and lose the race; a clock behind makes "
        "this node hold back those of others. Let NTP keep it (timedatectl set-ntp true)"
    )
    tip_time, median = _number(info.table, "time"), _number(info.table, "mediantime")
    behind_s = max((tip_time or 0) - MAX_FUTURE_S, median or 0) - info.received
    if behind_s > 1:
        yield problem(
            "clock",
            f"this machine's clock is at least {_age(behind_s)} behind: the Bitcoin chain is further",
            cost,
        )
        return
    off_s = 0.0
    current, least = _number(answer.table, "curtime"), _number(answer.table, "mintime")
    if current is not None and current > (least or 0):  # else it is not the node's clock
        # In whole seconds, told at some time between question and answer.
        off_s = max(answer.sent - current - 1, 0.0) - max(current - answer.received - 1, 0.0)
    peers_s = -(_number(node["getnetworkinfo"].table, "timeoffset") or 0)
    for off, other in ((off_s, "the Bitcoin node's clock"), (peers_s + off_s, "those of the Bitcoin node's peers")):
        if abs(off) <= _CLOCK_S:
            continue
        found = f"this machine's clock is {_age(abs(off))} {'ahead of' if off > 0 else 'behind'} {other}"
        yield (problem if abs(off) > limit_s else warning)("clock", found, cost)
        return
    if current is None:
        return  # the template says what is wrong
    others = "the Bitcoin node and its peers" if node["getnetworkinfo"].table.get("connections") else "the Bitcoin node"
    yield ok("clock", f"agrees with {others} within {_CLOCK_S} s")


def _check_news(node: NodeAnswers, _params: Params) -> Iterator[Finding]:
    known, blind = node["waitfornewblock with a tip"], node["waitfornewblock"]
    if known.error is None:
        yield ok("new blocks", "seen at once (waitfornewblock with the known tip)")
    elif blind.error is None:
        yield ok("new blocks", "seen at once, or in rare cases half a second late: waitfornewblock takes no tip here")
    elif blind.is_missing or known.is_missing:
        yield warning(
            "new blocks",
            "the node has no waitfornewblock, or does not let us have it: it is asked for its tip four times a second",
            "a new block is seen up to a quarter of a second late. Bitcoin Core has it; see rpcwhitelist",
        )
    else:
        yield problem("new blocks", *_words_of(blind.error, node.name, "waitfornewblock"))


def _check_submit(node: NodeAnswers, _params: Params) -> Iterator[Finding]:
    submit, precious = node["submitblock"], node["preciousblock"]
    if submit.is_missing:
        yield problem(
            "submitblock",
            "the node does not have it, or does not let us have it",
            "blocks that are found could not be handed to Bitcoin: see rpcwhitelist in bitcoin.conf",
        )
    elif submit.error is not None and not isinstance(submit.error, BackendRefusal):
        yield problem("submitblock", *_words_of(submit.error, node.name, "submitblock"))
    elif precious.is_missing:
        yield warning(
            "submitblock",
            "answers; preciousblock is not there, or we may not have it",
            "if two blocks of one height are found, the node stays with the first even if the second is ours: see "
            "rpcwhitelist in bitcoin.conf",
        )
    elif precious.error is not None and not isinstance(precious.error, BackendRefusal):
        yield problem("submitblock", *_words_of(precious.error, node.name, "preciousblock"))
    else:
        yield ok("submitblock", "answers, and so does preciousblock")


#: What is asked of a node that is there and on the right network, in the order of the lines.
NODE_CHECKS: Final[tuple[Callable[[NodeAnswers, Params], Iterator[Finding]], ...]] = (
    _check_sync,
    _check_connections,
    _check_storage,
    _check_template,
    _check_news,
    _check_submit,
    _check_clock,
)


def _words_of(error: BackendError, name: str, method: str) -> tuple[str, str]:
    """What went wrong and what to do: our RPC client says both in one sentence."""
    text = str(error).removeprefix(f"{name}: {method}: ")
    found, _, advice = text.partition(": ")
    if "node is starting" in found:
        return f"{name}: {text}", "wait until it has started; p2pool run waits for it as well"
    if isinstance(error, BackendRefusal) and error.code in NOT_READY:
        return f"{name}: {method}: {text}", "see to its connections and its download of the chain: then it gives work"
    if isinstance(error, BackendRefusal) and error.code not in (401, _FORBIDDEN, 404):
        return f"{name}: {method}: {text}", "look up what it says, in its debug.log as well"
    return f"{name}: {found}", advice or "name the right node and its credentials with --bitcoind or --cookie-file"


def _room_setting(version: int | None, needed: int) -> str:
    if version is not None and version < _RESERVED_WEIGHT_VERSION:
        return f"blockmaxweight={WEIGHT_LIMIT - needed + _OLD_RESERVE}"
    return f"blockreservedweight={needed}"


def _core_version(version: int) -> str:
    return f"{version // 10_000}.{version // 100 % 100}"


def _number(table: Mapping[str, Any], key: str) -> int | None:
    value = table.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _age(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _is_same_place(ours: str, theirs: str) -> bool:
    """Whether an address that a node publishes on is the one that we listen to: hosts have many names, ports one."""
    port = re.fullmatch(r"tcp://.+:(\d+)", ours)
    return ours == theirs or (port is not None and re.fullmatch(rf"tcp://.+:{port[1]}", theirs) is not None)
