"""Objects to msgpack and back, guided by annotations: msgspec Structs, dataclasses, pydantic models, plain data."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine
from typing import Any, get_args, get_origin

import msgspec

from dynamo.errors import RequestError
from dynamo.wire.stream import Stream

Decode = Callable[[bytes | msgspec.Raw], Any]


def _encode_other(value: Any) -> Any:
    """Objects that msgspec does not know: pydantic models by their own dump, tuples and sets are known already."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"cannot send a {type(value).__name__}: use a msgspec Struct, a dataclass, pydantic, or plain data")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
encode: Callable[[Any], bytes] = _encoder.encode
_decode_any = msgspec.msgpack.Decoder().decode


def _is_pydantic(kind: Any) -> bool:
    return inspect.isclass(kind) and hasattr(kind, "model_validate") and hasattr(kind, "model_fields")


def decoder(kind: Any) -> Decode:
    """A function bytes -> `kind`. Types that msgspec cannot check (Any, unknown classes) come as plain data.

    The function raises RequestError when the data does not fit the type.
    """
    if _is_pydantic(kind):

        def decode_model(data: bytes | msgspec.Raw) -> Any:
            value = _decode_any(data)
            try:
                # text is taken as JSON: callers of the 0.x SDK passed `model.model_dump_json()`
                return kind.model_validate_json(value) if isinstance(value, str) else kind.model_validate(value)
            except ValueError as error:
                raise RequestError(f"invalid {kind.__name__}: {error}") from None

        return decode_model
    if kind in (Any, object, None, inspect.Parameter.empty):
        return _decode_any
    try:
        typed = msgspec.msgpack.Decoder(kind).decode
    except TypeError:
        return _decode_any

    def decode_typed(data: bytes | msgspec.Raw) -> Any:
        try:
            return typed(data)
        except msgspec.ValidationError as error:
            raise RequestError(f"invalid {getattr(kind, '__name__', kind)}: {error}") from None

    return decode_typed


def item_type(returns: Any) -> Any:
    """`AsyncIterator[X]`, `Stream[X]`, `AsyncGenerator[X, None]` -> X; anything else unchanged."""
    origin = get_origin(returns)
    if origin in (AsyncIterator, AsyncGenerator, AsyncIterable, Stream, Coroutine):
        return get_args(returns)[-1 if origin is Coroutine else 0]
    return Any if returns in (AsyncIterator, AsyncGenerator, AsyncIterable, Stream) else returns
