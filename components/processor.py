"""Processor: turns messages into tokens, chooses a worker, and hands its deltas on."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Set
from functools import partial
from typing import cast

import msgspec

from components.router import Router
from components.worker import VllmWorker
from dynamo.errors import ConfigError, DynamoError, TransportError, UnavailableError
from dynamo.kv_router.hashing import block_hashes, pack
from dynamo.kv_router.messages import KvMode, Route, RouteRequest
from dynamo.llm.migration import REASONS, Prepare, migrating
from dynamo.llm.model_files import tokenizer_dir
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

DEFAULT_CONTEXT_TOKENS = 4096
ROUTE_S = 0.5
"""How long the Router may take. It needs a tenth of a millisecond; without its answer the least loaded worker is taken."""
PLACES = 3
"""Workers that the Router may name before the least loaded one is taken: those that died a moment ago refuse."""
COMPLAIN_S = 30.0
CHOOSE = {
    "round-robin": round_robin,
    "random": random,
    "power-of-two": power_of_two,
    "least-loaded": least_loaded,
}


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Processor(Service):
    worker = depends(VllmWorker)
    kv_router = depends(Router)

    live_settings = ("router",)

    def __init__(
        self,
        model: str = "",
        block_size: int = 64,
        max_model_len: int | None = None,
        router: RouterMode = "round-robin",
        migration_limit: int = 3,
    ) -> None:
        """
        Args:
            model: whose tokenizer and chat template are used; the workers' model.
            block_size: tokens in a KV block, as the workers have it.
            max_model_len: context length in tokens; None: what the model's config.json says.
            router: how a worker is chosen: round-robin, random, power-of-two and least-loaded by this process itself,
                kv, kv-load and approx-kv by the Router.
            migration_limit: how many times a request goes on at another worker when the one that computes it is lost;
                0: the loss ends it with an error. It also limits how many workers a request can take down.
        """
        self.model, self.block_size, self.max_model_len = model, block_size, max_model_len
        self.router = router
        self.migration_limit = migration_limit
        self._complained_s = 0.0

    @property
    def router(self) -> RouterMode:
        return self._router

    @router.setter
    def router(self, mode: RouterMode) -> None:
        self._router: RouterMode = self._possible(mode)

    def _possible(self, mode: RouterMode) -> RouterMode:
        if mode not in CHOOSE and not is_linked(self, "kv_router"):
            raise ConfigError(
                f"router: {mode} needs a Router, which is not in this graph",
                hint=f"serve graphs.agg_router:Frontend, or use {', '.join(CHOOSE)}",
            )
        return mode

    @async_on_start
    async def load(self) -> None:
        directory = tokenizer_dir(self.model)
        length = self.max_model_len
        if length is None:
            config = json.loads((directory / "config.json").read_text("utf-8"))
            length = int(config.get("max_position_embeddings", DEFAULT_CONTEXT_TOKENS))
        self.preprocessor = Preprocessor(Tokenizer(directory), length)
        self._count()

    def _count(self) -> None:
        from prometheus_client import Counter  # here, so that a dry run does not import it

        registry = metrics_registry()
        told = "Requests that went on at another worker, by the code of the error that ended them at the first."
        self._migrations = Counter("dynamo_migrations", told, ["reason"], registry=registry)
        for reason in REASONS:  # from 0 on: rate() misses the step of a series that begins with its first event
            self._migrations.labels(reason)

    def _migrated(self, reason: str) -> None:
        self._migrations.labels(reason).inc()

    @endpoint(name="chat/completions")
    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return self._answer(partial(self.preprocessor.chat, request), request.routing)

    @endpoint(name="completions")
    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        stream = self._answer(partial(self.preprocessor.completion, request), request.routing)
        return _echoed(partial(self.preprocessor.prompt_text, request), stream) if request.echo else stream

    def _answer(self, prepare: Prepare, routing: Routing | None) -> Stream[Delta]:
        routing = routing or Routing()
        limit = self.migration_limit if routing.worker is None else 0  # a worker that was named cannot be replaced
        return migrating(
            prepare, partial(self._generate, routing), self.preprocessor.tokenizer.decode, limit, self._migrated
        )

    async def _generate(self, routing: Routing, request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        """Send a request to a worker that is not among those that it has lost."""
        if routing.worker is not None:
            return direct(self.worker, routing.worker).generate(request)
        mode = self._possible(routing.mode) if routing.mode is not None else self.router
        if mode in CHOOSE:
            return avoiding(CHOOSE[mode](self.worker), lost).generate(request)
        return await self._where_routed(request, mode, routing, lost)

    async def _where_routed(
        self, request: GenerateRequest, mode: RouterMode, routing: Routing, lost: Set[int]
    ) -> Stream[Delta]:
        """Ask the Router; where it does not answer, or names workers that refuse, take the least loaded one."""
        size = self.block_size
        question = RouteRequest(
            request_id=request.request_id,
            prompt_tokens=len(request.token_ids),
            block_size=size,
            hashes=pack(block_hashes(request.token_ids, size)),
            mode=cast(KvMode, mode),
            temperature=routing.temperature,
            overlap_credit=routing.overlap_credit,
            exclude=list(lost),
        )
        for _ in range(PLACES):
            route = await self._ask(question)
            if route is None:
                break
            request.expected_hit = route.overlap_blocks * size
            request.rank = route.rank if route.ranks > 1 else None
            stream = direct(self.worker, route.worker).generate(request)
            try:
                return await stream
            except (UnavailableError, TransportError):
                question.exclude.append(route.worker)
        request.expected_hit, request.rank = 0, None
        return avoiding(least_loaded(self.worker), question.exclude).generate(request)

    async def _ask(self, question: RouteRequest) -> Route | None:
        try:
            if not instance_ids(self.kv_router):
                raise UnavailableError("no Router is there")
            async with asyncio.timeout(ROUTE_S):
                route = await self.kv_router.route(question)
        except (DynamoError, TimeoutError) as error:
            if time.monotonic() - self._complained_s > COMPLAIN_S:
                self._complained_s = time.monotonic()
                log.warning("requests go to the least loaded worker: %s", str(error) or f"no answer in {ROUTE_S} s")
            return None
        if route.block_size not in (0, self.block_size):
            log.info("the workers' KV blocks have %d tokens, not %d as configured", route.block_size, self.block_size)
            self.block_size = route.block_size
        return route


def _echoed(prompt: Callable[[], str], stream: Stream[Delta]) -> Stream[Delta]:
    """Put the prompt's text in front of each choice's first delta."""
    seen: set[int] = set()

    def add(delta: Delta) -> Delta:
        if delta.index in seen:
            return delta
        seen.add(delta.index)
        return msgspec.structs.replace(delta, text=prompt() + delta.text)

    return stream.map(add)


if (
    __name__ == "__main__"
):  # python -m components.processor -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.launcher.foreground import alone

    alone(Processor)
