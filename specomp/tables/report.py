"""specomp report EXPERIMENT [overrides ...]: the sweep as one HTML file that needs
no network.

The table with the paper's numbers, curves against retention and bytes, ranks per linear, time per
stage, provenance.
"""

import argparse
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
from jinja2 import Environment, PackageLoader

from specomp.experiment.record import (
    COMMITTED,
    Record,
    RecordStore,
    companions,
    own_records,
    stored,
    stores,
)
from specomp.tables import charts
from specomp.tables.charts import Frames
from specomp.tables.command import command, sweep_parser
from specomp.tables.paper import facts, grid
from specomp.tables.render import as_file, as_html
from specomp.tables.sweep import Sweep, load_sweep

Table = tuple[list[str], list[list[str]]]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what a model wrote may have any


def report(
    sweep: Sweep,
    folders: Sequence[RecordStore],
    quality: Mapping[str, str] | None = None,
    linears: Frames | None = None,
) -> str:
    """The page. quality: `charts.quality` of the sweep, where it is drawn already; linears: the
    files beside its records, where they are read.
    """
    named = _named(sweep)
    linears = _beside(named, folders, "linears.csv") if linears is None else linears
    training: dict[str, str] = {}
    for name, rows in _beside(named, folders, "training.csv").items():
        training |= _training(name, named[name], rows)
    notes = {r.key[:12]: r.notes for r in sweep.records if r.notes}
    pages = Environment(
        loader=PackageLoader("specomp.tables", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters |= {"e": html.escape, "marked": as_html, "kind": _kind}
    maps = {f"Stored share of every linear: {k}": charts.rank_map(x) for k, x in linears.items()}
    return charts.numbered(
        pages.get_template("report.html.jinja").render(
            sweep=sweep,
            facts=facts(sweep),
            grid=grid(sweep),
            quality=charts.quality(sweep) if quality is None else quality,
            where=_where(sweep, linears) if linears else {},
            maps=maps,
            spectra=_spectra(sweep, linears),
            training=training,
            texts=_texts(named),
            times=charts.stage_times(named) if named else "",
            costs=_costs(named),
            provenance=_provenance(sweep.records),
            record_notes=json.dumps(notes, indent=1) if notes else "",
        )
    )


def write(sweep: Sweep, folders: Sequence[RecordStore], folder: Path) -> list[Path]:
    """report.html, and each figure of quality, and of MLPs that are cut, as an svg file."""
    folder.mkdir(parents=True, exist_ok=True)
    quality = charts.quality(sweep)
    linears = _beside(_named(sweep), folders, "linears.csv")
    files = {"report.html": report(sweep, folders, quality, linears)}
    for caption, drawing in quality.items():
        files[f"{as_file(caption)}.svg"] = f"{drawing}\n"
    if _is_cut(linears):
        files["cut.svg"] = f"{charts.cut_profile(linears)}\n"
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def _kind(line: Sequence[str]) -> str:
    """Of a row of a table: whose values it has."""
    kinds = ("paper", "difference")
    return next((x for x in kinds if any(c.startswith(x) for c in line)), "measured")


def _named(sweep: Sweep) -> dict[str, Record]:
    """Every point's record by its label, of several seeds the first."""
    return {p.label: p.done[0] for p in sweep.points if p.done}


def _is_cut(linears: Frames) -> bool:
    """Whether any of these models has MLPs that are."""
    return any("cut" in x for x in linears.values())


def _beside(named: Mapping[str, Record], folders: Sequence[RecordStore], suffix: str) -> Frames:
    """The files of that kind beside records, where there are some."""
    found = {k: charts.read_csv(companions(folders, r, suffix)) for k, r in named.items()}
    return {name: rows for name, rows in found.items() if not rows.empty}


def _where(sweep: Sweep, linears: Frames) -> dict[str, str]:
    """Where the parameters are; and AdaSVD's Figure 4 of the models that it has been made of."""
    drawn = {
        "Stored share of each decoder layer": charts.layer_profile(linears),
        "What the factors lose, in the norm each method minimizes": charts.error_profile(linears),
    }
    if _is_cut(linears):
        drawn["MLPs that are cut, by decoder layer"] = charts.cut_profile(linears)
    measured = {}
    for model in sweep.models:
        rows = charts.read_csv([COMMITTED.parent / "adasvd_figure4" / f"{model}.csv"])
        if not rows.empty:
            measured[model] = rows["importance"].tolist()
    if measured:
        caption = "Importance of each decoder layer, as adaCR sees it"
        drawn[caption] = charts.importances(measured)
    return drawn


def _spectra(sweep: Sweep, linears: Frames) -> dict[str, str]:
    """One figure per series, for a spectrum knows no ratio: where most linears were factorized."""
    best: dict[str, pandas.DataFrame] = {}
    for point in sweep.points:
        rows, name = linears.get(point.label), point.series()
        if rows is None or "spectrum" not in rows:
            continue
        rows = rows.dropna(subset="spectrum")
        if len(rows) > len(best.get(name, [])):
            best[name] = rows
    first: dict[str, str] = {}
    for name, rows in best.items():
        first.setdefault(charts.spectra(rows), f"Singular values in the norm of: {name}")
    return {caption: drawing for drawing, caption in first.items()}


def _training(name: str, record: Record, rows: pandas.DataFrame) -> dict[str, str]:
    """Curve of a training, and what became of the gates."""
    drawn = {f"Training: {name}": charts.training_curve(rows)}
    if profiles := record.training.get("profiles"):
        gates = charts.gate_profiles(profiles, "gate", "gate S, pruned: 0")
        drawn[f"Gates, mean over decoder layers: {name}"] = gates
        kept = charts.gate_profiles(profiles, "kept", "share kept")
        drawn[f"What is kept; a step if in singular-value order: {name}"] = kept
    return drawn


def _texts(named: Mapping[str, Record]) -> dict[str, Table]:
    """Greedy text, dense beside compressed, by benchmark: a row a prompt."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for label, record in named.items():
        for name, texts in record.texts.items():
            for text in texts:
                text = {k: CONTROL.sub(" ", v) for k, v in text.items()}
                cells = found.setdefault(name, {}).setdefault(text["prompt"], {})
                if "dense" in text:
                    cells.setdefault("dense", text["dense"])
                cells[label] = text["text"]
    tables = {}
    for name, prompts in found.items():
        columns = list(dict.fromkeys(x for cells in prompts.values() for x in cells))
        body = [[prompt, *(cells.get(x, "") for x in columns)] for prompt, cells in prompts.items()]
        tables[name] = ["prompt", *columns], body
    return tables


def _costs(named: Mapping[str, Record]) -> Table:
    stages = [x for x in charts.STAGES if any(x in r.seconds for r in named.values())]
    header = ["", *(f"{x} s" for x in stages), "peak MiB", "cache hits", "cache misses"]
    body = []
    for name, r in named.items():
        counts = [str(sum((r.cache.get(k) or {}).values())) for k in ("hits", "misses")]
        peak = f"{max(r.peak_memory_mib.values(), default=0):.0f}"
        body.append([name, *(f"{r.seconds.get(x, 0):.1f}" for x in stages), peak, *counts])
    return header, body


def _provenance(records: Sequence[Record]) -> Table:
    header = ["record", "made", "commit", "device", "threads", "torch", "transformers", "notes"]
    body = []
    for r in records:
        made, packages = r.provenance, r.provenance.get("packages") or {}
        commit = str(made.get("git") or "")[:10] + (" (changed)" if made.get("git_dirty") else "")
        told = [made.get("time"), commit, made.get("device"), made.get("threads")]
        told += [packages.get("torch"), packages.get("transformers"), len(r.notes)]
        body.append([r.key[:12], *("" if x is None else str(x) for x in told)])
    return header, body


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = sweep_parser("report", __doc__)
    output = f"file to write (default: {own_records().parent}/EXPERIMENT.html)"
    parser.add_argument("--output", type=Path, help=output)
    folder = "write report.html there, and the figures of quality and of cut MLPs as svg files"
    parser.add_argument("--write", type=Path, metavar="FOLDER", help=folder)
    return command(parser, arguments, _written)


def _written(options: argparse.Namespace) -> str:
    """Write what was asked for, and say where it is."""
    sweep = load_sweep([options.experiment, *options.overrides], stored(options.records))
    folders = stores(options.records)
    if options.write is not None:
        return "".join(f"{path}\n" for path in write(sweep, folders, options.write))
    path = options.output or own_records().parent / f"{sweep.name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(sweep, folders))
    return f"{path}\n"
