"""Where declarations meet the runtime: a graph becomes processes, with NATS and etcd beneath and a supervisor above."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo.config.merge import Resolved
    from dynamo.config.options import ServeOptions
    from dynamo.sdk.graph import Graph


def run(graph: Graph, resolved: Resolved, options: ServeOptions) -> int:
    """What `dynamo serve` does once the configuration is good. Returns the exit code.

    Raises ConfigError for what can be known before anything starts: too few GPUs, a port that is taken.
    """
    from dynamo.launcher import deployment, guard

    processes = deployment.check(graph, resolved, options)
    if options.service_names and processes == 1 and not (options.supervise or options.reload):
        return deployment.run_alone(graph, resolved, options)
    return guard.guarded(lambda: deployment.run(graph, resolved, options), deployment.report_death)
