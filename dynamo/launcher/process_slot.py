"""One process of a graph through all its runs, for the supervisor."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from dynamo.errors import DynamoError
from dynamo.launcher.managed_process import ManagedProcess, ProcessSpec
from dynamo.launcher.restart_policy import DeathRecord, RestartPolicy


class ProcessState(NamedTuple):
    """`restarts`: how often it was started again, after its end or an edit. `pid` None: it is not running.

    `leaving`: it is being removed. `progress`: what its start is waiting for.
    """

    spec: ProcessSpec
    ready: bool
    restarts: int
    pid: int | None
    leaving: bool = False
    progress: str = ""


class ProcessSlot:
    """One process of the graph, through all its runs."""

    def __init__(self, spec: ProcessSpec, policy: RestartPolicy, joined: asyncio.Future[None] | None = None) -> None:
        """`joined` is set for a process that is added: its result is the first `ready`, its exception the reason why not."""
        self.spec = spec
        self.joined = joined
        self.deaths = DeathRecord(policy)
        self.process: ManagedProcess | None = None  # the living run, or the last one
        self.runs = 0
        self.leaving = asyncio.Event()
        self.ended = asyncio.Event()  # for good

    @property
    def joining(self) -> bool:
        return self.joined is not None and not self.joined.done()

    def settle(self, error: DynamoError | None = None) -> bool:
        """End the wait of `Supervisor.add` for this process, with an error or without; return False if none waits."""
        if self.joined is None or self.joined.done():
            return False
        if error is None:
            self.joined.set_result(None)
        else:
            self.joined.set_exception(error)
        return True

    @property
    def state(self) -> ProcessState:
        process, restarts, leaving = self.process, max(self.runs - 1, 0), self.leaving.is_set()
        if process is None or not process.alive:
            return ProcessState(self.spec, False, restarts, None, leaving)
        return ProcessState(self.spec, bool(process.ready), restarts, process.pid, leaving, process.progress)


def inserted(slots: dict[str, ProcessSlot], slot: ProcessSlot) -> dict[str, ProcessSlot]:
    """Return the slots with one more, behind the last one of its service: the order in which services are drained."""
    names = list(slots)
    same = [index for index, name in enumerate(names) if slots[name].spec.service == slot.spec.service]
    names.insert(same[-1] + 1 if same else 0, slot.spec.name)
    return {name: slots.get(name, slot) for name in names}


def retrieve_exception(future: asyncio.Future[None]) -> None:
    """Mark a future's exception as seen."""
    if not future.cancelled():
        future.exception()
