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
    # It is shown on terminals, where a control character is a command.
    user = "".join(character if character.isprintable() else "?" for character in user)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Firmware:
    """What is known of one kind of firmware.

    Attributes:
        pattern: searched in the user agent, in lower case.
        coinbase_bytes: the largest coinbase that it was seen to take, or that its makers name.
        name: for a refusal.
        because: what goes wrong with a larger coinbase, for a refusal.
    """

    pattern: str
    coinbase_bytes: int
    name: str
    because: str = "a larger one is not taken"


FIRMWARE: Final = (
    Firmware(
        pattern=r"nicehash",
        coinbase_bytes=500,
        name="NiceHash",
        because="a larger one, or one that is long before the extranonce, is refused",
    ),
    Firmware(
        pattern=r"nerdminer",
        coinbase_bytes=255,
        name="NerdMiner",
        because="a larger one is cut, which makes every share wrong",
    ),
    Firmware(pattern=r"^p2pool-cpuminer/", coinbase_bytes=1_000_000, name="the p2pool CPU miner"),
    Firmware(pattern=r"antminer s21(?=$|/| \()", coinbase_bytes=2_250, name="Antminer S21"),
    Firmware(pattern=r"bosminer-plus-tuner", coinbase_bytes=2_250, name="Braiins"),
    Firmware(pattern=r"whatsminer", coinbase_bytes=6_500, name="WhatsMiner"),
    Firmware(pattern=r"bitaxe", coinbase_bytes=6_500, name="Bitaxe"),
    Firmware(pattern=r"powerplay-bm/", coinbase_bytes=16_000, name="ePIC"),
    Firmware(pattern=r"xminer-1\.", coinbase_bytes=16_000, name="xminer"),
    Firmware(pattern=r"cpuminer", coinbase_bytes=16_000, name="cpuminer"),
)
"""The first that fits a user agent counts. A line here is all that a new kind of firmware needs."""
UNKNOWN: Final = Firmware(pattern="", coinbase_bytes=755, name="this firmware")
"""What stock Antminers up to the S19 take, and, to be safe, whatever is not in the table."""
COINBASE_REST_BYTES: Final = 200
"""Of a coinbase beside its payouts, at most."""
WIDEST_PAYOUT_BYTES: Final = 43
"""An output to a P2TR or P2WSH address."""


def coinbase_bytes_of(payout_class: int) -> int:
    """The largest coinbase of a payout class."""
    return COINBASE_REST_BYTES + WIDEST_PAYOUT_BYTES * payout_class


def firmware_of(user_agent: str) -> Firmware:
    """The line of the table for a user agent."""
    agent = user_agent.lower()
    return next((one for one in FIRMWARE if re.search(one.pattern, agent)), UNKNOWN)


def payout_class_for(user_agent: str, classes: Sequence[int], overrides: Sequence[tuple[str, int]] = ()) -> int:
    """The number of window payouts that the firmware's coinbase buffer has room for.

    Arguments:
        user_agent: from `mining.subscribe`, "" where there was none.
        classes: the classes that the sharechain has, in any order.
        overrides: the operator's: a part of a user agent in any case ("" for all), and the class for it. The first
            that fits wins over the table.

    Raises:
        StratumError: 24, for a miner that fits no class.
    """
    agent = user_agent.lower()
    for text, payout_class in overrides:
        if text.lower() in agent:
            return payout_class
    firmware = firmware_of(user_agent)
    fitting = [size for size in classes if coinbase_bytes_of(size) <= firmware.coinbase_bytes]
    if not fitting:
        smallest = coinbase_bytes_of(min(classes))
        raise StratumError(
            UNAUTHORIZED,
            f"{firmware.name} cannot mine here: it takes a coinbase of {firmware.coinbase_bytes} bytes, and ours pays "
            f"every miner in at least {smallest}: {firmware.because}",
        )
    return max(fitting)


def read_difficulty(text: str) -> float | None:
    """A finite number above 0, else None."""
    try:
        difficulty = float(text)
    except ValueError:
        return None
    return difficulty if math.isfinite(difficulty) and difficulty > 0 else None
