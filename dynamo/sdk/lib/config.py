"""`from dynamo.sdk.lib.config import ServiceConfig`, as graphs of ai-dynamo 0.1 to 0.3 write it."""

from dynamo.config.service_config import ServiceConfig

__all__ = ["ServiceConfig"]
