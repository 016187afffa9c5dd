"""The deployments that run now: graphs of this machine, and the state of a deployment in etcd and NATS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from dynamo.errors import DynamoError, StartError, UnavailableError
from dynamo.launcher.run_dir import RunningGraph, running
from dynamo.llm.protocol import MODELS_PREFIX, ModelCard
from dynamo.planner.scaling import ServiceInfo, SupervisorClient
from dynamo.rpc.messages import Instance
from dynamo.rpc.nats_service import service_name
from dynamo.rpc.runtime import DEFAULT_ETCD
from dynamo.transport.etcd import Etcd, KeyValue
from dynamo.transport.etcd_cluster import RefusedError
from dynamo.transport.nats import DEFAULT_URL, Nats
from dynamo.transport.network import without_credentials
from dynamo.worker.live_settings import STATES_PREFIX, States

INSTANCES_PREFIX = "instances/"
ETCD_S = 1.5
GUESS_S = 0.5  # for an etcd that is only assumed to be there
STATS_S = 1.0  # a process that takes longer is shown without statistics


@dataclass(frozen=True)
class EndpointStats:
    """Statistics of one endpoint of one process since its start. None: not reported.

    `since` is Unix time; `kv_usage` and `prefix_hit_rate` are fractions from 0 to 1.
    """

    requests: int | None = None
    in_flight: int | None = None
    errors: int | None = None
    average_s: float | None = None
    since: float | None = None
    kv_usage: float | None = None
    prefix_hit_rate: float | None = None


@dataclass(frozen=True)
class Deployment:
    """An etcd, a NATS, and the graphs of this machine that use them, if any."""

    etcd_endpoints: str
    nats_url: str
    graphs: Sequence[RunningGraph] = ()
    timeout_s: float = ETCD_S

    def etcd(self) -> Etcd:
        """Connect to its etcd."""
        return Etcd.connect(self.etcd_endpoints, timeout_s=self.timeout_s)


@dataclass(frozen=True)
class ProcessSettings:
    """The live settings of one process. `instance` is its id in hex."""

    namespace: str
    service: str
    instance: str
    settings: States


@dataclass(frozen=True)
class Snapshot:
    """The state of a deployment at one moment."""

    deployment: Deployment
    instances: list[tuple[Instance, EndpointStats]] = field(default_factory=list)
    models: list[tuple[str, ModelCard]] = field(default_factory=list)
    """etcd key and card"""
    error: str = ""
    """why all of it, or the statistics, are missing"""
    settings: list[ProcessSettings] = field(default_factory=list)
    workers: dict[int, list[ServiceInfo]] = field(default_factory=dict)
    """services and workers of each graph of this machine, by the pid of its `dynamo serve`"""
    refusal: RefusedError | None = None
    """the error, if etcd answers but does not let us read"""

    @property
    def is_running(self) -> bool:
        """True if a graph, an instance, a model or a live setting was found."""
        return bool(self.instances or self.models or self.settings or self.deployment.graphs)


def deployments() -> list[Deployment]:
    """Return the deployment of ETCD_ENDPOINTS; else those of the running graphs; else the one at etcd's default port."""
    named = os.environ.get("ETCD_ENDPOINTS")
    nats = os.environ.get("NATS_SERVER") or DEFAULT_URL
    found: dict[str, list[RunningGraph]] = {}
    for graph in running():
        found.setdefault(graph.env.get("ETCD_ENDPOINTS") or DEFAULT_ETCD, []).append(graph)
    if named:
        graphs = found.get(named, [])
        return [Deployment(named, graphs[0].env.get("NATS_SERVER") or nats if graphs else nats, graphs)]
    if found:
        return [Deployment(etcd, graphs[0].env.get("NATS_SERVER") or nats, graphs) for etcd, graphs in found.items()]
    return [Deployment(DEFAULT_ETCD, nats, timeout_s=GUESS_S)]


def single_deployment() -> Deployment:
    """Return the only deployment. Raises StartError if several graphs run here, each with an etcd of its own."""
    found = deployments()
    if len(found) > 1:
        specs = ", ".join(f"{d.graphs[0].graph} ({without_credentials(d.etcd_endpoints)})" for d in found)
        raise StartError(f"several graphs run here: {specs}", hint="set ETCD_ENDPOINTS to the one you mean")
    return found[0]


