"""Frames: whatever bytes come, in whatever pieces, give the frames that were written or one error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pool.errors import PeerError
from p2pool.p2p.frames import MAX_LENGTH_BYTES, FrameBuffer, FrameStream, Room, encode_frame


def frames_of(pieces: list[bytes], limit: int) -> list[bytes | str]:
    """What a reader gets: payloads, and the rule broken if one is."""
    buffer, got = FrameBuffer(), list[bytes | str]()
    for piece in pieces:
        buffer.feed(piece)
        try:
            while (payload := buffer.take(limit)) is not None:
                got.append(payload)
        except PeerError as error:
            return [*got, error.rule]
    return got


@given(st.lists(st.binary(max_size=140), max_size=4), st.data())
def test_what_was_written_is_read_in_any_pieces(payloads: list[bytes], data: st.DataObject) -> None:
    raw = b"".join(map(encode_frame, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert frames_of(pieces, 140) == payloads


@given(st.binary(max_size=100), st.integers(0, 100))
def test_any_bytes_give_frames_or_one_error_however_they_are_cut(raw: bytes, limit: int) -> None:
    whole = frames_of([raw], limit)
    assert frames_of([bytes([byte]) for byte in raw], limit) == whole
    payloads = [item for item in whole if isinstance(item, bytes)]
    assert raw.startswith(b"".join(map(encode_frame, payloads)))
    assert whole[len(payloads) :] in ([], ["frame"])


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_a_frame_may_have_as_many_bytes_as_the_limit_and_no_more(size: int) -> None:
    raw = encode_frame(bytes(size))
    assert frames_of([raw], size) == [bytes(size)]
    # Refused when the length is there, before a byte of the payload is.
    assert size == 0 or frames_of([raw[:-size]], size - 1) == ["frame"]


@pytest.mark.parametrize("raw", [b"\x80\x00", b"\xff\x80\x00", b"\x80" * MAX_LENGTH_BYTES], ids=bytes.hex)
def test_a_length_has_one_form(raw: bytes) -> None:
    assert frames_of([raw], 2**28) == ["frame"]


class Senders:
    """Peers that send frames into one room, a stream each."""

    LIMIT = 1_000

    def __init__(self, nursery: trio.Nursery, room: Room) -> None:
        self._nursery = nursery
        self._room = room
        self._pieces: dict[str, trio.MemorySendChannel[bytes]] = {}
        #: What became of the streams: the payload, or None for one that had to go.
        self.ends: dict[str, bytes | None] = {}

    async def send(self, name: str, raw: bytes) -> None:
        """Send something on a stream; its first letter is the peer."""
        if name not in self._pieces:
            self._pieces[name], pieces = trio.open_memory_channel[bytes](100)
            self._nursery.start_soon(self._read, name, pieces)
        self._pieces[name].send_nowait(raw)
        await trio.testing.wait_all_tasks_blocked()

    async def _read(self, name: str, pieces: trio.MemoryReceiveChannel[bytes]) -> None:
        class Stream:
            async def read(self, size: int) -> bytes:
                return await pieces.receive()

        frames, frame = FrameStream(Stream(), name[0]), None
        with trio.CancelScope() as scope:
            frame = await self._room.read(frames, self.LIMIT, scope)
        self.ends[name] = frame


@asynccontextmanager
async def senders(room: Room) -> AsyncIterator[Senders]:
    async with trio.open_nursery() as nursery:
        yield Senders(nursery, room)
        nursery.cancel_scope.cancel()


async def test_room_is_taken_by_frames_that_are_not_whole_only() -> None:
    room = Room(100)
    async with senders(room) as peers:
        frame = encode_frame(bytes(90))
        await peers.send("a1", frame[:50])
        assert room.size == 50
        await peers.send("b1", frame)
        assert (room.size, peers.ends) == (50, {"b1": bytes(90)})
        await peers.send("a1", frame[50:])
        assert (room.size, peers.ends) == (0, {"b1": bytes(90), "a1": bytes(90)})
        await peers.send("c1", frame[:50])
    assert room.size == 0


async def test_without_room_the_peer_with_most_of_it_loses_its_largest_frame() -> None:
    room = Room(100)
    async with senders(room) as peers:
        frame = encode_frame(bytes(500))
        await peers.send("a1", frame[:20])
        await peers.send("a2", frame[:30])
        await peers.send("b1", frame[:45])
        assert (room.size, peers.ends) == (95, {})
        await peers.send("c1", frame[:6])
        assert (room.size, peers.ends) == (71, {"a2": None})
        await peers.send("c1", frame[6:90])
        assert (room.size, peers.ends) == (65, {"a2": None, "c1": None})


async def test_of_equal_frames_the_newest_has_to_go() -> None:
    room = Room(100)
    async with senders(room) as peers:
        for name in ("a1", "b1", "c1"):
            await peers.send(name, encode_frame(bytes(500))[:34])
        assert (room.size, peers.ends) == (68, {"c1": None})
