"""Logging as `dynamo.sdk.lib.logging` of ai-dynamo 0.1 and 0.2 configured it."""

from __future__ import annotations

import logging

from dynamo import log


def configure_server_logging(service_name: str | None = None, worker_id: int | None = None) -> None:
    """Configure logging with that name on every line; no-op where it is configured, as in a service process."""
    if not logging.root.handlers:
        log.configure(":".join(str(part) for part in (service_name, worker_id) if part is not None))
