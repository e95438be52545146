"""Frames: whatever bytes come, in whatever pieces, give the frames that were written or one error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.errors import PeerError
from p2pool.p2p.frames import MAX_LENGTH_BYTES, FrameBuffer, encode_frame


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
