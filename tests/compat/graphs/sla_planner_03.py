"""The shipped components with the planner and the Prometheus service of 0.3's graphs for vLLM V1."""

from components.frontend import Frontend as Base
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker
from dynamo.planner.planner_sla import Planner
from dynamo.planner.prometheus import Prometheus
from dynamo.sdk import depends, service


@service(dynamo={"namespace": "dynamo"})
class Frontend(Base):
    prometheus = depends(Prometheus)


Frontend.link(Processor).link(VllmWorker).link(PrefillWorker)
Frontend.link(Planner)
Frontend.link(Prometheus)
