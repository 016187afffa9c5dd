"""Settings that come from environment variables."""

from __future__ import annotations

import os

from dynamo.errors import ConfigError

_TRUE, _FALSE = ("true", "1", "yes", "y", "on", "t"), ("false", "0", "no", "n", "off", "f")


def str_to_bool(text: str) -> bool:
    """`true`, `1`, `yes`, `y`, `on`, `t` and their opposites, in any case; ConfigError for anything else."""
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ConfigError(f"expected a yes or a no, found {text!r}", hint="write true or false")


def get_host_port() -> tuple[str, int]:
    """DYNAMO_HOST and DYNAMO_PORT, else 127.0.0.1 and 8000."""
    return os.environ.get("DYNAMO_HOST") or "127.0.0.1", int(os.environ.get("DYNAMO_PORT") or 8000)


def get_system_app_host_port() -> tuple[str, int]:
    """DYNAMO_SYSTEM_APP_HOST and DYNAMO_SYSTEM_APP_PORT, else 0.0.0.0, for probes from outside, and any free port."""
    return (
        os.environ.get("DYNAMO_SYSTEM_APP_HOST") or "0.0.0.0",
        int(os.environ.get("DYNAMO_SYSTEM_APP_PORT") or 0),
    )
