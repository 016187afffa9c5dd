"""Selection of the sequences and token counts of each engine step. Rules of vLLM v1; pure, so that a simulator can run it.

Taken from vLLM 0.32 (v1/core/sched/scheduler.py, without async scheduling) and compared with it step by step in
tests/vllm/test_mock_parity.py:

* running sequences first, in the order of their admission, then waiting ones, until the step's token budget is used up;
* when blocks run out, the sequence admitted last is preempted: it returns to the head of the queue and computes everything
  again, including what it had generated. A step that preempted admits no sequence;
* a sequence is admitted when the blocks for all its tokens are free, though it allocates only those of its first chunk;
* the prefix cache is used for whole blocks, up to the last token but one;
* a generated token's block is stored in the step that computes the token, which is the step after the one that generated
  it: a request's last token is never stored;
* a sequence whose KV is fetched from another engine gets all its blocks when its turn comes and waits outside the queue.
  Once the KV has arrived, its last token is computed, as if all tokens before it had been found in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from dynamo.engines.mock.block_pool import Block, BlockPool
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes


class ScheduledSequence:
    """A prompt with one output.

    `hashes` are those of the prompt's full blocks; the given list is copied, so several sequences may share it.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "computed",
        "fetches",
        "hashes",
        "output",
        "preemptions",
        "prompt",
        "room",
        "running",
        "uncached",
    )

    def __init__(self, prompt: list[int], hashes: list[BlockHash]) -> None:
        self.prompt = prompt
        self.hashes = list(hashes)
        self.output: list[int] = []
        self.computed = 0  # tokens whose KV is computed at the end of the step
        self.running = False
        self.blocks: list[Block] = []  # held and in the prefix cache
        self.uncached = 0  # further blocks held, behind those
        self.room = 0  # tokens that fit into both
        self.cached_tokens = 0  # prompt tokens found in the prefix cache at the first admission
        self.preemptions = 0
        self.fetches = False  # the prompt's KV comes from another engine; False again once it has arrived or failed

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.prompt) + len(self.output)

    def tokens(self, first: int, end: int) -> list[int]:
        """Return the tokens `first` to `end` (exclusive) of prompt and output."""
        prompt = len(self.prompt)
        return self.prompt[first:end] + self.output[max(first - prompt, 0) : max(end - prompt, 0)]


S = TypeVar("S", bound=ScheduledSequence)


class ScheduledStep(NamedTuple):
    """The work of one step."""

    prefill_tokens: int
    """tokens of prompts, and of preempted sequences that are computed again"""
    decodes: int
    """sequences that get one more token"""


