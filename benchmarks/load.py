"""A cheap closed-loop load on an OpenAI chat endpoint: N connections, each with one request after another.

It shares the machine with the servers it measures, so while the clock runs it only collects bytes and records two times
a request. Afterwards every answer is parsed and checked: status, chunks, JSON, end, and the number of tokens.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import orjson

LIMIT_S = 300.0
_HEAD_END = b"\r\n\r\n"
_CHUNKED_END = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_TEXT = re.compile(rb'"content": ?"[^"]')
_WORDS = [f"w{i}" for i in range(500)]


class LoadError(Exception):
    """A request failed or an answer is not as requested, so its figures would be worthless."""


@dataclass(frozen=True)
class Load:
    """`requests` in total over `streams` connections, each for exactly `output_tokens`."""

    streams: int
    requests: int
    output_tokens: int = 128
    input_words: int = 64
    streaming: bool = True

    @property
    def tokens(self) -> int:
        return self.requests * self.output_tokens

    def bodies(self, model: str, seed: int) -> Iterator[bytes]:
        """Yield requests whose prompts begin differently, so that no prefix cache helps."""
        words = random.Random(seed)
        for number in range(self.requests):
            text = f"{seed}.{number} " + " ".join(words.choices(_WORDS, k=self.input_words))
            body: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": self.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": self.streaming,
            }
            if self.streaming:
                body["stream_options"] = {"include_usage": True}
            yield orjson.dumps(body)


@dataclass
class Answer:
    """One request's times in seconds and its raw bytes."""

    ttft_s: float
    duration_s: float
    raw: bytes


@dataclass(frozen=True)
class Outcome:
    """Times in seconds; `chunks` are the events that carried text."""

    seconds: float
    client_cpu_s: float
    tokens: int
    chunks: int
    ttft_s: list[float]
    duration_s: list[float]


class _Connection(asyncio.Protocol):
    """Sends the next request as soon as an answer is complete, until there are no more."""

    def __init__(self, requests: Iterator[bytes], answers: list[Answer]) -> None:
        self._requests = requests
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._length: int | None = None  # of the whole answer, if its head has a content-length
        self._size = 0
        self._first_s = 0.0
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_exception(LoadError(f"the server closed a connection early: {exc or 'end of stream'}"))

    def next(self) -> None:
        request = next(self._requests, None)
        if request is None or self._transport is None:
            if not self.finished.done():
                self.finished.set_result(None)
            return
        self._parts = []
        self._length = None
        self._size = 0
        self._first_s = 0.0
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        parts = self._parts
        parts.append(data)
        self._size += len(data)
        if not self._first_s:
            raw = b"".join(parts)
            if _TEXT.search(raw):
                self._first_s = time.perf_counter() - self._began
            if self._length is None:
                head, end, _ = raw.partition(_HEAD_END)
                found = _LENGTH.search(head + b"\r\n") if end else None
                if found:
                    self._length = len(head) + len(end) + int(found[1])
        if self._length is not None:
            complete = self._size >= self._length
        else:
            tail = data if len(data) >= len(_CHUNKED_END) else b"".join(parts[-len(_CHUNKED_END) :])
            complete = tail.endswith(_CHUNKED_END)
        if complete:
            self._answers.append(Answer(self._first_s, time.perf_counter() - self._began, b"".join(parts)))
            self.next()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Client:
    """Applies loads to one server, each over new connections."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self._host = host
        self._port = port
        self._model = model
        self._seed = 0

    async def run(self, load: Load) -> Outcome:
        """Apply `load`. Raises LoadError if any answer is incomplete or not exact."""
        self._seed += 1
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
            % self._host.encode()
        )
        bodies = load.bodies(self._model, self._seed)
        requests = iter([head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies])
        answers: list[Answer] = []
        loop = asyncio.get_running_loop()
        connections: list[_Connection] = []
        try:
            for _ in range(load.streams):
                _, connection = await loop.create_connection(
                    lambda: _Connection(requests, answers), self._host, self._port
                )
                connections.append(connection)
            cpu, began = time.process_time(), time.perf_counter()
            for connection in connections:
                connection.next()
            try:
                async with asyncio.timeout(LIMIT_S):
                    await asyncio.gather(*(connection.finished for connection in connections))
            except TimeoutError:
                raise LoadError(f"{len(answers)} of {load.requests} answers after {LIMIT_S:.0f} s") from None
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        finally:
            for connection in connections:
                connection.close()
        if len(answers) != load.requests:
            raise LoadError(f"{len(answers)} answers to {load.requests} requests")
        chunks = sum(check(answer.raw, load) for answer in answers)
        ttft_s = sorted(answer.ttft_s for answer in answers)
        return Outcome(seconds, cpu, load.tokens, chunks, ttft_s, sorted(answer.duration_s for answer in answers))


def check(raw: bytes, load: Load) -> int:
    """Return the number of chunks with text in an answer.

    Raises LoadError unless the answer is complete and has the requested tokens.
    """
    head, _, body = raw.partition(_HEAD_END)
    status = head.split(b" ", 2)[1]
    if b"transfer-encoding: chunked" in head.lower():
        body = unchunk(body)
    if status != b"200":
        raise LoadError(f"HTTP {status.decode()}: {body[:300].decode(errors='replace')}")
    if not load.streaming:
        return _check_whole(orjson.loads(body), load.output_tokens)
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise LoadError(f"a stream does not end in [DONE]: {body[-300:].decode(errors='replace')}")
    chunks = tokens = 0
    finished = False
    for event in events[:-1]:
        value = orjson.loads(event)
        if "error" in value:
            raise LoadError(f"an error in a stream: {event.decode()}")
        tokens += (value.get("usage") or {}).get("completion_tokens", 0)
        for choice in value["choices"]:
            finished = finished or choice["finish_reason"] is not None
            chunks += bool(choice["delta"].get("content"))
    if tokens != load.output_tokens or not finished or not chunks:
        raise LoadError(f"{tokens} tokens in {chunks} chunks, finished: {finished}; asked for {load.output_tokens}")
    return chunks


def _check_whole(value: dict[str, Any], output_tokens: int) -> int:
    tokens, choice = value["usage"]["completion_tokens"], value["choices"][0]
    if tokens != output_tokens or not choice["message"]["content"] or not choice["finish_reason"]:
        raise LoadError(f"{tokens} tokens, asked for {output_tokens}: {value}")
    return 1


def unchunk(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end].split(b";")[0], 16)
        at = line_end + 2
        if size == 0:
            return b"".join(parts)
        parts.append(body[at : at + size])
        if body[at + size : at + size + 2] != b"\r\n":
            raise LoadError("an answer does not match its chunk sizes")
        at += size + 2


def percentile(ordered: list[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
