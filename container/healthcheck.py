"""HEALTHCHECK of the images: `python healthcheck.py [PID]`; exit code 0 is healthy, 1 is not, with one line that says why.

Every graph that `dynamo serve` runs in this container must answer GET /health with less than 500, at the address that it
announced: 503 tells that no model can answer, 404 that its entry service is not ours and lives. Where nothing is
announced, PID, the container's first process, decides: a whole graph should have been announced; a service alone is
asked for /healthz where DYNAMO_SYSTEM_APP_PORT says where; a shell, or anything else, is healthy while it runs.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from dynamo.serve import announcement

ANSWER_S = 4.0  # less than half of HEALTHCHECK's timeout: starting Python on a busy machine takes the rest


def fault(pid: int) -> str | None:
    """What is wrong; None: healthy."""
    graphs = announcement.running()
    if graphs:
        faults = (_fault_at(f"{graph.url}/health") for graph in graphs if graph.url)
        return next(filter(None, faults), None)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError as error:
        return f"process {pid}: {error.strerror}"
    if "serve" not in command:
        return None
    alone = os.environ.get("DYNAMO_SERVICE_NAME") or any(word.startswith("--service-name") for word in command)
    if not alone:
        return "no graph is announced: it has not begun, or has ended"
    port = os.environ.get("DYNAMO_SYSTEM_APP_PORT")
    return _fault_at(f"http://127.0.0.1:{port}/healthz") if port else None


def _fault_at(url: str) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is for models, not for this
    try:
        opener.open(url, timeout=ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"{url}: {error.code} {error.reason}"
    except OSError as error:
        return f"{url}: {error}"
    return None


if __name__ == "__main__":
    found = fault(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    sys.exit(found)
