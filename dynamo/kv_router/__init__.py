"""KV-aware routing, without network code: block hashes, KV events, the prefix index, costs and the choice of a worker."""
