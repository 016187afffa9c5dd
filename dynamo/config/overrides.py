"""`--Service.key=value` on the command line, in any of the spellings `--S.k=v`, `--S.k v` and `--S.k = v`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from dynamo.config.merge import ENVS, Layer
from dynamo.config.provenance import KeyPath, Origin
from dynamo.config.yaml_file import scalar
from dynamo.errors import ConfigError

_FLAG = re.compile(r"--(?P<path>[^\W\d]\w*(?:\.[^.=\s]+)+)(?:=(?P<value>.*))?", re.DOTALL)
_NUMBER = re.compile(r"-\.?[0-9]")


class OverrideError(ConfigError):
    """An override without a value: how the command is used is wrong, not what it configures."""

    exit_code = 2


def split(arguments: Iterable[str]) -> tuple[list[Layer], list[str]]:
    """Separate a command line into overrides, one layer each in the order given, and the arguments that are none.

    A value of its own argument may be a negative number; another text that begins with `-` needs `--S.k=-text`, since
    it may as well be the next option. OverrideError where a flag has no value.
    """
    layers: list[Layer] = []
    rest: list[str] = []
    waiting, equals = "", False  # the path of a flag whose value has not come yet; whether its `=` has
    for argument in arguments:
        if waiting and argument == "=" and not equals:
            equals = True
        elif waiting:
            if len(argument) > 1 and argument[0] == "-" and not _NUMBER.match(argument):
                _missing(waiting)
            layers.append(override(waiting, argument))
            waiting, equals = "", False
        elif (flag := _FLAG.fullmatch(argument)) is None:
            rest.append(argument)
        elif flag["value"] is None:
            waiting = flag["path"]
        else:
            layers.append(override(flag["path"], flag["value"]))
    if waiting:
        _missing(waiting)
    return layers, rest


def override(dotted: str, text: str) -> Layer:
    """`override("S.a.b", "1")` sets `{"S": {"a": {"b": 1}}}`; the values of `S.ServiceArgs.envs` stay strings."""
    path = tuple(dotted.split("."))
    value = text if path[1:3] == ENVS and len(path) > 3 else parse_value(text)
    return setting(path, value, f"--{dotted}")


def setting(path: KeyPath, value: Any, source: str) -> Layer:
    """A layer of one value at `path`, which came from `source`."""
    origin = {path[:end]: Origin(source) for end in range(1, len(path) + 1)}
    origin |= {(*path, *below): Origin(source) for below in _keys(value)}
    for key in reversed(path):
        value = {key: value}
    return Layer(value, origin)


def parse_value(text: str) -> Any:
    """JSON where it is JSON, else a YAML scalar (`True`, `~`, `007`), else the text; no text is the empty string."""
    if text == "":
        return ""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return scalar(text)


def _missing(dotted: str) -> NoReturn:
    raise OverrideError(
        f"--{dotted}: a value is missing", hint=f"write --{dotted}=VALUE (a flag is --{dotted}=true or =false)"
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def _keys(value: Any) -> Iterable[KeyPath]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (key,)
            yield from ((key, *below) for below in _keys(item))
