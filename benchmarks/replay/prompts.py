"""Prompts from a trace's hash ids: the same ids always give the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import orjson
from tokenizers import Tokenizer

from benchmarks.replay.trace import Request

KEPT_BLOCKS = 8192  # texts of blocks, about 2.5 KB each with 512 tokens


def vocabulary(tokenizer_dir: Path) -> list[int]:
    """Return all token ids of a model except its special ones."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    specials = set(tokenizer.get_added_tokens_decoder())
    return [token for token in range(tokenizer.get_vocab_size()) if token not in specials]


class Prompts:
    """Token ids of blocks of `block` tokens. Another `seed` gives other tokens with the same sharing."""

    def __init__(self, tokens: Sequence[int], block: int, seed: int = 0) -> None:
        self.block = block
        self._tokens = tokens
        self._seed = seed
        self._text = lru_cache(KEPT_BLOCKS)(self._write)

    def block_tokens(self, hash_id: int, length: int) -> list[int]:
        """Return the first `length` tokens of a block."""
        return random.Random(f"{self._seed} {hash_id}").choices(self._tokens, k=length)

    def tokens(self, request: Request) -> list[int]:
        found: list[int] = []
        for hash_id in request.hash_ids:
            found += self.block_tokens(hash_id, min(self.block, request.input_length - len(found)))
        return found

    def body(self, request: Request, model: str) -> bytes:
        """Return a completion request for exactly the trace's token counts: OpenAI's fields and vLLM's `ignore_eos`."""
        left, texts = request.input_length, []
        for hash_id in request.hash_ids:
            texts.append(self._text(hash_id, min(self.block, left)))
            left -= self.block
        rest = {
            "model": model,
            "max_tokens": request.output_length,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return b'{"prompt":[%b],%b' % (b",".join(texts), orjson.dumps(rest)[1:])

    def _write(self, hash_id: int, length: int) -> bytes:
        return orjson.dumps(self.block_tokens(hash_id, length))[1:-1]
