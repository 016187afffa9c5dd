"""KV-aware routing without any network: block hashes, events, the index, the cost, the choice."""
