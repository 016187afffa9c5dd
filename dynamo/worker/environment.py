"""Environment variables that a launcher sets for a service process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo.config.service_args import service_args
from dynamo.sdk.spec import spec_of

RUN_DIR = "DYNAMO_RUN_DIR"
RELOAD = "DYNAMO_RELOAD"
"""set if processes report the source files they run, for restarts on edits"""
GPU_SHARE = "DYNAMO_GPU_SHARE"
"""fraction of one GPU's memory for this process, if several share the GPU"""


def namespace_of(cls: type[Any], services: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the namespace that a service registers under; ServiceArgs overrides the decorator."""
    spec = spec_of(cls)
    return service_args(spec.name, services.get(spec.name, {})).namespace or spec.namespace
