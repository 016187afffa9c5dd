"""The model that ships in the package, without running it: its FAQ, its tokenizer, its template, its files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo.llm.tiny import FAQ_FILE, MODEL_DIR, NAME, faq, words
from dynamo.llm.tiny.lessons import Lessons

TOKENIZER = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer  # three seconds of CPU time

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_faq_is_short_plain_answers() -> None:
    pairs = faq()
    assert 30 <= len(pairs) <= 36
    assert "What is an inference graph?" in pairs
    assert all(question.endswith("?") for question in pairs)
    assert {q: len(a.split()) for q, a in pairs.items() if not 12 <= len(a.split()) <= 40} == {}
    assert len(set(pairs.values())) == len(pairs)
    assert not any("\n" in text for pair in pairs.items() for text in pair)


def test_words_are_one_token_each_or_nearly() -> None:
    assert 200 <= len(words()) <= 500
    assert len(set(words())) == len(words())
    assert sum(len(TOKENIZER.encode(f" {word}").ids) == 1 for word in words()) > 0.85 * len(words())


def test_import_is_cheap() -> None:
    code = "import sys, dynamo.llm.tiny as t; t.faq(); print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_model_was_trained_from_this_faq() -> None:
    origin = json.loads((MODEL_DIR / "trained_from.json").read_text())
    now = hashlib.sha256(FAQ_FILE.read_bytes()).hexdigest()
    assert origin["name"] == NAME
    assert origin["faq_sha256"] == now, "faq.md was edited: run python -m dynamo.llm.tiny.train"


def test_model_is_small_and_can_be_split_in_two() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 10e6
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 8192
    assert config["head_dim"] in (32, 64)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] % 2 == 0, key
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert TOKENIZER.get_vocab_size() == config["vocab_size"]
    end = json.loads((MODEL_DIR / "generation_config.json").read_text())["eos_token_id"]
    assert TOKENIZER.id_to_token(end) == "<|end|>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x7f",
        "Zürich",
        "你好，世界",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "e\u0301 \u202e abc",
        "\ufeff\ufffd",
        "a\r\n\tb  c",
        "𝔘𝔫𝔦",
    ],
)
def test_odd_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_template_renders_every_role(tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>S<|end|><|system|>D<|end|><|user|>ab<|end|>"
        '<|assistant|><tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|end|>'
        "<|tool|>sunny<|end|><|assistant|>"
    )
    assert not tokenizer.apply_chat_template(messages, tokenize=False).endswith("<|assistant|>")


def test_template_and_training_give_the_same_tokens(tokenizer: Any) -> None:
    from dynamo.llm.tiny.train import Encoder

    for document_words in (0, 50):
        messages = Lessons(faq(), words(), seed=3).conversation(document_words, turns=20)
        chat = [{"role": m.role, "content": m.content} for m in messages]
        assert tokenizer.apply_chat_template(chat)["input_ids"] == Encoder(TOKENIZER)(messages)[0]


def test_lessons_are_the_same_for_the_same_seed() -> None:
    def draw() -> list[object]:
        lessons = Lessons(faq(), words(), seed=5)
        return [lessons.conversation(30, turns=10) for _ in range(20)]

    assert draw() == draw()
