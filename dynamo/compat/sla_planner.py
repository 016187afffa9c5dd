"""The services `dynamo.planner.planner_sla.Planner` and `dynamo.planner.prometheus.Prometheus` of ai-dynamo 0.3."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

from dynamo.compat.planner import LoadPlannerDefaults
from dynamo.planner.load_rule import LoadLimits, Pace
from dynamo.planner.service import PlannerService, PrometheusService
from dynamo.sdk import async_on_start, service
from dynamo.transport.network import METRICS_ADDRESS

log = logging.getLogger(__name__)


@service(
    dynamo={"namespace": "dynamo", "component_type": "planner"}, resources={"cpu": "1", "memory": "1Gi"}, workers=1
)
class Planner(PlannerService):
    """Takes the settings of the SLA planner and plans by the load rule."""

    def __init__(
        self,
        environment: Literal["local", "kubernetes"] = "local",
        backend: Literal["vllm_v0", "vllm_v1"] = "vllm_v0",
        no_operation: bool = False,
        log_dir: str | None = None,
        adjustment_interval: float = 180,
        max_gpu_budget: float = 8,
        min_endpoint: int = 1,
        decode_engine_num_gpu: float = 1,
        prefill_engine_num_gpu: float = 1,
        prometheus_endpoint: str = "http://localhost:9090",
        profile_results_dir: str = "profiling_results",
        isl: int = 3000,
        osl: int = 150,
        ttft: float = 0.5,
        itl: float = 0.05,
        load_predictor: Literal["constant", "arima", "prophet"] = "arima",
        load_prediction_window_size: int = 50,
    ) -> None:
        """Take the budget, the interval and `no_operation`; the other settings are accepted and not used."""
        log.warning(
            "planning by the load rule with its default thresholds on prefill queue and KV usage: ttft, itl, isl, osl, the "
            "profiles and Prometheus are not used"
        )
        limits = LoadLimits(
            max_gpus=max_gpu_budget,
            min_workers=min_endpoint,
            decode_gpus=decode_engine_num_gpu,
            prefill_gpus=prefill_engine_num_gpu,
        )
        pace = Pace(adjustment_interval, LoadPlannerDefaults.metric_pulling_interval)
        self.plan_with(limits, pace, environment=environment, no_operation=no_operation)


@service(dynamo={"namespace": "dynamo"}, workers=1)
class Prometheus(PrometheusService):
    """Takes any configuration of Prometheus and starts no server: `dynamo serve` has a page for one to scrape."""

    def __init__(self, **configuration: Any) -> None:
        self.configuration = configuration

    @async_on_start
    async def start(self) -> None:
        address = os.environ.get(METRICS_ADDRESS)
        where = f"http://{address}/metrics and /metrics/targets" if address else "nowhere: --metrics-port is 0"
        log.info("no Prometheus server is started; metrics for one to scrape: %s", where)
