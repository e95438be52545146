"""What a node remembers of other nodes and decides about them: whom to call, who may enter, who is sent away.

Theory of operation. Nothing here acts: it is told what happened (``opened``, ``failed``, ``heard``, ``blame`` ...) and
asked what to do (``next_calls``, ``may_enter``, ``offer``, ``spend``). Time and chance come in by argument.

A peer id costs nothing, an IP address little, many addresses in many networks much. So everything that a stranger can
take of this node is counted by the /16 (IPv4) or /32 (IPv6) that it speaks from: connections, and lines in the book of
addresses. The connections that matter most against being surrounded are those that we choose ourselves: they have
slots of their own, that no inbound connection takes, and go to different networks. See Heilman et al., "Eclipse
Attacks on Bitcoin's Peer-to-Peer Network" (2015), and Bitcoin Core's ``addrman`` and ``net``.

Addresses and the book of them are in ``addresses``, points, bans and budgets in ``conduct``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from p2pool.p2p import Link
from p2pool.p2p.addresses import Address, AddressBook, BookLimits, Known, Place, address_of, parse_address, place_of
from p2pool.p2p.conduct import BUDGETS, RULES, Ban, Budget, Budgets, Conduct
from p2pool.p2p.wire import MAX_ADDRESS, MAX_PEERS

__all__ = ["BUDGETS", "RULES", "Address", "Ban", "Budget", "Chance", "PeerBook", "PeerLimits", "parse_address"]

#: Seconds before a configured address is called again; doubles from the first to the second, for ever.
FIXED_BACKOFF_S: Final = (1.0, 60.0)
#: The same for an address of the book.
BOOK_BACKOFF_S: Final = (10.0, 900.0)
#: Seconds that a connection must last for its address to be as good as new.
SETTLED_S: Final = 60.0
#: Seconds after which a call of which nothing was heard is no longer under way.
CALL_S: Final = 120.0
#: An address is passed on if we had a connection to it in the last so many seconds.
LATELY_S: Final = 3 * 3_600.0
#: Addresses of one network in one answer to a peer.
OFFERED_PER_NETWORK: Final = 4
#: Bytes of the peer file: far more than a full one has.
MAX_FILE: Final = 4 * 1024 * 1024
FILE_VERSION: Final = 1

_T = TypeVar("_T")


class Chance(Protocol):
    """What is needed of ``random.Random``."""

    def random(self) -> float:
        """From 0 up to 1."""

    def sample(self, population: Sequence[_T], k: int) -> list[_T]:
        """``k`` different elements, in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    """How much of this node other nodes may take."""

    #: Connections that others made to us.
    max_inbound: int = 64
    #: Connections that we make by our own choice. Configured addresses come on top.
    max_outbound: int = 8
    #: Inbound connections of one address (IPv6: of one /64), and of one network (IPv4: /16, IPv6: /32).
    per_ip: int = 4
    per_network: int = 16
    #: The same for one address of a private network, and for all of loopback: one machine's or LAN's many nodes.
    per_ip_local: int = 32
    #: Chosen connections into one public network.
    outbound_per_network: int = 2
    #: Seconds of a first ban; each repetition doubles it up to the second figure.
    ban_s: float = 3_600.0
    max_ban_s: float = 86_400.0
    #: Bans of ids, and as many of addresses; beyond, those that end first are forgotten.
    max_bans: int = 1_000
    #: Addresses that are remembered.
    book: BookLimits = field(default_factory=BookLimits)


@dataclass(slots=True, kw_only=True)
class _Connected:
    """A peer that was taken. Mutable: where it can be called, as far as is known."""

    link: Link
    place: Place
    since: float
    address: Address | None


