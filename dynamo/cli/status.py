"""`dynamo status`: the running graphs, with instances, models and load."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dynamo.cli import tables
from dynamo.cli.errors import in_colour
from dynamo.errors import UnavailableError
from dynamo.launcher import wording

if TYPE_CHECKING:
    from dynamo.cli.deployments import EndpointStats, Snapshot
    from dynamo.planner.scaling import ServiceInfo
    from dynamo.rpc.messages import Instance

WATCH_S = 1.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"
CACHE_HEAD = ("KV", "HITS")  # only if a worker reports them
INSTANCE_HEAD = (
    "SERVICE", "INSTANCE", "ENDPOINT", "ADDRESS", "HOST", "SINCE", "REQUESTS", "IN FLIGHT", "ERRORS", "AVERAGE", *CACHE_HEAD,
)  # fmt: skip
MODEL_HEAD = ("MODEL", "TYPES", "CONTEXT", "ENGINE", "SOURCE", "SERVICE", "WORKERS")


@click.command()
@click.option("--watch", is_flag=True, help="Refresh every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of tables.")
def status(watch: bool, as_json: bool) -> int:
    """Show the running graphs: live instances, models and load.

    Graphs on this machine are found automatically. If ETCD_ENDPOINTS (and NATS_SERVER) are set, the graphs that use that
    etcd are shown, on whichever hosts they run. Each process counts its requests, errors and times since its start. KV is
    the fraction of a worker's KV cache in use, HITS the fraction of its prompt tokens found in the cache. The exit code is
    1 if no graph is running.

    \b
    Examples:
      dynamo status
      dynamo status --watch
      ETCD_ENDPOINTS=http://10.0.0.1:2379 NATS_SERVER=nats://10.0.0.1:4222 dynamo status
      dynamo status --json | jq .deployments[].instances[].requests
    """
    snapshots = _take_snapshots()
    if not any(snapshot.is_running for snapshot in snapshots):
        for snapshot in snapshots:
            if snapshot.refusal is not None:
                raise snapshot.refusal
        raise UnavailableError("nothing runs", hint=_nothing_runs_hint(snapshots))
    try:
        while True:
            if as_json:
                text = json.dumps({"deployments": [_to_builtins(snapshot) for snapshot in snapshots]})
            else:
                text = render(snapshots, colour=in_colour(sys.stdout))
            clear = CLEAR if watch and not as_json and sys.stdout.isatty() else ""
            click.echo(clear + text)
            if not watch:
                return 0
            time.sleep(WATCH_S)
            snapshots = _take_snapshots()
    except KeyboardInterrupt:
        return 0


def _take_snapshots() -> list[Snapshot]:
    from dynamo.cli.deployments import deployments, take_snapshot

    async def take_all() -> list[Snapshot]:
        return list(await asyncio.gather(*map(take_snapshot, deployments())))

    return asyncio.run(take_all())


def _nothing_runs_hint(snapshots: Sequence[Snapshot]) -> str:
    errors = [snapshot.error for snapshot in snapshots if snapshot.error]
    start = "start a graph with `dynamo serve`, or set ETCD_ENDPOINTS to where one runs"
    return f"{start} ({errors[0]})" if errors else start


def render(snapshots: Sequence[Snapshot], *, colour: bool = False) -> str:
    """Return the text for a terminal or a pipe: a block for each deployment."""
    shown = [snapshot for snapshot in snapshots if snapshot.is_running or snapshot.error]
    return "\n\n".join("\n\n".join(_sections(snapshot, colour)) for snapshot in shown)


def _sections(snapshot: Snapshot, colour: bool) -> Iterator[str]:
    yield "\n".join(_summary(snapshot))
    if snapshot.instances:
        rows = sorted(_instance_row(instance, stats) for instance, stats in snapshot.instances)
        has_cache = any(
            stats.kv_usage is not None or stats.prefix_hit_rate is not None for _, stats in snapshot.instances
        )
        width = len(INSTANCE_HEAD) if has_cache else len(INSTANCE_HEAD) - len(CACHE_HEAD)
        yield tables.render([row[:width] for row in rows], INSTANCE_HEAD[:width], colour=colour)
    if snapshot.models:
        yield tables.render(_model_rows(snapshot), MODEL_HEAD, colour=colour)
    if changes := _setting_changes(snapshot):
        yield "\n".join(changes)


def _summary(snapshot: Snapshot) -> Iterator[str]:
    """Yield a line for each graph, one for etcd and NATS, and one if there is an error or nothing else to show."""
    deployment = snapshot.deployment
    for graph in deployment.graphs:
        facts = (
            graph.graph,
            graph.url,
            f"pid {graph.pid}",
            f"up {wording.age(time.time() - graph.started)}",
            graph.run_dir,
            f"metrics {graph.metrics}" if graph.metrics else "",
        )
        yield "  ".join(filter(None, facts))
        yield from filter(None, map(_scaled, snapshot.workers.get(graph.pid, ())))
    yield f"etcd {_addresses(deployment.etcd_endpoints)}, nats {_addresses(deployment.nats_url)}"
    if snapshot.error:
        yield f"error: {snapshot.error}"
    elif not snapshot.instances and not snapshot.models:
        yield "no instances yet: the graph is starting"


def _scaled(service: ServiceInfo) -> str:
    """Return a line for a service that was scaled or has workers that are not ready; empty for others."""
    busy = [worker for worker in service.workers if worker.state != "ready"]
    if service.wanted == service.planned and not busy:
        return ""
    states = (f"{w.name} {w.state}{f' ({w.progress})' if w.progress else ''}" for w in busy)
    count = f"{service.wanted} worker{'s' if service.wanted != 1 else ''}"
    return ", ".join((f"{service.namespace}.{service.name}: {count}, {service.planned} at the start", *states))


def _instance_row(instance: Instance, stats: EndpointStats) -> tuple[str, ...]:
    from dynamo.transport.network import host_id

    return (
        f"{instance.namespace}.{instance.component}",
        f"{instance.instance_id:x}",
        instance.endpoint,
        instance.streams.get("tcp") or instance.streams.get("unix") or "",
        "here" if instance.host == host_id() else instance.host[:8],
        "" if stats.since is None else wording.age(time.time() - stats.since),
        _number(stats.requests),
        _number(stats.in_flight),
        _number(stats.errors),
        "" if stats.average_s is None else f"{stats.average_s * 1e3:.0f} ms",
        _percent(stats.kv_usage),
        _percent(stats.prefix_hit_rate),
    )


def _registrant(key: str) -> str:
    """Return the id, in hex, of the instance that wrote a card, which may be one for each type."""
    return key.rpartition("/")[2].partition(":")[0]


def _model_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Return a row for each model; workers that serve it alike share a row."""
    workers: Counter[tuple[str, ...]] = Counter()
    for key, card in snapshot.models:
        context = str(card.context_length) if card.context_length else ""
        service = f"{card.namespace}.{card.component}"
        row = (card.name, ",".join(card.types), context, card.engine, card.source, service)
        workers[row] += 0 if _registrant(key) == "0" else 1  # id 0: `llmctl` added it
    return [(*row, str(count or "")) for row, count in sorted(workers.items())]


