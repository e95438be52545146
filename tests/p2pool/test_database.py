"""The data directory: one node at a time, nothing damaged passes for whole, and a kill at any instant is survived."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pool import database
from p2pool.database import DataDirectory, LevelDatabase, check_files, is_in_use, open_copy
from p2pool.errors import ConfigError
from p2pool.report import VerifyReport, load_chain, verify_store
from sharechain.errors import StoreError
from sharechain.share import Share
from sharechain.store import SCHEMA, Store, _encode
from tests.builders import GENESIS_BLOCK, GENESIS_FACTS, PARAMS, START_TIME, add, grow, new_chain

SHARES = grow(new_chain(), 12)
#: Mines and writes shares until it is killed, and names each once it is written.
WRITER = """
import sys
from pathlib import Path
from p2pool import database
from p2pool.database import DataDirectory
from p2pool.report import load_chain
from tests.builders import GENESIS_BLOCK, GENESIS_FACTS, PARAMS, START_TIME, add, mine
directory = DataDirectory(Path(sys.argv[1]), PARAMS)
chain = load_chain(PARAMS, directory.store)
chain.learn_block(GENESIS_BLOCK, GENESIS_FACTS, START_TIME)
print("ready", flush=True)
while True:
    share = mine(chain, chain.tip, miner=len(chain) % 5)
    facts = {GENESIS_BLOCK: GENESIS_FACTS}
    directory.store.write(add(chain, share), first_seen_ms=1, facts=facts, sync=len(chain) % 10 == 0)
    directory.note_written()
    print(share.hash.hex(), flush=True)
