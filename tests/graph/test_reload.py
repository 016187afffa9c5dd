"""`dynamo serve --reload`: a service restarts when its source is edited, and only that one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.served import Start

GREETER = """
from dynamo.sdk import Service, async_on_start, endpoint, service


@service
class Greeter(Service):
    @async_on_start
    def hello(self) -> None:
        print("greeting is {greeting}", flush=True)

    @endpoint
    async def greet(self, name: str) -> str:
        return "{greeting} " + name
"""
CALLER = """
from dynamo.sdk import Service, depends, service
from greeter import Greeter


@service
class Caller(Service):
    greeter = depends(Greeter)
"""
LONER = """
from dynamo.sdk import Service, service


@service
class Loner(Service):
    pass
"""
GRAPH = """
from caller import Caller
from dynamo.sdk import Service, depends, service
from loner import Loner


@service
class Top(Service):
    caller = depends(Caller)
    loner = depends(Loner)
"""


def test_the_edited_service_restarts(serve_graph: Start, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    greeter = project / "greeter.py"
    greeter.write_text(GREETER.replace("{greeting}", "good morning"))
    for name, text in (("caller", CALLER), ("loner", LONER), ("graph", GRAPH)):
        (project / f"{name}.py").write_text(text)
    served = serve_graph("--reload", "--working-dir", str(project), graph="graph:Top")
    served.wait_for(re.compile("^ready in", re.MULTILINE), 30)
    assert "greeting is good morning" in served.output

    before = len(served.output)
    greeter.write_text(GREETER.replace("{greeting}", "good evening to you"))
    served.wait_for("greeting is good evening to you", 20, after=before)
    served.wait_for("Greeter ready again", 20, after=before)

    before = len(served.output)
    greeter.write_text("this is not Python")
    served.wait_for("edit a file to try again", 20, after=before)
    greeter.write_text(GREETER.replace("{greeting}", "good night"))
    served.wait_for("greeting is good night", 20, after=before)
    served.wait_for("Greeter ready again", 20, after=before)
    assert served.stop() == 0
