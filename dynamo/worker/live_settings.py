"""Settings that change while a graph runs: `live_settings = ("router",)` in a service class.

    etcdctl put /dynamo/processor/router random

sets `router` of every Processor of the namespace `dynamo`, in the key layout of ai-dynamo 0.3; `dynamo set` does the
same and validates first. Values are parsed as on the command line: JSON, else text, converted to the parameter's type.
Invalid values are rejected. Without the key, the configured value applies.
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
from dynamo.tasks import TaskSet

if TYPE_CHECKING:
    from dynamo.rpc.runtime import Runtime

log = logging.getLogger(__name__)

STATES_PREFIX = "settings/"
FIRST_LOOK_S = 2.0
"""How long a process waits for etcd before it serves; it follows etcd in any case."""


class LiveSetting(msgspec.Struct):
    """State of one live setting in one process, with values as text."""

    configured: str
    value: str
    allowed: str
    """such as `one of round-robin, random`"""
    given: str | None = None
    """the value in etcd that this process has seen last"""
    error: str = ""
    """why `given` was rejected; empty if it was not"""
    hint: str = ""


States: TypeAlias = dict[str, LiveSetting]
"""By name; JSON in etcd under `settings/<namespace>/<Service>/<lease hex>` while the process lives."""


def setting_prefix(namespace: str, service: str) -> str:
    """Return the etcd prefix of the keys that change a service's settings, in the layout of ai-dynamo 0.3."""
    return f"/{namespace}/{service.lower()}/"


def live_settings(cls: type[Any]) -> dict[str, Setting]:
    """Return the settings that a class declares as live, by name.

    Raises GraphError for a name that is not a constructor parameter.
    """
    names = getattr(cls, "live_settings", ())
    names = (names,) if isinstance(names, str) else names  # ("router") stands for ("router",)
    found = declared(cls)
    known = found.settings if found is not None else {}
    for name in names:
        if canonical(name) not in known:
            raise GraphError(
                f"{cls.__name__}.live_settings: {name!r} is not a constructor parameter",
                hint=suggestion(name, (canonical(key) for key in known), f"settings of {cls.__name__}"),
            )
    return {name: known[canonical(name)] for name in names}


class LiveSettings:
    """Live settings of one instance: follow etcd, set attributes, publish their state.

    Attributes have the names of the parameters; their values after construction are the configured ones. A property may
    reject a value by raising. Raises GraphError when the constructor does not set such an attribute.
    """

    def __init__(self, instance: Any, namespace: str) -> None:
        self._instance = instance
        self._service = type(instance).__name__
        self._namespace = namespace
        self._settings = live_settings(type(instance))
        self._prefix = setting_prefix(namespace, self._service)
        self._unknown: set[str] = set()
        self._tasks = TaskSet("live settings")
        self._looked = asyncio.Event()
        for name, setting in self._settings.items():
            if not hasattr(instance, setting.name):
                raise GraphError(
                    f"{self._service}.live_settings: {name!r} is not an attribute",
                    hint=f"write self.{setting.name} = {setting.name} in {self._service}.__init__",
                )
        self._configured = {name: getattr(instance, setting.name) for name, setting in self._settings.items()}
        self.states: States = {
            name: LiveSetting(_text(value), _text(value), expectation(self._settings[name].type())[0])
            for name, value in self._configured.items()
        }

    async def start(self, runtime: Runtime) -> None:
        """Follow etcd until `stop`; values that are in etcd now are set on return. No-op without live settings."""
        if self._settings:
            self._tasks.spawn(self._follow(runtime), name="follow etcd")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK_S):
                    await self._looked.wait()

    async def stop(self) -> None:
        """Stop following etcd."""
        await self._tasks.aclose()

    async def _follow(self, runtime: Runtime) -> None:
        state_key = f"{STATES_PREFIX}{self._namespace}/{self._service}/{runtime.instance_id:x}"
        async for view in runtime.follow(self._prefix):
            changed = self.apply({key.removeprefix(self._prefix): value for key, value in view.items()})
            if changed or not self._looked.is_set():
                try:
                    await runtime.publish(state_key, self.states)
                except TransportError as error:  # published when etcd is back
                    log.debug("cannot publish %s: %s", state_key, error.message)
            self._looked.set()

    def apply(self, view: dict[str, bytes]) -> bool:
        """Apply the values in etcd, by name; return whether any differs from before."""
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
        setting = self._settings[name]
        state = self.states[name]
        what = f"{self._service}.{name}"
        state.given = given
        state.error = ""
        state.hint = ""
        try:
            value = self._configured[name]
            if given is not None:
                value = convert(setting, parse_value(given), lambda: what)
            setattr(self._instance, setting.name, value)
        except Exception as error:  # wrong type, or raised by a property of the class
            message, hint = (error.message, error.hint) if isinstance(error, DynamoError) else (repr(error), None)
            state.error = f"{what}: {message.removeprefix(f'{what}: ').removeprefix(f'{name}: ')}"
            state.hint = hint or ""
            log.warning("%s (etcd %s%s); keeping %s", state.error, self._prefix, name, state.value)
            return
        before = state.value
        state.value = _text(getattr(self._instance, setting.name))
        if state.value != before:
            log.info("%s: %s -> %s (%s)", name, before, state.value, "configured" if given is None else "etcd")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
