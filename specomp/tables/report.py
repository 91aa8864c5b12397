"""python -m specomp.tables.report EXPERIMENT [overrides ...]: the sweep as one HTML file that needs no network.

The table with the paper's numbers, curves against retention and bytes, ranks per linear, time per stage, provenance.
"""

import argparse
import html
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from specomp.errors import UserError
from specomp.experiment.record import Record, RecordStore, companions, stored, stores
from specomp.tables import charts
from specomp.tables.paper import facts, grid
from specomp.tables.render import Bold, Cell
from specomp.tables.sweep import ROOT, Point, Sweep, load_sweep

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
tr.paper td { color: #777; border-bottom: none; } tr.difference td { color: #777; font-style: italic; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; } figcaption { font-size: .9rem; color: #444; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
code, pre { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media print {
  body { max-width: none; font-size: 10pt; } .wide { overflow: visible; } table { font-size: .7rem; }
  figure, tr { break-inside: avoid; }
}
"""


def report(sweep: Sweep, folders: Sequence[RecordStore]) -> str:
    """The page."""
    parts = [f"<h1>{html.escape(sweep.caption)}</h1>", _list(facts(sweep)), *_notes(sweep.notes()), "<h2>Table</h2>", _table(*grid(sweep))]
    if drawings := quality(sweep):
        drawn = "".join(_figure(drawing, caption) for caption, drawing in drawings.items())
        parts += ["<h2>Quality</h2>", f'<div class="figures">{drawn}</div>']
    named = labels(sweep)
    linears = {name: rows for name, r in named.items() if (rows := charts.read_csv(companions(folders, r.key, "linears.csv")))}
    if linears:
        profiles = _figure(charts.layer_profile(linears), "Stored share of each decoder layer")
        profiles += _figure(charts.error_profile(linears), "What the factors lose, in the norm each method minimizes")
        maps = "".join(_figure(charts.rank_map(rows), f"Stored share of every linear: {name}") for name, rows in linears.items())
        parts += ["<h2>Where the parameters are</h2>", f'<div class="figures">{profiles}{_importance(sweep)}</div>']
        parts.append(f'<details><summary>All {len(linears)} maps</summary><div class="figures">{maps}</div></details>')
    parts += _spectra(sweep, linears)
    trained = {name: rows for name, r in named.items() if (rows := charts.read_csv(companions(folders, r.key, "training.csv")))}
    if trained:
        parts += ["<h2>Training</h2>", f'<div class="figures">{"".join(_training(x, named[x], rows) for x, rows in trained.items())}</div>']
    if named:
        parts += ["<h2>Cost</h2>", _figure(charts.stage_times(named), "Seconds by stage; what the cache held cost nothing"), _costs(named)]
        parts += ["<h2>Provenance</h2>", _provenance(sweep.records)]
    missing = sweep.missing()
    if missing:
        parts += [f"<h2>Missing: {len(missing)} runs</h2>", "<pre>" + html.escape("\n".join(missing)) + "</pre>"]
    title = f"<title>{html.escape(sweep.caption)}</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{title}<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + charts.numbered("\n".join(parts)) + "\n</body></html>\n"


def quality(sweep: Sweep) -> dict[str, str]:
    """Drawings of every metric by caption: against retention and bytes, or against a swept number."""
    found = {}
    for column in sweep.columns:
        for what, drawing in (
            ("retention", charts.curves(sweep, column, against="retention")),
            ("bytes of the model", charts.curves(sweep, column, against="bytes")),
            ("the swept number", charts.steps(sweep, column)),
        ):
            if drawing:
                found[f"{column.label} against {what}"] = drawing
    return found


def write(sweep: Sweep, folders: Sequence[RecordStore], folder: Path) -> list[Path]:
    """report.html, and each figure of quality as an svg file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "report.html": report(sweep, folders)}
    files |= {folder / f"{re.sub('[^a-z0-9]+', '-', caption.lower())}.svg": f"{drawing}\n" for caption, drawing in quality(sweep).items()}
    for path, text in files.items():
        path.write_text(text)
    return list(files)


def _importance(sweep: Sweep) -> str:
    """AdaSVD's Figure 4 for the sweep's models, where their importances have been measured (experiments/adasvd_figure4)."""
    models = dict.fromkeys(p.models for p in sweep.points)
    found = {x: rows for x in models if (rows := charts.read_csv([ROOT / "experiments" / "adasvd_figure4" / f"{x}.csv"]))}
    drawn = {x: [float(row["importance"]) for row in rows] for x, rows in found.items()}
    return _figure(charts.importances(drawn), "Importance of each decoder layer, as adaCR sees it") if drawn else ""


def _spectra(sweep: Sweep, linears: dict[str, list[dict[str, str]]]) -> list[str]:
    """One figure per series, since a spectrum knows no ratio: of the point in which most linears were factorized."""
    best: dict[str, list[dict[str, str]]] = {}
    for point in sweep.points:
        rows, name = [x for x in linears.get(label(point), []) if x.get("spectrum")], charts.series(point)
        if len(rows) > len(best.get(name, [])):
            best[name] = rows
    first: dict[str, str] = {}
    for name, rows in best.items():
        first.setdefault(charts.spectra(rows), name)
    drawn = "".join(_figure(drawing, f"Singular values in the norm of: {name}") for drawing, name in first.items())
    return ["<h2>Singular spectra</h2>", f'<div class="figures">{drawn}</div>'] if drawn else []


def _training(name: str, record: Record, rows: list[dict[str, str]]) -> str:
    """Curve of a training, and what became of the gates."""
    drawn = _figure(charts.training_curve(rows), f"Training: {name}")
    if profiles := record.training.get("profiles"):
        drawn += _figure(charts.gate_profiles(profiles, "gate", "gate S, pruned: 0"), f"Gates, mean over decoder layers: {name}")
        drawn += _figure(charts.gate_profiles(profiles, "kept", "share kept"), f"What is kept; a step if in singular-value order: {name}")
    return drawn


def labels(sweep: Sweep) -> dict[str, Record]:
    """Complete points by their swept values; of several seeds the first."""
    return {label(p): p.done[0] for p in sweep.points if p.done}


def label(point: Point) -> str:
    """What a point is called in figures and tables."""
    return " ".join(point.keys.values()) or point.models


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_marked(x)}</li>" for x in lines) + "</ul>"


