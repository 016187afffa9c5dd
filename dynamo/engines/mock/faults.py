"""Failures on purpose: what a graph does when a worker dies, hangs or errs can be tried without breaking one."""

from __future__ import annotations

import os
import random
import signal
import time

from dynamo.engines.mock.settings import MockSettings
from dynamo.engines.mock.tokens import Choice
from dynamo.errors import EngineError

NOTICED_S = 2.0
"""after which a frozen engine fails its health check"""
_LATEST_ERROR = 100  # tokens; an output that ends before its error comes is spared


class Faults:
    """`advance` takes the place of `Choice.advance`. Tokens are counted over all ranks and requests."""

    def __init__(self, settings: MockSettings) -> None:
        self._crash_after, self._freeze_after = settings.mock_crash_after_tokens, settings.mock_freeze_after_tokens
        self._error_rate = settings.mock_error_rate
        self._random = random.Random(0)
        self._tokens = 0
        self._frozen_since: float | None = None

    @property
    def wanted(self) -> bool:
        return bool(self._crash_after or self._freeze_after or self._error_rate)

    @property
    def frozen(self) -> bool:
        return self._frozen_since is not None

    def choose(self, choice: Choice) -> None:
        """Whether the request, by its first choice, will fail, and when."""
        if self._random.random() < self._error_rate:
            choice.fails_at = self._random.randint(1, max(min(choice.limit, _LATEST_ERROR) - 1, 1))

    def advance(self, choice: Choice) -> bool:
        last = choice.advance()
        self._tokens += 1
        if self._crash_after and self._tokens >= self._crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._freeze_after and self._tokens >= self._freeze_after and not self.frozen:
            self._frozen_since = time.monotonic()
        if choice.fails_at and len(choice.output) >= choice.fails_at and not last:
            choice.generation.end(EngineError("the mock engine fails this request, as mock-error-rate says"))
        return last

    def check(self) -> None:
        """EngineError when it has been frozen for NOTICED_S."""
        since = self._frozen_since
        if since is not None and (silent_s := time.monotonic() - since) > NOTICED_S:
            raise EngineError(
                f"the mock engine has answered nothing for {silent_s:.0f} s, as mock-freeze-after-tokens says",
                hint="the worker is being restarted",
            )
