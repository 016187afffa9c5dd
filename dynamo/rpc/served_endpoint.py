"""One endpoint of this process, and the calls that run there."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dynamo import codec, context
from dynamo.context import request_id
from dynamo.errors import DeadlineError, DynamoError, UnavailableError
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import pack, raised_in_another_process
from dynamo.rpc.server_connection import ServerStream
from dynamo.streams import Stream
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)


@dataclass
class ServedEndpoint:
    """A method under an address. `method` returns an awaitable, an async iterator or a `Stream`."""

    address: tuple[str, str, str]
    """namespace, component, endpoint"""
    subject: str
    method: Callable[[Any], Any]
    decode: codec.Decode
    where: str
    """the process and endpoint, for errors: `VllmWorker:1 generate`"""
    stats_data: Callable[[], Mapping[str, Any]] | None = None
    """returns the service's own part of the endpoint's `$SRV.STATS`"""
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    processing_s: float = 0.0
    running: set[ServerCall] = field(default_factory=set)

    @property
    def method_name(self) -> str:
        """`<component>.<endpoint>`, as service code names it."""
        return f"{self.address[1]}.{self.address[2]}"

    def count_error(self, error: BaseException) -> None:
        """Record a failed call for `$SRV.STATS`."""
        self.errors += 1
        self.last_error = pack(error).message


class ServerCall:
    """One accepted request: runs the endpoint's method and sends its items to the client.

    It is in `endpoint.running` from its creation until `finish`, after which `on_finished` is called.
    """

    __slots__ = (
        "_context",
        "_deadline_timer",
        "_on_finished",
        "_started",
        "_stop_method",
        "_tasks",
        "endpoint",
        "stream",
    )

    def __init__(
        self,
        endpoint: ServedEndpoint,
        request: Request,
        stream: ServerStream,
        tasks: TaskSet,
        on_finished: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.stream = stream
        self._tasks = tasks
        self._on_finished = on_finished
        self._started = time.monotonic()
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._stop_method: Callable[[], Any] | None = None
        self._context = contextvars.copy_context()
        self._context.run(request_id.set, request.id)
        if request.timeout_s is None:
            self._context.run(context.deadline.set, None)
        else:
            self._context.run(context.deadline.set, self._started + request.timeout_s)
            self._deadline_timer = asyncio.get_running_loop().call_later(request.timeout_s, self._expire)
        stream.on_cancel = self.cut
        endpoint.running.add(self)

    def run(self, argument: Any) -> None:
        """Call the method and send what it returns. No-op if the call has been cut."""
        if self not in self.endpoint.running:
            return
        try:
            self._send_result(self._context.run(self.endpoint.method, argument))
        except Exception as error:
            self.finish(error)

    def _send_result(self, result: Any) -> None:
        """Send items as they come. A `Stream` is piped and costs no task; anything else runs in one."""
        if isinstance(result, Stream):
            self._stop_method = result.cancel
            self.stream.on_read = result.consumed
            result.pipe(self.stream.send, self.finish, counted=False)
        elif inspect.isawaitable(result):
            work = result if inspect.iscoroutine(result) else _wait_for(result)
            self._spawn(work, self._on_returned)
        elif isinstance(result, AsyncIterable):
            self._spawn(self._send_items(result), self._on_task_ended)
        else:
            found = type(result).__name__
            raise TypeError(f"{self.endpoint.where} returned a {found}, not an async iterator or awaitable")

    def _spawn(self, work: Coroutine[Any, Any, Any], on_done: Callable[[asyncio.Task[Any]], None]) -> None:
        task = self._tasks.spawn(work, name=self.endpoint.where, context=self._context, log_errors=False)
        task.add_done_callback(on_done)
        self._stop_method = task.cancel

    async def _send_items(self, items: AsyncIterable[Any]) -> None:
        stream = self.stream
        async with aclosing(items) if isinstance(items, AsyncGenerator) else nullcontext():
            async for item in items:
                stream.send(item)
                if stream.full:
                    await stream.wait_until_writable()
                if stream.closed:
                    return

    def _on_returned(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.stream.send(task.result())
        self._on_task_ended(task)

    def _on_task_ended(self, task: asyncio.Task[Any]) -> None:
        self.finish(UnavailableError("the call was cancelled") if task.cancelled() else task.exception())

    def _expire(self) -> None:
        self.cut(DeadlineError(f"{self.endpoint.where} did not finish within the request's deadline"))

    def cut(self, error: Exception | None = None) -> None:
        """Finish with `error` and stop the method."""
        self.finish(error)
        stop_method, self._stop_method = self._stop_method, None
        if stop_method is not None:
            try:
                stop_method()
            except Exception:  # raised by the endpoint's own on_cancel
                log.exception("%s: cancelling failed", self.endpoint.where)

    def finish(self, error: BaseException | None = None) -> None:
        """Count and log the outcome, and end the client's stream with `error` if given. Later calls are no-ops."""
        endpoint = self.endpoint
        if self not in endpoint.running:
            return
        endpoint.running.discard(self)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        duration_s = time.monotonic() - self._started
        endpoint.processing_s += duration_s
        if error is not None:
            endpoint.count_error(error)
            if not isinstance(error, DynamoError) and not raised_in_another_process(error):
                self._log(logging.ERROR, "%s failed: %r", endpoint.where, error, exc_info=error)
        if log.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "%s ended in %.3f s: %s", endpoint.where, duration_s, error or "ok")
        self.stream.end(error, endpoint.where)
        self._on_finished()

    def _log(self, level: int, text: str, *facts: object, exc_info: BaseException | None = None) -> None:
        """Log with the request's id, in a copy of the call's context, which may be entered already."""
        self._context.copy().run(log.log, level, text, *facts, exc_info=exc_info)


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result
