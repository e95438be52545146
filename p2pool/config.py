"""Configuration: one frozen value from flags, else the environment, else a TOML file, else defaults.

``OPTIONS`` is the whole list; ``docs/reference/config.md`` is its table. Every error names the source: the flag, the
variable, or the file and line.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Final

from p2pool.errors import ConfigError
from sharechain.errors import ParamsError
from sharechain.params import NETWORKS, Params

__all__ = ["OPTIONS", "Config", "Option", "load_config"]

LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: ``--some-name``, ``P2POOL_SOME_NAME`` and ``some_name = ...`` in the file."""

    name: str
    metavar: str
    help: str
    #: From text or a TOML value to the setting; ValueError says what is wrong.
    parse: Callable[[object], Any]
    #: As text; None means that there is none.
    default: str | None = None
    #: May be given more than once; in the environment, with commas between.
    is_list: bool = False
    #: Needs no value on the command line.
    is_switch: bool = False
    #: Values on the command line; in the environment, with commas between; an array in the file.
    values: int = 1

    @property
    def flag(self) -> str:
        """How the option is called on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """How the option is called in the environment."""
        return "P2POOL_" + self.name.upper()


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a text is needed, got {value!r}")
    return value


def _path(value: object) -> Path:
    try:
        return Path(_text(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: {error}") from None


def _port(value: object) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | str)
        or not str(value).isascii()
        or not str(value).isdigit()
    ):
        raise ValueError(f"a port number is needed, got {value!r}")
    if int(value) > 65535:
        raise ValueError(f"a port number from 0 to 65535 is needed, got {value}")
    return int(value)


def _seconds(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    except ValueError:
        number = -1.0
    if not 0.05 <= number <= 3600:
        raise ValueError(f"a number of seconds from 0.05 to 3600 is needed, got {value!r}")
    return number


def _count(most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).isdecimal():
            raise ValueError(f"a number from 0 to {most} is needed, got {value!r}")
        if int(value) > most:
            raise ValueError(f"a number from 0 to {most} is needed, got {value}")
        return int(value)

    return parse


def _switch(value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(f"true or false is needed, got {value!r}")
    return words[value.lower()]


def _peers(value: object) -> tuple[str, ...]:
    from p2pool.p2p.peers import parse_address

    texts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError(f"a list of addresses is needed, got {value!r}")
    return tuple(parse_address(_text(text)).text for text in texts)


def _bitcoinds(value: object) -> tuple[str, ...]:
    from p2pool.bitcoin_backend.jsonrpc import parse_endpoint

    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError("a list of addresses is needed")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError("a list of addresses is needed")
        parse_endpoint(text, network="mainnet")  # which network it is changes the defaults only
    return tuple(texts)


def _zmq(value: object) -> tuple[str, ...]:
    texts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError(f"a list of addresses is needed, got {value!r}")
    for text in texts:
        if not isinstance(text, str) or not re.match(r"(tcp|ipc)://.", text):
            raise ValueError(f"an address as in tcp://127.0.0.1:28332 is needed, got {text!r}")
    return tuple(texts)


def _texts(value: object) -> tuple[str, ...]:
    """The parts of a list: of the command line, of a text with commas, of an array."""
    texts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError(f"a list is needed, got {value!r}")
    return tuple(_text(text) for text in texts)


def _above_0(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not 0 < number < 1e30:
        raise ValueError(f"a difficulty above 0 is needed, got {value!r}")
    return number


def _listeners(value: object) -> tuple[tuple[str, int, float | None], ...]:
    return tuple(_listener(text) for text in _texts(value))


def _listener(text: str) -> tuple[str, int, float | None]:
    where, plus, difficulty = text.partition("+")
    host, colon, port = where.rpartition(":")
    if not colon or not host:
        raise ValueError(f"HOST:PORT or HOST:PORT+DIFFICULTY is needed, got {text!r}")
    if plus and port == "0":
        raise ValueError(f"a start difficulty needs a port that is known, got {text!r}")
    return host.strip("[]"), _port(port), _above_0(difficulty) if plus else None


def _networks(value: object) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        return tuple(ip_network(text) for text in _texts(value))
    except ValueError as error:
        raise ValueError(f"IP addresses or networks like 10.0.0.0/8 are needed: {error}") from None


def _classes(value: object) -> tuple[tuple[str, int], ...]:
    pairs = []
    for text in _texts(str(value) if isinstance(value, int) and not isinstance(value, bool) else value):
        agent, _, number = text.rpartition("=")
        if not (number.isascii() and number.isdecimal() and len(number) < 7):
            raise ValueError(f"CLASS or USER-AGENT=CLASS is needed, got {text!r}")
        pairs.append((agent, int(number)))
    return tuple(pairs)


def _two_paths(value: object) -> tuple[Path, Path]:
    texts = _texts(value)
    if len(texts) != 2:
        raise ValueError(f"two files are needed, a certificate and its key, got {value!r}")
    return _path(texts[0]), _path(texts[1])


def _one_of(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)} is needed, got {value!r}")
        return value

    return parse


OPTIONS: Final = (
    Option(
        name="network",
        metavar="NAME",
        help=f"Share network: {', '.join(NETWORKS)}.",
        parse=_one_of(*NETWORKS),
        default="mainnet",
    ),
    Option(
        name="data_dir",
        metavar="DIR",
        help="Where the sharechain is kept. [default: p2pool/NETWORK below $XDG_DATA_HOME or ~/.local/share]",
        parse=_path,
    ),
    Option(
        name="bitcoind",
        metavar="URL",
        help="Bitcoin node's RPC: [http://][USER:PASSWORD@]HOST[:PORT]. May be given more than once; the first is used "
        "while it can be. [default: on regtest a Bitcoin of our own; else 127.0.0.1]",
        parse=_bitcoinds,
        is_list=True,
    ),
    Option(
        name="cookie_file",
        metavar="FILE",
        help="Where the Bitcoin node writes its RPC password. [default: .cookie below ~/.bitcoin]",
        parse=_path,
    ),
    Option(
        name="rpc_user",
        metavar="USER",
        help="Name for the Bitcoin node's RPC, instead of a cookie.",
        parse=_text,
    ),
    Option(
        name="rpc_password",
        metavar="PASSWORD",
        help="Password for it. Others on this machine can read a command line: better in the file or the environment.",
        parse=_text,
    ),
    Option(
        name="zmq",
        metavar="ADDRESS",
        help="Where the Bitcoin node publishes hashblock, as in tcp://127.0.0.1:28332. May be given more than once.",
        parse=_zmq,
        is_list=True,
    ),
    Option(
        name="address",
        metavar="ADDRESS",
        help="Paid for miners whose user name is not an address. Without it, such miners are refused.",
        parse=_text,
    ),
    Option(
        name="stratum_host",
        metavar="HOST",
        help="Interface that miners connect to; 0.0.0.0 for all.",
        parse=_text,
        default="127.0.0.1",
    ),
    Option(
        name="stratum_port",
        metavar="PORT",
        help="Port that miners connect to; 0 for any free one.",
        parse=_port,
        default="3333",
    ),
    Option(
        name="vardiff_interval",
        metavar="SECONDS",
        help="Wanted time between two submissions of one miner.",
        parse=_seconds,
        default="5",
    ),
    Option(
        name="start_difficulty",
        metavar="DIFFICULTY",
        help="What a miner begins with; it is adapted within seconds.",
        parse=_above_0,
        default="512",
    ),
    Option(
        name="stratum_listen",
        metavar="HOST:PORT[+DIFFICULTY]",
        help="A further interface and port for miners, with its own start difficulty. May be given more than once.",
        parse=_listeners,
        is_list=True,
    ),
    Option(
        name="stratum_tls",
        metavar="CERT KEY",
        help="Certificate and key, as PEM files: miners may then speak TLS on every port, as well as plain text.",
        parse=_two_paths,
        values=2,
    ),
    Option(
        name="stratum_proxy",
        metavar="ADDRESS",
        help="A load balancer (IP address or network) that sends a PROXY header. May be given more than once.",
        parse=_networks,
        is_list=True,
    ),
    Option(
        name="stratum_max_per_ip",
        metavar="NUMBER",
        help="Miners that may be connected from one IP address; this machine's own may be more.",
        parse=_count(100_000),
        default="5000",
    ),
    Option(
        name="payout_class",
        metavar="[USER-AGENT=]CLASS",
        help="Payout class for miners whose user agent contains the text, or for all. May be given more than once.",
        parse=_classes,
        is_list=True,
    ),
    Option(
        name="shares_per_window",
        metavar="NUMBER",
        help="Shares of one address that a window should hold at most: bigger miners find heavier ones. 0: no limit.",
        parse=_count(1_000_000),
        default="200",
    ),
    Option(
        name="peer",
        metavar="MULTIADDR",
        help="Another node: /ip4/ADDRESS/tcp/PORT/p2p/ID. May be given more than once; called for as long as we run.",
        parse=_peers,
        is_list=True,
    ),
    Option(
        name="p2p_host",
        metavar="HOST",
        help="Interface that other nodes connect to; an IP address, 0.0.0.0 for all.",
        parse=_text,
        default="0.0.0.0",
    ),
    Option(
        name="p2p_port",
        metavar="PORT",
        help="Port that other nodes connect to; 0 for any free one.",
        parse=_port,
        default="9338",
    ),
    Option(
        name="mdns",
        metavar="",
        help="Find nodes on the local network, and be found there.",
        parse=_switch,
        default="false",
        is_switch=True,
    ),
    Option(
        name="max_inbound",
        metavar="NUMBER",
        help="Nodes that may be connected to us by their own call.",
        parse=_count(1_000),
        default="64",
    ),
    Option(
        name="max_outbound",
        metavar="NUMBER",
        help="Nodes that we call by our own choice; those of --peer come on top.",
        parse=_count(100),
        default="8",
    ),
    Option(
        name="log_level",
        metavar="LEVEL",
        help=f"How much to log: {', '.join(LOG_LEVELS)}.",
        parse=_one_of(*LOG_LEVELS),
        default="info",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the operator chose. Nothing in it is consensus, but for which network to be on."""

    network: str
    params: Params
    data_dir: Path
    #: As given: with passwords.
    bitcoind: tuple[str, ...] = field(repr=False)
    cookie_file: Path | None
    rpc_user: str | None
    rpc_password: str | None = field(repr=False)
    zmq: tuple[str, ...]
    address: str | None
    stratum_host: str
    stratum_port: int
    vardiff_interval: float
    start_difficulty: float
    #: Host, port, start difficulty.
    stratum_listen: tuple[tuple[str, int, float | None], ...]
    #: Certificate and key.
    stratum_tls: tuple[Path, Path] | None
    stratum_proxy: tuple[IPv4Network | IPv6Network, ...]
    stratum_max_per_ip: int
    #: Part of a user agent, class.
    payout_class: tuple[tuple[str, int], ...]
    shares_per_window: int
    #: Whole multiaddrs.
    peer: tuple[str, ...]
    p2p_host: str
    p2p_port: int
    mdns: bool
    max_inbound: int
    max_outbound: int
    log_level: str


