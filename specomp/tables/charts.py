"""The figures of a report, as SVG text. Everything drawn is also in the records and their csv of linears."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from specomp.experiment.record import Record
from specomp.tables.sweep import Column, Point, Sweep

RATIO = "ratio"
SIZE = (6.4, 4.0)  # inches
BEYOND_USE = 1e5  # a perplexity: more than the words that most vocabularies have
STAGES = ("calibrate", "allocate", "train", "compress", "evaluate")
Linears = Sequence[Mapping[str, str]]
Curve = tuple[list[float], list[float]]


def curves(sweep: Sweep, column: Column, *, against: str) -> str | None:
    """One metric per method. against: retention, or bytes of the whole model. None when no two points make a line."""
    if RATIO not in sweep.keys:
        return None
    place: Callable[[Record], float] = {
        "retention": lambda r: r.counted.measured_retention,
        "bytes": lambda r: r.counted.compressed.model_bytes / 1e6,
    }[against]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sweep.points:
        values = point.values(column)
        if values:
            lines.setdefault(series(point), []).append((fmean(place(r) for r in point.done), fmean(values)))
    label = "stored share of the linears' parameters (retention)" if against == "retention" else "MB of the whole model"
    return _metric_lines(lines, column, label, sweep.dense(column))


def steps(sweep: Sweep, column: Column) -> str | None:
    """One metric against a swept number (iterations, gap, ...), a line per value of the other keys. None when no key is a number."""
    numeric = next((k for k in reversed(sweep.keys) if all(_number(p.keys[k]) is not None for p in sweep.points)), None)
    if numeric is None:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sweep.points:
        x = _number(point.keys[numeric])
        if x is not None and (values := point.values(column)):
            name = ", ".join(v for k, v in point.keys.items() if k != numeric) or point.models
            lines.setdefault(name, []).append((x, fmean(values)))
    return _metric_lines(lines, column, numeric)


def _metric_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], column: Column, xlabel: str, dense: float | None = None
) -> str | None:
    """Named lines of (x, metric), with the dense model's as a level. None when no two points make a line."""
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, axes = _new()
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=4, linewidth=1.5, label=name)
    if dense is not None:
        axes.axhline(dense, color="0.5", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel=xlabel, ylabel=column.label, yscale="log" if column.lower_is_better else "linear")
    if column.lower_is_better:
        _plain_ticks(axes.yaxis)
        if axes.get_ylim()[1] > BEYOND_USE:  # lines of collapsed models leave the figure
            axes.set_ylim(top=BEYOND_USE)
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def rank_map(linears: Linears) -> str:
    """Stored share of every linear: types by decoder layer."""
    kinds, layers, share = by_kind(linears, lambda x: int(x["stored"]) / (int(x["m"]) * int(x["n"])))
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.28 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow([[share.get((kind, layer), float("nan")) for layer in layers] for kind in kinds], aspect="auto", vmin=0, vmax=1)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="decoder layer")
    figure.colorbar(image, ax=axes, label="stored share")
    return svg(figure)


def layer_profile(found: Mapping[str, Linears]) -> str:
    """Stored share of whole decoder layers, a line per record: the bowl of an importance-based allocation."""
    figure, axes = _new()
    for name, linears in found.items():
        stored: dict[int, list[int]] = {}
        for x in linears:
            pair = stored.setdefault(_layer(x["name"]), [0, 0])
            pair[0] += int(x["stored"])
            pair[1] += int(x["m"]) * int(x["n"])
        layers = sorted(stored)
        axes.plot(layers, [stored[i][0] / stored[i][1] for i in layers], marker=".", linewidth=1.2, label=name)
    axes.set(xlabel="decoder layer", ylabel="stored share", ylim=(0, 1.05))
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def error_profile(found: Mapping[str, Linears]) -> str:
    """Relative output error in the norm of the inputs, mean over the linears of a decoder layer."""
    figure, axes = _new()
    for name, linears in found.items():
        errors: dict[int, list[float]] = {}
        for x in linears:
            errors.setdefault(_layer(x["name"]), []).append(float(x["norm_error"]))
        layers = sorted(errors)
        axes.plot(layers, [fmean(errors[i]) for i in layers], marker=".", linewidth=1.2, label=name)
    axes.set(xlabel="decoder layer", ylabel="relative error in the method's norm", ylim=(0, None))
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def importances(found: Mapping[str, Sequence[float]]) -> str:
    """Importance of each decoder layer over the mean, a line per model, against depth: AdaSVD's Figure 4."""
    figure, axes = _new()
    for name, values in found.items():
        depth = [i / max(1, len(values) - 1) for i in range(len(values))]
        axes.plot(depth, values, marker=".", linewidth=1.2, label=f"{name} ({len(values)} decoder layers)")
    axes.set(xlabel="depth (0: first decoder layer, 1: last)", ylabel="importance over the mean", yscale="log")
    _plain_ticks(axes.yaxis)
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def histograms(centres: Sequence[float], found: Mapping[str, Sequence[float]], xlabel: str) -> str:
    """Shares of the same bins, a line per distribution."""
    figure, axes = _new()
    for (name, shares), style in zip(found.items(), ("-", "--", ":", "-."), strict=False):
        axes.plot(centres, shares, linestyle=style, linewidth=1.2, label=name)
    axes.set(xlabel=xlabel, ylabel="share of the outputs", ylim=(0, None))
    axes.legend(fontsize="small", frameon=False)
    return svg(figure)


