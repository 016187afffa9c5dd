"""What `dynamo serve --dry-run` prints on standard error: the process plan, and the source of each value and module."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamo.cli import tables
from dynamo.config.merge import Resolved
from dynamo.config.provenance import canonical, preview
from dynamo.config.settings import DeclaredSettings
from dynamo.errors import ConfigError
from dynamo.launcher import gpus
from dynamo.launcher.plan import describe, plan
from dynamo.sdk.graph import Graph

DEFAULT = "default"
INDENT = "  "


def explanation(
    graph: Graph,
    resolved: Resolved,
    declared: Mapping[str, DeclaredSettings | None],
    modules: Mapping[str, str],
    working_dir: Path,
    *,
    as_json: bool,
) -> str:
    """Return tables, or one JSON object with `plan` (or `plan_error`), `modules` and `values`.

    `declared` are the settings of the graph's services by name, `modules` the files of what the graph imported.
    """
    values = _values(resolved, declared)
    processes: list[dict[str, Any]] = []
    problem = ""
    try:
        processes = describe(plan(graph, resolved.services, working_dir=working_dir, visible_gpus=gpus.visible()))
    except ConfigError as error:  # a start would fail with it, but the configuration is valid: show both
        problem = str(error)
    if as_json:
        rows = [{"key": key, "value": value, "source": source} for key, value, source in values]
        planned = {"plan_error": problem} if problem else {"plan": processes}
        return json.dumps({**planned, "modules": modules, "values": rows}, indent=2, default=str)
    return "\n".join(
        [
            "Processes:",
            textwrap.indent(problem, INDENT) if problem else _process_table(processes),
            "Where each value comes from:",
            tables.render([(key, preview(value), source) for key, value, source in values], indent=len(INDENT)),
            "Where each module comes from:",
            tables.render([(name, _shown(file, working_dir)) for name, file in modules.items()], indent=len(INDENT)),
        ]
    )


def _shown(file: str, working_dir: Path) -> str:
    """Return a file's path from the working directory, in full if it is not below that."""
    path, root = Path(file), working_dir.resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else file


def _process_table(processes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (process["name"], f"GPU {','.join(process['gpus'])}" if process["gpus"] else "no GPU", _command(process))
        for process in processes
    ]
    return tables.render(rows, indent=len(INDENT))


def _command(process: Mapping[str, Any]) -> str:
    added = " ".join(f"{name}={value}" for name, value in process["env"].items())
    return f"{added} {process['command']}".strip()


def _values(resolved: Resolved, declared: Mapping[str, DeclaredSettings | None]) -> list[tuple[str, Any, str]]:
    """Return key, value and source of every given value, then of every default that applies instead."""
    rows = [(".".join(path), value, origin.source) for path, value, origin in resolved.leaves() if path[0] in declared]
    for service, settings in declared.items():
        given = {canonical(key) for key in resolved.services.get(service, {})}
        for name, setting in (settings.settings if settings is not None else {}).items():
            if name not in given and setting.default is not inspect.Parameter.empty and setting.default is not None:
                rows.append((f"{service}.{setting.name}", setting.default, DEFAULT))
    return rows
