"""A request becomes token ids with limits checked: what the Processor does before it calls a worker."""

from __future__ import annotations

from dynamo.errors import ContextLengthError, RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest, GenerateRequest, Sampling
from dynamo.llm.tokenizer import Tokenizer, text_parts
from dynamo.log import request_id


class Preprocessor:
    """One model's. `context_length` counts prompt and output tokens together."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    async def chat(self, request: ChatRequest) -> GenerateRequest:
        """Raises RequestError for messages that the template refuses, ContextLengthError for too many tokens."""
        prompt = self.tokenizer.render(
            text_parts(request.messages),
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            arguments=request.template_arguments,
        )
        # the template has written the special tokens already
        tokens = await self.tokenizer.encode(prompt, add_special_tokens=False)
        return self._limit(tokens, request.sampling, request.stream)

    async def completion(self, request: CompletionRequest) -> GenerateRequest:
        """Raises RequestError for an empty prompt or foreign token ids, ContextLengthError for too many tokens."""
        if isinstance(request.prompt, str):
            return self._limit(await self.tokenizer.encode(request.prompt), request.sampling, request.stream)
        for token in request.prompt:
            if not 0 <= token < self.tokenizer.vocabulary_size:
                raise RequestError(f"prompt: the model has no token {token}", param="prompt")
        return self._limit(request.prompt, request.sampling, request.stream)

    def _limit(self, tokens: list[int], sampling: Sampling, stream: bool) -> GenerateRequest:
        if not tokens:
            raise RequestError("the prompt is empty", param="prompt")
        room = self.context_length - len(tokens)
        wanted = sampling.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = f" and {wanted} for the completion" if wanted is not None else ""
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, you requested "
                f"{len(tokens)} tokens in the prompt{asked}.",
                hint="shorten the prompt or lower max_tokens",
                param="messages",
            )
        if wanted is None:
            sampling.max_tokens = room
        return GenerateRequest(tokens, sampling, request_id.get(), final_only=not stream)
