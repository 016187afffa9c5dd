"""What configurations of ai-dynamo 0.1 to 0.3 contain beside the settings of today: its services, and its older keys.

    SERVICES    services of upstream and of this project: a section of such a name is never a misspelling
    KEYS        keys of upstream's components by service, with what becomes of each
    OPEN        services that ignore all other keys, too

A row of KEYS applies where the service's class does not take the key itself: a Processor of a user may well declare
`temperature`. vLLM's own flags that vLLM has renamed or removed are in `dynamo.engines.vllm.old_flags`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo.config.provenance import canonical
from dynamo.environment import parse_bool

SERVICES = {
    **dict.fromkeys(("Frontend", "Processor", "Router", "VllmWorker", "PrefillWorker"), ""),
    "Planner": "ai-dynamo's planner",
    "Prometheus": "it belongs to ai-dynamo's planner",
    "VllmDecodeWorker": "ai-dynamo's vllm_v1 example",
    "VllmPrefillWorker": "ai-dynamo's vllm_v1 example",
    "VllmEncodeWorker": "ai-dynamo's multimodal example",
    "SGLangWorker": "ai-dynamo's SGLang example",
    "SGLangDecodeWorker": "ai-dynamo's SGLang example",
    "TensorRTLLMWorker": "ai-dynamo's TensorRT-LLM example",
    "TensorRTLLMPrefillWorker": "ai-dynamo's TensorRT-LLM example",
}
"""Names, and where they come from if this project has no such service."""


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a key: `settings` take its place, where they are not given as well; none: it is ignored.

    `note` says why, and what to write today.
    """

    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fact: str = ""
    """what is done, if the settings do not say it: "ignored", "read as model"."""


Row = Callable[[Any], Change]


def upstream_key(service: str, key: str, value: Any) -> Change | None:
    """Return what becomes of a key of upstream's component of this name; None if it had no such key."""
    row = KEYS.get(service, {}).get(canonical(key))
    return row(value) if row is not None else None


def _renamed(new: str, why: str) -> Row:
    return lambda value: Change(f"{why}; write {new}", {new: value})


def _ignored(why: str) -> Row:
    return lambda value: Change(f"{why}; remove it")


def _softmax_sample(value: Any) -> Change:
    # ai-dynamo drew from the softmax of the logits divided by their range: a router-temperature of 1
    wanted = parse_bool(str(value or False))
    temperature = value if wanted is None else float(wanted)  # a value of neither kind is refused under today's name
    return Change(
        f"the name in ai-dynamo 0.3; write router-temperature: {temperature}", {"router-temperature": temperature}
    )


_QUEUE_THREADS = _ignored("it was for the request queue of ai-dynamo 0.2 and 0.3, which is not needed here")
_GPU_OFFSET = _ignored("ai-dynamo 0.1.0 needed it; `dynamo serve` assigns GPUs to all workers")
_DECODE_ONLY = _ignored("ai-dynamo accepted it here without effect, as a setting of VllmWorker")
_DECODE_KEYS = ("remote-prefill", "conditional-disagg", "max-local-prefill-length", "max-prefill-queue-size")
_ONE_ENDPOINT = _ignored("the Processor of `endpoint` serves completions, too")
_LINKS = _ignored("the links of the graph decide it")
_NOT_FRONTENDS = _ignored("forks of ai-dynamo repeated it here; Processor and workers have it")
_ADDRESSES = {
    **dict.fromkeys(("etcd-endpoints", "etcd-url"), _ignored("the variable ETCD_ENDPOINTS holds the address")),
    **dict.fromkeys(("nats-server", "nats-url"), _ignored("the variable NATS_SERVER holds the address")),
}
KEYS: Mapping[str, Mapping[str, Row]] = {
    "Frontend": {
        "model": _renamed("served_model_name", "the name in ai-dynamo 0.1.0"),
        "endpoint-chat": _renamed("endpoint", "the name in forks of ai-dynamo"),
        "endpoint-completion": _ONE_ENDPOINT,
        "endpoint-completions": _ONE_ENDPOINT,
        "worker": _LINKS,
        "processor": _LINKS,
        **dict.fromkeys(("block-size", "max-model-len", "router"), _NOT_FRONTENDS),
        **_ADDRESSES,
    },
    "Processor": {
        "router-num-threads": _QUEUE_THREADS,
        "prompt-template": _ignored("it was for ai-dynamo's multimodal example; the model's chat template applies"),
        **dict.fromkeys(_DECODE_KEYS, _DECODE_ONLY),
        **_ADDRESSES,
    },
    "Router": {
        "model-name": _renamed("model", "the name in ai-dynamo 0.1"),
        "softmax-sample": _softmax_sample,
        "temperature": _renamed("router-temperature", "the name in forks of ai-dynamo"),
        "max-workers": _ignored("it was for XConnector; all workers are used"),
        **_ADDRESSES,
    },
    "VllmWorker": {"router-num-threads": _QUEUE_THREADS, "cuda-visible-device-offset": _GPU_OFFSET, **_ADDRESSES},
    "PrefillWorker": {
        "router": _DECODE_ONLY,
        "router-num-threads": _QUEUE_THREADS,
        "cuda-visible-device-offset": _GPU_OFFSET,
        "max-batched-prefill-tokens": _ignored("forks of ai-dynamo had it; the nearest is max-prefills, in prompts"),
        **dict.fromkeys(_DECODE_KEYS, _DECODE_ONLY),
        **_ADDRESSES,
    },
    "Planner": _ADDRESSES,
}

OPEN = {"Planner": "ai-dynamo's planners, and those of its forks, had many; remove it"}
"""Services of which any further key is ignored, if it is no misspelling, and why."""
