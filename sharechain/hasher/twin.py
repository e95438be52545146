"""The Python twin of the native extension: the same interface, clear rather than fast.

It serves where the extension was not built, and it is what the extension is tested against: for all arguments both
return equal values and raise the same exceptions. The documentation of the interface is here; the draw's docstring
(`WeightTable.draw`) holds the reasoning that `rust/src/draw.rs` relies on.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sharechain.tagged import tagged_hash

IMPLEMENTATION = "python"

HEADER_BYTES = 80
HASH_BYTES = 32
MAX_TARGET = 2**256 - 1
NONCES = 2**32
POLL_INTERVAL = 2**14
"""`scan_nonces` looks at its stop flag each time it has done this many hashes."""
WEIGHT_LIMIT = 2**128
"""Exclusive bound of a weight and of the sum of all weights."""
AMOUNT_LIMIT = 2**63
"""Exclusive bound of an amount in satoshis (all bitcoins are below 2^51)."""


def sha256d(data: bytes) -> bytes:
    """Bitcoin's hash: SHA-256 of the SHA-256 of `data`.

    Returns 32 bytes, internal order.

    Source: Bitcoin Core, `CHash256`.
    """
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def meets_target(header: bytes, target: int) -> bool:
    """Whether a block header is proof of work for a target: its hash, as a number, is at most the target.

    `header` is 80 bytes, `target` is in 0..2^256 - 1. The hash is read as a little-endian number.

    Raises `ValueError` for a header of another length, `OverflowError` for a target out of range.

    Source: Bitcoin Core, `CheckProofOfWork`.
    """
    _require_header(header)
    _require_target(target)
    return int.from_bytes(sha256d(header), "little") <= target


def check_headers(headers: Sequence[bytes], targets: Sequence[int]) -> list[bool]:
    """`meets_target` of each header and the target beside it; a batch leaves the other threads running.

    Raises as `meets_target`, and `ValueError` unless there are as many targets as headers.
    """
    if len(headers) != len(targets):
        raise ValueError(f"as many targets as headers, got {len(headers)} headers and {len(targets)} targets")
    return [meets_target(header, target) for header, target in zip(headers, targets, strict=True)]


def fold_merkle(leaf: bytes, branch: Sequence[bytes]) -> bytes:
    """The merkle root above the first transaction of a block.

    `leaf` is its hash and `branch` the siblings on the way up, lowest first, each on the right-hand side; all of 32
    bytes, internal order.

    Raises `ValueError` for a hash of another length.

    Source: Stratum's `merkle_branch`; Bitcoin Core, `ComputeMerkleRoot`.
    """
    for node in (*branch, leaf):
        _require_hash(node)
    root = leaf
    for sibling in branch:
        root = sha256d(root + sibling)
    return root


def merkle_roots(coinbases: Sequence[bytes], branches: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The merkle root of each block from its coinbase (without witness) and the branch beside it, as `fold_merkle`.

    The extension hashes many side by side, on all cores, and leaves the other Python threads running.

    Raises `ValueError` for a hash of another length than 32 bytes, and unless there are as many of both.
    """
    if len(coinbases) != len(branches):
        raise ValueError(f"as many branches as coinbases, got {len(coinbases)} coinbases and {len(branches)} branches")
    return [fold_merkle(sha256d(coinbase), branch) for coinbase, branch in zip(coinbases, branches, strict=True)]


class SubmissionChecker:
    """Hashes what miners of one job hand in, and compares it with the job's targets.

    The coinbase is `prefix`, an extranonce, `suffix`, without witness; the extension hashes the prefix once. `branch`
    is the coinbase's merkle branch; `previous_block_hash` and `bits` are the header's; `targets` are as many as wanted.

    Raises `ValueError` for a hash that has not 32 bytes, `OverflowError` for a target out of range.
    """

    __slots__ = ("_bits", "_branch", "_prefix", "_previous_block_hash", "_suffix", "_targets")

    def __init__(
        self,
        *,
        prefix: bytes,
        suffix: bytes,
        branch: Sequence[bytes],
        previous_block_hash: bytes,
        bits: int,
        targets: Sequence[int],
    ) -> None:
        for node in (*branch, previous_block_hash):
            _require_hash(node)
        for target in targets:
            _require_target(target)
        self._prefix, self._suffix, self._branch = prefix, suffix, branch
        self._previous_block_hash, self._bits, self._targets = previous_block_hash, bits, targets

    def check(self, extranonce: bytes, version: int, time: int, nonce: int) -> tuple[bytes, bytes, list[bool]]:
        """The header of a submission, its hash, and for each target whether the hash is at most that."""
        root = fold_merkle(sha256d(self._prefix + extranonce + self._suffix), self._branch)
        header = struct.pack("<I32s32sIII", version, self._previous_block_hash, root, time, self._bits, nonce)
        digest = sha256d(header)
        number = int.from_bytes(digest, "little")
        return header, digest, [number <= target for target in self._targets]


