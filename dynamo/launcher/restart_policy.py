"""The policy for processes that die: the delay before a restart, and the number of deaths that ends the graph."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RestartPolicy:
    """The delay before a restart doubles from `first_s` to `longest_s`, and is reset after `stable_s` of life.

    More than `deaths` deaths of one process within `window_s` end the graph.
    """

    first_s: float = 0.2
    longest_s: float = 10.0
    stable_s: float = 60.0
    deaths: int = 5
    window_s: float = 60.0


@dataclass
class DeathRecord:
    """The recent deaths of one process, judged by a policy."""

    policy: RestartPolicy
    _delay_s: float = field(init=False)
    _deaths: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._delay_s = self.policy.first_s

    @property
    def count(self) -> int:
        """Deaths within the policy's window."""
        return len(self._deaths)

    def add(self, now: float, age_s: float) -> float | None:
        """Record a death at `now` (monotonic seconds) after `age_s` of life.

        Returns the delay before the restart in seconds; None if there were too many deaths.
        """
        self._deaths.append(now)
        while now - self._deaths[0] > self.policy.window_s:
            self._deaths.popleft()
        if self.count > self.policy.deaths:
            return None
        if age_s >= self.policy.stable_s:
            self._delay_s = self.policy.first_s
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self.policy.longest_s)
        return delay_s
