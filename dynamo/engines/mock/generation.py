"""A running request of the mock engine, and the tokens of its sequences.

The next token is a function of all tokens so far, the prompt included. So a request that is continued on another worker
with the tokens it already has must continue identically, and a wrong or lost token is visible.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import xxhash

from dynamo.engines.mock.scheduler import ScheduledSequence, Scheduler
from dynamo.engines.mock.transfer import KvSource
from dynamo.engines.mock.vocabulary import Token
from dynamo.kv_router.hashing import BlockHash
from dynamo.llm.protocol import Delta, FinishReason, GenerateRequest
from dynamo.streams import Channel

EOS_EVERY = 97
"""mean number of tokens until the end-of-sequence token, unless the request ignores it"""


class Generation:
    """One running request: a sequence for each choice, all on one channel, which ends with the last of them.

    `keep`, where set, is called with each sequence that ends and takes over its KV blocks.
    """

    __slots__ = ("channel", "keep", "remove", "request", "running", "scheduler", "sequences")

    def __init__(
        self,
        request: GenerateRequest,
        channel: Channel[Delta],
        scheduler: Scheduler[MockSequence],
        remove: Callable[[Generation], None],
    ) -> None:
        """`remove` takes the request out of the engine's set of running ones."""
        self.request = request
        self.channel = channel
        self.scheduler = scheduler
        self.remove = remove
        self.sequences: list[MockSequence] = []
        self.keep: Callable[[MockSequence], None] | None = None
        self.running = request.sampling.n
        """sequences that have not ended"""

    def end(self, error: Exception | None = None) -> None:
        """Stop all sequences, free their KV blocks and end the channel."""
        self.withdraw()
        self.channel.end(error)

    def withdraw(self) -> None:
        """Stop all sequences and free their KV blocks; the channel stays open."""
        self.remove(self)
        for sequence in self.sequences:
            self.scheduler.remove(sequence)
            if sequence.fetch is not None:
                sequence.fetch.cancel()

    def finish_sequence(self, sequence: MockSequence) -> None:
        """Count a sequence that has generated its last token; the last one ends the channel."""
        if self.keep is not None:
            self.keep(sequence)
        self.running -= 1
        if not self.running:
            self.remove(self)
            self.channel.end()


class MockSequence(ScheduledSequence):
    """One choice of a request. `hash` covers all tokens so far, so it determines the next."""

    __slots__ = (
        "fails_at",
        "fetch",
        "final_texts",
        "generation",
        "hash",
        "index",
        "limit",
        "pending_text",
        "sampling",
        "source",
        "vocabulary",
    )

    def __init__(
        self,
        generation: Generation,
        index: int,
        hashes: list[BlockHash],
        packed_prompt: bytes,
        limit: int,
        vocabulary: list[Token],
    ) -> None:
        """`hashes` are those of the prompt's full blocks; `limit` is the largest number of tokens to generate."""
        request = generation.request
        super().__init__(request.token_ids, hashes)
        self.generation = generation
        self.index = index
        self.limit = limit
        self.vocabulary = vocabulary
        self.sampling = request.sampling
        self.hash = xxhash.xxh3_64(packed_prompt, seed=((self.sampling.seed or 0) + index) % 2**64)
        self.pending_text = ""  # held back because it may be the beginning of a stop string
        self.final_texts: list[str] | None = [] if request.final_only else None  # collected until the end
        self.source: KvSource | None = None  # of the prompt's KV, where `fetches`
        self.fetch: asyncio.Task[None] | None = None  # while it runs
        self.fails_at = 0  # tokens after which an injected fault fails the request; 0: never

    def advance(self) -> bool:
        """Generate one token and push its delta; return True after the last one."""
        state = self.hash.intdigest()
        token, text, packed = self.vocabulary[state % len(self.vocabulary)]
        self.hash.update(packed)
        self.output.append(token)

        sampling = self.sampling
        generated = len(self.output)
        may_stop = generated > sampling.min_tokens
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if may_stop and not (state >> 40) % EOS_EVERY and not sampling.ignore_eos:
            reason = "stop"
            text = ""  # end-of-sequence is no text
        elif may_stop and token in sampling.stop_token_ids:
            reason = "stop"
            stop_reason = token
        elif generated == self.limit:
            reason = "length"
        if may_stop and sampling.stop:
            text, stop = self._cut_at_stop(text, final=reason is not None)
            if stop is not None:
                reason = "stop"
                stop_reason = stop

        first = generated == 1
        if self.final_texts is None:
            delta = Delta(text, [token], self.index, reason, stop_reason)
        else:
            self.final_texts.append(text)
            if reason is None:
                return False
            first = True
            delta = Delta("".join(self.final_texts), self.output, self.index, reason, stop_reason)
        if first and not self.index:  # the prompt is counted once, however many choices the request has
            delta.prompt_tokens = len(self.prompt)
            delta.cached_tokens = self.cached_tokens
        self.generation.channel.push(delta)
        if reason is None:
            return False
        self.generation.finish_sequence(self)
        return True

    def _cut_at_stop(self, text: str, *, final: bool) -> tuple[str, str | None]:
        """Return the text that can be given out now, and the first stop string if one is complete.

        An end of the text that may be the beginning of a stop string is held back, unless `final`.
        """
        sampling = self.sampling
        text = self.pending_text + text
        found = [(text.find(stop), stop) for stop in sampling.stop]
        at, stop = min((f for f in found if f[0] >= 0), default=(-1, ""))
        if at >= 0:
            return text[: at + len(stop) if sampling.include_stop_str_in_output else at], stop
        held = 0 if final else max(map(len, sampling.stop)) - 1
        cut = max(len(text) - held, 0)
        self.pending_text = text[cut:]
        return text[:cut], None
