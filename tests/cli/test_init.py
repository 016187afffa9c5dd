"""`dynamo init`: its project runs and passes its own tests, with dynamo installed from a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dynamo.cli.init import FILES, MARK, project
from tests.cli.terminal import command, environment


def test_a_project_from_the_wheel_passes_its_own_tests(wheel: Path, tmp_path: Path):
    env = {"PYTHONPATH": str(wheel), "TMPDIR": str(tmp_path)}
    made = command("init", "parrot_2", cwd=tmp_path, **env)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.endswith("next: cd parrot_2 && dynamo serve graph:Frontend -f config.yaml\n")
    directory = tmp_path / "parrot_2"
    assert {path.name for path in directory.iterdir()} == set(FILES)
    shown = "import dynamo, sys; sys.exit(dynamo.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", shown], cwd=directory, env=environment(**env), capture_output=True, text=True
    )
    assert where.stderr.startswith(str(wheel))
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"],
        cwd=directory,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "3 passed" in tests.stdout
    dry = command("serve", "graph:Frontend", "-f", "config.yaml", "--dry-run", cwd=directory, **env)
    assert dry.returncode == 0, dry.stderr


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    assert command("init", "mine", cwd=tmp_path).returncode == 0  # an existing directory that is empty
    (tmp_path / "mine" / "graph.py").write_text("# mine\n")
    (tmp_path / "file").touch()
    for name in ("mine", "file"):
        result = command("init", name, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {name} exists, and nothing is overwritten\nhint: ")
    assert (tmp_path / "mine" / "graph.py").read_text() == "# mine\n"


@pytest.mark.parametrize("name", ["", "9lives", "a b", "a/b", "../up", "a.b", "é", "x" * 51, "-x"])
def test_invalid_names_are_rejected(name, tmp_path: Path):
    result = command("init", "--", name, cwd=tmp_path)
    assert result.returncode == 1
    error, hint = result.stderr.splitlines()
    assert error.endswith("cannot be the name of a project")
    assert hint.startswith("hint: use letters")
    assert list(tmp_path.iterdir()) == []


def test_a_project_does_not_depend_on_the_repository():
    files = project("parrot")
    for text in files.values():
        assert MARK not in text
        assert "components" not in text
        assert max(map(len, text.splitlines())) <= 126
    for name in ("component.py", "graph.py", "test_graph.py"):
        compile(files[name], name, "exec")


def test_a_directory_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    result = command("init", "link", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
