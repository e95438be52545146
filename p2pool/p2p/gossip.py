"""What to do with a share that gossip brings: relay it or not, and whose fault it is if it is bad. Pure.

R1 to R4 decide whether a share is relayed; a peer that brings one that breaks them has not checked, and is to blame.
Everything else depends on what a node knows: a share that breaks another rule is the fault of its author, who built on
what the rule reads, and never of a bearer who may not have had the parent. A body is only proven by R10: forging one
under a real header costs no work. So "seen" is remembered by the hash of the whole encoding, a share whose parent is
here is judged before it is relayed, and no more than a few bodies under one header are relayed unjudged.

What is too cheap or too deep to matter for the tip is left to the sync protocol: it is neither relayed nor judged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sharechain.chain import Accepted, Buried, Duplicate, Early, Orphaned, Outcome, Sharechain
from sharechain.difficulty import bits_to_target, work_of
from sharechain.errors import DecodeError, InvalidShare
from sharechain.params import Params
from sharechain.share import Share, decode_share, share_id
from sharechain.validate import check_alone, easiest_target, next_max_bits
from sharechain.waiting import MAX_BODIES

__all__ = ["GossipJudge", "Judgement"]

#: A share with less than this part of the work that the tip asks for is not relayed.
FLOOR_DIVISOR: Final = 8
#: Heights below the tip down to which gossip is judged: judging a share on a far parent moves a whole window.
MAX_DEPTH: Final = 100
#: Seconds ahead of the clock at which a share is no matter of clocks that differ.
MAX_AHEAD_S: Final = 7_200
#: Encodings and headers remembered.
MAX_SEEN: Final = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What becomes of one share of a message."""

    relay: bool
    #: Why it was left alone, in a word; None if it was judged.
    dropped: str | None = None
    #: The rule that it breaks, with the details; None if it breaks none.
    rule: str | None = None
    detail: str = ""
    #: Whether its bearer is to blame for that.
    guilty: bool = False
    #: Hashes that it waits for.
    missing: tuple[bytes, ...] = ()
    share: Share | None = None


class GossipJudge:
    """Judges the shares of one node's gossip.

    Mutable fields: ``_seen`` (identities of encodings, the oldest first) and ``_unjudged`` (how many bodies under a
    header were relayed without having been judged).
    """

    def __init__(self, params: Params) -> None:
        self._params = params
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._unjudged: OrderedDict[bytes, int] = OrderedDict()

    def note(self, raw: bytes) -> None:
        """An encoding that this node published: it is not news when it comes back."""
        self._remember(share_id(raw))

    def take(
        self,
        raw: bytes,
        *,
        is_author: bool,
        is_synced: bool,
        chain: Sharechain,
        accept: Callable[[Share], Outcome],
        now: float,
    ) -> Judgement:
        """Judge an encoded share.

        Args:
            raw: as it came.
            is_author: its bearer also wrote the message.
            is_synced: this node's tip is the network's.
            chain: for reading.
            accept: takes the share into the chain; raises ``InvalidShare``.
            now: Unix seconds.
        """
        identity = share_id(raw)
        if identity in self._seen:
            return Judgement(relay=False, dropped="seen")
        self._remember(identity)
        try:
            share = decode_share(raw)
            check_alone(self._params, share)
        except DecodeError as error:
            return Judgement(relay=False, rule="R1", detail=str(error), guilty=True)
        except InvalidShare as error:
            return Judgement(relay=False, rule=error.rule, detail=str(error), guilty=True)
        if share.hash in chain:
            return Judgement(relay=False, dropped="known")
        reason = self._beneath_notice(share, chain, now) if is_synced else None
        if reason is not None:
            return Judgement(relay=False, dropped=reason)
        try:
            outcome = accept(share)
        except InvalidShare as error:
            return Judgement(relay=False, rule=error.rule, detail=str(error), guilty=is_author, share=share)
        if isinstance(outcome, Accepted):
            return Judgement(relay=True, share=share)
        if isinstance(outcome, Duplicate | Buried):
            return Judgement(relay=False, dropped="known" if isinstance(outcome, Duplicate) else "buried")
        if isinstance(outcome, Early) and share.time > now + MAX_AHEAD_S:
            detail = f"share {share.hash[::-1].hex()} is {share.time - now:.0f} s ahead of the clock"
            return Judgement(relay=False, rule="future", detail=detail, guilty=is_author)
        missing = outcome.missing if isinstance(outcome, Orphaned) else ()
        bodies = self._unjudged.get(share.hash, 0)
        if bodies >= MAX_BODIES:
            del self._seen[identity]  # it may be the real one, which did not get to wait: news when its parent is here
            return Judgement(relay=False, dropped="bodies", missing=missing)
        self._unjudged[share.hash] = bodies + 1
        if len(self._unjudged) > MAX_SEEN:
            self._unjudged.popitem(last=False)
        return Judgement(relay=True, missing=missing, share=share)

    def _remember(self, identity: bytes) -> None:
        self._seen[identity] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def _beneath_notice(self, share: Share, chain: Sharechain, now: float) -> str | None:
        tip = chain.tip
        if tip is None:
            return None
        if share.data.height < tip.height - MAX_DEPTH:
            return "deep"
        asked = easiest_target(self._params, tip, next_max_bits(self._params, tip), int(now))
        if work_of(bits_to_target(share.data.bits)) * FLOOR_DIVISOR < work_of(asked):
            return "floor"
        return None
