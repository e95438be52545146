"""The benchmark of the hasher: every kernel of this processor in turns, and another miner's own benchmark beside them.

Rates of one thread are hashes per second of processor time, so that other work on the machine, which takes turns with
ours, does not count; what it costs by sharing a core's units and clock does. Everything that is compared runs in turns
within one call, and medians are shown.
"""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from p2pool.errors import ConfigError
from sharechain import hasher
from sharechain.hasher import twin

__all__ = ["bench_hasher", "read_hash_rate"]

Row = dict[str, Any]

HEADER: Final = bytes(80)
FULL_TURN_S: Final = 0.25
QUICK_TURN_S: Final = 0.02
AGAINST_S: Final = 6.0
"""How long the other miner runs each time: it is asked for a rate, and tells it every few seconds."""
_RATE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)(?:hash(?:es)?|H)/s", re.IGNORECASE)
_UNITS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def bench_hasher(quick: bool, against: str | None = None) -> Iterator[Row]:
    """Nonce scan by kernel, hash functions and checks, against hashlib and the Python twin.

    Args:
        quick: short turns.
        against: a command that prints its hash rate, as ``minerd -a sha256d --benchmark -t 1``; it is run in turns with
            the kernel in use.

    Raises:
        ConfigError: the command cannot be run, or prints no rate.
    """
    yield from _scans(quick)
    yield from _threads(quick)
    if against is not None:
        yield from _against(shlex.split(against), quick)
    yield from _reaction(quick)
    yield from _checks(quick)
    yield from _payment(quick)


def _row(case: str, metric: str, value: float, unit: str) -> Row:
    return {"case": case, "metric": metric, "value": value, "unit": unit}


def _scans(quick: bool) -> Iterator[Row]:
    turns = 3 if quick else 15
    scans: dict[str, Callable[[int], object]] = {
        f"kernel {name}": partial(_scan, name) for name in (hasher.kernels() if hasher.IMPLEMENTATION == "rust" else [])
    }
    scans["reference: Python twin"] = lambda count: twin.scan_nonces(HEADER, 0, count, 0)
    counts = {case: _calibrate(scan, QUICK_TURN_S if quick else FULL_TURN_S) for case, scan in scans.items()}
    rates: dict[str, list[float]] = {case: [] for case in scans}
    for _ in range(turns):
        for case, scan in scans.items():
            rates[case].append(_rate(scan, counts[case]))
    medians = {case: statistics.median(of_case) for case, of_case in rates.items()}
    unit = medians.get("kernel avx2") or medians.get("kernel portable") or medians["reference: Python twin"]
    name = next(case for case, rate in medians.items() if rate == unit)
    for case, rate in medians.items():
        yield _row(f"one thread, {case}", "scan", rate / 1e6, "MH/s")
        yield _row(f"one thread, {case}", "best turn", max(rates[case]) / 1e6, "MH/s")
        yield _row(f"one thread, {case}", f"median to that of {name}", rate / unit, "x")


def _scan(kernel: str | None, count: int) -> object:
    return hasher.scan_nonces(HEADER, 0, count, 0, kernel=kernel)


def _calibrate(scan: Callable[[int], object], turn_s: float) -> int:
    """How many hashes take about a turn."""
    count = 1 << 12
    while (rate := _rate(scan, count)) * turn_s > 2 * count and count < 1 << 31:
        count = min(1 << 31, max(2 * count, int(rate * turn_s / 2)))
    return count


def _rate(scan: Callable[[int], object], count: int) -> float:
    """Hashes per second of this thread's processor time."""
    start = time.thread_time()
    scan(count)
    return count / max(time.thread_time() - start, 1e-6)


