"""Merging: laws, `Common`, provenance."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.config.merge import Layer, Resolved, merge, overlay, resolve, walk
from dynamo.config.overrides import override
from dynamo.config.yaml_file import parse
from dynamo.errors import ConfigError

KEYS = st.sampled_from(["a", "b", "c-d", "c_d"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3),
    lambda below: st.dictionaries(KEYS, below | LEAVES, max_size=3),
    max_leaves=8,
)


def shaped(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Return trees in which a key is a mapping either in all of them or in none."""
    parts: dict[str, st.SearchStrategy[Any]] = {"a": LEAVES, "b": LEAVES}
    if depth:
        parts |= {"x": shaped(depth - 1), "y": shaped(depth - 1)}
    return st.fixed_dictionaries({}, optional=parts)


@given(TREES)
def test_merge_empty_is_neutral(tree):
    assert merge(tree, {}) == tree == merge({}, tree)
    assert list(merge({}, tree)) == list(tree)


@given(TREES)
def test_merge_with_itself_changes_nothing(tree):
    assert merge(tree, tree) == tree


@given(shaped(2), shaped(2), shaped(2))
def test_merge_is_associative_on_trees_of_one_shape(a, b, c):
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


def test_merge_is_not_associative_where_a_mapping_meets_a_value():
    a, b, c = {"x": {"p": 1}}, {"x": 5}, {"x": {"q": 2}}
    assert merge(merge(a, b), c) == {"x": {"q": 2}}
    assert merge(a, merge(b, c)) == {"x": {"p": 1, "q": 2}}


@given(TREES, TREES)
def test_merge_upper_wins_and_lower_keeps_the_rest(lower, upper):
    merged = dict(walk(merge(lower, upper)))
    for path, value in walk(upper):
        if not isinstance(value, dict):
            assert merged[path] == value
    assert set(merged) <= {p for p, _ in walk(lower)} | {p for p, _ in walk(upper)}


@given(TREES, TREES)
def test_merge_neither_changes_nor_shares_its_inputs(lower, upper):
    before = copy.deepcopy((lower, upper))
    merged = merge(lower, upper)
    for _, value in list(walk(merged)):
        if isinstance(value, list):
            value.append("x")
        elif isinstance(value, dict):
            value["x"] = 1
    assert (lower, upper) == before


@given(TREES, TREES)
def test_overlay_keeps_the_origin_of_every_key(lower, upper):
    def layer(values, source):
        return parse_tree({"S": values}, source)

    low, high = layer(lower, "low"), layer(upper, "high")
    both = overlay(low, high)
    assert list(both.origins) == [path for path, _ in walk(both.values)]
    for path, value in walk(both.values):
        if not isinstance(value, dict) and both.origins[path].source == "high":
            assert value in dict_values(high.values, path)


def parse_tree(values, source):
    from dynamo.config.provenance import Origin

    return Layer(values, {path: Origin(source) for path, _ in walk(values)})


def dict_values(values, path):
    """Return all values at `path`, in any spelling."""
    return [
        value for p, value in walk(values) if [k.replace("_", "-") for k in p] == [k.replace("_", "-") for k in path]
    ]


def resolved(text: str, *overrides: tuple[str, str], services=(), knows=None) -> Resolved:
    layers = [parse(text, "c.yaml"), *(override(*pair) for pair in overrides)]
    return resolve(layers, services, knows) if knows else resolve(layers, services)


def sources(result: Resolved) -> dict[str, str]:
    return {".".join(path): origin.source for path, _, origin in result.leaves()}


def test_services_get_the_keys_of_common_that_they_list():
    result = resolved(
        """\
Common:
  model: m
  block-size: 64
  kv: {a: 1, b: 2}
Other: {x: 1}
Processor:
  router: kv
  block-size: 32
  common-configs: [kv, model, block-size, absent]
  kv: {b: 3}
"""
    )
    assert result.services == {
        "Other": {"x": 1},
        "Processor": {"model": "m", "router": "kv", "block-size": 32, "kv": {"a": 1, "b": 3}},
    }
    assert list(result.services["Processor"]) == ["model", "router", "block-size", "kv"]
    assert sources(result) == {
        "Other.x": "c.yaml:5",
        "Processor.model": "c.yaml:2",
        "Processor.router": "c.yaml:7",
        "Processor.block-size": "c.yaml:8",
        "Processor.kv.a": "c.yaml:4",
        "Processor.kv.b": "c.yaml:10",
    }


def test_common_keys_come_first_in_the_order_of_the_list():
    result = resolved("Common: {a: 1, b: 2, c: 3}\nS: {z: 0, common-configs: [c, a]}\n")
    assert list(result.services["S"].items()) == [("c", 3), ("a", 1), ("z", 0)]


