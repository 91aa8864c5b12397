"""A paper's table as a sweep: which points `conf/experiment/NAME.yaml` has, which record each one
has, and what the paper prints.

A point finds its record by what its command line says (Record.points), not by the record's key: so
tables can be made where neither the model nor the texts are, from committed records alone.
"""

import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import pandas
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from specomp.errors import UserError, meant
from specomp.experiment.completed import completed
from specomp.experiment.environment import plain_config
from specomp.experiment.making import make
from specomp.experiment.record import Record, point_of
from specomp.progress import track
from specomp.settings import BESIDE, CONF, PROGRAM, choices

EXPERIMENT = "experiment="
SEED = "seed"
RATIO = "ratio"
LEDGER = "ledger"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of one benchmark. protocol: its id, or where that ends with the hash of a text,
    all before it (with the colon); "ledger" for what is counted on the compressed model itself.
    """

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
        known = self.protocol
        return benchmark == known or (known.endswith(":") and benchmark.startswith(known))

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
            raise UserError(
                f"Record {record.key[:12]} has {self.protocol} of {len(found)} different texts: "
                "keep one data root per table."
            )
        return found[0] if found else {}

    def collapsed(self, record: Record) -> bool:
        """Whether a record's perplexity means nothing any more."""
        value = self.of(record)
        if self.metric != "ppl" or value is None:
            return False
        return not math.isfinite(value) or bool(self.result(record).get("collapsed"))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job of a sweep, for every seed."""

    keys: dict[str, str]  # swept key -> value, without the seed
    commands: tuple[str, ...]  # one per seed
    models: str
    columns: tuple[Column, ...]  # of its benchmarks
    records: tuple[Record | None, ...]  # one per seed, None before it has run

    @property
    def label(self) -> str:
        """What the point is called in figures and tables."""
        return " ".join(self.keys.values()) or self.models

    def series(self, swept: str = RATIO) -> str:
        """What a line of a figure is called: the values besides the one that changes along it."""
        return ", ".join(v for k, v in self.keys.items() if k != swept) or self.models

    @property
    def done(self) -> list[Record]:
        """Records that are there and complete."""
        return [r for r in self.records if r is not None and r.status == "ok"]

    @property
    def retention(self) -> float:
        """Of the linears, as counted; mean over the seeds that have run."""
        return fmean(r.counted.measured_retention for r in self.done)

    @property
    def in_bits(self) -> bool:
        """Whether few bits were asked for, not few parameters."""
        return any(r.counted.in_bits for r in self.done)

    @property
    def bits(self) -> float:
        """Stored bits a weight of the linears; mean over the seeds that have run."""
        return fmean(r.counted.measured_bits for r in self.done)

    @property
    def model_bytes(self) -> float:
        """Of the whole model; mean over the seeds that have run."""
        return fmean(r.counted.compressed.model_bytes for r in self.done)

    def values(self, column: Column) -> list[float]:
        """One value per seed; fewer where some are missing."""
        found = [column.of(r) for r in self.done]
        return [x for x in found if x is not None]

    def mean(self, column: Column) -> float | None:
        """Over the seeds that have run."""
        values = self.values(column)
        return fmean(values) if values else None

    def std(self, column: Column) -> float | None:
        """Over seeds where there are several (with n - 1)."""
        values = self.values(column)
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None

    def error(self, column: Column) -> float | None:
        """What a value is uncertain by: over seeds, or of one record by what its benchmark says."""
        if (spread := self.std(column)) is not None:
            return spread
        told = [column.result(r).get(f"{column.metric}_stderr") for r in self.done]
        return next((float(x) for x in told if x is not None), None)

    def collapsed(self, column: Column) -> bool:
        """Whether any seed's value means nothing."""
        return any(column.collapsed(r) for r in self.done)