"""


def write(directory: DataDirectory, count: int = 12) -> None:
    """Write the first shares as a node does."""
    chain = new_chain()
    for number, share in enumerate(SHARES[:count]):
        change = add(chain, share)
        facts = {GENESIS_BLOCK: GENESIS_FACTS}
        directory.store.write(change, first_seen_ms=START_TIME * 1000 + number, facts=facts, sync=number % 5 == 0)
        directory.note_written()


def verify(path: Path) -> VerifyReport:
    """What ``p2pool verify`` does."""
    check_files(path)
    with open_copy(path) as (params, store):
        *_, report = verify_store(params, store)
    assert isinstance(report, VerifyReport)
    return report


def made(path: Path, *, clean: bool = True) -> Path:
    """A directory with shares, stopped cleanly or as a kill leaves it."""
    directory = DataDirectory(path, PARAMS)
    write(directory)
    if clean:
        directory.close()
    else:
        shutil.copytree(path, path.with_name(path.name + "-killed"))
        directory.close()
        path = path.with_name(path.name + "-killed")
    return path


def stored(path: Path) -> list[Share]:
    with open_copy(path) as (_, store):
        return [one.share for one in store.shares()]


# -- one node at a time --------------------------------------------------------------------------------------


def test_a_directory_is_held_by_one_node_of_this_process(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path, PARAMS)
    with pytest.raises(ConfigError, match="in use by this process"):
        DataDirectory(tmp_path / ".." / tmp_path.name, PARAMS)
    assert is_in_use(tmp_path)
    write(first, 2)  # the refused opening took nothing away
    first.close()
    assert not is_in_use(tmp_path)
    DataDirectory(tmp_path, PARAMS).close()
    assert len(stored(tmp_path)) == 2


def test_a_link_to_a_directory_is_the_same_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    first = DataDirectory(tmp_path / "data", PARAMS)
    with pytest.raises(ConfigError, match="in use"):
        DataDirectory(tmp_path / "link", PARAMS)
    first.close()


@pytest.mark.slow
def test_a_directory_is_held_against_other_processes_and_a_kill_lets_go(tmp_path: Path) -> None:
    with writer(tmp_path, tmp_path.with_name("log")) as process:
        with pytest.raises(ConfigError, match=rf"in use by another node \(process {process.pid}\).*--data-dir"):
            DataDirectory(tmp_path, PARAMS)
        assert is_in_use(tmp_path)
        with pytest.raises(ConfigError):
            DataDirectory(tmp_path, PARAMS)
        process.kill()
        process.wait()
        assert not is_in_use(tmp_path)
        DataDirectory(tmp_path, PARAMS).close()


def test_somebody_who_only_looks_does_not_keep_a_node_from_starting(tmp_path: Path) -> None:
    # `p2pool status` looks at the lock for an instant, with the same call as here; a node may start in that instant.
    made(tmp_path)
    looking = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    timer = threading.Timer(0.05, lambda: os.close(looking))
    timer.start()
    try:
        DataDirectory(tmp_path, PARAMS).close()
    finally:
        timer.join()


@pytest.mark.parametrize("name", ["lock", "."])
def test_what_cannot_be_a_directory_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data"
    if name == ".":
        path.write_text("a file")
    else:
        (path / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        DataDirectory(path, PARAMS)


def test_another_network_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    made(tmp_path)
    other = PARAMS.with_overrides({"name": "other"})
    with pytest.raises(StoreError, match=r"belongs to network 'test'.*not to 'other'"):
        DataDirectory(tmp_path, other)
    assert not is_in_use(tmp_path)
    DataDirectory(tmp_path, PARAMS).close()
    assert stored(tmp_path) == SHARES


def test_a_newer_schema_is_refused_for_writing_and_for_reading(tmp_path: Path) -> None:
    made(tmp_path)
    level = LevelDatabase(tmp_path / "sharechain", create=False)
    batch = level.write_batch()
    batch.put(b"m/schema", _encode(SCHEMA + 1))
    batch.write()
    level.close()
    with pytest.raises(StoreError, match=f"schema {SCHEMA + 1} was written by another version"):
        DataDirectory(tmp_path, PARAMS)
    with pytest.raises(StoreError, match="another version"), open_copy(tmp_path):
        pass


# -- whole or damaged ----------------------------------------------------------------------------------------


def test_a_clean_stop_leaves_sums_that_hold_until_the_next_start(tmp_path: Path) -> None:
    made(tmp_path)
    assert check_files(tmp_path) >= 4
    assert verify(tmp_path).shares == len(SHARES)
    assert stored(tmp_path) == SHARES
    directory = DataDirectory(tmp_path, PARAMS)
    assert directory.warnings == []
    assert check_files(tmp_path) == 0, "a running node changes its files"
    directory.close()
    assert check_files(tmp_path) >= 4


def test_without_sums_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert check_files(made(tmp_path / "data", clean=False)) == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'"x"', b"\xff", b"null"])
def test_sums_that_are_damaged_themselves_are_named(tmp_path: Path, content: bytes) -> None:
    made(tmp_path)
    (tmp_path / "sharechain.sums").write_bytes(content)
    with pytest.raises(StoreError, match="sums: is damaged"):
        check_files(tmp_path)


def test_a_file_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    made(tmp_path)
    extra = tmp_path / "sharechain" / "000099.ldb"
    extra.write_bytes(b"x")
    with pytest.raises(StoreError, match=r"000099\.ldb"):
        check_files(tmp_path)
    extra.unlink()
    (tmp_path / "sharechain.batches").rename(tmp_path / "kept")
    with pytest.raises((StoreError, FileNotFoundError)) as damaged:
        check_files(tmp_path)
    assert isinstance(damaged.value, StoreError), "a missing file is damage, and no accident of the reader"
    assert "sharechain.batches" in str(damaged.value)


def data_files(path: Path) -> list[Path]:
    kept = [file for file in (path / "sharechain").iterdir() if file.name not in ("LOCK", "LOG", "LOG.old")]
    return sorted([*kept, path / "sharechain.batches"])


def sampled(file: Path) -> list[int]:
    """Positions in a file: everywhere in a small one, the head of each early log record and a sample in a large one."""
    size = file.stat().st_size
    if size <= 64:
        return list(range(size))
    positions = {*range(30), *range(size - 12, size), *random.Random(file.name).sample(range(size), 25)}
    if file.suffix == ".log":
        raw, at = file.read_bytes(), 0
        while at + 7 < size:  # checksum (4), length (2), kind (1)
            positions |= {at + 4, at + 5, at + 6}
            at += 7 + int.from_bytes(raw[at + 4 : at + 6], "little")
    return sorted(positions)


@pytest.mark.slow
@pytest.mark.parametrize("clean", [True, False], ids=["after a clean stop", "after a kill"])
@pytest.mark.parametrize("compacted", [False, True], ids=["log", "table"])
def test_every_changed_byte_of_every_file_is_found(tmp_path: Path, clean: bool, compacted: bool) -> None:
    path = made(tmp_path / "data", clean=clean)
    if compacted:  # opening moves the log into a table
        if clean:
            DataDirectory(path, PARAMS).close()
        else:
            LevelDatabase(path / "sharechain", create=False).close()
    whole = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    assert verify(path).shares == len(SHARES)
    tip = SHARES[-1].hash
    unnoticed: list[str] = []
    for file in data_files(path):
        for position in sampled(file):
            raw = bytearray(whole[file])
            raw[position] ^= 0x80 if position % 2 else 0x01
            file.write_bytes(raw)
            try:
                report = verify(path)
            except StoreError:
                continue
            finally:
                file.write_bytes(whole[file])
            same = report.shares == len(SHARES) and report.tip == tip[::-1].hex()
            unnoticed.append(f"{file.name}[{position}]{' harmless' if same else ''}")
    if clean:
        assert unnoticed == []
    else:  # without sums, a byte may be one that LevelDB never reads; nothing that is read may differ
        assert [found for found in unnoticed if not found.endswith("harmless")] == []


def test_a_log_that_lost_its_end_is_noticed_and_the_node_says_so_and_goes_on(tmp_path: Path) -> None:
    path = made(tmp_path / "data", clean=False)
    (log,) = (path / "sharechain").glob("*.log")
    log.write_bytes(log.read_bytes()[:-300])
    with pytest.raises(StoreError, match="the end of the log is damaged or missing"):
        verify(path)
    directory = DataDirectory(path, PARAMS)
    assert len(directory.warnings) == 1
    assert "batches" in directory.warnings[0]
    chain = load_chain(PARAMS, directory.store)
    assert 0 < len(chain) < len(SHARES)
    directory.close()
    assert verify(path).shares == len(chain), "the loss was told once; what is left is whole"


@pytest.mark.slow
def test_a_log_of_any_length_loads_or_is_refused_and_never_invents_anything(tmp_path: Path) -> None:
    path = made(tmp_path / "data", clean=False)
    (log,) = (path / "sharechain").glob("*.log")
    raw = log.read_bytes()
    for size in range(0, len(raw), max(1, len(raw) // 20)):
        log.write_bytes(raw[:size])
        with pytest.raises(StoreError):
            verify(path)


def test_a_missing_current_file_is_damage_and_not_a_new_database(tmp_path: Path) -> None:
    for number, clean in enumerate((True, False)):
        path = made(tmp_path / str(number), clean=clean)
        (path / "sharechain" / "CURRENT").unlink()
        with pytest.raises(StoreError, match=r"CURRENT: is missing: the database is damaged"):
            DataDirectory(path, PARAMS)
        assert not is_in_use(path)
        with pytest.raises(StoreError):
            verify(path)


def test_a_database_that_lost_all_its_small_files_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    path = made(tmp_path / "data", clean=False)
    for name in ("sharechain/CURRENT", "sharechain.batches"):
        (path / name).unlink()
    with pytest.raises(StoreError, match="damaged"):
        DataDirectory(path, PARAMS)


@pytest.mark.parametrize("name", ["sharechain.batches", "sharechain.sums"])
def test_a_small_file_that_is_gone_costs_no_share(tmp_path: Path, name: str) -> None:
    made(tmp_path)
    (tmp_path / name).unlink()
    DataDirectory(tmp_path, PARAMS).close()
    assert stored(tmp_path) == SHARES


def test_a_count_of_batches_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = made(tmp_path / "data", clean=False)
    (path / "sharechain.batches").write_bytes(bytes(12))
    for attempt in (lambda: DataDirectory(path, PARAMS), lambda: verify(path)):
        with pytest.raises(StoreError, match="batches: checksum mismatch"):
            attempt()


# -- kills ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left",
    [
        [],
        ["lock"],
        ["lock", "sharechain/"],
        ["lock", "sharechain/LOCK", "sharechain/LOG"],
        ["lock", "sharechain/LOCK", "sharechain/LOG", "sharechain/MANIFEST-000001"],
        ["lock", "sharechain/LOCK", "sharechain/LOG", "sharechain/MANIFEST-000001", "sharechain/000001.dbtmp"],
    ],
    ids=len,
)
def test_a_first_start_that_was_killed_starts_again(tmp_path: Path, left: list[str]) -> None:
    path = tmp_path / "data"
    for name in left:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (path / name).mkdir()
        else:
            (path / name).write_bytes(b"")
    directory = DataDirectory(path, PARAMS)
    assert directory.warnings == []
    write(directory)
    directory.close()
    assert verify(path).shares == len(SHARES)


def test_a_database_that_was_made_and_not_yet_stamped_starts_again(tmp_path: Path) -> None:
    LevelDatabase(tmp_path / "sharechain", create=True).close()
    with pytest.raises(StoreError), open_copy(tmp_path):
        pass
    directory = DataDirectory(tmp_path, PARAMS)
    write(directory, 3)
    directory.close()
    assert len(stored(tmp_path)) == 3


@contextmanager
def writer(path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to a directory for ever, and to ``log`` what it has written."""
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=file)
    try:
        while not log.read_bytes().startswith(b"ready\n"):
            assert process.poll() is None
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_kill_at_any_instant_loses_nothing_that_was_written(tmp_path: Path) -> None:
    dice = random.Random(1)
    path, log = tmp_path / "data", tmp_path / "log"
    acknowledged: list[bytes] = []
    for _ in range(4):
        with writer(path, log) as process, pytest.raises(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0.01, 0.2))
        acknowledged += [bytes.fromhex(line) for line in log.read_text().split("\n")[1:-1]]
        assert verify(path).shares > 0
        kept = {share.hash for share in stored(path)}
        assert set(acknowledged[-400:]) <= kept, "older ones may be pruned"
    directory = DataDirectory(path, PARAMS)
    assert directory.warnings == []
    directory.close()
    assert acknowledged
    assert set(acknowledged[-400:]) <= {share.hash for share in stored(path)}


