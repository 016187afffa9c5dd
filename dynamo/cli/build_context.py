"""The build context of `dynamo build`: a Dockerfile and the modules that a graph needs, as a folder."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.errors import ConfigError, DynamoError, GraphError
from dynamo.sdk import graph_import

SOURCES = "src"
DOCKERFILE = "Dockerfile"
REQUIREMENTS = "requirements.txt"
_MARK = "# packed by dynamo build\n"
_WORKDIR = "/workspace/graph"


@dataclass(frozen=True)
class Packed:
    """What goes into an image. `files`: path in the image's working directory -> file here."""

    spec: str
    base_image: str
    files: Mapping[Path, Path]
    config: Path | None
    requirements: Path | None

    def dockerfile(self) -> str:
        """Return the Dockerfile."""
        command = ["dynamo", "serve", self.spec, *(["-f", str(self.config)] if self.config is not None else [])]
        lines = [f"FROM {self.base_image}", f"LABEL dynamo.graph={json.dumps(self.spec)}"]
        if self.requirements is not None:
            lines += [
                "USER root",
                f"COPY {REQUIREMENTS} /tmp/{REQUIREMENTS}",
                f'RUN pip --python "$(command -v python)" install --no-cache-dir -r /tmp/{REQUIREMENTS}',
                "USER 1000:1000",
            ]
        lines += [f"WORKDIR {_WORKDIR}", f"COPY {SOURCES}/ ./", f"CMD {json.dumps(command)}"]
        return _MARK + "\n".join(lines) + "\n"

    def write(self, directory: Path, *, force: bool = False) -> None:
        """Write the context, in place of an earlier one. Raises ConfigError for a folder of something else."""
        dockerfile = directory / DOCKERFILE
        earlier = dockerfile.is_file() and dockerfile.read_text(errors="replace").startswith(_MARK)
        if not (force or earlier) and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(
                f"{directory} exists, and is no build context of dynamo",
                hint="choose another folder with --output, or pass --force",
            )
        try:
            if earlier:  # of something else nothing is deleted
                shutil.rmtree(directory / SOURCES, ignore_errors=True)
                (directory / REQUIREMENTS).unlink(missing_ok=True)
            for target, source in self.files.items():
                copy = directory / SOURCES / target
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
            if self.requirements is not None:
                shutil.copyfile(self.requirements, directory / REQUIREMENTS)
            dockerfile.write_text(self.dockerfile(), encoding="utf-8")
        except OSError as error:
            raise DynamoError(f"cannot write {error.filename or directory}: {error.strerror}") from None


def collect(
    spec: str, modules: Mapping[str, str], base_image: str, config: Path | None, extra: Sequence[Path], root: Path
) -> Packed:
    """Collect a graph's `modules`, what they import at any time, its configuration and `extra` files below `root`."""
    root = root.resolve()
    files: dict[Path, Path] = {}
    for name, file in _closure(modules).items():
        files[_place(name, Path(file), root)] = Path(file)
    place = None
    if config is not None:
        resolved = config.resolve()
        place = resolved.relative_to(root) if resolved.is_relative_to(root) else Path(config.name)
        files[place] = resolved
    for path in extra:
        below = path.resolve()
        if not below.is_relative_to(root):
            raise ConfigError(f"--include {path} is not below {root}", hint="run from a folder above it")
        found = [below] if below.is_file() else [file for file in sorted(below.rglob("*")) if _wanted(file)]
        files |= {file.relative_to(root): file for file in found}
    requirements = root / REQUIREMENTS
    return Packed(spec, base_image, files, place, requirements if requirements.is_file() else None)


def _wanted(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _place(name: str, file: Path, root: Path) -> Path:
    """Return where a module goes: where it is below the working directory, else by its name."""
    if file.is_relative_to(root):
        return file.relative_to(root)
    path = Path(*name.split("."))
    return path / file.name if file.stem == "__init__" else path.with_suffix(file.suffix)


def _closure(modules: Mapping[str, str]) -> dict[str, str]:
    """Return the modules and all that they import, also within functions, except what is installed; by name."""
    found: dict[str, str] = {}
    waiting = dict(modules)
    while waiting:
        name, file = waiting.popitem()
        found[name] = file
        for wanted in _imports(name, Path(file)):
            if wanted not in found and wanted not in waiting:
                place = graph_import.locate(wanted)
                if place is not None:
                    waiting[wanted] = place
    return dict(sorted(found.items()))


def _imports(name: str, file: Path) -> Iterator[str]:
    """Yield the names of modules that a file may import: `from a import b` gives `a` and `a.b`, `a.b` also `a`."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise GraphError(f"{file}:{error.lineno}: {error.msg}", hint="it is imported by the graph") from None
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for dotted in names:
            parts = dotted.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
