"""What crosses the network: `etcd` (who is there), `nats` (requests, events), `stream` (answers) with
its two ends, `listener` and `caller`.

Nothing is imported here: a process pays for grpc only when it imports `dynamo.transport.etcd`.
"""
