"""`dynamo env`: its fields, missing parts, and hidden secrets."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest

import dynamo
from dynamo.cli import env as command_env
from tests.cli.conftest import Graph
from tests.cli.terminal import ROOT, command


def fields(output: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in output.splitlines())


def test_names_and_versions(graph: Graph):
    result = command("env", **graph.servers, DYN_LOG="info")
    assert (result.returncode, result.stderr) == (0, "")
    found = fields(result.stdout)
    assert found["dynamo"] == dynamo.__version__
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found["click"] == metadata.version("click")
    assert re.fullmatch(r"\d+ usable of \d+", found["cpu cores"])
    assert re.match(r"\d+\.\d GiB, \d+\.\d GiB available", found["memory"])
    for name in ("os", "kernel", "cpu", "cpu flags", "nvidia driver", "vllm", "torch"):
        assert found[name]
    for program in ("nats-server", "etcd"):
        assert re.match(r"\d+\.\d+\.\d+ \(/", found[program])
    assert re.fullmatch(r"answers at 127\.0\.0\.1:\d+ \(\d+\.\d+\.\d+\)", found["nats server"])
    assert re.fullmatch(r"answers at 127\.0\.0\.1:\d+ \(\d+\.\d+\.\d+\)", found["etcd server"])
    assert found["ETCD_ENDPOINTS"] == graph.servers["ETCD_ENDPOINTS"]
    assert found["DYN_LOG"] == "info"


def test_secrets_are_hidden():
    result = command(
        "env",
        NATS_SERVER="nats://me:hush@127.0.0.1:9",
        ETCD_ENDPOINTS="http://127.0.0.1:9",
        DYN_API_KEYS="hush",
        NATS_AUTH_TOKEN="hush",
        ETCD_AUTH_CA="-----BEGIN CERTIFICATE-----\nhush",
        HF_TOKEN="hush",
        DYNAMO_SERVICE_CONFIG='{"Frontend": {"api_keys": ["hush"]}}',
        DYNAMO_URL="http://me:hush@here:8000",
    )
    assert result.returncode == 0
    assert "hush" not in result.stdout
    found = fields(result.stdout)
    assert found["NATS_SERVER"] == "nats://(hidden)@127.0.0.1:9"
    assert found["DYN_API_KEYS"] == found["HF_TOKEN"] == "(hidden)"
    assert found["NATS_AUTH_TOKEN"] == found["ETCD_AUTH_CA"] == "(hidden)"
    assert found["nats server"] == "does not answer at 127.0.0.1:9 (Connection refused)"


def test_it_imports_nothing_heavy():
    code = (
        "import sys; from dynamo.cli.main import main; main(['env']);"
        "print('heavy:', *(m for m in ('torch', 'vllm', 'grpc', 'fastapi', 'transformers') if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.endswith("heavy:\n")


def test_a_failing_probe_becomes_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> command_env.Lines:
        yield "first", "1"
        raise RuntimeError("no /proc here")

    assert list(command_env._run_probe(broken)) == [("first", "1"), ("broken", "unknown (RuntimeError: no /proc here)")]
    monkeypatch.setattr(command_env, "PACKAGES", ("no-such-package",))
    command_env.env.main([], standalone_mode=False)
    assert "no-such-package: Not installed\n" in capsys.readouterr().out


def test_gpus_of_nvidia_smi_are_listed(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559 MiB, 570.1'\necho '1, Other, 1 MiB, 570.1'\n")
    program.chmod(0o755)
    found = fields(command("env", PATH=f"{tmp_path}:/usr/bin:/bin").stdout)
    assert found["gpu 0"] == "NVIDIA H100 80GB HBM3, 81559 MiB"
    assert found["gpu 1"] == "Other, 1 MiB"
    assert found["nvidia driver"] == "570.1"
