"""What peers did: points and bans for broken rules, and budgets for what is allowed in measure.

Misbehaviour has a price in points (``RULES``), which halve in ten minutes; at 100 the peer id and its IP are banned.
The IP of this machine or of a private network is never banned, as in Bitcoin Core: behind it are all other nodes of
the machine, the network or the proxy, and one bad one would shut out all. There, only the id is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from p2pool.p2p.addresses import Place

__all__ = ["BUDGETS", "RULES", "Ban", "Budget", "Budgets", "Conduct"]

#: Points for each broken rule; a peer is banned at ``BAN_POINTS``.
RULES: Final[dict[str, float]] = {
    # What the bearer of a share can see from the share alone, and must not relay.
    "R1": 100,
    "R2": 100,
    "R3": 100,
    "R4": 100,
    # What only the chain tells. For those who vouched for a share by serving it; for a bearer see the budget "wasted".
    **dict.fromkeys(("R5", "R6", "R7", "R8", "R9", "R10", "R11", "R12"), 50),
    "frame": 50,  # too large, or cut off
    "message": 50,  # not canonical, or out of shape
    "yamux": 50,  # more bytes than the stream's window allows, or a frame that is none
    "streams": 25,  # more at once, or a second, than allowed
    "negotiation": 25,  # of a stream's protocol: no name, or no end
    "pubsub": 50,  # a message of the topic that no honest library writes
    "unasked": 25,  # an answer to something else
    "block": 50,  # a block without its proof of work
    "claim": 100,  # of a share that we have: no honest node can say of it what it does not say itself
    "unkept": 20,  # its chain did not lead to the tip that it claimed; after a reorg that may be so
    "future": 10,  # its own share, from a clock that is wrong
    "flood": 2,  # each message beyond the budget
    "address": 5,  # an address that is none
    "fault": 25,  # what it sent raised an error that nobody expected
    "handshake": 10,  # not finished, or not Noise
    "slow": 25,  # a request that was begun and not ended, an answer that is not read
    "stream": 5,  # opened and left alone
    "timeout": 2,  # may be the line's fault
}
#: For a rule that is not in the table.
OTHER_POINTS: Final = 10.0
BAN_POINTS: Final = 100.0
#: Seconds in which points halve, and seconds of one step of it: within a step nothing is forgiven, so that 50 points
#: and 50 a moment later are 100.
POINTS_HALVE_S: Final = 600.0
POINTS_STEP_S: Final = 60.0
#: Seconds that a local address is refused when something without a name misbehaves there.
LOCAL_REFUSAL_S: Final = 2.0
#: Seconds that are nothing: a Unix time as a float is no finer.
CLOCK_S: Final = 1e-6
#: Scores and buckets that are remembered at most.
MAX_SCORES: Final = 4_096
MAX_BUCKETS: Final = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one peer may take: tokens each second, and at once after a rest."""

    rate: float
    burst: float


