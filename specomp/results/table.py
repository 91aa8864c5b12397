"""python -m specomp.results.table [FOLDER] [--format markdown|csv|latex] [--where key=value ...] [--columns ...]: records as a table.

A row per record, sorted by model, ratio and method; a column per metric. Only what was measured: a missing cell is --.
"""

import argparse
import csv
import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specomp.errors import UserError
from specomp.results.record import Record, RecordStore

METRICS = ("ppl", "acc")
MISSING = "--"


def flatten(record: Record) -> dict[str, Any]:
    """One record as a flat row: choices, overridden slots, retention, sizes, metrics as `<benchmark id> <metric>`, seconds."""
    row: dict[str, Any] = {
        "model": record.choices.get("model"),
        "method": record.choices.get("method"),
        "variant": variant(record),
        "packing": record.ledger.get("packing", "factors"),
        "compression": record.ledger.get("target_compression"),
        "target": record.ledger.get("target_retention"),
        "measured": record.ledger.get("measured_retention"),
        "bytes": (record.ledger.get("compressed") or {}).get("model_bytes"),
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
    """What the command line changed inside the method: slot choices and settings, as typed."""
    overrides = [x.lstrip("+") for x in record.config.get("overrides") or []]
    return " ".join(x for x in overrides if x.startswith(("method.", "method/", "calibration.", "seed=")))


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


def render(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], form: str) -> str:
    """The table as markdown, csv or LaTeX (booktabs)."""
    body = [[cell(row, column) for column in columns] for row in rows]
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(body)
        return text.getvalue()
    if form == "latex":
        escape = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"})
        lines = [" & ".join(x.translate(escape) for x in line) + r" \\" for line in [list(columns), *body]]
        rules = [
            r"\begin{tabular}{" + "l" * len(columns) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(rules) + "\n"
    widths = [max(len(line[i]) for line in [list(columns), *body]) for i in range(len(columns))]
    aligned = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in [list(columns), *body]
    ]
    return "\n".join([aligned[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *aligned[1:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m specomp.results.table", description=__doc__)
    parser.add_argument("folder", nargs="?", default="outputs/records", type=Path, help="folder of records (default: outputs/records)")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE", help="keep rows with these values")
    parser.add_argument("--columns", nargs="*", help="columns to print (default: the most asked for)")
    options = parser.parse_args(arguments)
    try:
        if not options.folder.is_dir():
            raise UserError(f"No folder of records at {options.folder}: run `python run.py` first, or name one.")
        rows = [flatten(record) for record in RecordStore(options.folder).all()]
        if not rows:
            raise UserError(f"No records in {options.folder}: run `python run.py` first, or name another folder.")
        malformed = [x for x in options.where if "=" not in x]
        if malformed:
            raise UserError(f"--where {malformed[0]}: expected COLUMN=VALUE.")
        chosen = select(rows, dict(x.split("=", 1) for x in options.where))
        unknown = [x for x in options.columns or [] if x not in columns_of(rows)]
        if unknown:
            raise UserError(f"--columns {unknown[0]}: no such column; there are {', '.join(columns_of(rows))}.")
        sys.stdout.write(render(chosen, options.columns or default_columns(rows), options.format))
    except UserError as error:
        logging.getLogger("specomp").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
