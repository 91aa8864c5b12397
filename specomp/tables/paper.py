"""A sweep as the paper's table: measured values with those of the paper beside them, and what is still missing."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from specomp.evaluation.metric import FRACTION
from specomp.experiment.record import Record
from specomp.tables.render import Bold, Cell, Form, render
from specomp.tables.sweep import LEDGER, Column, Point, Sweep, mean_std

MISSING = "--"
DENSE = "dense"


def paper_table(sweep: Sweep, form: Form) -> str:
    """The whole text: what it is, the table, notes on quoted cells, and the commands that fill what is missing."""
    header, body = grid(sweep)
    if form == "csv":
        return render(*long_grid(sweep), "csv")
    table = render(header, body, form)
    if form == "latex":
        return "".join(f"% {line}\n" for line in facts(sweep)) + table
    parts = [f"# {sweep.caption}", "\n".join(f"- {line}" for line in facts(sweep)), table.rstrip()]
    if notes := sweep.notes():
        parts.append("On the paper's numbers:\n\n" + "\n".join(f"- {note}" for note in notes))
    missing = sweep.missing()
    if missing:
        parts.append(
            f"Missing: {len(missing)} of {sum(len(p.commands) for p in sweep.points)} runs. These fill them:\n\n"
            + "\n".join(f"    {x}" for x in missing)
        )
    return "\n\n".join(parts) + "\n"


def facts(sweep: Sweep) -> list[str]:
    """What the numbers are: model, texts, windows, tokens, what counts as retention, and the command."""
    records, lines = sweep.records, [f"made by `{sweep.command}`"]
    lines.append("models: " + ", ".join(dict.fromkeys(p.models for p in sweep.points)))
    if records:
        described = dict.fromkeys(_calibration(r) for r in records if r.calibration)
        lines.append("calibration: " + "; ".join(described))
    devices = Counter(str(r.provenance.get("device")) for r in records)
    if len(devices) > 1:
        lines.append("devices: " + ", ".join(f"{device} ({runs} runs)" for device, runs in devices.items()))
    lines += [f"{c.label}: mean over the factorized linears, see the csv of linears" for c in sweep.columns if c.protocol == LEDGER]
    for column in sweep.columns:
        found = next((column.result(r) for r in records if column.of(r) is not None), None)
        if found is None:
            continue
        if column.metric == "ppl":
            window = f" in windows of {found['window']:.0f}" if found.get("window") else ""
            lines.append(
                f"{column.label}: perplexity over {found['tokens']:,.0f} predicted tokens{window}; *collapsed*: worse than guessing"
            )
        elif "n" in found:
            lines.append(
                f"{column.label}: {found['n']:.0f} documents, one standard error about {100 * found.get('acc_stderr', math.nan):.1f} points"
            )
    lines.append("retention: stored parameters of the compressible linears over theirs in the dense model, as counted on the modules")
    return lines


def _calibration(record: Record) -> str:
    described = record.calibration
    source = described.get("source") or {}
    text = "/".join(str(source[x]) for x in ("name", "split") if source.get(x)) or record.choices.get("calibration", "")
    return f"{described.get('samples')} samples of {described.get('length')} tokens, {text}"


def accuracies(sweep: Sweep) -> list[Column]:
    """The columns that a mean is printed of, where there are several."""
    found = [c for c in sweep.columns if c.unit == FRACTION]
    return found if len(found) > 1 else []


def grid(sweep: Sweep) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: the dense model, then per point the measured values and, where the paper prints some, its own and the difference."""
    means = accuracies(sweep)
    header = [*sweep.keys, "", "retention", *(c.label for c in sweep.columns), *(["mean acc"] if means else [])]
    dense = [sweep.dense(c) for c in sweep.columns]
    body: list[list[Cell]] = []
    if any(x is not None for x in dense):
        line: list[Cell] = [*(DENSE if i == 0 else "" for i in range(len(sweep.keys))), "measured", "1.0000"]
        line += [_number(c, x) for c, x in zip(sweep.columns, dense, strict=True)]
        scores = [sweep.dense(c) for c in means]
        body.append([*line, *([_mean(scores)] if means else [])])
    best = {c.label: _best(sweep, c) for c in sweep.columns}
    for point in sweep.points:
        body.append([*point.keys.values(), "measured", _retention(point), *(_measured(sweep, point, c, best) for c in sweep.columns)])
        if means:
            body[-1].append(_mean([fmean(v) if (v := point.values(c)) else None for c in means]))
        quoted = [sweep.quote(point, c) for c in sweep.columns]
        if not any(quoted):
            continue
        model = next(q.model for q in quoted if q)
        blank = [""] * len(point.keys)
        published = [_number(c, q.value if q else None) for c, q in zip(sweep.columns, quoted, strict=True)]
        scores = [q.value if q else None for q, c in zip(quoted, sweep.columns, strict=True) if c in means]
        body.append([*blank, f"paper, {model}", "", *published, *([_mean(scores)] if means else [])])
        if model == point.models and any(point.values(c) for c in sweep.columns):
            differences = [_difference(c, point.values(c), q.value if q else None) for c, q in zip(sweep.columns, quoted, strict=True)]
            body.append([*blank, "difference", "", *differences, *([""] if means else [])])
    return header, body


