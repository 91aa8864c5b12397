"""python -m specomp.tables.table EXPERIMENT [overrides ...]: the table of a sweep, with the paper's numbers beside it.
python -m specomp.tables.table [FOLDER] [--where key=value ...] [--columns ...]: every record of a folder as a row, sorted by model,
ratio and method. Both: --format markdown|csv|latex. Only what was measured: a missing cell is --.
"""

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specomp.errors import UserError
from specomp.experiment.record import Record, RecordStore, publish, stored, stores
from specomp.tables.paper import paper_table, write
from specomp.tables.render import FORMS, Form, render
from specomp.tables.sweep import load_sweep, names

METRICS = ("ppl", "acc")
MISSING = "--"


def flatten(record: Record) -> dict[str, Any]:
    """One record as a flat row: choices, overridden slots, retention, sizes, metrics as `<benchmark id> <metric>`, seconds."""
    row: dict[str, Any] = {
        "model": record.choices.get("model"),
        "method": record.choices.get("method"),
        "variant": variant(record),
        "packing": record.ledger.packing if record.ledger else "factors",
        "compression": record.ledger and record.ledger.target_compression,
        "target": record.ledger and record.ledger.target_retention,
        "measured": record.ledger and record.ledger.measured_retention,
        "bytes": record.ledger and record.ledger.compressed.model_bytes,
        "calibration": record.choices.get("calibration"),
        "status": record.status,
        "record": record.key[:12],
    }
    for name, values in record.metrics.items():
        for metric, value in values.items():
            row[f"{name} {metric}"] = value
        row[f"{name} collapsed"] = bool(values.get("collapsed"))
    row["seconds"] = sum(record.seconds.get(stage, 0.0) for stage in ("calibrate", "allocate", "train", "compress"))
    if record.training:
        # Of the training itself, which the run of this record may have read from the cache.
        row |= {"train seconds": record.training.get("seconds"), "train tokens": record.training.get("tokens")}
    return row


def variant(record: Record) -> str:
    """What the command line changed inside the method: slot choices and settings, as typed; and the quantizer, where there is one."""
    overrides = [x.lstrip("+") for x in record.config.get("overrides") or []]
    typed = [x for x in overrides if x.startswith(("method.", "method/", "calibration.", "quantizer.", "seed="))]
    quantizer = record.choices.get("quantizer", "none")
    return " ".join(typed if quantizer == "none" or record.choices.get("method") == "dense" else [f"quantizer={quantizer}", *typed])


def select(rows: Sequence[Mapping[str, Any]], where: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Rows whose columns equal the given texts. Raises UserError for a column no row has."""
    for column in where:
        if rows and not any(column in row for row in rows):
            raise UserError(f"--where {column}: no such column; there are {', '.join(columns_of(rows))}.")
    kept = [row for row in rows if all(str(row.get(column)) == value for column, value in where.items())]
    return sorted(kept, key=lambda row: (str(row["model"]), row["compression"] or 0, str(row["method"]), str(row["variant"])))


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column, in order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def default_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader wants first: who, how much, how good, how long."""
    metrics = [c for c in columns_of(rows) if c.rpartition(" ")[2] in METRICS]
    leading = ["model", "method"] + (["variant"] if any(row["variant"] for row in rows) else [])
    # Equal numbers of parameters buy different ranks in different packings: never beside each other without a label.
    leading += ["packing"] if any(row["packing"] != "factors" for row in rows) else []
    training = [c for c in ("train seconds", "train tokens") if any(row.get(c) is not None for row in rows)]
    return [*leading, "compression", "target", "measured", *metrics, "seconds", *training, "status", "record"]


def cell(row: Mapping[str, Any], column: str) -> str:
    """A value as text; a collapsed perplexity says so instead of digits that mean nothing."""
    value = row.get(column)
    if value is None:
        return MISSING
    if isinstance(value, float):
        if column.endswith(" ppl") and (row.get(column.replace(" ppl", " collapsed")) or not math.isfinite(value)):
            return f"{value:.3g} (collapsed)"
        if column == "compression":
            return f"{value:.0%}"
        return f"{value:.4f}" if column in {"target", "measured"} or column.endswith("acc") else f"{value:.2f}"
    return str(value)


def listing(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], form: Form) -> str:
    """The table as markdown, csv or LaTeX (booktabs)."""
    return render(columns, [[cell(row, column) for column in columns] for row in rows], form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m specomp.tables.table", description=__doc__)
    parser.add_argument("what", nargs="?", default="outputs/records", help="experiment, or folder of records (default: outputs/records)")
    parser.add_argument("overrides", nargs="*", help="of an experiment: what was typed after experiment=NAME")
    parser.add_argument("--format", choices=FORMS, default="markdown")
    listed = parser.add_argument_group("of a folder")
    listed.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help="keep rows with these values")
    listed.add_argument("--columns", nargs="*", help="columns to print (default: the most asked for)")
    swept = parser.add_argument_group("of an experiment")
    swept.add_argument("--records", nargs="*", type=Path, help="folders of records (default: yours and the committed ones)")
    swept.add_argument("--write", type=Path, metavar="FOLDER", help="write table.md, table.csv and table.tex there")
    swept.add_argument("--publish", type=Path, metavar="FOLDER", help="copy the records there, without paths of this machine")
    swept.add_argument("--missing", action="store_true", help="print only the commands that fill what is missing")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.what in names():
            sys.stdout.write(experiment(options))
        else:
            sys.stdout.write(folder(options))
    except UserError as error:
        logging.getLogger("specomp").error("%s", error)
        return 1
    return 0


def experiment(options: argparse.Namespace) -> str:
    """The table of an experiment, or where it was written."""
    sweep = load_sweep(options.what, options.overrides, stored(options.records))
    text = ""
    if options.publish is not None:
        text += f"{len(publish(sweep.records, stores(options.records), options.publish))} records in {options.publish}\n"
    if options.write is not None:
        text += "".join(f"{path}\n" for path in write(sweep, options.write))
    if options.missing:
        text += "".join(f"{line}\n" for line in sweep.missing())
    return text if options.publish or options.write or options.missing else paper_table(sweep, options.format)


def folder(options: argparse.Namespace) -> str:
    """Every record of a folder as a row."""
    place = Path(options.what)
    if not place.is_dir():
        known = f"; experiments: {', '.join(names())}" if names() else ""
        raise UserError(f"No folder of records at {place}: run `python run.py` first, or name one{known}.")
    rows = [flatten(record) for record in RecordStore(place).all()]
    if not rows:
        raise UserError(f"No records in {place}: run `python run.py` first, or name another folder.")
    malformed = [x for x in options.where if "=" not in x]
    if malformed:
        raise UserError(f"--where {malformed[0]}: expected COLUMN=VALUE.")
    chosen = select(rows, dict(x.split("=", 1) for x in options.where))
    unknown = [x for x in options.columns or [] if x not in columns_of(rows)]
    if unknown:
        raise UserError(f"--columns {unknown[0]}: no such column; there are {', '.join(columns_of(rows))}.")
    return listing(chosen, options.columns or default_columns(rows), options.format)


if __name__ == "__main__":
    sys.exit(main())
