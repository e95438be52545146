"""What to ask of whom next, so that this node ends with the shares that the network has. Pure: state and ``now`` in.

Theory of operation. Every peer is asked for its status each few seconds. A tip that is not known here and claims more
work than ours starts a *download*: the peer that told it, the *lead*, is asked for the hashes after our locator, and
every peer for a batch of those shares in turn; batches are handed on in order, parents first, however they arrive. A
tip that claims no more, but is as high as ours, is one share that gossip lost: it is fetched by its hash, and so are
the parents and uncles that shares wait for, of the peer that brought those. What does not help within two trips makes
that peer the lead of a download.

Anybody can claim any work. Those whose downloads led nowhere are tried after all others, one that goes on for long
gives way when somebody else claims more than we have, and claims of which nothing comes keep no miner waiting.

A download that starts below what our history can judge is a *foreign history*: whoever drives this module builds it
aside and compares (``Download.foreign``). There is one download at a time. A lead that does not deliver, or slowly, is
left for another; what it cannot deliver at all it should not have claimed.

Gossip is a hint. Everything that it loses is healed here, within a round of statuses.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pool.p2p.wire import MAX_SHARES, Status
from sharechain.chain import Sharechain
from sharechain.share import share_id

__all__ = ["Ask", "Batch", "Download", "Sync", "SyncStatistics"]

#: Seconds between two statuses of a peer, whoever asks. A round.
STATUS_INTERVAL_S: Final = 3.0
#: Seconds that gossip gets to bring a missing parent by itself.
ORPHAN_PATIENCE_S: Final = 0.3
#: Shares asked for at once. Some 150 kB: large enough for libp2p, small enough to spread over peers.
BATCH_SIZE: Final = 250
#: Batches that may be fetched ahead of what has been taken in.
MAX_AHEAD: Final = 8
#: Seconds that a peer which failed is not asked again.
COOLDOWN_S: Final = 5.0
#: A lead must keep up so many shares per second, looked at each so many seconds.
MIN_RATE: Final = 20
RATE_INTERVAL_S: Final = 30.0
#: Seconds without any peer after which a node goes on alone, and with peers that do not say where they stand.
ALONE_AFTER_S: Final = 20.0
#: Seconds without a share from any download after which nobody's claims keep miners waiting.
NO_GAIN_S: Final = 120.0
#: Seconds that a lead has before another may have its turn; what was fetched until then is kept.
TURN_S: Final = 300.0
#: The same for a foreign history, which begins anew with another lead.
FOREIGN_TURN_S: Final = 1_800.0
#: Seconds after which a batch that all others wait for is asked of a second peer.
SLOW_S: Final = 3.0
#: Requests for a peer's tip by its hash, after which it should tell its chain.
MAX_TIP_TRIES: Final = 2
#: Addresses whose downloads in vain are remembered.
MAX_VAIN: Final = 1_000
#: Downloads in a row that end because their lead has no more what it listed, before that is held against it.
MAX_EXCUSES: Final = 2
#: Hashes that one download may list: two of the longest windows, a margin, and 3 uncles for each share.
MAX_LISTED: Final = 500_000
#: Seconds for which a peer's tips stay unknown here until its chain is looked at, whatever work it claims: what our own
#: tip claims may be a liar's word, if our history began in the middle.
STRANGE_S: Final = 30.0
#: Missing hashes remembered.
MAX_MISSING: Final = 2_000
#: Hashes of one download that are known ahead; more are located when it gets short.
MIN_LISTED: Final = BATCH_SIZE * MAX_AHEAD


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """One request to one peer; equal only to itself."""

    peer: str
    #: "status", "locate" or "shares".
    kind: str
    #: The locator, or the shares asked for.
    hashes: tuple[bytes, ...] = ()
    #: Which download it belongs to; None for none.
    download: Download | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Some shares of a download, in order."""

    hashes: tuple[bytes, ...]
    #: Of the same shares, as the lead tells them: a body that another peer gives is the lead's, or is not taken.
    identities: tuple[bytes, ...]
    #: Who is asked for them at the moment, and who has said that it has not all of them.
    asked: str | None = None
    asked_at: float = -1e9
    without: set[str] = field(default_factory=set)
    #: The encoded shares and who gave them; None while they are on their way.
    shares: tuple[bytes, ...] | None = None
    giver: str = ""
    #: Peers that gave other bodies.
    deviants: set[str] = field(default_factory=set)


