"""Addresses: the published vectors, a round trip of every type, no single typing error that gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.address import AddressError, decode_address, encode_address
from p2pool.errors import P2PoolError

NETWORKS = ("mainnet", "testnet4", "signet", "regtest")

VALID = [
    ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "mainnet", "76a91462e907b15cbf27d5425399ebf6f0fb50ebb88f1888ac"),
    ("3P14159f73E4gFr7JterCCQh9QjiTjiZrG", "mainnet", "a914e9c3dd0c07aac76179ebc76a6c78d4d67c6c160a87"),
    ("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", "testnet4", "76a914243f1394f44554f4ce3fd68649c19adc483ce92488ac"),
    ("2MzQwSSnBHWHqSAqtTVQ6v47XtaisrJa1Vc", "regtest", "a9144e9f39ca4688ff102128ea4ccda34105324305b087"),
    ("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4", "mainnet", "0014751e76e8199196d454941c45d1b3a323f1433bd6"),
    (
        "tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sl5k7",
        "signet",
        "00201863143c14c5166804bd19203356da136c985678cd4d27a1b8c6329604903262",
    ),
    (
        "tb1qqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesrxh6hy",
        "testnet4",
        "0020000000c4a5cad46221b2a187905e5266362b99d5e91c6ce24d165dab93e86433",
    ),
    (
        "tb1pqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesf3hn0c",
        "testnet4",
        "5120000000c4a5cad46221b2a187905e5266362b99d5e91c6ce24d165dab93e86433",
    ),
    (
        "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
        "mainnet",
        "512079be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798",
    ),
    # Bitcoin Core's own vectors (key_io_valid.json): regtest's prefix is in neither BIP.
    ("bcrt1qdavt4j2sd7dlhqsavtnfxvzppw6k7qy97tmnu9", "regtest", "00146f58bac9506f9bfb821d62e69330410bb56f0085"),
    (
        "bcrt1qan8gntac7z7me2ejt4hpru42ad2f759fmy0m3ejvs98656znv7eqga4uhv",
        "regtest",
        "0020ecce89afb8f0bdbcab325d6e11f2aaeb549f50a9d91fb8e64c814faa685367b2",
    ),
    (
        "bcrt1pfwxjqvtt4tcxrtdluukfmy2dv7xd2qzdfy6kajv5nwn4yam3wxkq3553uh",
        "regtest",
        "51204b8d20316baaf061adbfe72c9d914d678cd5004d49356ec9949ba752777171ac",
    ),
]


@pytest.mark.parametrize(("address", "network", "script_hex"), VALID)
def test_a_published_address_decodes_and_encodes(address: str, network: str, script_hex: str) -> None:
    script = bytes.fromhex(script_hex)
    assert decode_address(address, network) == script
    expected = address.lower() if address.isupper() else address
    assert encode_address(script, network) == expected


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqh2y7hd", "version 1 needs bech32m"),
        ("tb1z0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqglt7rf", "version 2 needs bech32m"),
        ("BC1S0XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ54WELL", "version 16 needs bech32m"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kemeawh", "version 0 needs bech32"),
        ("tb1q0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq24jc47", "version 0 needs bech32"),
        ("bc1p38j9r5y49hruaue7wxjce0updqjuyyx0kh56v8s25huc6995vvpql3jow4", "'o' is not a bech32 character"),
        ("BC130XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ7ZWS8R", "unsupported witness version 17"),
        ("bc1zw508d6qejxtdg4y5r3zarvaryvaxxpcs", "unsupported witness version 2"),
        ("BC1SW50QGDZ25J", "unsupported witness version 16"),
        ("bc1pw5dgrnzv", "program of 1 bytes"),
        (
            "bc1pw508d6qejxtdg4y5r3zarvary0c5xw7kw508d6qejxtdg4y5r3zarvary0c5xw7kt5nd6y",
            "program of 40 bytes; witness version 1 needs 32",
        ),
        (
            "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v8n0nx0muaewav253zgeav",
            "program of 41 bytes",
        ),
        ("BC1QR508D6QEJXTDG4Y5R3ZARVARYV98GJ9P", "program of 16 bytes; witness version 0 needs 20 or 32"),
        ("tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq47Zagq", "mixed case"),
        ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v07qwwzcrf", "bad padding"),
        ("tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vpggkg4j", "bad padding"),
        ("bc1gmk9yu", "too short"),
        ("tc1qw508d6qejxtdg4y5r3zarvary0c5xw7kg3g4ty", "not a base58 character"),
        ("tc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq5zuyut", "not a base58 character"),
        # BIP173 had these valid; BIP350 gave versions above 0 another checksum.
        ("bc1pw508d6qejxtdg4y5r3zarvary0c5xw7kw508d6qejxtdg4y5r3zarvary0c5xw7k7grplx", "version 1 needs bech32m"),
        ("BC1SW50QA3JX3S", "version 16 needs bech32m"),
        ("bc1zw508d6qejxtdg4y5r3zarvaryvg6kdaj", "version 2 needs bech32m"),
        # What else BIP173 has as invalid.
        ("BC13W508D6QEJXTDG4Y5R3ZARVARY0C5XW7KN40WF2", "version 17 needs bech32m"),
        ("bc1rw5uspcuh", "version 3 needs bech32m"),
        (
            "bc10w508d6qejxtdg4y5r3zarvary0c5xw7kw508d6qejxtdg4y5r3zarvary0c5xw7kw5rljs90",
            "version 15 needs bech32m",
        ),
        ("tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sL5k7", "mixed case"),
        ("bc1zw508d6qejxtdg4y5r3zarvaryvqyzf3du", "version 2 needs bech32m"),
        ("tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3pjxtptv", "bad padding"),
        # What a hand adds to a good one.
        ("Bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "mixed case"),
        (" bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "' ' is not a base58 character"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4 ", "' ' is not a bech32 character"),
        ("bc1", "too short"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5", "bad checksum"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb", "bad checksum"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7Div", "expected 25"),
        ("", "empty"),
        ("1" * 91, "at most 90"),
        ("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7\u212aV8F3T4", "not ASCII"),
    ],
)
def test_a_broken_address_is_refused_with_its_fault(address: str, reason: str) -> None:
    network = "testnet4" if address.startswith("tb") else "mainnet"
    with pytest.raises(AddressError, match=reason):
        decode_address(address, network)
    for other in NETWORKS:
        with pytest.raises(AddressError):
            decode_address(address, other)


@pytest.mark.parametrize(
    ("address", "network", "message"),
    [
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "regtest", "is a mainnet address; this node mines regtest"),
        ("3P14159f73E4gFr7JterCCQh9QjiTjiZrG", "signet", "is a mainnet address; this node mines signet"),
        (
            "mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn",
            "mainnet",
            "is a testnet4, signet or regtest address; this node mines mainnet",
        ),
        (
            "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4",
            "regtest",
            "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4 is a mainnet address; this node mines regtest",
        ),
        (
            "tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sl5k7",
            "regtest",
            "is a testnet4 or signet address; this node mines regtest",
        ),
    ],
)
def test_an_address_of_another_network_is_refused_by_name(address: str, network: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        decode_address(address, network)


#: One address of each of the five types on each network, and the networks that it is good for.
KINDS = {
    "P2PKH": {"mainnet": ("mainnet",), "testnet4": NETWORKS[1:], "signet": NETWORKS[1:], "regtest": NETWORKS[1:]},
    "P2SH": {"mainnet": ("mainnet",), "testnet4": NETWORKS[1:], "signet": NETWORKS[1:], "regtest": NETWORKS[1:]},
    **{
        kind: {
            "mainnet": ("mainnet",),
            "testnet4": ("testnet4", "signet"),
            "signet": ("testnet4", "signet"),
            "regtest": ("regtest",),
        }
        for kind in ("P2WPKH", "P2WSH", "P2TR")
    },
}


@pytest.mark.parametrize("theirs", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_address_is_paid_on_its_networks_and_refused_with_their_names_on_others(
    kind: str, theirs: str
) -> None:
    script = _script(list(KINDS).index(kind), bytes(range(32)))
    address = encode_address(script, theirs)
    assert address is not None
    good = KINDS[kind][theirs]
    named = {1: "{}", 2: "{} or {}", 3: "{}, {} or {}"}[len(good)].format(*good)
    for ours in NETWORKS:
        if ours in good:
            assert decode_address(address, ours) == script
            continue
        with pytest.raises(AddressError) as caught:
            decode_address(address, ours)
        assert str(caught.value) == f"{address} is a {named} address; this node mines {ours}"


@pytest.mark.parametrize(
    "text",
    [
        # Valid bech32 (BIP173).
        "A12UEL5L",
        "a12uel5l",
        "an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs",
        "abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw",
        "11qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqc8247j",
        "split1checkupstagehandshakeupstreamerranterredcaperred2y9e3w",
        "?1ezyfcl",
        # Invalid bech32 (BIP173).
        " 1nwldj5",
        "\x7f1axkwrx",
        "\x801eym55h",
        "an84characterslonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1569pvx",
        "pzry9x0s0muk",
        "1pzry9x0s0muk",
        "x1b4n0q5v",
        "li1dgmt3",
        "de1lg7wt\xff",
        "A1G7SGD8",
        "10a06t8",
        "1qzzfhee",
        # Valid bech32m (BIP350).
        "A1LQFN3A",
        "a1lqfn3a",
        "an83characterlonghumanreadablepartthatcontainsthetheexcludedcharactersbioandnumber11sg7hg6",
        "abcdef1l7aum6echk45nj3s0wdvt2fg8x9yrzpqzd3ryx",
        "11llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllludsr8",
        "split1checkupstagehandshakeupstreamerranterredcaperredlc445v",
        "?1v759aa",
        # Invalid bech32m (BIP350).
        " 1xj0phk",
        "\x7f1g6xzxy",
        "\x801vctc34",
        "an84characterslonghumanreadablepartthatcontainsthetheexcludedcharactersbioandnumber11d6pts4",
        "qyrz8wqd2c9m",
        "1qyrz8wqd2c9m",
        "y1b0jsk6g",
        "lt1igcx5c0",
        "in1muywd",
        "mm1crxm3i",
        "au1s5cgom",
        "M1VUXWEZ",
        "16plkw9",
        "1p2gdwpf",
    ],
)
def test_bech32_that_is_no_address_is_refused_whether_it_is_sound_or_not(text: str) -> None:
    for network in NETWORKS:
        with pytest.raises(AddressError):
            decode_address(text, network)


def test_an_unknown_base58_version_is_refused() -> None:
    with pytest.raises(AddressError, match="unknown version byte 0x30"):
        decode_address("LM2WMpR1Rp6j3Sa59cMXMs1SPzj9eXpGc1", "mainnet")


def test_an_unknown_network_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="unknown network 'testnet3'") as caught:
        decode_address("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", "testnet3")
    assert not isinstance(caught.value, P2PoolError)
    with pytest.raises(ValueError, match="unknown network"):
        encode_address(b"", "litecoin")


def _script(kind: int, content: bytes) -> bytes:
    return (
        b"\x76\xa9\x14" + content[:20] + b"\x88\xac",
        b"\xa9\x14" + content[:20] + b"\x87",
        b"\x00\x14" + content[:20],
        b"\x00\x20" + content,
        b"\x51\x20" + content,
    )[kind]


scripts = st.builds(_script, st.integers(0, 4), st.binary(min_size=32, max_size=32))


@given(scripts, st.sampled_from(NETWORKS))
def test_every_payable_script_survives_the_round_trip(script: bytes, network: str) -> None:
    address = encode_address(script, network)
    assert address is not None
    assert decode_address(address, network) == script


@given(st.binary(max_size=40), st.sampled_from(NETWORKS))
def test_any_script_with_an_address_is_paid_by_it(script: bytes, network: str) -> None:
    address = encode_address(script, network)
    assert address is None or decode_address(address, network) == script


near_addresses = st.builds(
    str.__add__,
    st.sampled_from(["bc1", "tb1q", "bcrt1p"]),
    st.text("qpzry9x8gf2tvdw0s3jn54khce6mua7lbB1", max_size=80),
)


@given(st.text(max_size=100) | near_addresses, st.sampled_from(NETWORKS))
def test_any_text_gives_a_script_or_an_address_error(text: str, network: str) -> None:
    try:
        script = decode_address(text, network)
    except AddressError:
        return
    assert encode_address(script, network) in (text, text.lower())


@pytest.mark.slow
@pytest.mark.parametrize("address", [address for address, _, _ in VALID])
def test_any_single_mistyped_character_is_refused(address: str) -> None:
    network = next(network for valid, network, _ in VALID if valid == address)
    typable = "0123456789abcdefghjklmnopqrstuvwxyzBIOQZ"
    for position in range(len(address)):
        for character in typable:
            mutated = address[:position] + character + address[position + 1 :]
            if mutated == address:
                continue
            with pytest.raises(AddressError):
                decode_address(mutated, network)
