"""An engine without a model: deterministic tokens at a modelled pace. What graphs are developed and measured with.

The next token is a function of all tokens so far, prompt included. So a request that is continued elsewhere with the
tokens it already has must go on identically, and a wrong or lost token shows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

from dynamo.errors import RequestError
from dynamo.llm.engine import EngineInfo, EngineStats
from dynamo.llm.models import tokenizer_dir
from dynamo.llm.protocol import Delta, FinishReason, GenerateRequest
from dynamo.wire.stream import Channel, Stream

_MASK = (1 << 64) - 1
_EOS_EVERY = 97  # tokens on average, unless ignore_eos

# Step times of dynamo.mocker's default performance model (docs/mocker, perf_model.rs), in ms: prefill of T tokens, and
# a decode step with an almost empty KV cache.
PREFILL_MS = (16.50142, 1.518344e-02, 4.209989e-07)
DECODE_MS = 5.74


def prefill_ms(tokens: int) -> float:
    constant, linear, square = PREFILL_MS
    return constant + linear * tokens + square * tokens * tokens


def mix(state: int, token: int) -> int:
    """The state after one more token: splitmix64's finalizer over the old state and the token."""
    z = (state ^ (token * 0x9E3779B97F4A7C15)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class _Sequence:
    """One choice of one running request."""

    __slots__ = ("channel", "generated", "index", "kept", "left", "request", "state", "stop", "tail")

    def __init__(self, request: GenerateRequest, index: int, state: int, channel: Channel[Delta], left: int) -> None:
        self.request, self.index, self.state, self.channel = request, index, state, channel
        self.left = left
        self.generated = 0
        self.stop = request.sampling.stop
        self.tail = ""  # text that may be the beginning of a stop string
        self.kept: tuple[list[str], list[int]] | None = ([], []) if request.final_only else None


class MockEngine:
    """`speedup` divides the modelled times; 0 means no waiting at all."""

    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}  # others have no meaning here
        self._speedup = float(given.get("speedup-ratio", 1.0))
        self._model, self._progress = model, progress
        self._info = EngineInfo(
            int(given.get("max-model-len", 4096)),
            int(given.get("block-size", 64)),
            int(given.get("num-gpu-blocks-override", 16384)),
        )
        self._running: list[_Sequence] = []
        self._waiting = 0
        self._stepping: asyncio.TimerHandle | asyncio.Handle | None = None
        self._table: list[tuple[int, str]] = []
        self._step_s = DECODE_MS / self._speedup / 1e3 if self._speedup else 0.0
        self._next_step = 0.0

    async def start(self) -> EngineInfo:
        self._progress("loading the tokenizer")
        tokenizer = Tokenizer.from_file(str(tokenizer_dir(self._model) / "tokenizer.json"))
        specials = set(tokenizer.get_added_tokens_decoder())
        for token in range(tokenizer.get_vocab_size()):
            text = tokenizer.decode([token]) if token not in specials else ""
            if text.isprintable() and text.isascii() and text.strip():
                self._table.append((token, text))
        self._loop = asyncio.get_running_loop()
        return self._info

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        sampling, prompt = request.sampling, request.token_ids
        if sampling.logprobs is not None:
            raise RequestError("the mock engine gives no logprobs", param="logprobs")
        room = self._info.context_length - len(prompt)
        if room < 1:
            raise RequestError(f"{len(prompt)} prompt tokens do not fit {self._info.context_length}", param="prompt")
        left = min(room, sampling.max_tokens or room)
        state = sampling.seed or 0
        for token in prompt:
            state = mix(state, token)
        channel: Channel[Delta] = Channel()
        sequences = [
            _Sequence(request, index, mix(state, -index) if index else state, channel, left)
            for index in range(sampling.n)
        ]
        channel.on_cancel = lambda: self._remove(sequences)
        if self._speedup:
            self._waiting += 1
            self._loop.call_later(prefill_ms(len(prompt)) / self._speedup / 1e3, self._admit, sequences)
        else:
            self._running += sequences
            self._wake()
        return Stream(channel)

    def _admit(self, sequences: list[_Sequence]) -> None:
        self._waiting -= 1
        if not sequences[0].channel.done:
            self._running += sequences
            self._wake()

    def _remove(self, sequences: list[_Sequence]) -> None:
        self._running = [s for s in self._running if s not in sequences]

    def _wake(self) -> None:
        if self._stepping is None:
            self._next_step = time.monotonic()
            self._stepping = self._loop.call_soon(self._step)

    def _step(self) -> None:
        """One token for each running sequence, as an engine's decode step."""
        done: dict[int, list[_Sequence]] = {}
        for sequence in self._running:
            self._advance(sequence)
            if sequence.left == 0:
                done.setdefault(id(sequence.channel), []).append(sequence)
        if done:
            self._running = [s for s in self._running if s.left]
            for finished in done.values():
                channel = finished[0].channel
                if not any(s.channel is channel for s in self._running):
                    channel.end()
        if not self._running:
            self._stepping = None
        elif self._step_s:
            self._next_step = max(self._next_step + self._step_s, time.monotonic())
            self._stepping = self._loop.call_later(self._next_step - time.monotonic(), self._step)
        else:
            self._stepping = self._loop.call_soon(self._step)

    def _advance(self, sequence: _Sequence) -> None:
        sampling = sequence.request.sampling
        token, text = self._table[sequence.state % len(self._table)]
        ended = not (sequence.state >> 40) % _EOS_EVERY and not sampling.ignore_eos
        sequence.state = mix(sequence.state, token)
        sequence.left -= 1
        sequence.generated += 1
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if (ended or token in sampling.stop_token_ids) and sequence.generated > sampling.min_tokens:
            stop_reason = None if ended else token
            sequence.left, reason, text = 0, "stop", "" if ended else text
        elif sequence.left == 0:
            reason = "length"
        if sequence.stop:
            text, stop = self._until_stop(sequence, text, final=reason is not None)
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
        prompt_tokens, cached_tokens = (len(sequence.request.token_ids), 0) if counted else (None, None)
        sequence.channel.push(Delta(text, tokens, sequence.index, reason, stop_reason, prompt_tokens, cached_tokens))

    def _until_stop(self, sequence: _Sequence, text: str, *, final: bool) -> tuple[str, str | None]:
        """The text that can be given out now, and the stop string if one was met."""
        text = sequence.tail + text
        for stop in sequence.stop:
            at = text.find(stop)
            if at >= 0:
                end = at + len(stop) if sequence.request.sampling.include_stop_str_in_output else at
                return text[:end], stop
        held = 0 if final else max(len(stop) for stop in sequence.stop) - 1
        cut = max(len(text) - held, 0)
        sequence.tail = text[cut:]
        return text[:cut], None

    async def abort(self, request_id: str) -> None:
        for sequence in [s for s in self._running if s.request.request_id == request_id]:
            sequence.channel.cancel()

    def stats(self) -> EngineStats:
        return EngineStats(len(self._running), self._waiting, 0.0, 0, 0)

    async def check_health(self) -> None:
        return None

    async def stop(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> MockEngine:
    return MockEngine(model, arguments, progress)
