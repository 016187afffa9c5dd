"""The nodes of one engine detect when one of them is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from components.worker import VllmWorker
from dynamo.engines.vllm.multi_node import HELLO_TIMEOUT_S, MAX_PENDING, NONCE_BYTES, NodeGroup
from dynamo.errors import ConfigError, StartError
from tests.cli.terminal import command
from tests.ports import free_port


def nodes(count: int = 2) -> list[NodeGroup]:
    port = free_port()
    return [NodeGroup(rank, count, "127.0.0.1", port) for rank in range(count)]


async def until(what: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.02)


async def connect(all_of_them: list[NodeGroup], lost: list[str]) -> None:
    """Connect all nodes, the leader last: the others wait for it. Losses before the start go to `lost`."""
    progress: list[str] = []
    waiting = [asyncio.create_task(node.connect(progress.append, lost.append)) for node in all_of_them[1:]]
    await until(lambda: len(progress) == len(waiting))
    assert all("waiting for the leader at 127.0.0.1:" in text for text in progress)
    await all_of_them[0].connect(progress.append, lost.append)
    await asyncio.gather(*waiting)


def test_group_from_flags() -> None:
    assert NodeGroup.from_flags({"tensor-parallel-size": 2}) is None
    assert NodeGroup.from_flags({"nnodes": 1}) is None
    found = NodeGroup.from_flags({"nnodes": 2, "node_rank": 1, "master-addr": "10.0.0.1", "master_port": "4000"})
    assert found is not None
    assert (found.rank, found.count, found.address, found.port, found.is_leader) == (1, 2, "10.0.0.1", 4001, False)
    assert str(found) == "node 1 of 2 of the engine at 10.0.0.1:4000"


def test_data_parallelism_over_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="data-parallel-size: 2 with nnodes: 2"):
        NodeGroup.from_flags({"nnodes": 2, "data_parallel_size": 2})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nnodes": 0}, "nnodes: expected a number, 1 to 256, found 0"),
        ({"nnodes": None}, "nnodes: expected a number, 1 to 256, found null"),
        ({"nnodes": "x"}, 'nnodes: expected a number, 1 to 256, found "x"'),
        ({"nnodes": True}, "nnodes: expected a number, 1 to 256, found true"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank: expected a number, 0 to 1, found 2"),
        ({"nnodes": 2, "node-rank": -1}, "node-rank: expected a number, 0 to 1, found -1"),
        ({"node-rank": 1}, "node-rank: expected a number, 0 to 0, found 1"),
        ({"nnodes": 2, "master-port": 65535}, "master-port: expected a number, 1 to 65534, found 65535"),
        ({"tensor-parallel-size": "all"}, 'tensor-parallel-size: expected a number, 1 or more, found "all"'),
    ],
)
def test_invalid_flags_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        VllmWorker.check_settings(flags, lambda key: f"VllmWorker.{key}")
    assert refused.value.message == f"VllmWorker.{message}"


def test_dry_run_names_the_source_of_an_invalid_flag(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("VllmWorker:\n  nnodes: 2\n  node-rank: 2\n")
    serve = ("serve", "graphs.agg:Frontend", "-f", str(file), "--dry-run")
    found = command(*serve)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {file}:3 VllmWorker.node-rank: expected a number, 0 to 1, found 2\nhint: ")
    assert command(*serve, "--VllmWorker.node-rank=1").returncode == 0


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_the_loss_of_any_node_ends_all(lost: int) -> None:
    three = nodes(3)
    early: list[str] = []
    await connect(three, early)
    for node in three:
        node.mark_started()
    three[lost].close()
    await until(lambda: three[0].lost if lost else three[1].lost and three[2].lost)
    if lost:  # the others detect it when the leader ends
        assert three[0].lost == f"lost node {lost} of 3 of this engine"
        three[0].close()
    await until(lambda: all(node.lost for node in three[1:] if node is not three[lost]))
    assert not early


async def test_loss_during_the_start_is_reported_immediately() -> None:
    two, lost = nodes(), list[str]()
    await connect(two, lost)
    two[1].close()
    await until(lambda: "lost node 1 of 2 of this engine" in lost)
    two[0].close()


async def test_foreign_connections_are_rejected_and_a_complete_group_stops_listening() -> None:
    leader, other = nodes()
    await leader.connect(lambda _: None, lambda _: None)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: of-this-engine\r\n\r\n")
        await asyncio.to_thread(_read_to_the_end, stranger)
    await other.connect(lambda _: None, lambda _: None)
    leader.mark_started()
    await until(lambda: not _answers(leader.port))
    assert not leader.lost
    other.close()
    await until(lambda: leader.lost)


async def test_silent_connections_do_not_keep_nodes_out(caplog: pytest.LogCaptureFixture) -> None:
    """More than MAX_PENDING silent connections exist before the node connects; the oldest are closed."""
    leader, other = nodes()
    await leader.connect(lambda _: None, lambda _: None)
    silent = [socket.create_connection(("127.0.0.1", leader.port), 5) for _ in range(MAX_PENDING + 3)]
    try:
        await asyncio.to_thread(_read_to_the_end, silent[0])
        async with asyncio.timeout(HELLO_TIMEOUT_S - 1):  # not one after the other
            await other.connect(lambda _: None, lambda _: None)
        assert not leader.lost
        for link in silent:
            await asyncio.to_thread(_read_to_the_end, link)
    finally:
        for link in silent:
            link.close()
    other.close()
    await until(lambda: leader.lost)


def set_secret(monkeypatch: pytest.MonkeyPatch, secret: str, *, given: bool = True) -> None:
    monkeypatch.setenv("DYNAMO_KV_SECRET", secret)
    monkeypatch.setenv("DYNAMO_KV_SECRET_SHARED", "1" if given else "")


@pytest.mark.parametrize("given", [True, False])
async def test_only_nodes_with_the_secret_are_admitted(
    given: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A secret generated by `dynamo serve` differs from host to host, and is not checked."""
    port = free_port()
    set_secret(monkeypatch, "ours", given=given)
    leader = NodeGroup(0, 2, "127.0.0.1", port)
    await leader.connect(lambda _: None, lambda _: None)
    set_secret(monkeypatch, "theirs", given=given)
    stranger = asyncio.create_task(NodeGroup(1, 2, "127.0.0.1", port).connect(lambda _: None, lambda _: None))
    if given:
        await until(lambda: "rejected this node, retrying: check that DYNAMO_KV_SECRET is the same" in caplog.text)
        stranger.cancel()
        await asyncio.gather(stranger, return_exceptions=True)
        set_secret(monkeypatch, "ours")
        other = NodeGroup(1, 2, "127.0.0.1", port)
        await other.connect(lambda _: None, lambda _: None)
        other.close()
        await until(lambda: leader.lost == "lost node 1 of 2 of this engine")
    else:
        async with asyncio.timeout(10):
            await stranger
        leader.close()


