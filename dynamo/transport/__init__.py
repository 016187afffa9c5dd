"""The brokers: `etcd` (service discovery), `nats` (events, work queues), and `network` (addresses and sockets).

Nothing is imported here: a process pays for grpc only when it imports `dynamo.transport.etcd`.
"""
