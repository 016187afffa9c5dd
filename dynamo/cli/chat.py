"""A conversation with a model in the terminal, or one question and its answer in a pipe.

Only the answer goes to standard output; the prompt, status, statistics and errors go to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import click

from dynamo.cli.errors import in_colour, report
from dynamo.errors import DynamoError

PROMPT = ">>> "
HELP = """\
/help         show this list
/clear        start a new conversation; the system message stays
/system TEXT  set the system message; without TEXT, remove it
/save FILE    save the conversation: as OpenAI messages if FILE ends in .json, else as Markdown
/quit         quit, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it quits."""
_CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})
"""Removed from answers on a terminal, which a model must not control."""

Message = dict[str, str]


class SamplingOptions(NamedTuple):
    """Sampling parameters; None: the default of the model."""

    max_tokens: int | None = None
    temperature: float | None = None


class Piece(NamedTuple):
    """A part of an answer. `tokens` are output tokens; `prompt_tokens` is 0 while it is not known."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0


class Model(Protocol):
    """A model that answers: an engine in this process, or a server. Closing the generator stops it."""

    name: str

    def answer(self, messages: list[Message], sampling: SamplingOptions) -> Generator[Piece]:
        """Answer the last message. Raises DynamoError."""
        ...


class Statistics:
    """Token counts and times of one answer, from the question on."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._first = 0.0
        self._last = 0.0
        self.tokens = 0
        self.prompt_tokens = 0

    def add(self, piece: Piece) -> None:
        """Count a part of the answer."""
        self.tokens += piece.tokens
        self.prompt_tokens += piece.prompt_tokens
        if piece.text:
            self._last = time.monotonic()
            self._first = self._first or self._last

    def __str__(self) -> str:
        """Show the counts, TTFT and tokens/s, which leaves out the first token: its time is the TTFT."""
        ttft_s = self._first - self._asked if self._first else 0.0
        decode_s = self._last - self._first
        rate = (self.tokens - 1) / decode_s if self.tokens > 1 and decode_s > 0 else 0.0
        counts = f"{self.prompt_tokens} prompt tokens, {self.tokens} output tokens"
        return f"{counts}, TTFT {ttft_s:.3f} s, {rate:.1f} tokens/s"


class Chat:
    """One conversation: its messages, and its display to the user."""

    def __init__(
        self, model: Model, sampling: SamplingOptions, *, system: str | None = None, stats: bool = False
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._stats = stats
        self.system = system
        self.messages: list[Message] = []
        self._to_terminal = sys.stdout.isatty()

    def ask(self, question: str) -> None:
        """Print the answer while it arrives. If the user stops it, the printed part stays in the conversation.

        Raises KeyboardInterrupt if the user stops it, DynamoError if the model fails. A question that got no text is
        dropped.
        """
        asked = {"role": "user", "content": question}
        parts: list[str] = []
        statistics = Statistics()
        try:
            with closing(self._model.answer([*self._all_messages(), asked], self._sampling)) as pieces:
                for piece in pieces:
                    statistics.add(piece)
                    parts.append(piece.text)
                    self._write(piece.text)
        finally:
            answer = "".join(parts)
            if answer:
                self.messages += [asked, {"role": "assistant", "content": answer}]
                if not answer.endswith("\n"):
                    self._write("\n")
            if self._stats:
                _note(str(statistics))

    def _all_messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _write(self, text: str) -> None:
        sys.stdout.write(text.translate(_CONTROL_CHARACTERS) if self._to_terminal else text)
        sys.stdout.flush()

    # -- at the prompt

    def converse(self) -> None:
        """Answer questions from the terminal until the user quits."""
        try:
            import readline  # noqa: F401  # line editing and history for input()
        except ImportError:
            pass
        _note(f"{self._model.name}; /help lists the commands, Ctrl-D quits")
        while True:
            try:
                line = self._read().strip()
            except (EOFError, KeyboardInterrupt):
                click.echo(err=True)
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:
                _note("stopped; Ctrl-C again quits")
            except DynamoError as error:
                report(error)

    def _read(self) -> str:
        if self._to_terminal:
            return input(PROMPT)
        click.echo(PROMPT, err=True, nl=False)
        return input()

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/help":
            _note(HELP)
        elif name == "/clear":
            self.messages.clear()
            _note("started a new conversation")
        elif name == "/system":
            self.system = text or None
            _note("system message set" if text else "system message removed")
        elif name == "/save":
            self._save(text)
        else:
            raise DynamoError(f"{name}: no such command", hint="type /help")

    def _save(self, name: str) -> None:
        if not name:
            raise DynamoError("/save: a file name is missing", hint="type /save FILE")
        messages = self._all_messages()
        text = "".join(f"**{message['role']}**: {message['content'].strip()}\n\n" for message in messages)
        if name.endswith(".json"):
            text = json.dumps(messages, indent=2, ensure_ascii=False) + "\n"
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise DynamoError(f"/save {name}: the file exists", hint="choose another name") from None
        except OSError as error:
            raise DynamoError(f"/save {name}: {error.strerror}", hint="choose another name") from None
        _note(f"{len(messages)} messages saved in {name}")


class Progress:
    """One line on the terminal that shows the state of a long start; no-op in a pipe."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Replace the line by `text`."""
        if self._is_shown:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line."""
        self.show("")


def _note(text: str) -> None:
    click.echo(click.style(text, dim=True), err=True, color=in_colour(sys.stderr))
