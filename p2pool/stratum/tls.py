"""TLS without sockets: bytes of the network in, bytes of the miner out, and the other way round."""

from __future__ import annotations

import ssl
from pathlib import Path

from p2pool.errors import ConfigError


class TlsError(Exception):
    """The other side does not speak TLS, or none that we accept."""


def load_certificate(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a server needs to speak TLS.

    Arguments:
        certificate: PEM, with the chain behind it.
        key: PEM, not encrypted.

    Raises:
        ConfigError: the files cannot be read or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An encrypted key would ask for its password on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"certificate {certificate} with key {key}: {error}") from None
    return context


class Tls:
    """One connection's TLS.

    Mutable state: what OpenSSL holds; `is_open` is set when the handshake is done.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.is_open = False

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take bytes of the network; returns those for the session and those to be sent back.

        Raises:
            TlsError: the connection has to end.
        """
        self._incoming.write(data)
        plain = bytearray()
        try:
            if not self.is_open:
                self._ssl.do_handshake()
                self.is_open = True
            while piece := self._ssl.read(16384):
                plain += piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise TlsError(error.reason or str(error)) from None
        return bytes(plain), self._outgoing.read()

    def encrypt(self, data: bytes) -> bytes:
        """The bytes to be sent for `data`; only behind the handshake.

        Raises:
            TlsError: the connection has to end.
        """
        try:
            self._ssl.write(data)
        except ssl.SSLError as error:
            raise TlsError(error.reason or str(error)) from None
        return self._outgoing.read()
