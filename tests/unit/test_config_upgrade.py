"""Configurations of ai-dynamo 0.1 to 0.3: what they hold beside today's settings has upstream's meaning, and a notice."""

from __future__ import annotations

from typing import Any

import pytest

from components.frontend import Frontend
from components.planner_service import Planner
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker
from dynamo.config.merge import Resolved
from dynamo.config.overrides import override
from dynamo.config.provenance import misspelled
from dynamo.config.resolution import resolve_and_check
from dynamo.config.settings import declared
from dynamo.config.upstream_keys import KEYS
from dynamo.config.yaml_file import parse
from dynamo.engines.kv_transfer.configuration import upstream_connector
from dynamo.errors import ConfigError
from dynamo.text import edit_distance

AGG = (Frontend, Processor, VllmWorker)
DISAGG = (*AGG, PrefillWorker)
DISAGG_ROUTER = (*DISAGG, Router)
NIXL = 'kv-transfer-config: \'{"kv_connector":"DynamoNixlConnector"}\''


def read(text: str, *flags: tuple[str, str], graph: tuple[type, ...] = DISAGG_ROUTER, strict: bool = False) -> Resolved:
    services = {cls.__name__: declared(cls) for cls in graph}
    layers = [parse(text, "c.yaml"), *(override(*flag) for flag in flags)]
    return resolve_and_check(layers, services, strict=strict)


def refused(text: str, *flags: tuple[str, str], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *flags, **options)
    return str(caught.value)


def messages(resolved: Resolved) -> list[str]:
    return [notice.message for notice in resolved.notices]


# -- sections


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Planner: {environment: local, no-operation: true}", "c.yaml:1 Planner: ignored"),
        ("Prometheus:\n  port: 9090", "c.yaml:1 Prometheus: ignored"),
        ("PrefillWorker: {max-num-seqs: 4}", "c.yaml:1 PrefillWorker: ignored"),
        ("\nVllmDecodeWorker: {a: 1}", "c.yaml:2 VllmDecodeWorker: ignored"),
        ("MyOwnScheduler: {a: 1}", "c.yaml:1 MyOwnScheduler: ignored"),
        ("VllmWorker2: {a: 1}", "c.yaml:1 VllmWorker2: ignored"),
        ("etcd-endpoints: ['http://127.0.0.1:2379']", "c.yaml:1 etcd-endpoints: ignored"),
        ("nats-url: nats://127.0.0.1:4222", "c.yaml:1 nats-url: ignored"),
    ],
)
def test_a_section_of_no_service_of_the_graph(text: str, message: str) -> None:
    assert messages(read(text, graph=AGG)) == [message]
    assert refused(text, graph=AGG, strict=True).startswith(message)


def test_a_section_is_reported_once_with_its_flags() -> None:
    found = read("Planner: {a: 1}", ("Planner.no-operation", "true"), ("Planner.b", "2"), graph=AGG)
    assert messages(found) == ["c.yaml:1 Planner: ignored"]
    assert messages(read("", ("Planner.no-operation", "true"), graph=AGG)) == ["--Planner.no-operation: ignored"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("router: {min-workers: 1}", "did you mean Router?"),
        ("Frontned: {port: 1}", "did you mean Frontend?"),
        ("VllmWorkr: {port: 1}", "did you mean VllmWorker?"),
        ("Comon: {model: m}", "did you mean Common?"),
        ("Procesor: 5", ""),
    ],
)
def test_a_misspelled_section_is_an_error(text: str, hint: str) -> None:
    message = refused(text)
    assert "no such service in the graph" in message or "expected a mapping" in message
    assert hint in message
    assert message == refused(text, strict=True)


def test_a_known_service_is_never_a_misspelling() -> None:
    class SGLangWorkers:
        def __init__(self, a: int = 1) -> None: ...

    found = read("SGLangWorker: {a: 2}", graph=(SGLangWorkers,))
    assert messages(found) == ["c.yaml:1 SGLangWorker: ignored"]


@pytest.mark.parametrize(
    ("word", "name", "near"),
    [
        ("router", "Router", True),
        ("Rotuer", "Router", True),
        ("block_sizes", "block-size", True),
        ("VlmWorkr", "VllmWorker", True),
        ("PrefillWorker", "VllmWorker", False),
        ("x-common", "Common", False),
        ("Worker1", "Worker2", False),
        ("Planner", "Frontend", False),
        ("A", "B", False),
        ("Max", "Min", False),
    ],
)
def test_misspelled(word: str, name: str, near: bool) -> None:
    assert misspelled(word, ["Other", name]) == (name if near else None)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("a", "", 1), ("ab", "ba", 1), ("kitten", "sitting", 3), ("port", "ports", 1), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


