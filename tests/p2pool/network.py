"""A private share network for tests: parameters, a clock by hand, a node on a real Bitcoin, and a miner's work."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pool.bitcoin_backend import BitcoinBackend, BlockTemplate
from p2pool.bitcoin_backend.address import encode_address
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import assemble_block
from p2pool.database import DataDirectory
from p2pool.jobs import Candidate, Job, JobBook
from p2pool.node import Node
from p2pool.stratum.server import ServerSettings, open_listeners
from p2pool.stratum.values import Submission, Verdict, Worker
from p2pool.stratum.vardiff import VardiffSettings
from sharechain import hasher
from sharechain.chain import Sharechain
from sharechain.coinbase import build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target
from sharechain.entry import ancestors
from sharechain.hasher import sha256d
from sharechain.params import NETWORKS, Params
from sharechain.payout import Payouts
from sharechain.share import bip34_push, pack_header
from tests.builders import miner_script

#: 256 hashes for a share, 4 shares for a block.
PARAMS = NETWORKS["regtest"].with_overrides(
    {
        "name": "node",
        "share_period_ms": 1_000,
        "half_life_s": 1_200,
        "stall_after_s": 600,
        "stall_doubling_s": 60,
        "max_target": hex(2**248 - 1),
        "window_max_shares": 50,
        "block_target_divisor": 4,
        "heaviest_share": 1000,
    }
)
#: Unix seconds. After regtest's genesis, long before now.
START = 1_700_000_000
#: Paid to whoever shows the script: P2WSH of OP_TRUE.
ANYBODY = b"\x51"
ANYBODY_SCRIPT = b"\x00\x20" + hashlib.sha256(ANYBODY).digest()
EASY_SERVER = ServerSettings(vardiff=VardiffSettings(start_difficulty=2.0**-26, target_interval_s=0.05, window_s=1.0))


class Clock:
    """Unix seconds that move only by hand."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def address(number: int) -> str:
    """The regtest address of test miner ``number``."""
    text = encode_address(miner_script(number), "regtest")
    assert text is not None
    return text


def pay(template: BlockTemplate, script: bytes) -> bytes:
    """A coinbase that pays everything to one script, and belongs to no share."""
    payouts = Payouts(outputs=b"", count=0, finder_amount=template.coinbase_value, threshold=0)
    return build_coinbase(
        bip34_push(template.height) + b"/test/", payouts, script, template.witness_commitment, bytes(32)
    )


def solved_block(template: BlockTemplate, coinbase: bytes) -> bytes:
    """A block with its proof of work at Bitcoin's own target."""
    header = pack_header(
        version=template.version,
        previous_block_hash=template.previous_block_hash,
        merkle_root=fold_coinbase(coinbase, template.merkle_branch),
        time=template.min_time,
        bits=template.bits,
        nonce=0,
    )
    nonce = hasher.scan_nonces(header, 0, 2**32, bits_to_target(template.bits)).nonce
    assert nonce is not None
    return assemble_block(header[:76] + nonce.to_bytes(4, "little"), coinbase, template)


def mine_blocks(backend: KernelBackend, count: int, script: bytes = ANYBODY_SCRIPT) -> None:
    """Extend Bitcoin's chain by blocks of a stranger."""
    for _ in range(count):
        template = backend.block_template_now()
        result = backend.submit_block_now(solved_block(template, pay(template, script)))
        assert result.accepted, result


def spend(txid: bytes, index: int, value: int) -> bytes:
    """A transaction from an output of ``ANYBODY_SCRIPT`` to another one; its witness is the script."""
    source = b"\x01" + txid + index.to_bytes(4, "little") + b"\x00" + b"\xff\xff\xff\xff"
    target = b"\x01" + value.to_bytes(8, "little") + bytes([len(ANYBODY_SCRIPT)]) + ANYBODY_SCRIPT
    return b"\x02\x00\x00\x00" + b"\x00\x01" + source + target + b"\x01\x01" + ANYBODY + bytes(4)


def is_plain_share(candidate: Candidate) -> bool:
    """A share that is no block."""
    return candidate.is_share and not candidate.is_block


def is_any_block(candidate: Candidate) -> bool:
    """A block."""
    return candidate.is_block


