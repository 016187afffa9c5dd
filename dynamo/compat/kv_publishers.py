"""`KvEventPublisher` and the two classes that read KV events of vLLM over ZeroMQ, as in ai-dynamo 0.1 to 0.3."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from dynamo.compat.router_events import (
    CachePublisher,
    KvCacheEvent,
    events_of,
    removed_event,
    stored_blocks,
    stored_event,
    token_hashes,
)
from dynamo.errors import StartError
from dynamo.kv_router.events import EngineEvent

if TYPE_CHECKING:
    from dynamo.engines.vllm.events import KvEventSource
    from dynamo.runtime.component import Component

log = logging.getLogger(__name__)


class KvEventPublisher:
    """Reports the KV blocks of a worker to the `KvIndexer`s of its component. Methods may be called in any thread.

    Create it on the event loop. `worker_id` is the id of the instance, as clients see it.
    """

    def __init__(self, component: Component, worker_id: int, kv_block_size: int) -> None:
        token_hashes([], kv_block_size)  # check it now
        self._kv_block_size = kv_block_size
        self._loop = asyncio.get_running_loop()
        self._cache = _cache_publisher(component, worker_id)
        self._warned = False

    def publish_stored(
        self,
        event_id: int,
        token_ids: Sequence[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[int],
        lora_id: int = 0,
        parent_hash: int | None = None,
    ) -> None:
        """Report consecutive blocks of a prompt: their tokens, the number of tokens of each, and the engine's hashes.

        `parent_hash` is the hash of the block before. Blocks from the first of another size on are left out.
        """
        full = next(
            (n for n, size in enumerate(num_block_tokens) if size != self._kv_block_size), len(num_block_tokens)
        )
        if full < len(num_block_tokens) and not self._warned:
            self._warned = True
            log.warning(
                "KV blocks of %d tokens, not %d, are not published", num_block_tokens[full], self._kv_block_size
            )
        blocks = stored_blocks(block_hashes[:full], token_ids, self._kv_block_size)
        self._publish(stored_event(event_id, parent_hash, blocks))

    def publish_removed(self, event_id: int, block_hashes: Sequence[int]) -> None:
        """Report blocks that were evicted, by the engine's hashes."""
        self._publish(removed_event(event_id, block_hashes))

    def _publish(self, event: KvCacheEvent) -> None:
        self._loop.call_soon_threadsafe(self._cache.publish, event)


@dataclass
class ZmqKvEventPublisherConfig:
    """Where vLLM publishes its KV events, by its kv-events-config."""

    worker_id: int
    kv_block_size: int
    zmq_endpoint: str = "tcp://127.0.0.1:5557"
    zmq_topic: str = ""


class ZmqKvEventPublisher:
    """Reports the KV blocks of a vLLM engine to the `KvIndexer`s of a component until `shutdown`."""

    def __init__(self, component: Component, config: ZmqKvEventPublisherConfig) -> None:
        token_hashes([], config.kv_block_size)  # check it now
        cache = _cache_publisher(component, config.worker_id)
        self._source = _source(
            config.zmq_endpoint, config.zmq_topic, lambda events: cache.publish_changes(events, config.kv_block_size)
        )

    def shutdown(self) -> None:
        self._source.close()


class ZmqKvEventListener:
    """Collects the KV events of a vLLM engine, for a `RadixTree`; it needs no NATS and no etcd."""

    def __init__(self, zmq_endpoint: str, zmq_topic: str, kv_block_size: int) -> None:
        token_hashes([], kv_block_size)  # check it now
        self._kv_block_size = kv_block_size
        self._events: list[str] = []
        self._received = 0
        self._source = _source(zmq_endpoint, zmq_topic, self._add)

    def _add(self, events: Sequence[EngineEvent]) -> None:
        for event in events_of(events, self._kv_block_size, self._received):
            self._events.append(msgspec.json.encode(event).decode())
        self._received += 1

    async def get_events(self) -> list[str]:
        """Return the events since the last call, each as JSON for `RadixTree.apply_event`."""
        events = self._events
        self._events = []
        return events


def _cache_publisher(component: Component, worker_id: int) -> CachePublisher:
    cache = CachePublisher(component.runtime, component.namespace, component.name, worker_id)
    component.runtime.spawn(cache.start(), name="KV events")
    return cache


def _source(endpoint: str, topic: str, handler: Callable[[Sequence[EngineEvent]], None]) -> KvEventSource:
    """Subscribe to an engine's events. Raises StartError without pyzmq."""
    from dynamo.engines.vllm.events import KvEventSource  # imported here: the other classes do not need it

    try:
        return KvEventSource(0, endpoint, None, lambda _, events: handler(events), topic)
    except ModuleNotFoundError:
        raise StartError("KV events over ZeroMQ need pyzmq", hint="pip install pyzmq; vLLM has it") from None
