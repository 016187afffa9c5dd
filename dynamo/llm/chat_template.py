"""Chat templates: render messages to a prompt exactly as transformers' `apply_chat_template` does.

Importing transformers takes 6 s of CPU, so its Jinja environment is rebuilt here; the tests compare the two.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dynamo.errors import RequestError, StartError

DEFAULT = "default"
TOOL_USE = "tool_use"
_CONTINUATION_MARK = "DYNAMO_CONTINUATION_MARK "


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body).set_lineno(line)]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize without escaping HTML, as Jinja's own filter would: models are not trained on that."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


_environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_environment.filters["tojson"] = _to_json
_environment.globals["raise_exception"] = _raise
_environment.globals["strftime_now"] = _strftime_now


class ChatTemplate:
    """A model's templates by name. The template "tool_use", if there is one, is used for requests with tools.

    `special_tokens` are variables of the template, such as `bos_token`. Raises StartError for a template with a syntax
    error.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        self._special_tokens = special_tokens
        self._templates: dict[str, tuple[jinja2.Template, str]] = {}
        for name, text in templates.items():
            try:
                self._templates[name] = _environment.from_string(text), text
            except jinja2.TemplateSyntaxError as error:
                raise StartError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt, special tokens included.

        With `continue_final_message` it ends with the text of the last message, for the model to continue. Raises
        RequestError for messages that the template rejects.
        """
        name = TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT
        chosen = self._templates.get(name) or next(iter(self._templates.values()), None)
        if chosen is None:
            raise RequestError("this model has no chat template", hint="use /v1/completions", param="messages")
        template, text = chosen
        prepared = _template_messages(messages, knows_developer="developer" in text)
        if continue_final_message:
            content = prepared[-1].get("content")
            if not isinstance(content, str):
                raise RequestError("continue_final_message: the last message has no text", param="messages")
            prepared[-1]["content"] = content + _CONTINUATION_MARK
        variables = {
            **self._special_tokens,
            "documents": None,
            **(arguments or {}),
            "messages": prepared,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            prompt = template.render(variables)
        except Exception as error:  # a template is a program, and may fail in any way on these messages
            raise RequestError(f"the model's chat template rejects these messages: {error}", param="messages") from None
        return _cut_at_mark(prompt) if continue_final_message else prompt


def _cut_at_mark(prompt: str) -> str:
    """Return the prompt up to the mark of `continue_final_message`.

    If the space at the mark's end is missing, the template trims messages: then the text's end is trimmed too.
    """
    at = prompt.rfind(_CONTINUATION_MARK.strip())
    if at < 0:
        raise RequestError("continue_final_message: the template changes the last message", param="messages")
    kept = prompt[:at]
    return kept if prompt.startswith(_CONTINUATION_MARK, at) else kept.rstrip()


def _template_messages(messages: Sequence[Mapping[str, Any]], *, knows_developer: bool) -> list[dict[str, Any]]:
    """Convert OpenAI's messages to those that templates expect: text instead of parts, tool arguments as objects.

    Raises RequestError for images and other parts that the engines do not support.
    """
    return [_template_message(i, message, knows_developer) for i, message in enumerate(messages)]


def _template_message(i: int, message: Mapping[str, Any], knows_developer: bool) -> dict[str, Any]:
    # clients send back the fields of an earlier response, null ones included
    plain = {name: value for name, value in message.items() if value is not None}
    if plain.get("role") == "developer" and not knows_developer:
        plain["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, f"messages.{i}.content.{j}") for j, part in enumerate(content))
    elif content is None:
        # templates test for none beside tool calls; elsewhere they would print it
        plain["content"] = None if plain.get("tool_calls") else ""
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_with_object(call, f"messages.{i}.tool_calls") for call in plain["tool_calls"]]
    return plain


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise RequestError(f"content part of type {kind!r:.40} is not supported by this model", param=path)
    if not isinstance(text, str):
        raise RequestError(f"Missing required parameter: '{path}.text'.", param=f"{path}.text")
    return text


def _with_object(call: Any, path: str) -> Any:
    """Return a tool call with its arguments as an object: they are text in OpenAI's API, and templates apply `tojson`."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"Invalid value for '{path}': each has a function.", param=path)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise RequestError(f"Invalid value for '{path}': arguments are not JSON.", param=path) from None
    return {**call, "function": {**function, "arguments": copy.copy(arguments)}}


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a model's templates by name.

    Those of the tokenizer's `config` are overridden by `chat_template.jinja` and by `additional_chat_templates/*.jinja`.
    """
    found: dict[str, str] = {}
    given = config.get("chat_template")
    if isinstance(given, str):
        found[DEFAULT] = given
    elif isinstance(given, list):
        found = {entry["name"]: entry["template"] for entry in given}
    file = directory / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = file.read_text("utf-8")
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = extra.read_text("utf-8")
    return found
