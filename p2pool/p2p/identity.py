"""The node's identity: a secret seed in a file of its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from p2pool.errors import ConfigError

SEED_BYTES: Final = 32


def load_identity(path: Path) -> bytes:
    """The secret seed of the node's identity, from its file; made at the first start.

    Returns:
        32 bytes.

    Raises:
        ConfigError: the file is damaged, others may read it, or it cannot be read or made.
    """
    try:
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                seed = file.read(SEED_BYTES + 1)
        except FileNotFoundError:
            return _create_identity(path)
    except OSError as error:
        raise ConfigError(f"the identity {path} cannot be read or made: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"the identity {path} is open to others (mode {mode:03o}): chmod 600 {path}")
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"the identity {path} is damaged: expected {SEED_BYTES} bytes, got "
            f"{'more' if len(seed) > SEED_BYTES else len(seed)}. Restore it, or delete it to get a new identity"
        )
    return seed


def _create_identity(path: Path) -> bytes:
    """Write a new seed so that the file is whole and closed to others from the first moment that it is there."""
    seed = os.urandom(SEED_BYTES)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(seed)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # Unlike a rename, never replaces what another process has made meanwhile.
    finally:
        draft.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return seed
