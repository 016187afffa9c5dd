"""A reader thread's sessions with holders, kept open between fetches."""

from __future__ import annotations

import contextlib
import socket
from collections import OrderedDict

from dynamo.engines.kv_transfer.kv_cache import BlockCopier, KvCache
from dynamo.engines.kv_transfer.session import RemoteKv, Session, SessionError, handshake_as_reader, layout_difference
from dynamo.engines.kv_transfer.staging import SLOT_BYTES, SLOTS, Staging
from dynamo.transport.network import host_id

MAX_SESSIONS = 64  # kept open by one thread
CONNECT_TIMEOUT_S = 2.0


class HolderSessions:
    """Open sessions by holder, and the staging memory and copier of the thread that uses them."""

    def __init__(self, cache: KvCache, secret: bytes, *, shared: bool) -> None:
        """`shared` False: never share staging memory with a holder."""
        self._cache = cache
        self._secret = secret
        self._shared = shared
        self._open: OrderedDict[tuple[str, int], Session] = OrderedDict()
        self._has_staging: dict[Session, bool] = {}
        """for sessions that use shared memory: True once the holder has received the staging memory's descriptor"""
        self._copier: BlockCopier | None = None
        self._staging: Staging | None = None

    @property
    def copier(self) -> BlockCopier:
        """The thread's copier, created on first use."""
        self._copier = self._copier or self._cache.copier()
        return self._copier

    @property
    def staging(self) -> Staging:
        """The thread's staging memory, created on first use."""
        if self._staging is None:
            self._staging = Staging(SLOTS, SLOT_BYTES)
            self.copier.register(self._staging)
        return self._staging

    def get(self, remote: RemoteKv) -> tuple[Session, bool]:
        """Return an open session with a holder and whether it is new. Raises SessionError if none can be opened."""
        key = (remote.address, remote.port)
        session = self._open.get(key)
        if session is not None:
            self._open.move_to_end(key)
            return session, False
        if len(self._open) >= MAX_SESSIONS:
            self._close(self._open.popitem(last=False)[1])
        connection, shared = self._connect(remote)
        session = Session(connection)
        try:
            layout = handshake_as_reader(session, self._secret)
            difference = layout_difference(layout, self._cache.layout)
            if difference:
                raise SessionError(difference)
        except SessionError:
            session.close()
            raise
        session.set_timeout()
        self._open[key] = session
        if shared:
            self._has_staging[session] = False
        return session, True

    def _connect(self, remote: RemoteKv) -> tuple[socket.socket, bool]:
        """Return a connection to a holder and whether memory can be shared over it."""
        if remote.local and remote.host == host_id():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CONNECT_TIMEOUT_S)
            try:
                connection.connect("\0" + remote.local)
                return connection, self._shared
            except OSError:  # the holder is in another network namespace of this host, such as a container's
                connection.close()
        try:
            return socket.create_connection((remote.address, remote.port), CONNECT_TIMEOUT_S), False
        except OSError as error:
            raise SessionError(str(error)) from None

    def is_shared(self, session: Session) -> bool:
        """Return True if the session's bytes go through shared memory."""
        return session in self._has_staging

    def unsent_descriptor(self, session: Session) -> int | None:
        """Return the staging memory's descriptor if the holder needs it and does not have it yet, and count it as sent."""
        if self._has_staging.get(session) is False:
            self._has_staging[session] = True
            return self.staging.descriptor
        return None

    def drop(self, remote: RemoteKv) -> None:
        """Close the session with a holder, if there is one."""
        session = self._open.pop((remote.address, remote.port), None)
        if session is not None:
            self._close(session)

    def _close(self, session: Session) -> None:
        self._has_staging.pop(session, None)
        session.close()

    def close(self) -> None:
        """Close all sessions and the staging memory."""
        for session in self._open.values():
            session.close()
        if self._staging is not None:
            with contextlib.suppress(OSError):
                self.copier.unregister(self._staging)
                self._staging.close()
