"""Bitcoin addresses to output scripts and back, for every address type in use, on an explicit network.

A miner logs in with an address, and the coinbase pays a script. Between the two stands this module. It knows
no process-wide "current network": the caller always says which one it means, so that an address of another
network is refused by name instead of being paid on the wrong chain.

Bech32 (BIP173) and bech32m (BIP350) are checked here in full: the prefix, the case, the checksum, the witness
version and the padding.

Source: BIP13, BIP16, BIP141, BIP173, BIP341, BIP350.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pool.errors import P2PoolError
from sharechain.hasher import sha256d


class AddressError(P2PoolError, ValueError):
    """An address that cannot be paid on this network. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefixes:
    pubkey_hash: int
    script_hash: int
    human_readable: str


# The test networks share the version bytes of base58 addresses; testnet4 and signet share the bech32 prefix
# too.
_PREFIXES = {
    "mainnet": _Prefixes(pubkey_hash=0x00, script_hash=0x05, human_readable="bc"),
    "testnet4": _Prefixes(pubkey_hash=0x6F, script_hash=0xC4, human_readable="tb"),
    "signet": _Prefixes(pubkey_hash=0x6F, script_hash=0xC4, human_readable="tb"),
    "regtest": _Prefixes(pubkey_hash=0x6F, script_hash=0xC4, human_readable="bcrt"),
}
_BASE58_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BECH32_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BECH32_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_BECH32_CHECK = 1
_BECH32M_CHECK = 0x2BC830A3
_LONGEST_ADDRESS = 90  # BIP173's bound; a base58 address has at most 35 characters


def decode_address(address: str, network: str) -> bytes:
    """Give the script that pays `address`.

    Arguments:
        address: P2PKH, P2SH, P2WPKH, P2WSH or P2TR, as people write it.
        network: mainnet, testnet4, signet or regtest.

    Returns: the output script (scriptPubKey), 22 to 34 bytes.

    Raises:
        AddressError: the address is mistyped, of another network or of an unsupported kind.
        ValueError: there is no such network.
    """
    prefixes = _prefixes_of(network)
    if not address:
        raise AddressError("the address is empty")
    if len(address) > _LONGEST_ADDRESS:
        raise AddressError(f"an address has at most {_LONGEST_ADDRESS} characters, got {len(address)}")
    if not address.isascii():
        raise AddressError(f"{address!r} is not an address: it holds a character that is not ASCII")
    human_readable = address.lower().partition("1")[0]
    if any(human_readable == known.human_readable for known in _PREFIXES.values()):
        program_version, program = _decode_segwit(address)
        if human_readable != prefixes.human_readable:
            raise _wrong_network(
                address, network, [n for n, p in _PREFIXES.items() if p.human_readable == human_readable]
            )
        return _witness_script(address, program_version, program)
    version, payload = _decode_base58check(address)
    if version == prefixes.pubkey_hash:
        return b"\x76\xa9\x14" + payload + b"\x88\xac"
    if version == prefixes.script_hash:
        return b"\xa9\x14" + payload + b"\x87"
    others = [name for name, known in _PREFIXES.items() if version in (known.pubkey_hash, known.script_hash)]
    if not others:
        raise AddressError(f"{address} has the unknown version byte {version:#04x}")
    raise _wrong_network(address, network, others)


def encode_address(script: bytes, network: str) -> str | None:
    """Give the address that people write for an output script, or None if the script has no address.

    The inverse of `decode_address`: the two agree on every script of the five types.

    Arguments:
        script: an output script (scriptPubKey).
        network: mainnet, testnet4, signet or regtest.

    Raises:
        ValueError: there is no such network.
    """
    prefixes = _prefixes_of(network)
    if len(script) == 25 and script[:3] == b"\x76\xa9\x14" and script[23:] == b"\x88\xac":
        return _encode_base58check(prefixes.pubkey_hash, script[3:23])
    if len(script) == 23 and script[:2] == b"\xa9\x14" and script[22:] == b"\x87":
        return _encode_base58check(prefixes.script_hash, script[2:22])
    if (len(script) == 22 and script[:2] == b"\x00\x14") or (len(script) == 34 and script[:2] == b"\x00\x20"):
        return _encode_segwit(prefixes.human_readable, 0, script[2:])
    if len(script) == 34 and script[:2] == b"\x51\x20":
        return _encode_segwit(prefixes.human_readable, 1, script[2:])
    return None


