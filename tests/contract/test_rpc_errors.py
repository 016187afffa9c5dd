"""Errors between services: which class and HTTP status the client gets, and what is logged where."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo import codec, context
from dynamo.errors import BadCallError, RequestError
from dynamo.http.errors import status_of
from dynamo.rpc.client import Client
from dynamo.rpc.runtime import Runtime
from tests.contract.rpc_steps import Make, call, make, namespace, plane

__all__ = ["make", "namespace", "plane"]  # fixtures
pytestmark = pytest.mark.usefixtures("plane")


class Text(msgspec.Struct):
    """What `classify` takes."""

    words: int

    def __post_init__(self) -> None:
        if self.words < 0:
            raise RequestError("words must not be negative", param="words")
        if self.words > 100:
            raise LookupError("no such words")


class WrongText(msgspec.Struct):
    """What another service believes that `classify` takes."""

    words: str


async def classify(text: Text) -> int:
    if text.words == 0:
        raise RequestError("no words", param="words")
    if text.words == 1:
        raise KeyError("one")
    return text.words


class ErrorLog:
    """The lines logged at error, each with the request id at that moment."""

    def __init__(self) -> None:
        self.lines: list[tuple[logging.LogRecord, str]] = []

    def note(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self.lines.append((record, context.request_id.get()))
        return True


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> ErrorLog:
    found = ErrorLog()
    caplog.handler.addFilter(found.note)
    return found


@pytest.fixture
def in_request() -> Any:
    token = context.request_id.set("req-7")
    yield
    context.request_id.reset(token)


async def served(server: Runtime, client: Runtime, namespace: str, method: Any, request_type: Any, name: str) -> Client:
    await server.serve(namespace, "Words", name, method, request_type)
    found = await client.client(namespace, "Words", name)
    await found.wait_for_instances(timeout_s=5)
    return found


@pytest.fixture
async def words(make: Make, namespace: str) -> Client:
    """`Words.classify`, in a process of its own."""
    return await served(await make(), await make(), namespace, classify, Text, "classify")


@pytest.mark.usefixtures("in_request")
async def test_a_wrong_type_between_services_is_a_500_and_logged_once_by_the_server(
    words: Client, errors: ErrorLog
) -> None:
    with pytest.raises(BadCallError) as caught:
        await call(words, WrongText("three"), streaming=False)
    fact = "Words.classify: invalid request: invalid Text: Expected `int`, got `str` - at `$.words`"
    assert caught.value.message == fact
    assert status_of(caught.value) == 500
    ((record, request_id),) = errors.lines
    assert record.getMessage() == f"callee classify refused a call: {fact}"
    assert record.name.startswith("dynamo.rpc.")
    assert request_id == "req-7"


async def test_a_type_that_fails_unexpectedly_is_logged_with_its_traceback(words: Client, errors: ErrorLog) -> None:
    with pytest.raises(BadCallError, match="no such words") as caught:
        await call(words, {"words": 200}, streaming=False)
    assert status_of(caught.value) == 500
    ((record, _),) = errors.lines
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_a_wrong_type_in_a_response_is_a_500_and_logged_once_by_the_client(
    words: Client, errors: ErrorLog
) -> None:
    with pytest.raises(BadCallError) as caught:
        await words.call({"words": 7}, "round_robin", decode=codec.decoder(str), streaming=False)
    fact = f"invalid response of instance {words.instance_ids()[0]:x}: invalid str: Expected `str`, got `int`"
    assert caught.value.message == fact
    assert status_of(caught.value) == 500
    ((record, _),) = errors.lines
    assert record.getMessage() == fact


@pytest.mark.parametrize("number", [0, -1])
async def test_validation_by_the_service_keeps_its_class_and_400(words: Client, errors: ErrorLog, number: int) -> None:
    """Whether the method raises it or its argument's type."""
    with pytest.raises(RequestError) as caught:
        await call(words, {"words": number}, streaming=False)
    assert type(caught.value) is RequestError
    assert caught.value.param == "words"
    assert status_of(caught.value) == 400
    assert not errors.lines


@pytest.mark.usefixtures("in_request")
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_unexpected_error_is_logged_once_where_it_was_raised(
    words: Client, make: Make, namespace: str, errors: ErrorLog, streaming: bool
) -> None:
    """Two hops: the process in between passes it on and does not log it again."""

    async def relay(request: Any) -> Any:
        return await call(words, request, streaming=False)

    async def relay_items(request: Any) -> AsyncIterator[Any]:
        yield await call(words, request, streaming=False)

    method = relay_items if streaming else relay
    between = await served(await make(), await make(), namespace, method, Any, "relay")
    stream = call(between, {"words": 1}, streaming=streaming)
    with pytest.raises(KeyError) as caught:
        await (anext(stream) if streaming else stream)
    assert caught.value.__notes__ == ["raised in callee classify"]
    ((record, request_id),) = errors.lines
    assert record.getMessage() == "callee classify failed: KeyError('one')"
    assert record.exc_info is not None
    assert record.exc_info[2] is not None
    assert request_id == "req-7"
