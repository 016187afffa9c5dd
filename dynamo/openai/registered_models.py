"""The models that processes register in etcd, whatever their engine: a `Backend` for the OpenAI server.

A card names the endpoint that serves its model. What the endpoint takes is seen from its instances and from the card:

    declared type ChatRequest, CompletionRequest   a Processor of this project: the request as it is, deltas back
    declared type GenerateRequest                  a worker of this project: through the Processor of its namespace, if one
                                                   runs, which routes; else tokenized here, deltas back
    card type backend                              plain data: tokenized here, tokens back (`dynamo.llm.token_worker`)
    anything else                                  OpenAI's request as a dict, OpenAI's chunks back
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec

from dynamo import codec
from dynamo.errors import DynamoError, TransportError, UnavailableError
from dynamo.llm.migration import migrating
from dynamo.llm.model_cards import BACKEND, decode_cards, is_native
from dynamo.llm.model_files import context_tokens, tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import (
    MODELS_PREFIX,
    ChatRequest,
    CompletionRequest,
    Delta,
    GenerateRequest,
    ModelCard,
    ServedModel,
)
from dynamo.llm.token_worker import TokenReader, eos_token_ids, plain_request
from dynamo.llm.tokenizer import Tokenizer
from dynamo.openai.endpoints import merge_streams
from dynamo.rpc.client import Client
from dynamo.rpc.messages import type_name
from dynamo.rpc.runtime import Runtime
from dynamo.streams import Stream
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

Api = Literal["chat", "completion"]
APIS: tuple[Api, ...] = ("chat", "completion")
MIGRATION_LIMIT = 3
LOAD_RETRY_S = 10.0
"""pause after a tokenizer could not be loaded"""
_PROCESSOR_TAKES = {"chat": type_name(ChatRequest), "completion": type_name(CompletionRequest)}
_PROCESSORS = {"chat": ("Processor", "chat/completions"), "completion": ("Processor", "completions")}
_WORKER_TAKES = type_name(GenerateRequest)
_DELTA = codec.decoder(Delta)
_PLAIN = codec.decoder(Any)

Address = tuple[str, str, str]


class _Text(NamedTuple):
    """What turns text into tokens and back for one model."""

    preprocessor: Preprocessor
    eos: list[int]


class _Route(NamedTuple):
    """An endpoint that answers an API of a model."""

    card: ModelCard
    client: Client
    kind: Literal["processor", "worker", "tokens", "openai"]


class RegisteredModels:
    """Follows the cards; `models()` returns those that an instance serves now."""

    def __init__(
        self, runtime: Runtime, choice: str = "round_robin", wanted: Callable[[ModelCard], bool] = lambda card: True
    ) -> None:
        """
        Args:
            runtime: the connections of this process.
            choice: how an instance is chosen, as `Client.call` takes it.
            wanted: returns False for cards that are served otherwise.
        """
        self._runtime = runtime
        self._choice = choice
        self._wanted = wanted
        self._cards: dict[str, list[ModelCard]] = {}  # by name, those with the smallest key first
        self._known: set[Address] = set()
        self._clients: dict[Address, Client] = {}
        self._texts: dict[tuple[str, int], _Text | None] = {}  # by model and context length; None: loading
        self._tasks = TaskSet("RegisteredModels")

    async def follow(self) -> None:
        """Follow the cards until cancelled."""
        try:
            async for cards in self._runtime.follow(MODELS_PREFIX):
                self.update(cards)
        except TransportError as error:
            log.error("stopped following the list of models: %s", error)

    def update(self, cards: Mapping[str, bytes]) -> None:
        """Replace the cards, which are given by etcd key."""
        found: dict[str, list[ModelCard]] = {}
        for card in decode_cards(cards):
            if self._wanted(card):
                found.setdefault(card.name, []).append(card)
        for name in found.keys() - self._cards.keys():
            log.info("model %s: %s", name, " ".join(sorted({".".join(_address(card)) for card in found[name]})))
        for name in self._cards.keys() - found.keys():
            log.info("model %s is no longer registered", name)
        self._cards = found
        for card in (card for cards_of_name in found.values() for card in cards_of_name):
            for address in {address for api in APIS for address in _addresses(card, api)} - self._known:
                self._known.add(address)
                self._tasks.keep_running(partial(self._connect, address), name=f"connect to {'.'.join(address)}")
            if BACKEND in card.types:
                self._text(card)

    async def _connect(self, address: Address) -> None:
        self._clients[address] = await self._runtime.client(*address)

    def _text(self, card: ModelCard) -> _Text | None:
        """Return the tokenizer of a card's model; None while it is being loaded, which begins with the first call."""
        key = (card.source, card.context_length)
        if key not in self._texts:
            self._texts[key] = None
            self._tasks.spawn(self._load(card), name=f"load the tokenizer of {card.name}")
        return self._texts[key]

    async def _load(self, card: ModelCard) -> None:
        """Load a card's tokenizer; try again while the model is registered, since the files may come later."""
        key = (card.source, card.context_length)
        while any((c.source, c.context_length) == key for cards in self._cards.values() for c in cards):
            try:
                self._texts[key] = await asyncio.to_thread(_load_text, *key)
                return
            except (DynamoError, OSError, ValueError) as error:
                log.error("model %s cannot be served: its tokenizer cannot be loaded here: %s", card.name, error)
            await asyncio.sleep(LOAD_RETRY_S)
        del self._texts[key]

    # -- what can answer

    def __contains__(self, name: str) -> bool:
        """Return True for the name of a registered model, whether or not it can answer now."""
        return name in self._cards

    def models(self) -> list[ServedModel]:
        """Return the models that can answer now."""
        served = []
        for name, cards in self._cards.items():
            routes = {api: route for api in APIS if (route := self._route(name, api)) is not None}
            if routes:
                card = cards[0]
                forwarded = tuple(api for api, route in routes.items() if route.kind == "openai")
                served.append(
                    ServedModel(name, card.source, card.context_length, card.created, tuple(routes), forwarded)
                )
        return served

    def missing(self, name: str) -> str:
        """Return why a registered model cannot answer; empty for a name that is not registered."""
        cards = self._cards.get(name, ())
        addresses = {".".join(_address(card)) for card in cards}
        for card in cards:
            client = self._clients.get(_address(card))
            if BACKEND in card.types and client is not None and client.instance_ids() and self._text(card) is None:
                return f"the tokenizer of {name} is not loaded"
        return f"no instance of {', '.join(sorted(addresses))} serves {name}" if addresses else ""

    def instance_counts(self) -> dict[str, int]:
        """Return for each endpoint that a card names, or that is used for one, how many instances can be called."""
        cards = [card for cards_of_name in self._cards.values() for card in cards_of_name]
        named = {_address(card) for card in cards}
        used = {address for card in cards for api in APIS for address in _addresses(card, api)}
        counts = {a: len(self._clients[a].instance_ids()) for a in sorted(used) if a in self._clients}
        return {".".join(address): count for address, count in counts.items() if count or address in named}

    def _route(self, name: str, api: str) -> _Route | None:
        """Return the first endpoint for an API of a model that has an instance now."""
        for card in self._cards.get(name, ()):
            if api not in card.types and BACKEND not in card.types:
                continue
            for address in _addresses(card, api):
                client = self._clients.get(address)
                taken = client.request_types() if client is not None else ()
                if client is None or not taken:
                    continue
                if _PROCESSOR_TAKES[api] in taken:
                    return _Route(card, client, "processor")
                if _WORKER_TAKES in taken or BACKEND in card.types:
                    if self._text(card) is not None:
                        return _Route(card, client, "worker" if _WORKER_TAKES in taken else "tokens")
                elif address == _address(card):
                    return _Route(card, client, "openai")
        return None

    def _serving(self, name: str, api: str) -> _Route:
        route = self._route(name, api)
        if route is None:
            raise UnavailableError(self.missing(name) or f"{name} is not registered any more", hint="try again")
        return route

    # -- requests

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return self._generate("chat", request)

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        return self._generate("completion", request)

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        client = self._serving(request["model"], api).client
        return client.call(request, self._choice, decode=_PLAIN, streaming=True)

    def _generate(self, api: Api, request: ChatRequest | CompletionRequest) -> Stream[Delta]:
        route = self._serving(request.model, api)
        if route.kind == "processor":
            return route.client.call(request, self._choice, decode=_DELTA, streaming=True)
        text = self._text(route.card)
        assert text is not None
        prepare: Any = text.preprocessor.chat if api == "chat" else text.preprocessor.completion
        send = self._send_to_worker if route.kind == "worker" else partial(self._send_tokens, text)
        decode = text.preprocessor.tokenizer.decode
        stream = migrating(
            partial(prepare, request), partial(send, route.client), decode, MIGRATION_LIMIT, lambda reason: None
        )
        if isinstance(request, CompletionRequest) and request.echo:
            return text.preprocessor.echo(request, stream)
        return stream

    async def _send_to_worker(self, client: Client, request: GenerateRequest, lost: Set[int]) -> Stream[Delta]:
        return client.call(request, self._choice, lost, decode=_DELTA, streaming=True)

    async def _send_tokens(
        self, text: _Text, client: Client, request: GenerateRequest, lost: Set[int]
    ) -> Stream[Delta]:
        """Send a request for each choice, since a worker may answer a single one."""
        sampling = request.sampling
        streams = []
        for i in range(sampling.n):
            seed = None if sampling.seed is None else sampling.seed + i
            one = msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, n=1, seed=seed))
            items = client.call(plain_request(one, text.eos), self._choice, lost, decode=_PLAIN, streaming=True)
            decode = text.preprocessor.tokenizer.decode
            streams.append(Stream(TokenReader(items, one, decode, text.eos, report_prompt=i == 0).out))
        return merge_streams(streams, 1)

    async def aclose(self) -> None:
        """Stop connecting and loading."""
        await self._tasks.aclose()


def _address(card: ModelCard) -> Address:
    return card.namespace, card.component, card.endpoint


def _addresses(card: ModelCard, api: str) -> list[Address]:
    """Return the endpoints that may answer an API, the preferred one first."""
    own = _address(card)
    return [(card.namespace, *_PROCESSORS[api]), own] if is_native(card) else [own]


def _load_text(source: str, context_length: int) -> _Text:
    directory = tokenizer_dir(source)
    length = context_length or context_tokens(directory)
    return _Text(Preprocessor(Tokenizer(directory), length), eos_token_ids(directory))
