"""Tokenizer and chat templates: prompts must equal those of transformers, character for character.

This is the only test module that imports transformers (6 s), and only in the tests that compare.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from dynamo.errors import ContextLengthError, RequestError, StartError
from dynamo.llm import tiny
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Sampling
from dynamo.llm.tokenizer import THREAD_ABOVE_CHARS, Tokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Ort> & 'Zeit'",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
HELLO = [{"role": "user", "content": '  hi <b>&"there"</b> 🌍 \n'}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>hm</think> eins "},
    {"role": "user", "content": "two"},
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "b": [1]}},
}
CALLING = [
    *TALK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "grau"}'},
    {"role": "assistant", "content": "Grey."},
    {"role": "user", "content": "thanks"},
]
CASES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (HELLO, {}),
    (HELLO, {"tools": TOOLS}),
    (TALK, {}),
    (TALK, {"add_generation_prompt": False}),
    (CALLING, {"tools": TOOLS}),
    (CALLING, {}),
    (HELLO, {"arguments": {"enable_thinking": False, "date_string": "1 Jan 2026"}}),
    ([*TALK, {"role": "assistant", "content": "zwei und"}], {"continue_final_message": True}),
    ([*TALK, {"role": "assistant", "content": "zwei und "}], {"continue_final_message": True}),
]


def model(directory: Path, template: Any = None, **config: Any) -> Path:
    """A model's directory: the tiny tokenizer with another template."""
    directory.mkdir(exist_ok=True)
    shutil.copy(tiny.MODEL_DIR / "tokenizer.json", directory)
    found = json.loads((tiny.MODEL_DIR / "tokenizer_config.json").read_text("utf-8"))
    found.pop("chat_template", None)
    if template is not None:
        found["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps({**found, **config}), "utf-8")
    return directory


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "deepseek"])
def test_prompts_match_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    directory = model(tmp_path / "m", text)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(str(directory))
    for messages, options in CASES:
        rest = {k: v for k, v in options.items() if k != "arguments"}
        continued = rest.get("continue_final_message", False)
        rest["add_generation_prompt"] = rest.get("add_generation_prompt", True) and not continued
        expected = theirs.apply_chat_template(messages, tokenize=False, **rest, **options.get("arguments", {}))
        assert ours.template.render(messages, **options) == expected
        ids = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=False, **rest, **options.get("arguments", {})
        )
        rendered = ours.template.render(messages, **options)
        assert asyncio.run(ours.encode(rendered, add_special_tokens=False)) == ids


def test_tokens_match_transformers() -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(tiny.MODEL_DIR), AutoTokenizer.from_pretrained(str(tiny.MODEL_DIR))
    for text in ("", "Hello wörld 🌍", " two  spaces\n", "<s>", "x" * (THREAD_ABOVE_CHARS + 5)):
        for special in (True, False):
            assert asyncio.run(ours.encode(text, add_special_tokens=special)) == theirs.encode(
                text, add_special_tokens=special
            )
    assert ours.vocabulary_size == len(theirs)
    ids = asyncio.run(ours.encode("Hello there"))
    assert ours.decode(ids) == theirs.decode(ids)


# -- templates without transformers


def render(directory: Path, messages: Any = HELLO, **options: Any) -> str:
    return Tokenizer(directory).template.render(messages, **options)


def test_template_sources(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools | length }}"}]
    directory = model(tmp_path / "m", named)
    assert render(directory) == "plain"
    assert render(directory, tools=TOOLS) == "with 2"
    (directory / "chat_template.jinja").write_text("from the file", "utf-8")
    assert render(directory) == "from the file"
    extra = directory / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools from a file", "utf-8")
    assert render(directory, tools=TOOLS) == "tools from a file"


def test_special_tokens(tmp_path: Path) -> None:
    text = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token }}"
    config = {
        "bos_token": {"content": "<B>", "lstrip": False},
        "eos_token": None,
        "add_bos_token": True,
        "extra_special_tokens": {"image_token": "<I>"},
    }
    directory = model(tmp_path / "m", text, **config)
    (directory / "special_tokens_map.json").write_text('{"pad_token": "<P>"}', "utf-8")
    found = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    found.pop("pad_token", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(found), "utf-8")
    assert render(directory) == "<B><I><P>"


