"""From spectra to trained gates, and to the components they keep: what surrounds gated.py.

What is kept of a trained spectrum (method.training.pruning) does not determine the training, so
every ablation of it reads one run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specomp.cache import digest
from specomp.compression.run import Run
from specomp.compression.spectra import Spectra
from specomp.forms.menu import options
from specomp.forms.options import DENSE, fill
from specomp.forms.prices import Numbers, numbers
from specomp.models.family import LinearSpec, Unit
from specomp.models.modules import replace_linear
from specomp.numerics.factors import LowRankFactors, balanced
from specomp.numerics.gates import GateBudget
from specomp.numerics.ratio import retained
from specomp.slots import Choice, describe
from specomp.training.fit import Result, fit, trained_once
from specomp.training.gated import HISTOGRAM, GatedLinear, SpectrumModule, price_of
from specomp.training.phases import SpectrumSettings
from specomp.training.teacher import TeacherStates

# Bumped whenever the same settings would train other scores.
VERSION = 1
BINS = 24


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What training decided, per linear: gates (k,), which components still exist (k,), and d (m)
    or None; and how it went.
    """

    gates: dict[str, Tensor]
    alive: dict[str, Tensor]
    deviations: dict[str, Tensor | None]
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GatedChoice:
    """The components that are kept, with their gates: what the forms of a trained model are made
    of.
    """

    choices: dict[Unit, Choice]
    by: str
    account: Mapping[str, Any]
    gains: Mapping[str, float | None]
    trained: Gates
    kept: Mapping[str, Tensor]  # indices of components, by linear
    components: Spectra
    plain: bool  # components without their gates
    left: frozenset[str] = frozenset()

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        """The kept components, each times its gate; `rank` of them."""
        spectrum, name = self.components(linear), linear.name
        device = spectrum.U.device
        index = self.kept[name].to(device)
        # Of a component that training dropped: as it was.
        gates = self.trained.gates[name].to(device).where(self.trained.alive[name].to(device), 1.0)
        if self.plain:
            gates = torch.ones_like(gates)
        return balanced(spectrum.U[:, index] * gates[index], spectrum.rows[index])

    def bias(self, linear: LinearSpec, old: Tensor | None) -> Tensor | None:
        """b + d; None where there is neither."""
        parts = [x for x in (old, self.trained.deviations[linear.name]) if x is not None]
        device = self.components(linear).U.device
        return (
            torch.stack([x.detach().to(device, torch.float32) for x in parts]).sum(0)
            if parts
            else None
        )


def train(
    run: Run,
    settings: SpectrumSettings,
    choices: Mapping[Unit, Choice],
    components: Spectra,
    teacher: TeacherStates,
    *,
    target: float,
    gains: Mapping[str, float | None],
    by: str,
) -> GatedChoice:
    """Train gates and choose: from the cache, from a checkpoint on, or from the start. Raises
    UserError when the training diverges.

    choices: of an allocation: components each linear starts with, the largest first; dense ones
    start with all of them. components: what is trained, of the dense model or of what is stored;
    target: the retention wanted.
    """
    with run.progress.stage("train"):
        trained = _trained(run, settings, choices, components, teacher, target)
    kept, pruning = choose(run, settings, trained, target)
    out_of_order = sum(int((index >= len(index)).sum()) for index in kept.values())
    pruning |= {"kept": sum(map(len, kept.values())), "kept_out_of_order": out_of_order}
    profiles = gate_profiles(run.linears, trained.gates, trained.alive, kept)
    account = {name: value for name, value in trained.report.items() if name != "curve"} | {
        "samples": run.training_samples.num_samples,
        "samples_hash": run.training_samples.hash,
        "pruning": pruning,
        "profiles": profiles,
    }
    run.progress.trained(
        account | {"curve": trained.report["curve"]}, (run.linears, trained.gates, kept)
    )
    return GatedChoice(
        choices={unit: stored_as(run, unit, len(kept[unit.linears[0].name])) for unit in run.units},
        by=by,
        account=account,
        gains=gains,
        trained=trained,
        kept=kept,
        components=components,
        plain=settings.pruning.values == "plain",
    )


def stored_as(run: Run, unit: Unit, rank: int) -> Choice:
    """In the method's form where that saves parameters at this rank, dense where not."""
    form = run.method.packing
    if rank in form.sizes(unit) and numbers(form.parts(unit, rank)) < unit.params:
        return Choice(form, rank)
    return Choice(DENSE, DENSE.sizes(unit)[0])


