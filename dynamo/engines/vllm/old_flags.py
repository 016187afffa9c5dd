"""vLLM's flags of 2025, from 0.7 on, that vLLM has renamed or removed since, and values that it reads otherwise today.

A row of FLAGS applies where the installed vLLM has no such flag; one that it has is passed to it untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo.config.provenance import canonical
from dynamo.config.upstream_keys import Change
from dynamo.engines.mock.settings import MockSettings
from dynamo.engines.vllm.install import engine_arguments
from dynamo.text import from_json

Replace = Callable[[Any], Mapping[str, Any]]
"""from a flag's value, the flags of today that say the same"""


@dataclass(frozen=True, slots=True)
class OldFlag:
    """A flag that vLLM lacks from version `removed` on. Without `replace` it says nothing that vLLM can do today."""

    removed: str
    why: str = "remove it"
    replace: Replace | None = None


def changed_flag(key: str, value: Any, known: Collection[str]) -> Change | None:
    """Return what becomes of a flag; None if it is passed as it is. `known` are the installed vLLM's, with `_`."""
    name = canonical(key)
    field = name.removeprefix("no-").partition(".")[0].replace("-", "_")
    if field in known or name.replace("-", "_") in known:
        return _changed_value(key, value)
    old = FLAGS.get(name)
    if old is None and name.startswith("no-"):
        old, value = FLAGS.get(name.removeprefix("no-")), False
    if old is None:
        return None
    since = f"not in vLLM since {old.removed}"
    settings = dict(old.replace(value)) if old.replace is not None and value is not None else {}
    if not all(setting.replace("-", "_") in known for setting in settings):
        settings = {}
    if not settings:
        return Change(f"{since}, {old.why}")
    return Change(f"{since}; write {_written(settings)}", settings)


def is_flag(key: str) -> bool:
    """Return whether a key is a flag of vLLM, of today or of 2025. Without vLLM, only the mock engine's flags are known."""
    known = engine_arguments() or frozenset(MockSettings.__struct_fields__)
    name = canonical(key).removeprefix("no-").partition(".")[0]
    return name in FLAGS or name.replace("-", "_") in known


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in settings.items())


def _changed_value(key: str, value: Any) -> Change | None:
    """Return what becomes of a flag that exists, but took other values in 2025."""
    name = canonical(key)
    new = value
    if name == "compilation-config":
        new = _compilation_config(value)
    elif name == "limit-mm-per-prompt" and isinstance(value, str) and "=" in value:
        counts = [item.partition("=") for item in value.split(",")]
        if all(count.strip().isdecimal() for _, _, count in counts):
            new = {kind.strip(): int(count) for kind, _, count in counts}
    if new == value:
        return None
    return Change(f"vLLM's form before 0.12; write {key}: {json.dumps(new)}", {key: new})


def _compilation_config(value: Any) -> Any:
    """Return a compilation config with today's fields: `mode` was `level`, and a number alone was the level."""
    given = from_json(value)
    if isinstance(given, int) and not isinstance(given, bool):
        return {"mode": given}
    if not isinstance(given, Mapping) or not given.keys() & _COMPILATION_FIELDS:
        return value
    new = {key: field for key, field in given.items() if key not in _COMPILATION_FIELDS}
    if "level" in given:
        new.setdefault("mode", given["level"])
    if given.get("full_cuda_graph"):
        new.setdefault("cudagraph_mode", "FULL")
    if given.get("use_cudagraph") is False:
        new.setdefault("cudagraph_mode", "NONE")
    return new


_COMPILATION_FIELDS = {"level", "full_cuda_graph", "use_cudagraph", "use_inductor"}


def _to(name: str) -> Replace:
    return lambda value: {name: from_json(value)}


def _if_true(name: str, new: Any) -> Replace:
    return lambda value: {} if str(value).lower() == "false" else {name: new}


def _speculative(name: str) -> Replace:
    return lambda value: {"speculative-config": {name: value}}


