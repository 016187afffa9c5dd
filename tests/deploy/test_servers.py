"""The servers with the flags that the compose file gives them: only ports, directories and programs are of this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import nats

from dynamo.launcher.server_kinds import ETCD, NATS, find_binary
from dynamo.transport.etcd import Etcd
from tests.deploy.container import SERVERS, compose, running
from tests.ports import free_ports

SERVICES = compose(SERVERS)["services"]


def read(url: str) -> bytes:
    with urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
        return content


def members(etcdctl: Sequence[str]) -> list[dict[str, Any]]:
    ran = subprocess.run([*etcdctl, "member", "list", "-w", "json"], capture_output=True, check=True, timeout=20)
    found: list[dict[str, Any]] = json.loads(ran.stdout)["members"]
    return found


async def payload_limit(url: str) -> int:
    client = await nats.connect(url)
    try:
        return client.max_payload
    finally:
        await client.close()


async def test_nats(tmp_path: Path, nats_server: str) -> None:
    client, monitor = map(str, free_ports(2))
    config = tmp_path / "dynamo.conf"  # the client port has no flag in the compose file: it is NATS' usual one
    (source,) = (mount.split(":")[0] for mount in SERVICES["nats"]["volumes"] if mount.endswith("dynamo.conf:ro"))
    config.write_text(f"port: {client}\n" + (SERVERS.parent / source).read_text())
    changes = {"nats-server": find_binary(NATS), "/etc/nats/dynamo.conf": str(config)}
    changes |= {"--store_dir=/data": f"--store_dir={tmp_path}/data", "--http_port=8222": f"--http_port={monitor}"}
    with running(SERVICES["nats"], changes, {":8222/": f":{monitor}/"}):
        jetstream = json.loads(read(f"http://127.0.0.1:{monitor}/jsz"))
        assert jetstream["config"]["store_dir"].startswith(f"{tmp_path}/data")
        url = f"nats://127.0.0.1:{client}"
        assert await payload_limit(url) == await payload_limit(nats_server)  # of `dynamo serve`'s own server
        connection = await nats.connect(url)
        stream = connection.jetstream()
        await stream.add_stream(name="tasks", subjects=["tasks"])
        await stream.publish("tasks", b"prefill")
        await connection.close()
    with running(SERVICES["nats"], changes, {":8222/": f":{monitor}/"}):  # the volume keeps what JetStream had
        connection = await nats.connect(url)
        assert (await connection.jetstream().stream_info("tasks")).state.messages == 1
        await connection.close()


async def test_etcd(tmp_path: Path) -> None:
    port, peer = map(str, free_ports(2))
    server = find_binary(ETCD)
    changes = {"/usr/local/bin/etcd": server, "/var/lib/etcd": str(tmp_path), ":2379": f":{port}", ":2380": f":{peer}"}
    check = {"/usr/local/bin/etcdctl": find_binary(replace(ETCD, binary="etcdctl")), ":2379": f":{port}"}
    with running(SERVICES["etcd"], changes, check) as health:
        address = f"http://127.0.0.1:{port}"
        assert json.loads(read(f"{address}/version"))["etcdserver"].startswith("3.")
        metrics = read(f"{address}/metrics")  # prometheus.yml scrapes it there
        assert b"\netcd_server_quota_backend_bytes 2.147483648e+09\n" in metrics
        (member,) = members(health[:2])
        assert member["clientURLs"] == [address]
        async with Etcd.connect(address) as etcd:
            await etcd.put("deploy", b"kept")
    with running(SERVICES["etcd"], changes, check):
        async with Etcd.connect(address) as etcd:
            assert await etcd.get("deploy") == b"kept"


def test_etcd_advertises_the_address_of_its_host() -> None:
    assert "--advertise-client-urls=http://${DYN_HOST_IP:-127.0.0.1}:2379" in SERVERS.read_text()


def test_etcd_is_new_enough() -> None:
    """Earlier 3.5 releases could lose or corrupt data after a crash."""
    version = SERVICES["etcd"]["image"].rpartition(":v")[2]
    assert tuple(map(int, version.split("."))) >= (3, 5, 6)
