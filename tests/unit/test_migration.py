"""Migration: the reader of a request whose workers are lost gets the same as from one worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from components.processor import Processor
from components.worker import VllmWorker
from dynamo.engines.mock import MockEngine
from dynamo.errors import (
    EngineDeadError,
    EngineError,
    NoInstancesError,
    RequestError,
    TransportError,
    UnavailableError,
    WorkerLostError,
)
from dynamo.llm.migration import migrating
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.protocol import CompletionRequest, Delta, GenerateRequest, Routing, Sampling, TokenLogprob
from dynamo.llm.tokenizer import Tokenizer
from dynamo.sdk import bind
from dynamo.sdk.depends import Choice, StartCall, Stub
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel, Stream

TOKENIZER = Tokenizer(tokenizer_dir("dynamo-tiny"))
FAST = FastTokenizer.from_file(str(tokenizer_dir("dynamo-tiny") / "tokenizer.json"))
EOS = next(iter(FAST.get_added_tokens_decoder()))
PROMPT = FAST.encode("Say it in all languages: ").ids
LOST = WorkerLostError("the worker was lost")


def scripted(scripts: list[list[int]], request: GenerateRequest) -> list[Delta]:
    """Return the deltas of a worker that says one of the scripts, chosen by the seed.

    The text is as vLLM makes it: held back where it may begin a stop string or a character, from the tokens of this
    request alone.
    """
    sampling = request.sampling
    choices = [_say(scripts[(sampling.seed or 0) + i], i, request) for i in range(sampling.n)]
    longest = max(map(len, choices))
    turns = [choice[step] for step in range(longest) for choice in choices if step < len(choice)]
    cached = 7 if request.token_ids == PROMPT else 99
    return [msgspec.structs.replace(turns[0], prompt_tokens=len(request.token_ids), cached_tokens=cached), *turns[1:]]


def _say(script: list[int], index: int, request: GenerateRequest) -> list[Delta]:
    sampling, said = request.sampling, request.token_ids[len(PROMPT) :]
    assert script[: len(said)] == said
    decoder = DecodeStream(ids=request.token_ids, skip_special_tokens=sampling.skip_special_tokens)
    held = 0 if sampling.include_stop_str_in_output else max(map(len, sampling.stop), default=1) - 1
    text, shown, found = "", 0, list[Delta]()
    for number, token in enumerate(script[len(said) :], 1):
        before = len(text)
        reason, stop_reason = None, None
        if token == EOS and number > sampling.min_tokens:
            reason = "stop"
        else:
            text += decoder.step(FAST, token) or ""
        if number == sampling.max_tokens:
            reason = reason or "length"
        if number > sampling.min_tokens:
            matches = [(text.find(stop, max(before - len(stop) + 1, 0)), stop) for stop in sampling.stop]
            at, stop = min((m for m in matches if m[0] >= 0), default=(-1, ""), key=lambda match: match[0])
            if at >= 0:
                reason, stop_reason = "stop", stop
                text = text[: at + len(stop)] if sampling.include_stop_str_in_output else text[:at]
        end = max(len(text) if reason else len(text) - held, shown)
        logprobs = [TokenLogprob("", token, -number / 8)] if sampling.logprobs is not None else None
        found.append(Delta(text[shown:end], [token], index, reason, stop_reason, logprobs=logprobs))
        shown = end
        if reason:
            break
    return found


class Workers:
    """Workers that answer requests and lose the first ones: the i-th after `cuts[i]` deltas, with an error."""

    def __init__(self, answer: Callable[[GenerateRequest], list[Delta]], cuts: list[tuple[int, Exception]]) -> None:
        self.answer, self.cuts = answer, cuts
        self.requests: list[GenerateRequest] = []
        self.avoided: list[set[int]] = []
        self.channels: list[Channel[Delta]] = []

    async def send(self, request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        channel.source = len(self.requests)
        self.requests.append(request)
        self.avoided.append(set(lost))
        self.channels.append(channel)
        deltas = self.answer(request)
        cut = self.cuts.pop(0) if self.cuts else None
        for delta in deltas if cut is None else deltas[: cut[0]]:
            channel.push(delta)
        channel.end(None if cut is None or cut[0] >= len(deltas) else cut[1])
        return Stream(channel)

    def ask(self, request: GenerateRequest, limit: int = 3, counted: list[str] | None = None) -> Stream[Delta]:
        async def prepare() -> GenerateRequest:
            return request

        reasons: list[str] = [] if counted is None else counted
        return migrating(prepare, self.send, TOKENIZER.decode, limit, reasons.append)


class Said(NamedTuple):
    """One choice as the reader has it at the end."""

    text: str
    tokens: list[int]
    ended: list[tuple[str, str | int | None]]
    logprobs: int


def together(deltas: list[Delta], n: int = 1) -> list[Said]:
    return [
        Said(
            "".join(d.text for d in deltas if d.index == i),
            [token for d in deltas if d.index == i for token in d.token_ids],
            [(d.finish_reason, d.stop_reason) for d in deltas if d.index == i and d.finish_reason],
            sum(len(d.logprobs or ()) for d in deltas if d.index == i),
        )
        for i in range(n)
    ]


async def read(stream: Stream[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


TEXTS = st.text(st.sampled_from("ab \nöß€語🙂🏽\ufffd"), min_size=1, max_size=25)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], Sampling, list[tuple[int, Exception]]]:
    texts = draw(st.lists(TEXTS, min_size=1, max_size=3))
    scripts = [[*FAST.encode(text).ids, EOS] for text in texts]
    places = st.tuples(st.sampled_from(texts), st.integers(0, 24), st.integers(1, 6))
    stops = [text[at : at + size] for text, at, size in draw(st.lists(places, max_size=2)) if text[at : at + size]]
    sampling = Sampling(
        n=len(texts),
        seed=0,
        stop=[stop for stop in stops if "\ufffd" not in stop],
        include_stop_str_in_output=draw(st.booleans()),
        max_tokens=draw(st.integers(1, 80)),
        logprobs=draw(st.sampled_from([None, 0])),
    )
    errors = st.sampled_from([LOST, EngineDeadError("dead")])
    return scripts, sampling, draw(st.lists(st.tuples(st.integers(0, 60), errors), min_size=1, max_size=3))


@settings(max_examples=400, deadline=None)
@example(  # the seam in a character, behind one that is a replacement character itself
    (
        [[*FAST.encode("€�🏽").ids, EOS]],
        Sampling(seed=0, max_tokens=10),
        [(9, LOST)],
    )
)
@given(cases())
def test_cut_anywhere_the_answer_is_the_same(case: Any) -> None:
    scripts, sampling, cuts = case
    request = GenerateRequest(PROMPT, sampling, "r")
    whole = scripted(scripts, request)
    workers = Workers(lambda given: scripted(scripts, given), list(cuts))

    async def run() -> list[Delta]:
        return await read(workers.ask(request))

    deltas = asyncio.run(run())
    assert together(deltas, sampling.n) == together(whole, sampling.n)
    assert [(d.prompt_tokens, d.cached_tokens) for d in deltas if d.prompt_tokens] == [(len(PROMPT), 7)]
    assert all("\ufffd" not in d.text for d in deltas) or any("\ufffd" in FAST.decode(s) for s in scripts)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 30),
    st.lists(st.sampled_from("aeist"), max_size=2),
)
def test_the_mock_engine_continues_identically(cut: int, n: int, final_only: bool, least: int, stop: list[str]) -> None:
    async def both() -> tuple[list[Delta], list[Delta]]:
        engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0}, lambda _: None)
        await engine.start()
        sampling = Sampling(n=n, max_tokens=40, seed=5, stop=stop, min_tokens=least)
        request = GenerateRequest(PROMPT, sampling, "r", final_only=final_only)
        whole = await read(engine.generate(request))

        class Cutting(Workers):
            async def send(self, request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
                deltas = await read(engine.generate(request))
                self.answer = lambda _: deltas
                return await super().send(request, lost)

        return whole, await read(Cutting(lambda _: [], [(cut, LOST)]).ask(request))

    whole, deltas = asyncio.run(both())
    assert together(deltas, n) == together(whole, n)
    assert sum(d.prompt_tokens or 0 for d in deltas) == len(PROMPT)


SCRIPT = [*FAST.encode("one two three four five").ids, EOS]


def one_script(cuts: list[tuple[int, Exception]]) -> Workers:
    return Workers(lambda request: scripted([SCRIPT], request), cuts)


async def test_other_workers_get_the_remaining_request_and_are_counted() -> None:
    workers, counted = one_script([(2, LOST), (1, EngineDeadError("x"))]), list[str]()
    sampling = Sampling(max_tokens=40, min_tokens=3)
    await read(workers.ask(GenerateRequest(PROMPT, sampling, "r", rank=1, expected_hit=5), counted=counted))
    assert counted == ["worker_lost", "engine_dead"]
    assert workers.avoided == [set(), {0}, {0, 1}]
    assert [r.token_ids for r in workers.requests] == [PROMPT, PROMPT + SCRIPT[:2], PROMPT + SCRIPT[:3]]
    assert [(r.sampling.max_tokens, r.sampling.min_tokens) for r in workers.requests] == [(40, 3), (38, 1), (37, 0)]
    assert [(r.rank, r.expected_hit) for r in workers.requests] == [(1, 5), (None, 0), (None, 0)]
    assert len({r.request_id for r in workers.requests}) == 3


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_at_the_limit_the_error_follows_the_text_so_far(limit: int) -> None:
    workers = one_script([(1, LOST)] * 5)
    stream = workers.ask(GenerateRequest(PROMPT, Sampling()), limit)
    seen = [await anext(stream) for _ in range(limit + 1)]
    with pytest.raises(WorkerLostError):
        await anext(stream)
    assert len(workers.requests) == limit + 1
    assert together(seen)[0].tokens == SCRIPT[: limit + 1]


@pytest.mark.parametrize(
    ("error", "after", "tries"),
    [
        (EngineError("this request"), 2, 1),
        (RequestError("bad"), 0, 1),
        (NoInstancesError("none"), 0, 1),
        (TransportError("nats is not reachable"), 0, 1),
        (UnavailableError("stopping"), 2, 2),
        (WorkerLostError("lost"), 0, 2),
    ],
)
async def test_which_errors_cause_a_migration(error: Exception, after: int, tries: int) -> None:
    workers = one_script([(after, error)])
    request = GenerateRequest(PROMPT, Sampling())
    if tries == 1:
        with pytest.raises(type(error)):
            await read(workers.ask(request))
    else:
        assert together(await read(workers.ask(request)))[0].tokens == SCRIPT
    assert len(workers.requests) == tries


async def test_the_processor_asks_for_another_instance() -> None:
    engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0}, lambda _: None)
    await engine.start()
    choices: list[tuple[Choice, frozenset[int]]] = []

    class Pool:
        def endpoint(self, spec: EndpointSpec) -> StartCall:
            return self.start

        def start(self, request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
            choices.append((choice, avoid))
            if len(choices) == 1:
                channel: Channel[Any] = Channel()
                channel.source = 41
                channel.end(LOST)
                return Stream(channel)
            return engine.generate(request)

    processor = Processor(model="dynamo-tiny", router="least-loaded")
    bind(processor, worker=Stub(spec_of(VllmWorker), Pool()))  # type: ignore[arg-type]
    await processor.load()
    request = CompletionRequest("m", "Once", Sampling(max_tokens=3, ignore_eos=True), echo=True)
    deltas = await read(processor.completion(request))
    assert choices == [("least_loaded", frozenset()), ("least_loaded", frozenset({41}))]
    assert "".join(d.text for d in deltas).count("Once") == 1
    choices.clear()
    named = CompletionRequest("m", "x", Sampling(), routing=Routing(worker=41))
    with pytest.raises(WorkerLostError):
        await read(processor.completion(named))


@pytest.mark.parametrize("later", [NoInstancesError("none"), TransportError("no answer"), UnavailableError("stopping")])
async def test_without_another_worker_the_first_error_is_raised(later: Exception) -> None:
    workers = one_script([(2, LOST), *[(0, later)] * 4])
    with pytest.raises(WorkerLostError):
        await read(workers.ask(GenerateRequest(PROMPT, Sampling())))


async def test_after_a_refused_call_the_first_error_is_raised() -> None:
    workers = one_script([(2, LOST)])
    send = workers.send

    async def send_once(request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        if workers.requests:
            raise TransportError("no answer")
        return await send(request, lost)

    workers.send = send_once  # type: ignore[method-assign]
    with pytest.raises(WorkerLostError):
        await read(workers.ask(GenerateRequest(PROMPT, Sampling())))


async def test_structured_output_starts_again_only_before_its_first_token() -> None:
    request = GenerateRequest(PROMPT, Sampling(structured={"json_object": True}))
    assert together(await read(one_script([(0, LOST)]).ask(request)))[0].tokens == SCRIPT
    with pytest.raises(WorkerLostError):
        await read(one_script([(1, LOST)]).ask(request))


async def test_a_loss_after_all_choices_ended_is_ignored() -> None:
    workers = one_script([])
    whole = scripted([SCRIPT], GenerateRequest(PROMPT, Sampling()))

    async def send(request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        for delta in whole:
            channel.push(delta)
        channel.end(LOST)
        return Stream(channel)

    workers.send = send  # type: ignore[method-assign]
    assert await read(workers.ask(GenerateRequest(PROMPT, Sampling()))) == whole


async def test_a_cancelled_reader_stops_the_current_worker() -> None:
    sent, cancelled = list[Channel[Delta]](), list[int]()

    async def send(request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        number = len(sent)
        channel: Channel[Delta] = Channel(on_cancel=lambda: cancelled.append(number))
        sent.append(channel)
        return Stream(channel)

    async def prepare() -> GenerateRequest:
        return GenerateRequest(PROMPT, Sampling())

    stream = migrating(prepare, send, TOKENIZER.decode, 3, lambda _: None)
    await stream
    sent[0].push(Delta("one", SCRIPT[:1]))
    sent[0].end(LOST)
    await asyncio.sleep(0.01)
    sent[0].push(Delta("late", [1]))
    sent[1].push(Delta("?", SCRIPT[1:2]))
    assert [(await anext(stream)).token_ids for _ in range(2)] == [SCRIPT[:1], SCRIPT[1:2]]
    stream.cancel()
    assert cancelled == [1]


async def test_a_reader_cancelled_between_two_workers() -> None:
    asked = asyncio.Event()
    stopped = list[bool]()

    async def send(request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        if not lost:
            channel: Channel[Delta] = Channel()
            channel.source = 1
            channel.end(LOST)
            return Stream(channel)
        asked.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(True)
        raise AssertionError

    async def prepare() -> GenerateRequest:
        return GenerateRequest(PROMPT, Sampling())

    stream = migrating(prepare, send, TOKENIZER.decode, 3, lambda _: None)
    async with asyncio.timeout(5):
        await asked.wait()
    stream.cancel()
    await asyncio.sleep(0.01)
    assert stopped == [True]
