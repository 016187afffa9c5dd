"""`ServiceArgs`: the keys below a service that configure its processes; its constructor does not get them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dynamo.config.merge import SERVICE_ARGS
from dynamo.config.provenance import KeyPath, Origin, location, preview, suggestion
from dynamo.errors import ConfigError

KEYS = ("workers", "resources", "envs", "dynamo", "image")
RESOURCES = ("gpu", "cpu", "memory")
DYNAMO = ("namespace", "component_type", "name", "enabled", "custom_lease")

_CPU = re.compile(r"[0-9]+(\.[0-9]+)?m?")
_MEMORY = re.compile(r"[0-9]+(\.[0-9]+)?([kKMGTPE]i?)?B?")


@dataclass(frozen=True, slots=True)
class ServiceArgs:
    """How the processes of one service run. None: not configured, so the value of the decorator applies."""

    workers: int | None = None
    gpu: float | None = None
    """GPUs of each worker, or a fraction of one"""
    cpu: str | None = None
    """cores, such as `2` or `500m`"""
    memory: str | None = None
    """such as `500Mi`"""
    envs: Mapping[str, str] = field(default_factory=dict)
    dynamo: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None

    @property
    def namespace(self) -> str | None:
        return self.dynamo.get("namespace")


def service_args(
    service: str, config: Mapping[str, Any], origins: Mapping[KeyPath, Origin] | None = None
) -> ServiceArgs:
    """Parse the `ServiceArgs` of one service's resolved configuration.

    Raises ConfigError for an unknown key or a bad value.
    """
    reader = _Reader((service, SERVICE_ARGS), origins or {})
    given = reader.section(config.get(SERVICE_ARGS), (), KEYS)
    resources = reader.section(given.get("resources"), ("resources",), RESOURCES)
    dynamo = reader.section(given.get("dynamo"), ("dynamo",), DYNAMO)
    namespace = dynamo.get("namespace")
    if namespace is not None and not (isinstance(namespace, str) and re.fullmatch(r"[\w-]+", namespace)):
        reader.fail(("dynamo", "namespace"), "a name of letters, digits, - and _", namespace)
    image = given.get("image")
    if image is not None and not isinstance(image, str):
        reader.fail(("image",), "the name of an image", image)
    return ServiceArgs(
        workers=reader.workers(given.get("workers")),
        gpu=reader.gpu(resources.get("gpu")),
        cpu=reader.amount(resources.get("cpu"), "cpu", _CPU, 'a number of cores such as 2 or "500m"'),
        memory=reader.amount(resources.get("memory"), "memory", _MEMORY, "a size such as 500Mi or 8Gi"),
        envs=reader.envs(given.get("envs")),
        dynamo=dynamo,
        image=image,
    )


class _Reader:
    """Validates single values. Errors name their source, and their path below `above`."""

    def __init__(self, above: KeyPath, origins: Mapping[KeyPath, Origin]) -> None:
        self.above = above
        self.origins = origins

    def fail(self, path: KeyPath, expected: str, found: Any, hint: str | None = None) -> NoReturn:
        raise ConfigError(
            f"{location(self.origins, (*self.above, *path))}: expected {expected}, found {preview(found)}",
            hint=hint or f"give {expected}",
        )

    def section(self, value: Any, path: KeyPath, keys: tuple[str, ...]) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(path, f"a mapping of {', '.join(keys)}", value)
        for key in value:
            if key not in keys:
                raise ConfigError(
                    f"{location(self.origins, (*self.above, *path, key))}: no such key",
                    hint=suggestion(key, keys, f"keys of {'.'.join((SERVICE_ARGS, *path))}"),
                )
        return value

    def workers(self, value: Any) -> int | None:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            elsewhere = f"to start none here: --depends {self.above[0]}=elsewhere" if value == 0 else None
            self.fail(("workers",), "an int of at least 1", value, elsewhere)
        return value

    def gpu(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (number >= 0 and math.isfinite(number)):
            self.fail(("resources", "gpu"), "a number of GPUs of at least 0", value)
        return number

    def amount(self, value: Any, key: str, pattern: re.Pattern[str], expected: str) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not pattern.fullmatch(str(value)):
            self.fail(("resources", key), expected, value)
        return str(value)

    def envs(self, value: Any) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(("envs",), "a mapping of variables, or a list of {name, value}", value)
        for name, text in value.items():
            if not name or "=" in name or "\0" in f"{name}{text}":
                self.fail(("envs", name), "the name of an environment variable", name)
        return {name: str(text) for name, text in value.items()}
