"""The reader's side: fetches KV into this engine's cache on a few threads, while the engine computes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from dynamo.engines.kv_transfer.holder_sessions import HolderSessions
from dynamo.engines.kv_transfer.kv_cache import KvCache, chunks
from dynamo.engines.kv_transfer.session import (
    Done,
    Fetch,
    Filled,
    FromHolder,
    Next,
    RefusedError,
    RemoteKv,
    Session,
    SessionError,
)

log = logging.getLogger(__name__)

THREADS = 4
MAX_LOGGED_REASONS = 100  # different reasons logged as warnings, each once
UNREACHABLE_S = 5.0
"""how long a holder is not tried again after a failed connection, so that other pulls do not wait for the same"""


class Pull(NamedTuple):
    """A request's fetch: block numbers of this engine, to be filled from the lease's blocks from position `first` on.

    Without blocks, the lease is only released.
    """

    request: str
    remote: RemoteKv
    first: int
    blocks: Sequence[int]
    allocated: Any = None
    """`KvCache.record_event` at the time when the blocks were allocated to the request"""


class PullResults(NamedTuple):
    """Pulls that ended since the last `take_results`."""

    requests: set[str]
    """requests whose pull ended, successfully or not"""
    failed_blocks: set[int]
    pulls: int
    failures: int
    bytes: int
    seconds: float
    """summed over all pulls, each from the time when a thread began it until its end"""


NO_RESULTS = PullResults(set(), set(), 0, 0, 0, 0.0)


class _CancelledError(Exception):
    """The request ended while its KV was being fetched."""


class Puller:
    """A queue of pulls and the threads that work on it, which start with it and end with `close`."""

    def __init__(self, cache: KvCache, secret: bytes, *, threads: int = THREADS, shared: bool = True) -> None:
        """`shared` False: use sockets even for holders with which memory could be shared."""
        self._cache = cache
        self._secret = secret
        self._shared = shared
        self._queue: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._cancelled: set[str] = set()
        self._unreachable: dict[tuple[str, int], tuple[float, str]] = {}
        """by address and port: until when a holder is not tried again, and why"""
        self._logged_reasons: set[str] = set()
        self._results = NO_RESULTS
        self._threads = [threading.Thread(target=self._run, name="kv puller", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, pull: Pull) -> None:
        """Queue a pull. Its request appears in `take_results` if it has blocks."""
        with self._lock:
            if pull.blocks:
                self._pending.add(pull.request)
        self._queue.put(pull)

    def cancel(self, requests: Collection[str]) -> None:
        """Cancel pulls of these requests, which end soon, and after SILENCE_S if the holder is silent.

        Requests without a pending pull are ignored.
        """
        with self._lock:
            self._cancelled |= self._pending.intersection(requests)

    def take_results(self) -> PullResults:
        """Return the pulls that have ended since the last call."""
        with self._lock:
            results = self._results
            self._results = NO_RESULTS
        return results

    def close(self) -> None:
        """End the threads after the pulls that are queued."""
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        sessions = HolderSessions(self._cache, self._secret, shared=self._shared)
        while (pull := self._queue.get()) is not None:
            started = time.monotonic()
            failed = False
            size = 0
            try:
                size = self._pull(pull, sessions)
            except _CancelledError:
                pass
            except Exception as error:
                failed = True
                sessions.drop(pull.remote)
                self._log_failure(pull, error)
            self._record(pull, failed=failed, size=size, seconds=time.monotonic() - started)
        sessions.close()

    def _record(self, pull: Pull, *, failed: bool, size: int, seconds: float) -> None:
        """Add a pull that has ended to the results."""
        with self._lock:
            self._pending.discard(pull.request)
            cancelled = pull.request in self._cancelled
            self._cancelled.discard(pull.request)
            if not pull.blocks:
                return
            results = self._results
            self._results = PullResults(
                results.requests | {pull.request},
                results.failed_blocks.union(pull.blocks if failed and not cancelled else ()),
                pulls=results.pulls + 1,
                failures=results.failures + failed,
                bytes=results.bytes + size,
                seconds=results.seconds + seconds,
            )

    def _log_failure(self, pull: Pull, error: Exception) -> None:
        """Log a failed pull: each reason once as a warning, errors of our own with their traceback."""
        if not isinstance(error, (SessionError, OSError, ValueError)):
            log.error("fetch of KV failed for request %s", pull.request, exc_info=error)
            return
        reason = str(error)
        level = logging.DEBUG if reason in self._logged_reasons else logging.WARNING
        if len(self._logged_reasons) < MAX_LOGGED_REASONS:
            self._logged_reasons.add(reason)
        remote = pull.remote
        if pull.blocks:
            text = "KV of request %s not fetched from %s:%d, it is computed here: %s"
        else:
            text = "KV lease of request %s not released at %s:%d, it will expire: %s"
        log.log(level, text, pull.request, remote.address, remote.port, reason)

    def _pull(self, pull: Pull, sessions: HolderSessions) -> int:
        """Fetch the blocks of a pull and return how many bytes they have. Raises SessionError if that fails."""
        remote = pull.remote
        if self._is_cancelled(pull):
            pull = pull._replace(blocks=())
        session, is_new = self._connect(remote, sessions)
        try:
            return self._fetch(pull, session, sessions)
        except SessionError as error:
            if is_new or isinstance(error, RefusedError):
                raise
            sessions.drop(remote)  # the holder may have closed an idle session: try again with a new one
            session, _ = sessions.get(remote)
            return self._fetch(pull, session, sessions)

    def _connect(self, remote: RemoteKv, sessions: HolderSessions) -> tuple[Session, bool]:
        """Return an open session and whether it is new. Raises SessionError if none can be opened, and for UNREACHABLE_S
        after that without trying.
        """
        holder = (remote.address, remote.port)
        until, reason = self._unreachable.get(holder, (0.0, ""))
        if time.monotonic() < until:
            raise SessionError(reason)
        self._unreachable.pop(holder, None)
        try:
            return sessions.get(remote)
        except SessionError as error:
            self._unreachable[holder] = (time.monotonic() + UNREACHABLE_S, str(error))
            raise

    def _is_cancelled(self, pull: Pull) -> bool:
        with self._lock:
            return pull.request in self._cancelled

    def _fetch(self, pull: Pull, session: Session, sessions: HolderSessions) -> int:
        """Fetch blocks, if the pull has any, and end the lease; return the number of bytes fetched.

        Raises SessionError if the session fails, RefusedError if the holder refuses, _CancelledError if the request ends.
        """
        lease_id = pull.remote.lease_id
        if not pull.blocks:
            session.send(Done(lease_id))
            return 0
        staging = sessions.staging
        copier = sessions.copier
        shared = sessions.is_shared(session)
        fetch = Fetch(lease_id, pull.first, len(pull.blocks), staging.slot_bytes, staging.slots if shared else 0)
        session.send(fetch, sessions.unsent_descriptor(session))
        copier.wait_event(pull.allocated)
        block_bytes = self._cache.block_bytes
        for number, segments in enumerate(chunks(block_bytes, len(pull.blocks), staging.slot_bytes)):
            if self._is_cancelled(pull):
                # the old session is in the middle of the fetch
                sessions.drop(pull.remote)
                session, _ = sessions.get(pull.remote)
                session.send(Done(lease_id))
                raise _CancelledError
            answer = session.receive(FromHolder)
            if not isinstance(answer, Filled):
                raise RefusedError(answer.reason)
            slot = staging.slot(number)
            if not shared:
                session.receive_bytes(slot[: self._cache.chunk_bytes(segments)])
            copier.scatter(pull.blocks, segments, slot)
            if shared:
                session.send(Next())
        session.send(Done(lease_id))
        return sum(block_bytes) * len(pull.blocks)
