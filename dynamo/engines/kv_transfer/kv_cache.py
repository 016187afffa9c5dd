"""The engine's KV tensors as planes of blocks, and copies of blocks to and from staging memory.

vLLM's tensors differ: [blocks, heads, tokens, 2 * head size] on the CPU, [2, blocks, ...] or [blocks, 2, ...] with
FlashAttention, strided where all layers of a block lie together. A plane is what is left when the block index is put
first: one stride from block to block, and dense bytes within a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dynamo.engines.kv_transfer.session import Layout, Plane
from dynamo.engines.kv_transfer.staging import Staging


class Piece(NamedTuple):
    """Some blocks of one plane and where they lie in a slot. `first` counts in the list of blocks that is copied."""

    plane: int
    first: int
    blocks: int
    offset: int


def chunks(block_bytes: Sequence[int], blocks: int, slot_bytes: int) -> Iterator[list[Piece]]:
    """What goes through one slot after the other: the same on both sides, so that nobody has to tell.

    Raises ValueError where a single block does not fit.
    """
    pieces: list[Piece] = []
    used = 0
    for plane, size in enumerate(block_bytes):
        if size > slot_bytes:
            raise ValueError(f"a KV block of {size} bytes does not fit a slot of {slot_bytes}")
        first = 0
        while first < blocks:
            count = min(blocks - first, (slot_bytes - used) // size)
            if count:
                pieces.append(Piece(plane, first, count, used))
                first, used = first + count, used + count * size
            if first < blocks:
                yield pieces
                pieces, used = [], 0
    if pieces:
        yield pieces


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first block, count) of each run of consecutive block numbers."""
    start = 0
    for position in range(1, len(blocks) + 1):
        if position == len(blocks) or blocks[position] != blocks[position - 1] + 1:
            yield start, blocks[start], position - start
            start = position


