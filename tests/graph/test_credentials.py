"""Passwords in NATS_SERVER and ETCD_ENDPOINTS reach neither clients nor logs, whatever happens to the servers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from dynamo.errors import ConfigError, TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.transport.etcd import Etcd
from dynamo.transport.nats import Nats
from tests.cli.terminal import COMMAND, ROOT, command, environment
from tests.ports import free_port
from tests.served import Served

USER, PASSWORD = "ann", "sekret"


def secret(url: str) -> str:
    return url.replace("//", f"//{USER}:{PASSWORD}@")


class Joined(Served):
    """A graph beside servers that are named with user and password, with all that its processes log."""

    def __init__(self, log: Path, infra: Infra) -> None:
        self.port, self.log, self.started, self._seen = free_port(), log, 0.0, set()
        arguments = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "-p", str(self.port)]
        env = {variable: secret(url) for variable, url in infra.env.items()}
        env |= {"DYN_REQUEST_PLANE": "nats", "DYN_LOG": "debug", "DYN_METRICS_PORT": "0", "TMPDIR": str(log.parent)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], cwd=ROOT, env=environment(**env), stdout=output, stderr=output
            )


async def test_a_graph_reveals_no_credentials(private_infra: Infra, tmp_path: Path) -> None:
    served = Joined(tmp_path / "output", private_infra)
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
