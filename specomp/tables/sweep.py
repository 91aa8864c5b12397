"""A paper's table as a sweep: which points `conf/experiment/NAME.yaml` has, which record each one has, and what the paper prints.

A point finds its record by what its command line says (Record.points), not by the record's key: so tables can be made where
neither the model nor the texts are, from committed records alone.
"""

import csv
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from specomp.errors import UserError
from specomp.experiment.record import Record, point_of
from specomp.rows import CONF

ROOT = Path(__file__).resolve().parents[2]
SEED = "seed"
LEDGER = "ledger"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of one benchmark. protocol: its id, or where that ends with the hash of a text, all before it (with the colon);
    "ledger" for what is counted on the compressed model itself (Record.ledger)."""

    label: str
    protocol: str
    metric: str
    better: Literal["higher", "lower"] = "lower"
    unit: str = ""

    @property
    def lower_is_better(self) -> bool:
        """Whether the best value is the smallest."""
        return self.better == "lower"

    def matches(self, benchmark: str) -> bool:
        """Whether a benchmark's id is of this column's protocol."""
        return benchmark == self.protocol or (self.protocol.endswith(":") and benchmark.startswith(self.protocol))

    def of(self, record: Record, *, dense: bool = False) -> float | None:
        """The value in a record, of the compressed model or of its dense reference."""
        return self.result(record, dense=dense).get(self.metric)

    def result(self, record: Record, *, dense: bool = False) -> Mapping[str, Any]:
        """All that the benchmark says of a record; empty where it was not run."""
        if self.protocol == LEDGER:
            return {} if dense or record.ledger is None else record.ledger.as_dict()
        metrics = record.dense_metrics if dense else record.metrics
        found = [v for k, v in metrics.items() if self.matches(k)]
        if len(found) > 1:
            raise UserError(f"Record {record.key[:12]} has {self.protocol} of {len(found)} different texts: keep one data root per table.")
        return found[0] if found else {}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job of a sweep. keys: swept key -> value, without the seed; records: one per seed that has run."""

    keys: dict[str, str]
    commands: tuple[str, ...]  # one per seed
    models: str
    records: tuple[Record | None, ...]

    @property
    def done(self) -> list[Record]:
        """Records that are there and complete."""
        return [r for r in self.records if r is not None and r.status == "ok"]

    def values(self, column: Column) -> list[float]:
        """One value per seed; fewer where some are missing."""
        found = [column.of(r) for r in self.done]
        return [x for x in found if x is not None]


@dataclass(frozen=True, kw_only=True)
class Quote:
    """One published cell."""

    keys: dict[str, str]
    model: str
    metric: str
    value: float
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything one table is made of."""

    caption: str
    command: str
    keys: list[str]
    columns: list[Column]
    points: list[Point]
    quotes: list[Quote]

    @property
    def records(self) -> list[Record]:
        """Complete records of the points, each once."""
        return list({r.key: r for point in self.points for r in point.done}.values())

    def dense(self, column: Column) -> float | None:
        """The dense model's value, from whichever record has it."""
        return next((x for r in self.records if (x := column.of(r, dense=True)) is not None), None)

    def missing(self) -> list[str]:
        """Commands that fill what is missing: a job that did not run, or ran without some benchmark."""
        return [
            command
            for point in self.points
            for command, record in zip(point.commands, point.records, strict=True)
            if record is None or record.status != "ok" or any(c.of(record) is None for c in self.columns)
        ]

    def quote(self, point: Point, column: Column) -> Quote | None:
        """The published cell for a point: of its own model where there is one, else of the first model that is quoted."""
        found = [q for q in self.quotes if q.metric == column.label and all(_same(point.keys.get(k, v), v) for k, v in q.keys.items())]
        return next((q for q in found if q.model == point.models), found[0] if found else None)

    def notes(self) -> list[str]:
        """What is said of the published cells that have a place in the table, each once."""
        found = (self.quote(p, c) for p in self.points for c in self.columns)
        return list(dict.fromkeys(q.note for q in found if q is not None and q.note))


def _same(typed: str, printed: str) -> bool:
    """Whether two values of a swept key are the same; 0.1 is 0.10."""
    try:
        return float(typed) == float(printed)
    except ValueError:
        return typed == printed


def names() -> list[str]:
    """Every experiment there is."""
    return sorted(path.stem for path in (CONF / "experiment").glob("[!_]*.yaml"))


