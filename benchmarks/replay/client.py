"""The open-loop client: every request is sent at its time in the trace, whatever the state of those before.

It shares the machine with the servers, so it does little while the clock runs: bodies are made ahead, connections are
kept, and for an answer it records two times and collects the bytes, which it checks at the end of the answer.

All times of a request count from when it was due, not from when it was sent. So a client or a server that falls behind
shows in the figures instead of slowing the load down (no coordinated omission). How late requests were sent is recorded
as well: if that is much, the client itself was the limit and the figures say nothing about the server.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import orjson

from benchmarks.load import LoadError, unchunk
from benchmarks.replay.trace import Request

LIMIT_S = 300.0  # after the last request was due
AHEAD_BYTES = 64 << 20  # of bodies made before they are due
SPARE_S = 0.005  # with less time than that until the next request, no further body is made
IDLE_S = 2.0  # a connection unused for longer is not used again: servers close theirs after some seconds
_HEAD_END = b"\r\n\r\n"
_CHUNKED_END = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_TEXT = re.compile(rb'"text": ?"[^"]')
_NUMBER = re.compile(r"\d+")


class Due(NamedTuple):
    """A request, and when it is due in seconds from the start of the replay."""

    at_s: float
    request: Request


@dataclass(slots=True)
class Answer:
    """Outcome of a request. Times in seconds from when it was due; nan if it did not happen."""

    due_s: float
    request: Request
    late_s: float = float("nan")
    """until it was sent"""
    ttft_s: float = float("nan")
    end_s: float = float("nan")
    cached_tokens: int | None = None
    error: str = ""
    """the failure, in the same words for the same failure; empty for none"""

    @property
    def itl_s(self) -> float:
        """Mean time between its tokens; 0 for a single one."""
        tokens = self.request.output_length
        return (self.end_s - self.ttft_s) / (tokens - 1) if tokens > 1 else 0.0


@dataclass
class Replay:
    answers: list[Answer]
    """in the order of the trace"""
    seconds: float
    """from the first request due to the last answer"""
    client_cpu_s: float
    cached: float | None = field(default=None)
    """share of prompt tokens that were cached, by the server's counters if its answers do not have it"""


def schedule(requests: Iterable[Request], speed: float) -> Iterator[Due]:
    """Yield the requests with the trace's times, counted from its first request and divided by `speed`."""
    first_ms: float | None = None
    for request in requests:
        first_ms = request.timestamp if first_ms is None else first_ms
        yield Due((request.timestamp - first_ms) / 1e3 / speed, request)


class _Connection(asyncio.Protocol):
    """One request at a time; `idle` is called when the next may come."""

    def __init__(self, idle: Callable[[_Connection], None]) -> None:
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._answered: Callable[[], None] = lambda: None
        self._parts: list[bytes] = []
        self._due = 0.0
        self._length: int | None = None
        self._size = 0
        self.unused_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes, answer: Answer, due: float, answered: Callable[[], None]) -> None:
        """Send a request that is due at `due`, by time.perf_counter().

        `answered` is called once when `answer` is complete, with or without an error.
        """
        assert self._transport is not None
        self._answer = answer
        self._due = due
        self._answered = answered
        self._parts = []
        self._length = None
        self._size = 0
        self._transport.write(data)
        answer.late_s = time.perf_counter() - due

    def data_received(self, data: bytes) -> None:
        answer, parts = self._answer, self._parts
        if answer is None:
            return
        parts.append(data)
        self._size += len(data)
        if math.isnan(answer.ttft_s):
            raw = b"".join(parts)
            if _TEXT.search(raw):
                answer.ttft_s = time.perf_counter() - self._due
            if self._length is None:
                head, end, _ = raw.partition(_HEAD_END)
                if found := _LENGTH.search(head + b"\r\n") if end else None:
                    self._length = len(head) + len(end) + int(found[1])
        if self._length is not None:
            complete = self._size >= self._length
        else:
            tail = data if len(data) >= len(_CHUNKED_END) else b"".join(parts[-len(_CHUNKED_END) :])
            complete = tail.endswith(_CHUNKED_END)
        if complete:
            answer.end_s = time.perf_counter() - self._due
            self._finish(check(b"".join(parts), answer))

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish("connection closed early")

    def _finish(self, error: str) -> None:
        answer = self._answer
        self._answer = None
        self._parts = []
        if answer is None:
            return
        answer.error = error
        if self.open:
            self.unused_since = time.perf_counter()
            self._idle(self)
        self._answered()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def check(raw: bytes, answer: Answer) -> str:
    """Return the failure of a whole answer, "" for none; set the answer's cached tokens."""
    head, _, body = raw.partition(_HEAD_END)
    status = head.split(b" ", 2)[1]
    if status != b"200":
        return f"HTTP {status.decode(errors='replace')} {_NUMBER.sub('N', _message(body))}"
    try:
        if b"transfer-encoding: chunked" in head.lower():
            body = unchunk(body)
        events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
        if b'"error"' in body:
            return "error in the stream"
        if len(events) < 2 or events[-1] != b"[DONE]":
            return "stream without [DONE]"
        usage = orjson.loads(events[-2])["usage"]
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
    except (LoadError, ValueError, KeyError, TypeError, IndexError):
        return "answer that is not a stream with usage"
    if counts != (answer.request.input_length, answer.request.output_length):
        return "wrong number of tokens"
    if math.isnan(answer.ttft_s):
        return "no text"
    answer.cached_tokens = details.get("cached_tokens")
    return ""


