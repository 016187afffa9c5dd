"""NATS' micro-service protocol, which shows the endpoints of this process to `nats micro ls` and dashboards.

A component is a service `<namespace>_<component>`; every process that serves it answers `$SRV.PING`, `.INFO` and
`.STATS`, alone or followed by `.<name>` or `.<name>.<id>`. (NATS ADR-32.)
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from dynamo.rpc.served_endpoint import ServedEndpoint
from dynamo.rpc.server import QUEUE_GROUP, RpcServer
from dynamo.transport.nats import Nats

log = logging.getLogger(__name__)

VERSION = "0.0.1"
VERBS = ("PING", "INFO", "STATS")


def service_name(namespace: str, component: str) -> str:
    """Return the name of a component as a NATS service."""
    return f"{namespace}_{component}".lower()


async def serve_service_info(nats: Nats, server: RpcServer, instance_id: int) -> None:
    """Answer `$SRV` requests for the endpoints of `server`, those added later included."""
    identity = f"{instance_id:x}"
    started = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    for verb in VERBS:
        answer = partial(_answer, server, identity, started, verb)
        for subject in (f"$SRV.{verb}", f"$SRV.{verb}.*", f"$SRV.{verb}.*.{identity}"):
            await nats.subscribe(subject, answer)


async def _answer(
    server: RpcServer,
    identity: str,
    started: str,
    verb: str,
    subject: str,
    data: bytes,
    respond: Callable[[bytes], Awaitable[None]],
) -> None:
    wanted = subject.split(".")[2:3]
    services: dict[str, list[ServedEndpoint]] = {}
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


def _info(endpoint: ServedEndpoint, name: str, identity: str) -> dict[str, Any]:
    """Describe an endpoint, named as in ai-dynamo `<service>-<endpoint>-<lease>`, in characters that NATS allows."""
    plain = endpoint.address[2].replace("/", "_")
    return {
        "name": f"{name}-{plain}-{identity}",
        "subject": endpoint.subject,
        "queue_group": QUEUE_GROUP,
        "metadata": {"endpoint": endpoint.address[2]},
    }


def _stats(endpoint: ServedEndpoint) -> dict[str, Any]:
    """Return an endpoint's counts and the processing times, in ns, of its ended calls."""
    ended = endpoint.requests - len(endpoint.running)
    processing_ns = int(endpoint.processing_s * 1e9)
    return {
        "num_requests": endpoint.requests,
        "num_errors": endpoint.errors,
        "last_error": endpoint.last_error,
        "processing_time": processing_ns,
        "average_processing_time": processing_ns // max(ended, 1),
        "data": _service_data(endpoint),
    }


def _service_data(endpoint: ServedEndpoint) -> msgspec.Raw:
    """Return the service's own stats and `in_flight`; `in_flight` alone if its `stats_data` fails."""
    own = {"in_flight": len(endpoint.running)}
    if endpoint.stats_data is not None:
        try:
            return msgspec.Raw(msgspec.json.encode({**endpoint.stats_data(), **own}))
        except Exception:
            log.exception("%s: stats_data failed", endpoint.where)
    return msgspec.Raw(msgspec.json.encode(own))
