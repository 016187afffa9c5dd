"""Free TCP ports, as `dynamo.sdk.cli.utils` of ai-dynamo gave them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserve_free_port(host: str = "localhost") -> Iterator[int]:
    """Yield the number of a free port, which no other process can bind until the block ends. Raises OSError."""
    with socket.socket() as reserved:
        reserved.bind((host, 0))
        yield reserved.getsockname()[1]
