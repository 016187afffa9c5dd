"""Serve large language models as inference graphs: services in Python, etcd and NATS between them, vLLM underneath."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # packages of others that are called dynamo.x; ours come first
__version__ = "0.1.0"
