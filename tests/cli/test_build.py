"""`dynamo build` with engines that record what they are given, and without any; the commands that exist no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo.cli.main import FORMER
from tests.cli.terminal import ROOT, command, environment

WORKER = """
from dynamo.sdk import service

@service
class Worker:
    def __init__(self, size: int = 1) -> None:
        from helper import deep
        from . import side
"""
FILES = {
    "graphs/mine.py": "from components.worker import Worker\n",
    "components/worker.py": WORKER,
    "components/side.py": "",
    "components/unused.py": "",
    "helper/__init__.py": "import yaml\n",
    "helper/deep.py": "",
    "configs/mine.yaml": "Worker:\n  size: 2\n",
    "prompts/a.txt": "hello\n",
    "prompts/__pycache__/a.pyc": "",
    "tests/test_mine.py": "",
}
PACKED = {
    "graphs/mine.py",
    "components/worker.py",
    "components/side.py",
    "helper/__init__.py",
    "helper/deep.py",
    "configs/mine.yaml",
}
BUILD = ("build", "graphs.mine:Worker", "-f", "configs/mine.yaml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for file, text in FILES.items():
        path = tmp_path / "project" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def engine(directory: Path, name: str, *, version: int = 0, build: int = 0) -> None:
    """Make a program that keeps its arguments and the context it gets; `version` and `build` are exit codes."""
    program = directory / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f'#!/bin/sh\n[ "$1" = version ] && exit {version}\n'
        f'printf "%s\\n" "$0" "$@" > {directory}/arguments\nfor last; do :; done\ncp -r "$last" {directory}/context\n'
        f"echo STEP 1\nexit {build}\n"
    )
    program.chmod(0o755)


def build(project: Path, *arguments: str, path: str = "/bin") -> subprocess.CompletedProcess[str]:
    """Run `dynamo build`; `path` holds the engines, and cp."""
    return command(*BUILD, *arguments, cwd=project, PATH=path)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def bin_(tmp_path: Path) -> Path:
    return tmp_path / "bin"


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_an_engine_builds_the_image(name: str, project: Path, bin_: Path) -> None:
    engine(bin_, name)
    ran = build(project, "--include", "prompts", "-t", "me/mine:1", "--base-image", "base:2", path=f"{bin_}:/bin")
    assert (ran.returncode, ran.stdout) == (0, "Successfully built me/mine:1.\n"), ran.stderr
    program, *arguments = (bin_ / "arguments").read_text().splitlines()
    context = arguments[-1]
    assert program.endswith(f"/{name}")
    assert arguments == ["build", "-t", "me/mine:1", "-f", f"{context}/Dockerfile", context]
    assert "STEP 1\n" in ran.stderr
    assert f"{'docker' if name == 'docker' else 'podman'} run " in ran.stderr.splitlines()[-1]
    assert files(bin_ / "context/src") == PACKED | {"prompts/a.txt"}
    assert not Path(context).exists()
    assert not (project / "build").exists()
    *_, start = (bin_ / "context/Dockerfile").read_text().splitlines()
    assert json.loads(start.removeprefix("CMD ")) == [
        "dynamo",
        "serve",
        "graphs.mine:Worker",
        "-f",
        "configs/mine.yaml",
    ]


def test_a_failed_build_keeps_the_context_and_says_how_to_repeat_it(project: Path, bin_: Path, tmp_path: Path) -> None:
    engine(bin_, "docker", build=3)
    ran = command(*BUILD, cwd=project, PATH=f"{bin_}:/bin", TMPDIR=str(tmp_path))
    assert (ran.returncode, ran.stdout) == (1, "")
    *_, error, hint = ran.stderr.splitlines()
    assert error == "error: docker build failed with exit code 3"
    context = Path(hint.rpartition(" ")[2])
    assert files(context / "src") == PACKED


def test_an_engine_that_does_not_answer_is_passed_over(project: Path, bin_: Path) -> None:
    engine(bin_, "docker", version=1)
    ran = build(project, path=f"{bin_}:/bin")
    assert ran.returncode == 0
    assert "no image: docker is installed but does not answer" in ran.stderr
    assert files(project / "build/graphs-mine/src") == PACKED
    engine(bin_, "podman")
    assert build(project, path=f"{bin_}:/bin").stdout == "Successfully built graphs-mine:latest.\n"


def test_without_an_engine_the_context_serves_the_graph(project: Path) -> None:
    (project / "requirements.txt").write_text("rich\n")
    ran = build(project, "--output", "out", path="/nowhere")
    assert (ran.returncode, ran.stdout) == (0, "")
    wrote, why, following = ran.stderr.splitlines()
    assert wrote == "wrote out: Dockerfile and 6 files of the graph"
    assert why == "no image: docker, podman and buildah were not found"
    assert following.startswith("next: docker build -t graphs-mine:latest out ")
    assert files(project / "out") == {f"src/{file}" for file in PACKED} | {"Dockerfile", "requirements.txt"}
    assert "requirements.txt" in (project / "out/Dockerfile").read_text()
    start = json.loads((project / "out/Dockerfile").read_text().splitlines()[-1].removeprefix("CMD "))
    dry = command(*start[1:], "--dry-run", cwd=project / "out/src")
    assert dry.returncode == 0, dry.stderr
    assert '"size": 2' in dry.stdout
    hadolint = [str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "warning", "--ignore", "DL3007"]
    checked = subprocess.run([*hadolint, project / "out/Dockerfile"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_what_serve_would_ignore_is_a_warning_here_too(project: Path) -> None:
    (project / "configs/mine.yaml").write_text("Worker: {size: 2}\nPlanner: {no-operation: true}\n")
    ran = build(project)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("warning: configs/mine.yaml:2 Planner: ignored: this graph has no such service")


def test_a_module_from_another_folder_is_packed_by_its_name(project: Path) -> None:
    """Our components, for a graph that uses them; what is installed is not packed."""
    (project / "graphs/agg.py").write_text((ROOT / "graphs/agg.py").read_text())
    (project / "components/worker.py").write_text((ROOT / "components/worker.py").read_text())
    ran = command("build", "graphs.agg:Frontend", "--no-containerize", "-o", "../out", cwd=project)
    assert ran.returncode == 0, ran.stderr
    packed = files(project.parent / "out/src")
    assert {"graphs/agg.py", "components/worker.py", "components/frontend.py", "components/processor.py"} <= packed
    assert {file.partition("/")[0] for file in packed} == {"graphs", "components"}


def test_an_earlier_context_is_replaced_and_nothing_else(project: Path) -> None:
    assert build(project, path="/nowhere").returncode == 0
    (project / "build/graphs-mine/src/old.py").touch()
    assert build(project, path="/nowhere").returncode == 0
    assert files(project / "build/graphs-mine/src") == PACKED
    ran = build(project, "-o", "prompts", path="/nowhere")
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (
        1,
        "error: prompts exists, and is no build context of dynamo",
    )
    assert build(project, "-o", "prompts", "--force", path="/nowhere").returncode == 0
    assert (project / "prompts/a.txt").exists()


WRONG = {
    "no engine": (["--containerize"], 1, "docker, podman and buildah were not found"),
    "a bad tag": (["-t", "A B"], 2, "Invalid value for '-t' / '--tag': 'A B' is not the name of an image"),
    "its own folder": (
        ["-o", ".", "--force"],
        2,
        "Invalid value for '-o' / '--output': the graph's own files are there",
    ),
    "push": (["--push"], 2, "there is no Dynamo Cloud to push to; push the image: docker push NAME:TAG"),
    "outside": (["--include", ".."], 1, "--include .. is not below {here}"),
    "a bad setting": (["-f", "bad.yaml"], 1, "bad.yaml:1 Worker.size: expected int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_writes_nothing(case: str, project: Path) -> None:
    arguments, code, message = WRONG[case]
    (project / "bad.yaml").write_text("Worker: {size: x}\n")
    ran = build(project, *arguments, path="/nowhere")
    assert (ran.returncode, ran.stdout) == (code, "")
    error, hint = ran.stderr.splitlines()
    assert error.startswith(f"error: {message.format(here=project)}")
    assert hint.startswith("hint: ")
    assert not (project / "build").exists()


@pytest.mark.parametrize("name", FORMER)
@pytest.mark.parametrize("arguments", [(), ("create", "a:1", "-n", "x", "--no-wait"), ("--help",)], ids=len)
def test_commands_of_ai_dynamo_name_what_to_use(name: str, arguments: tuple[str, ...]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "dynamo", name, *arguments], env=environment(), capture_output=True, text=True
    )
    error = f"error: ai-dynamo's command `dynamo {name}` does not exist here"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"{error}\nhint: {FORMER[name]}\n")
    assert f"  {name} " not in command("--help").stdout