def _speculative_model(value: Any) -> Mapping[str, Any]:
    return {"speculative-config": {"method": "ngram"} if value == "[ngram]" else {"model": value}}


def _structured_outputs(name: str) -> Replace:
    return lambda value: {"structured-outputs-config": {name: value}}


def _guided_decoding_backend(value: Any) -> Mapping[str, Any]:
    """Translate `xgrammar:disable-any-whitespace`, as vLLM 0.8 wrote a backend and its options."""
    backend, _, options = str(value).partition(":")
    config: dict[str, Any] = {"backend": backend}
    if "disable-any-whitespace" in options:
        config["disable_any_whitespace"] = True
    return {"structured-outputs-config": config}


def _eplb(name: str) -> Replace:
    return lambda value: {"eplb-config": {name: value}}


def _rope(name: str) -> Replace:
    def replace(value: Any) -> Mapping[str, Any]:
        given = from_json(value)
        parameters = given if name == "rope-scaling" else {"rope_theta": given}
        if isinstance(parameters, Mapping) and "type" in parameters:
            parameters = {"rope_type": parameters["type"], **{k: v for k, v in parameters.items() if k != "type"}}
        return {"hf-overrides": {"rope_parameters": parameters}}

    return replace


def _task(value: Any) -> Mapping[str, Any]:
    if value in ("generate", "transcription"):
        return {"runner": "generate"}
    convert = {"embed": "embed", "embedding": "embed", "classify": "classify", "score": "classify"}.get(str(value))
    if convert is not None:
        return {"runner": "pooling", "convert": convert}
    if value == "reward":  # the model's architecture says the rest
        return {"runner": "pooling"}
    return {} if value == "auto" else {"runner": value}


_V0 = "it was for vLLM's V0 engine; remove it"
_ADAPTER = "vLLM has no prompt adapters any more; remove it"
_TOKENIZER_POOL = "vLLM has no tokenizer pool any more; remove it"
_LORA = "vLLM's LoRA needs it no more; remove it"
_PARTIAL_PREFILL = "vLLM has no limit of partial prefills any more; remove it"
_SPECULATION = "vLLM's speculative-config has no such field; remove it"

