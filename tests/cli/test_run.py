"""`dynamo run`: in a pipe and in a terminal; with a model in its process, behind a URL and in a temporary graph."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo.engines.mock import MockEngine
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, Sampling
from dynamo.llm.tiny import faq
from dynamo.llm.tokenizer import Tokenizer
from tests.cli.conftest import Graph
from tests.cli.terminal import COMMAND, CTRL_C, CTRL_D, ROOT, Terminal, command, environment
from tests.ports import free_port

MOCK = ("run", "--engine", "mock")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **env: str) -> Terminal:
        opened.append(Terminal(*arguments, **env))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def long_question() -> str:
    """A question that the mock engine answers with more than 300 tokens: two seconds, enough time to stop it."""

    async def find() -> str:
        engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0}, lambda _: None)
        await engine.start()
        preprocessor = Preprocessor(Tokenizer(tokenizer_dir("dynamo-tiny")), 4096)
        for number in range(1000):
            question = f"question {number}"
            chat = ChatRequest("", [{"role": "user", "content": question}], Sampling())
            if len([delta async for delta in engine.generate(await preprocessor.chat(chat))]) > 300:
                return question
        raise AssertionError("none of 1000")

    return asyncio.run(find())


# -- in a pipe


def test_a_prompt_is_answered_once():
    first = command(*MOCK, "hello", "there", "--max-tokens", "8", stdin="not read")
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.strip()
    assert first.stdout.endswith("\n")
    assert "\x1b" not in first.stdout
    piped = command(*MOCK, "--max-tokens", "8", stdin="hello there\n")
    assert piped.stdout == first.stdout
    with_system = command(*MOCK, "--max-tokens", "8", "--system", "Be short.", "hello there")
    assert with_system.returncode == 0
    assert with_system.stdout != first.stdout


def test_statistics_go_to_standard_error():
    result = command(*MOCK, "hello", "--max-tokens", "8", "--stats")
    found = re.fullmatch(
        r"(\d+) prompt tokens, 8 output tokens, TTFT (\d\.\d{3}) s, (\d+\.\d) tokens/s\n", result.stderr
    )
    assert found, result.stderr
    assert int(found[1]) > 0
    assert 0.01 < float(found[2]) < 2  # the mock engine's prefill takes 17 ms
    assert 10 < float(found[3]) < 250  # and a step 5.7 ms


BAD = {
    "nothing to ask": (["--engine", "mock"], 2, "the prompt is empty"),
    "no such engine": (["--engine", "gpu", "x"], 2, "Invalid value for '--engine'"),
    "no such model": (["--engine", "mock", "--model", "./nowhere", "x"], 1, "model directory ./nowhere does not exist"),
    "file without a graph": (["-f", "configs/agg.yaml", "x"], 2, "-f needs GRAPH"),
    "graph and URL": (["graphs.agg:Frontend", "--url", "127.0.0.1:1"], 2, "GRAPH and --url do not go together"),
    "graph and engine": (["graphs.agg:Frontend", "--engine", "mock"], 2, "GRAPH and --engine do not go together"),
    "engine and URL": (["--engine", "mock", "--url", "127.0.0.1:1"], 2, "--engine and --url do not go together"),
    "not a URL": (["--url", "ftp://here", "x"], 1, "--url ftp://here: not a URL"),
    "no server": (["--url", "http://127.0.0.1:9", "x"], 1, "cannot reach 127.0.0.1:9: Connection refused"),
    "no such graph": (["graphs.nosuch:Frontend", "x"], 1, "graph module 'graphs.nosuch' not found"),
    "too long": (["--engine", "mock", "--context-length", "8", "word " * 20], 1, "This model's maximum context length"),
    "bad temperature": (["--temperature", "3", "x"], 2, "Invalid value for '--temperature'"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_a_hint(case):
    arguments, code, message = BAD[case]
    result = command("run", *arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")


def test_a_closed_pipe_is_no_error(long_question):
    script = f"{' '.join([*COMMAND, *MOCK])} {long_question} | head -c 1"
    result = subprocess.run(["sh", "-c", script], cwd=ROOT, env=environment(), capture_output=True, timeout=60)
    assert result.stderr == b""


# -- in a terminal


def test_a_conversation(terminal, tmp_path):
    chat = terminal(*MOCK, "--max-tokens", "6", "--stats")
    chat.wait_for("dynamo-tiny (mock); /help lists the commands")
    chat.wait_for(">>> ")
    chat.type("first question\n")
    chat.wait_for(" tokens/s")
    chat.wait_for(">>> ")
    chat.type("/system Be kind.\n")
    chat.wait_for("system message set")
    chat.type("second question\n")
    chat.wait_for(" tokens/s")
    chat.type("/nonsense\n")
    chat.wait_for("error: /nonsense: no such command")
    chat.wait_for("hint: type /help")
    chat.type("/help\n")
    chat.wait_for("Ctrl-C stops an answer")
    for name, count in (("talk.json", 5), ("talk.md", 5)):
        chat.type(f"/save {tmp_path / name}\n")
        chat.wait_for(f"{count} messages saved")
    chat.type(f"/save {tmp_path / 'talk.md'}\n")
    chat.wait_for("the file exists")
    chat.type("/clear\n")
    chat.wait_for("started a new conversation")
    chat.type(f"/save {tmp_path / 'after.json'}\n")
    chat.wait_for("1 messages saved")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "Be kind."
    assert messages[3]["content"] == "second question"
    assert all(m["content"] for m in messages)
    assert (
        f"**user**: {messages[1]['content']}\n\n**assistant**: {messages[2]['content'].strip()}\n\n"
        in (tmp_path / "talk.md").read_text()
    )


def test_ctrl_c_stops_an_answer_and_then_quits(terminal, long_question, tmp_path):
    chat = terminal(*MOCK)
    chat.wait_for(">>> ")
    chat.type(f"{long_question}\n")
    chat.wait_for("\n")  # the echo of the question
    time.sleep(0.3)
    chat.type(CTRL_C)
    chat.wait_for("stopped; Ctrl-C again quits", 2)
    chat.wait_for(">>> ")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("2 messages saved")
    chat.wait_for(">>> ")
    chat.type(CTRL_C)
    assert chat.wait() == 0
    asked, answered = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"] == long_question
    assert answered["content"]
    whole = command(*MOCK, long_question).stdout
    assert whole.startswith(answered["content"])
    assert len(answered["content"]) < len(whole) - 100


def test_quit_command(terminal):
    chat = terminal(*MOCK)
    chat.wait_for(">>> ")
    chat.type("/quit\n")
    assert chat.wait() == 0


# -- behind a URL


def test_a_running_graph_answers(graph: Graph, terminal):
    direct = command(*MOCK, "--max-tokens", "8", "hello there")
    for url in (graph.url, graph.url.removeprefix("http://"), f"{graph.url}/v1/"):
        result = command("run", "--url", url, "--max-tokens", "8", "--stats", "hello there")
        assert result.stdout == direct.stdout, result.stderr  # the same engine, the same tokens
        assert re.search(r", [2-8] output tokens, ", result.stderr)  # the mock engine chooses the length
    chat = terminal("run", DYNAMO_URL=graph.url)
    chat.wait_for("dynamo-tiny; /help lists the commands")
    chat.wait_for(">>> ")
    chat.type("word " * 5000 + "\n")
    chat.wait_for("error: This model's maximum context length is 4096 tokens")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0


def test_flags_override_the_variable():
    away = {"DYNAMO_URL": "http://127.0.0.1:9"}
    assert command("run", "hi", **away).returncode == 1
    assert command(*MOCK, "--max-tokens", "2", "hi", **away).returncode == 0
    assert "graph module 'no.such' not found" in command("run", "no.such:Graph", "hi", **away).stderr


def test_a_model_that_the_graph_does_not_have(graph: Graph):
    result = command("run", "--url", graph.url, "--model", "gpt-9", "x")
    assert result.returncode == 1
    assert "has no model 'gpt-9'\nhint: models: dynamo-tiny\n" in result.stderr


class _Scripted(http.server.BaseHTTPRequestHandler):
    """A server that answers /v1/models, and chat requests with the lines of `script`; None waits for the client to leave."""

    script: tuple[bytes | None, ...] = ()
    status = 200
    client_left = threading.Event()

    def do_GET(self) -> None:
        self._head(200)
        self.wfile.write(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._head(self.status)
        for line in self.script:
            if line is None:
                self.rfile.read(1)
                self.client_left.set()
            else:
                self.wfile.write(line)
                self.wfile.flush()

    def _head(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def scripted() -> Iterator[Callable[..., str]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def serve(*script: bytes | None, status: int = 200) -> str:
        handler = type(
            "Handler", (_Scripted,), {"script": script, "status": status, "client_left": _Scripted.client_left}
        )
        _Scripted.client_left.clear()
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


HELLO = b'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n'


@pytest.mark.parametrize(
    ("script", "status", "output", "error"),
    [
        ((HELLO, b": ping\n\n", b"data: [DONE]\n\n"), 200, "Hello\n", ""),
        ((HELLO,), 200, "Hello\n", "closed the connection before the end of the answer"),
        ((HELLO, b"data: {oops\n\n"), 200, "Hello\n", "failed to read the answer of "),
        ((HELLO, b'data: {"error": {"message": "out of luck"}}\n\n'), 200, "Hello\n", "error: out of luck"),
        ((b'{"error": {"message": "no such thing"}}',), 400, "", "error: no such thing"),
        ((b'{"error": {"message": "who are you"}}',), 401, "", "hint: set DYN_API_KEY"),
        ((b"<html>proxy</html>",), 502, "", "error: HTTP 502 Bad Gateway: <html>proxy</html>"),
    ],
)
def test_answers_and_errors_of_a_server(scripted, script, status, output, error):
    result = command("run", "--url", scripted(*script, status=status), "x")
    assert result.stdout == output
    assert result.returncode == (1 if error else 0)
    assert error in result.stderr
    assert "Traceback" not in result.stderr


def test_stopping_an_answer_closes_the_connection(scripted, terminal):
    chat = terminal("run", "--url", scripted(HELLO, None))
    chat.wait_for(">>> ")
    chat.type("hi\n")
    chat.wait_for("Hello")
    chat.type(CTRL_C)
    chat.wait_for("stopped")
    assert _Scripted.client_left.wait(2)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0


# -- in a graph of its own


def test_a_graph_for_one_question(tmp_path):
    env = {"TMPDIR": str(tmp_path)}
    result = command("run", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--max-tokens", "8", "hello", **env)
    assert result.returncode == 0, result.stderr
    assert result.stdout == command(*MOCK, "--max-tokens", "8", "hello").stdout
    assert list(tmp_path.iterdir()) == []


def test_killing_the_command_ends_its_graph(tmp_path):
    """After `kill -9`, which leaves no time to clean up, the graph still ends."""
    process = subprocess.Popen(
        [*COMMAND, "run", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "hello", "--max-tokens", "2000"],
        cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("dynamo-*/graph.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while found := _processes_with(str(tmp_path)):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def _processes_with(text: str) -> list[str]:
    """Return the processes whose environment contains the text."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:
            continue
    return found


