"""The rule of ai-dynamo 0.3's load planner: thresholds on the prefill queue and on the KV cache usage of decode workers.

Pure: samples and counts in, steps out. One step for each kind of worker at a time, prefill first, since a long prefill queue
also fills the decode workers' caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

GRACE_INTERVALS = 3
"""No decode worker is removed for so many intervals after one was added: its cache fills meanwhile."""
TREND_INTERVALS = 3
"""The queue is extrapolated over so many intervals, about the time in which a prefill worker starts."""
WAITING_KV = 0.02
"""KV cache usage that a waiting request is taken to need."""

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class LoadLimits:
    """Thresholds and bounds. `prefill_gpus` and `decode_gpus`: of one worker, counted against `max_gpus`."""

    max_gpus: float = 8
    min_workers: int = 1
    decode_kv_up: float = 0.9
    decode_kv_down: float = 0.5
    prefill_queue_up: float = 5.0
    prefill_queue_down: float = 0.2
    decode_gpus: float = 1
    prefill_gpus: float = 1


class Pace(NamedTuple):
    """Seconds between two decisions and between two readings of the load."""

    decide_s: float
    read_s: float


class Workers(NamedTuple):
    """Numbers of workers. `prefill` is 0 in a graph without prefill workers."""

    prefill: int
    decode: int


class Sample(NamedTuple):
    """One reading. `queue`: prompts that wait for a prefill worker; None: unknown. `kv`: load of each decode worker."""

    queue: float | None
    kv: Sequence[float]


class Step(NamedTuple):
    """One worker more (`change` 1) or less (-1), with the reason in numbers."""

    kind: Kind
    change: Literal[1, -1]
    reason: str


class Decision(NamedTuple):
    """What to do, in this order, and a line that says why, with the numbers."""

    steps: list[Step]
    text: str


def kv_load(usage: float, waiting: float) -> float:
    """Return a decode worker's KV cache usage, 0 to 1, with what its waiting requests will need."""
    return usage + WAITING_KV * waiting


def decide(samples: Sequence[Sample], workers: Workers, limits: LoadLimits, grace: int = 0) -> Decision:
    """Decide on the samples of one interval. `grace`: intervals for which no decode worker may be removed yet."""
    rule = _Rule(workers, limits)
    queue = [sample.queue for sample in samples if sample.queue is not None]
    kv = [usage for sample in samples for usage in sample.kv]
    queue_load = fmean(queue) / workers.prefill if queue and workers.prefill else None
    kv_usage = fmean(kv) if kv else None
    if queue_load is not None:
        rule.consider_less_prefill(queue_load)
    if kv_usage is not None:
        rule.consider_less_decode(kv_usage, grace)
    if queue_load is not None:
        rule.consider_more_prefill(queue_load, queue)
    if kv_usage is not None:
        rule.consider_more_decode(kv_usage)
    facts = [
        "prefill queue unknown" if queue_load is None else f"prefill queue {queue_load:.2f} a worker",
        "KV usage unknown" if kv_usage is None else f"KV usage {kv_usage:.2f}",
        f"{workers.prefill} prefill and {workers.decode} decode workers",
        f"{rule.gpus_before:g} of {limits.max_gpus:g} GPUs",
    ]
    if not workers.prefill:
        del facts[0]
    reasons = [*(f"{step.change:+d} {step.kind} worker ({step.reason})" for step in rule.steps), *rule.refusals]
    return Decision(rule.steps, f"{', '.join(facts)}: {'; '.join(reasons) or 'no change'}")


class _Rule:
    """The steps so far, and the GPUs in use after them."""

    def __init__(self, workers: Workers, limits: LoadLimits) -> None:
        self.workers = workers
        self.limits = limits
        self.gpus = self.gpus_before = workers.prefill * limits.prefill_gpus + workers.decode * limits.decode_gpus
        self.steps: list[Step] = []
        self.refusals: list[str] = []

    def consider_less_prefill(self, load: float) -> None:
        low = self.limits.prefill_queue_down
        if load < low and self.workers.prefill > self.limits.min_workers:
            self._step("prefill", -1, f"queue {load:.2f} < {low:g}", self.limits.prefill_gpus)

    def consider_less_decode(self, usage: float, grace: int) -> None:
        low = self.limits.decode_kv_down
        if usage >= low or self.workers.decode <= self.limits.min_workers:
            return
        if grace > 0:
            self.refusals.append(f"no decode worker removed for {grace} more intervals after the last one added")
        else:
            self._step("decode", -1, f"KV {usage:.2f} < {low:g}", self.limits.decode_gpus)

    def consider_more_prefill(self, load: float, queue: Sequence[float]) -> None:
        high = self.limits.prefill_queue_up
        if load <= high or not self._in_budget("prefill", self.limits.prefill_gpus):
            return
        expected = queue[-1] + (queue[-1] - queue[0]) * TREND_INTERVALS
        if expected > high:
            reason = f"queue {load:.2f} > {high:g}, {expected:g} expected"
            self._step("prefill", 1, reason, self.limits.prefill_gpus)
        else:
            self.refusals.append(f"no prefill worker added: the queue falls, {expected:g} expected")

    def consider_more_decode(self, usage: float) -> None:
        high = self.limits.decode_kv_up
        if usage > high and self._in_budget("decode", self.limits.decode_gpus):
            self._step("decode", 1, f"KV {usage:.2f} > {high:g}", self.limits.decode_gpus)

    def _in_budget(self, kind: Kind, gpus: float) -> bool:
        if self.gpus + gpus <= self.limits.max_gpus:
            return True
        self.refusals.append(f"no {kind} worker added: {self.gpus:g} of {self.limits.max_gpus:g} GPUs in use")
        return False

    def _step(self, kind: Kind, change: Literal[1, -1], reason: str, gpus: float) -> None:
        self.steps.append(Step(kind, change, reason))
        self.gpus += change * gpus
