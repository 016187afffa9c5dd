"""The supervisor: starts the processes of a graph, watches them, restarts the dead, stops all of them in order.

A process that dies may leave descendants: vLLM's engine core has its own session. As the supervisor is a subreaper
(`guard.py`) they become its children; they are killed before the process starts again (`leftovers.py`).

Linux. Elsewhere leftovers are not found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from dynamo.errors import DynamoError
from dynamo.launcher import guard
from dynamo.launcher.console import Console
from dynamo.launcher.managed_process import Event, ManagedProcess, ProcessSpec
from dynamo.launcher.orphans import Orphans

__all__ = ["Event", "ProcessSpec", "ProcessState", "RestartPolicy", "Supervisor"]

log = logging.getLogger(__name__)

SHOWN_LINES = 15  # of a process's output, when it fails
GRACE_S = 1.0  # between SIGTERM and SIGKILL where nothing has to be drained
FAILED_EXIT_S = 2.0  # a process that reported `failed` is killed if it has not ended by then
ON_EXIT_S = 3.0  # a call of `on_exit` may take this long
SAME_STOP_S = 0.2  # systemd signals the whole cgroup: one SIGTERM comes directly, one through the guard
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RestartPolicy:
    """The wait before a restart doubles from `first_s` to `longest_s`, and starts anew after `stable_s` of life.

    More than `deaths` deaths of one process within `window_s` end the graph.
    """

    first_s: float = 0.2
    longest_s: float = 10.0
    stable_s: float = 60.0
    deaths: int = 5
    window_s: float = 60.0


class ProcessState(NamedTuple):
    """`restarts`: how often it was started again, after its end or an edit. `pid` None: it does not run."""

    spec: ProcessSpec
    ready: bool
    restarts: int
    pid: int | None


class Supervisor:
    """Runs `processes`, given dependencies first and entry service last. `run` may be called once.

    `on_exit` is awaited whenever a process has ended, with the last `ready` event that it wrote ({} if none).
    `also` names coroutines to run beside the graph; one that raises ends the graph; they are cancelled last.
    `changes` yields paths of files that were edited: processes that had reported one in their `ready` event (`files`)
    are drained and started again, and one that cannot start then waits for the next edit instead of giving up.
    `spare` gives the pids of children of this process that others started while `run` runs (embedded servers): without
    it they would be taken for leftovers. Children that exist when `run` is called are spared anyhow.
    `joined` is told when all are ready and none of them has a URL.
    """

    def __init__(
        self,
        processes: Sequence[ProcessSpec],
        *,
        run_dir: Path,
        console: Console,
        on_exit: Callable[[ProcessSpec, Event], Awaitable[None]] | None = None,
        also: Sequence[tuple[str, Callable[[], Awaitable[None]]]] = (),
        spare: Callable[[], Collection[int]] = tuple,
        drain_s: float = 30.0,
        progress_s: float = 5.0,
        restarts: RestartPolicy = RestartPolicy(),
        changes: Callable[[], AsyncIterator[Collection[str]]] | None = None,
        joined: str = "",
    ) -> None:
        self._specs = list(processes)
        self._logs = run_dir / "logs"
        self._console = console
        self._on_exit = on_exit
        self._also = also
        self._spare = spare
        self._drain_s = drain_s
        self._progress_s = progress_s
        self._restarts = restarts
        self._changes = changes
        self._joined = joined
        self._edited = asyncio.Event()
        self._running: dict[str, ManagedProcess] = {}  # by name: the run that lives, or the last one
        self._runs = Counter[str]()  # by name: how many there were
        self._up = False  # all were ready at once, once
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._code = 0
        self._stop_asked_at = 0.0

    async def run(self) -> int:
        """Until the graph ends: 0 stopped by a signal and drained, 130 stopped by force, 1 otherwise.

        No process of the graph is left when this returns or raises.
        """
        self._started_at = time.monotonic()
        self._logs.mkdir(parents=True, exist_ok=True)
        self._leftovers = Orphans(self._living, self._spare)
        guard.set_subreaper()
        self._console.starting([spec.name for spec in self._specs])
        with self._stop_signals():
            try:
                await self._run()
                if self._code == 0:
                    self._console.stopped(time.monotonic() - self._stop_asked_at)
            finally:
                for child in self._running.values():
                    child.close()
                self._leftovers.sweep()
                self._console.flush()
        return self._code

    def processes(self) -> list[ProcessState]:
        """All of them, as they are now."""
        found = []
        for spec in self._specs:
            child = self._running.get(spec.name)
            restarts, ready, pid = max(self._runs[spec.name] - 1, 0), False, None
            if child is not None and child.lives:
                ready, pid = bool(child.ready), child.pid
            found.append(ProcessState(spec, ready, restarts, pid))
        return found

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            watches = [self._tasks.create_task(self._watch(name, start)) for name, start in self._also]
            if self._changes is not None:
                watches.append(self._tasks.create_task(self._watch("reload", self._follow_changes)))
            ticking = self._tasks.create_task(self._tick())
            self._farewells: set[asyncio.Task[None]] = set()
            async with asyncio.TaskGroup() as keepers:
                for spec in self._specs:
                    keepers.create_task(self._keep(spec))
                await self._stopping.wait()
                await self._stop()
            while self._farewells and not self._forced.is_set():
                await asyncio.wait(self._farewells)
            for task in (ticking, *self._farewells, *watches):
                task.cancel()

    # -- one process

    async def _keep(self, spec: ProcessSpec) -> None:
        """Start the process, and again each time it dies, until the graph stops."""
        delay_s, deaths = self._restarts.first_s, deque[float]()
        while not self._stopping.is_set():
            try:
                child = ManagedProcess(spec, self._logs / f"{spec.name}.log", self._console, self._on_event)
            except OSError as error:
                self._fail(f"{spec.name} could not start", str(error))
                return
            self._running[spec.name] = child
            self._runs[spec.name] += 1
            try:
                await child.ended()
                self._say_farewell(child)
                await self._leftovers.kill()
            finally:
                child.close()
            if self._stopping.is_set():
                return
            if not self._up:
                self._fail_child(child, f"{spec.name} could not start")
                return
            if child.reloading:
                continue
            if self._changes is not None and not child.ready:
                self._console.failed(spec.name, child.error or child.how_it_ended(), "edit a file to try again")
                await self._next_edit()
                continue
            now = time.monotonic()
            deaths.append(now)
            while now - deaths[0] > self._restarts.window_s:
                deaths.popleft()
            if len(deaths) > self._restarts.deaths:
                what = f"{spec.name} died {len(deaths)} times in {self._restarts.window_s:.0f} s: giving up"
                self._fail_child(child, what, drain=True)
                return
            if now - child.started_at >= self._restarts.stable_s:
                delay_s = self._restarts.first_s
            self._console.restarting(spec.name, child.how_it_ended(), child.error, delay_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            delay_s = min(2 * delay_s, self._restarts.longest_s)

    async def _follow_changes(self) -> None:
        assert self._changes is not None
        async for paths in self._changes():
            self._edited.set()
            self._edited = asyncio.Event()
            for child in self._living():
                mine = sorted(set(paths) & set(child.ready.get("files") or ()))
                if mine and not self._stopping.is_set():
                    self._console.say(f"{os.path.relpath(mine[0])} changed: restarting {child.spec.name}")
                    child.reloading = True
                    child.signal(signal.SIGTERM)

    async def _next_edit(self) -> None:
        edited = asyncio.ensure_future(self._edited.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({edited, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            edited.cancel()
            stopping.cancel()

    def _on_event(self, child: ManagedProcess, event: Event) -> None:
        match event.get("event"):
            case "progress":
                child.progress = str(event.get("text") or "")
            case "ready":
                first, child.ready = not child.ready, event  # a later one may bring a new lease
                if first and not self._stopping.is_set():
                    detail = str(event.get("text") or "")
                    self._console.process_ready(child.spec.name, child.age_s(), detail, again=self._up)
                    self._come_up()
            case "failed":
                child.error, child.hint = str(event.get("error") or "failed"), str(event.get("hint") or "")
                if self._up or self._stopping.is_set():
                    asyncio.get_running_loop().call_later(FAILED_EXIT_S, child.signal, signal.SIGKILL)
                else:
                    self._fail_child(child, f"{child.spec.name} could not start")

    def _come_up(self) -> None:
        children = [self._running.get(spec.name) for spec in self._specs]
        if not self._up and all(child is not None and child.ready for child in children):
            self._up = True
            urls = [str(child.ready["url"]) for child in children if child is not None and child.ready.get("url")]
            self._console.serving(time.monotonic() - self._started_at, urls[-1] if urls else self._joined)

    def _say_farewell(self, child: ManagedProcess) -> None:
        """Call `on_exit` beside everything else: a restart does not wait for it."""
        if self._on_exit is not None:
            task = self._tasks.create_task(self._call_on_exit(self._on_exit, child))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    async def _call_on_exit(
        self, on_exit: Callable[[ProcessSpec, Event], Awaitable[None]], child: ManagedProcess
    ) -> None:
        try:
            async with asyncio.timeout(ON_EXIT_S):
                await on_exit(child.spec, child.ready)
        except Exception as error:
            log.warning("after the end of %s: %s", child.spec.name, str(error) or type(error).__name__)

    # -- the end of the graph

    def _fail(self, what: str, fact: str, hint: str = "", lines: Sequence[str] = (), log_path: str = "") -> None:
        """End the graph with exit code 1. Only the first failure is told: those after it mostly follow from it."""
        if not self._stopping.is_set():
            self._console.failed(what, fact, hint, lines, log_path)
            self._code = 1
            self._stopping.set()

    def _fail_child(self, child: ManagedProcess, what: str, *, drain: bool = False) -> None:
        if not drain:
            self._forced.set()
        if child.error:
            self._fail(what, child.error, child.hint)
        else:
            hint = "look for an out-of-memory kill in dmesg" if child.exit_code == -signal.SIGKILL else ""
            self._fail(what, child.how_it_ended(), hint, list(child.tail)[-SHOWN_LINES:], str(child.log_path))

    def _on_signal(self, signum: int) -> None:
        now = time.monotonic()
        if guard.guard_is_gone():
            guard.stop_hard()
        if not self._stopping.is_set():
            self._stop_asked_at = now
            self._console.draining()
            self._stopping.set()
        elif not self._forced.is_set() and (signum == signal.SIGINT or now - self._stop_asked_at > SAME_STOP_S):
            self._console.forcing()
            self._code = self._code or 130
            self._forced.set()

    async def _stop(self) -> None:
        """Drain, unless or until it is forced, at most `drain_s`; then end what is left."""
        drain = self._tasks.create_task(self._drain())
        forced = self._tasks.create_task(self._forced.wait())
        await asyncio.wait({drain, forced}, timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        late = self._living()
        for task in (drain, forced):
            task.cancel()
        if late and not self._forced.is_set():
            names = ", ".join(child.spec.name for child in late)
            self._console.failed(names, f"still running {self._drain_s:g} s after the signal to stop: killed")
            self._code = 1
            for child in late:
                if child.told_to_stop:
                    child.signal(signal.SIGKILL)
        await self._end(self._living())

    async def _drain(self) -> None:
        """SIGTERM to the entry first, so that it finishes its streams while all below it lives; then the next service.

        What is not ready yet has nothing to finish.
        """
        loading = [child for child in self._living() if not child.ready]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._end(loading))
            for _, group in groupby(reversed(self._living()), lambda child: child.spec.service):
                service = [child for child in group if child.ready]
                for child in service:
                    child.told_to_stop = True
                    child.signal(signal.SIGTERM)
                for child in service:
                    await child.ended()

    async def _end(self, children: Sequence[ManagedProcess]) -> None:
        """SIGTERM, then SIGKILL."""
        for child in children:
            child.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                for child in children:
                    await child.ended()
        for child in children:
            child.signal(signal.SIGKILL)
        for child in children:
            await child.ended()

    def _living(self) -> list[ManagedProcess]:
        found = (self._running.get(spec.name) for spec in self._specs)
        return [child for child in found if child is not None and child.lives]

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {sig: signal.getsignal(sig) for sig in _STOP_SIGNALS}
        mine = [sig for sig in before if sig != signal.SIGHUP or before[sig] != signal.SIG_IGN]  # nohup stays nohup
        for sig in mine:
            loop.add_signal_handler(sig, self._on_signal, sig)
        if guard.guard_is_gone():  # and its signal came before
            guard.stop_hard()
        try:
            yield
        finally:
            for sig in mine:
                loop.remove_signal_handler(sig)
                signal.signal(sig, before[sig])

    # -- what runs beside

    async def _watch(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        try:
            await start()
        except DynamoError as error:
            self._fail(name, error.message, error.hint or "")
        except Exception as error:
            log.exception("%s failed", name)
            self._fail(name, str(error) or type(error).__name__)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._progress_s)
            self._leftovers.find()  # reaps daemons that ended
            for child in self._living():
                if not child.ready and not self._stopping.is_set():
                    self._console.progress(child.spec.name, child.progress, child.age_s())