def _trained(
    run: Run,
    settings: SpectrumSettings,
    choices: Mapping[Unit, Choice],
    components: Spectra,
    teacher: TeacherStates,
    target: float,
) -> Gates:
    described = describe(settings)
    pruning = described.pop("pruning")
    starts = {unit.name: choice.size for unit, choice in choices.items()}
    price = [numbers(run.method.packing.parts(unit, 2)) for unit in run.units]
    pair = [2 * (x.m + x.n) for x in run.linears]
    key = digest(
        {
            "version": VERSION,
            "spectra": components.key,
            "samples": run.training_samples.hash,
            "half": run.half_forward,
            "settings": described
            | {"stages": {name: describe(phase) for name, phase in settings.schedule.items()}},
            "exact_budget": pruning["exact_budget"],
            "retention": target,
            "ranks": starts,
            "seed": run.seed,
        }
        | ({} if price == pair else {"price": price})
    )

    def fitted(folder: Path) -> Result:
        gated = gate(run, settings, choices, components)
        module = SpectrumModule(run, settings, teacher, gated, target)
        scores = sum(len(x.scores) for x in gated.values())
        what = (
            f"{scores} scores{' and biases' if settings.deviation else ''} of {len(gated)} linears"
        )
        stored, content = fit(run, module, folder, what)
        return stored, content | {
            "initial_soft_retention": module.initial,
            "histogram_top": HISTOGRAM[1],
        }

    stored, content = trained_once(run.cache, key, "scores", run.progress.curve_file, fitted)
    names = [x.name for x in run.linears]
    return Gates(
        gates={name: settings.gate.to_gate(stored[f"{name}.scores"]) for name in names},
        alive={name: stored[f"{name}.alive"] for name in names},
        deviations={name: stored.get(f"{name}.deviation") for name in names},
        report=content,
    )


def gate(
    run: Run, settings: SpectrumSettings, choices: Mapping[Unit, Choice], components: Spectra
) -> dict[str, GatedLinear]:
    """Replace every linear of the model by its gated components, in place."""
    run.model.requires_grad_(False)
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    gated = {}
    for unit, choice in choices.items():
        (linear,) = unit.linears
        spectrum, bias = components(linear), run.model.get_submodule(linear.name).bias
        module = GatedLinear(
            spectrum.U.to(dtype),
            spectrum.rows.to(dtype),
            bias,  # type: ignore[arg-type]
            to_gate=settings.gate.to_gate,
            start=settings.gate.start,
            deviation=settings.deviation,
        )
        if choice.form != DENSE:
            module.prune(torch.arange(len(spectrum.s), device=spectrum.s.device) < choice.size)
        replace_linear(run.model, linear.name, module)
        gated[linear.name] = module
    return gated


def choose(
    run: Run, settings: SpectrumSettings, trained: Gates, target: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Indices of the components to keep, per linear, and what was counted on the way."""
    pruning, linears = settings.pruning, run.linears
    counts = [len(trained.gates[x.name]) for x in linears]
    budget = GateBudget([(x.m, x.n) for x in linears], counts, price_of(run.method.packing))
    alive = torch.cat([trained.alive[x.name] for x in linears])
    gates = torch.where(alive, torch.cat([trained.gates[x.name] for x in linears]), -1.0)
    exact = budget.threshold_for(gates, target)
    threshold = exact if pruning.exact_budget else settings.threshold
    masks = (budget.kept(gates, threshold) & alive).split(budget.counts)
    ranks = {x.name: int(mask.sum()) for x, mask in zip(linears, masks, strict=True)}
    if pruning.ranks == "allocation":
        menu = options(
            run.units,
            [run.method.packing],
            Numbers(compression=retained(target)),
            run.model.dtype,
            None,  # type: ignore[arg-type]
            None,
        )
        uniform = fill(menu, dict.fromkeys(menu, target), target)
        ranks = {
            unit.name: min(menu[unit].choice(i).size, len(trained.gates[unit.name]))
            for unit, i in uniform.items()
        }
    chosen = {}
    for linear, mask in zip(linears, masks, strict=True):
        count, exists = ranks[linear.name], trained.alive[linear.name]
        if pruning.order == "singular_value":
            chosen[linear.name] = torch.arange(count)
        elif pruning.ranks == "trained":
            chosen[linear.name] = mask.nonzero().flatten()
        else:
            values = torch.where(exists, trained.gates[linear.name], -1.0)
            chosen[linear.name] = values.topk(min(count, int(exists.sum()))).indices.sort().values
    account = {
        "threshold": threshold,
        "exact_threshold": exact,
        "exact_retention": budget.hard_retention(gates, exact),
        "fixed_threshold": settings.threshold,
        "fixed_retention": budget.hard_retention(gates, settings.threshold),
    }
    return chosen, account


def gate_profiles(
    linears: Sequence[LinearSpec],
    gates: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
) -> dict[str, dict[str, list[float]]]:
    """By kind of linear: gates (pruned: 0) and share kept in BINS equal ranges of the component
    index, means over decoder layers.

    gates, alive: (k,) per linear; chosen: indices kept. Component 0 has the largest singular value.
    """

    def profile(values: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool1d(values.float().cpu()[None, None], BINS)[0, 0]

    def mean(rows: list[Tensor]) -> list[float]:
        return [round(x, 4) for x in torch.stack(rows).mean(0).tolist()]

    found = {}
    for kind in dict.fromkeys(x.kind for x in linears):
        names = [x.name for x in linears if x.kind == kind]
        kept = [
            torch.zeros(len(gates[name])).index_fill(0, chosen[name].cpu(), 1.0) for name in names
        ]
        found[kind] = {
            "gate": mean([profile(torch.where(alive[name], gates[name], 0.0)) for name in names]),
            "kept": mean([profile(x) for x in kept]),
        }
    return found
