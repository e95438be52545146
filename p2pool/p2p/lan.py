"""Nodes on the local network find one another, by mDNS (libp2p's form of it), without any configuration.

The type of service has the network's id in it, so that nodes of other networks do not see us. What is found is only an
address to try: anybody on the local network can announce anything.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import trio
import zeroconf

logger = logging.getLogger("p2pool.p2p")

#: Milliseconds for a node that announced itself to tell its addresses.
ANSWER_MS: Final = 3_000
#: Announcements that wait to be looked at; more than a home has.
MAX_WAITING: Final = 64
#: Letters of an address.
MAX_ADDRESS: Final = 256
#: Addresses taken of one announcement.
MAX_ADDRESSES: Final = 8


async def follow_lan(
    *,
    network_id: bytes,
    peer_id: str,
    addresses: Sequence[str],
    found: Callable[[str], None],
    interfaces: Any = zeroconf.InterfaceChoice.All,
) -> None:
    """Announce our addresses and tell of those of others, until cancelled. Without multicast: a line in the log.

    Args:
        network_id: of the sharechain; its first bytes name the service.
        addresses: whole multiaddrs of ours.
        found: called with each address that is announced, once for each announcement.
        interfaces: zeroconf's choice, or the IP addresses of interfaces.
    """
    # A label of a service type has at most 15 letters.
    kind = f"_p2p-{network_id[:5].hex()}._udp.local."
    send, receive = trio.open_memory_channel[str](MAX_WAITING)
    token = trio.lowlevel.current_trio_token()

    def changed(*, name: str, state_change: zeroconf.ServiceStateChange, **_: object) -> None:
        if state_change is not zeroconf.ServiceStateChange.Removed:  # Runs in zeroconf's thread.
            token.run_sync_soon(partial(_offer, send, name))

    in_thread = trio.to_thread.run_sync
    try:
        service = await in_thread(partial(zeroconf.Zeroconf, interfaces=interfaces))
    except OSError as error:
        logger.warning("nodes on the local network are not looked for: %s", error)
        return
    try:
        own = _announcement(kind, addresses)
        await in_thread(partial(service.register_service, own, strict=False))
        browser = await in_thread(partial(zeroconf.ServiceBrowser, service, kind, handlers=[changed]))
        logger.debug("looking for nodes on the local network as %s", browser.types)
        async for name in receive:
            if name == own.name:
                continue
            info = zeroconf.ServiceInfo(kind, name)
            await in_thread(info.request, service, ANSWER_MS)
            for address in _addresses(info):
                if not address.endswith(f"/p2p/{peer_id}"):
                    found(address)
    except (zeroconf.Error, OSError) as error:
        logger.warning("nodes on the local network are no longer looked for: %s", error)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(service.close)  # Says farewell too.


def _offer(send: trio.MemorySendChannel[str], name: str) -> None:
    try:
        send.send_nowait(name)
    except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
        logger.debug("an announcement on the local network was dropped")


def _announcement(kind: str, addresses: Sequence[str]) -> zeroconf.ServiceInfo:
    host = secrets.token_hex(16)
    parts = [address.split("/") for address in addresses[:MAX_ADDRESSES]]
    return zeroconf.ServiceInfo(
        kind,
        f"{host}.{kind}",
        port=int(parts[0][4]) if parts else 0,
        properties={f"dnsaddr{number or ''}": address for number, address in enumerate(addresses[:MAX_ADDRESSES])},
        server=f"{host}.local.",
        # Nobody needs them, but zeroconf waits for them.
        parsed_addresses=[part[2] for part in parts],
    )


def _addresses(info: zeroconf.ServiceInfo) -> list[str]:
    """The multiaddrs of an announcement, as far as it has come."""
    found = []
    for key, value in info.properties.items():
        if key.startswith(b"dnsaddr") and value is not None and len(value) <= MAX_ADDRESS:
            address = value.decode("ascii", "replace")
            if "/p2p/" in address and address.isprintable():
                found.append(address)
    return found[:MAX_ADDRESSES]
