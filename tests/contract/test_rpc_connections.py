"""The two ends of an RPC connection over real sockets, without NATS or etcd."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo import codec
from dynamo.errors import DeadlineError, TransportError, WorkerLostError
from dynamo.rpc import frames
from dynamo.rpc import server_connection as listeners
from dynamo.rpc.client_connection import ClientConnection, ClientStream, connect
from dynamo.rpc.messages import Request
from dynamo.rpc.server_connection import ServerConnection, ServerStream, StreamListener
from dynamo.streams import Channel, Stream

decode_any = codec.decoder(Any)


class Ends:
    """A client and a server, connected."""

    def __init__(self, listener: StreamListener, client: ClientConnection, server: ServerConnection) -> None:
        self.listener = listener
        self.client = client
        self.server = server
        self.byes = 0

    def open(self, decode: codec.Decode = decode_any, **kwargs: Any) -> tuple[Stream[Any], ClientStream, ServerStream]:
        channel: Channel[Any] = Channel()
        client_stream = self.client.open_stream(decode, channel, **kwargs)
        client_stream.accepted = True
        channel.on_cancel = lambda: self.client.cancel_stream(client_stream)
        return Stream(channel), client_stream, self.server.open_stream(client_stream.sid)


@pytest.fixture(params=["unix", "tcp"])
async def ends(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ends]:
    listener = StreamListener()
    listener.key = KEY
    if request.param == "unix":
        await listener.listen(unix=tmp_path / "s")
    else:
        await listener.listen(tcp=("127.0.0.1", 0))
    found: list[Ends] = []

    def bye() -> None:
        found[0].byes += 1

    client = await connect(listener.addresses, KEY, same_host=True, on_lost=lambda _: None, on_bye=bye)
    server = await listener.connection(client.id)
    assert server is not None
    found.append(Ends(listener, client, server))
    yield found[0]
    client.abort()
    await listener.close()
    await asyncio.sleep(0.01)


async def soon(condition: Any, seconds: float = 1.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def collect(stream: Stream[Any]) -> list[Any]:
    return [item async for item in stream]


async def test_items_of_a_step_are_one_frame_and_the_ends_follow(ends: Ends) -> None:
    kinds: list[int] = []
    dispatch = ends.client._dispatch

    def spy(kind: int, body: bytes | bytearray) -> None:
        kinds.append(kind)
        dispatch(kind, body)

    ends.client._reader = frames.FrameReader(spy)
    opened = [ends.open() for _ in range(20)]
    for _, _, server_stream in opened:
        server_stream.send("a")
    for _, _, server_stream in opened:
        server_stream.send("b")
        server_stream.end()
    assert [await collect(stream) for stream, _, _ in opened] == [["a", "b"]] * 20
    assert kinds == [frames.DATA, frames.END]
    assert not ends.client.streams
    assert not ends.server.streams


async def test_error_after_items_of_the_same_step(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    server_stream.send(1)
    server_stream.end(KeyError("x"), "here")
    server_stream.send(2)
    assert await anext(stream) == 1
    with pytest.raises(KeyError) as caught:
        await anext(stream)
    assert caught.value.__notes__ == ["raised in here"]


@pytest.mark.parametrize("bad", [object(), 1 << 70, "\ud800", {"a": {object()}}])
async def test_unsendable_item_fails_only_its_own_stream(ends: Ends, bad: Any) -> None:
    good, _, good_out = ends.open()
    broken, _, broken_out = ends.open()
    errors: list[Exception | None] = []
    broken_out.on_cancel = errors.append
    for server_stream, items in ((good_out, [1, 2]), (broken_out, [1, bad, 3])):
        for item in items:
            server_stream.send(item)
    good_out.send(3)
    good_out.end()
    assert await collect(good) == [1, 2, 3]
    assert await anext(broken) == 1
    with pytest.raises((TypeError, OverflowError, UnicodeEncodeError)):
        await anext(broken)
    assert broken_out.closed
    assert len(errors) == 1
    assert errors[0] is not None


async def test_an_unsendable_last_item_is_an_error(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    server_stream.send(object())
    server_stream.end()
    with pytest.raises(TypeError):
        await anext(stream)


async def test_a_step_too_large_for_one_frame(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    small, large = [ends.open() for _ in range(3)], ends.open()
    for _, _, server_stream in small:
        server_stream.send("x" * 500)
        server_stream.end()
    large[2].send("x" * 1500)
    assert [len((await collect(stream))[0]) for stream, _, _ in small] == [500] * 3
    with pytest.raises(ValueError, match="too many"):
        await anext(large[0])


async def test_item_that_does_not_decode_fails_its_stream_and_stops_the_server(ends: Ends) -> None:
    stream, _, server_stream = ends.open(codec.decoder(int))
    other, _, other_out = ends.open()
    server_stream.send("no int")
    other_out.send("yes")
    with pytest.raises(Exception, match="invalid int"):
        await anext(stream)
    assert await anext(other) == "yes"
    await soon(lambda: server_stream.closed)


async def test_a_consumer_that_fails_does_not_disturb_others(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    other, _, other_out = ends.open()

    def fail(_: Any) -> None:
        raise RuntimeError("consumer")

    stream.pipe(fail, fail)
    server_stream.send(1)
    other_out.send(2)
    assert await anext(other) == 2
    await soon(lambda: server_stream.closed)
    assert ends.client.alive


async def test_streams_of_one_type_and_of_several(ends: Ends) -> None:
    """Frames are decoded in one step if all items are of one type; the result must be the same."""
    integer, text = codec.decoder(int), codec.decoder(str)
    assert codec.decoder(int) is integer
    first, _, first_out = ends.open(integer)
    second, _, second_out = ends.open(integer)
    first_out.send(1)
    second_out.send("not an int")
    assert await anext(first) == 1
    with pytest.raises(Exception, match="invalid int"):
        await anext(second)
    other, _, other_out = ends.open(text)
    for _ in range(2):
        first_out.send(2)
        other_out.send("two")
        assert (await anext(first), await anext(other)) == (2, "two")
    first.cancel()
    other_out.send("three")
    assert await anext(other) == "three"
    other.cancel()
    third, _, third_out = ends.open(integer)
    other_out.send("late")  # of a stream that the client has cancelled, and of another type
    third_out.send(3)
    assert await anext(third) == 3


async def test_cancel_reaches_the_server(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    errors: list[Any] = []
    server_stream.on_cancel = errors.append
    stream.cancel()
    await soon(lambda: server_stream.closed)
    assert errors == [None]
    server_stream.send(1)
    server_stream.end()


async def test_cancel_before_the_request_arrives(ends: Ends) -> None:
    channel: Channel[Any] = Channel()
    client_stream = ends.client.open_stream(decode_any, channel)
    ends.client.cancel_stream(client_stream)
    await asyncio.sleep(0.02)
    assert ends.server.open_stream(client_stream.sid).closed


async def test_cancels_of_requests_that_never_come_are_bounded(ends: Ends) -> None:
    last = None
    for _ in range(listeners.EARLY_CANCELS + 100):
        last = ends.client.open_stream(decode_any, Channel())
        ends.client.cancel_stream(last)
    await asyncio.sleep(0.1)
    assert len(ends.server._early_cancels) == listeners.EARLY_CANCELS
    assert last is not None
    assert ends.server.open_stream(last.sid).closed


async def test_a_stream_is_opened_once(ends: Ends) -> None:
    stream, client_stream, server_stream = ends.open()
    assert not server_stream.closed
    assert ends.server.open_stream(client_stream.sid).closed
    assert not server_stream.closed
    stream.cancel()


async def test_body_before_and_after_its_request(ends: Ends) -> None:
    body = codec.encode("b" * 3_000_000)
    ends.client.control(frames.BODY, (1, body))
    await soon(lambda: ends.server.has_body(1))
    assert await ends.server.receive_body(1) == body
    waiting = asyncio.create_task(ends.server.receive_body(2))
    await asyncio.sleep(0.01)
    ends.client.control(frames.BODY, (2, body))
    assert await waiting == body
    assert not ends.server._bodies


async def test_bodies_of_cancelled_requests_are_freed(ends: Ends) -> None:
    client_stream = ends.client.open_stream(decode_any, Channel())
    ends.client.control(frames.BODY, (client_stream.sid, b"x"))
    await soon(lambda: ends.server.has_body(client_stream.sid))
    waiting = asyncio.create_task(ends.server.receive_body(99))
    await asyncio.sleep(0)
    ends.client.cancel_stream(client_stream)
    await soon(lambda: client_stream.sid not in ends.server._bodies)
    ends.client.abort()
    assert await waiting is None


async def test_lost_connection_fails_accepted_streams_and_cancels_them_on_the_server(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    server_stream.send(1)
    assert await anext(stream) == 1
    ends.server.abort()
    with pytest.raises(WorkerLostError):
        await anext(stream)
    await soon(lambda: server_stream.closed)
    assert ends.server.open_stream(77).closed


async def test_a_connection_lost_before_acceptance_fails_the_reply(ends: Ends) -> None:
    channel: Channel[Any] = Channel()
    client_stream = ends.client.open_stream(decode_any, channel)
    ends.server.abort()
    with pytest.raises(WorkerLostError):
        await asyncio.wait_for(client_stream.reply, 1)
    assert not channel.done


async def test_deadline_at_the_client(ends: Ends) -> None:
    stream, client_stream, server_stream = ends.open(left_s=0.01)
    with pytest.raises(DeadlineError):
        await anext(stream)
    await soon(lambda: server_stream.closed)
    assert client_stream.deadline_timer is not None


async def test_the_deadline_timer_is_cancelled_with_the_stream(ends: Ends) -> None:
    stream, client_stream, server_stream = ends.open(left_s=60)
    server_stream.end()
    assert await collect(stream) == []
    assert client_stream.deadline_timer is not None
    assert client_stream.deadline_timer.cancelled()


async def test_retired_connection_closes_with_its_last_stream(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    ends.client.retire()
    server_stream.send(1)
    assert await anext(stream) == 1
    server_stream.end()
    assert await collect(stream) == []
    await soon(lambda: ends.client.transport is None)
    await soon(lambda: not ends.listener.accepted)


async def test_bye_reaches_present_and_later_clients(ends: Ends) -> None:
    ends.listener.announce_stop()
    await soon(lambda: ends.byes == 1)
    later: list[int] = []
    connection = await connect(
        ends.listener.addresses, KEY, same_host=True, on_lost=lambda _: None, on_bye=lambda: later.append(1)
    )
    await soon(lambda: later == [1])
    connection.close()


async def test_a_generator_stays_within_its_window(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    sent = 0

    async def produce() -> None:
        nonlocal sent
        for i in range(5000):
            server_stream.send(i)
            sent += 1
            if server_stream.full:
                await server_stream.wait_until_writable()
        server_stream.end()

    producer = asyncio.create_task(produce())
    await asyncio.sleep(0.05)
    assert sent == listeners.WINDOW_ITEMS
    assert [await anext(stream) for _ in range(300)] == list(range(300))
    await asyncio.sleep(0.05)
    assert listeners.WINDOW_ITEMS < sent <= listeners.WINDOW_ITEMS + 300
    assert await collect(stream) == list(range(300, 5000))
    await producer


async def test_large_items_wait_for_a_process_that_does_not_read(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    assert ends.client.transport is not None
    ends.client.transport.pause_reading()
    sent = 0
    while not server_stream.full:
        server_stream.send(b"x" * 100_000)
        sent += 1
        await asyncio.sleep(0)
        assert sent < 1000
    waiting = asyncio.create_task(server_stream.wait_until_writable())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    ends.client.transport.resume_reading()
    await asyncio.wait_for(waiting, 2)
    assert not server_stream.closed
    stream.cancel()


async def test_a_client_that_never_reads_is_dropped(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "MAX_UNREAD_BYTES", 4 << 20)
    stream, _, server_stream = ends.open()
    assert ends.client.transport is not None
    ends.client.transport.pause_reading()
    for _ in range(200):
        server_stream.send(b"x" * 100_000)
        await asyncio.sleep(0)
        if server_stream.closed:
            break
    assert server_stream.closed
    assert not ends.server.alive
    stream.cancel()


KEY = "0123456789abcdef"


def raw_frame(kind: int, body: Any) -> bytes:
    return frames.pack(kind, msgspec.msgpack.encode(body))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!IB", 0, 1),
        raw_frame(frames.CANCEL, 1),
        raw_frame(frames.HELLO, 5),
        raw_frame(frames.HELLO, "a"),
        struct.pack("!IB", 1 << 20, frames.HELLO),
        raw_frame(frames.HELLO, ("a", "")),
        raw_frame(frames.HELLO, ("a", KEY[:-1])),
        raw_frame(frames.HELLO, ("a", KEY)) + raw_frame(frames.HELLO, ("b", KEY)),
        raw_frame(frames.HELLO, ("a", KEY)) + frames.pack(frames.CREDIT, b"\xc1"),
        raw_frame(frames.HELLO, ("a", KEY)) + frames.pack(frames.CREDIT, b"\x91" * 100_000),
        raw_frame(frames.HELLO, ("a", KEY)) + raw_frame(frames.REQUEST, ("a.b", [])),
    ],
)
async def test_bad_frames_drop_their_connection_only(ends: Ends, data: bytes) -> None:
    stream, _, server_stream = ends.open()
    addresses = ends.listener.addresses
    if "unix" in addresses:
        reader, writer = await asyncio.open_unix_connection(addresses["unix"])
    else:
        host, _, port = addresses["tcp"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(1):
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
    writer.close()
    server_stream.send(1)
    assert await anext(stream) == 1
    assert list(ends.listener.connections) == [ends.client.id]


async def test_bad_frames_from_the_server_end_its_streams(ends: Ends) -> None:
    stream, _, _ = ends.open()
    assert ends.server.transport is not None
    ends.server.transport.write(raw_frame(frames.DATA, [[1, 2], [1]]))
    with pytest.raises(WorkerLostError):
        await collect(stream)


async def test_frames_of_a_later_version_are_ignored(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    ends.server.control(99, "?")
    ends.client.control(99, "?")
    server_stream.send(1)
    assert await anext(stream) == 1


def send_request(
    ends: Ends, *, wait_s: float, deadline_s: float | None = None
) -> tuple[ClientStream, asyncio.Task[None]]:
    client_stream = ends.client.open_stream(decode_any, Channel(), deadline_s)
    request = Request("", ends.client.id, client_stream.sid, deadline_s, msgspec.Raw(b"\xc0"))
    return client_stream, asyncio.create_task(ends.client.request(client_stream, "a.b", request, wait_s))


async def test_a_request_waits_while_bytes_move(ends: Ends) -> None:
    """Its acceptance may be queued behind the items of other streams."""
    stream, _, server_stream = ends.open()
    client_stream, request = send_request(ends, wait_s=0.05)
    for _ in range(10):
        server_stream.send("much")
        await asyncio.sleep(0.02)
    assert not request.done()
    ends.server.accept(client_stream.sid)
    await request
    stream.cancel()


async def test_a_request_without_an_answer_times_out(ends: Ends) -> None:
    _, request = send_request(ends, wait_s=0.05)
    with pytest.raises(TransportError, match=r"did not answer within 0\.1 s"):
        await request


async def test_a_request_waits_no_longer_than_its_deadline(ends: Ends) -> None:
    stream, _, server_stream = ends.open()
    _, request = send_request(ends, wait_s=0.05, deadline_s=0.12)
    started = time.monotonic()
    while not request.done():
        server_stream.send("much")
        await asyncio.sleep(0.01)
        assert time.monotonic() - started < 1
    assert isinstance(request.exception(), TransportError)
    stream.cancel()


async def test_lost_right_after_an_acceptance_over_nats(ends: Ends) -> None:
    """The acceptance has arrived, and the task that awaits it has not run yet."""
    channel: Channel[Any] = Channel()
    client_stream = ends.client.open_stream(decode_any, channel)
    client_stream.reply.set_result(b"")
    ends.client.abort()
    async with asyncio.timeout(1):
        with pytest.raises(WorkerLostError):
            await collect(Stream(channel))


async def test_a_client_without_hello_is_dropped(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "HELLO_TIMEOUT_S", 0.1)
    addresses = ends.listener.addresses
    if "unix" in addresses:
        reader, writer = await asyncio.open_unix_connection(addresses["unix"])
    else:
        host, _, port = addresses["tcp"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(2):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert ends.server.alive


async def test_waits_for_a_late_hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "HELLO_TIMEOUT_S", 0.1)
    listener = StreamListener()
    await listener.listen(unix=tmp_path / "s")
    early = [asyncio.create_task(listener.connection(name)) for name in ("mine", "mine", "other")]
    await asyncio.sleep(0.05)
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.write(raw_frame(frames.HELLO, ("mine", listener.key)))
    first, second, other = await asyncio.gather(*early)
    assert first is second
    assert first is not None
    assert other is None
    writer.close()
    await listener.close()


async def test_connect_falls_back_to_tcp_and_reports_what_failed(tmp_path: Path) -> None:
    listener = StreamListener()
    await listener.listen(tcp=("127.0.0.1", 0))
    addresses = {"unix": str(tmp_path / "missing"), **listener.addresses}
    connection = await connect(addresses, listener.key, same_host=True, on_lost=lambda _: None, on_bye=lambda: None)
    assert connection.transport is not None
    option = connection.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert option == 1
    connection.close()
    await listener.close()
    await asyncio.sleep(0.01)
    with pytest.raises(TransportError, match=r"unix:.*missing.*tcp:127.0.0.1"):
        await connect(addresses, listener.key, same_host=True, on_lost=lambda _: None, on_bye=lambda: None)
