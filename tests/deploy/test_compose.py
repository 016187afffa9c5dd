"""The compose files: valid, pinned, and what the documents say of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo.launcher.server_kinds import ETCD, NATS
from tests.deploy.container import DEPLOY, METRICS, SERVERS, compose

# Neither a shell nor wget, only the program: Prometheus' scrape is its check.
WITHOUT_HEALTH_CHECK = {"nats-exporter"}
FILES = pytest.mark.parametrize("file", [SERVERS, METRICS], ids=["servers", "metrics"])
SERVICES = [
    pytest.param(name, service, id=name) for name, service in compose(METRICS)["services"].items()
]  # fmt: skip


def published(service: dict[str, Any]) -> set[int]:
    """Return the published ports of the host."""
    return {int(port.split(":")[1]) for port in service.get("ports", ())}


@FILES
def test_they_are_compose_files(file: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    ran = subprocess.run(check, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_schema_rejects_invalid_files(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(SERVERS.read_text().replace("healthcheck:", "healthchecks:"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong)]
    assert subprocess.run(check, capture_output=True).returncode == 1


def test_both_have_the_same_servers_in_one_project() -> None:
    """Compose identifies containers and volumes by project and name: the second file reuses those of the first."""
    servers, metrics = compose(SERVERS), compose(METRICS)
    assert servers["name"] == metrics["name"]
    assert servers["services"].keys() == {"nats", "etcd"}
    assert {name: metrics["services"][name] for name in servers["services"]} == servers["services"]
    assert servers["volumes"].items() <= metrics["volumes"].items()


def test_only_the_gpu_exporter_has_a_profile() -> None:
    profiles = {
        name: service["profiles"] for name, service in compose(METRICS)["services"].items() if "profiles" in service
    }
    assert profiles == {"dcgm-exporter": ["gpu"]}


def test_the_ports_are_those_of_the_readme() -> None:
    told = {
        (row[1], int(row[0]))
        for row in re.findall(r"^\| (\d+) \| ([a-z-]+) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    }
    services = compose(METRICS)["services"]
    opened = {(name, port) for name, service in services.items() for port in published(service)}
    opened |= {("prometheus", 9090), ("grafana", 3001)}  # on the host's network: no list of ports
    assert opened == told
    assert "--web.listen-address=0.0.0.0:9090" in services["prometheus"]["command"]
    grafana = services["grafana"]["environment"]
    assert (grafana["GF_SERVER_HTTP_ADDR"], grafana["GF_SERVER_HTTP_PORT"]) == ("0.0.0.0", "3001")
    assert NATS.port in published(services["nats"])
    assert ETCD.port in published(services["etcd"])


def test_one_variable_sets_the_address_of_all_ports() -> None:
    services = compose(METRICS, {"DYN_BIND_IP": "10.1.2.3"})["services"]
    for service in services.values():
        assert all(port.startswith("10.1.2.3:") for port in service.get("ports", ()))
    prometheus, grafana = services["prometheus"], services["grafana"]
    assert "--web.listen-address=10.1.2.3:9090" in prometheus["command"]
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "10.1.2.3"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://10.1.2.3:9090"
    for service, page in ((prometheus, "9090/-/ready"), (grafana, "3001/api/health")):
        assert service["healthcheck"]["test"][-1] == f"http://10.1.2.3:{page}"


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_a_service_is_pinned_checked_and_restarted(name: str, service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*", service["image"])
    assert service["restart"] == "unless-stopped"
    assert ("healthcheck" in service) == (name not in WITHOUT_HEALTH_CHECK)
    if "healthcheck" in service:
        assert service["healthcheck"]["test"][0] == "CMD"  # CMD-SHELL needs a shell, which etcd's image has not


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_mounted_paths_exist(name: str, service: dict[str, Any]) -> None:
    directory = SERVERS.parent if name in compose(SERVERS)["services"] else METRICS.parent
    volumes = compose(METRICS)["volumes"]
    for mount in service.get("volumes", ()):
        source, *rest = mount.split(":")
        if source.startswith("."):
            assert (directory / source).exists()
            assert rest[1:] == ["ro"]
        else:
            assert source in volumes


def test_every_volume_is_mounted_once() -> None:
    document = compose(METRICS)
    mounted = [mount.split(":")[0] for service in document["services"].values() for mount in service.get("volumes", ())]
    assert sorted(source for source in mounted if not source.startswith(".")) == sorted(document["volumes"])


def test_dependencies_on_health_have_a_health_check() -> None:
    services = compose(METRICS)["services"]
    waits = [(name, on) for name, service in services.items() for on in service.get("depends_on", ())]
    assert waits
    assert all("healthcheck" in services[on] for _, on in waits)


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = DEPLOY / "metrics/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    scrape = yaml.safe_load((DEPLOY / "metrics/prometheus.yml").read_text())
    assert source["url"] == "$PROMETHEUS_URL"
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/dynamo.yml").read_text())["providers"]
    grafana = compose(METRICS)["services"]["grafana"]
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://localhost:9090"
    places = dict(mount.split(":")[:2][::-1] for mount in grafana["volumes"])
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    dashboards = METRICS.parent / places[provider["options"]["path"]]
    assert (dashboards / Path(home).relative_to(provider["options"]["path"])).is_file()
    assert places["/etc/grafana/provisioning"] == "./grafana/provisioning"
