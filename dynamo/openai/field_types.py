"""Types of request fields that take more than one form, with their validators. Errors are ValueErrors in our own words."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator, StringConstraints

from dynamo.openai.validation import type_in_words

MAX_STOP_STRINGS = 4
MAX_PROMPTS = 1024


def _stop_strings(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a string or an array of strings")
    if len(texts) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} strings, but got {len(texts)}")
    if not all(texts):
        raise ValueError("a stop string cannot be empty")
    return texts


def _prompts(value: Any) -> list[str | list[int]]:
    """Return a list of prompts, each as text or as token ids, from one prompt or several."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"expected a string or an array, but got {type_in_words(value)}")
    if not value:
        raise ValueError("there is no prompt")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"expected at most {MAX_PROMPTS} prompts, but got {len(value)}")
    for prompt in value:
        tokens = isinstance(prompt, list) and set(map(type, prompt)) <= {int}
        if not tokens and not isinstance(prompt, str):
            raise ValueError("expected a string, an array of strings, of token ids, or of arrays of token ids")
    return value


def _logit_bias(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, but got {type_in_words(value)}")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal()):
            raise ValueError(f"{token!r:.40} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {token} is not a number from -100 to 100")
    return value


def _content(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"expected a string or an array of content parts, but got {type_in_words(value)}")
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("each content part is an object with a type")
    return value


def _instance_id(value: Any) -> Any:
    """Read an instance id, hexadecimal as `dynamo status` shows it."""
    try:
        return int(value, 16) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{value!r:.40} is not an instance id") from None


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
StopStrings = Annotated[list[str], PlainValidator(_stop_strings, json_schema_input_type=str | list[str])]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
LogitBias = Annotated[dict[str, float] | None, BeforeValidator(_logit_bias)]
Content = Annotated[str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=Any)]
InstanceId = Annotated[int | None, BeforeValidator(_instance_id)]
