"""`dynamo serve`: imports a graph, resolves and validates its configuration, then runs it or, with --dry-run, shows it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import click
from click.core import ParameterSource

from dynamo.cli.errors import short_warnings, warn
from dynamo.cli.options import FILE, PORT, WORKING_DIR
from dynamo.cli.selection import require_external, select, without
from dynamo.config import overrides, yaml_file
from dynamo.config.merge import Layer
from dynamo.config.options import InfraMode, ServeOptions
from dynamo.config.resolution import default_host_layers, resolve_and_check
from dynamo.config.service_config import VARIABLE
from dynamo.config.settings import DeclaredSettings, declared, knows

DEPLOYMENT_CONFIG = "DYN_DEPLOYMENT_CONFIG"
OLD_OPTIONS = {"--file": "--config-file", "--config": "--config-file"}
"""Long forms of -f in 0.1 and in examples of NVIDIA."""
OVERRIDES = "dynamo.config.overrides"  # key of the overrides in click's context


class _ServeCommand(click.Command):
    """Takes `--Service.key=value` out of the command line, so that click can be strict about everything else."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # a shell completes an unfinished line: overrides may lack their values
            ctx.meta[OVERRIDES], args = overrides.split(map(_today, args))
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[--Service.key=value ...]"]


def _today(argument: str) -> str:
    """Return an argument with the option's name of today."""
    option, equals, value = argument.partition("=")
    return f"{OLD_OPTIONS.get(option, option)}{equals}{value}"


@click.command(cls=_ServeCommand)
@click.argument("graph")
@click.option(
    "-f",
    "--config-file",
    type=FILE,
    metavar="FILE",
    help="YAML file of settings by service, such as those in configs/.",
)
@click.option(
    "--service-name",
    "service_names",
    multiple=True,
    envvar="DYNAMO_SERVICE_NAME",
    show_envvar=True,
    metavar="NAME",
    help="Run only this service, as part of a graph that is running: a single process in the foreground, several under "
    "supervision. May be repeated.",
)
@click.option("--supervise", is_flag=True, help="With --service-name: supervise a single process too.")
@click.option(
    "--depends",
    "elsewhere",
    multiple=True,
    envvar="DYNAMO_SERVE_DEPENDS",
    show_envvar=True,
    metavar="NAME=VALUE",
    help="Do not start service NAME: it runs elsewhere and is found through etcd. May be repeated.",
)
@click.option(
    "-p",
    "--port",
    type=PORT,
    envvar="DYNAMO_PORT",
    show_envvar=True,
    help="HTTP port of the graph's entry service; overrides the file.",
)
@click.option(
    "--host",
    envvar="DYNAMO_HOST",
    show_envvar=True,
    metavar="ADDRESS",
    help="Address on which the entry service listens; overrides the file.",
)
@WORKING_DIR
@click.option(
    "--infra",
    type=click.Choice(get_args(InfraMode)),
    default="auto",
    show_default=True,
    envvar="DYN_INFRA",
    show_envvar=True,
    help="NATS and etcd: `external` uses running servers, `embedded` starts private ones, `auto` uses those that are "
    "configured or running, else starts private ones.",
)
@click.option(
    "--target",
    type=click.Choice(["dynamo"]),
    default="dynamo",
    show_default=True,
    help="Where the graph runs: `dynamo` is processes on this machine.",
)
@click.option(
    "--enable-system-app/--no-enable-system-app",
    default=None,
    help="Serve liveness and readiness probes on a separate port.",
)
@click.option("--system-app-port", type=PORT, help="Port of the probes; only with --service-name.")
@click.option("--system-app-host", metavar="ADDRESS", help="Address of the probes; 0.0.0.0 by default.")
@click.option(
    "--use-default-health-checks",
    is_flag=True,
    default=None,
    help="Answer probes with 200 for services without @liveness or @readiness.",
)
@click.option(
    "--metrics-port",
    type=PORT,
    envvar="DYN_METRICS_PORT",
    show_envvar=True,
    help="Port for the Prometheus metrics of all processes of this command; by default the first free one from 9091 on, "
    "0 turns it off.",
)
@click.option(
    "--metrics-host",
    envvar="DYN_METRICS_HOST",
    show_envvar=True,
    metavar="ADDRESS",
    help="Address of the metrics port; by default 127.0.0.1 and the address that other hosts reach.",
)
@click.option("--enable-local-planner", is_flag=True, hidden=True)  # of ai-dynamo 0.2
@click.option("--reload", is_flag=True, help="Restart a service when a Python file that it imports changes.")
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse what is otherwise ignored with a warning: sections of services that are not in the graph, keys of earlier "
    "versions.",
)
@click.option(
    "--dry-run/--no-dry-run",
    help="Validate everything and print the resolved configuration, without starting anything.",
)
@click.option(
    "--explain",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Format in which --dry-run prints the process plan and the source of each value on standard error.",
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
    enable_local_planner: bool,
    reload: bool,
    strict: bool,
    dry_run: bool,
    explain: str,
) -> int:
    """Start the inference graph GRAPH: its services as processes on this machine, with HTTP in front.

    GRAPH is module:Service, path/to/file.py:Service, or a module with one root service.

    Any setting of any service can be given as --Service.key=value. It overrides the file, which overrides the defaults in
    the code. A value is parsed as JSON if possible, else it is text; dots in the key reach into mappings. --Common.key=value
    sets the key for all services that share it.

    \b
    Examples:
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --dry-run
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --Processor.router=random -p 9000
      dynamo serve graphs.agg:Frontend -f configs/agg.yaml --VllmWorker.ServiceArgs.workers=2
      dynamo serve graphs.agg:Frontend -f configs/agg_mock.yaml          # no GPU, no model weights
      dynamo serve graphs.agg:Frontend -f configs/agg_mock.yaml --reload # restart services as you edit them
      dynamo serve graphs.agg:Frontend --service-name VllmWorker         # one service, for debugging
      dynamo serve graphs.agg:Frontend --depends VllmWorker=elsewhere    # workers run on other machines
      dynamo serve graphs.agg:Frontend --service-name VllmWorker --VllmWorker.ServiceArgs.workers=4  # on those
    """
    from dynamo.sdk import graph_import
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
    with short_warnings(), _unchanged("DYNAMO_PORT"):  # Frontends of 0.3 set it when imported, for their own process
        found = load(graph, working_dir)
    modules = graph_import.imported([cls.__module__ for cls in found.services.values()])
    _warn_of_borrowed(graph_import.borrowed(modules, working_dir), working_dir)
    if enable_local_planner:
        warn("--enable-local-planner has no effect: a Planner that the graph links plans in any case")
    started = select(without(found, elsewhere), service_names)
    for option, given in (("--depends", elsewhere), ("--service-name", service_names)):
        if given:
            infra = require_external(infra, option)
    options = ServeOptions(
        working_dir,
        service_names,
        supervise,
        cast(InfraMode, infra),
        host,
        port,
        dry_run,
        reload,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )
    services = {name: declared(cls) for name, cls in found.services.items()}
    entry = next(name for name, cls in found.services.items() if cls is found.entry)
    layers = default_host_layers(entry, services) + _file_layers(config_file)
    layers += _entry_layers(ctx, entry, services)
    layers += ctx.meta[OVERRIDES]
    resolved = resolve_and_check(layers, services, strict=strict)
    for notice in resolved.notices:
        warn(str(notice))
    if dry_run:
        from dynamo.cli.explain import explanation
        from dynamo.launcher.metrics_port import check_addresses

        check_addresses(options, os.environ.get("NATS_SERVER", ""))
        click.echo(render(resolved.services))
        text = explanation(started, resolved, services, modules, working_dir, as_json=explain == "json")
        click.echo(text, err=True)
        return 0
    from dynamo.launcher import run

    return run(started, resolved, options)


