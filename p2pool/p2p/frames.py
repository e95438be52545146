"""Frames on a stream of bytes: an unsigned varint, the length, then as many bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from p2pool.errors import PeerError

#: Bytes of a frame's length: 28 bits are more than any cap.
MAX_LENGTH_BYTES: Final = 4
#: Bytes asked of a stream at once: small, so that the window is given back early and the sender never waits for long.
READ_BYTES: Final = 64 * 1024


def encode_frame(payload: bytes) -> bytes:
    """The bytes of a frame.

    Args:
        payload: fewer than 2**28 bytes.
    """
    length, prefix = len(payload), bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + payload


class FrameBuffer:
    """Cuts what was read into frames. True while it holds bytes that belong to no frame taken so far."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def __len__(self) -> int:
        return len(self._bytes)

    def feed(self, data: bytes) -> None:
        """Add what was read."""
        self._bytes += data

    def take(self, limit: int) -> bytes | None:
        """The payload of the next frame, or None if it is not whole yet.

        Args:
            limit: bytes that the payload may have. Checked as soon as the length is there.

        Raises:
            PeerError: "frame": it is longer, or its length is not the shortest varint.
        """
        length = 0
        for index, byte in enumerate(self._bytes[:MAX_LENGTH_BYTES]):
            length |= (byte & 0x7F) << 7 * index
            if byte & 0x80:
                continue
            if index and not byte:
                raise PeerError("frame", "the length has more bytes than it needs")
            if length > limit:
                raise PeerError("frame", f"at most {limit} bytes are allowed here, got {length}")
            start = index + 1
            if len(self._bytes) < start + length:
                return None
            payload = bytes(self._bytes[start : start + length])
            del self._bytes[: start + length]
            return payload
        if len(self._bytes) >= MAX_LENGTH_BYTES:
            raise PeerError("frame", f"the length has more than {MAX_LENGTH_BYTES} bytes")
        return None


class FrameStream:
    """Frames on a stream of libp2p's kind: ``read`` gives some bytes, and raises ``EOFError`` at the end.

    Mutable state: ``_buffer`` has what was read and belongs to no frame that was handed out; ``_is_at_end`` is set when
    there is nothing more to read.
    """

    def __init__(self, stream: Any, peer_id: str) -> None:
        self.stream = stream
        self.peer_id = peer_id
        self._buffer = FrameBuffer()
        self._is_at_end = False

    @property
    def has_more(self) -> bool:
        return bool(self._buffer)

    @property
    def is_ended(self) -> bool:
        """Whether the other side is known to have ended the stream while nobody used it."""
        muxed = self.stream.muxed_stream
        return bool(muxed.recv_closed or muxed.closed or self._buffer)

    @property
    def is_over(self) -> bool:
        """Whether the other side has ended the stream, and not within a frame."""
        return self._is_at_end and not self._buffer

    async def wait(self) -> None:
        """Wait for the first byte of a frame, or the end of the stream."""
        if not self._buffer:
            await self._read_some()

    async def read(self, limit: int, waits: Callable[[int], None] = lambda size: None) -> bytes | None:
        """The next frame; None if the stream ends before or within it.

        Args:
            limit: bytes that the payload may have.
            waits: told how many bytes are here, each time before more are waited for.

        Raises:
            PeerError: "frame": it is longer than the limit, or its length is not a length.
        """
        while True:
            frame = self._buffer.take(limit)
            if frame is not None:
                return frame
            waits(len(self._buffer))
            if not await self._read_some():
                return None

    async def write(self, payload: bytes) -> None:
        await self.stream.write(encode_frame(payload))

    async def _read_some(self) -> bool:
        try:
            data = await self.stream.read(READ_BYTES)
        except EOFError:
            data = b""
        self._is_at_end = not data
        self._buffer.feed(data)
        return bool(data)


@dataclass(slots=True, eq=False, kw_only=True)
class _Part:
    """A frame that is not whole yet. Mutable: ``size``, the bytes that are here."""

    peer_id: str
    scope: trio.CancelScope
    size: int = 0


class Room:
    """Where frames come in. Bounds the bytes of all that are not whole yet, of all peers together.

    If there are too many, the peer that has most of them loses its largest frame, of equals the newest: room can be
    held only by holding less of it than others.

    Mutable state: ``_parts`` are the frames that are coming, oldest first (a dictionary for its order), ``_size`` is
    their bytes, never more than the limit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: dict[_Part, None] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes of frames that are not whole."""
        return self._size

    async def read(self, frames: FrameStream, limit: int, scope: trio.CancelScope) -> bytes | None:
        """As ``FrameStream.read``.

        Args:
            frames: the stream.
            limit: bytes that the payload may have.
            scope: around this call; cancelled if the frame has to go. The stream is of no use then.
        """
        part = _Part(peer_id=frames.peer_id, scope=scope)
        self._parts[part] = None
        try:
            return await frames.read(limit, partial(self._resize, part))
        finally:
            self._leave(part)

    def _resize(self, part: _Part, size: int) -> None:
        if part not in self._parts:
            return  # It has to go, and only does not know it yet.
        self._size += size - part.size
        part.size = size
        while self._size > self._limit:
            self._put_out()

    def _put_out(self) -> None:
        of_peers: Counter[str] = Counter()
        for part in self._parts:
            of_peers[part.peer_id] += part.size
        largest = max(reversed(self._parts), key=lambda part: (of_peers[part.peer_id], part.size))
        self._leave(largest)
        largest.scope.cancel()

    def _leave(self, part: _Part) -> None:
        if part in self._parts:
            del self._parts[part]
            self._size -= part.size