def load_config(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None) -> Config:
    """Choose each setting from the first source that has it.

    Args:
        flags: option name to text (to a tuple of texts for a list), None or () where the flag was not given.
        environment: as ``os.environ``.
        file: a TOML file, or None.

    Raises:
        ConfigError: naming the flag, the variable, or the file and line.
    """
    table, text = _read(file)
    known = {option.name for option in OPTIONS} | {"params"}
    for key in table:
        if key not in known:
            raise ConfigError(f"{file}:{_line(text, key)}: {key}: unknown option; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if flags.get(option.name) not in (None, ()):
            source, value = option.flag, flags[option.name]
        elif option.variable in environment:
            source, value = option.variable, environment[option.variable]
        elif option.name in table:
            source, value = f"{file}:{_line(text, option.name)}: {option.name}", table[option.name]
        elif option.default is not None:
            source, value = option.flag, option.default
        else:
            values[option.name] = () if option.is_list else None
            continue
        try:
            values[option.name] = option.parse(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    params = NETWORKS[values["network"]]
    overrides = table.get("params", {})
    if not isinstance(overrides, dict):
        raise ConfigError(f"{file}:{_line(text, 'params')}: params: a table is needed")
    if overrides:
        if overrides.get("name") in (None, *NETWORKS):
            raise ConfigError(f"{file}:{_line(text, 'params')}: params: a private network needs a name of its own")
        try:
            params = params.with_overrides(overrides)
        except ParamsError as error:
            raise ConfigError(f"{file}:{_line(text, error.option)}: {error}") from None
    if values["data_dir"] is None:
        base = Path(environment.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser())
        values["data_dir"] = base / "p2pool" / params.name
    return Config(params=params, **values)


def _read(file: Path | None) -> tuple[dict[str, Any], str]:
    if file is None:
        return {}, ""
    try:
        text = file.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as error:
        raise ConfigError(f"--config: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{file}:{where[1] if where else text.count(os.linesep) + 1}: {error}") from None


def _line(text: str, key: str) -> int:
    """The line that sets ``key``, or opens the table of that name; for messages only."""
    pattern = re.compile(
        rf"\s*(\[\s*{re.escape(key)}\s*\]|[\"']?{re.escape(key)}[\"']?\s*=|.*[{{,]\s*{re.escape(key)}\s*=)"
    )
    for number, line in enumerate(text.splitlines(), 1):
        if pattern.match(line):
            return number
    return 1
