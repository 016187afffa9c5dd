"""The server on the wire: framing, keep-alive, pipelining, clients that disconnect and clients that do not read."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator

import pytest
import uvloop

from dynamo.errors import StartError
from dynamo.http.server import HttpServer
from dynamo.llm.protocol import Delta
from dynamo.openai import backlog, streaming
from dynamo.openai.app import create_app
from tests.http_backend import Call, FakeBackend, Site, chat, events, post, site, without_direct

PATH = "/v1/chat/completions"


@pytest.fixture(params=["direct", "send"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    around = without_direct if request.param == "send" else lambda app: app
    async with site(around=around) as found:
        yield found


@pytest.fixture
async def direct() -> AsyncIterator[Site]:
    async with site() as found:
        yield found


async def connect(to: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", to.port)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """Read one chunk of chunked encoding; empty at the end. Sizes and line ends must be exactly right."""
    line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    assert re.fullmatch(rb"[0-9a-f]+\r\n", line), line
    data = await asyncio.wait_for(reader.readexactly(int(line, 16) + 2), 5)
    assert data.endswith(b"\r\n")
    return data[:-2]


async def read_chunked(reader: asyncio.StreamReader) -> str:
    chunks: list[bytes] = []
    while chunk := await read_chunk(reader):
        chunks.append(chunk)
    return b"".join(chunks).decode()


async def until(condition: object, timeout_s: float = 2.0) -> None:
    assert callable(condition)
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        await asyncio.sleep(0.005)


# -- framing


async def test_chunks_go_out_as_they_come(served: Site) -> None:
    reader, writer = await connect(served)
    writer.write(post(PATH, chat(stream=True)))
    call = await served.backend.next_call()
    call.push("a")
    status, headers = await read_head(reader)
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    body = await read_chunk(reader)
    for text in ("b", "ç", "🌍", "\u2028", '"\\\n'):
        call.push(text)
        chunk = await read_chunk(reader)
        (event,) = events(chunk.decode())
        assert event["choices"][0]["delta"]["content"] == text
        body += chunk
    call.push("", end=True)
    call.channel.end()
    found = events((body.decode()) + await read_chunked(reader))
    assert found[-1] == "[DONE]"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found[:-1]) == 'abç🌍\u2028"\\\n'
    writer.close()


async def test_a_connection_is_used_again(served: Site) -> None:
    reader, writer = await connect(served)
    for stream in (True, False, True, True):
        writer.write(post(PATH, chat(stream=stream)))
        call = await served.backend.next_call()
        call.say("one", "two")
        status, headers = await read_head(reader)
        assert status == 200
        assert "connection" not in headers
        if stream:
            assert "onetwo" in "".join(
                e["choices"][0]["delta"].get("content", "") for e in events(await read_chunked(reader))[:-1]
            )
        else:
            await reader.readexactly(int(headers["content-length"]))
        assert not call.cancelled.is_set()
    writer.close()


async def test_pipelined_requests_are_answered_in_order(served: Site) -> None:
    reader, writer = await connect(served)
    writer.write(
        post(PATH, chat(stream=True)) + post(PATH, chat(stream=True)) + b"GET /live HTTP/1.1\r\nhost: t\r\n\r\n"
    )
    for text in ("first", "second"):
        call = await served.backend.next_call()
        await asyncio.sleep(0.02)
        assert len(served.backend.calls) == (1 if text == "first" else 2)
        call.say(text)
        await read_head(reader)
        assert text in await read_chunked(reader)
    assert (await read_head(reader))[0] == 200
    assert json.loads(await reader.readexactly(17)) == {"status": "live"}
    writer.close()


async def test_connection_close(served: Site) -> None:
    for stream in (True, False):
        reader, writer = await connect(served)
        writer.write(post(PATH, chat(stream=stream), "connection: close"))
        (await served.backend.next_call()).say("x")
        _, headers = await read_head(reader)
        assert headers["connection"] == "close"
        rest = await asyncio.wait_for(reader.read(), 5)  # until the server closes
        assert rest.endswith(b"0\r\n\r\n") == stream
        writer.close()


async def test_http_1_0_gets_no_chunks(direct: Site) -> None:
    reader, writer = await connect(direct)
    writer.write(post(PATH, chat(stream=True), version="1.0"))
    call = await direct.backend.next_call()
    call.say("one", "two", "three")
    _, headers = await read_head(reader)
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    body = await asyncio.wait_for(reader.read(), 5)
    assert events(body.decode())[-1] == "[DONE]"
    writer.close()


async def test_http_1_0_unary_and_error(direct: Site) -> None:
    for body, status in ((chat(), 200), (chat(n=0), 400)):
        reader, writer = await connect(direct)
        writer.write(post(PATH, body, version="1.0"))
        if status == 200:
            (await direct.backend.next_call()).say("x")
        found, headers = await read_head(reader)
        assert found == status
        assert len(await asyncio.wait_for(reader.read(), 5)) == int(headers["content-length"])
        writer.close()


async def test_expect_100_continue(direct: Site) -> None:
    reader, writer = await connect(direct)
    head, _, body = post(PATH, chat(), "expect: 100-continue").partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100")
    writer.write(body)
    (await direct.backend.next_call()).say("x")
    assert (await read_head(reader))[0] == 200
    writer.close()


# -- silence


async def test_headers_and_comments_during_a_long_prefill(served: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SILENCE_S", 0.05)
    reader, writer = await connect(served)
    writer.write(post(PATH, chat(stream=True)))
    call = await served.backend.next_call()
    status, _ = await read_head(reader)
    assert status == 200
    assert b'"role":"assistant"' in await read_chunk(reader)
    await asyncio.sleep(0.2)
    call.say("at last")
    body = await read_chunked(reader)
    assert "at last" in body
    assert events(body)[-1] == "[DONE]"
    writer.close()


async def test_comments_during_a_long_prefill_of_a_completion(direct: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text completion has no opening chunk, and an empty chunk would end the response."""
    monkeypatch.setattr(streaming, "SILENCE_S", 0.05)
    reader, writer = await connect(direct)
    writer.write(post("/v1/completions", {"prompt": "x", "stream": True}))
    call = await direct.backend.next_call()
    await read_head(reader)
    assert await read_chunk(reader) == b": waiting\n\n"
    call.say("text")
    assert events(await read_chunked(reader))[-1] == "[DONE]"
    writer.close()


