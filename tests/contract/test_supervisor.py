"""The supervisor with real processes, below its guard as `dynamo serve` runs it.

Every process of a test has a token in its command line, by which remaining ones are found in /proc.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo.launcher import guard
from dynamo.launcher.console import Console
from dynamo.launcher.wording import age, duration, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process supervision is for Linux")

# A process of a graph. Its last argument says what to do; it writes a journal of its signals and states.
WORKER = """
import json, os, signal, subprocess, sys, time
token, do = sys.argv[1], json.loads(sys.argv[2])
fd = int(os.environ["DYNAMO_STATUS_FD"])
os.set_inheritable(fd, False)
def report(event, **more):
    os.write(fd, (json.dumps({"event": event, **more}) + "\\n").encode())
def journal(text):
    with open(os.environ["JOURNAL"], "a") as file:
        file.write(f"{os.environ['NAME']} {text}\\n")
def stop(*_):
    journal("TERM")
    report("draining")
    time.sleep(do.get("drain_s", 0))
    journal("end")
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if do.get("ignore_term") else stop)
journal("start")
print("started", flush=True)
report("an event of the future")
if "core" in do:
    subprocess.Popen([sys.executable, "-ISc", os.environ["STUBBORN"], token, "1"])
    time.sleep(0.2)
if "share" in do:
    from multiprocessing.shared_memory import SharedMemory
    shared = SharedMemory(f"{token}-{os.getpid()}", create=True, size=4096)
if "daemon" in do and os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-ISc", "import time; time.sleep(60)", token, "daemon"])
    os._exit(0)
if "daemon" in do:
    os.wait()
if "progress" in do:
    report("progress", text=do["progress"])
if "print" in do:
    sys.stdout.write("x" * do["print"] + do.get("end", ""))
    sys.stdout.flush()
time.sleep(do.get("load_s", 0))
if "failed" in do:
    report("failed", **do["failed"])
    time.sleep(60)
if "exit" in do:
    print("the last word", end="")
    sys.exit(do["exit"])
report("ready", **do.get("ready", {}))
journal("ready")
if "exit_ready" in do:
    time.sleep(0.05)
    sys.exit(do["exit_ready"])
while True:
    time.sleep(60)
"""

STUBBORN = """
import os, signal, subprocess, sys, time
token, level = sys.argv[1], int(sys.argv[2])
os.setsid()
for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(sig, signal.SIG_IGN)
if level:
    subprocess.Popen([sys.executable, "-ISc", os.environ["STUBBORN"], token, str(level - 1)])
elif os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
else:
    os.wait()
time.sleep(60)
"""

DRIVER = """
import json, os, sys
from dynamo.launcher.guard import guarded

def run():
    import asyncio, subprocess
    from pathlib import Path
    from dynamo.errors import DynamoError, TransportError
    from dynamo.launcher.console import Console
    from dynamo.launcher.supervisor import ProcessSpec, RestartPolicy, Supervisor
    plan = json.loads(sys.argv[2])
    def journal(text):
        with open(os.environ["JOURNAL"], "a") as file:
            file.write(text + "\\n")
    async def on_exit(spec, ready):
        journal(f"on_exit {spec.name} {ready.get('lease')}")
        raise RuntimeError("etcd is away")
    servers = []
    def server():
        sleep = [sys.executable, "-ISc", "import time; time.sleep(60)", sys.argv[1], "server"]
        servers.append(subprocess.Popen(sleep, start_new_session=True).pid)
    async def beside():
        if "server" in plan:
            server()
        if "beside_fails" in plan:
            await asyncio.sleep(plan["beside_fails"])
            raise TransportError("etcd ended", hint="look at its log")
        try:
            await asyncio.Event().wait()
        finally:
            journal("beside ended")
    if "server" in plan:
        server()
    supervisor = Supervisor(
        [ProcessSpec(**{**spec, "argv": tuple(spec["argv"])}) for spec in plan["processes"]],
        run_dir=Path(plan["run_dir"]),
        console=Console(),
        on_exit=on_exit,
        other_pids=lambda: servers[1:],
        restarts=RestartPolicy(**plan.get("restarts", {})),
        **plan.get("options", {}),
    )
    supervisor.run_beside("etcd", beside)
    def spec_of(given):
        return ProcessSpec(**{**given, "argv": tuple(given["argv"])})
    async def step(verb, argument):
        try:
            await (supervisor.add(spec_of(argument)) if verb == "add" else supervisor.remove(argument))
            journal(f"{verb} done")
        except DynamoError as error:
            journal(f"{verb} {type(error).__name__} {error.message}")
    async def scale():
        # `wait`: for a state of the processes; `start`: without waiting for the end of the step
        begun = []
        for verb, argument in plan.get("steps", []):
            if verb == "wait":
                while [f"{p.spec.name} {'leaving' if p.leaving else 'ready' if p.ready else p.pid and 'starting'}"
                       for p in supervisor.processes()] != argument:
                    await asyncio.sleep(0.01)
            elif verb == "journal":
                journal(argument)
            elif verb == "start":
                begun.append(asyncio.create_task(step(*argument)))
            else:
                await step(verb, argument)
        journal("steps done")
        await asyncio.gather(*begun)
        await asyncio.Event().wait()
    supervisor.run_beside("scale", scale)
    return asyncio.run(supervisor.run())

