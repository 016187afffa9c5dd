"""vLLM's KV events, from its engine core's ZeroMQ publishers to a listener. Layouts of 0.26 and 0.32.

A message is [topic, sequence in 8 bytes, msgpack of [time, events, ...]], with a sequence from 0 for each data-parallel
rank. Events of other KV groups than the first, or of other media than the GPU's memory (as which the CPU's own cache
counts), are passed over: they say nothing about where a prefix is in the cache that requests hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineEvent
from dynamo.llm.engine import KvListener

log = logging.getLogger(__name__)

PAUSE_S = 0.005
"""between two looks while messages come: one message is one engine step, and waking up costs more than reading it"""
BATCH_MESSAGES = 256
"""taken at a look"""
QUEUE_MESSAGES = 100_000
REPLAY_MESSAGES = 1_000
"""kept by the engine core to be sent again"""
REPLAY_TIMEOUT_S = 2.0
_PRIVATE_SOCKET = "inproc"
"""A file name: for a further rank vLLM takes only endpoints with "tcp" or "inproc" in them, and puts _dp<rank> behind."""

_Name = int | bytes


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[_Name]
    parent_block_hash: _Name | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[_Name]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    time: float
    events: list[_Stored | _Removed | _Cleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode


def events_of(payload: bytes) -> list[EngineEvent]:
    """Raises msgspec.DecodeError for what is not vLLM's."""
    found: list[EngineEvent] = []
    for event in _decode(payload).events:
        if isinstance(event, _Cleared):
            found.append(BlocksCleared())
        elif event.group_idx not in (None, 0) or event.medium not in (None, "GPU"):
            continue
        elif isinstance(event, _Removed):
            found.append(BlocksRemoved(_numbers(event.block_hashes)))
        else:
            found += _stored(event)
    return found


def _stored(event: _Stored) -> Iterator[BlocksStored]:
    """One for each run of blocks with the same extra keys, which are given block by block."""
    names, size, tokens = _numbers(event.block_hashes), event.block_size, event.token_ids
    parent = None if event.parent_block_hash is None else _number(event.parent_block_hash)
    keys = event.extra_keys or [None] * len(names)
    if not event.lora_name and not any(keys):
        yield BlocksStored(names, parent, tokens, size)
        return
    start = 0
    for salt, run in itertools.groupby(_salt(event.lora_name, key) for key in keys):
        end = start + len(list(run))
        yield BlocksStored(names[start:end], parent, tokens[start * size : end * size], size, salt)
        parent, start = names[end - 1], end


def _salt(lora_name: str | None, keys: list[Any] | None) -> str:
    return repr((lora_name, keys)) if lora_name or keys else ""


def _number(name: _Name) -> int:
    return name if isinstance(name, int) else int.from_bytes(name, "big")


def _numbers(names: list[_Name]) -> list[int]:
    return [_number(name) for name in names]


def private_config() -> dict[str, Any]:
    """A kv-events-config whose sockets only this user's processes reach; `remove` it in the end."""
    directory = tempfile.mkdtemp(prefix="kv-", dir=os.environ.get("DYNAMO_RUN_DIR"))
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{directory}/{_PRIVATE_SOCKET}",
        "replay_endpoint": f"ipc://{directory}/replay-{_PRIVATE_SOCKET}",
        "buffer_steps": REPLAY_MESSAGES,
    }


def remove(private: Mapping[str, Any]) -> None:
    shutil.rmtree(os.path.dirname(private["endpoint"].removeprefix("ipc://")), ignore_errors=True)


