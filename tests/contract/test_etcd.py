"""The etcd client against real etcd that is killed, restarted, wiped, compacted, cut off."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo.errors import ConfigError, TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.transport.credentials import EtcdCredentials
from dynamo.transport.etcd import Delete, Etcd, Event, KeyValue, Put, Snapshot, _range_of
from dynamo.transport.etcd_cluster import rpc
from tests.ports import free_port


@pytest.fixture
async def etcd(etcd_server: str) -> AsyncIterator[Etcd]:
    async with Etcd.connect(etcd_server) as client:
        yield client


@pytest.fixture
async def private(private_infra: Infra) -> AsyncIterator[Etcd]:
    async with Etcd.connect(private_infra.etcd_endpoints) as client:
        yield client


@pytest.fixture
def root() -> str:
    """A prefix that no other test uses."""
    return f"test/{uuid.uuid4().hex}/"


class Watcher:
    """Reads a watch in the background and keeps its events."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self.events: list[Event] = []
        self._task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[Event, None]) -> None:
        async with aclosing(events):
            async for event in events:
                self.events.append(event)

    async def until(self, done: Callable[[list[Event]], bool], timeout_s: float = 10) -> list[Event]:
        async with asyncio.timeout(timeout_s):
            while not done(self.events):
                if self._task.done():
                    self._task.result()
                    raise AssertionError(f"the watch ended: {self.events}")
                await asyncio.sleep(0.005)
        return self.events

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def watching(client: Etcd, prefix: str) -> AsyncIterator[Watcher]:
    watcher = Watcher(client.watch_prefix(prefix))
    try:
        await watcher.until(lambda events: len(events) > 0)
        yield watcher
    finally:
        await watcher.close()


class Proxy:
    """A TCP proxy in front of etcd that can be cut, or drop the replies."""

    def __init__(self, etcd_endpoints: str, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._upstream = int(etcd_endpoints.rpartition(":")[2])
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.lose_replies = False

    async def __aenter__(self) -> Proxy:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def open(self) -> None:
        self.lose_replies = False
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._writers |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer, False), self._pump(up_reader, writer, True))
        self._writers -= {writer, up_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replies: bool) -> None:
        try:
            while data := await reader.read(65536):
                if replies and self.lose_replies:
                    continue
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()


async def kill_etcd(infra: Infra) -> None:
    process = infra.processes["etcd"]
    process.kill()
    await process.wait()


async def eventually(check: Callable[[], Any], timeout_s: float = 10) -> float:
    """Wait until `await check()` is true; return the seconds that took."""
    begin = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not await check():
            await asyncio.sleep(0.01)
    return time.monotonic() - begin


# -- keys


async def delete_prefix(etcd: Etcd, prefix: str) -> int:
    """Delete all keys under a prefix in one request; return their number."""
    first, end = _range_of(prefix)
    request = rpc.DeleteRangeRequest(key=first, range_end=end)
    reply, _ = await etcd._cluster.call(lambda stubs: stubs.kv.DeleteRange, request)
    return int(reply.deleted)


async def test_keys(etcd: Etcd, root: str) -> None:
    assert await etcd.get(root + "a") is None
    await etcd.put(root + "b", b"\x00\xff")
    await etcd.put(root + "ä/1", b"")
    await etcd.put(root + "a", b"1")
    await etcd.put(root + "a", b"2")
    items, revision = await etcd.get_prefix(root)
    assert [(item.key.removeprefix(root), item.value) for item in items] == [
        ("a", b"2"), ("b", b"\x00\xff"), ("ä/1", b""),
    ]  # fmt: skip
    assert revision >= max(item.mod_revision for item in items)
    assert isinstance(items[0], KeyValue)
    assert await etcd.get(root + "b") == b"\x00\xff"
    everything, _ = await etcd.get_prefix("")
    assert set(items) <= set(everything)
    assert await etcd.delete(root + "a")
    assert not await etcd.delete(root + "a")
    assert await delete_prefix(etcd, root) == 2
    assert (await etcd.get_prefix(root))[0] == []


