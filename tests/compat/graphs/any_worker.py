"""A worker with an engine of its own, as scripts of 0.3 were written: any_worker.py dyn://ns.backend.generate."""

import argparse
import asyncio
import json
import sys

import uvloop

from dynamo.llm import ModelType, register_llm
from dynamo.runtime import DistributedRuntime, dynamo_worker

WORDS = ["Any", " engine", " will", " do", "."]


class RequestHandler:
    def __init__(self, args, tokenizer):
        self.args = args
        self.tokenizer = tokenizer

    def note(self, event, **more):
        print(json.dumps({"event": event, **more}), flush=True)

    async def chat(self, request):
        self.note("request", request=request)
        last = request["messages"][-1]["content"]
        try:
            if last == "raise":
                raise ValueError("the engine is out of ideas")
            for i, word in enumerate(WORDS if last != "long" else WORDS * 200):
                delta = {"role": "assistant", "content": word}
                if last == "nonsense":
                    yield 5
                yield {
                    "id": "worker-1",
                    "object": "chat.completion.chunk",
                    "created": 1,
                    "model": "whatever",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
                }
                if last == "fail" and i == 1:
                    raise ValueError("the engine broke")
                if last == "exit" and i == 1:
                    await asyncio.sleep(0.2)
                    sys.exit(9)
                await asyncio.sleep(0.02 if last == "long" else 0)
            tool = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"a":'}}
            more = {"index": 0, "function": {"arguments": "1}"}}
            for call in (tool, more) if "tools" in request else ():
                yield {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}
            yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            if request.get("stream_options", {}).get("include_usage"):
                yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}
        except asyncio.CancelledError:
            self.note("cancelled")
            raise

    async def completion(self, request):
        for text in [request["prompt"], *WORDS]:
            yield {"choices": [{"index": 0, "text": text, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}

    async def generate(self, request):
        """Yield the tokens of a fixed text, as engines of 0.3 do: without the token that ends it."""
        self.note("request", request=request)
        limit = request["stop_conditions"]["max_tokens"]
        tokens = self.tokenizer.encode(self.args.text, add_special_tokens=False).ids
        for token in tokens[:limit] if not self.args.endless else tokens * 1000:
            yield {"token_ids": [token]}
            await asyncio.sleep(self.args.pause)
        yield {"token_ids": [], "finish_reason": "stop" if limit > len(tokens) else "length"}


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime):
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--type", default="chat")
    parser.add_argument("--model", default="dynamo-tiny")
    parser.add_argument("--name")
    parser.add_argument("--text", default="Grüße, 世界! stop here please")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--endless", action="store_true")
    args = parser.parse_args()
    namespace, component_name, endpoint_name = args.endpoint.replace("dyn://", "", 1).split(".")
    tokenizer = None
    if args.type == "backend":
        from tokenizers import Tokenizer

        from dynamo.llm.model_files import tokenizer_dir

        tokenizer = Tokenizer.from_file(str(tokenizer_dir(args.model) / "tokenizer.json"))
    component = runtime.namespace(namespace).component(component_name)
    await component.create_service()
    endpoint = component.endpoint(endpoint_name)
    handler = RequestHandler(args, tokenizer)
    kinds = {
        "chat": (ModelType.Chat, handler.chat),
        "completion": (ModelType.Completion, handler.completion),
        "backend": (ModelType.Backend, handler.generate),
        "unregistered": (None, handler.chat),
    }
    kind, generate = kinds[args.type]
    if kind is not None:
        await register_llm(kind, endpoint, args.model, args.name, kv_cache_block_size=16)
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
