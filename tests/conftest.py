"""What all tests share: real NATS and etcd, graphs under `dynamo serve`, and how pytest-xdist divides the tests.

NATS and etcd are one pair for each xdist worker, and private pairs for tests that break them.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click
import hypothesis
import pytest
import pytest_asyncio

from dynamo.launcher.embedded_servers import Infra, find_or_start
from tests.served import ROOT, Served, Start

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine makes nothing wrong
hypothesis.settings.load_profile("untimed")

# The tests start about a thousand Python processes: without their bytecode each would compile the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Code that torch has compiled is kept from run to run, as it would be in the temporary directory that tests replace.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:  # commands such as `dynamo status` look for graphs in the temporary directory: not those of other workers
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"{WORKER}-")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and what they start


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if WORKER:
        config.option.basetemp = f"{tempfile.gettempdir()}/t"  # short: unix sockets go below `tmp_path`


def pytest_unconfigure() -> None:
    if WORKER:
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.parallel import Groups

    config.option.loadscopereorder = False  # the order of `pytest_collection_modifyitems`
    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER:
        from tests.parallel import arrange

        arrange(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make captured output valid Unicode: xdist ends a worker whose report holds half of a surrogate pair."""
    report = yield
    report.sections = [(name, text.encode(errors="replace").decode()) for name, text in report.sections]
    return report


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def infra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Infra]:
    """NATS and etcd of the whole session: use keys and subjects of your own, and never stop or restart them."""
    infra = await find_or_start(tmp_path_factory.mktemp("infra"), "embedded")
    yield infra
    await infra.stop()


@pytest.fixture(scope="session")
def nats_server(infra: Infra) -> str:
    """The session's NATS, as in NATS_SERVER."""
    return infra.nats_url


@pytest.fixture(scope="session")
def etcd_server(infra: Infra) -> str:
    """The session's etcd, as in ETCD_ENDPOINTS."""
    return infra.etcd_endpoints


@pytest.fixture
async def private_infra(tmp_path: Path) -> AsyncIterator[Infra]:
    """NATS and etcd of one test, to kill, restart and wipe; 0.1 s."""
    infra = await find_or_start(tmp_path / "infra", "embedded")
    yield infra
    await infra.stop()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, which a user without the repository imports."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = directory.glob("*.whl")
    zipfile.ZipFile(built).extractall(directory / "site")
    return directory / "site"


class Installed(NamedTuple):
    """A Python in which the wheel is installed, and its site-packages."""

    python: str
    site: Path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A virtual environment with the wheel and its dependencies, and without the repository."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory)
    (site,) = (directory / "lib").glob("python3.*/site-packages")
    dependencies = Path(click.__file__).parents[1]  # a folder on the path, unlike a site folder, has no .pth files read
    (site / "installed.pth").write_text(f"{wheel}\n{dependencies}\n")
    return Installed(str(directory / "bin" / "python"), site)


@pytest.fixture(scope="module")
def serve_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start graphs with `serve_graph(*arguments, graph=, cwd=, env=)`; those that still run end with the module."""
    with ExitStack() as started:

        def start(*arguments: str, **options: Any) -> Served:
            served = Served(tmp_path_factory.mktemp("serve") / "output", *arguments, **options)
            started.callback(served.end)
            return served

        yield start
