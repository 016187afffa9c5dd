"""The way of KV between two processes, without engines: layouts, both sockets, shared memory, and peers that do wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo.engines.kv_transfer import kv_leases
from dynamo.engines.kv_transfer import puller as pulling
from dynamo.engines.kv_transfer import session as sessions
from dynamo.engines.kv_transfer.kv_cache import CpuMover, KvCache, chunks, runs
from dynamo.engines.kv_transfer.kv_leases import KvLeases
from dynamo.engines.kv_transfer.puller import Pull, Puller
from dynamo.engines.kv_transfer.release import release
from dynamo.engines.kv_transfer.server import Server
from dynamo.engines.kv_transfer.session import Offer, difference
from dynamo.engines.kv_transfer.staging import Staging
from dynamo.transport.network import host_id

pytestmark = pytest.mark.vllm

BLOCKS = 40
SECRET = b"known to both"


def tensors(kind: str = "blocks first", seed: int = 0) -> dict[str, torch.Tensor]:
    """Two layers of random KV for BLOCKS blocks of 16 tokens, in the manner of one attention backend."""
    dice = torch.Generator().manual_seed(seed)

    def filled(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice).to(torch.bfloat16)

    if kind == "one allocation":  # all layers of a block together
        whole = filled(BLOCKS, 2, 4, 16, 8)
        return {str(layer): whole[:, layer] for layer in range(2)}
    make = {
        "blocks first": lambda: filled(BLOCKS, 4, 16, 8),
        "halves first": lambda: filled(2, BLOCKS, 16, 4, 8),
        "heads before tokens": lambda: filled(2, BLOCKS, 4, 16, 8).transpose(2, 3),
        "halves second": lambda: filled(BLOCKS, 2, 16, 4, 8),
        "smaller kernel blocks": lambda: filled(2 * BLOCKS, 8, 4, 16),
    }[kind]
    return {str(layer): make() for layer in range(2)}


KINDS = (
    "blocks first",
    "halves first",
    "heads before tokens",
    "halves second",
    "smaller kernel blocks",
    "one allocation",
)


def cache_of(found: dict[str, torch.Tensor], **more: Any) -> KvCache:
    return KvCache(found, BLOCKS, 16, **{"engine": "e", "model": "m", **more})


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


# -- copies


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    blocks=st.integers(1, 60),
    slot=st.integers(50, 400),
)
def test_chunks_have_every_block_of_every_plane_once(sizes: list[int], blocks: int, slot: int) -> None:
    seen = []
    for chunk in chunks(sizes, blocks, slot):
        offset = 0
        for piece in chunk:
            assert piece.offset == offset
            offset += piece.blocks * sizes[piece.plane]
            seen += [(piece.plane, piece.first + n) for n in range(piece.blocks)]
        assert 0 < offset <= slot
    assert seen == [(plane, block) for plane in range(len(sizes)) for block in range(blocks)]


def test_a_block_that_fits_no_slot_is_an_error() -> None:
    with pytest.raises(ValueError, match="100 bytes does not fit a slot of 99"):
        list(chunks([100], 1, 99))


@given(st.lists(st.integers(0, 30)))
def test_runs_are_the_list_again(blocks: list[int]) -> None:
    found = list(runs(blocks))
    assert [first + n for _, first, count in found for n in range(count)] == blocks
    assert [position for position, _, _ in found] == [
        n for n in range(len(blocks)) if n == 0 or blocks[n] != blocks[n - 1] + 1
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_layout_arrive_where_they_belong(kind: str) -> None:
    source, target = tensors(kind, 1), tensors(kind, 2)
    before = {name: tensor.clone() for name, tensor in target.items()}
    dice, numbers = random.Random(3), list(range(BLOCKS))
    there, here = dice.sample(numbers, 12), dice.sample(numbers, 12)
    out, into = cache_of(source), cache_of(target)
    slot = Staging(1, 4096).slot(0)
    for pieces in chunks(out.block_bytes, 12, len(slot)):
        CpuMover(out).gather(there, pieces, slot)
        CpuMover(into).scatter(here, pieces, slot)
    factor = 2 if kind == "smaller kernel blocks" else 1
    axis = 1 if kind in ("halves first", "heads before tokens") else 0
    for name, tensor in target.items():
        expected = before[name]
        for theirs, ours in zip(there, here, strict=True):
            for part in range(factor):
                origin = source[name].select(axis, theirs * factor + part)
                expected.select(axis, ours * factor + part).copy_(origin)
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("shape", [(BLOCKS + 1, 4, 16, 8), (3, BLOCKS + 1, 4, 8), (7,)])
def test_a_tensor_of_other_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a KV tensor of shape"):
        cache_of({"0": torch.zeros(shape)})


def test_differences_are_named() -> None:
    layout = cache_of(tensors()).layout
    assert difference(layout, layout) == ""
    assert difference(msgspec.structs.replace(layout, block_tokens=32), layout) == "block tokens 32 there, 16 here"
    assert "4 KV tensors there, 2 here" in difference(cache_of(tensors("halves first")).layout, layout)
    assert "a KV block of [" in difference(cache_of(tensors("halves second")).layout, layout)


# -- holdings


def test_a_lease_ends_but_not_under_a_reader() -> None:
    now = [0.0]
    held = KvLeases(30.0, lambda: now[0])
    for name in ("read", "unread", "reading"):
        held.hold(name, [1, 2])
    assert held.open("read") == [1, 2]
    assert held.open("reading") == [1, 2]
    held.close("read", done=True)
    assert held.open("read", 0) is None
    assert held.take_finished() == ({"read"}, 0)
    now[0] = 30.0
    assert held.take_finished() == ({"unread"}, 1)
    held.close("reading", done=False)
    assert held.take_finished() == ({"reading"}, 1)
    assert len(held) == 0
    started = time.monotonic()
    assert held.open("unread", 30) is None, "it has ended: nobody waits for it"
    assert time.monotonic() - started < 10


def test_a_reader_may_come_early() -> None:
    held = KvLeases(30.0)
    threading.Timer(0.05, held.hold, ("late", [7])).start()
    assert held.open("late", 10) == [7]
    assert held.open("never", 0.01) is None


# -- between a holder and a reader


class Holder:
    def __init__(self, cache: KvCache, secret: bytes = SECRET) -> None:
        self.cache, self.holdings = cache, KvLeases(60.0)
        self.server = Server(cache, self.holdings, secret, "127.0.0.1")

    def offer(self, name: str, blocks: list[int], way: str = "shared memory") -> Offer:
        self.holdings.hold(name, blocks)
        host = "elsewhere" if way == "TCP" else host_id()
        return Offer(name, 16 * len(blocks), "", host, self.server.local, "127.0.0.1", self.server.port)


@pytest.fixture
def holder() -> Iterator[Holder]:
    found = Holder(cache_of(tensors(seed=1)))
    yield found
    found.server.close()


class Reader:
    def __init__(self, cache: KvCache, *, secret: bytes = SECRET, shared: bool = True) -> None:
        self.cache, self.puller = cache, Puller(cache, secret, threads=2, shared=shared)

    def pull(self, offer: Offer, blocks: list[int], first: int = 0) -> pulling.Pulled:
        self.puller.submit(Pull(offer.holding, offer, first, blocks))
        found: pulling.Pulled = until(lambda: (p := self.puller.take()).requests and p)
        return found


@pytest.fixture
def reader() -> Iterator[Reader]:
    found = Reader(cache_of(tensors(seed=2)))
    yield found
    found.puller.close()


def assert_pulled(holder: Holder, reader: Reader, there: list[int], here: list[int]) -> None:
    for theirs, ours in zip(holder.cache.planes, reader.cache.planes, strict=True):
        assert torch.equal(theirs[there], ours[here])


@pytest.mark.parametrize("way", ["shared memory", "unix socket", "TCP"])
def test_every_way_brings_the_same(holder: Holder, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "SLOT_BYTES", 8192)  # several chunks
    reader = Reader(cache_of(tensors(seed=2)), shared=way != "unix socket")
    for name, there in (("first", [3, 4, 5, 9, 30, 31]), ("second", [1, 0, 39])):  # over one connection, or two
        here = [n + 7 for n in range(len(there) - 1)]
        ended = reader.pull(holder.offer(name, there, way), here, first=1)
        assert ended[:4] == ({name}, set(), 1, 0)
        assert ended.bytes == len(here) * sum(holder.cache.block_bytes)
        assert_pulled(holder, reader, there[1:], here)
        assert until(lambda: holder.holdings.take_finished()[0]) == {name}
    reader.puller.close()


def test_nobody_will_come(holder: Holder, reader: Reader) -> None:
    reader.puller.submit(Pull("r", holder.offer("h", [1, 2]), 0, ()))
    assert until(lambda: holder.holdings.take_finished()[0]) == {"h"}
    assert reader.puller.take() == pulling.NOTHING


def test_a_request_that_never_reached_its_engine_core(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = msgspec.structs.asdict(holder.offer("h", [1, 2]))
    monkeypatch.setenv(sessions.SECRET, "guessed")
    release({"do_remote_prefill": True, **offer})
    release({"remote_block_ids": [1]})
    monkeypatch.setenv(sessions.SECRET, SECRET.decode())
    assert not holder.holdings.take_finished()[0]
    release({"do_remote_prefill": True, **offer})
    assert until(lambda: holder.holdings.take_finished()[0]) == {"h"}
    release(offer)  # again: nothing happens
    release({**offer, "port": 1})


def test_another_secret_is_refused_and_told_once(holder: Holder, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Reader(cache_of(tensors(seed=2)), secret=b"guessed")
    before = [plane.clone() for plane in stranger.cache.planes]
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            ended = stranger.pull(holder.offer(f"h{number}", [1, 2]), [5, 6])
            assert (ended.failed_blocks, ended.failures) == ({5, 6}, 1)
            stranger.puller._shunned.clear()
    assert all(map(torch.equal, before, stranger.cache.planes))
    told = [record.message for record in caplog.records]
    assert sum("refused to peers with another secret" in text for text in told) == 1
    assert sum("is DYNAMO_KV_SECRET the same on both sides?" in text for text in told) == 1


def test_a_holder_without_the_secret_is_not_believed(reader: Reader) -> None:
    """One that answers whatever a reader says, in the hope that it takes its KV."""
    impostor = Holder(reader.cache, secret=b"")

    def accept_all(session: sessions.Session, secret: bytes, layout: sessions.Layout) -> bool:
        session.send(sessions.Hello(sessions.PROTOCOL, os.urandom(sessions.NONCE_BYTES)))
        session.receive(sessions.Join)
        session.send(sessions.Welcome(os.urandom(32), layout))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamo.engines.kv_transfer.server.greet_as_holder", accept_all)
        assert reader.pull(impostor.offer("h", [1]), [2]).failed_blocks == {2}
    impostor.server.close()


@pytest.mark.parametrize("more", [{"model": "other"}, {"engine": "other"}])
def test_another_model_or_version_is_not_mixed(holder: Holder, more: dict[str, str], caplog: Any) -> None:
    other = Reader(cache_of(tensors(seed=2), **more))
    assert other.pull(holder.offer("h", [1]), [2]).failed_blocks == {2}
    assert "there, other here" in caplog.text


FOREIGN = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff\xff\xff\xff" + b"x" * 100,
    b"\0\0\0\5abcde",
    msgspec.msgpack.encode(sessions.Done("h")),
    os.urandom(5000),
    b"",
]


@pytest.mark.parametrize("data", FOREIGN)
def test_foreign_bytes_do_no_harm(holder: Holder, reader: Reader, data: bytes) -> None:
    offer = holder.offer("h", [1, 2])
    with socket.create_connection(("127.0.0.1", holder.server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(data)
        with contextlib.suppress(OSError):  # the server may have closed it by now
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    assert not holder.holdings.take_finished()[0]
    assert not reader.pull(offer, [3, 4]).failures


@pytest.mark.parametrize(("first", "blocks"), [(0, [1, 2, 3]), (2, [1]), (-1, [1])])
def test_only_what_is_held_can_be_read(
    holder: Holder, reader: Reader, first: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_leases, "EARLY_S", 0.1)
    offer = holder.offer("h", [10, 11])
    assert reader.pull(offer, blocks, first).failed_blocks == set(blocks)
    assert reader.pull(msgspec.structs.replace(offer, holding="h2"), [5]).failures == 1
    assert not reader.pull(offer, [7, 8]).failures


def test_memory_that_can_shrink_is_refused() -> None:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 8192)
    with pytest.raises(ValueError, match="can change its size"):
        Staging(2, 4096, descriptor)
    with pytest.raises(ValueError, match="staging memory of -1 bytes"):
        Staging(1, -1)


class SlowMover(CpuMover):
    """A holder's, that fills one chunk and then waits."""

    def __init__(self, cache: KvCache) -> None:
        super().__init__(cache)
        self.filled, self.go_on = threading.Semaphore(0), threading.Event()

    def gather(self, *arguments: Any) -> None:
        if self.filled._value:
            assert self.go_on.wait(30)
        super().gather(*arguments)
        self.filled.release()


