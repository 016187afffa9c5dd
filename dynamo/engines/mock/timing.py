"""How long a step takes: dynamo.mocker's default performance model (docs/mocker, perf_model.rs), in ms."""

from __future__ import annotations

from dynamo.engines.mock.scheduler import Step

PREFILL_MS = (16.50142, 1.518344e-02, 4.209989e-07)
DECODE_MS = (5.74, 54.01, -25.74)


def prefill_ms(tokens: int) -> float:
    """`tokens` are those computed in the step: found in the prefix cache, they cost nothing."""
    constant, linear, square = PREFILL_MS
    return constant + linear * tokens + square * tokens * tokens


def decode_ms(kv_read: float) -> float:
    """One token for each running sequence. `kv_read`: tokens whose KV they read, against those that the cache holds, at
    most 1. Sequences that share blocks read them each, as attention does and as the mocker counts (measured)."""
    constant, linear, square = DECODE_MS
    return max(constant + linear * kv_read + square * kv_read * kv_read, 1.0)


def step_ms(step: Step, kv_read: float) -> float:
    """A step that does both takes the sum, fixed costs twice: dearer than a real mixed step rather than cheaper.

    So the chunks of a long prompt delay the tokens of all others, which is what a graph is to be tried with.
    """
    return (prefill_ms(step.prefill_tokens) if step.prefill_tokens else 0.0) + (
        decode_ms(kv_read) if step.decodes else 0.0
    )
