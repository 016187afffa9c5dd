"""`dynamo.sdk.core.lib` of ai-dynamo 0.3."""

from dynamo.sdk.core.runner import TargetEnum
from dynamo.sdk.depends import depends
from dynamo.sdk.endpoint import liveness, readiness
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.lib.image import DYNAMO_IMAGE
from dynamo.sdk.service import service

__all__ = [
    "DYNAMO_IMAGE",
    "abstract_endpoint",
    "depends",
    "get_target",
    "liveness",
    "readiness",
    "service",
    "set_target",
]


def set_target(target: object) -> None:
    """No-op, kept for ai-dynamo 0.3: only one target exists."""


def get_target() -> TargetEnum:
    """Return the only target."""
    return TargetEnum.DYNAMO
