"""Language models: prompts and tokens, generation messages, the engine protocol, migration, disaggregation.

`from dynamo.llm import KvIndexer` and other names of ai-dynamo 0.1 to 0.3 come from `dynamo.compat.llm`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    # `from dynamo.llm import engine` asks here before it imports the module
    if name.startswith("__") or find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(name)
    from dynamo.compat import llm  # imported here: it needs NATS, which this room does not

    try:
        return getattr(llm, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
