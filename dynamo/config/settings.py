"""A service's constructor parameters are its settings: which keys it takes, of which type, with which default.

    class Processor:
        def __init__(self, model: str = "", block_size: int = 64, router: Literal["random", "kv"] = "kv") -> None: ...

takes `model`, `block-size` (or `block_size`) and `router`, and any other key is an error. A class whose constructor has no
parameters declares no settings and takes any key. `**kwargs` takes further keys: any, or those that the class's
`extra_settings` names.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from dynamo.config.merge import COMMON, COMMON_CONFIGS, SERVICE_ARGS, Resolved
from dynamo.config.provenance import KeyPath, Origin, canonical, location, misspelled, preview, suggestion
from dynamo.config.service_args import service_args
from dynamo.config.upstream_keys import Change
from dynamo.errors import ConfigError

RESERVED = (SERVICE_ARGS, COMMON_CONFIGS)
ExtraSettings = Callable[[], Collection[str] | None]
CheckSettings = Callable[[Mapping[str, Any], Callable[[str], str]], None]
UpgradeSetting = Callable[[str, Any, Mapping[str, Any], Collection[str]], Change | None]


@dataclass(frozen=True, slots=True)
class Setting:
    """One constructor parameter. `annotation` is as written; if it is text, it is resolved in `namespace` when needed."""

    name: str
    annotation: Any
    default: Any
    namespace: Mapping[str, Any]

    @property
    def required(self) -> bool:
        """True without a default."""
        return self.default is inspect.Parameter.empty

    def type(self) -> Any:
        """Return the annotation as a type; Any without one, or if it names something imported for type checkers only."""
        if self.annotation is inspect.Parameter.empty:
            return Any
        holder = type("annotated", (), {"__annotations__": {"value": self.annotation}})
        try:
            return typing.get_type_hints(holder, dict(self.namespace), include_extras=True)["value"]
        except (NameError, AttributeError, TypeError, SyntaxError):
            return Any


@dataclass(frozen=True, slots=True)
class DeclaredSettings:
    """The settings that a service class declares."""

    settings: dict[str, Setting]
    """by canonical key"""
    has_kwargs: bool = False
    """the constructor takes `**kwargs`"""
    extra_settings: ExtraSettings | None = None
    """The class's hook: names of further keys, None for any. It may be slow; called only for keys that are no parameter."""
    check_settings: CheckSettings | None = None
    """The class's hook `check_settings(values, where)`: raises ConfigError, with a message that begins with `where(key)`."""
    upgrade_setting: UpgradeSetting | None = None
    """The class's hook `upgrade_setting(key, value, settings, services)`: what becomes of a key of older versions."""

    def takes(self, key: str) -> bool:
        """Return whether the class accepts a key, in either spelling."""
        if canonical(key) in self.settings or key in RESERVED:
            return True
        if self.extra_settings is None:
            return self.has_kwargs
        names = self.extra_settings()
        if names is None:
            return True
        return _engine_flag(key) in map(_engine_flag, names) or canonical(key) in map(canonical, names)

    def names(self, style: str) -> list[str]:
        """Return all keys that are allowed, parameters first, spelled with `_` or `-` as the key `style` is."""
        extra = self.extra_settings() if self.extra_settings else None
        join = "_" if "_" in style else "-"
        names = [*(setting.name for setting in self.settings.values()), *sorted(extra or ())]
        return [*(name.replace("_", join).replace("-", join) for name in names), SERVICE_ARGS]


def declared(cls: type[Any]) -> DeclaredSettings | None:
    """Return the settings of a class, from its own or inherited constructor; None if it declares none and takes any key."""
    if cls.__init__ is object.__init__:
        return None
    constructor = inspect.unwrap(cls.__init__)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    extra: ExtraSettings | None = getattr(cls, "extra_settings", None)
    if not named and not has_kwargs and extra is None:
        return None
    namespace = getattr(constructor, "__globals__", {})
    settings = {canonical(p.name): Setting(p.name, p.annotation, p.default, namespace) for p in named}
    hooks = getattr(cls, "check_settings", None), getattr(cls, "upgrade_setting", None)
    return DeclaredSettings(settings, has_kwargs, extra, *hooks)


def knows(services: Mapping[str, DeclaredSettings | None], service: str, key: str) -> bool:
    """Return whether a service takes a key of `Common`. A service that declares no settings takes any key."""
    if service not in services:
        return False
    found = services[service]
    return key != COMMON_CONFIGS and (found is None or found.takes(key))