@dataclass(frozen=True, kw_only=True)
class Quote:
    """One published cell."""

    keys: dict[str, str]
    model: str
    metric: str
    value: float
    source: str
    note: str

    def is_of(self, point: Point, column: Column) -> bool:
        """Whether the cell has its place at a point, whatever the model."""
        places = (_same(point.keys.get(k, v), v) for k, v in self.keys.items())
        return self.metric == column.label and all(places)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything one table is made of."""

    name: str  # of its experiment, or "sweep"
    caption: str
    command: str  # that runs it
    asked: str  # what its table, report and dashboard are asked for by
    keys: list[str]
    columns: list[Column]
    points: list[Point]
    quotes: list[Quote]

    @property
    def records(self) -> list[Record]:
        """Complete records of the points, each once."""
        return list({r.key: r for point in self.points for r in point.done}.values())

    @property
    def models(self) -> list[str]:
        """Every model of the points, each once."""
        return list(dict.fromkeys(p.models for p in self.points))

    def dense(self, column: Column) -> float | None:
        """The dense model's value, from whichever record has it."""
        found = (column.of(r, dense=True) for r in self.records)
        return next((x for x in found if x is not None), None)

    def missing(self) -> list[str]:
        """Commands that fill what is missing: a job, or a benchmark of it, that did not run."""
        return [
            command
            for point in self.points
            for command, record in zip(point.commands, point.records, strict=True)
            if record is None
            or record.status != "ok"
            or any(c.of(record) is None for c in point.columns)
        ]

    def quote(self, point: Point, column: Column) -> Quote | None:
        """The published cell for a point: of its own model, else of the first that is quoted."""
        found = [q for q in self.quotes if q.is_of(point, column)]
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


@contextmanager
def configured(asked: str) -> Iterator[None]:
    """Hydra in conf/; what it refuses of the asked is a UserError."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    except HydraException as error:
        raise UserError(f"{asked}: {str(error).splitlines()[0]}") from error


def load_sweep(asked: Sequence[str], records: Iterable[Record]) -> Sweep:
    """Every point that `python run.py -m asked...` would run, with its records among the given.
    The first of the asked may be the name of an experiment alone.
    """
    typed = [x if "=" in x or x.startswith("~") else f"{EXPERIMENT}{x}" for x in asked]
    with configured(" ".join(typed)):
        return _load(typed, records)


def _load(asked: Sequence[str], records: Iterable[Record]) -> Sweep:
    marked = defaultdict(list)
    for record in records:
        for mark in record.points:
            marked[mark].append(record)
    named = [x for x in asked if x.startswith(EXPERIMENT)]
    overrides = [x for x in asked if x not in named]
    name = _experiment(named)
    fixed, axes = _axes(named, overrides)
    seeds = [[f"{SEED}={x}"] for x in axes.pop(SEED)] if SEED in axes else [[]]
    program = [*PROGRAM.split(), *own_yamls()]
    command = [*program, *named, *(["hydra.mode=RUN"] if named else [])]
    points: list[Point] = []
    measured: dict[str, tuple[Column, ...]] = {}  # by what is asked of a benchmark suite
    count = math.prod(map(len, axes.values()))
    for chosen in track(product(*axes.values()), "points of the table", count, traced=False):
        keys = dict(zip(axes, chosen, strict=True))
        lines = [[*fixed, *(f"{k}={v}" for k, v in keys.items()), *seed] for seed in seeds]
        configs = [
            completed(compose("config", overrides=[*_searched(), *named, *line])) for line in lines
        ]
        marks = [_point_of(cfg) for cfg in configs]
        suite = OmegaConf.to_yaml(configs[0].benchmark)
        if suite not in measured:
            measured[suite] = tuple(columns_of(configs[0]))
        points.append(
            Point(
                keys=keys,
                models=str(configs[0].model.name),
                columns=measured[suite],
                commands=tuple(shlex.join([*command, *line]) for line in lines),
                records=tuple(_one(marked[x], line) for x, line in zip(marks, lines, strict=True)),
            )
        )
    caption = OmegaConf.select(configs[0], "table.caption")
    return Sweep(
        name=name or "sweep",
        caption=str(caption or f"Sweep of {', '.join(axes)}"),
        command=shlex.join([*program, "-m", *named, *overrides]),
        asked=shlex.join([*([name] if name else []), *overrides, *own_yamls()]),
        keys=list(axes),
        columns=list(dict.fromkeys(c for found in measured.values() for c in found)),
        points=points,
        quotes=quotes(CONF / "experiment" / f"{name}.csv"),
    )


def own_yamls() -> list[str]:
    """As it is typed."""
    return [x for folder in BESIDE for x in ("--config-dir", str(folder))]


def _searched() -> list[str]:
    return [f"hydra.searchpath=[{','.join(f'file://{x}' for x in BESIDE)}]"] if BESIDE else []


def _axes(named: list[str], overrides: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Of what was asked for: overrides that hold for every point, and the values of the others."""
    parser = OverridesParser.create()
    base = compose("config", overrides=[*_searched(), *named], return_hydra_config=True)
    swept = {str(k): f"{k}={v}" for k, v in (base.hydra.sweeper.params or {}).items()}
    fixed = []
    for x in parser.parse_overrides(overrides):
        # As Hydra's sweeper does: what is typed replaces what the file sweeps.
        if x.is_sweep_override() or x.get_key_element() in swept:
            swept[x.get_key_element()] = x.input_line or ""
        else:
            fixed.append(x.input_line or "")
    return fixed, {key: _values(parser.parse_override(line)) for key, line in swept.items()}


