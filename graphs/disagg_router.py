"""Disaggregated serving with KV-aware routing: a request is decoded where its prefix is, a long rest is computed elsewhere.

dynamo serve graphs.disagg_router:Frontend -f configs/disagg_router.yaml
"""

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker).link(PrefillWorker)
Processor.link(VllmWorker)
