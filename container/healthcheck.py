"""HEALTHCHECK of the images: `python healthcheck.py [PID]`. Exit code 0: healthy; 1: unhealthy, with the reason in one line.

Every graph that `dynamo serve` runs in this container must answer GET /health with a status below 500 at its announced
address: 503 means that no model is available, 404 that the entry service is a custom one and alive. If the entry service
runs elsewhere, the metrics port must report at least one ready process of each service here. If no graph is announced, the
check depends on PID, the container's first process: a whole graph must be announced; a service alone is asked for /healthz
if DYNAMO_SYSTEM_APP_PORT is set; a shell, or anything else, is healthy while it runs.
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
    """Return the reason why the container is unhealthy; None if it is healthy."""
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
        return "no graph is announced: it has not started yet, or has ended"
    port = os.environ.get("DYNAMO_SYSTEM_APP_PORT")
    return _fault_at(f"http://127.0.0.1:{port}/healthz") if port else None


def _fault_of_services(url: str) -> str | None:
    """Return a service without a ready process, by the metrics port at `url`; None if there is none, or no `url`."""
    if not url:
        return None
    try:
        try:
            text = _get(url)
        except OSError:  # the address is for other hosts, by address translation
            text = _get(f"http://127.0.0.1:{urlsplit(url).port}/metrics")
    except OSError as error:
        return f"{url}: {error}"
    ups: dict[str, list[bool]] = {}
    for service, value in _UP.findall(text):
        ups.setdefault(service, []).append(float(value) > 0)
    return next((f"{service}: no process is ready" for service, up in ups.items() if not any(up)), None)


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is for downloads of models
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
