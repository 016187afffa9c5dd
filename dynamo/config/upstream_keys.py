"""What configurations of ai-dynamo 0.1 to 0.3 contain beside the settings of today: its services, and its older keys.

    SERVICES    services of upstream and of this project: a section of such a name is never a misspelling
    KEYS        keys of upstream's components by service, with what becomes of each

A row of KEYS applies where the service's class does not take the key itself: a Processor of a user may well declare
`temperature`. vLLM's own flags that vLLM has renamed or removed are in `dynamo.engines.vllm.old_flags`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo.config.provenance import canonical

SERVICES = {
    "Frontend": "",
    "Processor": "",
    "Router": "",
    "VllmWorker": "",
    "PrefillWorker": "",
    "Planner": "ai-dynamo's Planner",
    "Prometheus": "ai-dynamo's Planner reads it",
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


def _renamed(new: str, since: str) -> Row:
    return lambda value: Change(f"the name before ai-dynamo {since}; write {new}", {new: value})


def _ignored(note: str) -> Row:
    return lambda value: Change(note)


def _softmax_sample(value: Any) -> Change:
    # ai-dynamo drew from the softmax of the logits divided by their range: a router-temperature of 1
    temperature = 1.0 if value in (True, "true", "True") else 0.0
    return Change(
        f"ai-dynamo 0.3.2's name; write router-temperature: {temperature}", {"router-temperature": temperature}
    )


_QUEUE_THREADS = _ignored("tasks of ai-dynamo's request queue; requests are not queued here: remove it")
_ONLY_DECODE = _ignored("ai-dynamo accepted it here and did not read it: remove it; VllmWorker has the setting")
_DECODE_KEYS = dict.fromkeys(("remote-prefill", "conditional-disagg", "max-local-prefill-length", "max-prefill-queue-size"), _ONLY_DECODE)
_ONE_ENDPOINT = _ignored("the Processor of Frontend.endpoint serves chat and completions: remove it")

KEYS: Mapping[str, Mapping[str, Row]] = {
    "Frontend": {
        "model": _renamed("served_model_name", "0.1.1"),
        "endpoint-chat": lambda value: Change("another name of endpoint; write endpoint", {"endpoint": value}),
        "endpoint-completion": _ONE_ENDPOINT,
        "endpoint-completions": _ONE_ENDPOINT,
    },
    "Processor": {"router-num-threads": _QUEUE_THREADS, **_DECODE_KEYS},
    "Router": {
        "model-name": _renamed("model", "0.2"),
        "softmax-sample": _softmax_sample,
        "temperature": lambda value: Change(
            "a name of ai-dynamo's branches; write router-temperature", {"router-temperature": value}
        ),
        "max-workers": _ignored("a key of XConnector's Router; all workers are used: remove it"),
    },
    "VllmWorker": {
        "router-num-threads": _QUEUE_THREADS,
        "cuda-visible-device-offset": _ignored("`dynamo serve` assigns the GPUs of all workers: remove it"),
    },
    "PrefillWorker": {
        "router": _ONLY_DECODE,
        "router-num-threads": _QUEUE_THREADS,
        "cuda-visible-device-offset": _ignored("`dynamo serve` assigns the GPUs of all workers: remove it"),
        "max-batched-prefill-tokens": _ignored(
            "a key of ai-dynamo's branches; the nearest is max-prefills, in prompts"
        ),
        **_DECODE_KEYS,
    },
}
