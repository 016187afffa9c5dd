"""`--Service.key=value` in all its spellings."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.config.merge import merge, walk
from dynamo.config.overrides import OverrideError, override, parse_value, split


def values(*arguments: str) -> dict:
    layers, rest = split(arguments)
    assert rest == []
    result: dict = {}
    for layer in layers:
        result = merge(result, layer.values)
    return result


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
PARTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_/-]{0,6}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=5,
)


@given(NAMES, st.lists(PARTS, min_size=1, max_size=4), JSON)
def test_the_three_spellings_agree_and_carry_any_json(service, path, value):
    if path[:2] == ["ServiceArgs", "envs"]:
        return
    flag, text = "--" + ".".join([service, *path]), json.dumps(value)
    expected = value
    for key in reversed([service, *path]):
        expected = {key: expected}
    assert values(f"{flag}={text}") == values(flag, "=", text) == values(flag, text) == expected


@given(st.text())
def test_every_text_has_a_value_that_json_can_carry(text):
    assert json.loads(json.dumps(parse_value(text), allow_nan=False)) == parse_value(text)


@given(st.lists(st.text(alphabet="-.=Sk1 x", max_size=6)))
def test_no_command_line_hangs_or_crashes(arguments):
    try:
        layers, rest = split(arguments)
    except OverrideError:
        return
    assert len(layers) + len(rest) <= len(arguments)
    assert [argument for argument in arguments if argument in rest] or not rest


@given(st.lists(st.tuples(st.sampled_from(["S.a", "S.b", "T.a.b"]), st.integers()), max_size=6))
def test_the_last_one_wins(pairs):
    result = dict(walk(values(*(f"--{path}={value}" for path, value in pairs))))
    for path, value in dict(pairs).items():
        assert result[tuple(path.split("."))] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1.50", 1.5),
        ("true", True),
        ("True", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('{"a": 1}', {"a": 1}),
        ('"x"', "x"),
        ('"1"', "1"),
        ("007", 7),
        ("off", "off"),
        ("", ""),
        ("a=b", "a=b"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("[a, b]", "[a, b]"),
        ("{", "{"),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values(text, value):
    assert values(f"--S.k={text}") == {"S": {"k": value}}


@pytest.mark.parametrize("text", ["-1", "-.5", "-1e3"])
def test_negative_numbers_in_all_spellings(text):
    expected = {"S": {"k": float(text)}}
    assert values(f"--S.k={text}") == values("--S.k", text) == values("--S.k", "=", text) == expected


def test_environment_variables_stay_strings():
    assert values("--S.ServiceArgs.envs.A=0", "--S.ServiceArgs.envs.B", "true", "--S.ServiceArgs.workers=2") == {
        "S": {"ServiceArgs": {"envs": {"A": "0", "B": "true"}, "workers": 2}}
    }


def test_overrides_of_one_section_merge():
    assert values("--S.a.b=1", "--S.a.c=2", '--S.a={"d": 3}') == {"S": {"a": {"b": 1, "c": 2, "d": 3}}}


def test_other_arguments_are_left_in_order():
    layers, rest = split(["graph:X", "-f", "c.yaml", "--S.k", "1", "--dry-run", "--Bogus", "--S.=1", "--.k=1", "x"])
    assert [layer.values for layer in layers] == [{"S": {"k": 1}}]
    assert rest == ["graph:X", "-f", "c.yaml", "--dry-run", "--Bogus", "--S.=1", "--.k=1", "x"]


def test_the_source_is_the_flag():
    layer = override("S.a", '{"b": {"c": 1}}')
    assert {origin.source for origin in layer.origins.values()} == {"--S.a"}
    assert set(layer.origins) == {("S",), ("S", "a"), ("S", "a", "b"), ("S", "a", "b", "c")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--S.k"],
        ["--S.k", "="],
        ["--S.k", "--T.j=1"],
        ["--S.k", "=", "--T.j=1"],
        ["--S.k", "-f", "c.yaml"],
        ["--S.k", "--dry-run"],
        ["--T.j=1", "--S.k"],
    ],
)
def test_a_missing_value_is_an_error_with_a_hint(arguments):
    with pytest.raises(OverrideError) as caught:
        split(arguments)
    assert caught.value.message == "--S.k: a value is missing"
    assert caught.value.hint == "write --S.k=VALUE (a flag is --S.k=true or =false)"
    assert caught.value.exit_code == 2
