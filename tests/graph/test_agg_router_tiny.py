"""graphs.agg_router as its configuration for the CPU has it: two real vLLM engines, whose KV events route the requests."""

from __future__ import annotations

import pytest

from dynamo.llm import tiny
from tests.graph.test_agg_router import agree, complete, metrics
from tests.served import Served, Start

BLOCK = 32

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Served:
    return serve_graph("-f", "configs/agg_router_tiny.yaml", graph="graphs.agg_router:Frontend").ready(200)


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
    for question, expected in list(tiny.faq().items())[:3] * 2:
        answer = served.client().chat.completions.create(
            model="dynamo-tiny", messages=[{"role": "user", "content": question}], max_tokens=300
        )
        assert answer.choices[0].message.content == expected
