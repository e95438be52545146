"""The benchmark of a fresh sync: two real nodes in two processes over loopback, beside a bare libp2p stream.

The node that serves has a chain of real shares: proof of work, coinbases of the largest class, thousands of miners. The
one that syncs judges every share by every rule and stores it, as any node does.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from p2pool.bench import (
    BLOCK_BITS,
    BLOCK_HASH,
    BLOCK_HEIGHT,
    VALUE,
    Row,
    make_row,
    mine_share,
    miner_scripts,
    window_params,
    winners,
)
from p2pool.bitcoin_backend import BlockTemplate, HeaderFacts, SubmitResult
from p2pool.bitcoin_backend.template import build_template
from p2pool.database import DataDirectory
from p2pool.node import Node
from p2pool.p2p import SYNC, Gossip, Link
from p2pool.p2p.network import Network
from p2pool.p2p.peers import PeerBook, PeerLimits
from p2pool.report import load_chain
from sharechain.chain import Accepted, Sharechain
from sharechain.params import Params, decode_params
from sharechain.share import Share
from sharechain.validate import BlockFacts

__all__ = ["StillBitcoin", "bench_sync"]

#: Bytes that the bare stream moves: as much as the frames of a sync are large, so many times.
FRAME: Final = 1024 * 1024
FRAMES: Final = 64
#: Seconds after which a sync has failed.
PATIENCE_S: Final = 600.0


def bench_sync(quick: bool) -> Iterator[Row]:
    """Fresh syncs of whole chains, and of one whose beginning everybody has forgotten."""
    yield from _bench_stream()
    if quick:
        yield from _bench_fresh(1_000, 8_640)
        return
    yield from _bench_fresh(8_640, 8_640)
    yield from _bench_fresh(60_480, 60_480)
    yield from _bench_fresh(20_000, 8_640)


def _bench_fresh(count: int, window: int) -> Iterator[Row]:
    params = window_params(window)
    with tempfile.TemporaryDirectory(prefix="p2pool-bench-") as scratch:
        source = Path(scratch) / "source"
        size = _fill(source, params, count)
        with _serving("node", str(source), params.encoded.hex()) as address:
            seconds, held = trio.run(_sync, Path(scratch) / "fresh", params, address, count)
    case = f"{held} of {count} shares, window {window}"
    yield make_row(case, "fresh sync", seconds, "s")
    yield make_row(case, "fresh sync", held / seconds, "shares/s")
    yield make_row(case, "fresh sync", size * held / count / seconds / 1e6, "MB/s")


def _bench_stream() -> Iterator[Row]:
    with _serving("stream") as address:
        seconds = trio.run(_pull, address)
    yield make_row("reference: a bare stream", "1 MiB answers", FRAMES * FRAME / seconds / 1e6, "MB/s")


def _fill(path: Path, params: Params, count: int) -> int:
    """A data directory with a chain of real shares. Returns their bytes."""
    directory = DataDirectory(path, params)
    try:
        chain = load_chain(params, directory.store)
        facts = {BLOCK_HASH: BlockFacts(height=BLOCK_HEIGHT, next_bits=BLOCK_BITS)}
        chain.learn_block(BLOCK_HASH, facts[BLOCK_HASH], 0.0)
        size = 0
        for number, share in enumerate(_shares(chain, count)):
            change = chain.accept(share, time.time())
            assert isinstance(change, Accepted), change
            directory.store.write(change, first_seen_ms=0, facts={} if number else facts, sync=False)
            directory.note_written()
            size += len(share.encoded)
    finally:
        directory.close()
    return size


def _shares(chain: Sharechain, count: int) -> Iterator[Share]:
    scripts = miner_scripts()
    for miner in winners(count):
        yield mine_share(chain, scripts[miner])


async def _sync(path: Path, params: Params, address: str, count: int) -> tuple[float, int]:
    """Seconds until a fresh node has the tip, and how many shares it then holds."""
    directory = DataDirectory(path, params)
    try:
        async with trio.open_nursery() as nursery:
            node = _node(directory, params, [address])
            started = time.perf_counter()
            await nursery.start(node.run, [])
            with trio.fail_after(PATIENCE_S):
                while node.chain.tip is None or node.chain.tip.height < count - 1:  # noqa: ASYNC110 - a node has no event for it
                    await trio.sleep(0.01)
            seconds = time.perf_counter() - started
            held = len(node.chain)
            nursery.cancel_scope.cancel()
    finally:
        directory.close()
    return seconds, held


def _node(directory: DataDirectory, params: Params, peers: Sequence[str]) -> Node:
    from p2pool.p2p.host import Libp2pTransport
    from p2pool.p2p.identity import load_identity

    transport = Libp2pTransport(
        seed=load_identity(directory.identity_file),
        network_id=params.network_id,
        listen_host="127.0.0.1",
        listen_port=0,
        max_connections=16,
    )
    book = PeerBook(PeerLimits(), own_id=transport.peer_id, fixed=peers)
    return Node(
        directory=directory,
        params=params,
        backend=StillBitcoin(),
        network=lambda desk: Network(desk, transport, book, clock=time.time, choose=random.Random(1)),
    )


class StillBitcoin:
    """A Bitcoin of one block, which stands still: a sync asks no more of it."""

    network = "regtest"

    async def block_template(self) -> BlockTemplate:
        return build_template(
            version=0x20000000,
            previous_block_hash=BLOCK_HASH,
            height=BLOCK_HEIGHT + 1,
            bits=BLOCK_BITS,
            min_time=1,
            time=int(time.time()),
            coinbase_value=VALUE,
            transactions=(),
        )

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        if block_hash != BLOCK_HASH:
            return None
        return HeaderFacts(block_hash=BLOCK_HASH, height=BLOCK_HEIGHT, next_bits=BLOCK_BITS, median_time=0)

    async def is_on_chain(self, block_hash: bytes) -> bool:
        return block_hash == BLOCK_HASH

    async def submit_block(self, raw: bytes) -> SubmitResult:
        return SubmitResult(accepted=False, reason=f"a block of {len(raw)} bytes: this Bitcoin takes none")

    async def tip(self) -> HeaderFacts:
        facts = await self.header_facts(BLOCK_HASH)
        assert facts is not None
        return facts

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        await trio.sleep(math.inf if timeout is None else timeout)
        return known

    async def aclose(self) -> None:
        pass


class _Bare:
    """A transport's handler that serves one frame for ever."""

    def may_enter(self, ip: str) -> bool:
        return bool(ip)

    def opened(self, link: Link) -> bool:
        return bool(link.peer_id)

    def closed(self, peer_id: str) -> None:
        pass

    def gossip(self, message: Gossip) -> bool:
        return not message.payload

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        return bytes(FRAME) if peer_id and protocol == SYNC else request

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        raise AssertionError(f"{peer_id or ip} broke {rule}: {detail}")


