"""The text of a choice that is continued by another engine: as if one engine had written all of it.

The second engine gets what was generated as part of its prompt. So its own text is not to be had at the seam: a character
whose bytes lie on both sides, text that the first engine held back, a stop string that begins before the seam. From the
seam on the text is therefore made here, from the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from dynamo.llm.protocol import Delta, Sampling

Decode = Callable[[list[int]], str]

LEAD_TOKENS = 8
"""of what comes before are decoded together with new tokens, whose text may depend on them: a leading space"""
WINDOW_TOKENS = 32
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""what the bytes of an incomplete character decode to"""


class Detokenizer:
    """Text of the tokens that follow `lead`, whole characters only."""

    def __init__(self, decode: Decode, lead: Sequence[int], tokens: Sequence[int]) -> None:
        """`text` is then that of `tokens`."""
        self._decode = decode
        known = [*lead[-LEAD_TOKENS:], *tokens]
        before = self._whole(known[: len(known) - len(tokens)])
        whole = self._whole(known)
        self.text = decode(known[:whole])[len(decode(known[:before])) :]
        self._known = 0  # characters of the window's text that were given out
        self._window = known[:whole]
        self._shrink()
        self._window += known[whole:]

    def _whole(self, tokens: Sequence[int]) -> int:
        """The tokens from the beginning that end with a whole character."""
        end = len(tokens)
        while end and self._decode(list(tokens[max(end - LEAD_TOKENS, 0) : end])).endswith(UNFINISHED):
            end -= 1
        return end

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._window += tokens
        text = self._decode(self._window)
        if text.endswith(UNFINISHED):
            return ""
        new = text[self._known :]
        self._known = len(text)
        if len(self._window) > WINDOW_TOKENS:
            self._shrink()
        return new

    def _shrink(self) -> None:
        """Characters that the cut makes incomplete stay so, and count the same each time."""
        self._window = self._window[-LEAD_TOKENS:]
        self._known = len(self._decode(self._window))


class Continuation:
    """Makes the deltas of a continued choice those of an uninterrupted one. Its request must have no stop strings.

    Stop strings are looked for here, with vLLM's rules: in what comes after `min_tokens`; what may be the beginning of
    one is held back unless stop strings are part of the output.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], tokens: Sequence[int], shown: str, sampling: Sampling):
        """`tokens` were generated after `prompt`, and `shown` is the text of them that was given out."""
        self._detokenizer = Detokenizer(decode, prompt, tokens)
        text = self._detokenizer.text
        # an engine with another idea of the text: then nothing is known of what it held back
        held = text[len(shown) :] if text.startswith(shown) else ""
        self._stop, self._include = sampling.stop, sampling.include_stop_str_in_output
        self._memory = max(map(len, sampling.stop), default=1) - 1  # characters that may begin a stop string
        self._text = shown[len(shown) - min(self._memory, len(shown)) :] + held
        self._given = len(self._text) - len(held)
        self._checked = len(self._text)
        self._generated, self._min_tokens = len(tokens), sampling.min_tokens

    def join(self, delta: Delta) -> Delta:
        """The same delta with its text put right; it may end the choice, where a stop string is complete."""
        tokens, reason, stop_reason = delta.token_ids, delta.finish_reason, delta.stop_reason
        self._generated += len(tokens)
        silent = reason == "stop" and not self._include  # the token that stops is no text
        self._text += self._detokenizer.add(tokens[:-1] if silent else tokens)
        end = len(self._text)
        found = self._find_stop() if self._generated > self._min_tokens else None
        self._checked = end
        if found is not None:
            at, stop_reason = found
            reason, end = "stop", at + len(stop_reason) if self._include else at
        elif reason is None and not self._include:
            end -= self._memory
        end = max(end, self._given)
        text = self._text[self._given : end]
        forgotten = max(end - self._memory, 0)
        self._text = self._text[forgotten:]
        self._given, self._checked = end - forgotten, self._checked - forgotten
        return msgspec.structs.replace(delta, text=text, finish_reason=reason, stop_reason=stop_reason)

    def _find_stop(self) -> tuple[int, str] | None:
        """The first stop string that new text has a part in, and where it begins."""
        found = [(self._text.find(stop, max(self._checked - len(stop) + 1, 0)), stop) for stop in self._stop]
        return min(((at, stop) for at, stop in found if at >= 0), key=lambda match: match[0], default=None)