def check(resolved: Resolved, services: Mapping[str, DeclaredSettings | None]) -> None:
    """Validate a configuration against the settings of the graph's `services`.

    Raises ConfigError for the first fault, with its source, key and value, and a hint of what is allowed: unknown
    services and keys, wrong types, bad `ServiceArgs`, keys given in both spellings, missing required keys.
    """
    for name, values in resolved.services.items():
        if name not in services:
            choices = [*services, COMMON] if misspelled(name, [COMMON]) else services
            raise ConfigError(
                f"{location(resolved.origins, (name,))}: no such service in the graph",
                hint=suggestion(name, choices, "services"),
            )
        found = services[name]
        if found is not None:
            _check_service(name, values, found, resolved.origins)
        service_args(name, values, resolved.origins)
    for path in resolved.unclaimed:
        names = [key for found in services.values() if found for key in found.names(path[1])]
        raise ConfigError(
            f"{location(resolved.origins, path)}: no service of the graph takes it",
            hint=suggestion(path[1], names, "settings"),
        )
    for name, found in services.items():
        if found is not None:
            _check_required(name, resolved.services.get(name, {}), found, resolved.origins)


def _check_service(
    name: str, values: Mapping[str, Any], found: DeclaredSettings, origins: Mapping[KeyPath, Origin]
) -> None:
    spellings: dict[str, str] = {}
    for key, value in values.items():
        if key in RESERVED:
            continue
        place = partial(location, origins, (name, key))
        if not found.takes(key):
            raise ConfigError(
                f"{place()}: no such setting", hint=suggestion(key, found.names(key), f"settings of {name}")
            )
        if (other := spellings.setdefault(canonical(key), key)) != key:
            raise ConfigError(f"{place()}: already given as {other}", hint="keep one of the two spellings")
        if setting := found.settings.get(canonical(key)):
            convert(setting, value, place)
    if found.check_settings is not None:
        found.check_settings(values, lambda key: location(origins, (name, key)))


def _check_required(
    name: str, values: Mapping[str, Any], found: DeclaredSettings, origins: Mapping[KeyPath, Origin]
) -> None:
    given = set(map(canonical, values))
    for key, setting in found.settings.items():
        if setting.required and key not in given:
            raise ConfigError(
                f"{location(origins, (name, key))}: is required and not given",
                hint=f"add `{key}` below {name} in the file given with -f, or pass --{name}.{key}=VALUE",
            )


def constructor_arguments(cls: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for `cls(...)` from its resolved configuration, converted to the annotated types.

    Reserved keys are left out. Keys that are no parameters are passed as written if the constructor has `**kwargs`
    (`max-num-seqs` stays `max-num-seqs`), else left out: the class reads them from `ServiceConfig`.
    """
    found = declared(cls)
    if found is None:
        return {}
    arguments: dict[str, Any] = {}
    for key, value in config.items():
        if key in RESERVED:
            continue
        setting = found.settings.get(canonical(key))
        if setting is not None:
            arguments[setting.name] = convert(setting, value, partial("{}.{}".format, cls.__name__, key))
        elif found.has_kwargs:
            arguments[key] = value
    return arguments


def convert(setting: Setting, value: Any, place: Callable[[], str]) -> Any:
    """Convert a value to the setting's type: `"5"` to an int, 5 to a string; nothing else changes its kind.

    None fits if it is the default. Raises ConfigError, beginning with `place()`, if the value does not fit.
    """
    if value is None and setting.default is None:
        return None
    wanted = setting.type()
    try:
        try:
            return msgspec.convert(value, wanted, strict=False, dec_hook=_from_text)
        except msgspec.ValidationError:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise
            return msgspec.convert(str(value), wanted, strict=False, dec_hook=_from_text)
    except msgspec.ValidationError as error:
        expected, choices = expectation(wanted)
        example = f", such as {preview(setting.default)}" if isinstance(setting.default, int | float) else ""
        inside = str(error).partition(" - at ")[2].strip("`").removeprefix("$")
        hint = suggestion(str(value), choices, "choices") if choices else f"give {expected}{example}"
        raise ConfigError(
            f"{place()}: expected {expected}, found {preview(value)}{f' (at {inside})' if inside else ''}", hint=hint
        ) from None
    except TypeError:  # msgspec does not support the annotation, such as a union of several custom classes
        return value


def _from_text(wanted: type[Any], value: Any) -> Any:
    return wanted(value) if issubclass(wanted, Path) and isinstance(value, str) else value


def expectation(annotation: Any) -> tuple[str, list[str]]:
    """Describe a type to a user, and return its choices if it is a Literal.

    Examples: `("int or null", [])`, `("one of random, kv", ["random", "kv"])`.
    """
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is typing.Annotated:
        return expectation(arguments[0])
    if origin is Literal:
        choices = [str(choice) for choice in arguments]
        return f"one of {', '.join(choices)}", choices
    if origin in (Union, UnionType):
        parts = [expectation(part) for part in arguments]
        return " or ".join(text for text, _ in parts), [choice for _, choices in parts for choice in choices]
    if annotation in (None, NoneType):
        return "null", []
    if origin is not None:
        return str(annotation).replace("typing.", "").replace("collections.abc.", ""), []
    return getattr(annotation, "__name__", str(annotation)), []


def _engine_flag(key: str) -> str:
    """Return the name of an engine's argument: `no-enable-x` is `enable-x`, `compilation-config.mode` its first part."""
    return canonical(key).removeprefix("no-").partition(".")[0]