def spectra(linears: Linears) -> str:
    """Singular values over the largest, a line per type of linear: geometric mean over decoder layers."""
    found: dict[str, list[list[float]]] = {}
    for x in linears:
        found.setdefault(x["name"].rpartition(".")[2], []).append([max(float(v), 1e-6) for v in x["spectrum"].split()])
    figure, axes = _new()
    for kind, rows in found.items():
        values = [geometric_mean(column) for column in zip(*rows, strict=True)]
        axes.plot([i / (len(values) - 1) for i in range(len(values))], values, marker=".", linewidth=1.2, label=kind)
    axes.set(xlabel="component / number of components", ylabel="singular value over the largest", yscale="log")
    axes.legend(fontsize="small", frameon=False, ncols=2)
    return svg(figure)


def gate_profiles(profiles: Mapping[str, Mapping[str, Sequence[float]]], what: str, label: str) -> str:
    """A trained spectrum by component index, a line per type of linear. what: gate, or kept."""
    figure, axes = _new()
    for kind, profile in profiles.items():
        values = profile[what]
        axes.plot([(i + 0.5) / len(values) for i in range(len(values))], values, linewidth=1.2, label=kind.rpartition(".")[2])
    axes.set(xlabel="component / number of components, largest singular value first", ylabel=label, ylim=(0, None))
    axes.legend(fontsize="small", frameon=False, ncols=2)
    return svg(figure)


def stage_times(found: Mapping[str, Record]) -> str:
    """Seconds of every stage of the run that made a record; what came from the cache cost nothing."""
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(found)
    for stage in STAGES:
        widths = [r.seconds.get(stage, 0.0) for r in found.values()]
        axes.barh(range(len(found)), widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    figure.legend(loc="outside upper center", fontsize="small", frameon=False, ncols=len(STAGES))
    return svg(figure)


def training_curve(rows: Sequence[Mapping[str, str]]) -> str:
    """KL of a training, step by step; of a spectrum training the retention too."""
    figure, axes = _new()
    step = [int(x["step"]) for x in rows]
    axes.plot(step, [float(x["kl"]) for x in rows], color="0.4", linewidth=0.8, label="KL per token")
    axes.set(xlabel="optimizer step", ylabel="KL per token", yscale="log")
    if "soft" not in rows[0]:
        return svg(figure)
    right = axes.twinx()
    for name, style in (("soft", "--"), ("hard", "-")):
        right.plot(step, [float(x[name]) for x in rows], style, color="tab:blue", linewidth=1, label=f"{name} retention")
    right.set(ylabel="retention", ylim=(0, None))
    handles, labels = (a + b for a, b in zip(axes.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True))
    axes.legend(handles, labels, fontsize="small", frameon=False)
    return svg(figure)


def series(point: Point) -> str:
    """What a line of a figure is called: the swept values besides the ratio."""
    return ", ".join(v for k, v in point.keys.items() if k != RATIO) or point.models


def by_kind(linears: Linears, value: Callable[[Mapping[str, str]], float]) -> tuple[list[str], list[int], dict[tuple[str, int], float]]:
    """(types, decoder layers, value by both)."""
    found = {(x["name"].rpartition(".")[2], _layer(x["name"])): value(x) for x in linears}
    return list(dict.fromkeys(kind for kind, _ in found)), sorted({layer for _, layer in found}), found


def read_csv(paths: Iterable[Path]) -> list[dict[str, str]]:
    """Rows of the first file that exists; none where none does."""
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def svg(figure: Figure) -> str:
    """The figure as an <svg> element: text stays text, the same figure the same bytes."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specomp"}):
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    return body[body.index("<svg") :]


def numbered(page: str) -> str:
    """The page with the ids of every figure made its own: matplotlib counts from 1 in each."""
    before, *drawings = page.split("<svg")
    return before + "".join("<svg" + re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{i}-", x) for i, x in enumerate(drawings))


def _new() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_ticks(axis: Any) -> None:
    """20, 50, 100 and not 10^2: the range is often less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
