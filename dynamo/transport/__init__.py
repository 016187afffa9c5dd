"""What crosses the network: `etcd` (who is there), `nats` (requests, events), `stream` (answers).

Nothing is imported here: a process pays for grpc only when it imports `dynamo.transport.etcd`.
"""