def _bare_transport(seed: bytes) -> Any:
    from p2pool.p2p.host import Libp2pTransport

    return Libp2pTransport(seed=seed, network_id=bytes(8), listen_host="127.0.0.1", listen_port=0, max_connections=16)


async def _pull(address: str) -> float:
    transport = _bare_transport(b"\x02" * 32)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run, _Bare())
        peer_id = await transport.connect(address)
        await transport.request(peer_id, SYNC, b"?", 60.0)
        started = time.perf_counter()
        for _ in range(FRAMES):
            await transport.request(peer_id, SYNC, b"?", 60.0)
        seconds = time.perf_counter() - started
        nursery.cancel_scope.cancel()
    return seconds


@contextmanager
def _serving(*arguments: str) -> Iterator[str]:
    """Another process that serves; gives its address."""
    code = "import sys; from p2pool.bench_network import serve; serve(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def serve(arguments: Sequence[str]) -> None:
    """What the other process does, until it is killed."""
    trio.run(_serve, arguments)


async def _serve(arguments: Sequence[str]) -> None:
    async with trio.open_nursery() as nursery:
        if arguments[0] == "stream":
            transport = _bare_transport(b"\x01" * 32)
            await nursery.start(transport.run, _Bare())
            addresses = transport.addresses
        else:
            params = decode_params(bytes.fromhex(arguments[2]))
            node = _node(DataDirectory(Path(arguments[1]), params), params, [])
            await nursery.start(node.run, [])
            assert node.network is not None
            addresses = node.network.addresses
        print(json.dumps(addresses[0]), flush=True)
