"""The mock's KV cache and scheduler compared with vLLM's step by step, and the mock engine with the whole of vLLM.

vLLM's Scheduler is driven with invented tokens, so that its state can be read after each step. Tokens are a function of
the request and the position, the same on both sides; vLLM's block hashes are translated into ours by block content. vLLM
runs in a fork of `vllm_process`, whose environment is set before vLLM is imported.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from dynamo.engines.mock import MockEngine
from dynamo.engines.mock.block_pool import BlockPool
from dynamo.engines.mock.scheduler import ScheduledSequence, Scheduler
from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, EngineEvent
from dynamo.kv_router.hashing import ROOT, block_hashes
from dynamo.llm.engine import Engine
from dynamo.llm.protocol import GenerateRequest, Sampling
from dynamo.llm.tiny import MODEL_DIR
from tests.vllm.fork_server import ForkServer

pytestmark = pytest.mark.vllm

BLOCK = 32
CONTEXT = 1024
RANDOM_TRACES = 40
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


class Arrival(NamedTuple):
    step: int
    """the request is added before this step"""
    name: str
    prompt: list[int]
    max_tokens: int
    abort_step: int | None = None


class Trace(NamedTuple):
    name: str
    blocks: int
    batched_tokens: int
    sequences: int
    arrivals: list[Arrival]
    prefix_caching: bool = True
    chunked_prefill: bool = True


class StepLog(msgspec.Struct, frozen=True):
    """State after a step. Requests are named; events are ["stored", parent, block] and ["removed", block]."""

    computed: list[tuple[str, int]]
    """(request, tokens computed at the step's end) of the step's batch, in its order"""
    events: list[list[Any]]
    running: list[str]
    waiting: list[str]
    usage: float
    queries: int
    hits: int


class TraceLog(msgspec.Struct, frozen=True):
    steps: list[StepLog]
    cached_tokens: dict[str, int]
    output: dict[str, list[int]]
    preemptions: dict[str, int]


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 900), k=count)


def next_token(name: str, position: int) -> int:
    """Return the token at a position. Only the name's length counts, so that some requests generate the same blocks."""
    return (len(name) * 7919 + position * 104729) % 887


def traces() -> list[Trace]:
    shared = tokens(1, 200)
    sequential = [
        Arrival(60 * i, f"s{i}", shared[: 40 + 32 * (i % 4)] + tokens(i, 10 + 23 * i), 20 + i) for i in range(12)
    ]
    return [
        Trace("one after the other, with eviction", 20, 512, 8, sequential),
        Trace("the same prompt again", 40, 512, 8, [Arrival(30 * i, f"r{i}", shared[:128], 10) for i in range(3)]),
        Trace("the same prompt concurrently", 60, 512, 8, [Arrival(0, f"r{i}", shared[:130], 40) for i in range(5)]),
        Trace("chunks", 60, 48, 8, [Arrival(i, f"r{i}", shared[:100] + tokens(i, 77), 40) for i in range(6)]),
        Trace("preemption", 14, 512, 8, [Arrival(0, f"r{i}", tokens(i, 60), 120) for i in range(5)]),
        Trace("preemption in chunks", 14, 40, 8, [Arrival(i, f"r{i}", tokens(i, 60), 120) for i in range(5)]),
        Trace("few places", 60, 512, 2, [Arrival(0, f"r{i}", shared[: 20 * i + 5], 9) for i in range(9)]),
        Trace("no prefix caching", 14, 64, 8, [Arrival(0, f"r{i}", shared[:60], 120) for i in range(5)], False),
        Trace("no chunks", 60, CONTEXT, 8, [Arrival(0, f"r{i}", tokens(i, 400), 9) for i in range(4)], True, False),
        *(random_trace(seed) for seed in range(RANDOM_TRACES)),
    ]


def random_trace(seed: int) -> Trace:
    """Return conversations with shared prefixes, some of them aborted, in a cache that is too small for all."""
    rng = random.Random(seed)
    roots = [tokens(seed * 10 + i, rng.randint(30, 200)) for i in range(3)]
    arrivals = []
    step = 0
    blocks = rng.randint(14, 40)
    for number in range(rng.randint(5, 25)):
        step += rng.choice((0, 0, 1, 5, 40))
        root = rng.choice(roots)
        prompt = root[: rng.choice((len(root), rng.randint(1, len(root)), 32, 64))] + tokens(
            rng.randint(0, 5), rng.choice((0, 1, 31, 32, 50))
        )
        output = rng.randint(1, min(120, (blocks - 1) * BLOCK - len(prompt)))
        abort = step + rng.randint(1, 30) if rng.random() < 0.2 else None
        arrivals.append(Arrival(step, "r" * rng.randint(1, 3) + f"-{number:02}", prompt, output, abort))
        if rng.random() < 0.3:  # a next turn
            roots.append(prompt + [next_token(arrivals[-1].name, len(prompt) + i) for i in range(output)])
            if len(roots[-1]) > (blocks - 1) * BLOCK - 160:
                roots.pop()
    return Trace(f"random {seed}", blocks, rng.choice((33, 64, 100, 512)), rng.choice((2, 4, 16)), arrivals)


class Traced(ScheduledSequence):
    __slots__ = ("max_tokens", "name")

    def __init__(self, arrival: Arrival, *, prefix_caching: bool) -> None:
        super().__init__(arrival.prompt, block_hashes(arrival.prompt, BLOCK) if prefix_caching else [])
        self.name = arrival.name
        self.max_tokens = arrival.max_tokens

    def advance(self) -> bool:
        self.output.append(next_token(self.name, len(self.prompt) + len(self.output)))
        return len(self.output) == self.max_tokens


def flat(events: Iterable[EngineEvent]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for event in events:
        assert not isinstance(event, BlocksCleared)
        if isinstance(event, BlocksRemoved):
            found += [["removed", name] for name in event.hashes]
        else:
            assert block_hashes(event.token_ids, event.block_size, event.parent or ROOT) == list(event.hashes)
            parents = [event.parent, *event.hashes]
            found += [["stored", parent, name] for parent, name in zip(parents, event.hashes, strict=False)]
    return found


def run_mock(trace: Trace) -> TraceLog:
    cache = BlockPool(trace.blocks, BLOCK, events=True)
    scheduler: Scheduler[Traced] = Scheduler(
        cache,
        batched_tokens=trace.batched_tokens,
        sequences=trace.sequences,
        chunked_prefill=trace.chunked_prefill,
        prefix_caching=trace.prefix_caching,
    )
    known: dict[str, Traced] = {}
    steps = []
    arrivals = list(trace.arrivals)
    for number in range(10_000):
        while arrivals and arrivals[0].step <= number:
            arrival = arrivals.pop(0)
            known[arrival.name] = Traced(arrival, prefix_caching=trace.prefix_caching)
            scheduler.add(known[arrival.name])
        for arrival in trace.arrivals:
            if arrival.abort_step == number:
                scheduler.remove(known[arrival.name])
        if scheduler.schedule() is None and not arrivals:
            break
        computed = [(s.name, s.computed) for s in scheduler.batch]
        scheduler.complete(Traced.advance)
        steps.append(
            StepLog(
                computed,
                flat(cache.drain_events()),
                [s.name for s in scheduler.running],
                [s.name for s in scheduler.waiting],
                round(cache.usage, 6),
                scheduler.prefix_queries,
                scheduler.prefix_hits,
            )
        )
    return TraceLog(
        steps,
        {name: s.cached_tokens for name, s in known.items() if s.output},
        {name: s.output for name, s in known.items()},
        {name: s.preemptions for name, s in known.items()},
    )


def run_vllm(trace: Trace, scheduler: Any, events: list[Any], new_request: Any) -> TraceLog:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    names: dict[int | bytes, int] = {}  # vLLM's block hash -> ours
    requests: dict[str, Any] = {}
    cached: dict[str, int] = {}
    steps = []
    queries = hits = 0
    arrivals = list(trace.arrivals)
    for number in range(10_000):
        while arrivals and arrivals[0].step <= number:
            arrival = arrivals.pop(0)
            requests[arrival.name] = new_request(arrival)
            scheduler.add_request(requests[arrival.name])
        for arrival in trace.arrivals:
            if arrival.abort_step == number:
                scheduler.finish_requests(arrival.name, RequestStatus.FINISHED_ABORTED)
        planned = scheduler.schedule()
        if not planned.num_scheduled_tokens and not arrivals:
            break
        batch = [requests[name] for name in planned.num_scheduled_tokens]
        computed = [(r.request_id, r.num_computed_tokens) for r in batch]
        sampled = [
            [next_token(r.request_id, r.num_tokens)] if r.num_computed_tokens == r.num_tokens else [] for r in batch
        ]
        index = {r.request_id: i for i, r in enumerate(batch)}
        ran = ModelRunnerOutput(req_ids=list(index), req_id_to_index=index, sampled_token_ids=sampled)
        for outputs in scheduler.update_from_output(planned, ran).values():
            for output in outputs.outputs:
                if output.prefill_stats is not None:
                    cached[output.request_id] = output.prefill_stats.num_cached_tokens
            if (stats := outputs.scheduler_stats) is not None:
                queries += stats.prefix_cache_stats.queries
                hits += stats.prefix_cache_stats.hits
        steps.append(
            StepLog(
                computed,
                translated(events, names),
                [r.request_id for r in scheduler.running],
                [r.request_id for r in scheduler.waiting],
                round(scheduler.get_kv_cache_usage(), 6),
                queries,
                hits,
            )
        )
        events.clear()
    return TraceLog(
        steps,
        cached,
        {name: list(r.output_token_ids) for name, r in requests.items()},
        {name: r.num_preemptions for name, r in requests.items()},
    )


def translated(events: list[Any], names: dict[int | bytes, int]) -> list[list[Any]]:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    found: list[list[Any]] = []
    for event in events:
        if isinstance(event, BlockRemoved):
            found += [["removed", names[name]] for name in event.block_hashes]
            continue
        assert isinstance(event, BlockStored)
        parent = None if event.parent_block_hash is None else names[event.parent_block_hash]
        ours = block_hashes(event.token_ids, event.block_size, parent or ROOT)
        names.update(zip(event.block_hashes, ours, strict=True))
        found += [["stored", before, name] for before, name in zip([parent, *ours], ours, strict=False)]
    return found


def make_scheduler(trace: Trace, events: list[Any]) -> tuple[Any, Any]:
    """Return vLLM's scheduler for a trace and a function that creates its requests. KV events are added to `events`."""
    import torch
    from vllm import SamplingParams
    from vllm.config import CacheConfig, DeviceConfig, KVEventsConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config = VllmConfig(
        model_config=ModelConfig(model=str(MODEL_DIR), dtype="float32", max_model_len=CONTEXT),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=trace.prefix_caching),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=trace.batched_tokens,
            max_num_seqs=trace.sequences,
            max_model_len=CONTEXT,
            is_encoder_decoder=False,
            enable_chunked_prefill=trace.chunked_prefill,
            async_scheduling=False,
        ),
        device_config=DeviceConfig("cpu"),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    config.cache_config.num_gpu_blocks = trace.blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    scheduler = VllmScheduler(
        config,
        KVCacheConfig(
            num_blocks=trace.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )
    scheduler.kv_event_publisher.publish = lambda batch: events.extend(batch.events)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256) if trace.prefix_caching else None

    def new_request(arrival: Arrival) -> Any:
        return Request(
            arrival.name,
            arrival.prompt,
            SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True),
            None,
            block_hasher=hasher,
        )

    return scheduler, new_request


