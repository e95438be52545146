"""The data directory: who may use it, the LevelDB database in it, and what shows that nothing of it is lost.

    lock                 held by the one node that uses the directory
    sharechain/          the LevelDB database (see ``sharechain.store``)
    sharechain.batches   number of the last batch written, so that a log that lost its tail is noticed
    sharechain.sums      after a clean stop: SHA-256 of every file of the database
    blocks/              blocks that Bitcoin has not answered yet
    identity.key         the secret that the node's peer id is made of, readable by its owner only
    peers.json           nodes that are known, and those that were sent away
    workers.json         what miners have done, each worker's and address's books
    status.json          what the running node says of itself, each few seconds
    bitcoin/             the embedded Bitcoin, if one is used

LevelDB's own checksums cover its blocks and log records, but not everything in its files: a log record whose
length is damaged near the end reads like a log that ends there. The last two files close that gap.

A node writes; every other command reads a copy, so that it neither disturbs a running node nor changes a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from p2pool.errors import ConfigError
from sharechain.errors import StoreError
from sharechain.params import Params
from sharechain.store import Store, WriteBatch, read_params

try:
    import plyvel
except ImportError:  # Python 3.13 and later: the same interface and disk format under another name
    import plyvel_next as plyvel

__all__ = ["DataDirectory", "check_files", "open_copy", "read_status"]

_LOCK: Final = "lock"
_DATABASE: Final = "sharechain"
_BATCHES: Final = "sharechain.batches"
_SUMS: Final = "sharechain.sums"
_BLOCKS: Final = "blocks"
_IDENTITY: Final = "identity.key"
_PEERS: Final = "peers.json"
_STATUS: Final = "status.json"
_WORKERS: Final = "workers.json"
#: LevelDB's own log for people, and its lock: they change without a write and hold no data.
_NO_DATA: Final = ("LOCK", "LOG", "LOG.old")

#: Seconds to wait for a lock: looking whether there is one takes it for an instant.
LOCK_PATIENCE_S: Final = 0.5

#: flock is per process and file description: the same process would get a second lock, and LevelDB would lose its own.
_held: Final[set[Path]] = set()


class LevelDatabase:
    """plyvel with every checksum verified, and its errors told as ``StoreError``."""

    def __init__(self, directory: Path, *, create: bool, shown_as: Path | None = None) -> None:
        """Open a directory; ``shown_as`` is what errors call it (a copy is called by its original's name)."""
        self._directory = directory
        self._shown = str(shown_as or directory)
        try:
            self._db = plyvel.DB(str(directory), create_if_missing=create, paranoid_checks=True)
        except (plyvel.Error, OSError) as error:
            raise StoreError(self._shown, f"does not open: {self._reason(error)}") from None

    def get(self, key: bytes) -> bytes | None:
        """One value, or None."""
        try:
            value: bytes | None = self._db.get(key, verify_checksums=True)
        except plyvel.Error as error:
            raise StoreError(self._shown, f"record {_shown_key(key)} does not read: {self._reason(error)}") from None
        return value

    def iterator(self, *, prefix: bytes, include_value: bool = True) -> Iterator[Any]:
        """Keys, or keys and values, of a prefix, ascending."""
        key = prefix
        try:
            with self._db.iterator(prefix=prefix, include_value=include_value, verify_checksums=True) as rows:
                for row in rows:
                    key = row[0] if include_value else row
                    yield row
        except plyvel.Error as error:
            where = f"what follows record {_shown_key(key)}"
            raise StoreError(self._shown, f"{where} does not read: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        text = error.args[0] if error.args else error
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(error)
        return text.replace(str(self._directory), self._shown)

    def write_batch(self, *, transaction: bool = False, sync: bool = False) -> WriteBatch:
        """An atomic batch; nothing is written before its ``write``."""
        return _Batch(self._db.write_batch(transaction=transaction, sync=sync), self._shown)

    def close(self) -> None:
        """Close; safe to call twice."""
        self._db.close()


class _Batch:
    """A plyvel batch that tells its errors as ``StoreError``."""

    def __init__(self, batch: Any, shown: str) -> None:
        self.put = batch.put
        self.delete = batch.delete
        self._batch = batch
        self._shown = shown

    def write(self) -> None:
        try:
            self._batch.write()
        except plyvel.Error as error:
            raise StoreError(self._shown, f"does not take a write: {error}") from None


class DataDirectory:
    """A data directory held by one node, with its store.

    Mutable fields: none but what the operating system holds; ``close`` lets go of all of it.
    """

    def __init__(self, path: Path, params: Params) -> None:
        """Take the directory, making what is missing.

        Args:
            path: the directory.
            params: of the network whose sharechain it holds or shall hold.

        Raises:
            ConfigError: another node uses it, or it cannot be written.
            StoreError: the database is damaged, of another network, or of a newer schema.
        """
        self.path = path.resolve()
        #: What the operator should know of the state that was found; empty if all is well.
        self.warnings: list[str] = []
        self._lock = self._take()
        try:
            directory = self.path / _DATABASE
            batches = _read_batches(self.path)
            new = not (directory / "CURRENT").exists()
            if new and (batches is not None or any(directory.glob("*.ldb")) or any(directory.glob("*.log"))):
                raise StoreError(str(directory / "CURRENT"), "is missing: the database is damaged")
            (self.path / _SUMS).unlink(missing_ok=True)
            self._database = LevelDatabase(directory, create=new)
            try:
                #: The sharechain on disk.
                self.store = Store(self._database, params)
                if batches is None and self.store.sequence:
                    self.warnings.append(f"{_BATCHES} is missing: whether the log lost its tail cannot be told")
                if self.store.sequence < (batches or 0):
                    self.warnings.append(
                        f"the database holds {self.store.sequence} of {batches} batches: the machine lost power, or "
                        "the log is damaged; the missing shares will be fetched or mined again"
                    )
                self._batches = os.open(self.path / _BATCHES, os.O_RDWR | os.O_CREAT, 0o644)
                self.note_written()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            self._let_go()
            raise

    def note_written(self) -> None:
        """Count what the store has written; to be called after each batch. Costs one small write."""
        try:
            os.pwrite(self._batches, _pack_batches(self.store.sequence), 0)
        except OSError as error:
            raise StoreError(str(self.path / _BATCHES), f"does not take a write: {error.strerror}") from None

    def keep_block(self, block_hash: bytes, encoded: bytes) -> None:
        """Keep a block until Bitcoin has answered. Survives a kill and a power cut.

        Args:
            block_hash: 32 bytes, internal order.
            encoded: what ``kept_blocks`` gives back.
        """
        (self.path / _BLOCKS).mkdir(exist_ok=True)
        _write_synced(self._block_file(block_hash), encoded)

    def drop_block(self, block_hash: bytes) -> None:
        """Bitcoin has answered."""
        self._block_file(block_hash).unlink(missing_ok=True)

    def kept_blocks(self) -> list[tuple[Path, bytes]]:
        """The files of blocks that were kept and not dropped, with what ``keep_block`` was given."""
        return [(file, file.read_bytes()) for file in sorted((self.path / _BLOCKS).glob("*.block"))]

    def set_aside(self, file: Path) -> None:
        """Rename a file of ``kept_blocks`` that cannot be read, so that it is not met again and not lost."""
        file.replace(file.with_suffix(".damaged"))

    @property
    def identity_file(self) -> Path:
        """Where the node's identity is kept."""
        return self.path / _IDENTITY

    def save_peers(self, encoded: bytes) -> None:
        """Keep what is known of other nodes."""
        _write_whole(self.path / _PEERS, encoded)

    def load_peers(self) -> bytes | None:
        """What ``save_peers`` was given last; None if nothing was."""
        try:
            return (self.path / _PEERS).read_bytes()
        except FileNotFoundError:
            return None

    def save_workers(self, encoded: bytes) -> None:
        """Keep the books of the miners."""
        _write_whole(self.path / _WORKERS, encoded)

    def write_status(self, status: dict[str, Any]) -> None:
        """Let other commands see what the running node says of itself (see ``read_status``)."""
        _write_whole(self.path / _STATUS, json.dumps(status).encode())

    def _block_file(self, block_hash: bytes) -> Path:
        return self.path / _BLOCKS / f"{block_hash[::-1].hex()}.block"

    def close(self) -> None:
        """Close the database, note the sums of its files, and let go of the directory."""
        try:
            self._database.close()
            os.close(self._batches)
            sums = _sum_files(self.path)
            _write_synced(self.path / _SUMS, json.dumps(sums, indent=1).encode() + b"\n")
        finally:
            self._let_go()

    def _take(self) -> int:
        if self.path in _held:
            raise ConfigError(f"data directory {self.path} is in use by this process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"data directory {self.path} cannot be used: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)  # somebody may only be looking: see is_in_use
                    continue
            owner = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise ConfigError(
                f"data directory {self.path} is in use by another node (process {owner or 'unknown'}); "
                "stop it, or give this one another --data-dir"
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        _held.add(self.path)
        return lock

    def _let_go(self) -> None:
        _held.discard(self.path)
        os.close(self._lock)


def is_in_use(path: Path) -> bool:
    """Whether a node holds a data directory at this moment."""
    try:
        lock = os.open(path / _LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def read_status(path: Path) -> dict[str, Any] | None:
    """What the node that runs on a data directory said of itself last; None if it has said nothing."""
    try:
        status = json.loads((path / _STATUS).read_bytes())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def load_workers(path: Path) -> bytes | None:
    """What ``DataDirectory.save_workers`` was given last; None if nothing was. A node may be running."""
    try:
        return (path / _WORKERS).read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def open_copy(path: Path) -> Iterator[tuple[Params, Store]]:
    """Read a data directory without touching it, whether a node runs on it or not.

    Yields:
        The parameters of its network, and a store on a copy of its database.

    Raises:
        ConfigError: there is no sharechain in it.
        StoreError: the database is damaged.
    """
    source = path / _DATABASE
    if not source.is_dir():
        raise ConfigError(f"data directory {path} holds no sharechain (no {_DATABASE}/ in it)")
    with tempfile.TemporaryDirectory(prefix="p2pool-") as scratch:
        for attempt in range(5):
            copy = Path(scratch) / str(attempt)
            batches = _read_batches(path)
            last = attempt == 4 or not is_in_use(path)
            try:
                _copy_database(source, copy)
                database = LevelDatabase(copy, create=False, shown_as=source)
            except FileNotFoundError as error:
                if last:
                    raise StoreError(str(error.filename), "is missing") from None
                continue
            except StoreError:
                if last:
                    raise
                continue  # the node has just compacted its files; a moment later the copy is whole
            try:
                params = read_params(database)
                if params is None:
                    raise StoreError(str(source), f"is empty, but {_BATCHES} counts {batches} batches")
                store = Store(database, params)
                if batches is None and store.sequence:
                    raise StoreError(str(path / _BATCHES), "is missing: whether the log lost its tail cannot be told")
                if batches is not None and store.sequence < batches and not last:
                    continue
                if batches is not None and store.sequence < batches:
                    raise StoreError(
                        str(source),
                        f"the last batch is number {store.sequence}, but {_BATCHES} counts {batches}: "
                        "the end of the log is damaged or missing",
                    )
                yield params, store
                return
            finally:
                database.close()


def check_files(path: Path) -> int:
    """Compare the files of a database with the sums noted at the last clean stop.

    Returns:
        The number of files that agree; 0 if the last stop was not clean, so that there is nothing to compare.

    Raises:
        StoreError: a file differs, is missing or is new; ``where`` names it.
    """
    try:
        noted = json.loads((path / _SUMS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except ValueError as error:
        raise StoreError(str(path / _SUMS), f"is damaged: {error}") from None
    found = _sum_files(path)
    if not isinstance(noted, dict):
        raise StoreError(str(path / _SUMS), "is damaged: not a table of sums")
    for name in sorted(noted.keys() | found.keys()):
        if name not in found:
            where = path / name
            raise StoreError(str(where), f"is missing, or its name in {_SUMS} is damaged")
        if noted.get(name) != found[name]:
            raise StoreError(
                str(path / name), f"differs from its SHA-256 in {_SUMS}: one of the two was changed after the last stop"
            )
    return len(found)


def _shown_key(key: bytes) -> str:
    kind, rest = key[:1].decode("ascii", "replace"), key[1:]
    return f"{kind}/{rest[::-1].hex() if kind in ('s', 'b') else rest.hex()}"  # hashes as they are displayed


def _copy_database(source: Path, copy: Path) -> None:
    # A running node appends to the log and replaces the rest. The manifest first and the logs last: what was
    # flushed in between is then in both or, if a log is gone, noticed by the count of batches.
    copy.mkdir()
    names = [name for name in os.listdir(source) if name not in _NO_DATA]
    order = {"CURRENT": 0, "MANIFEST": 1}
    for name in sorted(
        names, key=lambda name: (order.get(name.split("-")[0], 3 if name.endswith(".log") else 2), name)
    ):
        shutil.copyfile(source / name, copy / name)


def _sum_files(path: Path) -> dict[str, str]:
    files = [file for file in (path / _DATABASE).iterdir() if file.name not in _NO_DATA] + [path / _BATCHES]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


def _pack_batches(sequence: int) -> bytes:
    number = sequence.to_bytes(8, "big")
    return number + zlib.crc32(number).to_bytes(4, "big")


def _read_batches(path: Path) -> int | None:
    """The number of batches noted, or None if none was."""
    try:
        raw = (path / _BATCHES).read_bytes()
    except FileNotFoundError:
        return None
    sequence = int.from_bytes(raw[:8], "big")
    if raw and raw != _pack_batches(sequence):
        raise StoreError(str(path / _BATCHES), "checksum mismatch: the file is damaged")
    return sequence


def _write_whole(path: Path, content: bytes) -> None:
    """Whoever reads sees the old file or the new one. A power cut may lose both: for what can be lost."""
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def _write_synced(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(path.suffix + ".new")
    with open(fresh, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
