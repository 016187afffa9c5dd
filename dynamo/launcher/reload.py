"""`--reload`: which source files were edited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from pathlib import Path

import watchfiles


async def edits(working_dir: Path) -> AsyncIterator[Collection[str]]:
    """Absolute paths of Python files below `working_dir` that were written, in batches, until cancelled."""
    async for changes in watchfiles.awatch(working_dir.resolve(), watch_filter=watchfiles.PythonFilter()):
        yield {path for _, path in changes}
