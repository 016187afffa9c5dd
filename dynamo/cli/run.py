"""`dynamo run`: chat with a model in the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from dynamo.cli.errors import INTERRUPTED
from dynamo.cli.options import FILE
from dynamo.cli.signals import exit_on_signals

if TYPE_CHECKING:
    from dynamo.cli.chat import Model

_GRAPH = re.compile(r"[\w./-]+:[A-Za-z_]\w*|[\w./-]+\.py")  # module:Service, path/file.py:Service, path/file.py
TINY = "dynamo-tiny"


class _RunCommand(click.Command):
    """Hands arguments with `in=` or `out=` to `dynamo_run`, whose options are others."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from dynamo.cli.dynamo_run import dynamo_run, is_given

        if is_given(args) and not ctx.resilient_parsing:
            ctx.exit(dynamo_run.main(args, prog_name=ctx.command_path, standalone_mode=False) or 0)
        return super().parse_args(ctx, args)


@click.command(cls=_RunCommand)
@click.argument("words", nargs=-1, metavar="[GRAPH] [PROMPT]")
@click.option(
    "-f",
    "--config-file",
    type=FILE,
    metavar="FILE",
    help="YAML file of settings, for GRAPH.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Directory, Hugging Face id or dynamo-tiny; with --url, a name that the server lists.",
)
@click.option(
    "--engine", type=click.Choice(["vllm", "mock"]), default="vllm", show_default=True, help="Inference engine."
)
@click.option(
    "--url",
    envvar="DYNAMO_URL",
    show_envvar=True,
    metavar="URL",
    help="Chat through the OpenAI endpoint of a running graph, with the key in DYN_API_KEY if it is set.",
)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum output tokens; by default, the rest of the context.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    metavar="X",
    help="Sampling temperature; 0 always picks the likeliest token.",
)
@click.option(
    "--context-length", type=click.IntRange(1), metavar="N", help="Maximum length of the conversation in tokens."
)
@click.option("--stats", is_flag=True, help="Print tokens, TTFT and tokens/s of each answer on standard error.")
@click.pass_context
def run(
    ctx: click.Context,
    words: tuple[str, ...],
    config_file: Path | None,
    model: str | None,
    engine: str,
    url: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    context_length: int | None,
    stats: bool,
) -> int:
    """Chat with a model. PROMPT, or text on standard input, gets one answer; without either, a conversation starts.

    Without GRAPH and --url, the model runs in this process: no NATS, no etcd, no server. GRAPH, written as for
    `dynamo serve`, is started for the conversation and stopped after it.

    \b
    Examples:
      dynamo run                                             # dynamo-tiny, which is part of dynamo
      dynamo run "What is an inference graph?"
      git diff | dynamo run --system "Summarise this change." --model Qwen/Qwen3-0.6B
      dynamo run --url http://127.0.0.1:8000                 # a running graph
      dynamo run graphs.agg:Frontend -f configs/agg.yaml     # a graph just for this conversation

    \b
    With in= or out= it joins what asks to what answers, as ai-dynamo 0.3 did; `dynamo run in=http --help` lists it all:
      dynamo run in=http out=vllm Qwen/Qwen3-0.6B            # OpenAI's HTTP API for one model
      dynamo run in=http out=dyn                             # for the models that workers register
    """
    graph, prompt = _split_words(words)
    url = _effective_url(ctx, graph, url)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode(errors="replace").rstrip()
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty", ctx)
    _configure_logging()
    from dynamo.cli.chat import Chat, SamplingOptions

    code = 0
    with exit_on_signals():
        try:
            with _open_model(graph, config_file, model, engine, url, context_length) as opened_model:
                chat = Chat(opened_model, SamplingOptions(max_tokens, temperature), system=system, stats=stats)
                if prompt is None:
                    chat.converse()
                else:
                    chat.ask(prompt)
        except KeyboardInterrupt:
            code = INTERRUPTED
    if "vllm" in sys.modules:  # the engine has stopped; Python would take 2 s to unload vLLM's modules
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _split_words(words: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Split the arguments into GRAPH, which a first word that looks like one is, and PROMPT, whose words need no quotes."""
    graph = words[0] if words and _GRAPH.fullmatch(words[0]) else None
    rest = words[1:] if graph else words
    return graph, " ".join(rest) if rest else None


def _effective_url(ctx: click.Context, graph: str | None, url: str | None) -> str | None:
    """Return the URL to use: options for a local model or a graph override DYNAMO_URL.

    Raises UsageError for options that contradict each other.
    """

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    if given("config_file") and not graph:
        raise click.UsageError("-f needs GRAPH", ctx)
    local = [f"--{name.replace('_', '-')}" for name in ("engine", "context_length") if given(name)]
    ways = [*(["GRAPH"] if graph else local[:1]), *(["--url"] if given("url") else [])]
    if graph:
        ways += local
    if len(ways) > 1:
        raise click.UsageError(f"{ways[0]} and {ways[1]} do not go together", ctx)
    return url if given("url") or not ways else None


@contextmanager
def _open_model(
    graph: str | None,
    config_file: Path | None,
    model: str | None,
    engine: str,
    url: str | None,
    context_length: int | None,
) -> Iterator[Model]:
    """Provide the model: in this process, behind a URL, or in a graph that is started for it."""
    from dynamo.cli.chat import Progress

    progress = Progress()
    if graph is None and url is None:
        from dynamo.cli.local_model import LocalModel

        with LocalModel(model or TINY, engine, context_length, progress) as local:
            yield local
        return
    from dynamo.cli.remote_model import RemoteModel

    key = os.environ.get("DYN_API_KEY")
    if graph is None:
        assert url is not None
        yield RemoteModel(url, model, key)
        return
    from dynamo.cli.temporary_graph import temporary_graph

    with temporary_graph([graph, *(["-f", str(config_file)] if config_file else [])], progress) as served:
        yield RemoteModel(served, model, key)


def _configure_logging() -> None:
    """Log warnings and errors only, unless DYN_LOG asks for more."""
    from dynamo.log import configure

    os.environ.setdefault("DYN_LOG", "warning")
    configure("run")
