"""Blocks that are kept for a reader: until they were read, or their lease ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EARLY_S = 5.0
"""how long a reader waits for a holding to appear: its offer may overtake the engine step that tells of it"""
REMEMBERED = 4096  # names of holdings that ended: whoever comes for them need not wait


@dataclass
class _Holding:
    blocks: Sequence[int]
    expires: float
    readers: int = 0
    done: bool = False


class KvLeases:
    """Used by the engine's thread (`hold`, `take_finished`) and by those of readers (`open`, `close`).

    A holding with a reader outlives its lease, so that nobody reads blocks that are in use again; readers are given up
    when they are silent.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._held: dict[str, _Holding] = {}
        self._ended: dict[str, None] = {}
        self._changed = threading.Condition()

    def hold(self, name: str, blocks: Sequence[int]) -> None:
        with self._changed:
            self._held[name] = _Holding(blocks, self._clock() + self._lease_s)
            self._changed.notify_all()

    def open(self, name: str, timeout_s: float | None = None) -> Sequence[int] | None:
        """Blocks in the prompt's order, to be closed; None where nothing (more) is held under that name."""
        with self._changed:
            self._changed.wait_for(
                lambda: name in self._held or name in self._ended, EARLY_S if timeout_s is None else timeout_s
            )
            found = self._held.get(name)
            if found is None or found.done:
                return None
            found.readers += 1
            return found.blocks

    def close(self, name: str, *, done: bool) -> None:
        """`done`: nobody will read it again."""
        with self._changed:
            holding = self._held[name]
            holding.readers -= 1
            holding.done = holding.done or done

    def take_finished(self) -> tuple[set[str], int]:
        """Names whose blocks are free now, each told once, and how many of them nobody had read."""
        with self._changed:
            now = self._clock()
            free = {n for n, h in self._held.items() if not h.readers and (h.done or h.expires <= now)}
            expired = sum(not self._held.pop(name).done for name in free)
            self._ended.update(dict.fromkeys(free))
            while len(self._ended) > REMEMBERED:
                del self._ended[next(iter(self._ended))]
            return free, expired

    def __len__(self) -> int:
        return len(self._held)
