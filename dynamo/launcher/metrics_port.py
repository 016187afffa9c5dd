"""The port on which a host's metrics are scraped: where it listens, and the address that is announced for it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError
from dynamo.transport.network import ADVERTISED, BOUND, advertised_host, bound_host, is_loopback, listening_at

if TYPE_CHECKING:
    from dynamo.config.options import ServeOptions

DEFAULT_PORTS = range(9091, 9191)  # the first is that of ai-dynamo's metrics program
LOOPBACK = "127.0.0.1"
ANY = ("", "0.0.0.0", "::")


@dataclass(frozen=True)
class MetricsPort:
    """`address`: `host:port` to scrape. `listeners` accept connections from the start, before anything serves them."""

    address: str
    listeners: Sequence[socket.socket]

    @property
    def url(self) -> str:
        return f"http://{self.address}/metrics"

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def check_addresses(options: ServeOptions, nats_url: str) -> None:
    """Raise ConfigError for a DYN_HOST_IP, DYN_BIND_IP or `--metrics-host` on which this host cannot listen."""
    if os.environ.get(ADVERTISED) or os.environ.get(BOUND):
        bound_host(nats_url)
    if options.metrics_host is not None and options.metrics_port != 0:
        try:
            listening_at(options.metrics_host, 0).close()
        except OSError as error:
            raise _cannot_listen(error, options.metrics_host, options.metrics_port) from None


def check(options: ServeOptions, nats_url: str, reserved: Collection[int] = ()) -> None:
    """Raise ConfigError for addresses as `check_addresses` does, and for a `--metrics-port` that cannot be claimed.

    `reserved` are the ports that the graph itself needs.
    """
    check_addresses(options, nats_url)
    if options.metrics_port:
        if options.metrics_port in reserved:
            raise ConfigError(
                f"--metrics-port {options.metrics_port}: the graph's own HTTP has this port",
                hint="choose another port for one of them, or 0 for no metrics",
            )
        if port := claim(options, nats_url):
            port.close()


def claim(options: ServeOptions, nats_url: str, reserved: Collection[int] = ()) -> MetricsPort | None:
    """Listen on the metrics port: the one in `options`, else the first free one of `DEFAULT_PORTS` but not `reserved`.

    Returns None if `options` turn metrics off (port 0). Raises ConfigError if no port can be claimed.
    """
    if options.metrics_port == 0:
        return None
    hosts = _hosts(options.metrics_host, nats_url)
    if options.metrics_port is None:
        port, listeners = _listen_on_free_port(hosts, reserved)
    else:
        port = options.metrics_port
        try:
            listeners = _listen(hosts, port)
        except OSError as error:
            raise _cannot_listen(error, hosts[0], port) from None
    given = options.metrics_host
    host = given if given and given not in ANY else advertised_host(nats_url)
    return MetricsPort(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", listeners)


def _hosts(given: str | None, nats_url: str) -> list[str]:
    """Return the addresses to listen on: the given one, else that of this host's processes, and loopback."""
    if given is not None:
        return [given]
    host = bound_host(nats_url)
    return [host] if is_loopback(host) or host in ANY else [host, LOOPBACK]


def _listen_on_free_port(hosts: Sequence[str], reserved: Collection[int]) -> tuple[int, list[socket.socket]]:
    for port in DEFAULT_PORTS:
        if port in reserved:
            continue
        try:
            return port, _listen(hosts, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _cannot_listen(error, hosts[0], port) from None
    raise ConfigError(
        f"no free port for metrics on {hosts[0]}: {DEFAULT_PORTS[0]} to {DEFAULT_PORTS[-1]} are in use",
        hint="choose a port with --metrics-port, or 0 for none",
    )


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Listen on the port at all of these addresses, or raise OSError and listen at none."""
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(listening_at(host, port)) for host in hosts]
        opened.pop_all()
        return listeners


def _cannot_listen(error: OSError, host: str, port: int | None) -> ConfigError:
    place = f"{host}:{port}" if port else host
    hint = "give an address of this host: --metrics-host 127.0.0.1, or 0.0.0.0 for all of them"
    if port and error.errno in (errno.EADDRINUSE, errno.EACCES):  # EACCES: below 1024
        other = port + 1 if error.errno == errno.EADDRINUSE else DEFAULT_PORTS[0]
        hint = f"choose another port: --metrics-port {other}, or 0 for none"
    return ConfigError(f"cannot listen on {place} for metrics: {error.strerror}", hint=hint)
