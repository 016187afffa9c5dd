"""The reader's side: fetches KV into this engine's cache on a few threads, while the engine computes."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from dynamo.engines.kv_transfer.kv_cache import KvCache, Mover, chunks
from dynamo.engines.kv_transfer.session import (
    Done,
    Fetch,
    Filled,
    FromHolder,
    Next,
    Offer,
    RefusedError,
    Session,
    SessionError,
    difference,
    greet_as_reader,
)
from dynamo.engines.kv_transfer.staging import SLOT_BYTES, SLOTS, Staging
from dynamo.transport.network import host_id

log = logging.getLogger(__name__)

THREADS = 4
MAX_SESSIONS = 64  # kept open by one thread
CONNECT_TIMEOUT_S = 2.0
MAX_TOLD = 100  # different reasons in the log, each once
SHUN_S = 5.0
"""after a connection that failed: others would wait for the same"""


class Pull(NamedTuple):
    """What to fetch for a request. `blocks` are this engine's, for the holding's blocks from the `first` on.

    No blocks: only tell the holder that nobody will come.
    """

    request: str
    offer: Offer
    first: int
    blocks: Sequence[int]
    mark: Any = None
    """`KvCache.mark` of when the blocks became this request's"""


class Pulled(NamedTuple):
    """What happened since the last look."""

    requests: set[str]
    """whose pull ended, one way or the other"""
    failed_blocks: set[int]
    pulls: int
    failures: int
    bytes: int
    seconds: float
    """summed over all pulls, from their turn to their end"""


NOTHING = Pulled(set(), set(), 0, 0, 0, 0.0)


class _CancelledError(Exception):
    """The request is over: nobody reads what is being fetched."""


