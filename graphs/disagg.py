"""Disaggregated serving: long prompts are computed by prefill workers, tokens by decode workers.

dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml
"""

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(VllmWorker).link(PrefillWorker)
