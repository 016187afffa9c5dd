"""`register_llm` of ai-dynamo 0.2.1 to 0.3: a worker of any engine makes its model known to the OpenAI servers."""

from __future__ import annotations

import asyncio
import enum
import time
from pathlib import Path

from dynamo.llm.model_cards import BACKEND
from dynamo.llm.model_files import context_tokens, tokenizer_dir
from dynamo.llm.protocol import ModelCard, model_key
from dynamo.runtime import Endpoint


class ModelType(enum.IntEnum):
    """What the endpoint of a model takes and yields: OpenAI's requests and chunks, or tokens (Backend)."""

    Chat = 1
    Completion = 2
    Backend = 3
    Embedding = 4


class RouterMode(enum.IntEnum):
    """How a server chooses an instance. Accepted; the server that is asked decides."""

    RoundRobin = 1
    Random = 2
    KV = 3


async def register_llm(
    model_type: ModelType,
    endpoint: Endpoint,
    model_path: str,
    model_name: str | None = None,
    context_length: int | None = None,
    kv_cache_block_size: int | None = None,
    router_mode: RouterMode | None = None,
) -> None:
    """Publish the card of a model, which is removed when this process ends. It is offered once the endpoint is served.

    Args:
        model_type: what the endpoint takes and yields.
        endpoint: the endpoint that answers.
        model_path: directory or Hugging Face id; for Backend, each server that offers the model loads its tokenizer.
        model_name: name for clients; None: the id, or the name of the directory.
        context_length: tokens of prompt and output together; None: as in the model's config.json.
        kv_cache_block_size: tokens in a KV block.
        router_mode: ignored.

    Raises StartError if a Backend model has no tokenizer, and TransportError.
    """
    kind = BACKEND if model_type == ModelType.Backend else ModelType(model_type).name.lower()
    if context_length is None and kind == BACKEND:
        context_length = await asyncio.to_thread(_context_length, model_path)
    path = Path(model_path)
    is_directory = path.is_dir()
    runtime = endpoint.component.runtime
    namespace, component, name = endpoint.address
    card = ModelCard(
        name=model_name or (path.resolve().name if is_directory else model_path),
        source=str(path.resolve()) if is_directory else model_path,
        namespace=namespace,
        component=component,
        context_length=context_length or 0,
        kv_block_size=kv_cache_block_size or 0,
        engine="",
        created=int(time.time()),
        types=[kind],
        endpoint=name,
    )
    await runtime.publish(model_key(card.name, runtime.instance_id, kind), card)


def _context_length(model_path: str) -> int:
    return context_tokens(tokenizer_dir(model_path))
