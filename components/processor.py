"""Processor: tokenizes requests, sends them to workers and returns the stream of deltas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any, cast

from components.router import Router
from components.worker import VllmWorker
from dynamo.config.settings import declared
from dynamo.config.upstream_keys import Change
from dynamo.engines.vllm.old_flags import is_flag
from dynamo.errors import ConfigError, DynamoError, TransportError, UnavailableError
from dynamo.kv_router.hashing import block_hashes, pack
from dynamo.kv_router.messages import KvMode, Route, RouteRequest
from dynamo.llm.migration import REASONS, Prepare, migrating
from dynamo.llm.model_files import context_tokens, tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, GenerateRequest, RouterMode, Routing
from dynamo.llm.tokenizer import Tokenizer
from dynamo.sdk import (
    Service,
    Stream,
    async_on_start,
    avoiding,
    depends,
    direct,
    endpoint,
    instance_ids,
    is_linked,
    least_loaded,
    metrics_registry,
    power_of_two,
    random,
    round_robin,
    service,
)

log = logging.getLogger(__name__)

ROUTE_TIMEOUT_S = 0.5
"""How long the Router may take. It needs a tenth of a millisecond; without its answer the least loaded worker is used."""
ROUTE_ATTEMPTS = 3
"""Workers that the Router may name before the least loaded one is used: those that have just died refuse."""
LOG_INTERVAL_S = 30.0
LOCAL_MODES = {
    "round-robin": round_robin,
    "random": random,
    "power-of-two": power_of_two,
    "least-loaded": least_loaded,
}
"""Modes in which this process itself chooses the worker, without the Router."""


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Processor(Service):
    worker = depends(VllmWorker)
    kv_router = depends(Router)

    live_settings = ("router",)

    @classmethod
    def upgrade_setting(
        cls, key: str, value: Any, settings: Mapping[str, Any], services: Collection[str]
    ) -> Change | None:
        """Ignore vLLM's flags, all of which ai-dynamo 0.1 to 0.3 accepted here."""
        own = declared(cls)
        if own is None or own.takes(key) or not is_flag(key):
            return None
        return Change("the Processor runs no vLLM; write the flag below VllmWorker")

    def __init__(
        self,
        model: str = "",
        block_size: int = 64,
        max_model_len: int | None = None,
        router: RouterMode = "round-robin",
        migration_limit: int = 3,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            model: the workers' model, for its tokenizer and chat template.
            block_size: tokens in a KV block of the workers.
            max_model_len: context length in tokens; None: as in the model's config.json.
            router: how a worker is chosen: round-robin, random, power-of-two and least-loaded by this process itself,
                kv, kv-load and approx-kv by the Router.
            migration_limit: how many times a request is continued by another worker when its worker is lost; 0: the
                loss ends the request with an error. It also limits how many workers a request can crash.
            trust_remote_code: run the Python code of a model whose tokenizer needs it, as vLLM's flag of this name does.
        """
        self.model = model
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.router = router
        self.migration_limit = migration_limit
        self.trust_remote_code = trust_remote_code
        self._logged_s = 0.0

    @property
    def router(self) -> RouterMode:
        return self._router

    @router.setter
    def router(self, mode: RouterMode) -> None:
        self._check_mode(mode)
        self._router: RouterMode = mode

    def _check_mode(self, mode: RouterMode) -> None:
        """Raise ConfigError if a mode needs a Router and the graph has none."""
        if mode not in LOCAL_MODES and not is_linked(self, "kv_router"):
            raise ConfigError(
                f"router: {mode} needs a Router, which is not in this graph",
                hint=f"serve graphs.agg_router:Frontend, or use {', '.join(LOCAL_MODES)}",
            )

    @async_on_start
    async def load(self) -> None:
        directory = tokenizer_dir(self.model, with_code=self.trust_remote_code)
        length = self.max_model_len
        if length is None:
            length = context_tokens(directory)
        self.preprocessor = Preprocessor(Tokenizer(directory, trust_remote_code=self.trust_remote_code), length)
        self._add_metrics()

    def _add_metrics(self) -> None:
        from prometheus_client import Counter  # imported here to keep a dry run fast

        text = "Requests continued by another worker, by the error code of the loss."
        self._migrations = Counter("dynamo_migrations", text, ["reason"], registry=metrics_registry())
        for reason in REASONS:  # start all series at 0: rate() misses the step of one that begins with its first event
            self._migrations.labels(reason)

    def _count_migration(self, reason: str) -> None:
        self._migrations.labels(reason).inc()

    @endpoint(name="chat/completions")
    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return self._answer(partial(self.preprocessor.chat, request), request.routing)

    @endpoint(name="completions")
    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        stream = self._answer(partial(self.preprocessor.completion, request), request.routing)
        return self.preprocessor.echo(request, stream) if request.echo else stream

    def _answer(self, prepare: Prepare, routing: Routing | None) -> Stream[Delta]:
        routing = routing or Routing()
        decode = self.preprocessor.tokenizer.decode
        limit = self.migration_limit if routing.worker is None else 0  # a worker that was named cannot be replaced
        return migrating(prepare, partial(self._generate, routing), decode, limit, self._count_migration)

    async def _generate(self, routing: Routing, request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        """Send a request to a worker, to one in `lost` only if there are no others."""
        if routing.worker is not None:
            return direct(self.worker, routing.worker).generate(request)
        mode = self.router
        if routing.mode is not None:
            self._check_mode(routing.mode)
            mode = routing.mode
        if mode in LOCAL_MODES:
            return avoiding(LOCAL_MODES[mode](self.worker), lost).generate(request)
        return await self._generate_routed(request, cast(KvMode, mode), routing, lost)

    async def _generate_routed(
        self, request: GenerateRequest, mode: KvMode, routing: Routing, lost: Set[int]
    ) -> Stream[Delta]:
        """Send a request to the worker that the Router chooses.

        If the Router does not answer, or its workers refuse, send it to the least loaded one.
        """
        block_size = self.block_size
        question = RouteRequest(
            request_id=request.request_id,
            prompt_tokens=len(request.token_ids),
            block_size=block_size,
            hashes=pack(block_hashes(request.token_ids, block_size)),
            mode=mode,
            temperature=routing.temperature,
            overlap_credit=routing.overlap_credit,
            exclude=list(lost),
        )
        for _ in range(ROUTE_ATTEMPTS):
            route = await self._ask_router(question)
            if route is None:
                break
            request.expected_hit = route.overlap_blocks * block_size
            request.rank = route.rank if route.ranks > 1 else None
            try:
                return await direct(self.worker, route.worker).generate(request)
            except (UnavailableError, TransportError):
                question.exclude.append(route.worker)
        request.expected_hit = 0
        request.rank = None
        return avoiding(least_loaded(self.worker), question.exclude).generate(request)

    async def _ask_router(self, question: RouteRequest) -> Route | None:
        """Return the Router's choice; None, with a log line now and then, if it has none or does not answer."""
        try:
            if not instance_ids(self.kv_router):
                raise UnavailableError("no Router is running")
            async with asyncio.timeout(ROUTE_TIMEOUT_S):
                route = await self.kv_router.route(question)
        except (DynamoError, TimeoutError) as error:
            if time.monotonic() - self._logged_s > LOG_INTERVAL_S:
                self._logged_s = time.monotonic()
                reason = str(error) or f"no answer in {ROUTE_TIMEOUT_S} s"
                log.warning("falling back to the least loaded worker: %s", reason)
            return None
        if route.block_size not in (0, self.block_size):
            log.info("block size: %d as the workers report it, not %d as configured", route.block_size, self.block_size)
            self.block_size = route.block_size
        return route


if __name__ == "__main__":
    # this service alone, also under a debugger: python -m components.processor -f configs/agg.yaml
    from dynamo.launcher.foreground import alone

    alone(Processor)