# -- clients that disconnect


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "reset":
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.transport.abort() if how == "reset" else writer.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(("stream", "tokens"), [(True, 0), (True, 2), (False, 0), (False, 2)])
async def test_a_disconnect_cancels_the_request(served: Site, how: str, stream: bool, tokens: int) -> None:
    reader, writer = await connect(served)
    writer.write(post(PATH, chat(stream=stream)))
    call = await served.backend.next_call()
    for _ in range(tokens):
        call.push("x")
    if stream and tokens:
        await read_head(reader)
    await asyncio.sleep(0.02)
    left = time.monotonic()
    leave(writer, how)
    await asyncio.wait_for(call.cancelled.wait(), 2)
    assert time.monotonic() - left < 1.0
    page = await gauge(served, "dynamo_frontend_inflight_requests")
    assert page == 0
    assert await gauge(served, "dynamo_frontend_disconnected_clients") == 1


async def gauge(at: Site, name: str) -> float:
    await asyncio.sleep(0.03)
    reader, writer = await connect(at)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    text = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def test_a_disconnect_before_the_body_is_complete(served: Site) -> None:
    _, writer = await connect(served)
    writer.write(post(PATH, chat())[:-10])
    await asyncio.sleep(0.02)
    writer.close()
    await asyncio.sleep(0.02)
    assert not served.backend.calls
    assert await gauge(served, "dynamo_frontend_inflight_requests") == 0


async def test_a_disconnect_with_a_second_request_in_the_pipeline(direct: Site) -> None:
    """uvicorn reports a disconnect only to the newest request of a connection; the writer notices the closed transport."""
    reader, writer = await connect(direct)
    writer.write(post(PATH, chat(stream=True)) + post(PATH, chat(stream=True)))
    call = await direct.backend.next_call()
    call.push("x")
    await read_head(reader)
    leave(writer, "reset")
    for _ in range(20):
        await asyncio.sleep(0.01)
        call.push("y")
    assert call.cancelled.is_set()


async def test_closing_after_the_response_is_not_a_disconnect(served: Site) -> None:
    reader, writer = await connect(served)
    writer.write(post(PATH, chat(stream=True)))
    call = await served.backend.next_call()
    call.say("all", "of", "it")
    await read_head(reader)
    await read_chunked(reader)
    writer.close()
    assert await gauge(served, "dynamo_frontend_disconnected_clients") == 0
    assert not call.cancelled.is_set()


# -- clients that do not read


