"""Who mines, by what a miner writes into its user name, its password and its user agent. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pool.errors import StratumError
from p2pool.stratum.values import UNAUTHORIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class UserOptions:
    """What is written in a user name and a password."""

    address: str
    worker_name: str
    session_difficulty: float | None
    share_difficulty: float | None


_USER_OPTION = re.compile(r"([+/])([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=$|[+/.])")
_PASSWORD_OPTION = re.compile(r"(?:^|[,; ])(?:d|diff)=([0-9.eE+-]+)(?=$|[,; ])")


def parse_user(user: str, password: str) -> UserOptions:
    """Read `address[.worker]` with `+difficulty` (session) and `/difficulty` (share), and `d=` in the password.

    The symbols may be percent-encoded. What is said in the user name wins over the password; anything that is not a
    difficulty above 0 is ignored, as miners put all sorts of things in there.
    """
    for encoded, symbol in (("%2B", "+"), ("%2b", "+"), ("%2F", "/"), ("%2f", "/")):
        user = user.replace(encoded, symbol)
    difficulties: dict[str, float] = {}
    in_password = _PASSWORD_OPTION.search(password)
    if in_password and (difficulty := read_difficulty(in_password[1])) is not None:
        difficulties["+"] = difficulty
    for symbol, number in _USER_OPTION.findall(user):
        if (difficulty := read_difficulty(number)) is not None:
            difficulties[symbol] = difficulty
    address, _, worker_name = _USER_OPTION.sub("", user.strip()).partition(".")
    return UserOptions(
        address=address,
        worker_name=worker_name,
        session_difficulty=difficulties.get("+"),
        share_difficulty=difficulties.get("/"),
    )


CUT_USER_LENGTH: Final = 63
"""Characters after which Avalon firmware cuts a user name; a taproot address alone has 62 on mainnet, 64 on regtest."""


def explain_user(user: str, fault: str) -> str:
    """The text of a refusal, with what is likely behind it."""
    if len(user) == CUT_USER_LENGTH:
        fault += (
            f"; the name has exactly {CUT_USER_LENGTH} characters, where some firmware (Avalon) cuts it: "
            "use a shorter worker name or a shorter type of address"
        )
    return f"user name: {fault}"


_REFUSED_AGENTS: Final = (
    ("nicehash", "NiceHash cannot mine here: it takes no coinbase above 500 bytes, and ours pays every miner"),
    ("nerdminer", "NerdMiner cannot mine here: it cuts the coinbase at 255 bytes, which makes every share wrong"),
)
_WANTED_CLASSES: Final = (
    (re.compile(r"antminer s21(?=$|/| \()"), 47),
    (re.compile(r"bosminer-plus-tuner"), 47),
    (re.compile(r"whatsminer|bitaxe"), 146),
    (re.compile(r"powerplay-bm/|xminer-1\.|cpuminer"), 367),
)
_CLASS_OF_UNKNOWN: Final = 12
_OWN_MINER = "p2pool-cpuminer/"


def payout_class_for(user_agent: str, classes: Sequence[int]) -> int:
    """The number of window payouts that the firmware's coinbase buffer has room for.

    Coinbase bytes that firmware was seen to take: stock Antminers up to S19, and to be safe all unknown ones, 755;
    Antminer S21 and Braiins 2,250; WhatsMiner and Bitaxe 6,500; ePIC, xminer and cpuminers 16,000 and more.

    Arguments:
        user_agent: from `mining.subscribe`, "" where there was none.
        classes: the classes that the sharechain has, in any order.

    Raises:
        StratumError: 24, for a miner that fits no class.
    """
    agent = user_agent.lower()
    for name, text in _REFUSED_AGENTS:
        if name in agent:
            raise StratumError(UNAUTHORIZED, text)
    if agent.startswith(_OWN_MINER):
        return max(classes)
    wanted = next((size for pattern, size in _WANTED_CLASSES if pattern.search(agent)), _CLASS_OF_UNKNOWN)
    return max((size for size in classes if size <= wanted), default=min(classes))


def read_difficulty(text: str) -> float | None:
    """A finite number above 0, else None."""
    try:
        difficulty = float(text)
    except ValueError:
        return None
    return difficulty if math.isfinite(difficulty) and difficulty > 0 else None
