"""A request that outlives the workers that compute it.

What a worker has generated is remembered here. When the worker is lost, another one gets the prompt with those tokens
behind it, and the reader's stream goes on: same text, same usage. Each unfinished choice of a request with n > 1 is
continued by a request of its own. Where nothing was generated yet, the request is sent again as it was.

What cannot be carried over: the state of a seeded random generator, penalties on what was generated (it is part of the
prompt now), and the state of a grammar, so that structured output with tokens already shown ends with the error.
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
"""sends a request to a worker, to none of these instances if there are others"""
Decode = Callable[[list[int], bool], str]
"""text of tokens, without special tokens if the second is true"""


REASONS = tuple(str(error.code) for error in (WorkerLostError, EngineDeadError, UnavailableError, TransportError))
"""codes of the errors after which a request goes on elsewhere"""


def migrating(
    prepare: Prepare, send: Send, decode: Decode, limit: int, migrated: Callable[[str], None]
) -> Stream[Delta]:
    """The stream of a request that `prepare` makes and `send` sends, up to `limit` more times when its worker is lost.

    `migrated` is called each time with the code of the error. The last error ends the stream.
    """
    migration = _Migration(send, decode, limit, migrated)
    opening = asyncio.get_running_loop().create_task(migration.open(prepare))
    migration.out.on_cancel = opening.cancel
    return Stream(migration.out, opening)


class _Choice:
    """What was shown of one choice."""

    __slots__ = ("ended", "texts", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.ended = False

    def note(self, delta: Delta) -> None:
        self.tokens += delta.token_ids
        self.texts.append(delta.text)
        self.ended |= delta.finish_reason is not None


class _Run:
    """One request to one worker, for the choices `indexes` of the whole; `cause` is the first loss before it."""

    __slots__ = ("cause", "indexes", "request", "seam", "stream", "task", "tries")

    def __init__(self, request: GenerateRequest, indexes: Sequence[int], tries: int, cause: Exception | None) -> None:
        self.request, self.indexes, self.tries, self.cause = request, indexes, tries, cause
        self.seam: Continuation | None = None
        self.stream: Stream[Delta] | None = None
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.stream is not None:
            self.stream.cancel()
        elif self.task is not None:
            self.task.cancel()


class _Migration:
    def __init__(self, send: Send, decode: Decode, limit: int, migrated: Callable[[str], None]) -> None:
        self.out: Channel[Delta] = Channel()
        self._send, self._decode, self._limit, self._migrated = send, decode, limit, migrated
        self._context = contextvars.copy_context()  # deadline and request id: a lost connection calls from elsewhere
        self._choices: list[_Choice] = []
        self._announced = False  # the prompt's tokens were counted to the reader
        self._runs: set[_Run] = set()
        self._lost: set[int] = set()

    async def open(self, prepare: Prepare) -> None:
        try:
            self._request = request = await prepare()
            indexes = range(request.sampling.n)
            self._choices = [_Choice() for _ in indexes]
            run = _Run(request, indexes, 0, None)
            self._runs.add(run)
            stream = await self._send(request, self._lost)
        except Exception as error:
            self.out.end(error)
            return
        if self.out.done:
            stream.cancel()
            return
        run.stream = stream
        out = self.out
        out.on_cancel, out.on_consumed = self._cancel, stream.consumed
        if not self._limit:
            stream.pipe(out.push, out.end, counted=False)
        elif len(indexes) > 1:
            stream.pipe(self._take_one_of_many, partial(self._ended, run), counted=False)
        else:
            self._take_the_only_one(run, stream)

    def _take_the_only_one(self, run: _Run, stream: Stream[Delta]) -> None:
        (choice,) = self._choices
        note_tokens, note_text, push = choice.tokens.extend, choice.texts.append, self.out.push
        last: Delta | None = None

        def take(delta: Delta) -> None:  # for every token of every stream: no more than it must
            nonlocal last
            last = delta
            note_tokens(delta.token_ids)
            note_text(delta.text)
            push(delta)

        def end(error: BaseException | None) -> None:
            if last is not None:
                choice.ended, self._announced = last.finish_reason is not None, True
            self._ended(run, error)

        stream.pipe(take, end, counted=False)

    def _take_one_of_many(self, delta: Delta) -> None:
        self._choices[delta.index].note(delta)
        self._announced |= delta.prompt_tokens is not None
        self.out.push(delta)

    def _cancel(self) -> None:
        for run in self._runs:
            run.cancel()

    def _ended(self, run: _Run, error: BaseException | None) -> None:
        self._runs.discard(run)
        if error is not None:
            left = [index for index in run.indexes if not self._choices[index].ended]
            if left:
                self._go_on(run, left, error)
        if not self._runs:
            self.out.end()

    def _go_on(self, run: _Run, left: list[int], error: BaseException) -> None:
        """Send what is left of a run to another worker, or end everything with the error."""
        generated = sum(len(self._choices[index].tokens) for index in left)
        if not self._worth_trying(run, generated, error):
            self._fail(run, error)
            return
        assert isinstance(error, DynamoError)
        if run.stream is not None and run.stream.source is not None:
            self._lost.add(run.stream.source)
        self._migrated(error.code or "other")
        context = self._context.copy()  # a run that is lost at once is still in the one of its own task
        context.run(log.info, "goes on elsewhere, after %d tokens: %s", generated, error.message)
        whole = not generated and len(left) == len(run.indexes)
        for indexes in [run.indexes] if whole else [[index] for index in left]:
            again = _Run(self._rest(indexes, run.tries + 1), indexes, run.tries + 1, run.cause or error)
            self._runs.add(again)
            again.task = asyncio.get_running_loop().create_task(self._start(again), context=context.copy())

    def _worth_trying(self, run: _Run, generated: int, error: BaseException) -> bool:
        if run.tries >= self._limit or (generated and self._request.sampling.structured):
            return False
        if isinstance(error, (WorkerLostError, EngineDeadError)):
            return True
        # before the first token, these mean that the call has tried several instances already
        refused = isinstance(error, (UnavailableError, TransportError)) and not isinstance(error, NoInstancesError)
        return refused and generated > 0

    def _rest(self, indexes: Sequence[int], tries: int) -> GenerateRequest:
        """What is still to be generated of these choices: of all as they were, or of one."""
        request = self._request
        sampling, tokens = request.sampling, list[int]()
        name = f"{request.request_id}-{tries}" if request.request_id else ""
        if len(indexes) < sampling.n:
            (index,) = indexes
            name = name and f"{name}.{index}"
            # as engines seed the choices of one request
            seed = None if sampling.seed is None else sampling.seed + index
            sampling = msgspec.structs.replace(sampling, n=1, seed=seed)
        if len(indexes) == 1 and (tokens := self._choices[indexes[0]].tokens):
            limit = None if sampling.max_tokens is None else sampling.max_tokens - len(tokens)
            least = max(sampling.min_tokens - len(tokens), 0)
            sampling = msgspec.structs.replace(sampling, max_tokens=limit, min_tokens=least, stop=[])
        return GenerateRequest(request.token_ids + tokens, sampling, name, final_only=request.final_only)

    async def _start(self, run: _Run) -> None:
        try:
            if len(run.indexes) == 1:
                run.seam = self._seam(run.indexes[0])
            stream = await self._send(run.request, self._lost)
        except Exception as error:
            self._runs.discard(run)
            self._fail(run, error)
            return
        if self.out.done:
            stream.cancel()
            return
        run.stream = stream
        alone = len(self._runs) == 1
        self.out.on_consumed = stream.consumed if alone else None
        stream.pipe(partial(self._take, run), partial(self._ended, run), counted=not alone)

    def _seam(self, index: int) -> Continuation | None:
        choice, sampling = self._choices[index], self._request.sampling
        if not choice.tokens:
            return None
        decode = partial(self._decode_as, sampling.skip_special_tokens)
        return Continuation(decode, self._request.token_ids, choice.tokens, "".join(choice.texts), sampling)

    def _decode_as(self, skip_special_tokens: bool, tokens: list[int]) -> str:
        return self._decode(tokens, skip_special_tokens)

    def _take(self, run: _Run, delta: Delta) -> None:
        """A delta of a later run becomes what the reader expects of the whole."""
        joined = delta if run.seam is None else run.seam.join(delta)
        new = delta.prompt_tokens is not None and not self._announced
        joined = msgspec.structs.replace(
            joined,
            index=delta.index if len(run.indexes) > 1 else run.indexes[0],
            prompt_tokens=len(self._request.token_ids) if new else None,
            cached_tokens=delta.cached_tokens if new else None,
        )
        self._choices[joined.index].note(joined)
        self._announced |= new
        self.out.push(joined)
        if joined.finish_reason is not None and delta.finish_reason is None and run.stream is not None:
            run.stream.cancel()  # the worker does not know of the stop string
            self._ended(run, None)

    def _fail(self, run: _Run, error: BaseException) -> None:
        if isinstance(error, (UnavailableError, TransportError)):  # that nobody took over says less
            error = run.cause or error
        self._cancel()
        self._runs.clear()
        self.out.end(error)
