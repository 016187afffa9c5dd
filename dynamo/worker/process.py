"""The life of one service process: `python -m dynamo.worker.process GRAPH --service-name NAME`.

construct -> start hooks -> connect -> find the services it calls -> register its endpoints -> accept HTTP -> ready ->
(SIGTERM) -> stop HTTP -> deregister -> finish running requests -> shutdown hooks -> close. Start hooks run before any
connection opens, unless the component uses one, so that an engine may fork.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo.config.service_config import ServiceConfig
from dynamo.config.settings import constructor_arguments
from dynamo.errors import DynamoError
from dynamo.http.scrape_targets import ScrapeTargets
from dynamo.log import configure
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import bind, graph_import
from dynamo.sdk.arguments import IgnoredArgumentWarning
from dynamo.sdk.channels import attach
from dynamo.sdk.context import ServiceContext, enter
from dynamo.sdk.depends import Stub, dependencies
from dynamo.sdk.endpoint import Hook, hooks
from dynamo.sdk.graph import Graph, load
from dynamo.sdk.spec import spec_of
from dynamo.worker.broker import ServiceBroker
from dynamo.worker.constructor import DEFAULT_PORT, construct
from dynamo.worker.environment import RELOAD, RUN_DIR, namespace_of
from dynamo.worker.http_service import HttpService
from dynamo.worker.live_settings import LiveSettings
from dynamo.worker.metrics_socket import METRICS, TARGETS, MetricsSocket, path_of
from dynamo.worker.status import Status
from dynamo.worker.stop_signals import StopSignals, run_to_end
from dynamo.worker.stubs import InstancePool

if TYPE_CHECKING:
    from dynamo.http.prometheus_text import Pages

log = logging.getLogger(__name__)

DRAIN_S = 25.0
MIN_DRAIN_S = 0.2
GC_THRESHOLDS = (20_000, 20, 50)
"""Keep the objects of a few hundred running requests in the youngest generation: with Python's default of 700, garbage
collection took 9 % of a token's time."""
LIVENESS_EVERY_S = 1.0
READINESS_EVERY_S = 0.02
PLANNER = "planner"
"""`component_type` of a planner, as ai-dynamo writes it"""
PLANNER_START_S = 0.5
"""A planner whose start hooks take longer counts as started."""


Scrape = Callable[["Pages", Callable[[], bool]], Coroutine[Any, Any, None]]
"""serve the pages of a process until cancelled; the second argument returns whether the process is ready"""


