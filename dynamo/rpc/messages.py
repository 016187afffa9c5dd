"""The messages of RPC and discovery, and the keys and subjects under which instances are found."""

from __future__ import annotations

from typing import Any, NewType

import msgspec

InstanceId = NewType("InstanceId", int)
"""The etcd lease of a process: unique in the deployment while the process lives."""


class Request(msgspec.Struct, array_like=True):
    """A call to an instance, sent over its RPC connection with the instance's subject, or over NATS to that subject."""

    id: str
    connection: str
    """id of the client's RPC connection: a request that outlives it must not be answered on the next one"""
    sid: int
    """the client's number for this stream, unique per connection"""
    timeout_s: float | None
    """time left until the request's deadline"""
    body: msgspec.Raw
    body_ahead: bool = False
    """the body was too large for NATS and went ahead as a BODY frame; `body` is nil"""


class Instance(msgspec.Struct):
    """One endpoint of one process: JSON in etcd under `instances/<ns>/<component>/<endpoint>:<lease hex>`."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int
    transport: dict[str, str]
    """`nats_tcp`: the NATS subject of requests; `stream`: the key that opens an RPC connection to this process"""
    streams: dict[str, str] = {}
    """`unix`: path and `tcp`: host:port of the RPC listener; `pulse`: host:port of the heartbeat"""
    host: str = ""
    """`host_id()` there: the unix socket is reachable if it is the same as here"""
    request_type: str = ""
    """`module:class` that the endpoint declares for its request; empty if it takes plain data"""

    @property
    def id(self) -> InstanceId:
        return InstanceId(self.instance_id)

    @property
    def subject(self) -> str:
        return self.transport["nats_tcp"]

    @property
    def key(self) -> str:
        return self.transport.get("stream", "")


def instances_prefix(namespace: str, component: str, endpoint: str) -> str:
    """Return the etcd prefix of an endpoint's instances; its colon keeps `generate` from matching `generate2`."""
    return f"instances/{namespace}/{component}/{endpoint}:"


def subject(namespace: str, component: str, endpoint: str, lease_id: int) -> str:
    """Return the NATS subject of one instance's requests."""
    return f"{namespace}_{component.lower()}.{endpoint}-{lease_id:x}"


def type_name(kind: Any) -> str:
    """Return `module:class` for a class; empty for `Any` and other annotations, which stand for plain data."""
    return f"{kind.__module__}:{kind.__qualname__}" if isinstance(kind, type) and kind is not Any else ""
