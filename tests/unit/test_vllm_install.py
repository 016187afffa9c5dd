"""Engines and their flags on a machine without vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from components.worker import VllmWorker
from dynamo import engines
from dynamo.engines.vllm.install import engine_arguments, unverifiable_flags
from dynamo.errors import StartError


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    engine_arguments.cache_clear()
    yield
    engine_arguments.cache_clear()


@pytest.mark.usefixtures("without_vllm")
def test_vllm_engine_without_vllm_is_an_error() -> None:
    with pytest.raises(StartError, match="vLLM is not installed") as caught:
        engines.create("vllm", "dynamo-tiny", {}, lambda _: None)
    assert "mock" in (caught.value.hint or "")


def test_failed_import_of_vllm_is_reported_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    engine = engines.create("vllm", "dynamo-tiny", {}, lambda _: None)
    monkeypatch.setattr("dynamo.engines.vllm.options.set_environment", lambda: None)
    monkeypatch.setattr("dynamo.engines.vllm.engine.importlib.import_module", broken)
    with pytest.raises(StartError, match=r"vLLM cannot be imported: libcudart\.so\.13"):
        engine.start().send(None)


@pytest.mark.usefixtures("without_vllm")
def test_flags_that_cannot_be_verified_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    VllmWorker(engine="mock", **{"max-num-seqs": 4, "no-enable-prefix-caching": True, "modl": "x"})
    assert "cannot validate flag modl" in caplog.text


def test_no_flag_is_unverifiable_with_vllm() -> None:
    assert unverifiable_flags(["modl"]) == []
