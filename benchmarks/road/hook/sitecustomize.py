"""Imported by every Python that has this folder in PYTHONPATH: records calls between SIGUSR1 and SIGUSR2.

The record is a JSON list of [file, first line, qualified name, calls] in the directory `DYNAMO_ROAD_DIR`, by process id.
"""

import collections
import json
import os
import signal
import sys
from types import CodeType, FrameType
from typing import Any

calls: collections.Counter[CodeType] = collections.Counter()


def _count(frame: FrameType, event: str, _: Any) -> None:
    if event == "call":
        calls[frame.f_code] += 1


def _start(*_: Any) -> None:
    calls.clear()
    sys.setprofile(_count)


def _stop(*_: Any) -> None:
    sys.setprofile(None)
    found = [(code.co_filename, code.co_firstlineno, code.co_qualname, number) for code, number in calls.items()]
    path = os.path.join(os.environ["DYNAMO_ROAD_DIR"], f"{os.getpid()}.json")
    with open(f"{path}.new", "w") as file:
        json.dump(found, file)
    os.rename(f"{path}.new", path)


if os.environ.get("DYNAMO_ROAD_DIR"):
    signal.signal(signal.SIGUSR1, _start)
    signal.signal(signal.SIGUSR2, _stop)
