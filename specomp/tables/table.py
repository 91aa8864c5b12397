"""python -m specomp.tables.table EXPERIMENT [overrides ...]: the table of a sweep, with the paper's
numbers beside it. python -m specomp.tables.table [FOLDER] [--where key=value ...] [--columns ...]:
every record of a folder as a row, sorted by model, ratio and method. Both: --format
markdown|csv|latex. Only what was measured: a missing cell is --.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specomp.errors import UserError
from specomp.experiment.record import Record, RecordStore, publish, stored, stores
from specomp.tables.command import RECORDS, command
from specomp.tables.paper import paper_table, write
from specomp.tables.render import FORMS, MISSING, Form, render
from specomp.tables.sweep import load_sweep, names

FOLDER = "outputs/records"
METRICS = ("ppl", "acc")
COSTS = ("calibrate", "allocate", "train", "compress")  # stages that a method is priced by
TYPED = ("method.", "method/", "calibration.", "quantizer.", "seed=")
Row = Mapping[str, Any]


def flatten(record: Record) -> dict[str, Any]:
    """One record as a flat row; metrics are called `<benchmark id> <metric>`."""
    choices, ledger = record.choices, record.ledger
    row: dict[str, Any] = {
        "model": choices.get("model"),
        "method": choices.get("method"),
        "variant": variant(record),
        "packing": ledger.packing if ledger else "factors",
        "compression": ledger and ledger.target_compression,
        "target": ledger and ledger.target_retention,
        "measured": ledger and ledger.measured_retention,
        "bytes": ledger and ledger.compressed.model_bytes,
        "calibration": choices.get("calibration"),
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


def variant(record: Record) -> str:
    """What was typed about the inside of the method, and the quantizer where there is one."""
    overrides = [x.lstrip("+") for x in record.config.get("overrides") or []]
    changed = [x for x in overrides if x.startswith(TYPED)]
    quantizer = record.choices.get("quantizer", "none")
    if quantizer != "none" and record.choices.get("method") != "dense":
        changed.insert(0, f"quantizer={quantizer}")
    return " ".join(changed)


def select(rows: Sequence[Row], where: Mapping[str, str]) -> list[Row]:
    """Rows whose columns equal the given texts, sorted. Raises UserError for an unknown column."""
    check("--where", where, rows)
    kept = [row for row in rows if all(str(row.get(k)) == v for k, v in where.items())]

    def order(row: Row) -> tuple[str, float, str, str]:
        name, method, changed = (str(row[x]) for x in ("model", "method", "variant"))
        return name, row["compression"] or 0.0, method, changed

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
    metrics = [c for c in columns_of(rows) if c.rpartition(" ")[2] in METRICS]
    leading = ["model", "method"]
    if any(row["variant"] for row in rows):
        leading.append("variant")
    # Equal numbers of parameters buy different ranks in different packings: never beside each
    # other without a label.
    if any(row["packing"] != "factors" for row in rows):
        leading.append("packing")
    training = ("train seconds", "train tokens")
    costs = ["seconds", *(c for c in training if any(row.get(c) is not None for row in rows))]
    return [*leading, "compression", "target", "measured", *metrics, *costs, "status", "record"]


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
        return f"{value:.0%}"
    share = column in {"target", "measured"} or column.endswith("acc")
    return f"{value:.4f}" if share else f"{value:.2f}"


def listing(rows: Sequence[Row], columns: Sequence[str], form: Form) -> str:
    """The table as markdown, csv or LaTeX (booktabs)."""
    return render(columns, [[cell(row, column) for column in columns] for row in rows], form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m specomp.tables.table", description=__doc__)
    add = parser.add_argument
    what = f"experiment, or folder of records (default: {FOLDER})"
    add("what", nargs="?", default=FOLDER, help=what)
    add("overrides", nargs="*", help="of an experiment: what was typed after experiment=NAME")
    add("--format", choices=FORMS, default="markdown")
    add = parser.add_argument_group("of a folder").add_argument
    where, columns = "keep rows with these values", "columns to print (default: the most asked for)"
    add("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help=where)
    add("--columns", nargs="*", help=columns)
    add = parser.add_argument_group("of an experiment").add_argument
    add("--records", nargs="*", type=Path, help=RECORDS)
    files = "write table.md, table.csv and table.tex there"
    copies = "copy the records there, without paths of this machine"
    add("--write", type=Path, metavar="FOLDER", help=files)
    add("--publish", type=Path, metavar="FOLDER", help=copies)
    missing = "print only the commands that fill what is missing"
    add("--missing", action="store_true", help=missing)
    return command(parser, arguments, lambda x: (experiment if x.what in names() else folder)(x))


def experiment(options: argparse.Namespace) -> str:
    """The table of an experiment, or where it was written."""
    sweep = load_sweep(options.what, options.overrides, stored(options.records))
    lines = []
    if options.publish is not None:
        copies = publish(sweep.records, stores(options.records), options.publish)
        lines.append(f"{len(copies)} records in {options.publish}")
    if options.write is not None:
        lines += map(str, write(sweep, options.write))
    if options.missing:
        lines += sweep.missing()
    if options.publish or options.write or options.missing:
        return "".join(f"{line}\n" for line in lines)
    return paper_table(sweep, options.format)


def folder(options: argparse.Namespace) -> str:
    """Every record of a folder as a row."""
    place = Path(options.what)
    if not place.is_dir():
        raise UserError(
            f"No folder of records at {place}: run `python run.py` first, or name one; "
            f"experiments: {', '.join(names())}."
        )
    rows = [flatten(record) for record in RecordStore(place).all()]
    if not rows:
        raise UserError(
            f"No records in {place}: run `python run.py` first, or name another folder."
        )
    for typed in options.where:
        if "=" not in typed:
            raise UserError(f"--where {typed}: expected COLUMN=VALUE.")
    chosen = select(rows, dict(x.split("=", 1) for x in options.where))
    check("--columns", options.columns or [], rows)
    return listing(chosen, options.columns or default_columns(rows), options.format)


if __name__ == "__main__":
    sys.exit(main())
