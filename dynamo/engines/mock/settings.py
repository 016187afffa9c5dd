"""Settings of the mock engine: the flags of vLLM that apply without a model, and faults to inject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dynamo.errors import StartError

Count = Annotated[int, Meta(ge=1)]


class MockSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Settings under vLLM's names, with `_` for `-`: `max-num-seqs` is `max_num_seqs`. Other flags of vLLM are ignored.

    vLLM's own default of `max-num-batched-tokens` depends on the hardware: 8192 is that of its server on large GPUs, and
    dynamo.mocker's.
    """

    max_model_len: Count = 4096
    """longest prompt plus output, in tokens; limited by the size of the KV cache"""
    block_size: Count = 64
    """tokens per KV block"""
    num_gpu_blocks_override: Annotated[int, Meta(ge=2)] = 16384
    """KV blocks of one rank; one of them is never used, as in vLLM"""
    max_num_batched_tokens: Count = 8192
    """largest number of tokens that one step computes"""
    max_num_seqs: Count = 256
    """largest number of sequences that run at a time; each of `n` choices is one"""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    data_parallel_size: Count = 1
    """number of ranks, each with its own KV cache and scheduler"""
    speedup_ratio: Annotated[float, Meta(ge=0)] = 1.0
    """divides the modelled times; 0: no waiting at all"""
    kv_transfer: bool = False
    """compute KV for other engines and fetch it from them; set by the workers of a disaggregated graph"""
    mock_kv_bytes_per_token: Annotated[int, Meta(ge=0)] = 131_072
    """size of the KV of one token in a transfer; default: Llama 3.1 8B, 32 layers of 8 heads of 128 16-bit numbers, twice"""
    mock_kv_bandwidth_gb_s: Annotated[float, Meta(gt=0)] = 64.0
    """bandwidth of a transfer in 10^9 bytes per second; the default is that of dynamo.mocker"""
    kv_transfer_lease_s: Annotated[float, Meta(gt=0)] = 30.0
    """time after which KV that was not fetched is freed"""
    mock_slow_factor: Annotated[float, Meta(gt=0)] = 1.0
    """multiplies the modelled times, to try one slow worker among others"""
    mock_crash_after_tokens: Annotated[int, Meta(ge=0)] = 0
    """kill the process with SIGKILL after that many generated tokens; 0: never"""
    mock_freeze_after_tokens: Annotated[int, Meta(ge=0)] = 0
    """produce nothing after the step that reached that many generated tokens; 0: never"""
    mock_error_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """fraction of requests that end with an EngineError in the middle of their output; the choice is seeded"""


FAULTS = frozenset(name for name in MockSettings.__struct_fields__ if name.startswith("mock_"))
"""settings that vLLM does not know"""


def mock_settings(arguments: Mapping[str, Any]) -> MockSettings:
    """Return the settings of configuration values by name, spelled with `-` or `_`.

    Raises StartError for a value of a wrong type or range.
    """
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
