"""Nodes of one engine notice when one of them has gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from components.worker import VllmWorker
from dynamo.errors import StartError
from dynamo.llm.engines.nodes import Nodes
from dynamo.serve.infra import free_ports


def nodes(count: int = 2) -> list[Nodes]:
    port = free_ports(1)[0]
    return [Nodes(rank, count, "127.0.0.1", port) for rank in range(count)]


async def until(what: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.02)


async def meet(all_of_them: list[Nodes], lost: list[str]) -> None:
    """The leader last: the others wait for it. Losses before the start go to `lost`."""
    told: list[str] = []
    waiting = [asyncio.create_task(node.meet(told.append, lost.append)) for node in all_of_them[1:]]
    await until(lambda: len(told) == len(waiting))
    assert all("waiting for the leader at 127.0.0.1:" in text for text in told)
    await all_of_them[0].meet(told.append, lost.append)
    await asyncio.gather(*waiting)


def test_of_the_flags() -> None:
    assert Nodes.of({"tensor-parallel-size": 2}) is None
    assert Nodes.of({"nnodes": 1}) is None
    found = Nodes.of({"nnodes": 2, "node_rank": 1, "master-addr": "10.0.0.1", "master_port": "4000"})
    assert found is not None
    assert (found.rank, found.count, found.address, found.port, found.leads) == (1, 2, "10.0.0.1", 4001, False)
    assert str(found) == "node 1 of 2 of the engine at 10.0.0.1:4000"


def test_copies_of_the_model_are_workers_of_their_own() -> None:
    with pytest.raises(StartError, match="data-parallel-size: 2 with nnodes: 2"):
        Nodes.of({"nnodes": 2, "data_parallel_size": 2})


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
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.to_thread(_read_to_the_end, stranger)
    await other.meet(lambda _: None, lambda _: None)
    leader.started()
    await until(lambda: not _answers(leader.port))
    assert not leader.lost
    other.close()
    await until(lambda: leader.lost)


def _read_to_the_end(link: socket.socket) -> None:
    link.settimeout(10)
    try:
        assert not link.recv(10)
    except ConnectionResetError:
        pass


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


async def test_a_leader_elsewhere_is_an_error() -> None:
    leader = Nodes(0, 2, "192.0.2.1", 4000)
    with pytest.raises(StartError, match=r"the leader of 2 nodes cannot listen on 192.0.2.1:4000"):
        await leader.meet(lambda _: None, lambda _: None)


def test_gpus_are_those_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine_service.cpu_build", lambda: False)
    split = {"tensor-parallel-size": 8, "pipeline-parallel-size": 2}
    assert VllmWorker.gpus_needed(split) == 16
    assert VllmWorker.gpus_needed({**split, "nnodes": 2}) == 8
