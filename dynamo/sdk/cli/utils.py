"""`from dynamo.sdk.cli.utils import configure_target_environment`, as scripts of ai-dynamo 0.3 write it."""

from dynamo.sdk.core.runner import TargetEnum


def configure_target_environment(target: TargetEnum) -> None:
    """Nothing: there is one target, and `@service` works without it."""
