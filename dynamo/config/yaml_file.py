"""YAML configuration files, read with the line of every key.

Values follow YAML 1.2's core schema rather than PyYAML's 1.1. Only `true` and `false` are booleans: `on`, `off`,
`yes` and `no` are strings, as keys and as values. `1e-5` is a number; `12:30` and `2026-01-31` are strings. So are `.inf`
and `.nan`, because JSON cannot carry them. Keys are always the text in the file. Values below `ServiceArgs.envs` keep
their text as well, since environment variables are strings: `A: 007` is `"007"`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dynamo.config.merge import ENVS, Layer
from dynamo.config.provenance import KeyPath, Notice, Origin, location, preview
from dynamo.errors import ConfigError

MAX_DEPTH = 50
"""libyaml composes by recursion and overruns the stack of the process if a file is nested deeply."""
_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
}
_BASES = {"0o": 8, "0x": 16}

# PyYAML's C loader where it is installed; made by `type` to replace the inherited resolvers by the patterns above.
_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {"yaml_implicit_resolvers": {}})
for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, None)


def scalar(text: str) -> Any:
    """Return the value of a plain YAML scalar. Text of no other kind, and a number too large for a float, stay strings."""
    for kind, pattern in _PATTERNS.items():
        if pattern.match(text):
            try:
                return _value(kind, text)
            except ValueError:
                return text
    return text


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind not in _PATTERNS or not _PATTERNS[kind].match(text):
        raise ValueError(f"{text!r} is not a valid {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, _BASES.get(text[:2], 10))
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number


def load(path: Path) -> Layer:
    """Read a file of `Service: {key: value}`. An empty file is an empty layer, a service without keys is `{}`.

    Of a key that is given twice the last one counts, with a notice. Raises ConfigError, with the line, if the file cannot
    be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="check the path given with -f") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Layer:
    """Parse the text of a file called `name`, as `load` does."""
    try:
        _check_depth(text, name)
        return _NodeReader(name).read(yaml.compose(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        column = f" (column {mark.column + 1})" if mark else ""
        facts = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            f"{name}{line}: not valid YAML: {facts}{column}", hint="check indentation, colons and quotes near that line"
        ) from None
    except yaml.YAMLError as error:
        facts = " ".join(str(error).split())
        raise ConfigError(f"{name}: not valid YAML: {facts}", hint="remove the characters that YAML forbids") from None


def _check_depth(text: str, name: str) -> None:
    """Raise ConfigError if a document is nested deeper than MAX_DEPTH."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(
                f"{name}:{line}: nested deeper than {MAX_DEPTH} levels",
                hint="close the brackets and braces that are open there",
            )


class _NodeReader:
    """Turns the nodes of one document into plain values, and records the line of every key in `origins`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: dict[KeyPath, Origin] = {}
        self.notices: dict[Notice, None] = {}  # an ordered set: a mapping with an alias is read several times
        self.ancestors: list[yaml.Node] = []

    def read(self, root: yaml.Node | None) -> Layer:
        """Return the layer of a document, None being an empty one."""
        if root is None:
            return Layer({}, {})
        if not isinstance(root, yaml.MappingNode):
            found = "a list" if isinstance(root, yaml.SequenceNode) else preview(self.value(root, ()))
            if found == "null":
                return Layer({}, {})
            self.fail(
                root, (), f"expected a mapping of services, found {found}", "write `Service:` and its keys below it"
            )
        values = self.mapping(root, ())
        return Layer(
            {key: {} if value is None else value for key, value in values.items()}, self.origins, tuple(self.notices)
        )

    def fail(self, node: yaml.Node, path: KeyPath, fact: str, hint: str) -> NoReturn:
        """Raise ConfigError with the line of a node."""
        dotted = f" {'.'.join(path)}" if path else ""
        raise ConfigError(f"{self.name}:{node.start_mark.line + 1}{dotted}: {fact}", hint=hint)

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of any node. `ancestors` finds an alias to a mapping inside itself, which has no value."""
        if any(node is ancestor for ancestor in self.ancestors):
            raise ConfigError(
                f"{location(self.origins, path)}: an alias refers to the mapping it stands in",
                hint="write the value out",
            )
        if node.tag.removeprefix(_TAG) not in (*_PATTERNS, "str", "map", "seq"):
            self.fail(node, path, f"the tag {node.tag} is not supported", "write a plain value")
        self.ancestors.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.ancestors.pop()

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a scalar, or its text below `ServiceArgs.envs`."""
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if path[1:3] == ENVS and len(path) > 3:
            return text
        try:
            return _value(kind, text)
        except ValueError as error:
            self.fail(node, path, str(error), "quote it to keep it as text")

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """Return a mapping, with what its merge keys (`<<`) add."""
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        inherited: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail(key_node, path, "a key must be text, found a mapping or a list", "write `key: value`")
            key: str = key_node.value
            if key == "<<" and key_node.style not in ("'", '"'):
                inherited += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                self.replace((*path, key), lines[key], line)
            lines[key] = line
            self.origins[(*path, key)] = Origin(f"{self.name}:{line}")
            values[key] = self.value(value_node, (*path, key))
        for source in inherited:
            self.inherit(values, source, path)
        return values

    def replace(self, path: KeyPath, before: int, line: int) -> None:
        """Forget the value that a key was given at the line `before`, with a notice."""
        place = f"{self.name}:{line} {'.'.join(path)}"
        notice = Notice(f"{place}: already given at line {before}, which is ignored", "keep one of the two lines")
        self.notices[notice] = None
        self.origins = {p: origin for p, origin in self.origins.items() if p[: len(path)] != path}

    def inherit(self, values: dict[str, Any], source: yaml.Node, path: KeyPath) -> None:
        """Add the keys of `source` that `values` lacks, with their own lines: YAML's merge key `<<: *anchor`."""
        if not isinstance(source, yaml.MappingNode):
            self.fail(source, path, "`<<` takes a mapping", "write `<<: *name` with the name of an anchored mapping")
        before = dict(self.origins)
        for key, value in self.value(source, path).items():
            if key not in values:
                values[key] = value
                continue
            # The mapping's own key wins: restore the lines that reading `source` has replaced.
            below = (*path, key)
            self.origins = {p: o for p, o in self.origins.items() if p[: len(below)] != below}
            self.origins |= {p: o for p, o in before.items() if p[: len(below)] == below}
