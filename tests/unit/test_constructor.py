"""Constructors that end, that are interrupted, and that wait for a server which they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dynamo.errors import UnavailableError
from dynamo.worker.constructor import construct
from tests.ports import free_port

LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"


def never(url: str) -> None:
    raise AssertionError(url)


def test_a_constructor_that_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert construct(lambda: None, 8080, never)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_constructor_raises() -> None:
    with pytest.raises(ValueError, match="no"):
        construct(lambda: [].remove("no"), 8080, never)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_a_constructor(number: int) -> None:
    cleaned = []

    def wait() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)  # a second one does not interrupt what it does at the end
            cleaned.append(True)

    started = time.monotonic()
    assert not construct(wait, 8080, never)
    assert time.monotonic() - started < 30
    assert cleaned


def test_a_constructor_that_waits_for_its_server() -> None:
    port, heard, urls = free_port(), threading.Event(), []

    def on_listening(url: str) -> None:
        urls.append(url)
        heard.set()

    def wait() -> None:
        with subprocess.Popen([sys.executable, "-c", LISTEN, str(port)]) as server:
            try:
                assert heard.wait(30)
            finally:
                server.kill()

    with pytest.raises(UnavailableError, match="the server that it waited for has ended"):
        construct(wait, port, on_listening)
    assert urls == [f"http://127.0.0.1:{port}"]


def test_another_port_of_a_child_is_not_waited_for() -> None:
    port = free_port()

    def wait() -> None:
        with subprocess.Popen([sys.executable, "-c", LISTEN.replace("time.sleep(60)", "time.sleep(1)"), str(port)]):
            pass

    assert construct(wait, str(port)[:-1], never)
