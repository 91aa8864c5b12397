"""One JSON file per compressed model: its passport, which benchmarks stamp.

The key is the hash of what determines the weights, so the same model asked for by two tables is one
record, re-running finds it, and only missing benchmarks are run. Written atomically after every
step; a failed run leaves a record that says why.
"""

import contextlib
import csv
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from specomp import checksums
from specomp.cache import digest
from specomp.compression.ledger import Ledger
from specomp.disk import atomic_path, lock_file, make_folder
from specomp.errors import UserError, one_line
from specomp.experiment.environment import hidden
from specomp.experiment.label import changes
from specomp.experiment.names import portable

log = logging.getLogger(__name__)
SCHEMA = 1
CHECKSUM = "checksum"  # of all else in a record's file
COMMITTED = Path(__file__).resolve().parents[2] / "experiments" / "records"
# Bumped when the same settings would give other weights.
WEIGHTS_VERSION = 1
SAID = {
    "load": "Load the model.",
    "allocate": "Choose what each linear keeps.",
    "save": "Save the model folder.",
}
COMPANIONS = ("linears.csv", "training.csv")
PACKAGES = (
    "specomp",
    "torch",
    "transformers",
    "lightning",
    "datasets",
    "lm_eval",
    "hydra-core",
    "safetensors",
    "compressed-tensors",
)


