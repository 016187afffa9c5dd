"""What runs now: graphs of this machine, and what etcd and NATS tell of a deployment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from dynamo.errors import DynamoError, StartError
from dynamo.launcher.run_dir import RunningGraph, running
from dynamo.llm.protocol import MODELS_PREFIX, ModelCard
from dynamo.rpc.messages import Instance
from dynamo.rpc.nats_service import service_name
from dynamo.rpc.runtime import DEFAULT_ETCD
from dynamo.transport.etcd import Etcd, KeyValue
from dynamo.transport.nats import DEFAULT_URL, Nats
from dynamo.transport.network import without_credentials
from dynamo.worker.live_settings import STATES_PREFIX, States

INSTANCES_PREFIX = "instances/"
ETCD_S = 1.5
GUESS_S = 0.5  # where nobody said that there is an etcd
STATS_S = 1.0  # a process that takes longer is shown without figures


@dataclass(frozen=True)
class Load:
    """What one endpoint of one process has done; None: it does not say. `since` is Unix time, the time in seconds.

    `kv_usage` and `prefix_hit_rate` are fractions of 0 to 1.
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
    """One NATS and etcd, and the graphs of this machine that use them, if any."""

    etcd_endpoints: str
    nats_url: str
    graphs: Sequence[RunningGraph] = ()
    timeout_s: float = ETCD_S

    def etcd(self) -> Etcd:
        return Etcd.connect(self.etcd_endpoints, timeout_s=self.timeout_s)


@dataclass(frozen=True)
class ProcessSettings:
    """The live settings of one process; `instance` is its id in hex."""

    namespace: str
    service: str
    instance: str
    settings: States


@dataclass(frozen=True)
class Seen:
    """One look at a deployment. `error` says why there is nothing, or no load."""

    deployment: Deployment
    instances: list[tuple[Instance, Load]] = field(default_factory=list)
    models: list[tuple[str, ModelCard]] = field(default_factory=list)
    """etcd key and card"""
    error: str = ""
    settings: list[ProcessSettings] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        return bool(self.instances or self.models or self.settings or self.deployment.graphs)


def deployments() -> list[Deployment]:
    """The one that ETCD_ENDPOINTS names; else those of the running graphs; else the one on etcd's usual port."""
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


def one_deployment() -> Deployment:
    """Raises StartError when several graphs run here, each with an etcd of its own."""
    found = deployments()
    if len(found) > 1:
        specs = ", ".join(f"{d.graphs[0].graph} ({without_credentials(d.etcd_endpoints)})" for d in found)
        raise StartError(f"several graphs run here: {specs}", hint="set ETCD_ENDPOINTS to the one you mean")
    return found[0]


async def look(deployment: Deployment) -> Seen:
    """Never raises a DynamoError: what cannot be reached is in `error`."""
    try:
        async with deployment.etcd() as etcd:
            instances, _ = await etcd.get_prefix(INSTANCES_PREFIX)
            cards, _ = await etcd.get_prefix(MODELS_PREFIX)
            settings = await read_settings(etcd)
    except DynamoError as failure:
        return Seen(deployment, error=failure.message)
    found = list(filter(None, map(_instance, instances)))
    error = ""
    loads: dict[str, Load] = {}
    if found:
        try:
            loads = await _loads(deployment.nats_url, found)
        except DynamoError as failure:
            error = failure.message
    return Seen(deployment, [(i, loads.get(i.subject, Load())) for i in found], decode_cards(cards), error, settings)


def decode_cards(items: Sequence[KeyValue]) -> list[tuple[str, ModelCard]]:
    """Key and card of each model; those of another version are left out."""
    found = []
    for item in items:
        try:
            found.append((item.key, msgspec.json.decode(item.value, type=ModelCard)))
        except msgspec.MsgspecError:
            continue
    return found


async def read_settings(etcd: Etcd) -> list[ProcessSettings]:
    """Of each process that has live settings. Raises TransportError."""
    items, _ = await etcd.get_prefix(STATES_PREFIX)
    found = []
    for item in items:
        try:
            namespace, service, instance = item.key.removeprefix(STATES_PREFIX).split("/")
            settings = msgspec.json.decode(item.value, type=States)
        except (ValueError, msgspec.MsgspecError):  # another version's
            continue
        found.append(ProcessSettings(namespace, service, instance, settings))
    return found


def _instance(item: KeyValue) -> Instance | None:
    try:
        return msgspec.json.decode(item.value, type=Instance)
    except msgspec.MsgspecError:
        return None


async def _loads(nats_url: str, instances: Sequence[Instance]) -> dict[str, Load]:
    """Load by subject, from `$SRV.STATS` of each process and service. Raises TransportError."""
    nats = await Nats.connect(nats_url, name="dynamo status")
    try:
        asked = {(service_name(i.namespace, i.component), f"{i.instance_id:x}") for i in instances}
        answers = await asyncio.gather(*(_ask(nats, f"$SRV.STATS.{name}.{identity}") for name, identity in asked))
    finally:
        await nats.close()
    return {subject: load for answer in answers for subject, load in answer.items()}


async def _ask(nats: Nats, subject: str) -> dict[str, Load]:
    try:
        answer = msgspec.json.decode(await nats.request(subject, b"", STATS_S))
        since = _unix_time(answer.get("started"))
        return {endpoint["subject"]: _load(endpoint, since) for endpoint in answer["endpoints"]}
    except (DynamoError, msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return {}  # it is starting, stopping, busy or of another version


def _load(stats: dict[str, Any], since: float | None) -> Load:
    data = stats.get("data") or {}
    requests = stats.get("num_requests")
    average_s = stats.get("average_processing_time", 0) / 1e9 if requests else None
    kv_usage, hit_rate = _number(data.get("gpu_cache_usage_perc")), _number(data.get("gpu_prefix_cache_hit_rate"))
    return Load(requests, data.get("in_flight"), stats.get("num_errors"), average_s, since, kv_usage, hit_rate)


def _number(value: Any) -> float | None:
    """A service may say anything."""
    return float(value) if isinstance(value, int | float) else None


def _unix_time(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
