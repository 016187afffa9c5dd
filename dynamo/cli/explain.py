"""What `dynamo serve --dry-run` tells on standard error: the processes that would run, and where each value comes from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamo.config.merge import Resolved
from dynamo.config.provenance import canonical, preview
from dynamo.config.settings import DeclaredSettings
from dynamo.errors import ConfigError
from dynamo.launcher import gpus
from dynamo.launcher.plan import describe, plan
from dynamo.sdk.graph import Graph

DEFAULT = "default"


def explanation(
    graph: Graph,
    resolved: Resolved,
    declared: Mapping[str, DeclaredSettings | None],
    working_dir: Path,
    *,
    as_json: bool,
) -> str:
    """Tables for a person, or one JSON object: `plan` (or `plan_error`) and `values`."""
    values = _values(resolved, declared)
    processes: list[dict[str, Any]] = []
    problem = ""
    try:
        processes = describe(
            plan(graph, resolved.services, working_dir=working_dir, visible_gpus=gpus.visible(), environment={})
        )
    except ConfigError as error:  # it says what starting would say; the configuration is good all the same
        problem = str(error)
    if as_json:
        told = [{"key": key, "value": value, "source": source} for key, value, source in values]
        planned = {"plan_error": problem} if problem else {"plan": processes}
        return json.dumps({**planned, "values": told}, indent=2, default=str)
    lines = ["Processes:"]
    if problem:
        lines += [f"  {line}" for line in problem.splitlines()]
    else:
        rows = [(p["name"], f"GPU {','.join(p['gpus'])}" if p["gpus"] else "no GPU", _command(p)) for p in processes]
        lines += _table(rows)
    lines += ["Where each value comes from:"]
    lines += _table([(key, preview(value), source) for key, value, source in values])
    return "\n".join(lines)


def _command(process: Mapping[str, Any]) -> str:
    added = " ".join(f"{name}={value}" for name, value in process["env"].items())
    return f"{added} {process['command']}".strip()


def _values(resolved: Resolved, declared: Mapping[str, DeclaredSettings | None]) -> list[tuple[str, Any, str]]:
    """Every value given, then every default that counts because nothing was given."""
    rows = [(".".join(path), value, origin.source) for path, value, origin in resolved.leaves()]
    for service, settings in declared.items():
        given = {canonical(key) for key in resolved.services.get(service, {})}
        for name, setting in (settings.settings if settings is not None else {}).items():
            if name not in given and setting.default is not inspect.Parameter.empty and setting.default is not None:
                rows.append((f"{service}.{setting.name}", setting.default, DEFAULT))
    return rows


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [f"  {a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows]
