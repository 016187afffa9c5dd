"""Disaggregated prefill: when a prompt is computed by a prefill worker, and the messages between the two workers.

A decode worker puts a `PrefillTask` on the work queue of the prefill workers. The worker that takes it sends a
`PrefillOffer` to that decode worker alone, on the subject that the task names. The decode worker then calls it with a
`PrefillRequest`, or declines. So the prompt travels directly to one worker, however long it is; the death of that worker
is noticed immediately; cancelling the call stops the computation; and a task that is no longer needed costs one message.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Literal, Protocol

import msgspec

from dynamo.llm.protocol import GenerateRequest


class PrefillTask(msgspec.Struct, omit_defaults=True):
    """A prompt that waits for a prefill worker."""

    id: str
    prompt_tokens: int
    reply: str
    """NATS subject on which its decode worker receives a `PrefillOffer`"""
    request_id: str = ""
    """of the request that it belongs to, for logs"""


class PrefillOffer(msgspec.Struct):
    """A prefill worker has taken a task and is ready to compute it."""

    task: str
    worker: int
    """instance id of the prefill worker"""


class PrefillRequest(msgspec.Struct):
    """The acceptance of an offer: the argument of the call to the worker that made it."""

    task: str
    request: GenerateRequest


class PrefillQueue(Protocol):
    """The work queue of the PrefillWorker service as a decode worker uses it."""

    async def put(self, task: PrefillTask) -> None: ...
    async def waiting(self) -> int: ...


class PrefillWorkers(Protocol):
    """The endpoints of the PrefillWorker service as a decode worker uses them."""

    def prefill(self, request: PrefillRequest) -> Awaitable[dict[str, Any]]: ...
    def decline(self, task: str) -> Awaitable[None]: ...


class PrefillSettings(Protocol):
    """A decode worker's settings, which may change while it runs. The first four have ai-dynamo 0.3's names."""

    @property
    def remote_prefill(self) -> bool:
        """Let prefill workers compute prompts."""
        ...

    @property
    def conditional_disagg(self) -> bool:
        """Let them compute only long prompts, and only while the queue is short; False: all prompts."""
        ...

    @property
    def max_local_prefill_length(self) -> int:
        """A prompt is long if more tokens of it than this are not in the decode worker's prefix cache."""
        ...

    @property
    def max_prefill_queue_size(self) -> int:
        """The queue is short while fewer tasks than this wait in it."""
        ...

    @property
    def prefill_timeout_s(self) -> float:
        """Time limit for a prompt to wait in the queue and be computed by a prefill worker."""
        ...


LocalPrefillReason = Literal["off", "short", "queue"]


def local_prefill_reason(settings: PrefillSettings, new_tokens: int, waiting: int) -> LocalPrefillReason | None:
    """Return why the decode worker computes a prompt itself; None: a prefill worker does.

    `new_tokens` of the prompt are not in the decode worker's prefix cache; `waiting` tasks have not been taken yet.
    """
    if not settings.remote_prefill:
        return "off"
    if settings.conditional_disagg and new_tokens <= settings.max_local_prefill_length:
        return "short"
    if settings.conditional_disagg and waiting >= settings.max_prefill_queue_size:
        return "queue"
    return None
