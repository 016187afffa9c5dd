"""Processor and Frontend as plain Python objects, bound to fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from components.frontend import Frontend
from components.processor import Processor
from components.worker import VllmWorker
from dynamo.engines.mock import MockEngine
from dynamo.errors import ConfigError, ContextLengthError, RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, GenerateRequest, ModelCard, Sampling
from dynamo.sdk import Stream, bind
from dynamo.sdk.depends import Choice, StartCall, Stub
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.spec import spec_of
from dynamo.sdk.testing import InstanceCall, calls, double, lose


class Caller:
    """The transport behind a dependency: records the calls and answers with the mock engine."""

    def __init__(self, answer: Callable[[Any], Stream[Delta]], instances: list[int]) -> None:
        self.answer = answer
        self.instances = instances
        self.calls: list[tuple[str, Any, Choice]] = []

    def endpoint(self, spec: EndpointSpec) -> StartCall:
        def start(request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
            self.calls.append((spec.name, request, choice))
            return self.answer(request)

        return start

    def instance_ids(self) -> list[int]:
        return self.instances


@pytest.fixture
async def engine() -> MockEngine:
    found = MockEngine("dynamo-tiny", {"speedup-ratio": 0}, lambda _: None)
    await found.start()
    return found


@pytest.fixture
def worker(engine: MockEngine) -> Caller:
    return Caller(engine.generate, [1])


@pytest.fixture
async def processor(worker: Caller) -> Processor:
    found = Processor(model="dynamo-tiny", max_model_len=200)
    bind(found, worker=Stub(spec_of(VllmWorker), worker))
    await found.load()
    return found


def chat(text: str = "hello", **sampling: Any) -> ChatRequest:
    return ChatRequest("m", [{"role": "user", "content": text}], Sampling(**sampling))


async def read(stream: Stream[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


async def test_chat(processor: Processor, worker: Caller) -> None:
    deltas = await read(processor.chat(chat(max_tokens=6, ignore_eos=True)))
    assert len(deltas) == 6
    ((endpoint, request, choice),) = worker.calls
    assert (endpoint, choice) == ("generate", "round_robin")
    assert isinstance(request, GenerateRequest)
    assert deltas[0].prompt_tokens == len(request.token_ids)


async def test_routing_mode(processor: Processor, worker: Caller) -> None:
    processor.router = "random"
    await read(processor.chat(chat(max_tokens=1)))
    assert worker.calls[0][2] == "random"


async def test_errors_come_out_of_the_stream(processor: Processor, worker: Caller) -> None:
    with pytest.raises(ContextLengthError):
        await read(processor.chat(chat("word " * 500)))
    with pytest.raises(RequestError, match="not supported"):
        await read(processor.chat(ChatRequest("m", [{"role": "user", "content": [{"type": "video"}]}], Sampling())))
    with pytest.raises(RequestError, match="empty"):
        await read(processor.completion(CompletionRequest("m", [], Sampling())))
    assert not worker.calls


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
async def test_echo(processor: Processor, stream: bool, tokens: bool) -> None:
    text = "Once upon  a time "
    prompt = await processor.preprocessor.tokenizer.encode(text) if tokens else text
    sampling = Sampling(n=2, max_tokens=3, ignore_eos=True)
    plain = await read(processor.completion(CompletionRequest("m", prompt, sampling, stream=stream)))
    echoed = await read(processor.completion(CompletionRequest("m", prompt, sampling, stream=stream, echo=True)))
    for index in (0, 1):
        without, with_echo = ("".join(d.text for d in found if d.index == index) for found in (plain, echoed))
        assert with_echo == text + without
    assert [d.token_ids for d in echoed] == [d.token_ids for d in plain]


async def test_context_length_of_the_model() -> None:
    found = Processor(model="dynamo-tiny")
    await found.load()
    assert found.preprocessor.context_length >= 1024


# -- Frontend


def card(name: str = "tiny", **fields: Any) -> bytes:
    values: dict[str, Any] = {
        "namespace": "dynamo",
        "component": "VllmWorker",
        "context_length": 4096,
        "engine": "mock",
    }
    return msgspec.json.encode(ModelCard(name=name, source="s", kv_block_size=32, created=7, **{**values, **fields}))


@pytest.fixture
def processors() -> Any:
    return double(Processor)


@pytest.fixture
def frontend(processors: Any) -> Frontend:
    found = Frontend()
    bind(found, processor=processors)
    return found


def test_models_need_a_card_and_a_processor(frontend: Frontend, processors: Any) -> None:
    assert frontend.models() == []
    assert not frontend.ready()
    cards = {"models/tiny/1": card(), "models/tiny/2": card(), "models/other/3": card("other")}
    frontend.update_models(cards)
    assert [m.name for m in frontend.models()] == ["other", "tiny"]
    assert frontend.ready()
    assert frontend.instance_counts() == {"Processor": 1}
    frontend.update_models({})
    assert frontend.models() == []
    frontend.update_models(cards)
    assert frontend.ready()
    lose(processors, 1)
    assert frontend.models() == []
    assert not frontend.ready()


def test_unreadable_cards_are_skipped(frontend: Frontend, caplog: pytest.LogCaptureFixture) -> None:
    frontend.update_models({"models/bad/1": b'{"name": 5}', "models/worse/2": b"\xff", "models/tiny/3": card()})
    assert [m.name for m in frontend.models()] == ["tiny"]
    assert "models/bad/1" in caplog.text


@pytest.mark.parametrize("names", ["alias", ["alias", "second"]])
def test_served_names(names: Any, processors: Any) -> None:
    found = Frontend(served_model_name=names)
    bind(found, processor=processors)
    found.update_models({"models/tiny/1": card()})
    assert [m.name for m in found.models()] == (["alias"] if names == "alias" else ["alias", "second"])
    assert found.models()[0].root == "s"


def test_endpoint_must_be_in_the_graph() -> None:
    Frontend(endpoint="dynamo.Processor.chat/completions")
    with pytest.raises(ConfigError, match=r"dynamo\.Elsewhere\.chat") as caught:
        Frontend(endpoint="dynamo.Elsewhere.chat")
    assert "dynamo.Processor.chat/completions" in str(caught.value.hint)


def test_api_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_API_KEYS", raising=False)
    assert Frontend().api_keys == []
    monkeypatch.setenv("DYN_API_KEYS", "one, two,")
    assert Frontend().api_keys == ["one", "two"]
    assert Frontend(api_keys=["three"]).api_keys == ["three"]
    assert Frontend(api_keys=[]).api_keys == []


async def test_requests_go_to_the_processor() -> None:
    found = Frontend()
    deltas = [Delta(token_ids=[1], text="one"), Delta(token_ids=[2], text="two")]
    bind(found, processor=double(Processor, chat=deltas[:1], completion=deltas[1:]))
    completion = CompletionRequest("m", "x", Sampling())
    assert await read(found.chat(chat())) == deltas[:1]
    assert await read(found.completion(completion)) == deltas[1:]
    assert calls(found.processor) == [InstanceCall("chat", chat(), 1), InstanceCall("completion", completion, 1)]
