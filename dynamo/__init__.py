"""Serve large language models as inference graphs: services in Python, etcd and NATS between them, vLLM underneath."""

__version__ = "0.1.0"
