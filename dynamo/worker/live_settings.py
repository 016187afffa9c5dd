"""Settings that change while a graph runs: `live_settings = ("router",)` in a service class.

    etcdctl put /dynamo/processor/router random

sets `router` of each Processor of namespace `dynamo`, as ai-dynamo 0.3 had it for some keys; `dynamo set` does the same
and checks it. The value is read as one on the command line is: JSON, else text, converted by the parameter's type. A
bad one is refused. Without the key, the configured value counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from dynamo.config.overrides import parse_value
from dynamo.config.provenance import canonical, suggestion
from dynamo.config.settings import Setting, convert, declared, expectation
from dynamo.errors import DynamoError, GraphError, TransportError

if TYPE_CHECKING:
    from dynamo.rpc.runtime import Runtime

log = logging.getLogger(__name__)

STATES_PREFIX = "settings/"
FIRST_LOOK_S = 2.0
"""A process does not wait longer for etcd before it serves; it follows etcd all the same."""


class LiveSetting(msgspec.Struct):
    """What one process says of one live setting, with values as text."""

    configured: str
    value: str
    allowed: str
    """such as `one of round-robin, random`"""
    given: str | None = None
    """what is in etcd, as far as this process has seen"""
    error: str = ""
    """why it refused `given`"""
    hint: str = ""


States: TypeAlias = dict[str, LiveSetting]
"""By name: JSON in etcd under `settings/<namespace>/<Service>/<lease hex>`, for as long as a process lives."""


def setting_prefix(namespace: str, service: str) -> str:
    """Of the keys that are put to change settings; the layout is ai-dynamo 0.3's."""
    return f"/{namespace}/{service.lower()}/"


def live_settings(cls: type[Any]) -> dict[str, Setting]:
    """The settings that a class declares as live, by the names there. Raises GraphError for one that is no parameter."""
    names = getattr(cls, "live_settings", ())
    names = (names,) if isinstance(names, str) else names  # ("router") is meant as ("router",)
    found = declared(cls)
    known = found.settings if found is not None else {}
    for name in names:
        if canonical(name) not in known:
            raise GraphError(
                f"{cls.__name__}.live_settings: {name!r} is no parameter of the constructor",
                hint=suggestion(name, (canonical(key) for key in known), f"settings of {cls.__name__}"),
            )
    return {name: known[canonical(name)] for name in names}


class LiveSettings:
    """The live settings of one instance: follows etcd, sets attributes, tells what holds.

    Attributes have the names of the parameters, and what they were at first counts as configured. A property may refuse
    a value by raising. Raises GraphError where the constructor keeps no such attribute.
    """

    def __init__(self, instance: Any, namespace: str) -> None:
        self._instance = instance
        self._service = type(instance).__name__
        self._namespace = namespace
        self._settings = live_settings(type(instance))
        self._prefix = setting_prefix(namespace, self._service)
        self._unknown: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        for name, setting in self._settings.items():
            if not hasattr(instance, setting.name):
                raise GraphError(
                    f"{self._service}.live_settings: {name!r} is no attribute",
                    hint=f"write self.{setting.name} = {setting.name} in {self._service}.__init__",
                )
        self._configured = {name: getattr(instance, setting.name) for name, setting in self._settings.items()}
        self.states: States = {
            name: LiveSetting(_text(value), _text(value), expectation(self._settings[name].type())[0])
            for name, value in self._configured.items()
        }

    async def start(self, runtime: Runtime) -> None:
        """Follow etcd until `stop`; the values that are there now hold when this returns. Without settings, nothing."""
        if self._settings:
            self._task = asyncio.get_running_loop().create_task(self._follow(runtime), name="live settings")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK_S):
                    await self._looked.wait()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self, runtime: Runtime) -> None:
        told = f"{STATES_PREFIX}{self._namespace}/{self._service}/{runtime.instance_id:x}"
        async for view in runtime.follow(self._prefix):
            changed = self.take({key.removeprefix(self._prefix): value for key, value in view.items()})
            if changed or not self._looked.is_set():
                try:
                    await runtime.publish(told, self.states)
                except TransportError as error:  # the lease puts it when etcd is back
                    log.debug("%s: %s", told, error.message)
            self._looked.set()

    def take(self, view: dict[str, bytes]) -> bool:
        """Set what differs from before; `view` is all that etcd has now, by name. True where there was a difference."""
        unknown = view.keys() - self._settings.keys()
        for name in unknown - self._unknown:
            hint = suggestion(name, self._settings, "live settings")
            log.warning("%s.%s (etcd %s%s): no such live setting; %s", self._service, name, self._prefix, name, hint)
        self._unknown = unknown
        given = {name: value.decode(errors="replace") for name, value in view.items()}
        changed = [name for name, state in self.states.items() if state.given != given.get(name)]
        for name in changed:
            self._change(name, given.get(name))
        return bool(changed)

    def _change(self, name: str, given: str | None) -> None:
        setting, state, what = self._settings[name], self.states[name], f"{self._service}.{name}"
        state.given, state.error, state.hint = given, "", ""
        try:
            value = self._configured[name]
            if given is not None:
                value = convert(setting, parse_value(given), lambda: what)
            setattr(self._instance, setting.name, value)
        except Exception as error:  # not of the setting's type, or what a property of the class raises
            message, hint = (error.message, error.hint) if isinstance(error, DynamoError) else (repr(error), None)
            state.error, state.hint = (
                f"{what}: {message.removeprefix(f'{what}: ').removeprefix(f'{name}: ')}",
                hint or "",
            )
            log.warning("%s (etcd %s%s); it stays %s", state.error, self._prefix, name, state.value)
            return
        before, state.value = state.value, _text(getattr(self._instance, setting.name))
        if state.value != before:
            log.info("%s: %s -> %s (%s)", name, before, state.value, "configured" if given is None else "etcd")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
