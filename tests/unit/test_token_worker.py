"""Workers that yield tokens: the request they get, and the deltas that are made of their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo.errors import EngineError
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.llm.token_worker import TokenReader, eos_token_ids, plain_request
from dynamo.llm.tokenizer import Tokenizer
from dynamo.streams import Channel, Stream

TOKENIZER = Tokenizer(tokenizer_dir("dynamo-tiny"))
EOS = eos_token_ids(tokenizer_dir("dynamo-tiny"))


def read(text_or_items: str | list[Any], **sampling: Any) -> tuple[list[Delta], BaseException | None, bool]:
    """Return the deltas, the error at the end, and whether the worker's stream was cancelled."""
    if isinstance(text_or_items, str):
        ids = TOKENIZER._encode(text_or_items, False)
        items: list[Any] = [*({"token_ids": [token]} for token in ids), {"token_ids": [], "finish_reason": "stop"}]
    else:
        items = text_or_items
    cancelled: list[bool] = []
    channel: Channel[Any] = Channel(on_cancel=lambda: cancelled.append(True))
    request = GenerateRequest([1, 2, 3], Sampling(**sampling))
    reader = TokenReader(Stream(channel), request, TOKENIZER.decode, EOS, report_prompt=True)
    found: list[Delta] = []
    ended: list[BaseException | None] = []
    Stream(reader.out).pipe(found.append, ended.append)
    for item in items:
        channel.push(item)
    channel.end()
    return found, ended[0] if ended else None, bool(cancelled)


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_text_has_whole_characters() -> None:
    found, error, _ = read("Grüße, 世界!")
    assert error is None
    assert text(found) == "Grüße, 世界!"
    assert not any("\N{REPLACEMENT CHARACTER}" in delta.text for delta in found)
    assert found[-1].finish_reason == "stop"
    assert found[-1].token_ids == EOS[:1]  # as engines of this project count it
    assert [delta.prompt_tokens for delta in found if delta.prompt_tokens is not None] == [3]


async def test_a_stop_string_ends_the_choice_and_the_worker() -> None:
    found, error, cancelled = read("one two three four", stop=["three"])
    assert (text(found), found[-1].finish_reason, found[-1].stop_reason) == ("one two ", "stop", "three")
    assert error is None
    assert cancelled


async def test_a_stop_token_ends_the_choice() -> None:
    word = TOKENIZER._encode("hello", False)
    found, _, cancelled = read([{"token_ids": [*word, EOS[0], *word]}])
    assert (text(found), found[-1].finish_reason) == ("hello", "stop")
    assert cancelled
    ignored, _, _ = read([{"token_ids": [*word, EOS[0], *word]}], ignore_eos=True)
    assert text(ignored).count("hello") == 2


async def test_the_limit_ends_the_choice() -> None:
    found, _, cancelled = read([{"token_ids": TOKENIZER._encode("one two three four", False)}], max_tokens=2)
    assert found[-1].finish_reason == "length"
    assert sum(len(delta.token_ids) for delta in found) == 2
    assert cancelled


async def test_a_worker_may_make_the_text_itself() -> None:
    found, _, _ = read([{"token_ids": [5], "text": "mine"}, {"token_ids": [], "finish_reason": "length"}])
    assert (text(found), found[-1].finish_reason) == ("mine", "length")


async def test_a_worker_may_end_without_a_reason() -> None:
    found, error, _ = read([{"token_ids": TOKENIZER._encode("hello", False)}])
    assert error is None
    assert (text(found), found[-1].finish_reason) == ("hello", "stop")


@pytest.mark.parametrize(("given", "reason"), [("Length", "length"), ("EoS", "stop"), (["?"], "stop"), (7, "stop")])
async def test_finish_reasons_in_other_words(given: Any, reason: str) -> None:
    found, error, _ = read([{"token_ids": [5]}, {"finish_reason": given}])
    assert (found[-1].finish_reason, error) == (reason, None)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"finish_reason": "error", "token_ids": []}, "the worker reported an error: without a message"),
        ({"finish_reason": {"error": "no memory"}, "token_ids": []}, "the worker reported an error: no memory"),
        ({"finish_reason": "error"}, "the worker reported an error: without a message"),
        ({"error": "no memory"}, "the worker reported an error: no memory"),
        ({"token_ids": [-1]}, "the worker yielded something else than tokens"),
        ({"token_ids": [1 << 40]}, "the worker yielded something else than tokens"),
        ({"tokens": []}, "the worker yielded something else than tokens"),
        ({"token_ids": ["a"]}, "the worker yielded something else than tokens"),
        ("text", "the worker yielded something else than tokens"),
    ],
)
async def test_errors(item: Any, message: str) -> None:
    _, error, _ = read([item])
    assert isinstance(error, EngineError)
    assert error.message.startswith(message)


def test_the_request_has_every_key() -> None:
    sampling = Sampling(max_tokens=9, temperature=0.5, stop=["x"], stop_token_ids=[4], seed=3)
    request = plain_request(GenerateRequest([1, 2], sampling), [7])
    assert request["token_ids"] == [1, 2]
    assert request["stop_conditions"] == {
        "max_tokens": 9, "stop": ["x"], "stop_token_ids_hidden": [4, 7], "min_tokens": None, "ignore_eos": False,
    }  # fmt: skip
    assert (request["sampling_options"]["temperature"], request["sampling_options"]["seed"]) == (0.5, 3)
    assert request["sampling_options"]["top_k"] is None
    assert request["eos_token_ids"] == [7]
    ignoring = plain_request(GenerateRequest([1], Sampling(ignore_eos=True)), [7])
    assert (ignoring["eos_token_ids"], ignoring["stop_conditions"]["stop_token_ids_hidden"]) == ([], [])


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    assert eos_token_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert eos_token_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert eos_token_ids(tmp_path) == [6, 7]
