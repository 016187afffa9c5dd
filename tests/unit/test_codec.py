"""What goes out as a typed object comes back as one; what does not fit is the request's fault."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo import codec
from dynamo.errors import RequestError
from dynamo.streams import Reply, Stream

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Colour(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: int
    label: str = ""


class Positional(msgspec.Struct, array_like=True):
    text: str
    ids: list[int]


@dataclasses.dataclass
class Box:
    points: list[Point]
    colour: Colour


class Model(pydantic.BaseModel):
    name: str
    when: datetime.datetime | None = None
    tags: set[str] = set()
    share: float = 0.0


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, ser_json_bytes="base64", val_json_bytes="base64")
    when: datetime.date
    blob: bytes


@dataclasses.dataclass
class Wrapped:
    model: Model
    count: int


class Unknown:
    pass


def round_trip(value: Any, kind: Any) -> Any:
    return codec.decoder(kind)(codec.encode(value))


@given(PLAIN)
def test_plain_data_survives(value: Any) -> None:
    assert round_trip(value, Any) == value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Point(3, "a"), Point),
        (Positional("é", [1, 2]), Positional),
        (Box([Point(1)], Colour.RED), Box),
        (Model(name="n", when=datetime.datetime(2026, 1, 1), tags={"t"}), Model),
        (Model(name="n", share=float("inf")), Model),
        (Strict(when=datetime.date(2026, 1, 1), blob=b"\xff\x00"), Strict),
        (Model(name="n"), Model | None),
        (None, Model | None),
        ([Point(1)], list[Point]),
        ({"a": Model(name="n")}, dict[str, Model]),
        (Wrapped(Model(name="n"), 2), Wrapped),
        (None, type(None)),
    ],
)
def test_typed_objects_come_back(value: Any, kind: Any) -> None:
    assert round_trip(value, kind) == value


def test_pydantic_takes_json_text() -> None:
    model = Model(name="n", tags={"a"})
    assert round_trip(model.model_dump_json(), Model) == model


def test_decodes_from_raw() -> None:
    assert codec.decoder(Point)(msgspec.Raw(codec.encode(Point(1)))) == Point(1)


@pytest.mark.parametrize("kind", [Any, object, None, inspect.Parameter.empty, Unknown, "text", Model | Point])
def test_types_that_cannot_be_checked_give_plain_data(kind: Any) -> None:
    assert round_trip({"a": [1]}, kind) == {"a": [1]}


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (codec.encode({"x": "no"}), Point, r"invalid Point: .*int.*\$\.x"),
        (codec.encode({"when": 5}), Model, "invalid Model: .*name: Field required"),
        (codec.encode("{"), Model, "invalid Model: "),
        (codec.encode([{"name": 1}]), list[Model], "name: Input should be a valid string"),
        (codec.encode({"a": {}}), dict[str, Unknown], "cannot receive a Unknown"),
        (b"\xc1", Any, "invalid data"),
        (b"\xa2\xff\xff", str, "invalid str"),
        (b"", Point, "invalid Point"),
        (b"\x91" * 100_000, Any, "invalid data"),
    ],
)
def test_what_does_not_fit_is_a_request_error(data: bytes, kind: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        codec.decoder(kind)(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("value", [Unknown(), {"a": Unknown()}, [object()], {1, Unknown}])
def test_refuses_to_send_other_objects(value: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot send a \w+: use a msgspec Struct"):
        codec.encode(value)


@pytest.mark.parametrize(
    ("returns", "item"),
    [
        (AsyncIterator[int], int),
        (AsyncGenerator[str, None], str),
        (Stream[Point], Point),
        (Reply[Point], Point),
        (Coroutine[Any, Any, bytes], bytes),
        (AsyncIterator, Any),
        (Stream, Any),
        (int, int),
        (list[int], list[int]),
    ],
)
def test_item_type(returns: Any, item: Any) -> None:
    assert codec.item_type(returns) == item
