"""What to log of something that fails again and again: how it began, what is new, that it lasts, that it is over.

A node that nobody answers tries for days. Its log must say so once and not a thousand times. Pure: the time comes in by
argument, what is to be logged goes out as a text.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Outage"]

#: Seconds between two words about what still fails in the same way.
REMINDER_S: Final = 600.0
#: Different reasons that are told at once; what has more of them is told as what lasts.
MAX_REASONS: Final = 8


class Outage:
    """One thing that fails or works.

    Mutable fields: ``_since`` (when it began to fail, None while it works), ``_said`` and ``_said_at`` (what was logged
    of it, and when the last) and ``_failures`` since the beginning.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._said: set[str] = set()
        self._said_at = 0.0
        self._failures = 0

    @property
    def since(self) -> float | None:
        """When it began to fail; None while it works."""
        return self._since

    def failed(self, reason: str, now: float) -> str | None:
        """It failed: what to log, or None if nothing is new.

        Args:
            reason: the error, as a person should read it.
            now: seconds, of any clock that only moves forward.
        """
        if self._since is None:
            self._since, self._said_at, self._failures = now, now, 0
            self._said.clear()
        self._failures += 1
        if reason not in self._said and len(self._said) < MAX_REASONS:
            self._said.add(reason)
            self._said_at = now
            return reason
        if now - self._said_at < REMINDER_S:
            return None
        self._said_at = now
        return f"{reason} (for {_shown(now - self._since)} now, {self._failures} tries)"

    def ended(self, now: float) -> str | None:
        """It works: how long it did not, or None if it worked before."""
        if self._since is None:
            return None
        lasted, self._since = now - self._since, None
        tries = "1 failed try" if self._failures == 1 else f"{self._failures} failed tries"
        return f"after {_shown(lasted)} and {tries}"


def _shown(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
