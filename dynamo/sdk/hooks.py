"""`ServiceHooks`: names that the framework looks for on a service class; all are optional."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol

from dynamo.config.upstream_keys import Change


class ServiceHooks(Protocol):
    """Attributes and methods that a service class may define, beside those that are marked with a decorator.

    The framework reads each by its name, so a class need not derive from this one.
    """

    live_settings: ClassVar[tuple[str, ...]] = ()
    """names of constructor parameters that `dynamo set` may change while the graph runs; the instance keeps each as an
    attribute of that name, and a property may refuse a value by raising"""

    @staticmethod
    def extra_settings() -> Collection[str] | None:
        """Return names of settings beside the constructor's parameters; None accepts any key.

        Called only for keys that are not parameters.
        """
        ...

    @staticmethod
    def check_settings(settings: Mapping[str, Any], where: Callable[[str], str]) -> None:
        """Validate settings together, before anything starts.

        `where(key)` is the place of a value, for the beginning of the message. Raises ConfigError.
        """

    @staticmethod
    def upgrade_setting(key: str, value: Any, settings: Mapping[str, Any], services: Collection[str]) -> Change | None:
        """Return what becomes of a key that the class no longer takes, or takes with another meaning; None: nothing.

        Called for every key before the check; `settings` are all keys of the service, `services` those of the graph.
        """
        ...

    @staticmethod
    def wanted_dependencies(settings: Mapping[str, Any]) -> Collection[str]:
        """Return the names of optional dependencies that these settings use, also where the graph does not link them.

        Their service then runs elsewhere, started by another command.
        """
        ...

    @staticmethod
    def gpus_needed(settings: Mapping[str, Any]) -> float:
        """Return how many GPUs one worker needs with these settings; `ServiceArgs.resources.gpu` overrides it."""
        ...

    def stats_data(self) -> Mapping[str, Any]:
        """Return figures that `$SRV.STATS` and `dynamo status` show for each endpoint of the service."""
        ...
