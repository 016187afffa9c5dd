"""Workers that take tokens and yield tokens in plain data, as the Backend workers of ai-dynamo 0.3 do.

Such a worker gets the prompt as token ids, and yields `{"token_ids": [...], "finish_reason": ...}`. What it leaves out is
done here: text, stop strings and stop tokens, the limit of output tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from dynamo.errors import EngineError
from dynamo.llm.continuation import Continuation
from dynamo.llm.protocol import Delta, FinishReason, GenerateRequest
from dynamo.streams import Channel, Stream

REASONS: dict[str, FinishReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "cancelled": "abort",
    "abort": "abort",
}

TOKENS = 1 << 32
"""token ids are below"""


def eos_token_ids(directory: Path) -> list[int]:
    """Return the tokens that end a text, of a model's `generation_config.json`, else of its `config.json`."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((directory / name).read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]
    return []


def plain_request(request: GenerateRequest, eos: list[int]) -> dict[str, Any]:
    """Return a request as plain data, with every key that workers of 0.3 look up."""
    sampling = request.sampling
    stop_ids = list(dict.fromkeys([*sampling.stop_token_ids, *([] if sampling.ignore_eos else eos)]))
    return {
        "token_ids": request.token_ids,
        "batch_token_ids": None,
        "stop_conditions": {
            "max_tokens": sampling.max_tokens,
            "stop": sampling.stop or None,
            "stop_token_ids_hidden": stop_ids,
            "min_tokens": sampling.min_tokens or None,
            "ignore_eos": sampling.ignore_eos,
        },
        "sampling_options": {
            "n": 1,
            "best_of": None,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "repetition_penalty": sampling.repetition_penalty,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "use_beam_search": None,
            "length_penalty": None,
            "seed": sampling.seed,
        },
        "eos_token_ids": [] if sampling.ignore_eos else eos,
        "mdc_sum": None,
        "annotations": [],
        "estimated_prefix_hit_num_blocks": None,
    }


class TokenReader:
    """Turns the items of one choice into deltas. `out` ends with the choice; then the worker's stream is cancelled."""

    def __init__(
        self,
        items: Stream[Any],
        request: GenerateRequest,
        decode: Callable[[list[int], bool], str],
        eos: Collection[int],
        *,
        report_prompt: bool,
    ) -> None:
        """`report_prompt`: the first delta has the number of prompt tokens."""
        sampling = request.sampling
        self._items = items
        self._sampling = sampling
        self._eos = () if sampling.ignore_eos else tuple(eos)
        self._stop_ids = {*sampling.stop_token_ids, *self._eos}
        decode_request = partial(_decode, decode, sampling.skip_special_tokens)
        self._text = Continuation(decode_request, request.token_ids, [], "", sampling)
        self._generated = 0
        self._prompt_tokens = len(request.token_ids) if report_prompt else None
        self.out: Channel[Delta] = Channel(on_cancel=items.cancel, on_consumed=items.consumed)
        items.pipe(self._on_item, self._on_end, counted=False)

    def _on_item(self, item: Any) -> None:
        found = item if isinstance(item, dict) else {}
        reason = _reason(found.get("finish_reason"), found.get("error"))
        tokens = found.get("token_ids", [] if reason else None)
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < TOKENS for token in tokens):
            raise EngineError(
                f"the worker yielded something else than tokens: {item!r:.80}",
                hint='it should yield {"token_ids": [...], "finish_reason": ...}',
            )
        tokens, reason = self._cut(tokens, reason)
        self._push(tokens, reason, found.get("text"))
        if reason is not None:
            self._items.cancel()
            self._end(None)

    def _cut(self, tokens: list[int], reason: FinishReason | None) -> tuple[list[int], FinishReason | None]:
        """Cut what follows a stop token or the last token allowed. A choice that stops ends with its stop token."""
        first = max(self._sampling.min_tokens - self._generated - 1, 0)
        for i, token in enumerate(tokens):
            if i >= first and token in self._stop_ids:
                return tokens[: i + 1], "stop"
        limit = self._sampling.max_tokens
        if limit is not None and self._generated + len(tokens) >= limit:
            return tokens[: limit - self._generated], reason or "length"
        if reason == "stop" and self._eos:  # the worker kept it back
            tokens = [*tokens, self._eos[0]]
        return tokens, reason

    def _push(self, tokens: list[int], reason: FinishReason | None, text: Any) -> None:
        self._generated += len(tokens)
        delta = Delta("", tokens, 0, reason, None, self._prompt_tokens)
        self._prompt_tokens = None
        if isinstance(text, str):  # the worker makes it
            delta.text = text
        else:
            delta = self._text.join(delta)
        self.out.push(delta)
        if delta.finish_reason is not None and reason is None:  # a stop string
            self._items.cancel()
            self._end(None)

    def _on_end(self, error: BaseException | None) -> None:
        if error is None and not self.out.done:
            self._push([], "stop", None)
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self.out.source = self._items.source
        self.out.end(error)


def _decode(decode: Callable[[list[int], bool], str], skip_special_tokens: bool, tokens: list[int]) -> str:
    return decode(tokens, skip_special_tokens)


def _reason(given: Any, error: Any) -> FinishReason | None:
    """Return the finish reason in our words. Raises EngineError if the worker reports an error, in either place."""
    if isinstance(given, dict):
        error = error or given.get("error")
    if error or given == "error" or isinstance(given, dict):
        raise EngineError(f"the worker reported an error: {error or 'without a message'}")
    return None if given is None else REASONS.get(str(given).lower(), "stop")
