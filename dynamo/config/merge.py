"""Layers of configuration, merged into one: file, environment, overrides; later layers win. `Common` is spread out.

Pure functions: no input is changed, and no output shares a mapping or list with an input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo.config.provenance import KeyPath, Notice, Origin, canonical, location, preview
from dynamo.errors import ConfigError

COMMON = "Common"
COMMON_CONFIGS = "common-configs"
SERVICE_ARGS = "ServiceArgs"
ENVS = (SERVICE_ARGS, "envs")


@dataclass(frozen=True, slots=True)
class Layer:
    """Plain values by service, the origin of each of their keys, mappings included, and what to warn of."""

    values: dict[str, Any]
    origins: dict[KeyPath, Origin]
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolved:
    """The configuration of a graph: the content of `DYNAMO_SERVICE_CONFIG`, and where each part of it came from.

    `services` is plain JSON: `Common` is merged in, `common-configs` removed, `envs` always a mapping. Services and
    keys stand in the order of the file, then in that of the overrides. `origins` has every key path below `services`,
    mappings included. `unclaimed` are keys of `Common` that no service takes; if `common-configs` is used anywhere,
    only those given as flags.
    """

    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    unclaimed: tuple[KeyPath, ...] = ()
    notices: tuple[Notice, ...] = ()
    """what was ignored or read otherwise than it is written"""

    def leaves(self) -> Iterator[tuple[KeyPath, Any, Origin]]:
        """Yield path, value and origin of every value that is not a mapping with keys, in order."""
        for path, value in walk(self.services):
            if len(path) > 1 and not (isinstance(value, dict) and value):
                yield path, value, self.origins[path]


def walk(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key path and its value, a mapping before its content."""
    for key, value in values.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from walk(value, (*above, key))


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; any other value of `upper` replaces that of `lower`. New keys go last.

    `{}` is neutral on both sides. Associative as long as no key is a mapping in one input and not in another.
    """
    merged = {key: copy.deepcopy(value) for key, value in lower.items()}
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def overlay(lower: Layer, upper: Layer) -> Layer:
    """Merge two layers with their origins. Keys of a service that both have keep `lower`'s spelling, `_` or `-`."""
    upper = _respelled(upper, lower)
    values = merge(lower.values, upper.values)
    plain_in_lower = {path for path, value in walk(lower.values) if not isinstance(value, dict)}
    origins: dict[KeyPath, Origin] = {}
    for path, value in walk(values):
        is_merged_mapping = isinstance(value, dict) and path not in plain_in_lower
        first, second = (lower, upper) if is_merged_mapping else (upper, lower)
        origins[path] = first.origins.get(path) or second.origins[path]
    return Layer(values, origins, (*lower.notices, *upper.notices))


def overlay_all(layers: Iterable[Layer]) -> Layer:
    """Merge layers, lowest first."""
    merged = Layer({}, {})
    for layer in layers:
        merged = overlay(merged, _with_env_mappings(layer))
    return merged


def resolve(
    layers: Iterable[Layer],
    services: Iterable[str] = (),
    knows: Callable[[str, str], bool] = lambda service, key: True,
) -> Resolved:
    """Merge `layers`, lowest first, and give each service the keys of `Common` that it claims.

    A service claims the keys that its `common-configs` lists; listed keys that `Common` lacks are skipped. If no service
    lists any key, each service of the layers and of the graph (`services`) claims the keys that it `knows(service, key)`,
    unless its list is there and empty. A service's own keys win over claimed ones (mappings merge), which go first.

    Raises ConfigError if a service is not a mapping, or its `common-configs` not a list of keys.
    """
    merged = overlay_all(layers)
    _require_mappings(merged)
    lists = {name: _common_configs(merged, name) for name in merged.values if name != COMMON}
    has_lists = any(lists.values())
    if has_lists:
        claims = {name: _named_keys(merged, keys or ()) for name, keys in lists.items()}
    else:
        claims = _known_keys(merged, lists, services, knows)
    unclaimed = _unclaimed(merged, claims, flags_only=has_lists)

    resolved: dict[str, dict[str, Any]] = {}
    origins = {path: merged.origins[path] for path in unclaimed}
    for name, keys in claims.items():
        service = _with_common(merged, name, keys)
        resolved[name] = service.values[name]
        origins |= service.origins
    return Resolved(resolved, origins, unclaimed)


def _require_mappings(layer: Layer) -> None:
    for name, value in layer.values.items():
        if not isinstance(value, dict):
            raise ConfigError(
                f"{location(layer.origins, (name,))}: expected a mapping of settings, found {preview(value)}",
                hint=f"write the settings of {name} as `key: value` lines below it",
            )


def _common_configs(layer: Layer, service: str) -> list[str] | None:
    """Return the keys that a service lists in `common-configs`; None if it has no such list."""
    for key, value in layer.values[service].items():
        if canonical(key) == COMMON_CONFIGS:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return list(dict.fromkeys(value))
            raise ConfigError(
                f"{location(layer.origins, (service, key))}: expected a list of keys of {COMMON}, found {preview(value)}",
                hint=f"write {COMMON_CONFIGS}: [model, block-size]",
            )
    return None


