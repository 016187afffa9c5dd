"""`dynamo serve --dry-run` and the command line around it, run as from a shell."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynamo

ROOT = Path(__file__).parents[2]
AGG = ("serve", "graphs.agg:Frontend", "-f", "./configs/agg.yaml", "--dry-run")
HEAVY = ("torch", "vllm", "grpc", "fastapi", "transformers", "rich")

EXPECTED = """\
Service Configuration:
{
  "Frontend": {
    "served_model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "endpoint": "dynamo.Processor.chat/completions",
    "port": 8000
  },
  "Processor": {
    "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "block-size": 64,
    "max-model-len": 16384,
    "router": "%(router)s"
  },
  "VllmWorker": {
    "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "enforce-eager": true,
    "block-size": 64,
    "max-model-len": 16384,
    "max-num-batched-tokens": 16384,
    "enable-prefix-caching": true,
    "router": "random",
    "tensor-parallel-size": 1,
    "ServiceArgs": {
      "workers": 1
    }
  }
}

Environment Variable that would be set:
DYNAMO_SERVICE_CONFIG={"Frontend": {"served_model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", \
"endpoint": "dynamo.Processor.chat/completions", "port": 8000}, \
"Processor": {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "block-size": 64, "max-model-len": 16384, \
"router": "%(router)s"}, \
"VllmWorker": {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "enforce-eager": true, "block-size": 64, \
"max-model-len": 16384, "max-num-batched-tokens": 16384, "enable-prefix-caching": true, "router": "random", \
"tensor-parallel-size": 1, "ServiceArgs": {"workers": 1}}}
"""

GRAPH = '''\
"""A graph without engines: the services of the era, no network."""

from typing import Any, Literal

from dynamo.sdk import depends, service


@service
class Backend:
    def __init__(self, model: str = "", size: int = 64, mode: Literal["fast", "slow"] = "fast") -> None: ...


@service
class Old:
    """Reads ServiceConfig itself, so takes any key."""


@service
class Entry:
    backend = depends(Backend)
    old = depends(Old)

    def __init__(self, host: str = "0.0.0.0", port: int = 8000, names: list[str] | None = None) -> None: ...
'''


def command(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DYN", "NO_COLOR"))}
    return subprocess.run(
        [sys.executable, "-m", "dynamo", *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("graph")
    (directory / "small.py").write_text(GRAPH)
    return directory


def settings(result: subprocess.CompletedProcess[str]) -> dict:
    """Return the configuration of a dry run, after checking that its JSON and its last line agree."""
    assert result.returncode == 0, result.stderr
    head, _, last = result.stdout.removesuffix("\n").partition(
        "\n\nEnvironment Variable that would be set:\nDYNAMO_SERVICE_CONFIG="
    )
    assert "\n" not in last
    values = json.loads(last)
    assert last == json.dumps(values)
    assert head == "Service Configuration:\n" + json.dumps(values, indent=2)
    return values


@pytest.mark.parametrize(
    ("overrides", "router"),
    [
        ((), "round-robin"),
        (("--Processor.router=random",), "random"),
        (("--Processor.router", "random"), "random"),
        (("--Processor.router", "=", "random"), "random"),
    ],
)
@pytest.mark.parametrize("columns", ["20", "400"])
def test_standard_output_is_the_contract(overrides, router, columns):
    result = command(*AGG, *overrides, COLUMNS=columns)
    assert result.stdout == EXPECTED % {"router": router}
    assert result.returncode == 0
    assert settings(result)["Processor"]["router"] == router


def test_standard_error_names_the_source_of_each_value():
    result = command(*AGG, "--Processor.router=random")
    lines = [re.split(r" {2,}", line.strip()) for line in result.stderr.splitlines()]
    assert ["Processor.router", '"random"', "--Processor.router"] in lines
    line = (ROOT / "configs/agg.yaml").read_text().splitlines().index("    workers: 1") + 1
    assert ["VllmWorker.ServiceArgs.workers", "1", f"configs/agg.yaml:{line}"] in lines


@pytest.mark.parametrize("name", ["agg", "agg_llama_nemotron_4b", "agg_tiny", "agg_mock"])
def test_the_configurations_of_the_repository_resolve(name):
    values = settings(command("serve", "graphs.agg:Frontend", "-f", f"configs/{name}.yaml", "--dry-run"))
    assert values["Frontend"]["port"] == 8000
    assert values["Processor"]["model"] == values["VllmWorker"]["model"]
    assert values["Processor"]["max-model-len"] == values["VllmWorker"]["max-model-len"]
    assert "common-configs" not in json.dumps(values)
    if name == "agg_llama_nemotron_4b":
        assert values["Frontend"] == {"port": 8000}
        assert values["VllmWorker"]["model"] == "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1"
        assert values["VllmWorker"]["max-model-len"] == 131072


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_configuration_has_a_comment(path):
    lines = path.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r" +[\w-]+:", line) and not re.match(r" +resources:", line):
            assert above.strip().startswith("#"), f"{path.name}: {line}"


@pytest.mark.parametrize(("explain", "heavy"), [("json", HEAVY), ("table", set(HEAVY) - {"rich"})])  # rich draws tables
def test_a_dry_run_loads_nothing_heavy(explain, heavy):
    code = (
        "import sys; from dynamo.cli.main import main; code = main(sys.argv[1:]);"
        f"print('heavy:', *(m for m in {heavy!r} if m in sys.modules), file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *AGG, "--explain", explain],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr.endswith("heavy:\n")


def test_help_loads_no_command():
    code = "import sys; from dynamo.cli.main import main; main(['--help']); print('dynamo.cli.serve' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "serve  Start an inference graph" in result.stdout
    assert result.stdout.endswith("False\n")


def test_version_and_help():
    for flag in ("--version", "-v"):
        result = command(flag)
        assert (result.returncode, result.stdout) == (0, f"Dynamo CLI version: {dynamo.__version__}\n")
    bare = command()
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "Usage: dynamo" in bare.stderr
    text = command("serve", "--help").stdout
    for part in ("--config-file", "--service-name", "DYNAMO_PORT", "DYN_INFRA", "--Service.key=value", "Examples:"):
        assert part in text


def test_the_module_runs_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "dynamo.cli.main", "-v"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"Dynamo CLI version: {dynamo.__version__}\n")


def test_port_and_host_are_settings_of_the_entry(graph):
    (graph / "c.yaml").write_text("Entry: {port: 1}\n")
    base = ("serve", "small:Entry", "--dry-run", "-f", "c.yaml")
    result = command(*base, "-p", "9000", "--host", "::1", cwd=graph)
    assert settings(result) == {"Entry": {"port": 9000, "host": "::1"}}
    assert re.search(r"Entry\.port +9000 +--port\n", result.stderr)
    result = command(*base, cwd=graph, DYNAMO_PORT="9001")
    assert settings(result) == {"Entry": {"port": 9001}}
    assert re.search(r"Entry\.port +9001 +DYNAMO_PORT\n", result.stderr)
    assert settings(command(*base, "--Entry.port=9002", "-p", "1", cwd=graph))["Entry"] == {"port": 9002}


def test_without_a_file_only_given_values_are_shown(graph):
    base = ("serve", "small:Entry", "--dry-run")
    assert settings(command(*base, cwd=graph)) == {}
    assert settings(command(*base, "--Backend.size=-1", "--Old.a.b=x", cwd=graph)) == {
        "Backend": {"size": -1},
        "Old": {"a": {"b": "x"}},
    }


def test_a_dependency_may_be_the_entry(graph):
    result = command("serve", "small:Entry.backend", "--dry-run", "--Backend.size=2", cwd=graph)
    assert settings(result) == {"Backend": {"size": 2}}
    result = command("serve", "small:Entry.nope", "--dry-run", cwd=graph)
    assert result.stderr.startswith("error: small:Entry.nope: Entry has no dependency 'nope'\nhint: dependencies: ")


def test_configuration_in_a_variable(graph):
    base = ("serve", "small:Entry", "--dry-run")
    given = {"DYN_DEPLOYMENT_CONFIG": '{"Entry": {"port": 7}}'}
    assert settings(command(*base, cwd=graph, **given)) == {"Entry": {"port": 7}}
    assert settings(command(*base, "--Entry.port=8", cwd=graph, **given)) == {"Entry": {"port": 8}}
    (graph / "c.yaml").write_text("Entry: {port: 1}\n")
    both = command(*base, "-f", "c.yaml", cwd=graph, **given)
    assert settings(both) == {"Entry": {"port": 7}}
    assert both.stderr.startswith("warning: DYN_DEPLOYMENT_CONFIG is set: c.yaml is ignored\n")
    as_json = command(*base, "-f", "c.yaml", cwd=graph, DYN_LOGGING_JSONL="true", **given)
    told = json.loads(as_json.stderr.splitlines()[0])
    assert (told["level"], told["message"]) == ("WARNING", "DYN_DEPLOYMENT_CONFIG is set: c.yaml is ignored")
    bad = command(*base, cwd=graph, DYN_DEPLOYMENT_CONFIG="Entry: {port: x}")
    assert bad.stderr.startswith('error: DYN_DEPLOYMENT_CONFIG:1 Entry.port: expected int, found "x"')


def test_common_is_kept_for_code_that_reads_it(graph):
    (graph / "c.yaml").write_text("Common: {model: m, scope: all}\nBackend: {common-configs: [model]}\n")
    result = command("serve", "small:Entry", "--dry-run", "-f", "c.yaml", cwd=graph)
    assert settings(result) == {"Common": {"model": "m", "scope": "all"}, "Backend": {"model": "m"}}
    assert re.search(r"Backend\.model +\"m\" +c\.yaml:1\n", result.stderr)
    assert "Common.model" not in result.stderr


@pytest.mark.parametrize("option", ["--file", "--config", "--config-file"])
@pytest.mark.parametrize("form", ["{}=c.yaml", "{} c.yaml"])
def test_the_file_has_all_its_names_of_0x(option, form, graph):
    (graph / "c.yaml").write_text("Entry: {port: 7}\n")
    base = ("serve", "small:Entry", "--no-dry-run", "--dry-run")
    assert settings(command(*base, *form.format(option).split(), cwd=graph)) == {"Entry": {"port": 7}}
    assert (option == "--config-file") == (f"{option} " in command("serve", "--help").stdout)


def test_what_is_ignored_is_a_warning_on_a_line_of_its_own(graph):
    (graph / "c.yaml").write_text("Entry: {port: 7}\nPlanner: {a: 1}\nhosts: [a]\n")
    result = command("serve", "small:Entry", "--dry-run", "-f", "c.yaml", "--Planner.no-operation=true", cwd=graph)
    assert settings(result) == {"Entry": {"port": 7}, "Planner": {"a": 1, "no-operation": True}}
    assert result.stderr.splitlines()[:3] == [
        "warning: c.yaml:2 Planner: ignored: this graph has no such service (ai-dynamo's planner)",
        "warning: c.yaml:3 hosts: ignored: it is not a section of a service, and nothing reads it; remove it",
        "Processes:",
    ]
    given = {"DYN_DEPLOYMENT_CONFIG": "Entry: {port: 7}\nPlanner: {a: 1}\n", "DYN_LOGGING_JSONL": "1"}
    first = json.loads(command("serve", "small:Entry", "--dry-run", cwd=graph, **given).stderr.splitlines()[0])
    assert (first["level"], first["message"].partition(": ")[0]) == ("WARNING", "DYN_DEPLOYMENT_CONFIG:2 Planner")


def test_working_dir_is_where_the_graph_is(graph):
    result = command("serve", "small:Entry", "--dry-run", "--working-dir", str(graph), "--Entry.names=[é]")
    assert result.returncode == 1
    result = command("serve", "small:Entry", "--dry-run", "--working-dir", str(graph), '--Entry.names=["é"]')
    assert settings(result) == {"Entry": {"names": ["é"]}}
    assert result.stdout.isascii()


BAD = {
    "missing file": (["-f", "missing.yaml"], "", 2, "Invalid value for '-f' / '--config-file': "),
    "file is a directory": (["-f", "."], "", 2, "Invalid value for '-f' / '--config-file': "),
    "bad YAML": ([], "Entry:\n  port: 1\n bad\n", 1, "c.yaml:3: not valid YAML: "),
    "not a mapping": ([], "- 1\n", 1, "c.yaml:1: expected a mapping of services, found a list"),
    "service not a mapping": ([], "Entry: 5\n", 1, "c.yaml:1 Entry: expected a mapping of settings, found 5"),
    "strict, duplicate key": (
        ["--strict"],
        "Entry:\n  port: 1\n  port: 2\n",
        1,
        "c.yaml:3 Entry.port: already given at line 2",
    ),
    "strict, section of another graph": (["--strict"], "\nPlanner: {a: 1}\n", 1, "c.yaml:2 Planner: ignored"),
    "strict, top-level list": (["--strict"], "hosts: [a]\n", 1, "c.yaml:1 hosts: ignored"),
    "unknown service": ([], "\nEntri: {}\n", 1, "c.yaml:2 Entri: no such service in the graph"),
    "unknown key": ([], "Backend:\n  sise: 1\n", 1, "c.yaml:2 Backend.sise: no such setting"),
    "wrong type": ([], "Backend:\n  size: abc\n", 1, 'c.yaml:2 Backend.size: expected int, found "abc"'),
    "wrong choice": ([], "Backend: {mode: fats}\n", 1, "c.yaml:1 Backend.mode: expected one of fast, slow"),
    "bad ServiceArgs": ([], "Old: {ServiceArgs: {workers: 0}}\n", 1, "c.yaml:1 Old.ServiceArgs.workers: expected"),
    "common-configs": ([], "Old: {common-configs: a}\n", 1, "c.yaml:1 Old.common-configs: expected a list"),
    "override without value": (["--Backend.size"], "", 2, "--Backend.size: a value is missing"),
    "override before a flag": (["--Backend.size", "--dry-run"], "", 2, "--Backend.size: a value is missing"),
    "override of a wrong type": (["--Backend.size=abc"], "", 1, '--Backend.size: expected int, found "abc"'),
    "override of an unknown key": (["--Backend.sise=1"], "", 1, "--Backend.sise: no such setting"),
    "override of an unknown service": (["--Bakend.size=1"], "", 1, "--Bakend.size: no such service in the graph"),
    "override without a key": (["--Backend=1"], "", 2, "No such option '--Backend'."),
    "unknown option": (["--dryrun"], "", 2, "No such option '--dryrun'."),
    "stray argument": (["stray"], "", 2, "Got unexpected extra argument (stray)"),
    "bad port": (["-p", "http"], "", 2, "Invalid value for '-p' / '--port'"),
    "port out of range": (["-p", "65536"], "", 2, "Invalid value for '-p' / '--port'"),
    "bad infra": (["--infra", "mine"], "", 2, "Invalid value for '--infra'"),
    "system app port of many": (["--system-app-port", "1"], "", 2, "--system-app-port needs --service-name"),
    "a port that is none": (
        ["--system-app-port", "abc"],
        "",
        2,
        "Invalid value for '--system-app-port': 'abc' is not a valid port",
    ),
    "target elsewhere": (["--target", "kubernetes"], "", 2, "Invalid value for '--target'"),
    "depends without =": (["--depends", "backend"], "", 1, "Invalid format for --depends option"),
    "unknown service name": (["--service-name", "Nope"], "", 1, "small:Entry has no service 'Nope'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_a_hint(case, graph):
    arguments, text, code, message = BAD[case]
    (graph / "c.yaml").write_text(text)
    file = [] if "-f" in arguments else ["-f", "c.yaml"]
    result = command("serve", "small:Entry", *file, "--dry-run", *arguments, cwd=graph)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["serve"], 2),
        (["nonsense"], 2),
        (["serve", "nosuch:Nope", "--dry-run"], 1),
        (["serve", "small:Nope", "--dry-run"], 1),
    ],
)
def test_a_usage_error_gives_one_line_and_a_hint(arguments, code, graph):
    result = command(*arguments, cwd=graph)
    assert result.returncode == code
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


def test_a_bug_in_the_graph_keeps_its_traceback(graph):
    (graph / "broken.py").write_text("1 / 0\n")
    result = command("serve", "broken:Entry", "--dry-run", cwd=graph)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def test_a_closed_pipe_is_no_error():
    script = f"{sys.executable} -m dynamo {' '.join(AGG)} 2>/dev/null | head -1"
    result = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "Service Configuration:\n"
    assert result.stderr == ""