# -- Common and the sections of others, in ServiceConfig


def test_common_and_foreign_sections_stay_readable() -> None:
    text = """
Common: {model: m, gpu-scope: host}
Planner: {common-configs: [model], a: 1}
Processor: {common-configs: [model]}
"""
    found = read(text, graph=AGG)
    assert found.services == {
        "Common": {"model": "m", "gpu-scope": "host"},
        "Planner": {"model": "m", "a": 1},
        "Processor": {"model": "m"},
    }
    assert list(found.services) == ["Common", "Planner", "Processor"]


def test_a_key_of_common_for_services_of_another_graph() -> None:
    shared = "Common: {model: m, max-prefills: 4}\nPrefillWorker: {}\n"
    assert messages(read(shared, graph=AGG)) == [
        "c.yaml:2 PrefillWorker: ignored",
        "c.yaml:1 Common.max-prefills: ignored",
    ]
    assert "Common.modle: no service of the graph takes it" in refused(
        "Common: {modle: m}\nPrefillWorker: {}\n", graph=AGG
    )
    assert "--Common.max-prefills" in refused("PrefillWorker: {}", ("Common.max-prefills", "4"), graph=AGG)
    assert "Common.max-prefills: no service of the graph takes it" in refused("Common: {max-prefills: 4}", graph=AGG)


# -- keys of upstream's components


ROWS: list[tuple[str, str, Any, dict[str, Any] | None]] = [
    ("Frontend", "model", "m", {"served_model_name": "m"}),
    (
        "Frontend",
        "endpoint_chat",
        "dynamo.Processor.chat/completions",
        {"endpoint": "dynamo.Processor.chat/completions"},
    ),
    ("Frontend", "endpoint_completion", "x", {}),
    ("Frontend", "endpoint_completions", "x", {}),
    ("Frontend", "block-size", 64, {}),
    ("Frontend", "max-model-len", 4096, {}),
    ("Frontend", "router", "kv", {}),
    ("Frontend", "worker", "VllmWorker", {}),
    ("Frontend", "processor", "Processor", {}),
    ("Processor", "router-num-threads", 4, {}),
    ("Processor", "prompt-template", "USER: <prompt>", {}),
    ("Router", "model-name", "m", {"model": "m"}),
    ("Router", "softmax-sample", True, {"router-temperature": 1.0}),
    ("Router", "softmax_sample", False, {"router-temperature": 0.0}),
    ("Router", "temperature", 0.3, {"router-temperature": 0.3}),
    ("Router", "max-workers", 4, {}),
    ("VllmWorker", "router-num-threads", 4, {}),
    ("VllmWorker", "cuda-visible-device-offset", 1, {}),
    ("VllmWorker", "disable-log-requests", True, {}),
    ("VllmWorker", "enable-reasoning", True, {}),
    ("PrefillWorker", "router", "kv", {}),
    ("PrefillWorker", "router-num-threads", 4, {}),
    ("PrefillWorker", "cuda-visible-device-offset", 1, {}),
    ("PrefillWorker", "max-batched-prefill-tokens", 8192, {}),
    ("PrefillWorker", "disable-log-requests", True, {}),
    *((s, k, 2, {}) for s in ("Processor", "PrefillWorker") for k in ("max-prefill-queue-size", "conditional-disagg")),
    *((s, k, 2, {}) for s in ("Processor", "PrefillWorker") for k in ("max-local-prefill-length", "remote-prefill")),
    *((s, k, "x", {}) for s in KEYS for k in ("etcd-endpoints", "etcd-url", "nats-server", "nats-url")),
    ("Planner", "profile-results-dir", "x", {}),
    ("Planner", "slo-level", "high", {}),
    ("Processor", "trust-remote-code", True, None),
    ("Processor", "enforce-eager", True, {}),
    ("Processor", "max-num-batched-tokens", 16384, {}),
    ("Processor", "task", "generate", {}),
]
"""Service, key, value, and what the service gets; None: the key as it is, without a notice."""


