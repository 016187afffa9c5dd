"""Transfer of KV blocks between vLLM engines: the engine that computed them keeps them under a lease, another pulls them.

    configuration    vLLM's kv-transfer-config
    connector        vLLM's connector: which blocks to keep, which to pull, when blocks are free again
    kv_leases        blocks kept for a reader until they are read or their lease expires
    server           the holder's side: serves pulls, one thread per connection
    puller           the reader's side: fetches into this engine's cache on a few threads
    holder_sessions  a reader thread's open sessions with holders
    session          the connection: frames, mutual proof of the deployment's secret, messages
    kv_cache         the engine's tensors as planes of blocks, and copies to and from staging memory
    staging          memory mapped by both processes of one host
    release          releases a lease from outside the engine core

The engine-core process loads the connector by its module path. No other module here imports vLLM, and outside the
engine core nothing is imported that needs torch.
"""
