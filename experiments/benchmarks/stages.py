"""Allocation, packing, decomposition and evaluation of SmolLM2's shapes, each beside the
straightforward one: ratios of paired runs.

    python experiments/benchmarks/stages.py
    python experiments/benchmarks/stages.py --only pack --turns 9

decompose    eigenproblem of the smaller side      full SVD of W times a Cholesky factor
allocate     steps on the hulls of all curves      one component at a time from a heap
pack         rows by LU and exchanges              QR with column pivoting (as PIFA prints it)
evaluate     log-softmax of 128 tokens at a time   the loss transformers computes for labels

Calibration against one Gram a linear, and whole runs, are in cost.py; a further ratio in ratios.py.
Random numbers; printed are the medians of both sides, and the median and quartiles of the ratios of
their turns (alternative / ours).
"""

import argparse
import heapq
import statistics
import time
from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specomp.evaluation.perplexity import window_nll
from specomp.forms.factors import Factors
from specomp.forms.menu import options
from specomp.forms.pivoted import pivot_rows
from specomp.forms.prices import Numbers
from specomp.methods.global_loss import curve, least_loss
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.factors import GramNorm, Spectrum

SHAPES = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
LAYERS = 30
Pair = tuple[Callable[[], object], Callable[[], object]]


def decompose() -> Pair:
    """The linears of one decoder layer."""
    weights = [torch.randn(m, n) / n**0.5 for m, n in SHAPES.values()]
    grams = {
        n: (x := torch.randn(4 * n, n) * torch.logspace(0, -1.5, n)).T @ x for n in (576, 1536)
    }

    def full_svd() -> None:
        for W in weights:
            S = torch.linalg.cholesky(grams[W.shape[1]].double()).float()
            _, _, Vt = torch.linalg.svd(W @ S, full_matrices=False)
            torch.linalg.solve_triangular(S, Vt, upper=False, left=False)

    return lambda: [GramNorm(grams[W.shape[1]]).decompose(W) for W in weights], full_svd


def allocate() -> Pair:
    """All linears of SmolLM2 at 40 % compression; the alternative ignores that a linear may be
    cheaper dense.
    """
    linears = [
        LinearSpec(f"{i}.{kind}", m, n, i, 0, kind)
        for i in range(LAYERS)
        for kind, (m, n) in SHAPES.items()
    ]
    units = [Unit(x.name, "linear", (x,)) for x in linears]
    values = {
        x.name: torch.rand(min(x.m, x.n)).sort(descending=True).values * float(torch.rand(1))
        for x in linears
    }
    budget = int(0.6 * sum(x.params for x in linears))

    class Known:
        """Evidence of an allocation."""

        def spectrum(self, linear: LinearSpec) -> Spectrum:
            return Spectrum(torch.empty(0), values[linear.name], torch.empty(0))

    def ours() -> dict[Unit, int]:
        menu = options(units, [Factors()], Numbers(compression=0.4), torch.float32, Known(), None)  # type: ignore[arg-type]
        curves = {x: curve(offered, 1, normalize=False) for x, offered in menu.items()}
        return least_loss(curves, budget)

    def gain(x: LinearSpec, rank: int) -> float:
        return float(values[x.name][rank]) ** 2 / (x.m + x.n)

    def heap() -> dict[str, int]:
        ranks, left = {x.name: 1 for x in linears}, float(budget - sum(x.m + x.n for x in linears))
        waiting = [(-gain(x, 1), i) for i, x in enumerate(linears)]
        heapq.heapify(waiting)
        while waiting:
            _, i = heapq.heappop(waiting)
            x = linears[i]
            if x.m + x.n > left:
                continue
            ranks[x.name], left = ranks[x.name] + 1, left - x.m - x.n
            if ranks[x.name] < min(x.m, x.n):
                heapq.heappush(waiting, (-gain(x, ranks[x.name]), i))
        return ranks

    return ours, heap


def pack() -> Pair:
    """The linears of one decoder layer at the ranks of 40 % compression."""
    factors = []
    for m, n in SHAPES.values():
        rank = max(r for r in range(1, min(m, n)) if r * (m + n - r) <= 0.6 * m * n)
        U = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64))[0][:, :rank]
        factors.append(U * torch.logspace(0, -1, rank).double())

    def pivoted_qr() -> None:
        for U in factors:
            rank = U.shape[1]
            _, _, order = scipy.linalg.qr(U.numpy().T, mode="economic", pivoting=True)
            torch.linalg.solve(U[order[:rank]], U[order[rank:]], left=False)

    return lambda: [pivot_rows(U, 2.0) for U in factors], pivoted_qr


def evaluate() -> Pair:
    """Four windows of 512 tokens through two decoder layers of SmolLM2's shapes and vocabulary."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    config = LlamaConfig(num_hidden_layers=2, **heads, **shape)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(49152, (4, 512))

    def labels() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return lambda: window_nll(model, ids, 4), labels


STAGES = {"decompose": decompose, "allocate": allocate, "pack": pack, "evaluate": evaluate}


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    print("| stage | alternative | ours | ratio (quartiles) |\n|---|---|---|---|")
    for name in chosen.only:
        ours, alternative = STAGES[name]()
        turns = [(seconds(alternative), seconds(ours)) for _ in range(chosen.turns + 1)][1:]
        low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4)
        a, b = (1e3 * statistics.median(column) for column in zip(*turns, strict=True))
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        print(f"| {name} | {a:.1f} ms | {b:.1f} ms | {ratio} |", flush=True)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
