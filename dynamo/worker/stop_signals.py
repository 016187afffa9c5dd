"""SIGTERM and SIGINT of a service process, beside handlers that the service installs for itself.

Components of ai-dynamo 0.x set their own handlers in constructors and start hooks, which clean up and then call `sys.exit` or
`loop.stop`. They run first here, and the process drains all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


class StopSignals:
    """Calls `on_stop` for either signal, after the service's own handler for it."""

    def __init__(self, on_stop: Callable[[], object]) -> None:
        self._on_stop = on_stop
        self._own: dict[signal.Signals, Callable[..., Any]] = {}
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._handle, number)
        self._installed = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def adopt(self) -> None:
        """Take over handlers that the service has set with `signal.signal` since the last call."""
        for number, installed in self._installed.items():
            found = signal.getsignal(number)
            if found is not installed:
                self.add(number, found)
                signal.signal(number, installed)
                signal.siginterrupt(number, False)  # as event loops have it

    def add(self, number: signal.Signals, handler: object) -> None:
        """Run a handler of the service at this signal. SIG_IGN and SIG_DFL have no effect: the process drains."""
        if callable(handler):
            self._own[number] = handler

    def _handle(self, number: signal.Signals) -> None:
        self._on_stop()
        handler = self._own.pop(number, None)
        if handler is None:
            return
        try:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                handler(number, None)
        except Exception:
            log.exception("the service's handler of %s failed", number.name)


def run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop to its end, also when something calls `loop.stop()` before."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop = runner.get_loop()
        task = loop.create_task(main)
        while True:
            try:
                return loop.run_until_complete(task)
            except RuntimeError:
                if task.done():
                    raise
