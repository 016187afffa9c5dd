"""Text of a choice that another engine continues: the same as if one engine had written all of it.

The second engine gets the tokens generated so far as part of its prompt. Its own text is therefore wrong where the two
parts meet: a character may have bytes on both sides, the first engine may have held back text, a stop string may begin in
the first part and end in the second. So from there on the text is made here, from the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from dynamo.llm.protocol import Delta, Sampling

Decode = Callable[[list[int]], str]

LEAD_TOKENS = 8
"""Preceding tokens that are decoded together with new ones, whose text may depend on them: a leading space."""
WINDOW_TOKENS = 32
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""text of the bytes of an incomplete character"""


class IncrementalDetokenizer:
    """Text of the tokens that follow `lead`, in whole characters only."""

    def __init__(self, decode: Decode, lead: Sequence[int], tokens: Sequence[int]) -> None:
        """Start after `tokens`; `text` is theirs."""
        self._decode = decode
        known = [*lead[-LEAD_TOKENS:], *tokens]
        whole_lead = self._whole(known[: len(known) - len(tokens)])
        whole = self._whole(known)
        self.text = decode(known[:whole])[len(decode(known[:whole_lead])) :]
        self._window = known[:whole]  # tokens to be decoded together with the next ones
        self._returned = 0  # characters of the window's text that were returned before
        self._shrink()
        self._window += known[whole:]

    def _whole(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens there are up to the last whole character."""
        end = len(tokens)
        while end and self._decode(list(tokens[max(end - LEAD_TOKENS, 0) : end])).endswith(UNFINISHED):
            end -= 1
        return end

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        self._window += tokens
        text = self._decode(self._window)
        if text.endswith(UNFINISHED):
            return ""
        new = text[self._returned :]
        self._returned = len(text)
        if len(self._window) > WINDOW_TOKENS:
            self._shrink()
        return new

    def _shrink(self) -> None:
        """Forget all but the last tokens.

        Characters that this cuts stay incomplete, and have the same length each time the window is decoded.
        """
        self._window = self._window[-LEAD_TOKENS:]
        self._returned = len(self._decode(self._window))


class Continuation:
    """Turns the deltas of a continued choice into those of an uninterrupted one. Its request must have no stop strings.

    Stop strings are searched here, by vLLM's rules: in the text after `min_tokens`; text that may begin a stop string is
    held back, unless stop strings are part of the output.

        text of the choice   ...  | sent | held | text of the next delta

    `_sent` is the end of the text that the reader has, as much of it as may begin a stop string; `_held` is held back.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], tokens: Sequence[int], shown: str, sampling: Sampling):
        """Continue after `tokens`, generated for `prompt`; the reader has the text `shown` of them."""
        self._detokenizer = IncrementalDetokenizer(decode, prompt, tokens)
        self._stop = sampling.stop
        self._include_stop = sampling.include_stop_str_in_output
        self._longest_beginning = max(map(len, sampling.stop), default=1) - 1  # characters that may begin a stop string
        self._min_tokens = sampling.min_tokens
        self._generated = len(tokens)
        self._sent = shown[max(len(shown) - self._longest_beginning, 0) :]
        text = self._detokenizer.text
        # if the first engine made another text, what it held back is unknown
        self._held = text[len(shown) :] if text.startswith(shown) else ""

    def join(self, delta: Delta) -> Delta:
        """Return the delta with its text corrected, and with the end of the choice if a stop string is complete."""
        tokens, reason, stop_reason = delta.token_ids, delta.finish_reason, delta.stop_reason
        self._generated += len(tokens)
        if reason == "stop" and not self._include_stop:
            tokens = tokens[:-1]  # the token that stops has no text
        before = self._sent + self._held
        text = before + self._detokenizer.add(tokens)
        end = len(text)  # of the text that the reader has after this delta
        found = self._find_stop(text, len(before)) if self._generated > self._min_tokens else None
        if found is not None:
            start, stop = found
            reason = "stop"
            stop_reason = stop
            end = start + len(stop) if self._include_stop else start
        elif reason is None and not self._include_stop:
            end -= self._longest_beginning
        end = max(end, len(self._sent))
        new = text[len(self._sent) : end]
        self._sent = text[max(end - self._longest_beginning, 0) : end]
        self._held = text[end:]
        return msgspec.structs.replace(delta, text=new, finish_reason=reason, stop_reason=stop_reason)

    def _find_stop(self, text: str, searched: int) -> tuple[int, str] | None:
        """Return where the first stop string begins that ends after the first `searched` characters, and the string."""
        found = [(text.find(stop, max(searched - len(stop) + 1, 0)), stop) for stop in self._stop]
        return min(((start, stop) for start, stop in found if start >= 0), key=lambda match: match[0], default=None)
