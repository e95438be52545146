"""Runs a node or a miner as a process: signals, the Bitcoin node, the listening port, the end."""

from __future__ import annotations

import logging
import math
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import trio

from p2pool.config import Config
from p2pool.database import DataDirectory
from p2pool.errors import ConfigError
from p2pool.miner import Miner, MinerEvent, MinerStatistics, mine
from p2pool.node import Node, script_of
from p2pool.p2p.network import Network, NetworkDesk
from p2pool.p2p.peers import PeerBook, PeerLimits
from p2pool.stratum.server import ServerSettings, open_listeners
from p2pool.stratum.tls import load_certificate
from p2pool.stratum.vardiff import VardiffSettings

if TYPE_CHECKING:
    from p2pool.bitcoin_backend.jsonrpc import Endpoint
    from p2pool.bitcoin_backend.kernel import KernelBackend
    from p2pool.bitcoin_backend.rpc import RpcBackend

__all__ = ["bitcoin_endpoints", "embeds_bitcoin", "open_bitcoin", "run_miner", "run_node", "until_signal"]

logger = logging.getLogger("p2pool")

#: Between two lines about accepted submissions.
MINER_INTERVAL_S: Final = 2.0


async def until_signal(job: Callable[[], Awaitable[None]]) -> None:
    """Run ``job`` until it ends or the process is told to stop (SIGINT, SIGTERM, SIGHUP).

    Another signal while it stops changes nothing: it is stopping.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    logger.info("%s: stopping", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await job()
            nursery.cancel_scope.cancel()


def run_node(config: Config, *, beside: Callable[[KernelBackend], Awaitable[None]] | None = None) -> None:
    """Run a node until it is told to stop.

    Args:
        config: what the operator chose.
        beside: runs with the node, on its embedded Bitcoin: for demonstrations and experiments.

    Raises:
        ConfigError: what the operator asked for cannot be done.
        BackendError: the Bitcoin node cannot be reached or opened.
        StoreError: the stored sharechain is damaged or another network's.
    """
    trio.run(until_signal, lambda: _run_node(config, beside))


def embeds_bitcoin(config: Config) -> bool:
    """Whether the node runs a Bitcoin of its own: on regtest, unless a Bitcoin node is named."""
    return config.params.bitcoin_network == "regtest" and not config.bitcoind


@asynccontextmanager
async def open_bitcoin(config: Config, *, wait: bool = True) -> AsyncIterator[KernelBackend | RpcBackend]:
    """The Bitcoin that the operator chose, as long as the context lasts; a node that is not there yet is waited for.

    Args:
        config: what the operator chose.
        wait: for a Bitcoin node that is not there, and begin a chain if there is no embedded one.

    Raises:
        ConfigError: what the operator asked for cannot be done.
        BackendError: the embedded Bitcoin cannot be opened, or no node is there and none is waited for.
    """
    if embeds_bitcoin(config):
        from p2pool.bitcoin_backend.kernel import KernelBackend

        if not wait and not (config.data_dir / "bitcoin").is_dir():
            raise ConfigError(f"{config.data_dir} has no Bitcoin of its own: name a Bitcoin node with --bitcoind")
        backend = await trio.to_thread.run_sync(KernelBackend.open, config.data_dir / "bitcoin")
        try:
            yield backend
        finally:
            with trio.CancelScope(shield=True):
                await backend.aclose()
        return
    from p2pool.bitcoin_backend.hashblock import check_zmq
    from p2pool.bitcoin_backend.rpc import connect_bitcoin
    from p2pool.bitcoin_backend.selection import coinbase_reserve

    for address in config.zmq:
        check_zmq(address)
    weight, sigops = coinbase_reserve(max(config.params.payout_classes))
    async with connect_bitcoin(
        bitcoin_endpoints(config),
        network=config.params.bitcoin_network,
        reserved_weight=weight,
        reserved_sigops=sigops,
        zmq=config.zmq if wait else (),
        wait=wait,
    ) as rpc:
        node = rpc.nodes.active
        logger.info("Bitcoin node %s (%s) at block %d is used", node.name, node.agent or "no name", node.height)
        yield rpc


def bitcoin_endpoints(config: Config) -> list[Endpoint]:
    """The Bitcoin nodes that the operator named; one on this machine if there is none.

    Raises:
        ConfigError: user and password do not go together.
    """
    from p2pool.bitcoin_backend.jsonrpc import parse_endpoint

    try:
        return [
            parse_endpoint(
                text,
                network=config.params.bitcoin_network,
                cookie_file=config.cookie_file,
                user=config.rpc_user,
                password=config.rpc_password,
            )
            for text in config.bitcoind or ("127.0.0.1",)
        ]
    except ValueError as error:
        raise ConfigError(f"--bitcoind: {error}") from None


async def _run_node(config: Config, beside: Callable[[KernelBackend], Awaitable[None]] | None) -> None:
    if config.address is not None:
        script_of(config.address, config.params)  # told before a Bitcoin node is waited for
    directory = DataDirectory(config.data_dir, config.params)
    try:
        async with open_bitcoin(config) as backend:
            node = Node(
                directory=directory,
                params=config.params,
                backend=backend,
                stratum=_stratum_settings(config),
                default_address=config.address,
                payout_classes=config.payout_class,
                shares_per_window=config.shares_per_window,
                network=partial(_build_network, config, directory),
            )
            listeners = _open_stratum(config)
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run, listeners)
                if beside is not None:
                    assert embeds_bitcoin(config), "what runs beside a node needs its own Bitcoin"
                    nursery.start_soon(beside, cast("KernelBackend", backend))
                chain = node.statistics().chain
                logger.info(
                    "network %s (%s), %d shares, height %d; data in %s",
                    config.params.name,
                    config.params.network_id.hex(),
                    chain.shares,
                    chain.height,
                    config.data_dir,
                )
                for address in node.network.addresses if node.network is not None else ():
                    logger.info("nodes connect to %s", address)
                for host, port in node.server.addresses:
                    logger.info("miners connect to stratum+tcp://%s:%d, user name: their Bitcoin address", host, port)
    finally:
        directory.close()


def _stratum_settings(config: Config) -> ServerSettings:
    return ServerSettings(
        vardiff=VardiffSettings(target_interval_s=config.vardiff_interval, start_difficulty=config.start_difficulty),
        start_difficulties={
            port: difficulty for _, port, difficulty in config.stratum_listen if difficulty is not None
        },
        tls=None if config.stratum_tls is None else load_certificate(*config.stratum_tls),
        proxies=config.stratum_proxy,
        max_per_ip=config.stratum_max_per_ip,
    )


def _open_stratum(config: Config) -> list[socket.socket]:
    """All that miners may connect to, or nothing."""
    listeners: list[socket.socket] = []
    try:
        for host, port in [(config.stratum_host, config.stratum_port), *(one[:2] for one in config.stratum_listen)]:
            listeners += open_listeners(host, port)
    except ConfigError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _build_network(config: Config, directory: DataDirectory, desk: NetworkDesk) -> Network:
    """The network round a node: its identity, what it knows of others, and libp2p."""
    from p2pool.p2p.hardening import check_library
    from p2pool.p2p.host import Libp2pTransport, load_identity

    check_library()
    heard: list[Network] = []
    transport = Libp2pTransport(
        seed=load_identity(directory.identity_file),
        network_id=config.params.network_id,
        listen_host=config.p2p_host,
        listen_port=config.p2p_port,
        max_connections=config.max_inbound + config.max_outbound + len(config.peer) + 8,
        mdns=config.mdns,
        found=lambda address: heard[0].heard_of(address),
    )
    limits = PeerLimits(max_inbound=config.max_inbound, max_outbound=config.max_outbound)
    encoded = directory.load_peers()
    book = None
    if encoded is not None:
        try:
            book = PeerBook.decode(encoded, limits, own_id=transport.peer_id, fixed=config.peer)
        except ValueError as error:
            logger.warning("what was known of other nodes is lost: %s", error)
    if book is None:
        book = PeerBook(limits, own_id=transport.peer_id, fixed=config.peer)
    network = Network(
        desk,
        transport,
        book,
        clock=time.time,
        choose=random.SystemRandom(),
        expects_peers=config.mdns,
        save=directory.save_peers,
    )
    heard.append(network)
    return network


def run_miner(
    *, host: str, port: int, user: str, password: str, threads: int, seconds: float | None
) -> MinerStatistics:
    """Mine until interrupted, or for some seconds; progress goes to standard error.

    Returns:
        What was done.

    Raises:
        P2PoolError: the pool refused us.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    last = MinerStatistics(hashes=0, hash_rate=0.0, accepted=0, rejected={}, difficulty=0.0)
    shown_at = -math.inf

    def show(event: MinerEvent) -> None:
        nonlocal last, shown_at
        last = event.statistics
        is_news = event.kind in ("connected", "rejected", "disconnected")
        if is_news or (event.kind == "accepted" and trio.current_time() - shown_at >= MINER_INTERVAL_S):
            shown_at = trio.current_time()
            console.print(
                f"{event.kind}: {event.text} [{event.statistics.hash_rate / 1e6:.2f} MH/s, "
                f"{event.statistics.accepted} accepted, {sum(event.statistics.rejected.values())} rejected]",
                markup=False,
            )

    async def work() -> None:
        nonlocal last
        miner: Miner | None = None
        with trio.move_on_after(math.inf if seconds is None else seconds):
            async with trio.open_nursery() as nursery:
                try:
                    client = partial(mine, host=host, port=port, user=user, password=password, threads=threads)
                    miner = await nursery.start(partial(client, on_event=show))
                    await trio.sleep_forever()
                finally:
                    if miner is not None:
                        last = miner.statistics()

    trio.run(until_signal, work)
    return last
