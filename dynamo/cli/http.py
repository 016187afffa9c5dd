"""The command `http`: an OpenAI server for the models that any process registers, as in ai-dynamo 0.1 to 0.3."""

from __future__ import annotations

import sys
import time

import click

from dynamo.cli.options import PORT

DEFAULT_PORT = 8080


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--host",
    envvar="DYNAMO_HOST",
    show_envvar=True,
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 for all.",
)
@click.option("-p", "--port", type=PORT, default=DEFAULT_PORT, show_default=True, help="Port to listen on.")
@click.option("--namespace", hidden=True)
@click.option("--component", hidden=True)
def http(host: str, port: int, namespace: str | None, component: str | None) -> int:
    """Serve OpenAI's HTTP API for the models that `llmctl http add` and `register_llm` name.

    A model is offered while an instance of its endpoint runs. NATS and etcd are those of NATS_SERVER and ETCD_ENDPOINTS, or
    of the graph that runs on this machine.

    \b
    Examples:
      http -p 8000
      llmctl http add chat-models my-model my_namespace.MyProcessor.chat
    """
    started = time.monotonic()
    from dynamo import log
    from dynamo.cli.serve_http import run_loop, serve_registered

    log.configure("http")
    return run_loop(serve_registered(host, port, "round_robin", started))


def main() -> int:
    """Run the console command `http`."""
    from dynamo.cli.main import invoke

    return invoke(http, "http")


if __name__ == "__main__":
    sys.exit(main())
