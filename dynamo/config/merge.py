"""Layers of configuration, lowest first: file, environment, overrides; merged into one, with `Common` spread out.

Pure functions: no input is changed, and no output shares a mapping or list with an input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo.config.provenance import KeyPath, Origin, alike, shown, where
from dynamo.errors import ConfigError

COMMON = "Common"
COMMON_CONFIGS = "common-configs"
SERVICE_ARGS = "ServiceArgs"
ENVS = (SERVICE_ARGS, "envs")


@dataclass(frozen=True, slots=True)
class Layer:
    """Plain values by service, and where each of their keys (mappings too) came from."""

    values: dict[str, Any]
    origin: dict[KeyPath, Origin]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The configuration of a graph: what `DYNAMO_SERVICE_CONFIG` carries, and where each part came from.

    `services` is plain JSON: `Common` merged in, `common-configs` removed, `envs` always a mapping; services and keys
    in the order of the file, then those of overrides. `origin` has every key path below it, mappings included.
    `unclaimed` are keys of `Common` that no service takes; with lists, those of flags only.
    """

    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    origin: dict[KeyPath, Origin] = field(default_factory=dict)
    unclaimed: tuple[KeyPath, ...] = ()

    def leaves(self) -> Iterator[tuple[KeyPath, Any, Origin]]:
        """Every value that is not a mapping with keys, in order, with its origin."""
        for path, value in walk(self.services):
            if len(path) > 1 and not (isinstance(value, dict) and value):
                yield path, value, self.origin[path]


def walk(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key path and its value, a mapping before what is in it."""
    for key, value in values.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from walk(value, (*above, key))


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; of anything else `upper`'s replaces `lower`'s whole. New keys go last.

    `{}` is neutral on both sides. Associative as long as no key is a mapping in one input and not in another.
    """
    merged = {key: copy.deepcopy(value) for key, value in lower.items()}
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else copy.deepcopy(value)
        )
    return merged


def overlay(lower: Layer, upper: Layer) -> Layer:
    """`merge` with provenance. `upper`'s `S.block_size` replaces `lower`'s `S.block-size`, in `lower`'s spelling."""
    upper = _respelled(upper, lower)
    values = merge(lower.values, upper.values)
    replaced = {path for path, value in walk(lower.values) if not isinstance(value, dict)}
    origin: dict[KeyPath, Origin] = {}
    for path, value in walk(values):
        first, second = (lower, upper) if isinstance(value, dict) and path not in replaced else (upper, lower)
        origin[path] = first.origin.get(path) or second.origin[path]
    return Layer(values, origin)


def resolve(
    layers: Iterable[Layer],
    services: Iterable[str] = (),
    knows: Callable[[str, str], bool] = lambda service, key: True,
) -> Resolved:
    """Merge `layers`, lowest first, and give each service what it takes of `Common`.

    A service takes the keys that its `common-configs` lists, in that order, before its own; its own keys win
    (mappings merge). Listed keys that `Common` lacks are skipped. Where no service lists any key, each of the file's
    and the graph's `services` takes the keys that it `knows(service, key)`, unless its list is there and empty.
    ConfigError where a service is not a mapping.
    """
    whole = Layer({}, {})
    for layer in layers:
        whole = overlay(whole, _with_env_mappings(layer))
    for name, value in whole.values.items():
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where(whole.origin, (name,))}: expected a mapping of settings, found {shown(value)}",
                hint=f"write the settings of {name} as `key: value` lines below it",
            )
    common = whole.values.get(COMMON, {})
    own = {name: value for name, value in whole.values.items() if name != COMMON}
    listed = {name: _listed(whole, name) for name in own}
    unclaimed: tuple[KeyPath, ...] = ()
    if common and not any(listed.values()):
        names = list(dict.fromkeys([*own, *services]))
        known = {name: [key for key in common if listed.get(name) is None and knows(name, key)] for name in names}
        unclaimed = tuple((COMMON, key) for key in common if not any(key in keys for keys in known.values()))
        listed = {name: keys for name, keys in known.items() if keys or name in own}
    else:
        wanted = {alike(key) for keys in listed.values() for key in keys or ()}
        unclaimed = tuple((COMMON, k) for k in common if whole.origin[COMMON, k].is_flag and alike(k) not in wanted)

    resolved: dict[str, dict[str, Any]] = {}
    origin: dict[KeyPath, Origin] = {path: whole.origin[path] for path in unclaimed}
    for name, keys in listed.items():
        taken = [key for listed_key in keys or () for key in common if alike(key) == alike(listed_key)]
        service = _with_common(whole, name, taken)
        resolved[name] = service.values[name]
        origin |= service.origin
    return Resolved(resolved, origin, unclaimed)


