"""The text sets of the papers, as one long text each: from a folder of files (paths.data) or from
the hub at a pinned revision.

Protocol: the documents of a split joined by one string, as GPTQ and SVD-LLM do (methods of reading
differ in the joiner only).
"""

import codecs
import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from specomp.data.text import Plain, describe_text
from specomp.errors import UserError, one_line
from specomp.settings import configurable

log = logging.getLogger(__name__)
MARKS = (  # of encodings that are not read; the longer ones first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# of a file of one's own: where a split begins and ends
PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0), "all": (0.0, 1.0)}


@configurable
class Hub:
    """Where a corpus lives on the hub, and how a row of it becomes a document."""

    path: str
    config: str | None
    revision: str
    # hub split -> file in the repository; null: the repository's own splits
    data_files: Annotated[dict[str, str] | None, Plain]
    template: str | None  # "{column}" text of a document; null: the corpus's field
    unique: (
        bool  # keep the first of equal documents (rows that repeat their paragraph once a question)
    )


@configurable
class Corpus:
    """One split of a text set. `local` maps splits to files below `data_root`; `partial` says which
    of them hold only a part.
    """

    name: str
    hub: Annotated[Hub, Plain]
    splits: Annotated[dict[str, str], Plain]
    field: str
    joiner: str
    local: Annotated[dict[str, str], Plain]
    partial: Annotated[dict[str, str], Plain]
    split: str
    max_documents: Annotated[int, Field(ge=1)] | None
    data_root: Path | None

    def text(self) -> str:
        """The documents joined. Raises UserError for an unknown split, a missing or malformed file,
        an unreachable hub.
        """
        return self._text

    @property
    def fingerprint(self) -> str:
        """Name, origin, size and hash on one line."""
        return str(self.describe()["fingerprint"])

    def describe(self) -> dict[str, Any]:
        """See TextSource.describe; `partial` says what a local file lacks, `max_documents` what was
        cut on request.
        """
        documents = self._documents  # first: it checks the split
        description = describe_text(
            self.name, split=self.split, origin=self._origin, documents=documents, text=self._text
        )
        return description | {"partial": self._partial, "max_documents": self.max_documents}

    @property
    def _partial(self) -> str | None:
        return None if self.data_root is None else self.partial.get(self.split)

    @property
    def _origin(self) -> str:
        if self.data_root is not None:
            return f"local {self.local[self.split]}"
        hub = self.hub
        which = f" {hub.config}" if hub.config else ""
        return f"hub {hub.path}@{hub.revision}{which} {self._hub_file or self.splits[self.split]}"

    @property
    def _hub_file(self) -> str | None:
        return self.hub.data_files[self.splits[self.split]] if self.hub.data_files else None

    @cached_property
    def _text(self) -> str:
        return self.joiner.join(self._documents)

    @cached_property
    def _documents(self) -> list[str]:
        if self.split not in self.splits:
            raise UserError(
                f"Corpus {self.name} has no split {self.split!r}: choose one of"
                f" {', '.join(self.splits)}."
            )
        documents = (
            self._from_hub() if self.data_root is None else self._from_folder(self.data_root)
        )
        if not any(document.strip() for document in documents):
            raise UserError(
                f"Corpus {self.name}: {self._origin} holds no text; check the file or choose"
                " another split."
            )
        if self._partial:
            log.warning(
                "Corpus %s, split %s: %s is only a part of it (%s).",
                self.name,
                self.split,
                self._origin,
                self._partial,
            )
        if self.max_documents is not None and len(documents) < self.max_documents:
            log.warning(
                "Corpus %s: %d documents, fewer than max_documents = %d.",
                self.name,
                len(documents),
                self.max_documents,
            )
        return documents

    def _from_folder(self, data_root: Path) -> list[str]:
        if self.split not in self.local:
            raise UserError(
                f"Corpus {self.name}: no local file is known for split {self.split!r} (local"
                f" splits: {', '.join(self.local) or 'none'}); choose one of them, or set"
                " paths.data=null to read the hub."
            )
        path = data_root.expanduser() / self.local[self.split]
        try:
            return list(islice(read_documents(path, self.field), self.max_documents))
        except FileNotFoundError as error:
            raise UserError(
                f"Corpus {self.name}, split {self.split!r}: {path} does not exist; set"
                f" paths.data=FOLDER to a folder with {self.local[self.split]}, or paths.data=null"
                " to read the hub."
            ) from error

    def _from_hub(self) -> list[str]:
        # imported here: it takes seconds, and runs on local text do not need it
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        hub, hub_split = self.hub, self.splits[self.split]
        files = {hub_split: self._hub_file} if self._hub_file else None
        log.info(
            "Loading corpus %s, split %s, from the hub (%s@%s).",
            self.name,
            self.split,
            hub.path,
            hub.revision,
        )
        try:
            rows = load_dataset(
                hub.path,
                hub.config,
                data_files=files,
                split=hub_split,
                revision=hub.revision,
                # naming single files makes the split sizes in the repository's card wrong
                verification_mode="no_checks" if files else None,
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            wanted = self.local.get(self.split)
            hint = (
                f"set paths.data=FOLDER to a folder with {wanted}"
                if wanted
                else "no local file is known for this split, choose another"
            )
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"Corpus {self.name}, split {self.split!r}: cannot load {hub.path}@{hub.revision}"
                f" from the hub ({type(error).__name__}: {reason}); {hint}."
            ) from error
        return list(islice(self._hub_documents(rows), self.max_documents))

    def _hub_documents(self, rows: Any) -> Iterator[str]:
        seen: set[str] = set()
        for number, row in enumerate(rows):
            if self.hub.template is None:
                document = field_of(row, self.field, f"{self.hub.path}, row {number}")
            else:  # columns put together; MBPP's code has Windows line ends
                document = self._filled(row).replace("\r\n", "\n")
            if self.hub.unique:
                if document in seen:
                    continue
                seen.add(document)
            yield document

    def _filled(self, row: Mapping[str, Any]) -> str:
        try:
            return str(self.hub.template).format(**row)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"Corpus {self.name}: hub.template={self.hub.template!r} does not fit the columns"
                f" of {self.hub.path} ({_names(row)}): {one_line(error)}."
            ) from error


