"""The house keeps its floors: who may import whom, and what must not be loaded by whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    {"errors", "log"},
    {"transport", "kv", "llm", "wire"},
    {"sdk", "runtime", "http", "config"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(FLOORS) for part in parts}
NEIGHBOURS_APART = [{"sdk", "runtime"}]
ONLY_IN = {
    "grpc": "dynamo/transport/etcd_cluster.py",
    "aetcd": "dynamo/transport/etcd_cluster.py",
    "nats": "dynamo/transport/nats_py.py",
    "vllm": ("dynamo/llm/engines/vllm", "dynamo/llm/engines/kv_transfer/connector.py"),
    "fastapi": "dynamo/http/",
    "uvicorn": "dynamo/http/",
    "starlette": "dynamo/http/",
}
HEAVY = {"torch", "vllm", "grpc", "fastapi", "transformers"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, wherever it stands; `from a import b` gives both `a` and `a.b`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) + 1 - node.level], node.module or ""] if node.level else [node.module or ""]
            )
            yield node.lineno, base.rstrip(".")
            yield from ((node.lineno, f"{base.rstrip('.')}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def found(folder: str) -> list[tuple[str, str, int, str]]:
    """(part of dynamo, file, line, module) of every import below a folder."""
    result = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        part = name.split("/")[1].removesuffix(".py")
        result += [(part, name, line, module) for line, module in imports(path)]
    return result


def test_every_part_has_a_floor() -> None:
    parts = {part for part, *_ in found("dynamo")} - {"__init__"}
    assert parts <= LEVEL.keys()


def test_nobody_imports_upwards() -> None:
    wrong = []
    for part, name, line, module in found("dynamo"):
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if top != "dynamo" or target not in LEVEL or part == target or part == "__init__":
            continue
        if LEVEL[target] > LEVEL[part] or {part, target} in NEIGHBOURS_APART or LEVEL[target] == LEVEL[part] == 0:
            wrong.append(f"{name}:{line}: {part} imports {module}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("dynamo", {"components", "graphs", "tests"}),
        ("components", {"graphs", "tests"}),
        ("graphs", {"dynamo", "tests"}),
    ],
)
def test_nobody_below_knows_who_is_above(folder: str, forbidden: set[str]) -> None:
    wrong = [f"{name}:{line}: {module}" for _, name, line, module in found(folder) if module.split(".")[0] in forbidden]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["dynamo", "components", "graphs"])
def test_one_heavyweight_one_file(folder: str) -> None:
    wrong = []
    for _, name, line, module in found(folder):
        place = ONLY_IN.get(module.split(".")[0])
        if place is not None and not name.startswith(place):
            wrong.append(f"{name}:{line}: {module} belongs in {place}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def loaded(program: str) -> set[str]:
    """The heavyweights in sys.modules at the end of a program that runs in the repository's root."""
    program += f"\nimport sys\nprint('LOADED', *sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_the_sdk_is_light() -> None:
    assert loaded("import dynamo.sdk") == set()


def test_a_dry_run_is_light() -> None:
    assert (
        loaded(
            "from dynamo.cli.main import main\n"
            "import sys\n"
            "sys.argv = 'dynamo serve graphs.agg:Frontend -f configs/agg.yaml --dry-run'.split()\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        )
        == set()
    )
