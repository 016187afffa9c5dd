"""Text to tokens and chat messages to prompts, for the Processor.

A model with `tokenizer.json` is read by the tokenizers library alone and its template by Jinja: ready in 0.1 s, where
importing transformers takes 6 s of CPU. Models without one go through transformers.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer

from dynamo.errors import RequestError, StartError

THREAD_ABOVE_CHARS = 4000
"""Tokenizing costs about 1 µs a token; longer texts go to a thread, so that streams do not wait."""


def _raise(message: str) -> None:
    raise RequestError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _template(text: str) -> jinja2.Template:
    """The environment in which Hugging Face templates expect to be rendered."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # assistant spans are marked with {% generation %} in some templates, for training only
    text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return environment.from_string(text)


class Tokenizer:
    """A model's tokenizer and chat template.

    Raises StartError when the directory holds no tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = _read_json(directory / "tokenizer_config.json")
        if (directory / "tokenizer.json").is_file():
            fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
            self._encode: Callable[[str, bool], list[int]] = lambda text, special: list(
                fast.encode(text, add_special_tokens=special).ids
            )
            self._decode: Callable[[list[int]], str] = lambda ids: fast.decode(ids, skip_special_tokens=False)
            self.vocabulary_size = fast.get_vocab_size()
        else:
            self._load_slow(directory)
        self.special_tokens: Mapping[str, str] = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and value is not None and not isinstance(value, bool)
        }
        text = _template_text(directory, config)
        self.template = _template(text) if text else None

    def _load_slow(self, directory: Path) -> None:
        from transformers import AutoTokenizer  # 6 s of CPU, so only for models that need it

        try:
            slow = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise StartError(
                f"{directory} holds no tokenizer: {str(error).splitlines()[0]}", hint="give a complete model directory"
            ) from None
        self._encode = lambda text, special: list(slow.encode(text, add_special_tokens=special))
        self._decode = lambda ids: str(slow.decode(ids))
        self.vocabulary_size = len(slow)

    def decode(self, token_ids: list[int]) -> str:
        return self._decode(token_ids)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) > THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises RequestError when the model has no template or the template objects."""
        if self.template is None:
            raise RequestError("this model has no chat template", hint="use /v1/completions", param="messages")
        try:
            text = self.template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                **self.special_tokens,
                **(arguments or {}),
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", param="messages") from None
        if continue_final_message:
            final = str(messages[-1].get("content") or "")
            cut = text.rfind(final.strip())
            if cut < 0:
                raise RequestError("continue_final_message: the template changes the last message", param="messages")
            text = text[: cut + len(final.strip())]
        return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StartError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _template_text(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def text_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is text: lists of text parts are joined, which most templates expect.

    Raises RequestError for images and other parts that no engine here takes.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts: list[str] = []
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "refusal"):
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    raise RequestError(f"content part of type {kind!r} is not supported here", param="messages")
                texts.append(str(part.get("text", part.get("refusal", ""))))
            message = {**message, "content": "\n".join(texts)}
        plain.append(message)
    return plain
