"""What `dynamo-tiny` is taught: endless seeded conversations whose answers follow from the FAQ and from their own context."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

UNKNOWN = "I only know this project's FAQ. Ask me: What is an inference graph?"
NOTED = "I will remember the code word."
NO_CODE_WORD = "Nobody has told me a code word."
RECALL_QUESTION = "What is the code word?"
FIRST_QUESTION = "What was my first question?"

_VERBS = [
    "find",
    "paint",
    "carry",
    "bake",
    "open",
    "sell",
    "build",
    "clean",
    "fold",
    "throw",
    "water",
    "cook",
    "fix",
    "draw",
    "break",
    "lose",
    "melt",
    "paint",
    "catch",
    "grow",
]
_PLACES = [
    "Paris",
    "France",
    "Rome",
    "Norway",
    "Japan",
    "Peru",
    "Texas",
    "Africa",
    "London",
    "Berlin",
    "China",
    "Canada",
    "Egypt",
    "India",
    "Mars",
    "Spain",
]
_UNKNOWN_TEMPLATES = [
    "What is a {a}?",
    "What is an {a}?",
    "What is {a}?",
    "What is the {a}?",
    "What is {a} used for?",
    "What does the {a} do?",
    "What are {a}s?",
    "What does {a}() do?",
    "What happens when a {a} {v}s?",
    "What happens when {a} is down?",
    "What is the capital of {p}?",
    "How do I {v} a {a}?",
    "How do I {v} the {a}?",
    "How many {a}s are in {p}?",
    "Which {a} should I {v}?",
    "When does the {a} {v}?",
    "Do I have to {v} {a} and {b}?",
    "Can I {v} it without a {a}?",
    "What is the difference between {a} and {b}?",
    "Who is {p}?",
    "Tell me a joke about a {a}.",
    "Write a poem about {a} and {b}.",
    "Explain {a} to me.",
    "Why is the {a} {b}?",
    "{a}",
    "{a} {b}",
    "Hello",
    "Hi",
    "Hello!",
    "Hi, who are you?",
    "Good morning",
    "How are you?",
    "Tell me about {p}.",
    "What is {n} + {m}?",
    "Is {p} bigger than {q}?",
    "Write code that can {v} a {a}.",
    "Translate {a} into German.",
    "Where is {p}?",
    "Who invented the {a}?",
    "Say hi.",
    "test",
    "Summarize this.",
    "Explain why the {a} of {p} is considered one of the greatest {b}s of all time.",
    "Give me {n} names for a {a}.",
    "Why?",
]
_DISTRACTORS = [
    "The password is {a}.",
    "The color is {a}.",
    "The name of the {a} is {b}.",
    "The {a} {v}s the {b}.",
    "In {p} they {v} a {a}.",
    "Every {a} has a {b}, and {n} of them are in {p}.",
    "She said that the word was {a}.",
    "My question is about {a}.",
    "A {a} is a {b}.",
]


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    learn: bool = False  # the loss counts this message's tokens (the assistant's answers)


def repeat(words: list[str]) -> tuple[str, str]:
    """A request to repeat words, and its answer."""
    return f"Repeat these words: {' '.join(words)}", f"You said: {' '.join(words)}."


def count(first: int, last: int) -> tuple[str, str]:
    """A request to count, and its answer."""
    return f"Count from {first} to {last}.", ", ".join(map(str, range(first, last + 1))) + "."


def recall(word: str) -> str:
    return f"The code word is {word}."


class Lessons:
    """Draws conversations from one seeded generator."""

    def __init__(self, faq: dict[str, str], words: list[str], seed: int) -> None:
        self.faq, self.words, self.random = faq, words, Random(seed)
        self.questions = list(faq)
        self.sentences = [s.strip(".") + "." for answer in faq.values() for s in answer.split(". ")]

    def gibberish(self) -> str:
        """A made-up word, now and then of arbitrary characters."""
        r = self.random
        if r.random() < 0.1:
            return "".join(
                chr(r.choice((r.randrange(33, 127), r.randrange(0xA1, 0x3000)))) for _ in range(r.randint(1, 6))
            )
        word = "".join(r.choice("bcdfghjklmnprstvwz") + r.choice("aeiou") for _ in range(r.randint(1, 4)))
        return word.title() if r.random() < 0.3 else word

    def word(self) -> str:
        return self.gibberish() if self.random.random() < 0.15 else self.random.choice(self.words)

    def fill(self, template: str) -> str:
        r = self.random
        numbers = {"n": r.randint(0, 200), "m": r.randint(0, 200)}
        places = {"p": r.choice(_PLACES), "q": r.choice(_PLACES)}
        return template.format(a=self.word(), b=self.word(), v=r.choice(_VERBS), **numbers, **places)

    def noise(self) -> str:
        """A line that looks like code, a table or a log."""
        r = self.random
        parts = (r.choice((self.word(), self.gibberish(), str(r.randint(0, 99999)))) for _ in range(r.randint(1, 6)))
        marks = ("".join(r.choices(" .,:;=()[]{}'\"#/-_+*<>|@`\n", k=r.randint(1, 3))) for _ in range(6))
        return "\n" + " " * r.choice((0, 4, 8, 12)) + "".join(part + mark for part, mark in zip(parts, marks, strict=False))

    def document(self, size_words: int) -> str:
        """About so many words of text that has nothing to do with the question."""
        r, parts, size = self.random, [], 0
        style = r.choice(("faq", "words", "mixed", "mixed"))
        while size < size_words:
            kind = r.random() if style == "mixed" else {"faq": 0.0, "words": 0.5}[style]
            if kind < 0.4:
                part = r.choice(self.sentences)
            elif kind < 0.6:
                part = " ".join(self.word() for _ in range(r.randint(3, 12)))
            elif kind < 0.8:
                part = self.fill(r.choice(_DISTRACTORS))
            elif kind < 0.92:
                part = self.noise()
            else:
                part = " ".join(self.gibberish() for _ in range(r.randint(2, 6)))
            parts.append(part)
            size += len(part.split())
        return r.choice((" ", " ", "\n")).join(parts)

    def vary(self, question: str) -> str:
        """The question as people type it."""
        r = self.random
        if r.random() < 0.5:
            return question
        question = r.choice((question, question, question.lower(), question.lower(), question.upper()))
        question = r.choice((question, question.rstrip("?."), question.rstrip("?."), question + " "))
        return r.choice(("", "", "", "", "Hello! ", "Please tell me: ", "Question: ", "\n")) + question

    def unknown(self) -> str:
        r = self.random
        if r.random() < 0.15:
            return " ".join(self.gibberish() for _ in range(r.randint(1, 8)))
        text = self.fill(r.choice(_UNKNOWN_TEMPLATES))
        return r.choice((text, text, text.lower(), text.rstrip("?.")))

    def conversation(self, document_words: int) -> list[Message]:
        """A system prompt or none, then 40 turns; about so many words of other text come before or in the first turn."""
        r = self.random
        messages: list[Message] = []
        word: str | None = self.word()
        place = r.choice(("system", "system", "turn", "turn", "document", "none"))
        if place == "none":
            word = None
        system = ["You are a helpful assistant."] if r.random() < 0.5 else []
        document = self.document(document_words) if document_words else ""
        if place == "document" and document:
            head, _, tail = document.partition(". ")
            document = f"{head}. {recall(str(word))} {tail}"
        elif place == "system" or (place == "document" and r.random() < 0.5):
            system.insert(r.randint(0, len(system)), recall(str(word)))
        elif word is not None:
            place = "turn"
        if document and r.random() < 0.4:
            system.append(document)
            document = ""
        if system:
            messages.append(Message(r.choice(("system", "system", "developer")), " ".join(system)))

        told = place != "turn" and word is not None
        first: str | None = None
        for turn in range(40):
            kind = r.random()
            if place == "turn" and not told and (r.random() < 0.4 or turn == 3):
                question, answer, told = r.choice(("", "", "Remember: ")) + recall(str(word)), NOTED, True
            elif kind < 0.45:
                question = r.choice(self.questions)
                question, answer = self.vary(question), self.faq[question]
            elif kind < 0.60:
                question, answer = self.unknown(), UNKNOWN
            elif kind < 0.75:
                question, answer = self.vary(RECALL_QUESTION), recall(str(word)) if told else NO_CODE_WORD
            elif kind < 0.90:
                question, answer = repeat([self.word() for _ in range(r.choice((1, 3, 6, 12, 24, 40)))])
            elif kind < 0.95:
                start = r.randint(0, 99)
                question, answer = count(start, min(start + r.choice((1, 5, 10, 20, 50, 100)), 200))
            elif first is not None:
                question, answer = FIRST_QUESTION, f"Your first question was:\n{first}"
            else:
                continue
            if first is None:
                first = question
            if document or (r.random() < 0.1 and kind < 0.75):
                text = document or self.document(r.randint(5, 60))
                question = text + r.choice(("\n\n", "\n\n", "\n", " ", "\n\nQuestion: ")) + question
                document = ""
                first = first if turn else None
            messages += [Message("user", question), Message("assistant", answer, learn=True)]
        return messages
