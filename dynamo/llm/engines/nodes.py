"""One engine over several hosts: its nodes know of each other's life, which vLLM's do not.

vLLM starts the workers of each node and lets them meet at the leader's `master-addr:master-port`. A node that is lost
later leaves the others waiting in a collective operation. So every node keeps a TCP connection to the leader, at the
port above that one, and whoever loses it ends; all of them start again and meet anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dynamo.errors import StartError
from dynamo.transport.stream import keep_alive

log = logging.getLogger(__name__)

MASTER_ADDRESS, MASTER_PORT = "127.0.0.1", 29501  # vLLM's defaults
CONNECT_TIMEOUT_S = 2.0
RETRY_S = 0.5
HELLO_TIMEOUT_S = 5.0


class Nodes:
    """This node's place among the nodes of an engine. `lost` says which one has gone, once one has."""

    def __init__(self, rank: int, count: int, address: str, port: int) -> None:
        self.rank, self.count, self.address, self.port = rank, count, address, port
        self.lost = ""
        self._on_lost: Callable[[str], None] | None = None
        self._listener: socket.socket | None = None
        self._links: dict[socket.socket, int] = {}

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Nodes | None:
        """From vLLM's flags `nnodes`, `node-rank`, `master-addr` and `master-port`; None for an engine of one node.

        Raises StartError for data parallelism over nodes: its ranks are workers of their own here.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        count = int(given.get("nnodes", 1))
        if count <= 1:
            return None
        if int(given.get("data-parallel-size", 1)) > 1:
            raise StartError(
                f"data-parallel-size: {given['data-parallel-size']} with nnodes: {count}",
                hint="leave data-parallel-size out, and run a worker for each copy of the model: --service-name VllmWorker",
            )
        address, port = str(given.get("master-addr", MASTER_ADDRESS)), int(given.get("master-port", MASTER_PORT))
        return cls(int(given.get("node-rank", 0)), count, address, port + 1)

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
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            self._listener = socket.create_server((self.address, self.port), family=family)
        except OSError as error:
            raise StartError(
                f"the leader of {self.count} nodes cannot listen on {self.address}:{self.port}: {error.strerror or error}",
                hint="set master-addr to an address of the host with node-rank 0, and leave the port above master-port free",
            ) from None

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                found = await loop.run_in_executor(
                    None, socket.create_connection, (self.address, self.port), CONNECT_TIMEOUT_S
                )
            except socket.gaierror as error:
                raise StartError(f"master-addr {self.address}: {error.strerror}", hint="give an IP address") from None
            except OSError as error:
                log.debug("the leader at %s:%d: %s", self.address, self.port, error)
                await asyncio.sleep(RETRY_S)
                continue
            keep_alive(found)
            found.sendall(b"%c" % self.rank)
            return found

    def _watch(self) -> None:
        """The thread: takes the other nodes in, once, and notices when one has gone."""
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link, selectors.EVENT_READ)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            while not self.lost:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket) and not _alive(key.fileobj):
                        self._lose(f"node {self._links[key.fileobj]}")
        self._let_go()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            link, peer = self._listener.accept()
            link.settimeout(HELLO_TIMEOUT_S)
            rank = link.recv(1)
            if not rank or not 0 < rank[0] < self.count or rank[0] in self._links.values():
                log.warning("a connection from %s is of no node of this engine", peer[0])
                link.close()
                return
            keep_alive(link)
            self._links[link] = rank[0]
            selector.register(link, selectors.EVENT_READ)
            log.info("node %d of %d has come from %s", rank[0], self.count, peer[0])
        if len(self._links) == self.count - 1:  # one that starts again must wait for the next leader
            selector.unregister(self._listener)
            self._listener.close()

    def _lose(self, what: str) -> None:
        self.lost = self.lost or f"{what} of {self.count} of this engine has gone"
        if self._on_lost is not None:
            self._on_lost(self.lost)

    def close(self) -> None:
        """Tell the other nodes, by the end of the connections."""
        self._on_lost = None
        self.lost = self.lost or "closed"
        for link in (*self._links, *([self._listener] if self._listener is not None else ())):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes the thread, too

    def _let_go(self) -> None:
        for link in (*self._links, *([self._listener] if self._listener is not None else ())):
            link.close()


def _alive(link: socket.socket) -> bool:
    try:
        return bool(link.recv(64))
    except TimeoutError:
        return True
    except OSError:
        return False
