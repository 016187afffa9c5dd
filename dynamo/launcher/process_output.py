"""The pipes of a child process, read line by line, and the log file that its output goes to."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LINE_BYTES = 64 * 1024  # a longer line is cut into pieces
LOG_BYTES = 64 * 1024 * 1024  # a larger log becomes <name>.log.1 and a new one begins


class LineReader:
    """Reads a pipe as it fills and passes its lines to `on_lines`, without line ends, at most LINE_BYTES each.

    After each read it pauses for `pause_s`, unless the pipe was full: a read costs more than handling its lines.
    """

    def __init__(self, fd: int, on_lines: Callable[[Sequence[bytes]], None], pause_s: float = 0.0) -> None:
        self._fd = fd
        self._on_lines = on_lines
        self._pause_s = pause_s
        self._rest = b""
        self._open = True
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._watch()

    def _watch(self) -> None:
        if self._open:
            self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        if self.read(1) < LINE_BYTES and self._pause_s and self._open:
            self._loop.remove_reader(self._fd)
            self._loop.call_later(self._pause_s, self._watch)

    def read(self, limit_bytes: int) -> int:
        """Read what is available; stop after `limit_bytes` or slightly more. Returns the number of bytes read."""
        size = 0
        while self._open and size < limit_bytes:
            try:
                data = os.read(self._fd, LINE_BYTES)
            except BlockingIOError:
                break
            if not data:
                self.close()
                break
            size += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            pieces = [piece for line in lines for piece in _pieces(line.removesuffix(b"\r"))]
            while len(self._rest) >= LINE_BYTES:
                pieces.append(self._rest[:LINE_BYTES])
                self._rest = self._rest[LINE_BYTES:]
            self._on_lines(pieces)
        return size

    def close(self) -> None:
        """Close the pipe and pass on an unfinished last line. May be called twice."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            if self._rest:
                self._on_lines([self._rest])


def _pieces(line: bytes) -> Iterable[bytes]:
    return (line[start : start + LINE_BYTES] for start in range(0, len(line) or 1, LINE_BYTES))


class RotatingLog:
    """A log file that is moved aside when it is full. A full disk loses lines and raises nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._size = self._file.tell()

    def __enter__(self) -> RotatingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, lines: Sequence[bytes]) -> None:
        """Append lines, which have no line ends."""
        if not lines:
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed, because no new file could be opened
            self._size += self._file.write(b"\n".join([*lines, b""]))
            if self._size > LOG_BYTES:
                self._file.close()
                os.replace(self._path, f"{self._path}.1")
                self._open()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()
