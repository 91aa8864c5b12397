"""INT4 on the factors: both factors of a low-rank linear rounded, each as the weight of a linear of its own (AdaSVD Table 4).

The published setting is SVD-LLM's script (svdllm_gptq.sh, quant_llama.py; AdaSVD follows it): GPTQ of Vt with the Gram G of the linear's
inputs, of U with V^T G V, the Gram of the unrounded Vt's outputs. Notation: W ~= U Vt, U (m, r), Vt (r, n), G (n, n).
Factors truncated in the norm of the same G have V^T G V diagonal (components are orthogonal in it), so GPTQ of their U is rounding to the
nearest: only repaired, trained or rebalanced factors, other norms and order=sequential leave it something to do.
Differs from the script, which rounds a finished model: inputs are those the compress stage has (of the dense model; or of the compressed
and rounded decoder layers before, where the method streams them), not those of rounded linears in the same decoder layer.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from specomp.factors import LowRankFactors, QuantizedFactors
from specomp.linalg import SOLVE_DTYPE, congruence
from specomp.quantization.gptq import gptq
from specomp.quantization.rtn import Rounded, Spacing, round_to_nearest
from specomp.settings import configurable
from specomp.statistics import Gram, Statistic, Stats


@configurable
class FactorQuantizer:
    """Rounds U and Vt to `bits` bits. Every setting is explained in conf/quantizer/gptq_int4.yaml."""

    algorithm: Literal["gptq", "rtn"]
    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    symmetric: bool
    act_order: bool
    damping: Annotated[float, Field(ge=0, le=1)]
    order: Literal["faithful", "sequential"]
    rebalance: bool

    @property
    def needs(self) -> frozenset[Statistic]:
        """Rounding to nearest looks at no inputs."""
        return frozenset({Gram()}) if self.algorithm == "gptq" else frozenset()

    def __call__(self, factors: LowRankFactors, stats: Stats, dtype: torch.dtype) -> QuantizedFactors:
        """The rounded factors, in float32, and their grids, whose scales are stored in the model's dtype (float16 for float32 models).

        Raises ValueError when the Gram is not finite.
        """
        if self.rebalance:
            factors = rebalanced(factors)
        spacing = Spacing(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16,
        )
        if self.algorithm == "rtn":
            return _quantized(round_to_nearest(factors.U, spacing), round_to_nearest(factors.Vt, spacing))
        G = stats[Gram()]
        Vt = self._gptq(factors.Vt, G, spacing)
        seen = factors.Vt if self.order == "faithful" else Vt.values()
        return _quantized(self._gptq(factors.U, congruence(seen.to(SOLVE_DTYPE), G), spacing), Vt)

    def _gptq(self, weight: Tensor, gram: Tensor, spacing: Spacing) -> Rounded:
        return gptq(weight, gram, spacing, act_order=self.act_order, damping=self.damping)


def rebalanced(factors: LowRankFactors) -> LowRankFactors:
    """The same product with orthogonal components, Sigma^{1/2} on each side: an SVD of U Vt through QR of both factors, in float64."""
    Q, R = torch.linalg.qr(factors.U.to(SOLVE_DTYPE))
    P, L = torch.linalg.qr(factors.Vt.to(SOLVE_DTYPE).T)
    A, s, Bt = torch.linalg.svd(R @ L.T)
    return LowRankFactors((Q @ (A * s.sqrt())).float(), (s.sqrt()[:, None] * Bt @ P.T).float())


def _quantized(U: Rounded, Vt: Rounded) -> QuantizedFactors:
    return QuantizedFactors(U.values(), Vt.values(), grids=(U.grid, Vt.grid), damping=max(U.damping, Vt.damping))