def test_without_lists_services_get_the_keys_of_common_that_they_know():
    takes = {"A": {"model"}, "B": {"model", "size"}, "C": {"other"}, "D": {"size"}}
    result = resolved(
        "Common: {model: m, size: 2, typo: 1}\nB: {size: 3}\nA: {}\n", services=takes, knows=lambda s, k: k in takes[s]
    )
    assert result.services == {"B": {"model": "m", "size": 3}, "A": {"model": "m"}, "D": {"size": 2}}
    assert list(result.services) == ["B", "A", "D"]
    assert result.unclaimed == (("Common", "typo"),)
    assert result.origins["D", "size"].source == result.origins["Common", "typo"].source == "c.yaml:1"


def test_an_empty_list_declines_common():
    assert resolved("Common: {a: 1}\nS: {common-configs: []}\nT: {}\n").services == {"S": {}, "T": {"a": 1}}


def test_with_one_list_only_lists_apply():
    assert resolved("Common: {a: 1}\nS: {common-configs: [a]}\nT: {}\n").services == {"S": {"a": 1}, "T": {}}


def test_overrides_reach_common_and_go_last():
    result = resolved(
        "Common: {model: m}\nS: {k: 1, common-configs: [model]}\n",
        ("Common.model", "n"),
        ("S.new", "1"),
        ("T.a.b", "2"),
    )
    assert result.services == {"S": {"model": "n", "k": 1, "new": 1}, "T": {"a": {"b": 2}}}
    assert sources(result) == {
        "S.model": "--Common.model",
        "S.k": "c.yaml:2",
        "S.new": "--S.new",
        "T.a.b": "--T.a.b",
    }


def test_a_flag_of_common_wins_over_files_and_yields_to_the_services_own_flag():
    takes = {"S": ["model", "max-model-len"], "T": ["model"], "U": []}
    result = resolved(
        "S: {max_model_len: 1, model: m}\nT: {model: m}\nU: {k: 1}\n",
        ("T.model", "own"),
        ("Common.model", "n"),
        ("Common.max-model-len", "5"),
        services=takes,
        knows=lambda s, k: k in takes[s],
    )
    assert result.services == {"S": {"max-model-len": 5, "model": "n"}, "T": {"model": "own"}, "U": {"k": 1}}
    assert sources(result)["S.model"] == "--Common.model"


def test_an_unclaimed_flag_of_common_is_reported():
    text = "Common: {a: 1, b: 2}\nS: {common-configs: [a]}\n"
    assert resolved(text).unclaimed == ()
    assert resolved(text, ("Common.b", "3")).unclaimed == (("Common", "b"),)


def test_an_override_keeps_its_siblings():
    result = resolved("S: {ServiceArgs: {workers: 2, resources: {gpu: 1}}}\n", ("S.ServiceArgs.envs.X", "0"))
    assert result.services["S"]["ServiceArgs"] == {"workers": 2, "resources": {"gpu": 1}, "envs": {"X": "0"}}


@pytest.mark.parametrize(("written", "flag"), [("block-size", "S.block_size"), ("block_size", "S.block-size")])
def test_an_override_finds_the_key_in_either_spelling(written, flag):
    result = resolved(f"S: {{{written}: 1, z: 2}}\n", (flag, "5"))
    assert list(result.services["S"].items()) == [(written, 5), ("z", 2)]
    assert sources(result)[f"S.{written}"] == f"--{flag}"


def test_a_service_overrides_common_in_either_spelling():
    result = resolved("Common: {max-model-len: 1}\nS: {max_model_len: 2, common-configs: [max_model_len]}\n")
    assert result.services == {"S": {"max-model-len": 2}}


def test_a_mapping_that_replaces_a_value_has_the_origin_of_the_mapping():
    assert sources(resolved("S: {a: 1}\n", ("S.a", "{}"))) == {"S.a": "--S.a"}


def test_envs_become_a_mapping_of_text():
    result = resolved(
        "S:\n  ServiceArgs:\n    envs:\n    - {name: A, value: 007}\n    - {name: B, value: yes}\n",
        ("S.ServiceArgs.envs.B", "1.50"),
        ("S.ServiceArgs.envs", '{"C": true, "D": "d"}'),
    )
    assert result.services["S"]["ServiceArgs"]["envs"] == {"A": "007", "B": "1.50", "C": "true", "D": "d"}
    assert sources(result)["S.ServiceArgs.envs.A"] == "c.yaml:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: {}\nFrontend: 5\n", "c.yaml:2 Frontend: expected a mapping of settings, found 5"),
        ("Common: [1]\n", "c.yaml:1 Common: expected a mapping of settings, found [1]"),
        (
            "S:\n  common-configs: model\n",
            'c.yaml:2 S.common-configs: expected a list of keys of Common, found "model"',
        ),
    ],
)
def test_sections_of_the_wrong_type_are_rejected(text, message):
    with pytest.raises(ConfigError) as caught:
        resolved(text)
    assert caught.value.message == message
    assert caught.value.hint


def test_no_layers_is_an_empty_configuration():
    assert resolve([]) == Resolved({}, {}, ())
