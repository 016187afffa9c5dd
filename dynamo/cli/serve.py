"""`dynamo serve`: import the graph, resolve and check its configuration, then show it or run it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click
from click.core import ParameterSource

from dynamo.cli.errors import warn
from dynamo.config import overrides, yaml_file
from dynamo.config.merge import Layer, resolve
from dynamo.config.options import Infra, ServeOptions
from dynamo.config.service_config import VARIABLE
from dynamo.config.settings import DeclaredSettings, check, declared, knows
from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from dynamo.sdk.graph import Graph

DEPLOYMENT_CONFIG = "DYN_DEPLOYMENT_CONFIG"
OVERRIDES = "dynamo.config.overrides"  # key of the overrides in click's context
_PORT = click.IntRange(0, 65535)
_PORT.name = "port"  # an error says so


class _ServeCommand(click.Command):
    """Takes `--Service.key value` out of the command line, so that click stays strict about all the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # a shell that completes half a line wants no errors
            ctx.meta[OVERRIDES], args = overrides.split(args)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[--Service.key=value ...]"]


@click.command(cls=_ServeCommand)
@click.argument("graph")
@click.option(
    "-f",
    "--config-file",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    metavar="FILE",
    help="YAML file of settings by service; see configs/.",
)
@click.option(
    "--service-name",
    "service_names",
    multiple=True,
    envvar="DYNAMO_SERVICE_NAME",
    show_envvar=True,
    metavar="NAME",
    help="Run this service alone, beside a graph that runs: one process in the foreground, several supervised. "
    "Can be given several times.",
)
@click.option("--supervise", is_flag=True, help="With --service-name: supervise one process too.")
@click.option(
    "--depends",
    "elsewhere",
    multiple=True,
    envvar="DYNAMO_SERVE_DEPENDS",
    show_envvar=True,
    metavar="NAME=VALUE",
    help="Do not start service NAME: it runs elsewhere, and is found through etcd. Can be given several times.",
)
@click.option(
    "-p",
    "--port",
    type=_PORT,
    envvar="DYNAMO_PORT",
    show_envvar=True,
    help="HTTP port of the graph's entry service; the file's value counts unless this is given.",
)
@click.option(
    "--host",
    envvar="DYNAMO_HOST",
    show_envvar=True,
    metavar="ADDRESS",
    help="Address on which the entry service listens.",
)
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Where GRAPH is imported from and the services run; the current directory by default.",
)
@click.option(
    "--infra",
    type=click.Choice(get_args(Infra)),
    default="auto",
    show_default=True,
    envvar="DYN_INFRA",
    show_envvar=True,
    help="NATS and etcd: `external` uses running ones, `embedded` starts private ones, `auto` whichever it can.",
)
@click.option(
    "--target",
    type=click.Choice(["dynamo"]),
    default="dynamo",
    show_default=True,
    help="Where the graph runs: `dynamo` is processes on this machine.",
)
@click.option("--enable-system-app/--no-enable-system-app", default=None, help="Probes on a port of their own.")
@click.option("--system-app-port", type=_PORT, help="That port; with --service-name only.")
@click.option("--system-app-host", metavar="ADDRESS", help="Where it listens; 0.0.0.0 by default.")
@click.option(
    "--use-default-health-checks",
    is_flag=True,
    default=None,
    help="Probes answer 200 where a service has no @liveness or @readiness.",
)
@click.option(
    "--metrics-port",
    type=_PORT,
    envvar="DYN_METRICS_PORT",
    show_envvar=True,
    help="Where Prometheus scrapes all processes of this command; the first free port from 9091 on by default, 0: nowhere.",
)
@click.option(
    "--metrics-host",
    envvar="DYN_METRICS_HOST",
    show_envvar=True,
    metavar="ADDRESS",
    help="Address of that port; the one that other hosts reach, and 127.0.0.1, by default.",
)
@click.option("--reload", is_flag=True, help="Restart a service when a Python file that it uses is edited.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved configuration, start nothing.")
@click.option(
    "--explain",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How --dry-run tells, on standard error, the process plan and where each value comes from.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    graph: str,
    config_file: Path | None,
    service_names: tuple[str, ...],
    supervise: bool,
    elsewhere: tuple[str, ...],
    port: int | None,
    host: str | None,
    working_dir: Path,
    infra: str,
    target: str,
    enable_system_app: bool | None,
    system_app_port: int | None,
    system_app_host: str | None,
    use_default_health_checks: bool | None,
    metrics_port: int | None,
    metrics_host: str | None,
    reload: bool,
    dry_run: bool,
    explain: str,
) -> int:
    """Start the inference graph GRAPH: every service as processes on this machine, and HTTP in front.

    GRAPH is module:Service, path/to/file.py:Service, or a module with one root service.

    Any setting of any service can be given as --Service.key=value. It wins over the file, which wins over the
    defaults in the code. Values are JSON, else text; dots reach into mappings. --Common.key=value sets it for all
    that share it.

    \b
    Examples:
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --dry-run
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --Processor.router=random -p 9000
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --VllmWorker.ServiceArgs.workers=2
      dynamo serve graphs.agg:Frontend -f configs/agg_mock.yaml          # no GPU, no model weights
      dynamo serve graphs.agg:Frontend -f configs/agg_mock.yaml --reload # services restart as you edit them
      dynamo serve graphs.agg:Frontend --service-name VllmWorker         # one service, to debug it
      dynamo serve graphs.agg:Frontend --depends VllmWorker=elsewhere    # the workers run on other machines
      dynamo serve graphs.agg:Frontend --service-name VllmWorker --VllmWorker.ServiceArgs.workers=4  # there
    """
    from dynamo.sdk.graph import load

    if system_app_port is not None and len(service_names) != 1:
        wanted = "takes one --service-name" if service_names else "needs --service-name"
        raise click.UsageError(f"--system-app-port {wanted}: one port cannot serve several processes")
    _set_system_app(
        ENABLED=enable_system_app,
        PORT=system_app_port,
        HOST=system_app_host,
        USE_DEFAULT_HEALTH_CHECKS=use_default_health_checks,
    )
    if supervise and not service_names:
        raise click.UsageError("--supervise needs --service-name: a whole graph is supervised in any case")
    found = load(graph, working_dir)
    started = _only(_without(found, elsewhere), service_names)
    for option, given in (("--depends", elsewhere), ("--service-name", service_names)):
        if given:
            infra = _shared(infra, option)
    options = ServeOptions(
        working_dir,
        service_names,
        supervise,
        cast(Infra, infra),
        host,
        port,
        dry_run,
        reload,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )
    services = {name: declared(cls) for name, cls in found.services.items()}
    layers = _file_layers(config_file)
    layers += _entry_layers(ctx, found, services)
    layers += ctx.meta[OVERRIDES]
    resolved = resolve(layers, services, functools.partial(knows, services))
    check(resolved, services)
    if dry_run:
        from dynamo.cli.explain import explanation
        from dynamo.launcher.metrics_port import check_addresses

        check_addresses(options, os.environ.get("NATS_SERVER", ""))
        click.echo(render(resolved.services))
        click.echo(explanation(started, resolved, services, working_dir, as_json=explain == "json"), err=True)
        return 0
    from dynamo.launcher import run

    return run(started, resolved, options)


