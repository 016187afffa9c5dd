"""Workers of any engine behind the OpenAI server: registered by `register_llm` or `llmctl`, served by `http`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dynamo.llm.protocol import MODELS_PREFIX
from dynamo.transport.etcd import Etcd
from tests.ports import free_port
from tests.served import READY, ROOT


class Command:
    """A process with its output in a file."""

    def __init__(self, log: Path, env: dict[str, str], *arguments: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *arguments], cwd=ROOT, env=os.environ | env, stdout=output, stderr=output
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.splitlines() if line.startswith('{"event"')]
        return [line for line in lines if line["event"] == kind]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            finally:
                self.process.kill()


Run = Callable[..., Command]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def run(nats_server: str, etcd_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    env = {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server, "DYN_TOKEN_ECHO_DELAY_MS": "0"}
    with ExitStack() as started:

        def start(*arguments: str) -> Command:
            command = Command(tmp_path_factory.mktemp("run") / "output", env, *arguments)
            started.callback(command.end)
            return command

        yield start


def worker(run: Run, *arguments: str) -> Command:
    return run("-m", "tests.compat.graphs.any_worker", *arguments)


def body(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}]}


class Site:
    """The command `http`."""

    def __init__(self, run: Run, *command: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = run(*command, str(self.port))
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)
        wait_until(lambda: READY.search(self.command.output) or self.command.process.poll() is not None, "no server")
        assert self.command.process.poll() is None, self.command.output

    def names(self) -> set[str]:
        return {model["id"] for model in self.http.get("/v1/models").json()["data"]}

    def wait_for(self, name: str, wanted: bool = True) -> None:
        wait_until(lambda: (name in self.names()) == wanted, f"{name}: {wanted}\n{self.command.output}")

    def chat(self, model: str, text: str, **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        return self.openai.chat.completions.create(model=model, messages=messages, **more)


@pytest.fixture(scope="module")
def site(run: Run) -> Site:
    return Site(run, "-m", "dynamo.cli.http", "-p")


@pytest.fixture(scope="module")
def chat_worker(run: Run, site: Site) -> Command:
    found = worker(run, "dyn://any.chatty.generate", "--name", "any/chatty")
    site.wait_for("any/chatty")
    return found


# -- Chat and Completion workers


def test_a_whole_answer_is_folded_from_chunks(site: Site, chat_worker: Command) -> None:
    answer = site.chat("any/chatty", "hi")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Any engine will do.")
    assert choice.finish_reason == "stop"
    assert answer.model == "any/chatty"
    assert answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)


def test_a_stream_passes_chunks_on(site: Site, chat_worker: Command) -> None:
    chunks = list(site.chat("any/chatty", "hi", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Any engine will do."
    assert {c.id for c in chunks} == {chunks[0].id}
    assert chunks[0].id.startswith("chatcmpl-")
    assert {c.model for c in chunks} == {"any/chatty"}
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert not any(c.usage for c in chunks)
    counted = list(site.chat("any/chatty", "hi", stream=True, stream_options={"include_usage": True}))
    assert counted[-1].choices == []
    assert counted[-1].usage.completion_tokens == 5


def test_the_worker_gets_the_request_of_the_client(site: Site, chat_worker: Command) -> None:
    site.chat("any/chatty", "look", temperature=0.25, extra_body={"my_option": {"deep": [1, 2]}})
    request = chat_worker.events("request")[-1]["request"]
    assert request["messages"] == [{"role": "user", "content": "look"}]
    assert request["model"] == "any/chatty"
    assert (request["temperature"], request["my_option"], request["stream"]) == (0.25, {"deep": [1, 2]}, True)


def test_tool_calls_are_folded(site: Site, chat_worker: Command) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    message = site.chat("any/chatty", "hi", tools=tools).choices[0].message
    (call,) = message.tool_calls
    assert (call.id, call.type, call.function.name, call.function.arguments) == (
        "call-1",
        "function",
        "look",
        '{"a":1}',
    )
    chunks = list(site.chat("any/chatty", "hi", tools=tools, stream=True))
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)


def test_requests_are_validated_before_a_worker_sees_them(site: Site, chat_worker: Command) -> None:
    before = len(chat_worker.events("request"))
    with pytest.raises(openai.BadRequestError, match="temperature"):
        site.chat("any/chatty", "hi", temperature=7)
    with pytest.raises(openai.NotFoundError, match="does not answer completion requests"):
        site.openai.completions.create(model="any/chatty", prompt="hi")
    assert len(chat_worker.events("request")) == before


def test_errors_of_a_worker(site: Site, chat_worker: Command) -> None:
    with pytest.raises(openai.InternalServerError, match="out of ideas"):
        site.chat("any/chatty", "raise")
    with pytest.raises(openai.InternalServerError, match=r"something else than chat\.completion\.chunk: 5"):
        site.chat("any/chatty", "nonsense")
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(site.chat("any/chatty", "fail", stream=True))


def test_a_client_that_leaves_cancels_the_worker(site: Site, chat_worker: Command) -> None:
    stream = site.chat("any/chatty", "long", stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: chat_worker.events("cancelled"), chat_worker.output)


def test_requests_are_counted_and_named(site: Site, chat_worker: Command) -> None:
    answer = site.http.post("/v1/chat/completions", json=body("any/chatty"), headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "chatcmpl-mine-1"
    metrics = site.http.get("/metrics").text
    counted = [line for line in metrics.splitlines() if line.startswith("dynamo_frontend_requests_total")]
    assert any(
        'model="any/chatty"' in line and 'status="success"' in line and not line.endswith(" 0.0") for line in counted
    )


def test_completion_workers(run: Run, site: Site) -> None:
    completing = worker(run, "dyn://any.completer.generate", "--name", "completer", "--type", "completion")
    site.wait_for("completer")
    answer = site.openai.completions.create(model="completer", prompt="Say:")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Say:Any engine will do.", "stop")
    assert answer.usage is None
    chunks = list(site.openai.completions.create(model="completer", prompt="Say:", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Say:Any engine will do."
    completing.end()
    site.wait_for("completer", False)


def test_a_model_goes_with_its_lease(run: Run, site: Site) -> None:
    worker(run, "dyn://any.dying.generate", "--name", "dying")
    site.wait_for("dying")
    with pytest.raises(openai.APIError):
        list(site.chat("dying", "exit", stream=True))
    site.wait_for("dying", False)


# -- models that llmctl adds


def test_llmctl_adds_a_foreign_endpoint(run: Run, site: Site) -> None:
    assert run("-m", "dynamo.cli.llmctl", "http", "add", "chat-models", "added", "any.adder.chat").process.wait(30) == 0
    wait_until(lambda: site.http.post("/v1/chat/completions", json=body("added")).status_code != 404, "not registered")
    refused = site.http.post("/v1/chat/completions", json=body("added"))
    assert refused.status_code == 503
    assert refused.json()["error"]["message"].startswith("no instance of any.adder.chat serves added")
    assert refused.headers["retry-after"]
    serving = worker(run, "any.adder.chat", "--type", "unregistered")
    site.wait_for("added")
    assert site.chat("added", "hi").choices[0].message.content == "Any engine will do."
    serving.end()
    site.wait_for("added", False)
    again = worker(run, "any.adder.chat", "--type", "unregistered")
    site.wait_for("added")
    assert run("-m", "dynamo.cli.llmctl", "http", "remove", "chat-models", "added").process.wait(30) == 0
    site.wait_for("added", False)
    again.end()


# -- Backend workers


@pytest.fixture(scope="module")
def token_worker(run: Run, site: Site) -> Command:
    found = worker(run, "dyn://any.tokens.generate", "--name", "tokens", "--type", "backend")
    site.wait_for("tokens")
    return found


def test_tokens_become_text(site: Site, token_worker: Command) -> None:
    answer = site.chat("tokens", "hi", temperature=0.5)
    assert answer.choices[0].message.content == "Grüße, 世界! stop here please"
    assert answer.choices[0].finish_reason == "stop"
    request = token_worker.events("request")[-1]["request"]
    assert answer.usage.prompt_tokens == len(request["token_ids"])
    assert request["sampling_options"]["temperature"] == 0.5
    assert request["sampling_options"]["top_k"] is None
    assert request["eos_token_ids"]
    assert request["batch_token_ids"] is None
    assert request["stop_conditions"]["max_tokens"] > 16
    streamed = list(site.chat("tokens", "hi", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == "Grüße, 世界! stop here please"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(c.choices[0].delta.content or "" for c in streamed)


def test_limits_and_stop_strings_of_tokens(site: Site, token_worker: Command) -> None:
    stopped = site.chat("tokens", "hi", stop=["stop"])
    assert stopped.choices[0].message.content == "Grüße, 世界! "
    assert stopped.choices[0].finish_reason == "stop"
    short = site.chat("tokens", "hi", max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    both = site.chat("tokens", "hi", n=2, max_tokens=3)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == short.usage.prompt_tokens
    text = site.openai.completions.create(model="tokens", prompt="Once", max_tokens=50, echo=True).choices[0].text
    assert text == "OnceGrüße, 世界! stop here please"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        site.chat("tokens", "hi", max_tokens=10_000_000)


def test_an_endless_worker_is_stopped_at_the_limit(run: Run, site: Site) -> None:
    endless = worker(run, "any.endless.generate", "--name", "endless", "--type", "backend", "--endless")
    site.wait_for("endless")
    answer = site.chat("endless", "hi", max_tokens=9)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 9)
    endless.end()


def test_a_request_moves_to_another_worker(run: Run, site: Site) -> None:
    text = "one two three four five six seven eight nine ten " * 4
    slow = [
        worker(run, "any.movers.generate", "--name", "movers", "--type", "backend", "--pause", "0.05", "--text", text)
        for _ in range(2)
    ]
    site.wait_for("movers")
    wait_until(lambda: site.http.get("/health").json()["instances"].get("any.movers.generate") == 2, "two instances")
    stream = iter(site.chat("movers", "hi", stream=True))
    got = [next(stream), next(stream), next(stream)]
    (serving,) = [found for found in slow if found.events("request")]
    serving.process.kill()
    rest = list(stream)
    (other,) = [found for found in slow if found is not serving]
    assert other.events("request")
    whole = "".join(chunk.choices[0].delta.content or "" for chunk in [*got, *rest])
    assert whole.startswith("one two")
    assert rest[-1].choices[0].finish_reason in ("stop", "length")


# -- the command


def test_http_ends_cleanly(run: Run) -> None:
    found = Site(run, "-m", "dynamo.cli.http", "--namespace", "public", "--component", "http", "-p")
    found.command.process.send_signal(signal.SIGINT)
    assert found.command.process.wait(10) == 0


def test_http_without_servers_is_one_line(tmp_path: Path) -> None:
    nowhere = {"NATS_SERVER": "nats://127.0.0.1:1", "ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    command = Command(tmp_path / "output", nowhere, "-m", "dynamo.cli.http", "-p", str(free_port()))
    assert command.process.wait(30) == 1
    assert command.output.startswith("error: ")
    assert "Traceback" not in command.output


# -- dynamo run in= out=


def test_run_in_http_out_dyn(run: Run, site: Site, chat_worker: Command, token_worker: Command) -> None:
    other = Site(run, "-m", "dynamo", "run", "in=http", "out=dyn", "--router-mode", "random", "--http-port")
    other.wait_for("any/chatty")
    other.wait_for("tokens")
    assert other.chat("any/chatty", "hi").choices[0].message.content == "Any engine will do."
    assert other.chat("tokens", "hi", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("engine", "begins"), [("echo_full", "ping"), ("echo_core", "<|begin|><|user|>ping"), ("mocker", "")]
)
def test_run_in_dyn(run: Run, site: Site, engine: str, begins: str) -> None:
    name = f"model-of-{engine}"
    serving = run("-m", "dynamo", "run", f"in=dyn://any.{engine}.generate", f"out={engine}", "--model-name", name)
    site.wait_for(name)
    answer = site.chat(name, "ping", max_tokens=30)
    assert answer.choices[0].message.content.startswith(begins)
    assert answer.choices[0].finish_reason in ("stop", "length")
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(30) == 0
    site.wait_for(name, False)


async def revoke(etcd_server: str, model: str) -> None:
    """Revoke the lease of the worker that registered a model."""
    etcd = Etcd.connect(etcd_server)
    try:
        (card,), _ = await etcd.get_prefix(f"{MODELS_PREFIX}{model}/")
        await etcd.revoke(int(card.key.rpartition("/")[2], 16), for_good=True)
    finally:
        await etcd.close()


def test_run_in_dyn_ends_when_its_lease_is_revoked(run: Run, site: Site, etcd_server: str) -> None:
    serving = run("-m", "dynamo", "run", "in=dyn://any.revoked.generate", "out=echo_full", "--model-name", "revoked")
    site.wait_for("revoked")
    asyncio.run(revoke(etcd_server, "revoked"))
    assert serving.process.wait(30) == 1
    assert "the lease was revoked" in serving.output


def test_run_in_http_with_an_engine_in_the_process(run: Run) -> None:
    served = Site(
        run,
        "-m",
        "dynamo",
        "run",
        "in=http",
        "out=mocker",
        "--model-name",
        "own",
        "--context-length",
        "512",
        "--http-port",
    )
    assert served.names() == {"own"}
    assert served.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    chunks = list(served.chat("own", "hi", max_tokens=8, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        served.chat("own", "hi", max_tokens=4096)
    served.command.process.send_signal(signal.SIGINT)
    assert served.command.process.wait(10) == 0


def test_run_in_batch(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "first"}\n\n{"text": "second", "id": 2}\n')
    batch = run("-m", "dynamo", "run", f"in=batch:{prompts}", "out=echo_full")
    assert batch.process.wait(60) == 0, batch.output
    answers = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert [(a["text"], a["response"], a["tokens_out"]) for a in answers] == [
        ("first", "first", 5),
        ("second", "second", 6),
    ]
    assert answers[1]["id"] == 2


def test_a_server_in_a_graph_ends_with_its_service(
    run: Run, nats_server: str, etcd_server: str, tmp_path: Path
) -> None:
    env = {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server, "DYNAMO_PROCESS": "mark"}
    port = free_port()
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'dynamo.cli.http', '-p', '{port}'])\n"
        "print('child', child.pid, flush=True)\ntime.sleep(60)"
    )
    parent = Command(tmp_path / "output", env, "-c", program)
    try:
        wait_until(lambda: READY.search(parent.output), "no server")
        parent.process.kill()
        pid = int(parent.output.split()[1])
        wait_until(lambda: not alive(pid), "the server is still there")
    finally:
        parent.end()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
