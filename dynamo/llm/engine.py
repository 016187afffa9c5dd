"""The interface of an inference engine, implemented by vLLM and by the mock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from dynamo.kv_router.events import EngineEvent
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Stream


class EngineInfo(NamedTuple):
    """Properties of a started engine. Lengths are in tokens."""

    context_length: int
    kv_block_size: int
    kv_blocks: int
    """KV blocks of one rank"""
    ranks: int = 1
    """data-parallel ranks, each with its own KV cache"""
    slots: int = 0
    """requests that one rank runs at a time: vLLM's max-num-seqs"""
    headless: str = ""
    """description of a follower node of an engine that spans several hosts, which takes no requests; else empty"""


class EngineStats(NamedTuple):
    """Load of one rank at one moment. The prefix counters are in tokens, since the start."""

    running: int
    waiting: int
    kv_usage: float
    """fraction of the KV blocks in use, 0 to 1"""
    prefix_queries: int
    """prompt tokens looked up in the prefix cache"""
    prefix_hits: int
    """prompt tokens found there"""


class KvTransfers(NamedTuple):
    """KV transfers of an engine since its start."""

    pulls: int = 0
    """fetches from other engines that have ended, failed ones included"""
    failures: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """sum over all pulls"""
    expired: int = 0
    """prompts whose KV was kept for another engine and not fetched in time"""

    def plus(self, other: KvTransfers) -> KvTransfers:
        """Return the sum of both."""
        return KvTransfers(
            self.pulls + other.pulls,
            self.failures + other.failures,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.expired + other.expired,
        )


KvListener = Callable[[int, Sequence[EngineEvent]], None]
"""Called on the event loop with a data-parallel rank and the changes of its KV cache since the last call, in order."""


Generate = Callable[[GenerateRequest], Stream[Delta]]
"""`Engine.generate`, or what stands before it in a worker: see `RemotePrefill` and `WorkerReporter`"""


class Engine(Protocol):
    """An inference engine: started once, then runs many requests at a time."""

    async def start(self) -> EngineInfo:
        """Load the model. Called in the main thread, before any gRPC channel is open: an engine may fork.

        Raises StartError.
        """
        ...

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """Return the deltas of a request, without waiting.

        The stream ends with RequestError for an invalid request and with EngineError if the engine has failed. Cancelling
        it aborts the request and frees its KV blocks. If the KV that `kv_transfer` names cannot be fetched, the prompt is
        computed.
        """
        ...

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """Compute the KV of a prompt and keep it for another engine, for a limited time.

        Returns the `kv_transfer` of the request to the other engine (vLLM's kv_transfer_params). Cancelling frees
        everything. Raises RequestError and EngineError as `generate` does.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Cancel all requests with that id."""
        ...

    def stats(self) -> Sequence[EngineStats]:
        """Return the load of each data-parallel rank."""
        ...

    def kv_transfers(self) -> KvTransfers | None:
        """Return the transfers so far; None for an engine that transfers no KV, or does not count it."""
        ...

    def kv_events(self, listener: KvListener) -> bool:
        """Report changes of the KV cache to `listener`; return False if this engine cannot. To be called before `start`."""
        ...

    async def check_health(self) -> None:
        """Raise EngineError if the engine has failed."""
        ...

    async def stop(self) -> None:
        """Stop the engine; running requests end with EngineError."""
        ...
