"""Replay a trace of requests to router modes and peers, and compare them.

python -m benchmarks.replay generate conversation --requests 1000 --seed 1 > trace.jsonl
python -m benchmarks.replay describe trace.jsonl
python -m benchmarks.replay trace.jsonl --modes round-robin,random,kv --peers DIR --load 0.7
python -m benchmarks.replay simulate trace.jsonl --modes round-robin,kv --load 0.7 --workers 200    # no processes
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console

from benchmarks.processes import CpuMeter, StartError
from benchmarks.replay import capacity, picture, report, systems
from benchmarks.replay.capacity import Engines
from benchmarks.replay.client import Client, Replay, schedule, warm_up
from benchmarks.replay.generate import DEFAULTS, generate
from benchmarks.replay.oracle import describe
from benchmarks.replay.prompts import Prompts, vocabulary
from benchmarks.replay.report import Goal
from benchmarks.replay.simulate import Simulation
from benchmarks.replay.trace import MOONCAKE_BLOCK, Cut, Limits, Request, TraceError, read, write
from benchmarks.system import Running
from dynamo.llm.model_files import tokenizer_dir

WARM_UP = 8  # requests for each worker before the clock starts


def main(arguments: Sequence[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "generate":
            return _generate(rest)
        if command == "describe":
            return _describe(rest)
        if command == "simulate":
            return _replay(rest, simulated=True)
        return _replay(arguments)
    except (TraceError, StartError) as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` ends early
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    return 1


def _generate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay generate",
        description="Write a trace. Lengths are in tokens; lengths that vary are means.",
    )
    parser.add_argument("kind", choices=DEFAULTS)
    parser.add_argument("--duration", type=float, metavar="S", help="as many requests as --rate gives in this time")
    for field in dataclasses.fields(next(iter(DEFAULTS.values()))):
        flag = "--" + ("trace-block" if field.name == "block" else field.name.replace("_", "-"))
        shown = ", ".join(f"{getattr(shape, field.name):g} {kind}" for kind, shape in DEFAULTS.items())
        parser.add_argument(flag, dest=field.name, type=type(field.default), help=f"default: {shown}")
    given = vars(parser.parse_args(arguments))
    kind, duration_s = given.pop("kind"), given.pop("duration")
    shape = dataclasses.replace(DEFAULTS[kind], **{name: value for name, value in given.items() if value is not None})
    if duration_s is not None:
        shape = dataclasses.replace(shape, requests=max(1, round(duration_s * shape.rate)))
    wrong = [name for name in ("requests", "rate", "sessions", "turns", "new_tokens", "output_tokens", "block")
             if getattr(shape, name) <= 0]  # fmt: skip
    if wrong:
        parser.error(f"{wrong[0].replace('_', '-')} must be positive")
    if shape.context_tokens < 2:
        parser.error("context-tokens must be at least 2")
    write(generate(kind, shape), sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return 0


def _describe(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay describe",
        description="Print statistics of a trace, best hit rates among them.",
    )
    _add_trace(parser)
    parser.add_argument("--cache-tokens", type=int, nargs="*", default=[], metavar="N", help="sizes of LRU caches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write them to this file")
    options = parser.parse_args(arguments)
    requests = _read(options)
    found = describe(requests, options.trace_block, options.cache_tokens)
    report.show_trace(found, Console(highlight=False))
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(dataclasses.asdict(found), option=_JSON))
    return 0


_JSON = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, help="JSONL in Mooncake's format")
    parser.add_argument(
        "--trace-block", type=int, default=MOONCAKE_BLOCK, metavar="N", help=f"tokens of a hash id; {MOONCAKE_BLOCK}"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    parser.add_argument("--max-input", type=int, metavar="N", help="leave out requests with longer prompts")
    parser.add_argument("--clip", action="store_true", help="shorten them to --max-input instead")


def _read(options: argparse.Namespace) -> list[Request]:
    if options.trace_block <= 0:
        raise TraceError("--trace-block must be positive")
    cut = Cut()
    limits = Limits(options.limit, options.max_input, options.clip)
    requests = list(read(options.trace, options.trace_block, limits, cut))
    for count, what in ((cut.dropped, "left out"), (cut.clipped, "shortened")):
        if count:
            print(f"{count} requests above {options.max_input} input tokens {what}", file=sys.stderr)
    if not requests:
        raise TraceError(f"{options.trace.name}: no requests")
    return requests


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_trace(parser)
    add = parser.add_argument
    add("--speed", type=float, default=1.0, metavar="F", help="replay the trace F times as fast; 1 by default")
    add("--load", type=float, metavar="SHARE", help="choose --speed so that requests arrive at this share of what the "
        "mock workers sustain without prefix hits; the formula is in capacity.py")  # fmt: skip
    add("--modes", default="round-robin,random,least-loaded,kv", help="router modes of ours; '' for none")
    add("--graph", default="graphs.agg_router:Frontend")
    add("--config", default="configs/agg_router_mock.yaml", metavar="FILE")
    add("--router-key", default="Processor.router", metavar="KEY", help="the setting for the mode")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a further setting of the graph; repeatable")
    add("--url", help="a running server, http://HOST:PORT, instead of starting graphs")
    add("--model", help="its model; by default the first it lists")
    add("--peers", type=Path, metavar="DIR", help="folder of benchmarks/peers/install.sh, for ai-dynamo 1.6.1")
    add("--peer-modes", default=",".join(systems.PEER_MODES), help="its --router-mode")
    for field in dataclasses.fields(Engines):
        flag = "--" + {"workers": "workers", "speedup": "speedup"}.get(field.name, f"engine-{field.name}").replace(
            "_", "-"
        )
        add(flag, dest=field.name, type=type(field.default), default=field.default,
            help=f"mock engines, ours and the peer's; {field.default:g} by default")  # fmt: skip
    add("--tokenizer", default="dynamo-tiny", help="whose token ids prompts are made of; the served model's")
    add("--vocab", metavar="FIRST:END", help="prompts of these token ids instead")
    add("--seed", type=int, default=0, help="another seed gives other prompts with the same sharing")
    add("--slo-ttft-ms", type=float, default=500.0)
    add("--slo-itl-ms", type=float, default=50.0)
    add("--picture", default="replay.png", metavar="FILE", help="the distributions; '' for none")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def _replay(arguments: Sequence[str], *, simulated: bool = False) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("speed", "load", "workers", "blocks", "block", "speedup", "max_sequences", "batched_tokens"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"{name.replace('_', '-')} must be positive")
    if options.picture:
        picture.require()
    engines = Engines(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Engines)})
    requests = _read(options)
    statistics = describe(requests, options.trace_block, [engines.tokens, engines.tokens * engines.workers])
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    report.show_trace(statistics, console)
    sustained = capacity.requests_per_s(engines, requests)
    speed = options.speed
    if options.load is not None:
        if not statistics.seconds:
            parser.error("--load needs a trace whose requests do not all arrive at the same time")
        speed = options.load * sustained / statistics.requests_per_s
    share = speed * statistics.requests_per_s / sustained
    console.print(
        f"replayed {speed:.3f} times as fast: {speed * statistics.requests_per_s:.2f} requests a second, {share:.0%} of "
        f"the {sustained:.2f} that {engines.workers} mock workers sustain without prefix hits"
    )
    prompts = Prompts(_tokens(parser, options), options.trace_block, options.seed)
    goal = Goal(options.slo_ttft_ms, options.slo_itl_ms)
    replays: dict[str, Replay] = {}
    results: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for mode in filter(None, options.modes.split(",")) if simulated else ():
        random.seed(options.seed)
        found = Simulation(engines, mode).run(list(schedule(requests, speed)), prompts)
        name = f"simulated {mode}"
        replays[name], results[name] = found, report.summarise(found, goal) | {"server_cores": 0.0, "client_cores": 0.0}
    for target in [] if simulated else _targets(options, engines, requests):
        print(f"{target.name} …", file=sys.stderr)
        try:
            replays[target.name], results[target.name] = _measure(target, requests, speed, prompts, engines, goal)
        except StartError as error:
            failures.append(f"{target.name}: {error}")
    if not results:
        raise StartError(failures[0])
    report.show(results, statistics, goal, console)
    if options.picture:
        hits = {system: result["hit_rate"] for system, result in results.items()}
        picture.draw(replays, hits, statistics.oracle, goal, Path(options.picture))
        console.print(f"distributions: {options.picture}")
    if options.json is not None:
        data = {
            "trace": dataclasses.asdict(statistics),
            "engines": dataclasses.asdict(engines),
            "sustained_requests_per_s": sustained,
            "speed": speed,
            "load": share,
            "goal": dataclasses.asdict(goal),
            "systems": results,
        }
        options.json.write_bytes(orjson.dumps(data, option=_JSON))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _tokens(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Sequence[int]:
    if options.vocab is None:
        return vocabulary(tokenizer_dir(options.tokenizer))
    first, _, end = options.vocab.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        parser.error(f"--vocab {options.vocab}: expected FIRST:END, for example 7:2048")
    return range(int(first), int(end))


def _targets(options: argparse.Namespace, engines: Engines, requests: Sequence[Request]) -> list[systems.Target]:
    targets: list[systems.Target] = []
    if options.url:
        targets.append(systems.url_target(options.url, options.model))
    elif modes := [mode for mode in options.modes.split(",") if mode]:
        graph = systems.Graph(options.graph, options.config, options.router_key, options.set)
        graph.values()
        longest = max(request.input_length + request.output_length for request in requests)
        targets += systems.our_targets(graph, modes, engines, longest)
    if options.peers is not None:
        targets += systems.peer_targets(options.peers, options.peer_modes.split(","), engines)
    if not targets:
        raise StartError("nothing to measure: give --modes, --url or --peers")
    return targets


def _measure(
    target: systems.Target, requests: Sequence[Request], speed: float, prompts: Prompts, engines: Engines, goal: Goal
) -> tuple[Replay, dict[str, Any]]:
    """Replay to a fresh server, warmed up with requests that share nothing with the trace.

    Raises StartError if the warm-up fails.
    """
    with tempfile.TemporaryDirectory(prefix="replay-") as run_dir:
        running = target.start(Path(run_dir))
        try:
            replay, cores = uvloop.run(_run(running, requests, speed, prompts, engines))
        finally:
            running.stop()
    result = report.summarise(replay, goal)
    result["start_s"] = running.start_s
    if cores is not None:
        result["server_cores"] = sum(cores.values())
        result["server_cores_by_role"] = cores
    return replay, result


async def _run(
    running: Running, requests: Sequence[Request], speed: float, prompts: Prompts, engines: Engines
) -> tuple[Replay, dict[str, float] | None]:
    """Return the replay and the cores that the server's processes kept busy, by role; None if one of them ended."""
    client = Client(running.host, running.port, "/v1/completions", lambda request: prompts.body(request, running.model))
    if failed := await warm_up(client, WARM_UP * engines.workers, min(engines.block, prompts.block)):
        raise StartError(f"{running.name} failed at the first requests: {failed[0]}")
    before = systems.fetch(running.host, running.port, "/metrics")
    meter = CpuMeter([process.pid for process in running.processes], running.role)
    meter.start()
    gc.collect()
    gc.freeze()
    replay = await client.run(schedule(requests, speed))
    gc.unfreeze()
    try:
        used = {role: seconds / replay.seconds for role, seconds in meter.seconds().items()}
    except OSError:
        used = {}
    replay.cached = report.counted_hits(before, systems.fetch(running.host, running.port, "/metrics"))
    return replay, used or None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    sys.exit(main(sys.argv[1:]))
