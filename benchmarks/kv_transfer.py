"""`python -m benchmarks.kv_transfer`: KV transfer between processes through the connector's data path.

Compared with a copy of the same bytes; with `--model DIR`, also between two vLLM engines, compared with an engine that
computes the KV itself.

Runs without pytest, on the CPU and on a GPU (whose two processes then share it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from dynamo.engines.kv_transfer.kv_cache import KvCache
from dynamo.engines.kv_transfer.kv_leases import KvLeases
from dynamo.engines.kv_transfer.puller import Pull, Puller
from dynamo.engines.kv_transfer.server import KvServer
from dynamo.engines.kv_transfer.session import SECRET, RemoteKv
from dynamo.transport.network import host_id

LAYERS, HEADS, BLOCK_TOKENS, HEAD = 32, 8, 16, 128  # an 8B Llama in bfloat16: 2 MiB a block of 16 tokens
BLOCK_BYTES = LAYERS * HEADS * BLOCK_TOKENS * 2 * HEAD * 2
GB = 1e9
WAYS = ("shared memory", "unix socket", "TCP")


def cache_of(blocks: int, device: str) -> KvCache:
    shape = (blocks, HEADS, BLOCK_TOKENS, 2 * HEAD) if device == "cpu" else (2, blocks, BLOCK_TOKENS, HEADS, HEAD)
    tensors = {f"layer {n}": torch.zeros(shape, dtype=torch.bfloat16, device=device) for n in range(LAYERS)}
    return KvCache(tensors, blocks, BLOCK_TOKENS, engine="bench", model="bench")


def hold(pipe: Connection, blocks: int, device: str) -> None:
    cache = cache_of(blocks, device)
    for number, plane in enumerate(cache.planes):
        plane.fill_(number + 1)
    leases = KvLeases(lease_s=600)
    server = KvServer(cache, leases, b"bench", "127.0.0.1")
    pipe.send((server.local, server.port))
    while (name := pipe.recv()) is not None:
        leases.grant(name, range(blocks))
        pipe.send(True)


def transfers(blocks: int, device: str, repetitions: int) -> Iterator[tuple[str, list[float]]]:
    """Yield (way, seconds of each repetition) of pulling all blocks; the first of each way is not counted."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(theirs, blocks, device), daemon=True)
    holder.start()
    local, port = pipe.recv()
    cache = cache_of(blocks, device)
    for way in WAYS:
        puller = Puller(cache, b"bench", threads=1, shared=way == "shared memory")
        remote = RemoteKv("", 1, "", host_id() if way != "TCP" else "", local, "127.0.0.1", port)
        seconds = []
        for number in range(repetitions + 1):
            name = f"{way} {number}"
            pipe.send(name)
            pipe.recv()
            puller.submit(
                Pull(name, msgspec.structs.replace(remote, lease_id=name), 0, range(blocks), cache.record_event())
            )
            while not (ended := puller.take_results()).requests:
                time.sleep(0.0002)
            assert not ended.failures
            seconds.append(ended.seconds)
        assert all(int(plane[-1, -1]) == number + 1 for number, plane in enumerate(cache.planes))
        puller.close()
        yield way, seconds[1:]
    pipe.send(None)
    holder.join()


def copies(size: int, repetitions: int) -> Iterator[tuple[str, list[float]]]:
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    yield "copy in memory", [_timed(lambda: target.copy_(source)) for _ in range(repetitions + 1)][1:]
    if torch.cuda.is_available():
        pinned, device = torch.zeros(size, dtype=torch.uint8, pin_memory=True), source.cuda()

        def bus(to: torch.Tensor, out_of: torch.Tensor) -> None:
            to.copy_(out_of, non_blocking=True)
            torch.cuda.synchronize()

        yield "GPU to pinned", [_timed(lambda: bus(pinned, device)) for _ in range(repetitions + 1)][1:]
        yield "pinned to GPU", [_timed(lambda: bus(device, pinned)) for _ in range(repetitions + 1)][1:]


def _timed(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def measure_path(sizes_gb: list[float], device: str, repetitions: int) -> None:
    print(f"{'GB':>6}  {'way':<16}{'GB/s':>8}  (lowest - highest of {repetitions})")
    for size_gb in sizes_gb:
        blocks = max(1, round(size_gb * GB / BLOCK_BYTES))
        size = blocks * BLOCK_BYTES
        for way, seconds in [*copies(size, repetitions), *transfers(blocks, device, repetitions)]:
            rates = sorted(size / s / GB for s in seconds)
            print(f"{size / GB:6.2f}  {way:<16}{statistics.median(rates):8.2f}  ({rates[0]:.2f} - {rates[-1]:.2f})")


async def measure_engines(model: str, arguments: Mapping[str, Any], lengths: list[int]) -> bool:
    """Compare a prompt of each length computed by the engine itself and by another one; return True if answers are equal."""
    from tests.vllm.engine_process import Engines

    secret = {SECRET: os.urandom(16).hex()}
    configuration = {"model": model, "arguments": {**arguments, "kv-transfer": True}, "environment": secret}
    dice, equal = random.Random(1), True
    async with Engines({"prefill": configuration}) as first, Engines({"decode": configuration}) as second:
        prefill, decode = first["prefill"], second["decode"]
        await asyncio.gather(*(engine.generate(_prompt(dice, 100)) for engine in (prefill, decode)))
        print(f"{'tokens':>7}{'prefill ms':>12}{'pull ms':>9}{'GB/s':>7}{'first token ms':>16}  equal")
        for length in [lengths[0], *lengths]:  # the first one warms up
            prompt = _prompt(dice, length)
            before = (await decode.state())["transferred"]
            started = time.perf_counter()
            kv = await prefill.prefill(prompt)
            computed = time.perf_counter()
            pulled = await decode.generate(prompt, 1, kv)
            answered = time.perf_counter()
            more = await decode.generate(prompt, 24)
            own = await prefill.generate(prompt, 24)
            after = (await decode.state())["transferred"]
            count, seconds = (after[name] - before.get(name, 0) for name in ("bytes", "seconds"))
            same = own["tokens"] == more["tokens"] and own["tokens"][:1] == pulled["tokens"] and not after["failures"]
            equal = equal and same
            print(
                f"{length:7}{1e3 * (computed - started):12.1f}{1e3 * seconds:9.1f}"
                f"{count / seconds / GB:7.2f}{1e3 * (answered - computed):16.1f}  {same}"
            )
        for name, engine in (("prefill", prefill), ("decode", decode)):
            print(name, await engine.state())
    return equal


def _prompt(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(10, 1000) for _ in range(length)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_transfer", description="Measure KV transfer.")
    parser.add_argument("--gb", type=float, nargs="*", default=[0.1, 1.0, 2.0], help="sizes; --gb alone: none")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a model's directory, or dynamo-tiny: also measure two engines")
    parser.add_argument("--arguments", type=json.loads, default={}, metavar="JSON", help="vLLM's flags by name")
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[100, 1000, 3000], help="lengths of prompts, in tokens"
    )
    options = parser.parse_args()
    measure_path(options.gb, options.device, options.repetitions)
    if options.model:
        return 0 if asyncio.run(measure_engines(options.model, options.arguments, options.lengths)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
