"""Several Bitcoin nodes as one: which of them is asked, and what is said of those that cannot be.

Theory of operation. Questions go to one node, the *active* one: the first of those that the operator named which can be
used. A task looks at all of them every few seconds: whether they answer, are on the right network, have finished their
initial block download, and where their chains end. What is wrong with a node is logged when it begins and when it ends.
A question that a node does not answer goes to the next one, and the node is left alone for a while, each time for
longer. If the active node's chain stays behind another's, the other becomes the active one. As soon as an earlier one
is as far as those behind it, it is the active one again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import trio

from p2pool.bitcoin_backend.headers import ChainRules, network_of
from p2pool.bitcoin_backend.jsonrpc import RpcClient
from p2pool.errors import BackendError, BackendRefusal, ConfigError
from p2pool.outage import Outage

__all__ = ["ASK_TIMEOUT_S", "NodeState", "RpcNodes", "unhex"]

logger = logging.getLogger("p2pool.bitcoin")

#: The oldest Bitcoin Core that is supported, as `getnetworkinfo` counts.
MIN_VERSION: Final = 250_000
#: Seconds between two looks at a node that can be used, and at one that cannot.
WATCH_INTERVAL_S: Final = 10.0
RETRY_INTERVAL_S: Final = 2.0
#: Seconds that a look at a node may take, and a question that is cheap for it.
WATCH_TIMEOUT_S: Final = 15.0
ASK_TIMEOUT_S: Final = 20.0
#: The same where no other node can be asked: one that is slow is better than none.
LONE_TIMEOUT_S: Final = 60.0
#: Blocks that a node may know of without having them: a new one's header comes first.
MAX_LACKING: Final = 2
#: Seconds that the active node's chain may be behind another node's.
LAG_S: Final = 10.0
#: Seconds without a new block after which the operator is told, and again each time that they have doubled: by chance
#: once in e^12 blocks, three years.
STUCK_S: Final = 7_200.0
#: Seconds for which a node that did not answer a question is left alone, if there is another; doubles up to the second
#: if it happens again.
AVOID_S: Final = 60.0
MAX_AVOID_S: Final = 3_600.0
#: Blocks that a node is given at once: they use half of the connections to it.
MAX_SUBMISSIONS: Final = 4
#: What Bitcoin Core says when it has no work to give: not connected, in initial block download.
NOT_READY: Final = (-9, -10)
#: Refusals that concern us or the node, not the question: another node may answer.
NOT_SERVED: Final = (401, 403, 404, *NOT_READY)

_T = TypeVar("_T")


class NodeState:
    """One Bitcoin node, as we see it.

    Mutable fields: ``usable`` (as it was last looked at); ``fault`` (why it must not be asked though it answers, or
    None); ``height``, ``tip``, ``tip_time`` (Unix seconds) of its chain, and how many ``headers`` it has; ``version``
    and ``agent`` (None where it does not say); ``waits`` (how it can be waited for: with the tip that we know, "blind",
    or not at all, "polled"); ``looked_at`` and ``avoid_until`` (trio's clock: when it last answered a look; it did not
    answer a question), ``avoid_s`` (for how long it is avoided the next time); ``outage`` and ``stuck_s`` (how many
    seconds without a block will be told next): what is said of it in the log.
    """

    def __init__(self, client: RpcClient) -> None:
        self.client = client
        self.name = client.endpoint.name
        self.usable = False
        self.fault: str | None = None
        self.height = self.headers = -1
        self.tip = b""
        self.tip_time = 0
        self.version: int | None = None
        self.agent: str | None = None
        self.waits = "known"
        self.looked_at = self.avoid_until = -math.inf
        self.avoid_s = AVOID_S
        self.lacking_since = math.inf
        #: Blocks that it is given at once: on test networks hundreds may be found before it has looked at the first.
        self.submissions = trio.CapacityLimiter(MAX_SUBMISSIONS)
        self.outage = Outage()
        self.stuck_s = STUCK_S

    def avoid(self, now: float) -> None:
        """It did not answer a question."""
        if now < self.avoid_until:  # nor did it answer another one, of the same time
            return
        self.avoid_s = AVOID_S if now > self.avoid_until + MAX_AVOID_S else min(2 * self.avoid_s, MAX_AVOID_S)
        self.avoid_until = now + self.avoid_s


class RpcNodes:
    """The Bitcoin nodes that the operator named, in that order.

    Mutable fields: ``active`` (one of ``nodes``), ``_ahead_since`` (trio's clock: since when another node's chain is
    ahead of the active one's), ``news`` (set when there may be a new tip, and replaced), ``_closed``.
    """

    def __init__(self, clients: Sequence[RpcClient], *, rules: ChainRules, clock: Callable[[], float]) -> None:
        """Asks nothing yet.

        Arguments:
            clients: at least one.
            rules: of the Bitcoin network that all must be on.
            clock: Unix seconds.
        """
        self.nodes: Final = tuple(NodeState(client) for client in clients)
        self.active = self.nodes[0]
        self.news = trio.Event()
        self._rules = rules
        self._clock = clock
        self._ahead_since = math.inf
        self._closed = False

    async def start(self, *, wait: bool = True) -> None:
        """Look at all nodes until one can be used.

        Arguments:
            wait: more than one look.

        Raises:
            ConfigError: a node is on another network, too old, or does not let us in.
            BackendError: no node can be used, and none is waited for.
        """
        while True:
            mistakes: list[ConfigError] = []
            async with trio.open_nursery() as nursery:
                for node in self.nodes:
                    nursery.start_soon(self._look, node, mistakes)
            if mistakes:
                raise mistakes[0]
            self._choose_active()
            if self.active.usable:
                return
            if not wait:
                raise BackendError("no Bitcoin node can be used")  # the log says why
            await trio.sleep(RETRY_INTERVAL_S)

    async def watch(self) -> None:
        """Look at each node every few seconds, until cancelled."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                nursery.start_soon(self._watch_one, node)

    async def aclose(self) -> None:
        """End all connections; who waits gets a `BackendError`."""
        self._closed = True
        self.wake()
        for node in self.nodes:
            await node.client.aclose()

    def wake(self) -> None:
        """End the waits for a tip: there may be a new one."""
        self.news.set()
        self.news = trio.Event()

    def check_open(self) -> None:
        """Raises: BackendError, it was closed."""
        if self._closed:
            raise BackendError("the connection to the Bitcoin node was closed")

    async def ask(self, method: str, *params: object, read: Callable[[Any], _T]) -> _T:
        """Ask the active node; if it does not answer, the others.

        Arguments:
            method: Bitcoin Core's name of it.
            params: in its order.
            read: makes sense of an answer, or raises `BackendError`: then it is none.

        Raises:
            BackendError: none answers, or it was closed.
            BackendRefusal: the node understood and refuses.
        """

        async def question(node: NodeState) -> _T:
            result = await self.call(node, method, *params)
            try:
                return read(result)
            except BackendError as error:
                raise BackendError(f"{node.name}: {method}: {error}") from None

        return await self.on_first(question)

    async def call(self, node: NodeState, method: str, *params: object, more_s: float = 0.0) -> Any:
        """Ask one node what is cheap for it.

        Arguments:
            node: one of ours.
            method: Bitcoin Core's name of it.
            params: in its order.
            more_s: seconds by which the answer may come later than others.

        Raises: as `RpcClient.call`.
        """
        return await node.client.call(method, *params, timeout_s=more_s + self._patience_s(node, ASK_TIMEOUT_S))

    async def on_first(self, question: Callable[[NodeState], Awaitable[_T]]) -> _T:
        """Put questions to the active node; if it does not answer, to the others, the usable ones first.

        Raises: as `ask`.
        """
        self.check_open()
        others = [node for node in self.nodes if node is not self.active and node.usable]
        others.sort(key=lambda node: node.avoid_until)
        first: BackendError | None = None
        failed: list[NodeState] = []
        for node in (self.active, *others):
            try:
                if node.fault is not None:
                    raise BackendError(node.fault)
                result = await question(node)
            except BackendError as error:
                self.check_open()
                if isinstance(error, BackendRefusal) and error.code not in NOT_SERVED:
                    raise
                first = first or error
                node.avoid(trio.current_time())
                failed.append(node)
                continue
            if self.active in failed:
                self._activate(node, str(first))
            return result
        assert first is not None, "there is a node"
        if isinstance(first, BackendRefusal) and first.code in NOT_READY:
            raise BackendError(first.message)
        raise first

    # Inside: nodes.

    def _patience_s(self, node: NodeState, timeout_s: float) -> float:
        return timeout_s if any(other.usable for other in self.nodes if other is not node) else LONE_TIMEOUT_S

    async def _watch_one(self, node: NodeState) -> None:
        while True:
            await trio.sleep(WATCH_INTERVAL_S if node.usable else RETRY_INTERVAL_S)
            await self._look(node)
            self._choose_active()

    async def _look(self, node: NodeState, mistakes: list[ConfigError] | None = None) -> None:
        """Find out whether a node can be used.

        Arguments:
            node: one of ours.
            mistakes: at the start; takes what the operator must put right first.
        """
        try:
            timeout_s = WATCH_TIMEOUT_S if mistakes is not None else self._patience_s(node, WATCH_TIMEOUT_S)
            info = await node.client.call("getblockchaininfo", timeout_s=timeout_s)
            if not node.usable:
                await self._identify(node)
            self._take_info(node, info)
        except BackendError as error:
            if mistakes is not None and isinstance(error, BackendRefusal) and error.code in (401, 403, 404):
                mistakes.append(ConfigError(f"--bitcoind: {error}"))
                return
            node.fault = None
            self._lost(node, str(error))
        except ConfigError as error:
            if mistakes is not None:
                mistakes.append(error)
                return
            node.fault = str(error)
            self._lost(node, node.fault)
        else:
            if node.fault is not None:
                self._lost(node, node.fault, f", at block {node.height:,} of {node.headers:,}")
                return
            node.usable = True
            if (text := node.outage.ended(trio.current_time())) is not None:
                logger.info("Bitcoin node %s can be used again, %s", node.name, text)

    async def _identify(self, node: NodeState) -> None:
        """Find out what a node is that may have been started anew.

        Raises:
            BackendError: it does not say.
            ConfigError: it is on another network, or too old.
        """
        genesis = unhex(await node.client.call("getblockhash", 0, timeout_s=WATCH_TIMEOUT_S))
        if genesis != self._rules.genesis_hash:
            raise ConfigError(
                f"--bitcoind: {node.name} is on Bitcoin network {network_of(genesis) or 'of another kind'}, this node "
                f"is to run on {self._rules.network}: name another Bitcoin node, or another --network"
            )
        node.waits = "known"  # it may be another version than before
        try:
            info = await node.client.call("getnetworkinfo", timeout_s=WATCH_TIMEOUT_S)
        except BackendRefusal as refusal:
            if refusal.code in (401, 404):
                raise
            return  # btcd does not have it, and an operator may have forbidden it
        if not isinstance(info, dict):
            raise BackendError(f"{node.name}: getnetworkinfo: not as Bitcoin Core answers it")
        node.version, node.agent = info.get("version"), info.get("subversion")
        if isinstance(node.version, int) and "Satoshi" in str(node.agent) and node.version < MIN_VERSION:
            raise ConfigError(
                f"--bitcoind: {node.name} is Bitcoin Core {node.version // 10_000}: {MIN_VERSION // 10_000} or newer "
                "is needed"
            )

    def _take_info(self, node: NodeState, info: Any) -> None:
        """Raises: BackendError, the answer makes no sense."""
        try:
            height, headers, tip = int(info["blocks"]), int(info["headers"]), unhex(info["bestblockhash"])
            tip_time = int(info.get("time") or 0)
            if not (0 <= height < 2**31 and 0 <= headers < 2**31 and 0 <= tip_time < 2**32):
                raise ValueError("out of range")
        except (TypeError, KeyError, ValueError, OverflowError, BackendError):
            raise BackendError(f"{node.name}: getblockchaininfo: not as Bitcoin Core or btcd answers it") from None
        if tip != node.tip and node is self.active and node.tip:
            self.wake()
        node.height, node.headers, node.tip, node.tip_time = height, headers, tip, tip_time
        node.looked_at = trio.current_time()
        node.fault = None
        if self._rules.network == "regtest":  # never through with it, as its blocks are old
            return
        if info.get("initialblockdownload"):
            node.fault = f"{node.name}: still in initial block download: it gives no work before it is through"
            return
        if self._rules.network == "mainnet" and self._is_lacking(node):
            node.fault = f"{node.name}: knows of more blocks than it has: it is catching up, or stuck"
            return
        silence_s = self._clock() - tip_time if tip_time else 0.0
        if silence_s < STUCK_S or self._rules.network == "testnet4":
            node.stuck_s = STUCK_S
        elif silence_s >= node.stuck_s:
            node.stuck_s = 2 * silence_s
            logger.warning(
                "Bitcoin node %s has had no new block for %.0f h: is it connected to others, is the clock right?",
                node.name,
                silence_s / 3600,
            )

    def _is_lacking(self, node: NodeState) -> bool:
        """Whether a node has known of blocks for a while that it does not have, as after a crash.

        Not on networks where headers cost little: anybody could stop us with them.
        """
        now = trio.current_time()
        node.lacking_since = min(node.lacking_since, now) if node.headers - node.height > MAX_LACKING else math.inf
        return now - node.lacking_since >= LAG_S or (not node.usable and node.lacking_since <= now)

    def _lost(self, node: NodeState, reason: str, detail: str = "") -> None:
        node.usable = False
        text = node.outage.failed(reason, trio.current_time())
        if text is not None:
            logger.error("Bitcoin node cannot be used: %s%s", text, detail)

    def _choose_active(self) -> None:
        """The first node that can be used, unless its chain has been behind another's for a while."""
        now = trio.current_time()
        usable = [node for node in self.nodes if node.usable]
        usable = [node for node in usable if node.avoid_until <= now] or usable
        if not usable:
            return
        chosen = self.active if self.active in usable else usable[0]
        best = max(usable, key=lambda node: node.height)
        if best.height <= chosen.height:
            self._ahead_since = math.inf
            chosen = next(node for node in usable if node.height >= chosen.height)
            self._activate(chosen, "it is the first that can be used")
            return
        self._ahead_since = min(self._ahead_since, now)
        # Both have the same blocks at nearly the same time, but are looked at one after the other.
        if chosen.looked_at - self._ahead_since >= LAG_S or chosen is not self.active:
            self._ahead_since = math.inf
            self._activate(best, f"it is at block {best.height}, {chosen.name} only at {chosen.height}")

    def _activate(self, node: NodeState, reason: str) -> None:
        if node is not self.active:
            logger.warning("Bitcoin node %s is used now: %s", node.name, reason)
            self.active = node
            self.wake()


def unhex(text: Any) -> bytes:
    """A hash as displayed, in internal order. Raises: BackendError."""
    try:
        raw = bytes.fromhex(text)[::-1]
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != 32:
        raise BackendError(f"expected a hash, got {str(text)[:80]!r}")
    return raw
