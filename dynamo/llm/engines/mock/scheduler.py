"""Which sequences compute how many tokens in a step. By the rules of vLLM v1; pure, so that a simulator can run it.

Seen in vLLM 0.32 (v1/core/sched/scheduler.py, without async scheduling), and compared with it step by step in
tests/vllm/test_mock_parity.py:

* running sequences first, in the order of their admission, then waiting ones, until the step's tokens are given out;
* when blocks run out the sequence admitted last is put back to the head of the queue and computes everything again,
  what it generated included; a step that did so admits nobody;
* a sequence is admitted when the blocks for all its tokens are free, though it takes only those of its first chunk;
* found in the prefix cache are whole blocks up to the last token but one;
* a generated token's block is stored in the step that computes the token, which is the one after it was generated: a
  request's last token is never stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from dynamo.kv.hashing import ROOT, BlockHash, block_hashes
from dynamo.llm.engines.mock.kv_cache import Block, KvCache


class Sequence:
    """A prompt with one output. `names` are those of the prompt's full blocks; it may be given to several sequences."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "computed",
        "names",
        "output",
        "preemptions",
        "prompt",
        "room",
        "running",
        "unnamed",
    )

    def __init__(self, prompt: list[int], names: list[BlockHash]) -> None:
        self.prompt, self.names = prompt, list(names)
        self.output: list[int] = []
        self.computed = 0  # tokens whose KV is there at the end of the step
        self.running = False
        self.blocks: list[Block] = []
        self.unnamed = 0  # blocks held behind them
        self.room = 0  # tokens that fit into both
        self.cached_tokens = 0  # prompt tokens found in the prefix cache at the first admission
        self.preemptions = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, first: int, end: int) -> list[int]:
        prompt = len(self.prompt)
        return self.prompt[first:end] + self.output[max(first - prompt, 0) : max(end - prompt, 0)]


S = TypeVar("S", bound=Sequence)


class Step(NamedTuple):
    """What a step computes: tokens of prompts (or of what was preempted), and sequences that get one more token."""

    prefill_tokens: int
    decodes: int


