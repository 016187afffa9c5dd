"""build.sh and run.sh: what they print, what they hand to docker, what they refuse. shellcheck reads all scripts."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dynamo

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "container"
USER = f"{os.getuid()}:{os.getgid()}"
HOST = (
    "docker run --network host --ipc host --shm-size=10G --ulimit memlock=-1 --ulimit stack=67108864 "
    f"--ulimit nofile=65536:65536 --cap-add CAP_SYS_PTRACE --stop-timeout 40 --user {USER} -w /workspace"
)
CACHE = "-v /home/ann/.cache/huggingface:/home/dynamo/.cache/huggingface"
BUILT = {name: f"--file {CONTAINER}/Dockerfile.{name} {ROOT}" for name in ("vllm", "cpu")}

BUILDS = {
    "": f"docker build --tag dynamo:latest-vllm {BUILT['vllm']}",
    "--framework cpu": f"docker build --tag dynamo:latest-cpu {BUILT['cpu']}",
    "--framework vllm_v1": f"docker build --tag dynamo:latest-vllm {BUILT['vllm']}",
    "--framework VLLM_NIXL": f"docker build --build-arg ENABLE_NIXL=true --tag dynamo:latest-vllm {BUILT['vllm']}",
    "--target builder --no-cache": (
        f"docker build --target builder --no-cache --tag dynamo:latest-vllm-builder {BUILT['vllm']}"
    ),
    "--framework Cpu --base-image my/python --base-image-tag 3.11": (
        "docker build --build-arg BASE_IMAGE=my/python --build-arg BASE_IMAGE_TAG=3.11 "
        f"--tag dynamo:latest-cpu {BUILT['cpu']}"
    ),
    "--tag a:1 --tag b:2 --platform linux/amd64": (
        f"docker build --platform linux/amd64 --tag a:1 --tag b:2 {BUILT['vllm']}"
    ),
    "--cache-from type=gha --cache-to type=inline --build-context x=../x --build-arg 'A=b c'": (
        "docker build --cache-from type=gha --cache-to type=inline --build-context x=../x "
        f"--build-arg A=b\\ c --tag dynamo:latest-vllm {BUILT['vllm']}"
    ),
    "--framework cpu --release-build": (
        f"docker build --tag dynamo:latest-cpu --tag dynamo:{dynamo.__version__}-cpu {BUILT['cpu']}"
    ),
}
RUNS = {
    "": f"{HOST} --gpus all --rm {CACHE} dynamo:latest-vllm",
    "--gpus all -it --framework vllm -v /a/../config:/workspace/configs": (
        f"{HOST} --gpus all -it --rm {CACHE} -v /a/../config:/workspace/configs dynamo:latest-vllm bash"
    ),
    "--framework cpu": f"{HOST} --rm {CACHE} dynamo:latest-cpu",
    "--framework cpu --gpus all --target builder": f"{HOST} --gpus all --rm {CACHE} dynamo:latest-cpu-builder",
    "--framework VLLM_NIXL --gpus NONE --hf-cache none": f"{HOST} --rm dynamo:latest-vllm",
    "--image me/it:1 --name one -- dynamo serve 'a b' -p 9000": (
        f"{HOST} --gpus all --rm --name one {CACHE} me/it:1 dynamo serve a\\ b -p 9000"
    ),
    "-it --entrypoint sh --privileged true --rm FALSE": (
        f"{HOST} --gpus all -it --privileged --entrypoint sh {CACHE} dynamo:latest-vllm"
    ),
    "--privileged --rm --hf-cache '/my models'": (
        f"{HOST} --gpus all --rm --privileged -v /my\\ models:/home/dynamo/.cache/huggingface dynamo:latest-vllm"
    ),
    "--mount-workspace -e A='b c' -e B": (
        f"{HOST} --gpus all --rm -v {ROOT}:/workspace -e PYTHONPATH=/workspace {CACHE} "
        "-e A=b\\ c -e B dynamo:latest-vllm"
    ),
    "--workspace /srv/mine --user 0:0 -it -- dynamo status": (
        f"{HOST.replace(f'--user {USER}', '--user 0:0')} --gpus all -it --rm "
        f"-v /srv/mine:/workspace -e PYTHONPATH=/workspace {CACHE} dynamo:latest-vllm dynamo status"
    ),
    "--gpus all -it --framework vllm -v /a/../config:/workspace/examples/llm/configs": (
        f"{HOST} --gpus all -it --rm {CACHE} -v /a/../config:/workspace/examples/llm/configs dynamo:latest-vllm bash"
    ),
    "--framework VLLM_V1 --runtime nvidia --workdir /workspace/examples/llm": (
        f"{HOST}/examples/llm --gpus all --runtime nvidia --rm {CACHE} dynamo:latest-vllm"
    ),
    "--gpus none --runtime nvidia --use-nixl-gds": (
        f"{HOST} -v /run/udev:/run/udev:ro --cap-add IPC_LOCK --rm {CACHE} dynamo:latest-vllm"
    ),
    "--framework cpu --hf-cache none --host 127.0.0.1": f"{HOST} --rm -e DYNAMO_HOST=127.0.0.1 dynamo:latest-cpu",
    "--framework cpu --hf-cache none --host 0.0.0.0": f"{HOST} --rm -e DYNAMO_HOST=0.0.0.0 dynamo:latest-cpu",
    "--framework cpu --hf-cache none -v a:b -e DYNAMO_HOST=::": f"{HOST} --rm -v a:b -e DYNAMO_HOST=:: dynamo:latest-cpu",
    "--framework cpu --hf-cache none -e DYNAMO_HOST": f"{HOST} --rm -e DYNAMO_HOST dynamo:latest-cpu",
    "--framework cpu --hf-cache none -e 'A= DYNAMO_HOST=::'": (f"{HOST} --rm -e A=\\ DYNAMO_HOST=:: dynamo:latest-cpu"),
}
REFUSED = {
    "build.sh --tga x": "unknown flag: --tga",
    "build.sh cpu": "unknown flag: cpu",
    "build.sh --tag": "--tag needs a value",
    "build.sh --tag --no-cache": "--tag needs a value",
    "build.sh --framework trtllm": "--framework TRTLLM: the engine here is vLLM; use VLLM or CPU",
    "build.sh --framework standard": "--framework STANDARD: there is no image without an engine; CPU runs on any machine",
    "build.sh --framework x": "unknown framework: X; use VLLM, VLLM_NIXL or CPU",
    "run.sh --gpu all": "unknown flag: --gpu",
    "run.sh dynamo serve": "dynamo is not a flag; put the command after --",
    "run.sh -v": "-v needs a value",
    "run.sh --hf-cache ''": "--hf-cache needs a value",
    "run.sh --name --dry-run": "--name needs a value",
    "run.sh --framework tensorrtllm": "--framework TENSORRTLLM: the engine here is vLLM; use VLLM or CPU",
    "run.sh --framework sglang": "--framework SGLANG: the engine here is vLLM; use VLLM or CPU",
    "run.sh --framework none": "--framework NONE: there is no image without an engine; CPU runs on any machine",
    "run.sh --framework x": "unknown framework: X; use VLLM, VLLM_NIXL or CPU",
    "run.sh --runtime --rm": "--runtime needs a value",
}


def script(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DYN", "NATS_", "ETCD_"))}
    return run(str(CONTAINER / name), *arguments, env={**kept, "HOME": "/home/ann", **env})


def run(*command: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as `text=True` does, but keep \\r, which it would change to \\n."""
    ran = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    return subprocess.CompletedProcess(command, ran.returncode, ran.stdout.decode(), ran.stderr.decode())


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PATH with a `docker` that writes its arguments, each terminated by NUL, and exits with 7."""
    directory = tmp_path_factory.mktemp("bin")
    program = directory / "docker"
    program.write_text("#!/bin/sh\nprintf 'docker\\0'; printf '%s\\0' \"$@\"; exit 7\n")
    program.chmod(0o755)
    return directory


def given_to_docker(ran: subprocess.CompletedProcess[str]) -> list[str]:
    assert (ran.returncode, ran.stderr) == (7, "")  # docker's own code
    return ran.stdout.split("\0")[:-1]


CASES = [("build.sh", *case) for case in BUILDS.items()] + [("run.sh", *case) for case in RUNS.items()]
IDS = [f"{name} {flags}" for name, flags, _ in CASES]


@pytest.mark.parametrize(("name", "flags", "expected"), CASES, ids=IDS)
def test_dry_run_prints_the_command(name: str, flags: str, expected: str) -> None:
    words = shlex.split(flags)
    end = words.index("--") if "--" in words else len(words)
    ran = script(name, *words[:end], "--dry-run", *words[end:])
    assert (ran.returncode, ran.stdout) == (0, f"{expected}\n")
    assert ran.stderr == "DRY RUN: COMMANDS PRINTED ONLY\n"


@pytest.mark.parametrize(("command", "message"), REFUSED.items())
def test_misuse_prints_the_error_and_then_the_help(command: str, message: str, docker: Path) -> None:
    ran = script(*shlex.split(command), PATH=f"{docker}:{os.environ['PATH']}")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {message}\n\nusage: container/")


@pytest.mark.parametrize("name", ["build.sh", "run.sh"])
@pytest.mark.parametrize("flag", ["-h", "-?", "--help"])
def test_help_names_every_flag(name: str, flag: str) -> None:
    ran = script(name, flag)
    assert (ran.returncode, ran.stderr) == (0, "")
    upstream = {
        "build.sh": "--platform --framework --base-image --base-image-tag --target --build-arg --tag --no-cache --cache-from "
        "--cache-to --build-context --release-build --dry-run --help",
        "run.sh": "--image --framework --target --name --hf-cache --gpus --entrypoint --privileged --rm -v -e -it "
        "--mount-workspace --workspace --dry-run --runtime --workdir --use-nixl-gds --",
    }
    assert set(upstream[name].split()) <= set(ran.stdout.replace(",", " ").replace("[", " ").split())


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda word: word[0] != "-")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(variable="A=\r\n", command=["\r"])
@example(variable="A=$(id) 'b' \"c\" \\", command=["--", "a\nb", ""])
@given(variable=words, command=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=3))
def test_the_printed_command_can_be_pasted(docker: Path, variable: str, command: Sequence[str]) -> None:
    """bash parses the printed line into the arguments that docker gets without --dry-run."""
    flags = ["--hf-cache", "none", "-e", variable]
    path = f"{docker}:{os.environ['PATH']}"
    direct = given_to_docker(script("run.sh", *flags, "--", *command, PATH=path))
    printed = script("run.sh", *flags, "--dry-run", "--", *command).stdout
    assert given_to_docker(run("bash", "-c", printed, env={"PATH": path})) == direct
    assert direct[direct.index("-e") :] == ["-e", variable, "dynamo:latest-vllm", *command]


def test_a_build_runs_docker(docker: Path) -> None:
    ran = script("build.sh", "--framework", "cpu", PATH=f"{docker}:{os.environ['PATH']}")
    assert given_to_docker(ran) == shlex.split(BUILDS["--framework cpu"])


def test_a_checkout_in_a_terminal_gets_a_shell() -> None:
    """With --mount-workspace, as ai-dynamo's run.sh does it; a script without a terminal gets the default command."""
    master, terminal = pty.openpty()
    command = [CONTAINER / "run.sh", "--mount-workspace", "--hf-cache", "none", "--dry-run"]
    ran = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=30, check=True)
    os.close(master)
    os.close(terminal)
    assert " -it " in ran.stdout
    assert ran.stdout.rstrip().endswith(" dynamo:latest-vllm bash")


