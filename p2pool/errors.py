"""The node's errors, by whose fault it is: the operator's, the backend's, a miner's, a peer's."""

from __future__ import annotations


class P2PoolError(Exception):
    """Something that the node expects to go wrong sometimes and knows how to answer."""


class ConfigError(P2PoolError):
    """The operator's: an option, a file or the machine is not as the node needs it. Shown at start, then exit."""


class BackendError(P2PoolError):
    """The Bitcoin node's, or its connection's: it cannot be opened, reached or understood."""


class BackendRefusal(BackendError):
    """The Bitcoin node understood and refuses: asking again changes nothing before somebody does something.

    Arguments:
        code: of the JSON-RPC error, or the HTTP status.
        message: what the node said, and what the operator should do.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class StratumError(P2PoolError):
    """A miner's: the answer to one request is an error; the session goes on.

    Arguments:
        code: the number that Stratum gives the error (21 job not found, 23 low difficulty, ...).
        message: what a miner reads in the log of the machine.
        reason: the name in statistics, where it says more than the code's.
    """

    def __init__(self, code: int, message: str, *, reason: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.message} (code {self.code})"


class PeerError(P2PoolError):
    """A peer's: it broke the wire protocol, a limit or a promise.

    Arguments:
        rule: what it broke, in a word or by the number of the sharechain's rule ("frame", "timeout", "R3", ...).
        message: what the log says.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)
        self.rule = rule
        self.message = message

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"
