"""`--reload`: restart the processes whose source files were edited."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import watchfiles

if TYPE_CHECKING:
    from dynamo.launcher.supervisor import Supervisor


async def follow_edits(working_dir: Path, supervisor: Supervisor) -> None:
    """Report edits of Python files below `working_dir` to the supervisor, in batches, until cancelled."""
    async for changes in watchfiles.awatch(working_dir.resolve(), watch_filter=watchfiles.PythonFilter()):
        supervisor.restart_edited({path for _, path in changes})
