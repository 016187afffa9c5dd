"""`dynamo set`: change settings of a running graph.

The command writes to etcd, which the processes of the service watch (`dynamo.worker.live_settings`), and waits until each
has reported that it applied or refused the value. Only they can validate it, so a refused value is taken back.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import click
from click.shell_completion import CompletionItem

from dynamo.cli import tables
from dynamo.cli.errors import in_colour
from dynamo.cli.etcd import with_etcd
from dynamo.config.provenance import canonical, suggestion
from dynamo.errors import ConfigError, DynamoError, UnavailableError
from dynamo.launcher import wording

if TYPE_CHECKING:
    from dynamo.cli.deployments import ProcessSettings
    from dynamo.transport.etcd import Etcd
    from dynamo.worker.live_settings import LiveSetting

APPLY_S = 2.0
POLL_S = 0.03
HEAD = ("NAMESPACE", "SETTING", "VALUE", "CONFIGURED", "PROCESSES", "ALLOWED")
NO_LIVE_SETTINGS_HINT = (
    "start a graph whose services name them in `live_settings`, or set ETCD_ENDPOINTS to where one runs"
)


class _Change(NamedTuple):
    """A change that the user asked for. `value` None: delete the key, so that the configured value applies."""

    service: str
    setting: str
    value: str | None


class _Target(NamedTuple):
    """A change with its place in etcd."""

    namespace: str
    service: str
    setting: str
    value: str | None
    key: str
    stored: bytes | None
    """the content of `key` before the change"""
    before: str
    """the value that the processes had before the change"""

    @property
    def name(self) -> str:
        """The setting as a user writes it: `Processor.router`."""
        return f"{self.service}.{self.setting}"


class _Outcome(NamedTuple):
    """The processes that have a setting, and those of them that have applied or refused the target's value."""

    target: _Target
    states: list[LiveSetting]
    done: list[LiveSetting]

    @property
    def is_complete(self) -> bool:
        """True if there is a process, and all have reported."""
        return bool(self.states) and len(self.done) == len(self.states)

    def __str__(self) -> str:
        now = ", ".join(sorted({state.value for state in self.done}))
        change = f"stays {now}" if now == self.target.before else f"{self.target.before} -> {now}"
        return f"{self.target.name}: {change} ({wording.processes(len(self.done))})"


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        processes = with_etcd(_read)
    except DynamoError:
        return []
    names = {f"{process.service}.{name}=" for process in processes for name in process.settings}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


@click.command("set")
@click.argument("changes", nargs=-1, metavar="[SERVICE.SETTING=VALUE]...", shell_complete=_complete)
@click.option(
    "--unset", is_flag=True, help="Restore the configured value of SERVICE.SETTING, as `SERVICE.SETTING=` does."
)
@click.option("-n", "--namespace", metavar="NAME", help="Namespace of the service, if several have one of that name.")
def change(changes: tuple[str, ...], unset: bool, namespace: str | None) -> int:
    """Change settings of services while they run. Without arguments, list the settings that can be changed.

    A service's class names these settings in `live_settings`. A change applies to all processes of the service, also to
    those that start later, until it is unset; the YAML file stays as it is. All changes of one command apply, or none: a
    value that a process refuses is taken back. The exit code is 1 if a change was refused or not applied within 2 s.

    The graph is found as by `dynamo status`: on this machine, or in the etcd of ETCD_ENDPOINTS.

    \b
    Examples:
      dynamo set                                 # the settings that can be changed, and their values
      dynamo set Processor.router=random
      dynamo set Processor.router=               # restore the configured value
      dynamo set --unset Processor.router        # the same
    """
    wanted = [_parse(text, unset) for text in changes]
    if not wanted:
        if unset:
            raise click.UsageError("--unset needs SERVICE.SETTING")
        processes = [process for process in with_etcd(_read) if namespace in (None, process.namespace)]
        if not processes:
            raise UnavailableError("no service with live settings runs", hint=NO_LIVE_SETTINGS_HINT)
        click.echo(_table(processes))
        return 0
    for line in with_etcd(lambda etcd: _apply(etcd, wanted, namespace)):
        click.echo(line)
    return 0


def _parse(text: str, unset: bool) -> _Change:
    """Parse SERVICE.SETTING=VALUE, or SERVICE.SETTING with `unset`. Raises UsageError."""
    name, equals, value = text.partition("=")
    service, dot, setting = name.strip().partition(".")
    if not (service and dot and setting) or bool(equals) == unset:
        form = "SERVICE.SETTING" if unset else "SERVICE.SETTING=VALUE"
        raise click.UsageError(f"{text!r} is not {form}, such as Processor.router{'' if unset else '=random'}")
    return _Change(service, setting, value or None)


async def _read(etcd: Etcd) -> list[ProcessSettings]:
    from dynamo.cli.deployments import read_settings

    return await read_settings(etcd)


