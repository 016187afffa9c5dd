"""Migration: another worker continues a request whose worker is lost.

The tokens that the worker has generated are kept here. When it is lost, another worker gets the prompt with those tokens
appended, and the reader's stream continues: same text, same usage. Each unfinished choice of a request with n > 1 is
continued by a request of its own. If nothing was generated yet, the request is sent again as it was.

Not carried over: the state of a seeded random generator, penalties on generated tokens (they are part of the prompt now),
and the state of a grammar; structured output of which tokens were already sent ends with the error instead.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Sequence, Set
from functools import partial

import msgspec

from dynamo.errors import (
    DynamoError,
    EngineDeadError,
    NoInstancesError,
    TransportError,
    UnavailableError,
    WorkerLostError,
)
from dynamo.llm.continuation import Continuation
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)

Prepare = Callable[[], Awaitable[GenerateRequest]]
Send = Callable[[GenerateRequest, Set[int]], Awaitable[Stream[Delta]]]
"""Send a request to a worker, to one of these lost instances only if there are no others."""
Decode = Callable[[list[int], bool], str]
"""Return the text of tokens, without special tokens if the second argument is true."""


REASONS = tuple(str(error.code) for error in (WorkerLostError, EngineDeadError, UnavailableError, TransportError))
"""codes of the errors after which a request is continued by another worker"""


def migrating(
    prepare: Prepare, send: Send, decode: Decode, limit: int, migrated: Callable[[str], None]
) -> Stream[Delta]:
    """Return the stream of the request that `prepare` makes; send it up to `limit` more times if its worker is lost.

    `migrated` is called each time with the code of the error. The last error ends the stream.
    """
    if limit <= 0:
        return Stream.opening(_send_once(prepare, send))
    migration = _Migration(send, decode, limit, migrated)
    opening = asyncio.get_running_loop().create_task(migration.open(prepare))
    migration.out.on_cancel = opening.cancel
    return Stream(migration.out, opening)


async def _send_once(prepare: Prepare, send: Send) -> Stream[Delta]:
    return await send(await prepare(), frozenset())


class _Choice:
    """The part of one choice that the reader has got."""

    __slots__ = ("finish_reason", "texts", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None

    def record(self, delta: Delta) -> None:
        self.tokens.extend(delta.token_ids)
        self.texts.append(delta.text)
        self.finish_reason = delta.finish_reason


class _Attempt:
    """One request to one worker, for some of the choices; `first_error` is the first loss before it."""

    __slots__ = ("continuation", "first_error", "indexes", "number", "request", "stream", "task")

    def __init__(
        self, number: int, request: GenerateRequest, indexes: Sequence[int], first_error: Exception | None
    ) -> None:
        self.number = number
        self.request = request
        self.indexes = indexes
        self.first_error = first_error
        self.continuation: Continuation | None = None
        self.stream: Stream[Delta] | None = None
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.stream is not None:
            self.stream.cancel()
        elif self.task is not None:
            self.task.cancel()


class _Migration:
    """One request: `open` makes the first attempt, each loss one more for each unfinished choice."""

    def __init__(self, send: Send, decode: Decode, limit: int, migrated: Callable[[str], None]) -> None:
        self.out: Channel[Delta] = Channel()
        self._send = send
        self._decode = decode
        self._limit = limit
        self._migrated = migrated
        # request id and deadline: the end of a lost connection is reported from another context
        self._context = contextvars.copy_context()
        self._choices: list[_Choice] = []
        self._counted = False  # the reader has got the number of prompt tokens
        self._attempts: set[_Attempt] = set()  # started and not ended
        self._lost: set[int] = set()  # instances

    async def open(self, prepare: Prepare) -> None:
        try:
            self._request = await prepare()
        except Exception as error:
            self.out.end(error)
            return
        indexes = range(self._request.sampling.n)
        self._choices = [_Choice() for _ in indexes]
        first = _Attempt(0, self._request, indexes, None)
        self._attempts.add(first)
        await self._start(first)

    async def _start(self, attempt: _Attempt) -> None:
        """Send an attempt's request and pass its deltas on."""
        try:
            attempt.continuation = self._continuation(attempt.indexes)
            stream = await self._send(attempt.request, self._lost)
        except Exception as error:
            self._attempts.discard(attempt)
            self._fail(attempt, error)
            return
        if self.out.done:
            stream.cancel()
            return
        attempt.stream = stream
        alone = len(self._attempts) == 1  # only then the reader's progress is that of this stream
        self.out.on_cancel = self._cancel
        self.out.on_consumed = stream.consumed if alone else None
        on_delta = self._on_first_delta if attempt.number == 0 else partial(self._on_later_delta, attempt)
        stream.pipe(on_delta, partial(self._on_end, attempt), counted=not alone)

    def _on_first_delta(self, delta: Delta) -> None:
        """Pass on a delta of the first attempt.

        Runs for every token of every stream: `_Choice.record` is written out, a call less.
        """
        choice = self._choices[delta.index]
        choice.tokens.extend(delta.token_ids)
        choice.texts.append(delta.text)
        choice.finish_reason = delta.finish_reason
        if delta.prompt_tokens is not None:
            self._counted = True
        self.out.push(delta)

    def _on_later_delta(self, attempt: _Attempt, delta: Delta) -> None:
        """Pass on a delta of a later attempt as if it came from the first one."""
        joined = delta if attempt.continuation is None else attempt.continuation.join(delta)
        first_count = delta.prompt_tokens is not None and not self._counted
        joined = msgspec.structs.replace(
            joined,
            index=delta.index if len(attempt.indexes) > 1 else attempt.indexes[0],
            prompt_tokens=len(self._request.token_ids) if first_count else None,  # without those appended
            cached_tokens=delta.cached_tokens if first_count else None,
        )
        self._counted |= first_count
        self._choices[joined.index].record(joined)
        self.out.push(joined)
        if joined.finish_reason is not None and delta.finish_reason is None and attempt.stream is not None:
            attempt.stream.cancel()  # its request has no stop strings
            self._on_end(attempt, None)

    def _on_end(self, attempt: _Attempt, error: BaseException | None) -> None:
        self._attempts.discard(attempt)
        if error is not None:
            unfinished = [index for index in attempt.indexes if self._choices[index].finish_reason is None]
            if unfinished:
                self._continue(attempt, unfinished, error)
        if not self._attempts:
            self.out.end()

    def _continue(self, attempt: _Attempt, unfinished: list[int], error: BaseException) -> None:
        """Send the unfinished choices of an attempt to other workers, or end the stream with the error."""
        generated = sum(len(self._choices[index].tokens) for index in unfinished)
        if not self._can_continue(attempt, generated, error):
            self._fail(attempt, error)
            return
        assert isinstance(error, DynamoError)
        if attempt.stream is not None and attempt.stream.source is not None:
            self._lost.add(attempt.stream.source)
        self._migrated(error.code or "other")
        # a copy, since an attempt that is lost immediately is still running in its task's own context
        context = self._context.copy()
        context.run(log.info, "continuing on another worker after %d tokens: %s", generated, error.message)
        number = attempt.number + 1
        as_before = not generated and len(unfinished) == len(attempt.indexes)
        for indexes in [attempt.indexes] if as_before else [[index] for index in unfinished]:
            later = _Attempt(number, self._remaining(indexes, number), indexes, attempt.first_error or error)
            self._attempts.add(later)
            later.task = asyncio.get_running_loop().create_task(self._start(later), context=context.copy())

    def _can_continue(self, attempt: _Attempt, generated: int, error: BaseException) -> bool:
        if attempt.number >= self._limit or (generated and self._request.sampling.structured):
            return False
        if isinstance(error, (WorkerLostError, EngineDeadError)):
            return True
        # before the first token, these mean that the call has tried several instances already
        refused = isinstance(error, (UnavailableError, TransportError)) and not isinstance(error, NoInstancesError)
        return refused and generated > 0

    def _remaining(self, indexes: Sequence[int], number: int) -> GenerateRequest:
        """Return the request for the rest of these choices: of all as at first, or of one with what it has got so far."""
        request = self._request
        sampling = request.sampling
        tokens: list[int] = []
        name = f"{request.request_id}-{number}" if request.request_id else ""
        if len(indexes) < sampling.n:
            (index,) = indexes
            name = name and f"{name}.{index}"
            # engines seed the choices of one request like this
            seed = None if sampling.seed is None else sampling.seed + index
            sampling = msgspec.structs.replace(sampling, n=1, seed=seed)
        if len(indexes) == 1 and (tokens := self._choices[indexes[0]].tokens):
            max_tokens = None if sampling.max_tokens is None else sampling.max_tokens - len(tokens)
            min_tokens = max(sampling.min_tokens - len(tokens), 0)
            sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens, min_tokens=min_tokens, stop=[])
        return GenerateRequest(request.token_ids + tokens, sampling, name, final_only=request.final_only)

    def _continuation(self, indexes: Sequence[int]) -> Continuation | None:
        """Return what joins the rest of one choice to its text so far; None if there is no text so far."""
        choice = self._choices[indexes[0]]
        if len(indexes) > 1 or not choice.tokens:
            return None
        sampling = self._request.sampling
        decode = partial(self._decode_as, sampling.skip_special_tokens)
        return Continuation(decode, self._request.token_ids, choice.tokens, "".join(choice.texts), sampling)

    def _decode_as(self, skip_special_tokens: bool, tokens: list[int]) -> str:
        return self._decode(tokens, skip_special_tokens)

    def _cancel(self) -> None:
        for attempt in self._attempts:
            attempt.cancel()

    def _fail(self, attempt: _Attempt, error: BaseException) -> None:
        """End the stream with an error; if that only says that no other worker took over, with the first loss."""
        if isinstance(error, (UnavailableError, TransportError)):
            error = attempt.first_error or error
        self._cancel()
        self._attempts.clear()
        self.out.end(error)
