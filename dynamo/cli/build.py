"""`dynamo build`: packs a graph as a container image, or as the folder from which one is built."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import click

from dynamo.cli.build_context import DOCKERFILE, Packed, collect
from dynamo.cli.errors import short_warnings, warn
from dynamo.cli.options import FILE, WORKING_DIR
from dynamo.config import yaml_file
from dynamo.config.resolution import resolve_and_check
from dynamo.config.settings import declared
from dynamo.errors import DynamoError, StartError

ENGINES = ("docker", "podman", "buildah")
ENGINE_ANSWER_S = 10.0
BASE_IMAGE = "dynamo:latest-vllm"
_TAG = re.compile(r"[a-z0-9][\w.:/@-]*")


@click.command()
@click.argument("graph")
@click.option(
    "-f",
    "--config-file",
    type=FILE,
    metavar="FILE",
    help="YAML file of settings that the image serves the graph with.",
)
@click.option(
    "-t", "--tag", metavar="NAME:TAG", help="Name of the image; by default the graph's, such as graphs-agg:latest."
)
@click.option(
    "--base-image",
    default=BASE_IMAGE,
    show_default=True,
    envvar="DYNAMO_IMAGE",
    show_envvar=True,
    metavar="IMAGE",
    help="Image with dynamo in it, as container/build.sh makes it.",
)
@click.option(
    "-o",
    "--output",
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder to keep the build context in; by default build/NAME, and only if no image is built.",
)
@click.option(
    "--containerize/--no-containerize",
    default=None,
    help="Build the image, or write the build context alone; by default the image if docker, podman or buildah is there.",
)
@click.option(
    "--include",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    metavar="PATH",
    help="File or folder to add, such as data that a service reads. May be repeated.",
)
@WORKING_DIR
@click.option("--force", is_flag=True, help="Write into a folder that holds something else.")
@click.option("--push", is_flag=True, hidden=True)
@click.option("-e", "--endpoint", hidden=True)
def build(
    graph: str,
    config_file: Path | None,
    tag: str | None,
    base_image: str,
    output: Path | None,
    containerize: bool | None,
    include: tuple[Path, ...],
    working_dir: Path,
    force: bool,
    push: bool,
    endpoint: str | None,
) -> int:
    """Pack GRAPH, written as for `dynamo serve`, as a container image that serves it.

    The image has the modules that the graph imports from your folders, the configuration file, and the packages of
    requirements.txt if that file is there, on top of an image of dynamo. Nothing is imported or started in it.

    \b
    Examples:
      dynamo build graphs.agg:Frontend -f configs/agg.yaml
      dynamo build graphs.agg:Frontend -f configs/agg.yaml --tag registry.example.com/chat:1 --include prompts
      dynamo build graphs.agg:Frontend --output context      # keep the build context
      dynamo build graphs.agg:Frontend --no-containerize     # without docker, podman or buildah
    """
    if push or endpoint:
        raise click.UsageError("there is no Dynamo Cloud to push to; push the image: docker push NAME:TAG")
    name = re.sub(r"[^a-z0-9]+", "-", graph.partition(":")[0].removesuffix(".py").lower()).strip("-")
    tag = tag or f"{name}:latest"
    if not _TAG.fullmatch(tag):
        raise click.BadParameter(f"{tag!r} is not the name of an image", param_hint="'-t' / '--tag'")
    if output is not None and working_dir.resolve().is_relative_to(output.resolve()):
        raise click.BadParameter("the graph's own files are there", param_hint="'-o' / '--output'")
    engine, why_none = _find_engine() if containerize is not False else (None, "--no-containerize is given")
    if containerize and engine is None:
        raise StartError(why_none, hint="leave out --containerize to write the build context alone")
    packed = _pack(graph, config_file, base_image, include, working_dir)
    if engine is None:
        directory = output or working_dir / "build" / name
        packed.write(directory, force=force)
        _echo_written(packed, directory)
        _echo(f"no image: {why_none}")
        _echo(f"next: docker build -t {tag} {directory}     # or podman, or buildah")
        return 0
    if output is not None:
        packed.write(output, force=force)
        _echo_written(packed, output)
        _build_image(engine, tag, output)
    else:
        directory = Path(tempfile.mkdtemp(prefix="dynamo-build-"))
        packed.write(directory)
        _build_image(engine, tag, directory)
        shutil.rmtree(directory)  # kept if the build fails, whose error names it
    click.echo(f"Successfully built {tag}.")
    _echo(f"next: {'podman' if engine == 'buildah' else engine} run --rm -p 8000:8000 {tag}")
    return 0


def _find_engine() -> tuple[str | None, str]:
    """Return the first engine that can build here, else None and the reason."""
    installed = list(filter(shutil.which, ENGINES))
    for engine in installed:
        try:
            if subprocess.run([engine, "version"], capture_output=True, timeout=ENGINE_ANSWER_S).returncode == 0:
                return engine, ""
        except (OSError, subprocess.TimeoutExpired):
            continue
    if not installed:
        return None, "docker, podman and buildah were not found"
    return None, f"{installed[0]} is installed but does not answer: try `{installed[0]} version`"


def _pack(
    graph: str, config_file: Path | None, base_image: str, include: tuple[Path, ...], working_dir: Path
) -> Packed:
    """Load the graph, check its configuration, and collect what the image needs."""
    from dynamo.sdk import graph_import
    from dynamo.sdk.graph import load

    with short_warnings():
        found = load(graph, working_dir)
    services = {name: declared(cls) for name, cls in found.services.items()}
    layers = [yaml_file.load(config_file)] if config_file is not None else []
    for notice in resolve_and_check(layers, services).notices:
        warn(str(notice))
    return collect(graph, graph_import.imported(), base_image, config_file, include, working_dir)


def _build_image(engine: str, tag: str, directory: Path) -> None:
    """Build the image with the engine's own output. Raises DynamoError with its exit code if it fails."""
    command = [engine, "build", "-t", tag, "-f", str(directory / DOCKERFILE), str(directory)]
    _echo(" ".join(command))
    code = subprocess.run(command, stdout=2).returncode  # standard output has one line, for scripts
    if code != 0:
        raise DynamoError(
            f"{engine} build failed with exit code {code}",
            hint=f"its output is above, and the build context is kept: {' '.join(command)}",
        )


def _echo_written(packed: Packed, directory: Path) -> None:
    _echo(f"wrote {directory}: {DOCKERFILE} and {len(packed.files)} files of the graph")


def _echo(text: str) -> None:
    click.echo(text, err=True)
