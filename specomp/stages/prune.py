"""What becomes of a trained spectrum: which components stay, and the linear that takes their place."""

import time

import torch
from torch import Tensor, nn

from specomp.budget import fill_ranks
from specomp.factors import balanced
from specomp.gates import GateBudget
from specomp.methods.base import Method, Quantizer
from specomp.methods.spectrum import SpectrumTraining
from specomp.models.family import LinearSpec
from specomp.modules import PivotedLinear, replace_linear
from specomp.ratio import Cost, Ratio, is_low_rank
from specomp.stages.calibrate import DenseStatistics
from specomp.stages.compress import LinearReport, errors_of, quantization_of, quantize
from specomp.stages.decompose import DenseSpectra
from specomp.stages.setup import Setup
from specomp.stages.spectrum import Trained, settings_of


def choose(
    linears: list[LinearSpec], trained: Trained, training: SpectrumTraining, ratio: Ratio, cost: Cost
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Indices of the components to keep, per linear, and what was counted on the way."""
    pruning = training.pruning
    budget = GateBudget(linears, [len(trained.gates[x.name]) for x in linears], cost=cost)
    alive = torch.cat([trained.alive[x.name] for x in linears])
    gates = torch.where(alive, torch.cat([trained.gates[x.name] for x in linears]), -1.0)
    exact = budget.threshold_for(gates, ratio.retention)
    threshold = exact if pruning.exact_budget else training.threshold
    masks = (budget.kept(gates, threshold) & alive).split(budget.counts)
    counts = {x.name: int(mask.sum()) for x, mask in zip(linears, masks, strict=True)}
    if pruning.ranks == "allocation":
        uniform = fill_ranks(linears, {x.name: ratio.retention for x in linears}, ratio.retention, cost)
        counts = {name: min(rank, len(trained.gates[name])) for name, rank in uniform.items()}
    chosen = {}
    for linear, mask in zip(linears, masks, strict=True):
        count, values = counts[linear.name], torch.where(trained.alive[linear.name], trained.gates[linear.name], -1.0)
        if pruning.order == "singular_value":
            chosen[linear.name] = torch.arange(count)
        elif pruning.ranks == "trained":
            chosen[linear.name] = mask.nonzero().flatten()
        else:
            chosen[linear.name] = values.topk(min(count, int(trained.alive[linear.name].sum()))).indices.sort().values
    account = {
        "threshold": threshold,
        "exact_threshold": exact,
        "exact_retention": budget.hard_retention(gates, exact),
        "fixed_threshold": training.threshold,
        "fixed_retention": budget.hard_retention(gates, training.threshold),
    }
    return chosen, account


@torch.no_grad()
def pack(
    setup: Setup,
    method: Method,
    quantizer: Quantizer,
    ratio: Ratio,
    trained: Trained,
    spectra: DenseSpectra,
    dense: DenseStatistics,
    before: DenseSpectra,
) -> tuple[list[LinearReport], dict[str, Tensor], dict[str, float]]:
    """Prune, merge the gates into the factors, and store them as every method does. Returns reports, kept indices per linear, counts.

    spectra: what was trained; before: of the dense model, which errors are measured against.
    """
    training = settings_of(method)
    chosen, account = choose(setup.linears, trained, training, ratio, method.packing.stored)
    reports, out_of_order, kept = [], 0, 0
    for linear in setup.linears:
        start, name, index = time.perf_counter(), linear.name, chosen[linear.name]
        module, spectrum = setup.model.get_submodule(name), spectra(linear.name)
        device = spectrum.U.device
        index, stats = index.to(device), dense(name)
        gates = trained.gates[name].to(device).where(trained.alive[name].to(device), 1.0)  # of a component that training dropped: as it was
        if training.pruning.values == "plain":
            gates = torch.ones_like(gates)
        factors = balanced(spectrum.U[:, index] * gates[index], spectrum.rows[index])
        whole = nn.Linear(linear.n, linear.m, bias=False, device="meta")
        whole.weight = nn.Parameter(factors.product().to(setup.model.dtype))
        whole.register_parameter("bias", _bias(module, trained.deviations[name], whole.weight))
        low = is_low_rank(linear.m, linear.n, len(index), method.packing.stored)
        rounded = quantize(quantizer, factors, stats, setup.model.dtype, name) if low else factors
        packed = method.packing(whole, rounded) if low else whole
        replace_linear(setup.model, name, packed.requires_grad_(False))
        out_of_order += int((index >= len(index)).sum())
        kept += len(index)
        complete, norm = before(name), method.whitening(stats)
        target = complete.U @ complete.rows
        merged: Tensor = packed.merged_weight() if low else whole.weight.float()  # type: ignore[operator, assignment]
        reports.append(
            LinearReport(
                name=name,
                m=linear.m,
                n=linear.n,
                rank=len(index) if low else min(linear.m, linear.n),
                stored=sum(p.numel() for part, p in packed.named_parameters() if not part.endswith("bias")),
                dense=not low,
                damping=spectrum.damping,
                growth=packed.growth() if isinstance(packed, PivotedLinear) else None,
                seconds=time.perf_counter() - start,
                **errors_of(merged, target, norm, complete, len(index)),
                **quantization_of(factors, rounded, norm),  # type: ignore[arg-type]
            )
        )
    return reports, chosen, account | {"kept": kept, "kept_out_of_order": out_of_order}


def _bias(module: nn.Module, deviation: Tensor | None, weight: Tensor) -> nn.Parameter | None:
    """b + d in the dtype of the weight; None where there is neither."""
    parts = [x.detach().to(weight.device, torch.float32) for x in (module.bias, deviation) if x is not None]  # type: ignore[operator, union-attr]
    return nn.Parameter(torch.stack(parts).sum(0).to(weight.dtype)) if parts else None
