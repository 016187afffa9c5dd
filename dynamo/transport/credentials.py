"""The credentials of this process at NATS and etcd: from the address, else from `NATS_AUTH_*` and `ETCD_AUTH_*`.

The variables have the names and the precedence of ai-dynamo 0.x. An empty variable counts as unset. Nothing here is logged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dynamo.errors import ConfigError

NATS_VARIABLES = (
    "NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, NATS_AUTH_TOKEN, NATS_AUTH_NKEY or NATS_AUTH_CREDENTIALS_FILE"
)
ETCD_VARIABLES = "ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"
ETCD_TLS_VARIABLES = "ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY"


class EtcdCredentials(NamedTuple):
    """A user of etcd, and PEM for `https://` endpoints: authorities, and a client's certificate with its key."""

    username: str = ""
    password: str = ""
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None

    def __repr__(self) -> str:
        return f"EtcdCredentials({self.username!r}, ...)"  # no secrets in logs


def nats_credentials(urls: str) -> dict[str, Any]:
    """Return the keywords of nats-py's `connect` for a user, a token, an nkey or a credentials file, the first that is set.

    Empty if an address names a user, which nats-py reads itself. Raises ConfigError for a seed or a file that cannot be
    used.
    """
    if "@" in urls:
        return {}
    if user := _user("NATS_AUTH"):
        return {"user": user[0], "password": user[1]}
    if token := os.environ.get("NATS_AUTH_TOKEN"):
        return {"token": token}
    if seed := os.environ.get("NATS_AUTH_NKEY"):
        _check_seed(seed)
        return {"nkeys_seed_str": seed}
    if path := os.environ.get("NATS_AUTH_CREDENTIALS_FILE"):
        if b"USER NKEY SEED" not in _read("NATS_AUTH_CREDENTIALS_FILE", path):
            raise ConfigError(
                f"NATS_AUTH_CREDENTIALS_FILE={path}: it has no user JWT and seed",
                hint="give a .creds file, as `nsc` writes",
            )
        return {"user_credentials": path}
    return {}


def _check_seed(seed: str) -> None:
    import nkeys  # few use it: it loads libsodium

    try:
        nkeys.from_seed(bytearray(seed.strip().encode()))
    except nkeys.NkeysError:
        raise ConfigError(
            "NATS_AUTH_NKEY is not the seed of an nkey", hint="give the line that begins with SU"
        ) from None


def etcd_credentials(endpoints: str) -> EtcdCredentials:
    """Return the user that the first endpoint with one names, else that of the variables, and the TLS files of those.

    Raises ConfigError for a file that cannot be read.
    """
    found = filter(None, map(_user_of, endpoints.split(",")))
    username, password = next(found, None) or _user("ETCD_AUTH") or ("", "")
    pem = [_pem(f"ETCD_AUTH_{name}") for name in ("CA", "CLIENT_CERT", "CLIENT_KEY")]
    if (pem[1] is None) != (pem[2] is None):
        raise ConfigError("ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY belong together", hint="set both, or neither")
    return EtcdCredentials(username, password, *pem)


def _user(prefix: str) -> tuple[str, str] | None:
    """Return the user and password of two variables; None unless both are set."""
    user, password = (os.environ.get(f"{prefix}_{name}", "") for name in ("USERNAME", "PASSWORD"))
    return (user, password) if user and password else None


def _user_of(url: str) -> tuple[str, str] | None:
    try:
        parts = urlsplit(url.strip() if "://" in url else f"http://{url.strip()}")
    except ValueError:  # no address, which the client reports
        return None
    return (unquote(parts.username), unquote(parts.password or "")) if parts.username else None


def _pem(variable: str) -> bytes | None:
    """Return the PEM that a variable holds, as text or as the path of a file."""
    value = os.environ.get(variable, "")
    if not value:
        return None
    pem = value.encode() if "-----BEGIN" in value else _read(variable, value)
    if b"-----BEGIN" not in pem:
        raise ConfigError(f"{variable} holds no PEM", hint="give a file that begins with -----BEGIN, or its text")
    return pem


def _read(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        # not the value: it may be a key that was pasted without its first line
        reason = getattr(error, "strerror", None) or "no path"
        raise ConfigError(
            f"cannot read the file of {variable}: {reason}", hint="give the path of a readable file"
        ) from None
