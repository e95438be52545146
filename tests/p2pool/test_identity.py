"""The identity: made once, kept, closed to others; a damaged file is an error and never a new identity."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from p2pool.errors import ConfigError
from p2pool.p2p.identity import SEED_BYTES, load_identity


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    seed = load_identity(path)
    assert len(seed) == SEED_BYTES
    assert load_identity(path) == seed
    assert load_identity(tmp_path / "other") != seed
    assert path.stat().st_mode & 0o777 == 0o600
    assert {entry.name for entry in tmp_path.iterdir()} == {"identity", "other"}


@pytest.mark.parametrize("size", [0, SEED_BYTES - 1, SEED_BYTES + 1])
def test_a_damaged_identity_is_refused_and_left_as_it_is(tmp_path: Path, size: int) -> None:
    path = tmp_path / "identity"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is damaged.*delete it"):
        load_identity(path)
    assert path.read_bytes() == bytes(size)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_an_identity_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    load_identity(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {re.escape(str(path))}"):
        load_identity(path)


def test_an_identity_that_cannot_be_made_is_the_operators_error(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "identity"
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_identity(path)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_identity(tmp_path)


def test_what_a_killed_start_has_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    (tmp_path / "identity.new").write_bytes(b"half")
    assert len(load_identity(path)) == SEED_BYTES
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_holds_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "identity"
    seed = load_identity(path)
    assert load_identity(path) == seed
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity"]


def test_a_file_system_without_modes_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        mode, *others = whole(descriptor)
        return os.stat_result((mode | 0o777, *others))

    path = tmp_path / "identity"
    load_identity(path)
    assert not caplog.messages
    monkeypatch.setattr(os, "fstat", fstat)
    assert len(load_identity(path)) == SEED_BYTES
    assert f"the identity {path} may be open to others (mode 777)" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity"]
