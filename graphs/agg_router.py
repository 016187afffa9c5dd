"""Aggregated serving with KV-aware routing: a request goes to the worker that has computed its prefix before.

dynamo serve graphs.agg_router:Frontend -f configs/agg_router.yaml
"""

from components.frontend import Frontend
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker)
Processor.link(VllmWorker)