def test_a_model_without_template(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        render(model(tmp_path / "m"))
    assert "/v1/completions" in str(caught.value.hint)


def test_messages_rejected_by_templates(tmp_path: Path) -> None:
    reasons = {
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{{ messages[5].content.upper() }}": "has no element 5",
        "{{ 1 / 0 }}": "division by zero",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    }
    for text, reason in reasons.items():
        with pytest.raises(RequestError, match=reason) as caught:
            render(model(tmp_path / "m", text))
        assert caught.value.param == "messages"
    with pytest.raises(StartError, match="line 2"):
        Tokenizer(model(tmp_path / "m", "ok\n{% if %}"))


def test_arguments_cannot_replace_the_messages(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", "{{ messages | length }} {{ tools }} {{ custom }}")
    arguments = {"messages": [], "tools": ["x"], "custom": "yes"}
    assert render(directory, arguments=arguments) == "1 None yes"


def test_openai_messages_for_templates(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", "{{ messages | tojson }}")

    def given(**message: Any) -> dict[str, Any]:
        (found,) = json.loads(render(directory, [message]))
        return dict(found)

    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert given(role="user", content=parts) == {"role": "user", "content": "a\nb\nc"}
    assert given(role="assistant", content=None, refusal=None, tool_calls=None) == {"role": "assistant", "content": ""}
    assert given(role="developer", content="x")["role"] == "system"
    called = given(role="assistant", content=None, tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}])
    assert called["content"] is None
    assert called["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    for content, param in (
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], "messages.0.content.1"),
        ([{"type": "text"}], "messages.0.content.0.text"),
    ):
        with pytest.raises(RequestError) as caught:
            given(role="user", content=content)
        assert caught.value.param == param
    with pytest.raises(RequestError, match="not JSON"):
        given(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])
    knows = model(tmp_path / "k", "{% if messages[0].role == 'developer' %}developer!{% endif %}")
    assert render(knows, [{"role": "developer", "content": "x"}]) == "developer!"


def test_messages_are_not_modified(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", "{% for m in messages %}{{ m.content }}{% endfor %}")
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": [{"type": "text", "text": "end "}]},
    ]
    before = json.dumps(messages)
    assert render(directory, messages, continue_final_message=True) == "Noneend "
    assert json.dumps(messages) == before
    with pytest.raises(RequestError, match="has no text"):
        render(directory, messages[:1], continue_final_message=True)
    dropping = model(tmp_path / "d", "nothing")
    with pytest.raises(RequestError, match="changes the last message"):
        render(dropping, messages, continue_final_message=True)


# -- files


def test_directories_without_a_tokenizer(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", "x")
    (directory / "tokenizer_config.json").write_text("{", "utf-8")
    with pytest.raises(StartError, match="not JSON"):
        Tokenizer(directory)
    model(directory, "x")
    (directory / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(StartError, match="not a tokenizer"):
        Tokenizer(directory)


OWN_CODE = '''
from transformers import PreTrainedTokenizer


class LetterTokenizer(PreTrainedTokenizer):
    """A token for each letter."""

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
'''


def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "letters.py").write_text(OWN_CODE)
    (model / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "LetterTokenizer", "auto_map": {"AutoTokenizer": ["letters.LetterTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(StartError, match="contains no tokenizer"):
        Tokenizer(model)
    tokenizer = Tokenizer(model, trust_remote_code=True)
    assert asyncio.run(tokenizer.encode("ab", add_special_tokens=False)) == [97, 98]
    assert tokenizer.decode([97, 98]) == "ab"


def test_truncation_saved_for_training_is_ignored(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", "x")
    saved = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    assert len(asyncio.run(Tokenizer(directory).encode("one two three four five six"))) > 3


def test_long_texts_go_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny.MODEL_DIR)
    threads: list[threading.Thread] = []
    encode = tokenizer._encode

    def spy(text: str, special: bool) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, special)

    monkeypatch.setattr(tokenizer, "_encode", spy)
    for size in (THREAD_ABOVE_CHARS, THREAD_ABOVE_CHARS + 1):
        asyncio.run(tokenizer.encode("a" * size))
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


# -- what the Processor makes of it


def prepare(request: ChatRequest | CompletionRequest, length: int = 100) -> Any:
    found = Preprocessor(Tokenizer(tiny.MODEL_DIR), length)
    work = found.chat(request) if isinstance(request, ChatRequest) else found.completion(request)
    return asyncio.run(work)


def test_preprocess_fills_in_the_room() -> None:
    tokens = prepare(CompletionRequest("m", "Hello there", Sampling())).token_ids
    found = prepare(CompletionRequest("m", "Hello there", Sampling(), stream=False))
    assert found.sampling.max_tokens == 100 - len(tokens)
    assert found.final_only
    assert not prepare(ChatRequest("m", HELLO, Sampling(max_tokens=5))).final_only
    assert prepare(CompletionRequest("m", [1, 2, 3], Sampling(max_tokens=5))).token_ids == [1, 2, 3]


def test_preprocess_limits() -> None:
    for request, param in (
        (CompletionRequest("m", [1] * 90, Sampling(max_tokens=11)), "prompt"),
        (CompletionRequest("m", [1] * 100, Sampling()), "prompt"),
        (ChatRequest("m", [{"role": "user", "content": "long " * 200}], Sampling()), "messages"),
    ):
        with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens") as caught:
            prepare(request)
        assert caught.value.param == param
    with pytest.raises(
        ContextLengthError, match=r"you requested 101 tokens \(90 in the prompt, 11 in the completion\)"
    ):
        prepare(CompletionRequest("m", [1] * 90, Sampling(max_tokens=11)))
    assert prepare(CompletionRequest("m", [1] * 90, Sampling(max_tokens=10)))
    for foreign in ([-1], [1, 10**9]):
        with pytest.raises(RequestError, match=f"no token {foreign[-1]}"):
            prepare(CompletionRequest("m", foreign, Sampling()))
    with pytest.raises(RequestError, match="empty"):
        prepare(CompletionRequest("m", [], Sampling()))