@pytest.mark.slow
def test_a_copy_can_be_read_at_any_time_while_a_node_writes(tmp_path: Path) -> None:
    path, log = tmp_path / "data", tmp_path / "log"
    with writer(path, log):
        before = 0
        for _ in range(20):
            acknowledged = log.read_bytes().count(b"\n") - 2
            with open_copy(path) as (params, store):
                assert params == PARAMS
                tip = store.tip()
                stored_tip = None if tip is None else store.share(tip)
            height = -1 if stored_tip is None else stored_tip.share.data.height
            assert height >= max(before, acknowledged)
            before = height
    assert verify(path).height >= before


def test_reading_leaves_no_copy_behind_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = made(tmp_path / "data")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    with open_copy(path) as (_, store):
        assert isinstance(store, Store)
        assert any(scratch.iterdir())
    with pytest.raises(KeyboardInterrupt), open_copy(path):
        raise KeyboardInterrupt
    assert not any(scratch.iterdir())
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    assert after == before


def test_reading_where_there_is_nothing_is_the_operators_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sharechain"), open_copy(tmp_path / "none"):
        pass
    assert not is_in_use(tmp_path / "none")


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_the_store(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from p2pool import database
from p2pool.database import DataDirectory
from sharechain.errors import StoreError
from tests.builders import PARAMS
from tests.p2pool.test_database import write
directory = DataDirectory(Path(sys.argv[1]), PARAMS)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    write(directory)
except StoreError as error:
    print("StoreError", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
directory._database.close()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("StoreError"), done.stderr
    again = DataDirectory(tmp_path, PARAMS)
    assert len(load_chain(PARAMS, again.store)) > 0
    again.close()


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    held = set(database._held)
    database._held.clear()
    assert held == set()


def test_a_lost_count_of_batches_is_told(tmp_path: Path) -> None:
    """Without it a log that lost its tail looks like a whole one."""
    directory = DataDirectory(tmp_path, PARAMS)
    directory.store.sync()
    directory.note_written()
    directory.close()
    (tmp_path / "sharechain.sums").unlink()
    (tmp_path / "sharechain.batches").unlink()
    with pytest.raises(StoreError, match=r"sharechain\.batches: is missing"), open_copy(tmp_path):
        pass
    again = DataDirectory(tmp_path, PARAMS)
    assert "sharechain.batches is missing" in again.warnings[0]
    again.close()
