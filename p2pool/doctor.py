"""`p2pool doctor`: looks at everything that keeps a node from working, and says what to do about it.

Theory of operation. ``CHECKS`` is the table of what is looked at on this machine; each is a function of what the
operator chose (`Subject`) that gives findings. The Bitcoin node has a file of its own, ``doctor_bitcoin.py``. All run
at the same time, each with a limit, since a disk or a server that does not answer is one of the things to find: those
of the table in threads, which are left alone if they hang.

Nothing is changed, and a node may be running on the data directory: a port is tried by binding it and letting go at
once, the database is read from a copy, a lock is looked at and not taken. So what is found is of this moment.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import ipaddress
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from p2pool.bitcoin_backend.address import AddressError, decode_address
from p2pool.config import OPTIONS, Config
from p2pool.database import is_in_use, open_copy, read_status
from p2pool.errors import ConfigError, P2PoolError
from p2pool.finding import Finding, ok, problem, warning
from sharechain import __version__, hasher
from sharechain.errors import StoreError

__all__ = ["CHECKS", "Subject", "diagnose", "option_sources"]

#: Seconds for a check of this machine, for an answer of a Bitcoin node, and for all questions to all of them.
LIMIT_S: Final = 10.0
ANSWER_S: Final = 9.0
BITCOIN_LIMIT_S: Final = 25.0
#: Open files that 1,000 miners and the other nodes need with room to spare, and what the node itself has open.
WANTED_FILES: Final = 4_096
OWN_FILES: Final = 128
#: Bytes. Less free space is a warning; less than the second and the next write may fail.
LOW_SPACE: Final = 1_000_000_000
NO_SPACE: Final = 50_000_000
#: Seconds after which the status of a running node, which it writes every two, is too old.
OLD_STATUS_S: Final = 60.0
#: Seconds that the clock service may take to answer.
NTP_S: Final = 5.0
#: Packages whose versions are always told.
NAMED: Final = ("trio", "libp2p")
#: Ports below are the system's.
_FIRST_FREE_PORT: Final = 1_024
#: File systems of other machines: their locks and their word that something is on disk may not hold.
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs"})
#: Bits of a mode that let others at a file.
_OPEN: Final = 0o077
_SEED_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined.

    Arguments:
        config: as for ``p2pool run``.
        sources: where each option that was chosen comes from, see `option_sources`.
        clock: Unix seconds.
    """

    config: Config
    sources: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.time

    @property
    def data_dir(self) -> Path:
        """Of the node."""
        return self.config.data_dir


def option_sources(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None) -> dict[str, str]:
    """Where the options come from that are not the defaults: the flag, the variable, or the file.

    Arguments:
        flags, environment, file: as for `load_config`, which has accepted them.
    """
    table: dict[str, object] = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    sources: dict[str, str] = {}
    for option in OPTIONS:
        if flags.get(option.name) not in (None, ()):
            sources[option.name] = option.flag
        elif option.variable in environment:
            sources[option.name] = option.variable
        elif option.name in table:
            sources[option.name] = str(file)
    if "params" in table:
        sources["params"] = str(file)
    return sources


async def diagnose(subject: Subject, *, limit_s: float = LIMIT_S, answer_s: float = ANSWER_S) -> list[Finding]:
    """Run all checks at once.

    Arguments:
        subject: what is examined.
        limit_s: seconds for each check of this machine.
        answer_s: seconds for each answer of a Bitcoin node.

    Returns: the findings: of the options, of Bitcoin, then in the order of `CHECKS`.
    """
    findings: dict[str, list[Finding]] = {"options": [], "bitcoin": []}

    async def run(name: str, look: Callable[[], Awaitable[list[Finding]]], seconds: float) -> None:
        with trio.move_on_after(seconds) as scope:
            try:
                findings[name] = await look()
            except (P2PoolError, StoreError, OSError) as error:
                findings[name] = [problem(name, str(error), "put that right, then ask again")]
        if scope.cancelled_caught:
            advice = "does a disk, a network file system or a name server hang?"
            findings[name] = [problem(name, f"no result in {seconds:g} s", advice)]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "bitcoin", partial(_check_bitcoin, subject, answer_s), BITCOIN_LIMIT_S)
        for name, check in CHECKS.items():
            findings.setdefault(name, [])
            nursery.start_soon(run, name, partial(_in_thread, check, subject), limit_s)
    return [finding for found in findings.values() for finding in found]


