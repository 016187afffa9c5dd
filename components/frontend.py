"""Frontend: the OpenAI-compatible HTTP server at the top of every graph."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from components.processor import Processor
from components.worker import VllmWorker
from dynamo import environment
from dynamo.errors import ConfigError, TransportError
from dynamo.llm.model_cards import decode_cards, is_native
from dynamo.llm.protocol import MODELS_PREFIX, ChatRequest, CompletionRequest, Delta, ModelCard, ServedModel
from dynamo.planner.service import PlannerService, PrometheusService
from dynamo.sdk import (
    Service,
    Stream,
    async_on_start,
    depends,
    instance_ids,
    on_shutdown,
    readiness,
    service,
    service_context,
)
from dynamo.sdk.context import ProcessRuntime
from dynamo.tasks import TaskSet

if TYPE_CHECKING:
    from dynamo.http.server import HttpServer
    from dynamo.openai.registered_models import RegisteredModels
    from dynamo.rpc.runtime import Runtime

log = logging.getLogger(__name__)

NATS_GRACE_S = 1.0
"""A disconnection from NATS makes /health report "unavailable" after this long; a restarting server is back sooner."""
FIRST_MODEL_TIMEOUT_S = 2.0
"""How long one of several Frontends waits for a model before it accepts connections."""
FIRST_MODEL_POLL_S = 0.02
PROCESSOR_ENDPOINTS = (("Processor", "chat/completions"), ("Processor", "completions"))


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Frontend(Service):
    """Serves OpenAI's HTTP API, and keeps the list of models from the cards that workers publish in etcd.

    Models of its own graph are answered by its Processor, other registered models by the endpoints that their cards name.
    """

    worker = depends(VllmWorker, optional=True)
    processor = depends(Processor)
    # run beside the graph; nothing here calls them
    planner = depends(PlannerService, optional=True)
    prometheus = depends(PrometheusService, optional=True)

    def __init__(
        self,
        served_model_name: str | list[str] | None = None,
        endpoint: str = "dynamo.Processor.chat/completions",
        host: str = "127.0.0.1",
        port: int = 8000,
        timeout_s: float | None = None,
        cors_origins: list[str] | None = None,
        api_keys: list[str] | None = None,
    ) -> None:
        """
        Args:
            served_model_name: name of the model for clients, or several; None: the name that the workers give it.
            endpoint: endpoint that answers chat requests, as namespace.component.endpoint.
            host: address to listen on; 0.0.0.0 for all.
            port: port to listen on.
            timeout_s: each request's deadline in seconds; None: no limit.
            cors_origins: sites whose pages may call this server from a browser, "*" for all; None: none.
            api_keys: clients send one of these as a bearer token; None: those of DYN_API_KEYS, separated by commas, and
                without that variable no key is needed.
        """
        names = [served_model_name] if isinstance(served_model_name, str) else served_model_name
        self.served_model_names = names or []
        self.host = host
        self.port = port
        self.timeout_s = timeout_s
        component = ".".join(Processor.dynamo_address())
        if endpoint != f"{component}.chat/completions":
            raise ConfigError(
                f"Frontend.endpoint: {endpoint} is not in this graph", hint=f"use {component}.chat/completions"
            )
        self.cors_origins = cors_origins
        self.api_keys = environment.api_keys() if api_keys is None else [key.strip() for key in api_keys if key.strip()]
        self.namespace = self.dynamo_address()[0]
        self.graph: frozenset[tuple[str, str]] = frozenset()
        self._models: list[ServedModel] = []  # of this graph, by the workers' cards
        self._others: RegisteredModels | None = None
        self.app: Callable[..., Awaitable[None]] | None = None
        self.server: HttpServer | None = None
        self._tasks = TaskSet("Frontend")

    @async_on_start
    async def start(self) -> None:
        # imported here, so that a dry run does not import FastAPI
        from dynamo.http.server import HttpServer
        from dynamo.openai.app import create_app

        context = service_context()
        if context is not None:
            self.namespace, self.graph = context.namespace, context.graph
            if not context.in_memory:
                from dynamo.openai.registered_models import RegisteredModels

                self._others = RegisteredModels(
                    cast("Runtime", context.runtime), wanted=lambda card: not self._is_own(card)
                )
            self._tasks.spawn(self._follow_models(context.runtime), name="follow models")
        self.app = create_app(
            self,
            timeout_s=self.timeout_s,
            cors_origins=self.cors_origins,
            api_keys=self.api_keys,
            processes=context.runtime.metrics if context is not None else None,
            targets=context.scrape_targets if context is not None else None,
            unavailable_reason=self.unavailable_reason,
            missing=self._others.missing if self._others is not None else None,
        )
        if context is not None and context.in_memory:
            return
        listen = context.listen if context is not None else None  # one port for all workers
        listener = listen(self.host, self.port) if listen is not None else None
        self.server = HttpServer(self.app, self.host, self.port, listener)
        if context is not None and context.workers > 1:
            self._tasks.spawn(self._start_with_models(self.server), name="start server")
        else:
            await self.server.start()
        if context is not None:
            context.serve_at(self.server.url)

    async def _start_with_models(self, server: HttpServer) -> None:
        """Start the server once there is a model, since the service's other processes can answer until then.

        Connections that the kernel gives to this process meanwhile wait.
        """
        give_up_at = time.monotonic() + FIRST_MODEL_TIMEOUT_S
        while not self.ready() and time.monotonic() < give_up_at:
            await asyncio.sleep(FIRST_MODEL_POLL_S)
        await server.start()

    async def _follow_models(self, runtime: ProcessRuntime) -> None:
        try:
            async for cards in runtime.follow(MODELS_PREFIX):
                self.update_models(cards)
        except TransportError as error:
            log.error("stopped following the list of models: %s", error)

    def update_models(self, cards: Mapping[str, bytes]) -> None:
        """Replace the list of models by those of the workers' cards, which are given by etcd key.

        Unreadable cards, from workers of another version, are skipped.
        """
        found: dict[str, ServedModel] = {}
        for card in filter(self._is_own, decode_cards(cards)):
            for name in self.served_model_names or [card.name]:
                found.setdefault(name, ServedModel(name, card.source, card.context_length, card.created))
        self._models = list(found.values())
        if self._others is not None:
            self._others.update(cards)

    def _is_own(self, card: ModelCard) -> bool:
        """Return True for the models of this graph's workers, and for further names of them that `llmctl` added.

        Workers that another command started count by their namespace.
        """
        in_namespace = card.namespace == self.namespace
        if is_native(card):
            return in_namespace or (card.namespace, card.component) in self.graph
        return in_namespace and (card.component, card.endpoint) in PROCESSOR_ENDPOINTS

    def _other(self, name: str) -> RegisteredModels | None:
        """Return what answers for a model that is not of this graph."""
        others = self._others
        if others is None or name not in others or any(model.name == name for model in self._models):
            return None
        return others

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return (self._other(request.model) or self.processor).chat(request)

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        return (self._other(request.model) or self.processor).completion(request)

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        assert self._others is not None
        return self._others.forward(api, request)

    def models(self) -> list[ServedModel]:
        """Return the models that can answer now: of this graph those that a worker serves, and none without a Processor."""
        own = self._models if instance_ids(self.processor) else []
        others = self._others.models() if self._others is not None else []
        return [*own, *(model for model in others if model.name not in {m.name for m in own})] if others else own

    @readiness
    def ready(self) -> bool:
        return bool(self.models())

    def instance_counts(self) -> dict[str, int]:
        """Return how many Processors can be called, and how many instances of other registered models."""
        others = self._others.instance_counts() if self._others is not None else {}
        return {"Processor": len(instance_ids(self.processor)), **others}

    def unavailable_reason(self) -> str:
        """Return why requests cannot be answered although there are models; empty if they can."""
        context = service_context()
        over_nats = context is not None and context.runtime.requests_over_nats
        away_s = context.runtime.nats_away_s if context is not None and over_nats else 0.0
        return f"the NATS server has been away for {away_s:.0f} s" if away_s > NATS_GRACE_S else ""

    @on_shutdown
    async def stop(self) -> None:
        await self._tasks.aclose()
        if self._others is not None:
            await self._others.aclose()
        if self.server is not None:
            await self.server.stop()


if __name__ == "__main__":  # python -m components.frontend -f configs/agg.yaml: this service alone, e.g. in a debugger
    from dynamo.launcher.foreground import alone

    alone(Frontend)