@contextmanager
def _unchanged(variable: str) -> Iterator[None]:
    """Undo what the block does to an environment variable."""
    given = os.environ.get(variable)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if given is not None:
            os.environ[variable] = given


def _warn_of_borrowed(modules: Mapping[str, str], working_dir: Path) -> None:
    """Warn of modules, name to file, that a folder of the working directory lacks and another one has."""
    if modules:
        named = ", ".join(f"{name} from {file}" for name, file in modules.items())
        warn(f"not in the folders of {working_dir.resolve()}, so taken from elsewhere: {named}")


def _file_layers(config_file: Path | None) -> list[Layer]:
    """Return the layer of DYN_DEPLOYMENT_CONFIG, else of the file.

    The variable holds YAML or JSON and replaces the file, as in deployments of 0.3.
    """
    deployed = os.environ.get(DEPLOYMENT_CONFIG)
    if not deployed:
        return [yaml_file.load(config_file)] if config_file else []
    if config_file is not None:
        warn(f"{DEPLOYMENT_CONFIG} is set: {config_file} is ignored")
    return [yaml_file.parse(deployed, DEPLOYMENT_CONFIG)]


def _set_system_app(**values: bool | int | str | None) -> None:
    """Set the environment variables of the system app (probes), which services inherit. None: leave the variable as it is."""
    for name, value in values.items():
        if value is not None:
            os.environ[f"DYNAMO_SYSTEM_APP_{name}"] = str(value).lower() if isinstance(value, bool) else str(value)


def render(services: Mapping[str, Any]) -> str:
    """Return what `--dry-run` prints on standard output. Scripts rely on this format."""
    return (
        f"Service Configuration:\n{json.dumps(services, indent=2)}\n\n"
        f"Environment Variable that would be set:\n{VARIABLE}={json.dumps(services)}"
    )


def _entry_layers(ctx: click.Context, entry: str, services: Mapping[str, DeclaredSettings | None]) -> list[Layer]:
    """Return `--port` and `--host` as settings of the entry service, if it has such; `ServeOptions` carries them too."""
    layers = []
    for key in ("host", "port"):
        value = ctx.params[key]
        if value is None:
            continue
        given = ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE
        source = f"--{key}" if given else f"DYNAMO_{key.upper()}"
        if knows(services, entry, key):
            layers.append(overrides.setting((entry, key), value, source))
    return layers
