"""`python -m benchmarks.disagg`: effect of long prompts on the ITL of other streams, with and without disaggregation.

Streams decode all the time, and long prompts without a cached prefix arrive at a steady rate. Measured are all times
between two tokens of the streams (not their means) and the TTFT of the long prompts; for each graph in turn, with the
same number of engines: prefill and decode workers against as many workers that do both.

    python -m benchmarks.disagg                                     # mock engines, 1 + 1 against 2
    python -m benchmarks.disagg --config-agg A.yaml --config-disagg D.yaml --set Common.model=DIR    # real ones
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.load import percentile
from benchmarks.processes import CpuMeter, StartError
from benchmarks.replay.systems import START_LIMIT_S, models
from benchmarks.system import serve_graph


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens; `rate`: long prompts a second."""

    streams: int
    stream_tokens: int
    long_tokens: int
    long_output: int
    rate: float
    seconds: float


@dataclass
class Seen:
    """Times in seconds, over the measured time only."""

    gaps_s: list[float] = field(default_factory=list)
    """between two tokens of the streams"""
    ttft_s: list[float] = field(default_factory=list)
    """of the long prompts"""
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


class Measurement:
    def __init__(self, url: str, model: str, shape: Shape, vocabulary: range) -> None:
        self._url = url
        self._model = model
        self._shape = shape
        self._vocabulary = vocabulary
        self._draw = random.Random(1)
        self._seen = Seen()
        self._measuring = False

    async def run(self) -> Seen:
        """Measure for `seconds` after a warm-up of 2 s. Raises StartError if no tokens arrived."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=120) as self._client:
            tasks = [asyncio.create_task(self._decode_stream()) for _ in range(self._shape.streams)]
            await asyncio.sleep(2.0)
            self._measuring = True
            arrivals = asyncio.create_task(self._long_prompts())
            await asyncio.sleep(self._shape.seconds)
            self._measuring = False
            for task in (arrivals, *tasks):
                task.cancel()
            await asyncio.gather(arrivals, *tasks, return_exceptions=True)
        if not self._seen.gaps_s:
            raise StartError(f"no tokens arrived: {self._seen.errors[:1]}")
        return self._seen

    async def _decode_stream(self) -> None:
        while True:
            tokens = self._shape.stream_tokens
            await self._answer(16, self._draw.randrange(tokens // 2, tokens), self._record_gap)

    async def _long_prompts(self) -> None:
        running: set[asyncio.Task[None]] = set()
        while True:
            task = asyncio.create_task(
                self._answer(self._shape.long_tokens, self._shape.long_output, self._record_first)
            )
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(self._draw.expovariate(self._shape.rate))

    def _record_gap(self, seconds: float, first: bool) -> None:
        if not first:
            self._seen.gaps_s.append(seconds)

    def _record_first(self, seconds: float, first: bool) -> None:
        if first:
            self._seen.ttft_s.append(seconds)

    async def _answer(self, prompt: int, output: int, record: Callable[[float, bool], None]) -> None:
        body = {
            "model": self._model,
            "prompt": self._draw.choices(self._vocabulary, k=prompt),
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        last, first = time.perf_counter(), True
        try:
            async with self._client.stream(
                "POST", "/v1/completions", content=orjson.dumps(body), headers={"content-type": "application/json"}
            ) as answer:
                if answer.status_code != 200:
                    raise StartError(f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}")
                async for chunk in answer.aiter_raw():
                    now = time.perf_counter()
                    if b'"text"' in chunk:
                        if self._measuring:
                            record(now - last, first)
                            self._seen.tokens += chunk.count(b'"text"')
                        last, first = now, False
        except (httpx.HTTPError, StartError) as error:
            if self._measuring:  # not for the streams that are cancelled at the end
                self._seen.errors.append(str(error) or type(error).__name__)
                await asyncio.sleep(0.5)


def measure(name: str, graph: str, config: str, settings: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="disagg-") as folder:
        running = serve_graph(name, "", graph, config, settings, Path(folder), START_LIMIT_S)
        running.role = lambda argv: "servers"
        try:
            (model, *_) = models(running.port)
            shape = Shape(
                options.streams, options.stream_tokens, options.tokens, options.output, options.rate, options.seconds
            )
            first, last = map(int, options.vocab.split(":"))
            meter = CpuMeter([process.pid for process in running.processes], running.role)
            meter.start()
            seen = asyncio.run(Measurement(f"http://127.0.0.1:{running.port}", model, shape, range(first, last)).run())
            cpu = sum(meter.seconds().values())
            metrics = httpx.get(f"http://127.0.0.1:{running.port}/metrics", timeout=10).text
        finally:
            running.stop()
    gaps, ttft = sorted(seen.gaps_s), sorted(seen.ttft_s)
    return {
        "name": name,
        "itl_ms": {p: percentile(gaps, share) * 1e3 for p, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "itl_mean_ms": fmean(gaps) * 1e3,
        "ttft_ms": {p: percentile(ttft, share) * 1e3 for p, share in (("p50", 0.5), ("p99", 0.99))} if ttft else {},
        "long_prompts": len(ttft),
        "tokens_per_s": seen.tokens / options.seconds,
        "errors": seen.errors,
        "server_cores": cpu / options.seconds,
        "remote": [line for line in metrics.splitlines() if "remote" in line and not line.startswith("#")][:6],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disagg", description="Measure ITL beside long prompts.")
    add = parser.add_argument
    add("--streams", type=int, default=16, help="streams that decode all the time; 16 by default")
    add("--stream-tokens", type=int, default=400, help="most tokens of each of their requests; 400 by default")
    add("--tokens", type=int, default=4000, help="length of a long prompt; 4000 by default")
    add("--output", type=int, default=16, help="tokens of its answer; 16 by default")
    add("--rate", type=float, default=3.0, help="long prompts a second; 3 by default")
    add("--seconds", type=float, default=20.0, help="duration of the measurement; 20 by default")
    add("--vocab", default="300:900", metavar="FIRST:END", help="token ids of the prompts")
    add("--graph-agg", default="graphs.agg:Frontend")
    add("--graph-disagg", default="graphs.disagg:Frontend")
    add("--config-agg", default="configs/agg_mock.yaml")
    add("--config-disagg", default="configs/disagg_mock.yaml")
    add(
        "--engines",
        type=int,
        default=2,
        help="total number; with disaggregation half of them compute prompts; 2 by default",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both graphs; repeatable")
    add("--set-agg", action="append", default=[], metavar="KEY=VALUE")
    add("--set-disagg", action="append", default=[], metavar="KEY=VALUE")
    add("--only", choices=("agg", "disagg"), help="measure one of the two")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    half = options.engines // 2
    agg = [*options.set, f"VllmWorker.ServiceArgs.workers={options.engines}", *options.set_agg]
    disagg = [
        *options.set,
        f"PrefillWorker.ServiceArgs.workers={half}",
        f"VllmWorker.ServiceArgs.workers={options.engines - half}",
        *options.set_disagg,
    ]
    plan = {
        "agg": (f"{options.engines} that do both", options.graph_agg, options.config_agg, agg),
        "disagg": (
            f"{half} prefill + {options.engines - half} decode",
            options.graph_disagg,
            options.config_disagg,
            disagg,
        ),
    }
    results = []
    for kind, (name, graph, config, settings) in plan.items():
        if options.only in (None, kind):
            print(f"{name} …", file=sys.stderr)
            try:
                results.append(measure(name, graph, config, settings, options))
            except StartError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    table = Table(
        title=f"{options.streams} streams decode, {options.rate:g} prompts of {options.tokens} tokens a second"
    )
    for heading in (
        "engines",
        "ITL p50",
        "p90",
        "p99 ms",
        "mean",
        "long TTFT p50",
        "p99 ms",
        "prompts",
        "tokens/s",
        "errors",
    ):
        table.add_column(heading, justify="left" if heading == "engines" else "right")
    for result in results:
        itl, ttft = result["itl_ms"], result["ttft_ms"]
        table.add_row(
            result["name"],
            *(f"{itl[p]:.1f}" for p in ("p50", "p90", "p99")),
            f"{result['itl_mean_ms']:.1f}",
            *(f"{ttft[p]:.0f}" if ttft else "-" for p in ("p50", "p99")),
            str(result["long_prompts"]),
            f"{result['tokens_per_s']:.0f}",
            str(len(result["errors"])),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for result in results:
        for line in (*result["remote"], *result["errors"][:3]):
            console.print(f"{result['name']}: {line}", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
