"""Planner: changes the number of workers with the load, by the rule and the settings of ai-dynamo 0.3's load planner."""

from __future__ import annotations

from typing import Literal

from dynamo.planner.load_rule import LoadLimits, Pace
from dynamo.planner.service import PlannerService
from dynamo.sdk import service


@service(
    dynamo={"namespace": "dynamo", "component_type": "planner"}, resources={"cpu": "1", "memory": "1Gi"}, workers=1
)
class Planner(PlannerService):
    """Adds and removes VllmWorkers and PrefillWorkers of the graph that links it."""

    def __init__(
        self,
        environment: Literal["local", "kubernetes"] = "local",
        no_operation: bool = False,
        log_dir: str | None = None,
        served_model_name: str | None = None,
        adjustment_interval: float = 180,
        metric_pulling_interval: float = 10,
        max_gpu_budget: float = 8,
        min_endpoint: int = 1,
        decode_kv_scale_up_threshold: float = 0.9,
        decode_kv_scale_down_threshold: float = 0.5,
        prefill_queue_scale_up_threshold: float = 5.0,
        prefill_queue_scale_down_threshold: float = 0.2,
        decode_engine_num_gpu: float = 1,
        prefill_engine_num_gpu: float = 1,
    ) -> None:
        """
        Args:
            environment: where workers are added: local, by the `dynamo serve` that runs this process, or kubernetes.
            no_operation: log the decisions and change nothing.
            log_dir: directory for TensorBoard files in ai-dynamo 0.3; not used, /metrics has the numbers.
            served_model_name: not used, as in ai-dynamo 0.3.
            adjustment_interval: seconds between two decisions.
            metric_pulling_interval: seconds between two readings of the load.
            max_gpu_budget: GPUs that all workers together may use.
            min_endpoint: workers of each service that are always kept.
            decode_kv_scale_up_threshold: mean KV cache usage, 0 to 1, above which a VllmWorker is added.
            decode_kv_scale_down_threshold: mean KV cache usage below which a VllmWorker is removed.
            prefill_queue_scale_up_threshold: waiting prompts for each PrefillWorker above which one is added.
            prefill_queue_scale_down_threshold: waiting prompts for each PrefillWorker below which one is removed.
            decode_engine_num_gpu: GPUs of one VllmWorker, in the budget.
            prefill_engine_num_gpu: GPUs of one PrefillWorker, in the budget.
        """
        limits = LoadLimits(
            max_gpus=max_gpu_budget,
            min_workers=min_endpoint,
            decode_kv_up=decode_kv_scale_up_threshold,
            decode_kv_down=decode_kv_scale_down_threshold,
            prefill_queue_up=prefill_queue_scale_up_threshold,
            prefill_queue_down=prefill_queue_scale_down_threshold,
            decode_gpus=decode_engine_num_gpu,
            prefill_gpus=prefill_engine_num_gpu,
        )
        pace = Pace(adjustment_interval, metric_pulling_interval)
        self.plan_with(limits, pace, environment=environment, no_operation=no_operation)
