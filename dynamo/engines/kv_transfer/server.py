"""The holder's side: serves pulls, one thread per connection, while the engine computes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence

from dynamo.engines.kv_transfer.kv_cache import BlockCopier, KvCache, chunks
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
    handshake_as_holder,
)
from dynamo.engines.kv_transfer.staging import Staging
from dynamo.transport.network import listening_socket

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512


class KvServer:
    """Serves the leased blocks of one cache, on TCP and, for its own host, on an abstract unix socket.

    Listens as soon as it is constructed. Its threads are daemons and end with the process.
    """

    def __init__(self, cache: KvCache, leases: KvLeases, secret: bytes, address: str, bound: str = "") -> None:
        """Listen on `bound`, or on `address` if it is empty; readers connect to `address`."""
        self._cache = cache
        self._leases = leases
        self._secret = secret
        self._connection_limit = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._logged_wrong_secret = False
        tcp = listening_socket(bound or address)
        self.address = address
        self.port = int(tcp.getsockname()[1])
        self.local = ""
        self._listeners = [tcp]
        if hasattr(os, "memfd_create"):  # Linux, which also has abstract sockets: they leave no file behind
            self.local = f"dynamo-kv-{os.urandom(8).hex()}"
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            unix.bind("\0" + self.local)
            unix.listen(128)
            self._listeners.append(unix)
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="kv accept", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Open connections are served on."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(), which close() alone does not
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self._connection_limit.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="kv holder", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        session = Session(connection)
        try:
            if handshake_as_holder(session, self._secret, self._cache.layout):
                _Connection(session, self._cache, self._leases).serve()
            else:
                level = logging.DEBUG if self._logged_wrong_secret else logging.WARNING
                log.log(level, "KV transfer refused: the peer has another secret")
                self._logged_wrong_secret = True
        except SessionError as error:
            log.debug("session with a KV reader ended: %s", error)
        except Exception:
            log.exception("session with a KV reader failed")
        finally:
            session.close()
            self._connection_limit.release()


class _Connection:
    """A reader's connection: serves its fetches one after the other."""

    def __init__(self, session: Session, cache: KvCache, leases: KvLeases) -> None:
        self._session = session
        self._cache = cache
        self._leases = leases
        self._copier: BlockCopier | None = None
        self._staging: Staging | None = None

    def serve(self) -> None:
        """Serve until the session fails, which raises SessionError."""
        try:
            while True:
                self._session.clear_timeout()
                message, descriptor = self._session.receive_with_descriptor(FromReader)
                self._session.set_timeout()
                if isinstance(message, Fetch):
                    self._fetch(message, descriptor)
                elif isinstance(message, Done):
                    self._end_lease(message.lease_id)
                else:
                    raise SessionError("received Next without a Fetch")
        finally:
            if self._staging is not None:
                self._close_staging(self._staging)

    def _end_lease(self, lease_id: str) -> None:
        if self._leases.begin_read(lease_id) is not None:
            self._leases.end_read(lease_id, done=True)

    def _fetch(self, fetch: Fetch, descriptor: int | None) -> None:
        """Answer a fetch, and end the lease if the reader then sends Done."""
        staging = self._staging_for(fetch, descriptor)
        held = self._leases.begin_read(fetch.lease_id)
        if held is None:
            self._session.send(Refused("the lease has ended"))
            return
        done = False
        try:
            wanted = held[fetch.first : fetch.first + fetch.blocks] if fetch.first >= 0 else []
            if not wanted or len(wanted) != fetch.blocks:
                self._session.send(Refused(f"the lease has only {len(held)} blocks"))
                return
            self._send(wanted, staging, shared=fetch.slots > 0)
            done = isinstance(self._session.receive(FromReader), Done)
        finally:
            self._leases.end_read(fetch.lease_id, done=done)

    def _send(self, blocks: Sequence[int], staging: Staging, *, shared: bool) -> None:
        """Send blocks chunk by chunk; in `shared` memory, fill at most as many slots as the reader has emptied."""
        copier = self._copier = self._copier or self._cache.copier()
        unread = 0
        for number, segments in enumerate(chunks(self._cache.block_bytes, len(blocks), staging.slot_bytes)):
            if shared and unread == staging.slots:
                self._wait_for_next()
                unread -= 1
            slot = staging.slot(number)
            copier.gather(blocks, segments, slot)
            self._session.send(Filled())
            unread += 1
            if not shared:
                self._session.send_bytes(slot[: self._cache.chunk_bytes(segments)])
        while shared and unread:
            self._wait_for_next()
            unread -= 1

    def _wait_for_next(self) -> None:
        if not isinstance(self._session.receive(FromReader), Next):
            raise SessionError("the reader ended the fetch early")

    def _staging_for(self, fetch: Fetch, descriptor: int | None) -> Staging:
        """Return the reader's staging memory, whose descriptor comes with its first fetch, or private memory from which
        the bytes are sent. Raises SessionError if the memory is unsuitable or differs from that of an earlier fetch.
        """
        slots = max(fetch.slots, 1)
        if self._staging is not None:
            if descriptor is not None:
                os.close(descriptor)
                raise SessionError("received a second staging memory")
            if (self._staging.slots, self._staging.slot_bytes) != (slots, fetch.slot_bytes):
                raise SessionError("the size of the staging memory changed")
            return self._staging
        if fetch.slots and descriptor is None:
            raise SessionError("received a fetch into staging memory without its descriptor")
        try:
            staging = Staging(slots, fetch.slot_bytes, descriptor)
        except (OSError, ValueError) as error:
            raise SessionError(f"unsuitable staging memory: {error}") from None
        self._copier = self._copier or self._cache.copier()
        self._copier.register(staging)
        self._staging = staging
        return staging

    def _close_staging(self, staging: Staging) -> None:
        assert self._copier is not None
        self._copier.unregister(staging)
        staging.close()
