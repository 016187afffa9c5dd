"""The processes of a graph, planned from its configuration. Pure, so that a plan can be shown and tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamo.config.service_args import ServiceArgs, service_args
from dynamo.config.service_config import VARIABLE
from dynamo.launcher import gpus
from dynamo.launcher.managed_process import ProcessSpec
from dynamo.sdk.graph import Graph
from dynamo.sdk.spec import spec_of
from dynamo.worker.environment import GPU_SHARE, namespace_of


def plan(
    graph: Graph,
    services: Mapping[str, Mapping[str, Any]],
    *,
    working_dir: Path,
    visible_gpus: Sequence[str],
) -> list[ProcessSpec]:
    """Return one spec per process, dependencies first. `services` is the resolved configuration.

    Variables that are known only at the start, such as the addresses of NATS and etcd, are added then. Raises
    ConfigError if there are too few GPUs.
    """
    wanted: list[tuple[str, int, int, ServiceArgs, float]] = []
    for name, cls in graph.services.items():
        arguments = service_args(name, services.get(name, {}))
        workers = arguments.workers or spec_of(cls).workers
        share = gpu_share(cls, services.get(name, {}), arguments)
        wanted += [(name, worker, workers, arguments, share) for worker in range(1, workers + 1)]
    given = gpus.assign(((name, share) for name, _, _, _, share in wanted), visible_gpus)
    processes: list[ProcessSpec] = []
    for (name, worker, workers, arguments, share), devices in zip(wanted, given, strict=True):
        env = {
            VARIABLE: json.dumps(services),
            **spec_of(graph.services[name]).envs,
            **arguments.envs,
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
        }
        if 0 < share < gpus.WHOLE:
            env[GPU_SHARE] = f"{share:g}"
        argv = [sys.executable, "-m", "dynamo.worker.process", graph.spec, "--service-name", name]
        argv += ["--worker-id", str(worker), "--workers", str(workers)]
        namespace, cwd = namespace_of(graph.services[name], services), str(working_dir.resolve())
        processes.append(ProcessSpec(name, worker, tuple(argv), env, cwd, workers, namespace))
    return processes


def gpu_share(cls: type[Any], settings: Mapping[str, Any], arguments: ServiceArgs) -> float:
    """Return the GPUs of one worker: by ServiceArgs, else computed by the class from its settings, else by its decorator."""
    if arguments.gpu is not None:
        return arguments.gpu
    needed = getattr(cls, "gpus_needed", None)
    return float(needed(settings)) if needed is not None else spec_of(cls).resources.gpu


def describe(processes: Sequence[ProcessSpec]) -> list[dict[str, Any]]:
    """Return what `--dry-run` shows of each process: name, command, GPUs, and the variables added to the caller's."""
    hidden = (VARIABLE, "CUDA_VISIBLE_DEVICES")
    return [
        {
            "name": process.name,
            "command": " ".join(("python", *process.argv[1:])),
            "gpus": [gpu for gpu in process.env["CUDA_VISIBLE_DEVICES"].split(",") if gpu],
            "env": {name: value for name, value in process.env.items() if name not in hidden},
            "cwd": process.cwd,
        }
        for process in processes
    ]
