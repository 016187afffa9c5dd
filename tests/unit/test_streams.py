"""Channel, Stream and Reply: one producer, one consumer, every way to end."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.errors import RemoteError, UnavailableError
from dynamo.streams import CREDIT_BATCH, Channel, Reply, Stream


class Ends:
    """Items and end that a pipe received."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.ends: list[BaseException | None] = []


def piped(stream: Stream[Any], on_item: Callable[[Any], None] | None = None) -> Ends:
    heard = Ends()
    stream.pipe(on_item or heard.items.append, heard.ends.append)
    return heard


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


@pytest.fixture
def cancels() -> list[str]:
    return []


@pytest.fixture
def channel(cancels: list[str]) -> Channel[Any]:
    return Channel(on_cancel=lambda: cancels.append("cancelled"))


# -- iteration


async def test_items_then_the_end(channel: Channel[int], cancels: list[str]) -> None:
    channel.push(1)
    reader = asyncio.create_task(collect(Stream(channel)))
    await asyncio.sleep(0)
    channel.push(2)
    await asyncio.sleep(0)
    channel.end()
    channel.push(3)
    assert await reader == [1, 2]
    assert cancels == []


async def test_error_comes_after_the_items_and_once(channel: Channel[int]) -> None:
    stream = Stream(channel)
    channel.push(1)
    channel.end(KeyError("x"))
    channel.end()
    assert await anext(stream) == 1
    with pytest.raises(KeyError):
        await anext(stream)
    assert await collect(stream) == []


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration()])
async def test_an_error_that_would_read_as_the_end_does_not(channel: Channel[int], error: Exception) -> None:
    channel.end(error)
    with pytest.raises(RuntimeError, match="producer raised Stop"):
        await anext(Stream(channel))


async def test_two_readers_are_refused(channel: Channel[int]) -> None:
    stream = Stream(channel)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="already being read"):
        await anext(stream)
    with pytest.raises(RuntimeError, match="already being read"):
        piped(stream)
    channel.push(1)
    assert await first == 1
    piped(stream)
    with pytest.raises(RuntimeError, match="already being read"):
        await anext(stream)


# -- cancelling


async def test_cancel_drops_what_is_buffered(channel: Channel[int], cancels: list[str]) -> None:
    stream = Stream(channel)
    channel.push(1)
    stream.cancel()
    stream.cancel()
    channel.push(2)
    channel.end(ValueError())
    assert await collect(stream) == []
    assert cancels == ["cancelled"]


async def test_cancel_after_the_end_drops_items_and_calls_no_one(channel: Channel[int], cancels: list[str]) -> None:
    stream = Stream(channel)
    channel.push(1)
    channel.end(ValueError())
    await stream.aclose()
    assert await collect(stream) == []
    assert cancels == []


async def test_cancel_wakes_the_reader(channel: Channel[int]) -> None:
    stream = Stream(channel)
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    stream.cancel()
    assert await reader == []


async def test_a_cancelled_task_cancels_the_producer(channel: Channel[int], cancels: list[str]) -> None:
    reader = asyncio.create_task(collect(Stream(channel)))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert cancels == ["cancelled"]


async def test_break_cancels_the_producer(channel: Channel[int], cancels: list[str]) -> None:
    channel.push(1)

    async def first() -> int:
        async for item in Stream(channel):
            return item
        raise AssertionError

    assert await first() == 1
    gc.collect()
    assert cancels == ["cancelled"]


async def test_dropped_elsewhere_is_cancelled_in_its_loop(cancels: list[str]) -> None:
    threads: list[int] = []
    box = [Stream(Channel(on_cancel=lambda: threads.append(threading.get_ident())))]
    await asyncio.to_thread(box.clear)
    await asyncio.sleep(0.01)
    assert threads == [threading.get_ident()]


def test_dropped_after_its_loop_is_harmless() -> None:
    async def leave() -> Stream[int]:
        loop = asyncio.get_running_loop()
        return Stream(Channel(on_cancel=lambda: loop.call_soon(print)))

    stream = asyncio.run(leave())
    del stream
    gc.collect()


def test_made_and_dropped_without_a_loop() -> None:
    Stream(Channel(on_cancel=lambda: pytest.fail("there is no loop")))


# -- pipes


async def test_pipe_hands_over_buffered_and_later_items(channel: Channel[int]) -> None:
    channel.push(1)
    heard = piped(Stream(channel))
    channel.push(2)
    assert channel.piped
    assert channel.backlog == 0
    channel.end()
    channel.end(ValueError())
    assert (heard.items, heard.ends) == ([1, 2], [None])


