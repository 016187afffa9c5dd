"""Names that components of ai-dynamo 0.2 and 0.3 import from `dynamo.sdk.cli.utils`."""

from dynamo.compat.ports import reserve_free_port
from dynamo.sdk.core.runner import TargetEnum

__all__ = ["configure_target_environment", "reserve_free_port"]


def configure_target_environment(target: TargetEnum) -> None:
    """No-op, kept for ai-dynamo 0.3: only one target exists."""
