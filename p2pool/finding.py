"""What `p2pool doctor` finds: one thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "ok", "problem", "warning"]

#: A problem keeps a node from working; a warning costs something or may become a problem.
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `p2pool doctor`.

    Arguments:
        check: what was looked at, in a word or two.
        level: how it is.
        found: what was found, without passwords.
        advice: what to do; never empty for a warning or a problem.
    """

    check: str
    level: Level
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.advice:
            raise ValueError(f"{self.check}: a {self.level} wants advice")


def ok(check: str, found: str, advice: str = "") -> Finding:
    """All is well; what may be done all the same."""
    return Finding(check=check, level="ok", found=found, advice=advice)


def warning(check: str, found: str, advice: str) -> Finding:
    """The node works, but."""
    return Finding(check=check, level="warning", found=found, advice=advice)


def problem(check: str, found: str, advice: str) -> Finding:
    """The node does not work like this."""
    return Finding(check=check, level="problem", found=found, advice=advice)