sys.exit(guarded(run))
"""


def alive(token: str) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if token.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():  # empty for a zombie
                found.append(int(entry))
        except OSError:
            pass
    return found


class Serve:
    """A guard and a supervisor, as `dynamo serve` starts them. Standard error is a file."""

    def __init__(self, tmp_path: Path) -> None:
        self.token = uuid.uuid4().hex
        self.dir = tmp_path
        self.journal_path = tmp_path / "journal"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *workers: tuple[str, dict[str, Any]], **plan: Any) -> list[str]:
        names = [name for name, _ in workers]
        processes = []
        for index, (name, do) in enumerate(workers):
            processes.append(self.spec(name, names[:index].count(name) + 1, names.count(name), do))
        text = json.dumps({"processes": processes, "run_dir": str(self.dir), **plan})
        return [sys.executable, "-c", DRIVER, self.token, text]

    def spec(self, service: str, worker_id: int, workers: int, do: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a ProcessSpec."""
        label = service if workers == 1 else f"{service}:{worker_id}"
        argv = [do.get("python", sys.executable), "-ISc", WORKER, self.token, json.dumps(do)]
        env = {"JOURNAL": str(self.journal_path), "STUBBORN": STUBBORN, "NAME": label}
        spec = {"service": service, "worker_id": worker_id, "workers": workers}
        return {**spec, "argv": argv, "env": env, "cwd": str(self.dir)}

    def start(self, *workers: tuple[str, dict[str, Any]], **plan: Any) -> None:
        with open(self.dir / "out", "wb") as out, open(self.dir / "err", "wb") as err:
            env = {**os.environ, "JOURNAL": str(self.journal_path)}
            self.process = subprocess.Popen(self.command(*workers, **plan), stdout=out, stderr=err, env=env)

    @property
    def err(self) -> str:
        return (self.dir / "err").read_text()

    @property
    def journal(self) -> list[str]:
        return self.journal_path.read_text().splitlines() if self.journal_path.exists() else []

    def wait_for(self, pattern: str, limit_s: float = 8.0) -> None:
        self.until(lambda: re.search(pattern, self.err) is not None, limit_s, pattern)

    def until(self, true: Callable[[], bool], limit_s: float = 8.0, what: str = "the condition") -> float:
        start = time.monotonic()
        while not true():
            assert time.monotonic() - start < limit_s, f"timed out waiting for {what}:\n{self.err}"
            time.sleep(0.01)
        return time.monotonic() - start

    def wait(self, limit_s: float = 8.0) -> int:
        """Return the exit code; no process may be left by then."""
        assert self.process is not None
        code = self.process.wait(limit_s)
        assert alive(self.token) == []
        return code

    def signal(self, sig: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(sig)

    @property
    def supervisor_pid(self) -> int:
        assert self.process is not None
        return guard.children(self.process.pid)[0]

    def pid(self, name: str) -> int:
        def is_it(pid: int) -> bool:
            return f"\0NAME={name}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()

        return next(pid for pid in guard.children(self.supervisor_pid) if is_it(pid))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path)
    yield serve
    for pid in alive(serve.token):
        guard.kill(pid, signal.SIGKILL)
    if serve.process is not None:
        serve.process.wait(5)


