"""KV transfer between mock engines: the same tokens and no lost block, whichever side stops at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.engines.mock import MockEngine, transfer
from dynamo.engines.mock.block_pool import BlockPool
from dynamo.engines.mock.scheduler import ScheduledSequence, Scheduler
from dynamo.errors import EngineError, RequestError
from dynamo.kv_router.events import BlocksStored, EngineEvent
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling

BLOCK = 8
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@asynccontextmanager
async def engine(**arguments: Any) -> AsyncIterator[MockEngine]:
    given_arguments = {"speedup-ratio": 0, "block-size": BLOCK, "kv-transfer": True, **arguments}
    found = MockEngine("dynamo-tiny", given_arguments, lambda _: None)
    await found.start()
    try:
        yield found
    finally:
        await found.stop()


def request(prompt: list[int], max_tokens: int = 12, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt, Sampling(max_tokens=max_tokens, ignore_eos=True), **more)


async def read(engine: MockEngine, one: GenerateRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(one)]


async def tokens(engine: MockEngine, one: GenerateRequest) -> list[int]:
    return [token for delta in await read(engine, one) for token in delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def usage(engine: MockEngine) -> float:
    return max(stats.kv_usage for stats in engine.stats())


def prompt(length: int, first: int = 1) -> list[int]:
    return [first, *((7 * i) % 300 for i in range(1, length))]


@SLOW
@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 3), st.booleans())
def test_tokens_are_the_same_and_all_blocks_are_freed(length: int, shared: int, ranks: int, caching: bool) -> None:
    async def main() -> None:
        options = {"enable-prefix-caching": caching, "data-parallel-size": ranks}
        async with engine(**options) as lender, engine(**options) as taker, engine() as plain:
            await read(taker, request(prompt(max(shared, 1)), rank=0))
            known = taker.stats()[0]
            asked = prompt(length)
            found = await lender.prefill(request(asked))
            assert usage(lender) > 0
            answer = await read(taker, request(asked, kv_transfer=found, rank=0))
            assert [t for d in answer for t in d.token_ids] == await tokens(plain, request(asked))
            stats = taker.stats()[0]
            assert answer[0].cached_tokens == 0
            hits = (stats.prefix_hits - known.prefix_hits) // BLOCK
            assert hits == (min(length - 1, max(shared, 1) + 11) // BLOCK if caching else 0) or shared < length
            assert (stats.prefix_queries - known.prefix_queries == length) or not caching
            await until(lambda: usage(lender) == usage(taker) == 0)

    asyncio.run(main())


async def test_fetched_blocks_are_reported_and_found_like_computed_ones() -> None:
    events: dict[str, list[EngineEvent]] = {"fetched": [], "computed": []}
    asked = prompt(5 * BLOCK)
    async with engine() as lender:
        for name in events:
            taker = MockEngine("dynamo-tiny", {"speedup-ratio": 0, "block-size": BLOCK, "kv-transfer": True}, print)
            assert taker.kv_events(lambda _, new, name=name: events[name].extend(new))
            await taker.start()
            where = await lender.prefill(request(asked)) if name == "fetched" else None
            await read(taker, request(asked, kv_transfer=where))
            again = await read(taker, request([*asked, 1, 2]))
            assert again[0].cached_tokens == 5 * BLOCK
            await taker.stop()
    assert events["fetched"] == events["computed"]
    assert isinstance(events["fetched"][0], BlocksStored)


async def test_prefix_hits_of_the_prefill_engine_count_as_cached() -> None:
    asked = prompt(5 * BLOCK)
    async with engine() as lender, engine() as taker:
        await lender.prefill(request(asked))
        again = await lender.prefill(request(asked))
        assert (await read(taker, request(asked, kv_transfer=again)))[0].cached_tokens == 4 * BLOCK


async def test_kv_that_is_no_longer_available_is_computed() -> None:
    asked = prompt(30)
    async with engine() as taker, engine() as plain:
        async with engine(**{"kv-transfer-lease-s": 0.01}) as lender:
            late = await lender.prefill(request(asked))
            await until(lambda: usage(lender) == 0)
            expected = await tokens(plain, request(asked))
            assert await tokens(taker, request(asked, kv_transfer=late)) == expected
        dead = await tokens(taker, request(prompt(30, 2), kv_transfer=late))
        assert dead == await tokens(plain, request(prompt(30, 2)))
        await until(lambda: usage(taker) == 0)


async def test_kv_is_computed_when_the_lender_stops_during_the_transfer() -> None:
    asked = prompt(64)
    slow = {"speedup-ratio": 100.0, "mock-kv-bandwidth-gb-s": 1e-9}
    async with engine(**slow) as lender, engine(**slow) as taker, engine() as plain:
        found = await lender.prefill(request(asked))
        waiting = asyncio.create_task(tokens(taker, request(asked, kv_transfer=found)))
        await until(lambda: not len(lender._leases))
        assert usage(lender) > 0
        assert usage(taker) > 0
        await lender.stop()
        assert await asyncio.wait_for(waiting, 10) == await tokens(plain, request(asked))


@pytest.mark.parametrize("wait_s", [0.0, 0.005, 0.02, 0.05])
async def test_cancelled_transfers_free_all_blocks(wait_s: float) -> None:
    pace = {"speedup-ratio": 2.0, "mock-kv-bandwidth-gb-s": 1e-3}
    async with engine(**pace) as lender, engine(**pace) as taker:

        async def whole(number: int) -> None:
            found = await lender.prefill(request(prompt(200, number)))
            await read(taker, request(prompt(200, number), kv_transfer=found))

        running = [asyncio.create_task(whole(number)) for number in range(8)]
        await asyncio.sleep(wait_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for name in list(lender._leases._leases):  # computed and not fetched yet: freed by the lease
            lender._leases.release(name)
        await until(lambda: usage(lender) == usage(taker) == 0)
        assert await tokens(taker, request([1, 2, 3]))


async def test_prompts_wait_for_a_full_cache_and_all_complete() -> None:
    """Each cache holds two prompts; ten are on their way."""
    small = {"num-gpu-blocks-override": 2 * 6 + 1, "max-model-len": 6 * BLOCK}
    async with engine(**small) as lender, engine(**small) as taker, engine() as plain:

        async def whole(number: int) -> list[int]:
            asked = prompt(4 * BLOCK, number)
            found = await lender.prefill(request(asked))
            return await tokens(taker, request(asked, kv_transfer=found))

        answers = await asyncio.wait_for(asyncio.gather(*map(whole, range(10))), 20)
        for number, answer in enumerate(answers):
            assert answer == await tokens(plain, request(prompt(4 * BLOCK, number)))
        await until(lambda: usage(lender) == usage(taker) == 0)


async def test_a_transfer_takes_its_modelled_time() -> None:
    async with (
        engine(**{"speedup-ratio": 1.0, "mock-kv-bytes-per-token": 10**6, "mock-kv-bandwidth-gb-s": 0.1}) as taker,
        engine() as lender,
    ):
        found = await lender.prefill(request(prompt(150)))
        started = asyncio.get_running_loop().time()
        await read(taker, request(prompt(150), 1, kv_transfer=found))
        assert asyncio.get_running_loop().time() - started >= 1.5  # 150 tokens at 10 ms


async def test_invalid_use_raises() -> None:
    async with engine(**{"kv-transfer": False}) as plain, engine() as taker:
        with pytest.raises(EngineError, match="does not compute KV for others"):
            await plain.prefill(request([1, 2]))
        with pytest.raises(RequestError, match="not of the mock engine"):
            await read(taker, request([1, 2], kv_transfer={"remote_host": "x"}))


class Fetched(ScheduledSequence):
    def __init__(self, prompt: list[int], size: int, outputs: int) -> None:
        from dynamo.kv_router.hashing import block_hashes

        super().__init__(prompt, block_hashes(prompt, size))
        self.left = outputs


def advance(sequence: Fetched) -> bool:
    sequence.output.append(len(sequence.output))
    sequence.left -= 1
    return not sequence.left


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_block_counts_are_consistent_in_any_order_of_events(data: st.DataObject) -> None:
    """The scheduler alone: prompts computed, fetched, not fetched, kept and removed at random, in a small cache."""
    size = 4
    cache = BlockPool(data.draw(st.integers(12, 40)), size)
    scheduler: Scheduler[Fetched] = Scheduler(cache, batched_tokens=data.draw(st.integers(4, 40)), sequences=4)
    kept: list[Fetched] = []
    known: list[Fetched] = []
    fetching: list[Fetched] = []
    ended = 0

    def emit(sequence: Fetched) -> bool:
        nonlocal ended
        last = advance(sequence)
        if last:
            ended += 1
            known.remove(sequence)
            if sequence.prompt[0] % 2:
                scheduler.keep(sequence)
                kept.append(sequence)
        return last

    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(
            st.sampled_from(["add", "fetch", "step", "step", "step", "arrive", "fail", "free", "remove"])
        )
        if action in ("add", "fetch"):
            length = data.draw(st.integers(1, 30))
            new = Fetched([data.draw(st.integers(0, 5)), *range(1, length)], size, data.draw(st.integers(1, 6)))
            new.fetches = action == "fetch"
            known.append(new)
            scheduler.add(new)
        elif action == "step":
            scheduler.schedule()
            fetching += scheduler.to_fetch
            scheduler.to_fetch.clear()
            scheduler.complete(emit)
        elif action in ("arrive", "fail") and fetching:
            one = fetching.pop(data.draw(st.integers(0, len(fetching) - 1)))
            scheduler.fetched(one) if action == "arrive" else scheduler.not_fetched(one)
        elif action == "free" and kept:
            scheduler.free(kept.pop())
        elif action == "remove" and known:
            scheduler.remove(known.pop(data.draw(st.integers(0, len(known) - 1))))
        assert len(scheduler) == len(known)
        assert 0 <= cache.free <= cache.usable
        assert scheduler.kv_tokens == sum(sequence.computed for sequence in scheduler.running)
    for one in kept:
        scheduler.free(one)
    for _ in range(2000):
        if not known:
            break
        for one in fetching:
            scheduler.fetched(one)
        fetching.clear()
        scheduler.schedule()
        fetching += scheduler.to_fetch
        scheduler.to_fetch.clear()
        before = len(kept)
        scheduler.complete(emit)
        for one in kept[before:]:
            scheduler.free(one)
    assert not known
    assert cache.free == cache.usable


async def test_the_advertised_address_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow name server would otherwise block all streams of the process at each prompt."""
    asked: list[str] = []
    monkeypatch.setattr(transfer, "advertised_host", lambda url: asked.append(url) or "127.0.0.1")
    lender = transfer.KvLeaseServer(1.0)
    await asyncio.gather(lender.open(), lender.open())
    assert lender.source("a", 0)["host"] == lender.source("b", 0)["host"] == "127.0.0.1"
    assert len(asked) == 1
    await lender.close()
