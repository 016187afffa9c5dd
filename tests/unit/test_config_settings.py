"""Constructor parameters as settings: accepted keys, conversions, errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pytest

from dynamo.config.overrides import override
from dynamo.config.resolution import resolve_and_check
from dynamo.config.service_args import ServiceArgs, service_args
from dynamo.config.settings import constructor_arguments, declared, expectation, knows
from dynamo.config.yaml_file import parse
from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from decimal import Decimal

calls: list[str] = []


class Processor:
    def __init__(
        self,
        model: str = "",
        block_size: int = 64,
        max_model_len: int | None = None,
        router: Literal["round-robin", "random"] = "round-robin",
    ) -> None: ...


class Worker:
    def __init__(self, model: str = "", engine: Literal["vllm", "mock"] = "vllm", **engine_args: Any) -> None: ...

    @staticmethod
    def extra_settings() -> set[str]:
        calls.append("Worker")
        return {"enforce-eager", "enable_prefix_caching", "compilation-config", "max-num-seqs"}


class Loader(Worker):
    """Inherits the constructor."""


class Anything:
    def __init__(self, name: str = "", **further: Any) -> None: ...


class AnyEngine(Worker):
    @staticmethod
    def extra_settings() -> None:  # type: ignore[override]
        return None


class Silent:
    def __init__(self) -> None: ...


class Plain: ...


class Required:
    def __init__(self, model: str, size: int = 1) -> None: ...


class Typed:
    def __init__(
        self,
        names: str | list[str] | None = None,
        flag: bool = False,
        ratio: float = 0.5,
        sizes: list[int] = [],  # noqa: B006
        limits: dict[str, int] | None = None,
        where: Path | None = None,
        old: Optional[int] = None,  # noqa: UP045
        lazy: int = None,  # type: ignore[assignment]  # noqa: RUF013
        price: Decimal | None = None,
        bounded: Annotated[int, "unit: s"] = 1,
        untyped=None,  # type: ignore[no-untyped-def]
    ) -> None: ...


GRAPH = {cls.__name__: cls for cls in (Processor, Worker, Silent)}


def refused(text: str, *overrides: tuple[str, str], graph=None) -> tuple[str, str]:
    services = {name: declared(cls) for name, cls in (graph or GRAPH).items()}
    layers = [parse(text, "configs/agg.yaml"), *(override(*pair) for pair in overrides)]
    with pytest.raises(ConfigError) as caught:
        resolve_and_check(layers, services)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message, caught.value.hint


def accepted(text: str, graph=None) -> dict[str, dict[str, Any]]:
    services = {name: declared(cls) for name, cls in (graph or GRAPH).items()}
    return resolve_and_check([parse(text, "c.yaml")], services).services


def test_declared_settings_of_a_class():
    assert declared(Plain) is None
    assert declared(Silent) is None
    found = declared(Processor)
    assert found is not None
    assert [setting.name for setting in found.settings.values()] == ["model", "block_size", "max_model_len", "router"]
    assert found.takes("block-size")
    assert found.takes("block_size")
    assert found.takes("ServiceArgs")
    assert not found.takes("blocksize")
    inherited = declared(Loader)
    assert inherited is not None
    assert inherited.has_kwargs
    assert inherited.takes("max-num-seqs")


@pytest.mark.parametrize(
    "key", ["enforce-eager", "enforce_eager", "no-enable-prefix-caching", "no_enforce_eager", "compilation-config.mode"]
)
def test_extra_settings_in_every_form(key):
    assert accepted(f"Worker: {{{key}: true}}") == {"Worker": {key: True}}


def test_extra_settings_are_called_only_for_unknown_keys():
    calls.clear()
    accepted("Worker: {model: m, engine: mock, ServiceArgs: {workers: 1}}")
    assert calls == []
    accepted("Worker: {enforce-eager: true}")
    assert calls


def test_classes_that_take_any_key():
    text = "S: {anything: [1, {a: 2}]}"
    assert accepted(text, {"S": Silent}) == accepted(text, {"S": Anything}) == accepted(text, {"S": AnyEngine})


def test_knows_for_common():
    services = {name: declared(cls) for name, cls in GRAPH.items()}
    assert knows(services, "Processor", "block-size")
    assert not knows(services, "Processor", "max-num-seqs")
    assert knows(services, "Worker", "max_num_seqs")
    assert knows(services, "Silent", "whatever")
    assert not knows(services, "Absent", "model")
    assert not knows(services, "Silent", "common-configs")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "Processor:\n  block-size: abc\n",
            'configs/agg.yaml:2 Processor.block-size: expected int, found "abc"',
            "give int, such as 64",
        ),
        (
            "Processor:\n  block_size: {a: 1}\n",
            'configs/agg.yaml:2 Processor.block_size: expected int, found {"a": 1}',
            "give int, such as 64",
        ),
        (
            "Processor:\n  model: {a: 1}\n",
            'configs/agg.yaml:2 Processor.model: expected str, found {"a": 1}',
            "give str",
        ),
        ("Processor: {model: [a]}", 'configs/agg.yaml:1 Processor.model: expected str, found ["a"]', "give str"),
        ("Processor: {model: true}", "configs/agg.yaml:1 Processor.model: expected str, found true", "give str"),
        ("Processor: {model: }", "configs/agg.yaml:1 Processor.model: expected str, found null", "give str"),
        (
            "Processor: {block-size: true}",
            "configs/agg.yaml:1 Processor.block-size: expected int, found true",
            "give int, such as 64",
        ),
        (
            "Processor: {router: radnom}",
            'configs/agg.yaml:1 Processor.router: expected one of round-robin, random, found "radnom"',
            "did you mean random? choices: round-robin, random",
        ),
        (
            "Processor: {router: {}}",
            "configs/agg.yaml:1 Processor.router: expected one of round-robin, random, found {}",
            "choices: round-robin, random",
        ),
        (
            "Processor:\n  model: m\n  blok-size: 1\n",
            "configs/agg.yaml:3 Processor.blok-size: no such setting",
            "did you mean block-size? settings of Processor: model, block-size, max-model-len, router, ServiceArgs",
        ),
        (
            "Processor: {blok_size: 1}",
            "configs/agg.yaml:1 Processor.blok_size: no such setting",
            "did you mean block_size? settings of Processor: model, block_size, max_model_len, router, ServiceArgs",
        ),
        (
            "Processor: {block-size: 1, block_size: 2}",
            "configs/agg.yaml:1 Processor.block_size: already given as block-size",
            "keep one of the two spellings",
        ),
        (
            "Worker: {enforce-eagr: true}",
            "configs/agg.yaml:1 Worker.enforce-eagr: no such setting",
            "did you mean enforce-eager? settings of Worker: model, engine, compilation-config, enable-prefix-caching, "
            "enforce-eager, max-num-seqs, ServiceArgs",
        ),
        (
            "Procesor: {model: m}\n",
            "configs/agg.yaml:1 Procesor: no such service in the graph",
            "did you mean Processor? services: Processor, Worker, Silent",
        ),
        (
            "Silent: {ServiceArgs: {wokers: 1}}",
            "configs/agg.yaml:1 Silent.ServiceArgs.wokers: no such key",
            "did you mean workers? keys of ServiceArgs: workers, resources, envs, dynamo, image",
        ),
    ],
)
def test_errors_name_source_key_value_and_allowed_values(text, message, hint):
    assert refused(text) == (message, hint)


def test_errors_in_overrides_name_the_flag():
    assert refused("", ("Processor.block-size", "abc"))[0] == '--Processor.block-size: expected int, found "abc"'
    assert refused("", ("Procesor.router", "x"))[0] == "--Procesor.router: no such service in the graph"
    text = "Processor: {block-size: 1}"
    assert refused(text, ("Processor.block_size", "abc"))[0] == '--Processor.block_size: expected int, found "abc"'


def test_an_unclaimed_key_of_common():
    graph = {"Processor": Processor, "Worker": Worker}
    message, hint = refused("Common:\n  model: m\n  enforce-eagr: true\n", graph=graph)
    assert message == "configs/agg.yaml:3 Common.enforce-eagr: no service of the graph takes it"
    assert hint.startswith("did you mean enforce-eager?")


def test_a_bad_value_from_common_names_the_line_in_common():
    message, _ = refused("Common:\n  block-size: x\nProcessor: {model: m}\n", graph={"Processor": Processor})
    assert message == 'configs/agg.yaml:2 Processor.block-size: expected int, found "x"'


def test_a_required_setting_that_is_missing():
    message, hint = refused("Required: {size: 2}", graph={"Required": Required})
    assert message == "configs/agg.yaml:1 Required.model: is required and not given"
    assert "--Required.model=VALUE" in hint
    assert refused("", graph={"Required": Required})[0] == "Required.model: is required and not given"


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("names", "a", "a"),
        ("names", ["a", "b"], ["a", "b"]),
        ("names", None, None),
        ("names", 5, "5"),
        ("flag", True, True),
        ("flag", "true", True),
        ("flag", 0, False),
        ("ratio", 1, 1.0),
        ("ratio", "0.25", 0.25),
        ("sizes", [1, "2"], [1, 2]),
        ("limits", {"a": 1}, {"a": 1}),
        ("where", "a/b", Path("a/b")),
        ("old", "5", 5),
        ("old", 5.0, 5),
        ("lazy", None, None),
        ("lazy", 7, 7),
        ("price", "1.5", "1.5"),  # the annotation exists for type checkers only
        ("bounded", "3", 3),
        ("untyped", {"a": [1]}, {"a": [1]}),
    ],
)
def test_conversions(key, value, result):
    converted = constructor_arguments(Typed, {key: value})
    assert converted == {key: result}
    assert type(converted[key]) is type(result)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("names", {"a": 1}, 'Typed.names: expected str or list[str] or null, found {"a": 1}'),
        ("names", [1], "Typed.names: expected str or list[str] or null, found [1] (at [0])"),
        ("flag", "on", 'Typed.flag: expected bool, found "on"'),
        ("flag", 2, "Typed.flag: expected bool, found 2"),
        ("sizes", "1", 'Typed.sizes: expected list[int], found "1"'),
        ("limits", {"a": "x"}, 'Typed.limits: expected dict[str, int] or null, found {"a": "x"} (at [...])'),
        ("where", {}, "Typed.where: expected Path or null, found {}"),
        ("lazy", "x", 'Typed.lazy: expected int, found "x"'),
        ("bounded", 1.5, "Typed.bounded: expected int, found 1.5"),
        (
            "names",
            {"a": "x" * 99},
            "Typed.names: expected str or list[str] or null, found " + '{"a": "' + "x" * 50 + "...",
        ),
    ],
)
def test_conversions_that_fail(key, value, message):
    with pytest.raises(ConfigError) as caught:
        constructor_arguments(Typed, {key: value})
    assert caught.value.message == message


def test_constructor_arguments_by_either_spelling_without_reserved_keys():
    config = {"model": "m", "block-size": "32", "ServiceArgs": {"workers": 1}}
    assert constructor_arguments(Processor, config) == {"model": "m", "block_size": 32}
    assert constructor_arguments(Silent, config) == constructor_arguments(Plain, config) == {}
    Processor(**constructor_arguments(Processor, config))


def test_further_arguments_are_passed_as_written():
    config = {"engine": "mock", "max-num-seqs": 4, "enforce_eager": True, "compilation-config.mode": 3}
    assert constructor_arguments(Worker, config) == config
    Worker(**constructor_arguments(Worker, config))


def test_expectation():
    assert expectation(Literal["a", "b"]) == ("one of a, b", ["a", "b"])
    assert expectation(Optional[int]) == ("int or null", [])  # noqa: UP045
    assert expectation(dict[str, list[int]]) == ("dict[str, list[int]]", [])
    assert expectation(Annotated[Literal["x"], 1]) == ("one of x", ["x"])


def test_service_args_are_typed():
    found = service_args(
        "S",
        {
            "ServiceArgs": {
                "workers": "2",
                "resources": {"gpu": "1", "cpu": 2, "memory": "8Gi"},
                "envs": {"A": "1"},
                "dynamo": {"namespace": "ns"},
                "image": "i",
            }
        },
    )
    assert found == ServiceArgs(2, 1.0, "2", "8Gi", {"A": "1"}, {"namespace": "ns"}, "i")
    assert found.namespace == "ns"
    assert service_args("S", {}) == ServiceArgs()
    assert service_args("S", {"ServiceArgs": {"resources": {"gpu": 0.5}}}).gpu == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "S.ServiceArgs: expected a mapping of workers, resources, envs, dynamo, image, found 5"),
        ("{workers: 0}", "S.ServiceArgs.workers: expected an int of at least 1, found 0"),
        ("{workers: two}", 'S.ServiceArgs.workers: expected an int of at least 1, found "two"'),
        ("{workers: true}", "S.ServiceArgs.workers: expected an int of at least 1, found true"),
        ("{resources: {gpu: -1}}", "S.ServiceArgs.resources.gpu: expected a number of GPUs of at least 0, found -1"),
        (
            "{resources: {gpu: all}}",
            'S.ServiceArgs.resources.gpu: expected a number of GPUs of at least 0, found "all"',
        ),
        ("{resources: {gpus: 1}}", "S.ServiceArgs.resources.gpus: no such key"),
        (
            "{resources: {memory: big}}",
            'S.ServiceArgs.resources.memory: expected a size such as 500Mi or 8Gi, found "big"',
        ),
        (
            "{resources: {cpu: []}}",
            'S.ServiceArgs.resources.cpu: expected a number of cores such as 2 or "500m", found []',
        ),
        ("{envs: 5}", "S.ServiceArgs.envs: expected a mapping of variables, or a list of {name, value}, found 5"),
        ("{envs: [A]}", 'S.ServiceArgs.envs: expected a mapping of variables, or a list of {name, value}, found ["A"]'),
        ("{envs: {A=B: 1}}", 'S.ServiceArgs.envs.A=B: expected the name of an environment variable, found "A=B"'),
        ("{dynamo: {namespace: a.b}}", "S.ServiceArgs.dynamo.namespace: expected a name"),
        ("{dynamo: {nmespace: a}}", "S.ServiceArgs.dynamo.nmespace: no such key"),
        ("{image: 5}", "S.ServiceArgs.image: expected the name of an image, found 5"),
    ],
)
def test_service_args_errors(text, message):
    assert refused(f"S:\n  ServiceArgs: {text}", graph={"S": Plain})[0].startswith(f"configs/agg.yaml:2 {message}")


def test_no_workers_has_a_hint_of_its_own():
    assert (
        refused("S: {ServiceArgs: {workers: 0}}", graph={"S": Plain})[1] == "to start none here: --depends S=elsewhere"
    )
    assert refused("S: {ServiceArgs: {workers: -1}}", graph={"S": Plain})[1] == "give an int of at least 1"
