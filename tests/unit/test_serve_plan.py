"""The plan of a start: who reaches the entry service, as the terminal says it."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo.config import overrides
from dynamo.config.options import ServeOptions
from dynamo.config.resolution import default_host_layers, resolve_and_check
from dynamo.config.settings import declared
from dynamo.launcher.serve_plan import make_plan
from dynamo.sdk.graph import load
from tests.served import ROOT

LOCAL = "only this machine reaches it; --host 0.0.0.0 opens it to others"
OPEN = "other machines reach it without a key: DYN_API_KEYS sets keys that clients must send"
KEYED = "other machines reach it with an API key"


def reach(entry: str, settings: dict[str, Any]) -> str:
    graph = load(entry, ROOT)
    services = {name: declared(cls) for name, cls in graph.services.items()}
    name = graph.entry.__name__
    layers = [*default_host_layers(name, services), overrides.setting(("VllmWorker", "model"), "dynamo-tiny", "test")]
    if "VllmWorker" not in services:
        layers.pop()
    layers += [overrides.setting((name, key), value, "test") for key, value in settings.items()]
    return make_plan(graph, resolve_and_check(layers, services), ServeOptions()).reach


@pytest.mark.parametrize(
    ("variables", "settings", "expected"),
    [
        ({}, {}, LOCAL),
        ({"DYN_API_KEYS": "a"}, {"host": "::1"}, LOCAL),
        ({"DYN_DEFAULT_HOST": "0.0.0.0"}, {}, OPEN),
        ({"DYN_DEFAULT_HOST": "0.0.0.0"}, {"host": "localhost"}, LOCAL),
        ({}, {"host": "10.0.0.1"}, OPEN),
        ({"DYN_API_KEYS": " , "}, {"host": "0.0.0.0"}, OPEN),
        ({"DYN_API_KEYS": "a"}, {"host": "0.0.0.0"}, KEYED),
        ({}, {"host": "0.0.0.0", "api-keys": ["a"]}, KEYED),
        ({"DYN_API_KEYS": "a"}, {"host": "0.0.0.0", "api_keys": []}, OPEN),
    ],
)
def test_who_reaches_the_frontend(
    variables: dict[str, str], settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DYN_API_KEYS", "DYN_DEFAULT_HOST", "DYNAMO_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert reach("graphs.agg:Frontend", settings) == expected


def test_a_service_without_keys_does_not_promise_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_DEFAULT_HOST", "0.0.0.0")
    assert reach("graphs.hello_world:Frontend", {}) == "other machines reach it"
    assert reach("graphs.agg:VllmWorker", {}) == ""
