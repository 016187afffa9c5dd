"""What serving costs: `python -m tests.bench`."""
