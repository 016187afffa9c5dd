"""Messages between processes, other than those of the LLM layer (`dynamo.llm.protocol`)."""

from __future__ import annotations

from typing import NewType

import msgspec

InstanceId = NewType("InstanceId", int)  # the etcd lease of the process: unique in the deployment while it lives


class Request(msgspec.Struct, array_like=True):
    """What goes to an instance: over its stream connection, with its subject, or over NATS, to its subject."""

    id: str
    connection: str
    """id of the caller's stream connection: a request that outlives it must not answer on the next one"""
    sid: int
    """the caller's number for this stream, unique per connection"""
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
    """`nats_tcp`: the NATS subject of requests; `stream`: the key that opens a stream connection to this process"""
    streams: dict[str, str] = {}
    """addresses of the stream plane: `unix` path, `tcp` host:port; and `pulse` host:port, where the process shows that it
    runs"""
    host: str = ""
    """identity of the host, to know whether the unix socket can be reached"""

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
    """Ends in a colon, so that `generate` does not match `generate2`."""
    return f"instances/{namespace}/{component}/{endpoint}:"


def subject(namespace: str, component: str, endpoint: str, lease_id: int) -> str:
    return f"{namespace}_{component.lower()}.{endpoint}-{lease_id:x}"
