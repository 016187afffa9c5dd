"""`ServiceConfig`: the graph's configuration, as a service's process reads it."""

from __future__ import annotations

import json
import logging
import os
from typing import Any, ClassVar

from dynamo.config.merge import COMMON, COMMON_CONFIGS, SERVICE_ARGS
from dynamo.config.provenance import preview
from dynamo.errors import ConfigError

VARIABLE = "DYNAMO_SERVICE_CONFIG"
NEGATED = {"enable-prefix-caching", "use-tqdm-on-load", "multi-step-stream-outputs"}
"""Flags that engines turn on by default, so `false` must be passed explicitly: `--no-enable-prefix-caching`."""

log = logging.getLogger(__name__)


class MissingSettingError(ConfigError, ValueError):
    """A required key is missing. Also a ValueError, as in ai-dynamo 0.3."""


class ServiceConfig(dict[str, Any]):
    """The configuration of all services by service name, from the variable `DYNAMO_SERVICE_CONFIG`.

    `dynamo serve` sets the variable with `Common` already merged in. If a service still lists keys in `common-configs`,
    the methods here look them up in `Common`; `config["Service"]` and `get` return what is written.
    """

    _instance: ClassVar[ServiceConfig | None] = None

    @classmethod
    def get_instance(cls) -> ServiceConfig:
        """Return the instance of this process, read on the first call; it is empty if the variable is not set.

        Raises ConfigError if the variable is not a JSON object of objects.
        """
        if ServiceConfig._instance is None:
            ServiceConfig._instance = cls(_read(os.environ.get(VARIABLE, "")))
        return ServiceConfig._instance

    def require(self, service_name: str, key: str) -> Any:
        """Return the value of a key. Raises MissingSettingError if the service or the key is missing."""
        values = self.get(service_name, {})
        if key not in values:
            raise MissingSettingError(
                f"{service_name}.{key} must be specified in configuration", hint=f"pass --{service_name}.{key}=VALUE"
            )
        return values[key]

    @classmethod
    def get_parsed_config(cls, service_name: str) -> dict[str, Any]:
        """Return a service's settings and those of `Common` that it lists, without `ServiceArgs`.

        Returns `{}` for an unknown service.
        """
        return cls.get_instance()._settings(service_name)

    def as_args(self, service_name: str, prefix: str = "") -> list[str]:
        """Return a service's settings as command-line arguments, keys of `Common` first.

        With `prefix`, only keys that begin with it, which is removed. True becomes `--key`; False is left out, or becomes
        `--no-key` for the flags in NEGATED; a mapping becomes JSON; anything else `str(value)` in one argument, lists
        and None included.
        """
        args: list[str] = []
        for key, value in self._settings(service_name).items():
            if not key.startswith(prefix):
                continue
            name = key[len(prefix) :]
            if value is True:
                args.append(f"--{name}")
            elif value is False:
                if (flag := name.replace("_", "-")) in NEGATED:
                    args.append(f"--no-{flag}")
            else:
                args += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        log.info("Running %s with args=%s", service_name, args)
        return args

    def _settings(self, service_name: str) -> dict[str, Any]:
        own = self.get(service_name, {})
        common = self.get(COMMON, {})
        listed = own.get(COMMON_CONFIGS) or []
        inherited = {key: common[key] for key in listed if key in common and key not in own}
        return inherited | {key: value for key, value in own.items() if key not in (SERVICE_ARGS, COMMON_CONFIGS)}


def _read(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{VARIABLE}: not valid JSON: {error}", hint="take the line that `dynamo serve --dry-run` prints"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{VARIABLE}: expected an object of services, found {preview(values)}", hint='set it to {"Service": {...}}'
        )
    for service, settings in values.items():
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{VARIABLE}: {service}: expected an object of settings, found {preview(settings)}",
                hint=f'set it to {{"{service}": {{"key": value}}}}',
            )
    return values