#: Per peer. "gossip": messages of the topic. "wasted": invalid shares whose bearer could not know. "request", and
#: "served": bytes of the answers.
BUDGETS: Final = {
    "gossip": Budget(rate=100, burst=400),
    "wasted": Budget(rate=20, burst=100),
    "request": Budget(rate=50, burst=200),
    "served": Budget(rate=8_000_000, burst=64_000_000),
}
#: All peers together: ids are free, an uplink is not.
TOTAL_BUDGETS: Final = {
    "request": Budget(rate=300, burst=1_000),
    "served": Budget(rate=24_000_000, burst=64_000_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """Somebody who is sent away for a while. Times are Unix seconds."""

    peer_id: str | None
    #: None for local addresses, which are not banned. IPv6: a whole /64.
    ip: str | None
    rule: str
    detail: str
    since: float
    until: float
    #: 1 for the first, one more for each repetition.
    count: int


class Conduct:
    """Who did what, and who is banned for it.

    Mutable fields: ``scores`` (points and when they were counted, by id and by machine), ``bans`` (by id and by
    machine; those that ended are kept for a while, to double the next), ``_refused`` (until when, by local machine),
    ``counters`` (by rule). A key is a peer id or the machine of a ``Place``; no text is both.
    """

    def __init__(self, *, ban_s: float, max_ban_s: float, max_bans: int) -> None:
        """Nobody has done anything. Seconds of a first ban and of any; bans of ids, and as many of machines."""
        self._ban_s, self._max_ban_s, self._max_bans = ban_s, max_ban_s, max_bans
        self.scores: dict[str, tuple[float, float]] = {}
        self.id_bans: dict[str, Ban] = {}
        self.machine_bans: dict[str, Ban] = {}
        self._refused: dict[str, float] = {}
        self.counters: Counter[str] = Counter()

    def score(self, key: str, now: float) -> float:
        points, at = self.scores.get(key, (0.0, now))
        steps = max(0.0, now - at) // POINTS_STEP_S
        return points * math.pow(0.5, min(steps * POINTS_STEP_S / POINTS_HALVE_S, 1_000.0))

    def is_banned(self, peer_id: str | None, machine: str | None, now: float) -> bool:
        return any(now < ban.until for ban in self._bans_of(peer_id, machine))

    def is_refused(self, machine: str, now: float) -> bool:
        until = self._refused.get(machine, now)
        return now < until <= now + LOCAL_REFUSAL_S

    def blame(self, peer_id: str | None, place: Place | None, rule: str, detail: str, now: float) -> Ban | None:
        self.counters[rule if rule in RULES else "other"] += 1
        points = RULES.get(rule, OTHER_POINTS)
        machine = None if place is None or place.is_local else place.machine
        keys = [key for key in (peer_id, machine) if key is not None]
        if peer_id is None and place is not None and place.is_local:
            if self._add(place.machine, points, now):
                self._forget_score(place.machine)
                self._refused = {key: until for key, until in self._refused.items() if now < until}
                self._refused[place.machine] = now + LOCAL_REFUSAL_S
            return None
        full = [self._add(key, points, now) for key in keys]
        if not any(full):
            return None
        for key in keys:
            self._forget_score(key)
        # What comes in between the ban and the end of the connection does not make another ban.
        if all(self.is_banned(key, key, now) for key in keys):
            return None
        return self._ban(peer_id, machine, rule, detail, now)

    def _ban(self, peer_id: str | None, machine: str | None, rule: str, detail: str, now: float) -> Ban:
        # Another id at a banned address does not make it the second ban of that address.
        counts = [
            ban.count + (now >= ban.until)
            for ban in self._bans_of(peer_id, machine)
            if now < self._remembered_until(ban)
        ]
        count = max(counts, default=1)
        length_s = min(self._ban_s * math.pow(2.0, min(count - 1, 60)), self._max_ban_s)
        ban = Ban(
            peer_id=peer_id,
            ip=machine,
            rule=rule,
            detail=detail[:200],
            since=now,
            until=now + length_s,
            count=count,
        )
        self.put(ban, now)
        return ban

    def put(self, ban: Ban, now: float) -> None:
        """Remember a ban; the one that ends first goes if there are too many."""
        for bans, key in ((self.id_bans, ban.peer_id), (self.machine_bans, ban.ip)):
            if key is None:
                continue
            bans[key] = ban
            if len(bans) > self._max_bans:
                for other in [other for other, old in bans.items() if now >= self._remembered_until(old)]:
                    del bans[other]
            while len(bans) > self._max_bans:
                del bans[min(bans.items(), key=lambda item: item[1].until)[0]]

    def all_bans(self) -> list[Ban]:
        """Each once, active or remembered, oldest first; without the id or machine that has a later one."""
        bans = []
        for ban in {id(ban): ban for ban in (*self.id_bans.values(), *self.machine_bans.values())}.values():
            peer_id = ban.peer_id if self.id_bans.get(ban.peer_id or "") is ban else None
            machine = ban.ip if self.machine_bans.get(ban.ip or "") is ban else None
            bans.append(replace(ban, peer_id=peer_id, ip=machine))
        return sorted(bans, key=lambda ban: (ban.since, ban.peer_id or "", ban.ip or ""))

    def _bans_of(self, peer_id: str | None, machine: str | None) -> list[Ban]:
        bans = [self.id_bans[peer_id]] if peer_id is not None and peer_id in self.id_bans else []
        return [*bans, self.machine_bans[machine]] if machine is not None and machine in self.machine_bans else bans

    def _remembered_until(self, ban: Ban) -> float:
        return ban.until + self._max_ban_s

    def _add(self, key: str, points: float, now: float) -> bool:
        """Add points. Whether they are enough for a ban."""
        total = self.score(key, now) + points
        _, at = self.scores.get(key, (0.0, now))
        self.scores[key] = (total, now - max(0.0, now - at) % POINTS_STEP_S)
        if len(self.scores) > MAX_SCORES:
            lowest = sorted(self.scores, key=lambda other: self.score(other, now))
            for other in lowest[: MAX_SCORES // 2]:
                del self.scores[other]
        return total >= BAN_POINTS

    def _forget_score(self, key: str) -> None:
        self.scores.pop(key, None)


class Budgets:
    """Token buckets.

    Mutable fields: ``_buckets``, tokens and when they were counted, by peer id and kind; "" is all peers together.
    A bucket outlives its connection, so that calling again does not fill it; a full one is not kept.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def spend(self, peer_id: str, kind: str, amount: float, now: float) -> float:
        """See ``PeerBook.spend``."""
        budgets = [((peer_id, kind), BUDGETS[kind])]
        if kind in TOTAL_BUDGETS:
            budgets.append((("", kind), TOTAL_BUDGETS[kind]))
        tokens = [self._tokens(key, budget, now) for key, budget in budgets]
        # More than a bucket holds is given when it is full, and owed.
        lacking = [
            (max(min(amount, budget.burst), 1.0) - have) / budget.rate
            for (_, budget), have in zip(budgets, tokens, strict=True)
        ]
        if max(lacking) > CLOCK_S:
            return max(lacking)
        for (key, _), have in zip(budgets, tokens, strict=True) if amount else ():
            self._buckets[key] = (have - amount, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._prune(now)
        return 0.0

    def _tokens(self, key: tuple[str, str], budget: Budget, now: float) -> float:
        tokens, at = self._buckets.get(key, (budget.burst, now))
        return min(tokens + max(0.0, now - at) * budget.rate, budget.burst)

    def _prune(self, now: float) -> None:
        for key in list(self._buckets):
            budget = BUDGETS[key[1]] if key[0] else TOTAL_BUDGETS[key[1]]
            if self._tokens(key, budget, now) >= budget.burst:
                del self._buckets[key]
        oldest = sorted((key for key in self._buckets if key[0]), key=lambda key: self._buckets[key][1])
        for key in oldest[: max(0, len(self._buckets) - MAX_BUCKETS // 2)]:
            del self._buckets[key]
