"""Benchmarks: `python -m benchmarks` measures CPU and latency of serving; the other modules have their own commands."""
