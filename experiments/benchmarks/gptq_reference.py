"""Our GPTQ against gptqmodel's on real factors: relative output error ||(Q - W) X|| / ||W X|| of
both, and their quotient.

The factors are SVD-LLM's at 40 % of linears of SmolLM2, with the Grams of its calibration set: W is
Vt with G, or U with V^T G V. gptqmodel sees a root of the Gram as its inputs, so both minimize the
same. It is no dependency of specomp; in a folder of its own:

    pip download --no-deps --no-binary :all: gptqmodel==7.7.0 && tar xzf gptqmodel-7.7.0.tar.gz
    pip install --no-deps --target extra pypcre logbar device-smi tokenicer defuser
    export PYTHONPATH=gptqmodel-7.7.0:extra:.
    python experiments/benchmarks/gptq_reference.py calibration=wikitext2_64x512

Arguments are overrides of run.py, of model and calibration.
"""

import math
import sys

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from published import rank_of
from torch import Tensor, nn

from specomp.compression.calibrate import calibrate
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.numerics.factors import GramNorm, truncate
from specomp.numerics.linalg import congruence
from specomp.numerics.statistics import Gram
from specomp.quantization.gptq import gptq
from specomp.quantization.rtn import Spacing, round_to_nearest

LINEARS = ("2.self_attn.q_proj", "15.self_attn.k_proj", "15.mlp.down_proj", "28.mlp.up_proj")
# name: (group_size, symmetric, act_order); with act_order and groups, gptqmodel is told to keep
# static groups, as ours does
SETTINGS = {
    "per row, asymmetric, act-order": (None, False, True),
    "per row, symmetric, natural order": (None, True, False),
    "group 128, symmetric, act-order": (128, True, True),
    "group 128, asymmetric, natural order": (128, False, False),
}
DAMPING = 0.01


def reference(
    weight: Tensor, gram: Tensor, group_size: int | None, symmetric: bool, act_order: bool
) -> Tensor:
    """gptqmodel's rounded weight (m, n), by its class for one linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    static = act_order and group_size is not None
    grid = {"bits": 4, "group_size": group_size or -1, "sym": symmetric}
    order = {"desc_act": act_order, "static_groups": static, "act_group_aware": False}
    config = QuantizeConfig(**grid, **order, damp_percent=DAMPING, mse=0.0, fallback=None)
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    values, vectors = torch.linalg.eigh(gram.double())
    task.add_batch((vectors * values.clamp_min(0).sqrt()).T.float()[None], torch.empty(0))
    return task.quantize()[0].float()


def error(rounded: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Relative output error."""
    norm = GramNorm(gram.double())
    return norm.loss((rounded - weight).double()) / norm.loss(weight.double())


def main() -> None:
    """Print one line per linear, factor and setting."""
    experiment = typed("method=svd_llm", "benchmark=none", *sys.argv[1:])
    run = run_of(experiment, experiment.source.load(experiment.cache))
    statistics = calibrate(run, {Gram()})
    quotients: dict[str, list[float]] = {name: [] for name in SETTINGS}
    columns = f"{'gptqmodel':>10} {'ours':>10} {'ours/its':>9} {'nearest':>9}"
    print(f"{'linear, factor, setting':<72} {columns}")
    for linear in (x for x in run.linears if x.name.removeprefix("model.layers.") in LINEARS):
        gram = statistics(linear)[Gram()]
        weight = run.model.get_submodule(linear.name).weight.detach()
        factors = truncate(GramNorm(gram).decompose(weight), rank_of(linear.m, linear.n, 0.6))
        through = congruence(factors.Vt.double(), gram)
        for part, factor, seen in (("Vt", factors.Vt, gram), ("U", factors.U, through)):
            whose = f"{linear.name.removeprefix('model.layers.')} {part} {tuple(factor.shape)}"
            for name, (group_size, symmetric, act_order) in SETTINGS.items():
                grid = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
                spacing = Spacing(**grid, scale_dtype=torch.float16)
                theirs = reference(factor, seen, group_size, symmetric, act_order)
                mine = gptq(factor, seen, spacing, act_order=act_order, damping=DAMPING).values()
                nearest = round_to_nearest(factor, spacing).values()
                a, b, c = (error(x, factor, seen) for x in (theirs, mine, nearest))
                quotients[name].append(b / a)
                figures = f"{a:>10.5f} {b:>10.5f} {b / a:>9.4f} {c:>9.5f}"
                print(f"{f'{whose}, {name}':<72} {figures}", flush=True)
    for name, found in quotients.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        print(f"{name:<40} ours / gptqmodel: mean {mean:.4f}, {min(found):.4f} to {max(found):.4f}")


if __name__ == "__main__":
    main()
