"""Settings on the command line: `--Service.key=value`, `--Service.key value` or `--Service.key = value`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from dynamo.config.merge import ENVS, Layer, walk
from dynamo.config.provenance import KeyPath, Origin
from dynamo.config.yaml_file import scalar
from dynamo.errors import ConfigError

_FLAG = re.compile(r"--(?P<path>[^\W\d]\w*(?:\.[^.=\s]+)+)(?:=(?P<value>.*))?", re.DOTALL)
_NUMBER = re.compile(r"-\.?[0-9]")


class OverrideError(ConfigError):
    """An override without a value: a usage error of the command line, hence its exit code."""

    exit_code = 2


def split(arguments: Iterable[str]) -> tuple[list[Layer], list[str]]:
    """Split a command line into overrides, one layer each in the order given, and all other arguments.

    A value that is an argument of its own may be a negative number. Other text that begins with `-` could be the next
    option, so it needs the form `--S.k=-text`. Raises OverrideError if a flag has no value.
    """
    layers: list[Layer] = []
    rest: list[str] = []
    pending = ""  # path of a flag whose value is still to come
    seen_equals = False
    for argument in arguments:
        if pending and argument == "=" and not seen_equals:
            seen_equals = True
        elif pending:
            if len(argument) > 1 and argument[0] == "-" and not _NUMBER.match(argument):
                _fail_without_value(pending)
            layers.append(override(pending, argument))
            pending = ""
            seen_equals = False
        elif (flag := _FLAG.fullmatch(argument)) is None:
            rest.append(argument)
        elif flag["value"] is None:
            pending = flag["path"]
        else:
            layers.append(override(flag["path"], flag["value"]))
    if pending:
        _fail_without_value(pending)
    return layers, rest


def override(dotted: str, text: str) -> Layer:
    """Return the layer of one flag: `override("S.a.b", "1")` sets `{"S": {"a": {"b": 1}}}`.

    Values below `S.ServiceArgs.envs` stay strings.
    """
    path = tuple(dotted.split("."))
    value = text if path[1:3] == ENVS and len(path) > 3 else parse_value(text)
    return setting(path, value, f"--{dotted}")


def setting(path: KeyPath, value: Any, source: str) -> Layer:
    """Return a layer of one value at `path`, which came from `source`."""
    origins = {path[:end]: Origin(source) for end in range(1, len(path) + 1)}
    if isinstance(value, dict):
        origins |= {(*path, *below): Origin(source) for below, _ in walk(value)}
    for key in reversed(path):
        value = {key: value}
    return Layer(value, origins)


def parse_value(text: str) -> Any:
    """Return the value of a text: JSON if it is JSON, else a YAML scalar (`True`, `~`, `007`), else the text itself."""
    if text == "":
        return ""
    try:
        return json.loads(text, parse_constant=_reject_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return scalar(text)


def _fail_without_value(dotted: str) -> NoReturn:
    raise OverrideError(
        f"--{dotted}: a value is missing", hint=f"write --{dotted}=VALUE (a flag is --{dotted}=true or =false)"
    )


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number
