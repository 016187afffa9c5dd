"""Whose code runs: a user's folders come before those of this project and of installed packages, file by file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from tests.cli.terminal import ROOT, environment
from tests.conftest import Installed

GRAPH = "from components.front import Front\nfrom components.worker import Worker\n\nFront.link(Worker)\n"
FRONT = """
from components.worker import Worker
from dynamo.sdk import depends, service
from utils.protocol import Text

@service
class Front:
    worker = depends(Worker)
"""
WORKER = """
from dynamo.sdk import service

@service
class Worker: ...
"""
FILES = {
    "graphs/agg.py": GRAPH,
    "components/front.py": FRONT,
    "components/worker.py": WORKER,  # ours has a module of this name too
    "utils/protocol.py": "Text = str\n",
}
MODULES = {file.removesuffix(".py").replace("/", "."): file for file in FILES}


def write(directory: Path, files: dict[str, str], *, packages: bool = False) -> Path:
    for file, text in files.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if packages:
            path.parent.joinpath("__init__.py").touch()
    return directory


@pytest.fixture(scope="module")
def python(installed: Installed) -> str:
    """A Python with dynamo from a wheel, and with packages called as a user's folders are."""
    unwanted = "raise AssertionError('an installed module was imported')\n"
    files = {"graphs/agg.py": unwanted, "components/worker.py": unwanted, "utils/other.py": unwanted}
    write(installed.site, files, packages=True)
    return installed.python


@pytest.fixture(params=["editable", "PYTHONPATH", "wheel"])
def layout(request: pytest.FixtureRequest, python: str) -> tuple[str, dict[str, str]]:
    """Python, and its environment: ours on the path's end as `pip install -e` puts it, before it as run.sh does, or not."""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    if request.param == "wheel":
        return python, env
    return sys.executable, env | ({"PYTHONPATH": str(ROOT)} if request.param == "PYTHONPATH" else {})


def dry_run(
    layout: tuple[str, dict[str, str]], cwd: Path, *arguments: str, graph: str = "graphs.agg:Front"
) -> subprocess.CompletedProcess[str]:
    python, env = layout
    words = [python, "-m", "dynamo", "serve", graph, "--dry-run", "--explain", "json", *arguments]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def modules(ran: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stderr)["modules"]
    return found


@pytest.mark.parametrize("packages", [False, True], ids=["folders", "packages"])
def test_the_working_directory_wins(layout: tuple[str, dict[str, str]], tmp_path: Path, packages: bool) -> None:
    write(tmp_path, FILES, packages=packages)
    expected = {name: str(tmp_path / file) for name, file in MODULES.items()}
    found = modules(dry_run(layout, tmp_path))
    assert {name: found[name] for name in expected} == expected
    assert {file for file in found.values() if not file.endswith("/__init__.py")} == set(expected.values())
    other = tmp_path / "other"
    other.mkdir()
    assert modules(dry_run(layout, other, "--working-dir", "..")) == found


