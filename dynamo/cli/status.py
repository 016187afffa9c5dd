"""`dynamo status`: the graphs that run, with instances, models and load."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from dynamo.errors import UnavailableError

if TYPE_CHECKING:
    from dynamo.cli.deployments import Seen

EVERY_S = 1.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"
CACHE_HEAD = ("KV", "HITS")  # only where a worker tells
INSTANCE_HEAD = (
    "SERVICE", "INSTANCE", "ENDPOINT", "ADDRESS", "HOST", "SINCE", "REQUESTS", "IN FLIGHT", "ERRORS", "AVERAGE", *CACHE_HEAD,
)  # fmt: skip
MODEL_HEAD = ("MODEL", "TYPES", "CONTEXT", "ENGINE", "SOURCE", "SERVICE", "WORKERS")


@click.command()
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of tables.")
def status(watch: bool, as_json: bool) -> int:
    """Show the graphs that run: live instances, models and load.

    Graphs of this machine are found by themselves. With ETCD_ENDPOINTS (and NATS_SERVER), those that use that etcd are
    shown, wherever they run. Requests, errors and times are counted by each process since its start. KV and HITS are the
    part of a worker's KV cache in use, and of its prompt tokens found there. Exit code 1 when nothing runs.

    \b
    Examples:
      dynamo status
      dynamo status --watch
      ETCD_ENDPOINTS=http://10.0.0.1:2379 NATS_SERVER=nats://10.0.0.1:4222 dynamo status
      dynamo status --json | jq .deployments[].instances[].requests
    """
    seen = _look()
    if not any(one.anything for one in seen):
        raise UnavailableError("nothing runs", hint=_nothing_hint(seen))
    try:
        while True:
            text = json.dumps({"deployments": [_plain(one) for one in seen]}) if as_json else render(seen)
            if watch and not as_json and sys.stdout.isatty():
                text = CLEAR + text
            click.echo(text)
            if not watch:
                return 0
            time.sleep(EVERY_S)
            seen = _look()
    except KeyboardInterrupt:
        return 0


def _look() -> list[Seen]:
    from dynamo.cli.deployments import deployments, look

    async def all_of_them() -> list[Seen]:
        return list(await asyncio.gather(*map(look, deployments())))

    return asyncio.run(all_of_them())


def _nothing_hint(seen: Sequence[Seen]) -> str:
    errors = [one.error for one in seen if one.error]
    start = "start a graph with `dynamo serve`, or set ETCD_ENDPOINTS to where one runs"
    return f"{start} ({errors[0]})" if errors else start


def render(seen: Sequence[Seen]) -> str:
    """The tables: columns two blanks apart, cut by nothing, so that grep and awk work."""
    return "\n\n".join("\n".join(_sections(one)) for one in seen if one.anything or one.error)


def _sections(seen: Seen) -> Iterator[str]:
    here = seen.deployment
    for graph in here.graphs:
        age = _duration(time.time() - graph.started)
        scraped = f"metrics {graph.metrics}" if graph.metrics else ""
        yield "  ".join(filter(None, (graph.graph, graph.url, f"pid {graph.pid}", f"up {age}", graph.run_dir, scraped)))
    yield f"etcd {_address(here.etcd_endpoints)}, nats {_address(here.nats_url)}"
    if seen.error:
        yield f"error: {seen.error}"
    if seen.instances:
        yield ""
        shown = any(load.kv_usage is not None or load.prefix_hit_rate is not None for _, load in seen.instances)
        width = len(INSTANCE_HEAD) if shown else len(INSTANCE_HEAD) - len(CACHE_HEAD)
        yield from table([row[:width] for row in (INSTANCE_HEAD, *_instance_rows(seen))])
    if seen.models:
        yield ""
        yield from table([MODEL_HEAD, *_model_rows(seen)])
    if changes := _changes(seen):
        yield ""
        yield from changes
    if not seen.instances and not seen.models and not seen.error:
        yield "no instances yet: the graph is starting"


def _instance_rows(seen: Seen) -> list[tuple[str, ...]]:
    from dynamo.transport.network import host_id

    rows = []
    for instance, load in seen.instances:
        rows.append(
            (
                f"{instance.namespace}.{instance.component}",
                f"{instance.instance_id:x}",
                instance.endpoint,
                instance.streams.get("tcp") or instance.streams.get("unix") or "",
                "here" if instance.host == host_id() else instance.host[:8],
                "" if load.since is None else _duration(time.time() - load.since),
                _count(load.requests),
                _count(load.in_flight),
                _count(load.errors),
                "" if load.average_s is None else f"{load.average_s * 1e3:.0f} ms",
                _percent(load.kv_usage),
                _percent(load.prefix_hit_rate),
            )
        )
    return sorted(rows)


def _model_rows(seen: Seen) -> list[tuple[str, ...]]:
    """Workers that serve the same model alike share a row."""
    workers: dict[tuple[str, ...], int] = {}
    for key, card in seen.models:
        context = str(card.context_length) if card.context_length else ""
        place = f"{card.namespace}.{card.component}"
        row = (card.name, ",".join(card.types), context, card.engine, card.source, place)
        workers[row] = workers.get(row, 0) + (not key.endswith("/0"))  # id 0: a name that `llmctl` added
    return [(*row, str(count or "")) for row, count in sorted(workers.items())]


def _changes(seen: Seen) -> list[str]:
    """A line for each setting that is not as configured, and for each change that was refused."""
    processes = Counter((process.namespace, process.service) for process in seen.settings)
    said: Counter[tuple[tuple[str, str], str]] = Counter()
    for process in seen.settings:
        service = process.namespace, process.service
        for name, setting in process.settings.items():
            if setting.error:
                said[service, f"{process.namespace}.{setting.error}; it stays {setting.value}"] += 1
            elif setting.value != setting.configured:
                said[service, f"{'.'.join(service)}.{name}: {setting.configured} -> {setting.value}"] += 1
    return [
        text if count == processes[service] else f"{text} ({count} of {processes[service]} processes)"
        for (service, text), count in sorted(said.items())
    ]


def _plain(seen: Seen) -> dict[str, Any]:
    """For --json: ids in hex as everywhere else, times in seconds."""
    return {
        "graphs": [
            {
                "graph": g.graph,
                "pid": g.pid,
                "url": g.url,
                "metrics": g.metrics or None,
                "started": g.started,
                "run_dir": g.run_dir,
            }
            for g in seen.deployment.graphs
        ],
        "etcd": _address(seen.deployment.etcd_endpoints),
        "nats": _address(seen.deployment.nats_url),
        "error": seen.error or None,
        "instances": [
            {
                "namespace": instance.namespace,
                "service": instance.component,
                "endpoint": instance.endpoint,
                "instance": f"{instance.instance_id:x}",
                "subject": instance.subject,
                "addresses": instance.streams,
                "host": instance.host,
                **vars(load),
            }
            for instance, load in seen.instances
        ],
        "models": [
            {
                "name": card.name,
                "types": card.types,
                "context_length": card.context_length or None,
                "engine": card.engine or None,
                "source": card.source or None,
                "service": f"{card.namespace}.{card.component}",
                "instance": key.rpartition("/")[2],
            }
            for key, card in seen.models
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
            for process in seen.settings
            for name, setting in process.settings.items()
        ],
    }


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _address(urls: str) -> str:
    """Without user and password, which a URL may have."""
    return ",".join(url.strip().rpartition("://")[2].rpartition("@")[2] for url in urls.split(","))


def _count(number: int | None) -> str:
    return "" if number is None else str(number)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 5 min`, `4 d 2 h`."""
    minutes, hours, days = int(seconds / 60), int(seconds / 3600), int(seconds / 86400)
    if minutes < 1:
        return f"{max(seconds, 0):.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"