def _threads(quick: bool) -> Iterator[Row]:
    """All processors at once, by the clock on the wall: what other processes take is missing here."""
    threads = os.cpu_count() or 1
    count = _calibrate(partial(_scan, None), QUICK_TURN_S if quick else FULL_TURN_S)
    rates = []
    for _ in range(3 if quick else 7):
        workers = [threading.Thread(target=_scan, args=(None, count)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(threads * count / (time.perf_counter() - start))
    yield _row(
        f"{threads} threads, kernel {hasher.kernel()}", "scan, wall clock", statistics.median(rates) / 1e6, "MH/s"
    )


def _reaction(quick: bool) -> Iterator[Row]:
    """From a new job until every thread has found something in it, with the branch and coinbase of a real one."""
    threads = os.cpu_count() or 1
    job: dict[str, Any] = {
        "prefix": bytes(60),
        "extranonce_size": 8,
        "suffix": bytes(14_000),
        "branch": [bytes(32)] * 12,
        "version": 0,
        "previous_block_hash": bytes(32),
        "time": 0,
        "bits": 0,
    }
    scanner = hasher.Scanner(threads)
    wanted = threads if hasher.IMPLEMENTATION == "rust" else 1
    times = []
    for tag in range(0, 40 if quick else 400, 2):
        scanner.start(tag=tag, target=0, **job)
        scanner.wait(10)
        start = time.perf_counter()
        scanner.start(tag=tag + 1, target=2**256 - 1, **job)
        seen: set[bytes] = set()
        while len(seen) < wanted:
            seen |= {find.extranonce for find in scanner.wait(1000) if find.tag == tag + 1}
        times.append((time.perf_counter() - start) * 1e3)
    scanner.close()
    case = f"{threads} threads, kernel {hasher.kernel()}"
    yield _row(case, "new job reaches all threads, median", statistics.median(times), "ms")
    yield _row(case, "new job reaches all threads, slowest", max(times), "ms")


def _against(command: list[str], quick: bool) -> Iterator[Row]:
    turn_s = 1.0 if quick else AGAINST_S
    ours, theirs = [], []
    count = _calibrate(partial(_scan, None), turn_s)
    for _ in range(2 if quick else 5):
        start = time.perf_counter()
        _scan(None, count)
        ours.append(count / (time.perf_counter() - start))
        theirs.append(_run_other(command, turn_s))
    case = f"one thread, wall clock, kernel {hasher.kernel()}"
    yield _row(case, "scan", statistics.median(ours) / 1e6, "MH/s")
    yield _row(f"reference: {shlex.join(command)}", "scan", statistics.median(theirs) / 1e6, "MH/s")
    yield _row(case, "ratio to the reference", statistics.median(ours) / statistics.median(theirs), "x")


def _run_other(command: list[str], seconds: float) -> float:
    """The last hash rate that a command prints within so many seconds; then it is ended."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError(f"--against: cannot run {shlex.join(command)}: {error}") from error
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        output.seek(0)
        text = output.read()
    rate = read_hash_rate(text)
    if rate is None:
        raise ConfigError(f"--against: {shlex.join(command)} printed no hash rate in {seconds:g} s: {text[-300:]!r}")
    return rate


def read_hash_rate(text: str) -> float | None:
    """The last rate in a miner's output, in hashes per second: "10.4 Mhash/s", "26.1 MH/s", "900 kH/s"."""
    found = _RATE.findall(text)
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * _UNITS[unit.lower()]


def _checks(quick: bool) -> Iterator[Row]:
    rounds = 20 if quick else 200
    for size in (80, 750, 16_000):
        data = bytes(size)
        ours, theirs = _times_us((partial(hasher.sha256d, data), partial(twin.sha256d, data)), rounds)
        yield _row(f"{size} bytes", "sha256d", ours, "us")
        yield _row(f"{size} bytes, reference: hashlib", "sha256d", theirs, "us")
    headers = [number.to_bytes(80, "little") for number in range(1000)]
    targets = [1 << 224] * len(headers)
    ours, theirs = _times_us(
        (partial(hasher.check_headers, headers, targets), partial(twin.check_headers, headers, targets)), rounds // 10
    )
    yield _row("1000 headers in one call", "check", len(headers) / ours * 1e6, "headers/s")
    yield _row("1000 headers in one call, reference: Python twin", "check", len(headers) / theirs * 1e6, "headers/s")
    branch = [bytes(32)] * 12
    ours, theirs = _times_us(
        (partial(hasher.fold_merkle, bytes(32), branch), partial(twin.fold_merkle, bytes(32), branch)), rounds
    )
    yield _row("12 levels", "fold merkle branch", ours, "us")
    yield _row("12 levels, reference: Python twin", "fold merkle branch", theirs, "us")


def _payment(quick: bool) -> Iterator[Row]:
    """A submission, and the step from weights to the merkle root, natively and by the twin."""
    rounds = 5 if quick else 50
    job: dict[str, Any] = {
        "prefix": bytes(250),
        "suffix": bytes(338),
        "branch": [bytes(32)] * 12,
        "previous_block_hash": bytes(32),
        "bits": 0,
        "targets": (1, 2, 3),
    }
    kinds: tuple[Any, Any] = (hasher.SubmissionChecker, twin.SubmissionChecker)
    ours, theirs = _times_us(
        tuple(partial(kind(**job).check, bytes(12), 1, 2, 3) for kind in kinds),
        rounds * 10,
    )
    case = "coinbase of 600 bytes, 12 levels, 3 targets"
    yield _row(case, "check submission", ours, "us")
    yield _row(f"{case}, reference: Python twin", "check submission", theirs, "us")
    pay: dict[str, Any] = {
        "value": 312_500_000,
        "bonus": 1_562_500,
        "payout_class": 500,
        "min_payout": 5_000,
        "dust": 546,
        "seed": bytes(32),
        "coinbase_script": bytes(20),
        "finder_script": bytes(22),
        "witness_commitment": bytes(32),
        "commitment": bytes(32),
        "branch": [bytes(32)] * 12,
    }
    tables: tuple[Any, Any] = (hasher.WeightTable(), twin.WeightTable())
    for number in range(500):
        digest = twin.sha256d(number.to_bytes(4, "big"))
        for table in tables:
            table.add(b"\x51\x20" + digest if number % 2 else b"\x00\x14" + digest[:20], 2**40 // (number + 1))
    ours, theirs = _times_us(tuple(partial(table.pay, **pay) for table in tables), rounds)
    yield _row("500 payees", "weights to merkle root", ours, "us")
    yield _row("500 payees, reference: Python twin", "weights to merkle root", theirs, "us")
    coinbases, branches = [bytes(14_000)] * 256, [[bytes(32)] * 12] * 256
    ours, theirs = _times_us(
        (partial(hasher.merkle_roots, coinbases, branches), partial(twin.merkle_roots, coinbases, branches)),
        max(3, rounds // 5),
    )
    case = "256 coinbases of 14 kB, 12 levels"
    yield _row(case, "merkle roots", 256 / ours * 1e6, "coinbases/s")
    yield _row(f"{case}, reference: Python twin", "merkle roots", 256 / theirs * 1e6, "coinbases/s")


def _times_us(calls: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """The median time of each call, in turns, in microseconds on the wall."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            of_call.append(time.perf_counter() - start)
    return [statistics.median(of_call) * 1e6 for of_call in times]