def test_a_plain_folder_called_dynamo_adds_modules(layout: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """As packages of forks of ai-dynamo, whose `dynamo` was such a folder; one is installed with `pip install -e`."""
    unwanted = "raise AssertionError('it hides a module of this project')\n"
    front = f"{FRONT}from dynamo.pools import size\nfrom dynamo.scheduling.rules.first import rule\n"
    write(tmp_path, {**FILES, "components/front.py": front, "dynamo/pools.py": "size = 1\n", "dynamo/sdk.py": unwanted})
    write(tmp_path, {"src/dynamo/scheduling/rules/first.py": "rule = 1\n", "src/dynamo/llm/__init__.py": unwanted})
    python, env = layout
    path = f"{tmp_path}/src:{env.get('PYTHONPATH', '')}".rstrip(":")
    found = modules(dry_run((python, env | {"PYTHONPATH": path}), tmp_path))
    assert {name: file for name, file in found.items() if name.startswith("dynamo")} == {
        "dynamo.pools": f"{tmp_path}/dynamo/pools.py",
        "dynamo.scheduling.rules.first": f"{tmp_path}/src/dynamo/scheduling/rules/first.py",
    }


@pytest.mark.parametrize("packages", [False, True], ids=["folders", "packages"])
def test_a_folder_of_pythonpath_wins_over_what_comes_later(tmp_path: Path, packages: bool) -> None:
    mine = write(tmp_path / "mine", FILES, packages=packages)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    env = environment(PYTHONPATH=f"../mine:{ROOT}")
    found = modules(dry_run((sys.executable, env), cwd))
    assert {name: found[name] for name in MODULES} == {name: str(mine / file) for name, file in MODULES.items()}


def test_the_working_directory_wins_wherever_it_is_in_pythonpath(tmp_path: Path) -> None:
    mine, other = write(tmp_path / "mine", FILES), write(tmp_path / "other", FILES, packages=True)
    found = modules(dry_run((sys.executable, environment(PYTHONPATH=f"{other}:{mine}")), mine))
    assert {name: found[name] for name in MODULES} == {name: str(mine / file) for name, file in MODULES.items()}


@pytest.mark.parametrize("packages", [False, True], ids=["folders", "packages"])
@pytest.mark.parametrize("path", [None, str(ROOT)], ids=["editable", "PYTHONPATH"])
def test_a_module_that_the_user_lacks_is_ours_and_is_named(tmp_path: Path, packages: bool, path: str | None) -> None:
    """A graph over our Frontend and Processor with a worker of its own."""
    graph = (ROOT / "graphs/agg.py").read_text()
    worker = (ROOT / "components/worker.py").read_text()
    write(tmp_path, {"graphs/agg.py": graph, "components/worker.py": worker}, packages=packages)
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    ran = dry_run((sys.executable, env | ({"PYTHONPATH": path} if path else {})), tmp_path, graph="graphs.agg:Frontend")
    assert ran.returncode == 0, ran.stderr
    notice, _, explained = ran.stderr.partition("\n")
    found = json.loads(explained)["modules"]
    assert found["graphs.agg"] == str(tmp_path / "graphs/agg.py")
    assert found["components.worker"] == str(tmp_path / "components/worker.py")
    ours = {name: file for name, file in found.items() if file.startswith(f"{ROOT}/")}
    assert {"components.frontend", "components.processor"} <= ours.keys()
    named = ", ".join(f"{name} from {file}" for name, file in ours.items())
    assert notice == f"warning: not in the folders of {tmp_path}, so taken from elsewhere: {named}"


def test_a_graph_alone_uses_our_components_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {"graphs/mine.py": (ROOT / "graphs/agg.py").read_text()})
    found = modules(dry_run((sys.executable, environment()), tmp_path, graph="graphs.mine:Frontend"))
    assert found["graphs.mine"] == str(tmp_path / "graphs/mine.py")
    assert found["components.frontend"] == str(ROOT / "components/frontend.py")


def test_nested_folders_join_ours(tmp_path: Path) -> None:
    files = {
        "graphs/deep/agg.py": "from components.parts.worker import Worker\nfrom components.text import short\n",
        "components/parts/worker.py": WORKER,
        "components/text.py": "from .parts import worker\nshort = worker.__name__\n",
    }
    write(tmp_path, files)
    found = modules(dry_run((sys.executable, environment()), tmp_path, graph="graphs.deep.agg:Worker"))
    assert set(found.values()) == {str(tmp_path / file) for file in files}


def test_a_folder_does_not_get_in_the_way_of_an_installed_package(tmp_path: Path) -> None:
    """The folder `jinja2`, a clone or just of that name: its modules are the user's, the package's are its own."""
    graph = "import jinja2\nimport jinja2.mine\nassert jinja2.Template('a').render() == 'a'\n" + WORKER
    write(tmp_path, {"graph.py": graph, "jinja2/mine.py": "", "jinja2/nodes.py": "raise AssertionError\n"})
    found = modules(dry_run((sys.executable, environment()), tmp_path, graph="graph:Worker"))
    assert found == {"graph": str(tmp_path / "graph.py"), "jinja2.mine": str(tmp_path / "jinja2/mine.py")}


