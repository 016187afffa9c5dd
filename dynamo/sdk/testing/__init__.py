"""Tests of services without servers: doubles for dependencies, and whole graphs in memory.

    async def test_the_router_takes_the_idle_worker() -> None:
        router = Router()
        bind(router, worker=pool(Worker(), Worker()))          # instances 1 and 2
        assert await router.route("hello") == 1

    async def test_the_graph_says_hello() -> None:
        async with TestGraph("graphs.hello_world:Frontend") as graph:
            assert await graph.client(Middle).greet("Ada") == "Hello Ada"

With `TestGraph(..., real=True)` the same test runs on real processes, NATS and etcd.
"""

from dynamo.sdk.testing.doubles import InstanceCall, calls, double, lose, pool
from dynamo.sdk.testing.graph import TestGraph

__all__ = ["InstanceCall", "TestGraph", "calls", "double", "lose", "pool"]
