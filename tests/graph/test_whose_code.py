"""Each process of a graph runs the files that the dry run shows, although another package on the path has their names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.terminal import COMMAND, environment
from tests.served import ROOT, Start

RECORD = """
import os as _os
with open(_os.environ["RECORD"], "a") as _record:
    print(__name__, __file__, file=_record)
"""
SPAWN = """
from dynamo.sdk import Service, async_on_start, service
from components.helper import where
import multiprocessing

@service
class Parent(Service):
    @async_on_start
    def ask_a_child(self) -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print("the child's file is " + pool.apply(where), flush=True)
"""
HELPER = "def where() -> str:\n    return __file__\n"
CONFIG = str(ROOT / "configs/agg_mock.yaml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A graph with a worker of its own in plain folders; our Frontend and Processor serve it."""
    made = tmp_path / "project"
    for file in ("graphs/agg.py", "components/worker.py"):
        text = (ROOT / file).read_text()
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_text(text.replace('\nif __name__ == "__main__"', f'{RECORD}\nif __name__ == "__main__"'))
    with (made / "graphs/agg.py").open("a") as graph:
        graph.write(RECORD)
    for file in ("graphs/agg.py", "components/worker.py", "components/helper.py"):
        other = tmp_path / "other" / file
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("raise AssertionError('of another project')\n")
        (other.parent / "__init__.py").touch()
    return made


def variables(project: Path) -> dict[str, str]:
    """The environment: another project's packages come before ours; a relative path, as typed in the project."""
    return environment(PYTHONPATH=f"../other:{ROOT}", RECORD=str(project.parent / "record"))


def record(project: Path) -> list[tuple[str, str]]:
    path = project.parent / "record"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(name, file) for name, _, file in (line.partition(" ") for line in lines)]


def test_all_processes_run_what_the_dry_run_shows(serve_graph: Start, project: Path) -> None:
    env = variables(project)
    words = ["serve", "graphs.agg:Frontend", "-f", CONFIG, "--dry-run", "--explain", "json"]
    dry = subprocess.run([*COMMAND, *words], cwd=project, env=env, capture_output=True, text=True, check=True)
    modules = json.loads(dry.stderr.partition("\n")[2])["modules"]
    expected = {name: str(project / file) for name, file in _mine().items()}
    assert modules | expected == modules
    record(project)
    served = serve_graph("-f", CONFIG, "--reload", cwd=project, env=env).ready()
    ran = record(project)
    assert len(ran) == 2 * (1 + len(served.pids("dynamo.worker.process")))
    assert set(ran) == set(expected.items())

    before = len(served.output)
    with (project / "components/worker.py").open("a") as worker:
        worker.write("# edited\n")
    for name in ("VllmWorker", "Processor", "Frontend"):  # all of them import it
        served.wait_for(f"{name} ready again", 30, after=before)
    assert record(project)
    answer = served.client().chat.completions.create(model="dynamo-tiny", messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content
    assert served.stop() == 0


def _mine() -> dict[str, str]:
    return {"graphs.agg": "graphs/agg.py", "components.worker": "components/worker.py"}


def test_processes_of_another_directory_run_the_same_files(serve_graph: Start, project: Path) -> None:
    """PYTHONPATH's relative folder is that of the command, not of the working directory."""
    env = variables(project)
    lib = project.parent / "command" / "lib"
    lib.mkdir(parents=True)
    (lib / "extra.py").write_text(RECORD)
    with (project / "graphs/agg.py").open("a") as graph:
        graph.write("import extra\n")
    arguments = ("-f", CONFIG, "--working-dir", str(project))
    served = serve_graph(*arguments, cwd=lib.parent, env=env | {"PYTHONPATH": f"lib:../other:{ROOT}"}).ready()
    assert set(record(project)) == {(name, str(project / file)) for name, file in _mine().items()} | {
        ("extra", str(lib / "extra.py"))
    }
    assert served.stop() == 0


def test_a_package_beside_ours_may_be_called_dynamo_x(tmp_path: Path) -> None:
    """As those of ai-dynamo, whose `dynamo` had no code of its own."""
    package = tmp_path / "src/dynamo/beside"
    package.mkdir(parents=True)
    (package / "graph.py").write_text(
        "from dynamo.sdk import Service, service\n\n@service\nclass Beside(Service):\n    pass\n"
    )
    (package.parent / "errors.py").write_text("raise AssertionError('ours comes first')\n")
    command = [*COMMAND, "serve", "dynamo.beside.graph:Beside", "--dry-run"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=f"src:{ROOT}"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--service-name Beside" in run.stderr


def test_dynamo_run_starts_the_users_graph(project: Path) -> None:
    words = ["run", "graphs.agg:Frontend", "-f", CONFIG, "Hello"]
    ran = subprocess.run(
        [*COMMAND, *words], cwd=project, env=variables(project), capture_output=True, text=True, timeout=90
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert set(record(project)) == {(name, str(project / file)) for name, file in _mine().items()}


def test_one_service_by_python_m_is_the_users(project: Path) -> None:
    """No NATS is there for it: it ends when the graph is loaded."""
    env = variables(project) | {"PYTHONPATH": str(ROOT), "NATS_SERVER": "nats://127.0.0.1:9"}
    words = [sys.executable, "-m", "components.worker", "-f", CONFIG]
    ran = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "127.0.0.1:9" in ran.stderr
    assert {file for _, file in record(project)} == {str(project / "components/worker.py")}


def test_children_of_a_service_import_the_same_files(serve_graph: Start, project: Path) -> None:
    (project / "components/parent.py").write_text(SPAWN)
    (project / "components/helper.py").write_text(HELPER)
    served = serve_graph(graph="components.parent:Parent", cwd=project, env=variables(project))
    served.wait_for(re.compile("^ready in", re.MULTILINE), 60)
    assert f"the child's file is {os.path.join(project, 'components/helper.py')}\n" in served.output
    assert served.stop() == 0
