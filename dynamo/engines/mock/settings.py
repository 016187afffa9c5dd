"""What the mock engine takes: vLLM's flags that mean something without a model, and faults to be had on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dynamo.errors import StartError

Count = Annotated[int, Meta(ge=1)]


class MockSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Named as in the configuration: `max-num-seqs` is `max_num_seqs` here. Other flags of vLLM are ignored.

    vLLM's own default of `max-num-batched-tokens` depends on the hardware: 8192 is that of its server on large GPUs, and
    dynamo.mocker's.
    """

    max_model_len: Count = 4096
    """longest prompt plus output, in tokens; less where the KV cache is smaller"""
    block_size: Count = 64
    """tokens of a KV block"""
    num_gpu_blocks_override: Annotated[int, Meta(ge=2)] = 16384
    """KV blocks of one rank; one of them is never used, as in vLLM"""
    max_num_batched_tokens: Count = 8192
    """tokens that one step computes at most"""
    max_num_seqs: Count = 256
    """sequences that run at a time; each of `n` choices is one"""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    data_parallel_size: Count = 1
    """ranks, each with a KV cache and a scheduler of its own"""
    speedup_ratio: Annotated[float, Meta(ge=0)] = 1.0
    """divides the modelled times; 0: no waiting at all"""
    kv_transfer: bool = False
    """computes KV for other engines and fetches it from them; a worker of a disaggregated graph sets it"""
    mock_kv_bytes_per_token: Annotated[int, Meta(ge=0)] = 131_072
    """of the KV that is transferred: 32 layers of 8 heads of 128 numbers of 16 bits, twice, as Llama 3.1 8B has them"""
    mock_kv_bandwidth_gb_s: Annotated[float, Meta(gt=0)] = 64.0
    """at which it is transferred, in 10^9 bytes a second; dynamo.mocker's default"""
    kv_transfer_lease_s: Annotated[float, Meta(gt=0)] = 30.0
    """after which KV that nobody fetches is freed"""
    mock_slow_factor: Annotated[float, Meta(gt=0)] = 1.0
    """multiplies them: one slow worker among others"""
    mock_crash_after_tokens: Annotated[int, Meta(ge=0)] = 0
    """the process kills itself with SIGKILL when it has given that many tokens; 0: never"""
    mock_freeze_after_tokens: Annotated[int, Meta(ge=0)] = 0
    """nothing is answered any more after the step that gave that many tokens; 0: never"""
    mock_error_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """fraction of requests that end with an EngineError in the middle of their output; which ones is seeded"""


FAULTS = frozenset(name for name in MockSettings.__struct_fields__ if name.startswith("mock_"))
"""names that vLLM does not know"""


def mock_settings(arguments: Mapping[str, Any]) -> MockSettings:
    """From configuration values by name, spelled with `-` or `_`; StartError where one is of a wrong type or range."""
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if flag.startswith("no-") and isinstance(value, bool):
            flag, value = flag.removeprefix("no-"), not value
        if value is not None:
            given[flag] = value
    try:
        return msgspec.convert(given, MockSettings, strict=False)
    except msgspec.ValidationError as error:
        fact, _, path = str(error).partition(" - at ")
        name = path.strip("`").removeprefix("$.")
        raise StartError(
            f"the mock engine's {name} {given.get(name)!r}: {fact[:1].lower()}{fact[1:].replace('`', '')}",
            hint="correct the worker's key in the configuration",
        ) from None
