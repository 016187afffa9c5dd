"""The checked configuration of a graph's services, from layers of settings: for all commands that run services."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dynamo.config import overrides
from dynamo.config.merge import Layer, Resolved, resolve
from dynamo.config.settings import check, knows
from dynamo.environment import DEFAULT_HOST

if TYPE_CHECKING:
    from dynamo.config.settings import DeclaredSettings


def default_host_layers(entry: str, services: Mapping[str, DeclaredSettings | None]) -> list[Layer]:
    """Return the lowest layer: DYN_DEFAULT_HOST as the `host` of the entry service, if it declares that setting."""
    host, declared = os.environ.get(DEFAULT_HOST), services[entry]
    if not host or declared is None or "host" not in declared.settings:
        return []
    return [overrides.setting((entry, "host"), host, DEFAULT_HOST)]


def resolve_and_check(
    layers: Iterable[Layer], services: Mapping[str, DeclaredSettings | None], *, only: str | None = None
) -> Resolved:
    """Merge `layers`, lowest first, into the configuration of these services, and check it, or that of `only` alone.

    Raises ConfigError as `check` does.
    """
    resolved = resolve(layers, services, partial(knows, services))
    if only is None:
        check(resolved, services)
    else:
        values = {only: resolved.services.get(only, {})}
        check(replace(resolved, services=values, unclaimed=()), {only: services[only]})
    return resolved
