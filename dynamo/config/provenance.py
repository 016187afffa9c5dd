"""Where a value came from, and how an error message says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dynamo.text import edit_distance, shorten

KeyPath: TypeAlias = tuple[str, ...]
"""`("VllmWorker", "ServiceArgs", "workers")`: the keys from a service down to a value."""

PREVIEW_CHARS = 60
LISTED_CHOICES = 16
_DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class Origin:
    """The place where a value was given."""

    source: str
    """as a user can find it: `configs/agg.yaml:14`, `--Processor.router`, `DYNAMO_PORT`"""

    @property
    def is_flag(self) -> bool:
        """True for a value of the command line."""
        return self.source.startswith("--")


@dataclass(frozen=True, slots=True)
class Notice:
    """Something in a configuration that has no effect, or another one than it says. A warning, or an error if strict."""

    message: str
    """where it stands, and what is done with it"""
    hint: str
    """why, and what to write in its place"""

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}"


def canonical(key: str) -> str:
    """Return the form that `block-size` and `block_size` share: they are the same key."""
    return key.replace("_", "-")


def misspelled(word: str, names: Iterable[str]) -> str | None:
    """Return the name of which `word` looks like a misspelling: one letter is wrong, or two of 8 and more.

    Case, `_` and `-` make no difference. Names that differ by a number only, such as Worker1 and Worker2, are two names.
    """
    form = canonical(word).lower()
    for name in names:
        other = canonical(name).lower()
        is_numbered = form != other and _DIGITS.sub("", form) == _DIGITS.sub("", other)
        if not is_numbered and edit_distance(form, other) <= min(len(form) // 4, len(other) // 4, 2):
            return name
    return None


def location(origins: Mapping[KeyPath, Origin], path: KeyPath) -> str:
    """Return `configs/agg.yaml:14 VllmWorker.block-size`: the source of `path` or of the nearest key above it, and the path.

    A flag already names its path, so it stands alone; without any source, the path does.
    """
    dotted = ".".join(path)
    for end in range(len(path), 0, -1):
        if origin := origins.get(path[:end]):
            names_path = f"{canonical(origin.source)}.".startswith(canonical(f"--{dotted}."))
            return origin.source if names_path else f"{origin.source} {dotted}"
    return dotted


def preview(value: Any) -> str:
    """Return a value as JSON on one line, of PREVIEW_CHARS at most."""
    return shorten(json.dumps(value, default=str), PREVIEW_CHARS)


def suggestion(word: str, choices: Iterable[str], kind: str) -> str:
    """Return a hint: `did you mean block-size? settings: block-size, model`.

    `kind` is the plural noun before the list of choices, which is left out if it is longer than LISTED_CHOICES.
    """
    from difflib import get_close_matches

    names = list(dict.fromkeys(choices))
    forms = {canonical(name).lower(): name for name in names}
    close = get_close_matches(canonical(word).lower(), forms, n=1, cutoff=0.6)
    parts = [f"did you mean {forms[close[0]]}?"] if close else []
    if len(names) <= LISTED_CHOICES:
        parts.append(f"{kind}: {', '.join(names) or 'none'}")
    return " ".join(parts) or f"there are {len(names)} {kind}; none is close to {word}"
