"""What components of ai-dynamo 0.2 and 0.3 imported from `dynamo.sdk.lib.utils`."""

from __future__ import annotations

import os
from typing import NoReturn

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


def get_capi_library_path() -> NoReturn:
    """There is no C library here: an engine publishes its KV events in Python."""
    raise ConfigError(
        "get_capi_library_path: dynamo has no C library",
        hint="leave VLLM_KV_CAPI_PATH out; KV events need no patched vLLM here",
    )