@pytest.mark.parametrize("error", [None, KeyError("x")])
async def test_pipe_after_the_end(channel: Channel[int], error: Exception | None) -> None:
    channel.push(1)
    channel.end(error)
    heard = piped(Stream(channel))
    assert (heard.items, heard.ends) == ([1], [error])


@pytest.mark.parametrize("buffered", [0, 2])
async def test_a_failing_consumer_gets_its_error_once(channel: Channel[int], cancels: list[str], buffered: int) -> None:
    for _ in range(buffered):
        channel.push(0)

    def fail(item: int) -> None:
        raise KeyError(item)

    heard = piped(Stream(channel), fail)
    channel.push(1)
    channel.push(2)
    channel.end()
    assert [type(end) for end in heard.ends] == [KeyError]
    assert cancels == ["cancelled"]


@pytest.mark.parametrize("buffered", [True, False])
async def test_cancel_out_of_the_callback_is_silent(channel: Channel[int], cancels: list[str], buffered: bool) -> None:
    stream = Stream(channel)
    if buffered:
        channel.push(1)
        channel.push(2)
    heard = piped(stream, lambda _: stream.cancel())
    channel.push(1)
    channel.push(2)
    channel.end()
    assert (heard.ends, cancels) == ([], ["cancelled"])


async def test_items_that_the_callback_brings_about_keep_their_order(channel: Channel[int]) -> None:
    seen: list[int] = []
    ends: list[BaseException | None] = []

    def take(item: int) -> None:
        seen.append(item)
        if item == 1:
            channel.push(3)
            channel.end()

    channel.push(1)
    channel.push(2)
    Stream(channel).pipe(take, ends.append)
    assert (seen, ends) == ([1, 2, 3], [None])


async def test_pipe_of_a_cancelled_stream_ends_with_an_error(channel: Channel[int]) -> None:
    stream = Stream(channel)
    stream.cancel()
    heard = piped(stream)
    assert [type(end) for end in heard.ends] == [UnavailableError]


async def test_a_piped_stream_may_be_dropped(channel: Channel[int], cancels: list[str]) -> None:
    heard = piped(Stream(channel))
    gc.collect()
    channel.push(1)
    assert (heard.items, cancels) == ([1], [])


# -- map


async def test_map(channel: Channel[int]) -> None:
    mapped = Stream(channel).map(lambda n: n * 2).map(str)
    channel.push(1)
    channel.push(2)
    channel.end(KeyError("late"))
    assert [await anext(mapped), await anext(mapped)] == ["2", "4"]
    with pytest.raises(KeyError):
        await anext(mapped)


