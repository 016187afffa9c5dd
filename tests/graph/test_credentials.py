"""Credentials, in addresses or variables, open NATS and etcd, and reach neither clients nor logs, whatever happens."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from dynamo.errors import ConfigError, TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.transport.etcd import Etcd
from dynamo.transport.nats import Nats
from tests.cli.terminal import COMMAND, ROOT, command, environment
from tests.guarded import etcd_with, nats_with
from tests.ports import free_port
from tests.served import Served

USER, PASSWORD = "ann", "sekret"


def secret(url: str) -> str:
    return url.replace("//", f"//{USER}:{PASSWORD}@")


class Joined(Served):
    """A graph beside servers that run already, with all that its processes log."""

    def __init__(self, log: Path, servers: dict[str, str]) -> None:
        self.port, self.log, self.started, self._seen = free_port(), log, 0.0, set()
        arguments = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "-p", str(self.port)]
        env = servers | {
            "DYN_REQUEST_PLANE": "nats",
            "DYN_LOG": "debug",
            "DYN_METRICS_PORT": "0",
            "TMPDIR": str(log.parent),
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], cwd=ROOT, env=environment(**env), stdout=output, stderr=output
            )


async def test_a_graph_reveals_no_credentials(private_infra: Infra, tmp_path: Path) -> None:
    served = Joined(tmp_path / "output", {variable: secret(url) for variable, url in private_infra.env.items()})
    try:
        served.ready()
        body = {"model": "mock-model", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
        told = []
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            models = (await client.get("/v1/models")).json()["data"]
            body["model"] = models[0]["id"]
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            private_infra.processes["nats"].kill()
            served.wait_for("lost the NATS server at nats://127.0.0.1:", 20)
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 503, answer.text
            told.append(answer.text)
            while (health := await client.get("/health")).status_code == 200:
                await asyncio.sleep(0.1)
            assert "the NATS server has been away for" in health.json()["reason"]
            private_infra.processes["etcd"].kill()
            served.wait_for("etcd does not answer at http://127.0.0.1:", 20)
            for path in ("/health", "/v1/models", "/metrics", "/"):
                told.append((await client.get(path)).text)
            await private_infra.restart_etcd()
            await private_infra.restart_nats()
        told += [path.read_text() for path in tmp_path.glob("dynamo-*/logs/*")]
        assert len(told) > 6
    finally:
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)
    for text in (*told, served.output):
        assert PASSWORD not in text
        assert USER not in text.replace("channel", "")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:1,ann:sekret@127.0.0.1:2"])
async def test_what_cannot_be_reached_is_named_without_it(address: str) -> None:
    with pytest.raises(TransportError) as no_nats:
        await Nats.connect(f"nats://ann:sekret@{address}")
    assert no_nats.value.message.startswith("cannot connect to NATS at nats://127.0.0.1:1")
    async with Etcd.connect(f"http://ann:sekret@{address}") as etcd:
        with pytest.raises(TransportError) as no_etcd:
            await etcd.get("key")
    assert no_etcd.value.message.startswith("etcd does not answer at http://127.0.0.1:1")
    assert PASSWORD not in f"{no_nats.value} {no_etcd.value}"


@pytest.mark.parametrize("password", ["sekret#1", "sekret/1", "sekret,1"])
def test_a_password_that_makes_it_no_address_is_not_shown_either(password: str) -> None:
    url = f"http://ann:{password}@127.0.0.1:1"
    started = command("serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", NATS_SERVER=url)
    assert started.returncode == 1
    assert "NATS_SERVER" in started.stderr
    with pytest.raises(ConfigError) as refused:
        Etcd.connect(url)
    assert "sekret" not in started.stdout + started.stderr + str(refused.value)


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            yield path.read_text(errors="replace")


async def test_a_graph_and_commands_use_the_variables(tmp_path: Path) -> None:
    password = f"{PASSWORD}-{uuid.uuid4().hex}"
    nats = nats_with(tmp_path, jetstream={"store_dir": str(tmp_path / "js")}, authorization={"token": password})
    async with nats as nats_url, etcd_with(tmp_path) as etcd:
        await etcd.enable_auth(USER, password)
        env = {"NATS_SERVER": nats_url, "ETCD_ENDPOINTS": etcd.url, "NATS_AUTH_TOKEN": password}
        env |= {"ETCD_AUTH_USERNAME": USER, "ETCD_AUTH_PASSWORD": password}
        served = Joined(tmp_path / "output", env)
        try:
            served.ready()
            await etcd.server.stop()  # which then has forgotten the tokens that it gave
            await etcd.server.start()
            outputs = []
            for line, expected in (
                (("status",), "Processor"),
                (("set", "Processor.router=random"), "random"),
                (("llmctl", "http", "list"), "dynamo-tiny"),
            ):
                ran = await asyncio.to_thread(command, *line, **env)
                outputs.append(ran.stdout + ran.stderr)
                assert ran.returncode == 0, outputs[-1]
                assert expected in outputs[-1]
            outputs += [served.output, *command_lines()]
            outputs += [path.read_text() for path in tmp_path.glob("dynamo-*/logs/*")]
            assert password not in "".join(outputs)
        finally:
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(60) == 0


@pytest.mark.parametrize("wrong", ["NATS_AUTH_PASSWORD", "ETCD_AUTH_PASSWORD"])
async def test_wrong_credentials_are_a_line_of_each_process(wrong: str, tmp_path: Path) -> None:
    async with (
        nats_with(tmp_path, authorization={"user": USER, "password": PASSWORD}) as nats_url,
        etcd_with(tmp_path) as etcd,
    ):
        await etcd.enable_auth(USER, PASSWORD)
        env = {
            f"{kind}_AUTH_{name}": value
            for kind in ("NATS", "ETCD")
            for name, value in (("USERNAME", USER), ("PASSWORD", PASSWORD))
        }
        env |= {"NATS_SERVER": nats_url, "ETCD_ENDPOINTS": etcd.url, wrong: f"{PASSWORD}2"}
        serve = ("serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "-p", str(free_port()))
        ran = await asyncio.to_thread(command, *serve, **env)
        status = await asyncio.to_thread(command, "status", **env)
    assert status.returncode == 1
    refused = "error: nothing runs" if wrong.startswith("NATS") else f"error: etcd refused at {etcd.url}: "
    assert status.stderr.startswith(refused)
    assert PASSWORD not in status.stderr
    assert ran.returncode == 1
    output = ran.stdout + ran.stderr
    expected = "Authorization Violation" if wrong.startswith("NATS") else "authentication failed"
    lines = [line for line in output.splitlines() if expected in line]
    assert "could not start: " in lines[0]
    assert len(lines) <= 3, output  # of a process each, if several end at once
    assert f"hint: set the credentials that it accepts: {wrong.partition('_')[0]}_AUTH_USERNAME and" in output
    assert PASSWORD not in output
    assert "Traceback" not in output
