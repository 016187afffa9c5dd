"""NATS and etcd that ask for credentials, as real servers."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamo.launcher.embedded_servers import EmbeddedServer
from dynamo.launcher.server_kinds import ETCD, NATS, find_binary


@asynccontextmanager
async def nats_with(folder: Path, **configuration: Any) -> AsyncIterator[str]:
    """Start a nats-server with the given configuration; yield its URL."""

    def command(data: Path, ports: list[int]) -> list[str]:
        file = data.with_suffix(".conf")
        file.write_text(json.dumps({"host": "127.0.0.1", "port": ports[0], **configuration}))
        return ["--config", str(file)]

    server = EmbeddedServer(replace(NATS, command=command), folder)
    await server.start()
    try:
        yield f"nats://{server.address}"
    finally:
        await server.stop()


class EtcdWith:
    """An etcd with further options."""

    def __init__(self, folder: Path, scheme: str, *options: str) -> None:
        def command(data: Path, ports: list[int]) -> list[str]:
            client = f"{scheme}://127.0.0.1:{ports[0]}"
            others = [option for option in ETCD.command(data, ports) if "client-urls" not in option]
            return [*others, f"--listen-client-urls={client}", f"--advertise-client-urls={client}", *options]

        ready = ETCD.ready if scheme == "http" else b"serving client traffic securely"
        self.server = EmbeddedServer(replace(ETCD, command=command, ready=ready), folder)
        self._scheme = scheme

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.server.address}"

    async def ctl(self, *arguments: str) -> None:
        """Run etcdctl."""
        program = Path(find_binary(ETCD)).with_name("etcdctl")
        line = [str(program), f"--endpoints={self.url}", *arguments]
        await asyncio.to_thread(subprocess.run, line, check=True, capture_output=True)

    async def enable_auth(self, user: str, password: str, *options: str) -> None:
        """Give `user` the right to read and write all keys, and ask for users from now on."""
        for line in (
            ("user", "add", f"root:{password}"),
            ("user", "grant-role", "root", "root"),
            ("role", "add", "graphs"),
            ("role", "grant-permission", "graphs", "readwrite", "--prefix=true", ""),
            ("user", "add", f"{user}:{password}"),
            ("user", "grant-role", user, "graphs"),
            ("auth", "enable"),
        ):
            await self.ctl(*options, *line)


@asynccontextmanager
async def etcd_with(folder: Path, *options: str, scheme: str = "http") -> AsyncIterator[EtcdWith]:
    """Start an etcd with further options."""
    etcd = EtcdWith(folder, scheme, *options)
    await etcd.server.start()
    try:
        yield etcd
    finally:
        await etcd.server.stop()
