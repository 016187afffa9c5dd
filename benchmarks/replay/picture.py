"""Distributions of all systems in one PNG. Needs matplotlib: the `bench` extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.processes import StartError
from benchmarks.replay.client import Answer, Replay
from benchmarks.replay.report import Goal


def require() -> None:
    """Raise StartError if pictures cannot be drawn. To be called before a long measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        raise StartError("--picture needs matplotlib: pip install -e '.[bench]', or give --picture ''")


def cdf(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the points of the cumulative distribution: values, and the shares of values up to each."""
    ordered = sorted(values)
    return ordered, [(at + 1) / len(ordered) for at in range(len(ordered))]


def draw(replays: Mapping[str, Replay], hits: Mapping[str, float | None], oracle: float, goal: Goal, to: Path) -> None:
    """Draw the CDFs of TTFT, ITL and end-to-end time, and the prefix hit rates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(13, 8), layout="constrained")
    (ttft, itl), (end, bars) = figure.subplots(2, 2)
    panels = [
        (ttft, "TTFT", "ttft_s", goal.ttft_ms),
        (itl, "ITL", "itl_s", goal.itl_ms),
        (end, "end to end", "end_s", 0),
    ]
    for axes, title, name, limit_ms in panels:
        for system, replay in replays.items():
            values = [_positive_ms(answer, name) for answer in replay.answers if not answer.error]
            axes.plot(*cdf(values), label=system, drawstyle="steps-post")
        if limit_ms:
            axes.axvline(limit_ms, color="grey", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="ms", ylabel="share of requests", xscale="log", ylim=(0, 1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    ttft.legend()
    bars.barh(list(hits), [100 * (value or 0.0) for value in hits.values()])
    bars.axvline(100 * oracle, color="grey", linestyle="--", linewidth=1)
    bars.invert_yaxis()
    bars.set(title="prefix hits (dashed: one cache that keeps everything)", xlabel="% of prompt tokens", xlim=(0, 100))
    figure.savefig(to, dpi=110)


def _positive_ms(answer: Answer, name: str) -> float:
    """Return a time in ms for the logarithmic axis: a single token's ITL of 0 becomes the left end."""
    return float(max(getattr(answer, name) * 1e3, 0.01))
