"""in=batch of `dynamo run`: many prompts to one server, several at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dynamo.cli.chat import Progress, SamplingOptions
from dynamo.cli.remote_model import RemoteModel
from dynamo.errors import ConfigError, DynamoError, UnavailableError

OUTPUT = "output.jsonl"
CONCURRENT = 32
MODEL_POLL_S = 0.5


def wait_for_model(url: str, progress: Progress) -> RemoteModel:
    """Return the first model of a server, without a limit of time: its worker may be loading."""
    key = os.environ.get("DYN_API_KEYS", "").split(",")[0] or None
    while True:
        try:
            found = RemoteModel(url, None, key)
        except UnavailableError:
            progress.show("waiting for a model")
            time.sleep(MODEL_POLL_S)
        else:
            progress.clear()
            return found


def run_batch(entries: list[dict[str, Any]], url: str, directory: Path) -> int:
    """Answer prompts; write them with their answers to `OUTPUT` in a directory. Return 1 if a prompt failed."""
    model = wait_for_model(url, Progress())
    started = time.monotonic()
    failed = 0
    with (directory / OUTPUT).open("w", encoding="utf-8") as output, ThreadPoolExecutor(CONCURRENT) as threads:
        for entry in threads.map(lambda entry: _answer(model, entry), entries):
            failed += "error" in entry
            output.write(json.dumps(entry, ensure_ascii=False) + "\n")
            output.flush()
    tokens = sum(entry.get("tokens_out", 0) for entry in entries)
    took_s = time.monotonic() - started
    print(f"{len(entries)} prompts in {took_s:.1f} s, {tokens} output tokens: {directory / OUTPUT}", file=sys.stderr)
    return 1 if failed else 0


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, each `{"text": ...}`. Raises ConfigError for an unreadable file, or a line without text."""
    entries = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"in=batch:{file}: {reason}", hint='give a file of lines {"text": "a prompt"}') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ConfigError(f"{file}:{number}: no prompt", hint='write {"text": "a prompt"} on each line')
        entries.append(entry)
    return entries


def _answer(model: RemoteModel, entry: dict[str, Any]) -> dict[str, Any]:
    """Add the answer, its tokens and its time to an entry; or the error."""
    started = time.monotonic()
    parts, prompt_tokens, tokens = [], 0, 0
    try:
        for piece in model.answer([{"role": "user", "content": entry["text"]}], SamplingOptions()):
            parts.append(piece.text)
            prompt_tokens += piece.prompt_tokens
            tokens += piece.tokens
    except DynamoError as error:
        entry["error"] = error.message
    entry |= {"response": "".join(parts), "tokens_in": prompt_tokens, "tokens_out": tokens}
    entry["elapsed_ms"] = round((time.monotonic() - started) * 1e3)
    return entry
