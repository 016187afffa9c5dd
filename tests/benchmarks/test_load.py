"""The load generator accepts whole answers and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from benchmarks.load import Client, Load, LoadError


def _event(**value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _text(text: str) -> bytes:
    return _event(choices=[{"delta": {"content": text}, "finish_reason": None}])


LAST = _event(choices=[{"delta": {}, "finish_reason": "length"}])
DONE = b"data: [DONE]\n\n"


def _usage(tokens: int) -> bytes:
    return _event(choices=[], usage={"completion_tokens": tokens})


def _stream(*events: bytes, status: bytes = b"200 OK") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return b"HTTP/1.1 " + status + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


async def _load(answer: bytes, load: Load, piece: int = 1 << 20) -> Any:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            for at in range(0, len(answer), piece):
                writer.write(answer[at : at + piece])
                await writer.drain()
                await asyncio.sleep(0)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await Client("127.0.0.1", server.sockets[0].getsockname()[1], "m").run(load)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
async def test_counts_the_tokens_and_chunks_of_every_request(piece: int) -> None:
    answer = _stream(_text("a b"), _text("c"), LAST, _usage(3), DONE)
    outcome = await _load(answer, Load(streams=2, requests=5, output_tokens=3), piece)
    assert (outcome.tokens, outcome.chunks, len(outcome.ttft_s)) == (15, 10, 5)
    assert all(0 < first <= last for first, last in zip(outcome.ttft_s, outcome.duration_s, strict=True))


@pytest.mark.parametrize(
    "answer",
    [
        _stream(_text("a"), LAST, _usage(1)),  # no end
        _stream(_text("a"), LAST, _usage(2), DONE),  # too many tokens
        _stream(_text("a"), _usage(1), DONE),  # no finish reason
        _stream(LAST, _usage(1), DONE),  # no text
        _stream(_event(error={"message": "broken"}), DONE),
        _stream(b'{"error": {}}', status=b"503 Service Unavailable"),
    ],
)
async def test_refuses_inexact_answers(answer: bytes) -> None:
    with pytest.raises(LoadError):
        await _load(answer, Load(streams=1, requests=1, output_tokens=1))


async def test_reads_a_whole_answer() -> None:
    body = orjson.dumps(
        {"choices": [{"message": {"content": "a"}, "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
    )
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    outcome = await _load(answer, Load(streams=1, requests=3, output_tokens=1, streaming=False), 5)
    assert outcome.tokens == 3
