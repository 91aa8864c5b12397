"""Corpora: the exact text of each protocol, where it came from, and every way it can be missing."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from specomp.data import pydocs
from specomp.data.corpora import Corpus, TextFile, read_documents
from specomp.data.pydocs import PyDocs
from specomp.data.text import TextSource
from specomp.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPECOMP_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data root: set SPECOMP_DATA")
CORPORA = sorted(path.stem for path in (ROOT / "conf" / "corpus").glob("*.yaml"))


def composed(name: str, data_root: Path | None = None, **overrides: object) -> Any:
    """The corpus of a yaml, as a run would make it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = [
            f"+corpus={name}",
            f"+paths.data={data_root or 'null'}",
            *(f"corpus.{key}={value}" for key, value in overrides.items()),
        ]
        return instantiate(compose(overrides=settings).corpus)


def corpus(data_root: Path | None, **changes: Any) -> Corpus:
    settings: dict[str, Any] = {
        "name": "toy",
        "hub": {
            "path": "some/toy",
            "config": None,
            "revision": "abc",
            "data_files": None,
            "template": None,
            "unique": False,
        },
        "splits": {"train": "train", "test": "validation"},
        "field": "text",
        "joiner": "\n\n",
        "local": {"test": "toy/test.jsonl"},
        "partial": {},
        "split": "test",
        "max_documents": None,
        "data_root": data_root,
    }
    return Corpus(**(settings | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    lines = [
        json.dumps({"text": text, "sentence": text.upper()}) for text in ("one", "two", "three")
    ]
    (tmp_path / "toy" / "test.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(tmp_path / "toy" / "test.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "toy" / "test.txt").write_text("raw\ntext\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "one\n\ntwo\n\nthree"),
        ({"joiner": " ", "field": "sentence"}, "ONE TWO THREE"),
        ({"max_documents": 2}, "one\n\ntwo"),
        ({"local": {"test": "toy/test.jsonl.gz"}}, "one\n\ntwo\n\nthree"),
        ({"local": {"test": "toy/test.txt"}}, "raw\ntext\n"),
    ],
)
def test_local_text(folder: Path, changes: dict[str, Any], text: str) -> None:
    assert corpus(folder, **changes).text() == text


def test_description_names_the_file_below_the_root_and_never_the_root(folder: Path) -> None:
    source = corpus(folder)
    description = source.describe()
    assert isinstance(source, TextSource)
    assert description["origin"] == "local toy/test.jsonl"
    assert (description["documents"], description["characters"]) == (3, 15)
    assert str(folder) not in json.dumps(description)
    assert description["sha256"][:16] in source.fingerprint


def test_partial_and_too_few_documents_are_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = corpus(folder, partial={"test": "a tenth"}, max_documents=5)
    source.text()
    assert "only a part of it (a tenth)" in caplog.text
    assert "3 documents, fewer than max_documents = 5" in caplog.text
    assert source.describe()["partial"] == "a tenth"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "valid"}, "no split 'valid': choose one of train, test"),
        ({"split": "train"}, r"no local file is known for split 'train' \(local splits: test\)"),
        ({"local": {"test": "toy/gone.jsonl"}}, "gone.jsonl does not exist; set paths.data=FOLDER"),
        ({"field": "words"}, r"line 1: no text field 'words' \(fields: text, sentence\)"),
        ({"local": {"test": "toy/bad.jsonl"}}, "line 2: not JSON"),
        ({"local": {"test": "toy/list.jsonl"}}, "line 1 holds a list, needs an object with a text"),
        ({"local": {"test": "toy/test.csv"}}, "use .jsonl, .jsonl.gz, .txt or .md"),
        ({"local": {"test": "toy/empty.txt"}}, "holds no text"),
    ],
)
def test_local_errors(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "toy" / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (folder / "toy" / "list.jsonl").write_text("[1]\n")
    (folder / "toy" / "test.csv").write_text("a,b\n")
    (folder / "toy" / "empty.txt").write_text("")
    with pytest.raises(UserError, match=message) as error:
        corpus(folder, **changes).describe()
    assert "\n" not in str(error.value)


PLAIN = "A line of text.\n"
ROW = json.dumps({"text": PLAIN}) + "\n"
TEXTS: list[tuple[str, bytes, list[str]]] = [  # name, content, documents
    ("a.txt", PLAIN.encode(), [PLAIN]),
    ("mark.txt", PLAIN.encode("utf-8-sig"), [PLAIN]),
    ("mark.jsonl", (ROW + ROW).encode("utf-8-sig"), [PLAIN, PLAIN]),
    ("windows.txt", b"one\r\ntwo\r\n", ["one\ntwo\n"]),
    ("windows.jsonl", ROW.replace("\n", "\r\n").encode(), [PLAIN]),
    ("blank.jsonl", f"\n{ROW}\n  \n{ROW}\n\n".encode(), [PLAIN, PLAIN]),
    ("UPPER.TXT", PLAIN.encode(), [PLAIN]),
    ("a.jsonl.gz", gzip.compress((ROW + ROW).encode()), [PLAIN, PLAIN]),
    ("pair.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
    ("empty.jsonl", b"", []),
    ("empty.txt", b"", [""]),
]
DEEP = "[" * 100_000
# name, content, what the line says after the file's name
UNREADABLE: list[tuple[str, bytes, str]] = [
    (
        "latin.txt",
        (PLAIN * 2 + "caf\xe9").encode("latin-1"),
        ", line 3: byte 35 of the file (0xe9) is not UTF-8; save it as UTF-8",
    ),
    (
        "latin.jsonl",
        (ROW + '{"text": "caf\xe9"}').encode("latin-1"),
        f", line 2: byte {len(ROW) + 13} of the file (0xe9) is not UTF-8",
    ),
    (
        "latin.jsonl.gz",
        gzip.compress((ROW + '{"text": "caf\xe9"}').encode("latin-1")),
        f", line 2: byte {len(ROW) + 13} of the file (0xe9) is not UTF-8",
    ),
    ("utf16.txt", PLAIN.encode("utf-16"), " is UTF-16; save it as UTF-8"),
    ("utf32.txt", PLAIN.encode("utf-32"), " is UTF-32; save it as UTF-8"),
    (
        "binary.txt",
        b"PK\x03\x04\x00\x00\xff\n",
        ", line 1: byte 6 of the file (0xff) is not UTF-8; and",
    ),
    ("utf16.jsonl", ROW.encode("utf-16"), " is UTF-16; save it as UTF-8"),
    ("unmarked.txt", PLAIN.encode("utf-16-le"), ": character 1 is a zero byte, so this is UTF-16"),
    ("packed.jsonl", gzip.compress(ROW.encode()), " is gzip; decompress it, or name it .jsonl.gz"),
    ("packed.txt", gzip.compress(ROW.encode()), " is gzip; decompress it"),
    ("cut.jsonl.gz", gzip.compress(ROW.encode() * 9)[:-9], " is not a whole gzip file (Compressed"),
    ("plain.jsonl.gz", ROW.encode(), " is not a whole gzip file (Not a gzipped file"),
    (
        "flipped.jsonl.gz",
        gzip.compress(ROW.encode())[:12] + b"\xff" * 40,
        " is not a whole gzip file (",
    ),
    (
        "half.jsonl",
        ROW.encode() + b'{"text": "a \\ud83d b"}',
        ", line 2: character 2 of field 'text' is half a character (\\ud83d, a lone surrogate)",
    ),
    ("null.jsonl", ROW.encode() + b'{"text": null}', ", line 2: field 'text' is null, not text"),
    ("true.jsonl", b'{"text": true}', ", line 1: field 'text' is true, not text"),
    ("number.jsonl", b'{"text": 1.5}', ", line 1: field 'text' is a number, not text"),
    ("list.jsonl", b'{"text": ["a"]}', ", line 1: field 'text' is a list, not text"),
    ("object.jsonl", b'{"text": {}}', ", line 1: field 'text' is an object, not text"),
    ("string.jsonl", b'"text"', ", line 1 holds a string, needs an object with a text field"),
    ("nothing.jsonl", b"null", ", line 1 holds null, needs an object with a text field"),
    ("other.jsonl", b'{"body": "a"}', ", line 1: no text field 'text' (fields: body); set the"),
    ("bare.jsonl", b"{}", ", line 1: no text field 'text' (fields: none); set the"),
    ("cut.jsonl", ROW.encode() + b'{"text": "a', ", line 2: not JSON (Unterminated string"),
    ("deep.jsonl", DEEP.encode(), ", line 1: not JSON ("),
    ("digits.jsonl", b"9" * 5000, ", line 1: not JSON ("),
]


@pytest.mark.parametrize(("name", "content", "documents"), TEXTS, ids=[x for x, *_ in TEXTS])
def test_what_text_files_hold(
    tmp_path: Path, name: str, content: bytes, documents: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(tmp_path / name, "text")) == documents


@pytest.mark.parametrize(("name", "content", "said"), UNREADABLE, ids=[x for x, *_ in UNREADABLE])
def test_text_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    """The same line from a corpus of a data root and from a text of one's own."""
    (tmp_path / name).write_bytes(content)
    for source in (corpus(tmp_path, local={"test": name}), text_file(tmp_path / name)):
        with pytest.raises(UserError) as caught:
            source.text()
        assert f"{tmp_path / name}{said}" in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def text_file(path: Path) -> TextFile:
    return TextFile(
        name="own", path=path, field="text", joiner="\n\n", split="all", max_documents=None
    )


def test_places_that_hold_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "closed.txt").write_text(PLAIN)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    for name, said in [
        ("folder.txt", "folder.txt is a folder; give the file in it"),
        ("gone.txt", "gone.txt does not exist; set"),
        ("blank.jsonl", "holds no text"),
        ("blank.txt", "holds no text"),
    ]:
        for source in (corpus(tmp_path, local={"test": name}), text_file(tmp_path / name)):
            with pytest.raises(UserError, match=said) as caught:
                source.text()
            assert "split=all" not in str(caught.value)  # it is refused too

    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match=r"closed.txt cannot be read: Permission denied\."):
        text_file(tmp_path / "closed.txt").text()


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"text": None}, {}, "some/toy, row 0: field 'text' is null, not text"),
        ({"body": "a"}, {}, r"some/toy, row 0: no text field 'text' \(fields: body\)"),
        ({"a": "x"}, {"template": "{b}"}, r"hub.template='{b}' does not fit .* \(a\): 'b'"),
        ({"a": "x"}, {"template": "{"}, "hub.template='{' does not fit"),
    ],
)
def test_rows_of_the_hub_that_are_no_documents(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    hub = {"path": "some/toy", "config": None, "revision": "abc", "data_files": None}
    with pytest.raises(UserError, match=said):
        corpus(None, hub=hub | {"template": None, "unique": False} | changes).text()


def test_hub_rows_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **settings: Any) -> list[dict[str, str]]:
        calls.append((args, settings))
        return [{"a": "x", "b": "1\r\n"}, {"a": "x", "b": "1\r\n"}, {"a": "y", "b": "2"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {
        "path": "some/toy",
        "config": "c",
        "revision": "abc",
        "data_files": {"validation": "v.json"},
        "template": "{a}={b}",
        "unique": True,
    }
    source = corpus(None, hub=hub)
    assert source.text() == "x=1\n\n\ny=2"
    assert source.describe()["origin"] == "hub some/toy@abc c v.json"
    source.text()
    assert len(calls) == 1
    (args, settings) = calls[0]
    assert args == ("some/toy", "c")
    assert (
        settings["revision"] == "abc"
        and settings["split"] == "validation"
        and settings["data_files"] == {"validation": "v.json"}
    )
    assert "trust_remote_code" not in settings


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **settings: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError,
        match=r"some/toy@abc from the hub \(ConnectionError.*paths.data=FOLDER.*toy/test.jsonl",
    ) as error:
        corpus(None).text()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no local file is known"):
        corpus(None, split="train").text()


def test_really_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installed datasets library, told that there is no network, ends in the same one line."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="set paths.data=FOLDER"):
        corpus(None).text()


@pytest.mark.parametrize("name", CORPORA)
def test_yaml(name: str) -> None:
    source = composed(name, **({"path": "somewhere.txt"} if name == "text" else {}))
    assert isinstance(source, TextSource)
    assert source.name == name
    if isinstance(source, Corpus):
        assert source.split in source.splits
        assert set(source.local) | set(source.partial) <= set(source.splits)
        assert source.hub.data_files is None or set(source.hub.data_files) == set(
            source.splits.values()
        )


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "documents"),
    [
        ("wikitext2", "test", 4358),
        ("wikitext2", "validation", 3760),
        ("wikitext2", "train", 1),
        ("ptb", "test", 3761),
        ("ptb", "validation", 3370),
        ("c4", "train", 1000),
        ("c4", "validation", 200),
        ("code", "test", 500),
        ("multilingual_de", "test", 240),
        ("multilingual_en", "test", 240),
        ("multilingual_zh", "test", 240),
    ],
)
def test_real_data(name: str, split: str, documents: int) -> None:
    description = composed(name, DATA, split=split).describe()
    assert description["documents"] == documents
    assert description["characters"] > 50_000
    assert description == composed(name, DATA, split=split).describe()


