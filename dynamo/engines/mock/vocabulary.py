"""The tokens that the mock engine generates: those of the model's tokenizer that are plain text."""

from __future__ import annotations

import os
from array import array
from functools import cache
from typing import NamedTuple

from dynamo.errors import StartError
from dynamo.llm.model_files import tokenizer_dir


class Token(NamedTuple):
    """One token of the vocabulary."""

    id: int
    text: str
    packed: bytes
    """as the hash over a sequence's tokens consumes it"""


def pack_tokens(token_ids: list[int]) -> bytes:
    """Pack token ids for the hash, 8 bytes each. Raises OverflowError for negative ids and for more than 64 bits."""
    return array("Q", token_ids).tobytes()


def load_vocabulary(model: str) -> list[Token]:
    """Return the model's tokens that are printable ASCII; the engines of one process share the list.

    Raises StartError if the model has no tokenizer or none of its tokens is plain text.
    """
    return _load_vocabulary(os.fspath(tokenizer_dir(model) / "tokenizer.json"))


@cache
def _load_vocabulary(path: str) -> list[Token]:
    from tokenizers import Tokenizer  # imported here: commands that only list the settings do not need it

    tokenizer = Tokenizer.from_file(path)
    specials = set(tokenizer.get_added_tokens_decoder())
    found: list[Token] = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token]) if token not in specials else ""
        if text.isprintable() and text.isascii() and text.strip():
            found.append(Token(token, text, pack_tokens([token])))
    if not found:
        raise StartError(f"{path}: none of its tokens is plain text")
    return found
