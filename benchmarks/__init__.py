"""What serving costs: `python -m benchmarks`."""
