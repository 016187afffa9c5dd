"""A model's tokenizer, for the Processor.

A `tokenizer.json` is loaded with the tokenizers library alone, in 0.1 s; importing transformers takes 6 s of CPU. Models
without that file are loaded with transformers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dynamo.errors import StartError
from dynamo.llm.chat_template import ChatTemplate, read_templates

THREAD_ABOVE_CHARS = 4000
"""Longer texts are tokenized in a thread, so that they do not delay the streams. Tokenizing takes about 1 µs a token."""


class Tokenizer:
    """A model's tokenizer and chat template. Raises StartError if the directory contains no tokenizer."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        """`trust_remote_code`: run Python code in the directory, if its tokenizer needs it."""
        self.directory = directory
        config = _read_json(directory / "tokenizer_config.json")
        self._encode: Callable[[str, bool], list[int]]
        self._decode: Callable[[list[int], bool], str]
        if (directory / "tokenizer.json").is_file():
            self._load_fast(directory / "tokenizer.json")
        else:
            self._load_slow(directory, trust_remote_code)
        tokens = {**_read_json(directory / "special_tokens_map.json"), **config}
        self.template = ChatTemplate(read_templates(directory, config), _special_tokens(tokens))

    def _load_fast(self, file: Path) -> None:
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise StartError(f"{file} is not a tokenizer: {str(error).splitlines()[0]}") from None
        fast.no_truncation()
        fast.no_padding()  # the file may enable both, for training
        self._encode = lambda text, special: list(fast.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        self._decode = lambda ids, skip: fast.decode(ids, skip_special_tokens=skip)
        self.vocabulary_size = fast.get_vocab_size()

    def _load_slow(self, directory: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # takes 6 s of CPU, so only for models that need it

        try:
            slow = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise StartError(
                f"{directory} contains no tokenizer: {str(error).splitlines()[0]}",
                hint="use a complete model directory",
            ) from None
        self._encode = lambda text, special: list(slow.encode(text, add_special_tokens=special))
        self._decode = lambda ids, skip: str(slow.decode(ids, skip_special_tokens=skip))
        self.vocabulary_size = len(slow)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of the tokens."""
        return self._decode(token_ids, skip_special_tokens)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text; special tokens are those that the model puts around it."""
        if len(text) > THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StartError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return `bos_token` and the other special tokens as text, also those under `extra_special_tokens`."""
    extra = config.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **config}
    found: dict[str, str] = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
