"""The native extension against its Python twin, and both against definitions written out here."""

import hashlib
import importlib.util
import random
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sharechain
from sharechain import hasher as picked
from sharechain.coinbase import build_coinbase, fold_coinbase
from sharechain.hasher import twin
from sharechain.payout import Payouts

try:
    from sharechain import _native as native
except ImportError as fault:
    raise ImportError("sharechain._native is not built, so there is nothing to compare: pip install -e .") from fault

GENESIS = bytes.fromhex(
    "0100000000000000000000000000000000000000000000000000000000000000000000003ba3edfd7a7b12b27ac72c3e67768f61"
    "7fc81bc3888a51323a9fb8aa4b1e5e4a29ab5f49ffff001d1dac2b7c"
)
GENESIS_HASH = bytes.fromhex("000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f")[::-1]
GENESIS_NONCE = 2083236893
GENESIS_TARGET = 0xFFFF << 208
MAX_TARGET = 2**256 - 1

both = pytest.mark.parametrize("hasher", [native, twin], ids=["rust", "python"])
few = settings(max_examples=40, deadline=None)

headers = st.binary(min_size=80, max_size=80)
hashes = st.binary(min_size=32, max_size=32)
targets = st.one_of(
    st.integers(0, MAX_TARGET),
    # Near the hashes of real headers: a random hash meets these about as often as not.
    st.integers(2**250, MAX_TARGET),
    st.sampled_from([0, 2**255, MAX_TARGET]),
)
weights = st.one_of(
    st.integers(1, 20), st.integers(1, 2**40), st.integers(1, 2**70), st.sampled_from([2**64, 2**127 // 20])
)
scripts = st.one_of(st.binary(max_size=40), st.binary(min_size=20, max_size=140), st.just(b"\x51" * 300))
tables = st.dictionaries(scripts, weights, min_size=1, max_size=20)
amounts = st.one_of(st.integers(0, 1000), st.integers(0, 2**63 - 1), st.sampled_from([312_500_000, 2**63 - 1]))
terms = st.tuples(
    amounts,
    st.one_of(st.integers(1, 25), st.integers(1, 2**63 - 1)),
    st.one_of(st.integers(1, 300), st.integers(1, 2**63 - 1)),
    st.one_of(st.integers(1, 600), st.integers(1, 2**63 - 1)),
    st.binary(max_size=140),
)


def build_table(hasher: ModuleType, contents: dict[bytes, int]) -> Any:
    table = hasher.WeightTable()
    for script, weight in contents.items():
        table.add(script, weight)
    return table


def fields(draw: Any) -> tuple[bytes, int, int, int]:
    return draw.outputs, draw.count, draw.paid, draw.threshold


def parse_outputs(outputs: bytes) -> list[tuple[int, bytes]]:
    """The (amount, script) of each serialised TxOut, read without help from the code under test."""
    parsed = []
    at = 0
    while at < len(outputs):
        amount = int.from_bytes(outputs[at : at + 8], "little")
        length = outputs[at + 8]
        at += 9
        width = {0xFD: 2, 0xFE: 4}.get(length, 0)
        if width:
            length = int.from_bytes(outputs[at : at + width], "little")
            at += width
        parsed.append((amount, outputs[at : at + length]))
        assert len(parsed[-1][1]) == length
        at += length
    return parsed


def caught(call: Callable[[], object]) -> tuple[type[Exception], str] | None:
    try:
        call()
    except (ValueError, OverflowError) as fault:
        return type(fault), str(fault)
    return None


# Which implementation


def load_anew() -> ModuleType:
    """The package as if it were imported for the first time."""
    spec = importlib.util.spec_from_file_location("loaded_anew", picked.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_extension_is_picked_when_it_is_there() -> None:
    assert picked.IMPLEMENTATION == native.IMPLEMENTATION == "rust"
    assert picked.WeightTable is native.WeightTable


def test_twin_is_picked_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sharechain._native", None)
    monkeypatch.delattr(sharechain, "_native")
    monkeypatch.delenv("P2POOL_HASHER", raising=False)
    module = load_anew()
    assert module.IMPLEMENTATION == "python"
    assert all(getattr(module, name) is getattr(twin, name) for name in picked.__all__)


def test_all_implementations_have_the_whole_interface() -> None:
    for name in picked.__all__:
        assert hasattr(native, name), name
        assert hasattr(twin, name), name


# Hashes and proof of work


@both
def test_genesis_header(hasher: ModuleType) -> None:
    hash_number = int.from_bytes(GENESIS_HASH, "little")
    assert hasher.sha256d(GENESIS) == GENESIS_HASH
    assert hasher.meets_target(GENESIS, GENESIS_TARGET)
    assert hasher.check_headers([GENESIS] * 3, [hash_number, hash_number - 1, MAX_TARGET]) == [True, False, True]


@few
@given(st.binary(max_size=300))
def test_sha256d_equals_the_definition(data: bytes) -> None:
    assert native.sha256d(data) == twin.sha256d(data) == hashlib.sha256(hashlib.sha256(data).digest()).digest()


@pytest.mark.parametrize("length", [1023, 1024, 1025, 20_000])
def test_sha256d_of_long_messages(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert native.sha256d(data) == twin.sha256d(data)


@few
@given(headers, targets)
def test_meets_target_equals_twin(header: bytes, target: int) -> None:
    assert native.meets_target(header, target) is twin.meets_target(header, target)
    hash_number = int.from_bytes(twin.sha256d(header), "little")
    assert native.meets_target(header, hash_number)
    assert not native.meets_target(header, hash_number - 1)


@few
@given(st.lists(st.tuples(headers, targets), max_size=50))
def test_check_headers_equals_one_by_one(batch: list[tuple[bytes, int]]) -> None:
    expected = [twin.meets_target(header, target) for header, target in batch]
    for hasher in (native, twin):
        assert hasher.check_headers([header for header, _ in batch], [target for _, target in batch]) == expected


@few
@given(hashes, st.lists(hashes, max_size=14))
def test_fold_merkle_equals_twin(leaf: bytes, branch: list[bytes]) -> None:
    assert native.fold_merkle(leaf, branch) == twin.fold_merkle(leaf, branch)
    for hasher in (native, twin):
        assert hasher.fold_merkle(leaf, ()) == leaf
        assert hasher.fold_merkle(leaf, (leaf,)) == hashlib.sha256(hashlib.sha256(leaf + leaf).digest()).digest()


@both
def test_header_faults(hasher: ModuleType) -> None:
    def calls(header: bytes, target: int) -> list[Callable[[], object]]:
        return [
            lambda: hasher.meets_target(header, target),
            lambda: hasher.check_headers([GENESIS, header], [1, target]),
            lambda: hasher.scan_nonces(header, 0, 1, target),
        ]

    for length in (0, 79, 81):
        for call in calls(bytes(length), 1):
            with pytest.raises(ValueError, match=f"^a header has 80 bytes, got {length}$"):
                call()
    for target in (-1, 2**256):
        for call in calls(GENESIS, target):
            with pytest.raises(OverflowError, match=r"^a target is in 0..2\^256 - 1, got "):
                call()
    with pytest.raises(ValueError, match="got 1 headers and 2 targets"):
        hasher.check_headers([GENESIS], [1, 1])
    for leaf, branch in ((b"x", [GENESIS_HASH]), (GENESIS_HASH, [GENESIS_HASH, b"x"])):
        with pytest.raises(ValueError, match=r"^a hash has 32 bytes, got 1$"):
            hasher.fold_merkle(leaf, branch)


# The nonce scan


@both
def test_scan_finds_the_genesis_nonce(hasher: ModuleType) -> None:
    result = hasher.scan_nonces(GENESIS[:76] + bytes(4), GENESIS_NONCE - 1000, 2000, GENESIS_TARGET)
    assert (result.nonce, result.hashes) == (GENESIS_NONCE, 1001)
    assert result == hasher.ScanResult(nonce=GENESIS_NONCE, hashes=1001)
    assert repr(result) == "ScanResult(nonce=2083236893, hashes=1001)"


@few
@given(headers, st.integers(0, 2**32 - 100), st.integers(0, 100), st.sampled_from([2, 10, 40, 10**6]))
def test_scan_equals_brute_force(header: bytes, start: int, count: int, difficulty: int) -> None:
    target = MAX_TARGET // difficulty
    found = None
    for nonce in range(start, start + count):
        if int.from_bytes(twin.sha256d(header[:76] + nonce.to_bytes(4, "little")), "little") <= target:
            found = nonce
            break
    expected = (found, count if found is None else found - start + 1)
    for hasher in (native, twin):
        result = hasher.scan_nonces(header, start, count, target)
        assert (result.nonce, result.hashes) == expected


def test_scan_equals_twin_over_several_polls() -> None:
    target = MAX_TARGET // 40_000
    for seed in range(2):
        header = random.Random(seed).randbytes(80)
        ours, theirs = (hasher.scan_nonces(header, 7, 20_000, target) for hasher in (native, twin))
        assert (ours.nonce, ours.hashes) == (theirs.nonce, theirs.hashes)


@both
def test_scan_bounds(hasher: ModuleType) -> None:
    last = hasher.scan_nonces(GENESIS, 2**32 - 1, 1, MAX_TARGET)
    assert (last.nonce, last.hashes) == (2**32 - 1, 1)
    nothing = hasher.scan_nonces(GENESIS, 2**32, 0, MAX_TARGET)
    assert (nothing.nonce, nothing.hashes) == (None, 0)
    for start, count in ((0, 2**32 + 1), (2**32, 1), (2**32 - 1, 2), (-1, 1), (1, -1), (2**70, 0), (0, 2**70)):
        with pytest.raises(ValueError, match=f"^nonces are in 0..2\\^32 - 1, got {count} from {start} on$"):
            hasher.scan_nonces(GENESIS, start, count, 1)


@both
def test_stop_flag_ends_a_scan_from_another_thread(hasher: ModuleType) -> None:
    stop = hasher.StopFlag()
    assert not stop.is_set()
    started = threading.Event()
    results = []

    def scan() -> None:
        started.set()
        results.append(hasher.scan_nonces(GENESIS, 0, 2**32, 0, stop))

    thread = threading.Thread(target=scan)
    thread.start()
    started.wait()
    stop.set()
    thread.join()
    assert stop.is_set()
    assert results[0].nonce is None
    assert results[0].hashes < 2**32
    assert results[0].hashes % 2**14 == 0
    assert hasher.scan_nonces(GENESIS, 0, 10, MAX_TARGET, stop) == hasher.ScanResult(nonce=None, hashes=0)


@few
@given(st.lists(st.tuples(st.binary(max_size=300), st.lists(hashes, max_size=4)), max_size=40))
def test_merkle_roots_equal_one_by_one(batch: list[tuple[bytes, list[bytes]]]) -> None:
    expected = [twin.fold_merkle(twin.sha256d(coinbase), branch) for coinbase, branch in batch]
    for hasher in (native, twin):
        assert hasher.merkle_roots([coinbase for coinbase, _ in batch], [branch for _, branch in batch]) == expected


@both
def test_batches_on_all_cores_keep_their_order(hasher: ModuleType) -> None:
    rng = random.Random(3)
    batch = [rng.randbytes(80) for _ in range(2000)]
    levels = [[rng.randbytes(32)] * (i % 3) for i in range(2000)]
    expected = [twin.fold_merkle(twin.sha256d(data), branch) for data, branch in zip(batch, levels, strict=True)]
    assert hasher.merkle_roots(batch, levels) == expected
    limits = [int.from_bytes(twin.sha256d(data), "little") - i % 2 for i, data in enumerate(batch)]
    assert hasher.check_headers(batch, limits) == [i % 2 == 0 for i in range(2000)]
    with pytest.raises(ValueError, match="got 2 coinbases and 1 branches"):
        hasher.merkle_roots([b"", b""], [[]])
    with pytest.raises(ValueError, match="a hash has 32 bytes, got 1"):
        hasher.merkle_roots([b""], [[b"x"]])


@few
@given(
    st.one_of(st.binary(max_size=200), st.binary(min_size=1000, max_size=1100)),
    st.binary(max_size=16),
    st.lists(hashes, max_size=12),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    st.lists(targets, max_size=4),
)
def test_submissions_are_checked_as_by_hand(
    part: bytes, extranonce: bytes, branch: list[bytes], numbers: tuple[int, ...], limits: list[int]
) -> None:
    version, time, bits, nonce = numbers
    root = twin.fold_merkle(twin.sha256d(part + extranonce + part[::-1]), branch)
    header = b"".join(
        (version.to_bytes(4, "little"), bytes(32), root, *(n.to_bytes(4, "little") for n in (time, bits, nonce)))
    )
    digest = twin.sha256d(header)
    number = int.from_bytes(digest, "little")
    limits = [*limits, number, max(0, number - 1)]
    for hasher in (native, twin):
        checker = hasher.SubmissionChecker(
            prefix=part, suffix=part[::-1], branch=branch, previous_block_hash=bytes(32), bits=bits, targets=limits
        )
        checked = checker.check(extranonce, version, time, nonce)
        assert checked == (header, digest, [number <= limit for limit in limits])


@both
def test_submission_checker_faults(hasher: ModuleType) -> None:
    good: dict[str, Any] = {"prefix": b"", "suffix": b"", "branch": [], "previous_block_hash": bytes(32), "bits": 0}
    with pytest.raises(OverflowError, match="a target is in"):
        hasher.SubmissionChecker(**good, targets=[-1])
    for change in ({"branch": [b"x"]}, {"previous_block_hash": b"x"}):
        with pytest.raises(ValueError, match="a hash has 32 bytes, got 1"):
            hasher.SubmissionChecker(**good | change, targets=[])


# The scanner

SCAN_JOB: dict[str, Any] = {
    "prefix": b"p" * 60,
    "extranonce_size": 1,
    "suffix": b"s" * 90,
    "branch": [b"b" * 32, b"c" * 32],
    "version": 0x2000_0001,
    "version_mask": 0x0000_6000,
    "previous_block_hash": b"q" * 32,
    "time": 1_700_000_000,
    "bits": 0x207FFFFF,
    "target": MAX_TARGET // 2,
}


def header_of(job: dict[str, Any], find: Any) -> bytes:
    coinbase = job["prefix"] + find.extranonce + job["suffix"]
    root = twin.fold_merkle(twin.sha256d(coinbase), job["branch"])
    head = find.version.to_bytes(4, "little") + job["previous_block_hash"] + root
    return bytes(head + b"".join(word.to_bytes(4, "little") for word in (find.time, job["bits"], find.nonce)))


def drain(scanner: Any, hashes: int) -> list[Any]:
    """All that is found until so many nonces are tried."""
    finds: list[Any] = []
    while scanner.hashes < hashes:
        finds += scanner.wait(50)
    while more := scanner.wait(20):
        finds += more
    return finds


def test_a_scanner_tries_all_extranonces_versions_and_nonces_of_a_job_once_as_the_twin_does() -> None:
    found = []
    for hasher in (native, twin):
        scanner = hasher.Scanner(3)
        scanner.start(tag=7, nonces=3, **SCAN_JOB)
        finds = drain(scanner, 256 * 4 * 3)
        assert scanner.hashes == 256 * 4 * 3
        headers = {header_of(SCAN_JOB, find) for find in finds}
        assert len(headers) == len(finds)
        assert all(twin.meets_target(header, SCAN_JOB["target"]) for header in headers)
        assert {find.tag for find in finds} == {7}
        assert {find.version for find in finds} == {0x2000_0001 | rolled << 13 for rolled in range(4)}
        found.append(headers)
        scanner.close()
        assert scanner.wait(1) == []
    assert found[0] == found[1]
    assert len(found[0]) > 1000


@pytest.mark.parametrize("kernel", native.kernels())
def test_a_scanner_runs_on_any_kernel(kernel: str) -> None:
    scanner = native.Scanner(1, kernel)
    scanner.start(tag=1, nonces=40, **SCAN_JOB | {"extranonce_size": 0, "target": MAX_TARGET // 16})
    finds = drain(scanner, 160)
    assert scanner.hashes == 160
    assert finds
    assert all(twin.meets_target(header_of(SCAN_JOB, find), MAX_TARGET // 16) for find in finds)
    scanner.close()


@both
def test_a_scanner_goes_over_to_another_job_and_another_time(hasher: ModuleType) -> None:
    scanner = hasher.Scanner(2)
    assert scanner.wait(1) == []
    scanner.start(tag=1, **SCAN_JOB | {"target": 0})
    scanner.wait(1)
    scanner.start(tag=2, **SCAN_JOB)
    finds: list[Any] = []
    while not finds:
        finds = scanner.wait(1000)
    assert {find.tag for find in finds} == {2}
    assert {find.time for find in finds} == {SCAN_JOB["time"]}
    scanner.set_time(SCAN_JOB["time"] + 9)
    while find_times(finds := scanner.wait(1000)) != {SCAN_JOB["time"] + 9}:
        pass
    scanner.stop()
    while scanner.wait(10):
        pass
    done = scanner.hashes
    assert scanner.wait(10) == []
    assert scanner.hashes == done
    scanner.close()


def find_times(finds: list[Any]) -> set[int]:
    return {find.time for find in finds}


@both
def test_equal_jobs_do_not_mean_the_same_headers(hasher: ModuleType) -> None:
    scanner = hasher.Scanner(1)
    headers = []
    for tag in (1, 2):
        scanner.start(tag=tag, nonces=1, **SCAN_JOB | {"extranonce_size": 9, "target": MAX_TARGET})
        finds: list[Any] = []
        while len(finds) < 8:
            finds += [find for find in scanner.wait(1000) if find.tag == tag]
        headers += [header_of(SCAN_JOB, find) for find in finds]
    assert len(set(headers)) == len(headers)
    scanner.close()


@both
def test_scanner_faults(hasher: ModuleType) -> None:
    with pytest.raises(ValueError, match="a scanner has threads, got 0"):
        hasher.Scanner(0)
    with pytest.raises(ValueError, match='got "abacus"'):
        hasher.Scanner(1, "abacus")
    scanner = hasher.Scanner(1)
    for change, fault, message in (
        ({"branch": [b"x"]}, ValueError, "a hash has 32 bytes, got 1"),
        ({"previous_block_hash": b"x"}, ValueError, "a hash has 32 bytes, got 1"),
        ({"target": -1}, OverflowError, "a target is in"),
        ({"nonces": 2**32 + 1}, ValueError, r"a header has 2\^32 nonces, got 4294967297"),
    ):
        with pytest.raises(fault, match=message):
            scanner.start(tag=1, **SCAN_JOB | change)
    scanner.close()


# Kernels


def test_kernels_have_names_and_the_first_is_in_use() -> None:
    assert native.kernels()[-1] == "portable"
    assert native.kernel() in native.kernels()
    assert (twin.kernel(), twin.kernels()) == ("python", ["python"])


@both
def test_a_kernel_that_is_not_there_is_a_clear_error(hasher: ModuleType) -> None:
    expected = f'^this processor has the kernels {", ".join(hasher.kernels())}, got "abacus"$'
    calls: list[Callable[[], object]] = [
        lambda: hasher.use_kernel("abacus"),
        lambda: hasher.scan_nonces(GENESIS, 0, 1, 0, kernel="abacus"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize("kernel", native.kernels())
def test_any_kernel_can_be_made_the_one_in_use(kernel: str) -> None:
    before = native.kernel()
    try:
        native.use_kernel(kernel)
        assert native.kernel() == kernel
        assert native.check_headers([GENESIS] * 40, [GENESIS_TARGET] * 39 + [1]) == [True] * 39 + [False]
        assert native.scan_nonces(GENESIS, GENESIS_NONCE - 20, 40, GENESIS_TARGET).nonce == GENESIS_NONCE
    finally:
        native.use_kernel(before)


@pytest.mark.parametrize("kernel", native.kernels())
def test_every_kernel_finds_genesis_in_every_lane_and_at_the_ends_of_a_range(kernel: str) -> None:
    for before in range(33):
        start = GENESIS_NONCE - before
        result = native.scan_nonces(GENESIS, start, before + 1, GENESIS_TARGET, kernel=kernel)
        assert result == native.ScanResult(nonce=GENESIS_NONCE, hashes=before + 1)
        assert native.scan_nonces(GENESIS, start, before, GENESIS_TARGET, kernel=kernel).nonce is None
        assert native.scan_nonces(GENESIS, GENESIS_NONCE + 1, before, GENESIS_TARGET, kernel=kernel).nonce is None


@pytest.mark.parametrize("kernel", native.kernels())
@few
@given(
    st.one_of(headers, st.sampled_from([bytes(80), b"\xff" * 80])),
    st.one_of(st.integers(0, 2**32 - 100), st.just(2**32 - 100)),
    st.integers(0, 100),
    st.sampled_from([1, 2, 10, 40, 10**6]),
)
def test_every_kernel_scans_as_the_twin(kernel: str, header: bytes, start: int, count: int, difficulty: int) -> None:
    target = MAX_TARGET // difficulty
    ours = native.scan_nonces(header, start, count, target, kernel=kernel)
    theirs = twin.scan_nonces(header, start, count, target)
    assert (ours.nonce, ours.hashes) == (theirs.nonce, theirs.hashes)


@pytest.mark.parametrize("wanted", ["python", "portable", "abacus"])
def test_the_environment_chooses_the_kernel(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.kernel()
    monkeypatch.setenv("P2POOL_HASHER", wanted)
    try:
        if wanted == "abacus":
            with pytest.raises(
                ImportError, match=r'^P2POOL_HASHER: this processor has .*portable, got "abacus"; python'
            ):
                load_anew()
        else:
            assert load_anew().kernel() == wanted
    finally:
        native.use_kernel(before)


def test_a_kernel_asked_for_without_the_extension_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2POOL_HASHER", "avx2")
    monkeypatch.setitem(sys.modules, "sharechain._native", None)
    monkeypatch.delattr(sharechain, "_native")
    with pytest.raises(ImportError, match="P2POOL_HASHER=avx2 needs the native extension, which is not built"):
        load_anew()


# The weight table


@few
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"", b"a", b"b", b"\x00" * 22, b"c" * 34]),
            st.one_of(st.integers(-5, 5), st.integers(-(2**129), 2**129), st.integers(2**127 - 2, 2**127 + 2)),
        ),
        max_size=40,
    )
)
@example([(b"a", 2**128 - 1), (b"b", 1), (b"a", -(2**128 - 1)), (b"b", 2**128 - 1), (b"b", -(2**128))])
@example([(b"a", 2**127), (b"a", -(2**127)), (b"a", -1), (b"a", 0)])
def test_table_equals_twin_and_a_dict(changes: list[tuple[bytes, int]]) -> None:
    ours, theirs = native.WeightTable(), twin.WeightTable()
    plain: dict[bytes, int] = {}
    for script, weight in changes:
        fault = caught(partial(ours.add, script, weight))
        assert fault == caught(partial(theirs.add, script, weight))
        if fault is None:
            plain[script] = plain.get(script, 0) + weight
            assert plain[script] >= 0
            if not plain[script]:
                del plain[script]
        for table in (ours, theirs):
            assert table.total == sum(plain.values())
            assert len(table) == len(plain)
            assert table.weight(script) == plain.get(script, 0)
            assert table.items() == sorted(plain.items())


@both
def test_table_faults_change_nothing(hasher: ModuleType) -> None:
    table = build_table(hasher, {b"a": 5, b"b": 2**128 - 6})
    for script, weight, fault, message in (
        (b"a", -6, ValueError, "must not fall below 0, got -6 for a script of weight 5"),
        (b"c", -1, ValueError, "must not fall below 0, got -1 for a script of weight 0"),
        (b"a", 1, OverflowError, "total weight stays below 2\\^128"),
        (b"c", 1, OverflowError, "total weight stays below 2\\^128"),
        (b"a", 2**128, OverflowError, "a weight is below 2\\^128"),
        (b"a", -(2**128), OverflowError, "a weight is below 2\\^128"),
        (b"a", 2**300, OverflowError, "a weight is below 2\\^128"),
    ):
        with pytest.raises(fault, match=message):
            table.add(script, weight)
        assert table.items() == [(b"a", 5), (b"b", 2**128 - 6)]
        assert table.total == 2**128 - 1


@both
def test_copy_is_independent(hasher: ModuleType) -> None:
    table = build_table(hasher, {b"a": 5})
    copy = table.copy()
    copy.add(b"b", 1)
    table.add(b"a", -5)
    assert (table.items(), copy.items()) == ([], [(b"a", 5), (b"b", 1)])
    assert (table.total, copy.total) == (0, 6)


# The draw


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(tables, terms)
def test_draw_equals_twin(contents: dict[bytes, int], terms: tuple[int, int, int, int, bytes]) -> None:
    ours = build_table(native, contents).draw(*terms)
    assert fields(ours) == fields(build_table(twin, contents).draw(*terms))


@pytest.mark.parametrize("payout_class", [1, 12, 367, 1999, 2000, 5000])
def test_draw_of_a_full_window_equals_twin(payout_class: int) -> None:
    rng = random.Random(payout_class)
    contents = {rng.randbytes(rng.choice([22, 23, 25, 34])): int(rng.paretovariate(1.1) * 2**40) for _ in range(2000)}
    terms = (312_500_000, payout_class, 5_000, 546, rng.randbytes(32))
    ours = build_table(native, contents).draw(*terms)
    assert fields(ours) == fields(build_table(twin, contents).draw(*terms))
    assert 0 < ours.count <= payout_class


def test_draw_does_not_depend_on_the_history_of_the_table() -> None:
    rng = random.Random(1)
    contents = {rng.randbytes(22): rng.randrange(1, 1000) for _ in range(50)}
    terms = (10**6, 10, 100, 100, b"seed")
    expected = fields(build_table(twin, contents).draw(*terms))
    for hasher in (native, twin):
        table = hasher.WeightTable()
        for script, weight in rng.sample(sorted(contents.items()), 50):
            table.add(b"gone" + script, 3)
            table.add(script, weight + 7)
        for script in rng.sample(sorted(contents), 50):
            table.add(b"gone" + script, -3)
            table.add(script, -7)
        assert fields(table.draw(*terms)) == fields(table.copy().draw(*terms)) == expected


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 12), st.integers(0, 80)), min_size=1, max_size=10),
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 60),
)
@example([10, 10, 10, 10], 2, 1, 100)
@example([1] * 10, 9, 1, 1000)
@example([0, 0], 1, 1, 1)
@example([5, 4, 4, 4], 1, 5, 13)
def test_threshold_is_the_smallest_that_fits(
    entitled: list[int], payout_class: int, min_payout: int, dust: int
) -> None:
    def needed(threshold: int) -> int:
        pool = sum(e for e in entitled if e < threshold)
        lots = 0 if pool < dust else max(1, pool // threshold)
        return sum(e >= threshold for e in entitled) + lots

    threshold = min_payout
    while needed(threshold) > payout_class:
        threshold += 1
    assert twin.find_threshold(entitled, payout_class, min_payout, dust) == threshold
    if total := sum(entitled):
        # With the total as value each weight is its own entitlement.
        contents = {bytes([i]): e for i, e in enumerate(entitled) if e}
        for hasher in (native, twin):
            draw = build_table(hasher, contents).draw(total, payout_class, min_payout, dust, b"")
            assert draw.threshold == threshold


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables, terms)
def test_draw_pays_what_it_says(contents: dict[bytes, int], terms: tuple[int, int, int, int, bytes]) -> None:
    value, payout_class, min_payout, dust, _ = terms
    draw = build_table(native, contents).draw(*terms)
    outputs = parse_outputs(draw.outputs)
    assert outputs == sorted(outputs, key=lambda output: (-output[0], output[1]))
    assert len(outputs) == len({script for _, script in outputs}) == draw.count <= payout_class
    assert sum(amount for amount, _ in outputs) == draw.paid <= value
    assert draw.threshold >= min_payout

    total = sum(contents.values())
    entitled = {script: value * weight // total for script, weight in contents.items()}
    pool = sum(e for e in entitled.values() if e < draw.threshold)
    paid = {script: amount for amount, script in outputs}
    exact = {script: e for script, e in entitled.items() if e >= draw.threshold}
    assert exact.items() <= paid.items()
    lots = {amount for script, amount in paid.items() if script not in exact}
    count = draw.count - len(exact)
    assert count == (0 if pool < dust else max(1, pool // draw.threshold))
    assert lots == ({pool // count} if count else set())
    unpaid = value - draw.paid - (0 if count else pool)
    assert 0 <= unpaid < len(contents) + max(1, count)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(1, 20),
    st.binary(max_size=4),
)
@example([7, 7, 7, 7, 7], 2, 1, b"")
@example([100, 1, 1, 1, 1, 1], 3, 3, b"")
def test_lots_are_fair_over_all_offsets(entitled: list[int], payout_class: int, min_payout: int, seed: bytes) -> None:
    threshold = twin.find_threshold(entitled, payout_class, min_payout, 1)
    small = {bytes([i]): e for i, e in enumerate(entitled) if e < threshold}
    pool = sum(small.values())
    lots = twin.count_lots(pool, threshold, 1)
    hits = dict.fromkeys(small, 0)
    for offset in range(pool):
        winners = twin.draw_winners(small, lots, offset, seed)
        assert len(winners) == lots
        assert len(set(winners)) == lots, "a script won twice"
        for script in winners:
            hits[script] += 1
    for script, e in small.items():
        assert hits[script] == lots * e
        # What it gets on average is its entitlement but for the rounding of the lot.
        mean = Fraction(hits[script] * (pool // lots), pool)
        assert e * (1 - Fraction(lots, pool)) < mean <= e


def test_lots_are_fair_over_seeds() -> None:
    contents = {bytes([i]) * 22: weight for i, weight in enumerate([1000, 40, 30, 20, 10])}
    ours = build_table(native, contents)
    paid = dict.fromkeys(contents, 0)
    rounds = 4000
    for number in range(rounds):
        for amount, script in parse_outputs(ours.draw(1100, 2, 1, 1, number.to_bytes(32, "big")).outputs):
            paid[script] += amount
    for script, weight in contents.items():
        # Five standard deviations of a lot of 100 that is won with probability weight / 100.
        chance = min(1.0, weight / 100)
        tolerance = 5 * 100 * (chance * (1 - chance) * rounds) ** 0.5
        assert abs(paid[script] - weight * rounds) <= tolerance


@both
@pytest.mark.parametrize("length", [0, 1, 23, 24, 31, 32, 87, 88, 252, 253, 300, 65_535, 65_536, 70_000])
def test_scripts_of_any_length(hasher: ModuleType, length: int) -> None:
    contents = {b"\x51" * length: 1, b"\x52" * length + b"x": 1, b"\x53": 1}
    draw = build_table(hasher, contents).draw(9, 3, 1, 1, bytes(32))
    assert sorted(parse_outputs(draw.outputs)) == sorted((3, script) for script in contents)
    lots = build_table(hasher, contents).draw(9, 1, 1, 1, bytes(32))
    assert fields(lots) == fields(build_table(twin, contents).draw(9, 1, 1, 1, bytes(32)))


@both
def test_equal_amounts_are_ordered_by_script(hasher: ModuleType) -> None:
    contents = dict.fromkeys([b"", b"\x00", b"\x00" * 8, b"\x00" * 9, b"\x00" * 8 + b"\x01", b"\x01", b"a" * 20], 1)
    draw = build_table(hasher, contents).draw(700, 7, 1, 1, b"")
    assert [script for _, script in parse_outputs(draw.outputs)] == sorted(contents)


@both
def test_draw_with_nothing_to_pay(hasher: ModuleType) -> None:
    table = build_table(hasher, {b"a": 1})
    assert fields(table.draw(0, 1, 7, 1, b"")) == (b"", 0, 0, 7)
    assert fields(table.draw(9, 1, 10, 10, b"")) == (b"", 0, 0, 10)


@both
def test_draw_value(hasher: ModuleType) -> None:
    draw = build_table(hasher, {b"a": 1}).draw(9, 1, 1, 1, b"")
    assert draw == hasher.Draw(outputs=(9).to_bytes(8, "little") + b"\x01a", count=1, paid=9, threshold=1)
    assert draw != hasher.Draw(outputs=b"", count=1, paid=9, threshold=1)
    with pytest.raises(AttributeError):
        draw.paid = 1


@both
def test_draw_faults(hasher: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^a draw needs at least one weight, got an empty table$"):
        hasher.WeightTable().draw(1, 1, 1, 1, b"")
    table = build_table(hasher, {b"a": 1})
    good = {"value": 1, "payout_class": 1, "min_payout": 1, "dust": 1}
    for name in good:
        for number in (-1, 2**63, 2**64, 2**200):
            with pytest.raises(OverflowError, match=f"^{name} is in 0..2\\^63 - 1, got {number}$"):
                table.draw(**(good | {name: number}), seed=b"")
        if name != "value":
            with pytest.raises(ValueError, match=f"^{name} is at least 1, got 0$"):
                table.draw(**(good | {name: 0}), seed=b"")


# From weights to the merkle root


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.just({}), tables),
    st.integers(0, 10**10),
    st.integers(0, 10**6),
    st.integers(1, 300),
    st.integers(1, 600),
    st.tuples(st.binary(max_size=100), st.binary(max_size=34), st.one_of(st.none(), hashes), hashes),
    st.lists(hashes, max_size=5),
)
def test_pay_equals_twin_and_its_parts(
    contents: dict[bytes, int],
    share: int,
    bonus: int,
    payout_class: int,
    dust: int,
    frame: tuple[bytes, bytes, bytes | None, bytes],
    branch: list[bytes],
) -> None:
    coinbase_script, finder_script, witness_commitment, commitment = frame
    paid = [
        build_table(hasher, contents).pay(
            value=share + bonus,
            bonus=bonus,
            payout_class=payout_class,
            min_payout=5,
            dust=dust,
            seed=b"seed",
            coinbase_script=coinbase_script,
            finder_script=finder_script,
            witness_commitment=witness_commitment,
            commitment=commitment,
            branch=branch,
        )
        for hasher in (native, twin)
    ]
    for name in ("outputs", "count", "finder_amount", "threshold", "txid", "merkle_root"):
        assert getattr(paid[0], name) == getattr(paid[1], name), name
    payment = paid[0]
    amounts = sum(amount for amount, _ in parse_outputs(payment.outputs))
    assert amounts + payment.finder_amount == share + bonus
    payouts = Payouts(
        outputs=payment.outputs,
        count=payment.count,
        finder_amount=payment.finder_amount,
        threshold=payment.threshold,
    )
    coinbase = build_coinbase(coinbase_script, payouts, finder_script, witness_commitment, commitment)
    assert payment.txid == twin.sha256d(coinbase)
    assert payment.merkle_root == fold_coinbase(coinbase, tuple(branch))


@both
def test_pay_faults(hasher: ModuleType) -> None:
    good: dict[str, Any] = {
        "value": 10,
        "bonus": 1,
        "payout_class": 2,
        "min_payout": 1,
        "dust": 1,
        "seed": b"",
        "coinbase_script": b"",
        "finder_script": b"",
        "witness_commitment": None,
        "commitment": bytes(32),
        "branch": [],
    }
    table = build_table(hasher, {b"a": 1})
    for change, fault, message in (
        ({"bonus": 11}, ValueError, "a bonus is part of the value 10, got 11"),
        ({"bonus": -1}, OverflowError, "bonus is in"),
        ({"value": -1}, OverflowError, "value is in"),
        ({"dust": 0}, ValueError, "dust is at least 1, got 0"),
        ({"finder_script": bytes(253)}, ValueError, "a script has at most 252 bytes, got 253"),
        ({"commitment": b"x"}, ValueError, "a hash has 32 bytes, got 1"),
        ({"witness_commitment": b"x"}, ValueError, "a hash has 32 bytes, got 1"),
        ({"branch": [b"x"]}, ValueError, "a hash has 32 bytes, got 1"),
    ):
        with pytest.raises(fault, match=message):
            table.pay(**good | change)
