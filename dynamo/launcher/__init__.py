"""The parent side of `dynamo serve`: a graph becomes processes, with NATS and etcd below and a supervisor above."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo.config.merge import Resolved
    from dynamo.config.options import ServeOptions
    from dynamo.sdk.graph import Graph


def run(graph: Graph, resolved: Resolved, options: ServeOptions) -> int:
    """Run a graph with a checked configuration until it ends; return the exit code of `dynamo serve`.

    Raises ConfigError for what can be known before anything starts: too few GPUs, a port that is taken.
    """
    from dynamo.launcher import deployment, foreground, guard
    from dynamo.launcher.serve_plan import check_ports, make_plan

    plan = make_plan(graph, resolved, options)
    check_ports(plan)
    if options.service_names and len(plan.processes) == 1 and not (options.supervise or options.reload):
        foreground.run_in_foreground(plan)
    return guard.guarded(lambda: deployment.run(plan), deployment.report_death)
