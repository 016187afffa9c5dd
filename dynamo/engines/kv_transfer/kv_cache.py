"""The engine's KV tensors as planes of blocks, and copies of blocks to and from staging memory.

vLLM's tensors differ: [blocks, heads, tokens, 2 * head size] on the CPU, [2, blocks, ...] or [blocks, 2, ...] with
FlashAttention, strided if all layers of a block lie together. A plane is a view with the block index first: one stride
from block to block, and dense bytes within a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dynamo.engines.kv_transfer.session import Layout, Plane
from dynamo.engines.kv_transfer.staging import Staging


class Segment(NamedTuple):
    """A part of a chunk: some blocks of one plane, and their offset in the slot in bytes.

    `first` is a position in the list of blocks that is copied, not a block number.
    """

    plane: int
    first: int
    blocks: int
    offset: int


def chunks(block_bytes: Sequence[int], blocks: int, slot_bytes: int) -> Iterator[list[Segment]]:
    """Yield chunks that fit a slot, each a list of segments, for `blocks` blocks of planes with these block sizes.

    Both sides compute the same chunks, so they need not be sent. Raises ValueError if a single block does not fit.
    """
    segments: list[Segment] = []
    used = 0
    for plane, size in enumerate(block_bytes):
        if size > slot_bytes:
            raise ValueError(f"a KV block of {size} bytes does not fit a slot of {slot_bytes}")
        first = 0
        while first < blocks:
            count = min(blocks - first, (slot_bytes - used) // size)
            if count:
                segments.append(Segment(plane, first, count, used))
                first += count
                used += count * size
            if first < blocks:
                yield segments
                segments = []
                used = 0
    if segments:
        yield segments


def consecutive_runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (position in the list, first block, count) of each run of consecutive block numbers."""
    start = 0
    for position in range(1, len(blocks) + 1):
        if position == len(blocks) or blocks[position] != blocks[position - 1] + 1:
            yield start, blocks[start], position - start
            start = position