class Scheduler(Generic[S]):
    """`schedule` a step, wait as long as it takes, `complete` it; `add` and `remove` at any time.

    Each sequence alone must fit into the pool (`BlockPool.usable` blocks), and without chunked prefill into one step. At
    most `batched_tokens` sequences run at a time; vLLM refuses to start with a larger `sequences`.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        batched_tokens: int,
        sequences: int,
        chunked_prefill: bool = True,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.running: list[S] = []
        self.waiting: OrderedDict[S, None] = OrderedDict()
        self.prefix_queries = 0
        """prompt tokens looked up in the prefix cache, once per sequence: not again after a preemption"""
        self.prefix_hits = 0
        """those of `prefix_queries` that were found"""
        self.kv_tokens = 0
        """tokens whose KV the running sequences read; shared blocks count for each sequence"""
        self.batch: list[S] = []
        """the sequences of the current step, in the order of admission"""
        self.to_fetch: list[S] = []
        """sequences with newly allocated blocks; the caller removes them from here, fetches their KV, and calls `fetched`
        or `not_fetched`"""
        self._batched_tokens = batched_tokens
        self._max_running = min(sequences, batched_tokens)
        self._chunked_prefill = chunked_prefill
        self._prefix_caching = prefix_caching
        self._fetching: dict[S, None] = {}
        self._fetched: list[S] = []  # waiting until fewer than `_max_running` run
        # All running sequences are computed up to their last token and decode one per step. Only the one admitted last may
        # still be in its prefill: until that is complete it uses up the step's budget, so that none is admitted behind it.
        self._prefilling: S | None = None
        self._refused: tuple[S, int] | None = None  # a sequence that did not fit, and `BlockPool.version` then

    def __len__(self) -> int:
        return len(self.running) + self.queued

    @property
    def queued(self) -> int:
        """Number of sequences that wait, for blocks or for their KV."""
        return len(self.waiting) + len(self._fetching) + len(self._fetched)

    def add(self, sequence: S) -> None:
        """Append a sequence to the queue."""
        self.waiting[sequence] = None

    def remove(self, sequence: S) -> None:
        """Remove a sequence in whatever state it is and free its blocks immediately; no-op if it has ended."""
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
        """Free the blocks of a sequence that is not running."""
        self.pool.release(sequence.blocks, sequence.uncached)
        sequence.blocks = []
        sequence.uncached = 0
        sequence.room = 0

    def fetched(self, sequence: S) -> None:
        """Store the blocks of a sequence whose KV has arrived; no-op if the sequence was removed."""
        if sequence in self._fetching:
            del self._fetching[sequence]
            sequence.fetches = False
            self._grow(sequence, sequence.length)
            self._fetched.append(sequence)

    def not_fetched(self, sequence: S) -> None:
        """Queue a sequence whose fetch failed at the head, to be computed here; no-op if it was removed."""
        if sequence in self._fetching:
            del self._fetching[sequence]
            sequence.fetches = False
            self.free(sequence)
            self._queue_first(sequence)

    # -- a step

    def schedule(self) -> ScheduledStep | None:
        """Return the next step, with its KV blocks allocated and stored; None if there is nothing to do until a change."""
        self._start_fetched()
        running = len(self.running)
        self._extend_decodes()
        decodes = len(self.running) - (self._prefilling is not None)
        self.kv_tokens += decodes
        budget = self._batched_tokens - decodes
        if self._prefilling is not None:
            budget -= self._continue_prefill(self._prefilling, budget)
        preempted = len(self.running) < running
        if self.waiting and not preempted:
            budget = self._admit_waiting(budget)
        self.batch = self.running.copy()
        if not self.running:
            return None
        return ScheduledStep(self._batched_tokens - decodes - budget, decodes)

    def complete(self, emit: Callable[[S], bool]) -> None:
        """End the step: call `emit` for each sequence that has computed all its tokens, in the order of admission.

        `emit` appends the next token to `output` and returns True if it was the last. It may add and remove sequences.
        """
        prefilling = self._prefilling
        ended = False
        for sequence in self.batch:
            if sequence.running and sequence is not prefilling and emit(sequence) and sequence.running:
                ended = True
                self._release(sequence)
        self.batch = []
        if ended:
            self.running = [sequence for sequence in self.running if sequence.running]

    def _start_fetched(self) -> None:
        """Run sequences whose KV has arrived, as far as there is room; each needs its last token computed."""
        while self._fetched and len(self.running) < self._max_running:
            sequence = self._fetched.pop(0)
            sequence.running = True
            sequence.computed = sequence.length - 1
            self.kv_tokens += sequence.computed
            before_prefilling = len(self.running) - (self._prefilling is not None)
            self.running.insert(before_prefilling, sequence)

    def _extend_decodes(self) -> None:
        """Compute one more token of each sequence past its prefill; preempt from the end where blocks run out."""
        prefilling = self._prefilling
        # a preemption during this loop shortens the list from its end, at most down to the current entry
        for sequence in self.running:
            if sequence is prefilling:
                break
            computed = sequence.computed + 1
            if computed >= sequence.room and not self._make_room(sequence, computed):
                break
            sequence.computed = computed

    def _continue_prefill(self, sequence: S, budget: int) -> int:
        """Compute the next chunk and return its tokens; 0 if there were no blocks and the sequence was preempted."""
        new = min(sequence.length - sequence.computed, budget)
        if not self._make_room(sequence, sequence.computed + new):
            return 0
        sequence.computed += new
        self.kv_tokens += new
        if sequence.computed == sequence.length:
            self._prefilling = None
        return new

    def _admit_waiting(self, budget: int) -> int:
        """Admit sequences from the head of the queue while there is room; return the tokens left of the budget."""
        while budget and self.waiting and len(self.running) < self._max_running:
            first = next(iter(self.waiting))
            if first.fetches:
                if not self._reserve(first):
                    break
            elif new := self._admit(first, budget):
                budget -= new
            else:
                break
        return budget

    def _admit(self, sequence: S, budget: int) -> int:
        """Run the first sequence of the queue and return the tokens of its first chunk; 0 if it does not fit now."""
        length = sequence.length
        if self._refused == (sequence, self.pool.version):
            return 0
        found = self._find(sequence)
        computed = len(found) * self.pool.block_size
        new = length - computed
        if new > budget:
            if not self._chunked_prefill:
                return 0
            new = budget
        if not self._fits(sequence, found):
            return 0
        self._dequeue(sequence, found)
        self.running.append(sequence)
        sequence.running = True
        self._grow(sequence, computed + new)
        sequence.computed = computed + new
        self.kv_tokens += sequence.computed
        if sequence.computed < length:
            self._prefilling = sequence
        return new

    def _reserve(self, sequence: S) -> bool:
        """Allocate all blocks of a sequence whose KV is fetched; False if they do not fit now."""
        if self._refused == (sequence, self.pool.version):
            return False
        found = self._find(sequence)
        if not self._fits(sequence, found):
            return False
        self._dequeue(sequence, found)
        missing = _blocks(sequence.length, self.pool.block_size) - len(found)
        self.pool.allocate(missing)
        sequence.uncached = missing
        sequence.computed = len(found) * self.pool.block_size
        self._fetching[sequence] = None
        self.to_fetch.append(sequence)
        return True

    def _find(self, sequence: S) -> list[Block]:
        """Return the blocks of a sequence that the prefix cache has."""
        if not self._prefix_caching:
            return []
        limit = (sequence.length - 1) // self.pool.block_size
        self._extend_hashes(sequence, limit)
        return self.pool.find(sequence.hashes, limit)

    def _fits(self, sequence: S, found: list[Block]) -> bool:
        """Return True if blocks for all tokens of a sequence are free; a False is remembered until the pool changes."""
        pool = self.pool
        evictable = sum(not block.holders for block in found)
        if _blocks(sequence.length, pool.block_size) - len(found) + evictable > pool.free:
            self._refused = sequence, pool.version
            return False
        return True

    def _dequeue(self, sequence: S, found: list[Block]) -> None:
        """Take a sequence out of the queue; it holds the blocks that were found from now on."""
        computed = len(found) * self.pool.block_size
        del self.waiting[sequence]
        self.pool.hold(found)
        sequence.blocks = found
        if not sequence.preemptions:
            sequence.cached_tokens = computed
            if self._prefix_caching:
                self.prefix_queries += sequence.length
                self.prefix_hits += computed

    # -- blocks

    def _make_room(self, sequence: S, computed: int) -> bool:
        """Allocate blocks for `computed` tokens, preempting others if needed; False if `sequence` itself was preempted."""
        while not self._grow(sequence, computed):
            if self._preempt_last() is sequence:
                return False
        return True

    def _grow(self, sequence: S, computed: int) -> bool:
        """Allocate blocks for `computed` tokens and store the full ones; False, and no change, if too few are free."""
        pool = self.pool
        size = pool.block_size
        blocks = sequence.blocks
        missing = -(-computed // size) - len(blocks) - sequence.uncached
        if missing > 0:
            if missing > pool.free:
                return False
            pool.allocate(missing)
            sequence.uncached += missing
        stored = len(blocks)
        full = computed // size
        if full > stored and self._prefix_caching:
            self._extend_hashes(sequence, full)
            hashes = sequence.hashes
            tokens = sequence.tokens(stored * size, full * size) if pool.events is not None else ()
            blocks += pool.store(hashes[stored - 1] if stored else None, hashes[stored:full], tokens)
            sequence.uncached -= full - stored
        sequence.room = (len(blocks) + sequence.uncached) * size
        return True

    def _extend_hashes(self, sequence: S, blocks: int) -> None:
        """Compute the hashes of the first `blocks` blocks, where generated tokens are in them."""
        hashes = sequence.hashes
        size = self.pool.block_size
        if (known := len(hashes)) < blocks:
            parent = hashes[-1] if hashes else ROOT
            hashes += block_hashes(sequence.tokens(known * size, blocks * size), size, parent)

    def _preempt_last(self) -> S:
        victim = self.running.pop()
        self._release(victim)
        victim.preemptions += 1
        self._queue_first(victim)
        return victim

    def _queue_first(self, sequence: S) -> None:
        sequence.computed = 0
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)

    def _leave(self, sequence: S) -> None:
        """End a sequence's run; `running` is updated by the caller."""
        sequence.running = False
        if sequence is self._prefilling:
            self._prefilling = None
        self.kv_tokens -= sequence.computed

    def _release(self, sequence: S) -> None:
        self._leave(sequence)
        self.free(sequence)


def _blocks(tokens: int, block_size: int) -> int:
    """Return the number of blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)