async def test_a_prefix_is_not_a_longer_name(etcd: Etcd, root: str) -> None:
    for name in ("x", "x/1", "x\U0010ffff", "y"):
        await etcd.put(root + name, b"")
    items, _ = await etcd.get_prefix(root + "x")
    assert [item.key.removeprefix(root) for item in items] == ["x", "x/1", "x\U0010ffff"]


async def test_one_of_many_concurrent_creates_succeeds(etcd_server: str, root: str) -> None:
    clients = [Etcd.connect(etcd_server) for _ in range(4)]
    won = await asyncio.gather(*(client.create(root + "k", b"same") for client in clients for _ in range(10)))
    assert won.count(True) == 1
    for client in clients:
        await client.close()


async def test_create_recognizes_its_own_key_when_the_reply_was_lost(etcd_server: str, root: str) -> None:
    async with Proxy(etcd_server) as proxy, Etcd.connect(proxy.url) as client, Etcd.connect(etcd_server) as other:
        lease = await client.grant(60)
        proxy.lose_replies = True
        creating = asyncio.create_task(client.create(root + "k", b"mine", lease))
        await eventually(lambda: other.get(root + "k"))
        await proxy.cut()
        await proxy.open()
        assert await creating
        assert not await client.create(root + "k", b"mine", lease)
        await other.revoke(lease)


async def test_a_lease_must_exist(etcd: Etcd, root: str) -> None:
    with pytest.raises(TransportError, match=r"etcd refused at http://.*: .*lease not found"):
        await etcd.put(root + "k", b"", lease=12345)
    await etcd.revoke(12345)


async def test_a_lease_id_can_be_chosen_once(etcd: Etcd) -> None:
    chosen = uuid.uuid4().int % 2**62
    assert await etcd.grant(60, chosen) == chosen
    with pytest.raises(TransportError, match=f"cannot grant etcd lease {chosen:x}: it exists"):
        await etcd.grant(60, chosen)
    await etcd.revoke(chosen)
    lease = await etcd.lease(60, chosen)
    assert lease.id == chosen
    await lease.revoke()


# -- failures


async def test_an_unreachable_etcd_is_reported_soon_and_clearly() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    async with Etcd.connect(url) as client:
        with pytest.raises(TransportError) as caught:
            await client.get("k")
    assert time.monotonic() - begin < 3.5
    assert caught.value.message.startswith(f"etcd does not answer at {url}: ")
    assert "Connection refused" in caught.value.message
    assert caught.value.hint == "start etcd, or set ETCD_ENDPOINTS to where it answers"


@pytest.mark.parametrize("bad", ["", " , ", "ftp://host", "http://", "host:port"])
async def test_invalid_addresses(bad: str) -> None:
    with pytest.raises(ConfigError):
        Etcd.connect(bad)


async def test_calls_wait_for_etcd_until_their_deadline(private: Etcd, private_infra: Infra) -> None:
    await private.put("k", b"1")
    await kill_etcd(private_infra)
    begin = time.monotonic()
    with pytest.raises(TransportError, match="etcd does not answer"):
        await private.get("k", timeout_s=0.5)
    assert 0.3 < time.monotonic() - begin < 2
    waiting = asyncio.create_task(private.get("k", timeout_s=20))
    await private_infra.restart_etcd()
    begin = time.monotonic()
    assert await waiting == b"1"
    assert time.monotonic() - begin < 3


async def test_the_next_endpoint_is_used(etcd_server: str, root: str) -> None:
    async with (
        Proxy(etcd_server) as first,
        Proxy(etcd_server) as second,
        Etcd.connect(f"{first.url},{second.url}") as client,
        watching(client, root) as watcher,
    ):
        lease = await client.lease(2)
        await lease.put(root + "leased", b"")
        for n in range(30):
            if n == 10:
                await first.cut()
            if n == 20:
                await asyncio.gather(first.open(), second.cut())
            await client.put(f"{root}{n:02}", b"")
        events = await watcher.until(lambda events: len(events) >= 32)
        assert [event.key for event in events[2:]] == [f"{root}{n:02}" for n in range(30)]  # type: ignore[union-attr]
        await lease.revoke()


