"""Where a host's metrics port listens, and what is told of it to those who scrape."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError
from dynamo.transport.network import ADVERTISED, BOUND, advertised_host, bound_host, is_loopback

if TYPE_CHECKING:
    from dynamo.config.options import ServeOptions

DEFAULT_PORTS = range(9091, 9191)  # the first is that of ai-dynamo's metrics program
LOOPBACK, ANY = "127.0.0.1", ("", "0.0.0.0", "::")
BACKLOG = 128


@dataclass(frozen=True)
class MetricsPort:
    """`address`: what others scrape, `host:port`."""

    address: str
    listeners: Sequence[socket.socket]

    @property
    def url(self) -> str:
        return f"http://{self.address}/metrics"

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def check_addresses(options: ServeOptions, nats_url: str) -> None:
    """Raises ConfigError for a DYN_HOST_IP, DYN_BIND_IP or `--metrics-host` on which nothing can listen here."""
    if os.environ.get(ADVERTISED) or os.environ.get(BOUND):
        bound_host(nats_url)
    if options.metrics_host is not None and options.metrics_port != 0:
        try:
            _close(_listen([options.metrics_host], 0))
        except OSError as error:
            raise _refused(error, options.metrics_host, options.metrics_port) from None


def check(options: ServeOptions, nats_url: str, taken: Collection[int] = ()) -> None:
    """Also raises it for a port that was asked for and is not free, or is one of `taken`, which the graph itself needs."""
    check_addresses(options, nats_url)
    if options.metrics_port:
        if options.metrics_port in taken:
            raise ConfigError(
                f"--metrics-port {options.metrics_port}: the graph's own HTTP has this port",
                hint="choose another port for one of them, or 0 for no metrics",
            )
        if port := claim(options, nats_url):
            port.close()


def claim(options: ServeOptions, nats_url: str, taken: Collection[int] = ()) -> MetricsPort | None:
    """Listen on the port that was asked for, else on the first of `DEFAULT_PORTS` that is free and not among `taken`;
    None: no port is wanted.

    On the address where the processes of this host listen, and on that of loopback, or on the one that was asked for.
    Raises ConfigError where that is not possible.
    """
    host, port = options.metrics_host, options.metrics_port
    if port == 0:
        return None
    hosts = [bound_host(nats_url) if host is None else host]
    if host is None and not is_loopback(hosts[0]) and hosts[0] not in ANY:
        hosts.append(LOOPBACK)
    told = host if host and host not in ANY else advertised_host(nats_url)
    for candidate in [port] if port else [each for each in DEFAULT_PORTS if each not in taken]:
        try:
            listeners = _listen(hosts, candidate)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise _refused(error, hosts[0], candidate) from None
        return MetricsPort(f"{f'[{told}]' if ':' in told else told}:{candidate}", listeners)
    raise ConfigError(
        f"ports {DEFAULT_PORTS[0]} to {DEFAULT_PORTS[-1]} are taken on {hosts[0]}, one is for metrics",
        hint="choose a port with --metrics-port, or 0 for none",
    )


def _refused(error: OSError, host: str, port: int | None) -> ConfigError:
    fact = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
    place = f"{host}:{port}" if port else host
    hint = "give an address of this host: --metrics-host 127.0.0.1, or 0.0.0.0 for all of them"
    if port and error.errno in (errno.EADDRINUSE, errno.EACCES):  # EACCES: below 1024
        other = port + 1 if error.errno == errno.EADDRINUSE else DEFAULT_PORTS[0]
        hint = f"choose another port: --metrics-port {other}, or 0 for none"
    return ConfigError(f"cannot listen on {place} for metrics: {fact}", hint=hint)


def _close(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as opened:
        found = []
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            every = host == "::"  # IPv4 too
            listener = socket.create_server(
                ("" if every else host, port), family=family, backlog=BACKLOG, dualstack_ipv6=every
            )
            found.append(opened.enter_context(listener))
        opened.pop_all()
        return found
