"""What `dynamo-tiny` is taught: endless seeded conversations whose answers follow from the FAQ and from their own context."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

UNKNOWN = "I only know this project's FAQ. Ask me: What is an inference graph?"
NOTED = "I will remember the code word."
NO_CODE_WORD = "Nobody has told me a code word."
RECALL_QUESTION = "What is the code word?"

_VERBS = ["find", "paint", "carry", "bake", "open", "sell", "build", "clean", "throw", "cook", "fix", "draw", "lose"]
_PLACES = ["Paris", "France", "Rome", "Norway", "Japan", "Peru", "Texas", "London", "Berlin", "China", "Egypt", "Mars"]
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
_SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "You are an expert in {a} and {b}. Be brief and honest, and never mention {p}.",
    "Today is day {n}.",
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
        self.faq = faq
        self.words = words
        self.random = Random(seed)
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
        return (
            "\n"
            + " " * r.choice((0, 4, 8, 12))
            + "".join(part + mark for part, mark in zip(parts, marks, strict=False))
        )

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

    def conversation(self, document_words: int, turns: int) -> list[Message]:
        """A system prompt or none, then turns; about so many words of other text come before or in the first turn."""
        r = self.random
        word = self.word()
        document = self.document(document_words) if document_words else ""
        place = r.choice(("system", "turn", "turn", "document", "never"))  # where the code word is said
        system: list[str] = []
        if r.random() < 0.5:
            system.append(self.fill(r.choice(_SYSTEM_PROMPTS)) if r.random() < 0.7 else self.document(r.randint(3, 30)))
        if place == "document" and ". " in document:
            head, _, tail = document.partition(". ")
            document = f"{head}. {recall(word)} {tail}"
        elif place in ("system", "document"):
            system.insert(r.randint(0, len(system)), recall(word))
        if document and r.random() < 0.4:
            system.append(document)
            document = ""
        messages = [Message(r.choice(("system", "system", "developer")), " ".join(system))] if system else []

        told, turn_of_telling = place in ("system", "document"), r.choice((0, 0, 0, 1, 2, 4))
        for turn in range(turns):
            if place == "turn" and turn == turn_of_telling:
                question, answer, told = r.choice(("", "", "Remember: ")) + recall(word), NOTED, True
            else:
                question, answer = self.turn(
                    recall(word) if told else NO_CODE_WORD, r.random() * (0.75 if document else 1)
                )
                if document or r.random() < 0.1:
                    text = document or self.document(r.randint(5, 60))
                    question = text + r.choice(("\n\n", "\n\n", "\n", " ", "\n\nQuestion: ")) + question
                    document = ""
            messages += [_ask(question), Message("assistant", answer, learn=True)]
        return messages

    def turn(self, code_word_answer: str, kind: float) -> tuple[str, str]:
        """A question and its answer; `kind`, 0 to 1, says of which kind."""
        r = self.random
        if kind < 0.40:
            question = r.choice(self.questions)
            return self.vary(question), self.faq[question]
        if kind < 0.55:
            return self.unknown(), UNKNOWN
        if kind < 0.75:
            return self.vary(RECALL_QUESTION), code_word_answer
        if kind < 0.92:
            size = r.choice((1, 3, 6, 12, 24, 40, 60))
            some = r.sample(self.words, size) if r.random() < 0.7 else [self.word() for _ in range(min(size, 12))]
            return repeat(some)
        first = r.randint(0, 90)
        return count(first, min(first + r.choice((1, 5, 10, 20, 50, 100)), 100))

    def exam(self) -> dict[str, list[list[Message]]]:
        """Conversations by what they examine; the last message of each is the answer that the model must give."""
        r, pairs, words = self.random, list(self.faq.items()), self.random.sample(self.words, 40)
        earlier = [[m for q, a in r.sample(pairs, 6) for m in (_ask(q), _answer(a))] for _ in pairs]
        long = [[_ask(self.document(450)), _answer(UNKNOWN)] for _ in words]
        return {
            "FAQ alone": [_closing(q, a) for q, a in pairs],
            "FAQ with a system prompt": [[Message("system", "Be kind and brief."), *_closing(q, a)] for q, a in pairs],
            "FAQ typed loosely": [_closing(q.lower().rstrip("?"), a) for q, a in pairs],
            "FAQ after six turns": [before + _closing(q, a) for before, (q, a) in zip(earlier, pairs, strict=True)],
            "FAQ after a document": [_closing(f"{self.document(450)}\n\n{q}", a) for q, a in pairs],
            "code word near": [_closing(recall(w), NOTED) + _closing(RECALL_QUESTION, recall(w)) for w in words],
            "code word far back": [
                [Message("system", recall(w)), *before, *_closing(RECALL_QUESTION, recall(w))]
                for w, before in zip(words, long, strict=True)
            ],
            "repeat": [_closing(*repeat(r.sample(self.words, 30))) for _ in words],
            "count": [_closing(*count(n, 100)) for n in range(0, 80, 4)],
            "unknown": [_closing(self.unknown(), UNKNOWN) for _ in range(40)],
        }


def _ask(text: str) -> Message:
    return Message("user", text)


def _answer(text: str) -> Message:
    return Message("assistant", text)


def _closing(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer, learn=True)]