async def test_a_slow_client_gets_everything_and_delays_no_other(served: Site) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", served.port))
    await loop.sock_sendall(slow, post(PATH, chat(stream=True, n=2), "connection: close"))
    call = await served.backend.next_call()
    texts: list[list[str]] = [[], []]
    most = 0
    for i in range(60_000):  # 12 MB of text alone, which no socket buffer takes
        text = f"{i:x} " + "ü" * 100
        texts[i % 2].append(text)
        call.channel.push(Delta(text, [i], i % 2, prompt_tokens=3 if i == 0 else None))
        if i % 1000 == 0:
            await asyncio.sleep(0)
            most = max(most, _waiting_deltas())
    assert backlog.MERGE_ABOVE < most <= 60_000 / 8
    # another client is served meanwhile
    reader, writer = await connect(served)
    writer.write(post(PATH, chat()))
    (await served.backend.next_call()).say("quick")
    assert (await read_head(reader))[0] == 200
    writer.close()
    for index in (0, 1):
        call.push("", index=index, end=True)
    call.channel.end()
    body = bytearray()
    while part := await asyncio.wait_for(loop.sock_recv(slow, 1 << 20), 10):
        body += part
    slow.close()
    chunked = asyncio.StreamReader()
    chunked.feed_data(body[body.index(b"\r\n\r\n") + 4 :])
    chunked.feed_eof()
    found = events(await read_chunked(chunked))
    assert found[-1] == "[DONE]"
    got: list[list[str]] = [[], []]
    for event in found[:-1]:
        got[event["choices"][0]["index"]].append(event["choices"][0]["delta"].get("content", ""))
    assert ["".join(each) for each in got] == ["".join(each) for each in texts]
    assert len(found) < 60_000  # merged


def _waiting_deltas() -> int:
    """Return the length of the longest backlog of the responses in progress."""
    kept = 0
    for task in asyncio.all_tasks():
        coroutine = task.get_coro()
        while coroutine is not None and getattr(coroutine, "cr_frame", None) is not None:
            found = coroutine.cr_frame.f_locals.get("self")
            if isinstance(found, streaming.EventStreamWriter):
                kept = max(kept, len(found._backlog.deltas))
            coroutine = coroutine.cr_await
    return kept


async def test_a_client_that_never_reads_and_disconnects(served: Site) -> None:
    reader, writer = await connect(served)
    writer.transport.pause_reading()
    writer.write(post(PATH, chat(stream=True)))
    call = await served.backend.next_call()
    for i in range(40_000):
        call.push(f"token {i}")
        if i % 1000 == 0:
            await asyncio.sleep(0)
    leave(writer, "reset")
    await asyncio.wait_for(call.cancelled.wait(), 2)
    assert await gauge(served, "dynamo_frontend_inflight_requests") == 0
    assert reader is not None


# -- the server itself


def test_the_same_on_uvloop() -> None:
    """uvloop is the event loop of a graph's processes."""

    async def main() -> None:
        async with site() as found:
            await test_chunks_go_out_as_they_come(found)
            await test_a_connection_is_used_again(found)
            await test_a_slow_client_gets_everything_and_delays_no_other(found)
            await test_a_disconnect_with_a_second_request_in_the_pipeline(found)
            await test_http_1_0_gets_no_chunks(found)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_small_writes_do_not_wait(direct: Site) -> None:
    """Without TCP_NODELAY, each second write waits 40 ms for the client's delayed acknowledgement."""
    reader, writer = await connect(direct)
    began = time.monotonic()
    for _ in range(10):
        writer.write(post(PATH, chat()))
        (await direct.backend.next_call()).say("x")
        _, headers = await read_head(reader)
        await reader.readexactly(int(headers["content-length"]))
    assert time.monotonic() - began < 1.0
    writer.close()


async def test_stop_lets_running_responses_end() -> None:
    async with site() as found:
        reader, writer = await connect(found)
        writer.write(post(PATH, chat(stream=True)))
        call = await found.backend.next_call()
        call.push("a")
        await read_head(reader)
        stopping = asyncio.create_task(found.server.stop())
        await asyncio.sleep(0.15)
        with pytest.raises(OSError, match=r"."):
            await connect(found)
        call.say("b")
        assert events(await read_chunked(reader))[-1] == "[DONE]"
        await asyncio.wait_for(stopping, 5)
        writer.close()


async def test_a_port_in_use(direct: Site) -> None:
    second = HttpServer(create_app(FakeBackend()), "127.0.0.1", direct.port)
    with pytest.raises(StartError, match=f"127.0.0.1:{direct.port}") as caught:
        await second.start()
    assert "--port" in str(caught.value.hint)


async def test_all_addresses() -> None:
    found = HttpServer(create_app(FakeBackend(Call.say)), "::", (await _port()))
    await found.start()
    try:
        assert found.url.startswith("http://127.0.0.1:")
        for host in ("127.0.0.1", "::1"):
            _, writer = await asyncio.open_connection(host, found.port)
            writer.close()
    finally:
        await found.stop()


async def _port() -> int:
    from tests.ports import free_port

    return free_port()
