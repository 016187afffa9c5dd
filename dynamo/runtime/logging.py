"""`from dynamo.runtime.logging import configure_dynamo_logging`, as components of ai-dynamo 0.2 and 0.3 write it."""

from __future__ import annotations

import logging

from dynamo import log


def configure_dynamo_logging(service_name: str | None = None, worker_id: int | None = None) -> None:
    """Configure logging with that name on every line. No-op without a name if logging is configured already."""
    if service_name is not None or not logging.root.handlers:
        log.configure(":".join(str(part) for part in (service_name, worker_id) if part is not None))


configure_logger = configure_dynamo_logging  # its name in 0.1


def log_message(level: str, message: str, module: str, file: str, line: int) -> None:
    """Log a message as if it came from that module and line. An unknown level is logged as info."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    logger = logging.getLogger(module)
    if logger.isEnabledFor(number):
        logger.handle(logger.makeRecord(module, number, file, line, message, (), None))
