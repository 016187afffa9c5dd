"""`from components.kv_router import Router`, as graphs of ai-dynamo 0.1 to 0.3 write it."""

from components.router import Router

__all__ = ["Router"]
