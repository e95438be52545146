"""The node: opens, wires, serves and closes. The single writer of the sharechain; holds no rule and no format.

Theory of operation. Every change of the sharechain happens in one synchronous stretch (``accept``): chain, store,
new work, jobs to every miner. Around it run a task that follows the Bitcoin node, one that submits blocks, the
Stratum server and the network of nodes; the last two ask the node as their desk. A submission that is a block is handed
to the block task, which submits it before the share joins the chain: nothing about the sharechain may delay a Bitcoin
block. Blocks that peers announce are completed, submitted and passed on the same way.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import trio

from p2pool.bitcoin_backend import BitcoinBackend, BlockTemplate, HeaderFacts, SubmitResult
from p2pool.bitcoin_backend.address import AddressError, decode_address, encode_address
from p2pool.bitcoin_backend.headers import CHAIN_RULES
from p2pool.bitcoin_backend.template import empty_template
from p2pool.blocks import NO_PARENT, RETRY_S, BlockSubmitter, FoundBlock
from p2pool.database import DataDirectory, load_workers
from p2pool.errors import BackendError, BackendRefusal, ConfigError, StratumError
from p2pool.exchange import BlockExchange
from p2pool.jobs import Candidate, JobBook, next_heaviness, next_work
from p2pool.outage import Outage
from p2pool.p2p.network import Network, NetworkDesk, NetworkStatistics
from p2pool.report import load_chain
from p2pool.stratum.accounting import Accounting
from p2pool.stratum.login import explain_user, parse_user, payout_class_for
from p2pool.stratum.server import ServerSettings, StratumServer
from p2pool.stratum.values import Notify, Submission, SubmissionOutcome, Verdict, Worker
from sharechain.chain import Accepted, ChainStatistics, Outcome, Sharechain, Unanchored
from sharechain.difficulty import DIFFICULTY_1_TARGET, difficulty_of
from sharechain.errors import InvalidShare, StoreError
from sharechain.params import BLOCK_FALL, Params
from sharechain.share import Share, is_payout_script
from sharechain.store import StoredShare
from sharechain.validate import BlockFacts, is_block

__all__ = ["BlockOutcome", "Node", "NodeStatistics", "script_of"]

logger = logging.getLogger("p2pool.node")

#: Seconds. Miners drop a pool that is silent for 60 to 120 s, so that there is fresh work at least so often.
WORK_INTERVAL_S: Final = 20.0
#: Seconds between two templates on one tip; the newer one is used if it is worth it, or after so many seconds.
TEMPLATE_INTERVAL_S: Final = 10.0
TEMPLATE_AGE_S: Final = 30.0
#: A newer template is worth new jobs if it pays more by one part in so many.
WORTH: Final = 100
#: Seconds that miners may be left on a block that is no longer the last, while the Bitcoin node makes a template.
#: Longer than to read a full one takes: new work for every miner in that moment would only delay it.
BRIDGE_S: Final = 1.0
#: Seconds of empty blocks after which the operator is told.
EMPTY_S: Final = 5.0
#: Share difficulties that a miner may ask for; the rules narrow them further.
MIN_DIFFICULTY: Final = 2.0**-31
MAX_DIFFICULTY: Final = 2.0**200
#: Seconds between two waits for the disk: what a power cut can cost.
SYNC_INTERVAL_S: Final = 1.0
#: Seconds between two looks for the Bitcoin blocks that waiting shares build on, and how many are looked for at once.
ANCHOR_INTERVAL_S: Final = 0.5
MAX_ANCHORS: Final = 64
#: Seconds between two of the node's words about itself.
STATUS_INTERVAL_S: Final = 2.0
#: Seconds between two times that the miners' books are kept; longer where many workers make them thick.
BOOKS_INTERVAL_S: Final = 10.0
WORKERS_PER_BOOKS_INTERVAL: Final = 1_000
#: Own shares that wait to join the chain, to be published then.
MAX_OWN_WAITING: Final = 100
#: Addresses in the node's word about itself.
MAX_TOLD_ADDRESSES: Final = 100
#: Seconds over which the bandwidth is measured.
TRAFFIC_INTERVAL_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOutcome:
    """A block that this node found, and what Bitcoin said of it."""

    #: As displayed.
    block_hash: str
    block_height: int
    #: Sat.
    value: int
    payouts: int
    transactions: int
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatistics:
    """A node at one moment."""

    chain: ChainStatistics
    #: Shares that joined the chain since the start, from whomever.
    shares: int
    #: Shares of own miners that broke a rule, by rule.
    invalid: Mapping[str, int]
    blocks: Sequence[BlockOutcome]
    bitcoin_height: int
    share_difficulty: float
    #: None if the node is alone by choice.
    network: NetworkStatistics | None


@dataclass(kw_only=True, slots=True)
class _Counters:
    shares: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    blocks: list[BlockOutcome] = field(default_factory=list)
    warned: Counter[str] = field(default_factory=Counter)


class Node:
    """One node on one data directory and one Bitcoin backend.

    Mutable fields: ``chain`` and the store (written only by ``accept`` and what it calls), ``_template`` (from
    Bitcoin, the one that miners work on, since ``_template_since``), ``_book`` with ``_notifies`` (jobs by desk
    id), ``_share_targets`` and ``_heaviness`` (of each address that mines, see ``next_heaviness``), ``_accounting``
    (what miners have done), ``_outcomes`` (what Bitcoin said of blocks whose share is not in the chain yet),
    ``blocks``, ``network``, ``_synced_at`` and ``_unsynced``, and the counters.
    Invariant: the store holds what the chain holds.
    """

    def __init__(
        self,
        *,
        directory: DataDirectory,
        params: Params,
        backend: BitcoinBackend,
        stratum: ServerSettings | None = None,
        default_address: str | None = None,
        payout_classes: Sequence[tuple[str, int]] = (),
        shares_per_window: int = 200,
        clock: Callable[[], float] = time.time,
        network: Callable[[NetworkDesk], Network] | None = None,
    ) -> None:
        """Load the chain; nothing runs yet.

        Args:
            directory: held for this node; ``close`` it after ``run``.
            params: of the share network.
            backend: on the Bitcoin network of ``params``.
            stratum: settings of the Stratum port.
            default_address: paid for miners whose user name is no address; None refuses them.
            payout_classes: parts of user agents with the class for them: see ``payout_class_for``.
            shares_per_window: how many shares of one address a window should hold at most; big miners get harder
                share targets for it, as far as the rules let them. 0 leaves all at the chain's.
            clock: Unix seconds.
            network: makes the network of nodes round this one; None for a node that is alone.

        Raises:
            ConfigError: the backend is on another network, the default address is none, or there is no such class.
            StoreError: the stored chain is damaged.
        """
        if backend.network != params.bitcoin_network:
            raise ConfigError(
                f"the Bitcoin node is on {backend.network}, the share network on {params.bitcoin_network}"
            )
        self.params: Final = params
        self._directory = directory
        self._store = directory.store
        self._backend = backend
        self._clock = clock
        self._default_script = None if default_address is None else script_of(default_address, params)
        for _, payout_class in payout_classes:
            if payout_class not in params.payout_classes:
                classes = ", ".join(map(str, params.payout_classes))
                raise ConfigError(f"--payout-class: one of {classes} is needed, got {payout_class}")
        self._payout_classes = tuple(payout_classes)
        self._shares_per_window = shares_per_window
        self._unsettled: list[bytes] = []
        self.chain: Final = load_chain(params, self._store, self._note_unsettled(self._store.shares()))
        self.server: Final = StratumServer(self, stratum)
        self._accounting = _load_accounting(directory, clock())
        self._template: BlockTemplate | None = None
        self._template_since = -math.inf
        self._bitcoin_height = -1
        self._book = JobBook(self.chain, first_id=int(clock() * 1000) & 0xFFFFFFFF)
        self._notifies: dict[str, Notify] = {}
        self._share_targets: dict[str, int] = {}
        self._heaviness: dict[str, int] = {}
        self._outcomes: dict[bytes, str] = {}
        self._submitter = BlockSubmitter(backend=backend, directory=directory, on_answer=self._on_answer)
        self._synced_at = -math.inf
        self._unsynced = False
        self._counters = _Counters()
        self._traffic = (0, 0, clock())
        self._anchors_wanted = trio.Event()
        self._work_due = trio.Event()
        self._fault: StoreError | None = None
        self._faulted = trio.Event()
        self._own_waiting: dict[bytes, Share] = {}
        self._anchor_turn = 0
        #: Blocks between our Bitcoin and other nodes.
        self.blocks: Final = BlockExchange(backend=backend, submitter=self._submitter, on_news=self._look_for_anchors)
        self.network: Final = None if network is None else network(self)
        self.blocks.network = self.network
        for warning in directory.warnings:
            logger.warning("%s", warning)

    async def run(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled.

        Args:
            listeners: listening sockets for miners, see ``p2pool.stratum.server.open_listeners``.
        """
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._follow_bitcoin)
                await nursery.start(self._submitter.run, self._unsettled)
                await nursery.start(self.server.serve, listeners)
                nursery.start_soon(self._tick)
                nursery.start_soon(self._end_on_fault)
                nursery.start_soon(self._anchor)
                nursery.start_soon(self._follow_chain)
                if self.network is not None:
                    await nursery.start(self.network.run)
                task_status.started()
        finally:
            self._keep_books(b"".join(self._accounting.encode(self._clock())))
            for listener in listeners:  # the server has closed them, if it came so far
                listener.close()

    def statistics(self) -> NodeStatistics:
        """Counts and gauges; a frozen value."""
        work = self._book.work
        return NodeStatistics(
            chain=self.chain.statistics(),
            shares=self._counters.shares,
            invalid=dict(self._counters.invalid),
            blocks=tuple(self._counters.blocks),
            bitcoin_height=self._bitcoin_height,
            share_difficulty=0.0 if work is None else difficulty_of(work.share_target),
            network=None if self.network is None else self.network.statistics(),
        )

    def accept(self, share: Share) -> Outcome:
        """Take a share into the chain and on disk, and give miners new work if it moved the tip.

        Raises:
            InvalidShare: the share breaks a rule; nothing has changed.
        """
        if self._fault is not None:
            raise self._fault
        outcome = self.chain.accept(share, self._clock())
        if isinstance(outcome, Accepted):
            self._record(outcome)
        elif isinstance(outcome, Unanchored):
            logger.debug("share %s waits for Bitcoin block %s", _shown(share.hash), _shown(outcome.block_hash))
            self._look_for_anchors()
        return outcome

    # -- the desk of the network: see ``p2pool.p2p.network.NetworkDesk`` ------------------------------------------

    def replace_chain(self, chain: Sharechain, shares: Iterable[Share]) -> None:
        """Go over to a history that was judged aside."""
        self.chain.replace(chain)
        tip = self.chain.tip
        assert tip is not None, "only a history with more work replaces ours"
        facts = self.chain.known_blocks()
        try:
            self._store.replace(
                shares,
                facts=facts,
                tip=tip.hash,
                short_history=self.chain.short_history,
                first_seen_ms=int(self._clock() * 1000),
                sync=True,
            )
            self._directory.note_written()
        except StoreError as fault:
            self._end_by(fault)
            raise
        self._renew_work(clean=True)

    def encoded(self, share_hash: bytes) -> bytes | None:
        """A share as it goes over the wire."""
        return self._store.encoded(share_hash)

    def bitcoin_tip(self) -> tuple[bytes, int]:
        """Hash and height of Bitcoin's tip."""
        template = self._template
        return (bytes(32), 0) if template is None else (template.previous_block_hash, template.height - 1)

    async def learn_blocks(self, block_hashes: Iterable[bytes]) -> bool:
        """Look up Bitcoin blocks that shares build on; whether all are known."""
        known = True
        for block_hash in block_hashes:
            if self.chain.block_facts(block_hash) is not None:
                continue
            try:
                facts = await self._backend.header_facts(block_hash)
            except BackendError as error:
                self._warn_of("facts", "the Bitcoin node does not tell what shares build on: %s", error)
                return False
            if facts is None:
                known = False
            else:
                self._learn(facts)
        return known

    def ready(self) -> None:
        """Miners may be served."""
        self._renew_work(clean=True)

    # -- the desk of the Stratum server ----------------------------------------------------------------------

    def authorize(self, *, user: str, password: str, user_agent: str) -> Worker:
        """Who mines: see ``p2pool.stratum.values.Desk``."""
        options = parse_user(user, password)
        name = options.worker_name
        try:
            script = decode_address(options.address, self.params.bitcoin_network)
        except AddressError as error:
            if self._default_script is None or _looks_like_address(options.address):
                raise StratumError(24, explain_user(user, str(error))) from None
            script = self._default_script
            name = f"{options.address}.{name}" if name else options.address
        if not is_payout_script(script):
            raise StratumError(24, "user name: an address of a type that the pool does not pay")
        return Worker(
            user=user,
            name=name,
            address=encode_address(script, self.params.bitcoin_network) or script.hex(),
            payout_script=script,
            payout_class=payout_class_for(user_agent, self.params.payout_classes, self._payout_classes),
            session_difficulty=options.session_difficulty,
            share_difficulty=options.share_difficulty,
        )

    def notify_for(self, worker: Worker) -> Notify | None:
        """The current job: see ``p2pool.stratum.values.Desk``."""
        if self.network is not None and not self.network.is_ready:
            return None
        self._renew_due_work()
        job = self._book.job_for(worker.payout_script, worker.payout_class, self._share_target(worker))
        if job is None:
            return None
        notify = self._notifies.get(job.job_id)
        if notify is None:
            template = job.work.template
            notify = self._notifies[job.job_id] = Notify(
                job_id=job.job_id,
                previous_block_hash=template.previous_block_hash,
                coinb1=job.coinb1,
                coinb2=job.coinb2,
                branch=template.merkle_branch,
                version=template.version,
                bits=job.work.bits,
                time=job.work.time,
                share_target=job.share_target,
                block_target=job.block_target,
            )
        return notify

    def judge(self, worker: Worker, submission: Submission) -> Verdict:
        """Hash a submission and act on it: see ``p2pool.stratum.values.Desk``."""
        job = self._book.job(submission.job_id)
        template = job.work.template
        candidate = self._book.candidate(
            job,
            extranonce=submission.extranonce1 + submission.extranonce2,
            version=submission.header_version(template.version),
            time=submission.time,
            nonce=submission.nonce,
        )
        if candidate.is_block:  # also one that is stale, or no share by the miner's own harder target
            self._submitter.submit(_found_block(candidate), lambda: self._accept_block(candidate))
        elif (ahead_s := submission.time - self._clock()) > (limit := self.params.future_limit_s):
            text = f"ntime is {ahead_s:.0f} s ahead of the clock; shares may be {limit} s ahead"
            raise StratumError(20, text, reason="ahead of time")
        elif candidate.is_share:
            self._accept_own(candidate)
        current = self._template
        stale = current is not None and template.previous_block_hash != current.previous_block_hash
        return Verdict(
            hash_value=candidate.hash_value,
            stale=stale and not candidate.is_share,
            is_share=candidate.is_share,
            is_block=candidate.is_block,
        )

    def note(self, worker: Worker, outcome: SubmissionOutcome) -> None:
        """Enter what became of a submission: see ``p2pool.stratum.values.Desk``."""
        self._accounting.note(address=worker.address, worker=worker.name, outcome=outcome, now=self._clock())

    def _share_target(self, worker: Worker) -> int | None:
        """The harder share target that a miner asked for, or whose size asks for it; None for the chain's own."""
        if worker.share_difficulty is not None:
            difficulty = min(max(worker.share_difficulty, MIN_DIFFICULTY), MAX_DIFFICULTY)
            return int(DIFFICULTY_1_TARGET / difficulty)
        work = self._book.work
        if work is None or not self._shares_per_window:
            return None
        target = self._share_targets.get(worker.address)
        if target is None:  # once for each address and each work
            heaviness = next_heaviness(
                self.params,
                work,
                hash_rate=self._accounting.hash_rate(worker.address, self._clock()),
                shares_per_window=self._shares_per_window,
                present=self._heaviness.get(worker.address, 1),
            )
            self._heaviness[worker.address] = heaviness
            target = self._share_targets[worker.address] = work.share_target // heaviness
        return target

    # -- inside ----------------------------------------------------------------------------------------------

    def _note_unsettled(self, shares: Iterable[StoredShare]) -> Iterator[StoredShare]:
        for stored in shares:
            if stored.block_outcome is None and is_block(self.params, stored.share):
                self._unsettled.append(stored.share.hash)
            yield stored

    def _accept_own(self, candidate: Candidate) -> None:
        try:
            self._accept_found(candidate.share())
        except InvalidShare as error:
            self._counters.invalid[error.rule] += 1
            count = self._counters.invalid[error.rule]
            if count & (count - 1) == 0:  # the first, the second, the fourth ...: a miner must not fill the log
                logger.warning("a miner's share breaks a rule (number %d of this rule): %s", count, error)
            raise StratumError(20, str(error), reason=f"invalid share ({error.rule})") from None

    def _accept_found(self, share: Share) -> None:
        if self.network is None:
            self.accept(share)
        elif isinstance(self.accept(share), Accepted):
            self.network.share_found(share)
        elif share.hash not in self.chain:
            self._own_waiting[share.hash] = share
            if len(self._own_waiting) > MAX_OWN_WAITING:
                del self._own_waiting[next(iter(self._own_waiting))]

    def _record(self, change: Accepted) -> None:
        if self._fault is not None:
            raise self._fault
        now, moment = self._clock(), trio.current_time()
        facts = {
            share.previous_block_hash: fact
            for share in change.added
            if (fact := self.chain.block_facts(share.previous_block_hash)) is not None
        }
        sync = moment - self._synced_at >= SYNC_INTERVAL_S
        if change.added or change.pruned:
            outcomes = {
                share.hash: self._outcomes.pop(share.hash) for share in change.added if share.hash in self._outcomes
            }
            try:
                self._store.write(
                    change, first_seen_ms=int(now * 1000), facts=facts, block_outcomes=outcomes, sync=sync
                )
                self._directory.note_written()
            except StoreError as fault:  # the chain holds what the store does not: nothing may follow
                self._end_by(fault)
                raise
            self._unsynced = not sync
            if sync:
                self._synced_at = moment
        self._counters.shares += len(change.added)
        for share, error in change.rejected:
            logger.debug("share %s that had waited breaks a rule: %s", _shown(share.hash), error)
            self._own_waiting.pop(share.hash, None)
        for share in change.added:
            logger.debug("share %s at height %d", _shown(share.hash), share.data.height)
            if self._own_waiting.pop(share.hash, None) is not None and self.network is not None:
                self.network.share_found(share)
        if change.disconnected:
            logger.info("reorg: %d shares left the main chain", len(change.disconnected))
        if change.added:  # a new tip, or an uncle to name; of many shares in a row, one renewal is enough
            self._work_due.set()

    def _end_by(self, fault: StoreError) -> None:
        self._fault = fault
        self._faulted.set()

    async def _end_on_fault(self) -> None:
        """Whoever was served when the store failed may have swallowed it."""
        await self._faulted.wait()
        assert self._fault is not None
        raise self._fault

    def _renew_due_work(self) -> None:
        if self._work_due.is_set():
            self._work_due = trio.Event()
            self._renew_work(clean=False)

    async def _follow_chain(self) -> None:
        while True:
            await self._work_due.wait()
            self._renew_due_work()

    def _renew_work(self, *, clean: bool) -> None:
        if self._template is None or (self.network is not None and not self.network.is_ready):
            return
        self._book.renew(next_work(self.chain, self._template, self._clock()))
        self._notifies.clear()
        self._heaviness = {address: self._heaviness[address] for address in self._share_targets}  # who mines now
        self._share_targets.clear()
        self.server.broadcast(clean=clean)

    def _learn(self, facts: HeaderFacts) -> None:
        known = BlockFacts(height=facts.height, next_bits=facts.next_bits, late=facts.late)
        change = self.chain.learn_block(facts.block_hash, known, self._clock())
        if isinstance(change, Accepted):
            self._record(change)

    async def _follow_bitcoin(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        retry_s, tip, outage = RETRY_S[0], b"", Outage()
        while True:
            try:
                template, facts = await self._fetch_template(tip)
                self._take_template(template, facts)
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                if (text := outage.ended(trio.current_time())) is not None:
                    logger.info("the Bitcoin node gives work again, %s", text)
                retry_s = RETRY_S[0]
                tip = await self._backend.wait_for_tip(template.previous_block_hash, TEMPLATE_INTERVAL_S)
            except BackendError as error:
                if self._template is None and isinstance(error, BackendRefusal):
                    raise
                text = outage.failed(str(error), trio.current_time())
                if text is not None:
                    logger.error("the Bitcoin node gives no work, miners stay on what they have: %s", text)
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S[1])

    async def _fetch_template(self, tip: bytes) -> tuple[BlockTemplate, HeaderFacts | None]:
        """A new template; if that takes long and the tip is another, miners get an empty one meanwhile.

        Args:
            tip: the Bitcoin block that is to be built on as far as we know.

        Raises:
            BackendError: there is none now.
        """
        error: BackendError | None = None
        async with trio.open_nursery() as nursery:
            if self._template is not None and tip != self._template.previous_block_hash:
                nursery.start_soon(self._bridge, tip, self._template.version)
            try:
                template = await self._backend.block_template()
                facts = await self._backend.header_facts(template.previous_block_hash)
            except BackendError as caught:
                error = caught
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return template, facts

    async def _bridge(self, tip: bytes, version: int) -> None:
        await trio.sleep(BRIDGE_S)
        try:
            facts = await self._backend.header_facts(tip)
        except BackendError:
            return  # told by who asks for the template
        rules = CHAIN_RULES[self.params.bitcoin_network]
        if facts is None or (rules.bip94 and (facts.height + 1) % rules.interval == 0):
            return  # the second: BIP94 demands more of the time than facts say
        template = empty_template(
            facts,
            version=version,
            halving_interval=rules.halving_interval,
            now=self._clock(),
            commits_always=rules.network == "signet",
        )
        if self._template is not None and template.previous_block_hash != self._template.previous_block_hash:
            try:
                self._take_template(template, facts)
            except BackendError:
                return
            await trio.sleep(EMPTY_S)
            logger.warning("no template for %.0f s: empty blocks are mined until the Bitcoin node gives one", EMPTY_S)

    def _take_template(self, template: BlockTemplate, facts: HeaderFacts | None) -> None:
        """Give miners new work if the template is for another block, is worth it, or the last one is old or empty.

        Raises:
            BackendError: it builds too far below the sharechain.
        """
        tip = self.chain.tip
        if tip is not None and template.height < tip.block_height - BLOCK_FALL:  # R12 would refuse every share
            raise BackendError(
                f"it is at block {template.height - 1}, the sharechain builds on {tip.block_height - 1}: "
                "it has to catch up"
            )
        old, moment = self._template, trio.current_time()
        clean = old is None or old.previous_block_hash != template.previous_block_hash
        if old is not None and not clean:
            is_better = (template.coinbase_value - old.coinbase_value) * WORTH >= old.coinbase_value
            is_first = bool(template.transactions) and not old.transactions
            if not (is_better or is_first or moment - self._template_since >= TEMPLATE_AGE_S):
                return
        self._template, self._template_since = template, moment
        self._bitcoin_height = template.height - 1
        self.blocks.learn(template, facts)
        if facts is not None:
            self._learn(facts)
        if clean:
            self._look_for_anchors()
        self._renew_work(clean=clean)

    def _compare_bitcoin(self, moment: float) -> None:
        rows = () if self.network is None else self.network.statistics().peers
        heights = [height for row in rows if (height := row.get("bitcoin_height")) is not None]
        self.blocks.compare(self._bitcoin_height, heights, moment)

    def _status(self, now: float) -> dict[str, Any]:
        """For the commands that look at a running node."""
        statistics = self.statistics()
        network = None
        if statistics.network is not None:
            network = {field.name: getattr(statistics.network, field.name) for field in fields(statistics.network)}
            rows = network["peers"]
            known = [row for row in rows if row["state"] == "known"][:MAX_TOLD_ADDRESSES]
            network["peers"] = [row for row in rows if row["state"] != "known"] + known
            received, sent, since = self._traffic
            seconds = max(now - since, 1e-3)
            network["received_per_s"] = round((network["received_bytes"] - received) / seconds)
            network["sent_per_s"] = round((network["sent_bytes"] - sent) / seconds)
            if seconds >= TRAFFIC_INTERVAL_S:
                self._traffic = (network["received_bytes"], network["sent_bytes"], now)
        tip = self.chain.tip
        return {
            "time": now,
            "pid": os.getpid(),
            "waiting": statistics.chain.waiting,
            "tip": None if tip is None else _shown(tip.hash),
            "height": statistics.chain.height,
            "total_work": statistics.chain.total_work,
            "shares": statistics.chain.shares,
            "joined": statistics.shares,
            "bitcoin_height": statistics.bitcoin_height,
            "blocks": dict(Counter(block.reason for block in statistics.blocks)),
            "invalid": statistics.invalid,
            "miners": {"connections": self.server.connections, **self._accounting.totals(now)},
            "network": network,
        }

    def _keep_books(self, encoded: bytes) -> None:
        try:
            self._directory.save_workers(encoded)
        except OSError as error:
            self._warn_of("books", "workers.json cannot be written: %s", error)

    def _warn_of(self, what: str, text: str, error: Exception) -> None:
        """Log what may go wrong again and again: the first, the second, the fourth time ..."""
        self._counters.warned[what] += 1
        count = self._counters.warned[what]
        if count & (count - 1) == 0:
            logger.error(text + " (number %d)", error, count)

    def _look_for_anchors(self) -> None:
        self._anchors_wanted.set()

    async def _anchor(self) -> None:
        """Look up the Bitcoin blocks that waiting shares build on, as long as there are any."""
        while True:
            await self._anchors_wanted.wait()
            self._anchors_wanted = trio.Event()
            if missing := self.chain.missing_blocks():
                start = self._anchor_turn % len(missing)  # in turns: what does not exist must not hide what does
                wanted = (*missing[start:], *missing[:start])[:MAX_ANCHORS]
                self._anchor_turn += MAX_ANCHORS
                if not await self.learn_blocks(wanted):
                    self._anchors_wanted.set()
                await trio.sleep(ANCHOR_INTERVAL_S)

    def _accept_block(self, candidate: Candidate) -> None:
        self.blocks.found(candidate.hash, candidate.block())  # Bitcoin has it by now, or does not answer
        if not candidate.is_share:
            return
        try:
            self._accept_found(candidate.share())
        except InvalidShare as error:
            self._counters.invalid[error.rule] += 1
            logger.error("block %s is no valid share: %s", _shown(candidate.hash), error)

    def _on_answer(self, block_hash: bytes, result: SubmitResult, block: FoundBlock | None) -> None:
        if self.blocks.answered(block_hash, result):
            if result.reason == NO_PARENT:
                return  # no verdict: it comes again with the blocks before it
        elif block is not None:
            self._counters.blocks.append(
                BlockOutcome(
                    block_hash=_shown(block_hash),
                    block_height=block.block_height,
                    value=block.value,
                    payouts=block.payouts,
                    transactions=block.transactions,
                    accepted=result.accepted,
                    reason=result.reason,
                )
            )
        if block_hash in self.chain:
            self._store.write_block_outcome(block_hash, result.reason, sync=True)
            self._directory.note_written()
        else:
            self._outcomes[block_hash] = result.reason

    async def _tick(self) -> None:
        eased_s = self.params.stall_doubling_s / 2
        told_at, kept_at = -math.inf, trio.current_time()
        while True:
            await trio.sleep(min(SYNC_INTERVAL_S, eased_s))
            now, moment = self._clock(), trio.current_time()
            if self._unsynced and moment - self._synced_at >= SYNC_INTERVAL_S:
                self._store.sync()
                self._directory.note_written()
                self._synced_at, self._unsynced = moment, False
            while isinstance(change := self.chain.release(now), Accepted):
                self._record(change)
                await trio.lowlevel.checkpoint()
            if moment - told_at >= STATUS_INTERVAL_S:
                told_at = moment
                self._compare_bitcoin(moment)
                try:
                    self._directory.write_status(self._status(now))
                except OSError as error:
                    self._warn_of("status", "status.json cannot be written: %s", error)
            if moment - kept_at >= BOOKS_INTERVAL_S * (1 + len(self._accounting) // WORKERS_PER_BOOKS_INTERVAL):
                kept_at, parts = moment, []
                for part in self._accounting.encode(now):
                    parts.append(part)
                    await trio.lowlevel.checkpoint()  # miners have their turn
                self._keep_books(b"".join(parts))
            work = self._book.work
            if work is not None and now - work.time >= min(WORK_INTERVAL_S, max(1.0, eased_s)):
                self._renew_work(clean=False)


def _load_accounting(directory: DataDirectory, now: float) -> Accounting:
    encoded = load_workers(directory.path)
    if encoded is not None:
        try:
            return Accounting.decode(encoded)
        except ValueError as error:
            logger.warning("workers.json is damaged, the books of the miners begin anew: %s", error)
    return Accounting(now)


def _found_block(candidate: Candidate) -> FoundBlock:
    template = candidate.job.work.template
    return FoundBlock(
        block_hash=candidate.hash,
        block_height=template.height,
        value=template.coinbase_value,
        payouts=candidate.job.payouts.count,
        transactions=len(template.transactions),
        raw=candidate.block(),
    )


def script_of(address: str, params: Params) -> bytes:
    """What pays the operator's address. Raises: ConfigError, it is none of this network."""
    try:
        return decode_address(address, params.bitcoin_network)
    except AddressError as error:
        raise ConfigError(f"--address: {error}") from None


def _looks_like_address(text: str) -> bool:
    """Whether a user name was meant as an address, so that a typing error is not paid to somebody else."""
    return len(text) >= 26


def _shown(share_hash: bytes) -> str:
    return share_hash[::-1].hex()
