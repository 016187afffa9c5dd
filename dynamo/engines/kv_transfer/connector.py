"""vLLM's side of the transfer, for its versions 0.26 and 0.32: loaded by the engine core through kv-transfer-config.

The prefill engine's last output carries an `Offer` as kv_transfer_params; the decode engine gets it with its request,
allocates blocks for what its own prefix cache does not have, and pulls them between two steps. What cannot be pulled is
reported as failed blocks, which vLLM computes under `kv_load_failure_policy: recompute`. While blocks are held or pulled
vLLM's engine core keeps stepping once a millisecond without a forward pass: leases end also when nothing else happens.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from dynamo.engines.kv_transfer.configuration import LEASE_S
from dynamo.engines.kv_transfer.kv_cache import KvCache
from dynamo.engines.kv_transfer.kv_leases import KvLeases
from dynamo.engines.kv_transfer.puller import NOTHING, Pull, Puller
from dynamo.engines.kv_transfer.server import Server
from dynamo.engines.kv_transfer.session import SECRET, Offer
from dynamo.transport.network import advertised_host, bound_host, host_id

log = logging.getLogger(__name__)


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the worker, with each engine step."""

    pulls: list[Pull] = field(default_factory=list)
    holds: dict[str, list[int]] = field(default_factory=dict)
    """blocks in the prompt's order by request id"""


@dataclass
class Place(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where the worker listens: from the worker to the scheduler, at the start."""

    local: str
    address: str
    port: int


@dataclass
class TransferStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last step that had any: pulls, failures, bytes, seconds, and expired holdings."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class PullConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Raises ValueError at the engine's start for what it cannot transfer."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        refuse(vllm_config, kv_cache_config)
        self._config, self._blocks = vllm_config, kv_cache_config.num_blocks
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._place: Place | None = None
        self._step = Step()
        self._known: dict[str, Offer | None] = {}
        """offers of requests that were not allocated yet; None: not to be used"""
        self._holdings: KvLeases | None = None
        self._puller: Puller | None = None
        self._server: Server | None = None
        self._ended, self._expired = NOTHING, 0  # of the last step

    # -- in the scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._place = next(iter(metadata.values()))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        offer = self._offer(request)
        missing = 0 if offer is None else offer.tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        offer = self._take_offer(request)
        if offer is None:
            return
        if num_external_tokens == 0:  # all of it is in the prefix cache
            self._step.pulls.append(Pull(request.request_id, offer, 0, ()))
            return
        first = (offer.tokens - num_external_tokens) // self._block_tokens
        wanted = blocks.get_block_ids()[0][first : -(-offer.tokens // self._block_tokens)]
        self._step.pulls.append(Pull(request.request_id, offer, first, list(wanted)))

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step, self._step = self._step, Step()
        return step

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        offer = self._take_offer(request)
        if offer is not None:  # it ended before it was allocated
            self._step.pulls.append(Pull(request.request_id, offer, 0, ()))
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode") or self._place is None:
            return False, None
        if request.status.name not in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"):
            return False, None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        kept = list(block_ids[: -(-tokens // self._block_tokens)])
        if not kept:
            return False, None
        self._step.holds[request.request_id] = kept
        offer = Offer(
            holding=request.request_id,
            tokens=tokens,
            digest=digest(request.all_token_ids[:tokens]),
            host=host_id(),
            local=self._place.local,
            address=self._place.address,
            port=self._place.port,
        )
        return True, {"do_remote_prefill": True, "do_remote_decode": False, **msgspec.structs.asdict(offer)}

    def _offer(self, request: Any) -> Offer | None:
        """What may be pulled for a request. An offer is used once: what is preempted later is computed."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        if request.request_id not in self._known:
            self._known[request.request_id] = self._check(request, params)
        return self._known[request.request_id]

    def _check(self, request: Any, params: dict[str, Any]) -> Offer | None:
        try:
            offer = msgspec.convert(params, Offer)
        except msgspec.ValidationError as error:
            log.warning("request %s has kv_transfer_params of another connector: %s", request.request_id, error)
            return None
        prompt = request.all_token_ids[: request.num_prompt_tokens]
        if not 0 < offer.tokens <= len(prompt) or digest(prompt[: offer.tokens]) != offer.digest:
            log.warning("request %s has the KV of another prompt; this engine computes its own", request.request_id)
            self._step.pulls.append(Pull(request.request_id, offer, 0, ()))
            return None
        return offer

    def _take_offer(self, request: Any) -> Offer | None:
        offer = self._offer(request)
        self._known.pop(request.request_id, None)
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
        return offer

    # -- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        model = self._config.model_config.hf_text_config
        cache = KvCache(
            kv_caches,
            self._blocks,
            self._block_tokens,
            engine=f"vLLM {vllm.__version__}",
            model=f"{model.model_type} of width {model.hidden_size}, {model.vocab_size} words",
        )
        secret = os.environ[SECRET].encode()
        self._cache = cache
        self._holdings = KvLeases(float(self._extra("lease_s", LEASE_S)))
        nats_url = os.environ.get("NATS_SERVER", "")
        self._server = Server(cache, self._holdings, secret, advertised_host(nats_url), bound_host(nats_url))
        self._puller = Puller(cache, secret)

    def get_handshake_metadata(self) -> Place | None:
        server = self._server
        return None if server is None else Place(server.local, server.address, server.port)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Holdings begin before the step's forward pass, which may be a long one: readers are on their way."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Step)
        if self._holdings is not None:
            for name, blocks in connector_metadata.holds.items():
                self._holdings.hold(name, blocks)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        if self._puller is not None and step.pulls:
            mark = self._cache.mark()
            for pull in step.pulls:
                self._puller.submit(pull._replace(mark=mark))

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        return None

    def wait_for_save(self) -> None:
        return None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._puller is None or self._holdings is None:
            return None, None
        if finished_req_ids:
            self._puller.cancel(finished_req_ids)
        self._ended = self._puller.take()
        freed, self._expired = self._holdings.take_finished()
        if self._expired:
            log.warning("KV of %d requests was fetched by nobody within the lease", self._expired)
        return freed or None, self._ended.requests or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set(self._ended.failed_blocks)

    def get_kv_connector_stats(self) -> TransferStats | None:
        ended = self._ended
        if not (ended.requests or self._expired):
            return None
        return TransferStats(
            {
                "pulls": ended.pulls,
                "failures": ended.failures,
                "bytes": ended.bytes,
                "seconds": ended.seconds,
                "expired": self._expired,
            }
        )

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        return TransferStats(dict(data or {}))

    def shutdown(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._puller is not None:
            self._puller.close()


def refuse(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError for what only other connectors transfer."""
    parallel = vllm_config.parallel_config
    for name in ("tensor", "pipeline", "decode_context", "prefill_context"):
        size = getattr(parallel, f"{name}_parallel_size", 1)
        if size > 1:
            raise ValueError(f"KV transfer by dynamo's connector: {name} parallel size {size}, it takes 1")
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise ValueError(
            f"KV transfer by dynamo's connector: the model has {len(kv_cache_config.kv_cache_groups)} groups of KV "
            "caches, it takes one"
        )
    if not os.environ.get(SECRET):
        raise ValueError(f"KV transfer: {SECRET} is not set")


def digest(token_ids: Iterable[int]) -> str:
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()