URL = "http://127.0.0.1:8000"
LOADS = ("VllmWorker", {"load_s": 0.7, "progress": "loading model", "ready": {"text": "tiny", "lease": 123}})
WORKS = ("VllmWorker", {"ready": {"lease": 123}})
FRONT = ("Frontend", {"ready": {"url": URL}})
CORE = ("VllmWorker", {"core": True, "ready": {}})


# -- start


def test_lines_from_start_to_stop(serve: Serve) -> None:
    serve.start(LOADS, FRONT, options={"progress_s": 0.4})
    serve.wait_for("ready in .* http")
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    lines = [line for line in serve.err.splitlines() if line != "started" and "(0.8 s)" not in line]  # if it was slow
    expected = [
        r"starting 2 processes: VllmWorker, Frontend",
        r"Frontend ready in 0\.\d s",
        r"VllmWorker: loading model \(0\.\d s\)",
        r"VllmWorker ready in 0\.\d s \(tiny\)",
        rf"ready in [01]\.\d s: {URL}",
        r"stopping: draining \(Ctrl-C again to force\)",
        r"after the end of Frontend: etcd is away",
        r"after the end of VllmWorker: etcd is away",
        r"stopped in 0\.\d s",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert (serve.dir / "out").read_bytes() == b""
    assert (serve.dir / "logs/VllmWorker.log").read_text() == "started\n"


def test_a_reported_failure_ends_the_start(serve: Serve) -> None:
    failed = {"error": "no model of that name", "hint": "set VllmWorker.model", "more": 1}
    serve.start(CORE, ("Processor", {"load_s": 0.5, "failed": failed}), FRONT)
    assert serve.wait() == 1
    assert "Processor could not start: no model of that name\nhint: set VllmWorker.model\n" in serve.err
    assert "stopping" not in serve.err


def test_an_exit_during_the_start_shows_the_last_lines(serve: Serve) -> None:
    serve.start(CORE, ("Processor", {"load_s": 0.5, "exit": 3}), ("Frontend", {"load_s": 60}))
    assert serve.wait() == 1
    log = serve.dir / "logs/Processor.log"
    last = f"Processor could not start: exited (3)\n  | started\n  | the last word\n  full output: {log}\n"
    assert last in serve.err
    assert serve.err.count("could not start") == 1


def test_a_missing_program_is_an_error(serve: Serve) -> None:
    serve.start(WORKS, ("Frontend", {"python": "no-such-python"}))
    assert serve.wait() == 1
    assert "Frontend could not start: [Errno 2] No such file or directory: 'no-such-python'" in serve.err


def test_ctrl_c_while_loading_does_not_wait_for_the_drain(serve: Serve) -> None:
    serve.start(("VllmWorker", {"load_s": 60, "ignore_term": True, "core": True}), FRONT)
    serve.wait_for("Frontend ready")
    serve.signal(signal.SIGINT)
    start = time.monotonic()
    assert serve.wait() == 0
    assert time.monotonic() - start < 2


def test_long_lines_neither_block_nor_grow(serve: Serve) -> None:
    serve.start(
        ("VllmWorker", {"print": 1_000_000}), ("Frontend", {"print": 100_000, "end": "\r99%\r100%\n", **FRONT[1]})
    )
    serve.wait_for(f"ready in .*{URL}")
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    lines = (serve.dir / "logs/VllmWorker.log").read_text().splitlines()
    assert sum(map(len, lines)) == 1_000_000 + len("started")
    assert max(map(len, lines)) == 64 * 1024
    assert "\n100%\n" in serve.err


# -- restarts


def test_a_restart_kills_the_orphans_of_the_dead_worker_only(serve: Serve) -> None:
    lives = {"daemon": True, "core": True, "ready": {"lease": 1}}
    serve.start(("VllmWorker", lives), ("VllmWorker", {"core": True, "ready": {"lease": 123}}), FRONT)
    serve.wait_for(f"ready in .*{URL}")
    first, second = serve.pid("VllmWorker:1"), serve.pid("VllmWorker:2")
    serve.until(lambda: len(alive(serve.token)) == 12)
    below_second = guard.descendants(second)
    assert len(below_second) == 2  # the third is a daemon, and below the supervisor already
    everything = set(alive(serve.token))
    os.kill(second, signal.SIGKILL)
    serve.wait_for(r"VllmWorker:2 died \(SIGKILL\); restarting in 0\.2 s")
    at_once = set(alive(serve.token))
    assert "on_exit VllmWorker:2 123" in serve.journal
    assert not at_once & {second, *below_second}
    assert len(everything - at_once) == 4  # the worker, its core, that one's child and daemon
    assert {first, *guard.descendants(first)} <= at_once
    daemons = [p for p in at_once if Path(f"/proc/{p}/cmdline").read_bytes().endswith(b"\0daemon\0")]
    assert len(daemons) == 1
    serve.wait_for(r"VllmWorker:2 ready again in 0\.\d s")
    assert serve.pid("VllmWorker:2") != second
    assert serve.pid("VllmWorker:1") == first
    serve.until(lambda: len(alive(serve.token)) == len(everything))
    serve.signal(signal.SIGTERM)
    assert serve.wait() == 0


@pytest.mark.parametrize("who", ["worker", "supervisor", "guard"])
def test_shared_memory_of_a_killed_process_is_removed(serve: Serve, who: str) -> None:
    def shared() -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"{serve.token}-*")]

    serve.start(("VllmWorker", {"share": True, "ready": {"lease": 1}}), FRONT)
    serve.wait_for(f"ready in .*{URL}")
    assert serve.process is not None
    worker = serve.pid("VllmWorker")
    assert shared() == [f"{serve.token}-{worker}"]
    os.kill({"worker": worker, "supervisor": serve.supervisor_pid, "guard": serve.process.pid}[who], signal.SIGKILL)
    if who == "worker":
        serve.wait_for("VllmWorker ready again")
        assert shared() == [f"{serve.token}-{serve.pid('VllmWorker')}"]
        serve.signal(signal.SIGTERM)
    serve.process.wait(8)
    serve.until(lambda: not alive(serve.token) and not shared())


