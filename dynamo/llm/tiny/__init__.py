"""The model that ships in the package: a Llama of a few megabytes that knows the FAQ by heart (see README.md here)."""

from __future__ import annotations

from pathlib import Path

NAME = "dynamo-tiny"

_HERE = Path(__file__).parent
MODEL_DIR: Path = _HERE / "model"
FAQ_FILE: Path = _HERE / "faq.md"
WORDS_FILE: Path = _HERE / "words.txt"


def faq() -> dict[str, str]:
    """Question -> answer, in the order of faq.md. Answers are the Markdown text, code ticks kept, lines joined by spaces."""
    sections = FAQ_FILE.read_text(encoding="utf-8").split("\n## ")[1:]
    pairs = (section.partition("\n") for section in sections)
    return {question.strip(): " ".join(answer.split()) for question, _, answer in pairs}


def words() -> list[str]:
    """The words that the model was trained to recall, as code words and in lists."""
    return WORDS_FILE.read_text(encoding="utf-8").split()
