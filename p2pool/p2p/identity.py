"""The node's identity: a secret seed in a file of its own."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path
from typing import Final

from p2pool.errors import ConfigError

logger = logging.getLogger("p2pool.p2p")

SEED_BYTES: Final = 32
#: Bits of a mode that let others at a file.
_OPEN: Final = 0o077
#: What a file system without hard links says of one.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP})


def load_identity(path: Path) -> bytes:
    """The secret seed of the node's identity, from its file; made at the first start.

    Only one process may do this at a time: the one that holds the data directory.

    Returns:
        32 bytes.

    Raises:
        ConfigError: the file is damaged, others may read it, or it cannot be read or made.
    """
    try:
        if not path.exists():
            _create_identity(path)
        with path.open("rb") as file:
            mode = _mode_of(file.fileno())
            seed = file.read(SEED_BYTES + 1)
        is_open = bool(mode & _OPEN)
        has_modes = not is_open or _has_modes(path)
    except OSError as error:
        raise ConfigError(f"the identity {path} cannot be read or made: {error.strerror}") from error
    if is_open and has_modes:
        raise ConfigError(f"the identity {path} is open to others (mode {mode:03o}): chmod 600 {path}")
    if is_open:
        logger.warning("the identity %s may be open to others (mode %03o): its file system keeps no modes", path, mode)
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"the identity {path} is damaged: expected {SEED_BYTES} bytes, got "
            f"{'more' if len(seed) > SEED_BYTES else len(seed)}. Restore it, or delete it to get a new identity"
        )
    return seed


def _create_identity(path: Path) -> None:
    """Write a new seed so that the file is whole and closed to others from the first moment that it is there."""
    draft = _draft_of(path)
    descriptor = _open_draft(draft)
    try:
        with open(descriptor, "wb") as file:
            file.write(os.urandom(SEED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # Unlike a rename, never replaces what is there.
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _has_modes(path: Path) -> bool:
    """Whether the file system keeps what modes it is told (exFAT and SMB show the same for all files)."""
    draft = _draft_of(path)
    try:
        descriptor = _open_draft(draft)
    except OSError:
        return True  # A directory that cannot be written to: nothing speaks against the mode that is shown.
    try:
        return not _mode_of(descriptor) & _OPEN
    finally:
        os.close(descriptor)
        draft.unlink()


def _draft_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _open_draft(draft: Path) -> int:
    """An empty file that only we may read. One that a killed start has left is removed."""
    draft.unlink(missing_ok=True)
    return os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _mode_of(descriptor: int) -> int:
    return stat.S_IMODE(os.fstat(descriptor).st_mode)
