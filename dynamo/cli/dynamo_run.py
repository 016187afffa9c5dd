"""`dynamo run in=... out=...`, also the command `dynamo-run`: joins what asks to what answers, as in ai-dynamo 0.1 to 0.3."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynamo.cli.http import DEFAULT_PORT
from dynamo.cli.options import FILE, PORT
from dynamo.cli.signals import exit_on_signals
from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from dynamo.cli.chat import Model
    from dynamo.cli.local_model import LocalModel
    from dynamo.openai.echo import EchoModel

ENGINES = {"vllm": "vllm", "mocker": "mock", "mock": "mock", "echo_core": "echo"}
"""out= -> engine in this process"""
FOREIGN = ("sglang", "trtllm", "llamacpp", "llama_cpp", "mistralrs", "pystr", "pytok")
OUTPUTS = "vllm, mocker, echo_core, echo_full, dyn"
INPUTS = "http, text, stdin, batch:FILE, dyn://namespace.component.endpoint"
CHOICES = {
    "round-robin": "round_robin",
    "random": "random",
    "power-of-two": "power_of_two",
    "least-loaded": "least_loaded",
    "kv": "least_loaded",
}
TINY = "dynamo-tiny"


@dataclass
class Job:
    """What is run: an input, an output, and the options of both. `extra` are arguments of the engine."""

    input: str
    output: str
    model: str = TINY
    name: str = ""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    router_mode: str = "round-robin"
    extra: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def engine(self) -> str | None:
        return ENGINES.get(self.output)


def is_given(arguments: Sequence[str]) -> bool:
    """Return True for arguments that begin as those of `dynamo-run` do."""
    return any(word.startswith(("in=", "out=")) for word in arguments[:2])


class _InOut(click.Command):
    """Takes `in=` and `out=` out of the first two words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in [word for word in args[:2] if word.startswith(("in=", "out="))]:
            key, _, value = word.partition("=")
            if f"dynamo.{key}" in ctx.meta:
                raise click.UsageError(f"{key}= is given twice", ctx)
            ctx.meta[f"dynamo.{key}"] = value
            args = [arg for arg in args if arg is not word]
        return super().parse_args(ctx, args)


