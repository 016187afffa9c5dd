"""KV-aware routing, without network: block hashes, KV events, the prefix index, cost and choice."""