def _prefixes_of(network: str) -> _Prefixes:
    prefixes = _PREFIXES.get(network)
    if prefixes is None:
        raise ValueError(f"unknown network {network!r}: expected one of {', '.join(_PREFIXES)}")
    return prefixes


def _wrong_network(address: str, network: str, networks: list[str]) -> AddressError:
    theirs = " or ".join([", ".join(networks[:-1]), networks[-1]] if len(networks) > 1 else networks)
    return AddressError(f"{address} is a {theirs} address; this node mines {network}")


# Base58check: a version byte, 20 bytes of hash, 4 bytes of double SHA-256.


def _checksum(body: bytes) -> bytes:
    return sha256d(body)[:4]


def _encode_base58check(version: int, payload: bytes) -> str:
    body = bytes([version]) + payload
    body += _checksum(body)
    number = int.from_bytes(body, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58_ALPHABET[digit] + digits
    zeros = len(body) - len(body.lstrip(b"\0"))
    return "1" * zeros + digits


def _decode_base58check(address: str) -> tuple[int, bytes]:
    number = 0
    for character in address:
        digit = _BASE58_ALPHABET.find(character)
        if digit < 0:
            raise AddressError(f"{address!r} is not an address: {character!r} is not a base58 character")
        number = number * 58 + digit
    zeros = len(address) - len(address.lstrip("1"))
    body = b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
    if len(body) != 25:
        raise AddressError(f"{address} is not an address: it holds {len(body)} bytes, expected 25")
    if _checksum(body[:-4]) != body[-4:]:
        raise AddressError(f"{address} has a bad checksum: is it mistyped?")
    return body[0], body[1:-4]


# Segwit: a prefix, "1", and characters of five bits: witness version, program, six characters of checksum.


def _polymod(values: Iterable[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_BECH32_GENERATOR):
            if top >> bit & 1:
                check ^= generator
    return check


def _expand(human_readable: str) -> list[int]:
    return [ord(c) >> 5 for c in human_readable] + [0] + [ord(c) & 31 for c in human_readable]


def _encode_segwit(human_readable: str, version: int, program: bytes) -> str:
    padding = -len(program) * 8 % 5
    bits = int.from_bytes(program, "big") << padding
    count = (len(program) * 8 + padding) // 5
    values = [version] + [bits >> 5 * (count - 1 - i) & 31 for i in range(count)]
    expected = _BECH32M_CHECK if version else _BECH32_CHECK
    check = _polymod(_expand(human_readable) + values + [0] * 6) ^ expected
    values += [check >> 5 * (5 - i) & 31 for i in range(6)]
    return human_readable + "1" + "".join(_BECH32_ALPHABET[value] for value in values)


def _decode_segwit(address: str) -> tuple[int, bytes]:
    """Take apart a segwit address of any network and version, with every check of BIP173 and BIP350."""
    if address not in (address.lower(), address.upper()):
        raise AddressError(f"{address} is in mixed case")
    human_readable, _, data = address.lower().partition("1")
    values = []
    for character in data:
        value = _BECH32_ALPHABET.find(character)
        if value < 0:
            raise AddressError(f"{address!r} is not an address: {character!r} is not a bech32 character")
        values.append(value)
    if len(values) < 7:
        raise AddressError(f"{address} is too short")
    check = _polymod(_expand(human_readable) + values)
    if check not in (_BECH32_CHECK, _BECH32M_CHECK):
        raise AddressError(f"{address} has a bad checksum: is it mistyped?")
    version, groups = values[0], values[1:-6]
    if check != (_BECH32M_CHECK if version else _BECH32_CHECK):
        used, wanted = ("bech32", "bech32m") if version else ("bech32m", "bech32")
        raise AddressError(f"{address} has a {used} checksum; witness version {version} needs {wanted}")
    bits = 0
    for value in groups:
        bits = bits << 5 | value
    padding = len(groups) * 5 % 8
    if padding > 4 or bits & (1 << padding) - 1:
        raise AddressError(f"{address} has bad padding")
    return version, (bits >> padding).to_bytes(len(groups) * 5 // 8, "big")


def _witness_script(address: str, version: int, program: bytes) -> bytes:
    if version > 1:
        raise AddressError(f"{address} has the unsupported witness version {version}")
    sizes = (32,) if version else (20, 32)
    if len(program) not in sizes:
        expected = " or ".join(str(size) for size in sizes)
        raise AddressError(
            f"{address} has a program of {len(program)} bytes; witness version {version} needs {expected}"
        )
    return bytes([0x51 if version else 0x00, len(program)]) + program
