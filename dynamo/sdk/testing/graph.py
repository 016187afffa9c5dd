"""`TestGraph`: all services of a graph for a test, in memory or as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import yaml

from dynamo.config import yaml_file
from dynamo.config.resolution import resolve_and_check
from dynamo.config.service_args import service_args
from dynamo.config.service_config import ServiceConfig
from dynamo.config.settings import constructor_arguments, declared
from dynamo.errors import GraphError, StartError
from dynamo.launcher.embedded_servers import free_ports
from dynamo.launcher.guard import descendants
from dynamo.launcher.run_dir import RunningGraph, running
from dynamo.rpc.runtime import Runtime
from dynamo.sdk.channels import attach
from dynamo.sdk.context import ServiceContext, enter_task
from dynamo.sdk.depends import Stub, bind
from dynamo.sdk.endpoint import Hook, hooks
from dynamo.sdk.graph import Graph, load
from dynamo.sdk.spec import spec_of
from dynamo.sdk.testing.doubles import MemoryPool
from dynamo.sdk.testing.memory import MemoryNetwork, MemoryRuntime
from dynamo.worker.environment import namespace_of
from dynamo.worker.http_service import api_of
from dynamo.worker.stubs import InstancePool

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)
T = TypeVar("T")
Config = Mapping[str, Mapping[str, Any]]

READY_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
POLL_S = 0.01
READY = re.compile(r"^ready in ", re.MULTILINE)


class _Running(Protocol):
    """A graph that runs, in memory or as processes."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def client(self, service: type[Any]) -> Any: ...
    async def kill(self, service: type[Any], worker_id: int) -> None: ...
    def http(self) -> httpx.AsyncClient: ...


class TestGraph:
    """The services of a graph, from entering the context until leaving it.

    In memory there are no sockets, NATS or etcd: all services run on the test's event loop, with the real components,
    and requests are encoded as between processes. With `real=True`, `dynamo serve` runs the graph with its embedded
    servers. The interface of this class is the same for both, so one test can run both ways.

    Args:
        entry: the entry service, or a graph as `dynamo serve` takes it (`"graphs.agg:Frontend"`).
        config: settings by service, as in a YAML file; `ServiceArgs: {workers: 2}` included.
        real: run processes instead.
    """

    __test__ = False  # pytest: not a class of tests

    def __init__(self, entry: type[Any] | str, config: Config | None = None, *, real: bool = False) -> None:
        graph = load(entry if isinstance(entry, str) else _spec_text(entry))
        settings = _checked(graph, config or {})
        self.graph = graph
        self._running: _Running = _Processes(graph, settings) if real else _InMemory(graph, settings)

    async def __aenter__(self) -> TestGraph:
        """Start the services and wait until each is ready. Raises StartError or what a service raises."""
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                await self._running.start()
        except BaseException:
            await self._running.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.stop()

    def client(self, service: type[T]) -> T:
        """Return a client of a service's instances, typed as the service itself."""
        self.graph.service(spec_of(service).name)
        return cast("T", self._running.client(service))

    def instances(self, service: type[T]) -> list[T]:
        """Return a service's live objects. Raises GraphError for real processes, which cannot show theirs."""
        if not isinstance(self._running, _InMemory):
            raise GraphError("TestGraph.instances: the objects are in other processes", hint="leave out real=True")
        return cast("list[T]", list(self._running.pools[spec_of(service).name].instances.values()))

    async def kill(self, service: type[Any], worker_id: int = 1) -> None:
        """Kill one worker of a service; its running calls end with WorkerLostError.

        The supervisor restarts real ones; in memory the worker stays absent. Raises GraphError when there is no such
        worker.
        """
        await self._running.kill(service, worker_id)

    def http(self) -> httpx.AsyncClient:
        """Return an HTTP client of the entry service (of the package `httpx`); close it, or use it as a context."""
        return self._running.http()


