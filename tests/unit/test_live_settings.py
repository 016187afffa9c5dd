"""What one instance makes of the values in etcd."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.errors import ConfigError, GraphError
from dynamo.sdk import service
from dynamo.worker.live_settings import LiveSettings, live_settings, setting_prefix


@service
class Tuned:
    live_settings = ("mode", "max-words", "heat", "names")

    def __init__(
        self,
        mode: Literal["loud", "quiet"] = "quiet",
        max_words: int | None = None,
        heat: float = 0.5,
        names: tuple[str, ...] = (),
        fixed: int = 1,
    ) -> None:
        self.mode, self.max_words, self.heat, self.names, self.fixed = mode, max_words, heat, names, fixed


def values(instance: Tuned) -> dict[str, object]:
    return {
        "mode": instance.mode, "max-words": instance.max_words, "heat": instance.heat, "names": instance.names
    }  # fmt: skip


TAKEN: dict[str, dict[str, object]] = {
    "mode": {"loud": "loud", "quiet": "quiet", '"loud"': "loud"},
    "max-words": {"7": 7, "null": None, " 8": 8},
    "heat": {"2": 2.0, "0.25": 0.25},
    "names": {'["a", "b"]': ("a", "b"), "[]": ()},
}
REFUSED = {"mode": ["", "LOUD", "3"], "max-words": ["x", "1.5", "[1]"], "heat": ["hot", "{}"], "names": ["{}", "7"]}


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={name: st.sampled_from([*TAKEN[name], *REFUSED[name]]) for name in Tuned.live_settings}
        ),
        max_size=6,
    )
)
def test_each_value_is_the_last_good_one_or_the_configured_one(views: list[dict[str, str]]) -> None:
    instance = Tuned(mode="loud", max_words=5)
    live = LiveSettings(instance, "n")
    configured = expected = values(instance)
    before: dict[str, str] = {}
    for view in views:
        assert live.apply({name: text.encode() for name, text in view.items()}) == (view != before)
        expected = {
            name: TAKEN[name].get(view[name], expected[name]) if name in view else configured[name] for name in expected
        }
        assert values(instance) == expected
        for name, state in live.states.items():
            assert state.given == view.get(name)
            assert bool(state.error) == (view.get(name) in REFUSED[name])
        before = view


def test_one_line_for_a_change_and_none_for_the_same_again(caplog: pytest.LogCaptureFixture) -> None:
    live = LiveSettings(Tuned(), "n")
    with caplog.at_level(logging.INFO, "dynamo"):
        for text in (b"loud", b"loud", b'"loud"'):
            live.apply({"mode": text})
        live.apply({})
    assert caplog.messages == ["mode: quiet -> loud (etcd)", "mode: loud -> quiet (configured)"]


def test_a_bad_value_says_what_was_found_and_what_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    live = LiveSettings(Tuned(), "n")
    live.apply({"mode": b"lout"})
    (line,) = caplog.messages
    assert line == (
        'Tuned.mode: expected one of loud, quiet, found "lout" (etcd /n/tuned/mode); keeping quiet'
    )  # fmt: skip
    assert live.states["mode"].hint == "did you mean loud? choices: loud, quiet"
    live.apply({"mode": b"\xff\xfe"})
    assert live.states["mode"].error.startswith("Tuned.mode: expected one of loud, quiet")


def test_a_key_that_is_no_live_setting_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    instance = Tuned()
    live = LiveSettings(instance, "n")
    for view in ({"fixed": b"2"}, {"fixed": b"3"}, {"fixed": b"3", "moode": b"loud"}):
        assert not live.apply(view)
    assert instance.fixed == 1
    first, second = caplog.messages
    assert first.startswith("Tuned.fixed (etcd /n/tuned/fixed): no such live setting; live settings: mode, max-words")
    assert second.startswith("Tuned.moode (etcd /n/tuned/moode): no such live setting; did you mean mode?")


def test_a_property_may_refuse_and_round(caplog: pytest.LogCaptureFixture) -> None:
    class Guarded:
        live_settings = ("limit",)

        def __init__(self, limit: int = 3) -> None:
            self._limit = limit

        @property
        def limit(self) -> int:
            return self._limit

        @limit.setter
        def limit(self, value: int) -> None:
            if value > 99:
                raise ConfigError("limit: at most 99", hint="give less")
            if value > 9:
                raise ValueError("at most 9")
            self._limit = max(value, 1)

    instance = Guarded()
    live = LiveSettings(instance, "n")
    live.apply({"limit": b"10"})
    assert caplog.messages == ["Guarded.limit: ValueError('at most 9') (etcd /n/guarded/limit); keeping 3"]
    live.apply({"limit": b"100"})
    assert (live.states["limit"].error, live.states["limit"].hint) == ("Guarded.limit: at most 99", "give less")
    live.apply({"limit": b"0"})
    assert (instance.limit, live.states["limit"].value) == (1, "1")


def test_declarations() -> None:
    assert list(live_settings(Tuned)) == ["mode", "max-words", "heat", "names"]
    assert live_settings(Path) == {}
    assert setting_prefix("dynamo", "Processor") == "/dynamo/processor/"

    class OneText:
        live_settings = "mode"

        def __init__(self, mode: str = "") -> None:
            self.mode = mode

    assert list(live_settings(OneText)) == ["mode"]

    class Misspelled:
        live_settings = ("moode",)

        def __init__(self, mode: str = "") -> None:
            self.mode = mode

    with pytest.raises(GraphError, match=r"Misspelled.live_settings: 'moode' is not a constructor parameter") as bad:
        live_settings(Misspelled)
    assert "did you mean mode?" in str(bad.value.hint)

    class Forgotten:
        live_settings = ("mode",)

        def __init__(self, mode: str = "") -> None:
            pass

    with pytest.raises(GraphError, match=r"Forgotten.live_settings: 'mode' is not an attribute"):
        LiveSettings(Forgotten(), "n")
