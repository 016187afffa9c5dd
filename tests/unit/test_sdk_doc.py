"""The Python of docs/sdk.md runs: the blocks below one heading are one file, and its `test_` functions are run."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dynamo.sdk
import dynamo.sdk.testing
from dynamo.errors import NoInstancesError, OverloadedError
from dynamo.sdk import bind
from dynamo.sdk.testing import TestGraph, lose, pool

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"
TEXT = PAGE.read_text("utf-8")


def files() -> dict[str, str]:
    """Return heading -> Python below it. Lines keep the numbers that they have in the page, for tracebacks."""
    found: dict[str, list[str]] = {}
    heading, inside = "", False
    for number, line in enumerate(TEXT.splitlines()):
        if line.startswith("```"):
            inside = line == "```python"
        elif line.startswith("## ") and not inside:
            heading = line.removeprefix("## ")
        elif inside:
            lines = found.setdefault(heading, [])
            lines += [""] * (number - len(lines)) + [line]
    return {heading: "\n".join(lines) + "\n" for heading, lines in found.items()}


FILES = files()
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import the Python below a heading as a module."""

    def load(heading: str) -> ModuleType:
        name = "guide_" + re.sub(r"\W+", "_", heading.lower()).strip("_")
        path = tmp_path / f"{name}.py"
        path.write_text(FILES[heading], "utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("heading", FILES)
def test_the_blocks_below_a_heading_are_a_module(heading: str, load: Load) -> None:
    module = load(heading)
    for name, function in vars(module).items():
        if name.startswith("test_"):
            asyncio.run(function(**_arguments(function)))


def _arguments(function: Any) -> dict[str, Any]:
    """Return the first case of a parametrized test."""
    return {mark.args[0]: mark.args[1][0] for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"}


def test_every_name_of_the_sdk_is_mentioned() -> None:
    names = [*dynamo.sdk.__all__, *dynamo.sdk.testing.__all__]
    assert [name for name in names if not re.search(rf"\b{name}\b", TEXT) and name != "InstanceCall"] == []


async def test_services_and_endpoints(load: Load) -> None:
    page = load("Services and endpoints")
    async with TestGraph(page.Reader) as graph, graph.http() as http:
        answer = await http.post("/read", content=b'{"text": "a graph is a set of services"}')
        assert answer.json() == {"words": 7, "first": ["a", "graph", "is"]}
    desk = pool(page.Desk())
    assert await desk.distance(page.Point(3, 4)) == 5
    assert await desk.order(page.Order(amount=1)) == page.Order(amount=2)


async def test_dependencies(load: Load) -> None:
    page = load("Dependencies and links")
    async with TestGraph(page.Entry) as graph:
        assert await graph.client(page.Entry).run("a") == "A"


async def test_http(load: Load) -> None:
    page = load("HTTP: `@api`")
    async with TestGraph(page.Chat) as graph, graph.http() as http:
        assert (await http.post("/ask", json={"text": "abc"})).json() == {"answer": "cba"}
        refused = await http.post("/ask", json={"text": ""})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text")
        assert (await http.get("/items/4")).json() == 4
        assert (await http.post("/count", json={"to": 2})).text == 'data: {"n":0}\n\ndata: {"n":1}\n\n'


async def test_hooks(load: Load) -> None:
    page = load("Hooks")
    async with TestGraph(page.Model) as graph:
        (model,) = graph.instances(page.Model)
        assert model.loaded
    assert not model.loaded


async def test_settings(load: Load) -> None:
    page = load("Settings")
    config = {"Store": {"path": "/data", "order": "lifo", "cache-size": 10}}
    async with TestGraph(page.Store, config) as graph:
        assert await graph.client(page.Store).first(["a", "b"]) == "b"
        assert graph.instances(page.Store)[0].options == {"cache-size": 10}
    with pytest.raises(page.ConfigError, match=r"config:2 Store.cache-size: expected 0 or more"):
        TestGraph(page.Store, {"Store": {"cache-size": -1, "path": ""}})


async def test_choosing(load: Load) -> None:
    page = load("Choosing an instance")
    async with TestGraph(page.Front, {"Worker": {"ServiceArgs": {"workers": 3}}}) as graph:
        assert [word async for word in graph.client(page.Front).ask(page.Prompt("Ada", "to be"))] == ["to", "be"]
    router = page.Router()
    workers = pool(page.Worker(), page.Worker())
    bind(router, worker=workers)
    assert await router.route(page.Prompt("Ada", "")) in (1, 2)
    lose(workers, 1)
    lose(workers, 2)
    with pytest.raises(NoInstancesError):
        await router.route(page.Prompt("Ada", ""))


async def test_channels(load: Load) -> None:
    page = load("Channels")
    async with TestGraph(page.Display) as graph, asyncio.timeout(5):
        (station,) = graph.instances(page.Station)
        display = graph.client(page.Display)
        await graph.client(page.Station).measure("roof")
        assert await display.value("roof") == 20.5
        await display.order(1)
        await display.order(2)
        while station.done != [1, 2]:
            await asyncio.sleep(0)


async def test_streams(load: Load) -> None:
    page = load("Streams")
    async with TestGraph(page.Sink) as graph:
        sink = graph.client(page.Sink)
        assert [n async for n in sink.doubled(3)] == [0, 2, 4]
        assert await sink.first(3) == [0, 1, 2]
        assert await sink.both(3) == [3, 15]


async def test_context(load: Load) -> None:
    page = load("Context and metrics")
    async with TestGraph(page.Greeter) as graph:
        assert (await graph.client(page.Greeter).greet("Ada")).startswith("Hello Ada from Greeter:1 of dynamo")


async def test_errors(load: Load) -> None:
    page = load("Errors")
    async with TestGraph(page.Desk) as graph, graph.http() as http:
        refused = await http.post("/book", json={"title": "Zoo"})
        expected = re.search(r"```json\n(.*)\n```", TEXT)
        assert expected is not None
        assert refused.status_code == 404
        assert refused.text.replace('":', '": ').replace(',"', ', "') == expected[1]
        busy = await http.post("/book", json={"title": "busy"})
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        assert busy.json()["error"]["code"] == OverloadedError.code
