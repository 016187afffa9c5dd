"""Language models: prompts and tokens, generation messages, the engine protocol, migration, disaggregation.

Also a door: `from dynamo.llm import register_llm` and other names of ai-dynamo 0.x come from `dynamo.compat.llm`.
"""

from __future__ import annotations

import importlib
from typing import Any

NAMES_OF_0X = frozenset(
    {
        "HttpAsyncEngine",
        "HttpError",
        "HttpService",
        "ModelType",
        "RouterMode",
        "register_llm",
    }
)


def __getattr__(name: str) -> Any:
    if name in NAMES_OF_0X:
        return getattr(importlib.import_module("dynamo.compat.llm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