def load_sweep(name: str, overrides: Sequence[str], records: Iterable[Record]) -> Sweep:
    """Compose every point of an experiment, as `python run.py -m experiment=name overrides...` would, and find their records."""
    if name not in names():
        raise UserError(f"No experiment {name}: there are {', '.join(names())}.")
    by_point: dict[str, list[Record]] = {}
    for record in records:
        for mark in record.points:
            by_point.setdefault(mark, []).append(record)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return _load(name, overrides, by_point)
    except HydraException as error:
        raise UserError(f"experiment={name} {' '.join(overrides)}: {str(error).splitlines()[0]}") from error


def _load(name: str, overrides: Sequence[str], by_point: Mapping[str, list[Record]]) -> Sweep:
    parser = OverridesParser.create()
    typed = parser.parse_overrides(list(overrides))
    base = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    swept = {str(k): f"{k}={v}" for k, v in base.hydra.sweeper.params.items()}
    fixed = []
    for x in typed:  # as Hydra's sweeper does: what is typed replaces what the file sweeps
        if x.is_sweep_override() or x.get_key_element() in swept:
            swept[x.get_key_element()] = x.input_line or ""
        else:
            fixed.append(x.input_line or "")
    base = compose("config", overrides=[f"experiment={name}", *fixed])
    axes = {key: _values(parser, line) for key, line in swept.items()}
    shared = ["python", "run.py", f"experiment={name}", "hydra.mode=RUN"]
    keys = [key for key in axes if key != SEED]
    points = []
    for chosen in product(*(axes[key] for key in keys)):
        here = dict(zip(keys, chosen, strict=True))
        lines = [[*fixed, *(f"{k}={v}" for k, v in here.items()), *([f"{SEED}={s}"] if s else [])] for s in axes.get(SEED, [""])]
        configs = [compose("config", overrides=[f"experiment={name}", *line]) for line in lines]
        marks = [point_of(_container(cfg)) for cfg in configs]
        points.append(
            Point(
                keys=here,
                models=str(configs[0].model.name),
                commands=tuple(shlex.join([*shared, *line]) for line in lines),
                records=tuple(_one(by_point.get(mark, []), line) for mark, line in zip(marks, lines, strict=True)),
            )
        )
    return Sweep(
        caption=str(base.table.caption),
        command=shlex.join(["python", "run.py", "-m", f"experiment={name}", *overrides]),
        keys=keys,
        columns=columns_of(base),
        points=points,
        quotes=quotes(ROOT / "experiments" / name / "expected.csv"),
    )


def _values(parser: Any, line: str) -> list[str]:
    override = parser.parse_overrides([line])[0]
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_element_as_str()]


def _container(cfg: DictConfig) -> dict[str, Any]:
    kept = {key: value for key, value in cfg.items_ex(resolve=False) if key != "hydra"}
    plain: Any = OmegaConf.to_container(OmegaConf.create(kept), resolve=True)
    return plain


def _one(found: Sequence[Record], line: Sequence[str]) -> Record | None:
    """The one record of a point; the committed and the fresh copy of one record are the same."""
    found = list({record.key: record for record in found}.values())
    if len(found) > 1:
        raise UserError(
            f"{' '.join(line)}: records {', '.join(r.key[:12] for r in found)} answer to the same command, made on different texts or "
            "tokenizers: remove all but one, or name one folder with --records."
        )
    return found[0] if found else None


def columns_of(cfg: DictConfig) -> list[Column]:
    """One column per part of the benchmark suite, in its order, after those of the ledger that the experiment asks for."""
    suite = instantiate(cfg.benchmark)
    counted = [Column(label=name.replace("_", " "), protocol=LEDGER, metric=name) for name in cfg.table.get("ledger") or []]
    return counted + [
        Column(label=f"{label} {part.metric}", protocol=part.protocol, metric=part.metric, **vars(part.metrics[part.metric]))
        for label, part in suite.parts.items()
    ]


def quotes(path: Path) -> list[Quote]:
    """expected.csv: model, one column per swept key, metric, value, source, note."""
    if not path.exists():
        return []
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            fixed = {name: row.pop(name) for name in ("model", "metric", "value", "source", "note")}
            keys = {key: value for key, value in row.items() if value}
            found.append(Quote(keys=keys, **fixed | {"value": float(fixed["value"])}))  # type: ignore[arg-type]
    return found


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation over seeds where there are several (with n - 1)."""
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return statistics.fmean(values), spread
