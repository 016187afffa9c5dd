"""A request becomes token ids with limits checked: what the Processor does before it calls a worker."""

from __future__ import annotations

from dynamo.context import request_id
from dynamo.errors import ContextLengthError, RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, GenerateRequest, Sampling
from dynamo.llm.tokenizer import Tokenizer


class Preprocessor:
    """One model's. `context_length` counts prompt and output tokens together."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    async def chat(self, request: ChatRequest) -> GenerateRequest:
        """Raises RequestError for messages that the template refuses, ContextLengthError for too many tokens."""
        prompt = self.tokenizer.template.render(
            request.messages,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            arguments=request.template_arguments,
        )
        # the template has written the special tokens already
        tokens = await self.tokenizer.encode(prompt, add_special_tokens=False)
        return self._limited(tokens, request.sampling, request.stream, "messages")

    async def completion(self, request: CompletionRequest) -> GenerateRequest:
        """Raises RequestError for an empty prompt or foreign token ids, ContextLengthError for too many tokens."""
        prompt = request.prompt
        tokens = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if tokens is prompt and tokens:
            foreign = next((t for t in (min(tokens), max(tokens)) if not 0 <= t < self.tokenizer.vocabulary_size), None)
            if foreign is not None:
                raise RequestError(f"the model has no token {foreign}", param="prompt")
        return self._limited(tokens, request.sampling, request.stream, "prompt")

    def prompt_text(self, request: CompletionRequest) -> str:
        """What `echo` puts in front of the completion."""
        return request.prompt if isinstance(request.prompt, str) else self.tokenizer.decode(request.prompt)

    def _limited(self, tokens: list[int], sampling: Sampling, stream: bool, param: str) -> GenerateRequest:
        if not tokens:
            raise RequestError("the prompt is empty", param=param)
        room = self.context_length - len(tokens)
        wanted = sampling.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = len(tokens) + (wanted or 0)
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, you requested {asked} "
                f"tokens ({len(tokens)} in the {param}, {wanted or 0} in the completion).",
                hint="shorten the prompt or lower max_tokens",
                param=param,
            )
        if wanted is None:
            sampling.max_tokens = room
        return GenerateRequest(tokens, sampling, request_id.get(), final_only=not stream)
