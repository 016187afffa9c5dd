"""`from dynamo.sdk.cli.utils import configure_target_environment`, as scripts of ai-dynamo 0.3 write it."""

from dynamo.sdk.core.runner import TargetEnum


def configure_target_environment(target: TargetEnum) -> None:
    """No-op, kept for ai-dynamo 0.3: only one target exists."""
