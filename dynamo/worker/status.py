"""What a service process reports to the supervisor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


class Status:
    """Reports to the supervisor over the pipe it passed; without a supervisor, `on_ready` is called when ready."""

    def __init__(self, on_ready: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._on_ready = on_ready
        fd = os.environ.pop("DYNAMO_STATUS_FD", "")
        self._fd = int(fd) if fd else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)

    def report(self, event: str, **fields: Any) -> bool:
        """Report an event; return whether there is a supervisor that received it."""
        if self._fd is None:
            if event == "ready" and self._on_ready is not None:
                self._on_ready(fields)
            return False
        try:
            os.write(self._fd, json.dumps({"event": event, **fields}).encode() + b"\n")
        except OSError:
            self._fd = None  # the supervisor has died; the kernel signals this process
        return self._fd is not None

    def progress(self, text: str) -> None:
        """Report what the start is waiting for."""
        self.report("progress", text=text)