def test_the_table_shows_each_module(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    words = [sys.executable, "-m", "dynamo", "serve", "graphs.agg:Front", "--dry-run"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    table = ran.stderr.split("Where each module comes from:\n")[1]
    assert dict(line.split() for line in table.splitlines()) == MODULES


TWO = {
    "a module and a package": (
        {"graphs/agg.py": GRAPH, "graphs/agg/__init__.py": ""},
        "graphs.agg is two things in {here}: graphs/agg.py and graphs/agg/__init__.py",
    ),
    "a module and a folder above the graph": (
        {"graphs.py": "", "graphs/agg.py": WORKER},
        "graphs is two things in {here}: graphs.py and graphs",
    ),
    "in what the graph imports": (
        {**FILES, "components/worker/__init__.py": ""},
        "components.worker is two things in {here}: components/worker.py and components/worker/__init__.py",
    ),
}


@pytest.mark.parametrize("case", TWO)
def test_two_answers_are_refused(case: str, tmp_path: Path) -> None:
    files, message = TWO[case]
    write(tmp_path, files)
    ran = dry_run((sys.executable, environment()), tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"error: {message.format(here=tmp_path)}\nhint: rename one of them\n"


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"click.py": WORKER})
    ran = dry_run((sys.executable, environment()), tmp_path, graph="click:Worker")
    assert ran.returncode == 1
    taken = f"graph module 'click' is {tmp_path}/click.py, but {click.__file__} has been imported under that name"
    assert ran.stderr == f"error: {taken}\nhint: rename it, or name the file: click.py\n"
    found = modules(dry_run((sys.executable, environment()), tmp_path, graph="click.py:Worker"))
    assert str(tmp_path / "click.py") in found.values()


def test_a_folder_with_a_name_of_the_standard_library_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"email/deep/graph.py": WORKER})
    ran = dry_run((sys.executable, environment()), tmp_path, graph="email.deep.graph:Worker")
    assert ran.returncode == 1
    fact, hint = ran.stderr.splitlines()
    assert fact == "error: graph module 'email.deep.graph' not found: email is Python's own"
    assert hint == "hint: rename email, or name the file: email/deep/graph.py"
    found = modules(dry_run((sys.executable, environment()), tmp_path, graph="email/deep/graph.py:Worker"))
    assert str(tmp_path / "email/deep/graph.py") in found.values()


def test_the_current_directory_is_not_imported_from_beside_a_working_directory(tmp_path: Path) -> None:
    """A service process, which runs in the working directory, would not find the module either."""
    write(tmp_path, {"mine/graph.py": "import helper\n" + WORKER, "helper.py": ""})
    ran = dry_run((sys.executable, environment()), tmp_path, "--working-dir", "mine", graph="graph:Worker")
    assert ran.returncode == 1
    assert "it needs module 'helper', which is not installed" in ran.stderr


@pytest.mark.parametrize(
    ("line", "fact", "hint"),
    [
        (
            "import yaml.patched",
            "it needs module 'yaml.patched', which does not exist",
            "look for it in yaml; ",
        ),
        (
            "from yaml import Patched",
            "{here}/components/worker.py:1: cannot import name 'Patched' from 'yaml' ({yaml})",
            "",
        ),
    ],
)
def test_a_component_that_cannot_be_imported_has_a_stand_in(line: str, fact: str, hint: str, tmp_path: Path) -> None:
    """As components do that were written for a patched engine."""
    write(tmp_path, {**FILES, "components/worker.py": f"{line}\n{WORKER}"})
    ran = dry_run((sys.executable, environment()), tmp_path)
    assert ran.returncode == 1
    error, shown = ran.stderr.splitlines()
    fact = fact.format(here=tmp_path, yaml=yaml.__file__)
    assert error == f"error: graph module 'graphs.agg' cannot be imported: {fact}"
    assert shown == f"hint: {hint}without {tmp_path}/components, {ROOT}/components would be used"