class StopFlag:
    """Ends a nonce scan from another thread. Once set it stays set.

    Mutable field: `_set`, which only ever goes from False to True.
    """

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Asks the scans that were given this flag to end."""
        self._set = True

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """What a nonce scan found and what it cost."""

    nonce: int | None
    """The first nonce that meets the target, None if none did (or the scan was stopped before it)."""
    hashes: int
    """The number of nonces tried, the found one included."""


def kernels() -> list[str]:
    """The names of the kernels that this processor can run, fastest first; "python" alone is the twin's.

    A kernel is the code that hashes, made for some processors: "avx512", "sha-ni", "avx2" (x86), "sha2" (ARM),
    "portable" (all).
    """
    return [IMPLEMENTATION]


def kernel() -> str:
    """The name of the kernel in use: the fastest, unless `use_kernel` was called."""
    return IMPLEMENTATION


def use_kernel(name: str) -> None:
    """Makes this kernel the one in use, for the whole process.

    Raises `ValueError`, saying which there are, for another name than those of `kernels`.
    """
    _require_kernel(name)


def scan_nonces(
    header: bytes, start: int, count: int, target: int, stop: StopFlag | None = None, kernel: str | None = None
) -> ScanResult:
    """Mines: tries the nonces `start` to `start + count - 1` in order and ends at the first that meets the target.

    `header` is 80 bytes, of which the last four, the nonce, are ignored; `target` is in 0..2^256 - 1. `stop` is
    looked at before the first hash and after each 2^14. `kernel` is one of `kernels`, None for the one in use.

    Raises `ValueError` for a header of another length, for nonces outside 0..2^32 - 1 and for a kernel that is not
    there, `OverflowError` for a target out of range.

    Source: ours; Bitcoin Core's `GenerateBlock` is the same loop.
    """
    if kernel is not None:
        _require_kernel(kernel)
    _require_header(header)
    _require_target(target)
    if start < 0 or count < 0 or start + count > NONCES:
        raise ValueError(f"nonces are in 0..2^32 - 1, got {count} from {start} on")
    midstate = hashlib.sha256(header[:64])
    tail = header[64:76]
    for done in range(count):
        if stop is not None and done % POLL_INTERVAL == 0 and stop.is_set():
            return ScanResult(nonce=None, hashes=done)
        inner = midstate.copy()
        inner.update(tail + (start + done).to_bytes(4, "little"))
        if int.from_bytes(hashlib.sha256(inner.digest()).digest(), "little") <= target:
            return ScanResult(nonce=start + done, hashes=done + 1)
    return ScanResult(nonce=None, hashes=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """A header that meets its job's target."""

    tag: int
    """Of the job."""
    extranonce: bytes
    """What was put between the coinbase's prefix and suffix."""
    version: int
    time: int
    nonce: int


