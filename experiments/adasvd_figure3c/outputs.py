"""AdaSVD (arXiv:2502.01403) Figure 3c: how a linear's outputs are distributed, dense, truncated, and repaired by adaComp.

The paper prints one overlap of histograms before (0.9504) and after 15 iterations (0.9980), not of which linear, in which bins or from
which start. Here: BINS equal bins between the dense outputs' 0.1 and 99.9 percentiles, the ends open; overlap = sum of the smaller of both
shares, 1 when equal. Beside it ||(W' - W) X||_F / ||W X||_F, which a distribution says nothing about.

    python experiments/adasvd_figure3c/outputs.py calibration=wikitext2_64x512 ratio=cr60   # Hydra overrides
"""

import csv
import sys
from pathlib import Path

import torch
from specomp.factors import GramNorm, truncate
from specomp.pipeline import load_dense
from specomp.ratio import rank_for_retention
from specomp.results.charts import histograms
from specomp.results.record import Record
from specomp.stages.calibrate import dense_statistics, linear_module
from specomp.statistics import Gram, Stats
from torch import Tensor

from specomp.experiment import typed
from specomp.methods.adasvd import AdaComp

BINS, SAMPLES, ITERATIONS = 200, 8, (0, 1, 3, 15)
HERE = Path(__file__).parent


def shares(y: Tensor, edges: Tensor) -> Tensor:
    """(BINS,) shares of the outputs."""
    return torch.bincount(torch.bucketize(y.flatten(), edges[1:-1]), minlength=BINS).double() / y.numel()


@torch.no_grad()
def main(overrides: list[str]) -> None:
    """One row per linear, start and number of iterations; a figure of the linear that adaComp helps most."""
    experiment = typed("method=adasvd", "benchmark=none", *overrides)
    setup = load_dense(experiment, Record(key="figure"))
    statistics = dense_statistics(setup, frozenset({Gram()}))
    middle = len(setup.layers) // 2
    linears = [x for x in setup.linears if x.decoder_layer == middle]
    inputs: dict[str, Tensor] = {}
    hooks = [
        linear_module(setup.model, x).register_forward_pre_hook(lambda _, args, name=x.name: inputs.update({name: args[0].flatten(0, -2)}))
        for x in linears
    ]
    setup.family.decoder(setup.model)(input_ids=setup.samples.tokens[:SAMPLES].to(setup.model.device), use_cache=False)
    for hook in hooks:
        hook.remove()

    rows, drawn, best = [], {}, 0.0
    for linear in linears:
        W, X, gram = linear_module(setup.model, linear).weight.float(), inputs[linear.name].float(), statistics(linear.name)[Gram()]
        dense = X @ W.T
        flat = dense.flatten().sort().values
        edges = torch.linspace(float(flat[len(flat) // 1000]), float(flat[-len(flat) // 1000]), BINS + 1)
        before = shares(dense, edges)
        rank = rank_for_retention(linear.m, linear.n, experiment.ratio.retention)
        for start, norm in (("svd", GramNorm(None)), ("whitened", GramNorm(gram))):
            factors, found = truncate(norm.decompose(W), rank), {}
            for count in ITERATIONS:
                comp = AdaComp(iterations=max(1, count), update="pseudo_inverse", stack_of_batch="gram", num_buckets=16, upstream="dense")
                repaired = comp(W, factors, Stats({Gram(): gram})) if count else factors
                outputs = X @ repaired.product().float().T
                found[count] = (outputs, float(torch.minimum(before, shares(outputs, edges)).sum()))
                error = float((outputs - dense).norm() / dense.norm())
                rows.append([linear.kind, rank, start, count, f"{found[count][1]:.4f}", f"{error:.4f}"])
            if (gain := found[ITERATIONS[-1]][1] - found[0][1]) > best:
                best = gain
                drawn = {"dense": before, "truncated": shares(found[0][0], edges), "15 iterations": shares(found[15][0], edges)}
                title, centres = f"{linear.name}, {start}, rank {rank}", (edges[1:] + edges[:-1]) / 2
    with (HERE / "outputs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["linear", "rank", "start", "iterations", "overlap", "output error"], *rows])
    (HERE / "outputs.svg").write_text(histograms(centres.tolist(), {k: v.tolist() for k, v in drawn.items()}, f"output of {title}"))


if __name__ == "__main__":
    main(sys.argv[1:])
