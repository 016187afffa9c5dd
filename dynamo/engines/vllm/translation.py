"""Translation between dynamo and vLLM: requests to sampling parameters, outputs to deltas, exceptions to ours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo.errors import ContextLengthError, EngineDeadError, EngineError, RequestError
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling, TokenLogprob

CACHED_TOKENS = "remote_prefill_cached_tokens"  # vLLM's key in kv_transfer_params


def sampling_params(request: GenerateRequest, defaults: Mapping[str, Any]) -> Any:
    """Return vLLM's SamplingParams; `defaults` are the model's. Raises RequestError if vLLM rejects a value."""
    params = importlib.import_module("vllm.sampling_params")
    given: Sampling = request.sampling
    values: dict[str, Any] = dict(defaults)
    values.pop("max_tokens", None)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(given, name)
        if value is not None:
            values[name] = value
    kind = params.RequestOutputKind
    if given.structured:
        values["structured_outputs"] = params.StructuredOutputsParams(**given.structured)
    try:
        return params.SamplingParams(
            **values,
            n=given.n,
            max_tokens=given.max_tokens,
            min_tokens=given.min_tokens,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=given.seed,
            stop=given.stop,
            stop_token_ids=given.stop_token_ids,
            include_stop_str_in_output=given.include_stop_str_in_output,
            ignore_eos=given.ignore_eos,
            skip_special_tokens=given.skip_special_tokens,
            logprobs=given.logprobs,
            prompt_logprobs=given.prompt_logprobs,
            logit_bias={int(k): v for k, v in given.logit_bias.items()} if given.logit_bias else None,
            output_kind=kind.FINAL_ONLY if request.final_only else kind.DELTA,
            extra_args={"kv_transfer_params": request.kv_transfer} if request.kv_transfer else None,
        )
    except (ValueError, TypeError) as error:
        raise RequestError(first_line(error)) from None


def to_delta(request: GenerateRequest, output: Any, choice: Any, *, first: bool) -> Delta:
    """Convert one choice of vLLM's RequestOutput; the `first` delta of a request carries the prompt's token counts."""
    return Delta(
        choice.text,
        list(choice.token_ids),
        choice.index,
        choice.finish_reason,
        choice.stop_reason,
        len(output.prompt_token_ids) if first else None,
        _cached_tokens(request, output) if first else None,
        _logprobs(choice.token_ids, choice.logprobs) if choice.logprobs else None,
    )


def _cached_tokens(request: GenerateRequest, output: Any) -> int:
    """Return the prompt tokens that no engine had to compute for this request.

    After a remote prefill these are the prefix hits of the prefill engine: vLLM's count here would include all tokens
    that were transferred.
    """
    if request.kv_transfer:
        return int(request.kv_transfer.get(CACHED_TOKENS, 0))
    return output.num_cached_tokens or 0


def _logprobs(token_ids: Sequence[int], positions: Sequence[Any]) -> list[TokenLogprob]:
    found: list[TokenLogprob] = []
    for token, candidates in zip(token_ids, positions, strict=True):
        chosen = candidates[token]
        ranked = sorted(candidates.items(), key=lambda kv: kv[1].rank or 0)
        top = [(c.decoded_token or "", int(i), float(c.logprob)) for i, c in ranked]
        found.append(TokenLogprob(chosen.decoded_token or "", int(token), float(chosen.logprob), top))
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def to_error(error: Exception) -> Exception:
    """Convert vLLM's exceptions to ours, recognized by class name since the classes have moved between versions."""
    if isinstance(error, (RequestError, EngineError)):
        return error
    names = {cls.__name__ for cls in type(error).__mro__}
    text = first_line(error)
    if "context length" in text or "max_model_len" in text or "maximum model length" in text:
        return ContextLengthError(text)
    if names & {"VLLMValidationError", "VLLMClientError"} or type(error) is ValueError:
        return RequestError(text)
    if "EngineDeadError" in names:
        return EngineDeadError("vLLM's engine core has died", hint="the worker is being restarted")
    return EngineError(f"vLLM failed: {text}")
