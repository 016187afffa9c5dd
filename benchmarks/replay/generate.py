"""Generated traces, reproducible by their seed, in four shapes that differ in what requests share."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.replay.trace import MOONCAKE_BLOCK, Request

SPREAD = 0.5  # sigma of the lengths' log-normal distribution
SHORT_GAPS, SHORT = 0.8, 0.2  # an agent's steps: 80 % of its gaps have 0.2 of the mean gap, so calls come in bursts


@dataclass(frozen=True)
class Shape:
    """Parameters of a trace. Lengths are in tokens; lengths that vary are means.

    `sessions` are active at any time, and a new one replaces each that ends, so a session's turns are sessions / rate
    seconds apart: the time to answer, read and think.
    """

    requests: int = 1000
    rate: float = 8.0
    """requests a second, over the whole trace"""
    sessions: int = 64
    """active at a time; `documents`: how many documents there are"""
    turns: int = 8
    """of a session"""
    shared_tokens: int = 512
    """the system prompt of all sessions, in whole blocks; of `documents` a document, each of its own length"""
    task_tokens: int = 0
    """further text that a session begins with"""
    new_tokens: int = 150
    """text of the user or of a tool in each turn"""
    output_tokens: int = 150
    context_tokens: int = 8192
    """limit of prompt and answer together: a session ends before, a document is cut"""
    zipf: float = 1.0
    """the n-th most popular document is requested in proportion to n ** -zipf"""
    block: int = MOONCAKE_BLOCK
    seed: int = 0

    @property
    def gap_s(self) -> float:
        return self.sessions / self.rate


DEFAULTS: dict[str, Shape] = {
    "conversation": Shape(),
    "agent": Shape(sessions=24, turns=24, shared_tokens=3072, task_tokens=1024, new_tokens=120, output_tokens=60),
    "documents": Shape(sessions=24, shared_tokens=5120, new_tokens=60, output_tokens=120),
    "independent": Shape(new_tokens=1500),
}


class _Ids:
    """Hash ids in the order in which blocks appear; a block is identified by its text and its place there."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._numbers: dict[tuple[int, int], int] = {}

    def of(self, text: int, tokens: int, start: int = 0) -> list[int]:
        """Return the blocks from `start` on of the first `tokens` tokens of `text`."""
        keys = ((text, at) for at in range(start, -(-tokens // self._block)))
        return [self._numbers.setdefault(key, len(self._numbers)) for key in keys]


def generate(kind: str, shape: Shape) -> Iterator[Request]:
    """Yield `shape.requests` requests in time order, the first at 0. `kind` is one of DEFAULTS."""
    made = {"conversation": _sessions, "agent": _sessions, "documents": _documents, "independent": _independent}[kind]
    steady: Callable[[random.Random, float], float] = lambda rng, mean_s: rng.expovariate(1 / mean_s)  # noqa: E731
    arrivals = made(shape, random.Random(f"{kind} {shape.seed}"), _bursts if kind == "agent" else steady)
    first_s = 0.0
    for number, (at_s, request) in enumerate(itertools.islice(arrivals, shape.requests)):
        first_s = first_s if number else at_s
        yield Request(round((at_s - first_s) * 1e3), request.input_length, request.output_length, request.hash_ids)


def _bursts(rng: random.Random, mean_s: float) -> float:
    long = (1 - SHORT_GAPS * SHORT) / (1 - SHORT_GAPS)
    return rng.expovariate(1 / (mean_s * (SHORT if rng.random() < SHORT_GAPS else long)))


def _length(rng: random.Random, mean: float) -> int:
    """Draw a length, log-normal around `mean`, from 1 to 8 times the mean."""
    drawn = rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD) if mean else 0
    return max(1, round(min(drawn, 8 * mean)))


def _whole_blocks(tokens: float, block: int) -> int:
    return max(round(tokens / block), 1) * block if tokens else 0


def _sessions(
    shape: Shape, rng: random.Random, gap: Callable[[random.Random, float], float]
) -> Iterator[tuple[float, Request]]:
    """Yield requests of sessions: each prompt is the one before with its answer and new text.

    All begin with the shared text, number 0.
    """
    ids = _Ids(shape.block)
    texts = itertools.count(1)
    shared = min(
        _whole_blocks(shape.shared_tokens, shape.block), shape.context_tokens // 2 // shape.block * shape.block
    )

    def begin() -> tuple[int, int, int]:
        """Return a new session: text, its length so far, turns left."""
        task = _length(rng, shape.task_tokens) if shape.task_tokens else 0
        return next(texts), shared + task, max(1, round(rng.expovariate(1 / shape.turns)))

    active = [(rng.expovariate(1 / shape.gap_s), *begin()) for _ in range(shape.sessions)]
    heapq.heapify(active)
    while True:
        at_s, text, tokens, turns = active[0]
        prompt = min(tokens + _length(rng, shape.new_tokens), shape.context_tokens - 1)
        output = min(_length(rng, shape.output_tokens), shape.context_tokens - prompt)
        hash_ids = ids.of(0, min(shared, prompt)) + ids.of(text, prompt, shared // shape.block)
        yield at_s, Request(at_s, prompt, output, hash_ids)
        tokens = prompt + output
        if turns == 1 or tokens + shape.new_tokens + shape.output_tokens > shape.context_tokens:
            text, tokens, turns = begin()
        else:
            turns -= 1
        heapq.heapreplace(active, (at_s + gap(rng, shape.gap_s), text, tokens, turns))


def _documents(
    shape: Shape, rng: random.Random, gap: Callable[[random.Random, float], float]
) -> Iterator[tuple[float, Request]]:
    """Yield requests of a document and a new question. The n-th most popular document is text n, in whole blocks."""
    ids = _Ids(shape.block)
    room = (shape.context_tokens // 4 * 3) // shape.block * shape.block or shape.block
    lengths = [min(_whole_blocks(_length(rng, shape.shared_tokens), shape.block), room) for _ in range(shape.sessions)]
    chosen = list(itertools.accumulate(rank**-shape.zipf for rank in range(1, shape.sessions + 1)))
    at_s = 0.0
    for question in itertools.count(shape.sessions):
        [document] = rng.choices(range(shape.sessions), cum_weights=chosen)
        prompt = min(lengths[document] + _length(rng, shape.new_tokens), shape.context_tokens - 1)
        output = min(_length(rng, shape.output_tokens), shape.context_tokens - prompt)
        hash_ids = ids.of(document, lengths[document])
        yield at_s, Request(at_s, prompt, output, hash_ids + ids.of(question, prompt, len(hash_ids)))
        at_s += gap(rng, 1 / shape.rate)


def _independent(
    shape: Shape, rng: random.Random, gap: Callable[[random.Random, float], float]
) -> Iterator[tuple[float, Request]]:
    ids = _Ids(shape.block)
    at_s = 0.0
    for text in itertools.count():
        prompt = min(_length(rng, shape.new_tokens), shape.context_tokens - 1)
        output = min(_length(rng, shape.output_tokens), shape.context_tokens - prompt)
        yield at_s, Request(at_s, prompt, output, ids.of(text, prompt))
        at_s += gap(rng, 1 / shape.rate)
