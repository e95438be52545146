"""What a Stratum session and the node tell each other: workers, jobs, submissions, verdicts. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

EXTRANONCE1_SIZE = 4
"""Bytes; never empty (some firmware takes an empty one for a failed subscribe)."""
EXTRANONCE2_SIZE = 8
"""Bytes. cgminer never submits above 8."""
DEFAULT_VERSION_MASK = 0x1FFFE000
"""The version bits that miners may roll. Source: BIP320."""

OTHER: Final = 20
STALE: Final = 21
DUPLICATE: Final = 22
LOW_DIFFICULTY: Final = 23
UNAUTHORIZED: Final = 24
NOT_SUBSCRIBED: Final = 25
REASONS: Final[Mapping[int, str]] = {
    OTHER: "malformed",
    STALE: "stale",
    DUPLICATE: "duplicate",
    LOW_DIFFICULTY: "low difficulty",
    UNAUTHORIZED: "unauthorized",
    NOT_SUBSCRIBED: "not subscribed",
}
"""The names of the error codes in statistics."""


def reason_of(code: int) -> str:
    """The name of an error code in statistics."""
    return REASONS.get(code, f"code {code}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Whom a job is for and who is paid for it, as the desk made it out of a user name.

    Attributes:
        user: the user name as the miner gave it.
        name: the part for display after the address; may be empty.
        address: who is paid, for display.
        payout_script: scriptPubKey.
        payout_class: how many window payouts the coinbase may have, by what the firmware takes.
        session_difficulty: asked for by `address+difficulty` or `d=`; None leaves it to vardiff.
        share_difficulty: asked for by `address/difficulty`; for the desk, the session does not read it.
    """

    user: str
    name: str
    address: str
    payout_script: bytes
    payout_class: int
    session_difficulty: float | None = None
    share_difficulty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """One job for one worker (or for all workers that would get the same), with values in internal order.

    Attributes:
        job_id: the desk's name of the job; a miner sees another one.
        previous_block_hash: 32 bytes.
        coinb1, coinb2: the coinbase without witness, before and after extranonce1 + extranonce2.
        branch: the merkle branch of the coinbase, 32 bytes each.
        version, bits, time: as in the header.
        share_target, block_target: 256 bits; no session target is below the larger of the two.
    """

    job_id: str
    previous_block_hash: bytes
    coinb1: bytes
    coinb2: bytes
    branch: tuple[bytes, ...]
    version: int
    bits: int
    time: int
    share_target: int
    block_target: int
    _middle: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.previous_block_hash) != 32 or any(len(node) != 32 for node in self.branch):
            raise ValueError(f"job {self.job_id}: expected hashes of 32 bytes")
        for name in ("version", "bits", "time"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"job {self.job_id}: {name}: expected 32 bits, got {getattr(self, name):#x}")
        words = (self.previous_block_hash[i : i + 4][::-1].hex() for i in range(0, 32, 4))
        branch = ",".join(f'"{node.hex()}"' for node in self.branch)
        middle = f'"{"".join(words)}","{self.coinb1.hex()}","{self.coinb2.hex()}",[{branch}]'
        object.__setattr__(self, "_middle", middle.encode())  # Hex of up to 16 kB, the same for every session.

    @property
    def limit(self) -> int:
        """The lowest session target that the job allows: no share and no block may go unreported."""
        return max(self.share_target, self.block_target)

    def encode(self, *, job_id: str, version_mask: int, clean: bool) -> bytes:
        """The `mining.notify` line, with the negotiated bits of the version cleared.

        Firmware disagrees whether the version bits of a submission replace those of the job, are ORed into or XORed
        onto them; cleared, the three are the same.
        """
        rest = f'"{self.version & ~version_mask:08x}","{self.bits:08x}","{self.time:08x}"'
        return (
            f'{{"id":null,"method":"mining.notify","params":["{job_id}",'.encode()
            + self._middle
            + f",{rest},{'true' if clean else 'false'}]}}\n".encode()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A miner's claim that these values make a header with a low hash.

    Attributes:
        worker: the user name in the submission.
        job_id: the desk's (`Notify.job_id`).
        extranonce1, extranonce2: 4 and 8 bytes, as they stand in the coinbase.
        time, nonce: as in the header.
        version_bits: as submitted, None where the miner sent none.
        version_mask: what was negotiated when the miner got the job; 0 for nothing.
    """

    worker: str
    job_id: str
    extranonce1: bytes
    extranonce2: bytes
    time: int
    nonce: int
    version_bits: int | None
    version_mask: int

    def header_version(self, job_version: int) -> int:
        """The version in the header that the miner hashed, given the job's. Bits outside the mask do not count."""
        return (job_version & ~self.version_mask) | ((self.version_bits or 0) & self.version_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the desk found out about a submission, and has already acted on.

    Attributes:
        hash_value: the header's hash as a number.
        stale: the job is on an older block than Bitcoin's tip.
        is_share: the hash meets the share target.
        is_block: the hash meets the block target; the block has been submitted.
    """

    hash_value: int
    stale: bool
    is_share: bool
    is_block: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionOutcome:
    """What became of a submission, for the books.

    Attributes:
        reason: one of `REASONS`, None for an accepted one.
        difficulty: of the job that it answered, which is what an accepted one is worth; 0.0 where the job is unknown.
        best: the difficulty that its hash would have met; 0.0 for a refused one.
        is_share, is_block: as in the verdict; False for a refused one.
    """

    reason: str | None
    difficulty: float = 0.0
    best: float = 0.0
    is_share: bool = False
    is_block: bool = False


class Desk(Protocol):
    """What a session asks of the node. All answers are immediate."""

    def authorize(self, *, user: str, password: str, user_agent: str) -> Worker:
        """Who mines. Raises: StratumError(24) with a text for the miner's owner."""

    def notify_for(self, worker: Worker) -> Notify | None:
        """The current job, the same object for equal workers; None while there is no work."""

    def judge(self, worker: Worker, submission: Submission) -> Verdict:
        """Hash, submit a block first, hand a share on. Raises: StratumError(21) for a job no longer known."""

    def note(self, worker: Worker, outcome: SubmissionOutcome) -> None:
        """Enter what became of a submission. The worker is the one that the miner named, or the session's first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """A session at one moment, for pages and logs.

    Attributes:
        user, user_agent: as the miner gave them; "" where it has not yet.
        difficulty: of the job in hand, 0 before the first.
        hash_rate: estimated from submissions, in hashes per second.
        accepted, rejected: submissions; rejected by the names in `REASONS`.
        shares, blocks: how many of the accepted were one.
        connected_at, heard_at: the start and the last line of the miner, on the server's clock.
    """

    session_id: str
    user: str
    user_agent: str
    difficulty: float
    hash_rate: float
    accepted: int
    rejected: Mapping[str, int]
    shares: int
    blocks: int
    connected_at: float
    heard_at: float
