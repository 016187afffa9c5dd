"""Request traces replayed against running graphs and peers: `python -m benchmarks.replay`."""
