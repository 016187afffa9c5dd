"""How far a request travels through the code: `python -m benchmarks.road`."""