async def take_snapshot(deployment: Deployment) -> Snapshot:
    """Read the state of a deployment. Never raises a DynamoError: its message is the snapshot's `error`."""
    workers = {graph.pid: await _read_workers(graph) for graph in deployment.graphs}
    try:
        async with deployment.etcd() as etcd:
            instance_items, _ = await etcd.get_prefix(INSTANCES_PREFIX)
            card_items, _ = await etcd.get_prefix(MODELS_PREFIX)
            settings = await read_settings(etcd)
    except DynamoError as failure:
        refusal = failure if isinstance(failure, RefusedError) else None
        return Snapshot(deployment, error=failure.message, workers=workers, refusal=refusal)
    instances = list(filter(None, map(_decode_instance, instance_items)))
    stats: dict[str, EndpointStats] = {}
    error = ""
    if instances:
        try:
            stats = await _read_stats(deployment.nats_url, instances)
        except DynamoError as failure:
            error = failure.message
    with_stats = [(instance, stats.get(instance.subject, EndpointStats())) for instance in instances]
    return Snapshot(deployment, with_stats, decode_cards(card_items), error, settings, workers)


async def _read_workers(graph: RunningGraph) -> list[ServiceInfo]:
    """Return the workers that a graph's supervisor runs; none if it does not answer."""
    try:
        return await SupervisorClient(Path(graph.run_dir)).services()
    except UnavailableError:
        return []


def decode_cards(items: Sequence[KeyValue]) -> list[tuple[str, ModelCard]]:
    """Return etcd key and card of each model; cards of other versions, which cannot be decoded, are left out."""
    found = []
    for item in items:
        try:
            found.append((item.key, msgspec.json.decode(item.value, type=ModelCard)))
        except msgspec.MsgspecError:
            continue
    return found


async def read_settings(etcd: Etcd) -> list[ProcessSettings]:
    """Return the live settings of each process that has any. Raises TransportError."""
    items, _ = await etcd.get_prefix(STATES_PREFIX)
    found = []
    for item in items:
        try:
            namespace, service, instance = item.key.removeprefix(STATES_PREFIX).split("/")
            settings = msgspec.json.decode(item.value, type=States)
        except (ValueError, msgspec.MsgspecError):  # written by another version
            continue
        found.append(ProcessSettings(namespace, service, instance, settings))
    return found


def _decode_instance(item: KeyValue) -> Instance | None:
    try:
        return msgspec.json.decode(item.value, type=Instance)
    except msgspec.MsgspecError:
        return None


async def _read_stats(nats_url: str, instances: Sequence[Instance]) -> dict[str, EndpointStats]:
    """Return the statistics of endpoints by subject, as each process answers `$SRV.STATS`. Raises TransportError."""
    nats = await Nats.connect(nats_url, name="dynamo status")
    try:
        services = {(service_name(i.namespace, i.component), f"{i.instance_id:x}") for i in instances}
        answers = await asyncio.gather(*(_request_stats(nats, f"$SRV.STATS.{name}.{id_}") for name, id_ in services))
    finally:
        await nats.close()
    return {subject: stats for answer in answers for subject, stats in answer.items()}


async def _request_stats(nats: Nats, subject: str) -> dict[str, EndpointStats]:
    """Return the statistics of one process; none if it is starting, stopping, busy or of another version."""
    try:
        answer = msgspec.json.decode(await nats.request(subject, b"", STATS_S))
        since = _unix_time(answer.get("started"))
        return {endpoint["subject"]: _endpoint_stats(endpoint, since) for endpoint in answer["endpoints"]}
    except (DynamoError, msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return {}


def _endpoint_stats(answer: dict[str, Any], since: float | None) -> EndpointStats:
    data = answer.get("data") or {}
    requests = answer.get("num_requests")
    return EndpointStats(
        requests=requests,
        in_flight=data.get("in_flight"),
        errors=answer.get("num_errors"),
        average_s=answer.get("average_processing_time", 0) / 1e9 if requests else None,
        since=since,
        kv_usage=_number(data.get("gpu_cache_usage_perc")),
        prefix_hit_rate=_number(data.get("gpu_prefix_cache_hit_rate")),
    )


def _number(value: Any) -> float | None:
    """Return a number as a float; None for anything else, since services are free in what they report."""
    return float(value) if isinstance(value, int | float) else None


def _unix_time(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
