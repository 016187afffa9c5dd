"""A conversation with a model in the terminal, or one question and its answer in a pipe.

The answer alone goes to standard output; the prompt's companions (status, figures, errors) go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import click

from dynamo.cli.errors import report
from dynamo.errors import DynamoError

PROMPT = ">>> "
HELP = """\
/help         this list
/clear        forget the conversation; the system text stays
/system TEXT  what the model is told first; without TEXT: nothing
/save FILE    write the conversation to FILE: OpenAI's messages if it ends in .json, else Markdown
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it leaves."""
_CONTROLS = dict.fromkeys(
    {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
)  # a model must not drive the terminal

Message = dict[str, str]


class Sampled(NamedTuple):
    """How answers are made; None: as the model would."""

    max_tokens: int | None = None
    temperature: float | None = None


class Piece(NamedTuple):
    """Some more of an answer. `tokens` are output tokens; `prompt_tokens` is 0 where it is not known yet."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0


class Model(Protocol):
    """What answers: an engine in this process, or a server. Closing the iterator stops it."""

    name: str

    def answer(self, messages: list[Message], sampled: Sampled) -> Generator[Piece]: ...


class Figures:
    """Counts of one answer and its times, in seconds from the question."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._first = self._last = 0.0
        self.tokens = self.prompt_tokens = 0

    def add(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        self.prompt_tokens += piece.prompt_tokens
        if piece.text:
            self._last = time.monotonic()
            self._first = self._first or self._last

    def __str__(self) -> str:
        """Tokens a second are those after the first one: its time is the TTFT."""
        ttft_s = self._first - self._asked if self._first else 0.0
        writing_s = self._last - self._first
        rate = (self.tokens - 1) / writing_s if self.tokens > 1 and writing_s > 0 else 0.0
        counts = f"{self.prompt_tokens} prompt tokens, {self.tokens} output tokens"
        return f"{counts}, TTFT {ttft_s:.3f} s, {rate:.1f} tokens/s"


class Chat:
    """One conversation: its messages, and what the user sees of it."""

    def __init__(self, model: Model, sampled: Sampled, *, system: str | None = None, stats: bool = False) -> None:
        self._model, self._sampled, self._stats = model, sampled, stats
        self.system = system
        self.messages: list[Message] = []
        self._to_terminal = sys.stdout.isatty()

    def ask(self, question: str) -> None:
        """Print the answer as it comes. What was printed stays in the conversation, also if the user stops it.

        Raises KeyboardInterrupt then, and DynamoError when the model fails; without an answer, the question is dropped.
        """
        told = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        parts: list[str] = []
        figures = Figures()
        try:
            with closing(self._model.answer([*told, *self.messages, asked], self._sampled)) as pieces:
                for piece in pieces:
                    figures.add(piece)
                    parts.append(piece.text)
                    self._write(piece.text)
        finally:
            answer = "".join(parts)
            if answer:
                self.messages += [asked, {"role": "assistant", "content": answer}]
                if not answer.endswith("\n"):
                    self._write("\n")
            if self._stats:
                _note(str(figures))

    def _write(self, text: str) -> None:
        sys.stdout.write(text.translate(_CONTROLS) if self._to_terminal else text)
        sys.stdout.flush()

    # -- at the prompt

    def converse(self) -> None:
        """Questions from the terminal until the user leaves."""
        try:
            import readline  # noqa: F401  # line editing and history for input()
        except ImportError:
            pass
        _note(f"{self._model.name}; /help lists the commands, Ctrl-D leaves")
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
                _note("stopped; Ctrl-C again leaves")
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
            _note("the conversation is forgotten")
        elif name == "/system":
            self.system = text or None
            _note("the system text is set" if text else "there is no system text now")
        elif name == "/save":
            self._save(text)
        else:
            raise DynamoError(f"{name}: no such command", hint="type /help")

    def _save(self, name: str) -> None:
        if not name:
            raise DynamoError("/save: a file name is missing", hint="type /save FILE")
        told = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*told, *self.messages]
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
    """One line on the terminal that tells what takes so long, and then goes away; nothing in a pipe."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def say(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        self.say("")


def _note(text: str) -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    click.echo(click.style(text, dim=True), err=True, color=colour)
