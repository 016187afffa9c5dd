"""Benchmark for a machine with a GPU: graphs.agg and vLLM's own API server, the same 8B Llama with random weights.

    python -m benchmarks.gpu [--out DIR]

No weights are needed (`load-format: dummy`): a configuration and a made-up tokenizer are written to a folder. Prints
the figures of each server at several numbers of streams, and the CPU time of everything but the engine's own processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import Client, Load, percentile
from benchmarks.processes import CpuMeter, Process, command_line, descendants, free_port
from benchmarks.system import REPOSITORY

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
CONTEXT, BATCHED_TOKENS, BLOCK = 8192, 16384, 64
POINTS = ((1, 8), (16, 96), (64, 256), (128, 512))  # streams, requests
INPUT_WORDS, OUTPUT_TOKENS = 600, 128
READY_S = 260.0


def write_model(folder: Path) -> None:
    """Write a model directory without weights: every token is a word, so that any generated token has text."""
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(LLAMA_8B["vocab_size"] - 3))]  # type: ignore[operator]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, word in enumerate(words[:3])
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')


def graph_command(model: Path, port: int) -> list[str]:
    """Return the command that serves the shipped configuration of the 8B model with random weights."""
    return [
        sys.executable, "-m", "dynamo", "serve", "graphs.agg:Frontend", "-f", "configs/agg.yaml",
        "--port", str(port), "--infra", "embedded", "--Frontend.served_model_name=m",
        f"--Processor.model={model}", f"--Processor.max-model-len={CONTEXT}", f"--VllmWorker.model={model}",
        f"--VllmWorker.max-model-len={CONTEXT}", "--VllmWorker.load-format=dummy", "--VllmWorker.enforce-eager=false",
    ]  # fmt: skip


def vllm_command(model: Path, port: int) -> list[str]:
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(model), "--served-model-name", "m", "--load-format", "dummy", "--max-model-len", str(CONTEXT),
        "--max-num-batched-tokens", str(BATCHED_TOKENS), "--block-size", str(BLOCK), "--enable-prefix-caching",
    ]  # fmt: skip


def role(argv: Sequence[str]) -> str:
    line = " ".join(argv)
    if "EngineCore" in line or "VLLM::Worker" in line or "multiprocessing.spawn" in line:
        return "engine"
    if "--service-name" in argv:
        return argv[argv.index("--service-name") + 1]
    return "api server" if "api_server" in line else "infrastructure"


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as reply:
            return bool(json.load(reply)["data"])
    except (OSError, ValueError):
        return False


def gpu_processes() -> list[str]:
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]


async def measure(port: int, pid: int) -> list[dict[str, Any]]:
    client = Client("127.0.0.1", port, "m")
    await client.run(Load(8, 16, OUTPUT_TOKENS, INPUT_WORDS))  # warm
    rows = []
    for streams, requests in POINTS:
        load = Load(streams, requests, OUTPUT_TOKENS, INPUT_WORDS)
        meter = CpuMeter([pid], role)
        meter.start()
        outcome = await client.run(load)
        used = {name: round(s / load.tokens * 1e6, 1) for name, s in meter.seconds().items()}
        used.pop("engine", None)
        rows.append(
            {
                "streams": streams,
                "tokens_per_s": round(outcome.tokens / outcome.seconds),
                "ttft_p50_ms": round(percentile(outcome.ttft_s, 0.5) * 1e3, 1),
                "ttft_p99_ms": round(percentile(outcome.ttft_s, 0.99) * 1e3, 1),
                "e2e_p50_ms": round(percentile(outcome.duration_s, 0.5) * 1e3, 1),
                "cpu_us_per_token": {**used, "all": round(sum(used.values()), 1)},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the servers' logs")
    parser.add_argument("--only", choices=["graph", "vllm"], help="measure one of the two")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    model = out / "llama-8b-random"
    write_model(model)
    found: dict[str, Any] = {}
    for name, command in (("graph", graph_command), ("vllm", vllm_command)):
        if options.only not in (None, name):
            continue
        port = free_port()
        print(f"== {name}", flush=True)
        server = Process(command(model, port), out / f"{name}.log", {}, REPOSITORY)
        try:
            ready_s = server.wait_for(lambda port=port: answers(port), READY_S, name)  # type: ignore[misc]
            print(f"ready in {ready_s:.0f} s", flush=True)
            for pid in descendants(server.pid):
                if role(command_line(pid)) == "VllmWorker":
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    print([e.decode() for e in environment if e.startswith(b"CUDA_VISIBLE")], gpu_processes())
            found[name] = {"ready_s": round(ready_s, 1), "rows": asyncio.run(measure(port, server.pid))}
        finally:
            server.stop()
            time.sleep(2)
            print(f"GPU processes after the stop: {gpu_processes()}", flush=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=2))
    if found.keys() == {"graph", "vllm"}:
        for ours, theirs in zip(found["graph"]["rows"], found["vllm"]["rows"], strict=True):
            print(
                f"{ours['streams']:>4} streams: graph {ours['tokens_per_s']:>6} tok/s, TTFT p50 {ours['ttft_p50_ms']:>7} ms"
                f" | vLLM {theirs['tokens_per_s']:>6} tok/s, TTFT p50 {theirs['ttft_p50_ms']:>7} ms"
                f" | {ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} x the tokens"
            )
    print(f"logs and JSON in {out}")
    os._exit(0)


if __name__ == "__main__":
    main()