def _experiment(named: Sequence[str]) -> str:
    """The one experiment that was named, or "". Raises UserError."""
    found = [x.removeprefix(EXPERIMENT) for x in named]
    name = found[0] if found else ""
    known = choices("experiment")
    if len(found) > 1 or "," in name:
        raise UserError(f"{' '.join(named)}: a table is of one experiment.")
    if name and name not in known:
        if Path(name).is_dir():
            told = "is a folder, and this is of a sweep"
            raise UserError(f"{name} {told}: `specomp table {name}` lists a folder.")
        raise UserError(f"No experiment {name}{meant(name, known)}")
    return name


def _values(override: Any) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _point_of(cfg: DictConfig) -> str:
    return point_of(plain_config(cfg))


def _one(found: Sequence[Record], line: Sequence[str]) -> Record | None:
    """The one record of a point; the committed and the fresh copy of one record are the same."""
    found = list({record.key: record for record in found}.values())
    if len(found) > 1:
        raise UserError(
            f"{' '.join(line)}: records {', '.join(r.key[:12] for r in found)} answer to the same "
            "command, made on different texts or tokenizers: remove all but one, or name one "
            "folder with --records."
        )
    return found[0] if found else None


def columns_of(cfg: DictConfig) -> list[Column]:
    """What the experiment counts on the ledger, then columns for each part of the suite."""
    columns = []
    for metric in OmegaConf.select(cfg, "table.ledger") or []:
        columns.append(Column(label=metric.replace("_", " "), protocol=LEDGER, metric=metric))
    for part in make(cfg, "benchmark").parts.values():
        name = part.protocol.partition("@")[0]
        quoted = [x for x, what in part.metrics.items() if x == part.metric or what.column]
        columns += [
            Column(
                label=f"{name} {metric}",
                protocol=part.protocol,
                metric=metric,
                better=part.metrics[metric].better,
                unit=part.metrics[metric].unit,
            )
            for metric in quoted
        ]
    return columns


def quotes(path: Path) -> list[Quote]:
    """An experiment's csv: model, one column per swept key, metric, value, source, note."""
    if not path.exists():
        return []
    found = []
    for row in pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"):
        value = float(row.pop("value"))
        told = {name: row.pop(name) for name in ("model", "metric", "source", "note")}
        keys = {key: typed for key, typed in row.items() if typed}
        found.append(Quote(keys=keys, value=value, **told))
    return found
