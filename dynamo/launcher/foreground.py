"""A component alone, in the foreground: `python -m components.worker -f configs/agg.yaml`, where `breakpoint()` works."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dynamo.config import overrides, yaml_file
from dynamo.config.merge import COMMON, SERVICE_ARGS, Layer, resolve
from dynamo.config.options import ServeOptions
from dynamo.config.settings import check, declared, knows
from dynamo.errors import DynamoError, GraphError
from dynamo.sdk.graph import load
from dynamo.sdk.spec import spec_of


def alone(cls: type[Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a service in this process and terminal, beside a NATS and an etcd that run, until Ctrl-C; the process ends here.

    Arguments are those of `dynamo serve`: `-f FILE` and `--Service.key=value`. Sections of the file for services that
    this one does not know are left out.
    """
    try:
        layers, rest = overrides.split(sys.argv[1:] if argv is None else argv)
        parser = argparse.ArgumentParser(
            description=f"Run {cls.__name__} alone. Any setting can be given as --{cls.__name__}.key=value."
        )
        parser.add_argument("-f", "--config-file", type=Path, metavar="FILE", help="YAML file of settings by service")
        file = parser.parse_args(rest).config_file
        spec = f"{_module(cls)}:{spec_of(cls).name}"
        graph = load(spec)
        services = {name: declared(found) for name, found in graph.services.items()}
        if file is not None:
            layers = [_only(yaml_file.load(file), {*services, COMMON}), *layers]
        layers = [*layers, overrides.setting((cls.__name__, SERVICE_ARGS, "workers"), 1, "python -m")]
        resolved = resolve(layers, services, partial(knows, services))
        mine = {cls.__name__: resolved.services.get(cls.__name__, {})}
        check(replace(resolved, services=mine, unclaimed=()), {cls.__name__: services[cls.__name__]})
        os.environ.pop("DYNAMO_STATUS_FD", None)
        from dynamo.launcher.deployment import run_alone

        run_alone(replace(graph, services={cls.__name__: graph.service(cls.__name__)}), resolved, ServeOptions())
    except DynamoError as error:
        sys.exit(f"error: {error}")
    raise AssertionError("a service alone ends with its process")


def _module(cls: type[Any]) -> str:
    """The importable name of the class's module, which is `__main__` now: its types must have one name in the graph."""
    if cls.__module__ != "__main__":
        return cls.__module__
    main = sys.modules["__main__"]
    found = getattr(main, "__spec__", None)
    if found is not None:
        return str(found.name)
    file = getattr(main, "__file__", None)
    if file is None:
        raise GraphError(f"{cls.__name__} is defined in no file", hint="put it into a module")
    return str(file)


def _only(layer: Layer, names: set[str]) -> Layer:
    values = {name: value for name, value in layer.values.items() if name in names}
    return Layer(values, {path: origin for path, origin in layer.origins.items() if path[0] in names})
