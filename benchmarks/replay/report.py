"""Figures of a replay, and the table that compares systems."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import percentile
from benchmarks.replay.client import Answer, Replay
from benchmarks.replay.oracle import Statistics

LATE_MS = 20.0  # p99 of the send delay above which a replay measures its client
_HIT_COUNTERS = [  # tokens found, tokens asked for; ai-dynamo's frontend, vLLM
    ("dynamo_frontend_cached_tokens_sum", "dynamo_frontend_input_sequence_tokens_sum"),
    ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
]


@dataclass(frozen=True)
class Goal:
    """Service level of a good answer: TTFT, and mean time between its tokens."""

    ttft_ms: float
    itl_ms: float

    def met(self, answer: Answer) -> bool:
        return not answer.error and answer.ttft_s * 1e3 <= self.ttft_ms and answer.itl_s * 1e3 <= self.itl_ms


def counted_hits(before: str, after: str) -> float | None:
    """Return the share of prompt tokens found in caches between two readings of /metrics; None if they lack it."""
    for hits, asked in _HIT_COUNTERS:
        total = _sum(after, asked) - _sum(before, asked)
        if total > 0:
            return (_sum(after, hits) - _sum(before, hits)) / total
    return None


def _sum(metrics: str, name: str) -> float:
    """Return the sum of a metric over all labels."""
    return sum(float(value) for value in re.findall(rf"(?m)^{re.escape(name)}(?:{{[^}}]*}})? (\S+)", metrics))


def summarise(replay: Replay, goal: Goal) -> dict[str, Any]:
    """Return the figures of a replay as plain data.

    Latencies are in ms over complete answers, rates over the time from the first request due to the last answer. A
    request's ITL is the mean time between its tokens; percentiles are over requests, as the goal is.
    """
    good = [answer for answer in replay.answers if not answer.error]
    met = sum(goal.met(answer) for answer in good)
    prompt_tokens = sum(answer.request.input_length for answer in good)
    output_tokens = sum(answer.request.output_length for answer in good)
    cached = [answer.cached_tokens for answer in good]
    hits: float | None
    if cached and None not in cached:
        hits, source = sum(filter(None, cached)) / prompt_tokens, "usage"
    else:
        hits, source = replay.cached, "metrics" if replay.cached is not None else "not reported"
    return {
        "requests": len(replay.answers),
        "seconds": replay.seconds,
        "ttft_ms": _milliseconds(good, "ttft_s"),
        "itl_ms": _milliseconds([answer for answer in good if answer.request.output_length > 1], "itl_s"),
        "end_to_end_ms": _milliseconds(good, "end_s"),
        "hit_rate": hits,
        "hit_rate_source": source,
        "requests_per_s": len(good) / replay.seconds,
        "output_tokens_per_s": output_tokens / replay.seconds,
        "input_tokens_per_s": prompt_tokens / replay.seconds,
        "goodput_per_s": met / replay.seconds,
        "good_share": met / len(replay.answers) if replay.answers else 0.0,
        "errors": dict(Counter(answer.error for answer in replay.answers if answer.error)),
        "late_ms": _milliseconds([a for a in replay.answers if not math.isnan(a.late_s)], "late_s"),
        "client_cores": replay.client_cpu_s / replay.seconds,
    }


def _milliseconds(answers: list[Answer], name: str) -> dict[str, float]:
    ordered = sorted(getattr(answer, name) * 1e3 for answer in answers)
    return {key: percentile(ordered, share) for key, share in _SHARES.items()} if ordered else {}


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def show(results: Mapping[str, Mapping[str, Any]], trace: Statistics, goal: Goal, console: Console) -> None:
    """Print the table. `results` are the summaries by system."""
    table = Table(title="replay; latencies count from when a request was due", title_justify="left")
    table.add_column("", no_wrap=True)
    for system in results:
        table.add_column(system, justify="right")

    def row(heading: str, *cells: str) -> None:
        table.add_row(heading, *cells)

    for heading, name in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("end to end", "end_to_end_ms")):
        for share in _SHARES:
            row(f"{heading} {share}, ms", *(_number(one[name].get(share), 1) for one in results.values()))
        table.add_section()
    row(f"prefix hits (at most {trace.oracle:.1%})", *(_percent(one["hit_rate"]) for one in results.values()))
    row("  source", *(one["hit_rate_source"] for one in results.values()))
    row("requests/s", *(_number(one["requests_per_s"], 2) for one in results.values()))
    row("output tokens/s", *(_number(one["output_tokens_per_s"], 0) for one in results.values()))
    row(
        f"goodput, requests/s with TTFT ≤ {goal.ttft_ms:g} ms, ITL ≤ {goal.itl_ms:g} ms",
        *(f"{one['goodput_per_s']:.2f} ({one['good_share']:.1%})" for one in results.values()),
    )
    row("errors", *(str(sum(one["errors"].values())) for one in results.values()))
    table.add_section()
    row("sent late p99, ms", *(_number(one["late_ms"].get("p99"), 1) for one in results.values()))
    row("cores used by servers", *(_number(one.get("server_cores"), 2) for one in results.values()))
    row("cores used by the client", *(_number(one["client_cores"], 2) for one in results.values()))
    console.print(table)
    for system, one in results.items():
        for error, count in one["errors"].items():
            console.print(f"{system}: {count} × {error}", markup=False)
        if (late := one["late_ms"].get("p99", 0.0)) > LATE_MS:
            console.print(
                f"[red]{system}: 1 % of the requests were sent more than {late:.0f} ms late: the client lacked "
                f"CPU time, and the figures say little about the servers[/]; lower --speed or --load"
            )


def show_trace(trace: Statistics, console: Console) -> None:
    """Print the statistics of a trace."""
    console.print(f"{trace.requests:,} requests in {trace.seconds:,.1f} s, {trace.requests_per_s:.2f} a second")
    for heading, values in (("input tokens", trace.input_tokens), ("output tokens", trace.output_tokens)):
        console.print(f"{heading}: " + ", ".join(f"{name} {value:,.0f}" for name, value in values.items()))
    console.print(f"working set: {trace.blocks:,} blocks, {trace.tokens:,} tokens")
    console.print(f"hit rate of one cache that keeps everything: {trace.oracle:.1%} of the prompt tokens")
    for size, rate in trace.bounded.items():
        console.print(f"hit rate of one LRU cache of {size:,} tokens: {rate:.1%}")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
