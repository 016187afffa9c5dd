"""The checked configuration of a graph's services, from layers of settings: for all commands that run services."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo.config import overrides
from dynamo.config.merge import COMMON, Layer, Resolved, overlay_all, resolve
from dynamo.config.provenance import Notice, location, misspelled
from dynamo.config.settings import check, knows
from dynamo.config.upgrade import foreign_sections, upgrade_for, upgraded
from dynamo.environment import DEFAULT_HOST
from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from dynamo.config.settings import DeclaredSettings


def default_host_layers(entry: str, services: Mapping[str, DeclaredSettings | None]) -> list[Layer]:
    """Return the lowest layer: DYN_DEFAULT_HOST as the `host` of the entry service, if it declares that setting."""
    host, declared = os.environ.get(DEFAULT_HOST), services[entry]
    if not host or declared is None or "host" not in declared.settings:
        return []
    return [overrides.setting((entry, "host"), host, DEFAULT_HOST)]


def resolve_and_check(
    layers: Iterable[Layer],
    services: Mapping[str, DeclaredSettings | None],
    *,
    only: str | None = None,
    strict: bool = False,
) -> Resolved:
    """Merge `layers`, lowest first, into the configuration of these services, and check it, or that of `only` alone.

    What the services do not read, but what ai-dynamo 0.1 to 0.3 read or ignored, is in `notices`. The result also has
    `Common` and the sections of other services, since code may read them from `ServiceConfig`.

    Raises ConfigError as `check` does, and for the first notice if `strict`.
    """
    merged, foreign = foreign_sections(overlay_all(layers), services)
    upgrade = upgrade_for(services)
    common = merged.values.get(COMMON, {})

    def claims(service: str, key: str) -> bool:
        if any(knows(services, name, key) for name in services):
            return knows(services, service, key)
        return upgrade(service, key, common[key], common) is not None

    resolved = resolve([merged], services, claims)
    sections = resolved.services
    ours = {name: values for name, values in sections.items() if name not in foreign}
    origins = {**merged.origins, **resolved.origins}
    resolved = upgraded(replace(resolved, services=ours, origins=origins, notices=merged.notices), upgrade)
    if foreign:
        resolved = _without_foreign_keys(resolved, services)
    if only is None:
        check(resolved, services)
    else:
        values = {only: resolved.services.get(only, {})}
        check(replace(resolved, services=values, unclaimed=()), {only: services[only]})
    if strict and resolved.notices:
        first = resolved.notices[0]
        raise ConfigError(f"{first.message}, which --strict refuses", hint=first.hint)
    sections = {**({COMMON: common} if common else {}), **sections, **resolved.services}
    return replace(resolved, services=sections)


def _without_foreign_keys(resolved: Resolved, services: Mapping[str, DeclaredSettings | None]) -> Resolved:
    """Turn keys of `Common` that no service takes into notices, in a file that also configures services of other graphs."""
    names = [key for found in services.values() if found is not None for key in found.names("-")]
    refused = tuple(
        path for path in resolved.unclaimed if resolved.origins[path].is_flag or misspelled(path[1], names) is not None
    )
    ignored = [
        Notice(f"{location(resolved.origins, path)}: ignored", "no service of this graph takes it")
        for path in resolved.unclaimed
        if path not in refused
    ]
    return replace(resolved, unclaimed=refused, notices=(*resolved.notices, *ignored))
