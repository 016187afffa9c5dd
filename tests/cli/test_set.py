"""`dynamo set`: changes, lists and refusals. The service's processes are objects in the test's own process."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from typing import Literal

import pytest

from dynamo.launcher.embedded_servers import Infra
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import service
from dynamo.transport.etcd import Etcd
from dynamo.worker.live_settings import LiveSettings
from tests.cli.terminal import command
from tests.cli.test_completion import completed


@service
class Voice:
    live_settings = ("mode", "max-words")

    def __init__(self, mode: Literal["loud", "quiet"] = "quiet", max_words: int = 3) -> None:
        self.mode = mode
        self.max_words = max_words


@service
class Ear:
    live_settings = ("range",)

    def __init__(self, range: int = 20) -> None:
        self.range = range


class Running:
    """Two Voices and an Ear in namespace `a`, and the environment in which commands find them."""

    def __init__(self, infra: Infra) -> None:
        self.env = infra.env
        self.voices = [Voice(), Voice()]
        self.ear = Ear()
        self._started: list[tuple[Runtime, LiveSettings]] = []

    async def start(self, instance: object, namespace: str = "a") -> LiveSettings:
        nats_url, etcd_endpoints = self.env["NATS_SERVER"], self.env["ETCD_ENDPOINTS"]
        runtime = Runtime(nats_url=nats_url, etcd_endpoints=etcd_endpoints)
        await runtime.connect()
        live = LiveSettings(instance, namespace)
        await live.start(runtime)
        self._started.append((runtime, live))
        return live

    async def stop(self) -> None:
        for runtime, live in self._started:
            await live.stop()
            await runtime.close()

    async def command(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Run `dynamo set`; return its exit code, standard output, and lines of standard error."""
        result = await asyncio.to_thread(self._command, "set", *arguments)
        return result.returncode, result.stdout, result.stderr.splitlines()

    def _command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command(*arguments, **self.env)

    def modes(self) -> list[str]:
        return [voice.mode for voice in self.voices]


@pytest.fixture
async def running(private_infra: Infra) -> AsyncIterator[Running]:
    running = Running(private_infra)
    for instance in (*running.voices, running.ear):
        await running.start(instance)
    yield running
    await running.stop()


async def test_change_list_and_unset(running: Running) -> None:
    assert await running.command("Voice.mode=loud") == (0, "Voice.mode: quiet -> loud (2 processes)\n", [])
    assert running.modes() == ["loud", "loud"]
    assert await running.command("Voice.mode=loud") == (0, "Voice.mode: stays loud (2 processes)\n", [])
    code, output, _ = await running.command("Voice.max_words=5", "Ear.range=30")  # either spelling
    assert (code, output) == (0, "Voice.max-words: 3 -> 5 (2 processes)\nEar.range: 20 -> 30 (1 process)\n")
    code, output, _ = await running.command()
    assert code == 0
    assert [line.split() for line in output.splitlines()] == [
        ["NAMESPACE", "SETTING", "VALUE", "CONFIGURED", "PROCESSES", "ALLOWED"],
        ["a", "Ear.range", "30", "20", "1", "int"],
        ["a", "Voice.max-words", "5", "3", "2", "int"],
        ["a", "Voice.mode", "loud", "quiet", "2", "one", "of", "loud,", "quiet"],
    ]
    status = await asyncio.to_thread(running._command, "status")
    assert [line for line in status.stdout.splitlines() if "->" in line] == [
        "a.Ear.range: 20 -> 30", "a.Voice.max-words: 3 -> 5", "a.Voice.mode: quiet -> loud"
    ]  # fmt: skip
    assert await running.command("Voice.mode=") == (0, "Voice.mode: loud -> quiet (2 processes)\n", [])
    code, output, _ = await running.command("--unset", "Voice.max-words", "Ear.range")
    assert (code, output) == (0, "Voice.max-words: 5 -> 3 (2 processes)\nEar.range: 30 -> 20 (1 process)\n")
    assert running.modes() == ["quiet", "quiet"]


