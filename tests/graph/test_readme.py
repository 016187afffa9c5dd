"""The commands and programs of README.md and docs/, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynamo.llm import tiny
from tests.served import ROOT, Served, Start

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def block(kind: str, containing: str) -> str:
    found = [text for language, text in BLOCKS if language == kind and containing in text]
    assert len(found) == 1, f"{len(found)} {kind} blocks contain {containing!r}"
    return found[0]


def run(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": path, "HOME": "/nonexistent"},
        timeout=60,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_the_first_request(tiny_graph: Served) -> None:
    command = block("bash", "/v1/chat/completions").replace("localhost:8000", f"127.0.0.1:{tiny_graph.port}")
    answer = json.loads(run(command).stdout)
    assert answer["choices"][0]["message"]["content"] == tiny.faq()["What is an inference graph?"]


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_the_openai_client(tiny_graph: Served) -> None:
    program = block("python", "from openai import OpenAI").replace("localhost:8000", f"127.0.0.1:{tiny_graph.port}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == tiny.faq()["What is a prefix hit?"]


def test_every_dry_run_prints_a_configuration() -> None:
    shell = "\n".join(text for language, text in BLOCKS if language == "bash")
    lines = re.findall(r"^dynamo serve graphs\.(?!.*--service-name).* -f .*", shell, re.MULTILINE)
    commands = sorted({line.partition("#")[0].replace("--dry-run", "").strip() for line in lines})
    assert len(commands) >= 8
    for command in commands:
        done = run(f"{command} --dry-run")
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert json.loads(last.removeprefix("DYNAMO_SERVICE_CONFIG=")).keys() >= {"Frontend", "VllmWorker"}


def test_a_model_of_your_own_reaches_every_service_that_needs_it() -> None:
    command = block("bash", "--Common.model=Qwen/Qwen3-0.6B      #").partition("#")[0].strip()
    done = run(f"{command} --dry-run")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout.splitlines()[-1].removeprefix("DYNAMO_SERVICE_CONFIG="))
    assert {name: values["model"] for name, values in services.items()} == {
        "Common": "Qwen/Qwen3-0.6B",
        "Processor": "Qwen/Qwen3-0.6B",
        "VllmWorker": "Qwen/Qwen3-0.6B",
    }


def test_shown_files_are_the_files() -> None:
    source = (ROOT / "graphs/agg.py").read_text("utf-8")
    assert source.endswith(block("python", "Frontend.link(Processor).link(VllmWorker)\n"))
    for name in re.findall(r"`(configs/\w+\.yaml)`", TEXT):
        assert yaml.safe_load((ROOT / name).read_text("utf-8"))
    for name in re.findall(r"^\d+\..*?`((?:dynamo|components)/[\w/.]+)`", TEXT, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_error_shown_is_the_error(tmp_path: Path) -> None:
    lines = (ROOT / "configs/agg.yaml").read_text("utf-8").splitlines()
    number = next(i for i, line in enumerate(lines) if line.strip().startswith("block-size") and i > 25)
    lines[number] = lines[number].replace("block-size", "blok-size")
    (tmp_path / "agg.yaml").write_text("\n".join(lines))
    done = run(f"dynamo serve graphs.agg:Frontend -f {tmp_path}/agg.yaml --dry-run")
    shown = block("text", "blok-size").splitlines()
    printed = done.stderr.replace(f"{tmp_path}/agg.yaml", "configs/agg.yaml").splitlines()
    assert printed[:2] == shown
    assert done.returncode == 1


def test_the_service_of_ones_own(serve_graph: Start, tmp_path: Path) -> None:
    (tmp_path / "shout.py").write_text(block("python", "class Shout"))
    served = serve_graph("--working-dir", str(tmp_path), graph="shout.py").ready()
    command = block("bash", "/speak").splitlines()[1].replace("localhost:8000", f"127.0.0.1:{served.port}")
    assert run(command).stdout == command.partition("# ")[2] == "HELLO!THERE!"
    served.stop()


def test_make_targets_that_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"serve", "test", "lint", "bench", "docs"} <= named <= targets