class ServiceProcess:
    """One worker of one service. `scrape` serves its metrics where there is no supervisor.

    `own_port`: the port of its `@api` methods, if it is not that of the configuration.
    """

    def __init__(
        self,
        graph: Graph,
        name: str,
        worker_id: int,
        workers: int,
        status: Status,
        scrape: Scrape | None = None,
        own_port: str | None = None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.status = status
        self.cls = graph.service(name)
        self.config = ServiceConfig.get_instance()
        self.namespace = namespace_of(self.cls, self.config)
        self.worker_id = worker_id
        self.workers = workers
        self.label = name if workers == 1 else f"{name}:{worker_id}"
        self.stopping = asyncio.Event()
        self.instance: Any = None
        self.http: HttpService | None = None
        self.live: LiveSettings | None = None
        self._scrape = scrape
        self._scraped: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._socket: MetricsSocket | None = None
        self._constructed = False
        self._ready = False
        self._drain_s = DRAIN_S
        self._planning: asyncio.Task[list[Any]] | None = None
        self._own_port = own_port

    async def run(self) -> int:
        """Run from construction to shutdown; return the exit code."""
        loop = asyncio.get_running_loop()
        signals = StopSignals(self.stopping.set)
        run_dir = Path(os.environ[RUN_DIR]) if os.environ.get(RUN_DIR) else None
        runtime = Runtime(run_dir=run_dir, name=self.label)
        self._following = loop.create_task(self._stop_with(runtime))
        self._targets = ScrapeTargets(runtime)
        self.context = self._enter_context(runtime)
        settings = self.config.get(self.name, {})
        targets = self._dependencies(settings)
        pools = {
            attribute: InstancePool(runtime, target, namespace_of(target, self.config))
            for attribute, target in targets.items()
        }
        try:
            self.instance = object.__new__(self.cls)
            attach(self.instance, ServiceBroker(runtime, self.namespace, self.name))
            # bound before the constructor runs, which may want to keep self.worker
            bind(self.instance, **{a: Stub(spec_of(targets[a]), pool) for a, pool in pools.items()})
            constructor = partial(self.instance.__init__, **constructor_arguments(self.cls, settings))
            port = settings.get("port", DEFAULT_PORT)
            if not construct(constructor, port, lambda url: self.status.report("ready", url=url)):
                return 0
            signals.adopt()
            self._constructed = True
            entry = self.cls is self.graph.entry
            text = partial(runtime.metrics.text, shared=True)
            own = {"port": self._own_port} if self._own_port and entry else {}
            self.http = HttpService(
                self.instance, settings | own, entry=entry, workers=self.workers, run_dir=run_dir, metrics=text
            )
            self.context.listen = self.http.listen
            await self._show_metrics(runtime, run_dir)
            await self.http.start_system_app()
            await self._start()
            signals.adopt()
            if self.stopping.is_set():
                return 0
            await self._join(runtime, pools)
            if self.stopping.is_set():
                return 0
            gc.collect()
            gc.freeze()  # objects that exist now are long-lived: exclude them from later collections
            gc.set_threshold(*GC_THRESHOLDS)
            self._ready = True
            self.status.report("ready", lease=runtime.instance_id, **self._url(), **_sources())
            return await self._live(runtime)
        finally:
            await self._shut_down(runtime)

    def _dependencies(self, settings: Mapping[str, Any]) -> dict[str, type[Any]]:
        """Return the services that this one calls, by attribute: linked ones, and optional ones that its settings want."""
        wanted = getattr(self.cls, "wanted_dependencies", lambda settings: ())(settings)
        known = dependencies(self.cls)
        return {**{attribute: known[attribute].on for attribute in wanted}, **self.graph.targets[self.name]}

    async def _show_metrics(self, runtime: Runtime, run_dir: Path | None) -> None:
        """Serve metrics to the supervisor or, without one, on the metrics port."""

        async def metrics() -> bytes:
            return runtime.metrics.text(shared=True)

        async def targets() -> bytes:
            from dynamo.http.prometheus_text import http_sd

            return http_sd(await self._targets.addresses())

        pages = {METRICS: metrics, TARGETS: targets}
        if self._scrape is not None:
            self._scraped = asyncio.get_running_loop().create_task(self._scrape(pages, lambda: self._ready))
        elif run_dir is not None:
            self._socket = MetricsSocket(path_of(run_dir, self.label), pages)
            await self._socket.open()

    def _enter_context(self, runtime: Runtime) -> ServiceContext:
        graph = [(namespace_of(cls, self.config), name) for name, cls in self.graph.services.items()]
        runtime.metrics.identify(self.namespace, self.name, graph, self.worker_id)
        endpoints = sorted(spec_of(self.cls).endpoints.values(), key=lambda endpoint: endpoint.method)
        context = ServiceContext(
            service_name=self.name,
            namespace=self.namespace,
            worker_id=self.worker_id,
            workers=self.workers,
            runtime=runtime,
            progress=self.status.progress,
            endpoints=tuple(endpoint.name for endpoint in endpoints),
            graph=frozenset(graph),
            scrape_targets=self._targets.addresses,
        )
        enter(context)
        return context

    def _url(self) -> dict[str, str]:
        url, headless = self.context.url if self._own_port is None else "", self.context.headless
        if not url:
            return {"text": f"{headless}: no endpoint here"} if headless else {}
        return {"url": url} if self.cls is self.graph.entry else {"url": url, "text": url}

    async def _start(self) -> None:
        """Run the start hooks, which a stop cancels. Those of a planner of ai-dynamo 0.3 never return: they are its loop."""
        hooks = asyncio.get_running_loop().create_task(self._call_hooks("start"))
        if spec_of(self.cls).component_type == PLANNER:
            self._planning = hooks
            await asyncio.wait({hooks}, timeout=PLANNER_START_S)
        else:
            await self._unless_stopping(asyncio.wait({hooks}))
            if not hooks.done():
                hooks.cancel()
                await asyncio.wait({hooks})
        if hooks.done() and not (hooks.cancelled() and self.stopping.is_set()):
            hooks.result()

    async def _call_hooks(self, kind: Hook) -> list[Any]:
        results = []
        for name in hooks(self.cls, kind):
            result = getattr(self.instance, name)()
            results.append(await result if inspect.isawaitable(result) else result)
        return results

    async def _join(self, runtime: Runtime, pools: dict[str, InstancePool]) -> None:
        await runtime.connect()
        await self._targets.publish()
        if not self.context.headless:
            await self._register(runtime, pools)
        assert self.http is not None
        self.http.starting = False
        url = await self.http.start()
        if url is not None:
            self.context.serve_at(url)
        while not self.stopping.is_set() and not all(await self._call_hooks("readiness")):
            await asyncio.sleep(READINESS_EVERY_S)

    async def _register(self, runtime: Runtime, pools: dict[str, InstancePool]) -> None:
        for pool in pools.values():
            await pool.connect()
        known = dependencies(self.cls)
        for attribute, pool in pools.items():
            for client in pool.clients.values() if not known[attribute].optional else ():
                if not client.instance_ids():
                    self.status.progress(f"waiting for {client.address[1]}")
                    await self._unless_stopping(client.wait_for_instances())
        self.live = LiveSettings(self.instance, self.namespace)
        await self.live.start(runtime)  # before the first request
        for endpoint in spec_of(self.cls).endpoints.values():
            method = getattr(self.instance, endpoint.method)
            stats_data = getattr(self.instance, "stats_data", None)
            await runtime.serve(self.namespace, self.name, endpoint.name, method, endpoint.types()[0], stats_data)

    async def _unless_stopping(self, work: Any) -> None:
        """Await `work`; return early if a stop is requested."""
        waiting = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, stopping):
            task.cancel()
        await asyncio.gather(waiting, stopping, return_exceptions=True)

    async def _stop_with(self, runtime: Runtime) -> None:
        """Request a stop when the component shuts its runtime down, or another process revokes its lease."""
        await runtime.stopped()
        self.stopping.set()

    async def _live(self, runtime: Runtime) -> int:
        """Serve until a stop is requested (return 0) or a liveness hook fails (deregister, return 1)."""
        while True:
            try:
                await asyncio.wait_for(self.stopping.wait(), LIVENESS_EVERY_S)
            except TimeoutError:
                pass
            else:
                self._ready = False
                self.status.report("draining")
                return 0
            try:
                if self._planning is not None and self._planning.done():
                    self._planning.result()
                alive = all(await self._call_hooks("liveness"))
                reason, hint = "a liveness check returned False", None
            except Exception as error:
                alive, reason = False, error.message if isinstance(error, DynamoError) else repr(error)
                hint = error.hint if isinstance(error, DynamoError) else None
            if not alive:
                log.error("liveness check failed: %s", reason)
                await runtime.deregister()
                self.status.report("failed", error=reason, hint=hint)
                await runtime.drain(0.0)
                self._drain_s = MIN_DRAIN_S
                return 1

    async def _shut_down(self, runtime: Runtime) -> None:
        started = time.monotonic()
        if self._planning is not None:
            self._planning.cancel()
        if self.http is not None:
            await self.http.stop(self._drain_s)
        await runtime.drain(max(self._drain_s - (time.monotonic() - started), MIN_DRAIN_S))
        if self._constructed:
            try:
                await self._call_hooks("shutdown")
            except Exception:
                log.exception("shutdown hook failed")
        if self.http is not None:
            await self.http.close()
        if self.live is not None:
            await self.live.stop()
        for task in filter(None, (self._scraped, self._following)):
            task.cancel()
        if self._socket is not None:
            self._socket.close()
        await runtime.close()
        log.debug("stopped in %.2f s", time.monotonic() - started)


