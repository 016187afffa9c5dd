"""The replay benchmark: traces, their statistics, prompts, the open-loop client and its figures."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.processes import StartError, command_line, descendants
from benchmarks.replay import capacity, picture, report
from benchmarks.replay.__main__ import main
from benchmarks.replay.capacity import Engines
from benchmarks.replay.client import Answer, Client, Due, Replay, check, schedule
from benchmarks.replay.generate import DEFAULTS, generate
from benchmarks.replay.oracle import describe, hit_rate, spread
from benchmarks.replay.prompts import Prompts, vocabulary
from benchmarks.replay.report import Goal
from benchmarks.replay.simulate import MODES, Simulation
from benchmarks.replay.trace import MOONCAKE_BLOCK, Cut, Limits, Request, TraceError, read, write
from dynamo.engines.mock.timing import prefill_ms
from dynamo.llm.model_files import tokenizer_dir

# --- traces

LINE = '{"timestamp": 5, "input_length": 700, "output_length": 3, "hash_ids": [1, 2], "chat_id": "other tools\' field"}'


def _file(directory: Path, *lines: str) -> Path:
    path = directory / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_trace_reads_back_as_it_was_written(tmp_path: Path) -> None:
    requests = list(generate("agent", dataclasses.replace(DEFAULTS["agent"], requests=50)))
    out = io.BytesIO()
    write(requests, out)
    path = _file(tmp_path, out.getvalue().decode())
    assert list(read(path, 512, Limits(), Cut())) == requests


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        (LINE.replace('"input_length": 700, ', ""), "`input_length`"),
        (LINE.replace("700", '"700"'), "$.input_length"),
        (LINE.replace("[1, 2]", "[1, null]"), "$.hash_ids[1]"),
        (LINE.replace('"output_length": 3', '"output_length": 0'), "$.output_length"),
        (LINE.replace("[1, 2]", "[1]"), "1 hash_ids for 700 tokens, 2 expected with blocks of 512 (--trace-block)"),
        (LINE.replace('"timestamp": 5', '"timestamp": 4'), "timestamp 4 comes after 5"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(TraceError) as caught:
        list(read(_file(tmp_path, LINE, "", line), 512, Limits(), Cut()))
    assert str(caught.value).startswith("trace.jsonl:3: ")
    assert reason in str(caught.value)


def test_limits_drop_or_clip_long_prompts(tmp_path: Path) -> None:
    short = LINE.replace("700", "20").replace("[1, 2]", "[7]")
    path = _file(tmp_path, LINE, short, LINE, LINE)
    cut = Cut()
    assert [request.input_length for request in read(path, 512, Limits(3, 500), cut)] == [20]
    assert (cut.dropped, cut.clipped) == (2, 0)
    cut = Cut()
    clipped = list(read(path, 512, Limits(3, 500, clip=True), cut))
    assert [(request.input_length, request.hash_ids) for request in clipped] == [(500, [1]), (20, [7]), (500, [1])]
    assert (cut.dropped, cut.clipped) == (0, 2)


# --- generated traces


@pytest.mark.parametrize("kind", DEFAULTS)
def test_generated_traces_are_determined_by_their_seed(kind: str) -> None:
    shape = dataclasses.replace(DEFAULTS[kind], requests=200)
    first, again = list(generate(kind, shape)), list(generate(kind, shape))
    assert first == again
    assert first != list(generate(kind, dataclasses.replace(shape, seed=1)))
    assert len(first) == 200
    assert first[0].timestamp == 0


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("block", [16, 512])
def test_generated_traces_have_the_requested_lengths_and_rate(kind: str, block: int) -> None:
    shape = dataclasses.replace(DEFAULTS[kind], requests=3000, rate=20.0, block=block, output_tokens=100, seed=3)
    requests = list(generate(kind, shape))
    assert all(len(request.hash_ids) == -(-request.input_length // block) for request in requests)
    assert all(request.input_length + request.output_length <= shape.context_tokens for request in requests)
    assert all(a.timestamp <= b.timestamp for a, b in itertools.pairwise(requests))
    found = describe(requests, block, [8192])
    assert found.requests_per_s == pytest.approx(20, rel=0.15)
    assert found.output_tokens["mean"] == pytest.approx(100, rel=0.1)


def test_kinds_differ_in_what_can_be_shared() -> None:
    oracle = {
        kind: hit_rate(generate(kind, dataclasses.replace(shape, requests=1500)), shape.block)
        for kind, shape in DEFAULTS.items()
    }
    assert oracle["independent"] == 0
    assert 0.6 < oracle["conversation"] < oracle["agent"] < 1
    assert 0.8 < oracle["documents"] < 1


def test_a_turn_begins_with_the_turn_before() -> None:
    shape = dataclasses.replace(DEFAULTS["conversation"], requests=100, sessions=1, turns=1000, context_tokens=100_000)
    requests = list(generate("conversation", shape))
    assert all(
        later.hash_ids[: len(earlier.hash_ids)] == earlier.hash_ids
        and later.input_length > earlier.input_length + earlier.output_length
        for earlier, later in itertools.pairwise(requests)
    )


def test_agents_come_in_bursts() -> None:
    def deviation(kind: str) -> float:
        shape = dataclasses.replace(DEFAULTS["agent"], requests=2000, sessions=1)
        times = [request.timestamp for request in generate(kind, shape)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean

    assert deviation("agent") > 1.5 * deviation("conversation")


# --- oracle

BLOCK = 4


@st.composite
def _traces(draw: st.DrawFn) -> list[Request]:
    """Short chains over few ids, so that much is shared; ends may be partial blocks."""
    requests = []
    for at in range(draw(st.integers(1, 15))):
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
        requests.append(Request(at, BLOCK * len(ids) - draw(st.integers(0, BLOCK - 1)), 1, ids))
    return requests


@given(_traces())
def test_the_oracle_counts_tokens_of_the_longest_prefix_seen_before(requests: list[Request]) -> None:
    """Compare with whole prompts of tokens, where a token of a block is its id and place."""

    def tokens(request: Request) -> list[tuple[int, ...]]:
        return [(*request.hash_ids[: at // BLOCK + 1], at) for at in range(request.input_length)]

    seen: set[tuple[int, ...]] = set()
    hit = 0
    for request in requests:
        mine = tokens(request)
        hit += next((at for at, token in enumerate(mine) if token not in seen), len(mine))
        seen.update(mine)
    asked = sum(request.input_length for request in requests)
    assert hit_rate(requests, BLOCK) == pytest.approx(hit / asked)
    assert describe(requests, BLOCK, []).tokens == len(seen)


@given(_traces(), st.integers(1, 12))
def test_a_bounded_cache_evicts_by_last_use(requests: list[Request], capacity_blocks: int) -> None:
    used: dict[tuple[int, ...], tuple[int, int]] = {}  # chain -> when, and how near to the beginning
    size: dict[tuple[int, ...], int] = {}
    hit = 0
    for now, request in enumerate(requests):
        chains = [tuple(request.hash_ids[: at + 1]) for at in range(len(request.hash_ids))]
        lengths = [min(BLOCK, request.input_length - BLOCK * at) for at in range(len(chains))]
        for chain, length in zip(chains, lengths, strict=True):
            hit += min(size.get(chain, 0), length)
            if size.get(chain, 0) < length:
                break
        for chain, length in zip(chains, lengths, strict=True):
            used[chain], size[chain] = (now, -len(chain)), max(length, size.get(chain, 0))
        for chain in sorted(used, key=lambda chain: used[chain])[: max(len(used) - capacity_blocks, 0)]:
            del used[chain], size[chain]
    asked = sum(request.input_length for request in requests)
    assert hit_rate(requests, BLOCK, capacity_blocks) == pytest.approx(hit / asked)


@given(_traces())
def test_more_cache_is_never_worse_and_finally_ideal(requests: list[Request]) -> None:
    rates = [hit_rate(requests, BLOCK, size) for size in (1, 2, 4, 8, 1000)]
    assert rates == sorted(rates)
    assert rates[-1] == hit_rate(requests, BLOCK)


# --- prompts


def test_the_vocabulary_has_no_special_tokens() -> None:
    directory = tokenizer_dir("dynamo-tiny")
    tokens = vocabulary(directory)
    specials = {one["id"] for one in json.loads((directory / "tokenizer.json").read_text())["added_tokens"]}
    assert specials
    assert not specials & set(tokens)
    assert len(tokens) + len(specials) == json.loads((directory / "config.json").read_text())["vocab_size"]


@given(_traces(), st.integers(0, 3))
def test_prompts_have_the_trace_s_lengths_and_prefixes(requests: list[Request], seed: int) -> None:
    prompts = Prompts(range(100, 100_000), BLOCK, seed)
    made = [prompts.tokens(request) for request in requests]
    assert [len(tokens) for tokens in made] == [request.input_length for request in requests]
    for request, tokens in zip(requests, made, strict=True):
        body = orjson.loads(prompts.body(request, "m"))
        assert body["prompt"] == tokens == Prompts(range(100, 100_000), BLOCK, seed).tokens(request)
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", request.output_length, True)
        assert body["stream_options"] == {"include_usage": True}
        for other, others in zip(requests, made, strict=True):
            same = next(
                (at for at, (a, b) in enumerate(zip(request.hash_ids, other.hash_ids, strict=False)) if a != b),
                min(len(request.hash_ids), len(other.hash_ids)),
            )
            shared = min(same * BLOCK, len(tokens), len(others))
            assert tokens[:shared] == others[:shared]


def test_another_seed_gives_other_prompts() -> None:
    request = Request(0, 600, 1, [1, 2])
    assert Prompts(range(1000), 512, 0).tokens(request) != Prompts(range(1000), 512, 1).tokens(request)


# --- load


def test_capacity_grows_with_workers_and_speed_and_falls_with_length() -> None:
    def sustained(engines: Engines, prompt: int = 2000, output: int = 100) -> float:
        return capacity.requests_per_s(engines, [Request(0, prompt, output, [0])])

    engines = Engines(workers=4)
    one = sustained(engines)
    assert sustained(dataclasses.replace(engines, workers=8)) == pytest.approx(2 * one)
    assert sustained(dataclasses.replace(engines, speedup=3)) == pytest.approx(3 * one)
    assert sustained(engines, prompt=4000) < one
    assert sustained(engines, output=200) < one
    assert sustained(dataclasses.replace(engines, blocks=64)) < one
    # one output token: prefill alone, in steps of 8192 tokens, each 169.136 ms by the polynomial
    assert sustained(engines, prompt=8192, output=1) == pytest.approx(4 * 1e3 / 169.136, rel=1e-3)


# --- client


def _answer(request: Request) -> Answer:
    return Answer(0.0, request, late_s=0.0, ttft_s=0.1)


def _event(**value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _usage(prompt: int, completion: int, cached: int | None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return _event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion, **details})


def _chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXT = _event(choices=[{"text": "a"}])
DONE = b"data: [DONE]\n\n"
REQUEST = Request(0, 8, 3, [1])


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (HEAD + _chunked(TEXT, _usage(8, 3, 4), DONE), ""),
        (HEAD + _chunked(TEXT, _usage(8, 3, None), DONE), ""),
        (HEAD + _chunked(TEXT, _usage(8, 2, 4), DONE), "wrong number of tokens"),
        (HEAD + _chunked(TEXT, _usage(9, 3, 4), DONE), "wrong number of tokens"),
        (HEAD + _chunked(TEXT, _usage(8, 3, 4)), "stream without [DONE]"),
        (HEAD + _chunked(TEXT, DONE), "answer that is not a stream with usage"),
        (HEAD + _chunked(_event(error={"message": "lost"}), DONE), "error in the stream"),
        (b'HTTP/1.1 503 Busy\r\n\r\n{"error":{"message":"9 wait"}}', "HTTP 503 N wait"),
    ],
)
def test_answers_are_checked(raw: bytes, error: str) -> None:
    assert check(raw, _answer(REQUEST)) == error


@asynccontextmanager
async def _server(reply: Callable[[asyncio.StreamWriter, int, Any], Any]) -> AsyncIterator[int]:
    """`reply(writer, connection, body)` answers each request of each connection, numbered as they open."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        connection = opened
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reply(writer, connection, orjson.loads(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def _client(port: int) -> Client:
    return Client("127.0.0.1", port, "/v1/completions", lambda request: Prompts(range(50), 512).body(request, "m"))


async def test_requests_go_out_in_time_whether_or_not_others_are_answered() -> None:
    """Every answer needs 1.5 s, and all 8 are in flight at once: the replay takes little more than one answer."""

    async def reply(writer: asyncio.StreamWriter, connection: int, body: Any) -> None:
        prompt, output = len(body["prompt"]), body["max_tokens"]
        await asyncio.sleep(0.5)
        writer.write(HEAD + _chunked(TEXT)[:-5])
        await asyncio.sleep(1.0)
        writer.write(_chunked(_usage(prompt, output, 5), DONE))

    async with _server(reply) as port:
        requests = [Request(100 * number, 8, 3, [number]) for number in range(8)]
        replay = await _client(port).run(schedule(requests, speed=2.0))
    assert [answer.error for answer in replay.answers] == [""] * 8
    assert [answer.due_s for answer in replay.answers] == pytest.approx([0.05 * number for number in range(8)])
    assert replay.seconds < 6  # one after another: 12 s
    for answer in replay.answers:
        assert 0.5 <= answer.ttft_s < answer.end_s
        assert answer.itl_s == pytest.approx((answer.end_s - answer.ttft_s) / 2)
        assert answer.end_s - answer.ttft_s > 0.5
        assert answer.cached_tokens == 5
        assert answer.late_s >= 0


async def test_connections_are_used_again_and_lost_ones_are_errors() -> None:
    seen: list[int] = []

    async def reply(writer: asyncio.StreamWriter, connection: int, body: Any) -> None:
        seen.append(connection)
        if body["max_tokens"] == 99:
            writer.close()
        else:
            writer.write(HEAD + _chunked(TEXT, _usage(8, 3, 0), DONE))

    async with _server(reply) as port:
        due = [Due(0.3 * number, Request(0, 8, 99 if number == 1 else 3, [number])) for number in range(4)]
        replay = await _client(port).run(due)
    assert [answer.error for answer in replay.answers] == ["", "connection closed early", "", ""]
    assert seen == [1, 1, 2, 2]


async def test_times_count_from_when_a_request_was_due() -> None:
    """The client is blocked for a second; the figures show it although the server answers immediately."""

    async def reply(writer: asyncio.StreamWriter, connection: int, body: Any) -> None:
        writer.write(HEAD + _chunked(TEXT, _usage(8, 3, 0), DONE))

    def body(request: Request) -> bytes:
        return Prompts(range(50), 512).body(request, "m")

    async def block() -> None:
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().call_soon(time.sleep, 1.5)

    async with _server(reply) as port:
        client = Client("127.0.0.1", port, "/v1/completions", body)
        replay, _ = await asyncio.gather(client.run([Due(0.3, REQUEST)]), block())
    assert replay.answers[0].late_s > 1
    assert replay.answers[0].ttft_s > 1
    assert report.summarise(replay, Goal(500, 50))["good_share"] == 0


async def test_a_refused_connection_is_an_error_of_each_request() -> None:
    async with _server(lambda *_: None) as port:
        pass
    replay = await _client(port).run([Due(0.0, REQUEST), Due(0.0, REQUEST)])
    assert [answer.error for answer in replay.answers] == ["no connection: Connection refused"] * 2


# --- figures


def _replay(cached: int | None = 6, counted: float | None = None) -> Replay:
    """Request n of 100 has a TTFT of n ms and 10 tokens in further 9 n ms; the last one failed."""
    answers = []
    for number in range(1, 101):
        answer = Answer(0.0, Request(0, 8, 10, [1]), 0.001, number / 1e3, number / 1e2, cached)
        answers.append(answer)
    answers[-1].error = "HTTP 503 busy"
    return Replay(answers, seconds=10.0, client_cpu_s=1.0, cached=counted)


def test_figures_of_a_replay() -> None:
    found = report.summarise(_replay(), Goal(ttft_ms=50, itl_ms=40.5))
    assert found["ttft_ms"] == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
    assert found["itl_ms"] == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
    assert found["end_to_end_ms"] == pytest.approx({"p50": 500, "p90": 900, "p99": 990})
    assert (found["hit_rate"], found["hit_rate_source"]) == (0.75, "usage")
    assert (found["requests_per_s"], found["output_tokens_per_s"]) == pytest.approx((9.9, 99))
    assert (found["goodput_per_s"], found["good_share"]) == pytest.approx((4.0, 0.4))
    assert found["errors"] == {"HTTP 503 busy": 1}


def test_hits_come_from_metrics_if_answers_lack_them() -> None:
    goal = Goal(1, 1)
    counted = report.summarise(_replay(None, 0.5), goal)
    assert (counted["hit_rate"], counted["hit_rate_source"]) == (0.5, "metrics")
    unknown = report.summarise(_replay(None), goal)
    assert (unknown["hit_rate"], unknown["hit_rate_source"]) == (None, "not reported")


def test_hits_from_counters_are_the_difference_over_all_labels() -> None:
    def metrics(*values: float) -> str:
        hits, asked, other = values
        return (
            f'# TYPE vllm:prefix_cache_hits_total counter\nvllm:prefix_cache_hits_total{{engine="0"}} {hits}\n'
            f'vllm:prefix_cache_hits_total{{engine="1"}} {other}\nvllm:prefix_cache_queries_total{{engine="0"}} {asked}\n'
        )

    assert report.counted_hits(metrics(5, 10, 1), metrics(30, 110, 6)) == pytest.approx(0.3)
    assert report.counted_hits("", "") is None


def test_spread_and_cdf() -> None:
    found = spread(list(range(100, 0, -1)))
    assert found == {"mean": 50.5, "p50": 51, "p90": 91, "p99": 100, "max": 100}
    assert spread([]) == {}
    assert picture.cdf([3, 1, 2, 2]) == ([1, 2, 2, 3], [0.25, 0.5, 0.75, 1.0])


def test_pictures_without_matplotlib_are_refused_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StartError, match="matplotlib"):
        picture.require()


# --- the command


def test_generate_and_describe(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["generate", "documents", "--duration", "20", "--rate", "5", "--sessions", "3", "--seed", "2"]) == 0
    path = tmp_path / "trace.jsonl"
    path.write_bytes(capfdbinary.readouterr().out)
    assert len(path.read_bytes().splitlines()) == 100
    assert main(["describe", str(path), "--cache-tokens", "8192", "--json", str(tmp_path / "out.json")]) == 0
    assert b"hit rate of one LRU cache of 8,192 tokens" in capfdbinary.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["bounded"]["8192"] <= found["oracle"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "absent.jsonl"], "absent.jsonl: No such file"),
        (["{trace}", "--limit", "1", "--picture", "", "--modes", ""], "nothing to measure"),
        (["{trace}", "--picture", "", "--config", "absent.yaml"], "configuration absent.yaml cannot be read"),
        (["{trace}", "--picture", "", "--modes", "", "--peers", "absent"], "absent has no dynamo-1.6"),
        (["{trace}", "--picture", "", "--url", "localhost:8000"], "expected http://HOST:PORT"),
        (["{trace}", "--max-input", "10"], "no requests"),
        (["describe", "{trace}", "--trace-block", "0"], "--trace-block must be positive"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = _file(tmp_path, LINE)
    assert (
        main([one.format(trace=path) for one in arguments] + (["--picture", ""] if arguments[0] == "{trace}" else []))
        == 1
    )
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "0"], "speed must be positive"),
        (["--load", "0.5"], "--load needs a trace"),
        (["--vocab", "9"], "--vocab 9: expected FIRST:END"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(_file(tmp_path, LINE)), "--picture", "", *arguments])
    assert caught.value.code == 2
    assert message in capfd.readouterr().err


