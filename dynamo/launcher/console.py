"""The terminal output of `dynamo serve`, all of it on standard error.

    metrics: http://127.0.0.1:9091/metrics
    starting 3 processes: Frontend, Processor, VllmWorker
    Frontend ready in 0.8 s
    VllmWorker: loading model (12 s)
    VllmWorker ready in 14 s (Qwen/Qwen3-0.6B)
    ready in 15 s: http://127.0.0.1:8000
    only this machine reaches it; --host 0.0.0.0 opens it to others
    VllmWorker died (SIGKILL); restarting in 0.2 s
    stopping: draining (Ctrl-C again to force)
    stopped in 0.9 s

With DYN_LOGGING_JSONL each of these lines is a JSON object, and so is each line of a child process: text that did not
come from its logging becomes the message of an object with the target `output`; JSON objects of its own get the fields
they lack.

A thread does the writing. A terminal that is slow, or halted with Ctrl-S, must not stop the supervisor, nor (through
their full pipes) the workers: while 10 000 lines wait, further ones are dropped and counted; the log files have them.

Plain text and five ANSI codes, without `rich`: lines go to scripts and log collectors as they are, rich would wrap
them, and its import takes 50 ms of every start.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from dynamo import log
from dynamo.launcher import wording
from dynamo.launcher.wording import duration

QUEUE_LINES = 10_000
WRITE_LINES = 200  # at a time

Style = Literal["", "good", "warning", "error", "dim", "bold"]
_ANSI = {"good": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "dim": "\x1b[2m", "bold": "\x1b[1m"}
_RESET = "\x1b[0m"
_LEVELS = {"error": "ERROR", "warning": "WARNING"}
_FIELDS = {"time", "level", "target", "service", "message"}
"""The fields of every JSON line."""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Console:
    """Writes lines to a descriptor from a thread. Create it after the guard's fork: the thread would not survive it.

    `fd`: 2 is standard error. `colour` None: if `fd` is a terminal and NO_COLOR is not set. No method raises if the
    terminal is closed.
    """

    def __init__(self, fd: int = 2, *, colour: bool | None = None) -> None:
        self._fd = fd
        self._colour = os.isatty(fd) and not os.environ.get("NO_COLOR") if colour is None else colour
        self._formatter = log.Formatter("serve") if log.jsonl() else None
        self._queue: queue.Queue[str | threading.Event] = queue.Queue(QUEUE_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name="console", daemon=True).start()

    # -- the supervisor's lines

    def starting(self, names: Sequence[str]) -> None:
        self.print(f"starting {wording.processes(len(names))}: {', '.join(names)}", "bold")

    def metrics(self, url: str) -> None:
        self.print(f"metrics: {url}")

    def progress(self, name: str, text: str, elapsed_s: float) -> None:
        self.print(f"{name}: {text or 'starting'} ({duration(elapsed_s)})", "dim", process=name)

    def process_ready(self, name: str, elapsed_s: float, detail: str = "", *, again: bool = False) -> None:
        text = f"{name} ready {'again ' if again else ''}in {duration(elapsed_s)}"
        self.print(text + (f" ({detail})" if detail else ""), "good", process=name, seconds=round(elapsed_s, 3))

    def serving(self, elapsed_s: float, url: str = "", reach: str = "") -> None:
        """Print the line that scripts wait for, and who reaches the URL."""
        text = f"ready in {duration(elapsed_s)}" + (f": {url}" if url else "")
        self.print(text, "good", seconds=round(elapsed_s, 3), url=url)
        if reach:
            self.print(reach)

    def restarting(self, name: str, reason: str, error: str, delay_s: float) -> None:
        text = f"{name} {reason}{f': {error}' if error else ''}; restarting in {duration(delay_s)}"
        self.print(text, "warning", process=name)

    def draining(self) -> None:
        self.print("stopping: draining (Ctrl-C again to force)", "warning", level="INFO")

    def forcing(self) -> None:
        self.print("stopping now", "warning")

    def stopped(self, elapsed_s: float) -> None:
        self.print(f"stopped in {duration(elapsed_s)}")

    def failed(self, what: str, fact: str, hint: str = "", lines: Sequence[str] = (), path: str = "") -> None:
        """Print an error, `<what>: <fact>`, its hint, the process's last output lines and the path of its log."""
        if self._formatter is not None:
            self.print(f"{what}: {fact}", "error", hint=hint, output=list(lines), log=path)
            return
        self.print(f"{what}: {fact}", "error")
        if hint:
            self.print(f"hint: {hint}")
        for line in lines:
            self.print(f"  | {line}")
        if path:
            self.print(f"  full output: {path}")

    # -- all lines

    def print(self, text: str, style: Style = "", *, level: str = "", **fields: Any) -> None:
        """Print one line.

        `level` and `fields` are for JSON lines: a level that does not follow from the style, and further fields, which
        are left out if empty.
        """
        if self._formatter is not None:
            given = {name: value for name, value in fields.items() if value not in ("", [])}
            self._enqueue(self._json(text, level or _LEVELS.get(style, "INFO"), **given))
            return
        start = _ANSI.get(style, "") if self._colour else ""
        self._enqueue(f"{start}{text}{_RESET if start else ''}\n")

    def output(self, line: str, name: str) -> None:
        """Print a line of output of the process `name`, unchanged unless lines are JSON."""
        if self._formatter is not None:
            printed = _json_object(line)
            if printed is None:
                line = log.dump(self._formatter.begin("INFO", "output", name, line))
            elif not printed.keys() >= _FIELDS:  # of another logger: it keeps its fields
                line = log.dump({**self._formatter.begin("INFO", "output", name, ""), **printed})
        self._enqueue(line + "\n")

    def flush(self, timeout_s: float = 1.0) -> None:
        """Block until all lines so far are written, at most `timeout_s`."""
        written = threading.Event()
        try:
            self._queue.put(written, timeout=timeout_s)
        except queue.Full:
            return
        written.wait(timeout_s)

    def _json(self, text: str, level: str = "INFO", **fields: Any) -> str:
        assert self._formatter is not None
        return log.dump({**self._formatter.begin(level, "dynamo.launcher", "serve", text), **fields}) + "\n"

    def _enqueue(self, line: str) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        """Write queued lines, endlessly: the function of the thread."""
        while True:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < WRITE_LINES:
                    items.append(self._queue.get_nowait())
            text = "".join(item for item in items if isinstance(item, str))
            if self._dropped:
                dropped = self._dropped
                self._dropped = 0
                note = f"({dropped} lines not shown: the terminal was too slow)"
                text = (f"{note}\n" if self._formatter is None else self._json(note, "WARNING")) + text
            data = text.encode(errors="replace")
            try:
                while data:
                    data = data[os.write(self._fd, data) :]  # not sys.stderr, whose lock a blocked write would hold
            except OSError:  # the terminal or the reader of the pipe is closed
                pass
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()


def _json_object(line: str) -> dict[str, Any] | None:
    """Parse a line; None if it is not a JSON object."""
    try:
        return _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
