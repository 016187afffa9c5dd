"""Subscription to vLLM's KV events, which its engine cores publish over ZeroMQ. Layouts of 0.26 and 0.32.

A message is [topic, sequence number in 8 bytes, msgpack of [time, events, ...]]; each data-parallel rank counts its
messages from 0. Events of KV groups other than the first, and of media other than the GPU's memory (the CPU build's own
cache counts as GPU), are ignored: they say nothing about prefixes in the cache that requests hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import msgspec

from dynamo.engines.vllm.events_config import subscriber_endpoint
from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineEvent
from dynamo.llm.engine import KvListener

log = logging.getLogger(__name__)

POLL_S = 0.005
"""interval of reads while messages arrive: one message is one engine step, and a wake-up costs more than reading it"""
BATCH_MESSAGES = 256
"""messages taken per read"""
QUEUE_MESSAGES = 100_000
REPLAY_TIMEOUT_S = 2.0

_BlockHash = int | bytes


class _BlockStored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[_BlockHash]
    parent_block_hash: _BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[_BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


_Events = list[_BlockStored | _BlockRemoved | _AllBlocksCleared]


class _EventBatch(msgspec.Struct, array_like=True, gc=False):
    time: float
    events: _Events


class _ArrayBatch(msgspec.Struct, array_like=True, gc=False):
    time: float
    events: list[list[Any]]


_ARRAY_FIELDS = {
    "BlockStored": (
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
    ),
    "BlockRemoved": ("type", "block_hashes", "medium"),
}  # fmt: skip

_decode = msgspec.msgpack.Decoder(_EventBatch).decode
_decode_array_batch = msgspec.msgpack.Decoder(_ArrayBatch).decode


def decode_events(payload: bytes) -> list[EngineEvent]:
    """Decode a message's events. Raises msgspec.DecodeError if it is not in a known layout of vLLM."""
    try:
        batch = _decode(payload)
    except msgspec.ValidationError as error:
        try:
            batch = _decode_arrays(payload)
        except msgspec.ValidationError:
            raise error from None
    found: list[EngineEvent] = []
    for event in batch.events:
        if isinstance(event, _AllBlocksCleared):
            found.append(BlocksCleared())
        elif event.group_idx not in (None, 0) or event.medium not in (None, "GPU"):
            continue
        elif isinstance(event, _BlockRemoved):
            found.append(BlocksRemoved(_as_ints(event.block_hashes)))
        else:
            found += _blocks_stored(event)
    return found


def _decode_arrays(payload: bytes) -> _EventBatch:
    """Decode the layout of earlier releases, and of SGLang, whose events are arrays of the type and the fields."""
    batch = _decode_array_batch(payload)
    events = [
        dict(zip(_ARRAY_FIELDS.get(str(event[0]), ("type",)), event, strict=False)) for event in batch.events if event
    ]
    return _EventBatch(batch.time, msgspec.convert(events, _Events))


def _blocks_stored(event: _BlockStored) -> Iterator[BlocksStored]:
    """Yield an event for each run of blocks with equal extra keys, which vLLM lists block by block."""
    hashes = _as_ints(event.block_hashes)
    size = event.block_size
    tokens = event.token_ids
    parent = None if event.parent_block_hash is None else _as_int(event.parent_block_hash)
    keys = event.extra_keys or [None] * len(hashes)
    if not event.lora_name and not any(keys):
        yield BlocksStored(hashes, parent, tokens, size)
        return
    start = 0
    for salt, run in itertools.groupby(_salt(event.lora_name, key) for key in keys):
        end = start + len(list(run))
        yield BlocksStored(hashes[start:end], parent, tokens[start * size : end * size], size, salt)
        parent = hashes[end - 1]
        start = end


def _salt(lora_name: str | None, keys: list[Any] | None) -> str:
    return repr((lora_name, keys)) if lora_name or keys else ""


def _as_int(block_hash: _BlockHash) -> int:
    return block_hash if isinstance(block_hash, int) else int.from_bytes(block_hash, "big")


def _as_ints(hashes: list[_BlockHash]) -> list[int]:
    return [_as_int(block_hash) for block_hash in hashes]


