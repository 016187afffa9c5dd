"""Identity of KV blocks: a chained hash of their tokens, the same on every host and for every engine."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import NewType, cast

from xxhash import xxh3_64_intdigest

BlockHash = NewType("BlockHash", int)
"""64 bits; stands for a block's tokens and all tokens before it"""

ROOT = BlockHash(0)
"""parent of a prompt's first block"""

# a cast, since BlockHash(...) in the loop would be a Python call for each block
_digest = cast(Callable[[bytes, int], BlockHash], xxh3_64_intdigest)


def block_hashes(token_ids: Sequence[int], block_size: int, parent: BlockHash = ROOT) -> list[BlockHash]:
    """Return a hash for each full block of `block_size` tokens; the rest at the end has none.

    A block's hash is xxh3 of its tokens (32 bits each, little-endian) seeded with its parent's hash: equal hashes mean
    equal prefixes. `parent` continues a chain.
    """
    packed = array("I", token_ids)
    previous = parent
    blocks = struct.unpack_from(f"{4 * block_size}s" * (len(packed) // block_size), packed)
    return [previous := _digest(block, previous) for block in blocks]


def pack(hashes: Sequence[BlockHash]) -> bytes:
    """Encode hashes for a message: 8 bytes each, little-endian."""
    return array("Q", hashes).tobytes()


def unpack(packed: bytes) -> list[BlockHash]:
    return list(view(packed))


def view(packed: bytes) -> memoryview[BlockHash]:
    """Return packed hashes as a sequence, without unpacking them all."""
    return memoryview(packed).cast("Q")  # type: ignore[return-value]
