"""Run a service's constructor, which may never return: Frontends of ai-dynamo 0.1 wait in theirs for the server they start.

The event loop stands still meanwhile. So a thread watches for a child process that accepts connections, and a signal to
stop interrupts the constructor, as Ctrl-C did in 0.1, so that it ends its child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dynamo.errors import UnavailableError
from dynamo.worker.stop_signals import STOP_SIGNALS

POLL_S = 0.1
DEFAULT_PORT = 8080
"""of the command `http`"""
LISTENS = "0A"
"""state of a socket in /proc/net/tcp"""


def construct(constructor: Callable[[], None], port: object, on_listening: Callable[[str], object]) -> bool:
    """Run a constructor in the main thread; return False if it was interrupted by SIGTERM or SIGINT.

    `on_listening` is called once, in another thread, with the URL, when a child process accepts connections on the port.

    Raises what the constructor raises, and UnavailableError if it returns after that call: its server has ended.
    """
    interrupted, ended, served = threading.Event(), threading.Event(), threading.Event()
    running = False

    def interrupt(number: int, _: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            if running:
                raise KeyboardInterrupt

    def watch() -> None:
        while not ended.wait(POLL_S):
            for url in _listening_children(os.getpid()):
                if url.endswith(f":{port}"):
                    served.set()
                    on_listening(url)
                    return

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    watcher = threading.Thread(target=watch, name="constructor", daemon=True)
    watcher.start()
    try:
        try:
            running = True
            constructor()
        finally:
            running = False
    except KeyboardInterrupt:
        if not interrupted.is_set():
            raise
    finally:
        ended.set()
        watcher.join()  # before start hooks, which may fork
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # not one that the constructor has installed
                signal.signal(number, handler)
                signal.siginterrupt(number, False)  # as event loops have it
    if served.is_set() and not interrupted.is_set():
        raise UnavailableError("the constructor returned: the server that it waited for has ended")
    return not interrupted.is_set()


def _listening_children(pid: int) -> Iterator[str]:
    """Yield the URLs at which child processes of a process accept connections over IPv4; none without /proc."""
    children = list(_children(pid))
    if not children:
        return
    with contextlib.suppress(OSError):
        table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        urls = {f"socket:[{row[9]}]": _url(row[1]) for row in table if row[3] == LISTENS}
        for child in children:
            with contextlib.suppress(OSError):  # it has ended
                for descriptor in os.scandir(f"/proc/{child}/fd"):
                    if (url := urls.get(os.readlink(descriptor))) is not None:
                        yield url


def _children(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield from Path(f"/proc/{pid}/task/{thread}/children").read_text().split()


def _url(address: str) -> str:
    """Return the URL of an address in /proc/net/tcp: hexadecimal, in the machine's byte order."""
    host, _, port = address.partition(":")
    return f"http://{socket.inet_ntoa(int(host, 16).to_bytes(4, 'little'))}:{int(port, 16)}"
