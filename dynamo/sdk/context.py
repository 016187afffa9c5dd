"""`dynamo_context`: what a served process tells its component. Empty when the class is used as plain Python."""

from __future__ import annotations

from typing import Any

dynamo_context: dict[str, Any] = {}
"""`service_name`, `worker_id` (from 1), `namespace`, `runtime`, `component`, `endpoints` (names, alphabetical)."""