class Scanner:
    """Threads that scan for a miner: from a job with room for an extranonce to headers, without end.

    Each thread takes an extranonce that no other has and goes through the versions that may be rolled, and for each
    through the nonces. Extranonces go on from job to job: two jobs that are equal do not mean the same headers. A new
    job ends the work on the old one after at most 2^14 hashes of each thread.

    The extension's threads work on their own, without the interpreter lock, and wait when 64 finds were not fetched.
    The twin has no threads: it hashes in `wait`, up to 2^14 nonces, whatever the patience.

    Mutable fields: `_work`, the headers left of the job in hand as a generator that yields what it found after some
    hashes, None without a job; `_time`, the header time; `_extranonce`, the next number; `_hashes`.
    """

    def __init__(self, threads: int, kernel: str | None = None) -> None:
        """`threads` is at least 1; `kernel` is one of `kernels`, None for the one in use.

        Raises `ValueError` for no threads and for a kernel that is not there.
        """
        if threads == 0:
            raise ValueError("a scanner has threads, got 0")
        if kernel is not None:
            _require_kernel(kernel)
        self._work: Iterator[Find | None] | None = None
        self._time = 0
        self._extranonce = 0
        self._hashes = 0

    def start(
        self,
        *,
        tag: int,
        prefix: bytes,
        extranonce_size: int,
        suffix: bytes,
        branch: Sequence[bytes],
        version: int,
        version_mask: int = 0,
        previous_block_hash: bytes,
        time: int,
        bits: int,
        target: int,
        nonces: int = NONCES,
    ) -> None:
        """Gives all threads another job, at once.

        `tag` comes back with what is found. The coinbase is `prefix`, an extranonce of `extranonce_size` bytes (of
        which the last eight are counted up, big-endian), `suffix`; `branch` is its merkle branch. `version` with the
        bits of `version_mask` in all ways, `previous_block_hash`, `time`, `bits` make the header; the first `nonces`
        nonces of each are tried. `target` is what the hash must not exceed.

        Raises `ValueError` for a hash that has not 32 bytes and for too many nonces, `OverflowError` for a target
        out of range.
        """
        if nonces > NONCES:
            raise ValueError(f"a header has 2^32 nonces, got {nonces}")
        for node in (*branch, previous_block_hash):
            _require_hash(node)
        _require_target(target)
        self._time = time

        def headers() -> Iterator[Find | None]:
            for _ in range(256**extranonce_size):
                extranonce = (self._extranonce % 256 ** min(extranonce_size, 8)).to_bytes(extranonce_size, "big")
                self._extranonce += 1
                root = fold_merkle(sha256d(prefix + extranonce + suffix), branch)
                rolled = 0
                while True:
                    rolling = version & ~version_mask | rolled
                    at = 0
                    while at < nonces:
                        now = self._time
                        header = struct.pack("<I32s32sIII", rolling, previous_block_hash, root, now, bits, 0)
                        result = scan_nonces(header, at, min(_TWIN_SLICE, nonces - at), target)
                        self._hashes += result.hashes
                        at += result.hashes
                        nonce = result.nonce
                        yield (
                            nonce
                            if nonce is None
                            else Find(tag=tag, extranonce=extranonce, version=rolling, time=now, nonce=nonce)
                        )
                    rolled = (rolled - version_mask) & version_mask
                    if not rolled:
                        break

        self._work = headers()

    def stop(self) -> None:
        """Leaves the threads without a job."""
        self._work = None

    def set_time(self, time: int) -> None:
        """Changes the header time of the job in hand, Unix seconds: nonces tried from now on have it."""
        self._time = time

    def wait(self, patience_ms: int) -> list[Find]:
        """What was found since the last call, also for jobs that are over; waits for it for so long, in ms."""
        until = self._hashes + POLL_INTERVAL
        finds: list[Find] = []
        work = self._work
        while work is not None and work is self._work and not finds and self._hashes < until:
            try:
                find = next(work)
            except StopIteration:
                break
            if find is not None:
                finds.append(find)
        return finds

    @property
    def hashes(self) -> int:
        """The number of nonces tried so far, by all threads."""
        return self._hashes

    def close(self) -> None:
        """Ends the threads and waits until they have ended. Nothing is found any more."""
        self._work = None


_TWIN_SLICE = 2**10
"""The twin's `Scanner` looks this often, in hashes, whether there is another job: some ten milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The payouts of one block reward, as `WeightTable.draw` made them."""

    outputs: bytes
    """Bitcoin TxOuts, one after the other (8 bytes amount, compact size, script): largest amount first, equal
    amounts by script."""
    count: int
    """The number of outputs."""
    paid: int
    """The sum of their amounts, sat."""
    threshold: int
    """Entitlements from this amount on (sat) were paid exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A coinbase that pays a window, as `WeightTable.pay` made it."""

    outputs: bytes
    """The window's payouts as Bitcoin TxOuts, in the order of `Draw.outputs`."""
    count: int
    """The number of outputs."""
    finder_amount: int
    """What the finder gets, sat; 0 if that would be dust and joined the first payout."""
    threshold: int
    """Entitlements from this amount on (sat) were paid exactly; 0 without a window."""
    txid: bytes
    """The hash of the coinbase without witness."""
    merkle_root: bytes
    """The root above it."""


