"""Our graph and its peers under the same loads, in turns: CPU and latency."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import uvloop

from benchmarks.load import Client, Load, LoadError, percentile
from benchmarks.peers import rust, sdk
from benchmarks.processes import CpuMeter
from benchmarks.system import REPOSITORY, Running, System, serve_graph
from dynamo.engines.mock import MockEngine
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling

T = TypeVar("T")

OURS = "ours"
OTHER = "other commit"
START_LIMIT_S = 60.0
VLLM_START_LIMIT_S = 240.0
WARM_UP = 2  # requests for each connection before a point is measured
DIRECT_CALLS = 100
PEER_TRIES = 3  # Dynamo 0.3 skips an instance for seconds after an error, which may happen under load
PEER_PAUSE_S = 5.0


class Point(NamedTuple):
    name: str
    load: Load
    paced: bool = False


POINTS = [
    Point("1 stream", Load(1, 48)),
    Point("64 streams", Load(64, 640)),
    Point("512 streams", Load(512, 1024)),
    Point("64 streams, paced", Load(64, 192), paced=True),
    Point("1 stream, paced", Load(1, 4), paced=True),
    Point("unary, 1 at a time", Load(1, 256, 1, streaming=False)),
    Point("unary, 64 at a time", Load(64, 2048, 1, streaming=False)),
]


@dataclass(frozen=True)
class Measured:
    """One run of one system at one point. CPU by role, in microseconds a token or, for unary loads, a request."""

    tokens_per_s: float
    requests_per_s: float
    chunks_per_token: float
    cpu_us: dict[str, float]
    ttft_p50_ms: float
    ttft_p99_ms: float
    duration_p50_ms: float
    duration_p99_ms: float
    client_cpu_us: float

    @property
    def total_cpu_us(self) -> float:
        return sum(self.cpu_us.values())


@dataclass
class Results:
    runs: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    """point -> system -> its runs"""
    start_s: dict[str, float] = field(default_factory=dict)
    direct_ttft_ms: dict[str, float] = field(default_factory=dict)
    """TTFT of our mock engine called in this process: `unpaced`, `paced`"""
    failures: list[str] = field(default_factory=list)
    """failures of peers; a failure of ours ends the benchmark"""

    def add(self, point: str, system: str, measured: Measured) -> None:
        self.runs.setdefault(point, {}).setdefault(system, []).append(measured)


def start_graph(run_dir: Path, paced: bool, *, name: str = OURS, repository: Path = REPOSITORY) -> Running:
    """Serve graphs.agg of a checkout with mock workers."""
    settings = [f"VllmWorker.speedup-ratio={int(paced)}"]
    config = "configs/agg_mock.yaml"
    return serve_graph(
        name, "dynamo-tiny", "graphs.agg:Frontend", config, settings, run_dir, START_LIMIT_S, repository=repository
    )


def systems(peers: Path | None, against: Path | None = None) -> list[System]:
    """Return our system, another checkout of it, and the peers installed in the folder `peers`."""
    found = [System(OURS, start_graph)]
    if against is not None:
        found.append(System(OTHER, partial(start_graph, name=OTHER, repository=against.resolve())))
    known: list[tuple[str, str, Callable[[Path, Path, bool], Running]]] = [
        (rust.NAME, "dynamo-1.6", rust.start),
        (sdk.NAME, "dynamo-0.3", sdk.start),
    ]
    for name, directory, start in known:
        if peers is not None and (peers / directory / "bin").is_dir():
            found.append(System(name, partial(start, (peers / directory).resolve())))
    return found


@contextmanager
def _started(wanted: Sequence[System], paced: bool, results: Results) -> Iterator[list[Running]]:
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as base:
        try:
            for number, system in enumerate(wanted):
                run_dir = Path(base, str(number))
                run_dir.mkdir()
                running.append(system.start(run_dir, paced))
                if not paced:
                    results.start_s[f"{system.name}, mock"] = running[-1].start_s
            yield running
        finally:
            for one in running:
                one.stop()


async def _measure(server: Running, load: Load) -> Measured:
    client = Client("127.0.0.1", server.port, server.model)
    meter = CpuMeter([process.pid for process in server.processes], server.role)
    meter.start()
    outcome = await client.run(load)
    used = meter.seconds()
    each = load.tokens if load.streaming else load.requests
    return Measured(
        tokens_per_s=load.tokens / outcome.seconds,
        requests_per_s=load.requests / outcome.seconds,
        chunks_per_token=outcome.chunks / outcome.tokens,
        cpu_us={role: seconds / each * 1e6 for role, seconds in used.items()},
        ttft_p50_ms=percentile(outcome.ttft_s, 0.5) * 1e3,
        ttft_p99_ms=percentile(outcome.ttft_s, 0.99) * 1e3,
        duration_p50_ms=percentile(outcome.duration_s, 0.5) * 1e3,
        duration_p99_ms=percentile(outcome.duration_s, 0.99) * 1e3,
        client_cpu_us=outcome.client_cpu_s / each * 1e6,
    )


async def _warm_up(server: Running, load: Load) -> bool:
    warm = Load(load.streams, load.streams * WARM_UP, min(load.output_tokens, 16), streaming=load.streaming)
    await Client("127.0.0.1", server.port, server.model).run(warm)
    return True


def measure(wanted: Sequence[System], points: Sequence[Point], repetitions: int, log: Callable[[str], None]) -> Results:
    """Measure every system at every point, in turns, so that other work on the machine affects all alike."""
    results = Results()
    for paced in (False, True):
        chosen = [point for point in points if point.paced == paced]
        if not chosen:
            continue
        with _started(wanted, paced, results) as running:
            for point in chosen:
                able = [
                    server for server in running if _try(server, partial(_warm_up, server, point.load), point, results)
                ]
                for repetition in range(repetitions):
                    for server in able:
                        measured = _try(server, partial(_measure, server, point.load), point, results)
                        if measured is not None:
                            results.add(point.name, server.name, measured)
                            log(
                                f"{point.name}: {server.name} {repetition + 1}/{repetitions}: "
                                f"{measured.total_cpu_us:.1f} µs, {measured.tokens_per_s:,.0f} tokens/s"
                            )
    for pace, ratio in (("unpaced", 0), ("paced", 1)):
        results.direct_ttft_ms[pace] = uvloop.run(_direct_ttft_ms(ratio, DIRECT_CALLS if ratio == 0 else 10))
    return results


def _try(server: Running, work: Callable[[], Coroutine[Any, Any, T]], point: Point, results: Results) -> T | None:
    """Run `work` and return its result; None if a peer failed PEER_TRIES times. Raises LoadError if ours fails."""
    for tried in range(PEER_TRIES):
        try:
            done: T = uvloop.run(work())
            return done
        except LoadError as error:
            if server.name == OURS:
                raise LoadError(f"{point.name}: {error}") from None
            if tried == PEER_TRIES - 1:
                results.failures.append(f"{point.name}: {server.name}: {error}")
            time.sleep(PEER_PAUSE_S)
    return None


async def _direct_ttft_ms(speedup: float, calls: int) -> float:
    """Return the median time to the first token of the mock engine itself, called in this process."""
    engine = MockEngine("dynamo-tiny", {"speedup-ratio": speedup}, lambda _: None)
    await engine.start()
    loop = asyncio.get_running_loop()
    times = []
    for number in range(calls):
        first: asyncio.Future[float] = loop.create_future()

        def on_item(_: Delta, first: asyncio.Future[float] = first) -> None:
            if not first.done():
                first.set_result(time.perf_counter())

        began = time.perf_counter()
        sampling = Sampling(max_tokens=8, ignore_eos=True)
        engine.generate(GenerateRequest([number] * 70, sampling)).pipe(on_item, lambda _: None)
        times.append(await first - began)
        await asyncio.sleep(0.001)
    return statistics.median(times) * 1e3


def measure_vllm_start(results: Results) -> None:
    """Measure the start of the tiny model on vLLM: with empty caches, then with those of the first start."""
    with tempfile.TemporaryDirectory(prefix="bench-") as base:
        caches = {
            name: f"{base}/{name.lower()}" for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
        }
        for name in ("first", "second"):
            config = "configs/agg_tiny.yaml"
            running = serve_graph(
                OURS, "dynamo-tiny", "graphs.agg:Frontend", config, [], Path(base), VLLM_START_LIMIT_S, caches
            )
            running.stop()
            results.start_s[f"ours, vLLM, {name} start"] = running.start_s


def summary(results: Results) -> dict[str, Any]:
    """Return medians, the range of total CPU, and the ratio of ours to each peer, as plain data for JSON and the table."""
    points: dict[str, Any] = {}
    for point, by_system in results.runs.items():
        rows: dict[str, Any] = {}
        for system, runs in by_system.items():
            totals = [run.total_cpu_us for run in runs]
            median = partial(_median, runs)
            rows[system] = {
                "tokens_per_s": median("tokens_per_s"),
                "requests_per_s": median("requests_per_s"),
                "chunks_per_token": median("chunks_per_token"),
                "cpu_us": {role: statistics.median(run.cpu_us[role] for run in runs) for role in runs[0].cpu_us},
                "total_cpu_us": statistics.median(totals),
                "total_cpu_us_range": [min(totals), max(totals)],
                "ttft_p50_ms": median("ttft_p50_ms"),
                "ttft_p99_ms": median("ttft_p99_ms"),
                "duration_p50_ms": median("duration_p50_ms"),
                "duration_p99_ms": median("duration_p99_ms"),
                "client_cpu_us": median("client_cpu_us"),
            }
        ours = rows[OURS]
        for system, row in rows.items():
            if system != OURS:
                ours.setdefault("cpu_of_peer", {})[system] = ours["total_cpu_us"] / row["total_cpu_us"]
        points[point] = rows
    out: dict[str, Any] = {
        "points": points,
        "start_s": results.start_s,
        "direct_ttft_ms": results.direct_ttft_ms,
        "failures": results.failures,
    }
    added = {
        pace: points[point][OURS]["ttft_p50_ms"] - results.direct_ttft_ms[pace]
        for pace, point in (("unpaced", "1 stream"), ("paced", "1 stream, paced"))
        if point in points
    }
    return {**out, "ttft_added_ms": added}


def _median(runs: Sequence[Measured], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))