@click.command(
    cls=_InOut,
    options_metavar="in=INPUT out=OUTPUT [OPTIONS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("words", nargs=-1, metavar="[MODEL]")
@click.option("--model-path", metavar="MODEL", help="The same as MODEL: directory, Hugging Face id or dynamo-tiny.")
@click.option(
    "--model-name",
    metavar="NAME",
    help="Name of the model for clients; by default MODEL, or its last part if it is a directory.",
)
@click.option("--model-config", metavar="MODEL", hidden=True)
@click.option("--http-port", type=PORT, default=DEFAULT_PORT, show_default=True, help="Port of in=http.")
@click.option(
    "--http-host",
    envvar="DYNAMO_HOST",
    show_envvar=True,
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address of in=http; 0.0.0.0 for all.",
)
@click.option("--tensor-parallel-size", type=click.IntRange(1), metavar="N", help="GPUs for the model.")
@click.option("--base-gpu-id", type=click.IntRange(0), metavar="N", help="Number of the first GPU to use.")
@click.option("--num-nodes", type=click.IntRange(1), default=1, hidden=True)
@click.option("--node-rank", type=click.IntRange(0), default=0, hidden=True)
@click.option("--leader-addr", hidden=True)
@click.option("--context-length", type=click.IntRange(1), metavar="N", help="Tokens of prompt and output together.")
@click.option("--kv-cache-block-size", type=click.IntRange(1), metavar="N", help="Tokens in a KV block.")
@click.option(
    "--extra-engine-args",
    type=FILE,
    metavar="FILE",
    help="JSON file with further flags of the engine, by name.",
)
@click.option("--request-template", type=click.Path(), hidden=True)
@click.option(
    "--router-mode",
    type=click.Choice(list(CHOICES)),
    default="round-robin",
    show_default=True,
    help="How out=dyn chooses an instance.",
)
@click.option("--max-num-batched-tokens", type=int, hidden=True)
@click.option("--kv-overlap-score-weight", type=float, hidden=True)
@click.option("--kv-gpu-cache-usage-weight", type=float, hidden=True)
@click.option("--kv-waiting-requests-weight", type=float, hidden=True)
@click.option("--router-temperature", type=float, hidden=True)
@click.option("-v", "verbosity", count=True, help="Log more: -v debug, -vv trace.")
@click.pass_context
def dynamo_run(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    model_path: str | None,
    model_name: str | None,
    http_port: int,
    http_host: str,
    extra_engine_args: Path | None,
    router_mode: str,
    verbosity: int,
    **options: Any,
) -> int:
    """Join what asks to what answers.

    \b
    in=http              OpenAI's HTTP API on --http-port
    in=text, in=stdin    a conversation in the terminal; one answer to standard input
    in=batch:FILE        JSON lines {"text": ...}; answers go to output.jsonl beside FILE
    in=dyn://NS.COMP.EP  a worker of that endpoint, for servers with out=dyn
    out=vllm             vLLM in this process
    out=mocker           deterministic tokens without a model; out=echo_core, out=echo_full: the prompt
    out=dyn              the models that processes register in etcd

    \b
    Examples:
      dynamo run in=http out=vllm Qwen/Qwen3-0.6B
      dynamo run in=http out=dyn --http-port 8000
      dynamo run in=dyn://qwen.backend.generate out=vllm Qwen/Qwen3-0.6B
    """
    if len(words) > 1:
        raise click.UsageError(f"unexpected argument {words[1]!r}", ctx)
    default_input = "text" if sys.stdin.isatty() else "stdin"
    given = ctx.meta.get("dynamo.in", default_input), ctx.meta.get("dynamo.out", "vllm")
    model = (words[0] if words else None) or model_path or TINY
    name = model_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    job = Job(*given, model, name, http_host, http_port, router_mode)
    _check(job, options)
    job.extra = _engine_arguments(options, extra_engine_args)
    if verbosity:
        os.environ["DYN_LOG"] = "debug" if verbosity == 1 else "trace"
    elif not job.input.startswith(("http", "dyn")):
        os.environ.setdefault("DYN_LOG", "warning")
    from dynamo import log

    log.configure("run")
    with exit_on_signals():
        code = _run(job)
    if "vllm" in sys.modules:  # the engine has stopped; Python would take 2 s to unload vLLM's modules
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _check(job: Job, options: dict[str, Any]) -> None:
    """Raise ConfigError for what cannot be run; set `output` to "dyn" for an address, which 0.3 ignores too."""
    if job.output.startswith("dyn://"):
        job.output = "dyn"
    name = job.output.partition(":")[0]
    if name in FOREIGN:
        raise ConfigError(
            f"out={job.output}: this project runs vLLM",
            hint="type out=vllm; or start your own worker, which calls register_llm, and type out=dyn",
        )
    if job.engine is None and job.output not in ("dyn", "echo_full"):
        raise ConfigError(f"out={job.output}: no such output", hint=f"outputs: {OUTPUTS}")
    kind = job.input.partition(":")[0]
    if job.input == "none":
        raise ConfigError("in=none: an engine over several hosts is a graph", hint="see docs/deployment.md: nnodes")
    if job.input not in ("http", "text", "stdin") and kind not in ("batch", "dyn"):
        raise ConfigError(f"in={job.input}: no such input", hint=f"inputs: {INPUTS}")
    if job.input in ("batch", "batch:"):
        raise ConfigError("in=batch: no file", hint="type in=batch:FILE")
    if kind == "dyn" and job.output == "dyn":
        raise ConfigError("in=dyn and out=dyn: nothing would answer", hint="type in=http out=dyn, or out=vllm")
    if options["num_nodes"] > 1:
        raise ConfigError(
            "--num-nodes: an engine over several hosts is a graph",
            hint="type `dynamo serve graphs.agg:Frontend` with VllmWorker's nnodes: see docs/deployment.md",
        )
    if options["request_template"]:
        raise ConfigError("--request-template is not supported", hint="give the fields in each request")
    if job.output == "dyn":
        for option in ("context_length", "kv_cache_block_size"):
            if options[option] is not None:
                flag = f"--{option.replace('_', '-')}"
                raise ConfigError(f"{flag} is a worker's, not out=dyn's", hint="give it to the command with in=dyn://")


def _engine_arguments(options: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Return the flags of the engine by name. Raises ConfigError for a file that is not a JSON object."""
    first, count = options["base_gpu_id"], options["tensor_parallel_size"] or 1
    if first is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + count)))
    flags = {
        "tensor-parallel-size": options["tensor_parallel_size"],
        "max-model-len": options["context_length"],
        "block-size": options["kv_cache_block_size"],
    }
    found = {name: value for name, value in flags.items() if value is not None}
    if file is not None:
        try:
            given = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"--extra-engine-args {file}: not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"--extra-engine-args {file}: not a JSON object", hint='write {"max-num-seqs": 8}')
        found |= {name.replace("_", "-"): value for name, value in given.items()}
    return found


def _run(job: Job) -> int:
    kind = job.input.partition(":")[0]
    if kind == "http":
        return _serve_http(job)
    if kind == "dyn":
        return _serve_endpoint(job)
    if kind == "batch":
        from dynamo.cli.batch import read_prompts, run_batch

        file = Path(job.input.partition(":")[2])
        prompts = read_prompts(file)
        with _server(job) as url:
            return run_batch(prompts, url, file.parent)
    return _talk(job)


def _serve_http(job: Job) -> int:
    from dynamo.cli.serve_http import run_loop, serve, serve_registered

    where = (job.host, job.port)
    if job.output == "dyn":
        if job.router_mode == "kv":
            click.echo(
                "note: --router-mode kv: the least loaded instance is taken; graphs.agg_router routes by KV", err=True
            )
        return run_loop(serve_registered(*where, CHOICES[job.router_mode], job.started))
    if job.engine is None:
        return run_loop(serve(_echo(job), *where, job.started))
    from dynamo.openai.engine_model import EngineModel

    with _local_model(job) as local:
        backend = EngineModel(job.name, job.model, local.engine, local.preprocessor)
        return local.run(serve(backend, *where, job.started, check_health=local.engine.check_health))


def _serve_endpoint(job: Job) -> int:
    from dynamo.cli.serve_endpoint import parse_address, serve_endpoint
    from dynamo.cli.serve_http import run_loop
    from dynamo.llm.model_cards import BACKEND
    from dynamo.llm.protocol import GenerateRequest, ModelCard

    namespace, component, endpoint = parse_address(job.input)
    block_size = job.extra.get("block-size")

    def card(context_length: int, engine: str, kind: str) -> ModelCard:
        return ModelCard(
            name=job.name,
            source=str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
            namespace=namespace,
            component=component,
            context_length=context_length,
            kv_block_size=block_size if isinstance(block_size, int) else 0,
            engine=engine,
            created=int(time.time()),
            types=[kind],
            endpoint=endpoint,
        )

    if job.engine is None:
        return run_loop(serve_endpoint(card(0, "", "chat"), _echo(job).chunks))
    with _local_model(job) as local:
        registered = card(local.preprocessor.context_length, job.engine, BACKEND)
        serving = serve_endpoint(registered, local.engine.generate, GenerateRequest, local.engine.check_health)
        return local.run(serving)


def _talk(job: Job) -> int:
    """Answer the terminal, or standard input."""
    from dynamo.cli.chat import Chat, SamplingOptions
    from dynamo.cli.errors import INTERRUPTED

    prompt = sys.stdin.buffer.read().decode(errors="replace").rstrip() if job.input == "stdin" else None
    if prompt is not None and not prompt.strip():
        raise ConfigError("in=stdin: the prompt is empty", hint='type: echo "a question" | dynamo run in=stdin')
    try:
        with _answering(job) as model:
            chat = Chat(model, SamplingOptions())
            if prompt is None:
                chat.converse()
            else:
                chat.ask(prompt)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@contextmanager
def _answering(job: Job) -> Iterator[Model]:
    """Provide the model: in this process, or behind a server that is started for it."""
    if job.engine is not None:
        with _local_model(job) as local:
            yield local
        return
    from dynamo.cli.remote_model import RemoteModel

    with _server(job) as url:
        yield RemoteModel(url, None, os.environ.get("DYN_API_KEYS", "").split(",")[0] or None)


@contextmanager
def _server(job: Job) -> Iterator[str]:
    """Run the same output behind in=http, and yield its URL once it has a model."""
    from dynamo.cli.batch import wait_for_model
    from dynamo.cli.chat import Progress
    from dynamo.cli.temporary_graph import temporary_server

    progress = Progress()
    arguments = [f"out={job.output}", job.model, "--model-name", job.name, "--router-mode", job.router_mode]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job.extra, file)
        file.flush()
        with temporary_server([*arguments, "--extra-engine-args", file.name], progress) as url:
            wait_for_model(url, progress)
            yield url


def _local_model(job: Job) -> LocalModel:
    from dynamo.cli.chat import Progress
    from dynamo.cli.local_model import LocalModel

    assert job.engine is not None
    return LocalModel(job.model, job.engine, None, Progress(), job.extra)


def _echo(job: Job) -> EchoModel:
    from dynamo.engines.echo import delay_s
    from dynamo.openai.echo import EchoModel

    return EchoModel(job.name, delay_s())


def main() -> int:
    """Run the console command `dynamo-run`."""
    from dynamo.cli.main import invoke

    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        import dynamo

        click.echo(f"dynamo-run {dynamo.__version__}")
        return 0
    return invoke(dynamo_run, "dynamo-run", arguments or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
