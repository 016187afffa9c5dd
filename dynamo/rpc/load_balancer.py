"""Which of several instances takes a call, where that depends on the calls that run there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeAlias


class Loaded(Protocol):
    @property
    def in_flight(self) -> int: ...


Ready: TypeAlias = Sequence[tuple[object, Loaded]]


def lighter_of_two(ready: Ready) -> int:
    """Position of the lighter of two random ones; of two that are alike, of either.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing": nearly as even as asking all, and callers
    that do not know of each other do not all run to the same one.
    """
    count = len(ready)
    if count == 1:
        return 0
    first, second = int(random.random() * count), int(random.random() * (count - 1))
    second += second >= first
    return second if ready[second][1].in_flight < ready[first][1].in_flight else first


def lightest(ready: Ready, start: int) -> int:
    """Position of the lightest; of those that are alike, of the first from `start` on, then from the beginning."""
    best, least = start, ready[start][1].in_flight
    for position in (*range(start + 1, len(ready)), *range(start)):
        if not least:
            break
        load = ready[position][1].in_flight
        if load < least:
            best, least = position, load
    return best
