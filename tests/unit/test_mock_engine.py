"""The mock engine: deterministic tokens, stop conditions, cancellation, and steps over many sequences."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.errors import EngineError, RequestError
from dynamo.llm.engines.mock import DECODE_MS, MockEngine, prefill_ms
from dynamo.llm.models import tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling


def run(work: Callable[[MockEngine], Any], **arguments: Any) -> Any:
    async def main() -> Any:
        engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0, **arguments}, lambda _: None)
        await engine.start()
        return await asyncio.wait_for(work(engine), 20)

    return asyncio.run(main())


def request(prompt: list[int], *, final_only: bool = False, name: str = "r", **sampling: Any) -> GenerateRequest:
    return GenerateRequest(prompt, Sampling(**{"max_tokens": 40, **sampling}), name, final_only)


def answers(*requests: GenerateRequest, **arguments: Any) -> list[list[Delta]]:
    async def work(engine: MockEngine) -> list[list[Delta]]:
        async def read(each: GenerateRequest) -> list[Delta]:
            return [delta async for delta in engine.generate(each)]

        return await asyncio.gather(*map(read, requests))

    found: list[list[Delta]] = run(work, **arguments)
    return found


def answer(given_request: GenerateRequest, **arguments: Any) -> list[Delta]:
    return answers(given_request, **arguments)[0]


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(d.text for d in deltas if d.index == index)


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for d in deltas if d.index == index for token in d.token_ids]


PROMPTS = st.lists(st.integers(0, 300), min_size=1, max_size=20)
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(PROMPTS, st.integers(1, 39), st.integers(0, 2**63), st.booleans())
def test_a_continued_request_goes_on_the_same(prompt: list[int], cut: int, seed: int, ignore_eos: bool) -> None:
    whole = answer(request(prompt, seed=seed, ignore_eos=ignore_eos))
    cut = min(cut, len(whole) - 1)
    if cut == 0:
        return
    so_far = tokens(whole)[:cut]
    rest = answer(request(prompt + so_far, seed=seed, ignore_eos=ignore_eos, max_tokens=40 - cut))
    assert so_far + tokens(rest) == tokens(whole)
    assert text(rest) == "".join(d.text for d in whole[cut:])
    assert rest[-1].finish_reason == whole[-1].finish_reason


@SLOW
@given(PROMPTS, st.integers(1, 4), st.data())
def test_stop_strings_do_not_leak(prompt: list[int], n: int, data: st.DataObject) -> None:
    free = answer(request(prompt, n=n, ignore_eos=True))
    whole = text(free)
    at = data.draw(st.integers(0, len(whole) - 1))
    stops = [whole[at : at + data.draw(st.integers(1, 12))], "\0never"]  # most go across tokens
    stopped = answer(request(prompt, n=n, ignore_eos=True, stop=stops))
    assert text(stopped) == whole[: whole.index(stops[0])]
    end = next(d for d in stopped if d.index == 0 and d.finish_reason)
    assert (end.finish_reason, end.stop_reason) == ("stop", stops[0])
    shown = text(answer(request(prompt, n=n, ignore_eos=True, stop=stops, include_stop_str_in_output=True)))
    assert shown == whole[: whole.index(stops[0]) + len(stops[0])]
    for index in range(n):
        assert stops[0] not in text(stopped, index)


@SLOW
@given(PROMPTS, st.integers(1, 3), st.lists(st.text("aeiou t", min_size=1, max_size=2), max_size=3), st.booleans())
def test_final_only_is_the_joined_stream(prompt: list[int], n: int, stop: list[str], ignore_eos: bool) -> None:
    streamed = answer(request(prompt, n=n, stop=stop, ignore_eos=ignore_eos))
    final = answer(request(prompt, n=n, stop=stop, ignore_eos=ignore_eos, final_only=True))
    assert len(final) == n
    for delta in final:
        assert delta.text == text(streamed, delta.index)
        assert delta.token_ids == tokens(streamed, delta.index)
        last = [d for d in streamed if d.index == delta.index][-1]
        assert (delta.finish_reason, delta.stop_reason) == (last.finish_reason, last.stop_reason)
    for deltas in (streamed, final):
        assert [d.prompt_tokens for d in deltas if d.prompt_tokens is not None] == [len(prompt)]


def test_the_first_of_several_stop_strings_counts() -> None:
    whole = text(answer(request([1, 2], ignore_eos=True)))
    early, late = whole[10:14], whole[11:16]
    assert text(answer(request([1, 2], ignore_eos=True, stop=[late, early]))) == whole[: whole.index(early)]


def test_seeds_and_prompts_decide() -> None:
    base = tokens(answer(request([1, 2, 3], ignore_eos=True)))
    assert tokens(answer(request([1, 2, 3], ignore_eos=True))) == base
    assert tokens(answer(request([1, 2, 3], ignore_eos=True, seed=1))) != base
    assert tokens(answer(request([3, 2, 1], ignore_eos=True))) != base
    assert tokens(answer(request([1, 2, 3], ignore_eos=True, seed=-1))) != base


def test_choices_differ() -> None:
    deltas = answer(request([5], n=3, ignore_eos=True))
    assert len({tuple(tokens(deltas, i)) for i in range(3)}) == 3
    assert [d.index for d in deltas[:6]] == [0, 1, 2, 0, 1, 2]
    assert tokens(deltas, 0) == tokens(answer(request([5], ignore_eos=True)))


def test_lengths() -> None:
    limited = answer(request([1], max_tokens=7, ignore_eos=True))
    assert len(tokens(limited)) == 7
    assert limited[-1].finish_reason == "length"
    room = answer(request([1] * 90, max_tokens=None, ignore_eos=True), **{"max-model-len": 100})
    assert len(tokens(room)) == 10
    ended = [answer(request([i], max_tokens=500)) for i in range(10)]
    assert {deltas[-1].finish_reason for deltas in ended} == {"stop"}
    assert min(len(tokens(d)) for d in ended) < 97
    longer = [answer(request([i], max_tokens=500, min_tokens=200)) for i in range(10)]
    assert all(len(tokens(d)) > 200 for d in longer)


def test_stop_tokens() -> None:
    whole = tokens(answer(request([9], ignore_eos=True)))
    stopped = answer(request([9], ignore_eos=True, stop_token_ids=[whole[5]]))
    assert tokens(stopped) == whole[: whole.index(whole[5]) + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", whole[5])
    later = answer(request([9], ignore_eos=True, stop_token_ids=[whole[5]], min_tokens=20))
    assert len(tokens(later)) > 20


def test_texts_are_what_the_tokens_decode_to() -> None:
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer_dir("dynamo-tiny") / "tokenizer.json")).decode
    for delta in answer(request([1, 2], ignore_eos=True)):
        assert delta.text == decode(delta.token_ids)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="logprobs"):
        answer(request([1], logprobs=1))
    with pytest.raises(RequestError, match="do not fit 100"):
        answer(request([1] * 100), **{"max-model-len": 100})


def test_cancelling_frees() -> None:
    async def work(engine: MockEngine) -> None:
        waiting = engine.generate(request([1] * 3000, max_tokens=None, ignore_eos=True))
        running = engine.generate(request([1], max_tokens=None, ignore_eos=True))
        await running.__anext__()
        assert (engine.stats()[0].running, engine.stats()[0].waiting) == (1, 1)
        waiting.cancel()
        running.cancel()
        assert (engine.stats()[0].running, engine.stats()[0].waiting) == (0, 0)
        await asyncio.sleep(0.02)
        assert not engine._running
        assert engine._stepping is None
        for name in ("a", "b"):
            engine.generate(request([1], name=name)).pipe(lambda _: None, lambda _: None)
        await engine.abort("a")
        assert {g.request.request_id for g in engine._live} == {"b"}

    run(work, **{"speedup-ratio": 1})


def test_stopping_ends_what_runs() -> None:
    async def work(engine: MockEngine) -> None:
        stream = engine.generate(request([1], max_tokens=None, ignore_eos=True))
        await stream.__anext__()
        await engine.stop()
        with pytest.raises(EngineError, match="stopping"):
            async for _ in stream:
                pass

    run(work)


def test_a_reader_may_start_and_cancel_others_meanwhile() -> None:
    async def work(engine: MockEngine) -> int:
        ended = asyncio.Event()
        got: list[Delta] = []
        started: list[bool] = []
        victim = engine.generate(request([2], ignore_eos=True, max_tokens=1000))
        victim.pipe(lambda _: None, lambda _: None)

        def start(_: Delta) -> None:
            if not started:
                started.append(True)
                victim.cancel()
                engine.generate(request([3], ignore_eos=True)).pipe(got.append, lambda _: ended.set())

        engine.generate(request([1], ignore_eos=True)).pipe(start, lambda _: None)
        await ended.wait()
        return len(got)

    assert run(work) == 40


def test_pace() -> None:
    """The schedule that the engine asks its loop for, rather than the clock of a busy machine."""

    async def work(engine: MockEngine) -> list[float]:
        loop = asyncio.get_running_loop()
        asked: list[float] = []
        call_later = loop.call_later

        def spy(delay: float, *rest: Any) -> Any:
            asked.append(delay)
            return call_later(0, *rest)

        engine._loop = type("Loop", (), {"call_later": staticmethod(spy), "call_soon": loop.call_soon})()
        began = time.monotonic()
        deltas = [d async for d in engine.generate(request([1] * 100, max_tokens=5, ignore_eos=True))]
        assert len(deltas) == 5
        assert engine._next_step - began == pytest.approx(4 * DECODE_MS / 10 / 1e3, abs=0.02)
        return asked

    asked = run(work, **{"speedup-ratio": 10})
    assert asked[0] == pytest.approx(prefill_ms(100) / 10 / 1e3)
    assert len(asked) == 5
    assert prefill_ms(1000) == pytest.approx(16.50142 + 15.18344 + 0.4209989)
