"""OpenAI's requests as pydantic models, checked at the HTTP edge, and their translation into our own messages.

Ranges and error wording follow OpenAI's API reference; the extra sampling fields are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dynamo.errors import RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Sampling

MAX_STOP_STRINGS = 4
MAX_CHOICES = 128


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class _SamplingFields(BaseModel):
    """What chat and text completions share. Unknown fields are kept and reported, not refused, as vLLM does."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _structured(self) -> dict[str, Any] | None:
        given = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        found = {kind: value for kind, value in given.items() if value is not None}
        if len(found) > 1:
            raise RequestError(f"give one of {', '.join('guided_' + kind for kind in found)}", param="guided_json")
        return found or None

    def _sampling(self, *, max_tokens: int | None, logprobs: int | None, structured: dict[str, Any] | None) -> Sampling:
        for token in self.logit_bias or ():
            if not token.lstrip("-").isdigit():
                raise RequestError(f"logit_bias: {token!r} is not a token id", param="logit_bias")
        return Sampling(
            n=self.n or 1,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop or [],
            stop_token_ids=self.stop_token_ids or [],
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            logit_bias=self.logit_bias,
            structured=structured,
            priority=self.priority,
        )


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(_SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def to_request(self) -> ChatRequest:
        """Raises RequestError for combinations that make no sense."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        structured = self._structured()
        if self.response_format is not None and self.response_format.type == "json_object":
            structured = {"json_object": True}
        elif self.response_format is not None and self.response_format.type == "json_schema":
            if self.response_format.json_schema is None:
                raise RequestError("response_format.json_schema is missing", param="response_format")
            structured = {"json": self.response_format.json_schema.schema_}
        sampling = self._sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            structured=structured,
        )
        return ChatRequest(
            model=self.model,
            messages=[m.model_dump(exclude_unset=True) for m in self.messages],
            sampling=sampling,
            tools=self.tools if self.tool_choice != "none" else None,
            tool_choice=self.tool_choice,
            stream=self.stream,
            template_arguments=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class TextCompletionRequest(_SamplingFields):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def to_requests(self) -> list[CompletionRequest]:
        """One request for each prompt. Raises RequestError for what is not supported."""
        if self.suffix:
            raise RequestError("suffix is not supported", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported", param="best_of")
        prompts: list[Any]
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            prompts = [self.prompt]
        else:
            prompts = list(self.prompt)
        if not prompts:
            raise RequestError("the prompt is empty", param="prompt")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for this route
        return [
            CompletionRequest(
                model=self.model,
                prompt=prompt,
                sampling=self._sampling(max_tokens=max_tokens, logprobs=self.logprobs, structured=self._structured()),
                stream=self.stream,
                echo=self.echo,
            )
            for prompt in prompts
        ]


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """A validated request. Raises RequestError with OpenAI's wording and the path of the field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(
                "We could not parse the JSON body of your request.", hint="the body must be a JSON object"
            ) from None
        path = ".".join(str(p) for p in first["loc"] if not (isinstance(p, str) and ("[" in p or p in ("str", "int"))))
        if first["type"] == "missing":
            raise RequestError(f"Missing required parameter: '{path}'.", param=path) from None
        text = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"Invalid value for '{path}': {text}." if path else text, param=path or None) from None
