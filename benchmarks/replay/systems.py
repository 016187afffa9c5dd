"""Targets of a replay: our graph with a router mode, ai-dynamo with one of its own, or a running server."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import yaml

from benchmarks.peers import rust
from benchmarks.processes import StartError
from benchmarks.replay.capacity import Engines
from benchmarks.system import REPOSITORY, Running, role_of, serve_graph, stopped_on_error

START_LIMIT_S = 240.0  # a real engine compiles
HTTP_LIMIT_S = 10.0
PEER_MODES = ("round-robin", "kv")


class Target(NamedTuple):
    """`start(run_dir)` returns a ready server."""

    name: str
    start: Callable[[Path], Running]


@dataclass(frozen=True)
class Graph:
    """Our graph. `settings` are KEY=VALUE as `dynamo serve` takes them after `--`."""

    graph: str
    config: str
    router_key: str
    settings: Sequence[str]

    def values(self) -> dict[str, Any]:
        """Return the contents of the configuration file. Raises StartError if it cannot be read."""
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
        """its workers are mock engines, which take the settings of `Engines`"""
        return bool(self.values().get("VllmWorker", {}).get("engine") == "mock")


def our_targets(graph: Graph, modes: Sequence[str], engines: Engines, longest: int) -> list[Target]:
    """Return a target for each mode. `longest`: tokens of the longest request with its answer."""
    return [Target(f"ours {mode}", partial(_start_graph, graph, mode, engines, longest)) for mode in modes]


def _start_graph(graph: Graph, mode: str, engines: Engines, longest: int, run_dir: Path) -> Running:
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
    return serve_graph(
        f"ours {mode}", graph.model, graph.graph, graph.config, [*settings, *graph.settings], run_dir, START_LIMIT_S
    )


def peer_targets(peers: Path, modes: Sequence[str], engines: Engines) -> list[Target]:
    """Return a target for each mode of ai-dynamo 1.6.1, installed by benchmarks/peers/install.sh.

    Raises StartError if it is not in the folder `peers`.
    """
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
    with stopped_on_error(running):
        # the model is listed as soon as the first worker is registered
        while (found := rust.registered(run_dir)) < engines.workers or not models(running.port):
            if time.perf_counter() - began > rust.START_LIMIT_S:
                logs = "\n".join(process.log.read_text(errors="replace")[-1000:] for process in running.processes)
                raise StartError(f"{rust.NAME} has {found} of {engines.workers} workers\n{logs}")
            time.sleep(0.05)
    running.start_s = time.perf_counter() - began
    return running


def url_target(url: str, model: str | None) -> Target:
    """Return a target for a running server, which keeps running afterwards."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise StartError(f"--url {url}: expected http://HOST:PORT")
    host, port = parts.hostname, parts.port or 80

    def found(_: Path) -> Running:
        names = [model] if model else models(port, host)
        if not names:
            raise StartError(f"{url} lists no model at /v1/models")
        return Running(url, port, names[0], [], role_of, host=host)

    return Target(url, found)


def models(port: int, host: str = "127.0.0.1") -> list[str]:
    text = fetch(host, port, "/v1/models")
    return [one["id"] for one in orjson.loads(text)["data"]] if text else []


def fetch(host: str, port: int, path: str) -> str:
    """Return the body of a GET; empty if there is no answer."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=HTTP_LIMIT_S) as got,
    ):
        return str(got.read().decode(errors="replace"))
    return ""