def _setting_changes(snapshot: Snapshot) -> list[str]:
    """Return a line for each setting whose value is not the configured one, and for each refused change."""
    processes = Counter((process.namespace, process.service) for process in snapshot.settings)
    counts: Counter[tuple[tuple[str, str], str]] = Counter()
    for process in snapshot.settings:
        service = process.namespace, process.service
        for name, setting in process.settings.items():
            if setting.error:
                counts[service, f"{process.namespace}.{setting.error}; keeping {setting.value}"] += 1
            elif setting.value != setting.configured:
                counts[service, f"{'.'.join(service)}.{name}: {setting.configured} -> {setting.value}"] += 1
    return [
        text if count == processes[service] else f"{text} ({count} of {processes[service]} processes)"
        for (service, text), count in sorted(counts.items())
    ]


def _to_builtins(snapshot: Snapshot) -> dict[str, Any]:
    """Return what --json prints: ids in hex, times in seconds."""
    return {
        "graphs": [
            {
                "graph": graph.graph,
                "pid": graph.pid,
                "url": graph.url,
                "metrics": graph.metrics or None,
                "started": graph.started,
                "run_dir": graph.run_dir,
                "services": [
                    {
                        "namespace": service.namespace,
                        "service": service.name,
                        "planned": service.planned,
                        "workers": [msgspec.to_builtins(worker) for worker in service.workers],
                    }
                    for service in snapshot.workers.get(graph.pid, ())
                ],
            }
            for graph in snapshot.deployment.graphs
        ],
        "etcd": _addresses(snapshot.deployment.etcd_endpoints),
        "nats": _addresses(snapshot.deployment.nats_url),
        "error": snapshot.error or None,
        "instances": [
            {
                "namespace": instance.namespace,
                "service": instance.component,
                "endpoint": instance.endpoint,
                "instance": f"{instance.instance_id:x}",
                "subject": instance.subject,
                "addresses": instance.streams,
                "host": instance.host,
                **vars(stats),
            }
            for instance, stats in snapshot.instances
        ],
        "models": [
            {
                "name": card.name,
                "types": card.types,
                "context_length": card.context_length or None,
                "engine": card.engine or None,
                "source": card.source or None,
                "service": f"{card.namespace}.{card.component}",
                "instance": _registrant(key),
            }
            for key, card in snapshot.models
        ],
        "settings": [
            {
                "namespace": process.namespace,
                "service": process.service,
                "instance": process.instance,
                "setting": name,
                "value": setting.value,
                "configured": setting.configured,
                "allowed": setting.allowed,
                "error": setting.error or None,
            }
            for process in snapshot.settings
            for name, setting in process.settings.items()
        ],
    }


def _addresses(urls: str) -> str:
    """Return the hosts and ports of URLs, without user and password."""
    return ",".join(url.strip().rpartition("://")[2].rpartition("@")[2] for url in urls.split(","))


def _number(number: int | None) -> str:
    return "" if number is None else str(number)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"
