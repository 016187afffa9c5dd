"""The processes of a graph, planned from its configuration. Pure, so that a plan can be shown and tested."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo.config.service_args import ServiceArgs, service_args
from dynamo.config.service_config import VARIABLE
from dynamo.errors import ConfigError
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
    workers: list[_Worker] = []
    for name, cls in graph.services.items():
        arguments = service_args(name, services.get(name, {}))
        count = arguments.workers or spec_of(cls).workers
        share = gpu_share(cls, services.get(name, {}), arguments)
        workers += [_Worker(name, cls, number, count, arguments, share) for number in range(1, count + 1)]
    assigned = gpus.assign([(worker.service, worker.gpu_share) for worker in workers], visible_gpus)
    return [
        _process(graph, services, worker, devices, working_dir)
        for worker, devices in zip(workers, assigned, strict=True)
    ]


def plan_another(
    graph: Graph,
    services: Mapping[str, Mapping[str, Any]],
    service: str,
    running: Sequence[ProcessSpec],
    *,
    working_dir: Path,
    visible_gpus: Sequence[str],
) -> ProcessSpec:
    """Return the spec of one more worker of a service, beside the processes that are `running`.

    It gets the lowest number and the GPUs that none of them has. Raises ConfigError if too few GPUs are free.
    """
    cls = graph.services[service]
    arguments = service_args(service, services.get(service, {}))
    used = {process.worker_id for process in running if process.service == service}
    number = next(number for number in itertools.count(1) if number not in used)
    count = max(len(used) + 1, number, 2)  # several, so that the name has the number
    worker = _Worker(service, cls, number, count, arguments, gpu_share(cls, services.get(service, {}), arguments))
    free = _free_gpus(running, visible_gpus)
    devices = gpus.take(free, worker.gpu_share) if worker.gpu_share > 0 else ()
    if devices is None:
        raise ConfigError(
            f"no GPU for one more {service}: {gpus.shortage('it', worker.gpu_share, free)}",
            hint="remove a worker of another service, or give the graph more GPUs in CUDA_VISIBLE_DEVICES",
        )
    return _process(graph, services, worker, devices, working_dir)


def gpus_of(process: ProcessSpec) -> list[str]:
    """Return the ids of the GPUs that a process uses or shares."""
    return [gpu for gpu in process.env["CUDA_VISIBLE_DEVICES"].split(",") if gpu]


def _free_gpus(running: Sequence[ProcessSpec], visible: Sequence[str]) -> dict[str, float]:
    """Return the part of each visible GPU that no running process uses."""
    free = dict.fromkeys(visible, gpus.WHOLE)
    for process in running:
        for gpu in gpus_of(process):
            free[gpu] -= float(process.env.get(GPU_SHARE, gpus.WHOLE))
    return free


def _process(
    graph: Graph, services: Mapping[str, Mapping[str, Any]], worker: _Worker, devices: Sequence[str], working_dir: Path
) -> ProcessSpec:
    return ProcessSpec(
        worker.service,
        worker.number,
        _command(graph, worker),
        _environment(worker, services, devices),
        str(working_dir.resolve()),
        worker.count,
        namespace_of(worker.cls, services),
    )


@dataclass(frozen=True)
class _Worker:
    """Process `number` (from 1) of the `count` of a service; `gpu_share` is a number of GPUs, or below 1 a part of one."""

    service: str
    cls: type[Any]
    number: int
    count: int
    arguments: ServiceArgs
    gpu_share: float


def _command(graph: Graph, worker: _Worker) -> tuple[str, ...]:
    command = (sys.executable, "-m", "dynamo.worker.process", graph.spec, "--service-name", worker.service)
    return (*command, "--worker-id", str(worker.number), "--workers", str(worker.count))


def _environment(worker: _Worker, services: Mapping[str, Mapping[str, Any]], devices: Sequence[str]) -> dict[str, str]:
    environment = {
        VARIABLE: json.dumps(services),
        **spec_of(worker.cls).envs,
        **worker.arguments.envs,
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
    }
    if 0 < worker.gpu_share < gpus.WHOLE:
        environment[GPU_SHARE] = f"{worker.gpu_share:g}"
    return environment


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
            "gpus": gpus_of(process),
            "env": {name: value for name, value in process.env.items() if name not in hidden},
            "cwd": process.cwd,
        }
        for process in processes
    ]
