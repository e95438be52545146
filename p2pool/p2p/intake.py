"""Takes fetched shares in, batch by batch, in order; and builds a foreign history aside until it can be compared.

Theory of operation. A batch of the download goes into the node's own chain. If it forks off below what our history can
judge, or starts in the middle of one while ours is empty, the download is started anew as a foreign one: that history
is built in a chain of its own, from its first share on, and replaces ours when all of it is there and it proves more
work: not by what its first share claims, but by the shares.

Bodies of shares near the beginning of such a history are proven only by the shares above them, whose coinbases pay by
them. So it is the lead that tells the identity of each, wherever it is fetched: what turns out wrong is the lead's
fault, and goes away with the chain aside. What was fetched of a lead that has left is not fetched again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import trio

from p2pool.p2p.sync import Batch, Download, Sync
from sharechain.chain import Accepted, Buried, Duplicate, Early, Orphaned, Outcome, Sharechain, Unanchored
from sharechain.errors import DecodeError, InvalidShare
from sharechain.share import Share, decode_share, share_id

__all__ = ["Intake"]

logger = logging.getLogger("p2pool.p2p")

#: Shares between two looks at what else is to be done.
SLICE: Final = 8
#: Seconds that a batch waits for Bitcoin blocks that our backend does not know yet, and between two looks.
BLOCK_PATIENCE_S: Final = 60.0
BLOCK_INTERVAL_S: Final = 0.25
#: Seconds for which a foreign history that proved too little is not fetched again from the same peer.
DECLINED_S: Final = 600.0


class Intake:
    """Takes in what ``Sync`` has fetched.

    Mutable fields: ``_aside`` (a foreign history under construction, or None) with ``_aside_shares`` (its shares,
    encoded, in the order in which it took them) and ``_aside_lead`` (the peer that gives it), ``missing_blocks``, and
    ``_news``.
    """

    def __init__(
        self,
        desk: Any,
        sync: Sync,
        *,
        clock: Callable[[], float],
        moment: Callable[[], float],
        blame: Callable[..., None],
    ) -> None:
        """Nothing happens before ``run``; the arguments are those of ``Network``."""
        self._desk = desk
        self._sync = sync
        self._clock = clock
        self._moment = moment
        self._blame = blame
        self._aside: Sharechain | None = None
        self._aside_shares: list[bytes] = []
        self._aside_lead = ""
        #: Bitcoin blocks that our backend does not know, and that the batch at hand waits for.
        self.missing_blocks: tuple[bytes, ...] = ()
        self._news = trio.Event()

    def poke(self) -> None:
        """Something may have arrived."""
        self._news.set()

    def height(self, download: Download) -> int:
        """How high the chain is that a download builds; -1 for no share."""
        chain = self._aside if download.foreign else self._desk.chain
        return -1 if chain is None or chain.tip is None else chain.tip.height

    async def run(self) -> None:
        """Take in what arrives, until cancelled."""
        while True:
            ready = self._sync.next_batch()
            if ready is not None:
                download, batch = ready
                if await self._take(download, batch):
                    self._sync.took(download, batch)
                continue
            done = self._sync.next_done()
            if done is not None:
                done.is_finished = True
                self._finish(done)
                self._sync.poke()  # our other peers may be on the side that we come from
                continue
            self._news = trio.Event()
            await self._news.wait()

    async def _take(self, download: Download, batch: Batch) -> bool:
        """Take one batch in. Returns whether the download goes on with the next."""
        try:
            shares = list(self._decode(batch))
        except InvalidShare as error:
            self._refuse(download, error)
            return False
        if download.foreign and self._aside_lead != download.lead:
            self._forget_aside(keep=True)
        if download.foreign and self._aside is None:
            self._aside, self._aside_shares, self._aside_lead = Sharechain(self._desk.params), [], download.lead
        await self._learn(shares)
        first = await self._begin(download, batch, shares)
        if first is None:
            return False
        for number, share in enumerate(shares[first:], first):
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
            try:
                outcome: Outcome = self._accept(download, share)
                if isinstance(outcome, Unanchored):
                    outcome = await self._accept_later(download, share, outcome.block_hash)
                    if self._sync.download is not download:
                        return False
            except InvalidShare as error:
                self._refuse(download, error)
                return False
            early_from = share.time - self._desk.params.future_limit_s
            if isinstance(outcome, Duplicate) and early_from > self._clock():  # it waits since an earlier turn
                outcome = Early(until=early_from)
            if isinstance(outcome, Early):
                self._wait_for_clock(download, outcome)
                return False
            if isinstance(outcome, Buried) or (
                isinstance(outcome, Orphaned) and number == 0 and share.data.parent in outcome.missing
            ):
                if download.foreign:
                    self._drop(download, "a share of its middle is missing")
                else:
                    logger.info("the chain of peer %s forks off below our history: compared aside", download.lead)
                    self._begin_foreign(download)
                return False
            if isinstance(outcome, Orphaned) and not download.foreign:
                self._sync.orphaned(batch.giver, outcome.missing, self._moment(), asked=False)
        return self._is_worth_it(download)

    async def _begin(self, download: Download, batch: Batch, shares: list[Share]) -> int | None:
        """Begin a foreign history if these are from the middle of one.

        Returns:
            How many shares that took; None if it cannot be done.
        """
        chain: Sharechain | None = self._aside if download.foreign else self._desk.chain
        assert chain is not None
        size: int = self._desk.params.uncle_depth + 1
        if chain.tip is not None or shares[0].data.height == 0:
            return 0
        if not download.foreign:
            self._begin_foreign(download)
            return None
        if len(shares) < size:
            self._drop(download, "it does not begin")
            return None
        with trio.move_on_after(BLOCK_PATIENCE_S):
            while True:
                try:
                    outcome = chain.begin_history(shares[:size], self._clock())
                except InvalidShare as error:
                    self._refuse(download, error)
                    return None
                if isinstance(outcome, Accepted):
                    self._aside_shares += [share.encoded for share in outcome.added]
                    self._sync.foreign_locator = chain.locator()
                    self.missing_blocks = ()
                    return size
                self.missing_blocks = tuple(share.previous_block_hash for share in shares[:size])
                if isinstance(outcome, Early):
                    self._wait_for_clock(download, outcome)
                    return None
                await trio.sleep(BLOCK_INTERVAL_S)
                await self._learn(shares[:size])
        self.missing_blocks = ()
        logger.warning("the Bitcoin node does not know the blocks that the history of peer %s builds on", download.lead)
        self._sync.abandon(download, self._moment())
        return None

    def _decode(self, batch: Batch) -> Iterator[Share]:
        assert batch.shares is not None
        for wanted, raw in zip(batch.hashes, batch.shares, strict=True):
            try:
                share = decode_share(raw)
            except DecodeError as error:
                raise InvalidShare("R1", str(error)) from None
            if share.hash != wanted:
                raise InvalidShare("unasked", f"share {share.hash[::-1].hex()} was not asked for")
            yield share

    def _accept(self, download: Download, share: Share) -> Outcome:
        if download.foreign:
            assert self._aside is not None
            outcome = self._aside.accept(share, self._clock())
            if isinstance(outcome, Accepted):
                self._aside_shares += [added.encoded for added in outcome.added]
            return outcome
        joined: Outcome = self._desk.accept(share)
        return joined

    async def _learn(self, shares: list[Share]) -> None:
        chain: Sharechain = self._desk.chain
        blocks = dict.fromkeys(share.previous_block_hash for share in shares)
        unknown = [block for block in blocks if chain.block_facts(block) is None]
        if unknown:
            await self._desk.learn_blocks(unknown)
        if self._aside is not None:
            for block in blocks:
                facts = chain.block_facts(block)
                if facts is not None and self._aside.block_facts(block) is None:
                    change = self._aside.learn_block(block, facts, self._clock())
                    if isinstance(change, Accepted):
                        self._aside_shares += [added.encoded for added in change.added]
            while isinstance(change := self._aside.release(self._clock()), Accepted):  # the first of an earlier turn
                self._aside_shares += [added.encoded for added in change.added]

    async def _accept_later(self, download: Download, share: Share, block_hash: bytes) -> Outcome:
        """Our Bitcoin node is behind the shares: what follows would wait in vain before it knows the block."""
        self.missing_blocks = (block_hash,)
        with trio.move_on_after(BLOCK_PATIENCE_S):
            while self._desk.chain.block_facts(block_hash) is None:
                await trio.sleep(BLOCK_INTERVAL_S)
                await self._learn([share])
        self.missing_blocks = ()
        outcome = self._accept(download, share)
        if self._desk.chain.block_facts(block_hash) is None:
            logger.warning("the Bitcoin node does not know block %s, which shares build on", block_hash[::-1].hex())
            self._sync.abandon(download, self._moment())
            self._forget_aside()
        return outcome

    def _wait_for_clock(self, download: Download, early: Early) -> None:
        """What follows would wait too, and look as if it forked off somewhere."""
        ahead_s = early.until + self._desk.params.future_limit_s - self._clock()
        logger.warning("shares of peer %s are %.0f s ahead of our clock: is it right?", download.lead, ahead_s)
        self._sync.abandon(download, self._moment())

    def _refuse(self, download: Download, error: InvalidShare) -> None:
        # The body is the one that the lead told of, whoever gave it.
        self._blame(peer_id=download.lead, ip=None, rule=error.rule, detail=str(error))
        self._sync.abandon(download, self._moment())
        if download.foreign:  # whoever gave it, it is what the lead told
            self._forget_aside()

    def _is_worth_it(self, download: Download) -> bool:
        """Whether a foreign history could prove more work than ours, by what its lead claims."""
        if not download.foreign:
            return True
        assert self._aside is not None
        self._sync.foreign_locator = self._aside.locator()
        tip, params = self._aside.tip, self._aside.params
        if tip is None:
            self._drop(download, "it does not begin")
            return False
        claimed = self._aside.proven_work() + max(0, download.status.total_work - tip.total_work)
        if claimed <= self._own_proof():
            self._drop(download, "it has less work than ours")
            return False
        if len(self._aside) > 4 * (2 * params.window_max_shares + 1_000):
            self._drop(download, "it is longer than any history")
            return False
        return True

    def _finish(self, download: Download) -> None:
        if not download.foreign:
            return
        aside = self._aside
        if aside is None or aside.tip is None:
            self._drop(download, "it does not begin")
            return
        if aside.proven_work() <= self._own_proof() or not aside.judges_in_full:
            detail = "its history proves less work than its tip claims"
            self._blame(peer_id=download.lead, ip=None, rule="unkept", detail=detail)
            self._drop(download, "it has less work than ours")
            return
        logger.warning(
            "going over to the history of peer %s: height %d, base %d",
            download.lead,
            aside.tip.height,
            aside.base_height,
        )
        held = (decode_share(raw) for raw in self._aside_shares)
        self._desk.replace_chain(aside, (share for share in held if share.hash in aside))
        self._sync.judged(download)
        self._forget_aside()

    def _own_proof(self) -> int:
        """The work that our history proves to a node that is given it as a foreign one: that begins above our base.

        Measured alike, the heavier of two histories is the same for both sides.
        """
        chain: Sharechain = self._desk.chain
        if chain.tip is None or chain.base_height == 0:
            return chain.proven_work()
        given = chain.after_locator((), self._desk.params.uncle_depth + 1)
        foot = [entry for share_hash in given if (entry := chain.entry(share_hash)) is not None]
        held = sum(entry.work + sum(uncle.work for uncle in entry.uncles if uncle.hash in chain) for entry in foot)
        return held + chain.tip.total_work - foot[-1].total_work

    def _begin_foreign(self, download: Download) -> None:
        """Fetch it again, aside; where it was left, if it is the same peer's."""
        if self._aside_lead != download.lead:
            self._forget_aside(keep=True)
        self._sync.begin_foreign(download, self._moment())

    def _drop(self, download: Download, why: str) -> None:
        logger.info("the history of peer %s is left alone: %s", download.lead, why)
        self._sync.decline(download.lead, self._moment() + DECLINED_S)
        self._sync.abandon(download, self._moment())
        self._forget_aside()

    def _forget_aside(self, *, keep: bool = False) -> None:
        if keep:
            if self._aside_shares:
                self._sync.held = {share_id(raw): raw for raw in self._aside_shares}
        else:
            self._sync.held = {}
        self._aside, self._aside_shares, self._aside_lead = None, [], ""
        self._sync.foreign_locator = ()
