"""An engine that returns the prompt's tokens, chat template included: it shows what a model would get."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from dynamo.errors import ConfigError, EngineError
from dynamo.llm.continuation import IncrementalDetokenizer
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.model_files import context_tokens, tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.llm.tokenizer import Tokenizer
from dynamo.streams import Stream

DELAY = "DYN_TOKEN_ECHO_DELAY_MS"
BLOCK_TOKENS = 16


def delay_s() -> float:
    """Return the time between two tokens, 10 ms unless `DYN_TOKEN_ECHO_DELAY_MS` is set. Raises ConfigError."""
    given = os.environ.get(DELAY) or "10"
    try:
        return int(given) / 1e3
    except ValueError:
        raise ConfigError(f"{DELAY}={given}: not a number", hint="give milliseconds") from None


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> EchoEngine:
    return EchoEngine(model, arguments.get("max-model-len"))


class EchoEngine:
    """Methods: see `dynamo.llm.engine.Engine`."""

    def __init__(self, model: str, context_length: int | None) -> None:
        self._model = model
        self._context_length = context_length
        self._delay_s = delay_s()

    async def start(self) -> EngineInfo:
        directory = tokenizer_dir(self._model)
        self._decode = Tokenizer(directory).decode
        return EngineInfo(self._context_length or context_tokens(directory), BLOCK_TOKENS, kv_blocks=0)

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        return Stream.from_iterator(self._echo(request))

    async def _echo(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        text = IncrementalDetokenizer(self._decode, (), ())
        prompt_tokens: int | None = len(request.token_ids)
        limit = request.sampling.max_tokens
        for count, token in enumerate(request.token_ids, 1):
            await asyncio.sleep(self._delay_s)
            reason = "stop" if count == len(request.token_ids) else "length" if count == limit else None
            new = text.add([token])
            for index in range(request.sampling.n):
                yield Delta(new, [token], index, reason, None, prompt_tokens)  # type: ignore[arg-type]
                prompt_tokens = None
            if reason is not None:
                return

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        raise EngineError("the echo engine has no KV cache")

    async def abort(self, request_id: str) -> None: ...

    def stats(self) -> Sequence[EngineStats]:
        return ()

    def kv_transfers(self) -> KvTransfers | None:
        return None

    def kv_events(self, listener: KvListener) -> bool:
        return False

    async def check_health(self) -> None: ...

    async def stop(self) -> None: ...
