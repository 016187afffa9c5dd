"""The supervisor: starts the processes of a graph, watches them, restarts those that die, stops all of them in order.

Processes may be added and removed while the graph runs.

A process that dies may leave descendants: vLLM's engine core has its own session. As the supervisor is a subreaper
(`guard.py`) they become its children; they are killed before the process starts again (`orphans.py`).

Linux. Elsewhere orphans are not found.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path

from dynamo import prctl
from dynamo.errors import DynamoError, StartError, UnavailableError
from dynamo.launcher.console import Console
from dynamo.launcher.managed_process import Event, ManagedProcess, ProcessSpec, end_processes
from dynamo.launcher.orphans import Orphans
from dynamo.launcher.process_slot import ProcessSlot, ProcessState, inserted, retrieve_exception
from dynamo.launcher.restart_policy import RestartPolicy
from dynamo.launcher.stop_signals import stop_signals
from dynamo.tasks import TaskSet

__all__ = ["Event", "ProcessSpec", "RestartPolicy", "Supervisor"]

log = logging.getLogger(__name__)

SHOWN_LINES = 15  # of a process's output, when it fails
FAILED_EXIT_S = 2.0  # a process that reported `failed` is killed if it has not ended by then
ON_EXIT_S = 3.0  # a call of `on_exit` may take this long
SAME_STOP_S = 0.2  # systemd signals the whole cgroup: one SIGTERM comes directly, one through the guard


class Supervisor:
    """Runs `processes`, given dependencies first and entry service last. `run` may be called once.

    `on_exit` is awaited whenever a process has ended, with its last `ready` event ({} if it wrote none).
    `other_pids` returns the pids of children of this process that other code starts while `run` runs (embedded
    servers), so that they are not taken for orphans. Children that exist when `run` is called never are.
    `reload`: a process that cannot start again after an edit waits for the next edit instead of ending the graph; see
    `restart_edited`. `ready_text` is shown when all are ready and none of them has a URL, `reach_text` after the URL.
    """

    def __init__(
        self,
        processes: Sequence[ProcessSpec],
        *,
        run_dir: Path,
        console: Console,
        on_exit: Callable[[ProcessSpec, Event], Awaitable[None]] | None = None,
        other_pids: Callable[[], Collection[int]] = tuple,
        drain_s: float = 30.0,
        progress_s: float = 5.0,
        restarts: RestartPolicy = RestartPolicy(),
        reload: bool = False,
        ready_text: str = "",
        reach_text: str = "",
    ) -> None:
        self._slots = {spec.name: ProcessSlot(spec, restarts) for spec in processes}
        self._logs = run_dir / "logs"
        self._console = console
        self._on_exit = on_exit
        self._other_pids = other_pids
        self._drain_s = drain_s
        self._progress_s = progress_s
        self._restarts = restarts
        self._reload = reload
        self._ready_text = ready_text
        self._reach_text = reach_text
        self._beside: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self._exit_hooks = TaskSet("supervisor")
        self._edited = asyncio.Event()  # replaced at each edit
        self._up = False  # all were ready at the same time once
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._code = 0
        self._stop_requested_at = 0.0

    def run_beside(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work()` beside the processes during `run`, and cancel it last. An exception that leaves it ends the graph.

        Call this before `run`.
        """
        self._beside.append((name, work))

    async def run(self) -> int:
        """Run the graph until it ends: 0 stopped by a signal and drained, 130 stopped by force, 1 otherwise.

        No process of the graph is left when this returns or raises.
        """
        self._started_at = time.monotonic()
        self._logs.mkdir(parents=True, exist_ok=True)
        self._orphans = Orphans(self._living, self._other_pids)
        prctl.set_subreaper()
        self._console.starting(list(self._slots))
        with stop_signals(self._on_stop_signal):
            try:
                await self._run()
                if self._code == 0:
                    self._console.stopped(time.monotonic() - self._stop_requested_at)
            finally:
                for slot in self._slots.values():
                    if slot.process is not None:
                        slot.process.close()
                self._orphans.kill_now()
                self._console.flush()
        return self._code

    def processes(self) -> list[ProcessState]:
        """Return the current state of all processes, dependencies first and those of a service together."""
        return [slot.state for slot in self._slots.values()]

    async def add(self, spec: ProcessSpec) -> None:
        """Start one more process, whose name is not in use, and return when it is ready. From then on it is as the others.

        Raises StartError if it fails or ends before: it is not tried again. Raises UnavailableError while the graph starts
        or stops. When the caller is cancelled, the process stays.
        """
        self._check_running()
        joined = asyncio.get_running_loop().create_future()
        joined.add_done_callback(retrieve_exception)  # the caller may be cancelled
        slot = ProcessSlot(spec, self._restarts, joined)
        self._slots = inserted(self._slots, slot)
        self._console.print(f"adding {spec.name}", process=spec.name)
        self._processes.create_task(self._keep_running(slot))
        await asyncio.shield(joined)

    async def remove(self, name: str) -> None:
        """Drain a process and end it for good; return when it has ended. A second call for it waits for the same end.

        It is killed if it has not ended `drain_s` after the signal. Raises UnavailableError while the graph starts or stops.
        When the caller is cancelled, the process is removed nevertheless.
        """
        self._check_running()
        slot = self._slots[name]
        if not slot.leaving.is_set():
            slot.leaving.set()
            self._console.print(f"removing {name}: draining", process=name)
            self._tasks.create_task(self._end_slot(slot))
        await slot.ended.wait()

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the graph is stopping")
        if not self._up:
            raise UnavailableError("the graph is still starting", hint="try again when it is ready")

    def restart_edited(self, paths: Collection[str]) -> None:
        """Drain and restart the processes that run one of these source files, by the `files` of their `ready` event."""
        self._edited.set()
        self._edited = asyncio.Event()
        for process in self._living():
            edited = sorted(set(paths) & set(process.ready.get("files") or ()))
            if edited and not self._stopping.is_set():
                self._console.print(f"{os.path.relpath(edited[0])} changed: restarting {process.spec.name}")
                process.reloading = True
                process.signal(signal.SIGTERM)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                beside = [self._tasks.create_task(self._run_task(name, work)) for name, work in self._beside]
                beside.append(self._tasks.create_task(self._report_progress()))
                async with asyncio.TaskGroup() as self._processes:
                    for slot in self._slots.values():
                        self._processes.create_task(self._keep_running(slot))
                    await self._stopping.wait()
                    await self._stop()
                while self._exit_hooks and not self._forced.is_set():
                    await self._exit_hooks.wait()
                for task in beside:
                    task.cancel()
        finally:
            await self._exit_hooks.aclose()

    # -- one process

    async def _keep_running(self, slot: ProcessSlot) -> None:
        """Run the process, and run it again each time it ends, until the graph stops or the process is removed."""
        try:
            while not self._stopping.is_set() and not slot.leaving.is_set():
                process = await self._run_once(slot)
                if process is None or self._stopping.is_set() or not await self._wait_for_restart(slot, process):
                    break
        finally:
            self._close_slot(slot)

    def _close_slot(self, slot: ProcessSlot) -> None:
        """Forget a process that was removed, or added in vain."""
        name = slot.spec.name
        what = "was removed" if slot.leaving.is_set() else "ended: the graph is stopping"
        slot.settle(UnavailableError(f"{name} {what}"))
        failed = slot.joined is not None and slot.joined.exception() is not None
        if slot.leaving.is_set() or failed:
            del self._slots[name]
            if not failed and not self._stopping.is_set():
                self._console.print(f"{name} removed", process=name)
        slot.ended.set()

    async def _run_once(self, slot: ProcessSlot) -> ManagedProcess | None:
        """Start the process and wait until it and its orphans have ended; None if it could not be started."""
        spec = slot.spec
        try:
            process = ManagedProcess(spec, self._logs / f"{spec.name}.log", self._console, self._on_event)
        except OSError as error:
            what = f"{spec.name} could not start"
            if slot.settle(StartError(f"{what}: {error}")):
                self._console.failed(what, str(error))
            else:
                self._fail(what, str(error))
            return None
        slot.process = process
        slot.runs += 1
        try:
            await process.wait()
            if self._on_exit is not None:  # in the background: a restart does not wait for it
                self._exit_hooks.spawn(self._call_on_exit(self._on_exit, process), name=f"end of {spec.name}")
            await self._orphans.kill()
        finally:
            process.close()
        return process

    async def _wait_for_restart(self, slot: ProcessSlot, process: ManagedProcess) -> bool:
        """Wait until a process that has ended may start again; False if it or the graph ends instead."""
        name = process.spec.name
        if slot.leaving.is_set():
            return False
        if slot.joining:
            slot.settle(self._join_error(process))
            return False
        if not self._up:
            self._fail_process(process, f"{name} could not start")
            return False
        if process.reloading:
            return True
        if self._reload and not process.ready:
            self._console.failed(name, process.error or process.exit_reason(), "edit a file to try again")
            await self._pause(slot, None, self._edited)
            return True
        delay_s = slot.deaths.add(time.monotonic(), process.age_s())
        if delay_s is None:
            what = f"{name} died {slot.deaths.count} times in {self._restarts.window_s:.0f} s: giving up"
            self._fail_process(process, what, drain=True)
            return False
        self._console.restarting(name, process.exit_reason(), process.error, delay_s)
        await self._pause(slot, delay_s)
        return True

    def _join_error(self, process: ManagedProcess) -> StartError:
        """Return why a process that was added did not become ready, and show it on the console."""
        name, fact, hint = process.spec.name, process.error or process.exit_reason(), process.hint
        lines = () if process.error else list(process.tail)[-SHOWN_LINES:]
        self._console.failed(f"{name} could not start", fact, hint, lines, str(process.log_path))
        return StartError(f"{name} could not start: {fact}", hint=hint or f"look into {process.log_path}")

    async def _pause(self, slot: ProcessSlot, timeout_s: float | None, *events: asyncio.Event) -> None:
        """Wait for one of `events`, the removal of the process, or the end of the graph; at most `timeout_s`."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stopping, slot.leaving, *events)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _end_slot(self, slot: ProcessSlot) -> None:
        """Drain a process that is removed, or kill it where it has nothing to finish or does not end in time."""
        process = slot.process
        if process is None or not process.alive:
            return
        if not process.ready:
            await end_processes([process])
            return
        process.draining = True
        process.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_s):
                await process.wait()
        except TimeoutError:
            fact = f"still running {self._drain_s:g} s after the signal to stop: killed"
            self._console.failed(slot.spec.name, fact)
            process.signal(signal.SIGKILL)

    def _on_event(self, process: ManagedProcess, event: Event) -> None:
        match event.get("event"):
            case "progress":
                process.progress = str(event.get("text") or "")
            case "ready":
                first = not process.ready  # a later event may bring a new lease
                process.ready = event
                if first and not self._stopping.is_set():
                    slot = self._slots[process.spec.name]
                    detail = str(event.get("text") or "")
                    self._console.process_ready(process.spec.name, process.age_s(), detail, again=slot.runs > 1)
                    slot.settle()
                    self._check_all_ready()
            case "failed":
                process.error = str(event.get("error") or "failed")
                process.hint = str(event.get("hint") or "")
                if self._up or self._stopping.is_set():
                    asyncio.get_running_loop().call_later(FAILED_EXIT_S, process.signal, signal.SIGKILL)
                else:
                    self._fail_process(process, f"{process.spec.name} could not start")

    def _check_all_ready(self) -> None:
        processes = [slot.process for slot in self._slots.values()]
        if not self._up and all(process is not None and process.ready for process in processes):
            self._up = True
            urls = [str(p.ready["url"]) for p in processes if p is not None and p.ready.get("url")]
            url, reach = (urls[-1], self._reach_text) if urls else (self._ready_text, "")
            self._console.serving(time.monotonic() - self._started_at, url, reach)

    async def _call_on_exit(
        self, on_exit: Callable[[ProcessSpec, Event], Awaitable[None]], process: ManagedProcess
    ) -> None:
        try:
            async with asyncio.timeout(ON_EXIT_S):
                await on_exit(process.spec, process.ready)
        except Exception as error:
            log.warning("after the end of %s: %s", process.spec.name, str(error) or type(error).__name__)

    # -- the end of the graph

    def _fail(self, what: str, fact: str, hint: str = "", lines: Sequence[str] = (), log_path: str = "") -> None:
        """End the graph with exit code 1. Only the first failure is shown: later ones mostly follow from it."""
        if not self._stopping.is_set():
            self._console.failed(what, fact, hint, lines, log_path)
            self._code = 1
            self._stopping.set()

    def _fail_process(self, process: ManagedProcess, what: str, *, drain: bool = False) -> None:
        if not drain:
            self._forced.set()
        if process.error:
            self._fail(what, process.error, process.hint)
        else:
            hint = "look for an out-of-memory kill in dmesg" if process.exit_code == -signal.SIGKILL else ""
            self._fail(what, process.exit_reason(), hint, list(process.tail)[-SHOWN_LINES:], str(process.log_path))

    def _on_stop_signal(self, signum: int) -> None:
        now = time.monotonic()
        if not self._stopping.is_set():
            self._stop_requested_at = now
            self._console.draining()
            self._stopping.set()
        elif not self._forced.is_set() and (signum == signal.SIGINT or now - self._stop_requested_at > SAME_STOP_S):
            self._console.forcing()
            self._code = self._code or 130
            self._forced.set()

    async def _stop(self) -> None:
        """Drain for at most `drain_s`, unless or until the stop is forced; then end what is left."""
        drain = self._tasks.create_task(self._drain())
        forced = self._tasks.create_task(self._forced.wait())
        await asyncio.wait({drain, forced}, timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        late = self._living()
        for task in (drain, forced):
            task.cancel()
        if late and not self._forced.is_set():
            names = ", ".join(process.spec.name for process in late)
            self._console.failed(names, f"still running {self._drain_s:g} s after the signal to stop: killed")
            self._code = 1
            for process in late:
                if process.draining:
                    process.signal(signal.SIGKILL)
        await end_processes(self._living())

    async def _drain(self) -> None:
        """Stop service by service, the entry first: it finishes its streams while the services below it still run.

        Processes that are not ready yet have nothing to finish and are ended immediately.
        """
        loading = [process for process in self._living() if not process.ready]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(end_processes(loading))
            for _, group in groupby(reversed(self._living()), lambda process: process.spec.service):
                service = [process for process in group if process.ready]
                for process in service:
                    process.draining = True
                    process.signal(signal.SIGTERM)
                for process in service:
                    await process.wait()

    def _living(self) -> list[ManagedProcess]:
        found = (slot.process for slot in self._slots.values())
        return [process for process in found if process is not None and process.alive]

    # -- beside the processes

    async def _run_task(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except DynamoError as error:
            self._fail(name, error.message, error.hint or "")
        except Exception as error:
            log.exception("%s failed", name)
            self._fail(name, str(error) or type(error).__name__)

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(self._progress_s)
            self._orphans.find()  # reaps daemons that ended
            for process in self._living():
                if not process.ready and not self._stopping.is_set():
                    self._console.progress(process.spec.name, process.progress, process.age_s())
