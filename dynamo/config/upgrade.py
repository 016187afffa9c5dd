"""What a configuration of ai-dynamo 0.1 to 0.3 holds beside today's settings, read as upstream read it, with a notice each.

Sections of services of other graphs have no effect, older keys are replaced or left out. Whatever looks like a
misspelling of a known name stays where it is, so that the check refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo.config.merge import COMMON, COMMON_CONFIGS, SERVICE_ARGS, Layer, Resolved, merge, walk
from dynamo.config.provenance import KeyPath, Notice, Origin, canonical, location, misspelled
from dynamo.config.upstream_keys import OPEN, SERVICES, Change, upstream_key
from dynamo.text import from_json

if TYPE_CHECKING:
    from dynamo.config.settings import DeclaredSettings

UpgradeKey = Callable[[str, str, Any, Mapping[str, Any]], Change | None]
"""by service, key, value and all settings of the service"""


def foreign_sections(layer: Layer, services: Collection[str]) -> tuple[Layer, list[str]]:
    """Find the sections that belong to no service of the graph; what looks misspelled is not among them.

    Returns the layer with a notice for each and without those that are no mappings, and the names of the others.
    """
    values = dict(layer.values)
    foreign: list[str] = []
    notices: list[Notice] = []
    for name, value in layer.values.items():
        if name in services or name == COMMON or _misspells(name, services):
            continue
        notices.append(Notice(f"{location(layer.origins, (name,))}: ignored", _why_foreign(name, value)))
        if isinstance(value, dict):
            foreign.append(name)
        else:
            del values[name]
    return Layer(values, layer.origins, (*layer.notices, *notices)), foreign


def _misspells(name: str, services: Collection[str]) -> bool:
    return name not in SERVICES and misspelled(name, [*services, COMMON]) is not None


def _why_foreign(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return "it is not a section of a service, and nothing reads it; remove it"
    source = SERVICES.get(name)
    return "this graph has no such service" + (f" ({source})" if source else "")


def upgrade_for(services: Mapping[str, DeclaredSettings | None]) -> UpgradeKey:
    """Return the function that says what becomes of a key of one of these services.

    A service that declares no settings takes every key as it is.
    """

    def upgrade(service: str, key: str, value: Any, settings: Mapping[str, Any]) -> Change | None:
        found = services.get(service)
        if found is None or key in (SERVICE_ARGS, COMMON_CONFIGS):
            return None
        change = found.upgrade_setting(key, value, settings, services) if found.upgrade_setting else None
        if change is not None or found.takes(key):
            return change
        change = upstream_key(service, key, value)
        if change is None and service in OPEN and misspelled(key, found.names(key)) is None:
            return Change(OPEN[service])
        if change is None or all(map(found.takes, change.settings)):
            return change
        return Change("ai-dynamo's component of this name had it, this one has not; remove it")

    return upgrade


def upgraded(resolved: Resolved, upgrade: UpgradeKey) -> Resolved:
    """Return a configuration with the older keys of its services replaced, and a notice for each."""
    services: dict[str, dict[str, Any]] = {}
    origins = dict(resolved.origins)
    notices: dict[str, Notice] = {}  # by message: services share the lines of Common, and the first says most
    for name, settings in resolved.services.items():
        changes = {key: upgrade(name, key, value, settings) for key, value in settings.items()}
        given = {canonical(key): key for key in settings if changes[key] is None}
        for key, change in changes.items():
            if change is not None:
                fact = _overridden(resolved.origins, name, key, change, given)
                notice = _notice(resolved.origins, name, key, replace(change, fact=fact) if fact else change)
                notices.setdefault(notice.message, notice)
        services[name] = _changed(name, settings, changes, origins)
    return replace(resolved, services=services, origins=origins, notices=(*resolved.notices, *notices.values()))


def _changed(
    name: str, settings: Mapping[str, Any], changes: Mapping[str, Change | None], origins: dict[KeyPath, Origin]
) -> dict[str, Any]:
    """Return the settings of service `name` with its changes, and add the origins of what is new.

    A value that is given under today's name wins, except over a flag; mappings merge.
    """
    kept = {key: value for key, value in settings.items() if changes[key] is None}
    spellings = {canonical(key): key for key in kept}
    below: dict[str, Any] = {}
    above: dict[str, Any] = {}
    for old, change in changes.items():
        for new, value in change.settings.items() if change is not None else ():
            key = spellings.get(canonical(new), new)
            is_flag = origins[name, old].is_flag
            if key in kept and isinstance(value, Mapping):
                kept[key] = from_json(kept[key])  # engines' flags may be JSON
            if is_flag and not (key in kept and origins[name, key].is_flag):
                above = merge(above, {key: value})
                origins[name, key] = origins[name, old]
            else:
                below = merge(below, {key: value})
                if key not in kept and key not in above:
                    origins[name, key] = origins[name, old]
    merged = merge(merge(below, kept), above)
    for path, _ in walk({name: merged}):
        if path not in origins:
            origins[path] = origins[path[:2]]
    return {key: merged[key] for key in dict.fromkeys([*kept, *merged])}


def _overridden(
    origins: Mapping[KeyPath, Origin], service: str, old: str, change: Change, given: Mapping[str, str]
) -> str:
    """Return the fact that all settings of a key are `given` under today's names and win; else an empty string."""
    is_flag = origins[service, old].is_flag
    keys = [given.get(canonical(new)) for new, value in change.settings.items() if not isinstance(value, Mapping)]
    winners = [key for key in keys if key is not None and (origins[service, key].is_flag or not is_flag)]
    all_lose = bool(winners) and len(winners) == len(change.settings)
    return f"ignored, since {', '.join(winners)} is given" if all_lose else ""


def _notice(origins: Mapping[KeyPath, Origin], service: str, key: str, change: Change) -> Notice:
    shared = origins.get((COMMON, key))
    section = COMMON if shared is not None and shared == origins.get((service, key)) else service
    fact = change.fact or (f"read as {', '.join(change.settings)}" if change.settings else "ignored")
    return Notice(f"{location(origins, (section, key))}: {fact}", change.note)