def _file_layers(config_file: Path | None) -> list[Layer]:
    """The file, or DYN_DEPLOYMENT_CONFIG in its stead: YAML or JSON in a variable, as deployments of 0.3 had it."""
    deployed = os.environ.get(DEPLOYMENT_CONFIG)
    if not deployed:
        return [yaml_file.load(config_file)] if config_file else []
    if config_file is not None:
        warn(f"{DEPLOYMENT_CONFIG} is set: {config_file} is not read")
    return [yaml_file.parse(deployed, DEPLOYMENT_CONFIG)]


def _set_system_app(**values: bool | int | str | None) -> None:
    """Flags of the system app reach the processes as the variables that they are documented as."""
    for name, value in values.items():
        if value is not None:
            os.environ[f"DYNAMO_SYSTEM_APP_{name}"] = str(value).lower() if isinstance(value, bool) else str(value)


def render(services: Mapping[str, Any]) -> str:
    """What `--dry-run` prints on standard output: a contract, on which scripts rely."""
    return (
        f"Service Configuration:\n{json.dumps(services, indent=2)}\n\n"
        f"Environment Variable that would be set:\n{VARIABLE}={json.dumps(services)}"
    )


def _without(graph: Graph, elsewhere: Sequence[str]) -> Graph:
    """The graph less the services that `--depends` names. Raises ConfigError, as upstream with exit code 1."""
    names = set()
    for given in elsewhere:
        name, equals, _ = given.partition("=")
        if not equals or not name:
            raise ConfigError(
                "Invalid format for --depends option. Use format 'name=value'",
                hint=f"write --depends {name or 'NAME'}=elsewhere",
            )
        graph.service(name)
        names.add(name)
    services = {name: cls for name, cls in graph.services.items() if name not in names}
    if not services:
        raise ConfigError("--depends leaves no service to start", hint="name those that run elsewhere only")
    return replace(graph, services=services)


def _only(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with those services alone, all of them where none is named. Raises GraphError for an unknown one."""
    services = {name: graph.service(name) for name in names}
    return replace(graph, services={n: c for n, c in graph.services.items() if n in services}) if names else graph


def _shared(infra: str, option: str) -> str:
    """Services elsewhere are found through a NATS and an etcd that they use too, never through private ones."""
    if infra == "embedded":
        raise ConfigError(
            f"{option} needs the NATS and etcd of the services elsewhere, and --infra embedded starts private ones",
            hint="set NATS_SERVER and ETCD_ENDPOINTS, and leave --infra out",
        )
    return "external"


def _entry_layers(ctx: click.Context, graph: Graph, services: Mapping[str, DeclaredSettings | None]) -> list[Layer]:
    """`--port` and `--host` as settings of the entry service, where it has them; `ServeOptions` carries them too."""
    name = next(name for name, cls in graph.services.items() if cls is graph.entry)
    layers = []
    for key in ("host", "port"):
        value = ctx.params[key]
        if value is None:
            continue
        given = ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE
        source = f"--{key}" if given else f"DYNAMO_{key.upper()}"
        if knows(services, name, key):
            layers.append(overrides.setting((name, key), value, source))
    return layers
