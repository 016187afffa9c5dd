"""A server that exists while a command runs: `dynamo serve` or `dynamo run in=http` as a child process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dynamo import prctl
from dynamo.cli.chat import Progress
from dynamo.errors import StartError
from dynamo.launcher.embedded_servers import free_ports

POLL_S = 0.05
STOP_S = 40.0  # `dynamo serve` drains for 30
SHOWN_LINES = 12
_READY = re.compile(r"^ready in .*: (http\S+)$", re.MULTILINE)


@contextmanager
def temporary_graph(arguments: Sequence[str], progress: Progress) -> Iterator[str]:
    """Run `dynamo serve ARGUMENTS` on a free port, and yield its URL. It ends with the block and with this process.

    Raises StartError, with the error that it printed, if it does not start.
    """
    with _temporary_server(["serve", *arguments, "--port", str(free_ports(1)[0])], progress) as url:
        yield url


@contextmanager
def temporary_server(arguments: Sequence[str], progress: Progress) -> Iterator[str]:
    """Run `dynamo run in=http ARGUMENTS` on a free port of this host, as `temporary_graph` does, and yield its URL."""
    port = str(free_ports(1)[0])
    with _temporary_server(
        ["run", "in=http", *arguments, "--http-host", "127.0.0.1", "--http-port", port], progress
    ) as url:
        yield url


@contextmanager
def _temporary_server(arguments: Sequence[str], progress: Progress) -> Iterator[str]:
    command = [sys.executable, "-m", "dynamo", *arguments]
    with tempfile.TemporaryDirectory(prefix="dynamo-run-") as directory:
        log = Path(directory) / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C is for the chat
                preexec_fn=partial(prctl.die_with_parent, signal.SIGTERM, os.getpid()),
            )
        try:
            yield _wait_for_url(process, log, progress)
        finally:
            progress.clear()
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path, progress: Progress) -> str:
    while True:
        code = process.poll()
        text = log.read_text(errors="replace")
        found = _READY.search(text)
        if found:
            progress.clear()
            return found[1]
        lines = text.strip().splitlines()
        if code is not None:
            raise _failure(lines, code)
        progress.show(lines[-1] if lines else "starting")
        time.sleep(POLL_S)


def _failure(lines: Sequence[str], code: int) -> StartError:
    """Return the error and hint that the server printed; without them, print its last lines."""
    for number, line in enumerate(lines):
        if line.startswith("error: "):
            hint = lines[number + 1].removeprefix("hint: ") if lines[number + 1 :] else None
            return StartError(line.removeprefix("error: "), hint=hint)
    sys.stderr.write("".join(f"  | {line}\n" for line in lines[-SHOWN_LINES:]))
    return StartError(f"the server did not start: it ended with code {code}", hint="its last lines are above")
