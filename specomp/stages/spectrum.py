"""From spectra to trained gates: what surrounds stages/train.py.

What is kept of a trained spectrum (method.training.pruning) does not determine the training, so every ablation of it reads one run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specomp.cache import digest
from specomp.methods.base import Method, describe
from specomp.methods.spectrum import SpectrumTraining
from specomp.modules import GatedLinear, replace_linear
from specomp.ratio import Cost, Ratio, is_low_rank, pair_cost
from specomp.stages.decompose import DenseSpectra
from specomp.stages.fit import Result, fit, trained_once
from specomp.stages.setup import Setup
from specomp.stages.teacher import TeacherStates
from specomp.stages.train import HISTOGRAM, SpectrumModule

# Bumped whenever the same settings would train other scores.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training decided, per linear: gates (k,), which components still exist (k,), and d (m) or None; and how it went."""

    gates: dict[str, Tensor]
    alive: dict[str, Tensor]
    deviations: dict[str, Tensor | None]
    report: dict[str, Any]


def train(
    setup: Setup,
    method: Method,
    ratio: Ratio,
    ranks: Mapping[str, int],
    spectra: DenseSpectra,
    teacher: TeacherStates,
    *,
    seed: int,
    curve_file: Path,
    logger: Callable[[], Any],
) -> Trained:
    """Trained gates: from the cache, from a checkpoint on, or from the start. Raises UserError when the training diverges.

    ranks: components each linear starts with, the largest first; at or above break-even it starts with all of them.
    teacher: made while the model was dense.
    curve_file: csv with one line per optimizer step; logger: makes a Lightning logger, or None, asked only if there is something to train.
    """
    training, cache = settings_of(method), setup.cache
    settings = describe(training)
    pruning = settings.pop("pruning")
    pair, price = ([cost(x.m, x.n, 2) for x in setup.linears] for cost in (pair_cost, method.packing.stored))
    key = digest(
        {
            "version": VERSION,
            "spectra": spectra.key,
            "samples": setup.samples.hash,
            "half": setup.half_forward,
            "settings": settings | {"stages": {name: describe(phase) for name, phase in training.schedule.items()}},
            "exact_budget": pruning["exact_budget"],
            "retention": ratio.retention,
            "ranks": dict(ranks),
            "seed": seed,
        }
        | ({} if price == pair else {"price": price})
    )
    stored, content = trained_once(
        *(cache, key, "scores", curve_file),
        lambda folder: _fit(setup, method, ratio, ranks, spectra, teacher, seed, folder, curve_file, logger),
    )
    names = [x.name for x in setup.linears]
    return Trained(
        gates={name: training.gate.to_gate(stored[f"{name}.scores"]) for name in names},
        alive={name: stored[f"{name}.alive"] for name in names},
        deviations={name: stored.get(f"{name}.deviation") for name in names},
        report=content,
    )


def settings_of(method: Method) -> SpectrumTraining:
    """The training slot; that it is one for spectra was checked when the experiment was built."""
    assert isinstance(method.training, SpectrumTraining)
    return method.training


def _fit(
    setup: Setup,
    method: Method,
    ratio: Ratio,
    ranks: Mapping[str, int],
    spectra: DenseSpectra,
    teacher: TeacherStates,
    seed: int,
    folder: Path,
    curve_file: Path,
    logger: Callable[[], Any],
) -> Result:
    training = settings_of(method)
    gated = gate(setup, training, ranks, spectra, method.packing.stored)
    module = SpectrumModule(setup, training, ratio, teacher, gated, cost=method.packing.stored, seed=seed, curve_file=curve_file)
    scores = sum(len(x.scores) for x in gated.values())
    what = f"{scores} scores{' and biases' if training.deviation else ''} of {len(gated)} linears"
    stored, content = fit(setup, module, folder, logger(), what)
    return stored, content | {"initial_soft_retention": module.initial, "histogram_top": HISTOGRAM[1]}


def gate(
    setup: Setup, training: SpectrumTraining, ranks: Mapping[str, int], spectra: DenseSpectra, cost: Cost = pair_cost
) -> dict[str, GatedLinear]:
    """Replace every linear of the model by its gated components, in place."""
    setup.model.requires_grad_(False)
    dtype = torch.bfloat16 if training.precision == "bfloat16" else torch.float32
    gated = {}
    for linear in setup.linears:
        spectrum, bias = spectra(linear.name), setup.model.get_submodule(linear.name).bias
        module = GatedLinear(
            spectrum.U.to(dtype),
            spectrum.rows.to(dtype),
            bias,  # type: ignore[arg-type]
            to_gate=training.gate.to_gate,
            start=training.gate.start,
            deviation=training.deviation,
        )
        if is_low_rank(linear.m, linear.n, ranks[linear.name], cost):
            module.prune(torch.arange(len(spectrum.s), device=spectrum.s.device) < ranks[linear.name])
        replace_linear(setup.model, linear.name, module)
        gated[linear.name] = module
    return gated
