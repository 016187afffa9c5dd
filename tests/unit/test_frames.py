"""Frames are read as they were packed, however the bytes are split; other bytes are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.rpc import frames

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=12)


def read(pieces: list[bytes]) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    reader = frames.FrameReader(lambda kind, body: found.append((kind, bytes(body))))
    for piece in pieces:
        reader.feed(piece)
    return found


@given(FRAMES, st.data())
def test_any_split_gives_the_same_frames(sent: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(frames.pack(kind, body) for kind, body in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(pieces) == sent


@given(FRAMES)
def test_byte_by_byte(sent: list[tuple[int, bytes]]) -> None:
    stream = b"".join(frames.pack(kind, body) for kind, body in sent)
    assert read([stream[i : i + 1] for i in range(len(stream))]) == sent


@pytest.mark.parametrize("length", [0, frames.MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_refuses_impossible_lengths(length: int) -> None:
    good = frames.pack(frames.END, b"x")
    reader = frames.FrameReader(lambda *_: None)
    reader.feed(good)
    with pytest.raises(ValueError, match=f"frame of {length} bytes"):
        reader.feed(struct.pack("!IB", length, 1))


def test_refuses_to_pack_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 10)
    assert read([frames.pack(1, b"123456789")]) == [(1, b"123456789")]
    with pytest.raises(ValueError, match="too many"):
        frames.pack(1, b"1234567890")


def test_a_large_frame_in_small_pieces_is_linear() -> None:
    body = bytes(4 << 20)
    stream = frames.pack(frames.BODY, body)
    assert read([stream[i : i + 4096] for i in range(0, len(stream), 4096)]) == [(frames.BODY, body)]
