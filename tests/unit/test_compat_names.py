"""Names that graphs and components of ai-dynamo 0.1 to 0.3 import from `dynamo.sdk.*`, and what stands behind them."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from dynamo.compat.declarations import (
    DynamoConfig,
    DynamoDependency,
    DynamoEndpoint,
    Env,
    KubernetesOverrides,
    LeaseConfig,
    ResourceConfig,
    ServiceConfig,
    ServiceInterface,
)
from dynamo.sdk import api, async_on_start, async_onstart, depends, endpoint, server_context, service
from dynamo.sdk.cli.utils import reserve_free_port
from dynamo.sdk.compat import dynamo_context
from dynamo.sdk.context import ServiceContext, enter_task
from dynamo.sdk.depends import Dependency, Stub
from dynamo.sdk.endpoint import endpoints
from dynamo.sdk.graph import build
from dynamo.sdk.links import EDGES
from dynamo.sdk.spec import spec_of

ROOT = Path(__file__).parents[2]
NAMES = {
    "dynamo.sdk": "AbstractService DYNAMO_IMAGE abstract_endpoint api async_on_shutdown async_on_start async_onstart depends "
    "dynamo_api dynamo_context dynamo_endpoint endpoint get_capi_library_path liveness on_shutdown readiness server_context "
    "service",
    "dynamo.sdk.cli.cli": "cli",
    "dynamo.sdk.cli.utils": "configure_target_environment reserve_free_port",
    "dynamo.sdk.core.decorators.endpoint": "DynamoClient DynamoEndpoint abstract_endpoint api dynamo_endpoint endpoint",
    "dynamo.sdk.core.lib": "DYNAMO_IMAGE depends get_target liveness readiness service set_target",
    "dynamo.sdk.core.protocol.deployment": "Env",
    "dynamo.sdk.core.protocol.interface": "AbstractService ComponentType DependencyInterface DynamoConfig "
    "DynamoEndpointInterface DynamoTransport KubernetesOverrides LeaseConfig LinkedServices ResourceConfig ServiceConfig "
    "ServiceInterface",
    "dynamo.sdk.core.runner": "TargetEnum",
    "dynamo.sdk.lib.config": "ServiceConfig",
    "dynamo.sdk.lib.decorators": "async_on_start async_onstart dynamo_api dynamo_endpoint endpoint on_shutdown",
    "dynamo.sdk.lib.dependency": "DynamoClient DynamoDependency depends",
    "dynamo.sdk.lib.image": "DYNAMO_IMAGE",
    "dynamo.sdk.lib.logging": "configure_server_logging",
    "dynamo.sdk.lib.service": "LeaseConfig LinkedServices service",
    "dynamo.sdk.lib.utils": "get_capi_library_path get_host_port get_system_app_host_port",
    "components.kv_router": "Router",
}
HEAVY = {"grpc", "nats", "fastapi", "vllm", "torch"}


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_every_name_is_there_and_none_is_heavy() -> None:
    program = "\n".join(f"from {module} import {', '.join(names.split())}" for module, names in NAMES.items())
    run = python(f"{program}\nimport sys\nprint(sorted({HEAVY!r} & set(sys.modules)))")
    assert (run.stdout, run.stderr) == ("[]\n", "")


# -- declarations


def test_config_objects_are_taken_for_mappings() -> None:
    @service(
        dynamo=DynamoConfig(namespace="n", component_type="planner", custom_lease=LeaseConfig(ttl=2)),
        resources=cast(Any, ResourceConfig(cpu=cast(Any, 3), gpu=cast(Any, 2))),
        envs=cast(Any, [{"name": "A", "value": 1}, Env(name="B")]),
        workers=cast(Any, "2"),
        image="i",
    )
    class Worker:
        pass

    spec = spec_of(Worker)
    assert (spec.address, spec.component_type, spec.workers) == (("n", "Worker"), "planner", 2)
    assert (spec.resources.gpu, spec.resources.cpu) == (2.0, "3")
    config: ServiceConfig = cast(Any, Worker).config
    assert config.dynamo == DynamoConfig(name="Worker", namespace="n", component_type="planner")
    assert (config.workers, config.image, [(e.name, e.value) for e in config.envs or ()]) == (
        2,
        "i",
        [("A", "1"), ("B", "")],
    )


@pytest.mark.parametrize(("given", "gpu"), [("1", "1"), (4, "4"), (0.5, "0.5"), (None, "0")])
def test_config_resources_are_text(given: Any, gpu: str) -> None:
    @service(resources={"gpu": given, "cpu": 3, "memory": "4Gi"})
    class Worker:
        pass

    config: ServiceConfig = cast(Any, Worker).config
    assert config.resources == ResourceConfig(gpu=gpu, cpu="3", memory="4Gi")


def test_kubernetes_overrides_are_accepted() -> None:
    overrides = KubernetesOverrides(entrypoint="run", cmd=["a"])
    with pytest.warns(UserWarning, match="'kubernetes_overrides' has no effect"):
        service(kubernetes_overrides=overrides)(type("S", (), {}))


def test_services_and_endpoints_are_instances_of_the_types_of_0_3() -> None:
    @service
    class Worker:
        @endpoint
        async def generate(self, request: str) -> str:
            return request

        @api
        async def health(self) -> str:
            return "ok"

        def plain(self) -> None: ...

    assert isinstance(Worker, ServiceInterface)
    assert not isinstance(Worker(), ServiceInterface)
    assert not isinstance(int, ServiceInterface)
    marked = [isinstance(method, DynamoEndpoint) for method in (Worker.generate, Worker.health, Worker.plain)]
    assert marked == [True, True, False]


def test_dynamo_endpoint_marks_a_method() -> None:
    class Worker:
        async def generate(self, request: str) -> str:
            return request

        generate = DynamoEndpoint(generate, name="make/text")

    assert [spec.name for spec in endpoints(Worker).values()] == ["make/text"]


@service
class Backend:
    @endpoint
    async def generate(self, request: str) -> str:
        return request


@service
class Other(Backend):
    pass


@service
class Frontend:
    backend = depends(Backend)
    optional = depends(Other, optional=True)


def test_setting_a_dependency_links_it() -> None:
    before = len(EDGES)
    frontend = cast(Any, Frontend)
    assert set(frontend.dependencies) == {"backend"}
    frontend.dependencies["backend"] = DynamoDependency(Other)
    try:
        graph = build("g", Frontend, [edge for edge in EDGES if edge.graph == __name__])
    finally:
        del EDGES[before:]
    assert graph.targets["Frontend"] == {"backend": Other}


def test_names_that_are_ours() -> None:
    from dynamo.sdk.lib.dependency import DynamoClient

    assert (DynamoClient, DynamoDependency, async_onstart) == (Stub, Dependency, async_on_start)


# -- processes


def test_a_reserved_port_is_taken_until_the_block_ends() -> None:
    with reserve_free_port("127.0.0.1") as port, socket.socket() as other:
        assert 0 < port < 65536
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


async def test_server_context_is_that_of_the_process() -> None:
    assert (server_context.worker_index, server_context.service_name) == (0, "")

    async def inside() -> tuple[int, str]:
        enter_task(ServiceContext("Backend", "n", 2, 3, cast(Any, None), lambda text: None))
        return server_context.worker_index, server_context.service_name

    assert await asyncio.create_task(inside()) == (2, "Backend")
    assert dynamo_context == {}


def test_configure_server_logging_leaves_configured_logging_alone() -> None:
    from dynamo.sdk.lib.logging import configure_server_logging

    assert logging.root.handlers  # pytest's
    before = list(logging.root.handlers)
    configure_server_logging(service_name="Frontend")
    assert logging.root.handlers == before


def test_configure_server_logging_in_a_script() -> None:
    run = python(
        "import logging\nfrom dynamo.sdk.lib.logging import configure_server_logging\n"
        "configure_server_logging('Frontend', 2)\nlogging.getLogger('x').info('here')"
    )
    assert (run.stdout, run.stderr.count("here"), run.stderr.count("Frontend:2")) == ("", 1, 1)


# -- the command line as an object


GRAPH = "tests.compat.graphs.hello_02:Frontend"


def test_the_typer_application_serves() -> None:
    testing = pytest.importorskip("typer.testing")
    from dynamo.sdk.cli.cli import cli

    arguments = ["serve", GRAPH, "--working-dir", str(ROOT), "--Frontend.model=qwen", "--Middle.bias=0.5", "--dry-run"]
    found = testing.CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0, found.output
    assert "Service Configuration:" in found.output
    assert '"model": "qwen"' in found.output


def test_the_typer_application_reports_errors_and_helps() -> None:
    testing = pytest.importorskip("typer.testing")
    from dynamo.sdk.cli.cli import cli

    invoke = testing.CliRunner().invoke
    found = invoke(cli, ["serve", "no_such_module:Frontend", "--dry-run"])
    assert found.exit_code == 1
    assert "error: graph module 'no_such_module' not found" in found.output
    found = invoke(cli, ["serve", "--help"])
    assert found.exit_code == 0
    assert "--Service.key=value" in found.output
    assert invoke(cli, ["--help"]).exit_code == 0


def test_without_typer_the_command_is_clicks() -> None:
    run = python(
        "import sys\nsys.modules['typer'] = None\n"
        "from dynamo.sdk.cli.cli import cli\nfrom click.testing import CliRunner\n"
        f"print(CliRunner().invoke(cli, ['serve', {GRAPH!r}, '--dry-run']).output)"
    )
    assert "Service Configuration:" in run.stdout, run.stderr