async def _apply(etcd: Etcd, changes: Sequence[_Change], namespace: str | None) -> list[str]:
    """Apply changes, and return a line for each.

    Raises ConfigError, with nothing changed, if a change has no target or is refused, UnavailableError if a process does
    not report in time.
    """
    processes = await _read(etcd)
    targets = [await _find_target(etcd, processes, change, namespace) for change in changes]
    if len({target.key for target in targets}) < len(targets):
        raise click.UsageError("a setting is given twice")
    try:
        for target in targets:
            await _write(etcd, target.key, None if target.value is None else target.value.encode())
        return await _wait_until_applied(etcd, targets)
    except ConfigError:
        for target in targets:
            await _write(etcd, target.key, target.stored)
        raise


async def _write(etcd: Etcd, key: str, value: bytes | None) -> None:
    if value is None:
        await etcd.delete(key)
    else:
        await etcd.put(key, value)


async def _find_target(
    etcd: Etcd, processes: Sequence[ProcessSettings], change: _Change, namespace: str | None
) -> _Target:
    """Find the service and the setting of a change. Raises ConfigError if either is missing or ambiguous."""
    from dynamo.worker.live_settings import setting_prefix

    candidates = _find_service(processes, change, namespace)
    setting = _find_setting(candidates, change)
    found_namespace = candidates[0].namespace
    key = setting_prefix(found_namespace, change.service) + setting
    values = {process.settings[setting].value for process in candidates if setting in process.settings}
    return _Target(
        namespace=found_namespace,
        service=change.service,
        setting=setting,
        value=change.value,
        key=key,
        stored=await etcd.get(key),
        before=", ".join(sorted(values)),
    )


def _find_service(
    processes: Sequence[ProcessSettings], change: _Change, namespace: str | None
) -> list[ProcessSettings]:
    """Return the processes of the service. Raises ConfigError if there are none, or in several namespaces."""
    name = f"{change.service}.{change.setting}"
    in_namespace = [process for process in processes if namespace in (None, process.namespace)]
    found = [process for process in in_namespace if process.service == change.service]
    if not found:
        place = f" in namespace {namespace}" if namespace else ""
        known = sorted({f"{process.service}.{setting}" for process in in_namespace for setting in process.settings})
        raise ConfigError(
            f"{name}: no service {change.service} with live settings runs{place}",
            hint=suggestion(name, known, "live settings"),
        )
    namespaces = sorted({process.namespace for process in found})
    if len(namespaces) > 1:
        raise ConfigError(
            f"{name}: {change.service} runs in several namespaces: {', '.join(namespaces)}",
            hint=f"name one: --namespace {namespaces[0]}",
        )
    return found


def _find_setting(processes: Sequence[ProcessSettings], change: _Change) -> str:
    """Return the setting's name in the spelling of the service. Raises ConfigError if it is not a live setting."""
    names = sorted({name for process in processes for name in process.settings})
    for name in names:
        if canonical(name) == canonical(change.setting):
            return name
    raise ConfigError(
        f"{change.service}.{change.setting}: not a setting that can be changed while {change.service} runs",
        hint=suggestion(change.setting, names, f"live settings of {change.service}"),
    )


async def _wait_until_applied(etcd: Etcd, targets: Sequence[_Target]) -> list[str]:
    """Wait until all processes have applied the values, and return a line for each target.

    Raises ConfigError if a process refuses a value, UnavailableError if one has not reported within APPLY_S.
    """
    deadline = time.monotonic() + APPLY_S
    while True:
        processes = await _read(etcd)
        outcomes = [_outcome(target, processes) for target in targets]
        for outcome in outcomes:
            for state in outcome.done:
                if state.error:
                    raise ConfigError(state.error, hint=state.hint or None)
        incomplete = [outcome for outcome in outcomes if not outcome.is_complete]
        if not incomplete:
            return [str(outcome) for outcome in outcomes]
        if time.monotonic() > deadline:
            late = incomplete[0]
            total = wording.processes(len(late.states))
            raise UnavailableError(
                f"{late.target.name}: {len(late.done)} of {total} applied the change within {APPLY_S:g} s",
                hint="the change is stored: the others apply it when they reach etcd",
            )
        await asyncio.sleep(POLL_S)


def _outcome(target: _Target, processes: Sequence[ProcessSettings]) -> _Outcome:
    states = [
        process.settings[target.setting]
        for process in processes
        if (process.namespace, process.service) == (target.namespace, target.service)
        and target.setting in process.settings
    ]
    return _Outcome(target, states, [state for state in states if state.given == target.value])


def _table(processes: Sequence[ProcessSettings]) -> str:
    """Return a row for each setting; processes whose values differ have rows of their own."""
    counts: Counter[tuple[str, str, str, str, str]] = Counter()
    for process in processes:
        for name, setting in process.settings.items():
            counts[
                process.namespace, f"{process.service}.{name}", setting.value, setting.configured, setting.allowed
            ] += 1
    rows = [(*row[:4], str(count), row[4]) for row, count in sorted(counts.items())]
    return tables.render(rows, HEAD, colour=in_colour(sys.stdout))
