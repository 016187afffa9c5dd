"""`dynamo set`: change settings of a graph that runs.

It writes to etcd, where the processes of the service look (`dynamo.worker.live_settings`), and waits until each has said
what it made of the value. What one of them refuses is taken back: they alone know what their code takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click
from click.shell_completion import CompletionItem

from dynamo.errors import ConfigError, DynamoError, UnavailableError

if TYPE_CHECKING:
    from dynamo.cli.deployments import ProcessSettings
    from dynamo.transport.etcd import Etcd

T = TypeVar("T")

TAKEN_OVER_S = 2.0
LOOK_EVERY_S = 0.03
HEAD = ("NAMESPACE", "SETTING", "VALUE", "CONFIGURED", "PROCESSES", "ALLOWED")


class _Change(NamedTuple):
    """`value` is what etcd will have; None: nothing, so that the configured value counts."""

    service: str
    setting: str
    value: str | None


class _Target(NamedTuple):
    """A change, where it is written, what was there, and the value that the processes had."""

    namespace: str
    service: str
    setting: str
    value: str | None
    key: str
    written: bytes | None
    before: str

    @property
    def name(self) -> str:
        return f"{self.service}.{self.setting}"


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        found = _with_etcd(_read)
    except DynamoError:
        return []
    names = {f"{process.service}.{name}=" for process in found for name in process.settings}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


@click.command("set")
@click.argument("changes", nargs=-1, metavar="[SERVICE.SETTING=VALUE]...", shell_complete=_complete)
@click.option(
    "--unset", is_flag=True, help="Return SERVICE.SETTING to its configured value, as `SERVICE.SETTING=` does."
)
@click.option("-n", "--namespace", metavar="NAME", help="Of the service, where several in one etcd have its name.")
def change(changes: tuple[str, ...], unset: bool, namespace: str | None) -> int:
    """Change settings of services while they run; without arguments, list those that can be changed.

    A service's class names them in `live_settings`. A change holds for all processes of the service, later ones too,
    until it is unset; the YAML file stays as it is. All changes of a command hold, or none: a value that a process
    refuses is taken back. Exit code 1 when something was refused or not taken over within 2 s.

    The graph is found as by `dynamo status`: on this machine, or in the etcd of ETCD_ENDPOINTS.

    \b
    Examples:
      dynamo set                                 # what can be changed, and what holds now
      dynamo set Processor.router=random
      dynamo set Processor.router=               # the configured value again
      dynamo set --unset Processor.router        # the same
    """
    wanted = [_parse(text, unset) for text in changes]
    if not wanted:
        if unset:
            raise click.UsageError("--unset needs SERVICE.SETTING")
        found = [process for process in _with_etcd(_read) if namespace in (None, process.namespace)]
        if not found:
            raise UnavailableError("no service with live settings runs", hint=_DECLARE)
        click.echo("\n".join(_listed(found)))
        return 0
    for line in _with_etcd(lambda etcd: _apply(etcd, wanted, namespace)):
        click.echo(line)
    return 0


_DECLARE = "start a graph whose services name them in `live_settings`, or set ETCD_ENDPOINTS to where one runs"


def _parse(text: str, unset: bool) -> _Change:
    """Raises UsageError."""
    name, equals, value = text.partition("=")
    service, dot, setting = name.strip().partition(".")
    if not (service and dot and setting) or bool(equals) == unset:
        form = "SERVICE.SETTING" if unset else "SERVICE.SETTING=VALUE"
        raise click.UsageError(f"{text!r} is not {form}, such as Processor.router{'' if unset else '=random'}")
    return _Change(service, setting, value or None)


def _with_etcd(work: Callable[[Etcd], Awaitable[T]]) -> T:
    from dynamo.cli.deployments import one_deployment

    async def run() -> T:
        async with one_deployment().etcd() as etcd:
            return await work(etcd)

    return asyncio.run(run())


async def _read(etcd: Etcd) -> list[ProcessSettings]:
    from dynamo.cli.deployments import read_settings

    return await read_settings(etcd)


async def _apply(etcd: Etcd, changes: Sequence[_Change], namespace: str | None) -> list[str]:
    """What was done, a line each. Raises ConfigError, with nothing changed, when anything cannot be or is refused."""
    found = await _read(etcd)
    targets = [await _target(etcd, found, one, namespace) for one in changes]
    if len({target.key for target in targets}) < len(targets):
        raise click.UsageError("a setting is given twice")
    try:
        for target in targets:
            await _write(etcd, target.key, None if target.value is None else target.value.encode())
        return await _taken_over(etcd, targets)
    except ConfigError:
        for target in targets:
            await _write(etcd, target.key, target.written)
        raise


async def _write(etcd: Etcd, key: str, value: bytes | None) -> None:
    if value is None:
        await etcd.delete(key)
    else:
        await etcd.put(key, value)


async def _target(etcd: Etcd, found: Sequence[ProcessSettings], one: _Change, namespace: str | None) -> _Target:
    """Where a change is written. Raises ConfigError for a service or a setting that is not there."""
    from dynamo.config.provenance import canonical, suggestion
    from dynamo.worker.live_settings import setting_prefix

    what = f"{one.service}.{one.setting}"
    there = [process for process in found if namespace in (None, process.namespace)]
    services = [process for process in there if process.service == one.service]
    if not services:
        raise ConfigError(
            f"{what}: no service {one.service} with live settings runs{f' in namespace {namespace}' if namespace else ''}",
            hint=suggestion(what, sorted(_names(there)), "live settings"),
        )
    namespaces = sorted({process.namespace for process in services})
    if len(namespaces) > 1:
        raise ConfigError(
            f"{what}: {one.service} runs in several namespaces: {', '.join(namespaces)}",
            hint=f"name one: --namespace {namespaces[0]}",
        )
    name = next((n for process in services for n in process.settings if canonical(n) == canonical(one.setting)), None)
    if name is None:
        live = sorted({name for process in services for name in process.settings})
        raise ConfigError(
            f"{what}: not a setting that can be changed while {one.service} runs",
            hint=suggestion(one.setting, live, f"live settings of {one.service}"),
        )
    key = setting_prefix(namespaces[0], one.service) + name
    before = ", ".join(sorted({process.settings[name].value for process in services if name in process.settings}))
    return _Target(namespaces[0], one.service, name, one.value, key, await etcd.get(key), before)


def _names(found: Sequence[ProcessSettings]) -> set[str]:
    return {f"{process.service}.{name}" for process in found for name in process.settings}


async def _taken_over(etcd: Etcd, targets: Sequence[_Target]) -> list[str]:
    """Wait for the processes. ConfigError: one refuses; UnavailableError: some do not say anything in time."""
    give_up = time.monotonic() + TAKEN_OVER_S
    while True:
        found = await _read(etcd)
        lines, missing = [], ""
        for target in targets:
            states = [
                process.settings[target.setting]
                for process in found
                if (process.namespace, process.service) == (target.namespace, target.service)
                and target.setting in process.settings
            ]
            done = [state for state in states if state.given == target.value]
            for state in done:
                if state.error:
                    raise ConfigError(state.error, hint=state.hint or None)
            if len(done) < len(states) or not states:
                missing = f"{target.name}: {len(done)} of {_count(len(states))} took it over in {TAKEN_OVER_S:g} s"
            now = ", ".join(sorted({state.value for state in done}))
            change = f"stays {now}" if now == target.before else f"{target.before} -> {now}"
            lines.append(f"{target.name}: {change} ({_count(len(done))})")
        if not missing:
            return lines
        if time.monotonic() > give_up:
            raise UnavailableError(missing, hint="it is written: the others follow when they reach etcd")
        await asyncio.sleep(LOOK_EVERY_S)


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes != 1 else ''}"


def _listed(found: Sequence[ProcessSettings]) -> Iterator[str]:
    from dynamo.cli.status import table

    rows: dict[tuple[str, ...], int] = {}
    for process in found:
        for name, setting in process.settings.items():
            row = (process.namespace, f"{process.service}.{name}", setting.value, setting.configured, setting.allowed)
            rows[row] = rows.get(row, 0) + 1
    yield from table([HEAD, *((*row[:4], str(count), row[4]) for row, count in sorted(rows.items()))])
