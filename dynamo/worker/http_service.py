"""HTTP of a service process: `@api` methods and probes on its own server, probes and metrics on the system app."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import inspect
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo import environment
from dynamo.config.provenance import canonical, preview
from dynamo.config.settings import declared
from dynamo.environment import enabled, get_system_app_host_port
from dynamo.errors import ConfigError, StartError
from dynamo.sdk.endpoint import LIVENESS_PATH, READINESS_PATH, Hook, probes
from dynamo.sdk.spec import spec_of

if TYPE_CHECKING:
    from dynamo.http.server import HttpServer

log = logging.getLogger(__name__)

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
CLOSE_S = 1.0
PORTS_FILE = "http.json"
SYSTEM_APP = "DYNAMO_SYSTEM_APP_ENABLED"
DEFAULT_CHECKS = "DYNAMO_SYSTEM_APP_USE_DEFAULT_HEALTH_CHECKS"


class HttpService:
    """Both HTTP servers of one process; neither is started unless it is needed."""

    def __init__(
        self,
        instance: Any,
        settings: Mapping[str, Any],
        *,
        entry: bool,
        workers: int,
        run_dir: Path | None,
        metrics: Callable[[], bytes],
    ) -> None:
        """`metrics` returns the text for /metrics of the system app."""
        self._instance = instance
        self._cls = type(instance)
        self._settings = settings
        self._entry = entry
        self._workers = workers
        self._run_dir = run_dir
        self._metrics = metrics
        self._spec = spec_of(self._cls)
        self._server: HttpServer | None = None
        self._system: HttpServer | None = None
        self.starting = True
        """before the start hooks are done, probes do not call the component's methods: live, not ready"""

    async def start_system_app(self) -> None:
        """Serve probes and metrics on DYNAMO_SYSTEM_APP_HOST and _PORT, if DYNAMO_SYSTEM_APP_ENABLED is true.

        It runs before the start hooks do. Raises StartError when the port is in use.
        """
        if not enabled(SYSTEM_APP):
            return
        from dynamo.http.api_app import create_api
        from dynamo.http.server import HttpServer, listen

        host, port = get_system_app_host_port()
        try:
            listener = listen(host, port)
        except StartError as error:
            hint = f"give the port to one service: {self._spec.name}.ServiceArgs.envs.DYNAMO_SYSTEM_APP_PORT"
            raise StartError(f"system app of {self._spec.name}: {error.message}", hint=hint) from None
        app = create_api(self._spec.system_app, f"{self._spec.name}-system", [], self._checks(), self._metrics)
        self._system = HttpServer(app, host, listener.getsockname()[1], listener, lifespan="auto")
        await self._system.start()
        log.info("system app: %s", self._system.url)

    async def start(self) -> str | None:
        """Accept requests for `@api` methods; return the URL, or None for a service without any."""
        if not self._spec.serves_http:
            return None
        from dynamo.http.server import HttpServer  # uvicorn and FastAPI, only where they are used

        app = api_of(self._instance, self._checks())
        host, port = http_address(self._cls, self._settings, entry=self._entry)
        listener = self.listen(host, port)
        self._server = HttpServer(app, host, listener.getsockname()[1], listener, lifespan="auto")
        await self._server.start()
        return self._server.url

    def listen(self, host: str, port: int | None) -> socket.socket:
        """Open the listening socket of this service's server; the kernel spreads connections over its live workers.

        Raises StartError when the port is in use.
        """
        from dynamo.http.server import listen

        if self._run_dir is None:
            return listen(host, port)
        ports, shared = self._run_dir / PORTS_FILE, self._workers > 1
        return claim(ports, self._spec.name, port, lambda p, s: listen(host, p, shared=s), shared)

    async def stop(self, limit_s: float) -> None:
        """Stop accepting requests and wait up to `limit_s` for running responses; then cut them."""
        self.starting = True  # the system app meanwhile reports this process as not ready
        await _stop(self._server, limit_s)

    async def close(self) -> None:
        """Close the system app."""
        await _stop(self._system, CLOSE_S)

    def _checks(self) -> dict[str, Callable[[], Awaitable[tuple[int, str]]]]:
        checks: dict[str, Callable[[], Awaitable[tuple[int, str]]]] = {}
        kinds: list[tuple[Hook, str]] = [("liveness", LIVENESS_PATH), ("readiness", READINESS_PATH)]
        for kind, path in kinds:
            methods: dict[str, list[str]] = {}
            for method, route in probes(self._cls, kind).items():
                methods.setdefault(route, []).append(method)
            if not methods and enabled(DEFAULT_CHECKS):
                methods[path] = []
            checks |= {route: self._check(kind, names) for route, names in methods.items()}
        return checks

    def _check(self, kind: Hook, methods: list[str]) -> Callable[[], Awaitable[tuple[int, str]]]:
        async def check() -> tuple[int, str]:
            if self.starting:
                return (200, "starting") if kind == "liveness" else (503, "not ready: starting or stopping")
            for name in methods:
                try:
                    result = getattr(self._instance, name)()
                    if not (await result if inspect.isawaitable(result) else result):
                        return 503, f"{self._spec.name}.{name} returned False"
                except Exception as error:
                    return 500, f"{self._spec.name}.{name}: {type(error).__name__}: {error}"
            return 200, "ok"

        return check


