"""The house keeps its floors: which room may import which, no import circle, and what must not be loaded by whom.

ARCHITECTURE.md draws the same plan.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    {"errors", "context", "environment", "text", "streams", "codec", "log", "prctl", "tasks"},
    {"config", "transport"},
    {"sdk", "rpc"},
    {"kv_router", "llm", "http"},
    {"engines", "openai"},
    {"worker"},
    {"launcher"},
    {"cli"},
    {"compat", "testing", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
APART = [{"sdk", "rpc"}, {"engines", "openai"}]
"""A declaration and a running process do not import each other; the worker joins them."""
COMPAT = ("dynamo.compat", "dynamo.runtime", "dynamo.sdk.compat", "dynamo.sdk.lib", "dynamo.sdk.core", "dynamo.sdk.cli")
"""What exists for ai-dynamo 0.1 to 0.3 alone: over everything else, and imported by nothing but the door below."""
DOORS = {"dynamo/sdk/__init__.py": "compat", "dynamo/llm/__init__.py": "compat"}
"""`from dynamo.sdk import dynamo_context` and `from dynamo.llm import register_llm`, as 0.x wrote it."""
ONLY_IN = {
    "grpc": "dynamo/transport/etcd_cluster.py",
    "aetcd": "dynamo/transport/etcd_cluster.py",
    "nats": "dynamo/transport/nats_import.py",
    "vllm": ("dynamo/engines/vllm/", "dynamo/engines/kv_transfer/connector.py"),
    "fastapi": ("dynamo/http/", "dynamo/openai/"),
    "uvicorn": "dynamo/http/",
    "starlette": ("dynamo/http/", "dynamo/openai/"),
}
HEAVY = {"torch", "vllm", "grpc", "fastapi", "transformers"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in (ROOT / "dynamo").rglob("*.py")}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import of a file, wherever it stands; `from a import b` gives `a.b` and `a`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) + 1 - node.level], node.module or ""] if node.level else [node.module or ""]
            ).rstrip(".")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in inner)
            if base not in MODULES or not all(name in MODULES for name in inner):  # something of the module itself
                yield node.lineno, base
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def found(folder: str) -> list[tuple[Path, int, str]]:
    """(file, line, module) of every import below a folder."""
    return [(path, *item) for path in sorted((ROOT / folder).rglob("*.py")) for item in imports(path)]


def room_of(module: str) -> str:
    if module.startswith("dynamo.sdk.testing"):
        return "testing"
    if module.startswith(COMPAT):
        return "compat"
    return [*module.split("."), ""][1]


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} - {""} == LEVEL.keys()


def test_no_room_imports_upwards() -> None:
    wrong = []
    for path, line, module in found("dynamo"):
        name, room, target = str(path.relative_to(ROOT)), room_of(module_name(path)), room_of(module)
        if module.split(".")[0] != "dynamo" or target not in LEVEL or room in (target, "") or DOORS.get(name) == target:
            continue
        if LEVEL[target] > LEVEL[room] or {room, target} in APART:
            wrong.append(f"{name}:{line}: {room} imports {module}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                result.append(sorted(component))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return result


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"d"}}) == [["a", "b", "c"]]


def test_no_import_circle() -> None:
    """Between modules, imports inside functions and for type checkers included, and between rooms."""
    modules: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for path, _, module in found("dynamo"):
        source, name = module_name(path), str(path.relative_to(ROOT))
        target = module if module in MODULES else module.rpartition(".")[0]
        if target not in MODULES or target == source or DOORS.get(name) == room_of(target):
            continue
        modules.setdefault(source, set()).add(target)
        if "" not in (room_of(source), room_of(target)):
            rooms.setdefault(room_of(source), set()).add(room_of(target))
    assert circles(modules) == []
    assert circles(rooms) == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("dynamo", {"components", "graphs", "tests", "benchmarks"}),
        ("components", {"graphs", "tests", "benchmarks"}),
        ("graphs", {"dynamo", "tests", "benchmarks"}),
    ],
)
def test_the_framework_does_not_know_its_users(folder: str, forbidden: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path, line, module in found(folder)
        if module.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["dynamo", "components", "graphs"])
def test_one_heavyweight_one_file(folder: str) -> None:
    wrong = []
    for path, line, module in found(folder):
        place, name = ONLY_IN.get(module.split(".")[0]), str(path.relative_to(ROOT))
        if place is not None and not name.startswith(place):
            wrong.append(f"{name}:{line}: {module} belongs in {place}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def loaded(program: str) -> set[str]:
    """Return the heavyweights in sys.modules at the end of a program that runs in the repository's root."""
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