async def test_replays_to_a_running_server(tmp_path: Path) -> None:
    async def reply(writer: asyncio.StreamWriter, connection: int, body: Any) -> None:
        usage = _usage(len(body["prompt"]), body["max_tokens"], len(body["prompt"]) // 2)
        writer.write(HEAD + _chunked(TEXT, usage, DONE))

    out = tmp_path / "out.json"
    path = _file(tmp_path, *[LINE] * 5)
    async with _server(reply) as port:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.replay", str(path), "--url", f"http://127.0.0.1:{port}", "--model", "m",
            "--picture", "", "--json", str(out), cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        text, _ = await process.communicate()
    assert process.returncode == 0
    assert b"TTFT p50" in text
    [found] = json.loads(out.read_text())["systems"].values()
    assert (found["requests"], found["hit_rate"], found["errors"]) == (5, 0.5, {})


def test_replays_to_a_graph_that_it_starts_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    shared = [Request(300 * number, 200, 4, [0]) for number in range(6)]
    path = tmp_path / "trace.jsonl"
    with path.open("wb") as file:
        write(shared, file)
    arguments = [str(path), "--graph", "graphs.agg:Frontend", "--config", "configs/agg_mock.yaml"]
    arguments += ["--modes", "random", "--workers", "1", "--speedup", "10", "--picture", "", "--json", str(out)]
    before = descendants(os.getpid())  # graphs of other tests, that live for the session
    assert main(arguments) == 0, capfd.readouterr().err
    found = json.loads(out.read_text())["systems"]["ours random"]
    assert (found["requests"], found["errors"]) == (6, {})
    assert found["hit_rate"] == pytest.approx(5 * 192 / (6 * 200))  # whole blocks of 64 tokens
    assert found["server_cores"] > 0
    new = [pid for pid in descendants(os.getpid()) if pid not in before]
    assert not [argv for pid in new if "dynamo.worker.process" in (argv := command_line(pid))]


# --- simulation


def simulated(mode: str, workers: int = 4) -> Replay:
    requests = list(generate("documents", dataclasses.replace(DEFAULTS["documents"], requests=80, sessions=8, seed=2)))
    engines = Engines(workers=workers, blocks=512)
    due = list(schedule(requests, 2.0))
    random.seed(1)
    return Simulation(engines, mode).run(due, Prompts(range(100, 900), MOONCAKE_BLOCK))


def cached_share(replay: Replay) -> float:
    total = sum(answer.request.input_length for answer in replay.answers)
    return sum(answer.cached_tokens or 0 for answer in replay.answers) / total


@pytest.mark.parametrize("mode", MODES)
def test_a_simulated_replay_answers_everything(mode: str) -> None:
    replay = simulated(mode)
    for answer in replay.answers:
        assert prefill_ms(1) / 1e3 <= answer.ttft_s <= answer.end_s
        assert answer.cached_tokens is not None
    assert [a.end_s for a in simulated(mode).answers] == [a.end_s for a in replay.answers]  # the same each time


def test_a_simulated_router_finds_what_is_cached() -> None:
    assert cached_share(simulated("kv")) > cached_share(simulated("round-robin")) + 0.1
    assert cached_share(simulated("round-robin", workers=1)) == cached_share(simulated("kv", workers=1))
