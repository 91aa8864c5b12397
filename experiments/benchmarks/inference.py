"""Compressed linears against dense ones at LLaMA-7B shapes, as a share of the ideal: the ratio of
their numbers, which is that of bytes and of multiply-adds alike.

    python experiments/benchmarks/inference.py
    python experiments/benchmarks/inference.py --device cuda --compile reduce-overhead

By default fp32 and bf16, 1 to 64 tokens at once, 40 % and 60 % compression; the second command
captures all of it as CUDA graphs.
Sites are timed as a decoder layer calls them: q, k and v on one input, gate and up on another, o
and down alone. `factors` are two factors a linear, `fused` the same with the first ones stacked
(specomp.models.fuse), `pivoted` rows and coefficients at its own, higher rank. Dense and compressed
take turns; printed is the median of the ratios of a turn, and their quartiles.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from specomp.evaluation.efficiency import now
from specomp.forms.factors import LowRankLinear
from specomp.forms.pivoted import PivotedLinear
from specomp.models.fuse import Stacked
from specomp.models.modules import TwoStage

SITES = {
    "q, k, v": ((4096, 4096),) * 3,
    "o": ((4096, 4096),),
    "gate, up": ((11008, 4096),) * 2,
    "down": ((4096, 11008),),
}
KINDS = ("factors", "fused", "pivoted")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--compression", type=float, nargs="+", default=[0.4, 0.6])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--compile", default=None, help="mode of torch.compile")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{chosen.device}, {chosen.threads} threads, {chosen.turns} turns\n")
    print("| site | dtype | tokens | compression | kind | dense ms | ratio (quartiles) ", end="")
    print(f"| ideal | share |\n|{'---|' * 9}")
    with torch.no_grad():
        for name, shapes in SITES.items():
            for dtype in chosen.dtype:
                for compression in chosen.compression:
                    site(name, shapes, dtype, compression, chosen)


def site(
    name: str,
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    compression: float,
    chosen: argparse.Namespace,
) -> None:
    """One site at one compression: every kind, every number of tokens."""
    place = {"dtype": DTYPES[dtype], "device": chosen.device}
    dense = [nn.Linear(n, m, bias=False, **place) for m, n in shapes]
    for kind in KINDS:
        if kind == "fused" and len(shapes) == 1:
            continue
        made = [factored(kind, m, n, compression, place) for m, n in shapes]
        if kind == "fused":
            Stacked(made)
        ideal = sum(m * n for m, n in shapes) / sum(p.numel() for x in made for p in x.parameters())
        for tokens in chosen.tokens:
            x = torch.randn(tokens, shapes[0][1], **place)
            calls = [timed(partial(each, linears), x, chosen.compile) for linears in (dense, made)]
            turns = [[call() for call in calls] for _ in range(chosen.turns + 1)][1:]
            low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4)
            milliseconds = 1e3 * statistics.median(a for a, _ in turns)
            print(
                f"| {name} | {dtype} | {tokens} | {compression:.0%} | {kind} | {milliseconds:.2f} "
                f"| {middle:.2f} ({low:.2f}-{high:.2f}) | {ideal:.2f} | {middle / ideal:.0%} |",
                flush=True,
            )


def each(linears: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """All of a site on one input."""
    return [linear(x) for linear in linears]


def factored(kind: str, m: int, n: int, compression: float, place: dict[str, object]) -> TwoStage:
    """A compressed linear of the rank that the compression pays for."""
    less = 1 if kind == "pivoted" else 0  # the r x r identity among pivot rows is not stored
    paid = (1 - compression) * m * n
    rank = max(r for r in range(1, min(m, n)) if r * (m + n - less * r) <= paid)
    made = (PivotedLinear if kind == "pivoted" else LowRankLinear)(n, m, rank, bias=False, **place)  # type: ignore[arg-type]
    if isinstance(made, PivotedLinear):  # outputs in an order as it comes
        made.order = torch.randperm(m, device=made.order.device).int()
    return made


def timed(call: Callable[[Tensor], object], x: Tensor, mode: str | None) -> Callable[[], float]:
    """Seconds of one call; several where one is too short for the clock."""
    run = torch.compile(call, mode=mode) if mode else call
    for _ in range(3):
        run(x)
    start = now(x.device)
    run(x)
    repeats = max(1, round(0.02 / max(now(x.device) - start, 1e-6)))

    def once() -> float:
        start = now(x.device)
        for _ in range(repeats):
            run(x)
        return (now(x.device) - start) / repeats

    return once


if __name__ == "__main__":
    main()