def _checked(graph: Graph, config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings by service, with `Common` merged in. Raises ConfigError as `dynamo serve` does."""
    services = {name: declared(cls) for name, cls in graph.services.items()}
    layer = yaml_file.parse(yaml.safe_dump({name: dict(values) for name, values in config.items()}), "config")
    resolved = resolve_and_check([layer], services)
    for notice in resolved.notices:
        log.warning("%s", notice)
    return {name: dict(values) for name, values in resolved.services.items()}


def _spec_text(entry: type[Any]) -> str:
    """Return `module:Class`, or `path/file.py:Class` where the module cannot be imported by its name."""
    name = spec_of(entry).name
    module = sys.modules.get(entry.__module__)
    importable = module is not None and entry.__module__ != "__main__"
    return f"{entry.__module__ if importable else inspect.getsourcefile(entry)}:{name}"


class _InMemory:
    """All services of a graph on one event loop."""

    def __init__(self, graph: Graph, settings: dict[str, dict[str, Any]]) -> None:
        self._graph = graph
        self._settings = settings
        self._network = MemoryNetwork()
        self._stopping = AsyncExitStack()
        self.pools = {name: MemoryPool(spec_of(cls), ()) for name, cls in graph.services.items()}
        self._workers: dict[tuple[str, int], _Worker] = {}
        self._entry: _Worker | None = None
        """the last worker of the entry service"""

    async def start(self) -> None:
        """Construct the services, dependencies first; run their start hooks; wait until all are ready."""
        previous = ServiceConfig._instance
        ServiceConfig._instance = ServiceConfig(self._settings)  # for components that read it, as those of 0.x do
        self._stopping.callback(setattr, ServiceConfig, "_instance", previous)
        for name, cls in self._graph.services.items():
            count = service_args(name, self._settings.get(name, {})).workers or spec_of(cls).workers
            for worker_id in range(1, count + 1):
                worker = _Worker(cls, self._context(cls, worker_id, count), self.pools[name])
                self._workers[name, worker_id] = self._entry = worker
                targets = {attribute: self.client(target) for attribute, target in self._graph.targets[name].items()}
                self._stopping.push_async_callback(worker.stop)
                await worker.start(targets, self._settings.get(name, {}))
        for worker in self._workers.values():
            await worker.wait_until_ready()

    def _context(self, cls: type[Any], worker_id: int, workers: int) -> ServiceContext:
        spec = spec_of(cls)
        namespace = namespace_of(cls, self._settings)
        runtime = MemoryRuntime(self._network, worker_id)
        runtime.metrics.identify(namespace, spec.name, [], worker_id)
        return ServiceContext(
            service_name=spec.name,
            namespace=namespace,
            worker_id=worker_id,
            workers=workers,
            runtime=runtime,
            progress=lambda _: None,
            endpoints=tuple(e.name for e in sorted(spec.endpoints.values(), key=lambda endpoint: endpoint.method)),
            graph=frozenset((namespace_of(c, self._settings), name) for name, c in self._graph.services.items()),
            in_memory=True,
        )

    async def stop(self) -> None:
        """Cancel the running calls and run the shutdown hooks of each service, the entry's first."""
        await self._stopping.aclose()

    def client(self, service: type[Any]) -> Any:
        """Return a stub of a service."""
        return Stub(spec_of(service), self.pools[spec_of(service).name])

    async def kill(self, service: type[Any], worker_id: int) -> None:
        """Remove an instance, with what it was answering and what it has published. Its shutdown hooks run at the end."""
        name = spec_of(service).name
        self.pools[name].lose(worker_id)
        await self._workers[name, worker_id].withdraw()

    def http(self) -> httpx.AsyncClient:
        """Return a client of the entry's ASGI application."""
        import httpx

        assert self._entry is not None
        app = self._entry.in_scope(self._app(self._entry.instance))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def _app(self, entry: Any) -> Any:
        spec = spec_of(self._graph.entry)
        if spec.routes or spec.app is not None:
            return api_of(entry)
        app = getattr(entry, "app", None)
        if app is None:
            raise GraphError(
                f"{spec.name} serves no HTTP", hint="give it @api methods, or keep its ASGI app in self.app"
            )
        return app


class _Worker:
    """One instance of a service in memory; its code runs in a scope of context variables of its own."""

    def __init__(self, cls: type[Any], context: ServiceContext, pool: MemoryPool) -> None:
        self.instance: Any = object.__new__(cls)
        self._cls = cls
        self._context = context
        self._pool = pool
        self._scope = contextvars.copy_context()
        self._scope.run(enter_task, context)
        self._started = False

    async def start(self, targets: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Construct the instance, run its start hooks, make it callable under its worker id."""
        attach(self.instance, self._pool.broker)
        bind(self.instance, **targets)
        self._scope.run(self.instance.__init__, **constructor_arguments(self._cls, settings))
        self._started = True
        await self._call_hooks("start")
        if not self._context.headless:
            self._pool.scopes[self._context.worker_id] = self._scope
            self._pool.add(self.instance, self._context.worker_id)

    async def wait_until_ready(self) -> None:
        """Wait until all readiness hooks return True."""
        while not all(await self._call_hooks("readiness")):
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End the service's running calls, run the shutdown hooks, withdraw what the instance has published."""
        await self._pool.aclose()
        if self._started:
            await self._call_hooks("shutdown")
        await self.withdraw()

    async def withdraw(self) -> None:
        """Remove what the instance has published."""
        await cast("MemoryRuntime", self._context.runtime).close()

    def in_scope(self, app: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        """Return an ASGI application whose requests run with the instance's context variables."""

        async def run(*arguments: Any) -> None:
            await asyncio.get_running_loop().create_task(app(*arguments), context=self._scope.copy())

        return run

    async def _call_hooks(self, kind: Hook) -> list[Any]:
        async def call() -> list[Any]:
            results = []
            for name in hooks(self._cls, kind):
                result = getattr(self.instance, name)()
                results.append(await result if inspect.isawaitable(result) else result)
            return results

        return await asyncio.get_running_loop().create_task(call(), context=self._scope)


class _Processes:
    """The processes of a graph, run by `dynamo serve` with embedded NATS and etcd."""

    def __init__(self, graph: Graph, settings: dict[str, dict[str, Any]]) -> None:
        self._graph = graph
        self._settings = settings
        self._directory = tempfile.TemporaryDirectory(prefix="dynamo-test-")
        self._output = Path(self._directory.name) / "output.txt"
        self._process: asyncio.subprocess.Process | None = None
        self._announced: RunningGraph | None = None
        self._runtime: Runtime | None = None
        self._pools: dict[str, InstancePool] = {}

    async def start(self) -> None:
        """Run `dynamo serve` and connect to its NATS and etcd. Raises StartError with its output when it ends."""
        entry = self._graph.entry
        known = declared(entry)
        if spec_of(entry).routes or (known is not None and known.takes("port")):
            self._settings.setdefault(spec_of(entry).name, {}).setdefault("port", free_ports(1)[0])
        config = Path(self._directory.name) / "config.yaml"
        config.write_text(yaml.safe_dump(self._settings))
        command = [sys.executable, "-m", "dynamo", "serve", self._graph.spec, "-f", str(config), "--infra", "embedded"]
        env = {**os.environ, "DYN_LOGGING_JSONL": "0"}
        with self._output.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command, "--metrics-port", "0", stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=env
            )
        while not READY.search(self._output.read_text(errors="replace")):
            if self._process.returncode is not None:
                raise StartError(f"the graph did not start:\n{self._output.read_text(errors='replace')}")
            await asyncio.sleep(POLL_S)
        pids = descendants(self._process.pid)
        self._announced = next(graph for graph in running() if graph.pid in pids)
        await self._connect(self._announced.env)

    async def _connect(self, env: Mapping[str, str]) -> None:
        """Make the clients of all services."""
        self._runtime = Runtime(nats_url=env["NATS_SERVER"], etcd_endpoints=env["ETCD_ENDPOINTS"], name="test")
        for name, cls in self._graph.services.items():
            pool = self._pools[name] = InstancePool(self._runtime, cls, namespace_of(cls, self._settings))
            await pool.connect()
            for client in pool.clients.values():
                await client.wait_for_instances()

    async def stop(self) -> None:
        """Stop the graph as Ctrl-C does; kill it when that takes longer than `STOP_LIMIT_S`."""
        if self._runtime is not None:
            await self._runtime.close()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(STOP_LIMIT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._directory.cleanup()

    def client(self, service: type[Any]) -> Any:
        """Return a stub of a service."""
        return Stub(spec_of(service), self._pools[spec_of(service).name])

    async def kill(self, service: type[Any], worker_id: int) -> None:
        """Kill a worker's process. Raises GraphError when there is none of that number."""
        assert self._process is not None
        wanted = f"--service-name\0{spec_of(service).name}\0--worker-id\0{worker_id}\0".encode()
        for pid in descendants(self._process.pid):
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return
        raise GraphError(f"no process of {spec_of(service).name} has the number {worker_id}")

    def http(self) -> httpx.AsyncClient:
        """Return a client of the entry's HTTP server."""
        import httpx

        if self._announced is None or not self._announced.url:
            raise GraphError(f"{spec_of(self._graph.entry).name} serves no HTTP")
        return httpx.AsyncClient(base_url=self._announced.url)