async def test_map_that_fails_ends_with_that_error(channel: Channel[int], cancels: list[str]) -> None:
    mapped = Stream(channel).map(lambda n: 1 // n)
    channel.push(1)
    channel.push(0)
    channel.push(1)
    assert await anext(mapped) == 1
    with pytest.raises(ZeroDivisionError):
        await anext(mapped)
    assert cancels == ["cancelled"]


async def test_dropping_a_mapped_stream_cancels_the_producer(channel: Channel[int], cancels: list[str]) -> None:
    mapped = Stream(channel).map(str)
    del mapped
    gc.collect()
    assert cancels == ["cancelled"]


# -- credit


@given(st.lists(st.sampled_from(["push", "read"]), max_size=1200))
def test_credit_is_what_was_read_in_batches(steps: list[str]) -> None:
    async def run() -> None:
        credits: list[int] = []
        channel: Channel[int] = Channel(on_consumed=credits.append)
        stream, read = Stream(channel), 0
        for step in steps:
            if step == "push":
                channel.push(0)
            elif channel.backlog:
                await anext(stream)
                read += 1
        assert 0 <= read - sum(credits) < CREDIT_BATCH
        assert all(n >= CREDIT_BATCH for n in credits)
        stream.cancel()

    asyncio.run(run())


async def test_credit_passes_through_pipes_from_the_last_reader() -> None:
    credits: list[int] = []
    channel: Channel[int] = Channel()
    mapped = Stream(channel).map(str)
    channel.on_consumed = credits.append  # known only when the call has found its instance
    for i in range(2 * CREDIT_BATCH):
        channel.push(i)
    assert credits == []
    for _ in range(CREDIT_BATCH):
        await anext(mapped)
    assert credits == [CREDIT_BATCH]
    mapped.pipe(lambda _: None, lambda _: None, counted=False)
    assert credits == [CREDIT_BATCH]
    mapped.consumed(CREDIT_BATCH)
    assert credits == [CREDIT_BATCH, CREDIT_BATCH]


# -- from an iterator


async def test_stream_of_an_iterator() -> None:
    async def count(end: int, error: Exception | None = None) -> AsyncIterator[int]:
        for number in range(end):
            yield number
            await asyncio.sleep(0)
        if error is not None:
            raise error

    assert await collect(Stream.from_iterator(count(3))) == [0, 1, 2]
    failing = Stream.from_iterator(count(1, KeyError("x")))
    assert await anext(failing) == 0
    with pytest.raises(KeyError):
        await anext(failing)


@pytest.mark.parametrize("has_begun", [False, True])
async def test_cancelling_a_stream_closes_its_iterator(has_begun: bool) -> None:
    events: list[str] = []

    async def wait() -> AsyncIterator[int]:
        try:
            events.append("begun")
            yield 0
            await asyncio.Event().wait()
        finally:
            events.append("closed")

    stream = Stream.from_iterator(wait())
    if has_begun:
        assert await anext(stream) == 0
    stream.cancel()
    assert await collect(stream) == []
    await asyncio.sleep(0.01)
    assert events == (["begun", "closed"] if has_begun else [])


# -- opening


async def test_opening(channel: Channel[int]) -> None:
    async def source() -> Stream[int]:
        await asyncio.sleep(0)
        return Stream(channel)

    stream = Stream.opening(source())
    channel.push(1)
    assert await stream is stream
    channel.push(2)
    channel.end()
    assert await collect(stream) == [1, 2]


async def test_opening_that_fails() -> None:
    async def source() -> Stream[int]:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await Stream.opening(source())
    with pytest.raises(KeyError):
        await anext(Stream.opening(source()))
    heard = piped(Stream.opening(source()))
    await asyncio.sleep(0.01)
    assert [type(end) for end in heard.ends] == [KeyError]


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_cancel_while_opening(channel: Channel[int], cancels: list[str], steps: int) -> None:
    """Before the source began, while it waits, and when it has just returned its stream."""
    returned = asyncio.Event()

    async def source() -> Stream[int]:
        if steps < 2:
            await asyncio.Event().wait()
        returned.set()
        return Stream(channel)

    stream = Stream.opening(source())
    for _ in range(steps):
        await asyncio.sleep(0)
        if returned.is_set():
            break
    stream.cancel()
    assert await collect(stream) == []
    await asyncio.sleep(0.01)
    assert cancels == (["cancelled"] if returned.is_set() else [])


async def test_a_caller_cancelled_while_it_waits_cancels_the_opening() -> None:
    stopped = asyncio.Event()

    async def source() -> Stream[int]:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    stream = Stream.opening(source())

    async def wait() -> None:
        await stream

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(stopped.wait(), 1)


async def test_a_source_that_was_cancelled_is_no_silent_end() -> None:
    async def source() -> Stream[int]:
        raise asyncio.CancelledError

    with pytest.raises(UnavailableError):
        await anext(Stream.opening(source()))


# -- replies


async def test_reply_is_awaited_once(channel: Channel[int]) -> None:
    reply = Reply(channel)
    channel.push(7)
    channel.end()
    assert await reply == 7
    with pytest.raises(RemoteError, match="without a result"):
        await reply


async def test_reply_iterates() -> None:
    channel: Channel[int] = Channel()
    channel.push(7)
    channel.end()
    assert await collect(Reply(channel)) == [7]


async def test_reply_raises(channel: Channel[int]) -> None:
    channel.end(KeyError("x"))
    with pytest.raises(KeyError):
        await Reply(channel)


async def test_cancelled_reply_is_not_none(channel: Channel[int]) -> None:
    reply = Reply(channel)

    async def wait() -> int:
        return await reply

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    reply.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_reply_that_opens() -> None:
    async def source() -> Stream[int]:
        channel: Channel[int] = Channel()
        channel.push(7)
        channel.end()
        return Stream(channel)

    assert await Reply.opening(source()) == 7


async def test_an_iterator_that_is_cancelled_ends_its_stream() -> None:
    async def cancelled() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError  # as from awaiting a call that was cancelled

    stream = Stream.from_iterator(cancelled())
    async with asyncio.timeout(1):
        assert await anext(stream) == 1
        with pytest.raises(UnavailableError, match="was cancelled"):
            await anext(stream)
