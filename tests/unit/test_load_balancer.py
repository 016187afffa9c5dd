"""Laws of load balancing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from dynamo.rpc.load_balancer import Ready, lighter_of_two, lightest

loads = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def ready(counts: list[int]) -> Ready:
    return [(number, SimpleNamespace(in_flight=count)) for number, count in enumerate(counts)]


@given(loads, st.data())
def test_the_first_least_loaded_instance_from_the_start_is_chosen(counts: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(counts) - 1))
    chosen = lightest(ready(counts), start)
    assert counts[chosen] == min(counts)
    between = [counts[(start + step) % len(counts)] for step in range((chosen - start) % len(counts))]
    assert all(count > min(counts) for count in between)


@given(loads, st.integers(1, 4))
def test_idle_instances_take_turns(counts: list[int], rounds: int) -> None:
    """Calls that end before the next one begins go to the least loaded in turn."""
    least = [position for position, count in enumerate(counts) if count == min(counts)]
    turn, chosen = 0, []
    for _ in range(rounds * len(least)):
        turn = lightest(ready(counts), turn % len(counts))
        chosen.append(turn)
        turn += 1
    assert Counter(chosen) == dict.fromkeys(least, rounds)


@given(loads, st.integers(0, 100))
def test_calls_that_do_not_end_even_out_the_loads(counts: list[int], more: int) -> None:
    counts = list(counts)
    enough = max(counts) * len(counts) - sum(counts) + more
    for turn in range(enough):
        counts[lightest(ready(counts), turn % len(counts))] += 1
    assert max(counts) - min(counts) <= 1


@given(loads)
def test_one_of_two_is_never_the_heaviest_alone(counts: list[int]) -> None:
    chosen = lighter_of_two(ready(counts))
    assert 0 <= chosen < len(counts)
    assert len(counts) == 1 or counts[chosen] < max(counts) or counts.count(max(counts)) > 1


def test_one_of_two_draws_all_and_breaks_ties_at_random() -> None:
    drawn = Counter(lighter_of_two(ready([1, 1, 1])) for _ in range(900))
    assert set(drawn) == {0, 1, 2}
    assert max(drawn.values()) < 450
    # of three, the one with load is drawn in two of three pairs, and loses both times
    assert Counter(lighter_of_two(ready([0, 9, 0])) for _ in range(300)).keys() == {0, 2}
