"""A service's constructor parameters are its settings: which keys it takes, of which type, with which default.

    class Processor:
        def __init__(self, model: str = "", block_size: int = 64, router: Literal["random", "kv"] = "kv") -> None: ...

takes `model`, `block-size` (or `block_size`) and `router`, and refuses everything else by name. A class whose
constructor has no parameters declares nothing and takes any key. `**kwargs` takes further keys: any, or those that
the class's `extra_settings` names.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from dynamo.config.merge import COMMON_CONFIGS, SERVICE_ARGS, Resolved
from dynamo.config.provenance import KeyPath, Origin, alike, shown, suggestion, where
from dynamo.config.service_args import service_args
from dynamo.errors import ConfigError

RESERVED = (SERVICE_ARGS, COMMON_CONFIGS)
ExtraSettings = Callable[[], Collection[str] | None]
CheckSettings = Callable[[Mapping[str, Any], Callable[[str], str]], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """One constructor parameter. `annotation` is as written; text is resolved, in `namespace`, when it is needed."""

    name: str
    annotation: Any
    default: Any
    namespace: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def type(self) -> Any:
        """The annotation as a type; Any where there is none, or where it names something imported for checkers only."""
        if self.annotation is inspect.Parameter.empty:
            return Any
        holder = type("annotated", (), {"__annotations__": {"value": self.annotation}})
        try:
            return typing.get_type_hints(holder, dict(self.namespace), include_extras=True)["value"]
        except (NameError, AttributeError, TypeError, SyntaxError):
            return Any


@dataclass(frozen=True, slots=True)
class Declared:
    """The settings of a service class, by alike() form; `further`: the constructor has `**kwargs`.

    `extra_settings` is the class's hook: names of further keys, or None for any. It may be slow, so it is called only
    for a key that is no parameter. `check_settings(values, where)`, a hook too, raises ConfigError for values of further
    keys; its message begins with `where(key)`.
    """

    settings: dict[str, Setting]
    further: bool = False
    extra_settings: ExtraSettings | None = None
    check_settings: CheckSettings | None = None

    def takes(self, key: str) -> bool:
        if alike(key) in self.settings or key in RESERVED:
            return True
        if self.extra_settings is None:
            return self.further
        names = self.extra_settings()
        return names is None or _flag(key) in {_flag(name) for name in names} or alike(key) in map(alike, names)

    def names(self, style: str) -> list[str]:
        """All keys that are allowed, spelled with `_` or `-` as `style` is; parameters first."""
        extra = self.extra_settings() if self.extra_settings else None
        join = "_" if "_" in style else "-"
        names = [*(setting.name for setting in self.settings.values()), *sorted(extra or ())]
        return [*(name.replace("_", join).replace("-", join) for name in names), SERVICE_ARGS]


def declared(cls: type[Any]) -> Declared | None:
    """The settings of a class, from its constructor or the one it inherits; None: it declares none, takes any key."""
    if cls.__init__ is object.__init__:
        return None
    initialise = inspect.unwrap(cls.__init__)
    parameters = list(inspect.signature(initialise).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    further = any(p.kind is p.VAR_KEYWORD for p in parameters)
    extra: ExtraSettings | None = getattr(cls, "extra_settings", None)
    if not named and not further and extra is None:
        return None
    namespace = getattr(initialise, "__globals__", {})
    settings = {alike(p.name): Setting(p.name, p.annotation, p.default, namespace) for p in named}
    return Declared(settings, further, extra, getattr(cls, "check_settings", None))


def knows(services: Mapping[str, Declared | None], service: str, key: str) -> bool:
    """Whether a key of `Common` is for this service. One that declares no settings takes any key."""
    if service not in services:
        return False
    found = services[service]
    return key != COMMON_CONFIGS and (found is None or found.takes(key))


def check(resolved: Resolved, services: Mapping[str, Declared | None]) -> None:
    """ConfigError for the first thing that the graph's `services` cannot take: its source, key, value, what is allowed.

    Unknown services and keys, wrong types, bad `ServiceArgs`, keys given in two spellings, required keys that are
    missing.
    """
    origin = resolved.origin
    for name, values in resolved.services.items():
        if name not in services:
            raise ConfigError(
                f"{where(origin, (name,))}: no such service in the graph",
                hint=suggestion(name, services, "services"),
            )
        found = services[name]
        if found is not None:
            _check_service(name, values, found, origin)
        service_args(name, values, origin)
    for path in resolved.unclaimed:
        names = [key for found in services.values() if found for key in found.names(path[1])]
        raise ConfigError(
            f"{where(origin, path)}: no service of the graph takes it", hint=suggestion(path[1], names, "settings")
        )
    for name, found in services.items():
        given = {alike(key) for key in resolved.services.get(name, {})}
        for key, setting in found.settings.items() if found else ():
            if setting.required and key not in given:
                raise ConfigError(
                    f"{where(origin, (name, key))}: is required and not given",
                    hint=f"add `{key}` below {name} in the file given with -f, or pass --{name}.{key}=VALUE",
                )


def _check_service(name: str, values: Mapping[str, Any], found: Declared, origin: Mapping[KeyPath, Origin]) -> None:
    seen: dict[str, str] = {}
    for key, value in values.items():
        if key in RESERVED:
            continue
        if not found.takes(key):
            raise ConfigError(
                f"{where(origin, (name, key))}: no such setting",
                hint=suggestion(key, found.names(key), f"settings of {name}"),
            )
        if (other := seen.setdefault(alike(key), key)) != key:
            raise ConfigError(
                f"{where(origin, (name, key))}: already given as {other}", hint="keep one of the two spellings"
            )
        if setting := found.settings.get(alike(key)):
            converted(setting, value, lambda: where(origin, (name, key)))  # noqa: B023  (called before the next turn)
    if found.check_settings is not None:
        found.check_settings(values, lambda key: where(origin, (name, key)))


def constructor_arguments(cls: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `cls(...)` from its resolved configuration, converted by annotation.

    Reserved keys are left out, and so are keys that only `ServiceConfig` readers know. With `**kwargs` further keys are
    passed as they are written: `max-num-seqs` stays `max-num-seqs`.
    """
    found = declared(cls)
    if found is None:
        return {}
    arguments: dict[str, Any] = {}
    for key, value in config.items():
        if key in RESERVED:
            continue
        setting = found.settings.get(alike(key))
        if setting is not None:
            arguments[setting.name] = converted(setting, value, lambda: f"{cls.__name__}.{key}")  # noqa: B023
        elif found.further:
            arguments[key] = value
    return arguments


