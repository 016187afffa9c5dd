"""The mock engine: deterministic tokens, stop conditions, cancellation, ranks, KV events, injected faults."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.worker import VllmWorker
from dynamo.config.settings import declared
from dynamo.engines.mock import MockEngine, faults
from dynamo.engines.mock import rank as mock_rank
from dynamo.engines.mock.settings import MockSettings, mock_settings
from dynamo.engines.mock.timing import decode_ms, prefill_ms
from dynamo.errors import ContextLengthError, EngineError, RequestError, StartError
from dynamo.kv_router.events import BlocksRemoved, BlocksStored, EngineEvent
from dynamo.kv_router.hashing import block_hashes
from dynamo.llm.model_files import tokenizer_dir
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
def test_a_continued_request_generates_the_same_tokens(
    prompt: list[int], cut: int, seed: int, ignore_eos: bool
) -> None:
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


def test_tokens_depend_on_seed_and_prompt() -> None:
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


def test_invalid_requests_are_rejected() -> None:
    with pytest.raises(RequestError, match="logprobs"):
        answer(request([1], logprobs=1))
    with pytest.raises(RequestError, match="do not fit 100"):
        answer(request([1] * 100), **{"max-model-len": 100})


def test_cancelling_frees_blocks_and_stops_stepping() -> None:
    async def work(engine: MockEngine) -> None:
        running = engine.generate(request([1], max_tokens=None, ignore_eos=True))
        await running.__anext__()
        waiting = engine.generate(request([1] * 3000, max_tokens=None, ignore_eos=True, n=2))
        assert engine.stats()[0][:2] == (1, 2)
        assert engine.stats()[0].kv_usage > 0
        waiting.cancel()
        running.cancel()
        assert engine.stats()[0][:3] == (0, 0, 0.0)
        await asyncio.sleep(0.05)
        assert engine._ranks[0]._next_step is None, "an idle engine costs nothing"
        for name in ("a", "b"):
            engine.generate(request([1], name=name)).pipe(lambda _: None, lambda _: None)
        await engine.abort("a")
        assert {g.request.request_id for g in engine._running} == {"b"}

    run(work, **{"speedup-ratio": 1})


def test_stopping_ends_running_requests() -> None:
    async def work(engine: MockEngine) -> None:
        stream = engine.generate(request([1], max_tokens=None, ignore_eos=True))
        await stream.__anext__()
        await engine.stop()
        with pytest.raises(EngineError, match="stopping"):
            async for _ in stream:
                pass

    run(work)


def test_a_callback_may_start_and_cancel_requests() -> None:
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


def paced(prompt: list[int], late_s: float = 0.0, **arguments: Any) -> list[float]:
    """Return the delays, in ms, that the engine schedules, with a clock that advances by each of them.

    The first step ends `late_s` late.
    """

    async def work(engine: MockEngine) -> list[float]:
        rank, loop = engine._ranks[0], asyncio.get_running_loop()
        asked: list[float] = []

        def wait(delay: float, *callback: Any) -> Any:
            clock.now += delay + (0.0 if asked else late_s)
            asked.append(delay * 1e3)
            return loop.call_soon(*callback)

        clock = SimpleNamespace(now=5.0, monotonic=lambda: clock.now)
        rank._loop = SimpleNamespace(call_later=wait, call_soon=loop.call_soon)  # type: ignore[assignment]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mock_rank, "time", clock)
            assert len([d async for d in engine.generate(request(prompt, max_tokens=5, ignore_eos=True))]) == 5
        return asked

    found: list[float] = run(work, **arguments)
    return found


def test_steps_take_the_modelled_time() -> None:
    cache_tokens = 16383 * 64
    expected = [prefill_ms(100), *(decode_ms((100 + i) / cache_tokens) for i in range(1, 5))]
    assert paced([1] * 100, **{"speedup-ratio": 1}) == pytest.approx(expected)
    slow = paced([1] * 100, **{"speedup-ratio": 10, "mock-slow-factor": 1000})
    assert slow == pytest.approx([ms * 100 for ms in expected])
    chunks = paced([1] * 100, **{"speedup-ratio": 1, "max-num-batched-tokens": 60})
    assert chunks[:2] == pytest.approx([prefill_ms(60), prefill_ms(40)])


def test_a_late_step_shortens_the_next() -> None:
    usual = paced([1] * 100, **{"speedup-ratio": 1})
    late = paced([1] * 100, late_s=2e-3, **{"speedup-ratio": 1})
    assert late == pytest.approx([usual[0], usual[1] - 2, *usual[2:]])
    very_late = paced([1] * 100, late_s=2e-2, **{"speedup-ratio": 1})
    assert very_late == pytest.approx([usual[0], 0, *usual[2:]]), "at most one step is made up for"


def test_cached_tokens_and_stats() -> None:
    async def work(engine: MockEngine) -> None:
        prompt = list(range(200))
        for expected in (0, 192):
            deltas = [d async for d in engine.generate(request(prompt, ignore_eos=True))]
            assert [(d.prompt_tokens, d.cached_tokens) for d in deltas] == [(200, expected)] + [(None, None)] * 39
        together = [d async for d in engine.generate(request(prompt, n=3, final_only=True))]
        assert [(d.cached_tokens) for d in sorted(together, key=lambda d: d.index)] == [192, None, None]
        assert engine.stats()[0] == (0, 0, 0.0, 1000, 192 * 4)

    run(work, **{"block-size": 64})


def test_events_match_the_cached_blocks() -> None:
    events: list[tuple[int, list[EngineEvent]]] = []

    async def main() -> None:
        engine = MockEngine(
            "dynamo-tiny", {"speedup-ratio": 0, "block-size": 32, "num-gpu-blocks-override": 9}, lambda _: None
        )
        assert engine.kv_events(lambda rank, new: events.append((rank, list(new))))
        info = await engine.start()
        assert (info.context_length, info.kv_block_size, info.kv_blocks, info.ranks) == (256, 32, 9, 1)
        for number in range(4):
            deltas = [d async for d in engine.generate(request([number] * 60, ignore_eos=True))]
            last = ([number] * 60 + tokens(deltas))[:-1]
        there: list[int] = []
        for rank, batch in events:
            assert rank == 0
            for event in batch:
                if isinstance(event, BlocksStored):
                    assert event.block_size == 32
                    there += event.hashes
                else:
                    assert isinstance(event, BlocksRemoved)
                    for name in event.hashes:
                        there.remove(name)
        assert set(block_hashes(last, 32)) < set(there)
        assert len(there) <= 8

    asyncio.run(main())
    assert any(isinstance(event, BlocksRemoved) for _, batch in events for event in batch)
    assert not MockEngine("dynamo-tiny", {"enable-prefix-caching": False}, print).kv_events(lambda *_: None)


def test_ranks_have_separate_caches() -> None:
    reported: set[int] = set()

    async def main() -> None:
        engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0, "data-parallel-size": 3}, lambda _: None)
        engine.kv_events(lambda rank, _: reported.add(rank))
        assert (await engine.start()).ranks == 3

        async def hit(rank: int) -> int | None:
            asked = request([7] * 130)
            asked.rank = rank
            return (await engine.generate(asked).__anext__()).cached_tokens

        assert [await hit(rank) for rank in (1, 1, 2)] == [0, 128, 0]
        assert reported == {1, 2}
        assert [stats.prefix_queries for stats in engine.stats()] == [0, 260, 130]
        streams = [engine.generate(request([1], max_tokens=None, ignore_eos=True)) for _ in range(7)]
        assert sorted(s.running + s.waiting for s in engine.stats()) == [2, 2, 3]
        for stream in streams:
            stream.cancel()
        with pytest.raises(RequestError, match="rank 3: the engine has 3"):
            await hit(3)

    asyncio.run(main())


def test_a_preempted_request_gives_the_same_tokens() -> None:
    requests = [request([i] * 30, max_tokens=200, ignore_eos=True, name=str(i)) for i in range(6)]
    small = {"block-size": 16, "num-gpu-blocks-override": 30}
    roomy = answers(*requests)
    found = answers(*requests, **small)
    assert [tokens(d) for d in found] == [tokens(d) for d in roomy]
    assert [text(d) for d in found] == [text(d) for d in roomy]


def test_prompts_larger_than_the_kv_cache_are_rejected() -> None:
    small = {"block-size": 16, "num-gpu-blocks-override": 5}
    with pytest.raises(ContextLengthError, match="64 prompt tokens do not fit 64"):
        answer(request([1] * 64), **small)
    assert len(tokens(answer(request([1] * 60, max_tokens=500, ignore_eos=True), **small))) == 4
    whole = {"enable-chunked-prefill": False, "max-num-batched-tokens": 50}
    with pytest.raises(ContextLengthError, match="51 prompt tokens do not fit 50"):
        answer(request([1] * 51), **whole)
    with pytest.raises(RequestError, match="32 bits"):
        answer(request([1 << 40] * 64))
    with pytest.raises(RequestError, match="no tokens"):
        answer(request([]))


def test_injected_errors() -> None:
    async def work(engine: MockEngine) -> list[int]:
        async def read(number: int) -> int:
            got: list[Delta] = []
            ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
            engine.generate(request([number], max_tokens=50, ignore_eos=True)).pipe(got.append, ended.set_result)
            error = await ended
            assert (len(got) < 50) == (isinstance(error, EngineError) and "mock-error-rate" in str(error))
            return len(got)

        found = await asyncio.gather(*map(read, range(200)))
        assert engine.stats()[0][:3] == (0, 0, 0.0)
        return list(found)

    found = run(work, **{"mock-error-rate": 0.3})
    assert 30 < sum(tokens < 50 for tokens in found) < 90
    assert run(work, **{"mock-error-rate": 0.3}) == found
    assert set(run(work)) == {50}


def test_freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "DETECTION_S", 0.0)

    async def work(engine: MockEngine) -> None:
        await engine.check_health()
        stream = engine.generate(request([1], ignore_eos=True))
        for _ in range(5):
            await stream.__anext__()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.2)
        later = engine.generate(request([2]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(later.__anext__(), 0.2)
        with pytest.raises(EngineError, match="mock-freeze-after-tokens"):
            await engine.check_health()

    run(work, **{"mock-freeze-after-tokens": 5})


def test_crashing() -> None:
    program = """