async def _in_thread(check: Callable[[Subject], Iterable[Finding]], subject: Subject) -> list[Finding]:
    return await trio.to_thread.run_sync(lambda: list(check(subject)), abandon_on_cancel=True)


async def _check_bitcoin(subject: Subject, answer_s: float) -> list[Finding]:
    from p2pool.doctor_bitcoin import ask_nodes, judge_nodes, judge_zmq
    from p2pool.service import bitcoin_endpoints, embeds_bitcoin

    config = subject.config
    if embeds_bitcoin(config):
        return await _in_thread(_check_embedded, subject)
    try:
        endpoints = bitcoin_endpoints(config)
    except ConfigError as error:
        return [problem("bitcoin node", str(error), "correct it; without it the node does not start")]
    nodes = await ask_nodes(endpoints, network=config.params.bitcoin_network, limit_s=answer_s, clock=subject.clock)
    # In a thread: a template of a whole block takes a while to read.
    return await trio.to_thread.run_sync(
        lambda: [*judge_nodes(nodes, config.params), *judge_zmq(nodes, config.zmq)], abandon_on_cancel=True
    )


def _check_embedded(subject: Subject) -> Iterator[Finding]:
    name = "bitcoin node"
    directory = subject.data_dir / "bitcoin"
    try:
        is_there = importlib.util.find_spec("pbk") is not None
    except ValueError:
        is_there = False
    if not is_there:
        advice = "pip install 'p2pool[kernel]', or name a Bitcoin node with --bitcoind"
        yield problem(name, "the embedded Bitcoin is not installed (Python package py-bitcoinkernel)", advice)
        return
    found = f"embedded, version {_version_of('py-bitcoinkernel')}"
    if is_in_use(subject.data_dir):
        yield ok(name, f"{found}; held by the running node")
    elif not directory.exists():
        yield ok(name, f"{found}; a new chain begins at the first start")
    elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        yield problem(
            name, f"{found}; {directory} cannot be written", f"give it to the user of the node: {_chown(directory)}"
        )
    elif (directory / "DIRTY").exists():
        yield warning(
            name,
            f"{found}; it was not closed in order",
            "nothing to do: the next start builds its databases again from the blocks, which takes some seconds",
        )
    else:
        yield ok(name, f"{found}; its chain is in {directory}")


def _check_options(subject: Subject) -> Iterator[Finding]:
    config, sources = subject.config, subject.sources
    params = config.params
    yield ok("network", f"{params.name} (id {params.network_id.hex()}), on Bitcoin's {params.bitcoin_network}")
    if sources:
        by_source: dict[str, list[str]] = {}
        for name, source in sources.items():
            by_source.setdefault("the command line" if source.startswith("--") else source, []).append(name)
        yield ok("options", "; ".join(f"from {source}: {', '.join(names)}" for source, names in by_source.items()))
    else:
        yield ok("options", "all are the defaults")
    yield from _check_secrets(subject)
    if config.address is None:
        yield ok("address", "none: each miner's user name must be a Bitcoin address")
        return
    try:
        decode_address(config.address, params.bitcoin_network)
    except AddressError as error:
        yield problem("address", str(error), f"give an address of {params.bitcoin_network} with --address, or none")
    else:
        yield ok("address", f"{config.address} is paid for miners whose user name is no address")


def _check_secrets(subject: Subject) -> Iterator[Finding]:
    """Where a password for the Bitcoin node can be read by others."""
    config, sources = subject.config, subject.sources
    secret = [
        sources[name]
        for name, is_secret in (
            ("rpc_password", config.rpc_password is not None),
            ("bitcoind", any("@" in text for text in config.bitcoind)),
        )
        if is_secret and name in sources
    ]
    for source in dict.fromkeys(secret):
        if source.startswith("--"):
            yield warning(
                "options",
                f"{source}: the password for the Bitcoin node is on the command line, where everybody on this machine "
                "can read it",
                "put it into a file that --config names, or use the cookie",
            )
        elif not source.startswith("P2POOL_") and (mode := stat.S_IMODE(os.stat(source).st_mode)) & _OPEN:
            yield warning(
                "options",
                f"{source} holds a password and is open to others (mode {mode:03o})",
                f"chmod 600 {source}",
            )


