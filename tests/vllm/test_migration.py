"""Migration between two real vLLM workers: one is killed while it answers, and the FAQ is still answered word for word."""

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
from tests.served import Served, Start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

FAQ = tiny.faq()


@pytest.fixture
def served(serve_graph: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="d-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        found = serve_graph("-f", "configs/agg_tiny.yaml", "--VllmWorker.ServiceArgs.workers=2").ready(150)
        yield found
        assert found.stop() == 0
        assert not [path for path in Path(directory).rglob("*") if path.is_socket()]


def test_killing_a_worker_changes_no_answer(served: Served) -> None:
    worker = served.pids("--service-name VllmWorker --worker-id 1")[0]

    def ask(question: str, begun: threading.Event, **extra: object) -> tuple[str, int]:
        chunks = served.client().chat.completions.create(
            model="dynamo-tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=1500,
            extra_body=extra,
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