ENGINE: dict[str, Any] = {
    "num-gpu-blocks-override": 20,
    "block-size": BLOCK,
    "max-model-len": 19 * BLOCK,
    "enforce-eager": True,
    "gpu-memory-utilization": 0.05,  # of the machine's memory, which is shared with other processes
}


class Answered(msgspec.Struct, frozen=True):
    prompt: list[int]
    output: list[int]
    cached_tokens: int


class EngineLog(msgspec.Struct, frozen=True):
    answers: list[Answered]
    events: list[list[Any]]
    queries: int
    hits: int


async def ask(engine: Engine, prompts: list[list[int]], *, first_tokens: int) -> EngineLog:
    """Send one request after the other; return the answers and the KV events meanwhile, with the engine's own hashes."""
    events: list[EngineEvent] = []
    assert engine.kv_events(lambda _, new: events.extend(new))
    await engine.start()
    answers = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=first_tokens + number, ignore_eos=True, temperature=0)
        deltas = [d async for d in engine.generate(GenerateRequest(prompt, sampling, f"r{number}"))]
        answers.append(Answered(prompt, [t for d in deltas for t in d.token_ids], deltas[0].cached_tokens or 0))
    seen = -1
    while seen != len(events):  # events arrive separately from the answers
        seen = len(events)
        await asyncio.sleep(1)
    stats = engine.stats()[0]
    await engine.stop()
    return EngineLog(answers, raw(events), stats.prefix_queries, stats.prefix_hits)