def _check_directory(subject: Subject) -> Iterator[Finding]:
    path, name = subject.data_dir, "data directory"
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not there.is_dir():
        yield problem(name, f"{there} is not a directory", "name another place with --data-dir")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        found = f"{there} cannot be written by this user" + (
            "" if there == path.absolute() else f", so {path} not made"
        )
        yield problem(name, found, f"{_chown(there)}, or name another place with --data-dir")
        return
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    found = f"{path}" + ("" if path.exists() else " (made at the first start)") + f", {free / 1e9:.1f} GB free"
    kind = _file_system(there)
    if free < NO_SPACE:
        yield problem(name, found, "make room: a node that cannot write stops")
    elif free < LOW_SPACE:
        yield warning(name, found, "make room before it is full: a node that cannot write stops")
    elif kind in _REMOTE:
        yield warning(
            name,
            f"{found}, on a network file system ({kind})",
            "use a local disk: locks and synced writes may not hold on it, and shares can be lost",
        )
    else:
        yield ok(name, found)


def _check_database(subject: Subject) -> Iterator[Finding]:
    path, params, name = subject.data_dir, subject.config.params, "sharechain"
    if not (path / "sharechain").is_dir():
        if (path / "sharechain.batches").exists():
            yield problem(
                name,
                f"{path / 'sharechain'} is missing, and sharechain.batches says that there was one",
                f"restore it, or delete {path / 'sharechain.batches'} to begin anew: other nodes give the history",
            )
            return
        yield ok(name, "none yet: it begins with the first start")
        return
    try:
        with open_copy(path) as (found, store):
            count = store.count()
    except StoreError as error:
        yield problem(
            name,
            str(error),
            f"p2pool verify tells more. With the node stopped, move sharechain and sharechain.batches out of {path}: "
            "the history is fetched again from other nodes",
        )
        return
    if found != params:
        yield problem(
            name,
            f"{path} holds network {found.name} (id {found.network_id.hex()}), wanted is {params.name} "
            f"(id {params.network_id.hex()})",
            f"--network {found.name} (or its --config), or another --data-dir",
        )
        return
    yield ok(name, f"{count:,} shares of {found.name}")


def _check_identity(subject: Subject) -> Iterator[Finding]:
    path, name = subject.data_dir / "identity.key", "identity"
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        yield ok(name, "none yet: it is made at the first start")
        return
    mode = stat.S_IMODE(facts.st_mode)
    if not os.access(path, os.R_OK):
        yield problem(name, f"{path} cannot be read by this user", _chown(path))
    elif mode & _OPEN:
        yield problem(name, f"{path} is open to others (mode {mode:03o}): the node does not start", f"chmod 600 {path}")
    elif facts.st_size != _SEED_BYTES:
        yield problem(
            name,
            f"{path} is damaged: {facts.st_size} bytes, expected {_SEED_BYTES}",
            "restore it, or delete it to get a new identity",
        )
    else:
        yield ok(name, f"{path}, readable by its owner only")


def _check_status(subject: Subject) -> Iterator[Finding]:
    path, name = subject.data_dir, "running node"
    waiting = len(list((path / "blocks").glob("*.block")))
    if not is_in_use(path):
        if waiting:
            yield warning(
                name, f"none; {waiting} found blocks wait for Bitcoin's answer", "start the node: it submits them"
            )
        else:
            yield ok(name, "none on this data directory")
        return
    status, owner = read_status(path), _owner_of(path)
    if status is None or status.get("pid") != owner:
        yield ok(name, f"process {owner or 'unknown'}, just started")
        return
    age_s = subject.clock() - float(status.get("time") or 0)
    found = f"process {owner}, height {status.get('height')}, {status.get('shares')} shares"
    if age_s > OLD_STATUS_S:
        yield warning(
            name,
            f"{found}; it has said nothing for {age_s:,.0f} s",
            "is its disk full, or does it hang? Look into its log, and start it again",
        )
    else:
        yield ok(name, f"{found}, {(status.get('network') or {}).get('state', 'without a network')}")


def _check_stratum_port(subject: Subject) -> Iterator[Finding]:
    config, name = subject.config, "stratum port"
    host, port = config.stratum_host, config.stratum_port
    if not port:
        yield ok(name, f"any free one of {host}")
        return
    reach = "miners on this machine only" if _is_loopback(host) else "for your miners; keep it from the internet"
    yield from _check_port(
        subject, name, host, port, "--stratum-host, --stratum-port", ok(name, f"{host}:{port}, {reach}")
    )


