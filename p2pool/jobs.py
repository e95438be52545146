"""Where a block template, the sharechain's tip and a miner meet: jobs, and what comes back for them.

A *job* is all but the extranonces, the time, the nonce and the rolled version bits of a block. A *candidate* is
a job with those filled in by a miner: a header with a hash. A candidate that meets the share target becomes a
share, by the same functions that every peer checks it with.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from p2pool.bitcoin_backend.template import BlockTemplate, assemble_block
from p2pool.errors import StratumError
from sharechain.chain import Sharechain
from sharechain.coinbase import COINBASE_TAG, coinbase_head, coinbase_tail, fold_coinbase
from sharechain.difficulty import bits_to_target, target_to_bits, work_of
from sharechain.entry import ChainEntry
from sharechain.hasher import sha256d
from sharechain.params import Params
from sharechain.payout import Payouts
from sharechain.share import Share, ShareData, bip34_push, pack_header, share_commitment
from sharechain.validate import (
    block_target,
    derive_data,
    easiest_target,
    hardest_target,
    median_time,
    next_max_bits,
)

__all__ = [
    "EXTRANONCE_SIZE",
    "Candidate",
    "Job",
    "JobBook",
    "Work",
    "build_job",
    "next_heaviness",
    "next_work",
    "shares_in_window",
]

#: Seconds after which no miner answers a job any more; each holds on to a whole template.
MAX_JOB_AGE_S: Final = 900
#: How far a hash rate may be outside what a heaviness is for before that changes.
HEAVINESS_MARGIN: Final = 1.25
#: Bytes. Extranonce1 (4) and extranonce2 (8) together.
EXTRANONCE_SIZE: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all jobs of one moment have in common."""

    template: BlockTemplate
    #: The sharechain's tip; None if there is no share yet.
    parent: ChainEntry | None
    uncles: tuple[ChainEntry, ...]
    max_bits: int
    #: The easiest share target that jobs may have (R8).
    share_target: int
    #: Unix seconds: the header time that jobs start from, after everything that it must be after.
    time: int
    #: Compact target that Bitcoin demands at that time.
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job, the same for every session of a payout script, class and share difficulty."""

    job_id: str
    work: Work
    data: ShareData
    payouts: Payouts
    #: The coinbase before and behind the extranonces.
    coinb1: bytes
    coinb2: bytes
    #: The coinbase script before the extranonces.
    script_head: bytes
    share_target: int
    block_target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A header that a miner hashed, with all that makes it a share or a block."""

    job: Job
    header: bytes
    hash: bytes
    coinbase: bytes
    coinbase_script: bytes

    @property
    def hash_value(self) -> int:
        """The hash as the number that is compared with targets."""
        return int.from_bytes(self.hash, "little")

    @property
    def is_share(self) -> bool:
        """Whether the hash meets the share target."""
        return self.hash_value <= self.job.share_target

    @property
    def is_block(self) -> bool:
        """Whether the hash meets the block target."""
        return self.hash_value <= self.job.block_target

    def share(self) -> Share:
        """The share that every peer will see."""
        template = self.job.work.template
        return Share(
            header=self.header,
            coinbase_script=self.coinbase_script,
            coinbase_value=template.coinbase_value,
            witness_commitment=template.witness_commitment,
            merkle_branch=template.merkle_branch,
            data=self.job.data,
        )

    def block(self) -> bytes:
        """The whole block, as Bitcoin takes it."""
        return assemble_block(self.header, self.coinbase, self.job.work.template)


def next_work(chain: Sharechain, template: BlockTemplate, now: float) -> Work:
    """The work on a template and the chain's tip.

    Args:
        chain: the sharechain.
        template: from the Bitcoin node.
        now: Unix seconds.
    """
    parent = chain.tip
    least = template.min_time if parent is None else max(template.min_time, median_time(parent) + 1)
    time = max(least, int(now))
    max_bits = next_max_bits(chain.params, parent)
    return Work(
        template=template,
        parent=parent,
        uncles=chain.uncle_candidates(parent),
        max_bits=max_bits,
        share_target=easiest_target(chain.params, parent, max_bits, time),
        time=time,
        bits=template.bits_at(time),
    )


def build_job(
    chain: Sharechain,
    work: Work,
    *,
    job_id: str,
    payout_script: bytes,
    payout_class: int,
    share_target: int | None = None,
) -> Job:
    """A job for a payout script.

    Args:
        chain: the sharechain that ``work`` was made from.
        work: what all jobs of this moment share.
        job_id: what the miner calls it by.
        payout_script: scriptPubKey to be credited.
        payout_class: one of the network's.
        share_target: a harder share target than the chain asks for, if the miner wants one; R8 bounds it.
    """
    params, template = chain.params, work.template
    easiest = work.share_target
    wanted = easiest if share_target is None else min(easiest, share_target)
    bits = target_to_bits(max(wanted, hardest_target(params, work.max_bits)))
    data = derive_data(
        params,
        parent=work.parent,
        uncles=work.uncles,
        bits=bits,
        payout_script=payout_script,
        payout_class=payout_class,
    )
    payouts = chain.payouts(
        work.parent,
        value=template.coinbase_value,
        payout_class=payout_class,
        max_bits=data.max_bits,
        block_bits=work.bits,
    )
    script_head = bip34_push(template.height) + COINBASE_TAG + template.coinbase_aux
    commitment = share_commitment(params.network_id, data)
    return Job(
        job_id=job_id,
        work=work,
        data=data,
        payouts=payouts,
        coinb1=coinbase_head(len(script_head) + EXTRANONCE_SIZE) + script_head,
        coinb2=coinbase_tail(payouts, payout_script, template.witness_commitment, commitment),
        script_head=script_head,
        share_target=bits_to_target(bits),
        block_target=block_target(params, data.max_bits, work.bits),
    )


