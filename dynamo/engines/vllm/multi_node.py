"""One engine over several hosts: its nodes know of each other's life, which vLLM's do not.

vLLM starts the workers of each node and lets them meet at the leader's `master-addr:master-port`. A node that is lost
later leaves the others waiting in a collective operation. So every node keeps a TCP connection to the leader, at the
port above that one, and whoever loses it ends; all of them start again and meet anew.

A node proves by HMAC-SHA256 over the leader's nonce that it knows the deployment's secret, where the user gave one: a secret
that `dynamo serve` makes is another one on each host, and the proof is then of the protocol alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dynamo.engines.kv_transfer.session import SECRET, SHARED
from dynamo.errors import ConfigError, StartError
from dynamo.transport.network import keep_alive, listening_at

log = logging.getLogger(__name__)

MASTER_ADDRESS, MASTER_PORT = "127.0.0.1", 29501  # vLLM's defaults
CONNECT_TIMEOUT_S = 2.0
RETRY_S = 0.5
HELLO_TIMEOUT_S = 5.0
MAX_NODES = 256  # a rank is one byte
NEWCOMERS = 64
"""connections of which nobody knows yet whether they are nodes; one more ends the oldest"""
NONCE_BYTES = 32
HELLO_BYTES = 1 + hashlib.sha256().digest_size
"""a node's rank and its proof"""
WELCOME = b"\1"

Where = Callable[[str], str]
"""how an error names a setting"""


def number(
    settings: Mapping[str, Any], key: str, default: int, lowest: int, highest: int = 1 << 31, where: Where = str
) -> int:
    """The setting `key`, written with `-` or `_`, or `default`. Raises ConfigError for what is no number in the range."""
    spelled = key.replace("-", "_")
    key = spelled if spelled in settings else key
    value = settings.get(key, default)
    try:
        found = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        found = None
    if found is None or not lowest <= found <= highest:
        allowed = f"{lowest} or more" if highest == 1 << 31 else f"{lowest} to {highest}"
        shown = json.dumps(value, default=str)[:60]
        raise ConfigError(f"{where(key)}: expected a number, {allowed}, found {shown}", hint=f"give {allowed}")
    return found


class _Newcomer:
    """A connection to the leader until its hello is complete."""

    def __init__(self, peer: str) -> None:
        self.peer, self.nonce, self.hello = peer, secrets.token_bytes(NONCE_BYTES), b""
        self.deadline = time.monotonic() + HELLO_TIMEOUT_S