def solve(
    book: JobBook,
    job: Job,
    wanted: Callable[[Candidate], bool],
    *,
    extranonce: bytes = bytes(12),
    version: int | None = None,
    time: int | None = None,
) -> Candidate:
    """The first candidate of a job that is wanted."""
    template = job.work.template
    version = template.version if version is None else version
    time = job.work.time if time is None else time
    target = max(job.share_target, job.block_target)
    header = book.candidate(job, extranonce=extranonce, version=version, time=time, nonce=0).header
    nonce = 0
    while True:
        found = hasher.scan_nonces(header, nonce, 2**32 - nonce, target).nonce
        assert found is not None
        candidate = book.candidate(job, extranonce=extranonce, version=version, time=time, nonce=found)
        if wanted(candidate):
            return candidate
        nonce = found + 1


def submission_of(candidate: Candidate, user: str) -> Submission:
    """What a miner sends for a candidate of a job that nobody rolled versions on."""
    extranonce, header = candidate.coinbase_script[-12:], candidate.header
    return Submission(
        worker=user,
        job_id=candidate.job.job_id,
        extranonce1=extranonce[:4],
        extranonce2=extranonce[4:],
        time=int.from_bytes(header[68:72], "little"),
        nonce=int.from_bytes(header[76:], "little"),
        version_bits=None,
        version_mask=0,
    )


class Rig:
    """A miner at a node's desk, without a socket."""

    def __init__(self, node: Node, miner: int = 0, options: str = "") -> None:
        self.node = node
        self.user = address(miner) + options
        self.worker: Worker = node.authorize(user=self.user, password="x", user_agent="cpuminer/2.5.1")
        self._extranonce = 0

    def job(self) -> Job:
        """The current job."""
        notify = self.node.notify_for(self.worker)
        assert notify is not None
        return self.node._book.job(notify.job_id)

    def find(
        self, wanted: Callable[[Candidate], bool] = is_plain_share, *, job: Job | None = None, time: int | None = None
    ) -> Candidate:
        """Something that is wanted, with a fresh extranonce; not submitted."""
        self._extranonce += 1
        extranonce = self._extranonce.to_bytes(12, "big")
        return solve(self.node._book, job or self.job(), wanted, extranonce=extranonce, time=time)

    def submit(self, candidate: Candidate) -> Verdict:
        """What the node says of a candidate."""
        return self.node.judge(self.worker, submission_of(candidate, self.user))


@asynccontextmanager
async def running(
    path: Path,
    *,
    params: Params = PARAMS,
    clock: Callable[[], float] | None = None,
    wrap: Callable[[KernelBackend], BitcoinBackend] | None = None,
    stratum: ServerSettings = EASY_SERVER,
    default_address: str | None = None,
) -> AsyncIterator[tuple[Node, KernelBackend]]:
    """A whole node on an embedded Bitcoin, both kept in ``path``; stopped as an operator stops it."""
    clock = Clock() if clock is None else clock
    directory = DataDirectory(path, params)
    try:
        backend = KernelBackend.open(path / "bitcoin", clock=clock)
        try:
            node = Node(
                directory=directory,
                params=params,
                backend=backend if wrap is None else wrap(backend),
                stratum=stratum,
                default_address=default_address,
                clock=clock,
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run, open_listeners("127.0.0.1", 0))
                yield node, backend
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await backend.aclose()
    finally:
        directory.close()


async def until(reached: Callable[[], bool]) -> None:
    """Wait for other tasks and threads, without any pause of its own."""
    with trio.fail_after(20):
        while not reached():  # noqa: ASYNC110 - what moves is no task of ours
            await trio.sleep(0.001)


def main_hashes(chain: Sharechain) -> list[bytes]:
    """The main chain, highest first."""
    return [entry.hash for entry in ancestors(chain.tip, 2**31)]


def remember(node: Node) -> tuple[int, list[bytes]]:
    """How many shares a node has and its main chain: what a restart must not change."""
    return len(node.chain), main_hashes(node.chain)


__all__ = [
    "ANYBODY",
    "ANYBODY_SCRIPT",
    "EASY_SERVER",
    "PARAMS",
    "START",
    "Clock",
    "Rig",
    "address",
    "is_any_block",
    "is_plain_share",
    "main_hashes",
    "mine_blocks",
    "pay",
    "remember",
    "running",
    "sha256d",
    "solve",
    "solved_block",
    "spend",
    "submission_of",
    "until",
]
