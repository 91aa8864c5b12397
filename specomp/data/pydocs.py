"""English prose that every Python brings along: the help topics of `pydoc` and the docstrings of
the standard library.

Nothing is imported or run: the sources are parsed, so `python -OO` makes no difference. The text
belongs to the Python version, which the fingerprint names; figures on it compare only within one
version.
"""

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from specomp.data.text import describe_text
from specomp.errors import UserError
from specomp.settings import configurable

TEST_SHARE = 0.25  # of the topics and modules; the others are for calibration
# less means an installation stripped of its documentation
MIN_CHARACTERS = {
    "train": 300_000,
    "test": 100_000,
}
MIN_WORDS = 8  # of a paragraph; shorter ones are headings and signatures
MIN_LETTERS = 0.85  # share of letters and spaces in a paragraph; code and tables have less
NO_PROSE = (">>>", "::=", "--+--")  # sessions, grammar, tables
JOINER = "\n\n"


@configurable
class PyDocs:
    """A TextSource. `train` and `test` share no topic, no module and no paragraph."""

    name: str
    split: Literal["train", "test"]
    max_documents: Annotated[int, Field(ge=1)] | None

    def text(self) -> str:
        """Paragraphs and documents joined by blank lines. Raises UserError where Python came
        without its documentation.
        """
        return JOINER.join(self._documents())

    @property
    def fingerprint(self) -> str:
        """Name, Python version, size and hash on one line."""
        return str(self.describe()["fingerprint"])

    def describe(self) -> dict[str, Any]:
        """See TextSource.describe."""
        origin = f"standard library of Python {platform.python_version()}"
        return describe_text(
            self.name,
            split=self.split,
            origin=origin,
            documents=self._documents(),
            text=self.text(),
        ) | {"max_documents": self.max_documents}

    def _documents(self) -> tuple[str, ...]:
        stdlib = Path(sysconfig.get_path("stdlib"))
        documents = read_parts(stdlib)[self.split]
        characters = sum(map(len, documents))
        if characters < MIN_CHARACTERS[self.split]:
            raise UserError(
                f"Corpus {self.name}: the documentation of Python {platform.python_version()} in"
                f" {stdlib} gives {characters} characters for split {self.split!r}, needs"
                f" {MIN_CHARACTERS[self.split]}; use a Python with its sources, or another corpus."
            )
        return documents[: self.max_documents]


@lru_cache(maxsize=2)
def read_parts(stdlib: Path) -> dict[str, tuple[str, ...]]:
    """Both parts of the documentation in a standard library folder: {"train": documents, "test":
    documents}.
    """
    topics_file = stdlib / "pydoc_data" / "topics.py"
    if not topics_file.is_file():
        raise UserError(
            f"Python {platform.python_version()} came without its help topics ({topics_file} does"
            " not exist): use a complete installation, or another corpus."
        )
    texts = {f"topic {name}": [text] for name, text in read_topics(topics_file).items()}
    # underscored modules are platform tables and implementation details
    texts |= {
        f"module {path.stem}": docstrings(path)
        for path in stdlib.glob("*.py")
        if not path.name.startswith("_")
    }
    return divide(
        {
            name: [paragraph for text in parts for paragraph in prose(text)]
            for name, parts in texts.items()
        }
    )


def divide(paragraphs: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Documents by name -> the parts. A hash of the name decides, and a repeated paragraph stays
    once, in `test` first.

    Topics quote each other ("compound" holds "if", "for" and "with"): dividing by name alone would
    leak.
    """
    # in the order of the hash, not of the name, so that the first documents of a part are already a
    # mixture
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in paragraphs}
    order = sorted(paragraphs, key=hashes.__getitem__)
    tested = {name for name in order if int(hashes[name][:8], 16) < TEST_SHARE * 16**8}
    seen: set[str] = set()
    parts = {}
    for part, names in (
        ("test", [n for n in order if n in tested]),
        ("train", [n for n in order if n not in tested]),
    ):
        documents = []
        for name in names:
            fresh = [
                paragraph for paragraph in dict.fromkeys(paragraphs[name]) if paragraph not in seen
            ]
            seen.update(fresh)
            if fresh:
                documents.append(JOINER.join(fresh))
        parts[part] = tuple(documents)
    return parts


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a text that read as English, each on one line with single spaces."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        long_enough = paragraph.count(" ") >= MIN_WORDS - 1
        if (
            long_enough
            and letters >= MIN_LETTERS * len(paragraph)
            and not any(mark in paragraph for mark in NO_PROSE)
        ):
            yield paragraph


def read_topics(path: Path) -> dict[str, str]:
    """The dictionary literal `topics` of pydoc_data/topics.py. Raises UserError when the file holds
    none.
    """
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return dict(ast.literal_eval(statement.value))
    raise UserError(
        f"{path} holds no dictionary of help topics: use a complete Python, or another corpus."
    )


def docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and their methods in source order; functions inside
    functions are left out.
    """
    found = []
    queue: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [
        ast.parse(path.read_bytes())
    ]
    while queue:
        node = queue.pop()
        text = ast.get_docstring(node)
        if text:
            found.append(text)
        if isinstance(node, ast.Module | ast.ClassDef):
            inner = [
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            queue.extend(reversed(inner))
    return found