class MultiNode:
    """This node's place among the nodes of an engine. `lost` says which one has gone, once one has."""

    def __init__(self, rank: int, count: int, address: str, port: int) -> None:
        self.rank, self.count, self.address, self.port = rank, count, address, port
        self.lost = ""
        self._on_lost: Callable[[str], None] | None = None
        self._listener: socket.socket | None = None
        self._links: dict[socket.socket, int] = {}
        self._newcomers: dict[socket.socket, _Newcomer] = {}
        self._key = os.environ.get(SECRET, "").encode() if os.environ.get(SHARED) else b""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], where: Where = str) -> MultiNode | None:
        """From vLLM's flags `nnodes`, `node-rank`, `master-addr` and `master-port`; None for an engine of one node.

        Raises ConfigError for what they cannot be, and for data parallelism over nodes: its ranks are workers of their
        own here.
        """
        count = number(arguments, "nnodes", 1, 1, MAX_NODES, where)
        rank = number(arguments, "node-rank", 0, 0, count - 1, where)
        port = number(arguments, "master-port", MASTER_PORT, 1, (1 << 16) - 2, where)
        copies = number(arguments, "data-parallel-size", 1, 1, where=where)
        if count == 1:
            return None
        if copies > 1:
            raise ConfigError(
                f"{where('data-parallel-size')}: {copies} with nnodes: {count}",
                hint="leave data-parallel-size out, and run a worker for each copy of the model: --service-name VllmWorker",
            )
        address = arguments.get("master-addr", arguments.get("master_addr", MASTER_ADDRESS))
        return cls(rank, count, str(address), port + 1)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"node {self.rank} of {self.count} of the engine at {self.address}:{self.port - 1}"

    async def meet(self, progress: Callable[[str], None], on_lost: Callable[[str], None]) -> None:
        """The leader listens from now on; another node waits until it does. Raises StartError for a bad address.

        `on_lost` is called, in a thread, for a node that is lost before `started`.
        """
        self._on_lost = on_lost
        os.register_at_fork(after_in_child=self._let_go)  # an engine core would keep the connections open
        if self.leads:
            self._listen()
        else:
            progress(f"waiting for the leader at {self.address}:{self.port}")
            self._links[await self._connect()] = 0
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()

    def started(self) -> None:
        """The engine runs: a node that is lost from now on is told by `lost` alone."""
        self._on_lost = None

    def _listen(self) -> None:
        try:
            self._listener = listening_at(self.address, self.port)
        except OSError as error:
            raise StartError(
                f"the leader of {self.count} nodes cannot listen on {self.address}:{self.port}: {error.strerror or error}",
                hint="set master-addr to an address of the host with node-rank 0, and leave the port above master-port free",
            ) from None

    async def _connect(self) -> socket.socket:
        loop, told = asyncio.get_running_loop(), False
        while True:
            try:
                found = await loop.run_in_executor(None, self._knock)
            except socket.gaierror as error:
                raise StartError(f"master-addr {self.address}: {error.strerror}", hint="give an IP address") from None
            except OSError as error:
                log.debug("the leader at %s:%d: %s", self.address, self.port, error)
            else:
                if found is not None:
                    return found
                if not told:
                    log.warning(
                        "the leader at %s:%d does not take this node: is %s the same on both hosts, and node-rank %d "
                        "nobody else's? Trying on", self.address, self.port, SECRET, self.rank,
                    )  # fmt: skip
                told = True
            await asyncio.sleep(RETRY_S)

    def _knock(self) -> socket.socket | None:
        """One try to be taken in; None where the leader does not want this node. Raises OSError where there is none."""
        link = socket.create_connection((self.address, self.port), CONNECT_TIMEOUT_S)
        try:
            link.settimeout(HELLO_TIMEOUT_S)
            keep_alive(link)
            if nonce := link.recv(NONCE_BYTES, socket.MSG_WAITALL):
                link.sendall(b"%c" % self.rank + self._proof(nonce, self.rank))
                if link.recv(1) == WELCOME:
                    return link
        except OSError as error:
            log.debug("the leader at %s:%d: %s", self.address, self.port, error)
        link.close()
        return None

    def _proof(self, nonce: bytes, rank: int) -> bytes:
        return hmac.digest(self._key, b"dynamo node %d of %d " % (rank, self.count) + nonce, "sha256")

    def _watch(self) -> None:
        """The thread: takes the other nodes in, once, and notices when one has gone."""
        with selectors.DefaultSelector() as selector:
            for known in self._sockets():
                selector.register(known, selectors.EVENT_READ)
            while not self.lost:
                for key, _ in selector.select(HELLO_TIMEOUT_S if self._newcomers else None):
                    link = key.fileobj
                    assert isinstance(link, socket.socket)
                    if link is self._listener:
                        self._accept(selector)
                    elif link in self._newcomers:
                        self._greet(link, selector)
                    elif link in self._links and not _alive(link):
                        self._lose(f"node {self._links[link]}")
                for late in [late for late, each in self._newcomers.items() if each.deadline < time.monotonic()]:
                    self._refuse(late, selector)
        self._let_go()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            link, peer = self._listener.accept()
            link.setblocking(False)
            selector.register(link, selectors.EVENT_READ)
            self._newcomers[link] = newcomer = _Newcomer(peer[0])
            link.send(newcomer.nonce)  # a socket that was just opened takes it whole
        if len(self._newcomers) > NEWCOMERS:
            self._refuse(next(iter(self._newcomers)), selector)

    def _greet(self, link: socket.socket, selector: selectors.BaseSelector) -> None:
        newcomer, more = self._newcomers[link], b""
        with contextlib.suppress(OSError):
            more = link.recv(HELLO_BYTES - len(newcomer.hello))
        newcomer.hello += more
        if more and len(newcomer.hello) < HELLO_BYTES:
            return
        rank, proof = newcomer.hello[:1], newcomer.hello[1:]
        known = rank and 0 < rank[0] < self.count and rank[0] not in self._links.values()
        if not known or not hmac.compare_digest(proof, self._proof(newcomer.nonce, rank[0])):
            self._refuse(link, selector)
            return
        del self._newcomers[link]
        self._links[link] = rank[0]
        keep_alive(link)
        with contextlib.suppress(OSError):  # gone already: the next look tells
            link.send(WELCOME)
        log.info("node %d of %d has come from %s", rank[0], self.count, newcomer.peer)
        if len(self._links) == self.count - 1:  # one that starts again must wait for the next leader
            assert self._listener is not None
            selector.unregister(self._listener)
            self._listener.close()
            for left in list(self._newcomers):
                self._refuse(left, selector)

    def _refuse(self, link: socket.socket, selector: selectors.BaseSelector) -> None:
        log.warning("a connection from %s is of no node of this engine", self._newcomers.pop(link).peer)
        selector.unregister(link)
        link.close()

    def _lose(self, what: str) -> None:
        self.lost = self.lost or f"{what} of {self.count} of this engine has gone"
        if self._on_lost is not None:
            self._on_lost(self.lost)

    def close(self) -> None:
        """Tell the other nodes, by the end of the connections."""
        self._on_lost = None
        self.lost = self.lost or "closed"
        for link in self._sockets():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes the thread, too

    def _let_go(self) -> None:
        for link in self._sockets():
            link.close()

    def _sockets(self) -> list[socket.socket]:
        return [*self._links, *self._newcomers, *([self._listener] if self._listener is not None else ())]


def _alive(link: socket.socket) -> bool:
    try:
        return bool(link.recv(64))
    except (TimeoutError, BlockingIOError):
        return True
    except OSError:
        return False