class Mover(Protocol):
    """Copies for one thread. Both calls return when the bytes are there."""

    def gather(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None:
        """Out of the cache, into the slot."""
        ...

    def scatter(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None: ...

    def adopt(self, staging: Staging) -> None:
        """Called before the first copy through that memory, and `release` after the last."""
        ...

    def release(self, staging: Staging) -> None: ...

    def order_after(self, mark: Any) -> None:
        """Write nothing before the engine's work up to a `KvCache.mark` is done."""
        ...


class KvCache:
    """Raises ValueError for tensors whose blocks cannot be told apart."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], blocks: int, block_tokens: int, *, engine: str, model: str
    ) -> None:
        unique = {(t.data_ptr(), tuple(t.shape)): t for t in tensors.values()}  # layers may share a tensor
        planes = [plane for tensor in unique.values() for plane in _planes(tensor, blocks)]
        self.block_count = blocks
        self.planes = [plane.flatten(1).view(torch.uint8) for plane in planes]
        self.block_bytes: list[int] = [plane.shape[1] for plane in self.planes]
        dtype = str(planes[0].dtype).removeprefix("torch.")
        shapes = [Plane(list(plane.shape[1:]), list(plane.stride()[1:])) for plane in planes]
        self.layout = Layout(engine, model, dtype, block_tokens, shapes)
        self.device = planes[0].device

    def mark(self) -> Any:
        """This moment in the engine's work, on the thread that submits it."""
        if self.device.type != "cuda":
            return None
        mark = torch.cuda.Event()
        mark.record()
        return mark

    def used(self, pieces: Sequence[Piece]) -> int:
        """Bytes of a slot that a chunk fills."""
        plane, _, blocks, offset = pieces[-1]
        return offset + blocks * self.block_bytes[plane]

    def mover(self) -> Mover:
        return CudaMover(self) if self.device.type == "cuda" else CpuMover(self)


def _planes(tensor: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """Views with the blocks first and a block's dimensions in the order in which they lie in memory."""
    if tensor.shape[0] % blocks == 0:
        halves = [tensor]
    elif tensor.dim() > 1 and tensor.shape[1] % blocks == 0:
        halves = list(tensor.unbind(0))
    else:
        raise ValueError(f"a KV tensor of shape {list(tensor.shape)} for {blocks} blocks")
    found = []
    for half in halves:
        if half.shape[0] != blocks:  # the attention kernel's blocks are smaller than the scheduler's
            half = half.unflatten(0, (blocks, -1))
        order = sorted(range(1, half.dim()), key=lambda d: (-half.stride(d), -half.shape[d]))
        plane = half.permute(0, *order)
        if not plane[0].is_contiguous():
            raise ValueError(f"a KV block of shape {list(plane.shape[1:])} is not in one piece: {plane.stride()}")
        found.append(plane)
    return found


class CpuMover:
    """Plain copies of runs of blocks, which NumPy makes without holding the interpreter's lock."""

    def __init__(self, cache: KvCache) -> None:
        self._planes = [plane.numpy() for plane in cache.planes]

    def gather(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None:
        for plane, there, here in self._pairs(blocks, pieces, slot):
            here[:] = plane[there]

    def scatter(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None:
        for plane, there, here in self._pairs(blocks, pieces, slot):
            plane[there] = here

    def _pairs(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> Iterator[tuple[Any, slice, Any]]:
        """For each run of blocks: its plane, where it lies there, and its bytes in the slot."""
        for wanted, same in itertools.groupby(pieces, key=lambda piece: (piece.first, piece.blocks)):
            found = list(runs(blocks[wanted[0] : wanted[0] + wanted[1]]))
            for piece in same:
                plane = self._planes[piece.plane]
                size = plane.shape[1]
                bytes_ = slot[piece.offset : piece.offset + piece.blocks * size].reshape(piece.blocks, size)
                for position, block, count in found:
                    yield plane, slice(block, block + count), bytes_[position : position + count]

    def adopt(self, staging: Staging) -> None:
        pass

    def release(self, staging: Staging) -> None:
        pass

    def order_after(self, mark: Any) -> None:
        pass


class CudaMover:
    """On a stream of its own: blocks are gathered on the GPU, then one copy to or from pinned staging memory."""

    def __init__(self, cache: KvCache) -> None:
        self._device, self._used = cache.device, cache.used
        # eight bytes at a time, where all blocks allow it
        self._planes = [p.view(torch.int64) for p in cache.planes] if all(map(_even, cache.planes)) else cache.planes
        self._stream = torch.cuda.Stream(self._device)
        self._buffer: torch.Tensor | None = None

    def gather(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None:
        with torch.cuda.stream(self._stream):
            numbers = torch.tensor(blocks, dtype=torch.int64, device=self._device)
            buffer = self._on_device(len(slot))
            for piece, plane, rows in self._rows(pieces, buffer):
                torch.index_select(plane, 0, numbers[piece.first : piece.first + piece.blocks], out=rows)
            used = self._used(pieces)
            torch.from_numpy(slot)[:used].copy_(buffer[:used], non_blocking=True)
        self._stream.synchronize()

    def scatter(self, blocks: Sequence[int], pieces: Sequence[Piece], slot: Any) -> None:
        with torch.cuda.stream(self._stream):
            numbers = torch.tensor(blocks, dtype=torch.int64, device=self._device)
            buffer, used = self._on_device(len(slot)), self._used(pieces)
            buffer[:used].copy_(torch.from_numpy(slot)[:used], non_blocking=True)
            for piece, plane, rows in self._rows(pieces, buffer):
                plane.index_copy_(0, numbers[piece.first : piece.first + piece.blocks], rows)
        self._stream.synchronize()

    def _rows(
        self, pieces: Sequence[Piece], buffer: torch.Tensor
    ) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
        for piece in pieces:
            plane = self._planes[piece.plane]
            size = plane.shape[1] * plane.element_size()
            rows = buffer[piece.offset : piece.offset + piece.blocks * size]
            yield piece, plane, rows.view(plane.dtype).view(piece.blocks, plane.shape[1])

    def _on_device(self, size: int) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer[:size]

    def adopt(self, staging: Staging) -> None:
        """Pinned memory is copied at the bus's speed, and without waiting for the engine's stream."""
        cuda: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            cuda.cudaHostRegister(staging.bytes.ctypes.data, staging.bytes.size, 0)

    def release(self, staging: Staging) -> None:
        cuda: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            cuda.cudaHostUnregister(staging.bytes.ctypes.data)

    def order_after(self, mark: Any) -> None:
        self._stream.wait_event(mark)


def _even(plane: torch.Tensor) -> bool:
    return not (plane.shape[1] % 8 or plane.stride(0) % 8 or plane.data_ptr() % 8)
