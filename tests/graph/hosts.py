"""Two hosts on one machine: network namespaces with a router between them, and files of their own.

    A 10.83.1.2 ── 10.83.1.1 router 10.83.2.1 ── 10.83.2.2 B

The router is a third namespace, so that a packet can be lost without a word, as behind a cable that was pulled out
somewhere else. Each namespace lives as long as a `cat`, which ends with this process's end of its pipe: nothing is left
to clear up. Works as root and, where the kernel allows it, as a user who is root of a user namespace.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamo.launcher.server_kinds import ETCD, NATS, find_binary
from tests.cli.terminal import COMMAND, ROOT, environment

A, B = "10.83.1.2", "10.83.2.2"
INFRA = {"NATS_SERVER": f"nats://{A}:4222", "ETCD_ENDPOINTS": f"http://{A}:2379"}
FORWARD = """
import asyncio, sys

async def pipe(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def accept(reader, writer):
    try:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", 8000)
    except OSError:
        return writer.close()
    await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))

async def main():
    async with await asyncio.start_unix_server(accept, sys.argv[1]) as server:
        await server.serve_forever()

asyncio.run(main())
"""


class NotHereError(Exception):
    """This machine gives no namespaces to this user."""


class Namespace:
    """A network and a mount namespace; `inside` is another one whose user namespace it is to have."""

    def __init__(self, inside: Namespace | None = None) -> None:
        enter, new = [], ["--user", "--map-root-user"] if os.geteuid() else []
        if inside is not None:
            enter, new = inside.enter(user_only=True), []
        self._user = bool(os.geteuid())
        command = [
            *enter,
            "unshare",
            *new,
            "--net",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "echo ready; exec cat",
        ]
        try:
            self._holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise NotHereError(f"{error.filename}: {error.strerror}") from None
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise NotHereError(self._holder.communicate()[1].strip())
        self.pid = self._holder.pid

    def enter(self, *, user_only: bool = False) -> list[str]:
        """What to put before a command, so that it runs here."""
        user = ["--user", "--preserve-credentials"] if self._user else []
        if user_only and not user:
            return []
        return ["nsenter", f"--target={self.pid}", *user, *([] if user_only else ["--net", "--mount"]), "--"]

    def run(self, *commands: str) -> None:
        """Raises NotHereError when one fails."""
        script = "; ".join(("set -e", *commands))
        found = subprocess.run([*self.enter(), "sh", "-c", script], capture_output=True, text=True)
        if found.returncode:
            raise NotHereError(found.stderr.strip() or f"{script}: {found.returncode}")

    def start(self, command: Sequence[str], env: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
        go = ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT)]
        with output.open("ab") as log:
            return subprocess.Popen([*self.enter(), *go, *command], env=dict(env), stdout=log, stderr=log)

    def end(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(10)


class Command:
    """A command of this project on one of the hosts, with its output in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 60, *, after: int = 0) -> str:
        """Wait until the output, from character `after` on, has `text`; gives the line that has it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output[after:]:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s:\n{self.output}"
            time.sleep(0.05)
        return next((line for line in self.output[after:].splitlines() if text in line), "")

    def ready(self, timeout_s: float = 60) -> Command:
        self.wait_for("\nready in ", timeout_s)
        return self

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Hosts:
    """Both hosts, with NATS and etcd on A as the compose file starts them. Raises NotHereError. `end` it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._private = directory / "private"
        self._private.mkdir()
        self._names = 0
        self._broken: list[str] = []
        self.commands: list[Command] = []
        self._namespaces: list[Namespace] = []
        try:
            self.router = self._namespace(None)
            self.hosts = {A: self._namespace(self.router), B: self._namespace(self.router)}
            self._lay_cables()
        except BaseException:
            self.end()
            raise
        data = directory / "data"
        nats = (find_binary(NATS), "-js", "-sd", str(data / "nats"), "-m", "8222")
        etcd = (
            find_binary(ETCD), "--name=dynamo", f"--data-dir={data / 'etcd'}", "--listen-client-urls=http://0.0.0.0:2379",
            f"--advertise-client-urls=http://{A}:2379", "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=dynamo=http://127.0.0.1:2380",
        )  # fmt: skip
        self.start(A, *nats).wait_for("Server is ready")
        self.start(A, *etcd).wait_for("ready to serve client requests")
        self.socket = directory / "http"
        self.start(A, sys.executable, "-c", FORWARD, str(self.socket))

    def _namespace(self, inside: Namespace | None) -> Namespace:
        self._namespaces.append(Namespace(inside))
        return self._namespaces[-1]

    def _lay_cables(self) -> None:
        self.router.run("ip link set lo up", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for name, (address, host) in zip(("toa", "tob"), self.hosts.items(), strict=True):
            gateway = f"{address.rpartition('.')[0]}.1"
            self.router.run(
                f"ip link add {name} type veth peer name up{name}",
                f"ip link set up{name} netns {host.pid}",
                f"ip addr add {gateway}/24 dev {name}",
                f"ip link set {name} up",
            )
            host.run(
                "ip link set lo up",
                f"ip addr add {address}/24 dev up{name}",
                f"ip link set up{name} up",
                f"ip route add default via {gateway}",
                f"mount -t tmpfs none '{self._private}'",  # the same path, other files: as /tmp of two machines
            )

    def start(self, host: str, *command: str, **env: str) -> Command:
        self._names += 1
        log = self._directory / f"output{self._names}"
        log.touch()
        with_own = environment(TMPDIR=str(self._private), **env)
        self.commands.append(Command(self.hosts[host].start(command, with_own, log), log))
        return self.commands[-1]

    def dynamo(self, host: str, *arguments: str, **env: str) -> Command:
        """`dynamo serve ...`, say, with the NATS and etcd of A."""
        return self.start(host, *COMMAND, *arguments, **{**INFRA, **env})

    def ask(self, host: str, *arguments: str, **env: str) -> str:
        """What a command that ends prints."""
        found = self.dynamo(host, *arguments, **env)
        assert found.process.wait(60) == 0, found.output
        return found.output

    def cut(self) -> None:
        """Drop all packets from now on, without any error to the senders."""
        self._broken = [f"ip route {{}} blackhole {address}/32" for address in (A, B)]
        self.router.run(*(command.format("add") for command in self._broken))

    def block_ports(self) -> None:
        """A firewall: no packet from A comes to the ports of B on which processes listen."""
        self._broken = [f"ip rule {{}} to {B} ipproto tcp dport 20000-32767 blackhole pref 10"]
        self.router.run(*(command.format("add") for command in self._broken))

    def mend(self) -> None:
        """Undo what was done to the link; a second time does nothing."""
        self.router.run(*(command.format("del") for command in self._broken))
        self._broken = []

    def end(self) -> None:
        for command in reversed(self.commands):
            if command.process.poll() is None:
                command.stop()
        for namespace in reversed(self._namespaces):
            namespace.end()

    def processes(self) -> list[int]:
        """All processes in the namespaces of the hosts, those that hold them left out."""
        mine = {os.readlink(f"/proc/{host.pid}/ns/net") for host in self.hosts.values()}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/net") in mine:
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(set(found) - {host.pid for host in self.hosts.values()})
