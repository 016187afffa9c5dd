"""Requests a second that the workers can sustain, so that a load can be given as a share of that.

Both mock engines, ours and ai-dynamo's, take the time of a step from the same two polynomials (ai-dynamo's docs/mocker),
in milliseconds divided by the speedup:

    p(T) = 16.50142 + 1.518344e-2 T + 4.209989e-7 T²      prefill of T uncached tokens in one step
    d(u) = max(1, 5.74 + 54.01 u - 25.74 u²)              one token for every running sequence, u: used share of the KV

A saturated worker without prefix hits always has prompts waiting, so its prefill steps carry the whole token
budget B: a prompt of I tokens costs I p(B) / B. It decodes as many sequences as fit, N = min(max sequences, KV tokens /
(I + O)), which share each step: O - 1 tokens cost (O - 1) d(u) / N with u = N (I + O / 2) / KV tokens. With the means of
I and O over the trace:

    requests a second = workers * speedup * 1000 / (I p(B) / B + (O - 1) d(u) / N)

Round-robin cannot do better than that when there are no hits; it spreads unequal prompts unevenly, so its queues grow
earlier. Hits make prefill cheaper: with them the same load is a smaller share of what the workers could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.replay.trace import Request
from dynamo.engines.mock.timing import decode_ms, prefill_ms


@dataclass(frozen=True)
class Engines:
    """Settings of the mock workers, the same for ours and for peers."""

    workers: int = 8
    block: int = 64
    """tokens in a KV block"""
    blocks: int = 2048
    """KV blocks of each worker"""
    speedup: float = 1.0
    max_sequences: int = 256
    batched_tokens: int = 8192

    @property
    def tokens(self) -> int:
        """tokens that a worker's KV cache holds"""
        return self.block * self.blocks


def requests_per_s(engines: Engines, requests: Sequence[Request]) -> float:
    """Return the requests a second that all workers together sustain without prefix hits, by the formula above."""
    prompt = sum(request.input_length for request in requests) / len(requests)
    output = sum(request.output_length for request in requests) / len(requests)
    running = max(1.0, min(engines.max_sequences, engines.tokens / (prompt + output)))
    used = min(1.0, running * (prompt + output / 2) / engines.tokens)
    prefill = prompt * prefill_ms(engines.batched_tokens) / engines.batched_tokens
    decode = (output - 1) * decode_ms(used) / running
    return engines.workers * engines.speedup * 1e3 / (prefill + decode)
