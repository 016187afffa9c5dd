"""`runtime.etcd_client()` and `EtcdKvCache` of the 0.x binding, over our etcd client. They connect at the first call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from dynamo.errors import TransportError
from dynamo.rpc.discovery import watch
from dynamo.rpc.runtime import Runtime
from dynamo.transport.etcd import Put, Snapshot


class EtcdClient:
    """Keys in etcd. They are removed when this process ends, unless they are given another lease, or 0 for none.

    Those of this process are restored when etcd loses its lease. All methods raise TransportError.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def primary_lease_id(self) -> int:
        """Return the id of this process, as an instance and as an etcd lease; known before it connects."""
        return self.runtime.instance_id

    async def kv_create(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Write a key. Raises TransportError if it exists."""
        if not await self.create(key, value, lease_id):
            raise TransportError(f"failed to create key {key} in etcd: it exists")

    async def kv_create_or_validate(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Write a key, unless it exists with that value. Raises TransportError if it exists with another one."""
        if await self.create(key, value, lease_id):
            return
        if await self.runtime.etcd.get(key) != _bytes(value):
            raise TransportError(f"failed to create or validate key {key} in etcd: it exists with another value")

    async def create(self, key: str, value: bytes, lease_id: int | None = None) -> bool:
        """Write a key if it does not exist; return whether this call wrote it."""
        await self.runtime.connect()
        if self._is_primary(lease_id):
            return await self.runtime.lease.create(key, _bytes(value))
        return await self.runtime.etcd.create(key, _bytes(value), lease_id)

    async def kv_put(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Write a key."""
        await self.runtime.connect()
        if self._is_primary(lease_id):
            await self.runtime.lease.put(key, _bytes(value))
        else:
            await self.runtime.etcd.put(key, _bytes(value), lease_id)

    async def kv_get_prefix(self, prefix: str) -> list[dict[str, Any]]:
        """Return the keys that begin with `prefix`, sorted: `key`, `value` (bytes), and etcd's numbers on each."""
        await self.runtime.connect()
        found, _ = await self.runtime.etcd.get_prefix(prefix)
        return [item._asdict() for item in found]

    async def delete(self, key: str) -> None:
        """Delete a key of any process; no-op if it does not exist."""
        await self.runtime.connect()
        await self.runtime.lease.delete(key)

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease, with its keys. The process whose primary lease it is finishes its calls and stops."""
        await self.runtime.connect()
        await self.runtime.etcd.revoke(lease_id, for_good=True)

    def _is_primary(self, lease_id: int | None) -> bool:
        return lease_id is None or lease_id == self.runtime.instance_id


class EtcdKvCache:
    """The keys under a prefix, kept here as they change: reading them costs no call. Made by `create`."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        """Not for users: it does not follow etcd yet."""
        self.prefix = prefix
        self._client = client
        self._values: dict[str, bytes] = {}

    @classmethod
    async def create(
        cls, etcd_client: EtcdClient, prefix: str, initial_values: Mapping[str, str | bytes]
    ) -> EtcdKvCache:
        """Write those of the initial values that etcd lacks, and follow the prefix. Raises TransportError."""
        cache = cls(etcd_client, prefix)
        for key, value in initial_values.items():
            await etcd_client.create(prefix + key, _bytes(value))
        cache._values = {item["key"]: item["value"] for item in await etcd_client.kv_get_prefix(prefix)}
        etcd_client.runtime.spawn(cache._follow(), name=f"cache of {prefix} in etcd")
        return cache

    new = create

    async def get(self, key: str) -> bytes | None:
        return self._values.get(self.prefix + key)

    async def get_all(self) -> dict[str, bytes]:
        """Return all values; the keys are without the prefix."""
        return {key.removeprefix(self.prefix): value for key, value in self._values.items()}

    async def put(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Write a key, in etcd and here. Raises TransportError."""
        known = self._values.get(self.prefix + key)
        await self._client.kv_put(self.prefix + key, value, lease_id)
        if self._values.get(self.prefix + key) is known:  # else etcd has reported this change already, or a later one
            self._values[self.prefix + key] = _bytes(value)

    async def delete(self, key: str) -> None:
        """Delete a key, in etcd and here. Raises TransportError."""
        known = self._values.get(self.prefix + key)
        await self._client.delete(self.prefix + key)
        if self._values.get(self.prefix + key) is known:
            self._values.pop(self.prefix + key, None)

    async def clear_all(self) -> None:
        """Delete all keys under the prefix. Raises TransportError."""
        for key in await self.get_all():
            await self.delete(key)

    async def _follow(self) -> None:
        """Apply what happens in etcd, until the runtime closes."""
        async with aclosing(watch(self._client.runtime.etcd, self.prefix)) as events:
            async for event in events:
                if isinstance(event, Snapshot):
                    self._values = dict(event.items)
                elif isinstance(event, Put):
                    self._values[event.key] = event.value
                else:
                    self._values.pop(event.key, None)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
