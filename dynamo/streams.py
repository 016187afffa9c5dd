"""Streams of items inside one process: a `Channel` is written by a producer, a `Stream` is read by one consumer.

A stream is read in one of two ways. `async for` wakes the reader's task for each batch of items: simple, 2 to 7 µs an
item. `pipe` (and `map`, which is a pipe) runs a callback for each item at the moment it is pushed, without a task or a
queue between: that is how tokens cross a process in less than a microsecond.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from dynamo.errors import RemoteError, UnavailableError

T = TypeVar("T")
U = TypeVar("U")

CREDIT_BATCH = 256  # items read between two calls of on_consumed


def _nothing() -> None:
    return None


class Channel(Generic[T]):
    """The producer's end. `push` items, then `end` once; afterwards both are no-ops, so late items are dropped.

    `on_cancel` runs once if the consumer leaves before the end; the producer should stop then. `on_consumed(n)` is
    called for every `CREDIT_BATCH` items read: a producer in another process may send as many more.
    """

    __slots__ = (
        "_consumed",
        "_counted",
        "_items",
        "_on_end",
        "_on_item",
        "_waiter",
        "cancelled",
        "done",
        "error",
        "on_cancel",
        "on_consumed",
        "source",
    )

    def __init__(
        self, on_cancel: Callable[[], Any] = _nothing, on_consumed: Callable[[int], None] | None = None
    ) -> None:
        self.on_cancel = on_cancel
        self.on_consumed = on_consumed
        self.done = False
        self.cancelled = False
        self.error: BaseException | None = None
        self.source: int | None = None
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._on_item: Callable[[T], None] | None = None
        self._on_end: Callable[[BaseException | None], None] | None = None
        self._consumed = 0
        self._counted = True

    def push(self, item: T) -> None:
        """Hand an item to the consumer: to its pipe now, or to the buffer that it iterates."""
        if self.done:
            return
        on_item = self._on_item
        if on_item is None:
            self._items.append(item)
            if self._waiter is not None:
                self._wake()
            return
        try:
            on_item(item)
        except Exception as error:
            self._consumer_failed(error, self._on_end)
        if self._counted:
            self._consumed += 1
            if self._consumed >= CREDIT_BATCH:
                self.consumed(0)

    def end(self, error: BaseException | None = None) -> None:
        """End the stream; with `error`, the consumer gets it after the items already pushed."""
        if self.done:
            return
        self.done = True
        self.error = error
        on_end = self._on_end
        self._on_item = None
        self._on_end = None
        if on_end is not None:
            on_end(error)
        elif self._waiter is not None:
            self._wake()

    def cancel(self) -> None:
        """Drop the buffered items and stop the producer, unless it has ended. Later calls are no-ops."""
        if self.cancelled:
            return
        producer_ended = self.done
        self.done = True
        self.cancelled = True
        self._items.clear()
        self._on_item = None
        self._on_end = None
        if self._waiter is not None:
            self._wake()
        if not producer_ended:
            self.on_cancel()

    def consumed(self, items: int) -> None:
        """Count `items` more as read, by the consumer or by a process behind it; grant credit in batches."""
        self._consumed += items
        if self._consumed >= CREDIT_BATCH and self.on_consumed is not None:
            items = self._consumed
            self._consumed = 0
            self.on_consumed(items)

    @property
    def backlog(self) -> int:
        """Number of items pushed and not yet read; always 0 when piped."""
        return len(self._items)

    @property
    def piped(self) -> bool:
        return self._on_item is not None

    def _consumer_failed(self, error: Exception, on_end: Callable[[BaseException | None], None] | None) -> None:
        """Cancel the stream and hand the consumer's own error to its `on_end`."""
        self.cancel()
        if on_end is not None:
            on_end(error)

    def _wake(self) -> None:
        waiter = self._waiter
        self._waiter = None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _next(self) -> T:
        while not self._items:
            if self.done:
                error = self.error
                self.error = None  # raised once, as a generator would
                if isinstance(error, (StopIteration, StopAsyncIteration)):
                    raise RuntimeError(f"the stream's producer raised {type(error).__name__}") from error
                if error is not None and not self.cancelled:
                    raise error
                raise StopAsyncIteration
            if self._waiter is not None or self._on_item is not None:
                raise RuntimeError("this stream is already being read elsewhere")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._waiter = None
                self.cancel()
                raise
        if self.on_consumed is not None:
            self.consumed(1)
        return self._items.popleft()

    def _pipe(
        self, on_item: Callable[[T], None], on_end: Callable[[BaseException | None], None], *, counted: bool
    ) -> None:
        if self._on_item is not None or self._waiter is not None:
            raise RuntimeError("this stream is already being read elsewhere")
        if self.cancelled:
            on_end(UnavailableError("the stream was cancelled before it was read"))
            return
        while self._items and not self.cancelled:  # items that `on_item` itself causes come after these
            try:
                on_item(self._items.popleft())
            except Exception as error:
                self._consumer_failed(error, on_end)
            if counted:
                self.consumed(1)
        if self.done:
            if not self.cancelled:
                on_end(self.error)
        else:
            self._on_item = on_item
            self._on_end = on_end
            self._counted = counted


