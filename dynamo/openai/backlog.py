"""Deltas that cannot be written yet, since the headers are not sent or the client reads slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dynamo.llm.protocol import Delta

MERGE_ABOVE = 64
"""Deltas kept before they are merged into one for each choice. After a merge, the limit is an eighth of the tokens kept if
that is more, so that the copying stays in proportion to the text."""


class Backlog:
    """The deltas of one response that wait to be written, merged when they become many."""

    def __init__(self, choices: int, merge: Callable[[list[Delta]], list[Delta]]) -> None:
        """`merge` returns the same output in fewer deltas."""
        self.deltas: list[Delta] = []
        self._choices = choices
        self._merge = merge
        self._merge_above = MERGE_ABOVE

    def add(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if len(self.deltas) > self._merge_above + self._choices:
            self.deltas = self._merge(self.deltas)
            self._merge_above = max(MERGE_ABOVE, sum(len(kept.token_ids) for kept in self.deltas) // 8)

    def take(self) -> list[Delta]:
        """Return all deltas, merged when there are several for a choice, and forget them."""
        deltas = self.deltas
        self.deltas = []
        self._merge_above = MERGE_ABOVE
        return self._merge(deltas) if len(deltas) > 2 * self._choices else deltas


def merge_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """Merge deltas into one for each choice, with the same text. The given ones are not changed."""
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.index, []).append(delta)
    return [same[0] if len(same) == 1 else _join(same) for same in by_choice.values()]


def _join(deltas: list[Delta]) -> Delta:
    first, last = deltas[0], deltas[-1]
    logprobs = [position for delta in deltas for position in delta.logprobs or ()]
    return Delta(
        "".join([delta.text for delta in deltas]),
        [token for delta in deltas for token in delta.token_ids],
        first.index,
        last.finish_reason,
        last.stop_reason,
        next((delta.prompt_tokens for delta in deltas if delta.prompt_tokens is not None), None),
        next((delta.cached_tokens for delta in deltas if delta.cached_tokens is not None), None),
        logprobs or None,
    )
