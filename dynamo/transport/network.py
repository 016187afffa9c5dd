"""Which host this is, and where others reach it.

A container is a host of its own here: it has the kernel of its machine, and neither its network nor its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import ipaddress
import os
import random
import re
import socket
import struct
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from dynamo.errors import ConfigError, TransportError

ADVERTISED = "DYN_HOST_IP"
BOUND = "DYN_BIND_IP"
METRICS_ADDRESS = "DYNAMO_METRICS_ADDRESS"
"""`host:port` where this host's processes are scraped, which each of them has from whoever started it"""
STREAM_PORTS = range(20000, 32768)
"""where processes listen for others: below the range that the kernel gives to outgoing connections"""

SIOCGIFADDR = 0x8915  # linux/sockios.h
_ADDRESS = re.compile(r"(\[[^\]]*\]|[^\s:/?#\[\]]+)(:\d+)?/?")


@functools.cache
def host_id() -> str:
    """`<network>-<files>`: equal for processes that see the same network and the same files, so that unix sockets and
    memory may be shared between them. The first part alone is equal where loopback addresses mean the same.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = f"{uuid.getnode():x}"
    seen = (f"{kernel} {_namespace(kind)}".encode() for kind in ("net", "mnt"))
    return "-".join(hashlib.blake2b(each, digest_size=4).hexdigest() for each in seen)


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:  # no Linux
        return kind


def same_network(host: str) -> bool:
    """Whether an address of loopback means the same on the host of this id as here."""
    return host.partition("-")[0] == host_id().partition("-")[0]


def advertised_host(nats_url: str) -> str:
    """The address on which other processes reach this one: DYN_HOST_IP, else the one that faces the NATS server."""
    given = os.environ.get(ADVERTISED)
    if given:
        return given
    parts = urlsplit(nats_url.partition(",")[0])
    try:
        found = socket.getaddrinfo(parts.hostname or "localhost", parts.port or 4222, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return "127.0.0.1"
    for family, kind, _, _, address in sorted(found, key=lambda each: each[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return "127.0.0.1"


def bound_host(nats_url: str) -> str:
    """The address to listen on: DYN_BIND_IP, else the advertised one.

    Raises ConfigError for a DYN_HOST_IP that nobody can listen on here, unless DYN_BIND_IP says where to.
    """
    advertised, bound = advertised_host(nats_url), os.environ.get(BOUND)
    if is_address(advertised) and ipaddress.ip_address(advertised).is_unspecified:
        raise ConfigError(
            f"{ADVERTISED}={advertised}: nobody reaches a host under this address",
            hint=f"give an address of this host, and {BOUND}={advertised} to listen on all of them",
        )
    if bound:
        _try_to_bind(
            bound, BOUND, f"give an address of this host, or 0.0.0.0 for all; {ADVERTISED} is what others are told"
        )
    elif os.environ.get(ADVERTISED):
        _try_to_bind(
            advertised, ADVERTISED,
            f"give an address of this host; if others reach it there by address translation, set {BOUND}=0.0.0.0 too",
        )  # fmt: skip
    return bound or advertised


def _try_to_bind(host: str, variable: str, hint: str) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{variable}={host}: not an address of this host: {error.strerror or error}", hint=hint
        ) from None


def listening_at(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A TCP socket that listens there, with IPv6 where the address is one. Raises OSError when it cannot."""
    return socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=backlog
    )


def listening_socket(host: str, backlog: int = 128) -> socket.socket:
    """A TCP socket that listens on a port of `STREAM_PORTS`. Raises TransportError when it cannot."""
    reason = ""
    for port in random.sample(STREAM_PORTS, 50):
        try:
            return listening_at(host, port, backlog)
        except OSError as error:
            reason = error.strerror or str(error)
    raise TransportError(f"cannot listen on {host}: {reason}", hint=f"set {ADVERTISED} to an address of this host")


def interface_of(address: str) -> str:
    """Name of the network interface that has this IPv4 address as its first; empty where none has, or off Linux."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def without_credentials(urls: str) -> str:
    """`"nats://user:secret@a:4222, b"` -> `"nats://a:4222,b"`, for errors, which clients may read, and for logs.

    Beside credentials, what is no address is `?`: it may be a piece of a password.
    """
    each = filter(None, map(str.strip, urls.split(",")))
    return ",".join(map(_public, each) if "@" in urls else each)


def _public(url: str) -> str:
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    address = rest.rpartition("@")[2]
    return f"{scheme}{separator}{address if _ADDRESS.fullmatch(address) else '?'}"


def is_address(host: str) -> bool:
    """Whether it is written as an IP address, not as a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address reaches its own host only."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 9000}
"""A host that vanished without a word is noticed in 9 s, which is less than the life of its lease."""


def keep_alive(opened: socket.socket) -> None:
    """Have the kernel notice when the other end of a TCP connection has vanished: see `KEEPALIVE`."""
    with contextlib.suppress(OSError):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # not everywhere
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