async def test_closing_ends_everything(etcd_server: str, root: str) -> None:
    before = asyncio.all_tasks()
    client = Etcd.connect(etcd_server)
    lease = await client.lease(60)
    await lease.put(root + "k", b"")
    watch = client.watch_prefix(root)
    assert isinstance(await anext(watch), Snapshot)
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    with pytest.raises(TransportError, match="closed"):
        await client.get("k")
    await client.close()
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() <= before


# -- leases


async def test_a_lease_is_kept_alive_until_its_client_closes(etcd: Etcd, etcd_server: str, root: str) -> None:
    client = Etcd.connect(etcd_server)
    lease = await client.lease(1)
    await lease.put(root + "k", b"v")
    await lease.put(root + "missing", b"v")
    await lease.delete(root + "missing")
    await asyncio.sleep(2.5)
    assert [item.key for item in (await etcd.get_prefix(root))[0]] == [root + "k"]
    await client.close()
    assert await eventually(lambda: is_absent(etcd, root + "k")) > 0.3


async def is_absent(client: Etcd, key: str) -> bool:
    return await client.get(key) is None


async def test_revoke_deletes_immediately(etcd: Etcd, root: str) -> None:
    lease = await etcd.lease(60)
    await lease.put(root + "k", b"v")
    await lease.revoke()
    assert await etcd.get(root + "k") is None


async def test_a_lost_lease_is_granted_again_under_its_id_with_its_keys(
    etcd: Etcd, etcd_server: str, root: str
) -> None:
    lease = await etcd.lease(1)
    for name in "abc":
        await lease.put(root + name, name.encode())
    await lease.delete(root + "b")
    async with Etcd.connect(etcd_server) as other, watching(other, root) as watcher:
        await other.revoke(lease.id)
        events = await watcher.until(lambda events: len(events) == 5)
        deleted = [Delete(root + "a"), Delete(root + "c")]
        assert events == [
            Snapshot({root + "a": b"a", root + "c": b"c"}), *deleted, Put(root + "a", b"a"), Put(root + "c", b"c")
        ]  # fmt: skip
        await other.revoke(lease.id)  # under the same id
        assert (await watcher.until(lambda events: len(events) >= 7))[5:7] == deleted
        await lease.put(root + "d", b"d")  # does not wait for the keep-alive to notice
        assert [item.key for item in (await other.get_prefix(root))[0]] == [root + name for name in "acd"]
    await lease.revoke()


async def test_a_lost_lease_leaves_what_others_wrote_meanwhile(etcd: Etcd, etcd_server: str, root: str) -> None:
    lease = await etcd.lease(1)
    for name in "ab":
        await lease.put(root + name, b"mine")
    async with Etcd.connect(etcd_server) as other, watching(other, root) as watcher:
        theirs = await other.lease(10)
        await theirs.put(root + "b", b"theirs")
        await other.revoke(lease.id)
        await watcher.until(lambda events: events[-1] == Put(root + "a", b"mine"))
        assert await other.get(root + "b") == b"theirs"
        await lease.put(root + "b", b"mine again")
        assert await other.get(root + "b") == b"mine again"
        await other.revoke(lease.id)
        await watcher.until(lambda events: events[-1] == Put(root + "b", b"mine again"))
    await lease.revoke()


async def test_a_lease_creates_a_key_once_and_keeps_it(etcd: Etcd, etcd_server: str, root: str) -> None:
    lease = await etcd.lease(1)
    assert await lease.create(root + "a", b"1")
    assert not await lease.create(root + "a", b"2")
    async with Etcd.connect(etcd_server) as other, watching(other, root) as watcher:
        await other.revoke(lease.id)
        assert await lease.create(root + "b", b"2")  # does not wait for the keep-alive to notice
        await watcher.until(lambda events: {Put(root + "a", b"1"), Put(root + "b", b"2")} <= set(events[1:]))
        assert [item.lease for item in (await other.get_prefix(root))[0]] == [lease.id, lease.id]
    await lease.revoke()


