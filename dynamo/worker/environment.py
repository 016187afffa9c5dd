"""The environment that a launcher gives to a service process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo.config.service_args import service_args
from dynamo.sdk.spec import spec_of

RUN_DIR = "DYNAMO_RUN_DIR"
RELOAD = "DYNAMO_RELOAD"
"""set where processes are to say which source files they run"""
GPU_SHARE = "DYNAMO_GPU_SHARE"
"""the part of one GPU's memory that is this process's, where several share it"""


def namespace_of(cls: type[Any], services: Mapping[str, Mapping[str, Any]]) -> str:
    """The namespace under which a service is found: ServiceArgs overrides the decorator."""
    spec = spec_of(cls)
    return service_args(spec.name, services.get(spec.name, {})).namespace or spec.namespace