class PeerBook:
    """All that a node remembers of others and decides about them.

    Mutable fields: ``_connected`` (by peer id), ``_under_way`` (calls: address and since when, by text), ``_fixed``
    (the configured addresses, by text), ``_book`` (all others), ``_anchors`` (addresses of the last run's outbound
    peers, until they were tried), ``_conduct``, ``_budgets``, ``_now`` (when we were told something last; ``offer``
    goes by it). Invariant: no peer id is connected twice, none is our own; peers that are not configured are within
    ``PeerLimits``.
    """

    def __init__(self, limits: PeerLimits, *, own_id: str, fixed: Sequence[str] = ()) -> None:
        """A node that knows nobody but who is configured.

        Args:
            limits: what others may take.
            own_id: our peer id: never called, never taken.
            fixed: whole multiaddrs that are always to be connected.

        Raises:
            ValueError: a fixed address is none.
        """
        self._limits = limits
        self._own_id = own_id
        self._connected: dict[str, _Connected] = {}
        self._under_way: dict[str, tuple[Address, float]] = {}
        addresses = [parse_address(text) for text in fixed]
        self._fixed = {
            address.text: Known(address=address, source="") for address in addresses if address.peer_id != own_id
        }
        self._fixed_ids = {known.address.peer_id for known in self._fixed.values()}
        self._book = AddressBook(limits.book)
        self._anchors: list[str] = []
        self._conduct = Conduct(ban_s=limits.ban_s, max_ban_s=limits.max_ban_s, max_bans=limits.max_bans)
        self._budgets = Budgets()
        self._now = 0.0

    @property
    def expects_peers(self) -> bool:
        """Whether there is anybody to call."""
        return bool(self._fixed or self._book.entries)

    # --- connections

    @property
    def links(self) -> tuple[Link, ...]:
        """Who is connected."""
        return tuple(connected.link for connected in self._connected.values())

    def may_enter(self, ip: str, now: float) -> bool:
        """Whether an address may connect, asked before the handshake, when nobody has a name yet.

        Only connections that were taken are counted: how many handshakes are under way is the transport's to limit.
        """
        place = place_of(ip)
        if self._conduct.is_banned(None, place.machine, now) or self._conduct.is_refused(place.machine, now):
            return False
        return self._inbound_refusal(place) is None or self._awaits_fixed(place)

    def opened(self, link: Link, now: float) -> str | None:
        """A handshake is done.

        Returns:
            None if the peer is taken, else why not: "self", "banned", "full" or "limit". A configured peer is never
            refused for a limit, and does not count in it; a ban is for all.
        """
        self._now = now
        if link.peer_id in self._connected:
            return None
        place = place_of(link.ip)
        if link.peer_id == self._own_id:
            return "self"
        if self._conduct.is_banned(link.peer_id, place.machine, now):
            return "banned"
        if link.peer_id not in self._fixed_ids:
            if link.inbound:
                refusal = self._inbound_refusal(place)
            else:
                refusal = "full" if len(self._chosen()) >= self._limits.max_outbound else None
            if refusal is not None:
                return refusal
        address = None if link.inbound else address_of(link.ip, link.port, link.peer_id)
        self._connected[link.peer_id] = _Connected(link=link, place=place, since=now, address=address)
        if address is not None and link.peer_id not in self._fixed_ids:
            known = Known(address=address, source=place.network, heard_at=now, tried_at=now, reached_at=now)
            if not self._book.add(known, is_source_local=place.is_local):
                self._reached(address.text, now)
        return None

    def closed(self, peer_id: str, now: float) -> None:
        """A connection is gone. One that did not last counts as a failed call: else it would be called all day."""
        self._now = now
        connected = self._connected.pop(peer_id, None)
        if connected is None or connected.link.inbound:
            return
        called = [known for known in self._fixed.values() if known.address.peer_id == peer_id]
        if connected.address is not None and connected.address.text in self._book.entries:
            called.append(self._book.entries[connected.address.text])
        for known in called:
            known.failures = 1 if now - connected.since >= SETTLED_S else known.failures + 1
            known.tried_at = now
            if known.reached_at is not None:
                known.reached_at = now

    def banned_links(self, now: float) -> tuple[Link, ...]:
        """Who is connected and must no longer be: after a ban, all that share the id or the address."""
        return tuple(
            connected.link
            for connected in self._connected.values()
            if self._conduct.is_banned(connected.link.peer_id, connected.place.machine, now)
        )

    def _inbound_refusal(self, place: Place) -> str | None:
        limits = self._limits
        inbound = [
            connected.place
            for peer_id, connected in self._connected.items()
            if connected.link.inbound and peer_id not in self._fixed_ids
        ]
        if len(inbound) >= limits.max_inbound:
            return "full"
        per_ip = limits.per_ip_local if place.is_local else limits.per_ip
        if sum(other.machine == place.machine for other in inbound) >= per_ip:
            return "limit"
        if not place.is_local and sum(other.network == place.network for other in inbound) >= limits.per_network:
            return "limit"
        return None

    def _awaits_fixed(self, place: Place) -> bool:
        """Whether a configured peer that is not connected could be calling from an address."""
        return any(
            known.address.peer_id not in self._connected and known.place.machine == place.machine
            for known in self._fixed.values()
        )

    def _chosen(self) -> list[_Connected]:
        """Outbound connections of our own choice."""
        return [
            connected
            for peer_id, connected in self._connected.items()
            if not connected.link.inbound and peer_id not in self._fixed_ids
        ]

    # --- whom to call

    def next_calls(self, now: float, choose: Chance) -> tuple[str, ...]:
        """The addresses to call now: configured ones that are due, then, while slots are free, the peers of the last
        run, then the book: spread over networks, half of them addresses that have answered before.
        """
        self._now = now
        under_way = [address for address, since in self._under_way.values() if since <= now < since + CALL_S]
        busy = {self._own_id, *self._connected, *(address.peer_id for address in under_way)}
        calls: list[str] = []
        for known in self._fixed.values():
            if known.is_due(now, FIXED_BACKOFF_S) and self._is_callable(known.address, busy, now):
                calls.append(known.address.text)
                busy.add(known.address.peer_id)
        chosen = self._chosen()
        networks = Counter(connected.place.network for connected in chosen if not connected.place.is_local)
        for address in under_way:
            if address.peer_id not in self._fixed_ids and not place_of(address.host).is_local:
                networks[place_of(address.host).network] += 1
        slots = self._limits.max_outbound - len(chosen)
        slots -= sum(address.peer_id not in self._fixed_ids for address in under_way)
        if slots <= 0:
            return tuple(calls)
        due = [
            known
            for known in self._book.entries.values()
            if known.is_due(now, BOOK_BACKOFF_S) and self._is_callable(known.address, busy, now)
        ]
        while slots > 0:
            due = [
                known
                for known in due
                if known.address.peer_id not in busy
                and networks[known.place.network] < self._limits.outbound_per_network
            ]
            if not due:
                break
            known = self._choose(due, networks, choose)
            calls.append(known.address.text)
            busy.add(known.address.peer_id)
            networks[known.place.network] += not known.place.is_local
            slots -= 1
        return tuple(calls)

    def _is_callable(self, address: Address, busy: set[str], now: float) -> bool:
        machine = None if address.is_name else place_of(address.host).machine
        return address.peer_id not in busy and not self._conduct.is_banned(address.peer_id, machine, now)

    def _choose(self, due: Sequence[Known], networks: Counter[str], choose: Chance) -> Known:
        anchors = [known for known in due if known.address.text in self._anchors]
        if anchors:
            return anchors[0]
        # A network that has a slot already is only second choice.
        fresh = [known for known in due if not networks[known.place.network]] or due
        reached = choose.random() < 0.5
        half = [known for known in fresh if (known.reached_at is not None) == reached] or fresh
        # By network first: a thousand addresses in one have no more chance than one.
        network = choose.sample(sorted({known.place.network for known in half}), 1)[0]
        return choose.sample([known for known in half if known.place.network == network], 1)[0]

    def calling(self, address: str, now: float) -> None:
        """A call begins."""
        recent = {text: call for text, call in self._under_way.items() if call[1] <= now < call[1] + CALL_S}
        self._under_way = recent | {address: (parse_address(address), now)}
        known = self._known(address)
        if known is not None:
            known.tried_at = now

    def called(self, address: str, peer_id: str, now: float) -> None:
        """A call succeeded, or the peer was connected already: then it proves nothing of the address."""
        self._under_way.pop(address, None)
        self._drop_anchor(address)
        connected = self._connected.get(peer_id)
        if connected is not None and not connected.link.inbound:
            self._reached(address, now)

    def failed(self, address: str, now: float) -> None:
        """A call failed. Who is connected to nobody does not forget anybody: it may be our own line."""
        self._under_way.pop(address, None)
        self._drop_anchor(address)
        known = self._known(address)
        if known is None:
            return
        known.failures += 1
        known.tried_at = now
        if address in self._book.entries and self._connected and known.is_worthless(now):
            self._book.drop(known)

    def _known(self, text: str) -> Known | None:
        return self._fixed.get(text) or self._book.entries.get(text)

    def _reached(self, text: str, now: float) -> None:
        if text in self._fixed:
            self._fixed[text].reached_at = now
        elif text in self._book.entries:
            self._book.reached(self._book.entries[text], now)

    def _drop_anchor(self, text: str) -> None:
        if text in self._anchors:
            self._anchors.remove(text)

    # --- learning addresses

    def heard(self, addresses: Sequence[str], source_ip: str, now: float) -> int:
        """Somebody told addresses of nodes.

        Names are not taken (a stranger must not make us ask the DNS), nor what leads nowhere, nor addresses of a
        machine or private network from outside of it.

        Returns:
            How many were no addresses at all, for who wants to blame somebody.
        """
        source, broken = place_of(source_ip), 0
        for text in addresses:
            try:
                address = parse_address(text)
            except ValueError:
                broken += 1
                continue
            self._hear(address, source, now)
        return broken

    def _hear(self, address: Address, source: Place, now: float) -> bool:
        if address.is_name or address.peer_id == self._own_id or address.peer_id in self._fixed_ids:
            return False
        place = place_of(address.host)
        if not source.may_hear_of(place) or self._conduct.is_banned(address.peer_id, place.machine, now):
            return False
        known = Known(address=address, source=source.network, heard_at=now)
        return self._book.add(known, is_source_local=source.is_local)

    def listens(self, peer_id: str, port: int, now: float) -> None:
        """A connected peer says on which port it can be called, at the address that it calls from."""
        connected = self._connected.get(peer_id)
        if connected is None or not connected.link.inbound:
            return
        address = address_of(connected.link.ip, port, peer_id)
        old = connected.address
        if address == old:
            return
        if old is not None and old.text in self._book.entries and self._book.entries[old.text].reached_at is None:
            self._book.drop(self._book.entries[old.text])  # a peer has one word, not one each minute
        connected.address = address
        if address is not None:
            self._hear(address, connected.place, now)

    def offer(self, peer_ip: str, choose: Chance) -> tuple[str, ...]:
        """Up to ``MAX_PEERS`` addresses for a peer, of nodes that we are connected to or have reached lately.

        A peer that called us is among them if it says where it listens: its id and IP are proven, only the port is its
        word, and without it nodes that know only one common node would never meet. Local addresses are for local
        peers only, and names are kept to ourselves.
        """
        asker = place_of(peer_ip)
        known = [connected.address for connected in self._connected.values() if connected.address is not None]
        for entry in (*self._fixed.values(), *self._book.entries.values()):
            if entry.reached_at is not None and 0.0 <= self._now - entry.reached_at <= LATELY_S:
                known.append(entry.address)
        by_id = {address.peer_id: address for address in known if not address.is_name}
        networks: Counter[str] = Counter()
        offered: list[str] = []
        for address in choose.sample(sorted(by_id.values(), key=lambda address: address.text), len(by_id)):
            place = place_of(address.host)
            if not asker.may_hear_of(place) or not self._is_callable(address, set(), self._now):
                continue
            networks[place.network] += not place.is_local
            if networks[place.network] <= OFFERED_PER_NETWORK:
                offered.append(address.text)
        return tuple(offered[:MAX_PEERS])

    # --- misbehaviour and budgets

    def blame(self, *, peer_id: str | None, ip: str | None, rule: str, detail: str, now: float) -> Ban | None:
        """Somebody broke a rule (see ``RULES``).

        Args:
            peer_id: who, or None before a handshake.
            ip: where; None for the address of the connected peer.
            rule: what.
            detail: for people.
            now: Unix seconds.

        Returns:
            A ban, if this was the last straw; then ``banned_links`` says whose connections end. None while a ban lasts.
            An unnamed one at a local address is never banned: connections from there are refused for two seconds.
        """
        self._now = now
        connected = self._connected.get(peer_id or "")
        place = place_of(ip) if ip else None if connected is None else connected.place
        return self._conduct.blame(peer_id, place, rule, detail, now)

    def is_banned(self, peer_id_or_ip: str, now: float) -> bool:
        """Whether a peer id or an address is banned at this moment."""
        return self._conduct.is_banned(peer_id_or_ip, place_of(peer_id_or_ip).machine, now)

    def banned(self, now: float) -> int:
        """Bans at this moment: of ids, and of addresses that were banned without one."""
        return sum(now < ban.until for ban in self._conduct.all_bans())

    @property
    def counters(self) -> dict[str, int]:
        """How often each rule was broken since the start; "other" for those that are not in ``RULES``."""
        return dict(self._conduct.counters)

    def spend(self, peer_id: str, kind: str, amount: float, now: float) -> float:
        """Take tokens from a peer's bucket, and from everybody's if there is one (see ``BUDGETS``).

        Args:
            peer_id: whose.
            kind: a name in ``BUDGETS``.
            amount: tokens; 0 takes none and asks whether there is one left.
            now: Unix seconds.

        Returns:
            0.0 when there were enough and they are taken; else nothing is taken, and these are the seconds until there
            would be enough.
        """
        return self._budgets.spend(peer_id, kind, amount, now)

    # --- persistence

    def rows(self, now: float) -> list[dict[str, Any]]:
        """For ``p2pool peers``: who is connected, then known addresses, then bans."""
        rows: list[dict[str, Any]] = [
            {
                "state": "connected",
                "peer_id": peer_id,
                "address": connected.address.text if connected.address else None,
                "ip": connected.link.ip,
                "port": connected.link.port,
                "direction": "inbound" if connected.link.inbound else "outbound",
                "configured": peer_id in self._fixed_ids,
                "since": connected.since,
                "score": round(self._conduct.score(peer_id, now), 1),
            }
            for peer_id, connected in self._connected.items()
        ]
        rows += [
            {
                "state": "known",
                "peer_id": known.address.peer_id,
                "address": known.address.text,
                "configured": known.address.text in self._fixed,
                "reached": known.reached_at,
                "failures": known.failures,
            }
            for known in (*self._fixed.values(), *self._book.entries.values())
            if known.address.peer_id not in self._connected
        ]
        rows += [
            {
                "state": "banned",
                "peer_id": ban.peer_id,
                "ip": ban.ip,
                "rule": ban.rule,
                "detail": ban.detail,
                "since": ban.since,
                "until": ban.until,
                "count": ban.count,
            }
            for ban in self._conduct.all_bans()
            if now < ban.until
        ]
        return rows

    def encode(self) -> bytes:
        """The peer file: JSON, for people to read. To be written while the peers are still connected: outbound ones are
        the anchors, called first after the next start, so that a restart does not let others choose our peers anew.
        """
        chosen = [connected.address.text for connected in self._chosen() if connected.address is not None]
        anchors = [text for text in dict.fromkeys((*chosen, *self._anchors)) if text in self._book.entries]
        value = {
            "version": FILE_VERSION,
            "addresses": [
                {
                    "address": known.address.text,
                    "source": known.source,
                    "heard": known.heard_at,
                    "tried": known.tried_at,
                    "reached": known.reached_at,
                    "failures": known.failures,
                }
                for known in self._book.entries.values()
            ],
            "anchors": anchors[: self._limits.max_outbound],
            "bans": [{name: getattr(ban, name) for name in Ban.__slots__} for ban in self._conduct.all_bans()],
        }
        return json.dumps(value, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, raw: bytes, limits: PeerLimits, *, own_id: str, fixed: Sequence[str] = ()) -> PeerBook:
        """Read a peer file; what is beyond the limits of today is left out.

        Raises:
            ValueError: damaged, or no peer file. The caller starts with an empty book: it is only a memory.
        """
        if len(raw) > MAX_FILE:
            raise ValueError(f"a peer file has at most {MAX_FILE} bytes, got {len(raw)}")
        try:
            value = json.loads(raw.decode())
        except RecursionError:
            raise ValueError("nested too deeply for a peer file") from None
        addresses, anchors, bans = (_list(value, name) for name in ("addresses", "anchors", "bans"))
        if value.get("version") != FILE_VERSION:
            raise ValueError(f"a peer file of version {FILE_VERSION} is read, got {value.get('version')!r}")
        book = cls(limits, own_id=own_id, fixed=fixed)
        for item in addresses:
            known = Known(
                address=parse_address(_text(item, "address")),
                source=_text(item, "source"),
                heard_at=_time(item, "heard"),
                tried_at=_time(item, "tried"),
                reached_at=None if item.get("reached") is None else _time(item, "reached"),
                failures=_count(item, "failures"),
            )
            if known.address.peer_id not in {own_id, *book._fixed_ids} and not known.address.is_name:
                source_is_local = known.source == "loopback" or place_of(known.source.partition("/")[0]).is_local
                book._book.add(known, is_source_local=source_is_local)
        for text in anchors:
            if not isinstance(text, str):
                raise ValueError(f"an anchor is an address, got {text!r}")
            if text in book._book.entries and text not in book._anchors[: limits.max_outbound]:
                book._anchors.append(text)
        for item in bans:
            ban = Ban(
                peer_id=None if item.get("peer_id") is None else _text(item, "peer_id"),
                ip=None if item.get("ip") is None else _text(item, "ip"),
                rule=_text(item, "rule"),
                detail=_text(item, "detail"),
                since=_time(item, "since"),
                until=_time(item, "until"),
                count=_count(item, "count"),
            )
            book._conduct.put(ban, ban.since)
        return book


def _list(value: object, name: str) -> list[Any]:
    """A list of a file, of objects but for the anchors."""
    items = value.get(name) if isinstance(value, dict) else None
    if not isinstance(items, list) or (name != "anchors" and not all(isinstance(item, dict) for item in items)):
        raise ValueError(f"no peer file: {name} is missing or no list")
    return items


def _text(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or len(value) > MAX_ADDRESS:
        raise ValueError(f"{name} is a text, got {value!r:.80}")
    return value


def _time(item: dict[str, Any], name: str) -> float:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise ValueError(f"{name} is a time in Unix seconds, got {value!r:.80}")
    return float(value)


def _count(item: dict[str, Any], name: str) -> int:
    value = item.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{name} is a number of times, got {value!r:.80}")
    return value
