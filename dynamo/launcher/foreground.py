"""One service in this process and terminal, where `breakpoint()` works.

`python -m components.worker -f configs/agg.yaml`, or `dynamo serve GRAPH --service-name NAME` with one process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo.config import overrides, yaml_file
from dynamo.config.merge import COMMON, SERVICE_ARGS, Layer
from dynamo.config.options import ServeOptions
from dynamo.config.resolution import default_host_layers, resolve_and_check
from dynamo.config.settings import declared
from dynamo.errors import DynamoError, GraphError
from dynamo.sdk.graph import load
from dynamo.sdk.spec import spec_of

if TYPE_CHECKING:
    from dynamo.launcher.managed_process import Event
    from dynamo.launcher.serve_plan import ServePlan


def alone(cls: type[Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a service in this process, beside a running NATS and etcd, until Ctrl-C; end the process.

    Arguments are those of `dynamo serve`: `-f FILE` and `--Service.key=value`. Sections of the file for services that
    this one does not know are ignored.
    """
    try:
        layers, rest = overrides.split(sys.argv[1:] if argv is None else argv)
        parser = argparse.ArgumentParser(
            description=f"Run {cls.__name__} alone. Any setting can be given as --{cls.__name__}.key=value."
        )
        parser.add_argument("-f", "--config-file", type=Path, metavar="FILE", help="YAML file of settings by service")
        file = parser.parse_args(rest).config_file
        graph = load(f"{_module(cls)}:{spec_of(cls).name}")
        services = {name: declared(found) for name, found in graph.services.items()}
        if file is not None:
            layers = [_only(yaml_file.load(file), {*services, COMMON}), *layers]
        layers = [*default_host_layers(cls.__name__, services), *layers]
        layers = [*layers, overrides.setting((cls.__name__, SERVICE_ARGS, "workers"), 1, "python -m")]
        resolved = resolve_and_check(layers, services, only=cls.__name__)
        for notice in resolved.notices:
            print(f"warning: {notice}", file=sys.stderr)
        os.environ.pop("DYNAMO_STATUS_FD", None)
        from dynamo.launcher.serve_plan import make_plan

        graph = replace(graph, services={cls.__name__: graph.service(cls.__name__)})
        run_in_foreground(make_plan(graph, resolved, ServeOptions()))
    except DynamoError as error:
        sys.exit(f"error: {error}")


def run_in_foreground(plan: ServePlan) -> NoReturn:
    """Run the plan's first process in this process, beside a running NATS and etcd; end the process with its exit code.

    Raises StartError if one of the two servers is not running, ConfigError for an address that cannot be used.
    """
    from dynamo.launcher import deployment, embedded_servers, host_metrics, metrics_port
    from dynamo.launcher.console import Console
    from dynamo.transport.network import bound_host
    from dynamo.worker import process

    started = time.monotonic()
    infra = asyncio.run(embedded_servers.find_or_start(Path(tempfile.gettempdir()), "external"))
    console = Console()
    console.print(f"joining the graph at {infra.description}")
    console.flush()
    bound_host(infra.nats_url)
    port = metrics_port.claim(plan.options, infra.nats_url, plan.reserved_ports())
    if port is not None:
        console.metrics(port.url)
        console.flush()  # in order: the process logs without the console
    spec = plan.processes_with(deployment.launch_environment(infra, port))[0]

    def on_ready(event: Event) -> None:
        text = event.get("text") or deployment.joined_text(plan, infra)
        url = event.get("url")
        console.serving(time.monotonic() - started, url or text, plan.reach if url else "")

    os.environ.update(spec.env)
    os.chdir(plan.options.working_dir)
    scrape = partial(host_metrics.serve_alone, port, spec) if port is not None else None
    process.main(spec.argv[3:], on_ready, scrape)


def _module(cls: type[Any]) -> str:
    """Return the importable name of the class's module, which is `__main__` now: its types need one name in the graph."""
    if cls.__module__ != "__main__":
        return cls.__module__
    main = sys.modules["__main__"]
    found = getattr(main, "__spec__", None)
    if found is not None:
        return str(found.name)
    file = getattr(main, "__file__", None)
    if file is None:
        raise GraphError(f"{cls.__name__} is not defined in a file", hint="put it into a module")
    return str(file)


def _only(layer: Layer, names: set[str]) -> Layer:
    values = {name: value for name, value in layer.values.items() if name in names}
    return Layer(values, {path: origin for path, origin in layer.origins.items() if path[0] in names}, layer.notices)