class Stream(Generic[T]):
    """The consumer's end: an async iterator of T that can also be piped, mapped and awaited.

    Leaving early (`aclose()`, `cancel()`, a cancelled task, or the last reference dropped after a `break`) cancels
    the producer, wherever it runs.
    """

    __slots__ = ("__weakref__", "_channel", "_loop", "_opened")

    def __init__(self, channel: Channel[T], opened: asyncio.Future[Any] | None = None) -> None:
        self._channel = channel
        self._opened = opened
        self._loop = _running_loop()

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        return await self._channel._next()

    def __await__(self) -> Generator[Any, None, Stream[T]]:
        """Wait until the producer has accepted the call (errors before the first item are raised here)."""
        return self._accepted().__await__()

    async def _accepted(self) -> Stream[T]:
        channel, opened = self._channel, self._opened
        if opened is not None and not opened.done():
            try:
                await asyncio.wait((opened,))
            except asyncio.CancelledError:
                channel.cancel()
                raise
        if channel.error is not None and not channel.backlog:
            await channel._next()
        return self

    def __del__(self) -> None:
        channel, loop = self._channel, self._loop
        if channel.done or channel.piped or loop is None or loop.is_closed():
            return
        if _running_loop() is loop:
            channel.cancel()
        else:  # the garbage collector runs in any thread
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(channel.cancel)

    @property
    def source(self) -> int | None:
        """Id of the instance that responds, or was tried last; None before the call is sent, or when it stays in memory."""
        return self._channel.source

    def cancel(self) -> None:
        """Stop now, from any callback: later items are dropped, iteration ends, a pipe is not called again."""
        self._channel.cancel()

    async def aclose(self) -> None:
        self._channel.cancel()

    def pipe(
        self,
        on_item: Callable[[T], None],
        on_end: Callable[[BaseException | None], None],
        *,
        counted: bool = True,
    ) -> None:
        """Call `on_item` with every item as it arrives, then `on_end` with None or the error; neither may block.

        An exception from `on_item` cancels the producer and goes to `on_end`. Items count as read when `on_item`
        returns; with `counted=False`, when `consumed` is called, which keeps a producer in another process within its
        window of a reader in yet another.
        """
        self._channel._pipe(on_item, on_end, counted=counted)

    def consumed(self, items: int) -> None:
        """Report that `items` more were read from a pipe with `counted=False`."""
        self._channel.consumed(items)

    def map(self, function: Callable[[T], U]) -> Stream[U]:
        """Return a stream of `function(item)`; an exception in `function` ends it with that error."""
        out: Channel[U] = Channel(on_cancel=self._channel.cancel, on_consumed=self._channel.consumed)
        push = out.push
        self.pipe(lambda item: push(function(item)), out.end, counted=False)
        return Stream(out, self._opened)

    @classmethod
    def from_iterator(cls, items: AsyncIterator[T]) -> Stream[T]:
        """Return a stream of the items of an async iterator, such as an async generator.

        A task reads the items, without waiting for the consumer; it is cancelled with the stream. An exception of the
        iterator ends the stream.
        """
        out: Channel[T] = Channel()

        async def fill() -> None:
            try:
                async for item in items:
                    out.push(item)
            except asyncio.CancelledError:  # raised by the iterator, unless the stream was cancelled
                out.end(UnavailableError("the iterator behind the stream was cancelled"))
                raise
            except Exception as error:
                out.end(error)
            else:
                out.end()

        out.on_cancel = asyncio.get_running_loop().create_task(fill()).cancel
        return cls(out)

    @classmethod
    def opening(cls, source: Coroutine[Any, Any, Stream[T]]) -> Stream[T]:
        """Return a stream for `source`, work that must be awaited before items can start (tokenizing, routing)."""
        task = asyncio.get_running_loop().create_task(source)
        out: Channel[T] = Channel(on_cancel=task.cancel)

        def start(task: asyncio.Task[Stream[T]]) -> None:
            if task.cancelled():
                out.end(UnavailableError("the call was cancelled before it could start"))
            elif (error := task.exception()) is not None:
                out.end(error)
            elif out.done:
                task.result().cancel()
            else:
                inner = task.result()
                out.on_cancel = inner.cancel
                out.on_consumed = inner.consumed
                inner.pipe(out.push, out.end, counted=False)

        task.add_done_callback(start)
        return cls(out, task)


class Reply(Stream[T]):
    """The result of calling a coroutine endpoint: `await` it once for the value; `async for` yields it as the only item.

    Awaiting a cancelled call raises CancelledError, as awaiting a cancelled task does.
    """

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, T]:  # type: ignore[override]
        return self._result().__await__()

    async def _result(self) -> T:
        try:
            return await self._channel._next()
        except StopAsyncIteration:
            if self._channel.cancelled:
                raise asyncio.CancelledError("the call was cancelled") from None
            raise RemoteError("the call ended without a result", hint="await a reply once") from None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