def api_of(instance: object, checks: Mapping[str, Callable[[], Awaitable[tuple[int, str]]]] | None = None) -> Any:
    """Return the ASGI application of a service's `@api` methods, with health checks by path."""
    from dynamo.http.api_app import BoundRoute, create_api

    spec = spec_of(type(instance))
    routes = [BoundRoute(route.path, route.verb, getattr(instance, route.method)) for route in spec.routes]
    return create_api(spec.app, spec.name, routes, checks or {})


async def _stop(server: HttpServer | None, limit_s: float) -> None:
    if server is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.stop(), limit_s)


def http_address(cls: type[Any], settings: Mapping[str, Any], *, entry: bool) -> tuple[str, int | None]:
    """Return the host and port of a service's HTTP server; port None means any free one.

    They come from its configuration, else, for the entry of the graph, from DYNAMO_HOST (else DYN_DEFAULT_HOST) and
    DYNAMO_PORT, else from its constructor's defaults, else 127.0.0.1:8000. Raises ConfigError for an invalid port.
    """
    found = declared(cls)
    values: dict[str, Any] = {}
    for key in ("host", "port"):
        setting = found.settings.get(key) if found is not None else None
        if setting is not None and not setting.required and setting.default is not None:
            values[key] = setting.default
    if entry:
        host = os.environ.get("DYNAMO_HOST") or os.environ.get(environment.DEFAULT_HOST)
        given = {"host": host, "port": os.environ.get("DYNAMO_PORT")}
        values |= {key: value for key, value in given.items() if value}
    values |= {canonical(key): value for key, value in settings.items() if canonical(key) in ("host", "port")}
    port = values.get("port", DEFAULT_PORT if entry else None)
    try:
        number = None if port is None else int(port)
        if number is not None and not 0 <= number < 1 << 16:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"{cls.__name__}.port: expected a port number, found {preview(port)}", hint="give a number up to 65535"
        ) from None
    return str(values.get("host") or DEFAULT_HOST), number


def claim(
    ports: Path, service: str, port: int | None, listen: Callable[[int | None, bool], socket.socket], shared: bool
) -> socket.socket:
    """Listen on a service's port, which all its workers share and keep across restarts: the file `ports` records it.

    `listen(port, shared)` opens the socket. Raises StartError when another service of the graph, or another program,
    uses the port.
    """
    with ports.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        claimed: dict[str, int] = json.loads(file.read() or "{}")
        for name, claimed_port in claimed.items():
            if name != service and claimed_port == port:
                raise StartError(
                    f"{service} cannot listen on port {port}: {name} uses it", hint=f"set {service}.port to a free port"
                )
        if shared and service not in claimed and port:
            listen(port, False).close()  # SO_REUSEPORT alone would share the port with any other program that sets it
        listener = listen(port or claimed.get(service), shared)
        claimed[service] = listener.getsockname()[1]
        file.truncate(0)
        json.dump(claimed, file)
        return listener
