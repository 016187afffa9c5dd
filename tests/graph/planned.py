"""A disaggregated graph with a Planner below its Frontend, linked as graphs of ai-dynamo 0.2 and 0.3 do."""

from components.frontend import Frontend
from components.planner_service import Planner
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(VllmWorker).link(PrefillWorker)
Frontend.link(Planner)
