"""HEALTHCHECK of the images: `python healthcheck.py [PID]`; exit code 0 is healthy, 1 is not, with one line that says why.

Every graph that `dynamo serve` runs in this container must answer GET /health with less than 500, at the address that it
announced: 503 tells that no model can answer, 404 that its entry service is not ours and lives. Where the entry service runs
elsewhere, the metrics port tells of each service here whether one of its processes is ready. Where nothing is announced, PID,
the container's first process, decides: a whole graph should have been announced; a service alone is asked for /healthz where
DYNAMO_SYSTEM_APP_PORT says where; a shell, or anything else, is healthy while it runs.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from dynamo.launcher.run_dir import running

ANSWER_S = 4.0  # less than half of HEALTHCHECK's timeout: starting Python on a busy machine takes the rest
_UP = re.compile(r'^dynamo_supervisor_process_up\{(?:[^}]*,)?service="([^"]*)"[^}]*\} (\S+)', re.MULTILINE)


def fault(pid: int) -> str | None:
    """What is wrong; None: healthy."""
    graphs = running()
    if graphs:
        faults = (_fault_at(f"{g.url}/health") if g.url else _fault_of_services(g.metrics) for g in graphs)
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


def _fault_of_services(url: str) -> str | None:
    """`url` is that of the metrics port, empty where there is none: then nobody knows more than that it runs."""
    if not url:
        return None
    try:
        try:
            text = _get(url)
        except OSError:  # others reach this host there, by address translation
            text = _get(f"http://127.0.0.1:{urlsplit(url).port}/metrics")
    except OSError as error:
        return f"{url}: {error}"
    ups: dict[str, list[bool]] = {}
    for service, value in _UP.findall(text):
        ups.setdefault(service, []).append(float(value) > 0)
    return next((f"{service}: no process is ready" for service, up in ups.items() if not any(up)), None)


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is for models, not for this
    with opener.open(url, timeout=ANSWER_S) as answer:
        return str(answer.read().decode(errors="replace"))


def _fault_at(url: str) -> str | None:
    try:
        _get(url)
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"{url}: {error.code} {error.reason}"
    except OSError as error:
        return f"{url}: {error}"
    return None


if __name__ == "__main__":
    found = fault(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    sys.exit(found)
