"""vLLM's KV connector for pulling, for versions 0.26 and 0.32: loaded by the engine core through kv-transfer-config.

The prefill engine's last output carries a `RemoteKv` as kv_transfer_params. The decode engine gets it with its request,
allocates blocks for the part that its own prefix cache does not have, and pulls them between two steps. Blocks that
cannot be pulled are reported as failed, and vLLM computes them under `kv_load_failure_policy: recompute`. While blocks
are leased or pulled, vLLM's engine core keeps stepping once a millisecond without a forward pass, so leases end also
while the engine is idle.
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
from dynamo.engines.kv_transfer.puller import NO_RESULTS, Pull, Puller
from dynamo.engines.kv_transfer.server import KvServer
from dynamo.engines.kv_transfer.session import SECRET, RemoteKv
from dynamo.transport.network import advertised_host, bound_host, host_id

log = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Pulls and leases that begin with an engine step; sent by the scheduler to the worker."""

    pulls: list[Pull] = field(default_factory=list)
    leases: dict[str, list[int]] = field(default_factory=dict)
    """blocks in the prompt's order by request id, which is also the lease's id"""


@dataclass
class ServerAddress(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Address of the worker's KV server; sent by the worker to the scheduler at the start. Fields as in `RemoteKv`."""

    local: str
    address: str
    port: int


@dataclass
class TransferStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of one step, or of several by `aggregate`: pulls, failures, bytes, seconds and expired leases."""

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
    """vLLM creates one connector in the scheduler and one in the worker; each uses its own half of the methods."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Create the connector. Raises ValueError for an engine whose KV it cannot transfer."""
        super().__init__(vllm_config, role, kv_cache_config)
        check_support(vllm_config, kv_cache_config)
        self._config = vllm_config
        self._blocks = kv_cache_config.num_blocks
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._extra = vllm_config.kv_transfer_config.get_from_extra_config
        # the scheduler's
        self._server_address: ServerAddress | None = None
        self._step = StepMetadata()
        self._remote: dict[str, RemoteKv | None] = {}
        """by request id, until the request is allocated; None for KV that must not be used"""
        # the worker's
        self._leases: KvLeases | None = None
        self._puller: Puller | None = None
        self._server: KvServer | None = None
        self._results = NO_RESULTS
        """pulls that ended with the last step"""
        self._expired = 0
        """leases that expired with the last step"""

    # -- in the scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._server_address = next(iter(metadata.values()))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        remote = self._remote_kv(request)
        missing = 0 if remote is None else remote.tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        remote = self._pop_remote_kv(request)
        if remote is None:
            return
        if num_external_tokens == 0:  # all of it is in the prefix cache
            self._release(request, remote)
            return
        first = (remote.tokens - num_external_tokens) // self._block_tokens
        wanted = blocks.get_block_ids()[0][first : -(-remote.tokens // self._block_tokens)]
        self._step.pulls.append(Pull(request.request_id, remote, first, list(wanted)))

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        step = self._step
        self._step = StepMetadata()
        return step

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return (True, kv_transfer_params for the decode engine) if the request's blocks are kept under a lease."""
        remote = self._pop_remote_kv(request)
        if remote is not None:  # the request ended before it was allocated
            self._release(request, remote)
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode") or self._server_address is None:
            return False, None
        if request.status.name not in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"):
            return False, None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        kept = list(block_ids[: -(-tokens // self._block_tokens)])
        if not kept:
            return False, None
        self._step.leases[request.request_id] = kept
        held = RemoteKv(
            lease_id=request.request_id,
            tokens=tokens,
            digest=digest(request.all_token_ids[:tokens]),
            host=host_id(),
            local=self._server_address.local,
            address=self._server_address.address,
            port=self._server_address.port,
        )
        return True, {"do_remote_prefill": True, "do_remote_decode": False, **msgspec.structs.asdict(held)}

    def _remote_kv(self, request: Any) -> RemoteKv | None:
        """Return the KV that can be pulled for a request, None if there is none or it is not this prompt's."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        if request.request_id not in self._remote:
            self._remote[request.request_id] = self._parse(request, params)
        return self._remote[request.request_id]

    def _parse(self, request: Any, params: dict[str, Any]) -> RemoteKv | None:
        try:
            remote = msgspec.convert(params, RemoteKv)
        except msgspec.ValidationError as error:
            log.warning("request %s has kv_transfer_params of another connector: %s", request.request_id, error)
            return None
        prompt = request.all_token_ids[: request.num_prompt_tokens]
        if not 0 < remote.tokens <= len(prompt) or digest(prompt[: remote.tokens]) != remote.digest:
            log.warning("request %s has the KV of another prompt; this engine computes its own", request.request_id)
            self._release(request, remote)
            return None
        return remote

    def _pop_remote_kv(self, request: Any) -> RemoteKv | None:
        """Return the request's KV once: after a preemption this engine computes it."""
        remote = self._remote_kv(request)
        self._remote.pop(request.request_id, None)
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
        return remote

    def _release(self, request: Any, remote: RemoteKv) -> None:
        """End the lease without fetching anything."""
        self._step.pulls.append(Pull(request.request_id, remote, 0, ()))

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
        self._leases = KvLeases(float(self._extra("lease_s", LEASE_S)))
        nats_url = os.environ.get("NATS_SERVER", "")
        self._server = KvServer(cache, self._leases, secret, advertised_host(nats_url), bound_host(nats_url))
        self._puller = Puller(cache, secret)

    def get_handshake_metadata(self) -> ServerAddress | None:
        server = self._server
        return None if server is None else ServerAddress(server.local, server.address, server.port)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Grant the step's leases: before its forward pass, which may be long while readers already ask for them."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if self._leases is not None:
            for lease_id, blocks in connector_metadata.leases.items():
                self._leases.grant(lease_id, blocks)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        if self._puller is not None and step.pulls:
            allocated = self._cache.record_event()
            for pull in step.pulls:
                self._puller.submit(pull._replace(allocated=allocated))

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        return None

    def wait_for_save(self) -> None:
        return None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return (requests whose lease has ended, requests whose pull has ended) since the last step."""
        if self._puller is None or self._leases is None:
            return None, None
        if finished_req_ids:
            self._puller.cancel(finished_req_ids)
        self._results = self._puller.take_results()
        freed, expired = self._leases.pop_ended()
        self._expired = expired
        if expired:
            log.warning("KV leases of %d requests expired unfetched", expired)
        return freed or None, self._results.requests or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set(self._results.failed_blocks)

    def get_kv_connector_stats(self) -> TransferStats | None:
        results = self._results
        if not (results.requests or self._expired):
            return None
        return TransferStats(
            {
                "pulls": results.pulls,
                "failures": results.failures,
                "bytes": results.bytes,
                "seconds": results.seconds,
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


def check_support(vllm_config: Any, kv_cache_config: Any) -> None:
    """Check that this connector can transfer the engine's KV. Raises ValueError if not, or if the secret is not set."""
    parallel = vllm_config.parallel_config
    for name in ("tensor", "pipeline", "decode_context", "prefill_context"):
        size = getattr(parallel, f"{name}_parallel_size", 1)
        if size > 1:
            raise ValueError(f"KV transfer by dynamo's connector: {name} parallel size is {size}, only 1 is supported")
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise ValueError(
            f"KV transfer by dynamo's connector: the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups, "
            "only one is supported"
        )
    if not os.environ.get(SECRET):
        raise ValueError(f"KV transfer: {SECRET} is not set")


def digest(token_ids: Iterable[int]) -> str:
    """Hash token ids, to recognize the prompt to which KV belongs."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()
