"""`from dynamo.sdk.lib.logging import configure_server_logging`, as in ai-dynamo 0.1 and 0.2."""

from dynamo.compat.logging import configure_server_logging

__all__ = ["configure_server_logging"]
