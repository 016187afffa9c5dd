"""`ServiceConfig`: the rules of ai-dynamo 0.3's class of that name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.config.service_config import ServiceConfig
from dynamo.errors import ConfigError
from dynamo.sdk.lib.config import ServiceConfig as Exported

UNRESOLVED = {
    "Common": {"model": "m", "block-size": 64, "max-model-len": 16384},
    "VllmWorker": {
        "enforce-eager": True,
        "block-size": 128,
        "ServiceArgs": {"workers": 1},
        "common-configs": ["model", "block-size", "absent"],
    },
    "Other": {"k": 1},
}


@pytest.fixture
def configure(monkeypatch):
    """Sets DYNAMO_SERVICE_CONFIG and drops the instance that was read before."""

    def set_(value) -> None:
        monkeypatch.setenv("DYNAMO_SERVICE_CONFIG", value if isinstance(value, str) else json.dumps(value))
        monkeypatch.setattr(ServiceConfig, "_instance", None)

    set_("")
    return set_


def test_is_the_class_that_old_graphs_import():
    assert Exported is ServiceConfig


def test_one_instance_per_process(configure):
    configure(UNRESOLVED)
    config = ServiceConfig.get_instance()
    assert config is ServiceConfig.get_instance()
    assert isinstance(config, dict)
    assert config == UNRESOLVED
    assert config.get("VllmWorker", {})["common-configs"] == ["model", "block-size", "absent"]
    assert config.get("Absent", {}) == {}


def test_is_empty_without_the_variable(configure, monkeypatch):
    assert ServiceConfig.get_instance() == {}
    monkeypatch.delenv("DYNAMO_SERVICE_CONFIG")
    monkeypatch.setattr(ServiceConfig, "_instance", None)
    assert ServiceConfig.get_instance() == {}


@pytest.mark.parametrize("text", ["{", "nonsense", "[1]", "5", '{"S": 5}', "[" * 100_000])
def test_a_bad_variable_is_named(configure, text):
    configure(text)
    with pytest.raises(ConfigError) as caught:
        ServiceConfig.get_instance()
    assert caught.value.message.startswith("DYNAMO_SERVICE_CONFIG: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_require():
    config = ServiceConfig(UNRESOLVED)
    assert config.require("Other", "k") == 1
    for service, key in (("Other", "x"), ("Absent", "x")):
        with pytest.raises(ValueError, match=rf"{service}\.{key} must be specified in configuration"):
            config.require(service, key)
        with pytest.raises(ConfigError):
            config.require(service, key)


def test_parsed_config(configure):
    configure(UNRESOLVED)
    assert ServiceConfig.get_parsed_config("VllmWorker") == {"model": "m", "enforce-eager": True, "block-size": 128}
    assert ServiceConfig.get_parsed_config("Absent") == {}


def test_resolved_and_unresolved_give_the_same(configure):
    resolved = {"VllmWorker": {"model": "m", "enforce-eager": True, "block-size": 128, "ServiceArgs": {"workers": 1}}}
    expected = ["--model", "m", "--enforce-eager", "--block-size", "128"]
    assert ServiceConfig(UNRESOLVED).as_args("VllmWorker") == expected
    assert ServiceConfig(resolved).as_args("VllmWorker") == expected


@pytest.mark.parametrize(
    ("settings", "args"),
    [
        ({}, []),
        ({"a": True}, ["--a"]),
        ({"a": False}, []),
        ({"enable-prefix-caching": False}, ["--no-enable-prefix-caching"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"use_tqdm_on_load": False}, ["--no-use-tqdm-on-load"]),
        ({"multi-step-stream-outputs": False}, ["--no-multi-step-stream-outputs"]),
        ({"enable-prefix-caching": True}, ["--enable-prefix-caching"]),
        ({"some-other-flag": False}, []),
        ({"a": {"b": [1, True]}}, ["--a", '{"b": [1, true]}']),
        ({"a": [1, 2]}, ["--a", "[1, 2]"]),
        ({"a": None}, ["--a", "None"]),
        ({"a_b": 1, "a-c": 2.5}, ["--a_b", "1", "--a-c", "2.5"]),
        ({"a": ""}, ["--a", ""]),
        ({"ServiceArgs": {"workers": 2}, "common-configs": [], "a": "x"}, ["--a", "x"]),
    ],
)
def test_as_args(settings, args):
    assert ServiceConfig({"S": settings}).as_args("S") == args


def test_as_args_with_a_prefix():
    config = ServiceConfig({"S": {"vllm-model": "m", "vllm-enable-prefix-caching": False, "other": 1}})
    assert config.as_args("S", prefix="vllm-") == ["--model", "m", "--no-enable-prefix-caching"]


def test_as_args_of_an_unknown_service():
    assert ServiceConfig({}).as_args("S") == []


def test_as_args_is_logged(caplog):
    caplog.set_level("INFO")
    ServiceConfig({"S": {"a": 1}}).as_args("S")
    assert "Running S with args=['--a', '1']" in caplog.text


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers()), st.lists(st.sampled_from(["a", "b", "x"])))
def test_common_never_wins(own, listed):
    common = {"a": "common", "b": "common"}
    args = ServiceConfig({"Common": common, "S": {**own, "common-configs": listed}}).as_args("S")
    pairs = dict(zip(args[::2], args[1::2], strict=True))
    expected = {key: "common" for key in listed if key in common} | {key: str(value) for key, value in own.items()}
    assert pairs == {f"--{key}": value for key, value in expected.items()}
