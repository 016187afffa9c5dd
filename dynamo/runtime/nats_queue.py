"""`NatsQueue` of the 0.x binding: tasks as bytes, each for one of many workers, over our client of JetStream."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from dynamo.transport.nats import Nats
from dynamo.transport.pull_subscription import NS_PER_S, error_code
from dynamo.transport.work_queue import NAME_IN_USE, JetStreamQueue

MAX_AGE_S = 600.0
"""Tasks that no worker has taken by then are dropped, as in 0.x."""
LOST_AFTER_S = 30.0
UNLIMITED = -1
MAX_TRIES = 5


class SharedQueue(JetStreamQueue):
    """A queue in a stream and with a consumer as 0.x made them, or as they are found: other programs may use them."""

    consumer = "worker-group"

    async def _create(self, nats: Nats) -> None:
        stream = {"name": self.stream, "subjects": [f"{self.stream}.*"], "max_age": int(MAX_AGE_S * NS_PER_S)}
        answer = await self._request(nats, f"STREAM.CREATE.{self.stream}", stream)
        if error_code(answer) not in (0, NAME_IN_USE):
            raise self._not_opened(answer)
        if error_code(await self._request(nats, f"CONSUMER.INFO.{self.stream}.{self.consumer}")):
            consumer = {"durable_name": self.consumer, "ack_policy": "explicit"}
            request = {"stream_name": self.stream, "config": consumer}
            answer = await self._request(nats, f"CONSUMER.DURABLE.CREATE.{self.stream}.{self.consumer}", request)
            if error_code(answer):
                raise self._not_opened(answer)

    async def waiting(self) -> int:
        """Return the number of tasks that no worker has taken, now."""
        info = await self._info(f"CONSUMER.INFO.{self.stream}.{self.consumer}")
        return int(info["num_pending"])


class NatsQueue:
    """A queue in the stream `stream_name`, shared by all who name it. A task counts as done once it was dequeued.

    It connects to `nats_server` at the first use, and belongs to the event loop of that. `dequeue_timeout` is in seconds.
    All methods raise TransportError.
    """

    def __init__(self, stream_name: str, nats_server: str, dequeue_timeout: float) -> None:
        self._nats_server = nats_server
        self._timeout_s = dequeue_timeout
        self._stream = stream_name.replace("/", "_").replace("\\", "_")
        self._nats: Nats | None = None
        self._connecting = asyncio.Lock()
        self._queue = self._new_queue()

    def _new_queue(self) -> SharedQueue:
        return SharedQueue(
            self._connected,
            self._stream,
            f"{self._stream}.queue",
            max_tasks=UNLIMITED,
            max_age_s=MAX_AGE_S,
            max_tries=MAX_TRIES,
            lost_after_s=LOST_AFTER_S,
        )

    async def _connected(self) -> Nats:
        async with self._connecting:
            if self._nats is None:
                self._nats = await Nats.connect(self._nats_server, name=f"queue {self._stream}")
            return self._nats

    async def connect(self) -> None:
        """Connect, and create the stream if it does not exist."""
        await self._queue.waiting()

    async def ensure_connection(self) -> None:
        """Connect unless that has happened."""
        if self._nats is None:
            await self.connect()

    async def close(self) -> None:
        """Disconnect. Using the queue again connects again."""
        await self._queue.close()
        if self._nats is not None:
            await self._nats.close()
        self._nats = None
        self._queue = self._new_queue()

    async def enqueue_task(self, task_data: bytes) -> None:
        """Add a task; return when the server has stored it."""
        await self._queue.put(task_data)

    async def dequeue_task(self, timeout: float | None = None) -> bytes | None:
        """Take a task; None if there is none within `timeout` seconds."""
        async with aclosing(self._queue.take(1)) as tasks:
            try:
                async with asyncio.timeout(self._timeout_s if timeout is None else timeout):
                    delivery = await anext(tasks, None)
            except TimeoutError:
                return None
        # acknowledged after the subscription has ended, which would request another task otherwise
        if delivery is None:  # closed meanwhile
            return None
        await delivery.done()
        return delivery.payload

    async def get_queue_size(self) -> int:
        """Return the number of tasks that no worker has taken."""
        return await self._queue.waiting()