# -- with vLLM


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_the_tiny_model_answers_and_can_be_stopped(terminal, tmp_path):
    question, answer = max(faq().items(), key=lambda pair: len(pair[1]))  # time to stop it
    with tempfile.TemporaryDirectory(prefix="d-") as directory:
        result = command("run", question, timeout_s=120, TMPDIR=directory)
        assert not [path for path in Path(directory).rglob("*") if path.is_socket()]
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{answer}\n"
    chat = terminal("run")
    chat.wait_for(">>> ", 120)
    assert chat.others()  # the engine core, which must not receive the Ctrl-C
    chat.type(f"{question}\n")
    chat.wait_for(answer[:10])
    chat.type(CTRL_C)
    chat.wait_for(">>> ")
    chat.type("/clear\n")
    chat.wait_for(">>> ")
    chat.type(f"{question}\n")
    chat.wait_for(answer)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0


@pytest.mark.vllm
@pytest.mark.parametrize("what", ["importing vLLM", "loading the model"])
def test_ctrl_c_while_loading_leaves_no_process(terminal, what):
    chat = terminal("run")
    chat.wait_for(what, 100)
    if what == "loading the model":
        deadline = time.monotonic() + 30
        while not chat.others():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    asked = time.monotonic()
    chat.type(CTRL_C)
    assert chat.wait() == 130
    assert time.monotonic() - asked < 5
