"""Request traces replayed against running graphs and peers: `python -m tests.bench.replay`."""
