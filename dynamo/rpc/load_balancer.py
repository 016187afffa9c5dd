"""Load balancing: choose the instance for a call by the number of calls that run on each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeAlias


class Loaded(Protocol):
    """Something with a number of running calls."""

    @property
    def in_flight(self) -> int: ...


Ready: TypeAlias = Sequence[tuple[object, Loaded]]


def lighter_of_two(ready: Ready) -> int:
    """Return the position of the less loaded of two random instances; either of them if they are equal.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing": nearly as even as comparing all, and clients
    that do not know of each other do not all choose the same one.
    """
    count = len(ready)
    if count == 1:
        return 0
    first = int(random.random() * count)
    second = int(random.random() * (count - 1))
    if second >= first:  # two different ones, each pair as likely
        second += 1
    return second if ready[second][1].in_flight < ready[first][1].in_flight else first


def lightest(ready: Ready, start: int) -> int:
    """Return the position of the least loaded instance; of equal ones, the first at or after `start`, wrapping around."""
    best = start
    least = ready[start][1].in_flight
    for position in (*range(start + 1, len(ready)), *range(start)):
        if not least:
            break
        load = ready[position][1].in_flight
        if load < least:
            best = position
            least = load
    return best
