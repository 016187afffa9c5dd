"""The documents match the code: links, commands, names of settings, metrics and variables.

`make docs` checks the website; this needs nothing installed for it, and covers README.md and files outside docs/ too.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import dynamo.sdk
from dynamo.cli.dynamo_run import dynamo_run, is_given
from dynamo.cli.main import group
from dynamo.config.settings import declared

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        path
        for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "AGENTS.md", "SECURITY.md")
        if (path := ROOT / name).exists()
    ),
    *(ROOT / folder / "README.md" for folder in ("container", "deploy")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCES = ("dynamo", "components", "graphs", "benchmarks", "container", "deploy")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@cache
def source() -> str:
    """Return all code, to look names up in."""
    files = (path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*")))
    return "\n".join(path.read_text("utf-8") for path in files if path.suffix in {".py", ".sh", ".yml", ".yaml", ".md"})


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command line in a page: of shell blocks, and of code in the text."""
    text = page.read_text("utf-8")
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose(page))
    for line in lines:
        start = re.search(r"(?:^|[ /(])(dynamo [a-z]|python -m benchmarks)", line)
        if start:
            yield shlex.split(line[start.start(1) :].partition(')"')[0], comments=True)


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


@each_page
def test_paths_in_the_text_exist(page: Path) -> None:
    paths = re.findall(
        r"`((?:benchmarks|components|configs|container|deploy|dynamo|graphs|tests)/[\w./-]+)`", prose(page)
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for program, *words in commands(page):
        if program == "python":
            assert importlib.util.find_spec(words[1]) is not None, words[1]
            continue
        command: click.Command = group
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, f"{program} {words}: no such command"
            command = found
        if command.name == "run" and is_given(words):
            command = dynamo_run
        options = {"-h", "--help", *(opt for p in command.params for opt in (*p.opts, *p.secondary_opts))}
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word == "--":
                break
            if word.startswith("-") and not re.match(r"--[A-Z]\w*\.", word):  # else a setting: --Service.key=value
                assert word.partition("=")[0] in options, f"dynamo {command.name}: no option {word}"
            if word == "-f" and following.startswith("configs/"):
                assert (ROOT / following).exists(), following
            if re.fullmatch(r"graphs\.\w+:\w+", word):
                assert (ROOT / f"{word.partition(':')[0].replace('.', '/')}.py").exists(), word


@each_page
def test_variables_exist(page: Path) -> None:
    names = set(re.findall(r"\b(?:DYN|DYNAMO)(?:_[A-Z0-9]+)+\b", page.read_text("utf-8")))
    parts = {"DYNAMO_SYSTEM_APP_PORT", "DYNAMO_SYSTEM_APP_HOST"}  # spelled as prefix and name in the code
    assert [name for name in sorted(names - parts) if name not in source()] == []


@each_page
def test_tables_of_settings_name_settings(page: Path) -> None:
    for service, table in re.findall(r"^\| setting of `(\w+)` .*\n\|[-|]+\n((?:\|.*\n)+)", prose(page), re.MULTILINE):
        modules = {"Router": "router", "VllmWorker": "worker"}
        found = declared(getattr(importlib.import_module(f"components.{modules[service]}"), service))
        assert found is not None
        for name in re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE):
            assert name.replace("-", "_") in found.settings or found.takes(name), f"{service} has no setting {name}"


def test_metrics_exist() -> None:
    text = (ROOT / "docs/metrics.md").read_text("utf-8")
    names = set(re.findall(r"`((?:dynamo|llm)_[a-z_]+[a-z])`", text))
    assert len(names) > 40
    made = re.compile(r"^dynamo_(?:supervisor|router_worker|disagg|router)_")  # names that are put together from parts
    for name in sorted(names):
        plain = name.removesuffix("_total")
        parts = {name, plain, made.sub("", name), made.sub("", plain)}
        assert any(f'"{part}"' in source() for part in parts), name


def test_every_name_of_the_sdk_is_in_the_reference() -> None:
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    assert [name for name in dynamo.sdk.__all__ if not re.search(rf"\b{name}\b", text)] == []
