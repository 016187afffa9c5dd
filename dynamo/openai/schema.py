"""OpenAI's request schemas as pydantic models, and their translation into the messages between processes.

Names, ranges and defaults follow OpenAI's API reference; the extra sampling fields are vLLM's.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynamo.errors import RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, RouterMode, Routing, Sampling
from dynamo.openai import field_types, json_schema

MAX_CHOICES = 128
MAX_LOGPROBS = 20


class _Strict(BaseModel):
    """A model without conversions: "1" is not a number. Unknown fields are kept, to be reported or passed on."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class StructuredOutputs(_Strict):
    """vLLM's newer name for guided decoding."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Extensions(_Strict):
    """`nvext`, Dynamo's extensions to OpenAI's requests: here, how the request is routed."""

    router: RouterMode | None = None
    router_temperature: float | None = Field(None, ge=0)
    overlap_score_credit: float | None = Field(None, ge=0)
    backend_instance_id: field_types.InstanceId = None

    def routing(self) -> Routing | None:
        found = Routing(self.router, self.router_temperature, self.overlap_score_credit, self.backend_instance_id)
        return None if found == Routing() else found


class SamplingFields(_Strict):
    """Fields of both chat and text completions. Unknown fields are kept and reported, not refused, as vLLM does."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: field_types.StopStrings = []
    logit_bias: field_types.LogitBias = None
    # accepted without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    # vLLM's
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # Dynamo's
    nvext: Extensions | None = None

    @property
    def routing(self) -> Routing | None:
        return self.nvext.routing() if self.nvext is not None else None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _constraints(self) -> dict[str, tuple[str, Any]]:
        """Return kind of structured output -> (parameter that asks for it, its value)."""
        found = {
            "json": ("guided_json", self.guided_json),
            "regex": ("guided_regex", self.guided_regex),
            "choice": ("guided_choice", self.guided_choice),
            "grammar": ("guided_grammar", self.guided_grammar),
        }
        asked = [(kind, name, value) for kind, (name, value) in found.items()]
        if self.structured_outputs is not None:
            given = self.structured_outputs
            for kind in ("json", "regex", "choice", "grammar", "json_object"):
                value = getattr(given, "json_" if kind == "json" else kind)
                value = None if value is False else value
                asked.append((kind, f"structured_outputs.{kind}", value))
        result: dict[str, tuple[str, Any]] = {}
        for kind, name, value in asked:
            if value is not None:
                _refuse_second(result, name)
                result[kind] = (name, value)
        return result

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Return the sampling parameters. Raises RequestError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.", param="stream_options"
            )
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise RequestError(
                f"Invalid value for 'min_tokens': {self.min_tokens} is more than max_tokens, {max_tokens}.",
                param="min_tokens",
            )
        constraints = self._constraints()
        for kind, (name, value) in constraints.items():
            if kind == "json" and isinstance(value, dict):
                _check_schema(value, name)
            elif kind == "choice" and not value:
                raise RequestError(f"Invalid value for '{name}': there is no choice.", param=name)
        return Sampling(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            logit_bias=self.logit_bias,
            structured={kind: value for kind, (_, value) in constraints.items()} or None,
            priority=self.priority,
        )


def _refuse_second(found: dict[str, tuple[str, Any]], name: str) -> None:
    """Raise RequestError if another kind of structured output is asked for already."""
    for other, _ in found.values():
        raise RequestError(f"'{name}' cannot be given together with '{other}'.", param=name)


def _check_schema(schema: dict[str, Any], name: str) -> None:
    found = json_schema.find_error(schema, name)
    if found is not None:
        where, reason = found
        raise RequestError(f"Invalid schema for '{name}': {where}: {reason}.", param=name)


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: field_types.Content | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class JsonSchemaFormat(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionDefinition(_Strict):
    name: field_types.NonEmpty
    parameters: dict[str, Any] | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ChatCompletionRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = []
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    # accepted without effect
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def to_request(self) -> ChatRequest:
        """Return the message for a Processor. Raises RequestError for combinations that make no sense."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("The 'top_logprobs' parameter needs 'logprobs' to be true.", param="top_logprobs")
        self._check_tools()
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return ChatRequest(
            model=self.model,
            messages=[message.model_dump(exclude_unset=True) for message in self.messages],
            sampling=self._sampling(limit, (self.top_logprobs or 0) if self.logprobs else None),
            tools=self._offered_tools() or None,
            tool_choice=self.tool_choice,
            stream=self.stream,
            template_arguments=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            routing=self.routing,
        )

    def _offered_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def _constraints(self) -> dict[str, tuple[str, Any]]:
        found = super()._constraints()
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return found
        _refuse_second(found, "response_format")
        if wanted.type == "json_object":
            return {"json_object": ("response_format", True)}
        if wanted.json_schema is None:
            name = "response_format.json_schema"
            raise RequestError(f"Missing required parameter: '{name}'.", param=name)
        return {"json": ("response_format.json_schema.schema", wanted.json_schema.schema_)}

    def _check_tools(self) -> None:
        for i, tool in enumerate(self.tools):
            if tool.function.parameters is not None:
                _check_schema(tool.function.parameters, f"tools.{i}.function.parameters")
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools]
        if choice is None or choice in ("none", "auto"):
            return
        if isinstance(choice, str) and choice != "required":
            raise RequestError(
                f"Invalid value for 'tool_choice': {choice!r:.40}. Supported: 'none', 'auto', 'required' or a function.",
                param="tool_choice",
            )
        if not names:
            raise RequestError("'tool_choice' is only allowed when 'tools' are given.", param="tool_choice")
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if name not in names:
                raise RequestError(
                    f"Invalid value for 'tool_choice': no tool is named {name!r:.80}; tools: {', '.join(names)}.",
                    param="tool_choice",
                )


class TextCompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: field_types.Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def to_requests(self) -> list[CompletionRequest]:
        """Return one message for each prompt. Raises RequestError for unsupported fields."""
        if self.suffix:
            raise RequestError("'suffix' is not supported.", param="suffix")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("'best_of' other than 'n' is not supported.", param="best_of")
        if self.echo and self.logprobs is not None:
            raise RequestError("'echo' together with 'logprobs' is not supported.", param="echo")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for this route
        return [
            CompletionRequest(
                model=self.model,
                prompt=prompt,
                sampling=self._sampling(max_tokens, self.logprobs),
                stream=self.stream,
                echo=self.echo,
                routing=self.routing,
            )
            for prompt in self.prompt
        ]
