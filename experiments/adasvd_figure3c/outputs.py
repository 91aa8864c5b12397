"""AdaSVD (arXiv:2502.01403) Figure 3c: how a linear's outputs are distributed, dense, truncated,
and repaired by adaComp.

The paper prints one overlap of histograms before (0.9504) and after 15 iterations (0.9980), not of
which linear, in which bins or from which start. Here: BINS equal bins between the dense outputs'
0.1 and 99.9 percentiles, the ends open; overlap = sum of the smaller of both shares, 1 when equal.
Beside it ||(W' - W) X||_F / ||W X||_F, which a distribution says nothing about.

    python experiments/adasvd_figure3c/outputs.py calibration=wikitext2_64x512 ratio=cr60

Arguments are overrides of run.py.
"""

import csv
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specomp.compression.calibrate import calibrate
from specomp.compression.run import Run
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.models.family import LinearSpec
from specomp.numerics.factors import GramNorm, truncate
from specomp.numerics.ratio import break_even_rank
from specomp.numerics.statistics import Gram
from specomp.rows import slot
from specomp.tables.charts import histograms

BINS, SAMPLES, ITERATIONS = 200, 8, (0, 1, 3, 15)
HERE = Path(__file__).parent


def inputs_of(run: Run, linears: list[LinearSpec]) -> dict[str, Tensor]:
    """What the linears see of the first SAMPLES, (tokens, n)."""
    found: dict[str, Tensor] = {}

    def see(name: str, _: Any, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0].flatten(0, -2).float()

    modules = {x.name: run.model.get_submodule(x.name) for x in linears}
    hooks = [module.register_forward_pre_hook(partial(see, x)) for x, module in modules.items()]
    tokens = run.samples.tokens[:SAMPLES].to(run.model.device)
    run.family.decoder(run.model)(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def shares(y: Tensor, edges: Tensor) -> Tensor:
    """(BINS,) shares of the outputs."""
    bins = torch.bucketize(y.flatten(), edges[1:-1])
    return torch.bincount(bins, minlength=BINS).double() / y.numel()


@torch.no_grad()
def main(overrides: list[str]) -> None:
    """One row per linear, start and number of iterations; a figure of what adaComp helps most."""
    experiment = typed("method=adasvd", "benchmark=none", *overrides)
    run = run_of(experiment, experiment.source.load(experiment.cache))
    statistics = calibrate(run, {Gram()})
    linears = [x for x in run.linears if x.decoder_layer == len(run.layers) // 2]
    inputs = inputs_of(run, linears)
    rows, figure, most = [], "", float("-inf")
    for linear in linears:
        W, X = run.model.get_submodule(linear.name).weight.float(), inputs[linear.name]
        stats, dense = statistics(linear), X @ W.T
        flat = dense.flatten().sort().values
        low, high = float(flat[len(flat) // 1000]), float(flat[-len(flat) // 1000])
        edges = torch.linspace(low, high, BINS + 1).to(dense.device)
        before = shares(dense, edges)
        rank = int(run.budget.share(run.model.dtype) * break_even_rank(linear.m, linear.n))
        for start, gram in (("svd", None), ("whitened", stats[Gram()])):
            factors, found, overlap = truncate(GramNorm(gram).decompose(W), rank), {}, {}
            for count in ITERATIONS:
                repaired = factors
                if count:
                    repair = slot("compensation", "adacomp", iterations=count, upstream="dense")
                    repaired = repair(W, factors, stats)
                outputs = X @ repaired.product().T
                found[count] = shares(outputs, edges)
                overlap[count] = float(torch.minimum(before, found[count]).sum())
                error = float((outputs - dense).norm() / dense.norm())
                row = [linear.kind, rank, start, count, f"{overlap[count]:.4f}", f"{error:.4f}"]
                rows.append(row)
            first, last = ITERATIONS[0], ITERATIONS[-1]
            if (gain := overlap[last] - overlap[first]) > most:
                lines = {
                    "dense": before,
                    "truncated": found[first],
                    f"{last} iterations": found[last],
                }
                centres = (edges[1:] + edges[:-1]) / 2
                title = f"{linear.name}, {start}, rank {rank}"
                drawn = {name: line.tolist() for name, line in lines.items()}
                figure, most = histograms(centres.tolist(), drawn, f"output of {title}"), gain
    with (HERE / "outputs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = ["linear", "rank", "start", "iterations", "overlap", "output error"]
        writer.writerows([header, *rows])
    (HERE / "outputs.svg").write_text(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