class KvEventSource:
    """Subscribes to one rank's KV events, on the running event loop, until `close`.

    When a message is missing, the one after the gap is held back and a replay is requested. If the replay does not fill
    the gap, the listener receives BlocksCleared: it then knows fewer blocks than the cache holds, but never more.
    """

    def __init__(
        self, rank: int, endpoint: str, replay_endpoint: str | None, listener: KvListener, topic: str = ""
    ) -> None:
        zmq: Any = importlib.import_module("zmq")  # a dependency of vLLM
        self._rank = rank
        self._listener = listener
        self._again = zmq.Again
        self._no_wait = zmq.NOBLOCK
        self._loop = asyncio.get_running_loop()
        context = zmq.Context.instance()  # one of its own would wait for its sockets when it is collected before them
        self._messages = context.socket(zmq.SUB)
        self._messages.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        self._messages.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._messages.connect(subscriber_endpoint(endpoint, rank))
        self._replay: Any = None
        if replay_endpoint:
            self._replay = context.socket(zmq.DEALER)
            self._replay.connect(subscriber_endpoint(replay_endpoint, rank))
        self._expected = 0
        """sequence number of the next message"""
        self._held_back: tuple[int, bytes] | None = None
        """sequence number and payload of the message after a gap, while the gap is being filled"""
        self._gap_timer: asyncio.TimerHandle | None = None
        self._poll_timer: asyncio.TimerHandle | None = None
        # ZeroMQ's descriptors are edge-triggered: a callback must read until the socket is empty
        self._messages_fd = self._messages.getsockopt(zmq.FD)
        self._read_messages()
        if self._replay is not None:
            self._replay_fd = self._replay.getsockopt(zmq.FD)
            self._loop.add_reader(self._replay_fd, self._read_replay)

    def close(self) -> None:
        self._loop.remove_reader(self._messages_fd)
        if self._replay is not None:
            self._loop.remove_reader(self._replay_fd)
            self._replay.close(linger=0)
            self._replay = None  # callbacks that are already scheduled check it
        for timer in (self._poll_timer, self._gap_timer):
            if timer is not None:
                timer.cancel()
        self._messages.close(linger=0)

    def _read_messages(self) -> None:
        """Read a batch of messages, up to a gap, and pass their events on."""
        events: list[EngineEvent] = []
        count = 0
        while count < BATCH_MESSAGES and self._held_back is None:
            message = self._receive(self._messages)
            if message is None:
                break
            count += 1
            sequence, payload = message
            if sequence == self._expected:
                self._accept(payload, events)
            elif sequence > self._expected:
                self._held_back = message
                self._request_replay()
            elif self._replay is None:
                self._report_loss("the engine has restarted", events)
                self._expected = sequence
                self._accept(payload, events)
            # else a replay has already delivered it
        self._schedule_read(idle=count == 0)
        self._deliver(events)

    def _schedule_read(self, *, idle: bool) -> None:
        """Schedule the next `_read_messages`: on the descriptor's signal if the socket is `idle`, else after POLL_S.

        While a gap is being filled it is not scheduled: `_end_gap` calls it.
        """
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        if self._held_back is None and idle:
            self._loop.add_reader(self._messages_fd, self._read_messages)
            return
        self._loop.remove_reader(self._messages_fd)
        if self._held_back is None:
            self._poll_timer = self._loop.call_later(POLL_S, self._read_messages)

    def _request_replay(self) -> None:
        """Request all messages from the expected one on; give up after REPLAY_TIMEOUT_S, or immediately without replays."""
        timeout_s = 0.0
        if self._replay is not None:
            timeout_s = REPLAY_TIMEOUT_S
            self._replay.send_multipart([b"", self._expected.to_bytes(8, "big")], self._no_wait)
            self._loop.call_soon(self._read_replay)  # sending may have consumed the descriptor's signal of an answer
        self._gap_timer = self._loop.call_later(timeout_s, self._end_gap)

    def _read_replay(self) -> None:
        """Read replayed messages; a negative sequence number marks the end of a replay."""
        events: list[EngineEvent] = []
        while self._replay is not None and (message := self._receive(self._replay)) is not None:
            sequence, payload = message
            if sequence < 0:
                self._deliver(events)
                events = []
                self._end_gap()
            elif sequence == self._expected and self._held_back is not None:
                self._accept(payload, events)
        self._deliver(events)

    def _end_gap(self) -> None:
        """Continue with the message that was held back, whether or not the replay has filled the gap before it."""
        if self._gap_timer is not None:
            self._gap_timer.cancel()
        if self._held_back is None:
            return
        sequence, payload = self._held_back
        self._held_back = None
        events: list[EngineEvent] = []
        if sequence > self._expected:
            self._report_loss(f"{sequence - self._expected} messages lost", events)
            self._expected = sequence
        if sequence == self._expected:  # else the replay has delivered it, too
            self._accept(payload, events)
        self._deliver(events)
        self._read_messages()

    def _receive(self, socket: Any) -> tuple[int, bytes] | None:
        """Return the next message's sequence number and payload; None if there is none."""
        with contextlib.suppress(self._again):
            frames = socket.recv_multipart(self._no_wait)
            return int.from_bytes(frames[-2], "big", signed=True), frames[-1]
        return None

    def _accept(self, payload: bytes, events: list[EngineEvent]) -> None:
        """Add the events of the expected message to `events`."""
        self._expected += 1
        try:
            events += decode_events(payload)
        except msgspec.DecodeError as error:
            self._report_loss(f"unreadable message ({error})", events)

    def _report_loss(self, reason: str, events: list[EngineEvent]) -> None:
        log.warning("KV events of vLLM's rank %d incomplete, its cache now counts as empty: %s", self._rank, reason)
        events.append(BlocksCleared())

    def _deliver(self, events: list[EngineEvent]) -> None:
        if events:
            self._listener(self._rank, events)