@pytest.mark.parametrize(("service", "key", "value", "settings"), ROWS)
def test_a_key_of_upstream(service: str, key: str, value: Any, settings: dict[str, Any] | None) -> None:
    flag = (f"{service}.{key}", str(value))
    graph = (*DISAGG_ROUTER, Planner)
    found = read(f"{service}: {{}}", flag, graph=graph)
    assert found.services[service] == ({key: value} if settings is None else settings)
    assert len(found.notices) == (settings is not None)
    if settings is not None:
        assert found.notices[0].message.startswith(f"--{service}.{key}: {'read as' if settings else 'ignored'}")
        assert refused(f"{service}: {{}}", flag, graph=graph, strict=True).startswith(f"--{service}.{key}: ")


def test_a_misspelled_key_of_the_planner_is_an_error() -> None:
    assert "did you mean max-gpu-budget" in refused("Planner: {max-gpu-budgt: 4}", graph=(*AGG, Planner))


def test_every_row_is_tried() -> None:
    tried = {(service, key.replace("_", "-")) for service, key, _, _ in ROWS}
    assert {(service, key) for service, keys in KEYS.items() for key in keys} <= tried


def test_todays_name_wins_over_an_older_one_except_over_a_flag() -> None:
    text = "Router: {model-name: old, model: new, softmax-sample: true, router_temperature: 0.2}"
    found = read(text)
    assert found.services["Router"] == {"model": "new", "router_temperature": 0.2}
    assert messages(found) == [
        "c.yaml:1 Router.model-name: ignored, since model is given",
        "c.yaml:1 Router.softmax-sample: ignored, since router_temperature is given",
    ]
    flags = (("Router.model-name", "flag"), ("Router.softmax-sample", "true"))
    found = read("Router: {model: new, router_temperature: 0.2}", *flags)
    assert found.services["Router"] == {"model": "flag", "router_temperature": 1.0}
    assert found.origins["Router", "model"].source == "--Router.model-name"
    assert [message.partition(": ")[2] for message in messages(found)] == [
        "read as model",
        "read as router-temperature",
    ]


def test_of_two_older_names_the_last_one_counts_and_is_the_one_in_errors() -> None:
    found = read("Router:\n  softmax-sample: true\n  temperature: 0.5")
    assert found.services["Router"] == {"router-temperature": 0.5}
    assert found.origins["Router", "router-temperature"].source == "c.yaml:3"
    wrong = refused("Router:\n  softmax-sample: true\n  temperature: hot")
    assert wrong.startswith('c.yaml:3 Router.router-temperature: expected float, found "hot"')
    flags = (("Router.temperature", "0.7"),)
    found = read("Router: {softmax-sample: true}", *flags)
    assert found.services["Router"] == {"router-temperature": 0.7}
    assert found.origins["Router", "router-temperature"].source == "--Router.temperature"


def test_a_switch_of_ai_dynamo_that_is_no_switch_is_an_error() -> None:
    assert 'expected float, found "maybe"' in refused("Router: {softmax-sample: maybe}")


def test_a_key_that_the_class_itself_takes_is_its_own() -> None:
    class Router:
        def __init__(self, temperature: float = 0.5, model_name: str = "") -> None: ...

    class Processor:
        """Reads ServiceConfig, as components of 0.x do."""

    text = "Router: {temperature: 2, model-name: m}\nProcessor: {router-num-threads: 4, enforce-eager: true}"
    found = read(text, graph=(Router, Processor))
    assert found.services == {
        "Router": {"temperature": 2, "model-name": "m"},
        "Processor": {"router-num-threads": 4, "enforce-eager": True},
    }
    assert not found.notices


def test_a_class_without_the_name_of_today_ignores_the_older_one() -> None:
    class Router:
        def __init__(self, size: int = 1) -> None: ...

    found = read("Router: {model-name: m}", graph=(Router,))
    assert found.services["Router"] == {}
    assert messages(found) == ["c.yaml:1 Router.model-name: ignored"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Processor: {router-num-thread: 4}", "settings of Processor"),
        ("Processor: {enforce-eagr: true}", "settings of Processor"),
        ("Router: {model-nam: m}", "did you mean model?"),
        ("VllmWorker: {disable-log-request: true}", "did you mean"),
        ("VllmWorker: {conditonal-disagg: false}", "did you mean conditional-disagg?"),
        ("Frontend: {nonsense: 1}", "settings of Frontend"),
    ],
)
def test_unknown_keys_of_known_services_stay_errors(text: str, hint: str) -> None:
    message = refused(text)
    assert "no such setting" in message
    assert hint in message