def shares_in_window(params: Params, work: Work) -> float:
    """How many main-chain shares the PPLNS window holds, if all are as hard as the chain asks."""
    block = block_target(params, work.max_bits, work.bits)
    wanted = params.window_blocks * work_of(block) / work_of(bits_to_target(work.max_bits))
    return min(wanted, params.window_max_shares)


def next_heaviness(params: Params, work: Work, *, hash_rate: float, shares_per_window: int, present: int = 1) -> int:
    """How many times harder than the chain asks a big miner's shares are to be, so that they do not flood it.

    A share is worth its work, so a miner loses nothing by fewer and heavier ones but evenness, of which two hundred a
    window leave plenty (7 %). R8 ends it at ``heaviest_share``: a miner of more than ``heaviest_share *
    shares_per_window`` ordinary shares a window, on mainnet 1.3 % of the pool, finds more than the aim all the same.

    Args:
        params, work: of the chain.
        hash_rate: of the payout script, in hashes per second.
        shares_per_window: the aim, above 0.
        present: the last answer. It changes only when the rate has clearly left what it is for.

    Returns:
        1, a power of two, or ``heaviest_share``.
    """
    window_s = shares_in_window(params, work) * params.share_period_ms / 1000
    expected = hash_rate * window_s / work_of(bits_to_target(work.max_bits))
    wanted = expected / shares_per_window
    if (present == 1 or present / 2 / HEAVINESS_MARGIN < wanted) and wanted <= present * HEAVINESS_MARGIN:
        return present
    heaviness = 1
    while heaviness < wanted and heaviness < params.heaviest_share:
        heaviness = min(2 * heaviness, params.heaviest_share)
    return heaviness


class JobBook:
    """The jobs that miners may still answer.

    Mutable fields: ``_jobs`` (by id, oldest first, bounded) and ``_current`` (the jobs of the newest work, by
    payout script, class and share target) with ``_work``, the newest work; ``_previous``, how many jobs the work
    before it had; ``_next_id``.
    """

    def __init__(self, chain: Sharechain, *, first_id: int, capacity: int = 1_000) -> None:
        """An empty book.

        Args:
            chain: the sharechain to make jobs on.
            first_id: 0 to 2^32 - 1; other than at the last start, so that an answer to a job of then is unknown.
            capacity: jobs that are kept.
        """
        self._chain = chain
        self._capacity = capacity
        self._next_id = first_id
        self._work: Work | None = None
        self._previous = 0
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._current: dict[tuple[bytes, int, int | None], Job] = {}

    @property
    def work(self) -> Work | None:
        """The newest work."""
        return self._work

    def renew(self, work: Work) -> None:
        """From now on give jobs on ``work``; older ones may still be answered."""
        self._work = work
        self._previous = len(self._current)
        self._current.clear()
        while self._jobs and (oldest := next(iter(self._jobs.values()))).work.time < work.time - MAX_JOB_AGE_S:
            del self._jobs[oldest.job_id]

    def job_for(self, payout_script: bytes, payout_class: int, share_target: int | None = None) -> Job | None:
        """The current job for a payout script, or None while there is no work. Arguments as of ``build_job``."""
        if self._work is None:
            return None
        key = (payout_script, payout_class, share_target)
        job = self._current.get(key)
        if job is None:
            job = build_job(
                self._chain,
                self._work,
                job_id=f"{self._next_id & 0xFFFFFFFF:x}",
                payout_script=payout_script,
                payout_class=payout_class,
                share_target=share_target,
            )
            self._next_id += 1
            self._current[key] = self._jobs[job.job_id] = job
            # However many miners there are, the jobs that they are still on while new ones go out are kept.
            while len(self._jobs) > max(self._capacity, 2 * (self._previous + len(self._current))):
                self._jobs.popitem(last=False)
        return job

    def job(self, job_id: str) -> Job:
        """A job that was given.

        Raises:
            StratumError: 21 for an unknown one.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise StratumError(21, f"job {job_id} not found")
        return job

    def candidate(self, job: Job, *, extranonce: bytes, version: int, time: int, nonce: int) -> Candidate:
        """What a miner hashed.

        Args:
            job: the job that it answers.
            extranonce: both extranonces, 12 bytes.
            version, time, nonce: of the header.

        Raises:
            StratumError: 20 for values that fit no header.
        """
        if len(extranonce) != EXTRANONCE_SIZE:
            raise StratumError(20, f"extranonces have {EXTRANONCE_SIZE} bytes together, got {len(extranonce)}")
        template = job.work.template
        coinbase = job.coinb1 + extranonce + job.coinb2
        header = pack_header(
            version=version,
            previous_block_hash=template.previous_block_hash,
            merkle_root=fold_coinbase(coinbase, template.merkle_branch),
            time=time,
            bits=job.work.bits,
            nonce=nonce,
        )
        return Candidate(
            job=job,
            header=header,
            hash=sha256d(header),
            coinbase=coinbase,
            coinbase_script=job.script_head + extranonce,
        )
