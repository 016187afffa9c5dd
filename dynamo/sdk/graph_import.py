"""Whose code runs: a module of a graph is the first file of its name in the working directory, then on Python's path.

Python alone decides by package: a folder without `__init__.py` loses to a package of its name that comes later on the path,
and a folder with one hides all others. Graphs come in both kinds of folder, and they are called `graphs` and `components`
as ours are. So modules within packages are looked for file by file here, and both kinds count alike: a user's
`components/worker.py` comes before ours, and a module that the user's folder lacks is taken from the next one.

What a plain folder `dynamo` of the user's holds is found beside our modules, and never instead of them.

A plain folder of the user's also comes before an installed package of its name, but not for that package itself: a folder
`datasets` beside the graph does not get in the way of a library that is called so.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from dynamo.errors import GraphError

_OWN = "dynamo"
_OWN_FOLDER = f"{Path(__file__).parent.parent}{os.sep}"
_STDLIB = os.path.dirname(os.path.realpath(os.__file__))


class GraphFinder:
    """Finds modules within packages, file by file, in the folders of `sys.path` that hold no installed packages."""

    def __init__(self, working_dir: str) -> None:
        self.working_dir = working_dir

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a module within a package is; None leaves it to Python.

        Raises GraphError if the working directory holds both a module and a package of the name.
        """
        top = fullname.partition(".")[0]
        if path is None or top in sys.stdlib_module_names or _imports_itself(top):
            return None
        if top == _OWN:
            return _find_beside_own(fullname, path)
        parent = fullname.rpartition(".")[0].replace(".", os.sep)
        portions: list[str] = []
        for root in roots():
            if not os.path.isdir(f"{root}/{top}"):
                continue
            spec = PathFinder.find_spec(fullname, [f"{root}/{parent}"])
            if spec is None:
                continue
            if spec.origin is not None:
                if root == self.working_dir:
                    _refuse_two(fullname, root)
                return spec
            portions += spec.submodule_search_locations or []
        if not portions:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            return spec
        merged = ModuleSpec(fullname, None, is_package=True)
        rest = spec.submodule_search_locations if spec is not None else None
        merged.submodule_search_locations = list(dict.fromkeys([*portions, *(rest or [])]))
        return merged


def install(working_dir: Path) -> None:
    """Put a directory first on Python's path, and find modules as this module says."""
    root = str(working_dir.resolve())
    sys.path[:] = [root, *(entry for entry in sys.path if (entry or os.getcwd()) != root)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, GraphFinder)]
    sys.meta_path.insert(sys.meta_path.index(PathFinder), GraphFinder(root))


def check(name: str, working_dir: Path) -> None:
    """Raise GraphError if it is not clear which file the graph module `name` is."""
    root = str(working_dir.resolve())
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        _refuse_two(".".join(parts[:end]), root, deeper=end < len(parts))
    loaded = getattr(sys.modules.get(name), "__file__", None)
    wanted = locate(name)
    if loaded is not None and wanted is not None and not os.path.samefile(loaded, wanted):
        raise GraphError(
            f"graph module {name!r} is {wanted}, but {loaded} has been imported under that name",
            hint=f"rename it, or name the file: {os.path.relpath(wanted, root)}",
        )


def roots() -> Iterator[str]:
    """Yield the folders of Python's path in order, without those of the standard library and of installed packages."""
    for entry in list(sys.path):
        if not _holds_installed(entry):
            yield entry or os.getcwd()


def imported(names: Sequence[str] = ()) -> dict[str, str]:
    """Return the file of each imported module that is neither installed nor dynamo's own, by name, and those of `names`."""
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or file.startswith(_OWN_FOLDER) or name in ("__main__", "__mp_main__"):
            continue
        if name in names or not _holds_installed(os.path.dirname(file)):
            found[name] = os.path.abspath(file)
    return found


def borrowed(modules: Mapping[str, str], working_dir: Path) -> dict[str, str]:
    """Return those of `imported` modules that a package of the working directory lacks: name to file, elsewhere."""
    root = working_dir.resolve()
    return {
        name: file
        for name, file in modules.items()
        if "." in name and (root / name.partition(".")[0]).is_dir() and not Path(file).is_relative_to(root)
    }


def locate(name: str) -> str | None:
    """Return the file of a module by the rule of this page, whether it is imported or not; None if it is installed."""
    top = name.partition(".")[0]
    if top == _OWN or top in sys.stdlib_module_names:
        return None
    parent = name.rpartition(".")[0].replace(".", os.sep)
    for root in roots():
        spec = PathFinder.find_spec(name, [os.path.join(root, parent) if parent else root])
        if spec is not None and spec.origin is not None:
            return spec.origin
    return None


def stand_in(error: ImportError, working_dir: Path, graph: str) -> str:
    """Return a hint: the folder that would be used without the user's one in which an import failed.

    Empty if there is none, or if it is the folder of the graph itself.
    """
    here = working_dir.resolve()
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        below = file.relative_to(here) if file.is_relative_to(here) else Path()
        if len(below.parts) < 2 or below.parts[0] == graph.partition(".")[0]:
            continue
        for root in roots():
            if root != str(here) and Path(root, below).is_file():
                return f"without {here / below.parts[0]}, {Path(root, below.parts[0])} would be used"
    return ""


def absolute_python_path() -> dict[str, str]:
    """Return PYTHONPATH for processes that run in another directory, if it has relative entries."""
    given = os.environ.get("PYTHONPATH", "")
    absolute = os.pathsep.join(os.path.abspath(entry) for entry in given.split(os.pathsep)) if given else ""
    return {"PYTHONPATH": absolute} if absolute != given else {}


def _find_beside_own(fullname: str, path: Sequence[str]) -> ModuleSpec | None:
    """Return where a module of `dynamo` is: in this package or, if it has none of the name, in plain folders called so.

    ai-dynamo's `dynamo` was such a folder, one of several: people's own packages were in others.
    """
    own = PathFinder.find_spec(fullname, path)
    if own is not None or fullname.count(".") > 1:
        return own
    folders = [f"{root}/{_OWN}" for root in roots() if not os.path.isfile(f"{root}/{_OWN}/__init__.py")]
    return PathFinder.find_spec(fullname, folders)


def _refuse_two(name: str, root: str, *, deeper: bool = False) -> None:
    """Raise GraphError if `name` is a module and a package in one folder; `deeper`: a module below `name` is wanted."""
    place = f"{root}/{name.replace('.', os.sep)}"
    package = f"{place}/__init__.py"
    if not os.path.isfile(f"{place}.py") or not (os.path.isfile(package) or (deeper and os.path.isdir(place))):
        return
    shown = [os.path.relpath(path, root) for path in (f"{place}.py", place if deeper else package)]
    raise GraphError(f"{name} is two things in {root}: {' and '.join(shown)}", hint="rename one of them")


@cache
def _holds_installed(folder: str) -> bool:
    parts = Path(folder).parts
    if "site-packages" in parts or "dist-packages" in parts:
        return True
    real = os.path.realpath(folder) if folder else ""
    return real == _STDLIB or real.startswith(f"{_STDLIB}{os.sep}") or folder.endswith(".zip")


def _imports_itself(top: str) -> bool:
    """Return True while an installed package `top` imports a module of its own."""
    if not _is_installed(sys.modules.get(top)):
        return False
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    importer = str(frame.f_globals.get("__name__", ""))
    return importer.partition(".")[0] == top and _is_installed(sys.modules.get(importer))


def _is_installed(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and _holds_installed(os.path.dirname(file))