async def test_proof_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hello that was recorded on one connection is rejected on another."""
    set_secret(monkeypatch, "ours")
    leader, other = nodes()
    await leader.connect(lambda _: None, lambda _: None)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as link:
        nonce = link.recv(NONCE_BYTES, socket.MSG_WAITALL)
        recorded = b"\1" + other._proof(nonce, 1)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as link:
        assert link.recv(NONCE_BYTES, socket.MSG_WAITALL) != nonce
        link.sendall(recorded)
        await asyncio.to_thread(_read_to_the_end, link)
    assert not leader.lost
    leader.close()


def _read_to_the_end(link: socket.socket) -> None:
    """Read until the leader closes the connection: it sends a nonce at most, and no welcome."""
    link.settimeout(10)
    count = 0
    try:
        while more := link.recv(NONCE_BYTES):
            count += len(more)
    except ConnectionResetError:
        pass
    assert count <= NONCE_BYTES


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


async def test_leader_address_of_another_host_is_an_error() -> None:
    leader = NodeGroup(0, 2, "192.0.2.1", 4000)
    with pytest.raises(StartError, match=r"the leader of 2 nodes cannot listen on 192.0.2.1:4000"):
        await leader.connect(lambda _: None, lambda _: None)


def test_gpus_needed_are_those_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine_service.cpu_build", lambda: False)
    split = {"tensor-parallel-size": 8, "pipeline-parallel-size": 2}
    assert VllmWorker.gpus_needed(split) == 16
    assert VllmWorker.gpus_needed({**split, "nnodes": 2}) == 8