def _with_common(whole: Layer, name: str, taken: Iterable[str]) -> Layer:
    """One service: the keys `taken` from `Common` that it does not have itself, then its own; no `common-configs`.

    `--Common.key=value` wins over the service's own value from a file, as every flag does.
    """
    own = {key: value for key, value in whole.values.get(name, {}).items() if alike(key) != COMMON_CONFIGS}
    position = {alike(key): index for index, key in enumerate(own)}
    common = {key: whole.values[COMMON][key] for key in taken}
    flags = {alike(key) for key in common if whole.origin[COMMON, key].is_flag and not isinstance(common[key], dict)}
    own = {k: value for k, value in own.items() if alike(k) not in flags or whole.origin[name, k].is_flag}
    upper = {p: o for p, o in whole.origin.items() if p[0] == name and (len(p) == 1 or p[1] in own)}
    lower = {(name, *path[1:]): o for path, o in whole.origin.items() if path[0] == COMMON}
    lower |= {path: o for path, o in upper.items() if path == (name,)}
    merged = overlay(Layer({name: common}, lower), Layer({name: own}, upper))
    in_order = sorted(merged.values[name], key=lambda key: position.get(alike(key), -1))
    return Layer({name: {key: merged.values[name][key] for key in in_order}}, merged.origin)


def _respelled(upper: Layer, lower: Layer) -> Layer:
    """`upper` with settings of a service renamed to the spelling (`_` or `-`) that `lower` has for them."""
    renamed: dict[KeyPath, str] = {}
    values = dict(upper.values)
    for service, section in upper.values.items():
        known = lower.values.get(service)
        if not isinstance(section, dict) or not isinstance(known, dict):
            continue
        spelling = {alike(key): key for key in known if key not in section}
        for key in section:
            if key not in known and (name := spelling.get(alike(key))):
                renamed[service, key] = name
        values[service] = {renamed.get((service, key), key): value for key, value in section.items()}
    origin = {
        (*path[:1], renamed[path[:2]], *path[2:]) if path[:2] in renamed else path: source
        for path, source in upper.origin.items()
    }
    return Layer(values, origin)


def _with_env_mappings(layer: Layer) -> Layer:
    """`ServiceArgs.envs` as a mapping of name to text, also where it is given as a list of `{name, value}`."""
    values, origin = copy.deepcopy(layer.values), dict(layer.origin)
    for service, section in values.items():
        arguments = section.get(SERVICE_ARGS) if isinstance(section, dict) else None
        given: Any = arguments.get("envs") if isinstance(arguments, dict) else None
        if isinstance(given, list) and all(
            isinstance(item, dict) and item.keys() == {"name", "value"} for item in given
        ):
            given = {str(item["name"]): item["value"] for item in given}
            origin |= {(service, *ENVS, name): origin[service, *ENVS] for name in given}
        if isinstance(arguments, dict) and isinstance(given, dict):
            arguments["envs"] = {name: _text(value) for name, value in given.items()}
    return Layer(values, origin)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(whole: Layer, name: str) -> list[str] | None:
    """The keys that a service asks for in `common-configs`; None where it has no such list."""
    for key, value in whole.values[name].items():
        if alike(key) == COMMON_CONFIGS:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return list(dict.fromkeys(value))
            raise ConfigError(
                f"{where(whole.origin, (name, key))}: expected a list of keys of {COMMON}, found {shown(value)}",
                hint=f"write {COMMON_CONFIGS}: [model, block-size]",
            )
    return None
