"""Aggregated serving: each worker does prefill and decode.

dynamo serve graphs.agg:Frontend -f configs/agg.yaml
"""

from components.frontend import Frontend
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(VllmWorker)
