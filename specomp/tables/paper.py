"""A sweep as the paper's table: measured beside published values, and what is still missing."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from specomp.evaluation.metric import FRACTION, PERCENT
from specomp.experiment.record import Record
from specomp.tables.render import MISSING, Form, as_markdown, captioned, one_line, render
from specomp.tables.sweep import LEDGER, RATIO, Column, Point, Sweep

DENSE = "dense"
FILES: dict[str, Form] = {"table.md": "markdown", "table.csv": "csv", "table.tex": "latex"}


def paper_table(sweep: Sweep, form: Form) -> str:
    """The whole text: what it is, the table, notes on quoted cells, and what is missing."""
    if form == "csv":
        return render(*long_grid(sweep), "csv")
    table = render(*grid(sweep), form)
    if form == "latex":
        return "".join(f"% {one_line(line)}\n" for line in facts(sweep)) + captioned(
            table, sweep.caption
        )
    parts = [f"# {as_markdown(sweep.caption)}", _bullets(facts(sweep)), table.rstrip()]
    if notes := sweep.notes():
        parts += ["On the paper's numbers:", _bullets(notes)]
    if missing := sweep.missing():
        jobs = sum(len(p.commands) for p in sweep.points)
        parts.append(f"Missing: {len(missing)} of {jobs} runs. These fill them:")
        parts.append("\n".join(f"    {x}" for x in missing))
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {as_markdown(line)}" for line in lines)


def facts(sweep: Sweep) -> list[str]:
    """What the numbers are: command, model, texts, windows, tokens, what counts as retention."""
    lines = [f"made by `{sweep.command}`", "models: " + ", ".join(sweep.models)]
    if records := sweep.records:
        texts = dict.fromkeys(_calibration(r) for r in records if r.calibration)
        lines.append("calibration: " + "; ".join(texts))
    devices = Counter(str(r.provenance.get("device")) for r in records)
    if len(devices) > 1:
        counts = (f"{device} ({runs} runs)" for device, runs in devices.items())
        lines.append("devices: " + ", ".join(counts))
    described = {c.label: _protocol(c, records) for c in sweep.columns}
    lines += [f"{label}: {what}" for label, what in described.items() if what]
    if any(point.std(c) is not None for point in sweep.points for c in sweep.columns):
        lines.append("mean ± standard deviation over seeds, and how many they are")
    if any(point.in_bits for point in sweep.points):
        return [
            *lines,
            "bits: all that is stored of the compressible linears (values, scales, zeros, indices)"
            " a weight of the dense model's, which is held in as many as its row says",
        ]
    return [
        *lines,
        "retention: stored parameters of the compressible linears over theirs in the dense model, "
        "as counted on the modules",
    ]


def _calibration(record: Record) -> str:
    described = record.calibration
    source = described.get("source") or {}
    text = "/".join(str(source[x]) for x in ("name", "split") if source.get(x))
    text = text or record.choices.get("calibration", "")
    return f"{described.get('samples')} samples of {described.get('length')} tokens, {text}"


def _protocol(column: Column, records: Sequence[Record]) -> str:
    """On how much a column was measured; empty where nothing was, or nothing is known."""
    if column.protocol == LEDGER:
        return "mean over the factorized linears, see the csv of linears"
    found = next((column.result(r) for r in records if column.of(r) is not None), {})
    if found and column.metric == "ppl":
        window = f" in windows of {found['window']:.0f}" if found.get("window") else ""
        tokens = f"perplexity over {found['tokens']:,.0f} predicted tokens"
        return f"{tokens}{window}; *collapsed*: worse than guessing"
    if "n" in found:
        error = 100 * found.get("acc_stderr", math.nan)
        return f"{found['n']:.0f} documents, one standard error about {error:.1f} points"
    return ""


def grid(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the dense model, then per point the measured values, the best of a block in
    **bold**, and where the paper prints some, its own and the difference.
    """
    columns = sweep.columns
    in_bits = any(point.in_bits for point in sweep.points)
    header = [*sweep.keys, "", "bits" if in_bits else "retention", *(c.label for c in columns)]
    fractions = [i for i, c in enumerate(columns) if c.unit == FRACTION]
    if len(fractions) > 1:
        header.append("mean acc")
    body: list[list[str]] = []

    def add(keys: Sequence[str], *cells: str, mean_of: Sequence[float | None] = ()) -> None:
        """A row. mean_of: values by column, of which the fractions have a mean."""
        scores = [mean_of[i] for i in fractions] if mean_of else []
        body.append([*keys, *cells, *([_mean(scores)] if len(fractions) > 1 else [])])

    blank = [""] * len(sweep.keys)
    dense = [sweep.dense(c) for c in columns]
    if any(x is not None for x in dense):
        names = [DENSE, *blank][: len(blank)]
        stored = dense_bits(sweep) if in_bits else "1.0000"
        add(names, "measured", stored, *map(number, columns, dense), mean_of=dense)
    for point in sweep.points:
        measured = [point.mean(c) for c in columns]
        stored = MISSING
        if point.done:
            stored = f"{point.bits:.3f}" if in_bits else f"{point.retention:.4f}"
        cells = [_measured(sweep, point, c) for c in columns]
        add(list(point.keys.values()), "measured", stored, *cells, mean_of=measured)
        quotes = [sweep.quote(point, c) for c in columns]
        quoted = [q.value if q else None for q in quotes]
        model = next((q.model for q in quotes if q), None)
        if model is not None:
            add(blank, f"paper, {model}", "", *map(number, columns, quoted), mean_of=quoted)
        if model == point.models and any(x is not None for x in measured):
            add(blank, "difference", "", *map(_difference, columns, measured, quoted))
    return header, body


