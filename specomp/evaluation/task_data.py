"""Local files in the place of a task's data: JSON lines at <root>/<task>/<split>.jsonl[.gz] (mmlu:
<root>/mmlu/<split>/<subject>.jsonl[.gz]), and the hashes by which data is known.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specomp.data.corpora import read_rows
from specomp.errors import UserError
from specomp.evaluation.tasks import MMLU

TaskConfig = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


def localize(
    config: Mapping[str, Any], files: Mapping[str, Path], folder: Path, num_fewshot: int
) -> TaskConfig:
    """A stock definition that reads `files` (split -> absolute path) and evaluates the split it
    always evaluated.

    Splits without a file are dropped. Raises UserError when the evaluated split, or the one
    few-shot examples come from, is among them.
    """
    evaluated = config.get("test_split") or config["validation_split"]  # lm-eval's own order
    needed = [evaluated]
    if num_fewshot:
        candidates = ("fewshot_split", "training_split", "validation_split")
        needed.append(next((config[key] for key in candidates if config.get(key)), evaluated))
    missing = [split for split in needed if split not in files]
    if missing:
        found = ", ".join(sorted(files)) or "none"
        raise UserError(
            f"{config['task']}: no {missing[0]}.jsonl under {folder} (splits found: {found};"
            f" {num_fewshot} few-shot examples asked for): add the file, lower num_fewshot, or set"
            " data_root=null to load the data from the hub."
        )
    splits = {key: config[key] for key in SPLIT_KEYS if config.get(key) in files}
    used = {split: str(files[split]) for split in splits.values()}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": used}}
    return {**config, **dict.fromkeys(SPLIT_KEYS), **splits, **data}


def split_files(root: Path, task: str, split: str) -> list[Path]:
    """The files of a split below a data root, by name (mmlu: by subject); .jsonl before
    .jsonl.gz.
    """
    folder, name = (root / task / split, "*") if task == MMLU else (root / task, split)
    found = {
        path.name.removesuffix(suffix): path
        for suffix in reversed(SUFFIXES)
        for path in folder.glob(name + suffix)
    }
    return [found[name] for name in sorted(found)]


def content_of(files: Sequence[Path], fields: Sequence[str]) -> str:
    """Hash (16 hex digits) of those columns of a split's rows: neither places, compression nor
    other columns play a part.

    Raises UserError for a row without one of them, with file and line.
    """
    stamps = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return sha256_of([_content(*stamp, tuple(fields)) for stamp in stamps])


@functools.lru_cache(maxsize=256)
def _content(path: Path, changed: int, size: int, fields: tuple[str, ...]) -> str:
    def rows() -> Iterator[Mapping[str, Any]]:
        kinds: dict[str, type] = {}  # of the first row
        for where, row in read_rows(path):
            lacking = [x for x in fields if not isinstance(row, dict) or row.get(x) is None]
            if lacking:
                raise UserError(
                    f"{where}: no {lacking[0]!r}; every row needs {', '.join(fields)}, none of them"
                    " null."
                )
            for x in fields:
                first, kind = kinds.setdefault(x, type(row[x])), type(row[x])
                if kind is not first:
                    raise UserError(
                        f"{where}: {x!r} is a {kind.__name__}, in the first row a"
                        f" {first.__name__}; every row needs the same."
                    )
            yield row

    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; every row is a document.")
    return sha256_of_rows(rows(), fields)


def sha256_of_rows(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row[x] for x in fields], sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def local_files(config: Mapping[str, Any], root: Path, task: str) -> dict[str, Path]:
    """Split name -> existing file of a task."""
    splits = {config[key] for key in SPLIT_KEYS if config.get(key)}
    stems = {
        split: root / task / split / config["dataset_name"] if task == MMLU else root / task / split
        for split in splits
    }
    candidates = (
        (split, stem.with_name(stem.name + suffix))
        for split, stem in stems.items()
        for suffix in reversed(SUFFIXES)
    )
    return {split: path for split, path in candidates if path.is_file()}
