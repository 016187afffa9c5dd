"""The files of a model by its name: a directory, the model that ships with the project, or a Hugging Face id."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dynamo.errors import StartError
from dynamo.llm import tiny

DEFAULT_CONTEXT_TOKENS = 4096


def resolve(name: str) -> str:
    """Return the directory of dynamo-tiny for its name; other names, directories and hub ids, are returned unchanged."""
    if name == tiny.NAME:
        return str(tiny.MODEL_DIR)
    return name


def tokenizer_dir(name: str, *, with_code: bool = False) -> Path:
    """Return the directory that holds a model's tokenizer, downloaded from the hub if it is not in its cache.

    `with_code`: with the Python files that it may need.
    Raises StartError if there is no such model, or it cannot be downloaded.
    """
    if not name:
        raise StartError("no model is configured", hint="set `model:` in the configuration, for example dynamo-tiny")
    path = Path(resolve(name)).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")):
        raise StartError(f"model directory {name} does not exist", hint="check `model:` in the configuration")
    from huggingface_hub import snapshot_download  # takes 0.3 s to import; not needed for a local model
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", *(("*.py", "*.tiktoken") if with_code else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or isinstance(error, LocalEntryNotFoundError)
        reason = "not in the local cache, and the hub is unreachable" if offline else str(error).split("\n")[0]
        raise StartError(
            f"model {name!r} cannot be loaded: {reason}",
            hint="use a local directory, set HF_TOKEN for a gated model, or try model: dynamo-tiny",
        ) from None


def context_tokens(directory: Path) -> int:
    """Return the context length of a model, as its config.json has it. Raises OSError without the file."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    return int(config.get("max_position_embeddings", DEFAULT_CONTEXT_TOKENS))
