"""The names of `dynamo.planner` of ai-dynamo 0.2 and 0.3, over the supervisor's own scaling."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

from dynamo.errors import ConfigError, DynamoError
from dynamo.planner.scaling import SupervisorClient
from dynamo.tasks import TaskSet
from dynamo.worker.environment import RUN_DIR

log = logging.getLogger(__name__)


class BasePlannerDefaults:
    """Defaults that the planners of 0.3 share."""

    namespace = "dynamo"
    environment = "local"
    backend = "vllm_v0"
    no_operation = False
    log_dir: str | None = None
    adjustment_interval = 180  # s
    max_gpu_budget = 8
    min_endpoint = 1
    decode_engine_num_gpu = 1
    prefill_engine_num_gpu = 1


class LoadPlannerDefaults(BasePlannerDefaults):
    """Defaults of 0.3's load planner."""

    metric_pulling_interval = 10  # s
    decode_kv_scale_up_threshold = 0.9
    decode_kv_scale_down_threshold = 0.5
    prefill_queue_scale_up_threshold = 5.0
    prefill_queue_scale_down_threshold = 0.2


class SLAPlannerDefaults(BasePlannerDefaults):
    """Defaults of 0.3's planner for service level agreements. `isl` and `osl` in tokens, `ttft` and `itl` in seconds."""

    prometheus_endpoint = "http://localhost:9090"
    profile_results_dir = "profiling_results"
    isl = 3000
    osl = 150
    ttft = 0.5
    itl = 0.05
    load_predictor = "arima"
    load_prediction_window_size = 50


class PlannerDefaults(LoadPlannerDefaults):
    """Defaults of 0.2's planner."""

    served_model_name = "vllm"
    adjustment_interval = 10
    metric_pulling_interval = 1


class VllmV0ComponentName:
    """Names in graphs of vLLM's engine V0."""

    prefill_worker = "PrefillWorker"
    prefill_worker_endpoint = "mock"
    decode_worker = "VllmWorker"
    decode_worker_endpoint = "generate"


class VllmV1ComponentName:
    """Names in graphs of vLLM's engine V1."""

    prefill_worker = "VllmPrefillWorker"
    prefill_worker_endpoint = "generate"
    decode_worker = "VllmDecodeWorker"
    decode_worker_endpoint = "generate"


WORKER_COMPONENT_NAMES = {"vllm_v0": VllmV0ComponentName, "vllm_v1": VllmV1ComponentName}


class PlannerConnector(ABC):
    """Adds and removes the workers of a component, one at a time."""

    @abstractmethod
    async def add_component(self, component_name: str, blocking: bool = True) -> bool:
        """Add a worker; return whether one was added, or with `blocking=False` at once."""

    @abstractmethod
    async def remove_component(self, component_name: str, blocking: bool = True) -> bool:
        """Remove a worker; return whether one was removed, or with `blocking=False` at once."""


class LocalConnector(PlannerConnector):
    """Changes the workers of the `dynamo serve` that runs this process. `runtime` is not needed."""

    def __init__(self, namespace: str, runtime: Any = None) -> None:
        self.namespace = namespace
        self.runtime = runtime
        self._scaler = SupervisorClient(Path(os.environ.get(RUN_DIR, "")))
        self._tasks = TaskSet("local connector")

    async def add_component(self, component_name: str, blocking: bool = True) -> bool:
        return await self._run(self._scaler.add(component_name), f"add {component_name}", blocking)

    async def remove_component(self, component_name: str, blocking: bool = True) -> bool:
        return await self._run(self._scaler.remove(component_name), f"remove {component_name}", blocking)

    async def get_state(self) -> dict[str, Any]:
        """Return the workers, in the form of 0.3's state file."""
        components = {}
        for service in await self._scaler.services():
            for worker in service.workers:
                name = f"{service.namespace}_{worker.name.replace(':', '_')}"
                components[name] = {"watcher_name": name, "resources": {"allocated_gpus": worker.gpus}}
        return {"namespace": self.namespace, "components": components}

    async def _run(self, step: Coroutine[Any, Any, Any], what: str, blocking: bool) -> bool:
        async def logged() -> bool:
            try:
                await step
            except DynamoError as error:
                log.warning("cannot %s: %s", what, error.message)
                return False
            return True

        if blocking:
            return await logged()
        self._tasks.spawn(logged(), name=what)
        await asyncio.sleep(0)
        return True


class KubernetesConnector(PlannerConnector):
    """Can be made, as in 0.3; it cannot scale yet."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    async def add_component(self, component_name: str, blocking: bool = True) -> bool:
        _refuse(f"add a {component_name}")

    async def remove_component(self, component_name: str, blocking: bool = True) -> bool:
        _refuse(f"remove a {component_name}")


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"cannot {what}: Kubernetes is not supported yet", hint="set Planner.environment: local")
