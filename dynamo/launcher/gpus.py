"""The GPUs of this machine, and their assignment to workers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence

from dynamo.errors import ConfigError

WHOLE = 1.0
SLACK = 1e-4
"""the environment has the part of a GPU with six digits"""


def visible(environment: str | None = None) -> list[str]:
    """Return ids for CUDA_VISIBLE_DEVICES: those of the inherited list, else one for each GPU that NVML counts.

    Empty without a driver. NVML is called directly: two functions are not worth a dependency.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES") if environment is None else environment
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() and part.strip() != "-1"]
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0
    finally:
        nvml.nvmlShutdown()
    return [] if failed else [str(index) for index in range(count.value)]


def assign(requests: Iterable[tuple[str, float]], gpus: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the GPUs for each request, (name, number of GPUs), in order. Requests below 1 share a GPU if they fit.

    Raises ConfigError if there are too few.
    """
    requests = list(requests)
    free = dict.fromkeys(gpus, WHOLE)
    assigned: list[tuple[str, ...]] = []
    for name, wanted in requests:
        if wanted <= 0:
            assigned.append(())
            continue
        found = take(free, wanted)
        if found is None:
            total = sum(w for _, w in requests)
            raise ConfigError(
                f"{shortage(name, wanted, free)}; the graph needs {total:g} in all",
                hint="lower ServiceArgs.workers or resources.gpu, or run without a GPU: -f configs/agg_tiny.yaml",
            )
        assigned.append(found)
    return assigned


def take(free: dict[str, float], wanted: float) -> tuple[str, ...] | None:
    """Take `wanted` GPUs, above 0, out of `free`, the part of each GPU that is free; None if they do not fit."""
    if wanted < WHOLE:
        fits = [gpu for gpu, left in free.items() if left >= wanted - SLACK][:1]
    else:
        fits = [gpu for gpu, left in free.items() if left >= WHOLE - SLACK][: int(wanted)]
    if len(fits) < max(1, int(wanted)):
        return None
    for gpu in fits:
        free[gpu] -= min(wanted, WHOLE)
    return tuple(fits)


def shortage(name: str, wanted: float, free: Mapping[str, float]) -> str:
    """Describe that `name` needs more GPUs than are free."""
    whole = sum(left >= WHOLE - SLACK for left in free.values())
    return f"{name} needs {wanted:g} GPU{'s' if wanted > 1 else ''}, {whole} of {len(free)} are free"
