"""Figures, drawn off screen. Everything in them is also a number in a record or a csv beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from specomp.cache import atomic_path
from specomp.models.family import LinearSpec

BINS = 24


def gate_profiles(
    linears: Sequence[LinearSpec], gates: Mapping[str, Tensor], alive: Mapping[str, Tensor], chosen: Mapping[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """By kind of linear: gates (pruned: 0) and share kept in BINS equal ranges of the component index, means over decoder layers.

    gates, alive: (k,) per linear; chosen: indices kept. Component 0 has the largest singular value.
    """
    found = {}
    for kind in dict.fromkeys(x.kind for x in linears):
        names = [x.name for x in linears if x.kind == kind]
        gate = _mean([_profile(torch.where(alive[name], gates[name], 0.0)) for name in names])
        kept = _mean([_profile(_indicator(len(gates[name]), chosen[name])) for name in names])
        found[kind] = {"gate": [round(x, 4) for x in gate.tolist()], "kept": [round(x, 4) for x in kept.tolist()]}
    return found


def training_figure(
    path: Path,
    linears: Sequence[LinearSpec],
    gates: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
    report: Mapping[str, Any],
) -> None:
    """What a training of gates did, as a PNG: its curve, gates and kept share by component index, ranks per decoder layer.

    gates: (k,) per linear; chosen: indices kept; report: as stored in the record, with its profiles, and the curve.
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
        rank.plot([x.decoder_layer for x in members], [len(chosen[x.name]) / len(gates[x.name]) for x in members], marker=".", label=label)
    gate.set(title="gate by component (mean over decoder layers; pruned: 0)", xlabel="component index / k", ylabel="S")
    rank.set(title="components kept", xlabel="decoder layer", ylabel="rank / k", ylim=(0, 1.02))
    kept.set(title="share kept by component: a step if in singular-value order", xlabel="component index / k", ylim=(0, 1.02))
    rank.legend(fontsize="small", ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curve(axes: Any, report: Mapping[str, Any]) -> None:
    steps = [row["step"] for row in report["curve"]]
    axes.plot(steps, [row["kl"] for row in report["curve"]], color="0.4", linewidth=0.8, label="KL per token (training)")
    ends = report["phases"]
    axes.plot([x["step"] for x in ends], [x["kl_cut"] for x in ends], "o", color="tab:red", label="KL held out, after the cut")
    axes.set(title="training", xlabel="optimizer step", ylabel="KL", yscale="log")
    right = axes.twinx()
    for name, style in (("soft", "--"), ("hard", "-")):
        right.plot(steps, [row[name] for row in report["curve"]], style, color="tab:blue", linewidth=1, label=f"{name} retention")
    right.set_ylabel("retention")
    for end in ends:
        axes.axvline(end["step"], color="0.8", linewidth=0.8)
        axes.annotate(end["phase"], (end["step"], 1.0), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize="small")
    handles, labels = (a + b for a, b in zip(axes.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True))
    axes.legend(handles, labels, fontsize="small", loc="lower left")


def _indicator(size: int, indices: Tensor) -> Tensor:
    values = torch.zeros(size)
    values[indices.cpu()] = 1
    return values


def _profile(values: Tensor) -> Tensor:
    """Means (BINS,) over equal ranges of the index, whatever the length."""
    return torch.nn.functional.adaptive_avg_pool1d(values.float().cpu()[None, None], BINS)[0, 0]


def _mean(profiles: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(profiles)).mean(0)
