"""Memory through which KV goes: slots of one size, which on one host both processes map.

It is an anonymous file (memfd): it has no name to be left behind, and no limit but the host's or container's memory,
where /dev/shm in a container is 64 MB. Its seals keep the peer from shrinking it, which would be a SIGBUS here.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np

SLOTS = 2  # one is filled while the other is emptied
SLOT_BYTES = 16 << 20
MAX_BYTES = 1 << 30
_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4)


class Staging:
    def __init__(self, slots: int, slot_bytes: int, descriptor: int | None = None) -> None:
        """Of one's own, or a peer's, whose descriptor is taken over. Raises OSError or ValueError where it is unfit."""
        size = slots * slot_bytes
        if not 0 < size <= MAX_BYTES:
            raise ValueError(f"staging memory of {size} bytes")
        if descriptor is None:
            descriptor = os.memfd_create("dynamo-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        elif fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            raise ValueError("the peer's staging memory can change its size")
        self.descriptor, self.slots, self.slot_bytes = descriptor, slots, slot_bytes
        self._memory = mmap.mmap(descriptor, size)
        self.bytes: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._memory, np.uint8)

    def slot(self, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        start = number % self.slots * self.slot_bytes
        return self.bytes[start : start + self.slot_bytes]

    def close(self) -> None:
        """The memory itself goes with its last user: arrays may still refer to it."""
        os.close(self.descriptor)