@needs_data
def test_wikitext2_test_text_is_the_published_one() -> None:
    """The 4358 rows of the split joined by "\\n\\n", as GPTQ and SVD-LLM read it."""
    text = composed("wikitext2", DATA).text()
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    rows = [
        json.loads(line)["text"]
        for line in (DATA / "wikitext2" / "test.jsonl").read_text().splitlines()
    ]
    assert text == "\n\n".join(rows)


def test_pydocs_is_long_stable_and_disjoint() -> None:
    train, test = (
        PyDocs(name="pydocs", split=split, max_documents=None) for split in ("train", "test")
    )
    assert len(train.text()) >= 300_000
    assert len(test.text()) >= 100_000
    paragraphs = set(train.text().split("\n\n"))
    assert not paragraphs & set(test.text().split("\n\n"))
    before = test.describe()
    pydocs.read_parts.cache_clear()
    assert test.describe() == before
    assert "of Python 3." in test.fingerprint and before["sha256"][:16] in test.fingerprint
    assert PyDocs(name="pydocs", split="test", max_documents=3).describe()["documents"] == 3


def test_pydocs_prose_keeps_sentences_only() -> None:
    text = """Heading
=======

   A sentence with more than eight words
   broken over two lines.

>>> this is a session with many words that look like prose

   x[1] = {2: (3, 4)}; y[5] = {6: (7, 8)}; z[9] = {1: 2}; w = [0] * 8

too short"""
    assert list(pydocs.prose(text)) == [
        "A sentence with more than eight words broken over two lines."
    ]


def test_pydocs_quoted_paragraphs_stay_in_one_part() -> None:
    paragraphs = {f"topic {number}": ["shared", f"own {number}"] for number in range(100)}
    parts = pydocs.divide(paragraphs)
    assert (
        sum("shared" in document.split("\n\n") for part in parts.values() for document in part) == 1
    )
    assert sum(map(len, parts.values())) == 100
    assert 10 <= len(parts["test"]) <= 40


def test_pydocs_without_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specomp.data.pydocs.sysconfig.get_path", lambda name: str(tmp_path))
    source = PyDocs(name="pydocs", split="train", max_documents=None)
    with pytest.raises(UserError, match="came without its help topics"):
        source.text()
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = None\n")
    with pytest.raises(UserError, match="holds no dictionary of help topics"):
        source.text()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'a': 'few words'}\n")
    with pytest.raises(UserError, match="gives 0 characters for split 'train', needs 300000"):
        source.describe()
    pydocs.read_parts.cache_clear()
