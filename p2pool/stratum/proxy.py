"""The PROXY protocol: what a load balancer says of the miner behind a connection, before the miner's first byte. Pure.

Version 1 is a line of text, version 2 a binary header. Only proxies that the operator named are listened to (see
`p2pool.stratum.server`): anybody else could claim any address.

Source: HAProxy, "The PROXY protocol, versions 1 and 2", sections 2.1 and 2.2.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

from p2pool.errors import StratumError
from p2pool.stratum.values import OTHER

MAX_LINE_BYTES: Final = 107
"""Of version 1, with the line's end."""
MAX_HEADER_BYTES: Final = 2048
"""Of version 2: the addresses and what some proxies add to them; the format allows 64 KiB."""
SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"

_PREFIX = b"PROXY "
_ADDRESS_SIZES = {1: 4, 2: 16}  # address family: IPv4, IPv6


class ProxyReader:
    """Takes the first bytes of a connection until the header is whole.

    Mutable state: `_buffer`, the bytes so far. Attributes that are set with the header: `address` is the miner's, None
    where the proxy speaks for itself (a health check) or of something that has none.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self.address: str | None = None

    def receive(self, data: bytes) -> bytes | None:
        """Take bytes; returns those behind the header once it is whole, None before.

        Raises:
            StratumError: this is no PROXY header.
        """
        self._buffer += data
        start = self._buffer[: len(SIGNATURE)]
        if SIGNATURE.startswith(start):
            return self._read_binary()
        if _PREFIX.startswith(start[: len(_PREFIX)]):
            return self._read_line()
        raise _refuse("neither version 1 nor 2")

    def _read_line(self) -> bytes | None:
        line, end, rest = self._buffer.partition(b"\r\n")
        if len(line) + 2 > MAX_LINE_BYTES:
            raise _refuse(f"a line of more than {MAX_LINE_BYTES} bytes")
        if not end:
            return None
        match line.split(b" "):
            case [b"PROXY", b"UNKNOWN", *_]:
                pass
            case [b"PROXY", b"TCP4" | b"TCP6", source, _, _, _]:
                try:
                    self.address = str(ipaddress.ip_address(source.decode("ascii")))
                except ValueError:
                    raise _refuse("the source is no IP address") from None
            case _:
                raise _refuse("unknown words")
        return rest

    def _read_binary(self) -> bytes | None:
        if len(self._buffer) < 16:
            return None
        kind, family, size = struct.unpack(">BBH", self._buffer[12:16])
        if kind not in (0x20, 0x21):
            raise _refuse(f"version and command {kind:#04x}")
        if size > MAX_HEADER_BYTES:
            raise _refuse(f"{size} bytes of addresses")
        if len(self._buffer) < 16 + size:
            return None
        width = _ADDRESS_SIZES.get(family >> 4)
        if kind == 0x21 and width is not None:
            if size < 2 * width + 4:
                raise _refuse(f"{size} bytes are too few for the addresses")
            self.address = str(ipaddress.ip_address(self._buffer[16 : 16 + width]))
        return self._buffer[16 + size :]


def _refuse(reason: str) -> StratumError:
    return StratumError(OTHER, f"no PROXY header: {reason}")
