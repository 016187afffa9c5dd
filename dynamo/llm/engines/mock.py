"""An engine without a model: deterministic tokens at a modelled pace. What graphs are developed and measured with.

The next token is a function of all tokens so far, prompt included. So a request that is continued elsewhere with the
tokens it already has must go on identically, and a wrong or lost token shows.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import xxhash
from tokenizers import Tokenizer

from dynamo.errors import EngineError, RequestError, StartError
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener
from dynamo.llm.models import tokenizer_dir
from dynamo.llm.protocol import Delta, FinishReason, GenerateRequest
from dynamo.wire.stream import Channel, Stream

_EOS_EVERY = 97  # tokens on average, unless ignore_eos

# Step times of dynamo.mocker's default performance model (docs/mocker, perf_model.rs), in ms: prefill of T tokens, and
# a decode step with an almost empty KV cache.
PREFILL_MS = (16.50142, 1.518344e-02, 4.209989e-07)
DECODE_MS = 5.74


def prefill_ms(tokens: int) -> float:
    constant, linear, square = PREFILL_MS
    return constant + linear * tokens + square * tokens * tokens


class _Generation:
    """One running request: its choices share a channel, which ends with the last of them."""

    __slots__ = ("admission", "channel", "choices", "request")

    def __init__(self, request: GenerateRequest, channel: Channel[Delta]) -> None:
        self.request, self.channel = request, channel
        self.choices = request.sampling.n  # that still run
        self.admission: asyncio.TimerHandle | None = None  # the end of its prefill


class _Sequence:
    """One choice. `hash` has seen all tokens so far, so it decides on the next."""

    __slots__ = ("generated", "generation", "hash", "index", "kept", "left", "sampling", "tail")

    def __init__(self, generation: _Generation, index: int, hash: xxhash.xxh3_64, left: int) -> None:
        self.generation, self.index, self.hash, self.left = generation, index, hash, left
        self.sampling = generation.request.sampling
        self.generated = 0
        self.tail = ""  # text that may be the beginning of a stop string
        self.kept: tuple[list[str], list[int]] | None = ([], []) if generation.request.final_only else None

    def until_stop(self, text: str, *, final: bool) -> tuple[str, str | None]:
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


class MockEngine:
    """`speedup-ratio` divides the modelled times; 0 means no waiting at all."""

    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}  # others have no meaning here
        self._speedup = float(given.get("speedup-ratio", 1.0))
        self._model, self._progress = model, progress
        self._info = EngineInfo(
            int(given.get("max-model-len", 4096)),
            int(given.get("block-size", 64)),
            int(given.get("num-gpu-blocks-override", 16384)),
        )
        self._live: set[_Generation] = set()
        self._running: list[_Sequence] = []
        self._stepping: asyncio.TimerHandle | asyncio.Handle | None = None
        self._table: list[tuple[int, str, bytes]] = []  # token, its text, what the hash gets
        self._step_s = DECODE_MS / self._speedup / 1e3 if self._speedup else 0.0
        self._next_step = 0.0

    async def start(self) -> EngineInfo:
        self._progress("loading the tokenizer")
        tokenizer = Tokenizer.from_file(str(tokenizer_dir(self._model) / "tokenizer.json"))
        specials = set(tokenizer.get_added_tokens_decoder())
        for token in range(tokenizer.get_vocab_size()):
            text = tokenizer.decode([token]) if token not in specials else ""
            if text.isprintable() and text.isascii() and text.strip():
                self._table.append((token, text, _packed([token])))
        if not self._table:
            raise StartError(f"the tokenizer of {self._model} has no token that is plain text")
        self._loop = asyncio.get_running_loop()
        return self._info

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        sampling, prompt = request.sampling, request.token_ids
        channel: Channel[Delta] = Channel()
        stream = Stream(channel)
        room = self._info.context_length - len(prompt)
        if sampling.logprobs is not None:
            channel.end(RequestError("the mock engine gives no logprobs", param="logprobs"))
            return stream
        if room < 1:
            channel.end(RequestError(f"{len(prompt)} prompt tokens do not fit {self._info.context_length}"))
            return stream
        generation = _Generation(request, channel)
        self._live.add(generation)
        channel.on_cancel = lambda: self._cancelled(generation)
        left, seed, seen = min(room, sampling.max_tokens or room), sampling.seed or 0, _packed(prompt)
        sequences = [
            _Sequence(generation, index, xxhash.xxh3_64(seen, seed=(seed + index) % 2**64), left)
            for index in range(sampling.n)
        ]
        if self._speedup:
            wait_s = prefill_ms(len(prompt)) / self._speedup / 1e3
            generation.admission = self._loop.call_later(wait_s, self._admit, generation, sequences)
        else:
            self._admit(generation, sequences)
        return stream

    def _admit(self, generation: _Generation, sequences: list[_Sequence]) -> None:
        generation.admission = None
        self._running += sequences
        if self._stepping is None:
            self._next_step = time.monotonic()
            self._stepping = self._loop.call_soon(self._step)

    def _cancelled(self, generation: _Generation) -> None:
        """Its sequences leave at the next step, before they get another token."""
        self._live.discard(generation)
        if generation.admission is not None:
            generation.admission.cancel()

    def _step(self) -> None:
        """One token for each running sequence, as an engine's decode step."""
        # a token's reader may call `generate` or cancel others meanwhile
        running, self._running = self._running, []
        still: list[_Sequence] = []
        for sequence in running:
            generation = sequence.generation
            if generation.channel.done:
                continue
            self._advance(sequence)
            if sequence.left:
                still.append(sequence)
                continue
            generation.choices -= 1
            if not generation.choices:
                self._live.discard(generation)
                generation.channel.end()
        self._running = still + self._running
        if not self._running:
            self._stepping = None
        elif self._step_s:
            self._next_step = max(self._next_step + self._step_s, time.monotonic())
            self._stepping = self._loop.call_later(self._next_step - time.monotonic(), self._step)
        else:
            self._stepping = self._loop.call_soon(self._step)

    def _advance(self, sequence: _Sequence) -> None:
        sampling, state = sequence.sampling, sequence.hash.intdigest()
        token, text, packed = self._table[state % len(self._table)]
        sequence.hash.update(packed)
        sequence.left -= 1
        sequence.generated += 1
        free = sequence.generated > sampling.min_tokens  # to stop before the limit
        ended = free and not (state >> 40) % _EOS_EVERY and not sampling.ignore_eos
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if ended:
            sequence.left, reason, text = 0, "stop", ""
        elif free and token in sampling.stop_token_ids:
            sequence.left, reason, stop_reason = 0, "stop", token
        elif sequence.left == 0:
            reason = "length"
        if sampling.stop and free:
            text, stop = sequence.until_stop(text, final=reason is not None)
            if stop is not None:
                sequence.left, reason, stop_reason = 0, "stop", stop
        first, tokens = sequence.generated == 1, [token]
        if sequence.kept is not None:
            sequence.kept[0].append(text)
            sequence.kept[1].append(token)
            if reason is None:
                return
            first, text, tokens = True, "".join(sequence.kept[0]), sequence.kept[1]
        # the prompt is counted once, however many choices it has
        counted = first and sequence.index == 0
        generation = sequence.generation
        prompt_tokens, cached_tokens = (len(generation.request.token_ids), 0) if counted else (None, None)
        generation.channel.push(Delta(text, tokens, sequence.index, reason, stop_reason, prompt_tokens, cached_tokens))

    async def abort(self, request_id: str) -> None:
        for generation in [g for g in self._live if g.request.request_id == request_id]:
            generation.channel.cancel()

    def stats(self) -> list[EngineStats]:
        waiting = sum(g.admission is not None for g in self._live)
        return [EngineStats(len(self._live) - waiting, waiting, 0.0, 0, 0)]

    def kv_events(self, listener: KvListener) -> bool:
        return False

    async def check_health(self) -> None:
        return None

    async def stop(self) -> None:
        """Running requests end with an error."""
        if self._stepping is not None:
            self._stepping.cancel()
        for generation in list(self._live):
            self._cancelled(generation)
            generation.channel.end(EngineError("the engine is stopping"))


def _packed(tokens: list[int]) -> bytes:
    return array("Q", tokens).tobytes()


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> MockEngine:
    return MockEngine(model, arguments, progress)