@pytest.mark.parametrize(
    ("argument", "error", "hint"),
    [
        ("Voice.mode=lout", 'Voice.mode: expected one of loud, quiet, found "lout"', "did you mean loud?"),
        ("Voice.max-words=many", 'Voice.max-words: expected int, found "many"', "give int, such as 3"),
        ("Voice.moode=loud", "Voice.moode: not a setting that can be changed while Voice runs", "did you mean mode?"),
        ("Voice.x=1", "Voice.x: not a setting that can be", "live settings of Voice: max-words, mode"),
        ("Voce.mode=loud", "Voce.mode: no service Voce with live settings runs", "did you mean Voice.mode?"),
        ("Front.port=1", "Front.port: no service Front", "live settings: Ear.range, Voice.max-words, Voice.mode"),
    ],
)
async def test_a_refused_change_changes_nothing(running: Running, argument: str, error: str, hint: str) -> None:
    assert (await running.command("Voice.mode=loud"))[0] == 0
    code, output, errors = await running.command("Ear.range=30", argument)
    assert (code, output) == (1, "")
    assert errors[0].startswith(f"error: {error}")
    assert errors[1].startswith(f"hint: {hint}")
    async with Etcd.connect(running.env["ETCD_ENDPOINTS"]) as etcd:
        left, _ = await etcd.get_prefix("/a/")
    assert [(item.key, item.value) for item in left] == [("/a/voice/mode", b"loud")]
    assert (await running.command("Voice.mode=loud"))[1] == "Voice.mode: stays loud (2 processes)\n"
    assert running.modes() == ["loud", "loud"]


async def test_a_process_that_does_not_report(running: Running) -> None:
    stuck = await running.start(Voice())
    await stuck.stop()  # it runs, but no longer watches etcd
    code, output, errors = await running.command("Voice.mode=loud")
    assert (code, output) == (1, "")
    assert errors == [
        "error: Voice.mode: 2 of 3 processes applied the change within 2 s",
        "hint: the change is stored: the others apply it when they reach etcd",
    ]
    assert running.modes() == ["loud", "loud"]


async def test_a_setting_given_twice(running: Running) -> None:
    code, _, errors = await running.command("Voice.mode=loud", "Voice.mode=quiet")
    assert (code, errors[0]) == (2, "error: a setting is given twice")
    assert running.modes() == ["quiet", "quiet"]


async def test_states_of_other_versions_are_skipped(running: Running) -> None:
    async with Etcd.connect(running.env["ETCD_ENDPOINTS"]) as etcd:
        for key, value in (("settings/a/Voice", b"{}"), ("settings/a/Voice/1", b"{"), ("settings/a/Voice/2", b"[1]")):
            await etcd.put(key, value)
    assert await running.command("Voice.mode=loud") == (0, "Voice.mode: quiet -> loud (2 processes)\n", [])


async def test_one_service_in_two_namespaces(running: Running) -> None:
    other = Voice()
    await running.start(other, "b")
    code, _, errors = await running.command("Voice.mode=loud")
    assert code == 1
    assert errors[0] == "error: Voice.mode: Voice runs in several namespaces: a, b"
    assert (await running.command("-n", "b", "Voice.mode=loud"))[1] == "Voice.mode: quiet -> loud (1 process)\n"
    assert (other.mode, running.modes()) == ("loud", ["quiet", "quiet"])


async def test_setting_names_are_completed(running: Running) -> None:
    offered = await asyncio.to_thread(lambda: completed("dynamo", "set", "Voice.m", **running.env))
    assert offered == {"Voice.max-words=", "Voice.mode="}


@pytest.mark.parametrize("arguments", [("Voice",), ("mode=loud",), (".mode=loud",), ("--unset",), ("--unset", "A.b=c")])
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = command("set", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2


async def test_nothing_with_live_settings_runs(private_infra: Infra) -> None:
    result = await asyncio.to_thread(lambda: command("set", **private_infra.env))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no service with live settings runs\nhint: start a graph")


def test_no_etcd(nothing_runs: dict[str, str]) -> None:
    result = command("set", "Voice.mode=loud", **nothing_runs)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: etcd does not answer at http://127.0.0.1:")
