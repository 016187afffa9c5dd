"""The table of `python -m benchmarks`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving import POINTS

UNARY = {point.name for point in POINTS if not point.load.streaming}


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary from `serving.summary`."""
    table = Table(title="CPU per token (unary: per request) and what clients see; medians", title_justify="left")
    for heading in ("load", "system"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "CPU",
        "range",
        "ours/it",
        "tokens/s",
        "req/s",
        "TTFT p50",
        "p99 ms",
        "answer p50",
        "p99 ms",
        "chunks",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("CPU by process")
    for point, rows in summary["points"].items():
        for system, row in rows.items():
            unit, scale = (" ms", 1e-3) if point in UNARY else (" µs", 1.0)
            digits = 3 if point in UNARY else 1
            low, high = (value * scale for value in row["total_cpu_us_range"])
            ratio = rows["ours"].get("cpu_of_peer", {}).get(system)
            table.add_row(
                point,
                system,
                f"{row['total_cpu_us'] * scale:.{digits}f}{unit}",
                f"{low:.{digits}f}-{high:.{digits}f}",
                f"{ratio:.2f}" if ratio else "",
                f"{row['tokens_per_s']:,.0f}" if point not in UNARY else "",
                f"{row['requests_per_s']:,.0f}",
                f"{row['ttft_p50_ms']:.2f}",
                f"{row['ttft_p99_ms']:.2f}",
                f"{row['duration_p50_ms']:.1f}",
                f"{row['duration_p99_ms']:.1f}",
                f"{row['chunks_per_token']:.2f}",
                ", ".join(f"{role} {us * scale:.{digits}f}" for role, us in row["cpu_us"].items()),
            )
        table.add_section()
    console.print(table)
    for failure in summary["failures"]:
        console.print(f"[red]failed:[/] {failure}")
    for name, seconds in summary["start_s"].items():
        console.print(f"start to ready: {name}: {seconds:.2f} s")
    for pace, added in summary["ttft_added_ms"].items():
        direct = summary["direct_ttft_ms"][pace]
        console.print(f"TTFT added by the graph, {pace}: {added:.2f} ms (the engine alone: {direct:.2f} ms)")
