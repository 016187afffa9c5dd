"""Environment variables as typed values."""

from __future__ import annotations

import os

from dynamo.errors import ConfigError

TRUE = frozenset({"true", "1", "yes", "y", "on", "t"})
FALSE = frozenset({"false", "0", "no", "n", "off", "f"})


def parse_bool(text: str) -> bool | None:
    """Return the boolean that a text means, in any case of its letters; None if it means neither."""
    word = text.strip().lower()
    if word in TRUE:
        return True
    return False if word in FALSE else None


def str_to_bool(text: str) -> bool:
    """Return the boolean that a text means, as `parse_bool` does. Raises ConfigError if it means neither."""
    value = parse_bool(text)
    if value is None:
        raise ConfigError(f"expected a yes or a no, found {text!r}", hint="write true or false")
    return value


def enabled(variable: str) -> bool:
    """Return the boolean in an environment variable; unset and empty mean False. Raises ConfigError for other text."""
    text = os.environ.get(variable, "")
    try:
        return bool(text) and str_to_bool(text)
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error.message}", hint=error.hint) from None


DEFAULT_HOST = "DYN_DEFAULT_HOST"
"""Variable with the address on which an entry service listens if nothing else names one; images set it."""


def get_host_port() -> tuple[str, int]:
    """Return DYNAMO_HOST, else DYN_DEFAULT_HOST, and DYNAMO_PORT; by default 127.0.0.1 and 8000."""
    host = os.environ.get("DYNAMO_HOST") or os.environ.get(DEFAULT_HOST) or "127.0.0.1"
    return host, int(os.environ.get("DYNAMO_PORT") or 8000)


def api_keys() -> list[str]:
    """Return the keys of DYN_API_KEYS, which are separated by commas."""
    return [key.strip() for key in os.environ.get("DYN_API_KEYS", "").split(",") if key.strip()]


def get_system_app_host_port() -> tuple[str, int]:
    """Return DYNAMO_SYSTEM_APP_HOST and DYNAMO_SYSTEM_APP_PORT.

    By default 0.0.0.0, since probes come from other hosts, and 0, which is any free port.
    """
    return (
        os.environ.get("DYNAMO_SYSTEM_APP_HOST") or "0.0.0.0",
        int(os.environ.get("DYNAMO_SYSTEM_APP_PORT") or 0),
    )
