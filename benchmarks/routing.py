"""`python -m benchmarks.routing [--peers DIR]`: CPU of a routing decision, of KV events, and memory of the index.

A decision is what the Router's `route` does between decoding the request and encoding the answer; hashing the prompt,
which the Processor does, has a column of its own and is part of the sum. A quarter of each prompt is common to all, like
a system prompt. Loads are random in the first run and equal in the second. For comparison, in the same run: a floor, the
same index queried block by block for each worker as in a first version, and ai-dynamo's index through its own Python
binding.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from dynamo import codec
from dynamo.kv_router.events import Change, KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import BlockHash, block_hashes, pack
from dynamo.kv_router.messages import Route, RouteRequest
from dynamo.kv_router.router import KvRouter

DECISIONS = 3000


def timed(work: Callable[[Any], Any], value: Any) -> tuple[Any, float]:
    """Return the result of `work(value)` and the CPU time of this thread in µs, without the time to read the clock."""
    started = time.thread_time_ns()
    result = work(value)
    return result, (time.thread_time_ns() - started - CLOCK_NS) / 1e3


def cpu_us(work: Callable[[Any], Any], values: Iterable[Any]) -> list[float]:
    """Return the CPU time of `work` for each value, in µs."""
    return [timed(work, value)[1] for value in values]


def clock_ns() -> int:
    """Return the CPU time between two readings of the clock with nothing between: two system calls."""
    return round(median(-time.thread_time_ns() + time.thread_time_ns() for _ in range(1000)))


CLOCK_NS = clock_ns()


def load_of(worker: int, draw: random.Random | None) -> WorkerLoad:
    prefill, decode = (250, 2000) if draw is None else (draw.randrange(500), draw.randrange(4000))
    return WorkerLoad(worker, 0, 8, 0, prefill, decode, 16384, 0.3, 0, 0, [], 0, 16, True)


def build(prompts: list[list[BlockHash]], workers: int, block_size: int) -> tuple[KvRouter, dict[str, float]]:
    """Return a router whose index holds these prompts, spread over the workers, and figures of its events.

    The events arrive encoded, as over the network.
    """
    draw = random.Random(2)
    encoded = []
    sequences = [0] * workers
    for number, prompt in enumerate(prompts):
        worker = number % workers
        sequences[worker] += 1
        encoded.append(codec.encode(KvEvents(worker + 1, 0, sequences[worker], [Change(True, pack(prompt))])))
    router = KvRouter()
    for worker in range(1, workers + 1):
        router.state.join(worker)
        router.state.apply_snapshot(worker, [KvSnapshot(worker, 0, 0, block_size, b"")])
        router.state.apply_load(load_of(worker, draw))
    gc.collect()
    decode = codec.decoder(KvEvents)
    memory, started = psutil.Process().memory_info().rss, time.thread_time_ns()
    for payload in encoded:
        router.state.apply_events(decode(payload))
    spent = time.thread_time_ns() - started
    blocks = len(router.state.index)
    return router, {
        "blocks": blocks,
        "events_us_per_block": spent / 1e3 / blocks,
        "bytes_per_block": (psutil.Process().memory_info().rss - memory) / blocks,
    }


def report(router: KvRouter, placed: list[tuple[Route, bytes]]) -> None:
    """Report that the workers have computed these prompts, and then that they evicted as much, since they are full."""
    state = router.state
    for cache in state.caches:
        cache.unreported.clear()
    for stored in (True, False):
        for route, hashes in placed:
            (cache,) = state.caches_of(route.worker)
            assert cache.sequence is not None
            new = Change(stored, hashes[8 * route.overlap_blocks :])
            state.apply_events(KvEvents(route.worker, 0, cache.sequence + 1, [new]))
        router.tick()


def decide(router: KvRouter, questions: list[bytes], workers: int, draw: random.Random | None) -> list[float]:
    """Return the CPU time of each decision in µs. Questions arrive encoded, and workers report between them."""
    decode, spent = codec.decoder(RouteRequest), []
    placed: list[tuple[Route, bytes]] = []
    for number, encoded in enumerate(questions):
        question = decode(encoded)
        route, spent_us = timed(router.route, question)
        spent.append(spent_us)
        placed.append((route, question.hashes))
        router.state.apply_load(load_of(1 + number % workers, draw))
        if number % 100 == 99:
            report(router, placed)
            placed.clear()
    return spent


def walk(router: KvRouter, prompt: list[BlockHash]) -> int:
    """Follow each worker's prefix block by block and return the cheapest worker: the floor."""
    state, best, lowest = router.state, 0, float("inf")
    for cache in state.caches:
        held, overlap = state.index.blocks(cache.slot), 0
        for hash in prompt:
            if hash not in held:
                break
            overlap += 1
        cost = cache.prefill_blocks + 2 * len(prompt) - overlap + cache.decode_blocks
        if cost < lowest:
            best, lowest = cache.worker, cost
    return best


