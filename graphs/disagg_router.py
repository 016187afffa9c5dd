"""Disaggregated serving with KV-aware routing: the worker with the prefix decodes, prefill workers compute long new parts.

dynamo serve graphs.disagg_router:Frontend -f configs/disagg_router.yaml
"""

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker).link(PrefillWorker)
Processor.link(VllmWorker)
