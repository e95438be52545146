"""What nodes say to one another, and how. Importing this package does not load libp2p.

``Transport`` is all that the rest asks of a network: libp2p is one (``host``), the simulated network of the tests is
another. A transport moves bytes, tells who is connected, and knows nothing of shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import trio

__all__ = ["BLOCK", "SYNC", "Gossip", "Link", "Traffic", "Transport", "TransportHandler"]

#: The two request protocols, as a transport is asked for them. On the wire: ``/p2pool/<network id>/sync/1``.
SYNC: Final = "sync/1"
BLOCK: Final = "block/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One connected peer, as the transport sees it."""

    #: As libp2p writes it, base58.
    peer_id: str
    #: Address and port of the other end of the connection.
    ip: str
    port: int
    #: Whether the peer called us.
    inbound: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gossip:
    """One message of the topic of shares."""

    #: The connected peer that sent it to us.
    bearer: str
    #: The peer that wrote and signed it.
    author: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of all connections since the start."""

    received: int
    sent: int


class TransportHandler(Protocol):
    """What a transport tells whoever uses it. All but ``serve`` are called in one synchronous stretch."""

    def may_enter(self, ip: str) -> bool:
        """Whether an address may connect at this moment. Asked before any handshake; costs microseconds."""

    def opened(self, link: Link) -> bool:
        """A handshake is done. False refuses the peer: the transport closes the connection, and tells no more of it."""

    def closed(self, peer_id: str) -> None:
        """The last connection to a peer that was taken is gone."""

    def gossip(self, message: Gossip) -> bool:
        """A message of the topic. Whether to relay it."""

    async def serve(self, peer_id: str, protocol: str, request: bytes) -> bytes:
        """Answer one request.

        Args:
            peer_id: who asks; a peer that was taken.
            protocol: ``SYNC`` or ``BLOCK``.
            request: one frame, without its length.

        Returns:
            One frame, without its length.

        Raises:
            PeerError: the request breaks the protocol. The handler has judged the peer; the transport resets the
                stream.
        """

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str) -> None:
        """The transport itself saw a peer or an address break a rule of the wire."""


class Transport(Protocol):
    """Connections to peers.

    Every method may be called only while ``run`` runs, but for the properties.
    """

    @property
    def peer_id(self) -> str:
        """Our own identity, base58."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we listen: whole multiaddrs, ending in ``/p2p/<peer id>``. Empty before ``run`` has started."""

    @property
    def links(self) -> tuple[Link, ...]:
        """All peers that are connected and were taken."""

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""

    async def run(
        self, handler: TransportHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; then close every connection. Started when it listens.

        Raises:
            ConfigError: the port is in use, or cannot be listened on.
        """

    async def connect(self, address: str) -> str:
        """Call a peer; returns when the handshake is done and the handler has taken the peer.

        Args:
            address: a whole multiaddr, ending in ``/p2p/<peer id>``.

        Returns:
            Its peer id. At once if it is connected already.

        Raises:
            PeerError: it cannot be reached, is somebody else, or was refused.
        """

    async def disconnect(self, peer_id: str) -> None:
        """End all connections to a peer; ``closed`` follows. Nothing happens if there is none."""

    async def request(self, peer_id: str, protocol: str, request: bytes, timeout_s: float) -> bytes:
        """Send one frame and wait for the answer. One stream is kept for each peer and protocol; requests on it queue.

        Args:
            peer_id: a connected peer.
            protocol: ``SYNC`` or ``BLOCK``.
            request: one frame, without its length.
            timeout_s: seconds that the answer may take, from when the request is first in the queue.

        Raises:
            PeerError: not connected, no answer in time, the stream broke, or the answer is larger than the protocol
                allows. ``rule`` tells which; only "frame" is the peer's fault for certain, and blaming it is left to
                the caller.
        """

    async def publish(self, payload: bytes) -> None:
        """Give a message of our own to the topic. It may get lost."""
