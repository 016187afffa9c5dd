"""The Dockerfiles as far as they can be tried without Docker, and the health check beside a graph that runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from dynamo.launcher.run_dir import announce
from tests.cli.terminal import COMMAND, environment
from tests.conftest import Installed
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "container"
CHECK = CONTAINER / "healthcheck.py"
DOCKERFILES = [CONTAINER / "Dockerfile.cpu", CONTAINER / "Dockerfile.vllm"]
each = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return (name, arguments) of each instruction in order, without comments and with lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    found = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in found if line)]


def last(dockerfile: Path, name: str) -> str:
    return [rest for instruction, rest in instructions(dockerfile) if instruction == name][-1]


def ignored(path: str) -> bool:
    """Return True if .dockerignore excludes a path: the last line that matches it or a folder above it decides."""
    above = ["/".join(path.split("/")[: count + 1]) for count in range(path.count("/") + 1)]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(pattern, place) for place in above):
                out = not line.startswith("!")
    return out


def copied(dockerfile: Path) -> list[str]:
    """Return the paths of the repository that COPY instructions use."""
    words = [rest.split() for name, rest in instructions(dockerfile) if name == "COPY" and "--from" not in rest]
    return [source for sources in words for source in sources[:-1]]


@each
def test_it_passes_hadolint(dockerfile: Path) -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "warning", str(dockerfile)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@each
def test_copied_paths_exist_and_are_not_ignored(dockerfile: Path) -> None:
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        below = [path for path in (ROOT / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        for path in [ROOT / source, *below]:
            assert not ignored(str(path.relative_to(ROOT))), path
    stages = {rest.split(" AS ")[1] for name, rest in instructions(dockerfile) if name == "FROM"}
    assert set(re.findall(r"COPY --from=(\S+)", dockerfile.read_text())) <= stages


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "tests/conftest.py", "dynamo/llm/__pycache__/x.pyc", "a.env"]
)
def test_other_paths_are_excluded_from_the_build(path: str) -> None:
    assert ignored(path)


@each
def test_the_default_command_is_accepted_by_dynamo(dockerfile: Path) -> None:
    program, *arguments = json.loads(last(dockerfile, "CMD"))
    assert program == "dynamo"
    config = arguments[arguments.index("-f") + 1]
    assert Path(config).parts[0] in copied(dockerfile)
    dry = subprocess.run(
        [*COMMAND, *arguments, "--dry-run"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.suffix[1:])
def image(request: pytest.FixtureRequest, installed: Installed, tmp_path: Path) -> tuple[Path, Sequence[str]]:
    """The folder of an image's /workspace, and the command that runs dynamo with the image's variables."""
    workspace = tmp_path / "workspace"
    found = instructions(request.param)
    last_stage = found[len(found) - [name for name, _ in reversed(found)].index("FROM") :]
    for source, target in (rest.split() for name, rest in last_stage if name == "COPY" and "--from" not in rest):
        if target.startswith("./") and (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, workspace / target, ignore=shutil.ignore_patterns("__pycache__"))
    (folder,) = re.findall(r'"workspace\.pth"\)\.write_text\("(\S+)\\n"\)', request.param.read_text())
    assert folder == last(request.param, "WORKDIR")
    (installed.site / "workspace.pth").write_text(f"{workspace}\n")
    (host,) = re.findall(r"DYN\w+=\S+", " ".join(rest for name, rest in last_stage if name == "ENV"))
    return workspace, ["env", "-u", "PYTHONPATH", host, installed.python, "-m", "dynamo"]


NEMOTRON = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_llama_nemotron_4b.yaml"]


def test_a_graph_is_served_from_the_folder_of_ai_dynamo(image: tuple[Path, Sequence[str]]) -> None:
    workspace, command = image
    words = [*command, *NEMOTRON, "--dry-run"]
    dry = subprocess.run(words, cwd=workspace / "examples/llm", env=environment(), capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert '"host": "0.0.0.0"' in dry.stdout
    assert re.search(r"Frontend\.host +\"0\.0\.0\.0\" +DYN_DEFAULT_HOST\n", dry.stderr)
    assert re.search(rf"components\.worker +{workspace}/components/worker\.py\n", dry.stderr)


def test_a_mounted_configuration_is_served_to_other_machines(image: tuple[Path, Sequence[str]]) -> None:
    """As after `run.sh -v CONFIG:/workspace/examples/llm/configs`. 127.0.0.2 is not where a graph listens by default."""
    workspace, command = image
    configs = workspace / "examples/llm/configs"
    shutil.rmtree(configs)
    configs.mkdir()
    text = (ROOT / "configs/agg_llama_nemotron_4b.yaml").read_text()
    (configs / "agg_llama_nemotron_4b.yaml").write_text(text)
    log, port = workspace / "log", free_port()
    mock = ["--Common.model=dynamo-tiny", "--VllmWorker.engine=mock", "--VllmWorker.ServiceArgs.resources.gpu=0"]
    words = [*command, *NEMOTRON, *mock, "--infra", "embedded", "-p", str(port), "--metrics-port", "0"]
    with log.open("wb") as output:
        graph = subprocess.Popen(words, cwd=workspace / "examples/llm", env=environment(), stdout=output, stderr=output)
    try:
        wait_for(graph, log, "\nother machines reach it without a key: DYN_API_KEYS sets keys that clients must send\n")
        with urllib.request.urlopen(f"http://127.0.0.2:{port}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"]
    finally:
        graph.send_signal(signal.SIGTERM)
        assert graph.wait(40) == 0


def test_a_users_folder_in_an_image_uses_the_components_there(image: tuple[Path, Sequence[str]]) -> None:
    workspace, command = image
    mine = workspace / "mine"
    (mine / "graphs").mkdir(parents=True)
    (mine / "graphs/agg.py").write_text((ROOT / "graphs/agg.py").read_text())
    words = [*command, "serve", "graphs.agg:Frontend", "--dry-run"]
    dry = subprocess.run(words, cwd=mine, env=environment(), capture_output=True, text=True)
    assert re.search(r"graphs\.agg +graphs/agg\.py\n", dry.stderr), dry.stderr
    assert re.search(rf"components\.worker +{workspace}/components/worker\.py\n", dry.stderr)


@each
def test_it_does_not_run_as_root_and_is_stopped_by_sigterm(dockerfile: Path) -> None:
    assert all(int(number) > 0 for number in last(dockerfile, "USER").split(":"))
    assert json.loads(last(dockerfile, "ENTRYPOINT")) == ["tini", "-s", "--"]
    names = [name for name, _ in instructions(dockerfile)]
    assert "STOPSIGNAL" not in names
    assert len(names) - names[::-1].index("RUN") < names.index("USER")  # nothing is installed into its home


@each
def test_its_health_check_is_the_copied_script(dockerfile: Path) -> None:
    program, script = json.loads(last(dockerfile, "HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    assert ("COPY", f"container/healthcheck.py {script}") in instructions(dockerfile)


def test_the_gpu_pins_cover_all_dependencies() -> None:
    """Compare names only: whether the versions are compatible is for the resolver, which needs an index."""
    pinned = dict(
        line.split("==") for line in (CONTAINER / "constraints-gpu.txt").read_text().splitlines() if line[0] != "#"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *(line for extra in ("gpu", "nixl") for line in project["optional-dependencies"][extra]),
    ]
    names = {re.split(r"[><=\[; ]", line)[0].lower() for line in needed}
    assert names <= pinned.keys()
    assert pinned["vllm"] == "0.26.0"
    assert pinned["torch"] == "2.11.0"


# -- the health check


def healthcheck(pid: int, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the health check as Docker does, in a container whose /tmp is `directory` and whose first process is `pid`."""
    env = environment(TMPDIR=str(directory))
    return subprocess.run(
        [sys.executable, CHECK, str(pid)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_a_graph_is_healthy_only_while_it_serves() -> None:
    directory = Path(tempfile.mkdtemp(prefix="dt-"))  # short: unix sockets go below it
    port = free_port()
    log = directory / "log"
    with log.open("wb") as output:
        arguments = [
            "serve",
            "graphs.agg:Frontend",
            "-f",
            "configs/agg_mock.yaml",
            "--infra",
            "embedded",
            "-p",
            str(port),
        ]
        env = environment(TMPDIR=str(directory))
        graph = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, env=env, stdout=output, stderr=output)
    try:
        before = healthcheck(graph.pid, directory)
        assert before.returncode == 1 or "\nready in" in log.read_text()
        wait_for(graph, log, "\nready in")
        assert (healthcheck(graph.pid, directory).returncode, healthcheck(graph.pid, directory).stderr) == (0, "")
        graph.send_signal(signal.SIGTERM)
        assert graph.wait(40) == 0
        after = healthcheck(graph.pid, directory)
        assert (after.returncode, after.stderr) == (1, f"process {graph.pid}: No such file or directory\n")
    finally:
        graph.kill()
        graph.wait()
        shutil.rmtree(directory, ignore_errors=True)


def test_joining_services_are_unhealthy_until_they_are_ready(nats_server: str, etcd_server: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="dt-"))
    log, port = directory / "log", str(free_port())
    arguments = ["graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--service-name", "Processor", "--supervise"]
    variables = {"TMPDIR": str(directory), "NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server}
    env = environment(**variables, DYN_METRICS_PORT=port)
    with log.open("wb") as output:  # it waits for workers, of which there are none
        joined = subprocess.Popen([*COMMAND, "serve", *arguments], cwd=ROOT, env=env, stdout=output, stderr=output)
    try:
        wait_for(joined, log, "waiting for VllmWorker")
        found = healthcheck(joined.pid, directory)
        assert (found.returncode, found.stderr) == (1, "Processor: no process is ready\n")
    finally:
        joined.send_signal(signal.SIGTERM)
        joined.wait(40)
        shutil.rmtree(directory, ignore_errors=True)


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    ticks = threading.Event()
    for _ in range(600):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()
        ticks.wait(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in a container without a running graph."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("DYNAMO_SERVICE_NAME", "DYNAMO_SYSTEM_APP_PORT"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("healthcheck", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def http(status: int, text: str = "") -> Iterator[int]:
    """Yield the port of a server that answers every GET with `status` and `text`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", free_port()), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (404, True), (401, True), (503, False), (500, False)])
def test_the_status_code_decides(check: ModuleType, tmp_path: Path, status: int, healthy: bool) -> None:
    run_dir = tmp_path / "dynamo-one"
    run_dir.mkdir()
    with http(status) as port, announce(run_dir, "graphs.agg:Frontend", ("0.0.0.0", port), {}):
        fault = check.fault(1)
    assert (fault is None) == healthy, fault
    assert healthy or f"http://127.0.0.1:{port}/health: {status}" in fault


def test_a_closed_port_is_unhealthy(check: ModuleType, tmp_path: Path) -> None:
    run_dir = tmp_path / "dynamo-one"
    run_dir.mkdir()
    with announce(run_dir, "graphs.agg:Frontend", ("127.0.0.1", free_port()), {}):
        assert "Connection refused" in check.fault(1)


UP = "# TYPE dynamo_supervisor_process_up gauge\n"
for_worker = 'dynamo_supervisor_process_up{namespace="dynamo",service="VllmWorker",worker="%d"} %.1f\n'
for_prefill = 'dynamo_supervisor_process_up{service="PrefillWorker",worker="1"} %.1f\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (UP + for_worker % (1, 1), None),
        (UP + for_worker % (1, 0) + for_worker % (2, 1), None),
        (UP + for_worker % (1, 0) + for_worker % (2, 0), "VllmWorker: no process is ready"),
        (UP + for_worker % (1, 1) + for_prefill % 0, "PrefillWorker: no process is ready"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])  # the other one is of a translator of addresses
def test_each_joined_service_must_have_a_ready_process(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, text: str, fault: str | None
) -> None:
    run_dir = tmp_path / "dynamo-one"
    run_dir.mkdir()
    monkeypatch.setattr(check, "ANSWER_S", 1.0)
    with http(200, text) as port:
        url = f"http://{host}:{port}/metrics"
        with announce(run_dir, "graphs.agg:Frontend", None, {}, url):
            assert check.fault(1) == fault
    with announce(run_dir, "graphs.agg:Frontend", None, {}, url):
        assert url in check.fault(1)  # nothing listens


def test_a_graph_without_http_is_healthy_while_it_runs(check: ModuleType, tmp_path: Path) -> None:
    run_dir = tmp_path / "dynamo-one"
    run_dir.mkdir()
    with announce(run_dir, "graphs.agg:VllmWorker", None, {}):
        assert check.fault(1) is None


@pytest.mark.parametrize(
    ("command", "status", "healthy"),
    [
        ("bash", 0, True),
        ("dynamo serve graphs.agg:Frontend", 0, False),
        ("dynamo serve graphs.agg:Frontend --service-name VllmWorker", 0, True),
        ("dynamo serve graphs.agg:Frontend --service-name=VllmWorker", 200, True),
        ("dynamo serve graphs.agg:Frontend --service-name VllmWorker", 500, False),
    ],
)
def test_without_a_graph_the_first_process_decides(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, command: str, status: int, healthy: bool
) -> None:
    """`status` is that of the service's probe; 0: it has none."""
    waits = [sys.executable, "-c", "print(flush=True); input()", *shlex.split(command)]
    with http(status or 500) as port, subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin
        assert first.stdout
        first.stdout.readline()
        if status:
            monkeypatch.setenv("DYNAMO_SYSTEM_APP_PORT", str(port))
        assert (check.fault(first.pid) is None) == healthy
        first.stdin.write(b"\n")
