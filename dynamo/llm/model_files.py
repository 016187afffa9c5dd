"""From a model's name to its files: a directory, the model that ships with the project, or a Hugging Face id."""

from __future__ import annotations

import os
from pathlib import Path

from dynamo.errors import StartError
from dynamo.llm import tiny


def resolve(name: str) -> str:
    """The directory of a local model (as text), or the hub id itself when it is to be found or fetched from there."""
    if name == tiny.NAME:
        return str(tiny.MODEL_DIR)
    return name


def tokenizer_dir(name: str) -> Path:
    """The directory that holds the tokenizer of a model; files come from the hub or its cache if need be.

    Raises StartError when there is no such model, or no network to fetch it.
    """
    if not name:
        raise StartError("no model is configured", hint="set `model:` in the configuration, for example dynamo-tiny")
    path = Path(resolve(name)).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")):
        raise StartError(f"model directory {name} does not exist", hint="check `model:` in the configuration")
    from huggingface_hub import snapshot_download  # 0.3 s to import, and a local model needs none of it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or isinstance(error, LocalEntryNotFoundError)
        reason = "it is not in the local cache and the hub cannot be reached" if offline else str(error).split("\n")[0]
        raise StartError(
            f"model {name!r} cannot be loaded: {reason}",
            hint="use a local directory, set HF_TOKEN for a gated model, or try model: dynamo-tiny",
        ) from None
