"""What the library raises: bytes that do not decode, shares that break a rule, a store that is damaged."""

from __future__ import annotations

__all__ = ["DecodeError", "InvalidShare", "ParamsError", "SharechainError", "StoreError", "show_value"]


class SharechainError(Exception):
    """Anything that the sharechain library refuses."""


class ParamsError(SharechainError, ValueError):
    """Network parameters that contradict themselves; ``option`` names the parameter."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


class DecodeError(SharechainError):
    """Bytes that are not the canonical encoding of anything; for a share this is rule R1."""

    rule = "R1"


class InvalidShare(SharechainError):
    """A share that breaks a rule for ever, whatever else a node learns.

    ``rule`` is the rule's number in ``docs/reference/rules.md`` ("R1" to "R12").
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message


class StoreError(SharechainError):
    """A database that cannot be used: damaged, of another network, or of a newer schema.

    ``where`` names the file or the record.
    """

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where
        self.message = message


def show_value(value: object) -> str:
    """A value from untrusted bytes for an error message: never long, and never an error itself."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, int) and abs(value) < 2**256:
        return str(value)
    if isinstance(value, list | tuple) and len(value) <= 8 and all(isinstance(part, int) for part in value):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, str):
        return repr(value[:80])
    return f"a {type(value).__name__}"  # a hostile number may be too large to print
