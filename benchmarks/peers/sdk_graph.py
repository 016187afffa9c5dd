"""The graph for Dynamo 0.3: the Worker makes up text, the Processor turns it into OpenAI chunks.

It runs in that release's environment; `dynamo` below is Dynamo 0.3, not ours.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from dynamo.sdk import depends, endpoint, service

# as our mock engine's pace: milliseconds of prefill for an empty prompt, and of a decode step
PREFILL_S, STEP_S = (0.0165, 0.00574) if os.environ.get("BENCH_PACED") else (0.0, 0.0)


@service(dynamo={"namespace": "dynamo"})
class Worker:
    @endpoint()
    async def generate(self, request: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(PREFILL_S)
        for number in range(request["tokens"]):
            await asyncio.sleep(STEP_S)
            yield {"word": f"word{number % 100} "}


@service(dynamo={"namespace": "dynamo"})
class Processor:
    worker = depends(Worker)

    @endpoint(name="chat/completions")
    async def chat(self, request: Any) -> AsyncIterator[Any]:
        def chunk(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return {"id": "bench", "object": "chat.completion.chunk", "created": 0, "model": request["model"],
                    "choices": [choice]}  # fmt: skip

        tokens = 0
        async for item in self.worker.generate({"tokens": request["max_tokens"]}):
            tokens += 1
            yield chunk({"role": "assistant", "content": item["word"]}, None)
        usage = {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}
        yield {**chunk({}, "length"), "usage": usage}
