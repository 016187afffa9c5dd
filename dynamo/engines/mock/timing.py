"""Duration of an engine step: the default performance model of dynamo.mocker (docs/mocker, perf_model.rs), in ms."""

from __future__ import annotations

from dynamo.engines.mock.scheduler import ScheduledStep

PREFILL_MS = (16.50142, 1.518344e-02, 4.209989e-07)
"""coefficients of 1, tokens and tokens²"""
DECODE_MS = (5.74, 54.01, -25.74)
"""coefficients of 1, `kv_read` and `kv_read`²"""


def prefill_ms(tokens: int) -> float:
    """Return the time to compute that many prompt tokens; tokens found in the prefix cache are not among them."""
    constant, linear, square = PREFILL_MS
    return constant + linear * tokens + square * tokens * tokens


def decode_ms(kv_read: float) -> float:
    """Return the time to compute one token for each running sequence.

    `kv_read`: tokens whose KV they read, as a fraction of the tokens that the cache holds, at most 1. Blocks shared by
    several sequences count for each of them, as attention reads them and as the mocker counts (measured).
    """
    constant, linear, square = DECODE_MS
    return max(constant + linear * kv_read + square * kv_read * kv_read, 1.0)


def step_ms(step: ScheduledStep, kv_read: float) -> float:
    """Return the time of a step: the sum of its prefill and its decode, fixed costs twice.

    That is longer than a real mixed step rather than shorter. So the chunks of a long prompt delay the tokens of all other
    requests: the effect that a graph is to be tried with.
    """
    prefill = prefill_ms(step.prefill_tokens) if step.prefill_tokens else 0.0
    decode = decode_ms(kv_read) if step.decodes else 0.0
    return prefill + decode
