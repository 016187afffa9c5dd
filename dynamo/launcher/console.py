"""What a user sees of `dynamo serve` on the terminal, all of it on standard error.

    metrics: http://127.0.0.1:9091/metrics
    starting 3 processes: Frontend, Processor, VllmWorker
    Frontend ready in 0.8 s
    VllmWorker: loading model (12 s)
    VllmWorker ready in 14 s (Qwen/Qwen3-0.6B)
    ready in 15 s: http://127.0.0.1:8000
    VllmWorker died (SIGKILL); restarting in 0.2 s
    stopping: draining (Ctrl-C again to force)
    stopped in 0.9 s

With DYN_LOGGING_JSONL each of these lines is a JSON object, and so is each line of a child: what it printed otherwise than
by logging becomes the message of one, with the target `output`; JSON objects of its own get what they lack.

A thread does the writing. A terminal that is slow, or halted with Ctrl-S, must not stop the supervisor, nor (through
their full pipes) the workers: when 10 000 lines wait, further ones are dropped and counted; the log files have them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo import log

QUEUE_LINES = 10_000
WRITE_LINES = 200  # at a time
_COLOURS = {"good": "\x1b[32m", "note": "\x1b[33m", "bad": "\x1b[31m", "faint": "\x1b[2m", "head": "\x1b[1m"}
_RESET = "\x1b[0m"
_LEVELS = {"bad": "ERROR", "note": "WARNING"}


_ALWAYS = {"time", "level", "target", "service", "message"}
"""fields of every line"""

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def seconds(duration_s: float) -> str:
    """`8.2 s`, `12 s`, `3 min 5 s`."""
    if duration_s < 9.95:
        return f"{duration_s:.1f} s"
    minutes, rest = divmod(round(duration_s), 60)
    return f"{minutes} min {rest} s" if minutes >= 2 else f"{round(duration_s)} s"


class Console:
    """Make it after the guard's fork: its thread would not exist in the child.

    `fd` is where it writes, 2 being standard error. `colour` None: if that is a terminal and NO_COLOR is not set.
    Nothing here raises when the terminal is gone.
    """

    def __init__(self, fd: int = 2, *, colour: bool | None = None) -> None:
        self._fd = fd
        self._colour = os.isatty(fd) and not os.environ.get("NO_COLOR") if colour is None else colour
        self._lines = log.Formatter("serve") if log.jsonl() else None
        self._queue: queue.Queue[str | threading.Event] = queue.Queue(QUEUE_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name="console", daemon=True).start()

    # -- what the supervisor has to say

    def starting(self, names: Sequence[str]) -> None:
        count = f"{len(names)} process" + ("es" if len(names) != 1 else "")
        self.say(f"starting {count}: {', '.join(names)}", "head")

    def metrics(self, url: str) -> None:
        self.say(f"metrics: {url}")

    def progress(self, name: str, text: str, elapsed_s: float) -> None:
        self.say(f"{name}: {text or 'starting'} ({seconds(elapsed_s)})", "faint", process=name)

    def process_ready(self, name: str, elapsed_s: float, detail: str = "", *, again: bool = False) -> None:
        text = f"{name} ready {'again ' if again else ''}in {seconds(elapsed_s)}"
        self.say(text + (f" ({detail})" if detail else ""), "good", process=name, seconds=round(elapsed_s, 3))

    def serving(self, elapsed_s: float, url: str = "") -> None:
        text = f"ready in {seconds(elapsed_s)}" + (f": {url}" if url else "")
        self.say(text, "good", seconds=round(elapsed_s, 3), url=url)

    def restarting(self, name: str, how: str, error: str, delay_s: float) -> None:
        text = f"{name} {how}{f': {error}' if error else ''}; restarting in {seconds(delay_s)}"
        self.say(text, "note", process=name)

    def draining(self) -> None:
        self.say("stopping: draining (Ctrl-C again to force)", "note", level="INFO")

    def forcing(self) -> None:
        self.say("stopping now", "note")

    def stopped(self, elapsed_s: float) -> None:
        self.say(f"stopped in {seconds(elapsed_s)}")

    def failed(self, what: str, fact: str, hint: str = "", lines: Sequence[str] = (), path: str = "") -> None:
        """An error: `<what>: <fact>`, its hint, and the last lines of the process with the place of the rest."""
        if self._lines is not None:
            self.say(f"{what}: {fact}", "bad", hint=hint, output=list(lines), log=path)
            return
        self.say(f"{what}: {fact}", "bad")
        if hint:
            self.say(f"hint: {hint}")
        for line in lines:
            self.say(f"  | {line}")
        if path:
            self.say(f"  its whole output: {path}")

    # -- what carries it

    def say(self, text: str, colour: str = "", *, level: str = "", **facts: Any) -> None:
        """One line. `colour`: good, note, bad, faint, head, or none.

        Of a JSON line: `level`, where the colour does not tell it, and `facts`, further fields, unless empty.
        """
        if self._lines is not None:
            told = {name: fact for name, fact in facts.items() if fact not in ("", [])}
            self._put(self._json(text, level or _LEVELS.get(colour, "INFO"), **told))
            return
        start = _COLOURS.get(colour, "") if self._colour else ""
        self._put(f"{start}{text}{_RESET if start else ''}\n")

    def output(self, line: str, name: str) -> None:
        """A line that the process `name` printed, as it came."""
        if self._lines is not None:
            printed = _object(line)
            if printed is None:
                line = log.dump(self._lines.begin("INFO", "output", name, line))
            elif not printed.keys() >= _ALWAYS:  # of another logger, say: it keeps its fields
                line = log.dump({**self._lines.begin("INFO", "output", name, ""), **printed})
        self._put(line + "\n")

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until all lines so far are written, at most `timeout_s`. Blocks."""
        written = threading.Event()
        try:
            self._queue.put(written, timeout=timeout_s)
        except queue.Full:
            return
        written.wait(timeout_s)

    def _json(self, text: str, level: str = "INFO", **facts: Any) -> str:
        assert self._lines is not None
        return log.dump({**self._lines.begin(level, "dynamo.launcher", "serve", text), **facts}) + "\n"

    def _put(self, line: str) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        """The thread. It writes to the descriptor, not through sys.stderr, whose lock it would hold while it waits."""
        while True:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < WRITE_LINES:
                    items.append(self._queue.get_nowait())
            text = "".join(item for item in items if isinstance(item, str))
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                note = f"({dropped} lines not shown: the terminal was too slow)"
                text = (f"{note}\n" if self._lines is None else self._json(note, "WARNING")) + text
            data = text.encode(errors="replace")
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:  # the terminal was closed, or the reader of the pipe has left
                pass
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()


def _object(line: str) -> dict[str, Any] | None:
    """None: it is no JSON object."""
    try:
        return _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
