"""Names that components of ai-dynamo 0.2 and 0.3 import from `dynamo.sdk.lib.utils`."""

from __future__ import annotations

from typing import NoReturn

from dynamo.environment import get_host_port, get_system_app_host_port, str_to_bool
from dynamo.errors import ConfigError

__all__ = ["get_capi_library_path", "get_host_port", "get_system_app_host_port", "str_to_bool"]


def get_capi_library_path() -> NoReturn:
    """Raise ConfigError: there is no C library, engines publish their KV events in Python."""
    raise ConfigError(
        "get_capi_library_path: dynamo has no C library",
        hint="remove VLLM_KV_CAPI_PATH; KV events work with an unpatched vLLM",
    )
