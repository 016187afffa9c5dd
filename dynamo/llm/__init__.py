"""Language models: prompts and tokens, generation messages, the engine protocol, migration, disaggregation.

`from dynamo.llm import KvIndexer` and other names of ai-dynamo 0.1 to 0.3 come from `dynamo.compat.llm`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    from dynamo.compat import (
        llm,
    )  # loads NATS, gRPC and zmq, which code of this project that imports a submodule must not

    try:
        return getattr(llm, name)
    except AttributeError:
        raise AttributeError(f"module 'dynamo.llm' has no attribute {name!r}") from None