def test_servers_started_by_other_code_are_not_orphans(serve: Serve) -> None:
    serve.start(WORKS, FRONT, server=True, options={"progress_s": 0.1})
    serve.wait_for(f"ready in .*{URL}")
    servers = [pid for pid in alive(serve.token) if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0server\0")]
    assert len(servers) == 2
    os.kill(serve.pid("VllmWorker"), signal.SIGKILL)
    serve.wait_for("VllmWorker ready again")
    assert set(servers) <= set(alive(serve.token))
    serve.signal(signal.SIGTERM)
    assert serve.wait() == 0  # the guard's side ends them


def test_the_delay_doubles_and_deaths_are_limited(serve: Serve) -> None:
    dies = ("VllmWorker", {"ready": {}, "exit_ready": 5, "load_s": 0.2})
    serve.start(dies, FRONT, restarts={"first_s": 0.1, "longest_s": 0.3, "deaths": 3})
    assert serve.wait() == 1
    assert re.findall(r"VllmWorker exited \(5\); restarting in (.*) s", serve.err) == ["0.1", "0.2", "0.3"]
    assert "VllmWorker died 4 times in 60 s: giving up: exited (5)\n  | started\n" in serve.err
    assert "Frontend end" in serve.journal


def test_the_delay_is_reset_after_a_stable_life(serve: Serve) -> None:
    dies = ("VllmWorker", {"ready": {}, "exit_ready": 5, "load_s": 0.2})
    serve.start(dies, FRONT, restarts={"first_s": 0.05, "stable_s": 0.1, "window_s": 0.5})
    serve.until(lambda: serve.err.count("restarting") >= 4)
    serve.signal(signal.SIGTERM)
    assert serve.wait() == 0
    assert set(re.findall(r"restarting in (.*) s", serve.err)) <= {"0.1", "0.0"}  # 0.05, rounded


# -- stop


def test_the_entry_stops_first_and_tasks_beside_the_graph_last(serve: Serve) -> None:
    slow = {"drain_s": 0.2}
    serve.start(("VllmWorker", slow), ("VllmWorker", slow), ("Processor", slow), ("Frontend", {**slow, **FRONT[1]}))
    serve.wait_for(f"ready in .*{URL}")
    serve.signal(signal.SIGTERM)
    os.kill(serve.supervisor_pid, signal.SIGTERM)  # as systemd does; not a second request
    assert serve.wait() == 0
    stops = [line for line in serve.journal if line.endswith(("TERM", "end")) or "beside" in line]
    assert stops[:4] == ["Frontend TERM", "Frontend end", "Processor TERM", "Processor end"]
    workers = [f"VllmWorker:{n} {what}" for what in ("TERM", "end") for n in (1, 2)]
    assert sorted(stops[4:6]) == workers[:2]
    assert sorted(stops[6:8]) == workers[2:]
    assert serve.journal[-1] == "beside ended"
    assert next(line for line in serve.journal if line.startswith("on_exit")) == "on_exit Frontend None"


def test_a_second_ctrl_c_forces(serve: Serve) -> None:
    serve.start(CORE, ("Frontend", {"ignore_term": True, **FRONT[1]}))
    serve.wait_for(f"ready in .*{URL}")
    serve.signal(signal.SIGINT)
    serve.wait_for("stopping: draining")
    time.sleep(0.3)
    assert "VllmWorker TERM" not in serve.journal  # not before the entry has ended
    serve.signal(signal.SIGINT)
    start = time.monotonic()
    assert serve.wait() == 130
    assert time.monotonic() - start < 1.5
    assert "stopping now" in serve.err


def test_the_drain_has_a_limit(serve: Serve) -> None:
    serve.start(WORKS, ("Frontend", {"ignore_term": True, **FRONT[1]}), options={"drain_s": 0.5})
    serve.wait_for(f"ready in .*{URL}")
    serve.signal(signal.SIGTERM)
    assert serve.wait(2) == 1
    assert "VllmWorker, Frontend: still running 0.5 s after the signal to stop: killed" in serve.err
    assert serve.journal.count("VllmWorker end") == 1  # it had its own time to drain


def test_a_failing_task_beside_the_graph_ends_it(serve: Serve) -> None:
    serve.start(WORKS, FRONT, beside_fails=0.6)
    assert serve.wait() == 1
    assert "etcd: etcd ended\nhint: look at its log\n" in serve.err
    assert "VllmWorker end" in serve.journal


@pytest.mark.parametrize("who", ["supervisor", "guard"])
def test_kill_9_leaves_no_process(serve: Serve, who: str) -> None:
    serve.start(CORE, ("VllmWorker", {"daemon": True, "core": True, "ignore_term": True}), FRONT)
    serve.wait_for(f"ready in .*{URL}")
    serve.until(lambda: len(alive(serve.token)) == 12)
    assert serve.process is not None
    os.kill(serve.supervisor_pid if who == "supervisor" else serve.process.pid, signal.SIGKILL)
    took_s = serve.until(lambda: not alive(serve.token))
    assert took_s < 2
    assert serve.process.wait(5) == (137 if who == "supervisor" else -signal.SIGKILL)


def test_ctrl_c_at_a_terminal(serve: Serve) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = serve.command(CORE, FRONT)
        os.execve(command[0], command, {**os.environ, "JOURNAL": str(serve.journal_path), "TERM": "xterm"})
    seen = b""
    sent = False
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how a pseudo terminal reports that its other end is closed
            break
        if not data:
            break
        seen += data
        if URL.encode() in seen and not sent:
            sent = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert alive(serve.token) == []
    assert b"\x1b[33mstopping: draining" in seen
    assert seen.count(b"stopping") == 1
    assert "VllmWorker end" in serve.journal


# -- the console


def test_a_halted_terminal_blocks_no_writer() -> None:
    reader, writer = os.pipe()
    console = Console(writer)
    start = time.monotonic()
    for _ in range(12_000):
        console.output("x" * 99, "child")
    assert time.monotonic() - start < 2
    seen = b""
    while b"not shown" not in seen:
        seen += os.read(reader, 65536)
        console.print("the terminal goes on")
    os.close(reader)
    console.print("the reader has closed its end")
    console.flush()
    assert re.search(rb"^\(\d+ lines not shown: the terminal was too slow\)\n", seen, re.MULTILINE)
    os.close(writer)


@pytest.mark.parametrize(
    ("duration_s", "text"), [(0.04, "0.0 s"), (8.24, "8.2 s"), (9.97, "10 s"), (119, "119 s"), (185, "3 min 5 s")]
)
def test_durations(duration_s: float, text: str) -> None:
    assert duration(duration_s) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (8.4, "8 s"), (185, "3 min"), (7500, "2 h 5 min"), (352_800, "4 d 2 h")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_counts_of_processes() -> None:
    assert (processes(1), processes(3)) == ("1 process", "3 processes")


# -- processes added and removed while the graph runs


def test_a_process_that_was_added_is_as_the_others(serve: Serve) -> None:
    serve.start(
        WORKS,
        FRONT,
        steps=[["wait", ["VllmWorker ready", "Frontend ready"]], ["add", serve.spec("VllmWorker", 2, 2, CORE[1])]],
    )
    serve.until(lambda: "add done" in serve.journal)
    assert "\nadding VllmWorker:2\n" in serve.err
    assert re.search(r"^VllmWorker:2 ready in 0\.\d s$", serve.err, re.MULTILINE)
    os.kill(serve.pid("VllmWorker:2"), signal.SIGKILL)  # restarted, without its orphans
    serve.wait_for(r"VllmWorker:2 died \(SIGKILL\); restarting in 0\.2 s")
    serve.wait_for(r"VllmWorker:2 ready again")
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    ends = [line for line in serve.journal if line.endswith(" TERM")]
    assert ends[0] == "Frontend TERM"  # drained as the others of its service, behind the entry
    assert sorted(ends[1:]) == ["VllmWorker TERM", "VllmWorker:2 TERM"]


@pytest.mark.parametrize(
    ("do", "error", "shown"),
    [
        ({"failed": {"error": "no memory", "hint": "lower it"}}, "no memory", "no memory\nhint: lower it\n"),
        ({"exit": 3}, "exited (3)", "exited (3)\n  | started\n  | the last word\n"),
        ({"python": "no-such-python"}, "[Errno 2] No such file or directory: 'no-such-python'", ""),
    ],
)
def test_a_process_added_in_vain_leaves_the_graph_as_it_was(
    serve: Serve, do: dict[str, Any], error: str, shown: str
) -> None:
    before = ["VllmWorker ready", "Frontend ready"]
    steps = [["wait", before], ["add", serve.spec("VllmWorker", 2, 2, do)], ["wait", before]]
    serve.start(WORKS, FRONT, steps=steps)
    serve.until(lambda: "steps done" in serve.journal)
    assert f"add StartError VllmWorker:2 could not start: {error}" in serve.journal
    assert shown in serve.err
    assert "restarting" not in serve.err
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0


def test_a_process_is_drained_before_it_is_removed(serve: Serve) -> None:
    slow = ("VllmWorker", {"drain_s": 0.3, "ready": {"lease": 7}})
    steps = [["wait", ["VllmWorker:1 ready", "VllmWorker:2 ready", "Frontend ready"]], ["remove", "VllmWorker:2"]]
    serve.start(slow, slow, FRONT, steps=steps)
    serve.until(lambda: "remove done" in serve.journal)
    journal = serve.journal
    assert journal.index("VllmWorker:2 TERM") < journal.index("VllmWorker:2 end") < journal.index("remove done")
    assert "VllmWorker:1 TERM" not in journal
    serve.until(lambda: "on_exit VllmWorker:2 7" in serve.journal)  # its lease is revoked
    assert re.search(r"^removing VllmWorker:2: draining\n(.*\n)?VllmWorker:2 removed$", serve.err, re.MULTILINE)
    assert "restarting" not in serve.err
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    assert serve.journal.count("VllmWorker:2 TERM") == 1


def test_a_removed_process_that_does_not_end_is_killed(serve: Serve) -> None:
    stubborn = ("VllmWorker", {"ignore_term": True, "core": True, "ready": {}})
    steps = [["wait", ["VllmWorker:1 ready", "VllmWorker:2 ready", "Frontend ready"]], ["remove", "VllmWorker:2"]]
    serve.start(WORKS, stubborn, FRONT, steps=steps, options={"drain_s": 0.3})
    serve.until(lambda: "remove done" in serve.journal)
    assert "VllmWorker:2: still running 0.3 s after the signal to stop: killed\n" in serve.err
    assert len(alive(serve.token)) == 4  # guard, supervisor, VllmWorker:1 and Frontend: its orphans ended with it
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0


def test_a_process_that_is_still_starting_is_removed_at_once(serve: Serve) -> None:
    before = ["VllmWorker ready", "Frontend ready"]
    steps = [
        ["wait", before],
        ["start", ["add", serve.spec("VllmWorker", 2, 2, {"load_s": 60})]],
        ["wait", ["VllmWorker ready", "VllmWorker:2 starting", "Frontend ready"]],
        ["remove", "VllmWorker:2"],
        ["wait", before],
    ]
    serve.start(WORKS, FRONT, steps=steps)
    serve.until(lambda: "steps done" in serve.journal)
    assert "add UnavailableError VllmWorker:2 was removed" in serve.journal
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0


def test_a_process_that_waits_for_its_restart_is_removed(serve: Serve) -> None:
    dies = ("VllmWorker", {"ready": {}})
    steps = [
        ["wait", ["VllmWorker:1 ready", "VllmWorker:2 ready", "Frontend ready"]],
        ["wait", ["VllmWorker:1 ready", "VllmWorker:2 None", "Frontend ready"]],
        ["remove", "VllmWorker:2"],
    ]
    serve.start(WORKS, dies, FRONT, steps=steps, restarts={"first_s": 60})
    serve.wait_for(f"ready in .*{URL}")
    os.kill(serve.pid("VllmWorker:2"), signal.SIGKILL)
    serve.until(lambda: "remove done" in serve.journal)
    assert serve.journal.count("VllmWorker:2 start") == 1
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0


def test_nothing_is_added_or_removed_while_the_graph_starts_or_stops(serve: Serve) -> None:
    slow = ("VllmWorker", {"load_s": 0.5, "drain_s": 1, "ready": {}})
    more = serve.spec("VllmWorker", 2, 2, WORKS[1])
    steps = [
        ["add", more],
        ["remove", "VllmWorker"],
        ["wait", ["VllmWorker ready", "Frontend ready"]],
        ["journal", "both ready"],
        ["wait", ["VllmWorker ready", "Frontend None"]],  # drained first
        ["add", more],
        ["remove", "VllmWorker"],
    ]
    serve.start(slow, FRONT, steps=steps)
    serve.until(lambda: "both ready" in serve.journal)
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    found = [line for line in serve.journal if "UnavailableError" in line]
    starting, stopping = "the graph is still starting", "the graph is stopping"
    assert found == [f"{verb} UnavailableError {why}" for why in (starting, stopping) for verb in ("add", "remove")]


def test_the_end_of_the_graph_ends_what_is_starting_or_leaving(serve: Serve) -> None:
    slow = ("VllmWorker", {"drain_s": 0.5, "ready": {}})
    steps = [
        ["wait", ["VllmWorker:1 ready", "VllmWorker:2 ready", "Frontend ready"]],
        ["start", ["add", serve.spec("VllmWorker", 3, 3, {"load_s": 60, "core": True})]],
        ["start", ["remove", "VllmWorker:2"]],
        ["wait", ["VllmWorker:1 ready", "VllmWorker:2 leaving", "VllmWorker:3 starting", "Frontend ready"]],
    ]
    serve.start(slow, slow, FRONT, steps=steps)
    serve.until(lambda: "steps done" in serve.journal)
    serve.signal(signal.SIGINT)
    assert serve.wait() == 0
    assert "add UnavailableError VllmWorker:3 ended: the graph is stopping" in serve.journal
    assert "remove done" in serve.journal