def dense_bits(sweep: Sweep) -> str:
    """A weight of the dense model, as it is held."""
    sizes = [r.counted.dense for r in sweep.records]
    return f"{sizes[0].linear_bits / sizes[0].linear_params:.0f}" if sizes else MISSING


def long_grid(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """One line per value, for other programs: full precision, nothing merged."""
    header = [*sweep.keys, "model", "metric", "measured", "std", "seeds", "dense", "paper"]
    header += ["paper model", "source", "note", "records"]
    body = []
    for point in sweep.points:
        records = " ".join(r.key[:12] for r in point.done)
        for column in sweep.columns:
            quote = sweep.quote(point, column)
            numbers = [point.mean(column), point.std(column), len(point.values(column))]
            numbers += [sweep.dense(column), quote.value if quote else None]
            cells = ["" if x is None else repr(x) for x in numbers]
            told = [quote.model, quote.source, quote.note] if quote else [""] * 3
            names = [*point.keys.values(), point.models, column.label]
            body.append([*names, *cells, *told, records])
    return header, body


def _measured(sweep: Sweep, point: Point, column: Column) -> str:
    mean, std = point.mean(column), point.std(column)
    text = number(column, mean)
    count, asked = len(point.values(column)), len(point.commands)
    if std is not None:
        text += f" ± {_spread(column, std)} ({count})"
    elif asked > 1:
        text += f" ({count} of {asked})"
    if mean is None:
        return MISSING
    if point.collapsed(column):
        return f"{text} *collapsed*"
    return f"**{text}**" if mean == _best(sweep, point, column) else text


def _spread(column: Column, std: float) -> str:
    """In the unit and with the digits of the value that it stands behind."""
    return number(column, std) if column.unit in PERCENT else f"{std:.2g}"


def _best(sweep: Sweep, point: Point, column: Column) -> float | None:
    """The best mean of points that differ in the last swept key only, or the last but the ratio;
    where there are several.
    """
    compared = next((k for k in reversed(sweep.keys) if k.partition(".")[0] != RATIO), None)

    def block(x: Point) -> list[str]:
        return [x.models, *(v for k, v in x.keys.items() if k != compared)]

    rivals = [p for p in sweep.points if block(p) == block(point) and not p.collapsed(column)]
    means = [x for p in rivals if (x := p.mean(column)) is not None]
    if len(means) < 2:
        return None
    return min(means) if column.lower_is_better else max(means)


def number(column: Column, value: float | None) -> str:
    """Accuracies in percent, perplexities with two decimals while those mean something; other
    metrics as they are.
    """
    if value is None:
        return MISSING
    if column.unit in PERCENT:
        return f"{100 * value:.1f}"
    digits = 4 if column.protocol == LEDGER else 2
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    if not values:
        return ""
    return MISSING if len(known) < len(values) else f"{100 * fmean(known):.1f}"


def _difference(column: Column, value: float | None, quoted: float | None) -> str:
    """Relative for a perplexity, in points for an accuracy."""
    if value is None or quoted is None:
        return MISSING
    if column.lower_is_better:
        return f"{100 * (value / quoted - 1):+.1f} %"
    return f"{100 * (value - quoted):+.1f}"


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """table.md, table.csv and table.tex in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in FILES.items():
        (folder / name).write_text(paper_table(sweep, form))
    return [folder / name for name in FILES]
