"""Objects to msgpack and back, guided by annotations: msgspec Structs, dataclasses, pydantic models, plain data."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, get_args, get_origin

import msgspec

from dynamo.errors import RequestError
from dynamo.streams import Reply, Stream

Data = bytes | bytearray | msgspec.Raw


class DecodeError(RequestError):
    """Data that does not fit its declared type."""


_OF_ITEMS = (AsyncIterator, AsyncGenerator, AsyncIterable, Awaitable, Coroutine, Stream, Reply)


def _encode_other(value: Any) -> Any:
    """Encode objects that msgspec does not know: pydantic models, by their own dump."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"cannot send a {type(value).__name__}: use a msgspec Struct, a dataclass, pydantic, or plain data")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
encode: Callable[[Any], bytes] = _encoder.encode


def _is_pydantic(kind: Any) -> bool:
    return inspect.isclass(kind) and hasattr(kind, "model_validate_json") and hasattr(kind, "model_fields")


def _decode_other(kind: Any, value: Any) -> Any:
    if not _is_pydantic(kind):
        raise TypeError(f"cannot receive a {kind.__name__}: use a msgspec Struct, a dataclass, pydantic, or plain data")
    # text is taken as JSON: callers of the 0.x SDK passed `model.model_dump_json()`
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return kind.model_validate_json(text)
    except ValueError as error:
        problems: list[dict[str, Any]] = getattr(error, "errors", list)()
        found = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'the whole'}: {p['msg']}" for p in problems)
        raise ValueError(found or str(error)) from None


def _is_checked(kind: Any) -> bool:
    """Return whether data can be decoded to a `kind`: types that msgspec knows, and pydantic models."""
    if kind in (Any, object, None, inspect.Parameter.empty):
        return False
    try:
        known = msgspec.inspect.type_info(kind)
        return not isinstance(known, msgspec.inspect.CustomType) or _is_pydantic(known.cls)
    except TypeError:
        return False


class Decode:
    """A decoder of one type: bytes -> object.

    Raises DecodeError when the data does not fit the type. `columns` decodes a whole DATA frame of such items; it
    raises what msgspec raises.
    """

    __slots__ = ("_decode", "_name", "columns")

    def __init__(self, kind: Any) -> None:
        checked = _is_checked(kind)
        self._name = getattr(kind, "__name__", kind) if checked else "data"
        kind = kind if checked else Any
        self._decode = msgspec.msgpack.Decoder(kind, dec_hook=_decode_other).decode
        self.columns: Callable[[Data], tuple[list[int], list[Any]]] = msgspec.msgpack.Decoder(
            tuple[list[int], list[kind]], dec_hook=_decode_other
        ).decode

    def __call__(self, data: Data) -> Any:
        try:
            return self._decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DecodeError(f"invalid {self._name}: {error}") from None


_decoders: dict[Any, Decode] = {}


def decoder(kind: Any) -> Decode:
    """Return the decoder of a `kind`, cached. Types that msgspec cannot check (Any, unknown classes) decode to plain data."""
    try:
        if kind not in _decoders:
            _decoders[kind] = Decode(kind)
        return _decoders[kind]
    except TypeError:  # not hashable
        return Decode(kind)


def item_type(returns: Any) -> Any:
    """Return X for `AsyncIterator[X]`, `Stream[X]`, `AsyncGenerator[X, None]`, `Reply[X]`; any other type unchanged."""
    origin = get_origin(returns)
    if origin in _OF_ITEMS:
        return get_args(returns)[-1 if origin is Coroutine else 0]
    return Any if returns in _OF_ITEMS else returns
