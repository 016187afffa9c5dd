"""Check the language of docstrings, comments, messages and documents; run by `make lint`.

A function's docstring begins with a verb in the imperative (PEP 257): "Return the ...", "Wait until ...". Words that read
as translated are refused in docstrings, comments, string literals, names of functions and Markdown: write what happens in
the field's terms ("log", "report", "no longer reachable"). Lines with `words: ok` are left alone.

    python .ci/words.py [PATH ...]          # default: the whole repository
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    *("dynamo", "components", "graphs", "configs", "examples"),
    *("benchmarks", "tests", "container", "deploy", "docs", ".ci"),
)
LEFT_OUT = ("dynamo/llm/tiny/", "tests/compat/graphs/", ".ci/words.py")
"""The tiny model's lessons, which it was trained on; graphs as users of 0.x wrote them; the word list."""
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".txt", ".html", ".conf")
REFUSED = re.compile(
    r"\b(tell|tells|telling|told|untold|hear|hears|heard|gone|nobody|whoever|whomever|by lot|for ever|at all events"
    r"|shall|thereby|whither|hither|behoof|tidings|anew|betimes|ere|lest|thence|whence)\b",
    re.IGNORECASE,
)
REFUSED_IN_NAMES = {"tell", "tells", "told", "hear", "hears", "heard", "gone", "nobody", "whoever", "anew"}
VERBS = frozenset(
    """
    abort accept acknowledge acquire activate adapt add adjust adopt admit advance advertise align allocate allow announce
    answer append apply approximate arm arrange ask assemble assert assign assume attach await back balance begin
    bench benchmark bind block book bootstrap bound break bridge bring broadcast build bundle cache calculate call
    cancel capture cast catch change charge chat check choose claim clamp clean clear clip close coalesce collect combine
    compare compile complete compress compute concatenate configure confirm connect construct consume contain
    continue control convert copy correct count cover create cut deactivate deal decide declare decline decode
    decorate decrease decrement deduplicate defer define delay delete deliver deregister derive describe deserialize
    detach detect determine dial diff disable discard disconnect dispatch display distribute divide do download
    draft drain draw drive drop dump duplicate echo edit embed emit empty enable encode end enforce enqueue ensure
    enter enumerate escape establish estimate evaluate evict examine exchange exclude execute exit expand expect
    expire explain export expose extend extract fail fall fetch fill filter find finish fire fit flag flatten flush
    fold follow force forget fork format forward free freeze gate gather generate get give go grant greet group grow
    guard guess hand handle hash hide hold identify ignore implement import include increase increment index
    indent indicate infer inherit initialize inject insert inspect install instantiate intercept interpret interrupt
    introduce invalidate invert invoke isolate issue iterate join judge jump keep kill label launch lay lead leave
    lend let limit link list listen load locate lock log look loop lower make manage map mark match measure merge
    migrate minimize mirror mix model modify monitor mount move multiplex name narrow negotiate no-op normalize note
    notice notify number observe obtain offer omit open order override own pack pad parse partition pass patch pause
    peek pick pin ping pipe place plan play plot point poll pop populate post prefer prefill prefix prepare prepend
    preserve prevent print probe proceed process produce profile promise propagate prove provide prune publish pull
    purge push put queue quote raise randomize range rank reach read readmit reap rebuild receive recompute reconnect
    record recover redeliver redirect reduce refer refresh refuse register reject relay release reload remember
    remove rename render renew repeat replace replay reply report represent reproduce request requeue require
    reserve reset resolve respond restart restore restrict resume retain retire retry return reuse revoke rewrite
    roll rotate round route run sample save say scale scan schedule score scrape search seed select send separate
    serialize serve set settle shape share shift show shuffle shut sign signal simulate skip sleep slice snapshot
    sort spawn specify split spread stage stamp start state stay step stop store stream stretch strip submit
    subscribe subtract suggest sum supervise supply suppress suspend swap switch synchronize tag take tally
    terminate test throttle throw tie time tokenize touch trace track train transfer transform translate traverse
    treat trigger trim truncate try tune turn undo unfold unify unlink unlock unpack unregister unset unsubscribe
    unwrap update upgrade upload use validate verify view visit wait wake walk warm warn watch weigh widen withdraw
    wrap write yield zero
    """.split()  # noqa: SIM905
)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of all prose in a file: of Python, comments and strings; of any other file, all lines."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield from ((token.start[0] + n, line) for n, line in enumerate(token.string.splitlines()))


def unclear_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of functions and classes whose names use a refused word."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            words = set(re.sub(r"([a-z])([A-Z])", r"\1_\2", node.name).lower().split("_"))
            if words & REFUSED_IN_NAMES:
                yield node.lineno, node.name


def openers(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, first word) of function docstrings that do not begin with a verb; properties are exempt."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = [ast.unparse(d) for d in node.decorator_list]
        if node.name.startswith("test_") or any("property" in d or "fixture" in d for d in decorators):
            continue
        docstring = ast.get_docstring(node)
        if docstring and node.name != "__init__" and _first_word(docstring) not in VERBS:
            yield node.lineno, docstring.split("\n")[0][:60]


def _first_word(text: str) -> str:
    found = re.match(r"[A-Za-z]+(-op\b)?", text)
    return found.group().lower() if found else ""


def findings(path: Path) -> list[tuple[int, str]]:
    """Return (line, what is wrong) of one file."""
    lines = path.read_text("utf-8").splitlines()
    found = [(n, f"{m.group()!r}: {text.strip()[:90]}") for n, text in sentences(path) for m in REFUSED.finditer(text)]
    if path.suffix == ".py":
        found += [(n, f"name {name}") for n, name in unclear_names(path)]
        if not str(path.relative_to(ROOT)).startswith("tests/"):
            found += [(n, f"no verb first: {text}") for n, text in openers(path)]
    return sorted((n, what) for n, what in found if "words: ok" not in lines[n - 1])


def main(paths: list[str]) -> int:
    """Print findings as path:line: text; return 1 where there are any."""
    chosen = [Path(p).resolve() for p in paths] or [
        *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.suffix in SUFFIXES),
        *sorted(file for file in ROOT.glob("*") if file.suffix in SUFFIXES),
    ]
    files = [f for p in chosen for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.suffix in SUFFIXES]
    count = 0
    for file in files:
        name = str(file.relative_to(ROOT))
        if not name.startswith(LEFT_OUT):
            for line, what in findings(file):
                count += 1
                print(f"{name}:{line}: {what}")
    if count:
        print(f"{count} findings; see the head of .ci/words.py", file=sys.stderr)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