def _named_keys(layer: Layer, names: Iterable[str]) -> list[str]:
    """Return the keys of `Common` for names in either spelling, in the order of the names."""
    common = layer.values.get(COMMON, {})
    return [key for name in names for key in common if canonical(key) == canonical(name)]


def _known_keys(
    layer: Layer,
    lists: Mapping[str, list[str] | None],
    services: Iterable[str],
    knows: Callable[[str, str], bool],
) -> dict[str, list[str]]:
    """Return the keys of `Common` that each service knows; `lists` are their `common-configs`, none of which names a key.

    Services of the graph that neither the layers name nor any key is for are left out.
    """
    claims: dict[str, list[str]] = {}
    for name in dict.fromkeys([*lists, *services]):
        declines = lists.get(name) is not None  # `common-configs: []`
        keys = [] if declines else [key for key in layer.values.get(COMMON, {}) if knows(name, key)]
        if keys or name in lists:
            claims[name] = keys
    return claims


def _unclaimed(layer: Layer, claims: Mapping[str, Sequence[str]], *, flags_only: bool) -> tuple[KeyPath, ...]:
    """Return the paths of `Common`'s keys that no service claims.

    `flags_only`: a file with `common-configs` may keep keys in `Common` that no service lists; a flag must have an effect.
    """
    claimed = {key for keys in claims.values() for key in keys}
    paths = [(COMMON, key) for key in layer.values.get(COMMON, {}) if key not in claimed]
    return tuple(path for path in paths if layer.origins[path].is_flag or not flags_only)


def _with_common(layer: Layer, service: str, claimed: Sequence[str]) -> Layer:
    """Return one service with the `claimed` keys of `Common`, those it does not have itself first; no `common-configs`.

    Its own keys win, except over `--Common.key=value`: a flag wins over the files.
    """
    own = layer.values.get(service, {})
    flags = {
        canonical(key)
        for key in claimed
        if layer.origins[COMMON, key].is_flag and not isinstance(layer.values[COMMON][key], dict)
    }
    kept = [
        key
        for key in own
        if canonical(key) != COMMON_CONFIGS and (canonical(key) not in flags or layer.origins[service, key].is_flag)
    ]
    merged = overlay(_select(layer, COMMON, claimed, service), _select(layer, service, kept, service))
    position = {canonical(key): index for index, key in enumerate(own)}
    values = merged.values[service]
    in_order = sorted(values, key=lambda key: position.get(canonical(key), -1))
    return Layer({service: {key: values[key] for key in in_order}}, merged.origins)


def _select(layer: Layer, section: str, keys: Sequence[str], service: str) -> Layer:
    """Return those keys of a section, in their order, as settings of `service`."""
    origins: dict[KeyPath, Origin] = {(service,): layer.origins.get((service,)) or layer.origins[(COMMON,)]}
    for path, origin in layer.origins.items():
        if len(path) > 1 and path[0] == section and path[1] in keys:
            origins[(service, *path[1:])] = origin
    return Layer({service: {key: layer.values[section][key] for key in keys}}, origins)


def _respelled(upper: Layer, lower: Layer) -> Layer:
    """Return `upper` with each setting spelled (`_` or `-`) as `lower` spells it."""
    renamed: dict[KeyPath, str] = {}
    for service, section in upper.values.items():
        known = lower.values.get(service)
        if isinstance(section, dict) and isinstance(known, dict):
            spellings = {canonical(key): key for key in known if key not in section}
            renamed |= {
                (service, key): spellings[canonical(key)]
                for key in section
                if key not in known and canonical(key) in spellings
            }
    if not renamed:
        return upper
    values = {
        service: {renamed.get((service, key), key): value for key, value in section.items()}
        if isinstance(section, dict)
        else section
        for service, section in upper.values.items()
    }
    origins = {
        (path[0], renamed[path[:2]], *path[2:]) if path[:2] in renamed else path: origin
        for path, origin in upper.origins.items()
    }
    return Layer(values, origins, upper.notices)


def _with_env_mappings(layer: Layer) -> Layer:
    """Return the layer with `ServiceArgs.envs` as a mapping of name to text, also if it is a list of `{name, value}`."""
    values = copy.deepcopy(layer.values)
    origins = dict(layer.origins)
    for service, section in values.items():
        arguments = section.get(SERVICE_ARGS) if isinstance(section, dict) else None
        if not isinstance(arguments, dict):
            continue
        envs: Any = arguments.get("envs")
        if isinstance(envs, list) and all(isinstance(e, dict) and e.keys() == {"name", "value"} for e in envs):
            envs = {str(item["name"]): item["value"] for item in envs}
            origins |= {(service, *ENVS, name): origins[service, *ENVS] for name in envs}
        if isinstance(envs, dict):
            arguments["envs"] = {name: _text(value) for name, value in envs.items()}
    return Layer(values, origins, layer.notices)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