class Scheduler(Generic[S]):
    """`schedule` a step, wait as long as it takes, `complete` it; `add` and `remove` at any time.

    A sequence must fit into the cache alone (`KvCache.usable` blocks), and without chunked prefill into one step. No more
    than `batched_tokens` sequences run at a time; vLLM refuses to start with a larger `sequences`.
    """

    def __init__(
        self,
        cache: KvCache,
        *,
        batched_tokens: int,
        sequences: int,
        chunked_prefill: bool = True,
        prefix_caching: bool = True,
    ) -> None:
        self.cache = cache
        self.running: list[S] = []
        self.waiting: OrderedDict[S, None] = OrderedDict()
        self.prefix_queries = self.prefix_hits = 0
        """prompt tokens looked up and found; what a preempted sequence finds again is not counted"""
        self.kv_tokens = 0
        """whose KV the running sequences read, each its own: what they share counts for each"""
        self._batched_tokens, self._sequences = batched_tokens, min(sequences, batched_tokens)
        self._chunked_prefill, self._prefix_caching = chunked_prefill, prefix_caching
        self.batch: list[S] = []
        """what the step computes, in the order of admission"""
        # All that run are computed up to their last token, and take one a step. Only the one admitted last may not be: as
        # long as it is not, it takes all that is left of a step, so that nobody is admitted behind it.
        self._partial: S | None = None
        self._refused: tuple[S, int] | None = None

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, sequence: S) -> None:
        self.waiting[sequence] = None

    def remove(self, sequence: S) -> None:
        """Wherever it is; its blocks are free at once. Nothing happens if it has ended."""
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.pop(sequence, None)

    def schedule(self) -> Step | None:
        """The next step, its KV blocks allocated and stored; None: nothing to do."""
        running, partial = self.running, self._partial
        before = len(running)
        for sequence in running:  # loses its end meanwhile, at most up to this one
            if sequence is partial:
                break
            computed = sequence.computed + 1
            if computed >= sequence.room and not self._make_room(sequence, computed):
                break
            sequence.computed = computed
        partial = self._partial
        decodes = len(running) - (partial is not None)
        self.kv_tokens += decodes
        budget = self._batched_tokens - decodes
        if partial is not None:
            budget -= self._continue(partial, budget)
        if self.waiting and len(running) == before:
            while budget and self.waiting and len(running) < self._sequences:
                new = self._admit(next(iter(self.waiting)), budget)
                if not new:
                    break
                budget -= new
        self.batch = running.copy()
        return Step(self._batched_tokens - decodes - budget, decodes) if running else None

    def complete(self, emit: Callable[[S], bool]) -> None:
        """End the step. `emit` appends the next token to a sequence's `output` and tells whether it was the last.

        It is called for sequences that have computed all their tokens, in the order of their admission, and may add and
        remove sequences.
        """
        partial, ended = self._partial, False
        for sequence in self.batch:
            if sequence.running and sequence is not partial and emit(sequence) and sequence.running:
                ended = True
                self._release(sequence)
        self.batch = []
        if ended:
            self.running = [sequence for sequence in self.running if sequence.running]

    def _continue(self, partial: S, budget: int) -> int:
        """Tokens of its next chunk; 0: there are no blocks for it, so it waits again."""
        new = min(partial.length - partial.computed, budget)
        if not self._make_room(partial, partial.computed + new):
            return 0
        partial.computed += new
        self.kv_tokens += new
        if partial.computed == partial.length:
            self._partial = None
        return new

    def _make_room(self, sequence: S, computed: int) -> bool:
        """Blocks for `computed` tokens, by preemption if need be. False: it was preempted itself, as the last."""
        while not self._grow(sequence, computed):
            if self._preempt_last() is sequence:
                return False
        return True

    def _admit(self, sequence: S, budget: int) -> int:
        """Tokens of the first chunk; 0: not now."""
        cache, size, length = self.cache, self.cache.block_size, sequence.length
        if self._refused == (sequence, cache.version):
            return 0
        found: list[Block] = []
        if self._prefix_caching:
            limit = (length - 1) // size
            self._name(sequence, limit)
            found = cache.find(sequence.names, limit)
        computed = len(found) * size
        new = length - computed
        if new > budget:
            if not self._chunked_prefill:
                return 0
            new = budget
        evictable = sum(not block.holders for block in found)
        if -(-length // size) - len(found) + evictable > cache.free:
            self._refused = sequence, cache.version
            return 0
        del self.waiting[sequence]
        self.running.append(sequence)
        sequence.running = True
        cache.hold(found)
        sequence.blocks = found
        if not sequence.preemptions:
            sequence.cached_tokens = computed
            if self._prefix_caching:
                self.prefix_queries += length
                self.prefix_hits += computed
        self._grow(sequence, computed + new)
        sequence.computed = computed + new
        self.kv_tokens += sequence.computed
        if sequence.computed < length:
            self._partial = sequence
        return new

    def _grow(self, sequence: S, computed: int) -> bool:
        """Blocks for `computed` tokens, the full ones stored. False: there are not enough, and nothing has changed."""
        cache, size = self.cache, self.cache.block_size
        blocks = sequence.blocks
        wanted = -(-computed // size) - len(blocks) - sequence.unnamed
        if wanted > 0:
            if wanted > cache.free:
                return False
            cache.take(wanted)
            sequence.unnamed += wanted
        known, full = len(blocks), computed // size
        if full > known and self._prefix_caching:
            self._name(sequence, full)
            names = sequence.names
            tokens = sequence.tokens(known * size, full * size) if cache.events is not None else ()
            blocks += cache.store(names[known - 1] if known else None, names[known:full], tokens)
            sequence.unnamed -= full - known
        sequence.room = (len(blocks) + sequence.unnamed) * size
        return True

    def _name(self, sequence: S, blocks: int) -> None:
        """Names for the first `blocks` blocks, where generated tokens are in them."""
        names, size = sequence.names, self.cache.block_size
        if (known := len(names)) < blocks:
            names += block_hashes(sequence.tokens(known * size, blocks * size), size, names[-1] if names else ROOT)

    def _preempt_last(self) -> S:
        victim = self.running.pop()
        self._release(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.waiting[victim] = None
        self.waiting.move_to_end(victim, last=False)
        return victim

    def _release(self, sequence: S) -> None:
        sequence.running = False
        if sequence is self._partial:
            self._partial = None
        self.kv_tokens -= sequence.computed
        self.cache.release(sequence.blocks, sequence.unnamed)
        sequence.blocks, sequence.unnamed, sequence.room = [], 0, 0
