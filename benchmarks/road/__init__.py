"""Count of the files and functions that a request runs through: `python -m benchmarks.road`."""
