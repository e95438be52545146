"""Who may import whom. ``docs/explanation/architecture.md`` says why; these tests keep it true."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Each room of the library imports only what stands above it.
SHARECHAIN_ORDER = (
    "errors",
    "params",
    "cbor",
    "tagged",
    "_native",
    "hasher",
    "difficulty",
    "share",
    "entry",
    "payout",
    "window",
    "coinbase",
    "validate",
    "waiting",
    "chain",
    "store",
    "simulation",
)
#: All that the library needs besides the standard library, as its users must install it.
SHARECHAIN_MAY = {"cbor2", "bitcoin.core", "sharechain"}
#: The world: clock, chance, disk, sockets, logs, other threads. The library is called with values instead.
WORLD = {"asyncio", "logging", "multiprocessing", "os", "pathlib", "plyvel", "random", "secrets", "select", "signal"}
WORLD |= {"socket", "ssl", "subprocess", "tempfile", "threading", "time", "trio", "urllib", "http"}
#: Files of the node that may touch the world; all others are pure.
IO_FILES = {
    *(
        "bench",
        "bench_bitcoin",
        "bench_hasher",
        "bench_network",
        "bench_stratum",
        "bench_template",
        "blocks",
        "cli",
        "cluster",
        "cluster_demo",
        "database",
        "demo",
        "doctor",
        "doctor_bitcoin",
        "lab",
        "miner",
        "node",
        "service",
    ),
    *("bitcoin_backend/kernel", "bitcoin_backend/rpc", "bitcoin_backend/nodes", "bitcoin_backend/jsonrpc"),
    *("bitcoin_backend/hashblock", "exchange", "stratum/server", "web/server"),
    *("p2p/__init__", "p2p/network", "p2p/blocks", "p2p/intake", "p2p/frames", "p2p/host", "p2p/lan", "p2p/hardening"),
}
IO_MODULES = {
    "trio",
    "socket",
    "plyvel",
    "plyvel_next",
    "time",
    "random",
    "secrets",
    "select",
    "libp2p",
    "pbk",
    "httpx",
    "zmq",
}
ROOMS = ("bitcoin_backend", "stratum", "p2p", "web")
NO_NAMES = {"utils", "util", "common", "base", "helpers", "helper", "manager", "misc"}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import anywhere in a file; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def room_of(path: Path, package: str) -> str:
    return path.relative_to(ROOT / package).with_suffix("").as_posix()


@pytest.mark.parametrize("path", files_of("sharechain"), ids=str)
def test_the_library_is_pure_and_knows_nothing_of_the_node(path: Path) -> None:
    for module, line in imports_of(path):
        where = f"{path}:{line}: imports {module}: "
        known = within(module, SHARECHAIN_MAY) or module.split(".")[0] in sys.stdlib_module_names
        assert known, where + "sharechain imports only the standard library, cbor2, bitcoin.core and itself"
        if (str(path.relative_to(ROOT)), module) == ("sharechain/hasher/__init__.py", "os.environ"):
            continue  # P2POOL_HASHER: which code computes a hash, never what it is.
        assert not within(module, WORLD), where + "the core never acts: time, chance and disk come in by argument"


@pytest.mark.parametrize("path", files_of("sharechain"), ids=str)
def test_a_file_of_the_library_imports_only_what_stands_above_it(path: Path) -> None:
    room = room_of(path, "sharechain").split("/")[0]
    if room == "__init__":
        assert not list(imports_of(path)), f"{path}: the package itself is empty, so that parts load alone"
        return
    assert room in SHARECHAIN_ORDER, f"{path}: give the new file its place in SHARECHAIN_ORDER"
    above = SHARECHAIN_ORDER[: SHARECHAIN_ORDER.index(room) + 1]
    for module, line in imports_of(path):
        parts = module.split(".")
        if parts[0] == "sharechain":
            assert parts[1] in above, f"{path}:{line}: {room} imports {module}, which stands below it"
            assert parts[1] != room or "/" in room_of(path, "sharechain"), f"{path}:{line}: imports itself"


@pytest.mark.parametrize("path", files_of("p2pool"), ids=str)
def test_rooms_of_the_node_do_not_import_one_another(path: Path) -> None:
    room = room_of(path, "p2pool").split("/")[0]
    for module, line in imports_of(path):
        other = module.split(".")[1] if module.startswith("p2pool.") else ""
        if room in ROOMS and other in ROOMS:
            assert other == room, f"{path}:{line}: {room} imports {module}: only the node joins the rooms"


@pytest.mark.parametrize("path", files_of("p2pool"), ids=str)
def test_only_the_listed_files_touch_the_world(path: Path) -> None:
    if room_of(path, "p2pool") in IO_FILES:
        return
    for module, line in imports_of(path):
        assert not within(module, IO_MODULES), f"{path}:{line}: imports {module}, but is not in IO_FILES: it is pure"


@pytest.mark.parametrize("path", files_of("sharechain") + files_of("p2pool"), ids=str)
def test_no_file_catches_everything_or_is_called_nothing(path: Path) -> None:
    assert path.stem not in NO_NAMES, f"{path}: a helper lives with its user"
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ExceptHandler):
            caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"all"}
            last = node.body[-1]
            passed_on = isinstance(last, ast.Raise) and last.exc is None  # cleans up and lets it pass
            bad = caught & {"all", "Exception", "BaseException"}
            assert passed_on or not bad, f"{path}:{node.lineno}: catches {bad}: name what can go wrong"
