"""graphs.agg_router as its configuration for the CPU has it: two real vLLM engines, whose KV events route the requests.

At the end one of them is killed while it answers, and the FAQ is still answered word for word.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dynamo.llm import tiny
from tests.graph.test_agg_router import agree, complete, metrics
from tests.served import Served, Start

BLOCK = 32

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


FAQ = tiny.faq()


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="d-") as directory:
        env = {**os.environ, "TMPDIR": directory}
        found = serve_graph("-f", "configs/agg_router_tiny.yaml", graph="graphs.agg_router:Frontend", env=env)
        yield found.ready(200)
        assert found.stop() == 0
        assert not [path for path in Path(directory).rglob("*") if path.is_socket()]


def test_requests_go_where_the_engine_has_their_prefix(served: Served) -> None:
    prompts = [[topic, *range(100, 100 + 20 * BLOCK)] for topic in range(50, 56)]
    first = [complete(served, prompt) for prompt in prompts]
    told = agree(served, workers=2)
    assert all(count > 0 for count in told.values()), "both engines have computed something"
    again = [complete(served, [*prompt, 7, 8]) for prompt in prompts]
    assert [answer.cached for answer in again] == [20 * BLOCK] * len(prompts)
    assert [answer.cached for answer in first] == [0] * len(prompts)
    routed = {labels["worker"]: n for labels, n in metrics(served)["dynamo_router_requests_total"]}
    assert sum(routed.values()) == 2 * len(prompts)
    hits = metrics(served)["dynamo_router_worker_hit_rate"]
    assert all(0.3 < rate < 0.6 for _, rate in hits), hits


def test_the_faq_is_answered_word_for_word(served: Served) -> None:
    for question, expected in list(FAQ.items())[:3] * 2:
        answer = served.client().chat.completions.create(
            model="dynamo-tiny", messages=[{"role": "user", "content": question}], max_tokens=300
        )
        assert answer.choices[0].message.content == expected


def test_killing_a_worker_changes_no_answer(served: Served) -> None:
    """Round robin, as graphs.agg has it, so that both workers have some of the questions."""
    worker = served.pids("--service-name VllmWorker --worker-id 1")[0]

    def ask(question: str, begun: threading.Event, **extra: object) -> tuple[str, int]:
        chunks = served.client().chat.completions.create(
            model="dynamo-tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=1500,
            extra_body={"nvext": {"router": "round-robin"}, **extra},
        )
        text, tokens = "", 0
        for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if text:
                begun.set()
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        return text, tokens

    with ThreadPoolExecutor(len(FAQ) + 2) as pool:
        # one long answer on each worker, started but not finished when the worker is killed, even on a busy machine
        long = []
        for _ in range(2):
            begun = threading.Event()
            long.append(pool.submit(ask, next(iter(FAQ)), begun, ignore_eos=True))
            assert begun.wait(60)
        asked = {question: pool.submit(ask, question, begun) for question in FAQ}
        os.kill(worker, signal.SIGKILL)
        answers = {question: one.result() for question, one in asked.items()}
    assert {question: text for question, (text, _) in answers.items()} == FAQ
    assert all(tokens > 3 for _, tokens in answers.values())
    (one, tokens), (other, _) = [each.result() for each in long]
    assert one == other
    assert tokens == 1500
    moved = re.findall(r"^dynamo_migrations_total\{.*\} (\S+)", httpx.get(f"{served.url}/metrics").text, re.MULTILINE)
    assert sum(map(float, moved)) >= 1