@pytest.mark.parametrize("request_type", [rpc.LeaseGrantRequest, rpc.TxnRequest])
async def test_a_lease_restores_its_keys_although_a_reply_is_lost(
    etcd: Etcd, root: str, request_type: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await etcd.lease(30)  # whose keep-alive comes too late to help
    await lease.put(root + "a", b"1")
    call = etcd._cluster.call
    lost: list[Any] = []

    async def call_and_lose_a_reply(method: Any, request: Any, *limits: Any) -> Any:
        reply = await call(method, request, *limits)
        if isinstance(request, request_type) and not lost:
            lost.append(reply)
            raise TransportError("no answer in time")
        return reply

    monkeypatch.setattr(etcd._cluster, "call", call_and_lose_a_reply)
    await etcd.revoke(lease.id)
    with pytest.raises(TransportError, match="no answer in time"):
        await lease.put(root + "b", b"1")
    for _ in range(2):
        await lease.put(root + "b", b"1")
        assert [item.key for item in (await etcd.get_prefix(root))[0]] == [root + "a", root + "b"]
        await etcd.revoke(lease.id)
    await lease.revoke()


async def test_a_key_that_a_lease_creates_again_stays_registered(etcd: Etcd, root: str) -> None:
    lease = await etcd.lease(30)
    await lease.put(root + "a", b"1")
    await etcd.revoke(lease.id)
    assert await lease.create(root + "a", b"2")
    await etcd.revoke(lease.id)
    await lease.put(root + "b", b"1")
    assert await etcd.get(root + "a") == b"2"
    await lease.revoke()


async def test_a_lease_that_is_ended_for_good_is_not_granted_again(
    etcd: Etcd, etcd_server: str, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()
    lease = await etcd.lease(1, on_revoked=ended.set)
    await lease.put(root + "a", b"1")
    async with Etcd.connect(etcd_server) as other:
        await other.revoke(lease.id, for_good=True)
        with pytest.raises(TransportError, match=f"etcd lease {lease.id:x} was revoked by another process"):
            await lease.put(root + "b", b"1")
        await asyncio.wait_for(ended.wait(), 10)
        assert (await other.get_prefix(root))[0] == []
    assert f"etcd lease {lease.id:x} was revoked by another process" in caplog.text
    await lease.revoke()


async def test_leases_survive_an_etcd_that_comes_back_empty(private: Etcd, private_infra: Infra) -> None:
    leases = [await private.lease(10) for _ in range(3)]
    for lease in leases:
        await lease.put(f"k/{lease.id:x}", b"v")
    await kill_etcd(private_infra)
    with pytest.raises(TransportError):
        await asyncio.wait_for(impatient_put(leases[0], "k/late"), 10)
    await private_infra.restart_etcd(wipe=True)

    async def all_there() -> bool:
        return len((await private.get_prefix("k/"))[0]) == 4

    assert await eventually(all_there) < 3  # not only after the TTL
    await asyncio.gather(*(lease.revoke() for lease in leases))
    assert (await private.get_prefix("k/"))[0] == []


async def impatient_put(lease: Any, key: str) -> None:
    lease._cluster.timeout_s = 0.3
    try:
        await lease.put(key, b"v")
    finally:
        lease._cluster.timeout_s = 5.0


# -- watches


async def test_a_watch_yields_the_state_and_then_the_changes(etcd: Etcd, root: str) -> None:
    await etcd.put(root + "a", b"1")
    await etcd.put(root[:-1], b"outside")
    async with aclosing(etcd.watch_prefix(root)) as events:
        assert await anext(events) == Snapshot({root + "a": b"1"})
        await etcd.put(root + "b", b"2")
        await etcd.put(root[:-1], b"outside")
        await etcd.put(root + "b", b"3")
        await delete_prefix(etcd, root)
        seen = [await anext(events) for _ in range(4)]
    assert seen == [Put(root + "b", b"2"), Put(root + "b", b"3"), Delete(root + "a"), Delete(root + "b")]


async def test_no_event_is_lost_or_repeated_when_etcd_is_killed(private: Etcd, private_infra: Infra) -> None:
    async with (
        Etcd.connect(private_infra.etcd_endpoints) as other,
        watching(private, "k/") as watcher,
        watching(other, "k/") as second,
        asyncio.TaskGroup() as tasks,
    ):
        for n in range(200):  # spread over the fault: a put that is retried must not be two events
            tasks.create_task(put_later(other, f"k/{n}", n * 0.005))
        await asyncio.sleep(0.3)
        await kill_etcd(private_infra)
        await asyncio.sleep(0.2)
        await private_infra.restart_etcd()
        events = (await watcher.until(lambda events: len(events) >= 201))[1:]
        await second.until(lambda events: len(events) >= 201)
        await asyncio.sleep(0.2)
        assert watcher.events == second.events
        assert sorted(event.key for event in events) == sorted(f"k/{n}" for n in range(200))  # type: ignore[union-attr]
        by_revision = sorted((await private.get_prefix("k/"))[0], key=lambda item: item.mod_revision)
        assert [event.key for event in events] == [item.key for item in by_revision]  # type: ignore[union-attr]


async def put_later(client: Etcd, key: str, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    await client.create(key, b"v", timeout_s=20)  # a create that is retried writes once; a put might write twice


async def test_a_watch_that_is_far_behind_loses_nothing(private: Etcd, private_infra: Infra) -> None:
    async with (
        Proxy(private_infra.etcd_endpoints) as proxy,
        Etcd.connect(proxy.url) as client,
        watching(client, "k/") as watcher,
    ):
        await proxy.cut()
        await asyncio.gather(*(private.put("k/same", b"%d" % n) for n in range(2500)))
        await proxy.open()
        for seen in (1, 1001):  # cut it between the batches of 1000 revisions in which etcd lets a watch catch up
            await watcher.until(lambda events, seen=seen: len(events) > seen)  # type: ignore[misc]
            await proxy.cut()
            await proxy.open()
        # a put whose answer is late on a busy machine is repeated, and then seen twice
        values = {b"%d" % n for n in range(2500)}
        await watcher.until(lambda events: len(events) > 2500 and values == {event.value for event in events[1:]})  # type: ignore[union-attr]


async def test_an_etcd_that_comes_back_empty_gives_a_new_snapshot(private: Etcd, private_infra: Infra) -> None:
    for n in range(5):
        await private.put(f"k/{n}", b"old")
    async with watching(private, "k/") as watcher:
        await private_infra.restart_etcd(wipe=True)
        await private.put("k/new", b"new")
        events = await watcher.until(lambda events: len(events) >= 2)
        await private.put("k/last", b"x")
        events = await watcher.until(lambda events: events[-1] == Put("k/last", b"x"))
    assert events[1] in (Snapshot({}), Snapshot({"k/new": b"new"}))
    assert events[2:] in ([Put("k/new", b"new"), Put("k/last", b"x")], [Put("k/last", b"x")])


async def test_an_empty_etcd_that_counted_past_our_revision_is_noticed(private: Etcd, private_infra: Infra) -> None:
    async with Proxy(private_infra.etcd_endpoints) as proxy, Etcd.connect(proxy.url) as client:
        await private.put("k/old", b"1")
        async with watching(client, "k/") as watcher:
            await proxy.cut()
            await private_infra.restart_etcd(wipe=True)
            for n in range(10):
                await private.put("k/new", b"%d" % n)
            await proxy.open()
            events = await watcher.until(lambda events: len(events) >= 2)
            assert events == [Snapshot({"k/old": b"1"}), Snapshot({"k/new": b"9"})]


async def test_compaction_gives_a_new_snapshot(private: Etcd, private_infra: Infra) -> None:
    async with Proxy(private_infra.etcd_endpoints) as proxy, Etcd.connect(proxy.url) as client:
        await private.put("k/deleted", b"1")
        async with watching(client, "k/") as watcher:
            await proxy.cut()
            await private.delete("k/deleted")
            for n in range(5):
                await private.put("k/a", b"%d" % n)
            _, revision = await private.get_prefix("")
            await private._cluster.call(
                lambda stubs: stubs.kv.Compact, rpc.CompactionRequest(revision=revision, physical=True)
            )
            await proxy.open()
            events = await watcher.until(lambda events: len(events) >= 2)
            assert events == [Snapshot({"k/deleted": b"1"}), Snapshot({"k/a": b"4"})]
            await private.put("k/a", b"5")
            await watcher.until(lambda events: events[-1] == Put("k/a", b"5"))


# -- passwords and TLS


async def test_passwords_outlive_a_restart(private: Etcd, private_infra: Infra) -> None:
    user = {"name": "root", "password": "secret"}
    await private._cluster.call(lambda stubs: stubs.auth.UserAdd, rpc.AuthUserAddRequest(**user))
    await private._cluster.call(lambda stubs: stubs.auth.RoleAdd, rpc.AuthRoleAddRequest(name="root"))
    await private._cluster.call(
        lambda stubs: stubs.auth.UserGrantRole, rpc.AuthUserGrantRoleRequest(user="root", role="root")
    )
    await private._cluster.call(lambda stubs: stubs.auth.AuthEnable, rpc.AuthEnableRequest())
    url = private_infra.etcd_endpoints
    with pytest.raises(TransportError, match=r"etcd refused at http://.*: .*user name is empty"):
        await private.get("k")
    async with Etcd.connect(url, credentials=EtcdCredentials("root", "wrong")) as client:
        with pytest.raises(TransportError, match=r"etcd refused at http://.*: .*authentication failed"):
            await client.get("k")
    async with (
        Etcd.connect(url, credentials=EtcdCredentials("root", "secret")) as client,
        watching(client, "k/") as watcher,
    ):
        lease = await client.lease(1)
        await lease.put("k/leased", b"1")
        for n in range(3):
            await asyncio.gather(*(client.put(f"k/{n}{m}", b"") for m in range(5)))
            await kill_etcd(private_infra)
            await private_infra.restart_etcd()  # every token is invalid now
        await client.put("k/last", b"")
        await asyncio.sleep(1.5)
        assert await client.get("k/leased") == b"1"
        events = await watcher.until(lambda events: len(events) >= 18)
        assert len({event.key for event in events[1:17]}) == 16  # type: ignore[union-attr]
        assert events[17:] == [Put("k/last", b"")]
        await lease.revoke()


async def test_a_password_for_an_etcd_without_users(etcd_server: str, root: str) -> None:
    async with Etcd.connect(etcd_server, credentials=EtcdCredentials("root", "secret")) as client:
        await client.put(root + "k", b"1")
        assert await client.get(root + "k") == b"1"


async def test_tls(etcd_server: str, root: str, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    tls.load_verify_locations(cert)
    tls.set_alpn_protocols(["h2"])
    tls.verify_mode = ssl.CERT_REQUIRED
    async with Proxy(etcd_server, tls) as proxy:
        pem = (cert.read_bytes(), cert.read_bytes(), key.read_bytes())
        async with Etcd.connect(proxy.url, credentials=EtcdCredentials("", "", *pem)) as client:
            await client.put(root + "k", b"1")
            assert await client.get(root + "k") == b"1"
        async with Etcd.connect(proxy.url) as client:
            with pytest.raises(TransportError, match="etcd does not answer at https://"):
                await client.get(root + "k", timeout_s=0.5)
