"""Where a value came from, and how an error message says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str, ...]
"""`("VllmWorker", "ServiceArgs", "workers")`: the keys from a service down to a value."""

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Origin:
    """`source` is what a user can go to: `configs/agg.yaml:14`, `--Processor.router`, `DYNAMO_PORT`."""

    source: str

    @property
    def is_flag(self) -> bool:
        """Whether it was given on the command line."""
        return self.source.startswith("--")


def alike(key: str) -> str:
    """The form in which `block-size` and `block_size` are the same key."""
    return key.replace("_", "-")


def where(origin: Mapping[KeyPath, Origin], path: KeyPath) -> str:
    """`configs/agg.yaml:14 VllmWorker.block-size`: the source of `path` (or of the nearest key above), and the path."""
    dotted = ".".join(path)
    for end in range(len(path), 0, -1):
        if found := origin.get(path[:end]):
            said = f"{alike(found.source)}.".startswith(alike(f"--{dotted}."))  # the flag names the path already
            return found.source if said else f"{found.source} {dotted}"
    return dotted


def shown(value: Any) -> str:
    """A value as JSON on one line, cut after 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def suggestion(word: str, choices: Iterable[str], what: str) -> str:
    """`did you mean block-size? settings are block-size, model`; only "did you mean" where the list would be long."""
    from difflib import get_close_matches

    names = list(dict.fromkeys(choices))
    forms = {alike(name).lower(): name for name in names}
    close = get_close_matches(alike(word).lower(), forms, n=1, cutoff=0.6)
    parts = [f"did you mean {forms[close[0]]}?"] if close else []
    if len(names) <= 16:
        parts.append(f"{what}: {', '.join(names) or 'none'}")
    return " ".join(parts) or f"there are {len(names)} {what}; none is close to {word}"
