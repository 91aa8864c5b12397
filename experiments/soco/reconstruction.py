"""Fixed against learned gates where nothing but one matrix is at stake: min ||(U diag(g) R - W) X||_F over gates g, r of them not zero.

The squared error is (g - 1)^T A (g - 1) with A = (U^T U) * (R G R^T). U has orthonormal columns, for the SVD of W and in the Gram norm,
so A is diagonal and every component stands alone: a kept gate is best at exactly 1 (no amplification makes up for what was pruned), and
the best components are those with the largest A_ii. Whatever a gate learns beyond that must come from the end-to-end loss. Checked here by
gradient descent on the full quadratic form, for real weights and Grams.

    python experiments/soco/reconstruction.py calibration=wikitext2_64x512      # Hydra overrides of model and calibration
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from cost import prepare
from specomp.factors import GramNorm
from specomp.ratio import rank_for_retention
from specomp.stages.calibrate import dense_statistics, linear_module
from specomp.statistics import Gram

from specomp.cache import Cache

STEPS, RATE, PRICE = 600, 0.05, 0.5
LINEARS = ("0.self_attn.q_proj", "10.self_attn.v_proj", "10.mlp.up_proj", "20.mlp.down_proj", "29.self_attn.o_proj")


def error(form: Tensor, gates: Tensor) -> Tensor:
    """||(U diag(g) R - W) X||_F over ||W X||_F."""
    off = gates - 1
    return (off @ form @ off / form.sum()).clamp_min(1e-12).sqrt()  # no slope where nothing is lost


def learned(form: Tensor, rank: int) -> Tensor:
    """Gates 2 sigmoid(s), trained on the error with a priced soft count, then the `rank` highest trained alone; the others are 0."""
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
    with_cache = Cache(next((x.removeprefix("paths.cache=") for x in overrides if x.startswith("paths.cache=")), "~/.cache/specomp"))
    setup, _, _ = prepare(with_cache, overrides)
    statistics = dense_statistics(setup, frozenset({Gram()}))
    print("| linear | basis | singular-value order | largest A_ii | learned | kept gates | off-diagonal A |\n|---|---|---|---|---|---|---|")
    for linear in (x for x in setup.linears if x.name.removeprefix("model.layers.") in LINEARS):
        W, gram = linear_module(setup.model, linear).weight.detach(), statistics(linear.name)[Gram()]
        rank = rank_for_retention(linear.m, linear.n, 0.6)
        for basis, norm in (("SVD of W", GramNorm(None)), ("Gram", GramNorm(gram))):
            spectrum = norm.decompose(W)
            form = (spectrum.U.T @ spectrum.U) * (spectrum.rows @ gram @ spectrum.rows.T)
            form = form / form.sum()
            size, diagonal = len(form), form.diagonal()
            gates = learned(form, rank)
            kept = gates[gates > 0]
            cells = [
                *(f"{error(form, only(size, x)):.4f}" for x in (torch.arange(rank), diagonal.topk(rank).indices)),
                f"{error(form, gates):.4f}",
                f"{kept.mean():.3f} +- {kept.std():.3f}",
                f"{(form - diagonal.diag()).norm() / form.norm():.1e}",
            ]
            print(f"| {linear.name.removeprefix('model.layers.')} (rank {rank} of {size}) | {basis} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
