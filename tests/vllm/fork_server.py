"""A process that has imported vLLM and forks: the import takes ten seconds of CPU time, and is done once for all tests.

`ForkServer` runs functions in forks of it, each with an environment of its own. It is for vLLM on the CPU: a process
must not fork after CUDA is initialized.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
MODULES = ("vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker", "vllm.v1.engine.core")
MESSAGE_BYTES, MAX_FDS = 1 << 16, 8


class ForkServer:
    """The process, as its tests see it; a context manager."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._numbers = itertools.count()
        self._ended: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )

    def start(
        self, function: str, *arguments: Any, fds: Sequence[int], environment: Mapping[str, str] | None = None
    ) -> int:
        """Run "module:function" with the arguments and then the descriptors in a fork; return the fork's number."""
        number = next(self._numbers)
        job = {"number": number, "function": function, "arguments": arguments, "environment": dict(environment or {})}
        socket.send_fds(self._socket, [json.dumps(job).encode()], list(fds))
        return number

    def wait(self, number: int, timeout_s: float) -> int:
        """Return the exit status of a fork. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while number not in self._ended:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            ended = json.loads(self._socket.recv(MESSAGE_BYTES) or b"null")
            assert ended, "the fork server died"
            self._ended[ended["number"]] = ended["status"]
        return self._ended.pop(number)

    def run(
        self, function: str, *arguments: Any, environment: Mapping[str, str] | None = None, timeout_s: float = 110
    ) -> Any:
        """Return what the function returned, once through JSON; what it writes is shown if it fails."""
        with tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as output:
            fds = [result.fileno(), output.fileno()]
            call = ("tests.vllm.fork_server:write_result", function, arguments)
            status = self.wait(self.start(*call, fds=fds, environment=environment), timeout_s)
            assert status == 0, _text(output)[-3000:]
            return json.loads(_text(result))

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def write_result(function: str, arguments: Sequence[Any], result: int, output: int) -> None:
    """Call the function, with standard output and error in the file `output`, and write its JSON to the file `result`."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    found = _call(function, arguments)
    with os.fdopen(result, "w") as file:
        json.dump(found, file)


def _call(function: str, arguments: Sequence[Any]) -> Any:
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(*arguments)
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def _fork(job: Mapping[str, Any], fds: Sequence[int], others: Sequence[int]) -> int:
    """Return the pid of the process that does the job."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for fd in others:
            os.close(fd)
        os.environ.update(job["environment"])
        _call(job["function"], [*job["arguments"], *fds])
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    from dynamo.engines.vllm.options import CPU_ENVIRONMENT, ENVIRONMENT

    defaults = {**ENVIRONMENT, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({name: value for name, value in defaults.items() if name not in os.environ})
    for module in MODULES:
        importlib.import_module(module)
    connection = socket.socket(fileno=int(sys.argv[1]))
    numbers: dict[int, tuple[int, int]] = {}
    """process descriptor -> pid and number of a fork"""
    while True:
        ready, _, _ = select.select([connection, *numbers], [], [])
        for descriptor in [fd for fd in ready if fd is not connection]:
            pid, number = numbers.pop(descriptor)
            os.close(descriptor)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                connection.send(json.dumps({"number": number, "status": status}).encode())
        if connection not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, MAX_FDS)
        if not message:
            break
        job = json.loads(message)
        pid = _fork(job, fds, [connection.fileno(), *numbers])
        numbers[os.pidfd_open(pid)] = (pid, job["number"])
        for fd in fds:
            os.close(fd)
    for descriptor in numbers:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)


if __name__ == "__main__":
    main()