def raw(events: Iterable[EngineEvent]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for event in events:
        assert not isinstance(event, BlocksCleared)
        if isinstance(event, BlocksRemoved):
            found += [["removed", name] for name in event.hashes]
        else:
            parent = event.parent
            for number, name in enumerate(event.hashes):
                held = event.token_ids[number * event.block_size : (number + 1) * event.block_size]
                found.append(["stored", parent, name, list(held)])
                parent = name
    return found


def renamed(events: list[list[Any]]) -> list[list[Any]]:
    """Return the events with the engine's hashes replaced by hashes of the blocks' content and all blocks before them."""
    names: dict[int, int] = {}
    found: list[list[Any]] = []
    for kind, *rest in events:
        if kind == "removed":
            found.append([kind, names[rest[0]]])
            continue
        parent, name, held = rest
        before = None if parent is None else names[parent]
        names[name] = block_hashes(held, BLOCK, before or ROOT)[0]
        found.append([kind, before, names[name]])
    return found


def engine_prompts() -> list[list[int]]:
    shared = tokens(1, 300)
    return [shared[: 64 + 40 * (number % 5)] + tokens(number % 7, 70 + 9 * number) for number in range(16)]


def run_engine() -> Any:
    from dynamo.engines.vllm.engine import VllmEngine

    engine = VllmEngine("dynamo-tiny", ENGINE, lambda _: None)
    return msgspec.to_builtins(asyncio.run(ask(engine, engine_prompts(), first_tokens=20)))


@pytest.fixture(scope="module")
def engine_log(vllm_process: ForkServer) -> EngineLog:
    found = vllm_process.run("tests.vllm.test_mock_parity:run_engine", environment=ENVIRONMENT)
    return msgspec.convert(found, EngineLog)


def test_mock_scheduler_stores_and_hits_the_same_blocks_as_the_vllm_engine(engine_log: EngineLog) -> None:
    """vLLM runs with its model and publishes over ZeroMQ; then the mock's scheduler generates the model's tokens."""
    cache = BlockPool(ENGINE["num-gpu-blocks-override"], BLOCK, events=True)
    scheduler: Scheduler[Traced] = Scheduler(cache, batched_tokens=2048, sequences=128)
    found = []
    for answer in engine_log.answers:
        chosen = iter(answer.output)
        sequence = Traced(Arrival(0, "r", answer.prompt, len(answer.output)), prefix_caching=True)
        scheduler.add(sequence)

        def advance(sequence: Traced, chosen: Iterator[int] = chosen) -> bool:
            sequence.output.append(next(chosen))
            return len(sequence.output) == sequence.max_tokens

        while scheduler.schedule() is not None:
            scheduler.complete(advance)
        found.append(Answered(answer.prompt, sequence.output, sequence.cached_tokens))
    assert found == engine_log.answers
    events = flat(cache.drain_events())
    assert events == renamed(engine_log.events)
    assert {kind for kind, *_ in events} == {"stored", "removed"}
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (engine_log.queries, engine_log.hits)


async def test_mock_engine_has_the_same_prefix_hits(engine_log: EngineLog) -> None:
    """The mock generates other tokens, but prefix hits depend only on prompts and lengths."""
    mock = await ask(
        MockEngine("dynamo-tiny", {**ENGINE, "speedup-ratio": 0}, lambda _: None), engine_prompts(), first_tokens=20
    )
    assert [a.cached_tokens for a in mock.answers] == [a.cached_tokens for a in engine_log.answers]
    assert [kind for kind, *_ in mock.events] == [kind for kind, *_ in engine_log.events]


def run_scheduler() -> Any:
    logs = {}
    for trace in traces():
        events: list[Any] = []
        scheduler, new_request = make_scheduler(trace, events)
        logs[trace.name] = run_vllm(trace, scheduler, events, new_request)
    return msgspec.to_builtins(logs)


@pytest.fixture(scope="module")
def vllm_logs(vllm_process: ForkServer) -> dict[str, TraceLog]:
    found = vllm_process.run("tests.vllm.test_mock_parity:run_scheduler", environment=ENVIRONMENT)
    return msgspec.convert(found, dict[str, TraceLog])


@pytest.mark.parametrize("trace", traces(), ids=lambda trace: trace.name)
def test_every_step_equals_vllms(vllm_logs: dict[str, TraceLog], trace: Trace) -> None:
    expected, found = vllm_logs[trace.name], run_mock(trace)
    for number, (theirs, ours) in enumerate(zip(expected.steps, found.steps, strict=False)):
        assert ours == theirs, f"step {number}"
    assert found == expected


def test_traces_cover_all_cases(vllm_logs: dict[str, TraceLog]) -> None:
    """vLLM's logs contain evictions, duplicates, preemptions, hits of preempted requests, and chunks."""
    kinds: dict[str, int] = dict.fromkeys(("stored", "removed", "stored twice", "preempted", "hit", "chunk"), 0)
    for log in vllm_logs.values():
        there: list[int] = []
        kinds["preempted"] += sum(log.preemptions.values())
        kinds["hit"] += sum(map(bool, log.cached_tokens.values()))
        for step in log.steps:
            kinds["chunk"] += sum(computed < 33 for _, computed in step.computed)
            for kind, *_, name in step.events:
                kinds[kind] += 1
                if kind == "removed":
                    there.remove(name)
                    continue
                kinds["stored twice"] += name in there
                there.append(name)
    assert min(kinds.values()) > 5, kinds
