"""Streams of items inside one process: a `Channel` is written by a producer, a `Stream` is read by one consumer.

A stream is read in one of two ways. `async for` wakes the reader's task for each batch of items: simple, 2 to 7 µs an
item. `pipe` (and `map`, which is a pipe) runs a callback for each item at the moment it is pushed, without a task or a
queue between: that is how tokens cross a process in less than a microsecond.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")

CREDIT_BATCH = 256  # items read between two calls of on_consumed


def _nothing() -> None:
    return None


class Channel(Generic[T]):
    """The producer's end. `push` items, then `end` once; afterwards both do nothing, so late items are dropped.

    `on_cancel` runs once when the consumer goes away before the end; the producer should stop then.
    `on_consumed(n)` reports every `CREDIT_BATCH` items that were read: a producer elsewhere may send as many more.
    """

    __slots__ = ("_consumed", "_items", "_on_end", "_on_item", "_waiter", "done", "error", "on_cancel", "on_consumed")

    def __init__(
        self, on_cancel: Callable[[], None] = _nothing, on_consumed: Callable[[int], None] | None = None
    ) -> None:
        self.on_cancel, self.on_consumed = on_cancel, on_consumed
        self.done = False
        self.error: BaseException | None = None
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._on_item: Callable[[T], None] | None = None
        self._on_end: Callable[[BaseException | None], None] | None = None
        self._consumed = 0

    def push(self, item: T) -> None:
        if self.done:
            return
        if self._on_item is not None:
            self._count()
            self._on_item(item)
            return
        self._items.append(item)
        if self._waiter is not None:
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """No more items; with `error`, the consumer gets it after the items already pushed."""
        if self.done:
            return
        self.done, self.error = True, error
        if self._on_end is not None:
            self._on_end(error)
            self._on_item = self._on_end = None
        elif self._waiter is not None:
            self._wake()

    def cancel(self) -> None:
        """The consumer is gone: drop what is buffered, tell the producer. Harmless after the end."""
        if not self.done:
            self.done = True
            self._items.clear()
            self._on_item = self._on_end = None
            if self._waiter is not None:
                self._wake()
            self.on_cancel()

    @property
    def backlog(self) -> int:
        """Items pushed and not yet read; 0 for ever when piped."""
        return len(self._items)

    @property
    def piped(self) -> bool:
        return self._on_item is not None

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _count(self) -> None:
        if self.on_consumed is not None:
            self._consumed += 1
            if self._consumed >= CREDIT_BATCH:
                self.on_consumed(self._consumed)
                self._consumed = 0

    async def _next(self) -> T:
        while not self._items:
            if self.done:
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        self._count()
        return self._items.popleft()

    def _pipe(self, on_item: Callable[[T], None], on_end: Callable[[BaseException | None], None]) -> None:
        while self._items:
            self._count()
            on_item(self._items.popleft())
        if self.done:
            on_end(self.error)
        else:
            self._on_item, self._on_end = on_item, on_end


class Stream(Generic[T]):
    """The consumer's end: an async iterator of T that can also be piped, mapped and awaited.

    Leaving early (`aclose()`, `cancel()`, a cancelled task, or the last reference dropped after a `break`) cancels
    the producer, wherever it runs.
    """

    __slots__ = ("__weakref__", "_channel", "_opened")

    def __init__(self, channel: Channel[T], opened: Awaitable[None] | None = None) -> None:
        self._channel, self._opened = channel, opened

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        return await self._channel._next()

    def __await__(self) -> Generator[Any, None, Stream[T]]:
        """Wait until the producer has accepted the call (errors before the first item are raised here)."""
        if self._opened is not None:
            yield from self._opened.__await__()
        return self

    def __del__(self) -> None:
        if not self._channel.done and not self._channel.piped:
            self._channel.cancel()

    def cancel(self) -> None:
        """Stop now, from any callback; later items are dropped and iteration ends."""
        self._channel.cancel()

    async def aclose(self) -> None:
        self._channel.cancel()

    def pipe(self, on_item: Callable[[T], None], on_end: Callable[[BaseException | None], None]) -> None:
        """Hand every item to `on_item` as it arrives, then None or the error to `on_end`; both must not block.

        An exception out of `on_item` cancels the producer and goes to `on_end`.
        """
        channel = self._channel

        def guarded(item: T) -> None:
            try:
                on_item(item)
            except Exception as error:
                channel.cancel()
                on_end(error)

        channel._pipe(guarded, on_end)

    def map(self, function: Callable[[T], U]) -> Stream[U]:
        """A stream of `function(item)`. An exception in `function` ends it with that error."""
        out: Channel[U] = Channel(on_cancel=self._channel.cancel)
        self.pipe(lambda item: out.push(function(item)), out.end)
        return Stream(out, self._opened)

    @classmethod
    def opening(cls, source: Awaitable[Stream[T]]) -> Stream[T]:
        """A stream now, for work that must be awaited before the items can start (tokenizing, asking a router)."""
        out: Channel[T] = Channel()

        async def open_source() -> None:
            try:
                inner = await source
            except asyncio.CancelledError:
                out.cancel()
                raise
            except Exception as error:
                out.end(error)
                return
            if out.done:
                inner.cancel()
            else:
                out.on_cancel = inner.cancel
                inner.pipe(out.push, out.end)

        task = asyncio.get_running_loop().create_task(open_source())
        out.on_cancel = task.cancel  # type: ignore[assignment]  # its result does not matter
        return cls(out, asyncio.shield(task))


class Reply(Stream[T]):
    """What a call of a coroutine endpoint gives: `await` it for the result; `async for` yields it as the only item."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, T]:  # type: ignore[override]
        return (yield from self._result().__await__())

    async def _result(self) -> T:
        async for item in self:
            return item
        return cast(T, None)  # a cancelled call