@dataclass(kw_only=True)
class Record:
    """Everything a table, a plot or a doubt needs about one compressed model. Metrics are keyed by
    benchmark id, then name.
    """

    schema: int = SCHEMA
    key: str
    status: Literal["running", "ok", "failed"] = "running"
    error: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    training: dict[str, Any] = field(default_factory=dict)
    # `point_of` every config that asked for these weights
    points: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    dense_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    # greedy text of some prompts, by benchmark id: prompt, text and, where it is known, the dense
    # model's
    texts: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: dict[str, float] = field(default_factory=dict)
    cache: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model_folder: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # checksums of COMPANIONS
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> Ledger:
        """The ledger of a record that has come so far."""
        assert self.ledger is not None, f"record {self.key[:12]} has no ledger"
        return self.ledger

    def label(self, group: str) -> str:
        """What its model or method is called: the `name` of the choice, which anyone may set."""
        return str(self.config.get(group, {}).get("name") or self.choices.get(group))

    @property
    def changes(self) -> list[str]:
        """What differs from the method's row."""
        return changes(self.choices, self.config.get("overrides") or [])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and note the process's peak memory at its end. Of stages without a progress
        bar the log says that they begin.
        """
        if name in SAID:
            log.info("%s", SAID[name])
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
            self.peak_memory_mib[name] = round(peak_memory() / 2**20, 1)

    def take(self, other: "Record") -> None:
        """What another record of the same weights has beside: commands, and what it measured."""
        self.points = list(dict.fromkeys([*self.points, *other.points]))
        self.metrics = other.metrics | self.metrics
        self.dense_metrics = other.dense_metrics | self.dense_metrics
        self.texts = other.texts | self.texts

    def take_dense(self, dense: "Record") -> None:
        """What the dense model's record has beside this one's metrics and texts."""
        for name, values in dense.metrics.items():
            if name in self.metrics:
                self.dense_metrics.setdefault(name, values)
        for name, texts in self.texts.items():
            said = {x["prompt"]: x["text"] for x in dense.texts.get(name, [])}
            for text in texts:
                if dense.key != self.key and text["prompt"] in said:
                    text["dense"] = said[text["prompt"]]

    def note(self, text: str) -> None:
        """Something a reader of the numbers should know: in the record and in the log."""
        if text not in self.notes:
            self.notes.append(text)
        log.warning("%s", text)


def peak_memory() -> int:
    """Peak bytes: of the GPU's allocator where anything was on one, else the process's resident
    set.
    """
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def as_dict(record: Record) -> dict[str, Any]:
    """As it is stored."""
    return asdict(replace(record, ledger=None)) | {
        "ledger": record.ledger.as_dict() if record.ledger else {}
    }


def record_key(identity: Mapping[str, Any]) -> str:
    """sha256 of what determines the weights."""
    return digest({"version": WEIGHTS_VERSION, **identity})


def point_of(config: Mapping[str, Any]) -> str:
    """Short hash of what a config asks for, the same on every machine; unlike the key it needs
    neither model nor text.
    """

    return digest(portable(config))[:16]


class RecordStore:
    """Records in a folder: <key12>.json, and <key12>.linears.csv with one line per linear."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().absolute()

    def path(self, key: str) -> Path:
        """Where a record is or would be."""
        return self.folder / f"{key[:12]}.json"

    def companion(self, key: str, suffix: str) -> Path:
        """A file beside a record: <key12>.<suffix>."""
        make_folder(self.folder)
        return self.folder / f"{key[:12]}.{suffix}"

    def lock(self, key: str) -> FileLock:
        """Held while a job works on a record: a second process that wants the same waits, and then
        finds it done.
        """
        return lock_file(self.folder / ".locks" / f"{key[:12]}.lock")

    def load(self, key: str) -> Record | None:
        """The record, or None; a damaged one is reported and made again. Raises UserError where
        none can be written.
        """
        path = self.path(key)
        if path.is_dir():
            raise UserError(f"{path} is a folder where a record belongs: rm -r '{path}'.")
        if not path.exists():
            return None
        try:
            record = read_record(path)
        except UserError as error:
            log.warning("%s It will be made again.", error)
            return None
        return record if record.key == key else None

    def save(self, record: Record) -> None:
        """Write atomically; what is stored already is left alone, so that a file's time says when
        something was last added.
        """
        path = self.path(record.key)
        content = json.loads(hidden(json.dumps(as_dict(record), default=str)))
        content[CHECKSUM] = checksums.of_content(content)
        text = json.dumps(content, indent=1, default=str, allow_nan=True) + "\n"
        with contextlib.suppress(OSError, ValueError):  # absent or damaged
            if path.read_text() == text:
                return
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    def save_linears(self, key: str, reports: Sequence[Mapping[str, Any]]) -> None:
        """One csv line per linear."""
        if not reports:
            return
        with (
            atomic_path(self.companion(key, "linears.csv")) as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(
                file, fieldnames=list(dict.fromkeys(name for row in reports for name in row))
            )
            writer.writeheader()
            writer.writerows(
                {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
                for row in reports
            )

    def seal(self, record: Record) -> None:
        """Note the checksums of the files beside a record in it."""
        paths = {suffix: self.companion(record.key, suffix) for suffix in COMPANIONS}
        record.files = {x: checksums.of_file(path) for x, path in paths.items() if path.is_file()}

    def all(self) -> list[Record]:
        """Every readable record, oldest first."""
        records, older = [], 0
        for path in sorted(self.folder.glob("*.json"), key=lambda p: p.lstat().st_mtime):
            try:
                record, sealed = _read(path)
            except UserError as error:
                log.warning("%s Skipped.", error)
                continue
            records.append(record)
            older += not sealed
        if older:
            log.info(
                "%s: %d of %d records are from before they had checksums.",
                self.folder,
                older,
                len(records),
            )
        return records


def stores(folders: Sequence[Path] | None) -> list[RecordStore]:
    """The given folders, or where runs write theirs and then the committed ones."""
    own = [own_records(), COMMITTED]
    return [RecordStore(x) for x in (folders or own) if Path(x).is_dir()]


def own_records() -> Path:
    """Where runs write theirs."""
    return Path(os.environ.get("SPECOMP_OUTPUTS", "outputs")) / "records"


def stored(folders: Sequence[Path] | None) -> list[Record]:
    """Their records; of one key the first, with the metrics of all."""
    found: dict[str, Record] = {}
    for store in stores(folders):
        for record in store.all():
            first = found.setdefault(record.key, record)
            first.take(record)
    return list(found.values())


def companions(stores: Sequence[RecordStore], record: Record, suffix: str) -> list[Path]:
    """Files beside a record, those of the first store that has the record itself: a run in progress
    writes some before there is one. One that is not what was written is left out, which is logged.
    """
    found = []
    for store in stores:
        path = store.companion(record.key, suffix)
        if store.path(record.key).exists() and path.exists():
            if path.is_file() and record.files.get(suffix) in (None, checksums.of_file(path)):
                found.append(path)
            else:
                log.warning("%s is not what was written (its checksum is another): left out.", path)
    return found


def publish(records: Sequence[Record], sources: Sequence[RecordStore], folder: Path) -> list[Path]:
    """Copy records, and the csv files beside them, into a folder to commit; absolute paths are cut
    to their last part. Of a record that is there already every number stays, and what else was
    measured is added: remove its file to have it replaced.
    """

    def shortened(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: shortened(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [shortened(v) for v in value]
        # also inside an override as it was typed, key=/a/path
        return re.sub(r"(^|=)/\S*/", r"\1.../", value) if isinstance(value, str) else value

    target = RecordStore(folder)
    for record in records:
        if (known := target.load(record.key)) is not None:
            known.take(record)
            target.save(known)
            continue
        target.save(
            replace(
                record,
                config=shortened(record.config),
                model_folder=None,
                calibration=shortened(record.calibration),
            )
        )
        for suffix in COMPANIONS:
            copy = target.companion(record.key, suffix)
            found = companions(sources, record, suffix)
            if found and found[0] != copy:
                shutil.copyfile(found[0], copy)
    return [target.path(record.key) for record in records]


def read_record(path: Path) -> Record:
    """Read one file. Raises UserError when it is not a record of this schema, or not what was
    written.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Record, bool]:
    """A record, and whether its file has a checksum."""
    try:
        content = json.loads(path.read_text())
        known = {x.name for x in fields(Record)}
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
        if not isinstance(content.get("texts", {}), dict):
            raise ValueError("its texts are no table")
        checksum = content.pop(CHECKSUM, None)  # older ones have none
        if checksum not in (None, checksums.of_content(content)):
            raise ValueError("its checksum is another: it is not what was written")
        ledger = Ledger.from_dict(content["ledger"]) if content.get("ledger") else None
        found = {name: value for name, value in content.items() if name in known}
        if (found.get("identity") or {}).get("method") == "dense":
            # of the run that measured it, it had the quantizer too
            found["choices"] = {**found.get("choices", {}), "quantizer": "none"}
        return Record(**found | {"ledger": ledger}), checksum is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable record ({one_line(error)}).") from error


def provenance() -> dict[str, Any]:
    """Where and with what a record was made; the device is added when the model is on it."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
