"""Injected faults, to try how a graph reacts to a worker that crashes, freezes or fails requests."""

from __future__ import annotations

import os
import random
import signal
import time

from dynamo.engines.mock.generation import MockSequence
from dynamo.engines.mock.settings import MockSettings
from dynamo.errors import EngineError

DETECTION_S = 2.0
"""time after which a frozen engine fails its health check"""
_LATEST_ERROR = 100
"""tokens; a request whose output ends before its error is due does not fail"""


class Faults:
    """Faults by the `mock_*` settings. `advance` replaces `MockSequence.advance`; tokens are counted over all ranks."""

    def __init__(self, settings: MockSettings) -> None:
        self._crash_after = settings.mock_crash_after_tokens
        self._freeze_after = settings.mock_freeze_after_tokens
        self._error_rate = settings.mock_error_rate
        self._random = random.Random(0)
        self._tokens = 0
        self._frozen_since: float | None = None

    @property
    def enabled(self) -> bool:
        """True if any fault is configured."""
        return bool(self._crash_after or self._freeze_after or self._error_rate)

    @property
    def frozen(self) -> bool:
        """True from the moment on that the engine produces nothing more."""
        return self._frozen_since is not None

    def plan_error(self, sequence: MockSequence) -> None:
        """Draw whether the request of this first sequence fails, and after how many tokens."""
        if self._random.random() < self._error_rate:
            sequence.fails_at = self._random.randint(1, max(min(sequence.limit, _LATEST_ERROR) - 1, 1))

    def advance(self, sequence: MockSequence) -> bool:
        """Generate one token and apply the faults that are due; return True after the last token."""
        last = sequence.advance()
        self._tokens += 1
        if self._crash_after and self._tokens >= self._crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._freeze_after and self._tokens >= self._freeze_after and not self.frozen:
            self._frozen_since = time.monotonic()
        if sequence.fails_at and len(sequence.output) >= sequence.fails_at and not last:
            sequence.generation.end(EngineError("request failed by mock-error-rate"))
        return last

    def check(self) -> None:
        """Raise EngineError if the engine has been frozen for more than DETECTION_S."""
        since = self._frozen_since
        if since is not None and (frozen_s := time.monotonic() - since) > DETECTION_S:
            raise EngineError(
                f"the mock engine has produced nothing for {frozen_s:.0f} s, because of mock-freeze-after-tokens",
                hint="the worker is being restarted",
            )
