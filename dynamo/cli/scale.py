"""`dynamo scale`: add and remove workers of a running graph, by way of the supervisor of its `dynamo serve`."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from click.shell_completion import CompletionItem

from dynamo.cli import tables
from dynamo.cli.errors import in_colour
from dynamo.config.provenance import suggestion
from dynamo.errors import ConfigError, DynamoError, StartError, UnavailableError

if TYPE_CHECKING:
    from dynamo.launcher.run_dir import RunningGraph
    from dynamo.planner.scaling import ServiceInfo, SupervisorClient, WorkerInfo

POLL_S = 0.5
HEAD = ("SERVICE", "WORKER", "STATE", "GPUS", "PID", "RESTARTS")
CHANGE = re.compile(r"(?P<service>\w+)=(?P<sign>[+-]?)(?P<number>\d+)")


class _Change(NamedTuple):
    """What the user asked for: `number` workers, or with a sign so many more or less."""

    service: str
    sign: str
    number: int


class _Supervised(NamedTuple):
    """A running graph, the client of its supervisor, and its services."""

    graph: RunningGraph
    client: SupervisorClient
    services: list[ServiceInfo]

    def service(self, name: str) -> ServiceInfo | None:
        return next((service for service in self.services if service.name == name), None)


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        found = asyncio.run(_find(None))
    except DynamoError:
        return []
    names = sorted({f"{service.name}=" for supervised in found for service in supervised.services})
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command()
@click.argument("changes", nargs=-1, metavar="[SERVICE=N]...", shell_complete=_complete)
@click.option("--remove", "workers", multiple=True, metavar="WORKER", help="Remove this worker, such as VllmWorker:2.")
@click.option(
    "--pid", type=int, metavar="PID", help="The `dynamo serve` to change, if several run; see `dynamo status`."
)
def scale(changes: tuple[str, ...], workers: tuple[str, ...], pid: int | None) -> int:
    """Add and remove worker processes of services while the graph runs. Without arguments, list the workers.

    SERVICE=3 starts or ends workers until there are 3; SERVICE=+1 adds one, SERVICE=-1 removes the youngest. A new worker
    gets the settings of the others and GPUs that are free among those that `dynamo serve` sees. A worker that is removed
    finishes its requests first, as at the end of the graph. One ready worker of each service always stays.

    The command returns when the workers are ready, or have ended; Ctrl-C does not undo what has begun. It changes graphs of
    this machine. A Planner in the graph goes on with its own decisions. The exit code is 1 if a change failed.

    \b
    Examples:
      dynamo scale                               # the workers of each service
      dynamo scale VllmWorker=3
      dynamo scale VllmWorker=+1 PrefillWorker=-1
      dynamo scale --remove VllmWorker:2
    """
    wanted = [_parse(text) for text in changes]
    if twice := next((c.service for c in wanted if [w.service for w in wanted].count(c.service) > 1), None):
        raise click.UsageError(f"{twice} is given twice")
    return asyncio.run(_scale(wanted, workers, pid))


def _parse(text: str) -> _Change:
    found = CHANGE.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"{text!r} is not SERVICE=N, SERVICE=+N or SERVICE=-N, such as VllmWorker=3")
    return _Change(found["service"], found["sign"], int(found["number"]))


async def _scale(changes: Sequence[_Change], workers: Sequence[str], pid: int | None) -> int:
    found = await _find(pid)
    if not changes and not workers:
        click.echo("\n\n".join(_table(supervised) for supervised in found))
        return 0
    # every service is found before the first change
    targets = [(_owner(found, change.service), change) for change in changes]
    removals = [(_owner(found, worker.partition(":")[0]), worker) for worker in workers]
    steps = [_change(*target) for target in targets] + [_remove(*removal) for removal in removals]
    results = await asyncio.gather(*steps, return_exceptions=True)
    for result in results:
        if isinstance(result, str):
            click.echo(result)
    errors = _dynamo_errors(results)
    if len(errors) > 1:
        raise StartError("; ".join(error.message for error in errors), hint=errors[0].hint)
    if errors:
        raise errors[0]
    return 0


def _dynamo_errors(results: Sequence[object]) -> list[DynamoError]:
    """Return the errors among results; raise the first of another kind."""
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, DynamoError):
            raise result
    return [result for result in results if isinstance(result, DynamoError)]


async def _find(pid: int | None) -> list[_Supervised]:
    """Return the graphs of this machine whose supervisor answers: that of `pid`, or those of ETCD_ENDPOINTS, or all."""
    from dynamo.cli.deployments import deployments
    from dynamo.planner.scaling import SupervisorClient

    graphs = [graph for deployment in deployments() for graph in deployment.graphs if pid in (None, graph.pid)]
    if not graphs:
        what = "no graph runs on this machine" if pid is None else f"no `dynamo serve` has the process id {pid}"
        raise UnavailableError(what, hint="see `dynamo status`; start a graph with `dynamo serve`")
    found, errors = [], []
    for graph in graphs:
        client = SupervisorClient(Path(graph.run_dir))
        try:
            found.append(_Supervised(graph, client, await client.services()))
        except UnavailableError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _owner(found: Sequence[_Supervised], service: str) -> _Supervised:
    """Return the graph that has a service. Raises ConfigError if none or several have it."""
    owners = [supervised for supervised in found if supervised.service(service) is not None]
    if not owners:
        names = sorted({s.name for supervised in found for s in supervised.services})
        raise ConfigError(f"{service}: no such service runs here", hint=suggestion(service, names, "services"))
    if len(owners) > 1:
        pids = ", ".join(f"{owner.graph.graph} (pid {owner.graph.pid})" for owner in owners)
        raise ConfigError(f"several graphs here run {service}: {pids}", hint="name one with --pid")
    return owners[0]


async def _change(supervised: _Supervised, change: _Change) -> str:
    """Make one change, and return the line for it."""
    service = supervised.service(change.service)
    assert service is not None
    before = service.wanted
    signed = {"+": before + change.number, "-": before - change.number}
    after = signed.get(change.sign, change.number)
    if after < 1:
        raise ConfigError(
            f"{change.service}: one worker has to stay, of {before}",
            hint="Ctrl-C stops the whole graph",
        )
    client, count = supervised.client, abs(after - before)
    step = client.add if after > before else client.remove
    failures = await _all([step(change.service) for _ in range(count)], supervised, change.service)
    if failures:
        done = count - len(failures)
        reached = before + (done if after > before else -done)
        first = failures[0]
        if len(failures) == 1 and count == 1:
            raise first
        message = f"{first.message}; {change.service}: {before} -> {reached} workers, not {after}"
        raise StartError(message, hint=first.hint)
    change_text = f"stays {before}" if after == before else f"{before} -> {after}"
    return f"{change.service}: {change_text} {'worker' if after == 1 else 'workers'}"


async def _remove(supervised: _Supervised, worker: str) -> str:
    service = worker.partition(":")[0]
    failures = await _all([supervised.client.remove(service, worker)], supervised, service)
    if failures:
        raise failures[0]
    return f"{worker}: removed"


async def _all(steps: Sequence[Awaitable[WorkerInfo]], supervised: _Supervised, service: str) -> list[DynamoError]:
    """Wait for steps, show the progress of workers meanwhile, and return the errors."""
    running = {asyncio.ensure_future(step) for step in steps}
    done, shown = set(running), dict[str, str]()
    while running:
        _, running = await asyncio.wait(running, timeout=POLL_S)
        if running:
            await _show_progress(supervised.client, service, shown)
    return _dynamo_errors([task.exception() for task in done])


async def _show_progress(client: SupervisorClient, service: str, shown: dict[str, str]) -> None:
    """Print a line for each worker that starts or drains, if its line has changed."""
    try:
        services = await client.services()
    except UnavailableError:
        return  # the steps report it
    for worker in next((s.workers for s in services if s.name == service), []):
        text = worker.progress or worker.state
        if worker.state in ("starting", "draining") and shown.get(worker.name) != text:
            shown[worker.name] = text
            click.echo(f"{worker.name}: {text}", err=True)


def _table(supervised: _Supervised) -> str:
    rows = [
        (
            f"{service.namespace}.{service.name}",
            worker.name,
            worker.state,
            ",".join(worker.gpus),
            str(worker.pid or ""),
            str(worker.restarts),
        )
        for service in supervised.services
        for worker in service.workers
    ]
    head = f"{supervised.graph.graph}  pid {supervised.graph.pid}"
    return f"{head}\n{tables.render(rows, HEAD, colour=in_colour(sys.stdout))}"