def _check_p2p_port(subject: Subject) -> Iterator[Finding]:
    config, name = subject.config, "p2p port"
    host, port = config.p2p_host, config.p2p_port
    try:
        ipaddress.ip_address(host)
    except ValueError:
        yield problem(name, f"--p2p-host {host} is not an IP address", "give one, such as 0.0.0.0 for all interfaces")
        return
    if port and port == config.stratum_port:
        yield problem(name, f"{port} is the Stratum port as well", "give --p2p-port or --stratum-port another number")
        return
    if not port:
        yield ok(name, f"any free one of {host}: others find it only by what we tell them")
        return
    if _is_loopback(host):
        free = ok(name, f"{host}:{port}, for nodes on this machine only")
    else:
        advice = (
            f"whether others can call it cannot be seen from here: if they shall, let TCP port {port} through the "
            "firewall and forward it in the router. It works without"
        )
        free = ok(name, f"{host}:{port}", advice)
    yield from _check_port(subject, name, host, port, "--p2p-host, --p2p-port", free)


def _check_port(subject: Subject, name: str, host: str, port: int, options: str, free: Finding) -> Iterator[Finding]:
    place = f"{host}:{port}"
    try:
        _try_port(host, port)
    except socket.gaierror as error:
        yield problem(name, f"{place}: {error.strerror}", f"name an interface of this machine with {options}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            yield _who_has(subject, name, place, port, options)
        elif error.errno == errno.EADDRNOTAVAIL:
            yield problem(name, f"{host} is no address of this machine", f"name one of its own with {options}")
        elif error.errno == errno.EACCES and port < _FIRST_FREE_PORT:
            yield problem(
                name, f"{place}: ports below {_FIRST_FREE_PORT} are root's", f"take a higher one with {options}"
            )
        else:
            yield problem(name, f"{place}: {error.strerror}", f"take another with {options}")
    else:
        yield free


def _try_port(host: str, port: int) -> None:
    """Bind every address of a host and let go; nobody can connect meanwhile. Raises: OSError."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection is no obstacle
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)


def _who_has(subject: Subject, name: str, place: str, port: int, options: str) -> Finding:
    holders = _listening_processes(port)
    running = _owner_of(subject.data_dir) if is_in_use(subject.data_dir) else None
    if running is not None and (running in holders or not holders):
        return ok(name, f"{place}, in use by the running node (process {running})")
    who = ", ".join(f"process {process} ({command})" for process, command in holders.items())
    return problem(
        name,
        f"{place} is in use by {who or 'another program, which this user may not see'}",
        f"stop that one (ss -ltnp sport = :{port} shows it), or take another port with {options}",
    )


def _listening_processes(port: int) -> dict[int, str]:
    """Who listens on a TCP port, by process id, as far as this user may know."""
    sockets: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        rows = [line.split() for line in lines]
        sockets |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    holders: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        try:
            if any(os.readlink(entry) in sockets for entry in (process / "fd").iterdir()):
                holders[int(process.name)] = (process / "comm").read_text().strip()
        except OSError:
            continue  # another user's, or gone
    return holders


def _check_peers(subject: Subject) -> Iterator[Finding]:
    config, name = subject.config, "other nodes"
    known = (subject.data_dir / "peers.json").exists()
    if config.peer:
        yield ok(name, f"{len(config.peer)} named with --peer are called")
    elif config.mdns:
        yield ok(name, "those of the local network are found (--mdns)")
    elif known:
        yield ok(name, "those that it has met before are called")
    elif config.params.bitcoin_network == "regtest":
        yield ok(name, "none is named: it runs alone until one calls")
    else:
        yield warning(
            name,
            "none is named, and none was met before: the node is a pool of its own until one calls it",
            "name one with --peer /ip4/ADDRESS/tcp/PORT/p2p/ID: the log of that node shows its address",
        )


def _check_files(subject: Subject) -> Iterator[Finding]:
    config, name = subject.config, "open files"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = config.max_inbound + config.max_outbound + len(config.peer) + OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= WANTED_FILES + others - OWN_FILES:
        yield ok(name, "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} may be open at once")
        return
    room = soft - others
    most = "" if hard in (resource.RLIM_INFINITY,) or hard >= WANTED_FILES else f" (above {hard:,} only root can)"
    advice = f"ulimit -n {WANTED_FILES} before the start{most}, or LimitNOFILE={WANTED_FILES} in the systemd unit"
    if room < 1:
        yield problem(name, f"{soft:,} may be open at once; other nodes and the database alone need {others}", advice)
    else:
        yield warning(name, f"{soft:,} may be open at once: enough for some {room:,} miners", advice)


def _check_ntp(_subject: Subject) -> Iterator[Finding]:
    name, program = "clock service", shutil.which("timedatectl")
    answer = None
    if program is not None:
        try:
            done = subprocess.run(
                [program, "show", "-p", "NTPSynchronized"],
                capture_output=True,
                text=True,
                timeout=NTP_S,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            answer = re.search(r"^NTPSynchronized=(yes|no)$", done.stdout, re.MULTILINE)
        except (subprocess.TimeoutExpired, OSError):
            pass
    if answer is None:
        yield ok(name, "whether the clock is kept by NTP cannot be seen here")
    elif answer[1] == "yes":
        yield ok(name, "the clock is kept by NTP")
    else:
        yield warning(
            name,
            "the clock is not kept by NTP, or not in step yet",
            "timedatectl set-ntp true, or another NTP program: shares with a wrong time wait or are refused",
        )


def _check_hasher(_subject: Subject) -> Iterator[Finding]:
    if hasher.IMPLEMENTATION == "rust":
        yield ok("hasher", "the Rust extension")
    else:
        yield warning(
            "hasher",
            "the Python twin: shares are checked some ten times slower than by the Rust extension",
            "install Rust (https://rustup.rs), then p2pool again (python -m pip install --force-reinstall --no-deps)",
        )


def _check_versions(_subject: Subject) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("versions", f"p2pool {__version__}, Python {python}, " + ", ".join(f"{n} {_version_of(n)}" for n in NAMED))
    try:
        from p2pool.p2p.hardening import check_library

        check_library()
    except ImportError as error:
        advice = "python -m pip install --force-reinstall p2pool: a package that it needs is missing or damaged"
        yield problem("versions", f"libp2p does not load: {error}", advice)
    except ConfigError as error:
        found, _, advice = str(error).partition(". Install it with: ")
        yield problem("versions", found, advice or "install that version")
    for name, relation, wanted in _requirements():
        if name == "libp2p":
            continue
        found = _version_of(name)
        is_right = found == wanted if relation == "==" else _numbers(found) >= _numbers(wanted)
        if not is_right:
            yield problem(
                "versions",
                f"{name} is {found}, needed is {relation} {wanted}",
                f"python -m pip install '{name}{relation}{wanted}'",
            )


def _requirements() -> Iterator[tuple[str, str, str]]:
    """What p2pool needs on every Python: name, "==" or ">=", version."""
    try:
        lines = importlib.metadata.requires("p2pool") or []
    except importlib.metadata.PackageNotFoundError:
        return  # run from its source: whoever does that has installed the rest by hand
    for line in lines:
        found = re.fullmatch(r"([\w.-]+)\s*(==|>=)\s*([\w.]+)", line)
        if found is not None:
            yield found[1], found[2], found[3]


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _owner_of(data_dir: Path) -> int | None:
    """The process that holds a data directory, as its lock says."""
    try:
        text = (data_dir / "lock").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on, as Linux calls it; "" where that cannot be seen."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    kind, longest = "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields.split()[4])
        if path.resolve().is_relative_to(mount) and len(mount) >= longest:
            kind, longest = rest.split()[0], len(mount)
    return kind


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _chown(path: Path) -> str:
    return f"chown -R USER {path}"


#: What is looked at on this machine, in the order in which it is told.
CHECKS: Final[Mapping[str, Callable[[Subject], Iterable[Finding]]]] = {
    "options": _check_options,
    "data directory": _check_directory,
    "sharechain": _check_database,
    "identity": _check_identity,
    "running node": _check_status,
    "stratum port": _check_stratum_port,
    "p2p port": _check_p2p_port,
    "other nodes": _check_peers,
    "open files": _check_files,
    "clock service": _check_ntp,
    "hasher": _check_hasher,
    "versions": _check_versions,
}
