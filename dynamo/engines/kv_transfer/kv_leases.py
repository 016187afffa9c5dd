"""Leases of KV blocks: blocks are kept until they have been read or their lease expires."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EARLY_READER_TIMEOUT_S = 5.0
"""how long a reader waits for its lease to be granted: a request may overtake the engine step that grants the lease"""
MAX_ENDED = 4096  # ids of ended leases that are remembered, so that their readers need not wait


@dataclass
class _Lease:
    blocks: Sequence[int]
    expires: float
    readers: int = 0
    done: bool = False


class KvLeases:
    """Leases by id. Used by the engine's thread (`grant`, `pop_ended`) and by readers' (`begin_read`, `end_read`).

    A lease does not expire while it is being read, since its blocks must not be reused meanwhile; readers that fall
    silent are disconnected by the server.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, _Lease] = {}
        self._ended: dict[str, None] = {}
        self._changed = threading.Condition()

    def grant(self, lease_id: str, blocks: Sequence[int]) -> None:
        """Keep blocks, given in the prompt's order, for `lease_s` from now on."""
        with self._changed:
            self._leases[lease_id] = _Lease(blocks, self._clock() + self._lease_s)
            self._changed.notify_all()

    def begin_read(self, lease_id: str, timeout_s: float | None = None) -> Sequence[int] | None:
        """Return the lease's blocks in the prompt's order, to be followed by `end_read`; None if the lease has ended.

        Waits up to `timeout_s` (EARLY_READER_TIMEOUT_S by default) for a lease that is not granted yet, then returns None.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: lease_id in self._leases or lease_id in self._ended,
                EARLY_READER_TIMEOUT_S if timeout_s is None else timeout_s,
            )
            lease = self._leases.get(lease_id)
            if lease is None or lease.done:
                return None
            lease.readers += 1
            return lease.blocks

    def end_read(self, lease_id: str, *, done: bool) -> None:
        """End a read; `done` ends the lease too, because its blocks will not be read again."""
        with self._changed:
            lease = self._leases[lease_id]
            lease.readers -= 1
            lease.done = lease.done or done

    def pop_ended(self) -> tuple[set[str], int]:
        """Remove ended leases; return their ids, whose blocks are free now, and how many of them expired unfetched."""
        with self._changed:
            now = self._clock()
            free = {
                i for i, lease in self._leases.items() if not lease.readers and (lease.done or lease.expires <= now)
            }
            expired = sum(not self._leases.pop(lease_id).done for lease_id in free)
            self._ended.update(dict.fromkeys(free))
            while len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
            return free, expired

    def __len__(self) -> int:
        return len(self._leases)
