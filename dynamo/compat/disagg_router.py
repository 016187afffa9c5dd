"""`DisaggregatedRouter` of ai-dynamo 0.1 to 0.3: remote or local prefill by length, with a limit that etcd may change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from dynamo.runtime.distributed import DistributedRuntime

log = logging.getLogger(__name__)

PREFIX = "public/components/disagg_router/models/chat/"


class _Settings(msgspec.Struct):
    max_local_prefill_length: int


class DisaggregatedRouter:
    """Decides where a prompt is computed: remotely if more of its tokens than a limit are not cached.

    The limit is `default_max_local_prefill_length` unless etcd has another, now or later, under
    `public/components/disagg_router/models/chat/<model>`: {"max_local_prefill_length": 500}.
    """

    def __init__(self, drt: DistributedRuntime, model_name: str, default_max_local_prefill_length: int) -> None:
        self._model_name = model_name
        self._default = self._limit = default_max_local_prefill_length
        if not drt.is_static:
            drt.inner.spawn(self._follow(drt), name=f"disaggregated router of {model_name}")

    def prefill_remote(self, prefill_length: int, prefix_hit_length: int) -> bool:
        """Return True if a prompt of `prefill_length` tokens, some of them cached, is to be computed remotely."""
        return prefill_length - prefix_hit_length > self._limit

    def update_value(self, max_local_prefill_length: int) -> None:
        """Set the limit for this process, until etcd changes it."""
        self._limit = max_local_prefill_length

    def get_model_name(self) -> str:
        return self._model_name

    async def _follow(self, drt: DistributedRuntime) -> None:
        key = PREFIX + self._model_name
        given: bytes | None = None
        async for view in drt.inner.follow(key):
            if view.get(key) == given:  # another model's, whose name begins with this one's
                continue
            given = view.get(key)
            try:
                limit = (
                    self._default
                    if given is None
                    else msgspec.json.decode(given, type=_Settings).max_local_prefill_length
                )
            except msgspec.MsgspecError as error:
                log.warning("etcd %s: %s; keeping %d", key, error, self._limit)
                continue
            log.info("max_local_prefill_length of %s: %d -> %d", self._model_name, self._limit, limit)
            self._limit = limit
