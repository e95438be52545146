"""Where nodes can be called: reading addresses, what an IP address is to us, and the book that remembers them.

An address is believed in three steps: somebody told it (counted against the teller), a peer that is connected from it
says that it listens there (its id and IP are proven, the port is its word), we have reached it ourselves.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from p2pool.p2p.wire import MAX_ADDRESS

__all__ = ["Address", "AddressBook", "BookLimits", "Known", "Place", "address_of", "parse_address", "place_of"]

#: Failed calls after which an address that never answered is forgotten.
FORGET_AFTER: Final = 5
#: The same for one that did: this many calls, and this many seconds since it last answered.
FORGET_REACHED_AFTER: Final = 10
FORGET_REACHED_S: Final = 7 * 86_400.0

_EXAMPLE: Final = "/ip4/198.51.100.7/tcp/9338/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
#: A name, its labels of 63 letters at most; the last has a letter, or it would be a form of an IP address.
_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*(?=[a-z0-9_-]{1,63}\Z)[a-z0-9_-]*[a-z][a-z0-9-]*"
)
_BASE58: Final = {letter: n for n, letter in enumerate("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")}
#: First bytes and length of the multihashes that are peer ids: an Ed25519 or a secp256k1 key, or SHA-256 of any key.
_ID_SHAPES: Final = ((b"\x00\x24\x08\x01\x12\x20", 38), (b"\x00\x25\x08\x02\x12\x21", 39), (b"\x12\x20", 34))
_PRIVATE: Final = (
    *("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
    *("fc00::/7", "fe80::/10"),
)
#: Reserved, documentation, benchmarks, multicast (RFC 6890 and its registry): nobody answers there.
_NOWHERE: Final = (
    *("0.0.0.0/8", "192.0.0.0/24", "192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    *("::/8", "100::/64", "2001:db8::/32", "3fff::/20", "ff00::/8"),
)
_PRIVATE_NETWORKS: Final = tuple(map(ipaddress.ip_network, _PRIVATE))
_NOWHERE_NETWORKS: Final = tuple(map(ipaddress.ip_network, _NOWHERE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a node can be called, and who must answer there."""

    #: An IP address, or a name for the DNS.
    host: str
    is_name: bool
    port: int
    #: Base58.
    peer_id: str
    #: The whole multiaddr, in its one canonical form.
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What an IP address is to us."""

    #: "loopback", "private", "public", or "nowhere" for what cannot be called.
    kind: str
    #: What counts as one machine, and as one network.
    machine: str
    network: str

    @property
    def is_local(self) -> bool:
        return self.kind in ("loopback", "private")

    def may_hear_of(self, other: Place) -> bool:
        """Whether somebody here can make use of, and may be trusted with, an address there."""
        if other.kind == "public":
            return True
        return other.kind == self.kind == "loopback" or (other.kind == "private" and self.is_local)


@lru_cache(maxsize=4_096)
def place_of(ip: str) -> Place:
    try:
        address = plain_ip(ip)
    except ValueError:
        return Place(kind="nowhere", machine=ip, network=ip)
    if address.is_loopback:
        return Place(kind="loopback", machine="loopback", network="loopback")
    if any(address in network for network in _PRIVATE_NETWORKS):
        kind = "private"
    else:
        kind = "nowhere" if any(address in network for network in _NOWHERE_NETWORKS) else "public"
    wide, narrow = (16, 32) if address.version == 4 else (32, 64)
    network = ipaddress.ip_network((address, wide), strict=False)
    machine = str(address) if narrow == 32 else str(ipaddress.ip_network((address, narrow), strict=False))
    return Place(kind=kind, machine=machine, network=str(network))


def plain_ip(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without the zone of a link-local address; IPv4 where a socket for both writes it as IPv6."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if address.version == 6 and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_address(text: str) -> Address:
    """Read where a node can be called: ``/ip4/198.51.100.7/tcp/9338/p2p/12D3KooW...``.

    Only this shape is taken, with ip4, ip6, dns, dns4 or dns6: TCP is all that is spoken, and without the peer id
    anybody could answer. One address has one text, so that the book can compare.

    Raises:
        ValueError: says what is wrong, and shows an address as it should be.

    Source: the multiaddr and peer id specifications of libp2p.
    """
    if len(text) > MAX_ADDRESS:
        raise _no_address(text[:40] + "...", f"at most {MAX_ADDRESS} letters are taken, got {len(text)}")
    parts = text.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
        raise _no_address(text, "the shape is /ip4/ADDRESS/tcp/PORT/p2p/PEER-ID, with ip4, ip6, dns, dns4 or dns6")
    _, kind, host, _, port, _, peer_id = parts
    if kind in ("ip4", "ip6"):
        try:
            if "%" in host or (":" in host) != (kind == "ip6"):
                raise ValueError
            ip = plain_ip(host)
        except ValueError:
            raise _no_address(text, f"{host!r} is no IPv{kind[2]} address") from None
        kind, host, is_name = f"ip{ip.version}", str(ip), False
    elif kind in ("dns", "dns4", "dns6"):
        host, is_name = host.lower(), True
        if not _NAME.fullmatch(host):
            raise _no_address(text, f"{host!r} is no name for the DNS (an IP address goes behind /ip4/ or /ip6/)")
    else:
        raise _no_address(text, f"{kind!r} is not ip4, ip6, dns, dns4 or dns6")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise _no_address(text, f"a port is a number from 1 to 65535, got {port!r}")
    if not _is_peer_id(peer_id):
        raise _no_address(text, f"{peer_id!r} is no peer id (base58; it begins with 12D3KooW, 16Uiu2 or Qm)")
    canonical = f"/{kind}/{host}/tcp/{int(port)}/p2p/{peer_id}"
    return Address(host=host, is_name=is_name, port=int(port), peer_id=peer_id, text=canonical)


def _no_address(text: str, why: str) -> ValueError:
    return ValueError(f"{text!r} is no address of a node: {why}. Example: {_EXAMPLE}")


def _is_peer_id(text: str) -> bool:
    if not 44 <= len(text) <= 56:
        return False
    number = 0
    try:
        for letter in text:
            number = number * 58 + _BASE58[letter]
    except KeyError:
        return False
    zeros = len(text) - len(text.lstrip("1"))
    raw = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    return any(len(raw) == length and raw.startswith(start) for start, length in _ID_SHAPES)


def address_of(ip: str, port: int, peer_id: str) -> Address | None:
    """The address of a connection; None if there is none that could be called."""
    try:
        plain = plain_ip(ip)
        return parse_address(f"/ip{plain.version}/{plain}/tcp/{port}/p2p/{peer_id}")
    except ValueError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class BookLimits:
    """How many addresses are remembered."""

    total: int = 1_000
    #: In one public network, of one public machine, and told (and not reached yet) by one public network.
    per_network: int = 32
    per_machine: int = 4
    per_source: int = 32
    #: The same three for a private network and loopback.
    local: int = 256


def _backoff(failures: int, span_s: tuple[float, float]) -> float:
    return min(span_s[0] * 2.0 ** min(failures - 1, 60), span_s[1]) if failures else 0.0


@dataclass(slots=True, kw_only=True)
class Known:
    """An address, and how calls to it went. Mutable: all but the address and who told it."""

    address: Address
    #: Network of who told it first.
    source: str
    heard_at: float = 0.0
    tried_at: float = 0.0
    reached_at: float | None = None
    failures: int = 0
    #: Of the address; nowhere for a name.
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.place = place_of(self.address.host)

    def is_due(self, now: float, backoff_s: tuple[float, float]) -> bool:
        """Whether to call it again. A clock that was set back is no reason to wait."""
        return not self.tried_at <= now < self.tried_at + _backoff(self.failures, backoff_s)

    def is_worthless(self, now: float) -> bool:
        if self.reached_at is None:
            return self.failures >= FORGET_AFTER
        return self.failures >= FORGET_REACHED_AFTER and now - self.reached_at >= FORGET_REACHED_S


def _badness(known: Known) -> tuple[int, float]:
    return known.failures, -known.heard_at


class AddressBook:
    """The addresses that are remembered, within the limits.

    Mutable fields: ``entries`` by text; ``_networks`` and ``_machines`` count them by where they lead,
    ``_sources`` by who told them, only those never reached: what we know ourselves is nobody's word.
    """

    def __init__(self, limits: BookLimits) -> None:
        self._limits = limits
        self.entries: dict[str, Known] = {}
        self._networks: Counter[str] = Counter()
        self._machines: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()

    def add(self, known: Known, *, is_source_local: bool) -> bool:
        """Take an address in, in the place of a worse one if there is no room. Whether it was new and taken."""
        limits = self._limits
        place = known.place
        if known.address.text in self.entries or place.kind == "nowhere":
            return False
        rooms: tuple[tuple[Counter[str], str, int, Callable[[Known], str]], ...] = (
            (
                self._sources if known.reached_at is None else Counter(),
                known.source,
                limits.local if is_source_local else limits.per_source,
                lambda other: other.source,
            ),
            (
                self._networks,
                place.network,
                limits.local if place.is_local else limits.per_network,
                lambda other: other.place.network,
            ),
            (
                self._machines,
                place.machine,
                limits.local if place.is_local else limits.per_machine,
                lambda other: other.place.machine,
            ),
        )
        leave: dict[str, Known] = {}
        for count, key, most, key_of in rooms:
            if count[key] < most:
                continue
            candidates = [old for old in self.entries.values() if key_of(old) == key and self._gives_way(old, known)]
            if not candidates:
                return False
            worst = max(candidates, key=_badness)
            leave[worst.address.text] = worst
        if len(self.entries) - len(leave) >= limits.total:
            candidates = self._of_fullest_source() or [old for old in self.entries.values() if old.failures > 1]
            if not candidates:
                return False
            worst = max(candidates, key=_badness)
            leave[worst.address.text] = worst
        for old in leave.values():
            self.drop(old)
        self.entries[known.address.text] = known
        self._count(known, 1)
        return True

    @staticmethod
    def _gives_way(old: Known, new: Known) -> bool:
        """A word gives way to what is known; among words, one that a call has disproved to one untested."""
        return old.reached_at is None and (new.reached_at is not None or old.failures > 0)

    def _of_fullest_source(self) -> list[Known]:
        """Whoever told most pays: to push out the words of others, an attacker needs more networks than they have."""
        fullest = max(self._sources, key=self._sources.__getitem__, default=None)
        return [old for old in self.entries.values() if old.reached_at is None and old.source == fullest]

    def drop(self, known: Known) -> None:
        del self.entries[known.address.text]
        self._count(known, -1)

    def reached(self, known: Known, now: float) -> None:
        self._count(known, -1)
        known.reached_at = now
        self._count(known, 1)

    def _count(self, known: Known, by: int) -> None:
        place = known.place
        counts = [(self._networks, place.network), (self._machines, place.machine)]
        if known.reached_at is None:
            counts.append((self._sources, known.source))
        for count, key in counts:
            count[key] += by
            if not count[key]:
                del count[key]