@pytest.fixture
def slow(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowMover]:
    mover = SlowMover(holder.cache)
    monkeypatch.setattr(pulling, "SLOT_BYTES", 4096)
    monkeypatch.setattr(holder.cache, "mover", lambda: mover)
    yield mover
    mover.go_on.set()


@pytest.mark.parametrize("way", ["shared memory", "TCP"])
def test_a_request_that_ends_meanwhile_is_no_failure(holder: Holder, reader: Reader, slow: SlowMover, way: str) -> None:
    offer = holder.offer("h", list(range(30)), way)
    reader.puller.submit(Pull("h", offer, 0, list(range(30))))
    until(lambda: slow.filled._value)
    reader.puller.cancel({"h", "another"})
    slow.go_on.set()
    ended = until(lambda: (p := reader.puller.take()).requests and p)
    assert (ended.failed_blocks, ended.failures) == (set(), 0)
    assert until(lambda: holder.holdings.take_finished()[0]) == {"h"}
    assert not reader.pull(holder.offer("next", [1]), [2]).failures


@pytest.mark.parametrize("way", ["shared memory", "TCP"])
def test_a_holder_that_falls_silent_is_given_up(
    holder: Holder, reader: Reader, slow: SlowMover, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SILENCE_S", 0.2)
    ended = reader.pull(holder.offer("h", list(range(30)), way), list(range(30)))
    assert ended.failed_blocks == set(range(30))
    slow.go_on.set()
    assert not reader.pull(holder.offer("next", [1], way), [2]).failures


def test_a_holder_that_is_gone_is_not_waited_for_again(reader: Reader, holder: Holder) -> None:
    offer = holder.offer("h", [1])
    holder.server.close()
    ended = [reader.pull(msgspec.structs.replace(offer, holding=str(n)), [n]) for n in range(20)]
    assert [e.failed_blocks for e in ended] == [{n} for n in range(20)]
    assert reader.puller._shunned