@configurable
class TextFile:
    """A file of one's own: .txt or .md is one text, a line of .jsonl(.gz) a document. A split is a
    part of it that no other has: train the first 80 %, validation and test 10 % each, cut at ends
    of lines.
    """

    name: str
    path: Path
    field: str
    joiner: str
    split: Literal["train", "validation", "test", "all"]
    max_documents: Annotated[int, Field(ge=1)] | None

    def text(self) -> str:
        """The split. Raises UserError for a file that cannot be read or has no text there."""
        return self._text

    def describe(self) -> dict[str, Any]:
        """See TextSource.describe."""
        origin, documents = f"file {self.path.name}", self._documents
        return describe_text(
            self.name, split=self.split, origin=origin, documents=documents, text=self._text
        )

    @cached_property
    def _documents(self) -> list[str]:
        path = self.path.expanduser()
        try:
            return list(islice(read_documents(path, self.field), self.max_documents))
        except FileNotFoundError as error:
            raise UserError(
                f"Corpus {self.name}: {path} does not exist; set the corpus's path to a .txt, .md,"
                " .jsonl or .jsonl.gz file."
            ) from error

    @cached_property
    def _text(self) -> str:
        whole = self.joiner.join(self._documents)
        if not whole.strip():
            raise UserError(f"Corpus {self.name}: {self.path} holds no text; give another file.")
        first, last = PARTS[self.split]
        text = whole[_line_end(whole, first) : _line_end(whole, last)]
        if not text.strip():
            raise UserError(
                f"Corpus {self.name}: the {self.split} part of {self.path} holds no text: the file"
                f" has {len(whole)} characters in {len(whole.splitlines())} lines, and parts end"
                " where lines do; give a file with more lines."
            )
        return text


def _line_end(text: str, share: float) -> int:
    """Where a share of a text ends: after the line that it falls into."""
    place = int(share * len(text))
    end = text.find("\n", max(place - 1, 0))
    return place if place in (0, len(text)) else len(text) if end < 0 else end + 1