def _marked(text: str) -> str:
    """Of markdown only what `facts` and cells use: `code` and *emphasis*."""
    return re.sub(r"\*(\w+)\*", r"<em>\1</em>", re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))


def _notes(notes: Sequence[str]) -> list[str]:
    return ["<p>On the paper's numbers:</p>", _list(notes)] if notes else []


def _table(header: Sequence[str], body: Sequence[Sequence[Cell]]) -> str:
    def text(cell: Cell) -> str:
        return f"<b>{_marked(cell.text)}</b>" if isinstance(cell, Bold) else _marked(cell)

    head = "".join(f"<th>{html.escape(x)}</th>" for x in header)
    rows = []
    for line in body:
        kind = next((x for x in ("paper", "difference") if any(isinstance(c, str) and c.startswith(x) for c in line)), "measured")
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{text(c)}</td>" for c in line) + "</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _costs(named: dict[str, Record]) -> str:
    stages = [x for x in charts.STAGES if any(x in r.seconds for r in named.values())]
    header = ["", *(f"{x} s" for x in stages), "peak MiB", "cache hits", "cache misses"]
    body: list[list[Cell]] = []
    for name, r in named.items():
        counts = [str(sum((r.cache.get(k) or {}).values())) for k in ("hits", "misses")]
        peak = f"{max(r.peak_memory_mib.values(), default=0):.0f}"
        body.append([name, *(f"{r.seconds.get(x, 0):.1f}" for x in stages), peak, *counts])
    return _table(header, body)


def _provenance(records: Sequence[Record]) -> str:
    header = ["record", "made", "commit", "device", "threads", "torch", "transformers", "notes"]
    body: list[list[Cell]] = []
    for r in records:
        p, packages = r.provenance, r.provenance.get("packages") or {}
        commit = str(p.get("git") or "")[:10] + (" (changed)" if p.get("git_dirty") else "")
        told = [p.get("time"), commit, p.get("device"), p.get("threads"), packages.get("torch"), packages.get("transformers"), len(r.notes)]
        body.append([r.key[:12], *("" if x is None else str(x) for x in told)])
    notes = {r.key[:12]: r.notes for r in records if r.notes}
    detail = f"<details><summary>Notes</summary><pre>{html.escape(json.dumps(notes, indent=1))}</pre></details>" if notes else ""
    return _table(header, body) + detail


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m specomp.tables.report", description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="what was typed after experiment=NAME")
    parser.add_argument("--records", nargs="*", type=Path, help="folders of records (default: yours and the committed ones)")
    parser.add_argument("--output", type=Path, help="file to write (default: EXPERIMENT.html)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write report.html there, and the figures of quality as svg files")
    options = parser.parse_intermixed_args(arguments)
    try:
        sweep = load_sweep(options.experiment, options.overrides, stored(options.records))
        if options.write is not None:
            paths = write(sweep, stores(options.records), options.write)
        else:
            paths = [options.output or Path(f"{options.experiment}.html")]
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            paths[0].write_text(report(sweep, stores(options.records)))
    except UserError as error:
        logging.getLogger("specomp").error("%s", error)
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
