"""Peers: who may enter, whom to call, who is sent away, and what an attacker with many addresses gets."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pool.p2p import Link
from p2pool.p2p.addresses import BookLimits, place_of
from p2pool.p2p.conduct import BUDGETS, MAX_BUCKETS, MAX_SCORES, RULES, TOTAL_BUDGETS
from p2pool.p2p.peers import PeerBook, PeerLimits, parse_address
from p2pool.p2p.wire import MAX_ADDRESS, MAX_PEERS

NOW = 1_700_000_000.0
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
LIMITS = PeerLimits()


def base58(raw: bytes) -> str:
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = ALPHABET[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def peer(number: int) -> str:
    """The peer id of an Ed25519 key."""
    return base58(b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32, "big"))


OWN = peer(0)


def at(ip: str, number: int, port: int = 9338) -> str:
    return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}/p2p/{peer(number)}"


def link(ip: str, number: int, *, inbound: bool = True, port: int = 9338) -> Link:
    return Link(peer_id=peer(number), ip=ip, port=port, inbound=inbound)


def new_book(*fixed: str, **limits: Any) -> PeerBook:
    return PeerBook(PeerLimits(**limits), own_id=OWN, fixed=fixed)


def public(number: int) -> str:
    """An address in a /16 of its own."""
    return f"{20 + number // 256 % 60}.{number % 256}.7.7"


def call(book: PeerBook, address: str, now: float) -> str | None:
    """Call an address with success, as a network does."""
    parsed = parse_address(address)
    book.calling(address, now)
    refusal = book.opened(Link(peer_id=parsed.peer_id, ip=parsed.host, port=parsed.port, inbound=False), now)
    if refusal is None:
        book.called(address, parsed.peer_id, now)
    else:
        book.failed(address, now)
    return refusal


def known(book: PeerBook) -> list[str]:
    return [item["address"] for item in json.loads(book.encode())["addresses"]]


# --- addresses


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (at("8.8.8.8", 1), None),
        (at("2001:4860::8", 1), None),
        (f"/dns/node.example.org/tcp/9338/p2p/{peer(1)}", None),
        (f"/dns4/localhost/tcp/1/p2p/{peer(1)}", None),
        (f"/dns6/xn--bcher-kva.example/tcp/65535/p2p/{peer(1)}", None),
        ("/ip4/8.8.8.8/tcp/1/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC", None),
        (f"/ip6/2001:4860:0:0::08/tcp/009/p2p/{peer(1)}", f"/ip6/2001:4860::8/tcp/9/p2p/{peer(1)}"),
        (f"/ip6/::ffff:8.8.8.8/tcp/9338/p2p/{peer(1)}", at("8.8.8.8", 1)),
        (f"/dns/NODE.Example.org/tcp/1/p2p/{peer(1)}", f"/dns/node.example.org/tcp/1/p2p/{peer(1)}"),
    ],
)
def test_an_address_has_one_form(text: str, canonical: str | None) -> None:
    address = parse_address(text)
    assert address.text == (canonical or text)
    assert parse_address(address.text) == address
    assert address.is_name == text.startswith("/dns")
    assert f"/{address.host}/tcp/{address.port}/p2p/{address.peer_id}" in address.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the shape is"),
        ("8.8.8.8:9338", "the shape is"),
        ("/ip4/8.8.8.8/tcp/9338", "the shape is"),
        (at("8.8.8.8", 1) + "/", "the shape is"),
        (at("8.8.8.8", 1).replace("tcp", "udp"), "the shape is"),
        (at("8.8.8.8", 1).replace("p2p", "ipfs"), "the shape is"),
        (at("8.8.8.8", 1).replace("ip4", "unix"), "is not ip4"),
        (at("8.8.8.8", 1).replace("ip4", "ip6"), "no IPv6 address"),
        (at("8.8.8", 1), "no IPv4 address"),
        (at("08.8.8.8", 1), "no IPv4 address"),
        (f"/ip6/fe80::1%eth0/tcp/1/p2p/{peer(1)}", "no IPv6 address"),
        (at("8.8.8.8", 1, port=0), "a port is"),
        (at("8.8.8.8", 1, port=65_536), "a port is"),
        (at("8.8.8.8", 1).replace("9338", "٩"), "a port is"),
        (f"/dns/8.8.8.8/tcp/1/p2p/{peer(1)}", "no name for the DNS"),
        (f"/dns/a b/tcp/1/p2p/{peer(1)}", "no name for the DNS"),
        (f"/dns/-a.example/tcp/1/p2p/{peer(1)}", "no name for the DNS"),
        (f"/dns/{'a' * 64}.example/tcp/1/p2p/{peer(1)}", "no name for the DNS"),
        (f"/dns/example.{'a' * 64}/tcp/1/p2p/{peer(1)}", "no name for the DNS"),
        (at("8.8.8.8", 1)[:-1], "no peer id"),
        (at("8.8.8.8", 1)[:-1] + "0", "no peer id"),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{base58(bytes([0x11, 0x20]) + bytes(32))}", "no peer id"),
        ("/" * 10_000, "at most 256 letters"),
    ],
)
def test_what_is_no_address_is_told_why_and_shown_one(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_address(text)
    message = str(caught.value)
    assert len(message) < 600
    parse_address(message.rpartition("Example: ")[2])


PARTS = [
    "ip4",
    "ip6",
    "dns",
    "dns4",
    "8.8.8.8",
    "::1",
    "fe80::1%1",
    "a.example",
    "tcp",
    "9338",
    "p2p",
    peer(1),
    "",
    "0",
]


@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PARTS), max_size=9).map("/".join)))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(address.text) == address


@given(
    st.ip_addresses(),
    st.integers(1, 65_535),
    st.sampled_from([b"\x00\x24\x08\x01\x12\x20", b"\x00\x25\x08\x02\x12\x21\x02", b"\x12\x20"]),
    st.binary(min_size=32, max_size=32),
)
def test_addresses_are_those_of_the_multiaddr_library(ip: Any, port: int, start: bytes, key: bytes) -> None:
    multiaddr = pytest.importorskip("multiaddr")
    text = parse_address(f"/ip{ip.version}/{ip}/tcp/{port}/p2p/{base58(start + key)}").text
    assert str(multiaddr.Multiaddr(text)) == text


@pytest.mark.parametrize(
    ("ip", "kind", "machine", "network"),
    [
        ("127.0.0.1", "loopback", "loopback", "loopback"),
        ("127.8.0.1", "loopback", "loopback", "loopback"),
        ("::1", "loopback", "loopback", "loopback"),
        ("10.1.2.3", "private", "10.1.2.3", "10.1.0.0/16"),
        ("172.31.0.1", "private", "172.31.0.1", "172.31.0.0/16"),
        ("fd00::1", "private", "fd00::/64", "fd00::/32"),
        ("fe80::1%eth0", "private", "fe80::/64", "fe80::/32"),
        ("8.8.4.4", "public", "8.8.4.4", "8.8.0.0/16"),
        ("::ffff:8.8.4.4", "public", "8.8.4.4", "8.8.0.0/16"),
        ("2a00:1:2:3:4::5", "public", "2a00:1:2:3::/64", "2a00:1::/32"),
        ("0.0.0.0", "nowhere", "0.0.0.0", "0.0.0.0/16"),
        ("203.0.113.9", "nowhere", "203.0.113.9", "203.0.0.0/16"),
        ("255.255.255.255", "nowhere", "255.255.255.255", "255.255.0.0/16"),
        ("ff02::1", "nowhere", "ff02::/64", "ff02::/32"),
        ("what", "nowhere", "what", "what"),
    ],
)
def test_an_ip_address_has_its_place(ip: str, kind: str, machine: str, network: str) -> None:
    place = place_of(ip)
    assert (place.kind, place.machine, place.network) == (kind, machine, network)


# --- who may enter


def test_inbound_connections_are_limited_in_all_by_address_and_by_network() -> None:
    book = new_book()
    for n in range(LIMITS.per_ip):
        assert book.may_enter("8.8.0.1", NOW)
        assert book.opened(link("8.8.0.1", n + 1), NOW) is None
    assert not book.may_enter("8.8.0.1", NOW)
    assert not book.may_enter("::ffff:8.8.0.1", NOW)
    assert book.opened(link("8.8.0.1", 50), NOW) == "limit"
    for n in range(LIMITS.per_ip, LIMITS.per_network):
        assert book.opened(link(f"8.8.1.{n}", n + 1), NOW) is None
    assert not book.may_enter("8.8.9.9", NOW)
    assert book.opened(link("8.8.9.9", 51), NOW) == "limit"
    for n in range(LIMITS.per_network, LIMITS.max_inbound):
        assert book.opened(link(public(n), n + 1), NOW) is None
    assert not book.may_enter("9.9.9.9", NOW)
    assert book.opened(link("9.9.9.9", 1_000), NOW) == "full"
    book.closed(peer(1), NOW)
    assert book.may_enter("9.9.9.9", NOW)
    assert len(book.links) == LIMITS.max_inbound - 1


def test_one_ipv6_subnet_is_one_address_and_a_provider_one_network() -> None:
    book = new_book()
    for n in range(1, LIMITS.per_ip + 1):
        assert book.opened(link(f"2a00:1:0:1::{n}", n), NOW) is None
    assert not book.may_enter("2a00:1:0:1:ffff::1", NOW)
    assert book.may_enter("2a00:1:0:2::1", NOW)
    for n in range(LIMITS.per_ip + 1, LIMITS.per_network + 1):
        assert book.opened(link(f"2a00:1:0:{n:x}::1", n), NOW) is None
    assert not book.may_enter("2a00:1:ffff::1", NOW)
    assert book.may_enter("2a00:2::1", NOW)


@pytest.mark.parametrize("ip", ["127.0.0.1", "192.168.1.9"])
def test_one_machine_may_have_many_nodes_in_a_private_network(ip: str) -> None:
    book = new_book()
    for n in range(1, LIMITS.per_ip_local + 1):
        assert book.opened(link(ip, n), NOW) is None
    assert book.opened(link(ip, 99), NOW) == "limit"
    assert book.may_enter("192.168.1.10", NOW)


def test_slots_for_our_own_choice_are_not_taken_by_inbound_connections() -> None:
    book = new_book()
    for n in range(1, LIMITS.max_inbound + 1):
        assert book.opened(link(public(n), n), NOW) is None
    for n in range(100, 100 + LIMITS.max_outbound):
        assert call(book, at(public(n), n), NOW) is None
    assert call(book, at("9.9.9.9", 999), NOW) == "full"


def test_a_configured_peer_is_not_refused_for_limits_and_counts_in_none() -> None:
    book = new_book(at("8.8.0.1", 1), at("8.8.0.2", 2), max_inbound=2, max_outbound=1, per_ip=1)
    assert book.opened(link("8.8.0.1", 3), NOW) is None
    assert book.may_enter("8.8.0.1", NOW)
    assert book.opened(link("8.8.0.1", 4), NOW) == "limit"
    assert book.opened(link("8.8.0.1", 1), NOW) is None
    assert not book.may_enter("8.8.0.1", NOW)
    assert book.opened(link("9.9.0.1", 5), NOW) is None
    assert book.may_enter("8.8.0.2", NOW)
    assert call(book, at("8.8.0.2", 2), NOW) is None
    assert call(book, at("7.7.0.1", 6), NOW) is None
    assert call(book, at("6.6.0.1", 7), NOW) == "full"
    book.blame(peer_id=peer(1), ip=None, rule="R3", detail="", now=NOW)
    book.closed(peer(1), NOW)
    assert book.opened(link("8.8.0.1", 1), NOW) == "banned"
    assert not book.may_enter("8.8.0.1", NOW)


def test_a_node_does_not_connect_to_itself() -> None:
    book = new_book(at("8.8.8.8", 0))
    book.heard([at("9.9.9.9", 0)], "7.7.7.7", NOW)
    assert book.opened(link("8.8.8.8", 0), NOW) == "self"
    assert book.opened(link("8.8.8.8", 0, inbound=False), NOW) == "self"
    assert book.next_calls(NOW, random.Random(0)) == ()
    assert not book.expects_peers


# --- surrounding a node


@pytest.mark.slow
def test_a_thousand_addresses_in_one_network_get_a_bounded_part_and_calls_still_go_elsewhere() -> None:
    book = new_book()
    for n in range(30):
        book.heard([at(public(n), n + 1)], public(n), NOW)
    attackers = range(1_000, 2_000)
    near = [at(f"66.66.{n // 250}.{n % 250}", n) for n in attackers[:150]]
    far = [at(public(n), n) for n in attackers[:150]]
    entered = 0
    for n in attackers:
        ip = f"66.66.{n // 250}.{n % 250}"
        if book.may_enter(ip, NOW) and book.opened(link(ip, n), NOW) is None:
            entered += 1
            book.listens(peer(n), 9338, NOW)
            book.heard(near, ip, NOW)
            book.heard(far, ip, NOW)
    assert entered == LIMITS.per_network
    leads_there = [text for text in known(book) if text.startswith("/ip4/66.66.")]
    told_there = [item for item in json.loads(book.encode())["addresses"] if item["source"] == "66.66.0.0/16"]
    assert 0 < len(leads_there) <= LIMITS.book.per_network
    assert 0 < len(told_there) <= LIMITS.book.per_source
    for n in range(30):
        assert at(public(n), n + 1) in known(book)
    chance, counts = random.Random(5), Counter[bool]()
    for _ in range(50):
        calls = book.next_calls(NOW, chance)
        assert len(calls) == LIMITS.max_outbound
        networks = Counter(place_of(parse_address(text).host).network for text in calls)
        assert max(networks.values()) == 1
        assert networks["66.66.0.0/16"] <= 1
        counts.update(text in leads_there or text not in {at(public(n), n + 1) for n in range(30)} for text in calls)
    assert counts[False] > 100


def test_a_crowded_network_gets_few_of_our_calls_even_if_there_is_no_other() -> None:
    book = new_book()
    book.heard([at(f"66.66.0.{n}", n) for n in range(1, 30)], "66.66.0.1", NOW)
    calls = book.next_calls(NOW, random.Random(0))
    assert len(calls) == LIMITS.outbound_per_network
    for address in calls:
        call(book, address, NOW)
    assert book.next_calls(NOW, random.Random(0)) == ()


def test_nodes_of_a_private_network_are_all_called() -> None:
    book = new_book()
    book.heard([at(f"192.168.0.{n}", n) for n in range(1, 30)], "192.168.0.1", NOW)
    assert len(book.next_calls(NOW, random.Random(0))) == LIMITS.max_outbound


def test_words_do_not_push_out_what_has_answered() -> None:
    book = new_book(book=BookLimits(total=50))
    for n in range(1, 9):
        assert call(book, at(public(n), n), NOW) is None
    for n in range(100, 1_000):
        book.heard([at(public(n), n)], public(n), NOW + n)
    assert len(known(book)) == 50
    assert all(at(public(n), n) in known(book) for n in range(1, 9))


def test_what_has_answered_counts_against_nobody() -> None:
    book = new_book(book=BookLimits(per_source=1))
    book.heard([at("7.7.7.7", 1)], "8.8.8.8", NOW)
    call(book, at("8.8.8.8", 2), NOW)
    assert known(book) == [at("7.7.7.7", 1), at("8.8.8.8", 2)]


def test_who_tells_most_gives_way_first() -> None:
    book = new_book(book=BookLimits(total=40))
    for n in range(1, 11):
        book.heard([at(public(n), n)], public(n), NOW)
    book.heard([at(public(n), n) for n in range(100, 200)], "66.66.0.1", NOW + 1)
    book.heard([at("9.9.9.9", 999)], "9.9.9.9", NOW + 2)
    assert at("9.9.9.9", 999) in known(book)
    assert all(at(public(n), n) in known(book) for n in range(1, 11))


# --- whom to call


def test_a_configured_peer_is_called_for_ever_with_growing_pauses() -> None:
    address = at("8.8.8.8", 1)
    book, now, chance = new_book(address), NOW, random.Random(0)
    pauses = []
    for _ in range(12):
        assert book.next_calls(now, chance) == (address,)
        book.calling(address, now)
        assert book.next_calls(now, chance) == ()
        book.failed(address, now)
        start = now
        while not book.next_calls(now, chance):
            now += 0.5
        pauses.append(now - start)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60]
    assert book.next_calls(now + 10**7, chance) == (address,)
    assert book.next_calls(NOW - 10**7, chance) == (address,), "a clock that is set back does not end it"


def test_a_connection_that_lasts_makes_pauses_short_again_and_one_that_does_not_makes_them_longer() -> None:
    address = at("8.8.8.8", 1)
    book, chance = new_book(address), random.Random(0)
    for _ in range(5):
        book.failed(address, NOW)
    assert call(book, address, NOW + 100) is None
    assert book.next_calls(NOW + 100, chance) == ()
    book.closed(peer(1), NOW + 101)
    assert book.next_calls(NOW + 101 + 31, chance) == ()
    assert book.next_calls(NOW + 101 + 32, chance) == (address,)
    assert call(book, address, NOW + 200) is None
    book.closed(peer(1), NOW + 300)
    assert book.next_calls(NOW + 301, chance) == (address,)


def test_a_peer_is_called_at_one_address_at_a_time() -> None:
    book, chance = new_book(at("8.8.8.8", 1), at("9.9.9.9", 1)), random.Random(0)
    book.heard([at("7.7.7.7", 2), at("6.6.6.6", 2)], "5.5.5.5", NOW)
    first = book.next_calls(NOW, chance)
    assert len(first) == 2
    for address in first:
        book.calling(address, NOW)
    assert book.next_calls(NOW, chance) == ()
    assert len(book.next_calls(NOW + 1_000, chance)) == 2, (
        "a call that was never answered for is not under way for ever"
    )


def test_configured_peers_come_on_top_and_calls_under_way_count() -> None:
    book, chance = new_book(*(at(public(n), n) for n in range(1, 11)), max_outbound=3), random.Random(0)
    for n in range(20, 40):
        book.heard([at(public(n), n)], public(n), NOW)
    calls = book.next_calls(NOW, chance)
    assert len(calls) == 13
    for address in calls[1:12]:
        book.calling(address, NOW)
    assert len(book.next_calls(NOW, chance)) == 2  # the configured one that was not called, and one more


def test_who_is_connected_or_banned_is_not_called() -> None:
    book, chance = new_book(at("8.8.8.8", 1)), random.Random(0)
    book.heard([at("7.7.7.7", 2), at("6.6.6.6", 3)], "5.5.5.5", NOW)
    book.opened(link("8.8.8.8", 1), NOW)
    book.opened(link("7.7.7.7", 2), NOW)
    book.blame(peer_id=peer(9), ip="6.6.6.6", rule="R3", detail="", now=NOW)
    assert book.next_calls(NOW, chance) == ()
    book.closed(peer(1), NOW)
    book.blame(peer_id=peer(1), ip=None, rule="R3", detail="", now=NOW)
    assert book.next_calls(NOW, chance) == ()
    assert book.next_calls(NOW + LIMITS.ban_s, chance) == (at("8.8.8.8", 1), at("6.6.6.6", 3))


def test_an_address_that_never_answers_is_forgotten_unless_nobody_does() -> None:
    book = new_book()
    book.heard([at("7.7.7.7", 2)], "5.5.5.5", NOW)
    for n in range(100):
        book.failed(at("7.7.7.7", 2), NOW + n)
    assert known(book) == [at("7.7.7.7", 2)]
    call(book, at("9.9.9.9", 3), NOW)
    book.failed(at("7.7.7.7", 2), NOW + 200)
    assert known(book) == [at("9.9.9.9", 3)]


def test_an_address_that_did_answer_is_forgotten_after_a_week() -> None:
    book = new_book()
    call(book, at("7.7.7.7", 2), NOW)
    book.closed(peer(2), NOW)
    call(book, at("9.9.9.9", 3), NOW)
    for n in range(20):
        book.failed(at("7.7.7.7", 2), NOW + n)
    assert at("7.7.7.7", 2) in known(book)
    book.failed(at("7.7.7.7", 2), NOW + 8 * 86_400)
    assert at("7.7.7.7", 2) not in known(book)


def test_what_answered_and_what_was_only_told_are_both_tried() -> None:
    book, chance = new_book(max_outbound=1), random.Random(1)
    for n in range(1, 200):
        book.heard([at(public(n), n)], public(n), NOW)
    call(book, at("9.9.9.9", 999), NOW)
    book.closed(peer(999), NOW)
    counts = Counter(book.next_calls(NOW + 1_000, chance)[0] == at("9.9.9.9", 999) for _ in range(100))
    assert counts[True] > 20
    assert counts[False] > 20


# --- learning addresses


@pytest.mark.parametrize(
    ("source", "address", "taken"),
    [
        ("8.8.8.8", "7.7.7.7", True),
        ("8.8.8.8", "192.168.0.1", False),
        ("8.8.8.8", "127.0.0.1", False),
        ("192.168.0.1", "7.7.7.7", True),
        ("192.168.0.1", "10.0.0.1", True),
        ("192.168.0.1", "127.0.0.1", False),
        ("127.0.0.1", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "224.0.0.1", False),
        ("127.0.0.1", "0.0.0.0", False),
        ("127.0.0.1", "203.0.113.1", False),
        ("127.0.0.1", "2001:db8::1", False),
    ],
)
def test_local_addresses_are_taken_from_and_told_to_local_peers_only(source: str, address: str, taken: bool) -> None:
    book = new_book()
    assert book.heard([at(address, 1)], source, NOW) == 0
    assert known(book) == ([at(address, 1)] if taken else [])
    book.opened(link(address, 1, inbound=False), NOW)
    assert book.offer(source, random.Random(0)) == ((at(address, 1),) if taken else ())


def test_names_own_configured_and_banned_addresses_are_not_taken_from_others() -> None:
    book = new_book(at("8.8.8.8", 1))
    book.blame(peer_id=peer(2), ip="7.7.7.7", rule="R3", detail="", now=NOW)
    told = [
        f"/dns/a.example/tcp/1/p2p/{peer(3)}",
        at("6.6.6.6", 0),
        at("6.6.6.6", 1),
        at("6.6.6.6", 2),
        at("7.7.7.7", 3),
        "nonsense",
        "/ip4/",
    ]
    assert book.heard(told, "5.5.5.5", NOW) == 2
    assert known(book) == []


def test_one_machine_has_few_lines_so_that_nobody_makes_others_call_a_victim() -> None:
    book = new_book()
    for n in range(1, 200):
        book.heard([at("7.7.7.7", n, port=n)], public(n), NOW)
    assert len(known(book)) == LIMITS.book.per_machine


def test_a_word_that_was_disproved_gives_way_to_an_untested_one() -> None:
    book = new_book(book=BookLimits(per_source=2))
    book.heard([at(public(n), n) for n in (1, 2, 3)], "5.5.5.5", NOW)
    assert known(book) == [at(public(n), n) for n in (1, 2)]
    book.failed(at(public(1), 1), NOW)
    book.heard([at(public(3), 3)], "5.5.5.5", NOW)
    assert known(book) == [at(public(n), n) for n in (2, 3)]


def test_a_peer_that_called_is_known_where_it_listens() -> None:
    book = new_book()
    book.opened(link("8.8.8.8", 1, port=50_000), NOW)
    assert book.offer("7.7.7.7", random.Random(0)) == ()
    book.listens(peer(1), 0, NOW)
    assert known(book) == []
    for port in (1_000, 2_000, 3_000):
        book.listens(peer(1), port, NOW)
    assert known(book) == [at("8.8.8.8", 1, port=3_000)]
    assert book.offer("7.7.7.7", random.Random(0)) == (at("8.8.8.8", 1, port=3_000),)
    book.listens(peer(2), 1_000, NOW)
    book.closed(peer(1), NOW)
    assert book.offer("7.7.7.7", random.Random(0)) == ()
    assert book.next_calls(NOW, random.Random(0)) == (at("8.8.8.8", 1, port=3_000),)
    call(book, at("8.8.8.8", 1, port=3_000), NOW)
    book.closed(peer(1), NOW)
    assert book.offer("7.7.7.7", random.Random(0)) == (at("8.8.8.8", 1, port=3_000),)


def test_a_call_that_found_the_peer_connected_already_proves_nothing() -> None:
    book = new_book()
    book.heard([at("6.6.6.6", 1)], "5.5.5.5", NOW)
    book.calling(at("6.6.6.6", 1), NOW)
    book.opened(link("8.8.8.8", 1), NOW)
    book.called(at("6.6.6.6", 1), peer(1), NOW)
    assert book.offer("7.7.7.7", random.Random(0)) == ()


def test_what_is_offered_was_reached_lately_is_not_banned_and_not_all_of_one_network() -> None:
    book = new_book(f"/dns/a.example/tcp/1/p2p/{peer(999)}")
    book.opened(link("3.3.3.3", 999, inbound=False), NOW)
    for n in range(1, 61):
        call(book, at(public(n), n), NOW)
        book.closed(peer(n), NOW + n)
    for n in range(100, 110):
        call(book, at(f"66.66.0.{n}", n), NOW)
        book.closed(peer(n), NOW + 60)
    book.heard([at("7.7.7.7", 200)], "7.7.7.7", NOW)
    book.blame(peer_id=peer(60), ip=None, rule="R3", detail="", now=NOW + 60)
    offered: set[str] = set()
    for seed in range(30):
        answer = book.offer("7.7.7.7", random.Random(seed))
        assert len(answer) == len(set(answer)) == MAX_PEERS
        assert sum(text.startswith("/ip4/66.66.") for text in answer) <= 4
        offered.update(answer)
    expected = {at(public(n), n) for n in range(1, 60)} | {at(f"66.66.0.{n}", n) for n in range(100, 110)}
    assert offered == expected | {at("3.3.3.3", 999)}
    book.blame(peer_id=peer(60), ip=None, rule="timeout", detail="", now=NOW + 86_400)
    assert book.offer("7.7.7.7", random.Random(0)) == (at("3.3.3.3", 999),)


# --- misbehaviour


def test_points_add_up_to_a_ban_of_the_id_and_the_address_that_ends() -> None:
    book = new_book()
    for n, ip in ((1, "8.8.8.8"), (2, "8.8.8.8"), (3, "8.8.8.9")):
        book.opened(link(ip, n), NOW)
    assert book.blame(peer_id=peer(1), ip=None, rule="frame", detail="one", now=NOW) is None
    assert not book.banned_links(NOW)
    ban = book.blame(peer_id=peer(1), ip=None, rule="frame", detail="two", now=NOW)
    assert ban is not None
    assert (ban.peer_id, ban.ip, ban.rule, ban.detail) == (peer(1), "8.8.8.8", "frame", "two")
    assert (ban.since, ban.until, ban.count) == (NOW, NOW + 3_600, 1)
    assert {gone.peer_id for gone in book.banned_links(NOW)} == {peer(1), peer(2)}
    end = NOW + 3_600
    for now, banned in ((NOW, True), (end - 1, True), (end, False)):
        assert book.is_banned(peer(1), now) == book.is_banned("8.8.8.8", now) == banned
        assert book.may_enter("8.8.8.8", now) == (not banned)
        assert book.banned(now) == banned
        assert not book.is_banned(peer(2), now)
    book.closed(peer(1), NOW)
    assert book.opened(link("9.9.9.9", 1), end - 1) == "banned"
    assert book.opened(link("8.8.8.8", 7), end - 1) == "banned"
    assert book.opened(link("9.9.9.9", 1), end) is None


def test_a_new_name_at_the_same_address_brings_its_points_along() -> None:
    book = new_book()
    assert book.blame(peer_id=peer(1), ip="8.8.8.8", rule="frame", detail="", now=NOW) is None
    ban = book.blame(peer_id=peer(2), ip="8.8.8.8", rule="frame", detail="", now=NOW)
    assert ban is not None
    assert (ban.peer_id, ban.ip) == (peer(2), "8.8.8.8")


def test_bans_double_up_to_a_day_and_are_forgiven_after_another() -> None:
    book, now, lengths = new_book(), NOW, []
    for _ in range(7):
        ban = book.blame(peer_id=peer(1), ip="8.8.8.8", rule="R3", detail="", now=now)
        assert ban is not None
        assert book.blame(peer_id=peer(1), ip="8.8.8.8", rule="R3", detail="", now=now + 1) is None, "no second one"
        lengths.append(ban.until - ban.since)
        now = ban.until
    assert lengths == [3_600, 7_200, 14_400, 28_800, 57_600, 86_400, 86_400]
    ban = book.blame(peer_id=peer(1), ip="8.8.8.8", rule="R3", detail="", now=now + 86_400)
    assert ban is not None
    assert ban.count == 1


def test_another_name_at_a_banned_address_does_not_double_its_ban() -> None:
    book = new_book()
    first = book.blame(peer_id=peer(1), ip="8.8.8.8", rule="R3", detail="", now=NOW)
    second = book.blame(peer_id=peer(2), ip="8.8.8.8", rule="R3", detail="", now=NOW + 1)
    assert first is not None
    assert second is not None
    assert (first.count, second.count) == (1, 1)


def test_a_restart_does_not_bring_an_earlier_ban_back_over_a_later_one() -> None:
    book = new_book()
    book.blame(peer_id=peer(1), ip="8.8.8.8", rule="R3", detail="", now=NOW)
    later = book.blame(peer_id=peer(1), ip="9.9.9.9", rule="R3", detail="", now=NOW + 4_000)
    assert later is not None
    again = PeerBook.decode(book.encode(), LIMITS, own_id=OWN)
    assert again.encode() == book.encode()
    assert again.is_banned(peer(1), later.until - 1)
    assert not again.is_banned(peer(1), later.until)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "10.0.0.7", "fd00::7"])
def test_a_local_address_is_never_banned_only_the_name(ip: str) -> None:
    book = new_book()
    book.opened(link(ip, 1), NOW)
    book.opened(link(ip, 2), NOW)
    ban = book.blame(peer_id=peer(1), ip=ip, rule="R3", detail="", now=NOW)
    assert ban is not None
    assert (ban.peer_id, ban.ip) == (peer(1), None)
    assert [gone.peer_id for gone in book.banned_links(NOW)] == [peer(1)]
    assert book.is_banned(peer(1), NOW)
    assert not book.is_banned(ip, NOW)
    assert book.may_enter(ip, NOW)


def test_who_misbehaves_without_a_name_is_banned_by_address_or_kept_out_for_a_moment_if_local() -> None:
    book = new_book()
    for n in range(9):
        assert book.blame(peer_id=None, ip="8.8.8.8", rule="handshake", detail="", now=NOW) is None, n
    ban = book.blame(peer_id=None, ip="8.8.8.8", rule="handshake", detail="", now=NOW)
    assert ban is not None
    assert (ban.peer_id, ban.ip) == (None, "8.8.8.8")
    for _ in range(10):
        assert book.may_enter("127.0.0.1", NOW)
        assert book.blame(peer_id=None, ip="127.0.0.1", rule="handshake", detail="", now=NOW) is None
    assert not book.may_enter("127.0.0.1", NOW)
    assert not book.may_enter("127.0.0.1", NOW + 1.9)
    assert book.may_enter("127.0.0.1", NOW + 2)
    assert book.may_enter("10.0.0.1", NOW)
    assert book.blame(peer_id=None, ip=None, rule="handshake", detail="", now=NOW) is None


def test_points_halve_every_ten_minutes() -> None:
    book = new_book()
    book.opened(link("8.8.8.8", 1), NOW)
    book.blame(peer_id=peer(1), ip=None, rule="frame", detail="", now=NOW)
    assert [book.rows(NOW + s)[0]["score"] for s in (0, 600, 1_200, 10**9)] == [50, 25, 12.5, 0]
    for n in range(1, 50):  # once in ten minutes is forgiven for ever: 50 + 25 + 12.5 ... stays below 100
        assert book.blame(peer_id=peer(1), ip=None, rule="frame", detail="", now=NOW + 601 * n) is None


def test_a_fault_of_nobody_in_particular_bans_nobody() -> None:
    book = new_book()
    for ip in (None, ""):
        assert book.blame(peer_id=None, ip=ip, rule="R3", detail="", now=NOW) is None
    assert book.banned(NOW) == 0
    assert book.opened(link("127.0.0.1", 1), NOW) is None
    assert not book.banned_links(NOW)


def test_faults_are_counted_by_rule() -> None:
    book = new_book()
    for name in ("R3", "R3", "frame", "something else"):
        book.blame(peer_id=peer(1), ip=None, rule=name, detail="", now=NOW)
    assert book.counters == {"R3": 2, "frame": 1, "other": 1}


@pytest.mark.slow
def test_what_is_remembered_of_conduct_is_bounded() -> None:
    book = new_book(max_bans=10)
    for n in range(1, 3 * MAX_SCORES):
        book.blame(peer_id=peer(n), ip="127.0.0.1", rule="timeout", detail="", now=NOW)
    assert len(book._conduct.scores) <= MAX_SCORES
    for n in range(1, 40):
        book.blame(peer_id=peer(n), ip=public(n), rule="R3", detail="", now=NOW + n)
    assert sum(book.is_banned(peer(n), NOW + 40) for n in range(1, 40)) == 10
    assert sum(book.is_banned(public(n), NOW + 40) for n in range(1, 40)) == 10
    assert book.is_banned(peer(39), NOW + 40)


def test_every_rule_has_a_price() -> None:
    assert all(0 < points <= 100 for points in RULES.values())
    assert {f"R{n}" for n in range(1, 13)} <= set(RULES)


# --- budgets


@pytest.mark.parametrize("kind", sorted(BUDGETS))
def test_a_bucket_gives_its_burst_then_its_rate(kind: str) -> None:
    book, budget = new_book(), BUDGETS[kind]
    assert book.spend(peer(1), kind, 0, NOW) == 0
    assert book.spend(peer(1), kind, budget.burst, NOW) == 0
    if budget.rate < 1_000_000:  # one byte is less time than a clock can tell
        assert book.spend(peer(1), kind, 0, NOW) > 0, "empty"
    wait_s = book.spend(peer(1), kind, budget.rate, NOW)
    assert wait_s == pytest.approx(1)
    assert book.spend(peer(1), kind, budget.rate, NOW + wait_s / 2) == pytest.approx(wait_s / 2)
    assert book.spend(peer(1), kind, budget.rate, NOW + wait_s) == 0
    assert book.spend(peer(1), kind, budget.burst + 1, NOW + 10_000) == 0, "more than a bucket holds, when it is full"
    assert book.spend(peer(1), kind, budget.rate, NOW + 10_000) > 1
    if kind not in TOTAL_BUDGETS:
        assert book.spend(peer(2), kind, budget.burst, NOW + 10_000) == 0


def test_all_peers_together_are_served_no_more_than_the_uplink_bears() -> None:
    book, total, served = new_book(), TOTAL_BUDGETS["served"], 0
    for second in range(20):
        for n in range(1, 21):
            while book.spend(peer(n), "served", 1_000_000, NOW + second) == 0:
                served += 1_000_000
    assert total.burst + 18 * total.rate <= served <= total.burst + 19 * total.rate


def test_calling_again_does_not_fill_the_bucket() -> None:
    book = new_book()
    book.opened(link("8.8.8.8", 1), NOW)
    assert book.spend(peer(1), "gossip", 400, NOW) == 0
    book.closed(peer(1), NOW)
    book.opened(link("8.8.8.8", 1), NOW)
    assert book.spend(peer(1), "gossip", 1, NOW) > 0


def test_a_clock_that_is_set_back_takes_no_tokens() -> None:
    book = new_book()
    assert book.spend(peer(1), "gossip", 100, NOW) == 0
    assert book.spend(peer(1), "gossip", 300, NOW - 1_000) == 0
    assert book.spend(peer(1), "gossip", 1, NOW - 1_000) > 0


def test_buckets_are_bounded() -> None:
    book = new_book()
    for n in range(3 * MAX_BUCKETS):
        book.spend(peer(n), "gossip", 1, NOW + n / 1_000)
    assert len(book._budgets._buckets) <= MAX_BUCKETS


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 600)), max_size=60))
def test_a_bucket_never_gives_more_than_burst_and_rate(steps: list[tuple[float, float]]) -> None:
    book, now, given_out, budget = new_book(), NOW, 0.0, BUDGETS["gossip"]
    for pause, amount in steps:
        now += pause
        wait_s = book.spend(peer(1), "gossip", amount, now)
        assert 0 <= wait_s <= budget.burst / budget.rate + 600 / budget.rate
        given_out += amount if wait_s == 0 else 0
        assert given_out <= budget.burst + 200 + (now - NOW) * budget.rate + 1  # 200: the debt of an amount over 400
    assert book.spend(peer(1), "gossip", 1, now + 60) == 0


# --- the peer file


def well_travelled() -> PeerBook:
    book = new_book(at("8.8.8.8", 1))
    call(book, at("8.8.8.8", 1), NOW)
    for n in range(2, 10):
        book.heard([at(public(n), n), at(public(n + 50), n + 50)], public(n), NOW)
    for n in range(2, 6):
        assert call(book, at(public(n), n), NOW + n) is None
    book.failed(at(public(55), 55), NOW + 9)
    book.heard([at("fd00::1", 70), at("127.0.0.1", 71)], "127.0.0.1", NOW)
    book.blame(peer_id=peer(90), ip="9.9.9.9", rule="R3", detail="no work", now=NOW)
    book.blame(peer_id=peer(91), ip="127.0.0.1", rule="R3", detail="", now=NOW)
    book.blame(peer_id=None, ip="2a00:1::1", rule="R1", detail="", now=NOW)
    return book


def test_a_peer_file_is_read_as_it_was_written() -> None:
    book = well_travelled()
    raw = book.encode()
    again = PeerBook.decode(raw, LIMITS, own_id=OWN, fixed=[at("8.8.8.8", 1)])
    assert again.encode() == raw
    assert again.is_banned(peer(90), NOW)
    assert again.is_banned("9.9.9.9", NOW)
    assert again.is_banned("2a00:1::2", NOW)
    assert again.is_banned(peer(91), NOW)
    assert not again.is_banned(peer(90), NOW + 3_600)
    ban = again.blame(peer_id=peer(90), ip=None, rule="R3", detail="", now=NOW + 3_600)
    assert ban is not None
    assert ban.count == 2
    assert again.expects_peers
    assert again.links == ()
    assert PeerBook.decode(new_book().encode(), LIMITS, own_id=OWN).encode() == new_book().encode()


def test_the_outbound_peers_of_the_last_run_are_called_first() -> None:
    book = well_travelled()
    anchors = {at(public(n), n) for n in range(2, 6)}
    for seed in range(10):
        again = PeerBook.decode(book.encode(), LIMITS, own_id=OWN)
        assert set(again.next_calls(NOW + 100, random.Random(seed))[:4]) == anchors
    for address in sorted(anchors):
        again.calling(address, NOW + 100)
    assert set(json.loads(again.encode())["anchors"]) == anchors, "a start that was cut short has not lost them"
    again.failed(at(public(2), 2), NOW + 100)
    call(again, at(public(3), 3), NOW + 100)
    assert set(json.loads(again.encode())["anchors"]) == anchors - {at(public(2), 2)}


def test_a_peer_file_beyond_the_limits_is_read_as_far_as_they_go() -> None:
    limits = PeerLimits(book=BookLimits(total=5), max_bans=1, max_outbound=2)
    again = PeerBook.decode(well_travelled().encode(), limits, own_id=peer(2))
    assert len(known(again)) == 5
    assert at(public(2), 2) not in known(again), "that is us now"
    assert len(again.next_calls(NOW, random.Random(0))) == 2


def change(path: list[Any], value: Any) -> Callable[[Any], Any]:
    def apply(file: Any) -> Any:
        inner = file
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return file

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: [],
        lambda file: 1,
        lambda file: {},
        change(["version"], 2),
        change(["addresses"], {}),
        change(["addresses"], [1]),
        change(["anchors"], None),
        change(["anchors"], [1]),
        change(["bans"], ["x"]),
        change(["addresses", 0, "address"], "/ip4/1.2.3.4"),
        change(["addresses", 0, "address"], 5),
        change(["addresses", 0, "source"], None),
        change(["addresses", 0, "heard"], "soon"),
        change(["addresses", 0, "tried"], float("nan")),
        change(["addresses", 0, "reached"], float("inf")),
        change(["addresses", 0, "reached"], -1),
        change(["addresses", 0, "failures"], 1.5),
        change(["addresses", 0, "failures"], True),
        change(["bans", 0, "until"], 1e300),
        change(["bans", 0, "count"], -1),
        change(["bans", 0, "peer_id"], []),
        change(["bans", 0, "rule"], "x" * 1_000),
    ],
)
def test_a_damaged_peer_file_is_a_value_error(damage: Callable[[Any], Any]) -> None:
    raw = json.dumps(damage(json.loads(well_travelled().encode()))).encode()
    with pytest.raises(ValueError, match=r"."):
        PeerBook.decode(raw, LIMITS, own_id=OWN)


FILE = well_travelled().encode()


@pytest.mark.slow
@given(st.integers(0, len(FILE) - 1), st.binary(max_size=4), st.booleans())
@settings(max_examples=200)
def test_any_bytes_are_a_peer_file_or_a_value_error(place: int, other: bytes, cut: bool) -> None:
    raw = FILE[:place] + other + (b"" if cut else FILE[place + len(other) :])
    try:
        book = PeerBook.decode(raw, LIMITS, own_id=OWN)
    except ValueError:
        return
    assert PeerBook.decode(book.encode(), LIMITS, own_id=OWN).encode() == book.encode()


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[" * 100_000, b"9" * 10_000, b" " * 5_000_000])
def test_what_is_no_json_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        PeerBook.decode(raw, LIMITS, own_id=OWN)


def test_rows_tell_who_is_connected_known_and_banned() -> None:
    book = well_travelled()
    book.opened(link("4.4.4.4", 80, port=5_555), NOW)
    rows = book.rows(NOW + 10)
    states = Counter(row["state"] for row in rows)
    assert states == {"connected": 6, "known": 14, "banned": 3}
    assert all("peer_id" in row for row in rows)
    first = rows[0]
    assert (first["address"], first["direction"], first["configured"]) == (at("8.8.8.8", 1), "outbound", True)
    inbound = next(row for row in rows if row["peer_id"] == peer(80))
    assert (inbound["address"], inbound["ip"], inbound["port"], inbound["since"]) == (None, "4.4.4.4", 5_555, NOW)
    json.dumps(rows)


# --- any order of events


IPS = ["127.0.0.1", "10.0.0.1", "8.8.0.1", "8.8.0.2", "8.8.1.1", "9.9.0.1", "2a00:1::1", "2a00:1:0:1::1", "0.0.0.0"]
SMALL = PeerLimits(
    max_inbound=5,
    max_outbound=3,
    per_ip=2,
    per_network=3,
    per_ip_local=3,
    outbound_per_network=1,
    max_bans=4,
    book=BookLimits(total=12, per_network=4, per_machine=2, per_source=3, local=5),
)
numbers, ips = st.integers(0, 12), st.sampled_from(IPS)
FIXED = [at("8.8.0.1", 11), at("10.0.0.1", 12)]


class AnyOrder(RuleBasedStateMachine):
    """A network that does anything, in any order, and asks whether the limits still hold."""

    def __init__(self) -> None:
        super().__init__()
        self.book = PeerBook(SMALL, own_id=OWN, fixed=FIXED)
        self.now = NOW
        self.under_way: list[str] = []

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 70.0, 4_000.0, 100_000.0, -50.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(ip=ips, number=numbers, inbound=st.booleans())
    def open(self, ip: str, number: int, inbound: bool) -> None:
        entered = self.book.may_enter(ip, self.now)
        fixed = number in (11, 12)
        before = self.book.links
        refusal = self.book.opened(link(ip, number, inbound=inbound), self.now)
        if refusal is None and inbound and not fixed and peer(number) not in {other.peer_id for other in before}:
            assert entered
            assert not self.book.is_banned(peer(number), self.now)

    @rule(number=numbers)
    def close(self, number: int) -> None:
        self.book.closed(peer(number), self.now)
        assert peer(number) not in {other.peer_id for other in self.book.links}

    @rule(seed=st.integers(0, 5))
    def begin_calls(self, seed: int) -> None:
        busy = {peer(0), *(other.peer_id for other in self.book.links)}
        for address in self.book.next_calls(self.now, random.Random(seed)):
            parsed = parse_address(address)
            assert parsed.peer_id not in busy
            assert not self.book.is_banned(parsed.peer_id, self.now)
            busy.add(parsed.peer_id)
            self.book.calling(address, self.now)
            self.under_way.append(address)
        assert not set(self.book.next_calls(self.now, random.Random(seed))) & set(FIXED)

    @precondition(lambda self: bool(self.under_way))
    @rule(succeeds=st.booleans())
    def end_call(self, succeeds: bool) -> None:
        address = self.under_way.pop(0)
        if succeeds:
            call(self.book, address, self.now)
        else:
            self.book.failed(address, self.now)

    @rule(told=st.lists(st.one_of(st.builds(at, ips, numbers, st.integers(1, 4)), st.text()), max_size=9), source=ips)
    def hear(self, told: list[str], source: str) -> None:
        self.book.heard(told, source, self.now)

    @rule(number=numbers, port=st.integers(0, 3))
    def listen(self, number: int, port: int) -> None:
        self.book.listens(peer(number), port, self.now)

    @rule(
        number=st.none() | numbers,
        ip=st.none() | ips,
        name=st.sampled_from(["R3", "frame", "timeout", "handshake", "?"]),
    )
    def blame(self, number: int | None, ip: str | None, name: str) -> None:
        peer_id = None if number is None else peer(number)
        ban = self.book.blame(peer_id=peer_id, ip=ip, rule=name, detail="", now=self.now)
        if ban is not None:
            assert SMALL.ban_s <= ban.until - ban.since <= SMALL.max_ban_s
            assert ban.ip is None or not place_of(ban.ip.partition("/")[0]).is_local
            assert self.book.is_banned(ban.peer_id or ban.ip or "", self.now)
            for gone in self.book.banned_links(self.now):
                self.book.closed(gone.peer_id, self.now)

    @rule(ip=ips, seed=st.integers(0, 5))
    def offer(self, ip: str, seed: int) -> None:
        answer = self.book.offer(ip, random.Random(seed))
        assert len(answer) <= MAX_PEERS
        for text in answer:
            assert len(text) <= MAX_ADDRESS
            assert place_of(ip).may_hear_of(place_of(parse_address(text).host))

    @rule()
    def restart(self) -> None:
        raw = self.book.encode()
        self.book = PeerBook.decode(raw, SMALL, own_id=OWN, fixed=FIXED)
        self.under_way.clear()
        assert self.book.encode() == raw

    @invariant()
    def connections_are_within_the_limits(self) -> None:
        links = self.book.links
        assert len({other.peer_id for other in links}) == len(links)
        assert OWN not in {other.peer_id for other in links}
        counted = [other for other in links if other.peer_id not in (peer(11), peer(12))]
        inbound = [place_of(other.ip) for other in counted if other.inbound]
        assert len(inbound) <= SMALL.max_inbound
        assert len(counted) - len(inbound) <= SMALL.max_outbound
        for place in inbound:
            machine = sum(other.machine == place.machine for other in inbound)
            assert machine <= (SMALL.per_ip_local if place.is_local else SMALL.per_ip)
            assert place.is_local or sum(other.network == place.network for other in inbound) <= SMALL.per_network

    @invariant()
    def counts_are_those_of_a_recount(self) -> None:
        book = self.book._book
        entries = book.entries.values()
        assert book._networks == Counter(place_of(entry.address.host).network for entry in entries)
        assert book._machines == Counter(place_of(entry.address.host).machine for entry in entries)
        assert book._sources == Counter(entry.source for entry in entries if entry.reached_at is None)

    @invariant()
    def the_book_is_within_the_limits(self) -> None:
        limits, items = SMALL.book, json.loads(self.book.encode())["addresses"]
        assert len(items) <= limits.total
        places = [place_of(parse_address(item["address"]).host) for item in items]
        assert max(Counter(place.network for place in places if not place.is_local).values(), default=0) <= 4
        assert max(Counter(place.machine for place in places if not place.is_local).values(), default=0) <= 2
        assert max(Counter(place.network for place in places if place.is_local).values(), default=0) <= 5
        words = [item for item in items if item["reached"] is None]
        for source, count in Counter(item["source"] for item in words).items():
            is_local = source == "loopback" or place_of(source.partition("/")[0]).is_local
            assert count <= (limits.local if is_local else limits.per_source)
        assert all(parse_address(item["address"]).peer_id not in (OWN, peer(11), peer(12)) for item in items)


AnyOrder.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
