"""Traces of requests in the JSONL format that Mooncake published: times, lengths, and shared prefixes.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}

`timestamp` is in milliseconds; `hash_ids` has one id for each block of the prompt (512 tokens in Mooncake's traces), the
last of which may be partial. Prompts whose lists begin with the same ids begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

MOONCAKE_BLOCK = 512


class TraceError(Exception):
    """A line is not in the format; file, line and reason are in the message."""


class Request(msgspec.Struct, frozen=True):
    """One line of a trace. Fields of other tools are ignored."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """milliseconds from the trace's own zero"""
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    hash_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Limits:
    """Limits of a trace: number of `requests` from the first on, and most `input_tokens` of a prompt."""

    requests: int | None = None
    input_tokens: int | None = None
    clip: bool = False
    """shorten prompts above `input_tokens` instead of leaving them out"""


@dataclass
class Cut:
    """Number of requests that the limits affected; complete when the reader has ended."""

    dropped: int = 0
    clipped: int = 0


def read(path: Path, block: int, limits: Limits, cut: Cut) -> Iterator[Request]:
    """Yield the requests of a trace. Raises TraceError for an invalid line, OSError for the file."""
    with path.open("rb") as lines:
        yield from _limited(_parsed(lines, path.name, block), block, limits, cut)


def _parsed(lines: BinaryIO, name: str, block: int) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(Request)
    before = 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{name}:{number}: {error}") from None
        blocks = -(-request.input_length // block)
        if len(request.hash_ids) != blocks:
            raise TraceError(
                f"{name}:{number}: {len(request.hash_ids)} hash_ids for {request.input_length} tokens, "
                f"{blocks} expected with blocks of {block} (--trace-block)"
            )
        if request.timestamp < before:
            raise TraceError(f"{name}:{number}: timestamp {request.timestamp:g} comes after {before:g}")
        before = request.timestamp
        yield request


def _limited(requests: Iterator[Request], block: int, limits: Limits, cut: Cut) -> Iterator[Request]:
    longest, left = limits.input_tokens, limits.requests
    for request in requests:
        if left is not None:
            if left == 0:
                return
            left -= 1
        if longest is not None and request.input_length > longest:
            if not limits.clip:
                cut.dropped += 1
                continue
            cut.clipped += 1
            ids = request.hash_ids[: -(-longest // block)]
            request = Request(request.timestamp, longest, request.output_length, ids)
        yield request


def write(requests: Iterable[Request], out: BinaryIO) -> None:
    encoder = msgspec.json.Encoder()
    for request in requests:
        out.write(encoder.encode(request) + b"\n")
