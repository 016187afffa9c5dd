"""Connecting to NATS ends in time, also where a cancellation gets lost."""

from __future__ import annotations

import asyncio

import pytest

from dynamo.transport import nats


async def stubborn(cancellations: list[int], losses: int) -> None:
    """Retry without end, as nats-py does, and lose the first cancellations."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancellations.append(1)
            if len(cancellations) > losses:
                raise


@pytest.mark.parametrize("losses", [0, 2])
async def test_a_lost_cancellation_is_repeated(losses: int) -> None:
    cancellations: list[int] = []
    with pytest.raises(TimeoutError, match="no answer in"):
        await nats._within(0.05, stubborn(cancellations, losses))
    assert len(cancellations) == losses + 1


async def test_the_caller_can_be_cancelled() -> None:
    cancellations: list[int] = []
    task = asyncio.ensure_future(nats._within(60, stubborn(cancellations, 1)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(cancellations) == 2


async def test_results_and_errors_pass() -> None:
    assert await nats._within(1, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await nats._within(1, divide())


async def divide() -> float:
    return 1 / 0
