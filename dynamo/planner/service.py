"""`PlannerService`: what every Planner service is, so that a graph may link any of them below its Frontend."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo.config.provenance import canonical
from dynamo.errors import ConfigError
from dynamo.planner.load_rule import LoadLimits, Pace
from dynamo.sdk import AbstractService, async_on_start, on_shutdown, service_context
from dynamo.tasks import TaskSet
from dynamo.worker.environment import RUN_DIR

if TYPE_CHECKING:
    from dynamo.planner.scaling import Scaler

log = logging.getLogger(__name__)

INTERVALS = ("adjustment-interval", "metric-pulling-interval")


class PrometheusService(AbstractService):
    """What a Prometheus beside a Planner is: graphs of ai-dynamo 0.3 link one below their Frontend."""


class PlannerService(AbstractService):
    """Runs a load planner beside the graph. The constructor of a service calls `plan_with`."""

    def plan_with(self, limits: LoadLimits, pace: Pace, *, environment: str, no_operation: bool) -> None:
        """Set what to plan. With `no_operation`, or where nothing can be changed, decisions are only logged."""
        self._limits = limits
        self._pace = pace
        self._environment = environment
        self._no_operation = no_operation
        self._tasks = TaskSet("planner")

    @staticmethod
    def check_settings(settings: Mapping[str, Any], where: Callable[[str], str]) -> None:
        """Validate the intervals, without which the planner would never pause."""
        for key, value in settings.items():
            if canonical(key) in INTERVALS and float(value) <= 0:
                raise ConfigError(f"{where(key)}: expected more than 0, found {value}", hint="give seconds, such as 10")

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        if context is None or context.in_memory:
            return
        # imported here: a dry run needs no NATS
        from dynamo.planner.load_planner import LoadPlanner
        from dynamo.planner.loads import Loads

        loads = Loads(context.runtime)
        planner = LoadPlanner(loads, self._scaler(), self._limits, self._pace, context.namespace)
        self._tasks.keep_running(loads.follow, name="follow instances")
        self._tasks.keep_running(planner.run, name="plan")

    def _scaler(self) -> Scaler | None:
        """Return what changes the numbers of workers; None, with a notice of the reason, if nothing can."""
        from dynamo.planner.scaling import SupervisorClient, path_of

        run_dir = os.environ.get(RUN_DIR)
        if self._no_operation:
            log.info("no-operation: decisions are logged, and no worker is added or removed")
        elif self._environment == "kubernetes":
            log.warning("environment: kubernetes is not supported yet: decisions are logged, and nothing is changed")
        elif not run_dir or not path_of(Path(run_dir)).exists():
            log.warning("no supervisor here: decisions are logged, and nothing is changed; start it with --supervise")
        else:
            return SupervisorClient(Path(run_dir))
        return None

    @on_shutdown
    async def stop(self) -> None:
        await self._tasks.aclose()