@dataclass(slots=True, kw_only=True, eq=False)
class Download:
    """One chain that is being fetched.

    Mutable fields: ``batches`` (what is not handed on yet, in order), ``listed`` (all that the lead listed and our
    chain does not have), ``last`` (the highest hash listed), ``complete`` (the lead has no more hashes),
    ``is_finished``, ``newest`` (the last hash handed on, until it is seen in the chain), and the counters of its
    progress.
    Invariant: no hash is listed twice, so that it ends.
    """

    lead: str
    #: What the lead claims.
    status: Status
    #: Fetched from the lead's first share on, since it forks off below what our history can judge.
    foreign: bool
    started_at: float
    batches: list[Batch] = field(default_factory=list)
    listed: set[bytes] = field(default_factory=set)
    last: bytes | None = None
    locating: bool = False
    complete: bool = False
    #: Whoever takes the shares in has drawn the conclusions from all of them.
    is_finished: bool = False
    taken: int = 0
    newest: bytes | None = None
    #: Peers that gave other bodies than the lead, of shares that are not judged yet.
    deviants: set[str] = field(default_factory=set)
    rate_from: tuple[float, int] = (0.0, 0)

    @property
    def is_done(self) -> bool:
        """Everything that the lead has was handed on."""
        return self.complete and not self.batches


@dataclass(slots=True, kw_only=True)
class _Peer:
    machine: str
    chosen: bool
    since: float
    status: Status | None = None
    status_at: float = -1e9
    asked_status_at: float = -1e9
    #: What is under way, by kind.
    busy: dict[str, Ask] = field(default_factory=dict)
    not_before: float = -1e9
    #: In a row, by kind: a peer that only tells its status answers nothing.
    failures: Counter[str] = field(default_factory=Counter)
    #: The last claim of a download that it led and that did not end with the tip that it claimed.
    tried: Status | None = None
    #: The last of them ended without a tip that it claimed: its claims keep no miner waiting.
    is_doubted: bool = False
    #: Shares that it brought wait for what fetching by hash did not find: it should tell its chain.
    must_locate: bool = False
    #: When it was asked last for the tip that it told.
    asked_tip_at: float = -1e9
    #: How often, since its tip was one that we have.
    asked_tips: int = 0
    #: Downloads that ended because it had no more what it had listed.
    excuses: int = 0
    #: Until then it is no lead: its history proved too little.
    declined_until: float = -1e9
    #: Since when its tips have been unknown here, without a break; None if the last one is known.
    strange_since: float | None = None


@dataclass(slots=True, kw_only=True)
class _Missing:
    since: float
    bearers: list[str]
    tries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncStatistics:
    """Where the sync stands."""

    #: "waiting" (for peers), "syncing" or "synced".
    state: str
    #: Shares taken in of the download under way, and the heights from here to there; 0 if there is none.
    taken: int
    height: int
    target_height: int
    missing: int