class Puller:
    def __init__(self, cache: KvCache, secret: bytes, *, threads: int = THREADS, shared: bool = True) -> None:
        """`shared` False: through sockets also where memory could be shared."""
        self._cache, self._secret, self._shared = cache, secret, shared
        self._host = host_id()
        self._jobs: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._cancelled: set[str] = set()
        self._shunned: dict[tuple[str, int], tuple[float, str]] = {}
        self._told: set[str] = set()
        self._ended = NOTHING
        self._threads = [threading.Thread(target=self._run, name="kv puller", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, pull: Pull) -> None:
        with self._lock:
            if pull.blocks:
                self._pending.add(pull.request)
        self._jobs.put(pull)

    def cancel(self, requests: Collection[str]) -> None:
        """They end soon, at the latest when the holder is silent for too long; others than pending ones are ignored."""
        with self._lock:
            self._cancelled |= self._pending.intersection(requests)

    def take(self) -> Pulled:
        with self._lock:
            ended, self._ended = self._ended, NOTHING
        return ended

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        sessions = _Sessions(self._cache, self._secret, shared=self._shared, host=self._host)
        while (pull := self._jobs.get()) is not None:
            started = time.monotonic()
            failed, size = False, 0
            try:
                size = self._pull(pull, sessions)
            except _CancelledError:
                pass
            except Exception as error:
                failed = True
                sessions.drop(pull.offer)
                self._tell(pull, error)
            with self._lock:
                self._pending.discard(pull.request)
                cancelled = pull.request in self._cancelled
                self._cancelled.discard(pull.request)
                if not pull.blocks:
                    continue
                ended = self._ended
                self._ended = Pulled(
                    ended.requests | {pull.request},
                    ended.failed_blocks.union(pull.blocks if failed and not cancelled else ()),
                    pulls=ended.pulls + 1,
                    failures=ended.failures + failed,
                    bytes=ended.bytes + size,
                    seconds=ended.seconds + time.monotonic() - started,
                )
        sessions.close()

    def _tell(self, pull: Pull, error: Exception) -> None:
        if not isinstance(error, (SessionError, OSError, ValueError)):
            log.error("KV of request %s cannot be fetched", pull.request, exc_info=error)
            return
        offer = pull.offer
        known = str(error) in self._told
        if len(self._told) < MAX_TOLD:
            self._told.add(str(error))
        what = "fetched; this engine computes it" if pull.blocks else "released; its lease will end"
        log.log(
            logging.DEBUG if known else logging.WARNING,
            "KV at %s:%d for request %s cannot be %s: %s",
            offer.address,
            offer.port,
            pull.request,
            what,
            error,
        )

    def _pull(self, pull: Pull, sessions: _Sessions) -> int:
        offer, place = pull.offer, (pull.offer.address, pull.offer.port)
        if self._is_cancelled(pull):
            pull = pull._replace(blocks=())
        until, reason = self._shunned.get(place, (0.0, ""))
        if time.monotonic() < until:
            raise SessionError(reason)
        self._shunned.pop(place, None)
        try:
            session, fresh = sessions.get(offer)
        except SessionError as error:
            self._shunned[place] = (time.monotonic() + SHUN_S, str(error))
            raise
        try:
            return self._fetch(pull, session, sessions)
        except SessionError as error:
            if fresh or isinstance(error, RefusedError):
                raise
            sessions.drop(offer)  # the holder may have closed it long ago: it deserves a second try
            session, _ = sessions.get(offer)
            return self._fetch(pull, session, sessions)

    def _is_cancelled(self, pull: Pull) -> bool:
        with self._lock:
            return pull.request in self._cancelled

    def _fetch(self, pull: Pull, session: Session, sessions: _Sessions) -> int:
        """Bytes that were fetched."""
        if not pull.blocks:
            session.send(Done(pull.offer.holding))
            return 0
        staging, mover, shared = sessions.staging, sessions.mover, sessions.is_shared(session)
        fetch = Fetch(pull.offer.holding, pull.first, len(pull.blocks), SLOT_BYTES, SLOTS if shared else 0)
        session.send(fetch, sessions.descriptor(session))
        mover.order_after(pull.mark)
        sizes = self._cache.block_bytes
        for number, pieces in enumerate(chunks(sizes, len(pull.blocks), SLOT_BYTES)):
            if self._is_cancelled(pull):
                sessions.drop(pull.offer)
                session, _ = sessions.get(pull.offer)
                session.send(Done(pull.offer.holding))
                raise _CancelledError
            answer = session.receive(FromHolder)
            if not isinstance(answer, Filled):
                raise RefusedError(answer.reason)
            slot = staging.slot(number)
            if not shared:
                session.receive_bytes(slot[: self._cache.used(pieces)])
            mover.scatter(pull.blocks, pieces, slot)
            if shared:
                session.send(Next())
        session.send(Done(pull.offer.holding))
        return sum(sizes) * len(pull.blocks)


class _Sessions:
    """Open connections of one thread to holders, and the memory through which it fetches."""

    def __init__(self, cache: KvCache, secret: bytes, *, shared: bool, host: str) -> None:
        self._cache, self._secret, self._shared, self._host = cache, secret, shared, host
        self._open: OrderedDict[tuple[str, int], Session] = OrderedDict()
        self._local: dict[Session, bool] = {}
        """sessions on this host, and whether the holder has the staging memory"""
        self._mover: Mover | None = None
        self._staging: Staging | None = None

    @property
    def mover(self) -> Mover:
        self._mover = self._mover or self._cache.mover()
        return self._mover

    @property
    def staging(self) -> Staging:
        if self._staging is None:
            self._staging = Staging(SLOTS, SLOT_BYTES)
            self.mover.adopt(self._staging)
        return self._staging

    def get(self, offer: Offer) -> tuple[Session, bool]:
        """An open session and whether it is new."""
        key = (offer.address, offer.port)
        session = self._open.get(key)
        if session is not None:
            self._open.move_to_end(key)
            return session, False
        if len(self._open) >= MAX_SESSIONS:
            self._close(self._open.popitem(last=False)[1])
        connection, local = self._connect(offer)
        session = Session(connection)
        try:
            layout = greet_as_reader(session, self._secret)
            unequal = difference(layout, self._cache.layout)
            if unequal:
                raise SessionError(unequal)
        except SessionError:
            session.close()
            raise
        session.wait_briefly()
        self._open[key] = session
        if local:
            self._local[session] = False
        return session, True

    def _connect(self, offer: Offer) -> tuple[socket.socket, bool]:
        if offer.local and offer.host == self._host:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CONNECT_TIMEOUT_S)
            try:
                connection.connect("\0" + offer.local)
                return connection, self._shared
            except OSError:  # another network namespace of this host: a container
                connection.close()
        try:
            return socket.create_connection((offer.address, offer.port), CONNECT_TIMEOUT_S), False
        except OSError as error:
            raise SessionError(str(error)) from None

    def is_shared(self, session: Session) -> bool:
        return session in self._local

    def descriptor(self, session: Session) -> int | None:
        """The staging memory's, for a holder that does not have it yet."""
        if self._local.get(session) is False:
            self._local[session] = True
            return self.staging.descriptor
        return None

    def drop(self, offer: Offer) -> None:
        session = self._open.pop((offer.address, offer.port), None)
        if session is not None:
            self._close(session)

    def _close(self, session: Session) -> None:
        self._local.pop(session, None)
        session.close()

    def close(self) -> None:
        for session in self._open.values():
            session.close()
        if self._staging is not None:
            with contextlib.suppress(OSError):
                self.mover.release(self._staging)
                self._staging.close()
