"""The names of `dynamo.llm` in ai-dynamo 0.1 to 0.3, which `dynamo/llm/__init__.py` finds here."""

from __future__ import annotations

from dynamo.compat.disagg_router import DisaggregatedRouter as DisaggregatedRouter
from dynamo.compat.http_service import HttpAsyncEngine as HttpAsyncEngine
from dynamo.compat.http_service import HttpError as HttpError
from dynamo.compat.http_service import HttpService as HttpService
from dynamo.compat.kv_indexer import ApproxKvIndexer as ApproxKvIndexer
from dynamo.compat.kv_indexer import KvIndexer as KvIndexer
from dynamo.compat.kv_indexer import OverlapScores as OverlapScores
from dynamo.compat.kv_indexer import RadixTree as RadixTree
from dynamo.compat.kv_publishers import KvEventPublisher as KvEventPublisher
from dynamo.compat.kv_publishers import ZmqKvEventListener as ZmqKvEventListener
from dynamo.compat.kv_publishers import ZmqKvEventPublisher as ZmqKvEventPublisher
from dynamo.compat.kv_publishers import ZmqKvEventPublisherConfig as ZmqKvEventPublisherConfig
from dynamo.compat.registration import ModelType as ModelType
from dynamo.compat.registration import RouterMode as RouterMode
from dynamo.compat.registration import register_llm as register_llm
from dynamo.compat.router_events import token_hashes
from dynamo.compat.worker_metrics import AggregatedMetrics as AggregatedMetrics
from dynamo.compat.worker_metrics import EndpointKvMetrics as EndpointKvMetrics
from dynamo.compat.worker_metrics import ForwardPassMetrics as ForwardPassMetrics
from dynamo.compat.worker_metrics import KvMetricsAggregator as KvMetricsAggregator
from dynamo.compat.worker_metrics import KvStats as KvStats
from dynamo.compat.worker_metrics import SpecDecodeStats as SpecDecodeStats
from dynamo.compat.worker_metrics import WorkerMetricsPublisher as WorkerMetricsPublisher
from dynamo.compat.worker_metrics import WorkerStats as WorkerStats

compute_block_hash_for_seq_py = token_hashes

# names of earlier releases
KvMetricsPublisher = WorkerMetricsPublisher  # 0.1 to 0.3.0
KvEventPublisherFromZmq = ZmqKvEventPublisher  # 0.3.0
KvEventPublisherFromZmqConfig = ZmqKvEventPublisherConfig
