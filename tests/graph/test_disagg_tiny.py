"""graphs.disagg on real vLLM: one engine computes the prompts, another one the answers, word for word."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.graph.test_disagg import remote, settled, total
from tests.graph.test_tiny import FAQ, ask
from tests.served import Served, Start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

FETCHED = "vllm:prompt_tokens_by_source_total"


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Served:
    """Two engines at a time are what a small machine takes."""
    arguments = ("-f", "configs/disagg_tiny.yaml", "--VllmWorker.max-prefill-queue-size=100")
    return serve_graph(*arguments, graph="graphs.disagg:Frontend").ready(120)


def answers(served: Served) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(FAQ, pool.map(lambda question: ask(served, question), FAQ), strict=True))


def test_the_faq_is_answered_word_for_word_from_kv_that_was_computed_elsewhere(served: Served) -> None:
    assert answers(served) == FAQ
    assert remote(served) == len(FAQ)
    assert total(served, "dynamo_disagg_failures_total") == 0
    tokens = total(served, "dynamo_prefill_tokens_total")
    assert tokens == total(served, "dynamo_disagg_remote_prefill_tokens_total") > 0
    assert total(served, FETCHED, service="VllmWorker", source="external_kv_transfer") == tokens
    settled(served)


def test_without_its_prefill_worker_the_answers_are_the_same(served: Served) -> None:
    before = remote(served)
    os.kill(served.pids("--service-name PrefillWorker")[0], signal.SIGKILL)
    assert answers(served) == FAQ
    assert remote(served) - before < len(FAQ)
    settled(served)
