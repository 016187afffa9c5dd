"""Staging memory for KV transfer: slots of one size, mapped by both processes if they are on one host.

The memory is an anonymous file (memfd): it leaves no name behind, and is limited only by the memory of the host or
container, where /dev/shm in a container is 64 MB. Its seals keep the peer from shrinking it, which would raise SIGBUS
here.
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
    """Staging memory, created here or received from a peer."""

    def __init__(self, slots: int, slot_bytes: int, descriptor: int | None = None) -> None:
        """Create staging memory, or map the peer's that `descriptor` refers to and take ownership of the descriptor.

        Raises ValueError if the size is out of range, or the peer could still change it; OSError if it cannot be mapped.
        """
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
        self.descriptor = descriptor
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(descriptor, size)
        self.bytes: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._memory, np.uint8)

    def slot(self, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the slot of chunk `number`: chunks use the slots in turn."""
        start = number % self.slots * self.slot_bytes
        return self.bytes[start : start + self.slot_bytes]

    def close(self) -> None:
        """Close the descriptor. The memory is unmapped with its last user, since arrays may still refer to it."""
        os.close(self.descriptor)
