"""`dynamo_context`: what a served process tells its component. Empty when the class is used as plain Python."""

from __future__ import annotations

from typing import Any

dynamo_context: dict[str, Any] = {}
"""Filled before the constructor runs:

service_name, namespace: text; worker_id: from 1
runtime: the process's `DistributedRuntime`; component: its `Component` there
endpoints: `ComponentEndpoint` objects, in alphabetical order of their methods; `endpoints[0].lease_id()` is the instance's id
lease: the process's lease, with `id()`
progress: call it with a text that tells what the start is waiting for
url: of the HTTP server, once there is one
headless: set by a start hook of a process that nobody is to call, a text that says what it is: it registers no endpoint
"""