def _message(body: bytes) -> str:
    found = re.search(rb'"message": ?"([^"]*)', body)
    return (found[1] if found else body)[:120].decode(errors="replace")


class Client:
    """Client of one server. `body` makes a request's JSON."""

    def __init__(self, host: str, port: int, path: str, body: Callable[[Request], bytes]) -> None:
        self._host = host
        self._port = port
        self._body = body
        self._head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
        self._idle: deque[_Connection] = deque()  # the last used last
        self._all: set[_Connection] = set()

    async def run(self, due: Iterable[Due]) -> Replay:
        """Send all requests and wait for the answers, at most LIMIT_S after the last was due."""
        entries = iter(due)
        ready: deque[tuple[Due, bytes]] = deque()
        buffered = 0

        def prepare() -> bool:
            """Make the next body. Return False if there is none or enough are ready."""
            nonlocal buffered
            if buffered > AHEAD_BYTES or (entry := next(entries, None)) is None:
                return False
            body = self._body(entry.request)
            data = b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body)
            buffered += len(data)
            ready.append((entry, data))
            return True

        while prepare():
            pass
        answers: list[Answer] = []
        waiting = 0
        all_sent = False
        done = asyncio.get_running_loop().create_future()

        def answered() -> None:
            nonlocal waiting
            waiting -= 1
            if all_sent and not waiting and not done.done():
                done.set_result(None)

        cpu, began = time.process_time(), time.perf_counter()
        try:
            async with asyncio.TaskGroup() as opening:
                while ready or prepare():
                    entry, data = ready.popleft()
                    buffered -= len(data)
                    while (wait_s := began + entry.at_s - time.perf_counter()) > 0:
                        if wait_s > SPARE_S and prepare():
                            await asyncio.sleep(0)
                        else:
                            await asyncio.sleep(wait_s)
                    answer = Answer(entry.at_s, entry.request)
                    answers.append(answer)
                    waiting += 1
                    connection = self._unused()
                    if connection is not None:
                        connection.send(data, answer, began + entry.at_s, answered)
                    else:
                        opening.create_task(self._open(data, answer, began + entry.at_s, answered))
                    await asyncio.sleep(0)  # so that answers are read in a burst as well
            all_sent = True
            if waiting:
                await asyncio.wait([done], timeout=LIMIT_S)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        finally:
            for connection in self._all:
                connection.close()
        for answer in answers:
            if math.isnan(answer.end_s) and not answer.error:
                answer.error = f"no end after {LIMIT_S:.0f} s"
        return Replay(answers, seconds, cpu)

    def _unused(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open and time.perf_counter() - connection.unused_since < IDLE_S:
                return connection
            connection.close()
            self._all.discard(connection)
        return None

    async def _open(self, data: bytes, answer: Answer, due: float, answered: Callable[[], None]) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._idle.append), self._host, self._port
            )
        except OSError as error:
            answer.error = f"no connection: {os.strerror(error.errno) if error.errno else error}"
            answered()
            return
        self._all.add(connection)
        connection.send(data, answer, due, answered)


async def warm_up(client: Client, count: int, tokens: int) -> list[str]:
    """Send `count` short requests, a few at a time, that share nothing with the trace; return their errors."""
    ids = itertools.count(1 << 40)
    requests = [Request(number // 4 * 50.0, tokens, 4, [next(ids)]) for number in range(count)]
    replay = await client.run(schedule(requests, 1.0))
    return [answer.error for answer in replay.answers if answer.error]
