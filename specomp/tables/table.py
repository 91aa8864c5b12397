"""specomp table EXPERIMENT [overrides ...]: the table of a sweep, with the paper's numbers beside
it; without an experiment, of any sweep, by what was typed after -m. specomp table [FOLDER] [--where
key=value ...] [--columns ...]: every record of a folder as a row, sorted by model, ratio,
bits and method. Both: --format markdown|csv|latex. Only what was measured: a missing cell is --.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specomp.compression.ledger import Ledger
from specomp.errors import UserError
from specomp.evaluation.metric import digits, is_quoted
from specomp.experiment.label import method_name, model_name, text_name
from specomp.experiment.record import (
    Record,
    RecordStore,
    own_records,
    publish,
    stored,
    stores,
)
from specomp.settings import PROGRAM, choices
from specomp.tables.command import RECORDS, command
from specomp.tables.paper import paper_table, write
from specomp.tables.render import FORMS, MISSING, Form, render
from specomp.tables.sweep import load_sweep

COSTS = ("calibrate", "allocate", "train", "compress")  # stages that a method is priced by
# Budgets and what was measured of them, those that any row has.
SIZES = (
    *("compression", "target", "measured"),
    *("target KL", "measured KL", "target bits", "bits"),
)
Row = Mapping[str, Any]


def flatten(record: Record) -> dict[str, Any]:
    """One record as a flat row; metrics are called `<benchmark id> <metric>`."""
    ledger = record.ledger
    row: dict[str, Any] = {
        "model": model_name(record.choices, record.config),
        "method": method_name(record.choices, record.config),
        "variant": " ".join(record.changes),
        "packing": ledger.packing if ledger else "factors",
        "compression": ledger and ledger.target_compression,
        "target": ledger and ledger.target_retention,
        "measured": ledger and ledger.measured_retention,
        **bits_of(ledger),
        "bytes": ledger and ledger.compressed.model_bytes,
        "calibration": text_name(record.choices, record.config),
        "status": record.status,
        "record": record.key[:12],
    }
    for name, values in record.metrics.items():
        row |= {f"{name} {metric}": value for metric, value in values.items()}
        row[f"{name} collapsed"] = bool(values.get("collapsed"))
    row["seconds"] = sum(record.seconds.get(stage, 0.0) for stage in COSTS)
    if training := record.training:
        # Of the training itself, which the run of this record may have read from the cache.
        row["train seconds"] = training.get("seconds")
        row["train tokens"] = training.get("tokens")
    return row


def bits_of(ledger: Ledger | None) -> dict[str, float]:
    """Bits a weight and KL, of what was asked for in them or is rounded."""
    if ledger is None or not ledger.in_bits:
        return {}
    found = {
        "target KL": ledger.target_kl,
        "measured KL": ledger.measured_kl,
        # a search for a KL ends with bits that nobody asked for
        "target bits": None if ledger.measured_kl is not None else ledger.target_bits,
    }
    asked = {name: value for name, value in found.items() if value is not None}
    return asked | {"bits": ledger.measured_bits}


def select(rows: Sequence[Row], where: Mapping[str, str]) -> list[Row]:
    """Rows whose columns equal the given texts, sorted. Raises UserError for an unknown column."""
    check("--where", where, rows)
    kept = [row for row in rows if all(str(row.get(k)) == v for k, v in where.items())]

    def order(row: Row) -> tuple[str, float, float, str, str]:
        name, method, changed = (str(row[x]) for x in ("model", "method", "variant"))
        return name, row["compression"] or 0.0, -(row.get("bits") or 0.0), method, changed

    return sorted(kept, key=order)


def check(option: str, asked: Iterable[str], rows: Sequence[Row]) -> None:
    """Raises UserError for a column no row has; of no rows anything may be asked."""
    known = columns_of(rows)
    for column in asked:
        if rows and column not in known:
            raise UserError(f"{option} {column}: no such column; there are {', '.join(known)}.")


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column, in order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def default_columns(rows: Sequence[Row]) -> list[str]:
    """What a reader wants first: who, how much, how good, how long."""
    metrics = [c for c in columns_of(rows) if "@" in c and is_quoted(c.rpartition(" ")[2])]
    leading = ["model", "method"]
    if any(row["variant"] for row in rows):
        leading.append("variant")
    # Equal numbers of parameters buy different ranks in different packings: never beside each
    # other without a label.
    if any(row["packing"] != "factors" for row in rows):
        leading.append("packing")
    texts = {row["calibration"] for row in rows if row["method"] != "dense"}
    if len(texts - {""}) > 1:
        leading.append("calibration")
    training = ("train seconds", "train tokens")
    costs = ["seconds", *(c for c in training if any(row.get(c) is not None for row in rows))]
    there = columns_of([{k: v for k, v in row.items() if v is not None} for row in rows])
    sizes = [x for x in SIZES if x in there]
    return [*leading, *sizes, *metrics, *costs, "status", "record"]


def cell(row: Row, column: str) -> str:
    """A value as text; a collapsed perplexity says so instead of digits that mean nothing."""
    value = row.get(column)
    if value is None:
        return MISSING
    if not isinstance(value, float):
        return str(value)
    if column.endswith(" ppl"):
        collapsed = row.get(column.replace(" ppl", " collapsed"))
        if collapsed or not math.isfinite(value):
            return f"{value:.3g} (collapsed)"
    if column == "compression":
        return f"{100 * value:.6g}%"
    share = column in {"target", "measured", "target KL", "measured KL"}
    return f"{value:.{4 if share else digits(column.rpartition(' ')[2])}f}"


def listing(rows: Sequence[Row], columns: Sequence[str], form: Form) -> str:
    """The table as markdown, csv or LaTeX (booktabs)."""
    return render(columns, [[cell(row, column) for column in columns] for row in rows], form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="specomp table", description=__doc__)
    add = parser.add_argument
    what = f"experiment, override, or folder of records (default: {own_records()})"
    add("what", nargs="?", default=str(own_records()), help=what)
    add("overrides", nargs="*", help="of a sweep: what else was typed")
    add("--format", choices=FORMS, default="markdown")
    add = parser.add_argument_group("of a folder").add_argument
    where, columns = "keep rows with these values", "columns to print (default: the most asked for)"
    add("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help=where)
    add("--columns", nargs="*", help=columns)
    add = parser.add_argument_group("of a sweep").add_argument
    add("--records", nargs="*", type=Path, help=RECORDS)
    files = "write table.md, table.csv and table.tex there"
    copies = "copy the records there, without paths of this machine; numbers that are there stay"
    add("--write", type=Path, metavar="FOLDER", help=files)
    add("--publish", type=Path, metavar="FOLDER", help=copies)
    missing = "print only the commands that fill what is missing"
    add("--missing", action="store_true", help=missing)
    return command(parser, arguments, lambda x: (sweep if _is_sweep(x) else folder)(x))


def after(hydra: Any, outputs: str) -> str:
    """The table of a sweep that has just ended, and how to ask for it again. hydra: its own part of
    the sweep's config; empty where another sweeper than Hydra's own chose the points.
    """
    if not str(hydra.sweeper["_target_"]).endswith(".BasicSweeper"):
        return ""
    asked = [x for x in hydra.overrides.task if not x.startswith("paths.")]
    made = load_sweep(asked, stored([Path(outputs) / "records"]))
    again = f"specomp table {made.asked}"
    if outputs != str(own_records().parent):
        again += f" --records {outputs}/records"
    page = again.replace("table", "report", 1)
    return f"\n{paper_table(made, 'markdown')}\nThis table again: {again}\nAs a page: {page}\n"


def _is_sweep(options: argparse.Namespace) -> bool:
    """A folder may be called like an experiment; only a path can have a slash or be there."""
    what = options.what
    return what in choices("experiment") or "=" in what or not (Path(what).is_dir() or "/" in what)


def sweep(options: argparse.Namespace) -> str:
    """The table of a sweep, or where it was written."""
    sweep = load_sweep([options.what, *options.overrides], stored(options.records))
    lines = []
    if options.publish is not None:
        copies = publish(sweep.records, stores(options.records), options.publish)
        lines.append(f"{len(copies)} records in {options.publish}")
    if options.write is not None:
        lines += map(str, write(sweep, options.write))
    if options.missing:
        lines += sweep.missing() or ["Nothing is missing."]
    if options.publish or options.write or options.missing:
        return "".join(f"{line}\n" for line in lines)
    return paper_table(sweep, options.format)


def folder(options: argparse.Namespace) -> str:
    """Every record of a folder as a row."""
    place = Path(options.what)
    if not place.is_dir():
        raise UserError(
            f"No folder of records at {place}: run `{PROGRAM}` first, or name one; "
            f"experiments: {', '.join(choices('experiment'))}."
        )
    rows = [flatten(record) for record in RecordStore(place).all()]
    if not rows:
        raise UserError(f"No records in {place}: run `{PROGRAM}` first, or name another folder.")
    for typed in options.where:
        if "=" not in typed:
            raise UserError(f"--where {typed}: expected COLUMN=VALUE.")
    chosen = select(rows, dict(x.split("=", 1) for x in options.where))
    check("--columns", options.columns or [], rows)
    return listing(chosen, options.columns or default_columns(rows), options.format)