class WeightTable:
    """The weight of each script in the PPLNS window, kept up to date share by share, and the draw of payouts from it.

    Mutable fields: `_weights`, without zeros, and `_total`, which is their sum and below 2^128.

    For one thread at a time. The extension keeps the interpreter lock in all methods, the draw included.
    """

    __slots__ = ("_total", "_weights")

    def __init__(self) -> None:
        self._weights: dict[bytes, int] = {}
        self._total = 0

    def add(self, script: bytes, weight: int) -> None:
        """Adds `weight`, which may be negative, to the script's; a script whose weight becomes 0 vanishes.

        Raises `ValueError` if the script's weight would fall below 0 and `OverflowError` if `weight` or the sum of
        all weights would reach 2^128; then nothing has changed.
        """
        if abs(weight) >= WEIGHT_LIMIT:
            raise OverflowError(f"a weight is below 2^128, got {weight}")
        present = self._weights.get(script, 0)
        if present + weight < 0:
            raise ValueError(f"a weight must not fall below 0, got {weight} for a script of weight {present}")
        if self._total + weight >= WEIGHT_LIMIT:
            raise OverflowError(f"the total weight stays below 2^128, got {weight} on top of {self._total}")
        self._total += weight
        if present + weight:
            self._weights[script] = present + weight
        else:
            self._weights.pop(script, None)

    @property
    def total(self) -> int:
        """The sum of all weights."""
        return self._total

    def __len__(self) -> int:
        return len(self._weights)

    def weight(self, script: bytes) -> int:
        """The script's weight, 0 if it has none."""
        return self._weights.get(script, 0)

    def items(self) -> list[tuple[bytes, int]]:
        """All scripts and their weights, by script."""
        return sorted(self._weights.items())

    def copy(self) -> "WeightTable":
        """A table of the same weights that changes on its own."""
        table = WeightTable()
        table._weights = self._weights.copy()
        table._total = self._total
        return table

    def draw(self, value: int, payout_class: int, min_payout: int, dust: int, seed: bytes) -> Draw:
        """Shares `value` out by weight in at most `payout_class` outputs: large entitlements exactly, small by lot.

        A coinbase has room for few outputs and the window has many scripts. Paying only the largest would rob the
        small miners; so their entitlements are pooled and paid in equal lots to a few of them, each winning as often
        as fits its entitlement. Every node draws the same lots from `seed`, so that a share's coinbase can be checked.

        `value` is what there is to pay; `min_payout` the least entitlement that is always paid exactly if there is
        room; `dust` the least pool for which lots are drawn; all in sat, below 2^63, the last two at least 1, as
        `payout_class`. `seed` is any bytes that the winner of a lot could not choose (a share hash).

        1. A script of weight w is *entitled* to e = floor(value * w / total).
        2. Let B(t) count the entitlements of at least t, S(t) sum up those below t, and L(t), the number of lots, be 0
           if S(t) < dust, else max(1, floor(S(t) / t)). The *threshold* t is the smallest integer from `min_payout`
           on with B(t) + L(t) <= payout_class (`find_threshold`). One exists: above all entitlements and their sum B
           is 0 and L at most 1.
        3. Entitlements from t on are paid exactly. If L > 0, the others compete for L lots of floor(S / L) each:
           they are laid end to end, in ascending order of SHA-256(seed || script), on a line of length S, and L points
           S / L apart, the first at offset / L, pick the winners. The offset is a number in 0..S - 1 made from the
           seed (`draw_winners`). To stay in integers all lengths are multiplied by L.
        4. Outputs are sorted by amount, largest first, then by script.

        *Nobody is hit twice.* If S >= t then L <= S / t, so the points are S / L >= t apart, and each small stretch
        is shorter than t. If S < t there is one point only.

        *The lots are fair.* A pair of an offset o in 0..S - 1 and a point number m in 0..L - 1 gives the point o +
        m * S, and each of the integers 0..L * S - 1 is given by exactly one pair. The stretch of a script entitled
        to e covers L * e of them, so over all S offsets it is hit L * e times, at most once per offset: it wins
        with probability L * e / S exactly, and L * e / S * floor(S / L) is e but for the rounding of the lot. (The
        offset is S times a 256-bit fraction, S < 2^63: the bias is below 2^-193. Taken modulo S instead, it would
        be another one for each satoshi that a finder leaves out of its coinbase, and could be chosen for next to
        nothing.) The order, being hashed anew with each seed, makes any two scripts' luck independent of their
        neighbours; no fairness rests on it.

        *What is not paid out*, the roundings and a pool below `dust`, is left to the caller: `value - paid`.

        Raises `ValueError` for an empty table and for a class, minimum or dust of 0, `OverflowError` for one of the
        four numbers outside 0..2^63 - 1.

        Source: ours; systematic sampling with unequal probabilities (W. G. Madow, 1949).
        """
        _require_terms(value, payout_class, min_payout, dust)
        if not self._weights:
            raise ValueError("a draw needs at least one weight, got an empty table")

        entitled = {script: value * weight // self._total for script, weight in self._weights.items()}
        threshold = find_threshold(list(entitled.values()), payout_class, min_payout, dust)
        amounts = {script: e for script, e in entitled.items() if e >= threshold}
        small = {script: e for script, e in entitled.items() if 0 < e < threshold}
        pool = sum(small.values())
        lots = count_lots(pool, threshold, dust)
        if lots:
            offset = pool * int.from_bytes(tagged_hash("p2pool/offset", seed), "big") >> 256
            lot = pool // lots
            for script in draw_winners(small, lots, offset, seed):
                amounts[script] = lot
        paid = sorted(amounts.items(), key=lambda output: (-output[1], output[0]))
        return Draw(
            outputs=b"".join(
                amount.to_bytes(8, "little") + _compact_size(len(script)) + script for script, amount in paid
            ),
            count=len(paid),
            paid=sum(amounts.values()),
            threshold=threshold,
        )

    def pay(
        self,
        *,
        value: int,
        bonus: int,
        payout_class: int,
        min_payout: int,
        dust: int,
        seed: bytes,
        coinbase_script: bytes,
        finder_script: bytes,
        witness_commitment: bytes | None,
        commitment: bytes,
        branch: Sequence[bytes],
    ) -> Payment:
        """From weights to the merkle root, the way of every share that is checked, in one call.

        The window shares `value - bonus` by `draw`; `bonus` and what the draw left are the finder's, but join the first
        payout where they are below `dust`. An empty table pays all to the finder. The coinbase has the outputs of the
        window, of the finder, of the witness commitment (32 bytes, or None) and of the share commitment (32 bytes).

        The same as `build_payouts`, `build_coinbase` and `fold_coinbase` one after the other, which say more.

        Raises as `draw`, but for an empty table; `ValueError` for a bonus above the value, a script of more than 252
        bytes and a hash of another length.
        """
        _require_terms(value, payout_class, min_payout, dust)
        if not 0 <= bonus < AMOUNT_LIMIT:
            raise OverflowError(f"bonus is in 0..2^63 - 1, got {bonus}")
        if bonus > value:
            raise ValueError(f"a bonus is part of the value {value}, got {bonus}")
        for script in (coinbase_script, finder_script):
            if len(script) > 0xFC:
                raise ValueError(f"a script has at most 252 bytes, got {len(script)}")
        for node in (commitment, *branch) if witness_commitment is None else (witness_commitment, commitment, *branch):
            _require_hash(node)
        drawn = Draw(outputs=b"", count=0, paid=0, threshold=0)
        if self._weights:
            drawn = self.draw(value - bonus, payout_class, min_payout, dust, seed)
        outputs, finder_amount = drawn.outputs, value - drawn.paid
        if drawn.count and finder_amount < dust:
            outputs = (int.from_bytes(outputs[:8], "little") + finder_amount).to_bytes(8, "little") + outputs[8:]
            finder_amount = 0
        others = []
        if finder_amount or not drawn.count:
            others.append((finder_amount, finder_script))
        if witness_commitment is not None:
            others.append((0, bytes.fromhex("6a24aa21a9ed") + witness_commitment))
        others.append((0, b"\x6a\x20" + commitment))
        coinbase = b"".join(
            (
                struct.pack("<IB32sIB", 2, 1, bytes(32), 0xFFFFFFFF, len(coinbase_script)),
                coinbase_script,
                b"\xff\xff\xff\xff",
                _compact_size(drawn.count + len(others)),
                outputs,
                *(struct.pack("<QB", amount, len(script)) + script for amount, script in others),
                bytes(4),
            )
        )
        txid = sha256d(coinbase)
        return Payment(
            outputs=outputs,
            count=drawn.count,
            finder_amount=finder_amount,
            threshold=drawn.threshold,
            txid=txid,
            merkle_root=fold_merkle(txid, branch),
        )


def count_lots(pool: int, threshold: int, dust: int) -> int:
    """The number of lots into which a pool of small entitlements (sat) is divided: each of at least the threshold,
    but one if the pool is smaller, and none if it is below `dust`.

    Source: ours, see `WeightTable.draw`.
    """
    return 0 if pool < dust else max(1, pool // threshold)


def find_threshold(entitled: Sequence[int], payout_class: int, min_payout: int, dust: int) -> int:
    """The smallest threshold (sat) from `min_payout` on for which exact payments and lots fit the payout class.

    With the entitlements in descending order, let t rise through the stretch in which exactly the first j are at
    least t: above the next entitlement, and up to the j-th. There the pool S of the others is constant, and the lots
    needed fall as t rises. So the first t of the stretch that fits has a closed form: with room for k = class - j
    lots, either S < dust and none is needed, or k >= 1 and max(1, floor(S / t)) <= k, that is S < (k + 1) * t, that is
    t >= floor(S / (k + 1)) + 1. Trying the stretches upwards, j downwards, the first that fits has the smallest t.
    The need does not fall steadily over the stretches (a pool that reaches `dust` suddenly needs lots), so there is no
    bisecting.

    Source: ours, see `WeightTable.draw`.
    """
    descending = sorted(entitled, reverse=True)
    largest = min(len(descending), payout_class)
    pool = sum(descending[largest:])
    for exact in range(largest, 0, -1):
        least = _least_in_stretch(descending, exact, pool, payout_class, min_payout, dust)
        if least is not None and least <= descending[exact - 1]:
            return least
        pool += descending[exact - 1]
    least = _least_in_stretch(descending, 0, pool, payout_class, min_payout, dust)
    assert least is not None  # with a class of at least 1 there is room for a lot
    return least


def draw_winners(small: Mapping[bytes, int], lots: int, offset: int, seed: bytes) -> list[bytes]:
    """The scripts that win a lot, in drawing order; see `WeightTable.draw` for why this is fair.

    `small` are the entitlements (sat, not 0) below the threshold, `offset` is in 0..pool - 1.

    Source: ours, see `WeightTable.draw`.
    """
    pool = sum(small.values())
    winners = []
    point, reached = offset, 0
    for script in sorted(small, key=lambda script: hashlib.sha256(seed + script).digest()):
        reached += lots * small[script]
        if point < reached:
            winners.append(script)
            point += pool
    return winners


def _least_in_stretch(
    descending: Sequence[int], exact: int, pool: int, payout_class: int, min_payout: int, dust: int
) -> int | None:
    following = descending[exact] if exact < len(descending) else 0
    least = max(min_payout, following + 1)
    if pool < dust:
        return least
    room = payout_class - exact
    return max(least, pool // (room + 1) + 1) if room else None


def _require_kernel(name: str) -> None:
    if name != IMPLEMENTATION:
        raise ValueError(f'this processor has the kernels {IMPLEMENTATION}, got "{name}"')


def _require_header(header: bytes) -> None:
    if len(header) != HEADER_BYTES:
        raise ValueError(f"a header has {HEADER_BYTES} bytes, got {len(header)}")


def _require_terms(value: int, payout_class: int, min_payout: int, dust: int) -> None:
    bounded = {"value": value, "payout_class": payout_class, "min_payout": min_payout, "dust": dust}
    for name, number in bounded.items():
        if not 0 <= number < AMOUNT_LIMIT:
            raise OverflowError(f"{name} is in 0..2^63 - 1, got {number}")
    for name, number in bounded.items():
        if name != "value" and number == 0:
            raise ValueError(f"{name} is at least 1, got 0")


def _require_hash(node: bytes) -> None:
    if len(node) != HASH_BYTES:
        raise ValueError(f"a hash has {HASH_BYTES} bytes, got {len(node)}")


def _require_target(target: int) -> None:
    if not 0 <= target <= MAX_TARGET:
        raise OverflowError(f"a target is in 0..2^256 - 1, got {target}")


def _compact_size(length: int) -> bytes:
    if length < 0xFD:
        return length.to_bytes(1, "little")
    if length <= 0xFFFF:
        return b"\xfd" + length.to_bytes(2, "little")
    return b"\xfe" + length.to_bytes(4, "little")
