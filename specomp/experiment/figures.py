"""Figures, drawn off screen. Everything in them is also a number in a record or a csv beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from specomp.disk import atomic_path
from specomp.models.family import LinearSpec
from specomp.training.spectrum import BINS


def training_figure(
    path: Path,
    linears: Sequence[LinearSpec],
    gates: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
    report: Mapping[str, Any],
) -> None:
    """What a training of gates did, as a PNG: its curve, gates and kept share by component index,
    ranks per decoder layer.

    gates: (k,) per linear; chosen: indices kept; report: as stored in the record, with its
    profiles, and the curve.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    curve, gate, rank, kept = figure.subplots(2, 2).flat
    _curve(curve, report)
    for kind, profile in report["profiles"].items():
        members = [x for x in linears if x.kind == kind]
        label = kind.rpartition(".")[2]
        shares = torch.linspace(0, 1, BINS)
        gate.plot(shares, profile["gate"], label=label)
        kept.plot(shares, profile["kept"], label=label)
        rank.plot(
            [x.decoder_layer for x in members],
            [len(chosen[x.name]) / len(gates[x.name]) for x in members],
            marker=".",
            label=label,
        )
    gate.set(
        title="gate by component (mean over decoder layers; pruned: 0)",
        xlabel="component index / k",
        ylabel="S",
    )
    rank.set(title="components kept", xlabel="decoder layer", ylabel="rank / k", ylim=(0, 1.02))
    kept.set(
        title="share kept by component: a step if in singular-value order",
        xlabel="component index / k",
        ylim=(0, 1.02),
    )
    rank.legend(fontsize="small", ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curve(axes: Any, report: Mapping[str, Any]) -> None:
    steps = [row["step"] for row in report["curve"]]
    axes.plot(
        steps,
        [row["kl"] for row in report["curve"]],
        color="0.4",
        linewidth=0.8,
        label="KL per token (training)",
    )
    ends = report["phases"]
    axes.plot(
        [x["step"] for x in ends],
        [x["kl_cut"] for x in ends],
        "o",
        color="tab:red",
        label="KL held out, after the cut",
    )
    axes.set(title="training", xlabel="optimizer step", ylabel="KL", yscale="log")
    right = axes.twinx()
    for name, style in (("soft", "--"), ("hard", "-")):
        right.plot(
            steps,
            [row[name] for row in report["curve"]],
            style,
            color="tab:blue",
            linewidth=1,
            label=f"{name} retention",
        )
    right.set_ylabel("retention")
    for end in ends:
        axes.axvline(end["step"], color="0.8", linewidth=0.8)
        axes.annotate(
            end["phase"],
            (end["step"], 1.0),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize="small",
        )
    handles, labels = (
        a + b
        for a, b in zip(
            axes.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True
        )
    )
    axes.legend(handles, labels, fontsize="small", loc="lower left")
