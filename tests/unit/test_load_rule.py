"""The rule of the load planner: each threshold, bound and exception, without a process."""

from __future__ import annotations

import pytest

from dynamo.planner.load_rule import Decision, LoadLimits, Sample, Workers, decide, kv_load

LIMITS = LoadLimits()
MIDDLE = 0.7  # KV usage between the thresholds


def after(
    queue: list[float] | None,
    kv: list[list[float]] | float = MIDDLE,
    workers: tuple[int, int] = (2, 2),
    grace: int = 0,
    **limits: float,
) -> Decision:
    """Return the decision on an interval with these readings of the queue and of the decode workers' KV usage."""
    readings: list[float | None] = [*queue] if queue is not None else [None]
    usage = [[kv] for _ in readings] if isinstance(kv, float) else kv
    samples = [Sample(waiting, found) for waiting, found in zip(readings, usage, strict=True)]
    return decide(samples, Workers(*workers), LoadLimits(**limits), grace)  # type: ignore[arg-type]


def steps(decision: Decision) -> list[tuple[str, int]]:
    return [(step.kind, step.change) for step in decision.steps]


def test_the_defaults_are_those_of_0_3() -> None:
    assert (LIMITS.max_gpus, LIMITS.min_workers, LIMITS.decode_gpus, LIMITS.prefill_gpus) == (8, 1, 1, 1)
    assert (LIMITS.decode_kv_up, LIMITS.decode_kv_down) == (0.9, 0.5)
    assert (LIMITS.prefill_queue_up, LIMITS.prefill_queue_down) == (5.0, 0.2)


def test_waiting_requests_count_as_cache_usage() -> None:
    assert kv_load(0.5, 0) == 0.5
    assert kv_load(0.5, 10) == pytest.approx(0.7)


def test_between_the_thresholds_nothing_changes() -> None:
    found = after([2, 3, 4])
    assert steps(found) == []
    assert found.text == (
        "prefill queue 1.50 a worker, KV usage 0.70, 2 prefill and 2 decode workers, 4 of 8 GPUs: no change"
    )


def test_a_long_queue_adds_a_prefill_worker() -> None:
    found = after([12, 14, 16])
    assert steps(found) == [("prefill", 1)]
    assert found.text.endswith("4 of 8 GPUs: +1 prefill worker (queue 7.00 > 5, 28 expected)")


def test_the_queue_is_judged_for_each_worker() -> None:
    assert steps(after([8, 8], workers=(1, 2))) == [("prefill", 1)]
    assert steps(after([8, 8], workers=(2, 2))) == []
    assert steps(after([10, 10], workers=(2, 2))) == []  # not above 5


def test_a_falling_queue_adds_none() -> None:
    found = after([20, 15, 9])  # 9 + 3 * (9 - 20)
    assert steps(found) == []
    assert found.text.endswith(": no prefill worker added: the queue falls, -24 expected")


def test_the_trend_is_judged_by_the_whole_queue() -> None:
    assert steps(after([14, 12])) == [("prefill", 1)]  # 12 - 6 > 5
    assert steps(after([14, 11])) == []  # 11 - 9 < 5


def test_an_empty_queue_removes_a_prefill_worker() -> None:
    found = after([0, 0, 0])
    assert steps(found) == [("prefill", -1)]
    assert "-1 prefill worker (queue 0.00 < 0.2)" in found.text
    assert steps(after([0], workers=(1, 2))) == []  # the least number
    assert steps(after([0], workers=(3, 2), min_workers=3)) == []


def test_full_caches_add_a_decode_worker() -> None:
    assert steps(after([2], [[0.95, 0.93]])) == [("decode", 1)]
    assert steps(after([2], [[1.0, 0.7]])) == []  # the mean of the workers
    assert steps(after([2, 2], [[1.1, 0.9], [0.8, 0.7]])) == []  # and of the readings


def test_empty_caches_remove_a_decode_worker() -> None:
    assert steps(after([2], 0.4)) == [("decode", -1)]
    assert steps(after([2], 0.4, workers=(2, 1))) == []


def test_a_decode_worker_that_was_added_has_time_to_fill() -> None:
    found = after([2], 0.4, grace=2)
    assert steps(found) == []
    assert found.text.endswith(": no decode worker removed for 2 more intervals after the last one added")
    assert steps(after([0], 0.4, grace=2)) == [("prefill", -1)]  # prefill workers have no such time


def test_both_kinds_grow_prefill_first() -> None:
    assert steps(after([20, 20], 0.95)) == [("prefill", 1), ("decode", 1)]


def test_the_budget_is_never_exceeded() -> None:
    assert steps(after([20, 20], 0.95, workers=(4, 4))) == []
    found = after([40, 40], 0.95, workers=(4, 3))
    assert steps(found) == [("prefill", 1)]  # one GPU is left, and prefill is first
    assert found.text.endswith("; no decode worker added: 8 of 8 GPUs in use")
    assert steps(after([20, 20], MIDDLE, workers=(2, 2), prefill_gpus=2, max_gpus=7)) == []
    assert steps(after([20, 20], MIDDLE, workers=(2, 2), prefill_gpus=2, max_gpus=8)) == [("prefill", 1)]
    assert steps(after([2], 0.95, workers=(2, 2), decode_gpus=4, max_gpus=13)) == []


def test_a_gpu_that_is_freed_counts_for_the_budget() -> None:
    assert steps(after([0], 0.95, workers=(4, 4))) == [("prefill", -1), ("decode", 1)]


def test_an_aggregated_graph_has_decode_workers_alone() -> None:
    found = after(None, 0.95, workers=(0, 2))
    assert steps(found) == [("decode", 1)]
    assert found.text.startswith("KV usage 0.95, 0 prefill and 2 decode workers, 2 of 8 GPUs")


def test_what_is_unknown_changes_nothing() -> None:
    assert steps(after(None, 0.95)) == [("decode", 1)]
    found = after([20], [[]])
    assert steps(found) == [("prefill", 1)]
    assert "KV usage unknown" in found.text
    found = after(None, [[]])
    assert steps(found) == []
    assert found.text.startswith("prefill queue unknown, KV usage unknown, ")
