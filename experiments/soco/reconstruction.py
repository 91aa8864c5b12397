"""Fixed against learned gates where nothing but one matrix is at stake: min over gates g, r of them
not zero, of ||(U diag(g) R - W) X||_F.

The squared error is (g - 1)^T A (g - 1) with A = (U^T U) * (R G R^T). U has orthonormal columns,
for the SVD of W and in the Gram norm, so A is diagonal and every component stands alone: a kept
gate is best at exactly 1 (no amplification makes up for what was pruned), and the best components
are those with the largest A_ii. Whatever a gate learns beyond that must come from the end-to-end
loss. Checked here by gradient descent on the full quadratic form, for real weights and Grams.

    python experiments/soco/reconstruction.py calibration=wikitext2_64x512

Arguments are overrides of run.py, of model and calibration.
"""

import sys

import torch
from torch import Tensor

from specomp.compression.calibrate import calibrate
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.numerics.factors import GramNorm
from specomp.numerics.ratio import break_even_rank
from specomp.numerics.statistics import Gram

STEPS, RATE, PRICE = 600, 0.05, 0.5
RETENTION = 0.6
LINEARS = (
    "0.self_attn.q_proj",
    "10.self_attn.v_proj",
    "10.mlp.up_proj",
    "20.mlp.down_proj",
    "29.self_attn.o_proj",
)
COLUMNS = (
    "linear",
    "basis",
    "singular-value order",
    "largest A_ii",
    "learned",
    "kept gates",
    "off-diagonal A",
)


def error(form: Tensor, gates: Tensor) -> Tensor:
    """||(U diag(g) R - W) X||_F over ||W X||_F."""
    off = gates - 1
    return (off @ form @ off / form.sum()).clamp_min(1e-12).sqrt()  # no slope where nothing is lost


def learned(form: Tensor, rank: int) -> Tensor:
    """Gates 2 sigmoid(s), trained on the error with a priced soft count, then the `rank` highest
    trained alone; the others are 0.
    """
    scores = torch.zeros(len(form), requires_grad=True)
    keep = torch.ones(len(form), dtype=torch.bool)
    for phase in ("choose", "refine"):
        optimizer = torch.optim.Adam([scores], lr=RATE)
        for _ in range(STEPS):
            gates = 2 * torch.sigmoid(scores) * keep
            excess = (torch.sigmoid((gates - 0.5) / 0.2).sum() - rank).clamp_min(0) / rank
            loss = error(form, gates) + PRICE * excess * (phase == "choose")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if phase == "choose":
            keep = torch.zeros_like(keep).index_fill_(0, scores.detach().topk(rank).indices, True)
    return (2 * torch.sigmoid(scores) * keep).detach()


def only(size: int, indices: Tensor) -> Tensor:
    """Gates 1 at indices, 0 elsewhere."""
    return torch.zeros(size).index_fill_(0, indices, 1.0)


def main(overrides: list[str]) -> None:
    """Print one row per linear and basis."""
    experiment = typed("method=svd_llm", "benchmark=none", *overrides)
    run = run_of(experiment, experiment.source.load(experiment.cache))
    statistics = calibrate(run, {Gram()})
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for linear in (x for x in run.linears if x.name.removeprefix("model.layers.") in LINEARS):
        W, gram = run.model.get_submodule(linear.name).weight.detach(), statistics(linear)[Gram()]
        rank = int(RETENTION * break_even_rank(linear.m, linear.n))
        for basis, norm in (("SVD of W", GramNorm(None)), ("Gram", GramNorm(gram))):
            spectrum = norm.decompose(W)
            form = (spectrum.U.T @ spectrum.U) * (spectrum.rows @ gram @ spectrum.rows.T)
            form = form / form.sum()
            size, diagonal = len(form), form.diagonal()
            gates = learned(form, rank)
            kept = gates[gates > 0]
            choices = (torch.arange(rank), diagonal.topk(rank).indices)
            cells = [
                f"{linear.name.removeprefix('model.layers.')} (rank {rank} of {size})",
                basis,
                *(f"{error(form, only(size, x)):.4f}" for x in choices),
                f"{error(form, gates):.4f}",
                f"{kept.mean():.3f} +- {kept.std():.3f}",
                f"{(form - diagonal.diag()).norm() / form.norm():.1e}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
