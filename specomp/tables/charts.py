"""The figures of a report, as SVG text. All that is drawn is in the records and their csv files."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, Literal

import matplotlib as mpl
import pandas
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from specomp.evaluation.metric import PERCENT
from specomp.experiment.record import Record
from specomp.tables.render import is_number
from specomp.tables.sweep import RATIO, Point, Sweep

SIZE = (6.4, 4.0)  # inches
MANY = 8  # lines: with more, names stand at their ends instead of in a legend
CHARACTERS = 88  # in a line of a legend
BEYOND_USE = 1e5  # a perplexity: more than the words that most vocabularies have
STAGES = ("calibrate", "allocate", "train", "compress", "evaluate")
PLAIN = {"linewidth": 1.2}
DOTS = PLAIN | {"marker": "."}
POINTS = {"marker": "o", "markersize": 4, "linewidth": 1.5}
Frames = Mapping[str, pandas.DataFrame]


def quality(sweep: Sweep) -> dict[str, str]:
    """Drawings of every metric by caption: against retention and bytes, or against a swept number,
    where two points make a line.
    """
    # end of the caption -> label of the axis, key that changes along a line, place of a point
    axes: dict[str, tuple[str, str, Callable[[Point], float]]] = {}
    if RATIO in sweep.keys:
        stored = "stored share of the linears' parameters (retention)"
        axes["retention"] = stored, RATIO, lambda p: p.retention
        megabytes = "MB of the whole model"
        axes["bytes of the model"] = megabytes, RATIO, lambda p: p.model_bytes / 1e6
    along = next((k for k in sweep.keys if k.endswith(".bits")), None)
    if along is not None:
        axes["bits a weight"] = "stored bits a weight of the linears", along, lambda p: p.bits
    numeric = [
        k for k in sweep.keys if k != along and all(is_number(p.keys[k]) for p in sweep.points)
    ]
    if numeric:
        key = numeric[-1]
        axes["the swept number"] = key, key, lambda p: float(p.keys[key])
    drawn = {}
    for column in sweep.columns:
        for caption, (label, swept, place) in axes.items():
            found: dict[str, list[tuple[float, float, float]]] = {}  # place, value, error
            scale, unit = (100, " (%)") if column.unit in PERCENT else (1, "")
            for point in sweep.points:
                if (value := point.mean(column)) is not None:
                    spot = place(point), scale * value, scale * (point.error(column) or 0.0)
                    found.setdefault(point.series(swept), []).append(spot)
            if all(len(line) < 2 for line in found.values()):
                continue
            dense = sweep.dense(column) if swept in (RATIO, along) else None
            drawn[f"{column.label} against {caption}"] = _lines(
                {name: [(x, y) for x, y, _ in sorted(line)] for name, line in found.items()},
                label,
                column.label + unit,
                [POINTS],
                errors={name: [e for *_, e in sorted(line)] for name, line in found.items()},
                dense=None if dense is None else scale * dense,
                plain_ticks=column.lower_is_better,
                yscale="log" if column.lower_is_better else "linear",
            )
    return drawn


def layer_profile(found: Frames) -> str:
    """Stored share of decoder layers, a line per record: the bowl that importances make."""
    lines = {}
    for name, linears in found.items():
        sums = linears.groupby("layer")[["stored", "whole"]].sum()
        lines[name] = (sums["stored"] / sums["whole"]).items()
    return _lines(lines, "decoder layer", "stored share", ylim=(0, 1.05))


def cut_profile(found: Frames) -> str:
    """What is kept of the inner dimensions of MLPs that were cut, a line per record; its name says
    how many they are.
    """
    lines = {}
    for name, linears in found.items():
        if "cut" in linears:
            cut = linears[linears["cut"] == 1].groupby("layer")[["stored", "whole"]].sum()
            kept = (cut["stored"] / cut["whole"]).items()
            lines[f"{name}: {len(cut)} of {linears['layer'].nunique()} cut"] = kept
    return _lines(lines, "decoder layer", "inner dimensions kept", [POINTS], ylim=(0, 1.05))


def error_profile(found: Frames) -> str:
    """Relative output error in the norm of the inputs, mean over the linears of a decoder layer."""
    measured = {k: x.dropna(subset="norm_error") for k, x in found.items()}
    lines = {k: x.groupby("layer")["norm_error"].agg(fmean).items() for k, x in measured.items()}
    return _lines(lines, "decoder layer", "relative error in the method's norm", ylim=(0, None))


def importances(found: Mapping[str, Sequence[float]]) -> str:
    """Importance of decoder layers over the mean, a line per model: AdaSVD's Figure 4."""
    lines = {f"{k} ({len(x)} decoder layers)": _against_depth(x) for k, x in found.items()}
    depth = "depth (0: first decoder layer, 1: last)"
    return _lines(lines, depth, "importance over the mean", plain_ticks=True, yscale="log")


def histograms(centres: Sequence[float], found: Mapping[str, Sequence[float]], xlabel: str) -> str:
    """Shares of the same bins, a line per distribution."""
    lines = {name: zip(centres, shares, strict=True) for name, shares in found.items()}
    styles = [PLAIN | {"linestyle": x} for x in ("-", "--", ":", "-.")]
    return _lines(lines, xlabel, "share of the outputs", styles, ylim=(0, None))


def spectra(linears: pandas.DataFrame) -> str:
    """Singular values over the largest, a line per type: geometric mean over decoder layers."""
    values = linears["spectrum"].str.split(expand=True).astype(float).clip(lower=1e-6)
    means = values.groupby(linears["kind"], sort=False).agg(geometric_mean)
    lines = {kind: _against_depth(means.loc[kind]) for kind in means.index}
    label = "singular value over the largest"
    return _lines(lines, "component / number of components", label, yscale="log")