FLAGS: Mapping[str, OldFlag] = {
    "calculate-kv-scales": OldFlag("0.28", "a checkpoint brings its KV scales; remove it"),
    "cuda-graph-sizes": OldFlag("0.13", replace=lambda value: {"cudagraph-capture-sizes": _sizes(value)}),
    "device": OldFlag("0.10", "the installed build of vLLM decides it; remove it"),
    "disable-async-output-proc": OldFlag("0.11", _V0),
    "disable-log-requests": OldFlag("0.17", "requests are never logged; remove it"),
    "disable-logprobs-during-spec-decoding": OldFlag("0.8.4", _SPECULATION),
    "disable-mm-preprocessor-cache": OldFlag(
        "0.13", "that is the default; remove it", _if_true("mm-processor-cache-gb", 0)
    ),
    "enable-lora-bias": OldFlag("0.11.2", _LORA),
    "enable-multimodal-encoder-data-parallel": OldFlag(
        "0.13", "that is the default; remove it", _if_true("mm-encoder-tp-mode", "data")
    ),
    "enable-prompt-adapter": OldFlag("0.10.2", _ADAPTER),
    "enable-reasoning": OldFlag("0.10", "reasoning-parser alone turns it on; remove it"),
    "eplb-log-balancedness": OldFlag("0.12", replace=_eplb("log_balancedness")),
    "eplb-step-interval": OldFlag("0.12", replace=_eplb("step_interval")),
    "eplb-window-size": OldFlag("0.12", replace=_eplb("window_size")),
    "guided-decoding-backend": OldFlag("0.12", replace=_guided_decoding_backend),
    "guided-decoding-disable-additional-properties": OldFlag(
        "0.12", replace=_structured_outputs("disable_additional_properties")
    ),
    "guided-decoding-disable-any-whitespace": OldFlag("0.12", replace=_structured_outputs("disable_any_whitespace")),
    "guided-decoding-disable-fallback": OldFlag("0.12", "vLLM has no other backend to fall back to; remove it"),
    "logits-processor-pattern": OldFlag("0.17", _V0),
    "long-lora-scaling-factors": OldFlag("0.10", _LORA),
    "lora-extra-vocab-size": OldFlag("0.12", _LORA),
    "max-long-partial-prefills": OldFlag("0.28", _PARTIAL_PREFILL),
    "max-num-partial-prefills": OldFlag("0.28", _PARTIAL_PREFILL),
    "max-prompt-adapter-token": OldFlag("0.10", _ADAPTER),
    "max-prompt-adapters": OldFlag("0.10", _ADAPTER),
    "max-seq-len-to-capture": OldFlag("0.11", "CUDA graphs have no limit of length any more; remove it"),
    "multi-step-stream-outputs": OldFlag("0.10.2", _V0),
    "ngram-prompt-lookup-max": OldFlag("0.8.4", replace=_speculative("prompt_lookup_max")),
    "ngram-prompt-lookup-min": OldFlag("0.8.4", replace=_speculative("prompt_lookup_min")),
    "num-lookahead-slots": OldFlag("0.12", _V0),
    "num-redundant-experts": OldFlag("0.12", replace=_eplb("num_redundant_experts")),
    "num-scheduler-steps": OldFlag("0.10.2", _V0),
    "num-speculative-tokens": OldFlag("0.8.4", replace=_speculative("num_speculative_tokens")),
    "override-attention-dtype": OldFlag("0.28"),
    "override-neuron-config": OldFlag("0.10.2", "vLLM's plugin for Neuron has its own settings; remove it"),
    "override-pooler-config": OldFlag("0.12", replace=_to("pooler-config")),
    "preemption-mode": OldFlag("0.11", "vLLM always recomputes what it preempted; remove it"),
    "qlora-adapter-name-or-path": OldFlag("0.10", _LORA),
    "rope-scaling": OldFlag("0.11.2", replace=_rope("rope-scaling")),
    "rope-theta": OldFlag("0.11.2", replace=_rope("rope-theta")),
    "scheduler-delay-factor": OldFlag("0.11", _V0),
    "spec-decoding-acceptance-method": OldFlag("0.8.4", _SPECULATION),
    "speculative-disable-by-batch-size": OldFlag("0.8.4", _SPECULATION),
    "speculative-disable-mqa-scorer": OldFlag("0.8.4", _SPECULATION),
    "speculative-draft-tensor-parallel-size": OldFlag("0.8.4", replace=_speculative("draft_tensor_parallel_size")),
    "speculative-max-model-len": OldFlag("0.8.4", replace=_speculative("max_model_len")),
    "speculative-model": OldFlag("0.8.4", replace=_speculative_model),
    "speculative-model-quantization": OldFlag("0.8.4", replace=_speculative("quantization")),
    "swap-space": OldFlag("0.18", "KV is not swapped to the CPU; remove it"),
    "task": OldFlag("0.13", "auto is the default; remove it", _task),
    "tokenizer-pool-extra-config": OldFlag("0.10", _TOKENIZER_POOL),
    "tokenizer-pool-size": OldFlag("0.10", _TOKENIZER_POOL),
    "tokenizer-pool-type": OldFlag("0.10", _TOKENIZER_POOL),
    "typical-acceptance-sampler-posterior-alpha": OldFlag("0.8.4", _SPECULATION),
    "typical-acceptance-sampler-posterior-threshold": OldFlag("0.8.4", _SPECULATION),
    "use-v2-block-manager": OldFlag("0.10", _V0),
}


def _sizes(value: Any) -> Any:
    """Return sizes as a list of ints; what is no number stays, and vLLM reports it."""
    items = value if isinstance(value, list) else str(value).replace(",", " ").split()
    return [int(item) if str(item).strip().isdecimal() else item for item in items]
