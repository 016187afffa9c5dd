"""`python -m benchmarks`: measure graphs.agg and its peers under load and print the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import orjson
from rich.console import Console

from benchmarks import report, serving
from benchmarks.load import LoadError
from benchmarks.processes import StartError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure CPU and latency.")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of benchmarks/peers/install.sh")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout of dynamo, with a .venv of its own"
    )
    parser.add_argument("--vllm", action="store_true", help="also measure the start of the tiny model on vLLM")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="runs of each point; 3 by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the points whose name contains this")
    options = parser.parse_args()
    say = Console(stderr=True).print
    points = [point for point in serving.POINTS if options.only in point.name]
    if not points:
        parser.error(f"no point has {options.only!r} in its name; points: {', '.join(p.name for p in serving.POINTS)}")
    try:
        results = serving.measure(serving.systems(options.peers, options.against), points, options.repetitions, say)
        if options.vllm:
            serving.measure_vllm_start(results)
    except (StartError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = serving.summary(results)
    report.show(summary, Console(width=None if sys.stdout.isatty() else 200))
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