import asyncio
from dynamo.engines.mock import MockEngine
from dynamo.llm.protocol import GenerateRequest, Sampling

async def main():
    engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0, "mock-crash-after-tokens": 7}, lambda _: None)
    await engine.start()
    async for delta in engine.generate(GenerateRequest([1], Sampling(max_tokens=50, ignore_eos=True))):
        print(delta.token_ids, flush=True)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.splitlines()) == 6  # the process is killed before the last is read


def test_settings() -> None:
    assert mock_settings({}) == MockSettings()
    found = mock_settings({"max_num_seqs": "7", "no-enable-prefix-caching": True, "gpu-memory-utilization": 0.5})
    assert found == MockSettings(max_num_seqs=7, enable_prefix_caching=False)
    assert mock_settings({"num-gpu-blocks-override": None}) == MockSettings()
    with pytest.raises(StartError, match="the mock engine's mock-error-rate 2: expected float <= 1"):
        mock_settings({"mock-error-rate": 2})
    with pytest.raises(StartError, match="block-size 'x': expected int"):
        mock_settings({"block_size": "x"})


def test_a_worker_accepts_the_mock_settings() -> None:
    takes = declared(VllmWorker)
    assert takes is not None
    for name in set(MockSettings.__struct_fields__) - {"kv_transfer"}:  # set by the worker itself
        assert takes.takes(name.replace("_", "-")), name
    assert not takes.takes("mock-crash-after-token")
