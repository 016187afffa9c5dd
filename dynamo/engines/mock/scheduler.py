"""Which sequences compute how many tokens in a step. By the rules of vLLM v1; pure, so that a simulator can run it.

Seen in vLLM 0.32 (v1/core/sched/scheduler.py, without async scheduling), and compared with it step by step in
tests/vllm/test_mock_parity.py:

* running sequences first, in the order of their admission, then waiting ones, until the step's tokens are given out;
* when blocks run out the sequence admitted last is put back to the head of the queue and computes everything again,
  what it generated included; a step that did so admits nobody;
* a sequence is admitted when the blocks for all its tokens are free, though it takes only those of its first chunk;
* found in the prefix cache are whole blocks up to the last token but one;
* a generated token's block is stored in the step that computes the token, which is the one after it was generated: a
  request's last token is never stored;
* a sequence whose KV is fetched from another engine gets all its blocks when its turn comes and waits beside the others;
  once the KV is there its last token is computed, as if all before it had been found in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from dynamo.engines.mock.kv_cache import Block, KvCache
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes


class Sequence:
    """A prompt with one output. `names` are those of the prompt's full blocks; it may be given to several sequences."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "computed",
        "fetches",
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
        self.fetches = False  # its prompt's KV comes from elsewhere: from `add` until it is there, or cannot be had

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
        self.to_fetch: list[S] = []
        """have their blocks since the last look; the caller takes them out and says `fetched` or `not_fetched` later"""
        self._fetching: dict[S, None] = {}
        self._fetched: list[S] = []  # wait for a place among those that run
        # All that run are computed up to their last token, and take one a step. Only the one admitted last may not be: as
        # long as it is not, it takes all that is left of a step, so that nobody is admitted behind it.
        self._partial: S | None = None
        self._refused: tuple[S, int] | None = None

    def __len__(self) -> int:
        return len(self.running) + self.idle

    @property
    def idle(self) -> int:
        """Sequences that wait, for blocks or for their KV."""
        return len(self.waiting) + len(self._fetching) + len(self._fetched)

    def add(self, sequence: S) -> None:
        self.waiting[sequence] = None

    def remove(self, sequence: S) -> None:
        """Wherever it is; its blocks are free at once. Nothing happens if it has ended."""
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            del self.waiting[sequence]
        elif sequence in self._fetching:
            del self._fetching[sequence]
            self.free(sequence)
        elif sequence in self._fetched:
            self._fetched.remove(sequence)
            self.free(sequence)

    def keep(self, sequence: S) -> None:
        """End a running sequence, which holds its blocks until `free`."""
        self.running.remove(sequence)
        self._leave(sequence)

    def free(self, sequence: S) -> None:
        """The blocks of a sequence that does not run."""
        self.cache.release(sequence.blocks, sequence.unnamed)
        sequence.blocks, sequence.unnamed, sequence.room = [], 0, 0

    def fetched(self, sequence: S) -> None:
        """Its KV is there: its blocks are stored. Nothing happens if it was removed."""
        if sequence in self._fetching:
            del self._fetching[sequence]
            sequence.fetches = False
            self._grow(sequence, sequence.length)
            self._fetched.append(sequence)

    def not_fetched(self, sequence: S) -> None:
        """Its KV cannot be had: it is the next to be computed here. Nothing happens if it was removed."""
        if sequence in self._fetching:
            del self._fetching[sequence]
            sequence.fetches = False
            self.free(sequence)
            self._wait_first(sequence)

    def schedule(self) -> Step | None:
        """The next step, its KV blocks allocated and stored; None: nothing to do until something changes."""
        running, partial = self.running, self._partial
        while self._fetched and len(running) < self._sequences:
            self._join(self._fetched.pop(0))
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
                first = next(iter(self.waiting))
                if first.fetches:
                    if not self._reserve(first):
                        break
                    continue
                new = self._admit(first, budget)
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

    def _find(self, sequence: S) -> list[Block]:
        """What the prefix cache has of it."""
        if not self._prefix_caching:
            return []
        limit = (sequence.length - 1) // self.cache.block_size
        self._name(sequence, limit)
        return self.cache.find(sequence.names, limit)

    def _fits(self, sequence: S, found: list[Block]) -> bool:
        """Whether there are blocks for all its tokens; False is remembered until the cache changes."""
        cache = self.cache
        evictable = sum(not block.holders for block in found)
        if -(-sequence.length // cache.block_size) - len(found) + evictable > cache.free:
            self._refused = sequence, cache.version
            return False
        return True

    def _start(self, sequence: S, found: list[Block]) -> None:
        """It waits no more, and holds what was found."""
        computed = len(found) * self.cache.block_size
        del self.waiting[sequence]
        self.cache.hold(found)
        sequence.blocks = found
        if not sequence.preemptions:
            sequence.cached_tokens = computed
            if self._prefix_caching:
                self.prefix_queries += sequence.length
                self.prefix_hits += computed

    def _reserve(self, sequence: S) -> bool:
        """Blocks for all of a sequence whose KV comes from elsewhere; False: not now."""
        if self._refused == (sequence, self.cache.version):
            return False
        found = self._find(sequence)
        if not self._fits(sequence, found):
            return False
        self._start(sequence, found)
        wanted = -(-sequence.length // self.cache.block_size) - len(found)
        self.cache.take(wanted)
        sequence.unnamed = wanted
        sequence.computed = len(found) * self.cache.block_size
        self._fetching[sequence] = None
        self.to_fetch.append(sequence)
        return True

    def _join(self, sequence: S) -> None:
        """It runs, before the one that is not computed to its last token."""
        sequence.running = True
        sequence.computed = sequence.length - 1
        self.kv_tokens += sequence.computed
        self.running.insert(len(self.running) - (self._partial is not None), sequence)

    def _admit(self, sequence: S, budget: int) -> int:
        """Tokens of the first chunk; 0: not now."""
        length = sequence.length
        if self._refused == (sequence, self.cache.version):
            return 0
        found = self._find(sequence)
        computed = len(found) * self.cache.block_size
        new = length - computed
        if new > budget:
            if not self._chunked_prefill:
                return 0
            new = budget
        if not self._fits(sequence, found):
            return 0
        self._start(sequence, found)
        self.running.append(sequence)
        sequence.running = True
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
        victim.preemptions += 1
        self._wait_first(victim)
        return victim

    def _wait_first(self, sequence: S) -> None:
        sequence.computed = 0
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)

    def _leave(self, sequence: S) -> None:
        sequence.running = False
        if sequence is self._partial:
            self._partial = None
        self.kv_tokens -= sequence.computed

    def _release(self, sequence: S) -> None:
        self._leave(sequence)
        self.free(sequence)
