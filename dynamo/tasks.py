"""`TaskSet`: the owner of background tasks."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

log = logging.getLogger(__name__)

Work = Coroutine[Any, Any, Any]


class TaskSet:
    """Background tasks of one object: named, their failures logged, cancelled together by `aclose`.

    It is for tasks that may run for as long as the object exists; those of one function belong in an
    `asyncio.TaskGroup`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._tasks))

    def spawn(
        self, work: Work, *, name: str, context: contextvars.Context | None = None, log_errors: bool = True
    ) -> asyncio.Task[Any]:
        """Run `work` in the background, in `context` if given.

        An exception that leaves it is logged, unless the caller handles the task's outcome and passes `log_errors=False`.
        """
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}: {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._finished if log_errors else self._tasks.discard)
        return task

    def keep_running(self, work: Callable[[], Work], *, name: str, pause_s: float = 1.0) -> asyncio.Task[Any]:
        """Run `work()` in the background until it returns; start it again `pause_s` after each exception, which is logged."""

        async def run() -> None:
            while True:
                try:
                    await work()
                    return
                except Exception:
                    log.exception("%s: %s failed; restarting it in %g s", self._name, name, pause_s)
                await asyncio.sleep(pause_s)

        return self.spawn(run(), name=name)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the tasks that run now have ended, at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=timeout_s)

    def cancel(self) -> None:
        """Cancel all tasks without waiting for their end."""
        for task in self:
            task.cancel()

    async def aclose(self) -> None:
        """Cancel all tasks and wait for their end."""
        tasks = tuple(self._tasks)
        self.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
