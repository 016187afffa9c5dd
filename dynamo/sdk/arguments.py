"""Keyword arguments that `@service`, `@endpoint`, `@api` and `depends()` accept without using them."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence

from dynamo.errors import GraphError

_NEAR = 0.8
"""Similarity from which a name is taken for a typing error of a known one."""
_NOT_NEAR = {"resource"}
"""An argument of ai-dynamo 0.1, which looks like `resources`."""
_warned: set[str] = set()


class IgnoredArgumentWarning(UserWarning):
    """A declaration has an argument that has no effect here."""


def warn_ignored(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Warn, once per process, of each argument in `names` that has no effect; `where` is the decorator.

    Raises GraphError for a name that nearly spells one of `known`.
    """
    for name in names:
        near = difflib.get_close_matches(name, known, 1, _NEAR)
        if near and name not in _NOT_NEAR:
            raise GraphError(f"{where}: unknown argument {name!r}", hint=f"did you mean {near[0]}?")
        message = f"{where}: {name!r} has no effect; known arguments: {', '.join(known)}"
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, IgnoredArgumentWarning, stacklevel=3)
