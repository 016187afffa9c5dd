"""Messages of the LLM services: requests from HTTP server to Processor to worker, and deltas back."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "abort", "error"]


class Sampling(msgspec.Struct, omit_defaults=True):
    """Sampling parameters, with OpenAI's names and meanings where it has them, else vLLM's. None: the model's default."""

    n: int = 1
    max_tokens: int | None = None
    """None: up to the end of the context"""
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """number of alternatives to report for each token; 0: only the chosen token; None: no log probabilities"""
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    structured: dict[str, Any] | None = None
    """constraint on the output: one of `json` (a schema), `json_object`, `regex`, `choice`, `grammar`"""
    priority: int = 0


RouterMode = Literal["round-robin", "random", "power-of-two", "least-loaded", "kv", "kv-load", "approx-kv"]
"""Policy that chooses a worker for a request; the modes with kv in their name are the Router's."""


class Routing(msgspec.Struct, omit_defaults=True):
    """Overrides of the routing settings for one request; None: as the Processor and the Router are configured."""

    mode: RouterMode | None = None
    temperature: float | None = None
    overlap_credit: float | None = None
    worker: int | None = None
    """id of the instance that must process the request"""


class ChatRequest(msgspec.Struct, omit_defaults=True):
    """A validated chat completion request. Messages are OpenAI's; their content is a string or a list of parts."""

    model: str
    messages: list[dict[str, Any]]
    sampling: Sampling
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stream: bool = True
    """False: the client receives the whole text in one response"""
    template_arguments: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    routing: Routing | None = None


class CompletionRequest(msgspec.Struct, omit_defaults=True):
    """A validated text completion request for one prompt, as text or token ids."""

    model: str
    prompt: str | list[int]
    sampling: Sampling
    stream: bool = True
    echo: bool = False
    routing: Routing | None = None


class GenerateRequest(msgspec.Struct, omit_defaults=True):
    """A request to a worker: token ids, never text."""

    token_ids: list[int]
    sampling: Sampling
    request_id: str = ""
    final_only: bool = False
    """send a single delta for each choice, at its end, since the client does not stream"""
    rank: int | None = None
    """data-parallel rank that runs the request; None: any"""
    expected_hit: int = 0
    """prompt tokens that the router expects in this worker's prefix cache"""
    kv_transfer: dict[str, Any] | None = None
    """address of the prompt's KV, as `Engine.prefill` returned it on another worker; None: compute it here"""


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):
    """One token with its log probability (natural logarithm) and the most likely alternatives."""

    token: str
    token_id: int
    logprob: float
    top: list[tuple[str, int, float]] = []


class Delta(msgspec.Struct, array_like=True, gc=False):
    """The output of one engine step for one choice of a request. `text` holds whole characters only.

    `prompt_tokens` and `cached_tokens` (prompt tokens whose KV was in the cache) are set in the first delta of a request
    and None in the others.
    """

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    logprobs: list[TokenLogprob] | None = None


class ModelCard(msgspec.Struct):
    """A worker's description of its model, in etcd under `models/<name>/<lease hex>`."""

    name: str
    source: str
    """the model as configured: a directory, a hub id, or dynamo-tiny"""
    namespace: str
    component: str
    context_length: int
    kv_block_size: int
    engine: str
    created: int
    """Unix time, seconds"""
    types: list[str] = msgspec.field(default_factory=lambda: ["chat", "completion"])
    """OpenAI APIs: chat, completion, embedding; or backend: the endpoint takes tokens, as `dynamo.llm.token_worker` says"""
    endpoint: str = "generate"


class ServedModel(NamedTuple):
    """A model that is being served, as clients see it. `created` is Unix time in seconds."""

    name: str
    root: str
    context_length: int
    created: int
    apis: tuple[str, ...] = ("chat", "completion")
    forwarded: tuple[str, ...] = ()
    """those of `apis` whose worker takes the OpenAI request itself and yields OpenAI chunks"""


MODELS_PREFIX = "models/"


def model_key(name: str, lease_id: int, kind: str = "") -> str:
    """Return the etcd key of a worker's `ModelCard`; with `kind`, of the one for this type alone."""
    return f"{MODELS_PREFIX}{name}/{lease_id:x}{f':{kind}' if kind else ''}"
