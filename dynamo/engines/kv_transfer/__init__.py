"""KV blocks from one vLLM engine to another: the engine that computed them keeps them, the other one pulls.

    configuration  vLLM's kv-transfer-config
    connector      vLLM's side: what to keep, what to pull, when blocks are free again
    holdings       blocks that are kept for a reader, for the length of a lease
    server         answers pulls, one thread a connection
    puller         fetches into this engine's cache, a few threads
    session        the connection: frames, mutual proof of the deployment's secret, messages
    kv_cache       the engine's tensors as planes of blocks, and copies to and from staging memory
    staging        memory that both processes of one host map
    release        tells a holder that nobody will come, from outside the engine core
    address        where this engine is

The engine-core process loads the connector by its module path; outside of it nothing is imported that needs torch.
"""
