"""The identity and addresses of this host, its ports, and listening TCP sockets.

A container counts as a host of its own: it shares the kernel of its machine, but neither its network nor its files.

To listen, use `listening_at` for a given port and `listening_socket` for a free one of `STREAM_PORTS`.
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
"""Variable with the `host:port` where the metrics of this host's processes are scraped; set by the launcher."""
STREAM_PORTS = range(20000, 32768)
"""The ports that processes listen on for each other: below 32768, where Linux's range for outgoing connections begins
(net.ipv4.ip_local_port_range), so that no outgoing connection holds one."""
PORT_ATTEMPTS = 50
"""Ports that are tried, at random, before there is none."""

SIOCGIFADDR = 0x8915
"""ioctl that reads an interface's address (linux/sockios.h)."""
_ADDRESS = re.compile(r"(\[[^\]]*\]|[^\s:/?#\[\]]+)(:\d+)?/?")


@functools.cache
def host_id() -> str:
    """Return `<network>-<files>`, equal for processes that see the same network and the same files.

    Those may share unix sockets and memory. If only the first part is equal, they share loopback addresses.
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
    except OSError:  # not Linux
        return kind


def same_network(host: str) -> bool:
    """Return True if the host with this id shares loopback addresses with this one."""
    return host.partition("-")[0] == host_id().partition("-")[0]


def advertised_host(nats_url: str) -> str:
    """Return the address at which other hosts reach this one: DYN_HOST_IP, else the one on the route to the NATS server."""
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
    """Return the address to listen on: DYN_BIND_IP, else the advertised one.

    Raises ConfigError for a DYN_BIND_IP, or without one a DYN_HOST_IP, that is no address of this host.
    """
    advertised = advertised_host(nats_url)
    bound = os.environ.get(BOUND)
    if is_address(advertised) and ipaddress.ip_address(advertised).is_unspecified:
        raise ConfigError(
            f"{ADVERTISED}={advertised}: other hosts cannot connect to this address",
            hint=f"give an address of this host, and {BOUND}={advertised} to listen on all of them",
        )
    if bound:
        _check_bindable(
            bound, BOUND, f"give an address of this host, or 0.0.0.0 for all; {ADVERTISED} is the one for other hosts"
        )
    elif os.environ.get(ADVERTISED):
        _check_bindable(
            advertised, ADVERTISED,
            f"give an address of this host; if other hosts reach it by address translation, set {BOUND}=0.0.0.0 too",
        )  # fmt: skip
    return bound or advertised


def _check_bindable(host: str, variable: str, hint: str) -> None:
    """Raise ConfigError, naming the variable, if this host has no such address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{variable}={host}: not an address of this host: {error.strerror or error}", hint=hint
        ) from None


def listening_at(host: str, port: int, backlog: int = 128, *, reuse_port: bool = False) -> socket.socket:
    """Return a listening TCP socket, of IPv6 if the host is an IPv6 address; on `::` it accepts IPv4 too.

    With `reuse_port`, several sockets may listen on the port and the kernel spreads connections over them. Raises OSError
    with the reason as its `strerror`.
    """
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=backlog,
            reuse_port=reuse_port,
            dualstack_ipv6=host == "::",
        )
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while attempting")[0]  # Python appends the address
        raise OSError(error.errno, reason) from None


def listening_socket(host: str, backlog: int = 128, *, reuse_port: bool = False) -> socket.socket:
    """Return a `listening_at` socket on a random free port of `STREAM_PORTS`. Raises TransportError if there is none."""
    reason = ""
    for port in random.sample(STREAM_PORTS, PORT_ATTEMPTS):
        try:
            return listening_at(host, port, backlog, reuse_port=reuse_port)
        except OSError as error:
            reason = error.strerror or str(error)
    raise TransportError(f"cannot listen on {host}: {reason}", hint=f"set {ADVERTISED} to an address of this host")


def interface_of(address: str) -> str:
    """Return the name of the network interface whose first IPv4 address this is; empty if there is none, or off Linux."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def without_credentials(urls: str) -> str:
    """Remove credentials from URLs, for logs and for errors, which clients may read.

    `"nats://user:secret@a:4222, b"` becomes `"nats://a:4222,b"`. If there are credentials, a piece that is no address
    becomes `?`: it may be part of a password.
    """
    each = filter(None, map(str.strip, urls.split(",")))
    return ",".join(map(_public, each) if "@" in urls else each)


def _public(url: str) -> str:
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    address = rest.rpartition("@")[2]
    return f"{scheme}{separator}{address if _ADDRESS.fullmatch(address) else '?'}"


def is_address(host: str) -> bool:
    """Return True for an IP address, False for a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return True for an address that reaches its own host only."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 9000}
"""A host that is cut off is noticed after 9 s, less than the TTL of its etcd lease."""


def keep_alive(opened: socket.socket) -> None:
    """Make the kernel close a TCP connection whose other end is no longer reachable; see `KEEPALIVE`."""
    with contextlib.suppress(OSError):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # some platforms lack some
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
