"""Nodes of one engine notice when one of them has gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from components.worker import VllmWorker
from dynamo.engines.vllm.multi_node import HELLO_TIMEOUT_S, NEWCOMERS, NONCE_BYTES, MultiNode
from dynamo.errors import ConfigError, StartError
from tests.cli.terminal import command
from tests.ports import free_port


def nodes(count: int = 2) -> list[MultiNode]:
    port = free_port()
    return [MultiNode(rank, count, "127.0.0.1", port) for rank in range(count)]


async def until(what: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.02)


async def meet(all_of_them: list[MultiNode], lost: list[str]) -> None:
    """The leader last: the others wait for it. Losses before the start go to `lost`."""
    told: list[str] = []
    waiting = [asyncio.create_task(node.meet(told.append, lost.append)) for node in all_of_them[1:]]
    await until(lambda: len(told) == len(waiting))
    assert all("waiting for the leader at 127.0.0.1:" in text for text in told)
    await all_of_them[0].meet(told.append, lost.append)
    await asyncio.gather(*waiting)


def test_of_the_flags() -> None:
    assert MultiNode.of({"tensor-parallel-size": 2}) is None
    assert MultiNode.of({"nnodes": 1}) is None
    found = MultiNode.of({"nnodes": 2, "node_rank": 1, "master-addr": "10.0.0.1", "master_port": "4000"})
    assert found is not None
    assert (found.rank, found.count, found.address, found.port, found.leads) == (1, 2, "10.0.0.1", 4001, False)
    assert str(found) == "node 1 of 2 of the engine at 10.0.0.1:4000"


def test_copies_of_the_model_are_workers_of_their_own() -> None:
    with pytest.raises(ConfigError, match="data-parallel-size: 2 with nnodes: 2"):
        MultiNode.of({"nnodes": 2, "data_parallel_size": 2})


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
def test_flags_that_cannot_be(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        VllmWorker.check_settings(flags, lambda key: f"VllmWorker.{key}")
    assert refused.value.message == f"VllmWorker.{message}"


def test_a_dry_run_names_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("VllmWorker:\n  nnodes: 2\n  node-rank: 2\n")
    serve = ("serve", "graphs.agg:Frontend", "-f", str(file), "--dry-run")
    found = command(*serve)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {file}:3 VllmWorker.node-rank: expected a number, 0 to 1, found 2\nhint: ")
    assert command(*serve, "--VllmWorker.node-rank=1").returncode == 0


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_whoever_goes_ends_all(gone: int) -> None:
    three = nodes(3)
    early: list[str] = []
    await meet(three, early)
    for node in three:
        node.started()
    three[gone].close()
    await until(lambda: three[0].lost if gone else three[1].lost and three[2].lost)
    if gone:  # the leader tells the others by its own end
        assert three[0].lost == f"node {gone} of 3 of this engine has gone"
        three[0].close()
    await until(lambda: all(node.lost for node in three[1:] if node is not three[gone]))
    assert not early


async def test_a_loss_during_the_start_is_told_at_once() -> None:
    two, lost = nodes(), list[str]()
    await meet(two, lost)
    two[1].close()
    await until(lambda: "node 1 of 2 of this engine has gone" in lost)
    two[0].close()


async def test_strangers_are_no_nodes_and_the_door_closes() -> None:
    leader, other = nodes()
    await leader.meet(lambda _: None, lambda _: None)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: of-this-engine\r\n\r\n")
        await asyncio.to_thread(_read_to_the_end, stranger)
    await other.meet(lambda _: None, lambda _: None)
    leader.started()
    await until(lambda: not _answers(leader.port))
    assert not leader.lost
    other.close()
    await until(lambda: leader.lost)


async def test_silent_connections_keep_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    """More than are kept, from before the node comes; the oldest ones are closed."""
    leader, other = nodes()
    await leader.meet(lambda _: None, lambda _: None)
    silent = [socket.create_connection(("127.0.0.1", leader.port), 5) for _ in range(NEWCOMERS + 3)]
    try:
        await asyncio.to_thread(_read_to_the_end, silent[0])
        async with asyncio.timeout(HELLO_TIMEOUT_S - 1):  # not one after the other
            await other.meet(lambda _: None, lambda _: None)
        assert not leader.lost
        for link in silent:
            await asyncio.to_thread(_read_to_the_end, link)
    finally:
        for link in silent:
            link.close()
    other.close()
    await until(lambda: leader.lost)


def shared(monkeypatch: pytest.MonkeyPatch, secret: str, *, given: bool = True) -> None:
    monkeypatch.setenv("DYNAMO_KV_SECRET", secret)
    monkeypatch.setenv("DYNAMO_KV_SECRET_SHARED", "1" if given else "")


@pytest.mark.parametrize("given", [True, False])
async def test_only_who_knows_the_secret_is_a_node(
    given: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that `dynamo serve` has made is another one on each host, and proves nothing."""
    port = free_port()
    shared(monkeypatch, "ours", given=given)
    leader = MultiNode(0, 2, "127.0.0.1", port)
    await leader.meet(lambda _: None, lambda _: None)
    shared(monkeypatch, "theirs", given=given)
    stranger = asyncio.create_task(MultiNode(1, 2, "127.0.0.1", port).meet(lambda _: None, lambda _: None))
    if given:
        await until(lambda: "does not take this node: is DYNAMO_KV_SECRET the same" in caplog.text)
        stranger.cancel()
        await asyncio.gather(stranger, return_exceptions=True)
        shared(monkeypatch, "ours")
        other = MultiNode(1, 2, "127.0.0.1", port)
        await other.meet(lambda _: None, lambda _: None)
        other.close()
        await until(lambda: leader.lost == "node 1 of 2 of this engine has gone")
    else:
        async with asyncio.timeout(10):
            await stranger
        leader.close()


async def test_a_proof_serves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one node has said, heard on the way, is of no use on another connection."""
    shared(monkeypatch, "ours")
    leader, other = nodes()
    await leader.meet(lambda _: None, lambda _: None)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as link:
        nonce = link.recv(NONCE_BYTES, socket.MSG_WAITALL)
        heard = b"\1" + other._proof(nonce, 1)
    with socket.create_connection(("127.0.0.1", leader.port), 5) as link:
        assert link.recv(NONCE_BYTES, socket.MSG_WAITALL) != nonce
        link.sendall(heard)
        await asyncio.to_thread(_read_to_the_end, link)
    assert not leader.lost
    leader.close()


def _read_to_the_end(link: socket.socket) -> None:
    """Past the nonce, without a welcome."""
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


async def test_a_leader_elsewhere_is_an_error() -> None:
    leader = MultiNode(0, 2, "192.0.2.1", 4000)
    with pytest.raises(StartError, match=r"the leader of 2 nodes cannot listen on 192.0.2.1:4000"):
        await leader.meet(lambda _: None, lambda _: None)


def test_gpus_are_those_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine_service.cpu_build", lambda: False)
    split = {"tensor-parallel-size": 8, "pipeline-parallel-size": 2}
    assert VllmWorker.gpus_needed(split) == 16
    assert VllmWorker.gpus_needed({**split, "nnodes": 2}) == 8