def _sources() -> dict[str, list[str]]:
    """Return the source files below the working directory that this process has imported, with `--reload` only."""
    if not os.environ.get(RELOAD):
        return {}
    here = f"{os.getcwd()}/"
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    return {"files": sorted(f for f in files if f.startswith(here) and "/site-packages/" not in f)}


def _load(spec: str) -> tuple[Graph, str | None]:
    """Load a graph, and return the DYNAMO_PORT that its modules set while they were imported.

    Frontends of ai-dynamo 0.3 do: `port` in their configuration is that of a server which they start themselves.
    """
    given = os.environ.get("DYNAMO_PORT")
    graph = load(spec)
    port = os.environ.get("DYNAMO_PORT")
    return graph, port if port != given else None


def main(
    argv: Sequence[str] | None = None,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
    scrape: Scrape | None = None,
) -> NoReturn:
    """Run one service process; exit with its code."""
    parser = argparse.ArgumentParser(prog="python -m dynamo.worker.process")
    parser.add_argument("graph")
    parser.add_argument("--service-name", required=True)
    parser.add_argument("--worker-id", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(argv)
    status = Status(on_ready)
    label = options.service_name if options.workers == 1 else f"{options.service_name}:{options.worker_id}"
    configure(label)
    warnings.simplefilter("ignore", IgnoredArgumentWarning)  # the command printed them

    async def run() -> int:
        graph, own_port = _load(options.graph)
        name, worker_id, workers = options.service_name, options.worker_id, options.workers
        return await ServiceProcess(graph, name, worker_id, workers, status, scrape, own_port).run()

    try:
        code = run_to_end(run())
    except DynamoError as error:
        if not status.report("failed", error=error.message, hint=error.hint):
            log.error("%s", error)
        code = error.exit_code
    except Exception as error:
        status.report("failed", error=f"{type(error).__name__}: {error}")
        log.exception("%s failed", label)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # an engine's threads must not delay the exit


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a child of multiprocessing unpickles what its parent imported: from the same files
    graph_import.install(Path())
