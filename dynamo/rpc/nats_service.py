"""NATS' micro-service protocol, so that `nats micro ls` and dashboards see the endpoints of this process.

A component is a service `<namespace>_<component>`; `$SRV.PING`, `.INFO` and `.STATS`, alone or followed by `.<name>` or
`.<name>.<id>`, are answered by every process that serves it. (NATS ADR-32.)
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from dynamo.rpc.server import QUEUE_GROUP, Endpoint, Server
from dynamo.transport.nats import Nats

log = logging.getLogger(__name__)

VERSION = "0.0.1"
VERBS = ("PING", "INFO", "STATS")


def service_name(namespace: str, component: str) -> str:
    return f"{namespace}_{component}".lower()


async def announce(nats: Nats, server: Server, instance_id: int) -> None:
    """Answer for all endpoints that `server` has, now and later."""
    identity = f"{instance_id:x}"
    started = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    for verb in VERBS:
        answer = partial(_answer, server, identity, started, verb)
        for subject in (f"$SRV.{verb}", f"$SRV.{verb}.*", f"$SRV.{verb}.*.{identity}"):
            await nats.subscribe(subject, answer)


async def _answer(
    server: Server,
    identity: str,
    started: str,
    verb: str,
    subject: str,
    data: bytes,
    respond: Callable[[bytes], Awaitable[None]],
) -> None:
    wanted = subject.split(".")[2:3]
    services: dict[str, list[Endpoint]] = {}
    for endpoint in server.endpoints.values():
        services.setdefault(service_name(*endpoint.address[:2]), []).append(endpoint)
    for name, endpoints in services.items():
        if wanted and wanted != [name]:
            continue
        body: dict[str, Any] = {
            "type": f"io.nats.micro.v1.{verb.lower()}_response",
            "name": name,
            "id": identity,
            "version": VERSION,
            "metadata": {},
        }
        if verb == "INFO":
            body |= {"description": "", "endpoints": [_info(e, name, identity) for e in endpoints]}
        elif verb == "STATS":
            stats = [_info(e, name, identity) | _stats(e) for e in endpoints]
            body |= {"started": started, "endpoints": stats}
        await respond(msgspec.json.encode(body))


def _info(endpoint: Endpoint, name: str, identity: str) -> dict[str, Any]:
    """The endpoint's name is ai-dynamo's `<service>-<endpoint>-<lease>`, in the letters that NATS allows."""
    plain = endpoint.address[2].replace("/", "_")
    return {
        "name": f"{name}-{plain}-{identity}",
        "subject": endpoint.subject,
        "queue_group": QUEUE_GROUP,
        "metadata": {"endpoint": endpoint.address[2]},
    }


def _stats(endpoint: Endpoint) -> dict[str, Any]:
    """Times in ns, of the calls that have ended."""
    ended = endpoint.requests - len(endpoint.running)
    processing_ns = int(endpoint.processing_s * 1e9)
    return {
        "num_requests": endpoint.requests,
        "num_errors": endpoint.errors,
        "last_error": endpoint.last_error,
        "processing_time": processing_ns,
        "average_processing_time": processing_ns // max(ended, 1),
        "data": _data(endpoint),
    }


def _data(endpoint: Endpoint) -> msgspec.Raw:
    """What the service says of itself must not keep the rest from being told."""
    known = {"in_flight": len(endpoint.running)}
    if endpoint.stats_data is not None:
        try:
            return msgspec.Raw(msgspec.json.encode({**endpoint.stats_data(), **known}))
        except Exception:
            log.exception("%s: stats_data failed", endpoint.where)
    return msgspec.Raw(msgspec.json.encode(known))
