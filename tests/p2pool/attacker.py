"""Those who attack a node over libp2p: bare connections whose frames are made by hand, and peers that lie.

    async with wire(address) as attacker:      # past the handshake; below it there are plain sockets
        await attacker.send(await attacker.open(protocol), b"garbage")
        await attacker.wait_closed()

    async with lying(address, network_id) as liar:     # speaks the protocols, and answers what it likes
        await liar.ask(GetPeers())

``tests/bench/hostile.py`` lets them loose on a process, ``tests/p2pool/test_hostile.py`` on a node in the test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.noise.transport import Transport as NoiseTransport

from p2pool.errors import PeerError
from p2pool.p2p import SYNC, Gossip, Link
from p2pool.p2p.host import Libp2pTransport
from p2pool.p2p.wire import (
    Announce,
    BlocksAfter,
    GetPeers,
    GetShares,
    Locate,
    Message,
    Status,
    Transactions,
    decode_message,
    encode_gossip,
    encode_message,
)
from tests.p2pool.test_hardening import Attacker, multistream, signed, subscribe

__all__ = ["Liar", "Wire", "address_parts", "lying", "new_seed", "status", "wire"]

#: Generous for a loaded machine; nothing waits for it unless something is wrong.
PATIENCE_S: Final = 60.0
#: Messages of one RPC of pubsub: what the hardening allows.
RPC_MESSAGES: Final = 64

_numbers = itertools.count(1)


def new_seed() -> bytes:
    """Of an identity that nobody had before."""
    return os.getpid().to_bytes(8, "big") + next(_numbers).to_bytes(24, "big")


def address_parts(address: str) -> tuple[str, int, str]:
    """Host, port and peer id of a whole multiaddr."""
    _, _, host, _, port, _, peer_id = address.split("/")
    return host, int(port), peer_id


def status(**changes: Any) -> Status:
    """The status of a node that has nothing, but for ``changes``."""
    fields: dict[str, Any] = {
        "tip": bytes(32),
        "height": 0,
        "total_work": 0,
        "listen_port": 0,
        "block_hash": bytes(32),
        "block_height": 0,
        "software": "attacker",
    }
    return Status(**{**fields, **changes})


class Wire(Attacker):
    """A connection past the handshake. Mutable fields: ``closed`` (set when the node hung up)."""

    def __init__(self, session: Any, seed: bytes) -> None:
        super().__init__(session, str(ID.from_pubkey(create_new_key_pair(seed).public_key)))
        self.seed = seed
        self.closed = trio.Event()

    async def drain(self) -> None:
        """Read and forget, until the node hangs up."""
        with suppress(IOException, trio.BrokenResourceError, trio.ClosedResourceError):
            while await self.session.read(2**16):
                pass
        self.closed.set()

    async def wait_closed(self) -> None:
        with trio.fail_after(PATIENCE_S):
            await self.closed.wait()

    async def open_topic(self, topic: str) -> int:
        """A stream of pubsub, subscribed to a topic."""
        stream_id = await self.open("/meshsub/1.1.0")
        await self.send_rpc(stream_id, subscribe(topic))
        return stream_id

    async def publish(self, stream_id: int, topic: str, payloads: Sequence[bytes], author: bytes | None = None) -> None:
        """Send messages of the topic, as their author or as one that relays another's."""
        for start in range(0, len(payloads), RPC_MESSAGES):
            batch = [
                signed(author or self.seed, next(_numbers), payload, topic)
                for payload in payloads[start : start + RPC_MESSAGES]
            ]
            await self.send_rpc(stream_id, rpc_pb2.RPC(publish=batch))

    async def publish_shares(
        self, stream_id: int, topic: str, shares: Sequence[bytes], author: bytes | None = None
    ) -> None:
        """The same with a share in each message."""
        await self.publish(stream_id, topic, [encode_gossip([share]) for share in shares], author)