def test_a_key_of_common_is_reported_once() -> None:
    lists = "common-configs: [disable-log-requests, kv-transfer-config]"
    text = f"Common:\n  disable-log-requests: true\n  {NIXL}\nVllmWorker: {{{lists}}}\nPrefillWorker: {{{lists}}}\n"
    found = read(text, graph=DISAGG)
    assert messages(found) == [
        "c.yaml:2 Common.disable-log-requests: ignored",
        "c.yaml:3 Common.kv-transfer-config: read as dynamo's own connector",
    ]
    assert found.services["VllmWorker"] == found.services["PrefillWorker"] == {}


def test_an_older_flag_of_vllm_in_common_without_lists() -> None:
    found = read("Common: {swap-space: 4, model: m}", graph=AGG)
    assert messages(found) == ["c.yaml:1 Common.swap-space: ignored"]
    assert found.services["VllmWorker"] == found.services["Processor"] == {"model": "m"}


def test_an_older_key_in_common_without_lists() -> None:
    found = read("Common: {router-num-threads: 4, softmax-sample: true}")
    assert sorted(messages(found)) == [
        "c.yaml:1 Common.router-num-threads: ignored",
        "c.yaml:1 Common.softmax-sample: read as router-temperature",
    ]
    assert found.services["Router"] == {"router-temperature": 1.0}


def test_of_several_notices_on_a_key_of_common_the_workers_is_shown() -> None:
    graph = (VllmWorker, Processor)  # in the order of `dynamo.sdk.graph.load`: who is called comes first
    (notice,) = read("Common: {swap-space: 4}", graph=graph).notices
    assert notice.hint.startswith("not in vLLM since")


def test_older_flags_that_become_one_are_merged_with_it() -> None:
    text = """
VllmWorker:
  speculative-model: m
  num-speculative-tokens: 5
  speculative-config: '{"num_speculative_tokens": 3, "method": "draft_model"}'
"""
    settings = read(text).services["VllmWorker"]
    assert settings == {"speculative-config": {"model": "m", "num_speculative_tokens": 3, "method": "draft_model"}}


# -- workers that exchange KV


@pytest.mark.parametrize(
    ("graph", "text", "fact"),
    [
        (AGG, f"VllmWorker:\n  {NIXL}", "ignored"),
        (DISAGG, f"VllmWorker:\n  {NIXL}", "read as dynamo's own connector"),
        (DISAGG, f"PrefillWorker:\n  {NIXL}", "read as dynamo's own connector"),
        ((PrefillWorker,), f"PrefillWorker:\n  {NIXL}", "read as dynamo's own connector"),
        ((VllmWorker,), f"VllmWorker:\n  {NIXL}", "ignored"),
        (
            (VllmWorker,),
            "VllmWorker: {kv_transfer_config: {kv_connector: DynamoNixlConnector, kv_role: kv_both}}",
            "ignored",
        ),
    ],
)
def test_upstreams_connector(graph: tuple[type, ...], text: str, fact: str) -> None:
    found = read(text, graph=graph)
    assert [message.partition(": ")[2] for message in messages(found)] == [fact]
    assert all(settings == {} for settings in found.services.values())


def test_upstreams_connector_is_nixl_where_that_is_installed() -> None:
    given = '{"kv_connector":"DynamoNixlConnector"}'
    change = upstream_connector(given, exchanges_kv=True, nixl=True)
    assert change is not None
    assert change.settings == {"kv-transfer-config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
    assert change.fact == "read as NixlConnector"
    change = upstream_connector(given, exchanges_kv=False, nixl=True)
    assert change is not None
    assert not change.settings


@pytest.mark.parametrize("given", ['{"kv_connector": "NixlConnector", "kv_role": "kv_both"}', "no JSON", {}])
def test_other_connectors_stay(given: Any) -> None:
    assert upstream_connector(given, exchanges_kv=True) is None


def test_remote_prefill_without_a_prefill_worker_in_the_graph() -> None:
    text = f"VllmWorker:\n  remote-prefill: true\n  {NIXL}\n"
    found = read(text, graph=AGG)
    assert messages(found) == [
        "c.yaml:2 VllmWorker.remote-prefill: this graph has no PrefillWorker",
        "c.yaml:3 VllmWorker.kv-transfer-config: read as dynamo's own connector",
    ]
    assert found.services["VllmWorker"] == {"remote-prefill": True}
    assert not read("VllmWorker: {remote-prefill: true}", graph=DISAGG).notices
    assert not read("VllmWorker: {remote-prefill: false}", graph=AGG).notices
    assert "expected bool" in refused("VllmWorker: {remote-prefill: maybe}", graph=AGG)
