"""The HTTP side of one service's process: `@api` methods and probes on its own server, probes and metrics on the system
app."""

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

from dynamo.config.provenance import canonical, preview
from dynamo.config.settings import declared
from dynamo.environment import enabled, get_system_app_host_port
from dynamo.errors import ConfigError, StartError
from dynamo.sdk.endpoint import LIVENESS_PATH, READINESS_PATH, Hook, probes
from dynamo.sdk.spec import spec_of

if TYPE_CHECKING:
    from dynamo.http.api_app import ApiServer

logger = logging.getLogger(__name__)

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
CLOSE_S = 1.0
PORTS_FILE = "http.json"
SYSTEM_APP = "DYNAMO_SYSTEM_APP_ENABLED"
DEFAULT_CHECKS = "DYNAMO_SYSTEM_APP_USE_DEFAULT_HEALTH_CHECKS"


class HttpService:
    """Both servers of one process; neither exists unless something needs it."""

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
        """`metrics`: what the system app answers to /metrics."""
        self._instance, self._cls = instance, type(instance)
        self._settings, self._entry, self._workers, self._run_dir = settings, entry, workers, run_dir
        self._metrics = metrics
        self._spec = spec_of(self._cls)
        self._server: ApiServer | None = None
        self._system: ApiServer | None = None
        self.starting = True
        """until the start hooks are done, probes answer without the component's methods: healthy, and not ready"""

    async def start_system_app(self) -> None:
        """Probes and metrics on DYNAMO_SYSTEM_APP_HOST and _PORT, if DYNAMO_SYSTEM_APP_ENABLED says so: from before the
        start hooks on.

        Raises StartError when the port is taken.
        """
        if not enabled(SYSTEM_APP):
            return
        from dynamo.http.api_app import ApiServer, create_api, listen

        host, port = get_system_app_host_port()
        try:
            listener = listen(host, port)
        except StartError as error:
            hint = f"give the port to one service: {self._spec.name}.ServiceArgs.envs.DYNAMO_SYSTEM_APP_PORT"
            raise StartError(f"system app of {self._spec.name}: {error.message}", hint=hint) from None
        app = create_api(self._spec.system_app, f"{self._spec.name}-system", [], self._checks(), self._metrics)
        self._system = ApiServer(app, host, listener)
        await self._system.start()
        logger.info("system app: %s", self._system.url)

    async def start(self) -> str | None:
        """Accept requests for `@api` methods; gives the URL. None: the service has nothing to do with HTTP."""
        if not self._spec.routes and self._spec.app is None:
            return None
        from dynamo.http.api_app import Answer, ApiServer, create_api  # FastAPI, only where it is used

        answers = [Answer(r.path, r.verb, getattr(self._instance, r.method)) for r in self._spec.routes]
        app = create_api(self._spec.app, self._spec.name, answers, self._checks())
        host, port = http_address(self._cls, self._settings, entry=self._entry)
        self._server = ApiServer(app, host, self.listen(host, port))
        await self._server.start()
        return self._server.url

    def listen(self, host: str, port: int | None) -> socket.socket:
        """For the server of this service, one socket in each of its workers: the kernel spreads connections over those
        that live. Raises StartError when the port is taken.
        """
        from dynamo.http.api_app import listen

        if self._run_dir is None:
            return listen(host, port)
        ports, shared = self._run_dir / PORTS_FILE, self._workers > 1
        return claim(ports, self._spec.name, port, lambda p, s: listen(host, p, shared=s), shared)

    async def stop(self, limit_s: float) -> None:
        """Accept nothing new, and return when the running answers have ended; those that take longer are cut."""
        self.starting = True  # the system app tells meanwhile that this process is not ready any more
        await _stop(self._server, limit_s)

    async def close(self) -> None:
        """The system app goes last."""
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


async def _stop(server: ApiServer | None, limit_s: float) -> None:
    if server is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.stop(), limit_s)


def http_address(cls: type[Any], settings: Mapping[str, Any], *, entry: bool) -> tuple[str, int | None]:
    """Where a service's HTTP server listens; port None: any free one.

    From its configuration, else its constructor's defaults; for the entry of the graph then DYNAMO_HOST and
    DYNAMO_PORT, else 127.0.0.1:8000. Raises ConfigError for what is no port.
    """
    found = declared(cls)
    values: dict[str, Any] = {}
    for key in ("host", "port"):
        setting = found.settings.get(key) if found is not None else None
        if setting is not None and not setting.required and setting.default is not None:
            values[key] = setting.default
    if entry:
        given = {"host": os.environ.get("DYNAMO_HOST"), "port": os.environ.get("DYNAMO_PORT")}
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
    """Listen on the service's port, the same one for all of its workers and after a restart: the file `ports` has it.

    `listen(port, shared)` makes the socket. Raises StartError when another service of the graph has the port, or
    another program.
    """
    with ports.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        claimed: dict[str, int] = json.loads(file.read() or "{}")
        for name, taken in claimed.items():
            if name != service and taken == port:
                raise StartError(
                    f"{service} cannot listen on port {port}: {name} has it", hint=f"set {service}.port to another one"
                )
        if shared and service not in claimed and port:
            listen(port, False).close()  # with SO_REUSEPORT, the port would be shared with whoever else shares it
        listener = listen(port or claimed.get(service), shared)
        claimed[service] = listener.getsockname()[1]
        file.truncate(0)
        json.dump(claimed, file)
        return listener
