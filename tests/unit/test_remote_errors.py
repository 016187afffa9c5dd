"""Errors are raised in the other process as the same class, or as the nearest known one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo import codec, errors
from dynamo.errors import DynamoError, RemoteError, RequestError
from dynamo.rpc.remote_errors import Failure, pack, unpack


def cross(error: BaseException, where: str = "") -> Exception:
    """Send an error as over a connection: pack, encode, decode, unpack."""
    return unpack(msgspec.msgpack.decode(codec.encode(pack(error, where)), type=Failure))


OURS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DynamoError)]


@pytest.mark.parametrize("cls", OURS)
@given(st.text(), st.none() | st.text(), st.none() | st.text())
def test_our_tree(cls: type[DynamoError], message: str, hint: str | None, param: str | None) -> None:
    back = cross(cls(message, hint=hint, param=param))
    assert type(back) is cls
    assert (back.message, back.hint, back.param) == (message, hint, param)
    assert back.status == cls.status


class Own(Exception):
    pass


class TwoArguments(Exception):
    def __init__(self, first: int, second: str) -> None:
        super().__init__(first, second)


class Odd(Exception):
    def __init__(self, *, needed: int) -> None:
        super().__init__(f"needed {needed}")


class OddRequest(RequestError):
    def __init__(self, size: int) -> None:
        super().__init__(f"{size} is too much", hint="send less", param="size")


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1),
        KeyError("missing"),
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file", "a/b"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        TimeoutError("late"),
        Own("x", None, 2.5, b"y"),
        TwoArguments(1, "two"),
    ],
)
def test_builtin_and_user_defined_classes(error: Exception) -> None:
    back = cross(error)
    assert type(back) is type(error)
    assert back.args == error.args
    assert str(back) == str(error)


def test_json_error_keeps_its_shape() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    back = cross(caught.value)
    assert isinstance(back, json.JSONDecodeError)
    assert back.pos == caught.value.pos


@pytest.mark.parametrize("argument", [object(), [1], "\ud800", 1 << 80, "x" * 100_000])
def test_arguments_that_cannot_cross_become_text(argument: Any) -> None:
    back = cross(Own(argument))
    assert type(back) is Own
    assert len(back.args) == 1
    assert isinstance(back.args[0], str)


def test_another_constructor_is_a_remote_error() -> None:
    back = cross(Odd(needed=3))
    assert type(back) is RemoteError
    assert str(back) == "Odd: needed 3"


def test_unknown_class_is_a_remote_error() -> None:
    back = unpack(Failure("no.such.module:Boom", "it went wrong", args=["it went wrong"]))
    assert type(back) is RemoteError
    assert str(back) == "Boom: it went wrong"


def test_unknown_class_or_constructor_of_our_tree_keeps_its_status() -> None:
    back = cross(OddRequest(3))
    assert type(back) is RequestError
    assert (back.message, back.hint, back.param) == ("3 is too much", "send less", "size")
    packed = pack(OddRequest(3))
    packed.kind = "no.such.module:Missing"
    assert type(unpack(packed)) is RequestError


@pytest.mark.parametrize(
    "kind", ["builtins:SystemExit", "builtins:KeyboardInterrupt", "builtins:print", "os:system", "", ":", "builtins:"]
)
def test_never_calls_a_class_that_is_no_exception(kind: str) -> None:
    assert type(unpack(Failure(kind, "m", args=["m"]))) is RemoteError


def test_a_broken_str_does_not_hide_the_failure() -> None:
    assert type(cross(Broken("x"))) is Broken


def test_the_note_has_the_first_place() -> None:
    back = cross(ValueError("x"), "Worker generate")
    assert back.__notes__ == ["raised in Worker generate"]
    assert cross(back, "Processor chat").__notes__ == ["raised in Worker generate"]
    assert not hasattr(cross(ValueError("x")), "__notes__")