@asynccontextmanager
async def wire(address: str, seed: bytes | None = None, *, reads: bool = True) -> AsyncIterator[Wire]:
    """Connect and shake hands as a stranger, and then do nothing but what is asked.

    Raises:
        IOException: the node hung up during the handshake.
    """
    host, port, peer_id = address_parts(address)
    seed = seed or new_seed()
    noise = NoiseTransport(create_new_key_pair(seed), noise_privkey=create_new_x25519_key_pair().private_key)
    async with await trio.open_tcp_stream(host, port) as tcp:
        raw = RawConnection(TrioTCPStream(tcp), True)
        with trio.fail_after(PATIENCE_S):
            await raw.write(multistream("/noise"))
            await _skip(raw.read, len(multistream("/noise")))
            session = await noise.secure_outbound(raw, ID.from_base58(peer_id))
            await session.write(multistream("/yamux/1.0.0"))
            await _skip(session.read, len(multistream("/yamux/1.0.0")))
        attacker = Wire(session, seed)
        async with trio.open_nursery() as nursery:
            if reads:
                nursery.start_soon(attacker.drain)
            yield attacker
            nursery.cancel_scope.cancel()


async def _skip(read: Callable[[int], Awaitable[bytes]], size: int) -> None:
    while size:
        data = await read(size)
        if not data:
            raise IOException("the node hung up during the handshake")
        size -= len(data)


class Liar:
    """A peer that speaks the protocols and says what it likes.

    Mutable fields: ``answers`` (by kind of request, what makes the answer), ``heard`` (requests of the node, by kind),
    ``lost`` (set when the node hung up).
    """

    def __init__(self, transport: Libp2pTransport, peer_id: str) -> None:
        self.transport = transport
        #: Of the node.
        self.node_id = peer_id
        self.answers: dict[type[Any], Callable[[Any], Message | bytes]] = {Status: lambda _: status()}
        self.heard: list[Any] = []
        self.lost = trio.Event()

    @property
    def peer_id(self) -> str:
        return self.transport.peer_id

    def may_enter(self, ip: str) -> bool:
        return True

    def opened(self, link: Link) -> bool:
        return True

    def closed(self, peer_id: str) -> None:
        self.lost.set()

    def gossip(self, message: Gossip) -> bool:
        return False

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        raise AssertionError(f"{peer_id} broke {rule}: {detail}")

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        message = decode_message(request, Status, Locate, GetShares, GetPeers, Announce, Transactions, BlocksAfter)
        self.heard.append(message)
        if type(message) not in self.answers:
            raise PeerError("gone", "says nothing")
        answer = self.answers[type(message)](message)
        return answer if isinstance(answer, bytes) else encode_message(answer)

    async def ask(self, message: Message | bytes, protocol: str = SYNC, timeout_s: float = 20.0) -> bytes:
        """Ask the node something. Raises: PeerError."""
        raw = message if isinstance(message, bytes) else encode_message(message)
        return await self.transport.request(self.node_id, protocol, raw, timeout_s)

    async def ask_until_lost(self, message: Message | bytes, protocol: str = SYNC) -> int:
        """Ask again and again until the node hangs up; how often."""
        count = 0
        while not self.lost.is_set():
            count += 1
            with suppress(PeerError):
                await self.ask(message, protocol)
            await trio.lowlevel.checkpoint()
        return count


@asynccontextmanager
async def lying(
    address: str,
    network_id: bytes,
    seed: bytes | None = None,
    *,
    answers: dict[type[Any], Callable[[Any], Message | bytes]] | None = None,
) -> AsyncIterator[Liar]:
    """A peer that called the node.

    Raises:
        PeerError: the node does not take it.
    """
    transport = Libp2pTransport(
        seed=seed or new_seed(), network_id=network_id, listen_host="127.0.0.1", listen_port=0, max_connections=20
    )
    liar = Liar(transport, address_parts(address)[2])
    liar.answers.update(answers or {})
    refused: PeerError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run, liar)
        try:
            await transport.connect(address)
        except PeerError as error:
            refused = error
        else:
            yield liar
        nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused
