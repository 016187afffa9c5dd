"""A request while it runs, and the tokens of its choices.

The next token is a function of all tokens so far, prompt included. So a request that is continued elsewhere with the
tokens it already has must go on identically, and a wrong or lost token shows.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Callable
from functools import cache

import xxhash

from dynamo.engines.mock.scheduler import Scheduler, Sequence
from dynamo.engines.mock.transfer import KvPlace
from dynamo.errors import StartError
from dynamo.kv_router.hashing import BlockHash
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.protocol import Delta, FinishReason, GenerateRequest
from dynamo.streams import Channel

EOS_EVERY = 97  # tokens on average, unless ignore_eos

Vocabulary = list[tuple[int, str, bytes]]
"""token, its text, what the hash gets"""


def packed(tokens: list[int]) -> bytes:
    return array("Q", tokens).tobytes()


def vocabulary(model: str) -> Vocabulary:
    """The model's tokens that are plain text; the engines of one process share it."""
    return _vocabulary(os.fspath(tokenizer_dir(model) / "tokenizer.json"))


@cache
def _vocabulary(path: str) -> Vocabulary:
    from tokenizers import Tokenizer  # here, for who only asks what settings there are

    tokenizer = Tokenizer.from_file(path)
    specials = set(tokenizer.get_added_tokens_decoder())
    found: Vocabulary = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token]) if token not in specials else ""
        if text.isprintable() and text.isascii() and text.strip():
            found.append((token, text, packed([token])))
    if not found:
        raise StartError(f"the tokenizer {path} has no token that is plain text")
    return found


class Generation:
    """One running request: its choices share a channel, which ends with the last of them.

    With `keep`, a choice that ends is given to it, and holds its KV blocks on.
    """

    __slots__ = ("channel", "choices", "forget", "keep", "left", "request", "scheduler")

    def __init__(
        self,
        request: GenerateRequest,
        channel: Channel[Delta],
        scheduler: Scheduler[Choice],
        forget: Callable[[Generation], None],
    ) -> None:
        self.request, self.channel, self.scheduler, self.forget = request, channel, scheduler, forget
        self.choices: list[Choice] = []
        self.keep: Callable[[Choice], None] | None = None
        self.left = request.sampling.n  # choices that still run

    def end(self, error: Exception | None = None) -> None:
        """The channel ends, and what still runs frees its KV blocks."""
        self.withdraw()
        self.channel.end(error)

    def withdraw(self) -> None:
        self.forget(self)
        for choice in self.choices:
            self.scheduler.remove(choice)
            if choice.fetch is not None:
                choice.fetch.cancel()


class Choice(Sequence):
    """One choice. `hash` has seen all tokens so far, so it decides on the next."""

    __slots__ = (
        "fails_at",
        "fetch",
        "generation",
        "hash",
        "index",
        "kept",
        "limit",
        "sampling",
        "source",
        "tail",
        "vocabulary",
    )

    def __init__(
        self,
        generation: Generation,
        index: int,
        names: list[BlockHash],
        seen: bytes,
        limit: int,
        vocabulary: Vocabulary,
    ) -> None:
        request = generation.request
        super().__init__(request.token_ids, names)
        self.generation, self.index, self.limit, self.vocabulary = generation, index, limit, vocabulary
        self.sampling = request.sampling
        self.hash = xxhash.xxh3_64(seen, seed=((self.sampling.seed or 0) + index) % 2**64)
        self.tail = ""  # text that may be the beginning of a stop string
        self.kept: list[str] | None = [] if request.final_only else None
        self.source: KvPlace | None = None  # of its prompt's KV, where `fetches`
        self.fetch: asyncio.Task[None] | None = None  # that is under way
        self.fails_at = 0  # tokens after which the request fails on purpose; 0: it does not

    def advance(self) -> bool:
        """Generate one token and hand it out; True: it was the last."""
        sampling, state = self.sampling, self.hash.intdigest()
        token, text, seen = self.vocabulary[state % len(self.vocabulary)]
        self.hash.update(seen)
        self.output.append(token)
        generated = len(self.output)
        free = generated > sampling.min_tokens  # to stop before the limit
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if free and not (state >> 40) % EOS_EVERY and not sampling.ignore_eos:
            reason, text = "stop", ""
        elif free and token in sampling.stop_token_ids:
            reason, stop_reason = "stop", token
        elif generated == self.limit:
            reason = "length"
        if sampling.stop and free:
            text, stop = self._until_stop(text, final=reason is not None)
            if stop is not None:
                reason, stop_reason = "stop", stop
        first, tokens = generated == 1, [token]
        if self.kept is not None:
            self.kept.append(text)
            if reason is None:
                return False
            first, text, tokens = True, "".join(self.kept), self.output
        generation = self.generation
        if first and not self.index:  # the prompt is counted once, however many choices it has
            delta = Delta(text, tokens, 0, reason, stop_reason, len(self.prompt), self.cached_tokens)
        else:
            delta = Delta(text, tokens, self.index, reason, stop_reason)
        generation.channel.push(delta)
        if reason is None:
            return False
        if generation.keep is not None:
            generation.keep(self)
        generation.left -= 1
        if not generation.left:
            generation.forget(generation)
            generation.channel.end()
        return True

    def _until_stop(self, text: str, *, final: bool) -> tuple[str, str | None]:
        """The text that can be given out now, and the first stop string if one was met."""
        sampling = self.sampling
        text = self.tail + text
        found = [(text.find(stop), stop) for stop in sampling.stop]
        at, stop = min((f for f in found if f[0] >= 0), default=(-1, ""))
        if at >= 0:
            return text[: at + len(stop) if sampling.include_stop_str_in_output else at], stop
        held = 0 if final else max(map(len, sampling.stop)) - 1
        cut = max(len(text) - held, 0)
        self.tail = text[cut:]
        return text[:cut], None
