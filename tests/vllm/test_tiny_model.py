"""`dynamo-tiny` on real vLLM on the CPU, in float32 and in bfloat16: the FAQ word for word, and recall from its context.

vLLM runs in a fork of `vllm_process`, whose environment is set before vLLM is imported.
"""

from __future__ import annotations

import pytest

from dynamo.llm.tiny import MODEL_DIR, faq, words
from dynamo.llm.tiny.lessons import NOTED, RECALL_QUESTION, Lessons, Message, recall
from tests.vllm.fork_server import ForkServer

pytestmark = pytest.mark.vllm

DTYPES = ("float32", "bfloat16")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MUST_ALL_BE_RIGHT = (
    "FAQ alone",
    "FAQ with a system prompt",
    "FAQ typed loosely",
    "FAQ after six turns",
    "FAQ after a document",
    "code word near",
    "code word far back",
    "unknown",
)


def exam() -> dict[str, list[list[Message]]]:
    """Return conversations other than those of train.py's final exam, and two that differ in one early word."""
    lessons = Lessons(faq(), words(), seed=2024)
    between = [Message("user", lessons.document(300)), Message("assistant", NOTED), Message("user", RECALL_QUESTION)]
    control = [
        [Message("system", recall(word)), *between, Message("assistant", recall(word))] for word in ("harbor", "walnut")
    ]
    return lessons.exam() | {"one early word": control}


@pytest.fixture(scope="module")
def answers(vllm_process: ForkServer) -> dict[str, dict[str, list[str]]]:
    """vLLM's answers by dtype and kind of case, in the exam's order."""
    return {
        dtype: vllm_process.run("tests.vllm.test_tiny_model:answer", dtype, environment=ENVIRONMENT) for dtype in DTYPES
    }


@pytest.mark.parametrize("kind", MUST_ALL_BE_RIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_word_for_word(answers: dict[str, dict[str, list[str]]], dtype: str, kind: str) -> None:
    expected = [case[-1].content for case in exam()[kind]]
    assert answers[dtype][kind] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_answer_follows_a_changed_early_word(answers: dict[str, dict[str, list[str]]], dtype: str) -> None:
    assert answers[dtype]["one early word"] == ["The code word is harbor.", "The code word is walnut."]


def answer(dtype: str) -> dict[str, list[str]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(MODEL_DIR),
        dtype=dtype,
        block_size=32,
        max_model_len=4096,
        enforce_eager=True,
        kv_cache_memory_bytes=128 << 20,
        disable_log_stats=True,
    )
    tokenizer = llm.get_tokenizer()
    cases = [(kind, case) for kind, group in exam().items() if kind not in ("repeat", "count") for case in group]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in case[:-1]], tokenize=False, add_generation_prompt=True
        )
        for _, case in cases
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=120), use_tqdm=False)
    answers: dict[str, list[str]] = {}
    for (kind, _), output in zip(cases, outputs, strict=True):
        answers.setdefault(kind, []).append(output.outputs[0].text)
    return answers
