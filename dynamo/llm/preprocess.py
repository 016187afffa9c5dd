"""Preprocessor: a request becomes token ids within the model's limits, before the Processor calls a worker."""

from __future__ import annotations

import msgspec

from dynamo.context import request_id
from dynamo.errors import ContextLengthError, RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, GenerateRequest, Sampling
from dynamo.llm.tokenizer import Tokenizer
from dynamo.streams import Stream


class Preprocessor:
    """Preprocessor of one model. `context_length` counts prompt and output tokens together."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    async def chat(self, request: ChatRequest) -> GenerateRequest:
        """Tokenize messages.

        Raises RequestError for messages that the template rejects, ContextLengthError for too many tokens.
        """
        prompt = self.tokenizer.template.render(
            request.messages,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            arguments=request.template_arguments,
        )
        # the template has written the special tokens already
        tokens = await self.tokenizer.encode(prompt, add_special_tokens=False)
        return self._limit(tokens, request.sampling, request.stream, "messages")

    async def completion(self, request: CompletionRequest) -> GenerateRequest:
        """Tokenize a prompt, or check its token ids.

        Raises RequestError for an empty prompt or unknown token ids, ContextLengthError for too many tokens.
        """
        if isinstance(request.prompt, str):
            tokens = await self.tokenizer.encode(request.prompt)
        else:
            tokens = request.prompt
            for token in (min(tokens), max(tokens)) if tokens else ():
                if not 0 <= token < self.tokenizer.vocabulary_size:
                    raise RequestError(f"the model has no token {token}", param="prompt")
        return self._limit(tokens, request.sampling, request.stream, "prompt")

    def echo(self, request: CompletionRequest, stream: Stream[Delta]) -> Stream[Delta]:
        """Return the stream with the prompt's text in front of each choice's first delta."""
        started: set[int] = set()

        def add_prompt(delta: Delta) -> Delta:
            if delta.index in started:
                return delta
            started.add(delta.index)
            return msgspec.structs.replace(delta, text=self._prompt_text(request) + delta.text)

        return stream.map(add_prompt)

    def _prompt_text(self, request: CompletionRequest) -> str:
        return request.prompt if isinstance(request.prompt, str) else self.tokenizer.decode(request.prompt)

    def _limit(self, tokens: list[int], sampling: Sampling, stream: bool, param: str) -> GenerateRequest:
        if not tokens:
            raise RequestError("the prompt is empty", param=param)
        room = self.context_length - len(tokens)
        max_tokens = sampling.max_tokens
        if room < 1 or (max_tokens is not None and max_tokens > room):
            requested = len(tokens) + (max_tokens or 0)
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, you requested {requested} "
                f"tokens ({len(tokens)} in the {param}, {max_tokens or 0} in the completion).",
                hint="shorten the prompt or lower max_tokens",
                param=param,
            )
        if max_tokens is None:
            sampling.max_tokens = room
        return GenerateRequest(tokens, sampling, request_id.get(), final_only=not stream)