class Sync:
    """The state of one node's sync.

    Mutable fields: ``_peers`` (by peer id), ``_download``, ``_missing`` (hashes that shares wait for), ``_vain``
    (downloads in vain by machine) and ``_started`` (how many there were), ``_is_ready`` (miners may be served; stays
    once it is true), ``_alone_since`` and ``_connected_since`` (when the last peer left and the first came) with
    ``_has_heard`` (whether any has told a status since), ``_gained_at`` (when a download last brought a share into
    the chain), ``unkept``, ``forgers``, ``foreign_locator`` with ``foreign_lead`` and ``held``, and ``why_ready``.
    Invariant: a batch of the download is with one peer, has arrived, or can be asked for; the lead is a peer. An
    answer counts while its request is under way: not after its peer left, even if it came back.
    """

    def __init__(self, *, uncle_depth: int, expects_peers: bool, now: float) -> None:
        """Start.

        Args:
            uncle_depth: the network's.
            expects_peers: whether there is anybody to call; without, the node is ready at once.
            now: Unix seconds, as everywhere here.
        """
        self._uncle_depth = uncle_depth
        self._peers: dict[str, _Peer] = {}
        self._download: Download | None = None
        self._missing: OrderedDict[bytes, _Missing] = OrderedDict()
        self._is_ready = False
        self._expects_peers = expects_peers
        self._alone_since = now
        self._connected_since = now
        self._has_heard = True
        self._gained_at = now
        self._vain: dict[str, int] = {}
        self._started = 0
        #: Leads whose downloads ended without the tip that they claimed, since this was read last.
        self.unkept: list[str] = []
        #: Locator of the history that is built aside; empty if there is none.
        self.foreign_locator: tuple[bytes, ...] = ()
        self.foreign_lead = ""
        #: Shares by identity, encoded, that were fetched of a foreign history whose lead has left: not fetched again.
        self.held: Mapping[bytes, bytes] = {}
        #: Peers that gave forged bodies under real headers, since this was read last.
        self.forgers: list[str] = []
        #: For people: why ``is_ready`` is true.
        self.why_ready = ""

    # -- what happened -----------------------------------------------------------------------------------------

    def connected(self, peer: str, now: float, *, machine: str = "", chosen: bool = False) -> None:
        """A peer is there.

        Args:
            peer: its id.
            now: seconds, as everywhere here.
            machine: what its downloads in vain are remembered by, since ids are free: its address.
            chosen: we called it.
        """
        if not self._peers and self._has_heard:  # one that comes and goes in silence starts no new wait
            self._connected_since, self._has_heard = now, False
        self._peers.setdefault(peer, _Peer(machine=machine or peer, chosen=chosen, since=now))

    def gone(self, peer: str, now: float) -> None:
        """A peer has left; what it was asked for is asked of others."""
        state = self._peers.pop(peer, None)
        if not self._peers and self._has_heard:
            self._alone_since = now
        download = self._download
        if download is None:
            return
        for batch in download.batches:
            if batch.asked == peer:
                batch.asked = None
        if download.lead == peer:
            self._note_vain(state)
            self._download = None

    def told(self, peer: str, status: Status, now: float) -> None:
        """A peer's status arrived, by whichever side's asking."""
        state = self._peers.get(peer)
        if state is not None:
            state.status, state.status_at = status, now
            self._has_heard = True

    def poke(self) -> None:
        """Our own tip moved in a way that gossip does not tell: exchange statuses at once."""
        for state in self._peers.values():
            state.status_at = state.asked_status_at = -1e9

    def orphaned(self, peer: str, missing: Sequence[bytes], now: float, *, asked: bool) -> None:
        """A share from a peer waits for others.

        Args:
            peer: who brought it.
            missing: what it waits for.
            now: Unix seconds.
            asked: it was asked for by its hash: the gap is deeper than one share, and the peer should tell its chain.
        """
        state = self._peers.get(peer)
        if asked and state is not None:
            state.must_locate = True
        for share_hash in missing:
            known = self._missing.setdefault(share_hash, _Missing(since=now, bearers=[]))
            if peer not in known.bearers and len(known.bearers) < 4:
                known.bearers.append(peer)
        while len(self._missing) > MAX_MISSING:
            self._missing.popitem(last=False)

    def located(self, ask: Ask, hashes: Sequence[bytes], identities: Sequence[bytes], chain: Sharechain) -> None:
        """The answer to "locate": hashes, and as many identities."""
        download = ask.download
        if not self._free(ask, answered=True) or download is None or download is not self._download:
            return
        download.locating = False
        if not download.foreign:
            download.listed = {share_hash for share_hash in download.listed if share_hash not in chain}
        told = dict(zip(hashes, identities, strict=True))
        fresh = [
            share_hash
            for share_hash in told
            if share_hash not in download.listed and (download.foreign or share_hash not in chain)
        ]
        download.listed.update(fresh)
        if not fresh or download.last == hashes[-1] or len(download.listed) >= MAX_LISTED:
            download.complete = True
        for start in range(0, len(fresh), BATCH_SIZE):
            part = tuple(fresh[start : start + BATCH_SIZE])
            batch = Batch(hashes=part, identities=tuple(told[share_hash] for share_hash in part))
            if all(identity in self.held for identity in batch.identities):
                batch.shares = tuple(self.held[identity] for identity in batch.identities)
                batch.giver = download.lead
            download.batches.append(batch)
        if fresh:
            download.last = fresh[-1]

    def fetched(self, ask: Ask, shares: Sequence[bytes | None], now: float) -> list[bytes]:
        """The answer to "shares".

        Returns:
            Encoded shares that belong to no download: to be accepted as they are.
        """
        if not self._free(ask, answered=True):
            return []
        if ask.download is None:
            return [share for share in shares if share is not None]
        batch = self._batch_of(ask)
        if batch is None:  # another was faster
            return []
        if batch.asked == ask.peer:
            batch.asked = None
        known = [share for share in shares if share is not None]
        if len(known) < len(shares) or not known:
            batch.without.add(ask.peer)
            if ask.peer == ask.download.lead:  # it listed what it has no more: a reorg or its pruning, once or twice
                self._peers[ask.peer].excuses += 1
                if self._peers[ask.peer].excuses > MAX_EXCUSES:
                    self.unkept.append(ask.peer)
                self._drop_download(now)
            return []
        if any(share_id(raw) != identity for raw, identity in zip(known, batch.identities, strict=False)):
            batch.without.add(ask.peer)
            batch.deviants.add(ask.peer)
            if ask.peer == ask.download.lead:  # it gives what it has not listed
                self.unkept.append(ask.peer)
                self._drop_download(now)
            return []
        if len(known) < len(batch.hashes):  # what did not fit into the answer
            rest = Batch(hashes=batch.hashes[len(known) :], identities=batch.identities[len(known) :])
            ask.download.batches.insert(ask.download.batches.index(batch) + 1, rest)
            batch.hashes = batch.hashes[: len(known)]
            batch.identities = batch.identities[: len(known)]
        batch.shares, batch.giver = tuple(known), ask.peer
        return []

    def failed(self, ask: Ask, now: float) -> None:
        """A request had no answer."""
        if not self._free(ask, answered=False):
            return
        state = self._peers[ask.peer]
        state.failures[ask.kind] += 1
        state.not_before = now + COOLDOWN_S
        download = ask.download
        if download is None or download is not self._download:
            return
        if ask.kind == "locate" or ask.peer == download.lead:
            self._drop_download(now)
            return
        batch = self._batch_of(ask)
        if batch is not None:
            batch.without.add(ask.peer)
            if batch.asked == ask.peer:
                batch.asked = None

    def next_batch(self) -> tuple[Download, Batch] | None:
        """The next batch of the download that can be taken in: it has arrived, and all before it are taken."""
        download = self._download
        if download is None or not download.batches or download.batches[0].shares is None:
            return None
        return download, download.batches[0]

    def next_done(self) -> Download | None:
        """The download, if all of it was taken in and it is to be finished: the caller sets ``is_finished``."""
        download = self._download
        return download if download is not None and download.is_done and not download.is_finished else None

    def took(self, download: Download, batch: Batch) -> None:
        """A batch was taken in."""
        download.deviants |= batch.deviants
        if not download.foreign:
            self.judged(download)
        download.taken += len(batch.hashes)
        download.newest = batch.hashes[-1]
        if batch in download.batches:
            download.batches.remove(batch)

    def judged(self, download: Download) -> None:
        """What was taken of a download is valid: who gave other bodies had forged them."""
        self.forgers += sorted(download.deviants)
        download.deviants.clear()

    def abandon(self, download: Download, now: float) -> None:
        """A download leads nowhere, or is not worth it."""
        if download is self._download:
            self._drop_download(now)

    def decline(self, peer: str, until: float) -> None:
        """A peer's history is not worth fetching before ``until``."""
        state = self._peers.get(peer)
        if state is not None:
            state.declined_until = until

    def begin_foreign(self, download: Download, now: float) -> None:
        """A download forks off below our history: fetch it again, aside, from its first share on."""
        if download is self._download:
            if self.foreign_lead != download.lead:
                self.foreign_lead, self.foreign_locator = download.lead, ()
            self._start(download.lead, download.status, now, foreign=True)

    def failures(self, peer: str) -> int:
        """Requests of one kind in a row that a peer has not answered."""
        state = self._peers.get(peer)
        return 0 if state is None else max(state.failures.values(), default=0)

    # -- what follows ------------------------------------------------------------------------------------------

    @property
    def download(self) -> Download | None:
        """The download under way."""
        return self._download

    def status_of(self, peer: str) -> Status | None:
        """What a peer said last."""
        state = self._peers.get(peer)
        return None if state is None else state.status

    def asks(self, chain: Sharechain, now: float) -> list[Ask]:
        """What to ask now. Each is under way until ``located``, ``fetched``, ``told`` with ``answered``, or ``failed``.

        Args:
            chain: read only.
            now: Unix seconds.
        """
        found: list[Ask] = []
        for peer, state in self._peers.items():
            due = max(state.status_at, state.asked_status_at) + STATUS_INTERVAL_S
            if now >= due and now >= state.not_before and "status" not in state.busy:
                state.asked_status_at = now
                found.append(self._ask(peer, "status"))
        self._look_for_download(chain, now)
        if self._download is not None:
            found += self._ask_for_download(self._download, chain, now)
        found += self._ask_for_missing(chain, now)
        return found

    def answered(self, ask: Ask) -> None:
        """The answer to "status" arrived; ``told`` has it."""
        self._free(ask, answered=True)

    def is_ready(self, chain: Sharechain, now: float) -> bool:
        """Whether miners may be served: this node is synced, or alone. Stays true once it is."""
        if self._is_ready:
            return True
        if not chain.judges_in_full:
            return False  # what the next share must pay cannot be told yet
        if not self._peers:
            self._is_ready = not self._expects_peers or now - self._alone_since >= ALONE_AFTER_S
            self.why_ready = "no peer answers, going on alone" if self._expects_peers else "nobody to call"
        else:
            believes = now - max(self._gained_at, self._connected_since) < NO_GAIN_S
            # Whose history proved less than ours has nothing to tell; with no share of our own it may be our clock.
            peers = [state for state in self._peers.values() if now >= state.declined_until or chain.tip is None]
            heard = [state.status for state in peers if state.status is not None]
            believed = [state.status for state in peers if state.status is not None and not state.is_doubted]
            work = 0 if chain.tip is None else chain.tip.total_work
            # A history that was begun on trust claims what nobody has proven: what others claim is not less than that.
            behind = any(
                any(status.tip) and status.tip not in chain and (status.total_work > work or chain.short_history)
                for status in believed
            )
            patient = now - self._connected_since < ALONE_AFTER_S
            if self._download is not None:
                behind = behind or not self._peers[self._download.lead].is_doubted
            self._is_ready = not (behind and believes) and (bool(heard) or not patient)
            if not heard:
                self.why_ready = "the connected nodes do not say where they stand, going on without them"
            elif behind:
                self.why_ready = "no peer gives the shares that it claims to have, going on without them"
            else:
                self.why_ready = "synced"
        return self._is_ready

    def statistics(self, chain: Sharechain) -> SyncStatistics:
        """Where it stands; a frozen value."""
        download = self._download
        height = -1 if chain.tip is None else chain.tip.height
        state = "syncing" if download is not None else "synced" if self._is_ready else "waiting"
        return SyncStatistics(
            state=state,
            taken=0 if download is None else download.taken,
            height=height,
            target_height=height if download is None else download.status.height,
            missing=len(self._missing),
        )

    # -- inside ------------------------------------------------------------------------------------------------

    def _ask(self, peer: str, kind: str, hashes: tuple[bytes, ...] = (), download: Download | None = None) -> Ask:
        ask = Ask(peer=peer, kind=kind, hashes=hashes, download=download)
        self._peers[peer].busy[kind] = ask
        return ask

    def _free(self, ask: Ask, *, answered: bool) -> bool:
        """An ask has ended. Returns whether it was under way still."""
        state = self._peers.get(ask.peer)
        if state is None or state.busy.get(ask.kind) is not ask:
            return False
        del state.busy[ask.kind]
        if answered:
            del state.failures[ask.kind]
        return True

    def _batch_of(self, ask: Ask) -> Batch | None:
        """The batch that an ask is for, if it has not arrived yet."""
        if ask.download is None or ask.download is not self._download:
            return None
        return next((b for b in ask.download.batches if b.shares is None and b.hashes == ask.hashes), None)

    def _start(self, lead: str, status: Status, now: float, *, foreign: bool) -> None:
        self._download = Download(lead=lead, status=status, foreign=foreign, started_at=now, rate_from=(now, 0))
        self._started += not foreign

    def _note_vain(self, lead: _Peer | None) -> None:
        """A download did not end with the tip that its lead claimed."""
        if lead is not None:
            self._vain[lead.machine] = self._vain.pop(lead.machine, 0) + 1
            if len(self._vain) > MAX_VAIN:
                del self._vain[next(iter(self._vain))]

    def _drop_download(self, now: float) -> None:
        assert self._download is not None
        lead = self._peers.get(self._download.lead)
        if lead is not None:
            lead.not_before = now + COOLDOWN_S
            lead.tried = lead.status  # what it claimed is no reason to try again; its next status may be
            self._note_vain(lead)
            lead.must_locate = False
        self._download = None

    def _look_for_download(self, chain: Sharechain, now: float) -> None:
        download = self._download
        if download is not None:
            if download.newest is not None and (download.foreign or download.newest in chain):
                self._gained_at, download.newest = now, None
            if download.is_done:
                if download.is_finished:
                    self._drop_done(chain, now)
            elif now - download.rate_from[0] >= RATE_INTERVAL_S:
                if download.taken - download.rate_from[1] < MIN_RATE * RATE_INTERVAL_S and not self._is_held(download):
                    self._drop_download(now)
                else:
                    download.rate_from = (now, download.taken)
                    has_had_turn = now - download.started_at >= (FOREIGN_TURN_S if download.foreign else TURN_S)
                    if has_had_turn and self._best_lead(chain, now, besides=download.lead) is not None:
                        self._drop_download(now)
        if self._download is None:
            peer = self._best_lead(chain, now)
            status = None if peer is None else self._peers[peer].status
            if peer is not None and status is not None:
                self._start(peer, status, now, foreign=False)

    def _best_lead(self, chain: Sharechain, now: float, *, besides: str | None = None) -> str | None:
        """Whose chain to fetch: the most work claimed, among those whose claims were least often in vain."""
        work = -1 if chain.tip is None else chain.tip.total_work
        best: tuple[tuple[float, ...], str] | None = None
        for peer, state in self._peers.items():
            status = state.status
            if status is None or not any(status.tip) or status.tip in chain:
                state.strange_since = None
            elif state.strange_since is None:
                state.strange_since = now
            if status is None or status is state.tried or now < max(state.not_before, state.declined_until):
                continue
            if peer == besides or status.tip in chain or not any(status.tip):
                continue
            wanted = state.must_locate or (status.total_work > work and not self._is_near(status, chain))
            wanted = wanted or (state.strange_since is not None and now - state.strange_since >= STRANGE_S)
            # Every other time it is not the claim that decides: claiming is free, staying is not.
            by_claim = self._started % 2 == 0
            merit = (float(status.total_work), state.chosen) if by_claim else (-state.since, state.chosen)
            rank = (-self._vain.get(state.machine, 0), *merit)
            if wanted and (best is None or rank > best[0]):
                best = (rank, peer)
        return None if best is None else best[1]

    def _is_held(self, download: Download) -> bool:
        # What has arrived and is not taken is our own slowness, not the lead's.
        return bool(download.batches) and download.batches[0].shares is not None

    def _drop_done(self, chain: Sharechain, now: float) -> None:
        download = self._download
        assert download is not None
        lead = self._peers[download.lead]
        if download.status.tip in chain or (chain.tip and chain.tip.total_work >= download.status.total_work):
            lead.must_locate = False  # in the second case its chain moved on, to one that is no worse
            lead.is_doubted = False
            self._vain.pop(lead.machine, None)
            self._download = None
            return
        # Its chain moved on meanwhile, or its tip waits for its time; else it does not lead to the tip that it claimed.
        if download.status.tip not in download.listed and (lead.status is None or lead.status.tip not in chain):
            self.unkept.append(download.lead)
            lead.is_doubted = True
        self._drop_download(now)

    def _ask_for_download(self, download: Download, chain: Sharechain, now: float) -> list[Ask]:
        found = []
        listed = sum(len(batch.hashes) for batch in download.batches)
        lead = self._peers[download.lead]
        if not download.complete and not download.locating and listed < MIN_LISTED and "locate" not in lead.busy:
            download.locating = True
            known = self.foreign_locator if download.foreign else chain.locator()
            locator = known if download.last is None else (download.last, *known)[:64]
            found.append(self._ask(download.lead, "locate", locator, download))
        for number, batch in enumerate(download.batches[:MAX_AHEAD]):
            is_late = number == 0 and now - batch.asked_at >= SLOW_S
            if batch.shares is None and (batch.asked is None or is_late):
                peer = self._giver(download, batch, now)
                if peer is not None:
                    batch.asked, batch.asked_at = peer, now
                    found.append(self._ask(peer, "shares", batch.hashes, download))
        return found

    def _giver(self, download: Download, batch: Batch, now: float) -> str | None:
        for peer, state in self._peers.items():
            if "shares" in state.busy or now < state.not_before or peer in batch.without:
                continue
            as_high = state.status is not None and state.status.total_work >= download.status.total_work
            if peer == download.lead or as_high:
                return peer
        return None

    def _ask_for_missing(self, chain: Sharechain, now: float) -> list[Ask]:
        found: list[Ask] = []
        wanted: dict[str, list[bytes]] = {}
        for share_hash, missing in list(self._missing.items()):
            if share_hash in chain or missing.tries > 2 or not missing.bearers:
                del self._missing[share_hash]
            elif now - missing.since >= ORPHAN_PATIENCE_S:
                peer = missing.bearers[missing.tries % len(missing.bearers)]
                state = self._peers.get(peer)
                if state is None:
                    missing.bearers.remove(peer)
                elif "shares" not in state.busy and now >= state.not_before:
                    missing.tries += 1
                    missing.since = now + COOLDOWN_S / 5
                    state.must_locate = state.must_locate or missing.tries > 1
                    wanted.setdefault(peer, []).append(share_hash)
        for peer, state in self._peers.items():
            status = state.status
            if status is None or not any(status.tip) or status.tip in chain:
                state.asked_tips = 0
            elif (
                self._is_near(status, chain)
                and not state.must_locate
                and "shares" not in state.busy
                and now - state.status_at >= ORPHAN_PATIENCE_S
                and now - state.asked_tip_at >= STATUS_INTERVAL_S
                and now >= state.not_before
            ):
                if state.asked_tips >= MAX_TIP_TRIES:
                    state.must_locate, state.asked_tips = True, 0
                    continue
                state.asked_tip_at = now
                state.asked_tips += 1
                wanted.setdefault(peer, []).append(status.tip)
        for peer, hashes in wanted.items():
            found.append(self._ask(peer, "shares", tuple(dict.fromkeys(hashes))[:MAX_SHARES]))
        return found

    def _is_near(self, status: Status, chain: Sharechain) -> bool:
        """Whether an unknown tip is probably one share that gossip lost or has not brought yet."""
        height = -1 if chain.tip is None else chain.tip.height
        return height - self._uncle_depth <= status.height <= height + 1