def converted(setting: Setting, value: Any, place: Callable[[], str]) -> Any:
    """`value` as the setting's type. `"5"` is an int where one is wanted and 5 a string; nothing else changes kind.

    ConfigError, beginning with `place()`, where it does not fit. None fits where it is the default.
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
        example = f", such as {shown(setting.default)}" if isinstance(setting.default, int | float) else ""
        inside = str(error).partition(" - at ")[2].strip("`").removeprefix("$")
        hint = suggestion(str(value), choices, "choices") if choices else f"give {expected}{example}"
        raise ConfigError(
            f"{place()}: expected {expected}, found {shown(value)}{f' (at {inside})' if inside else ''}", hint=hint
        ) from None
    except TypeError:  # an annotation that msgspec cannot handle, such as a union with a class of its own
        return value


def _from_text(wanted: type[Any], value: Any) -> Any:
    return wanted(value) if issubclass(wanted, Path) and isinstance(value, str) else value


def expectation(annotation: Any) -> tuple[str, list[str]]:
    """`("int or null", [])`, `("one of random, kv", ["random", "kv"])`: what a type allows, and its choices if few."""
    origin, arguments = get_origin(annotation), get_args(annotation)
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


def _flag(key: str) -> str:
    """An engine argument's name within a key: `no-enable-x` is `enable-x`, `compilation-config.mode` its first part."""
    return alike(key).removeprefix("no-").partition(".")[0]
