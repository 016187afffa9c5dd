"""Frontend: the OpenAI-compatible HTTP server at the top of every graph."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from components.processor import Processor
from components.worker import VllmWorker
from dynamo.errors import ConfigError, TransportError
from dynamo.llm.protocol import MODELS_PREFIX, ChatRequest, CompletionRequest, Delta, ModelCard, ServedModel
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

if TYPE_CHECKING:
    from dynamo.http.server import HttpServer

log = logging.getLogger(__name__)

NATS_AWAY_S = 1.0
"""/health says so from then on; a server that restarts is back sooner"""
KNOWN_S, KNOWN_EVERY_S = 2.0, 0.02
"""how long one of several Frontends waits for the models, and how often it looks"""


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Frontend(Service):
    worker = depends(VllmWorker)
    processor = depends(Processor)

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
            served_model_name: what clients call the model; None: as the workers name it.
            endpoint: where chat requests go, as namespace.component.endpoint.
            host: address to listen on; 0.0.0.0 for all.
            port: port to listen on.
            timeout_s: each request's deadline in seconds; None: no limit.
            cors_origins: sites whose pages may call this server from a browser, "*" for all; None: none.
            api_keys: clients send one of these as a bearer token; None: those of DYN_API_KEYS (commas between), and
                without that variable everybody is answered.
        """
        names = [served_model_name] if isinstance(served_model_name, str) else served_model_name
        self.served_model_names = names or []
        self.host, self.port, self.timeout_s = host, port, timeout_s
        component = ".".join(Processor.dynamo_address())
        if endpoint != f"{component}.chat/completions":
            raise ConfigError(
                f"Frontend.endpoint: {endpoint} is not in this graph", hint=f"use {component}.chat/completions"
            )
        self.cors_origins = cors_origins
        self.api_keys = api_keys if api_keys is not None else os.environ.get("DYN_API_KEYS", "").split(",")
        self.api_keys = [key.strip() for key in self.api_keys if key.strip()]
        self._served: list[ServedModel] = []
        self.server: HttpServer | None = None
        self._following: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None

    @async_on_start
    async def start(self) -> None:
        # here, so that a dry run does not import FastAPI
        from dynamo.http.server import HttpServer
        from dynamo.openai.app import create_app

        context = service_context()
        if context is not None:
            self._following = asyncio.get_running_loop().create_task(self._follow_models(context.runtime))
        app = create_app(
            self,
            timeout_s=self.timeout_s,
            cors_origins=self.cors_origins,
            api_keys=self.api_keys,
            processes=context.runtime.metrics if context is not None else None,
            targets=context.scrape_targets if context is not None else None,
            fault=self.fault,
        )
        listen = context.listen if context is not None else None  # one port for all workers
        listener = listen(self.host, self.port) if listen is not None else None
        self.server = HttpServer(app, self.host, self.port, listener)
        if context is not None and context.workers > 1:
            self._opening = asyncio.get_running_loop().create_task(self._open(self.server))
        else:
            await self.server.start()
        if context is not None:
            context.serve_at(self.server.url)

    async def _open(self, server: HttpServer) -> None:
        """Others answer meanwhile, so this one does once it knows the models. Connections that it is given wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S):
                while not self.ready():
                    await asyncio.sleep(KNOWN_EVERY_S)
        await server.start()

    async def _follow_models(self, runtime: ProcessRuntime) -> None:
        try:
            async for cards in runtime.follow(MODELS_PREFIX):
                self.take_cards(cards)
        except TransportError as error:
            log.error("the list of models is no longer followed: %s", error)

    def take_cards(self, cards: Mapping[str, bytes]) -> None:
        """The workers' model cards, by etcd key. One that cannot be read is left out: its worker is of another version."""
        found: dict[str, ServedModel] = {}
        for key in sorted(cards):
            try:
                card = msgspec.json.decode(cards[key], type=ModelCard)
            except msgspec.MsgspecError as error:
                log.warning("model card %s is ignored: %s", key, error)
                continue
            for name in self.served_model_names or [card.name]:
                found.setdefault(name, ServedModel(name, card.source, card.context_length, card.created))
        self._served = list(found.values())

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return self.processor.chat(request)

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        return self.processor.completion(request)

    def models(self) -> list[ServedModel]:
        """Models that can answer now: a worker has a card in etcd, and a Processor is there."""
        return self._served if instance_ids(self.processor) else []

    @readiness
    def ready(self) -> bool:
        return bool(self.models())

    def endpoints(self) -> dict[str, int]:
        return {"Processor": len(instance_ids(self.processor))}

    def fault(self) -> str:
        """Why nothing can be answered now; empty while all is well."""
        context = service_context()
        over_nats = context is not None and context.runtime.requests_over_nats
        away_s = context.runtime.nats_away_s if context is not None and over_nats else 0.0
        return f"the NATS server has been away for {away_s:.0f} s" if away_s > NATS_AWAY_S else ""

    @on_shutdown
    async def stop(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self.server is not None:
            await self.server.stop()
        if self._following is not None:
            self._following.cancel()


if (
    __name__ == "__main__"
):  # python -m components.frontend -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.launcher.foreground import alone

    alone(Frontend)
