"""What a trace is replayed to: our graph with a router mode, ai-dynamo with one of its own, or a server that runs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import yaml

from benchmarks.peers import rust
from benchmarks.processes import Process, StartError, command_line, descendants, free_port
from benchmarks.replay.capacity import Engines
from benchmarks.system import Running

REPOSITORY = Path(__file__).parents[3]
START_LIMIT_S = 240.0  # a real engine compiles
HTTP_LIMIT_S = 10.0
PEER_MODES = ("round-robin", "kv")


class Target(NamedTuple):
    """`start(run_dir)` gives a server that is ready; `end` leaves nothing of it."""

    name: str
    start: Callable[[Path], Running]


@dataclass(frozen=True)
class Graph:
    """Our side. `settings` are KEY=VALUE as `dynamo serve` takes them after `--`."""

    graph: str
    config: str
    router_key: str
    settings: Sequence[str]

    def values(self) -> dict[str, Any]:
        """The configuration file. Raises StartError if it cannot be read."""
        try:
            found = yaml.safe_load((REPOSITORY / self.config).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise StartError(f"configuration {self.config} cannot be read: {error}") from None
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> str:
        chosen = [one.partition("=")[2] for one in self.settings if one.startswith("Common.model=")]
        return str([self.values().get("Common", {}).get("model", "dynamo-tiny"), *chosen][-1])

    @property
    def mock(self) -> bool:
        """whether its workers are mock engines, which take the settings of `Engines`"""
        return bool(self.values().get("VllmWorker", {}).get("engine") == "mock")


def our_targets(graph: Graph, modes: Sequence[str], engines: Engines, longest: int) -> list[Target]:
    """`longest`: tokens of the longest request with its answer."""
    return [Target(f"ours {mode}", partial(_start_graph, graph, mode, engines, longest)) for mode in modes]


def _start_graph(graph: Graph, mode: str, engines: Engines, longest: int, run_dir: Path) -> Running:
    port = free_port()
    settings = [f"VllmWorker.ServiceArgs.workers={engines.workers}", f"{graph.router_key}={mode}"]
    if graph.mock:
        settings += [
            f"Common.block-size={engines.block}",
            f"Common.max-model-len={longest}",
            f"VllmWorker.num-gpu-blocks-override={engines.blocks}",
            f"VllmWorker.max-num-seqs={engines.max_sequences}",
            f"VllmWorker.max-num-batched-tokens={engines.batched_tokens}",
            f"VllmWorker.speedup-ratio={engines.speedup}",
        ]
    if "Router" in graph.values():
        settings.append(f"Router.min-workers={engines.workers}")
    process = Process(
        [sys.executable, "-m", "dynamo", "serve", graph.graph, "-f", graph.config, "--infra", "embedded", "--host",
         "127.0.0.1", "--port", str(port), *(f"--{setting}" for setting in [*settings, *graph.settings])],
        run_dir / "serve.log", {"DYN_LOG": "warn"}, REPOSITORY,
    )  # fmt: skip
    running = Running(f"ours {mode}", port, graph.model, [process], _role)
    with _ended_on_error(running):
        running.start_s = process.wait_for(
            lambda: re.search(rb"(?m)^ready in ", process.log.read_bytes()) is not None, START_LIMIT_S, "dynamo serve"
        )
    return running


def _role(argv: list[str]) -> str:
    if "--service-name" in argv:
        return argv[argv.index("--service-name") + 1]
    return "NATS" if argv and Path(argv[0]).name == "nats-server" else "other"


def peer_targets(peers: Path, modes: Sequence[str], engines: Engines) -> list[Target]:
    """ai-dynamo 1.6.1 as benchmarks/peers/install.sh puts it under `peers`. Raises StartError if it is not there."""
    environment = (peers / "dynamo-1.6").resolve()
    if not (environment / "bin").is_dir():
        raise StartError(f"{peers} has no dynamo-1.6: run benchmarks/peers/install.sh {peers}")
    return [Target(f"{rust.NAME} {mode}", partial(_start_peer, environment, mode, engines)) for mode in modes]


def _start_peer(environment: Path, mode: str, engines: Engines, run_dir: Path) -> Running:
    running = rust.launch(
        environment,
        run_dir,
        ["--num-workers", str(engines.workers), "--block-size", str(engines.block),
         "--num-gpu-blocks-override", str(engines.blocks), "--max-num-seqs", str(engines.max_sequences),
         "--max-num-batched-tokens", str(engines.batched_tokens), "--speedup-ratio", str(engines.speedup)],
        ["--router-mode", mode],
    )  # fmt: skip
    began = time.perf_counter()
    with _ended_on_error(running):
        # the model is listed when the first worker is there
        while (found := rust.registered(run_dir)) < engines.workers or not models(running.port):
            if time.perf_counter() - began > rust.START_LIMIT_S:
                logs = "\n".join(process.log.read_text(errors="replace")[-1000:] for process in running.processes)
                raise StartError(f"{rust.NAME} has {found} of {engines.workers} workers\n{logs}")
            time.sleep(0.05)
    running.start_s = time.perf_counter() - began
    return running


def url_target(url: str, model: str | None) -> Target:
    """A server that runs already and goes on afterwards."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise StartError(f"--url {url}: expected http://HOST:PORT")
    host, port = parts.hostname, parts.port or 80

    def found(_: Path) -> Running:
        names = [model] if model else models(port, host)
        if not names:
            raise StartError(f"{url} lists no model at /v1/models")
        return Running(url, port, names[0], [], _role, host=host)

    return Target(url, found)


def models(port: int, host: str = "127.0.0.1") -> list[str]:
    text = fetch(host, port, "/v1/models")
    return [one["id"] for one in orjson.loads(text)["data"]] if text else []


def fetch(host: str, port: int, path: str) -> str:
    """The body of a GET; empty if there is none to get."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=HTTP_LIMIT_S) as got,
    ):
        return str(got.read().decode(errors="replace"))
    return ""


@contextlib.contextmanager
def _ended_on_error(running: Running) -> Iterator[None]:
    try:
        yield
    except BaseException:
        end(running)
        raise


def end(running: Running) -> None:
    """Stop what was started, then whatever of its children is left."""
    left = {pid: command_line(pid) for process in running.processes for pid in descendants(process.pid)}
    running.stop()
    for pid, argv in left.items():
        if argv and command_line(pid) == argv:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
