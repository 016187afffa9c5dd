"""Dynamo 1.6: its Rust frontend and its Rust mock engine, with discovery through files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import Client, Load, LoadError
from benchmarks.processes import Process, StartError, free_port
from benchmarks.system import Running
from dynamo.llm.model_files import tokenizer_dir

NAME = "Dynamo 1.6.1"
MODEL = "mock"
START_LIMIT_S = 60.0
UNPACED = 1_000_000  # speedup over its own pace


def start(environment: Path, run_dir: Path, paced: bool) -> Running:
    began = time.perf_counter()
    engine = ["--speedup-ratio", "1" if paced else str(UNPACED), "--num-workers", "1", "--block-size", "16",
              "--max-num-seqs", "100000", "--max-num-batched-tokens", "10000000"]  # fmt: skip
    running = launch(environment, run_dir, engine, [])
    running.start_s = wait_for_answer(running, began, START_LIMIT_S)
    return running


def launch(environment: Path, run_dir: Path, engine: Sequence[str], frontend: Sequence[str]) -> Running:
    """Start both programs with these arguments, without waiting until they are ready."""
    port = free_port()
    python = environment / "bin" / "python"
    env = {
        "DYN_FILE_KV": str(run_dir / "kv"),
        "DYN_LOG": "warn",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    mocker = Process(
        [python, "-m", "dynamo.mocker", "--discovery-backend", "file", "--model-path", tokenizer_dir("dynamo-tiny"),
         "--model-name", MODEL, *engine],
        run_dir / "mocker.log", env, run_dir,
    )  # fmt: skip
    server = Process(
        [python, "-m", "dynamo.frontend", "--discovery-backend", "file", "--http-host", "127.0.0.1", "--http-port",
         str(port), *frontend],
        run_dir / "frontend.log", env, run_dir,
    )  # fmt: skip
    return Running(NAME, port, MODEL, [server, mocker], _role)


def registered(run_dir: Path) -> int:
    """Return the number of mock workers in discovery."""
    return sum("generate" in path.name for path in (run_dir / "kv" / "v1" / "instances").glob("*"))


def _role(argv: list[str]) -> str:
    return "Frontend" if "dynamo.frontend" in argv else "Mocker"


def wait_for_answer(running: Running, began: float, limit_s: float) -> float:
    """Wait for the first answer and return the seconds since `began`.

    Raises StartError, with everything stopped, if there is none within `limit_s`.
    """
    failed = ""
    while time.perf_counter() - began < limit_s:
        try:
            asyncio.run(Client("127.0.0.1", running.port, running.model).run(Load(1, 1, 2, 4)))
            return time.perf_counter() - began
        except (OSError, LoadError) as error:
            failed = str(error)
            time.sleep(0.05)
    running.stop()
    logs = "\n".join(process.log.read_text(errors="replace")[-1000:] for process in running.processes)
    raise StartError(f"{running.name} gave no answer within {limit_s:.0f} s: {failed}\n{logs}")
