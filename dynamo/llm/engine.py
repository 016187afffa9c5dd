"""What a worker needs from an inference engine. Two exist: vLLM and the mock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from dynamo.kv_router.events import EngineEvent
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Stream


class EngineInfo(NamedTuple):
    """What an engine knows once it has started. Lengths in tokens; `kv_blocks` are those of one rank."""

    context_length: int
    kv_block_size: int
    kv_blocks: int
    ranks: int = 1
    """data-parallel engines, each with a KV cache of its own"""
    slots: int = 0
    """requests that one rank runs at a time: vLLM's max-num-seqs"""
    part_of: str = ""
    """for a node of an engine that spans several hosts, other than its leader: what it is, since it takes no requests"""


class EngineStats(NamedTuple):
    """Load of an engine at one moment; `kv_usage` is a fraction of 0 to 1, hits and queries count tokens."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int


class KvTransfers(NamedTuple):
    """KV that an engine fetched from others since its start. `seconds` are summed over all pulls; `expired`: requests
    whose KV it kept and nobody fetched."""

    pulls: int = 0
    failures: int = 0
    bytes: int = 0
    seconds: float = 0.0
    expired: int = 0

    def plus(self, other: KvTransfers) -> KvTransfers:
        return KvTransfers(
            self.pulls + other.pulls,
            self.failures + other.failures,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.expired + other.expired,
        )


KvListener = Callable[[int, Sequence[EngineEvent]], None]
"""Gets a data-parallel rank and what changed in its KV cache since the last call, in order; on the event loop."""


class Engine(Protocol):
    """Started once, then generates for many requests at a time.

    `start` is called before any gRPC channel is open, in the main thread: an engine may fork. `generate` returns at
    once; the stream's errors are RequestError for a bad request and EngineError when the engine has failed. Cancelling
    the stream aborts the request and frees its KV blocks. `check_health` raises EngineError. `kv_events` is called before
    `start` by whoever wants to hear of the KV cache; it returns False when this engine will not tell. `stats` has one
    entry for each data-parallel rank; `kv_transfers` is None for an engine that transfers no KV, or does not count it.

    `prefill` computes the KV of a prompt and keeps it for another engine: what it returns is that request's
    `kv_transfer` there (vLLM's kv_transfer_params). KV that nobody fetches is freed after a time. A `generate` with a
    `kv_transfer` that cannot be fetched computes the prompt itself. Cancelling `prefill` frees everything.
    """

    async def start(self) -> EngineInfo: ...
    def generate(self, request: GenerateRequest) -> Stream[Delta]: ...
    async def prefill(self, request: GenerateRequest) -> dict[str, Any]: ...
    async def abort(self, request_id: str) -> None: ...
    def stats(self) -> Sequence[EngineStats]: ...
    def kv_transfers(self) -> KvTransfers | None: ...
    def kv_events(self, listener: KvListener) -> bool: ...
    async def check_health(self) -> None: ...
    async def stop(self) -> None: ...