def long_grid(sweep: Sweep) -> tuple[list[str], list[list[Cell]]]:
    """One line per value, for other programs: full precision, nothing merged."""
    header = [*sweep.keys, "model", "metric", "measured", "std", "seeds", "dense", "paper", "paper model", "source", "note", "records"]
    body: list[list[Cell]] = []
    for point in sweep.points:
        for column in sweep.columns:
            values, quoted = point.values(column), sweep.quote(point, column)
            mean, std = mean_std(values) if values else (None, None)
            numbers = [mean, std, len(values), sweep.dense(column), quoted and quoted.value]
            told = [quoted.model, quoted.source, quoted.note] if quoted else [""] * 3
            cells = ["" if x is None else repr(x) for x in numbers]
            body.append([*point.keys.values(), point.models, column.label, *cells, *told, " ".join(r.key[:12] for r in point.done)])
    return header, body


def _measured(sweep: Sweep, point: Point, column: Column, best: dict[str, dict[str, float]]) -> Cell:
    values = point.values(column)
    if not values:
        return MISSING
    mean, std = mean_std(values)
    text = _number(column, mean) + (f" ± {std:.2g}" if std is not None else "")
    if any(_collapsed(r, column) for r in point.done):
        return f"{text} *collapsed*"
    return Bold(text) if mean == best[column.label].get(_block(sweep, point)) else text


def _block(sweep: Sweep, point: Point) -> str:
    """What a best value is best of: points that differ in the last swept key only."""
    return "|".join([point.models, *(point.keys[k] for k in sweep.keys[:-1])])


def _best(sweep: Sweep, column: Column) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for point in sweep.points:
        if (values := point.values(column)) and not any(_collapsed(r, column) for r in point.done):
            found.setdefault(_block(sweep, point), []).append(fmean(values))
    choose = min if column.lower_is_better else max
    return {block: choose(values) for block, values in found.items() if len(values) > 1}


def _collapsed(record: Record, column: Column) -> bool:
    value = column.of(record)
    return column.metric == "ppl" and value is not None and (not math.isfinite(value) or bool(column.result(record).get("collapsed")))


def _retention(point: Point) -> str:
    found = [r.counted.measured_retention for r in point.done]
    return f"{fmean(found):.4f}" if found else MISSING


def _number(column: Column, value: float | None) -> str:
    """Accuracies in percent, perplexities with two decimals while those mean something; other metrics as they are."""
    if value is None:
        return MISSING
    if column.unit == FRACTION:
        return f"{100 * value:.1f}"
    digits = 4 if column.protocol == LEDGER else 2
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    if not known or len(known) < len(values):
        return MISSING
    return f"{100 * fmean(known):.1f}"


def _difference(column: Column, values: Sequence[float], quoted: float | None) -> str:
    """Relative for a perplexity, in points for an accuracy."""
    if not values or quoted is None:
        return MISSING
    return f"{100 * (fmean(values) / quoted - 1):+.1f} %" if column.lower_is_better else f"{100 * (fmean(values) - quoted):+.1f}"


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """table.md, table.csv and table.tex in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, Form] = {"table.md": "markdown", "table.csv": "csv", "table.tex": "latex"}
    for name, form in forms.items():
        (folder / name).write_text(paper_table(sweep, form))
    return [folder / name for name in forms]
