"""`@dynamo_worker` and `@dynamo_endpoint`, for scripts that use the runtime without a graph."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from dynamo import codec
from dynamo.errors import RequestError
from dynamo.runtime.distributed import DistributedRuntime

Main = Callable[..., Coroutine[Any, Any, Any]]
Handler = Callable[..., Any]

DRAIN_S = 25.0


def dynamo_worker(static: bool = False) -> Callable[[Main], Main]:
    """Wrap `async def main(runtime, ...)` as a coroutine function that connects the runtime and closes it afterwards.

    SIGTERM and SIGINT end `serve_endpoint`, and with it main; they cancel main if nothing is served. Running requests
    are finished first.
    """

    def wrap(main: Main) -> Main:
        @functools.wraps(main)
        async def run(*args: Any, **named: Any) -> Any:
            loop = asyncio.get_running_loop()
            runtime = DistributedRuntime(loop, static)

            async def connected() -> Any:
                await runtime.connect()
                return await main(runtime, *args, **named)

            task = asyncio.ensure_future(connected())
            stopping = False

            def stop() -> None:
                nonlocal stopping
                stopping = True
                runtime.shutdown()
                if not runtime.inner.serving:
                    task.cancel()

            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
                    loop.add_signal_handler(number, stop)
            try:
                return await task
            except asyncio.CancelledError:
                if not stopping:
                    raise
                return None
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await runtime.inner.drain(DRAIN_S)
                await runtime.close()

        return run

    return wrap


def dynamo_endpoint(request_model: Any, response_model: Any) -> Callable[[Handler], Handler]:
    """Convert a handler's request, its last argument, to a `request_model`, from an object or JSON text.

    The caller gets RequestError for an invalid one. `response_model` is documentation: items are sent unchanged.
    """
    decode = codec.decoder(request_model)

    def wrap(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def handle(*args: Any) -> AsyncIterator[Any]:
            *before, request = args
            if not (inspect.isclass(request_model) and isinstance(request, request_model)):
                try:
                    request = decode(codec.encode(request))
                except RequestError as error:
                    raise RequestError(f"Invalid request: {error.message}") from None
            result = handler(*before, request)
            if inspect.iscoroutine(result):
                yield await result
                return
            async with contextlib.aclosing(result):
                async for item in result:
                    yield item

        return handle

    return wrap
