"""Cost of the mock engine itself: CPU for each token of one engine, and hundreds of engines in one process.

python -m benchmarks.mock_engines [--engines 200] [--streams 8] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from typing import Any

import psutil
import uvloop

from dynamo.engines.mock import MockEngine
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling

SHARED_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 512, 128, 128
ROUNDS = 40


async def start(**arguments: Any) -> MockEngine:
    engine = MockEngine("dynamo-tiny", {"max-model-len": 16384, **arguments}, lambda _: None)
    engine.kv_events(lambda rank, events: None)
    await engine.start()
    return engine


async def measure_one(streams: int, prompt_tokens: int, output_tokens: int, block_size: int) -> float:
    """Return the CPU time of a token in µs, with piped streams and no pauses: the lowest of many rounds."""
    engine = await start(**{"speedup-ratio": 0, "block-size": block_size})
    best = float("inf")
    for number in range(ROUNDS):
        ended: list[BaseException | None] = []
        done = asyncio.Event()

        def end(error: BaseException | None, ended: list[BaseException | None] = ended, done: Any = done) -> None:
            ended.append(error)
            if len(ended) == streams:
                done.set()

        began = time.process_time()
        for stream in range(streams):
            prompt = [(stream * 7 + number * 13 + at) % 900 for at in range(prompt_tokens)]
            sampling = Sampling(max_tokens=output_tokens, ignore_eos=True)
            engine.generate(GenerateRequest(prompt, sampling)).pipe(lambda _: None, end)
        await done.wait()
        assert not any(ended), ended
        best = min(best, (time.process_time() - began) / streams / output_tokens * 1e6)
    return best


async def measure_many(count: int, streams: int, seconds: float, speedup: float) -> str:
    """Measure many busy engines and return a line of figures. Each stream begins a request when the one before ends."""
    process = psutil.Process()
    await start()  # loads what they share
    gc.collect()
    before = process.memory_info().rss
    engines = [await start(**{"speedup-ratio": speedup}) for _ in range(count)]
    gc.collect()
    idle = process.memory_info().rss - before
    tokens = requests = 0

    def on_item(_: Delta) -> None:
        nonlocal tokens
        tokens += 1

    def ask(engine: MockEngine, number: int) -> None:
        nonlocal requests
        requests += 1
        prompt = [number % 8] * SHARED_TOKENS + [number % 60000] * OWN_TOKENS
        request = GenerateRequest(prompt, Sampling(max_tokens=OUTPUT_TOKENS, ignore_eos=True))
        engine.generate(request).pipe(on_item, lambda _: ask(engine, number + streams))

    for engine in engines:
        for stream in range(streams):
            ask(engine, stream)
    await asyncio.sleep(1)
    tokens = requests = 0
    cpu_s, began = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - began
    gc.collect()
    busy = process.memory_info().rss - before
    return (
        f"{count} engines, {streams} streams each, speedup-ratio {speedup:g}: {tokens / wall_s:,.0f} tokens/s, "
        f"{requests / wall_s:,.0f} requests/s, {cpu_s / tokens * 1e6:.2f} µs of CPU a token, {cpu_s / wall_s:.0%} of a core; "
        f"memory of an engine: {idle / count / 1024:.0f} KiB idle, {busy / count / 1024:.0f} KiB busy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=200)
    parser.add_argument("--streams", type=int, default=8, help="streams of each engine")
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    for prompt, output, block in ((256, 500, 64), (256, 500, 16), (4000, 100, 64)):
        found = uvloop.run(measure_one(64, prompt, output, block))
        print(f"one engine, 64 streams, {prompt} + {output} tokens, block-size {block}: {found:.2f} µs of CPU a token")
    for speedup in (1.0, 0.0):
        print(uvloop.run(measure_many(options.engines, options.streams, options.seconds, speedup)))


if __name__ == "__main__":
    main()
