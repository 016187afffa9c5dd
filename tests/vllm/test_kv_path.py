"""KV transfer between two processes, without engines: layouts, TCP, unix sockets, shared memory, misbehaving peers."""

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

from dynamo.engines.kv_transfer import holder_sessions, kv_leases
from dynamo.engines.kv_transfer import session as sessions
from dynamo.engines.kv_transfer.kv_cache import CpuBlockCopier, KvCache, chunks, consecutive_runs
from dynamo.engines.kv_transfer.kv_leases import KvLeases
from dynamo.engines.kv_transfer.puller import NO_RESULTS, Pull, Puller, PullResults
from dynamo.engines.kv_transfer.release import release
from dynamo.engines.kv_transfer.server import KvServer
from dynamo.engines.kv_transfer.session import RemoteKv, layout_difference
from dynamo.engines.kv_transfer.staging import Staging
from dynamo.transport.network import host_id

pytestmark = pytest.mark.vllm

BLOCKS = 40
SECRET = b"known to both"


def tensors(kind: str = "blocks first", seed: int = 0) -> dict[str, torch.Tensor]:
    """Return two layers of random KV for BLOCKS blocks of 16 tokens, laid out as by one attention backend."""
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
def test_chunks_contain_every_block_of_every_plane_once(sizes: list[int], blocks: int, slot: int) -> None:
    seen = []
    for chunk in chunks(sizes, blocks, slot):
        offset = 0
        for segment in chunk:
            assert segment.offset == offset
            offset += segment.blocks * sizes[segment.plane]
            seen += [(segment.plane, segment.first + n) for n in range(segment.blocks)]
        assert 0 < offset <= slot
    assert seen == [(plane, block) for plane in range(len(sizes)) for block in range(blocks)]


def test_block_larger_than_a_slot_is_an_error() -> None:
    with pytest.raises(ValueError, match="100 bytes does not fit a slot of 99"):
        list(chunks([100], 1, 99))


