"""The holder's side: answers those who pull, one thread a connection, while the engine computes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence

from dynamo.engines.kv_transfer.kv_cache import KvCache, Mover, chunks
from dynamo.engines.kv_transfer.kv_leases import KvLeases
from dynamo.engines.kv_transfer.session import (
    Done,
    Fetch,
    Filled,
    FromReader,
    Next,
    Refused,
    Session,
    SessionError,
    greet_as_holder,
)
from dynamo.engines.kv_transfer.staging import Staging
from dynamo.transport.network import listening_socket

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512


class Server:
    """Listens from the start, on TCP and, for its own host, on an abstract unix socket; gone with the process.

    `address` is what readers are told, `bound` where it listens if that is another one.
    """

    def __init__(self, cache: KvCache, holdings: KvLeases, secret: bytes, address: str, bound: str = "") -> None:
        self._cache, self._holdings, self._secret = cache, holdings, secret
        self._seats = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._told = False
        tcp = listening_socket(bound or address)
        self.address, self.port = address, int(tcp.getsockname()[1])
        self.local = ""
        self._listeners = [tcp]
        if hasattr(os, "memfd_create"):  # Linux, which has abstract sockets, too: no file, gone with the process
            self.local = f"dynamo-kv-{os.urandom(8).hex()}"
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            unix.bind("\0" + self.local)
            unix.listen(128)
            self._listeners.append(unix)
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="kv accept", daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts; closing alone does not
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self._seats.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="kv holder", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        session = Session(connection)
        try:
            if greet_as_holder(session, self._secret, self._cache.layout):
                _Reader(session, self._cache, self._holdings).serve()
            else:
                log.log(logging.DEBUG if self._told else logging.WARNING, "KV is refused to peers with another secret")
                self._told = True
        except SessionError as error:
            log.debug("a reader of KV: %s", error)
        except Exception:
            log.exception("a reader of KV cannot be served")
        finally:
            session.close()
            self._seats.release()


class _Reader:
    """One connection: fetches one after the other."""

    def __init__(self, session: Session, cache: KvCache, holdings: KvLeases) -> None:
        self._session, self._cache, self._holdings = session, cache, holdings
        self._mover: Mover | None = None
        self._staging: Staging | None = None

    def serve(self) -> None:
        try:
            while True:
                self._session.wait_long()
                message, descriptor = self._session.receive_with_descriptor(FromReader)
                self._session.wait_briefly()
                if isinstance(message, Fetch):
                    self._fetch(message, descriptor)
                elif isinstance(message, Done):
                    self._release(message.holding)
                else:
                    raise SessionError("Next without a fetch")
        finally:
            if self._staging is not None:
                self._forget(self._staging)

    def _release(self, holding: str) -> None:
        if self._holdings.open(holding) is not None:
            self._holdings.close(holding, done=True)

    def _fetch(self, fetch: Fetch, descriptor: int | None) -> None:
        staging = self._staging_for(fetch, descriptor)
        held = self._holdings.open(fetch.holding)
        if held is None:
            self._session.send(Refused("it is not held any more"))
            return
        done = False
        try:
            wanted = held[fetch.first : fetch.first + fetch.blocks] if fetch.first >= 0 else []
            if not wanted or len(wanted) != fetch.blocks:
                self._session.send(Refused(f"{len(held)} blocks are held"))
                return
            self._send(wanted, staging, shared=fetch.slots > 0)
            done = isinstance(self._session.receive(FromReader), Done)
        finally:
            self._holdings.close(fetch.holding, done=done)

    def _send(self, blocks: Sequence[int], staging: Staging, *, shared: bool) -> None:
        mover = self._mover = self._mover or self._cache.mover()
        waiting = 0
        for number, pieces in enumerate(chunks(self._cache.block_bytes, len(blocks), staging.slot_bytes)):
            if shared and waiting == staging.slots:
                if not isinstance(self._session.receive(FromReader), Next):
                    raise SessionError("the reader stopped")
                waiting -= 1
            slot = staging.slot(number)
            mover.gather(blocks, pieces, slot)
            self._session.send(Filled())
            waiting += 1
            if not shared:
                self._session.send_bytes(slot[: self._cache.used(pieces)])
        while shared and waiting:
            if not isinstance(self._session.receive(FromReader), Next):
                raise SessionError("the reader stopped")
            waiting -= 1

    def _staging_for(self, fetch: Fetch, descriptor: int | None) -> Staging:
        """The reader's memory, whose descriptor comes with the first fetch; or one's own, for bytes on the way out."""
        if self._staging is not None:
            if descriptor is not None:
                os.close(descriptor)
                raise SessionError("a second staging memory")
            if (self._staging.slots, self._staging.slot_bytes) != (max(fetch.slots, 1), fetch.slot_bytes):
                raise SessionError("the staging memory changed")
            return self._staging
        if fetch.slots and descriptor is None:
            raise SessionError("a fetch through memory that was not sent")
        try:
            staging = Staging(max(fetch.slots, 1), fetch.slot_bytes, descriptor)
        except (OSError, ValueError) as error:
            raise SessionError(f"unfit staging memory: {error}") from None
        self._mover = self._mover or self._cache.mover()
        self._mover.adopt(staging)
        self._staging = staging
        return staging

    def _forget(self, staging: Staging) -> None:
        assert self._mover is not None
        self._mover.release(staging)
        staging.close()
