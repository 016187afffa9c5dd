"""The main job on real vLLM: what `make serve` runs, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from dynamo.llm import tiny
from tests.served import Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

FAQ = tiny.faq()
QUESTION = "What is an inference graph?"


def ask(served: Served, question: str, **options: object) -> str:
    answer = served.client().chat.completions.create(
        model="dynamo-tiny",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        **options,  # type: ignore[call-overload]
    )
    assert answer.choices[0].finish_reason == "stop"
    return str(answer.choices[0].message.content)


def test_every_question_of_the_faq_is_answered_word_for_word(tiny_graph: Served) -> None:
    assert len(FAQ) >= 20
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(FAQ, pool.map(lambda question: ask(tiny_graph, question), FAQ), strict=True))
    assert answers == FAQ


def test_a_stream_gives_the_same_text_in_many_chunks(tiny_graph: Served) -> None:
    for _ in range(10):  # a busy machine sends several tokens at a time
        stream = tiny_graph.client().chat.completions.create(
            model="dynamo-tiny",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        texts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        assert "".join(texts) == FAQ[QUESTION]
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert len(texts) <= usage.completion_tokens
        if len(texts) > 20:
            break
    assert len(texts) > 20


def test_the_answer_depends_on_the_whole_context(tiny_graph: Served) -> None:
    def code_word(word: str) -> str:
        messages = [{"role": "system", "content": f"The code word is {word}."}]
        messages += [{"role": "user", "content": "What is the code word?"}]
        answer = tiny_graph.client().chat.completions.create(
            model="dynamo-tiny",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
        )
        return str(answer.choices[0].message.content)

    assert code_word("garlic") == "The code word is garlic."
    assert code_word("dolphin") == "The code word is dolphin."


def test_sampling_parameters_reach_vllm(tiny_graph: Served) -> None:
    client = tiny_graph.client()
    message = [{"role": "user", "content": QUESTION}]

    def complete(**options: object) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model="dynamo-tiny", messages=message, **options)  # type: ignore[call-overload, no-any-return]

    short = complete(max_tokens=5, temperature=0)
    assert (short.choices[0].finish_reason, short.usage and short.usage.completion_tokens) == ("length", 5)
    stopped = complete(stop=["services"], temperature=0)
    assert stopped.choices[0].message.content == FAQ[QUESTION].partition("services")[0]
    assert stopped.choices[0].finish_reason == "stop"
    several = complete(n=3, temperature=1, extra_body={"top_k": 1})
    assert [choice.message.content for choice in several.choices] == [FAQ[QUESTION]] * 3
    seeded = [complete(temperature=1.5, seed=7, max_tokens=20).choices[0].message.content for _ in range(2)]
    assert seeded[0] == seeded[1]
    scored = complete(temperature=0, logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert len(scored.content) == 4
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) >= 2 for entry in scored.content)


def test_structured_output(tiny_graph: Served) -> None:
    answer = ask(tiny_graph, QUESTION, extra_body={"guided_choice": ["red", "green"]})
    assert answer in ("red", "green")


def test_text_completion_continues_the_prompt(tiny_graph: Served) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = tiny_graph.client().chat.completions.create(
        model="dynamo-tiny",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
    )
    template = json.loads((tiny.MODEL_DIR / "tokenizer_config.json").read_text())
    assert "chat_template" in template
    first_words = FAQ[QUESTION][:30]
    completion = tiny_graph.client().completions.create(
        model="dynamo-tiny", prompt=[first_words, first_words], max_tokens=3, temperature=0, echo=True
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert all(choice.text.startswith(first_words) for choice in completion.choices)
    assert chat.usage is not None


def test_prefix_cache_hits_are_reported(tiny_graph: Served) -> None:
    text = "The sky is blue over the harbour today. " * 12 + QUESTION
    counts = []
    for _ in range(2):
        answer = tiny_graph.client().chat.completions.create(
            model="dynamo-tiny", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=4
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        counts.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == 0
    assert counts[1]
    assert counts[1] % 32 == 0


def test_a_bad_request_is_the_clients_fault(tiny_graph: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny_graph, "word " * 9000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(tiny_graph, QUESTION, extra_body={"temperature": 9})


def test_a_client_that_leaves_frees_the_engine(tiny_graph: Served) -> None:
    body = {"model": "dynamo-tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3500}
    with httpx.stream(
        "POST", f"{tiny_graph.url}/v1/chat/completions", json={**body, "stream": True, "ignore_eos": True}
    ) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 5
    while (
        'dynamo_frontend_inflight_requests{model="dynamo-tiny"} 0.0' not in httpx.get(f"{tiny_graph.url}/metrics").text
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(tiny_graph, QUESTION) == FAQ[QUESTION]


def test_a_killed_engine_core_is_replaced_and_nothing_survives_the_supervisor(tiny_graph: Served) -> None:
    """The last of its group: it ends the graph."""
    served = tiny_graph
    (core,) = served.pids("EngineCore")
    before = len(served.output)
    os.kill(core, signal.SIGKILL)
    killed = time.monotonic()
    while httpx.get(f"{served.url}/health").status_code == 200:
        assert time.monotonic() < killed + 3
        time.sleep(0.05)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(served, QUESTION)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]
    served.wait_for("VllmWorker ready again", 90, after=before)
    assert ask(served, QUESTION) == FAQ[QUESTION]
    assert served.pids("EngineCore")
    served.stop(signal.SIGKILL)
