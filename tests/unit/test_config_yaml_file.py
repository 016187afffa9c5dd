"""YAML files: values, lines, errors."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamo.config import yaml_file
from dynamo.config.yaml_file import load, parse, scalar
from dynamo.errors import ConfigError

SCALARS = {
    "true": True,
    "False": False,
    "on": "on",
    "off": "off",
    "yes": "yes",
    "no": "no",
    "y": "y",
    "null": None,
    "~": None,
    "7": 7,
    "-7": -7,
    "+7": 7,
    "007": 7,
    "0x10": 16,
    "0o17": 15,
    "1_000": "1_000",
    "1.50": 1.5,
    "1e-5": 1e-5,
    "-.5": -0.5,
    "1e999": "1e999",
    ".inf": ".inf",
    ".nan": ".nan",
    "12:30": "12:30",
    "2026-01-31": "2026-01-31",
    "1.2.3": "1.2.3",
    "round-robin": "round-robin",
    "dynamo.Processor.chat/completions": "dynamo.Processor.chat/completions",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_in_files_and_overrides_are_the_same(text, value):
    assert scalar(text) == value
    if text != "1e999":
        assert parse(f"S: {{k: {text}}}", "c.yaml").values == {"S": {"k": value}}
    assert parse(f"S: {{k: '{text}'}}", "c.yaml").values == {"S": {"k": text}}


@given(st.text(max_size=12))
def test_every_scalar_survives_json(text):
    value = scalar(text)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value is None or isinstance(value, bool | int | float) or value == text


KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS.filter(lambda key: key != "ServiceArgs"), VALUES), max_size=3))
def test_json_files_are_read_as_json(values):
    text = json.dumps(values, indent=1, ensure_ascii=False)
    assert parse(text, "c.json").values == json.loads(text)


def test_keys_are_text():
    layer = parse("on: {off: 1, 8000: 2, null: 3, 1.0: 4, yes: 5}", "c.yaml")
    assert layer.values == {"on": {"off": 1, "8000": 2, "null": 3, "1.0": 4, "yes": 5}}


def test_every_key_has_its_line():
    layer = parse("# c\nA:\n  k: 1\n\n  m:\n    n: [1,\n     2]\nB: {x: 1}\n", "d/c.yaml")
    assert {".".join(path): origin.source for path, origin in layer.origins.items()} == {
        "A": "d/c.yaml:2",
        "A.k": "d/c.yaml:3",
        "A.m": "d/c.yaml:5",
        "A.m.n": "d/c.yaml:6",
        "B": "d/c.yaml:8",
        "B.x": "d/c.yaml:8",
    }


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_a_file_without_content_is_empty(text):
    assert parse(text, "c.yaml").values == {}


def test_a_service_without_keys_is_empty():
    assert parse("Frontend:\nB: {a: }\n", "c.yaml").values == {"Frontend": {}, "B": {"a": None}}


def test_environment_variables_keep_their_text():
    text = "S:\n  ServiceArgs:\n    envs: {A: 007, B: true, C: , D: 1e5, E: null, F: 'x'}\n    workers: 007\n"
    assert parse(text, "c.yaml").values["S"]["ServiceArgs"] == {
        "envs": {"A": "007", "B": "true", "C": "", "D": "1e5", "E": "null", "F": "x"},
        "workers": 7,
    }


def test_anchors_and_merge_keys():
    layer = parse("A: &a\n  k: {x: 1}\n  l: 2\nB:\n  <<: *a\n  k: 3\nC: {<<: [*a], m: 1}\nD: *a\n", "c.yaml")
    assert layer.values["B"] == {"k": 3, "l": 2}
    assert layer.values["C"] == {"k": {"x": 1}, "l": 2, "m": 1}
    assert layer.values["D"] == layer.values["A"]
    assert layer.origins["B", "k"].source == "c.yaml:6"
    assert layer.origins["B", "l"].source == layer.origins["D", "l"].source == "c.yaml:3"
    assert ("B", "k", "x") not in layer.origins


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("a:\n  b: 1\n c: 2\n", "c.yaml:3: not valid YAML: "),
        ("a: [1\nb: 2\n", "c.yaml:2: not valid YAML: "),
        ("a:\n\tb: 1\n", "c.yaml:2: not valid YAML: "),
        ("a: {}\n---\nb: {}\n", "c.yaml:2: not valid YAML: "),
        ("a: *b\n", "c.yaml:1: not valid YAML: "),
        ("a: \x01\n", "c.yaml: not valid YAML: "),
        ("- a\n", "c.yaml:1: expected a mapping of services, found a list"),
        ("hello\n", 'c.yaml:1: expected a mapping of services, found "hello"'),
        ("S:\n  [1]: 3\n", "c.yaml:2 S: a key must be text"),
        ("S:\n  k: !path x\n", "c.yaml:2 S.k: the tag !path is not supported"),
        ("S:\n  k: !!python/object/apply:os.getcwd []\n", "c.yaml:2 S.k"),
        ("S:\n  k: !!int x\n", "c.yaml:2 S.k: 'x' is not a valid int"),
        ("S: &s\n  k: *s\n", "c.yaml:2 S.k: an alias refers to the mapping it stands in"),
        ("S:\n  <<: 5\n", "c.yaml:2 S: `<<` takes a mapping"),
        ("S: " + "[" * 100_000, "c.yaml:1: nested deeper than 50 levels"),
    ],
)
@pytest.mark.parametrize("base", ["CSafeLoader", "SafeLoader"])
def test_errors_name_the_line(text, beginning, base, monkeypatch):
    if not hasattr(yaml, base):
        pytest.skip("PyYAML was built without libyaml")
    loader = type(
        "Loader", (getattr(yaml, base),), {"yaml_implicit_resolvers": yaml_file._Loader.yaml_implicit_resolvers}
    )
    monkeypatch.setattr(yaml_file, "_Loader", loader)
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    assert caught.value.message.startswith(beginning)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_of_a_key_that_is_given_twice_the_last_one_counts():
    layer = parse("S:\n  k: {a: 1}\n  l: 2\n  k: {b: 3}\nT: {x: 1}\nT: {y: 2}\nU: &u {z: 1, z: 2}\nV: *u\n", "c.yaml")
    assert layer.values == {"S": {"k": {"b": 3}, "l": 2}, "T": {"y": 2}, "U": {"z": 2}, "V": {"z": 2}}
    assert layer.origins["S", "k"].source == layer.origins["S", "k", "b"].source == "c.yaml:4"
    assert ("S", "k", "a") not in layer.origins
    assert ("T", "x") not in layer.origins
    assert [notice.message.removesuffix(", which is ignored") for notice in layer.notices] == [
        "c.yaml:4 S.k: already given at line 2",
        "c.yaml:6 T: already given at line 5",
        "c.yaml:7 U.z: already given at line 7",
        "c.yaml:7 V.z: already given at line 7",
    ]
    assert all(notice.hint == "keep one of the two lines" for notice in layer.notices)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"S: {k: \xe9}\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfS: {k: 1}\n")
    assert load(tmp_path / "c.yaml").values == {"S": {"k": 1}}