class BlockCopier(Protocol):
    """Copies between a cache and staging memory, for use by one thread."""

    def gather(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        """Copy a chunk of `blocks` from the cache into the slot; return when it is complete."""
        ...

    def scatter(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        """Copy a chunk of `blocks` from the slot into the cache; return when it is complete."""
        ...

    def register(self, staging: Staging) -> None:
        """Prepare staging memory for copies; to be called before the first copy that uses it."""
        ...

    def unregister(self, staging: Staging) -> None:
        """Undo `register`, after the last copy."""
        ...

    def wait_event(self, event: Any) -> None:
        """Delay later copies until the engine's work before a `KvCache.record_event` is done."""
        ...


class KvCache:
    """An engine's KV cache as planes of blocks, one for each tensor or half of a tensor."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], blocks: int, block_tokens: int, *, engine: str, model: str
    ) -> None:
        """`tensors` are vLLM's, by layer; `engine` and `model` go into the layout. Raises ValueError if the blocks of a
        tensor cannot be found.
        """
        unique = {(t.data_ptr(), tuple(t.shape)): t for t in tensors.values()}  # layers may share a tensor
        planes = [plane for tensor in unique.values() for plane in _planes(tensor, blocks)]
        self.planes = [plane.flatten(1).view(torch.uint8) for plane in planes]
        self.block_bytes: list[int] = [plane.shape[1] for plane in self.planes]
        dtype = str(planes[0].dtype).removeprefix("torch.")
        shapes = [Plane(list(plane.shape[1:]), list(plane.stride()[1:])) for plane in planes]
        self.layout = Layout(engine, model, dtype, block_tokens, shapes)
        self.device = planes[0].device

    def record_event(self) -> Any:
        """Return a CUDA event for the work submitted so far; call on the thread that submits it. None on the CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def chunk_bytes(self, segments: Sequence[Segment]) -> int:
        """Return how many bytes of a slot a chunk fills."""
        plane, _, blocks, offset = segments[-1]
        return offset + blocks * self.block_bytes[plane]

    def copier(self) -> BlockCopier:
        """Create a copier for the calling thread."""
        return CudaBlockCopier(self) if self.device.type == "cuda" else CpuBlockCopier(self)


def _planes(tensor: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """Return views with the block index first and a block's dimensions in their order in memory."""
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
            raise ValueError(f"a KV block of shape {list(plane.shape[1:])} is not contiguous: strides {plane.stride()}")
        found.append(plane)
    return found


class CpuBlockCopier:
    """Copies runs of consecutive blocks with NumPy, which releases the interpreter's lock meanwhile."""

    def __init__(self, cache: KvCache) -> None:
        self._planes = [plane.numpy() for plane in cache.planes]

    def gather(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        for plane, rows, staged in self._runs(blocks, segments, slot):
            staged[:] = plane[rows]

    def scatter(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        for plane, rows, staged in self._runs(blocks, segments, slot):
            plane[rows] = staged

    def _runs(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> Iterator[tuple[Any, slice, Any]]:
        """Yield (plane, its rows, their bytes in the slot) for each run of consecutive blocks of each segment.

        Runs are found once for neighbouring segments that hold the same blocks of different planes.
        """
        for (first, count), same_blocks in itertools.groupby(segments, key=lambda s: (s.first, s.blocks)):
            runs = list(consecutive_runs(blocks[first : first + count]))
            for segment in same_blocks:
                plane = self._planes[segment.plane]
                block_bytes = plane.shape[1]
                staged = slot[segment.offset : segment.offset + count * block_bytes].reshape(count, block_bytes)
                for position, block, length in runs:
                    yield plane, slice(block, block + length), staged[position : position + length]

    def register(self, staging: Staging) -> None:
        pass

    def unregister(self, staging: Staging) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class CudaBlockCopier:
    """Gathers blocks on the GPU, then makes one copy to or from pinned staging memory, on a stream of its own."""

    def __init__(self, cache: KvCache) -> None:
        self._device = cache.device
        self._chunk_bytes = cache.chunk_bytes
        # copy eight bytes at a time if all planes allow it
        aligned = all(map(_is_aligned, cache.planes))
        self._planes = [plane.view(torch.int64) for plane in cache.planes] if aligned else cache.planes
        self._stream = torch.cuda.Stream(self._device)
        self._buffer: torch.Tensor | None = None

    def gather(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        with torch.cuda.stream(self._stream):
            numbers = torch.tensor(blocks, dtype=torch.int64, device=self._device)
            buffer = self._device_buffer(len(slot))
            for segment, plane, rows in self._rows(segments, buffer):
                torch.index_select(plane, 0, numbers[segment.first : segment.first + segment.blocks], out=rows)
            size = self._chunk_bytes(segments)
            torch.from_numpy(slot)[:size].copy_(buffer[:size], non_blocking=True)
        self._stream.synchronize()

    def scatter(self, blocks: Sequence[int], segments: Sequence[Segment], slot: Any) -> None:
        with torch.cuda.stream(self._stream):
            numbers = torch.tensor(blocks, dtype=torch.int64, device=self._device)
            buffer = self._device_buffer(len(slot))
            size = self._chunk_bytes(segments)
            buffer[:size].copy_(torch.from_numpy(slot)[:size], non_blocking=True)
            for segment, plane, rows in self._rows(segments, buffer):
                plane.index_copy_(0, numbers[segment.first : segment.first + segment.blocks], rows)
        self._stream.synchronize()

    def _rows(
        self, segments: Sequence[Segment], buffer: torch.Tensor
    ) -> Iterator[tuple[Segment, torch.Tensor, torch.Tensor]]:
        """Yield (segment, plane, the segment's part of `buffer` as rows of that plane)."""
        for segment in segments:
            plane = self._planes[segment.plane]
            size = plane.shape[1] * plane.element_size()
            rows = buffer[segment.offset : segment.offset + segment.blocks * size]
            yield segment, plane, rows.view(plane.dtype).view(segment.blocks, plane.shape[1])

    def _device_buffer(self, size: int) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer[:size]

    def register(self, staging: Staging) -> None:
        """Pin the memory: it is then copied at the bus's speed, without waiting for the engine's stream."""
        cuda: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            cuda.cudaHostRegister(staging.bytes.ctypes.data, staging.bytes.size, 0)

    def unregister(self, staging: Staging) -> None:
        cuda: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            cuda.cudaHostUnregister(staging.bytes.ctypes.data)

    def wait_event(self, event: Any) -> None:
        self._stream.wait_event(event)


def _is_aligned(plane: torch.Tensor) -> bool:
    """Return True if every block of a plane of bytes starts and ends at a multiple of 8 bytes."""
    return not (plane.shape[1] % 8 or plane.stride(0) % 8 or plane.data_ptr() % 8)