def test_the_cache_directory_is_created_as_the_user(docker: Path, tmp_path: Path) -> None:
    cache = tmp_path / "my models"
    ran = script("run.sh", "--hf-cache", str(cache), PATH=f"{docker}:{os.environ['PATH']}")
    assert f"{cache}:/home/dynamo/.cache/huggingface" in given_to_docker(ran)
    assert cache.stat().st_uid == os.getuid()


def test_hf_home_is_the_cache(tmp_path: Path) -> None:
    assert f"-v {tmp_path}:/home/dynamo" in script("run.sh", "--dry-run", HF_HOME=str(tmp_path)).stdout


def test_the_token_is_passed_on_by_name_if_it_is_set() -> None:
    ran = script("run.sh", "--dry-run", HF_TOKEN="hf_secret")
    assert " -e HF_TOKEN dynamo:latest-vllm" in ran.stdout
    assert "hf_secret" not in ran.stdout + ran.stderr
    assert "HF_TOKEN" not in script("run.sh", "--dry-run").stdout + script("run.sh", "--dry-run", HF_TOKEN="").stdout


def test_variables_of_the_graph_are_passed_on_by_name_if_they_are_set() -> None:
    given = {
        "NATS_SERVER": "nats://ann:sekret@10.0.0.1:4222",
        "ETCD_ENDPOINTS": "http://10.0.0.1:2379",
        "NATS_AUTH_TOKEN": "sekret",
        "ETCD_AUTH_PASSWORD": "sekret",
        "ETCD_AUTH_USERNAME": "ann",
        "DYN_API_KEYS": "sekret",
        "DYN_BIND_IP": "0.0.0.0",
        "DYN_HOST_IP": "10.0.0.2",
        "DYN_LOG": "debug",
        "DYN_LOGGING_JSONL": "true",
        "DYN_METRICS_PORT": "0",
        "DYN_PEER_SILENCE_S": "",
        "DYNAMO_KV_SECRET": "sekret",
        "DYNAMO_SYSTEM_APP_PORT": "9000",
        "DYNAMO_RUN_DIR": "/of/another/graph",
    }
    ran = script("run.sh", "--dry-run", "--hf-cache", "none", **given)
    passed = [name for name, value in given.items() if value and name != "DYNAMO_RUN_DIR"]
    assert f"{' '.join(f'-e {name}' for name in passed)} dynamo:latest-vllm\n" in ran.stdout
    assert "sekret" not in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("flags", "expected"), [((), "10.0.0.1"), (("--host", "::"), "::"), (("-e", "DYNAMO_HOST=a"), "a")]
)
def test_precedence_of_the_host(flags: tuple[str, ...], expected: str, docker: Path) -> None:
    ran = script("run.sh", "--hf-cache", "none", *flags, PATH=f"{docker}:{os.environ['PATH']}", DYNAMO_HOST="10.0.0.1")
    hosts = [word for word in given_to_docker(ran) if word.startswith("DYNAMO_HOST")]
    assert hosts == [f"DYNAMO_HOST={expected}"]


@pytest.mark.parametrize("name", ["build.sh", "run.sh"])
def test_without_docker_the_error_is_one_line(name: str, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "readlink", "realpath", "id", "sed", "mkdir"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    ran = script(name, PATH=str(tmp_path))
    line = "error: docker was not found; install it: https://docs.docker.com/engine/install\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (127, "", line)


def test_a_missing_workspace_is_not_created(docker: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    ran = script("run.sh", "--hf-cache", "none", "--workspace", str(missing), PATH=f"{docker}:{os.environ['PATH']}")
    assert (ran.returncode, ran.stderr) == (1, f"error: --workspace {missing} is not a directory\n")


def test_every_script_passes_shellcheck() -> None:
    scripts = [
        path for path in ROOT.rglob("*.sh") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    assert {CONTAINER / "build.sh", CONTAINER / "run.sh"} <= set(scripts)
    ran = subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