@given(st.lists(st.integers(0, 30)))
def test_consecutive_runs_cover_the_list(blocks: list[int]) -> None:
    found = list(consecutive_runs(blocks))
    assert [first + n for _, first, count in found for n in range(count)] == blocks
    assert [position for position, _, _ in found] == [
        n for n in range(len(blocks)) if n == 0 or blocks[n] != blocks[n - 1] + 1
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_layout_are_copied_to_their_targets(kind: str) -> None:
    source, target = tensors(kind, 1), tensors(kind, 2)
    before = {name: tensor.clone() for name, tensor in target.items()}
    dice, numbers = random.Random(3), list(range(BLOCKS))
    there, here = dice.sample(numbers, 12), dice.sample(numbers, 12)
    out, into = cache_of(source), cache_of(target)
    slot = Staging(1, 4096).slot(0)
    for segments in chunks(out.block_bytes, 12, len(slot)):
        CpuBlockCopier(out).gather(there, segments, slot)
        CpuBlockCopier(into).scatter(here, segments, slot)
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
def test_tensor_with_another_number_of_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a KV tensor of shape"):
        cache_of({"0": torch.zeros(shape)})


def test_layout_differences_are_described() -> None:
    layout = cache_of(tensors()).layout
    assert layout_difference(layout, layout) == ""
    assert (
        layout_difference(msgspec.structs.replace(layout, block_tokens=32), layout) == "block tokens 32 there, 16 here"
    )
    assert "4 KV tensors there, 2 here" in layout_difference(cache_of(tensors("halves first")).layout, layout)
    assert "a KV block of [" in layout_difference(cache_of(tensors("halves second")).layout, layout)


# -- leases


def test_lease_expires_unless_it_is_being_read() -> None:
    now = [0.0]
    leases = KvLeases(30.0, lambda: now[0])
    for name in ("read", "unread", "reading"):
        leases.grant(name, [1, 2])
    assert leases.begin_read("read") == [1, 2]
    assert leases.begin_read("reading") == [1, 2]
    leases.end_read("read", done=True)
    assert leases.begin_read("read", 0) is None
    assert leases.pop_ended() == ({"read"}, 0)
    now[0] = 30.0
    assert leases.pop_ended() == ({"unread"}, 1)
    leases.end_read("reading", done=False)
    assert leases.pop_ended() == ({"reading"}, 1)
    assert len(leases) == 0
    started = time.monotonic()
    assert leases.begin_read("unread", 30) is None, "the wait for an ended lease was not skipped"
    assert time.monotonic() - started < 10


def test_reader_may_arrive_before_the_lease_is_granted() -> None:
    leases = KvLeases(30.0)
    threading.Timer(0.05, leases.grant, ("late", [7])).start()
    assert leases.begin_read("late", 10) == [7]
    assert leases.begin_read("never", 0.01) is None


# -- between a holder and a reader


class Holder:
    def __init__(self, cache: KvCache, secret: bytes = SECRET) -> None:
        self.cache = cache
        self.leases = KvLeases(60.0)
        self.server = KvServer(cache, self.leases, secret, "127.0.0.1")

    def grant(self, name: str, blocks: list[int], way: str = "shared memory") -> RemoteKv:
        self.leases.grant(name, blocks)
        host = "elsewhere" if way == "TCP" else host_id()
        return RemoteKv(name, 16 * len(blocks), "", host, self.server.local, "127.0.0.1", self.server.port)


@pytest.fixture
def holder() -> Iterator[Holder]:
    found = Holder(cache_of(tensors(seed=1)))
    yield found
    found.server.close()


class Reader:
    def __init__(self, cache: KvCache, *, secret: bytes = SECRET, shared: bool = True) -> None:
        self.cache = cache
        self.puller = Puller(cache, secret, threads=2, shared=shared)

    def pull(self, remote: RemoteKv, blocks: list[int], first: int = 0) -> PullResults:
        self.puller.submit(Pull(remote.lease_id, remote, first, blocks))
        found: PullResults = until(lambda: (p := self.puller.take_results()).requests and p)
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
def test_all_transports_copy_the_same_blocks(holder: Holder, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder_sessions, "SLOT_BYTES", 8192)  # several chunks
    reader = Reader(cache_of(tensors(seed=2)), shared=way != "unix socket")
    for name, there in (("first", [3, 4, 5, 9, 30, 31]), ("second", [1, 0, 39])):  # over one connection, or two
        here = [n + 7 for n in range(len(there) - 1)]
        ended = reader.pull(holder.grant(name, there, way), here, first=1)
        assert ended[:4] == ({name}, set(), 1, 0)
        assert ended.bytes == len(here) * sum(holder.cache.block_bytes)
        assert_pulled(holder, reader, there[1:], here)
        assert until(lambda: holder.leases.pop_ended()[0]) == {name}
    reader.puller.close()


def test_pull_without_blocks_releases_the_lease(holder: Holder, reader: Reader) -> None:
    reader.puller.submit(Pull("r", holder.grant("h", [1, 2]), 0, ()))
    assert until(lambda: holder.leases.pop_ended()[0]) == {"h"}
    assert reader.puller.take_results() == NO_RESULTS


def test_release_from_outside_the_engine_core(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = msgspec.structs.asdict(holder.grant("h", [1, 2]))
    monkeypatch.setenv(sessions.SECRET, "guessed")
    release({"do_remote_prefill": True, **remote})
    release({"remote_block_ids": [1]})
    monkeypatch.setenv(sessions.SECRET, SECRET.decode())
    assert not holder.leases.pop_ended()[0]
    release({"do_remote_prefill": True, **remote})
    assert until(lambda: holder.leases.pop_ended()[0]) == {"h"}
    release(remote)  # again: nothing happens
    release({**remote, "port": 1})


def test_another_secret_is_refused_and_logged_once(holder: Holder, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Reader(cache_of(tensors(seed=2)), secret=b"guessed")
    before = [plane.clone() for plane in stranger.cache.planes]
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            ended = stranger.pull(holder.grant(f"h{number}", [1, 2]), [5, 6])
            assert (ended.failed_blocks, ended.failures) == ({5, 6}, 1)
            stranger.puller._unreachable.clear()
    assert all(map(torch.equal, before, stranger.cache.planes))
    logged = [record.message for record in caplog.records]
    assert sum("the peer has another secret" in text for text in logged) == 1
    assert sum("is DYNAMO_KV_SECRET the same on both sides?" in text for text in logged) == 1


def test_holder_without_the_secret_is_rejected(reader: Reader) -> None:
    """The impostor accepts any proof and sends a made-up one of its own."""
    impostor = Holder(reader.cache, secret=b"")

    def accept_all(session: sessions.Session, secret: bytes, layout: sessions.Layout) -> bool:
        session.send(sessions.Hello(sessions.PROTOCOL, os.urandom(sessions.NONCE_BYTES)))
        session.receive(sessions.Join)
        session.send(sessions.Welcome(os.urandom(32), layout))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamo.engines.kv_transfer.server.handshake_as_holder", accept_all)
        assert reader.pull(impostor.grant("h", [1]), [2]).failed_blocks == {2}
    impostor.server.close()


@pytest.mark.parametrize("more", [{"model": "other"}, {"engine": "other"}])
def test_kv_of_another_model_or_version_is_rejected(holder: Holder, more: dict[str, str], caplog: Any) -> None:
    other = Reader(cache_of(tensors(seed=2), **more))
    assert other.pull(holder.grant("h", [1]), [2]).failed_blocks == {2}
    assert "there, other here" in caplog.text


INVALID = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff\xff\xff\xff" + b"x" * 100,
    b"\0\0\0\5abcde",
    msgspec.msgpack.encode(sessions.Done("h")),
    os.urandom(5000),
    b"",
]


@pytest.mark.parametrize("data", INVALID)
def test_invalid_bytes_do_not_disturb_the_server(holder: Holder, reader: Reader, data: bytes) -> None:
    remote = holder.grant("h", [1, 2])
    with socket.create_connection(("127.0.0.1", holder.server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(data)
        with contextlib.suppress(OSError):  # the server may have closed it by now
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    assert not holder.leases.pop_ended()[0]
    assert not reader.pull(remote, [3, 4]).failures


@pytest.mark.parametrize(("first", "blocks"), [(0, [1, 2, 3]), (2, [1]), (-1, [1])])
def test_only_leased_blocks_can_be_read(
    holder: Holder, reader: Reader, first: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_leases, "EARLY_READER_TIMEOUT_S", 0.1)
    remote = holder.grant("h", [10, 11])
    assert reader.pull(remote, blocks, first).failed_blocks == set(blocks)
    assert reader.pull(msgspec.structs.replace(remote, lease_id="h2"), [5]).failures == 1
    assert not reader.pull(remote, [7, 8]).failures


def test_staging_memory_without_seals_is_refused() -> None:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 8192)
    with pytest.raises(ValueError, match="can change its size"):
        Staging(2, 4096, descriptor)
    with pytest.raises(ValueError, match="staging memory of -1 bytes"):
        Staging(1, -1)


class SlowCopier(CpuBlockCopier):
    """Copier of a holder that fills one chunk and then waits for `go_on`."""

    def __init__(self, cache: KvCache) -> None:
        super().__init__(cache)
        self.filled = threading.Semaphore(0)
        self.go_on = threading.Event()

    def gather(self, *arguments: Any) -> None:
        if self.filled._value:
            assert self.go_on.wait(30)
        super().gather(*arguments)
        self.filled.release()


@pytest.fixture
def slow(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCopier]:
    copier = SlowCopier(holder.cache)
    monkeypatch.setattr(holder_sessions, "SLOT_BYTES", 4096)
    monkeypatch.setattr(holder.cache, "copier", lambda: copier)
    yield copier
    copier.go_on.set()


@pytest.mark.parametrize("way", ["shared memory", "TCP"])
def test_cancelled_pull_is_not_a_failure(holder: Holder, reader: Reader, slow: SlowCopier, way: str) -> None:
    remote = holder.grant("h", list(range(30)), way)
    reader.puller.submit(Pull("h", remote, 0, list(range(30))))
    until(lambda: slow.filled._value)
    reader.puller.cancel({"h", "another"})
    slow.go_on.set()
    ended = until(lambda: (p := reader.puller.take_results()).requests and p)
    assert (ended.failed_blocks, ended.failures) == (set(), 0)
    assert until(lambda: holder.leases.pop_ended()[0]) == {"h"}
    assert not reader.pull(holder.grant("next", [1]), [2]).failures


@pytest.mark.parametrize("way", ["shared memory", "TCP"])
def test_silent_holder_fails_the_pull(
    holder: Holder, reader: Reader, slow: SlowCopier, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SILENCE_S", 0.2)
    ended = reader.pull(holder.grant("h", list(range(30)), way), list(range(30)))
    assert ended.failed_blocks == set(range(30))
    slow.go_on.set()
    assert not reader.pull(holder.grant("next", [1], way), [2]).failures


def test_unreachable_holder_is_not_tried_again_immediately(reader: Reader, holder: Holder) -> None:
    remote = holder.grant("h", [1])
    holder.server.close()
    ended = [reader.pull(msgspec.structs.replace(remote, lease_id=str(n)), [n]) for n in range(20)]
    assert [e.failed_blocks for e in ended] == [{n} for n in range(20)]
    assert reader.puller._unreachable
