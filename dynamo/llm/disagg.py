"""Prefill by another worker: when it is worth it, and what the two workers say to each other.

A decode worker puts a `PrefillTask` on the work queue of the prefill workers. Whoever takes it offers itself to that
decode worker alone (`PrefillOffer`, on the subject that the task names), which then calls it with a `PrefillRequest` or
declines. So the prompt goes to one worker directly, however long it is, its death is noticed at once, cancelling the
call stops the computation, and a task that nobody wants any more costs a message.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from dynamo.llm.protocol import GenerateRequest


class PrefillTask(msgspec.Struct, omit_defaults=True):
    """A prompt that waits for a prefill worker."""

    id: str
    prompt_tokens: int
    reply: str
    """NATS subject on which its decode worker hears a `PrefillOffer`"""
    request_id: str = ""
    """of the request that it is a part of, for logs"""


class PrefillOffer(msgspec.Struct):
    """A prefill worker has taken a task and is free to do it."""

    task: str
    worker: int
    """its instance id"""


class PrefillRequest(msgspec.Struct):
    """The answer to an offer, as a call of the worker that made it."""

    task: str
    request: GenerateRequest


class PrefillTasks(Protocol):
    """The work queue, as far as a decode worker uses it."""

    async def put(self, task: PrefillTask) -> None: ...
    async def waiting(self) -> int: ...


class Prefiller(Protocol):
    """The endpoints of one prefill worker."""

    def prefill(self, request: PrefillRequest) -> Awaitable[dict[str, Any]]: ...
    def decline(self, task: str) -> Awaitable[None]: ...


class Rules(NamedTuple):
    """ai-dynamo 0.3's settings by their names. The length is in tokens."""

    remote_prefill: bool
    conditional_disagg: bool
    max_local_prefill_length: int
    max_prefill_queue_size: int


Local = Literal["off", "short", "queue"]


def local_reason(rules: Rules, new_tokens: int, waiting: int) -> Local | None:
    """Why a prompt is computed by the worker that decodes it; None: by a prefill worker.

    `new_tokens` of the prompt are not in the decode worker's prefix cache; `waiting` tasks are taken by nobody yet.
    """
    if not rules.remote_prefill:
        return "off"
    if rules.conditional_disagg and new_tokens <= rules.max_local_prefill_length:
        return "short"
    if rules.conditional_disagg and waiting >= rules.max_prefill_queue_size:
        return "queue"
    return None