def gate_profiles(
    profiles: Mapping[str, Mapping[str, Sequence[float]]], what: str, label: str
) -> str:
    """A trained spectrum by component index, a line per type of linear. what: gate, or kept."""
    lines = {}
    for kind, profile in profiles.items():
        values = profile[what]
        places = [(i + 0.5) / len(values) for i in range(len(values))]
        lines[kind.rpartition(".")[2]] = zip(places, values, strict=True)
    xlabel = "component / number of components, largest singular value first"
    return _lines(lines, xlabel, label, [PLAIN], ylim=(0, None))


def rank_map(linears: pandas.DataFrame) -> str:
    """Stored share of every linear: types by decoder layer."""
    share = (linears["stored"] / linears["whole"]).groupby([linears["kind"], linears["layer"]])
    table = share.last().unstack().reindex(linears["kind"].unique())
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.28 * len(table)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", vmin=0, vmax=1)
    axes.set_yticks(range(len(table)), table.index)
    axes.set(xlabel="decoder layer")
    figure.colorbar(image, ax=axes, label="stored share")
    return svg(figure)


def stage_times(found: Mapping[str, Record]) -> str:
    """Seconds of every stage of the run that made a record; the cache costs nothing."""
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


def training_curve(rows: pandas.DataFrame) -> str:
    """KL of a training, step by step; of a spectrum training the retention too."""
    figure, axes = _new()
    axes.plot(rows["step"], rows["kl"], color="0.4", linewidth=0.8, label="KL per token")
    axes.set(xlabel="optimizer step", ylabel="KL per token", yscale="log")
    if "soft" not in rows:
        return svg(figure)
    right = axes.twinx()
    for name, style in (("soft", "--"), ("hard", "-")):
        label = f"{name} retention"
        right.plot(rows["step"], rows[name], style, color="tab:blue", linewidth=1, label=label)
    right.set(ylabel="retention", ylim=(0, None))
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    _legend_below(figure, handles, [x.get_label() for x in handles])
    return svg(figure)


def read_csv(paths: Iterable[Path]) -> pandas.DataFrame:
    """The first file that exists; an empty frame where none does. Of a csv of linears each row has
    its kind, decoder layer and number of weights too.
    """
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return pandas.DataFrame()
    frame = pandas.read_csv(path, float_precision="round_trip")
    if "name" in frame:
        frame["kind"] = frame["name"].str.rpartition(".")[2]
        frame["layer"] = frame["name"].str.extract(r"\.(\d+)\.", expand=False).astype(int)
        frame["whole"] = frame["m"] * frame["n"]
    return frame


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
    ids = re.compile(r'(\bid="|url\(#|href="#)')
    return before + "".join("<svg" + ids.sub(rf"\g<1>f{i}-", x) for i, x in enumerate(drawings))


def _lines(
    found: Mapping[str, Iterable[tuple[Any, float]]],
    xlabel: str,
    ylabel: str,
    styles: Sequence[Mapping[str, Any]] = (DOTS,),
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    dense: float | None = None,
    plain_ticks: bool = False,
    **settings: Any,
) -> str:
    """Named lines of places and values. errors: bars, one per value; dense: the dense model's
    value, as a level; plain_ticks: 20, 50, 100 and not 10^2, for a range that is often less than a
    decade. Names stand below the axes, or at the ends of the lines where there are many.
    """
    figure, axes = _new()
    lines = {name: list(line) for name, line in found.items()}
    colours = mpl.colormaps["tab20" if len(lines) > 10 else "tab10"]
    axes.set_prop_cycle(color=[colours(i) for i in range(colours.N)])
    for (name, line), style in zip(lines.items(), cycle(styles)):
        (drawn,) = axes.plot(*zip(*line, strict=True), **style, label=name)
        if errors is not None and any(errors[name]):
            places, values = zip(*line, strict=True)
            axes.errorbar(places, values, errors[name], fmt="none", ecolor=drawn.get_color())
    if dense is not None:
        axes.axhline(dense, color="0.5", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel=xlabel, ylabel=ylabel, **settings)
    if plain_ticks:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if axes.get_ylim()[1] > BEYOND_USE:  # lines of collapsed models leave the figure
            axes.set_ylim(top=BEYOND_USE)
    if len(lines) > MANY:
        _name_ends(axes, [(name, line[-1]) for name, line in lines.items()])
    else:
        _legend_below(figure, *axes.get_legend_handles_labels())
    return svg(figure)


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Outside the axes, in as many columns as the names leave room for; the figure grows by it."""
    columns = max(1, min(len(labels), CHARACTERS // (max(map(len, labels), default=0) + 7)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * -(-len(labels) // columns))
    place: Literal["outside lower center"] = "outside lower center"
    style: dict[str, Any] = {"fontsize": "small", "frameon": False}
    figure.legend(handles, labels, loc=place, ncols=columns, **style)


def _name_ends(axes: Any, ends: Sequence[tuple[str, tuple[Any, float]]]) -> None:
    """Each line's name beside its last value, in its colour, moved apart where they would meet."""
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    heights = {}
    for name, end in ends:
        _, height = axes.transAxes.inverted().transform(axes.transData.transform(end))
        heights[name] = min(max(float(height), 0.0), 1.0)
    free = 0.0
    for name in sorted(heights, key=lambda x: heights[x]):
        free = max(heights[name], free)
        axes.annotate(
            name,
            (1.01, free),
            xycoords="axes fraction",
            va="center",
            fontsize="x-small",
            color=colours[name],
        )
        free += 0.042


def _new() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _against_depth(values: Sequence[float]) -> list[tuple[float, float]]:
    """Values at equal distances from 0 to 1."""
    return [(i / max(1, len(values) - 1), x) for i, x in enumerate(values)]
