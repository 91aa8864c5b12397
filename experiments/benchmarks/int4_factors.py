"""What 4 bits do to factors: relative output error ||(Q - U Vt) X|| / ||U Vt X|| of SVD-LLM's
factors at 40 %.

    python experiments/benchmarks/int4_factors.py calibration=wikitext2_64x512

Arguments are overrides of run.py, of model and calibration.
"""

import sys
from statistics import fmean
from typing import Any

from published import rank_of

from specomp.compression.calibrate import calibrate
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.numerics.factors import GramNorm, truncate
from specomp.numerics.statistics import Gram, Stats
from specomp.quantization.factors import FactorQuantizer
from specomp.slots import Chain

LINEARS = (
    "2.self_attn.q_proj",
    "8.self_attn.o_proj",
    "15.self_attn.k_proj",
    "15.mlp.down_proj",
    "28.mlp.up_proj",
)
GROUPS = {"bits": 4, "group_size": 128, "symmetric": True, "act_order": True, "damping": 0.01}
ROWS = GROUPS | {"group_size": None, "symmetric": False}
KINDS: dict[str, dict[str, Any]] = {
    "group 128, symmetric": GROUPS,
    "group 128, with zeros": GROUPS | {"symmetric": False},
    "per row": ROWS,
}
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"algorithm": "rtn", "order": "faithful", "rebalance": False},
    "nearest, rebalanced": {"algorithm": "rtn", "order": "faithful", "rebalance": True},
    "gptq": {"algorithm": "gptq", "order": "faithful", "rebalance": False},
    "gptq, sequential": {"algorithm": "gptq", "order": "sequential", "rebalance": False},
    "gptq, rebalanced": {"algorithm": "gptq", "order": "faithful", "rebalance": True},
    "gptq, rebalanced, sequential": {"algorithm": "gptq", "order": "sequential", "rebalance": True},
}


def main() -> None:
    """Print a table of means over a few linears."""
    experiment = typed("method=svd_llm", "benchmark=none", *sys.argv[1:])
    run = run_of(experiment, experiment.source.load(experiment.cache))
    statistics = calibrate(run, {Gram()})
    errors: dict[tuple[str, str], list[float]] = {}
    for linear in (x for x in run.linears if x.name.removeprefix("model.layers.") in LINEARS):
        gram = statistics(linear)[Gram()]
        weight = run.model.get_submodule(linear.name).weight.detach()
        factors = truncate(GramNorm(gram).decompose(weight), rank_of(linear.m, linear.n, 0.6))
        norm, product = GramNorm(gram.double()), factors.product().double()
        chain = Chain((factors.Vt, factors.U), lambda Vt, U: U @ Vt, free_basis=True)
        for kind, grid in KINDS.items():
            for way, settings in WAYS.items():
                quantizer, known = FactorQuantizer(**grid, **settings), Stats({Gram(): gram})
                Vt, U = quantizer(chain, known, weight.dtype)
                lost = norm.loss(U.values.double() @ Vt.values.double() - product)
                errors.setdefault((way, kind), []).append(lost / norm.loss(product))
    print("| |", " | ".join(KINDS), "|")
    print("|---|" + "---|" * len(KINDS))
    for way in WAYS:
        print(f"| {way} |", " | ".join(f"{fmean(errors[way, kind]):.4f}" for kind in KINDS), "|")


if __name__ == "__main__":
    main()