def read_documents(path: Path, field: str) -> Iterator[str]:
    """Documents of a .jsonl or .jsonl.gz file (one field of each line that is not blank), or a .txt
    or .md file as one document. UTF-8, with or without a byte order mark.

    Raises UserError for what is none of that, with the file and the line; FileNotFoundError, whose
    remedy only the caller knows.
    """
    name = path.name.lower()
    if name.endswith((".txt", ".md")):
        with _readable(path) as text:
            yield _text_only(text.read(), path)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        for where, row in read_rows(path):
            yield field_of(row, field, where)
    else:
        raise UserError(
            f"{path}: cannot read text from this kind of file; use .jsonl, .jsonl.gz, .txt or .md."
        )


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, value) of every line of a .jsonl or .jsonl.gz file that is not blank. Raises
    as `read_documents` does.
    """
    with _readable(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                where = f"{path}, line {number}"
                yield where, _parsed(line, where)


def field_of(row: Any, field: str, where: str) -> str:
    """The text in a row's field. Raises UserError where there is none."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} holds {_kind(row)}, needs an object with a text field {field!r}.")
    if field not in row:
        raise UserError(
            f"{where}: no text field {field!r} (fields: {_names(row)}); set the corpus's field."
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} is {_kind(text)}, not text; leave such rows out, or set the"
            " corpus's field to another one."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of field {field!r} is half a character"
            f" (\\u{ord(text[error.start]):04x}, a lone surrogate), which no tokenizer can read;"
            " leave it out."
        ) from error
    return text


@contextmanager
def _readable(path: Path) -> Iterator[IO[str]]:
    """An open text file, and what can be wrong with its bytes as one line."""
    try:
        try:
            # utf-8-sig drops a byte order mark
            with _opened(path, "rt", encoding="utf-8-sig") as file:
                yield file
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path)) from error
    except FileNotFoundError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole gzip file ({one_line(error)}); copy or download it again, or"
            " name it .jsonl if it is not compressed."
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the file in it.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}.") from error


def _opened(path: Path, mode: str, **options: Any) -> IO[Any]:
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else Path.open
    return opened(path, mode, **options)  # type: ignore[no-any-return]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also of integers and depths beyond Python's own
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UserError(
            f"{where}: not JSON ({reason}); one JSON object a line is needed."
        ) from error


def _text_only(text: str, path: Path) -> str:
    # UTF-16 without its mark is often valid UTF-8, every other character of it a zero
    if "\0" in text:
        raise UserError(
            f"{path}: character {text.index(chr(0))} is a zero byte, so this is UTF-16 or no text;"
            " save it as UTF-8."
        )
    return text


def _not_utf8(path: Path) -> str:
    """What is wrong with a file that could not be decoded, by a second look at its bytes."""
    offset = 0
    with _opened(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith(b"\x1f\x8b"):
                return (
                    f"{path} is gzip; decompress it, or name it .jsonl.gz if it holds JSON lines."
                )
            for mark, name in MARKS if number == 1 else ():
                if line.startswith(mark):
                    return f"{path} is {name}; save it as UTF-8 (iconv -f {name} -t UTF-8)."
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f"byte {offset + error.start} of the file (0x{line[error.start]:02x})"
                remedy = (
                    "and zero bytes are around it: this is no text"
                    if b"\0" in line
                    else "save it as UTF-8 (iconv -f CP1252 -t UTF-8, if it is Windows' or Latin-1)"
                )
                return f"{path}, line {number}: {place} is not UTF-8; {remedy}."
            offset += len(line)
    return f"{path} is not UTF-8; save it as UTF-8."  # it was changed in between


def _kind(value: Any) -> str:
    """A JSON value, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    named = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return named.get(type(value), f"a {type(value).__name__}")


def _names(row: Mapping[str, Any]) -> str:
    """Of the fields of a row, as far as they fit a line."""
    text = " ".join(", ".join(map(str, row)).split())
    return (text if len(text) <= 200 else f"{text[:197]}...") or "none"