def can_listen(given: Any) -> bool:
    """Whether a user's kv-events-config, a mapping or JSON, has vLLM publish where this process can subscribe."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return False  # vLLM's parser tells
    if not isinstance(given, Mapping) or not given.get("enable_kv_cache_events"):
        return False
    endpoint = str(given.get("endpoint", "tcp://*:5557"))
    bound = endpoint.startswith("ipc://") or (endpoint.startswith("tcp://") and ("*" in endpoint or "::" in endpoint))
    return given.get("publisher", "zmq") == "zmq" and bound and not endpoint.endswith(":0")


def endpoint_of(endpoint: str, rank: int) -> str:
    """Where to connect for what a rank binds: vLLM counts TCP ports up, and marks names that contain "inproc"."""
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}" if rank else endpoint
    host, _, port = endpoint.rpartition(":")
    return f"{host.replace('*', '127.0.0.1').replace('[::]', '[::1]')}:{int(port) + rank}"


class KvEventSource:
    """Listens to one rank, on the running event loop, until `close`.

    Messages that are missing are asked for again. Where that fails, the listener hears that the cache was cleared: what
    the cache holds beyond it is then not known, and nothing is taken for cached that is not.
    """

    def __init__(self, rank: int, endpoint: str, replay_endpoint: str | None, listener: KvListener) -> None:
        zmq: Any = importlib.import_module("zmq")  # comes with vLLM
        self._rank, self._listener = rank, listener
        self._again, self._no_wait, self._descriptor = zmq.Again, zmq.NOBLOCK, zmq.FD
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._messages = self._context.socket(zmq.SUB)
        self._messages.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        self._messages.setsockopt(zmq.SUBSCRIBE, b"")
        self._messages.connect(endpoint_of(endpoint, rank))
        self._replay: Any = None
        if replay_endpoint:
            self._replay = self._context.socket(zmq.DEALER)
            self._replay.connect(endpoint_of(replay_endpoint, rank))
        self._next = 0
        self._early: tuple[int, bytes] | None = None  # behind the gap that is being filled
        self._timer: asyncio.TimerHandle | None = None
        # ZeroMQ's descriptors tell a change only: whoever is called must read until there is nothing more
        self._fd = self._messages.getsockopt(self._descriptor)
        self._next_look: asyncio.TimerHandle | None = None
        self._read()
        if self._replay is not None:
            self._loop.add_reader(self._replay.getsockopt(self._descriptor), self._read_replay)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._replay is not None:
            self._loop.remove_reader(self._replay.getsockopt(self._descriptor))
            self._replay = None  # for whoever is called later
        for timer in (self._next_look, self._timer):
            if timer is not None:
                timer.cancel()
        self._context.destroy(linger=0)

    def _read(self) -> None:
        """Called by the descriptor after a silence, by a timer while messages come."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        events: list[EngineEvent] = []
        silent = True
        for _ in range(BATCH_MESSAGES):
            frames = None if self._early is not None else self._received(self._messages)
            if frames is None:
                break
            silent = False
            number = int.from_bytes(frames[-2], "big")
            if number > self._next:
                self._early = number, frames[-1]
                self._ask_again()
            elif number == self._next:
                self._take(frames[-1], events)
        if self._early is not None:
            self._loop.remove_reader(self._fd)  # what fills the gap comes first
        elif silent:
            self._loop.add_reader(self._fd, self._read)
        else:
            self._loop.remove_reader(self._fd)
            self._next_look = self._loop.call_later(PAUSE_S, self._read)
        self._tell(events)

    def _read_replay(self) -> None:
        events: list[EngineEvent] = []
        while self._replay is not None and (frames := self._received(self._replay)) is not None:
            number = int.from_bytes(frames[-2], "big", signed=True)
            if number == self._next and self._early is not None:
                self._take(frames[-1], events)
            elif number < 0:
                self._tell(events)
                events = []
                self._go_on()
        self._tell(events)

    def _received(self, socket: Any) -> Sequence[bytes] | None:
        with contextlib.suppress(self._again):
            frames: Sequence[bytes] = socket.recv_multipart(self._no_wait)
            return frames
        return None

    def _ask_again(self) -> None:
        if self._replay is not None:
            self._replay.send_multipart([b"", self._next.to_bytes(8, "big")], self._no_wait)
            self._loop.call_soon(self._read_replay)  # sending may have swallowed the sign of an answer
        self._timer = self._loop.call_later(REPLAY_TIMEOUT_S if self._replay is not None else 0, self._go_on)

    def _go_on(self) -> None:
        """Behind the gap, which is filled or is not."""
        if self._timer is not None:
            self._timer.cancel()
        if self._early is None:
            return
        (number, payload), self._early = self._early, None
        events: list[EngineEvent] = []
        if number > self._next:
            self._lose(f"{number - self._next} messages are lost", events)
            self._next = number
        if number == self._next:
            self._take(payload, events)
        self._tell(events)
        self._read()

    def _take(self, payload: bytes, events: list[EngineEvent]) -> None:
        self._next += 1
        try:
            events += events_of(payload)
        except msgspec.DecodeError as error:
            self._lose(f"a message cannot be read ({error})", events)

    def _lose(self, what: str, events: list[EngineEvent]) -> None:
        log.warning("vLLM's KV events, rank %d: %s; the KV cache counts as empty up to here", self._rank, what)
        events.append(BlocksCleared())

    def _tell(self, events: list[EngineEvent]) -> None:
        if events:
            self._listener(self._rank, events)