def measure(tokens: int, block_size: int, workers: int, blocks: int) -> dict[str, Any]:
    draw = random.Random(1)
    system = [draw.randrange(100_000) for _ in range(tokens // 4)]  # what all prompts begin with
    rest = tokens - len(system)
    texts = [system + [draw.randrange(100_000) for _ in range(rest)] for _ in range(blocks * block_size // rest)]
    prompts = [block_hashes(text, block_size) for text in texts]
    router, result = build(prompts, workers, block_size)
    asked = []
    for _ in range(DECISIONS):
        text, end = draw.choice(texts), draw.randrange(len(system), tokens + 1)
        asked.append(array("I", text[:end] + [draw.randrange(100_000) for _ in range(tokens - end)]))
    del texts
    gc.collect()
    gc.freeze()
    some = list(asked[:300])
    # lists of new ints, as the tokenizer gives them to the Processor
    hashes = cpu_us(lambda text: pack(block_hashes(text, block_size)), map(list, asked))
    questions = [
        codec.encode(RouteRequest(str(number), tokens, block_size, pack(block_hashes(text, block_size))))
        for number, text in enumerate(asked)
    ]
    del asked
    decisions = decide(router, questions, workers, draw)
    for worker in range(1, workers + 1):
        router.state.apply_load(load_of(worker, None))
    equal = decide(router, questions, workers, None)
    floor = cpu_us(lambda text: walk(router, block_hashes(text, block_size)), some)
    both = [one + two for one, two in zip(hashes, decisions, strict=True)]
    return result | {
        "hash_us": median(hashes),
        "decision_us": median(decisions),
        "equal_us": median(equal),
        "decision_p99_us": quantiles(decisions, n=100)[98],
        "both_us": median(both),
        "floor_us": median(floor),
    }


def measure_peer(directory: Path, version: str, shape: list[str]) -> dict[str, float] | None:
    python = directory / f"dynamo-{version}" / "bin" / "python"
    if not python.exists():
        return None
    script = Path(__file__).with_name("peers") / "radix_tree.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-P", script, *shape], capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description="Measure CPU of routing.")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of benchmarks/peers/install.sh")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a prompt; 4096 by default")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a KV block; 16 by default")
    parser.add_argument("--workers", type=int, default=64, help="64 by default")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="in the index; 1 million by default")
    options = parser.parse_args()
    ours = measure(options.tokens, options.block_size, options.workers, options.blocks)
    title = f"{options.tokens} tokens, block size {options.block_size}, {options.workers} workers, {ours['blocks']:,} blocks"
    table = Table(title=f"CPU of routing, medians in µs: {title}", title_justify="left")
    for heading in (
        "",
        "hashing",
        "decision",
        "p99",
        "equal loads",
        "both",
        "events, µs/block",
        "blocks/s",
        "bytes/block",
    ):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, **cells: float | None) -> None:
        table.add_row(name, *("" if cell is None else f"{cell:,.2f}" for cell in cells.values()))

    row(
        "ours",
        hash=ours["hash_us"],
        decision=ours["decision_us"],
        p99=ours["decision_p99_us"],
        equal=ours["equal_us"],
        both=ours["both_us"],
        events=ours["events_us_per_block"],
        rate=1e6 / ours["events_us_per_block"],
        size=ours["bytes_per_block"],
    )
    none = None
    row(
        "block by block",
        hash=none,
        decision=none,
        p99=none,
        equal=none,
        both=ours["floor_us"],
        events=none,
        rate=none,
        size=none,
    )
    shape = [options.tokens, options.block_size, options.workers, options.blocks * options.block_size // options.tokens]
    for version in ("1.6", "0.3") if options.peers else ():
        found = measure_peer(options.peers, version, list(map(str, shape)))
        if found is not None:
            row(
                f"ai-dynamo {version}, index only",
                hash=found["hash_us"],
                decision=found["match_us"],
                p99=none,
                equal=none,
                both=found["hash_us"] + found["match_us"],
                events=found["apply_us_per_block"],
                rate=1e6 / found["apply_us_per_block"],
                size=none,
            )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
