"""INT4 on what is stored: matrices applied one after the other, each rounded as the weight of a
linear of its own (AdaSVD Table 4).

The published setting is SVD-LLM's script (svdllm_gptq.sh, quant_llama.py; AdaSVD follows it): GPTQ
of Vt with the Gram G of the linear's inputs, of U with V^T G V, the Gram of the unrounded Vt's
outputs. Notation: W ~= U Vt, U (m, r), Vt (r, n), G (n, n). Factors truncated in the norm of the
same G have V^T G V diagonal (components are orthogonal in it), so GPTQ of their U is rounding to
the nearest: only repaired, trained or rebalanced factors, other norms and order=sequential leave it
something to do. Differs from the script, which rounds a finished model: inputs are those the
compress stage has (of the dense model; or of the compressed and rounded decoder layers before,
where the method streams them), not those of rounded linears in the same decoder layer.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from specomp.numerics.factors import LowRankFactors
from specomp.numerics.grid import GridSpec
from specomp.numerics.linalg import SOLVE_DTYPE, congruence
from specomp.numerics.statistics import AbsMean, Gram, OutputGradGram, Statistic, Stats
from specomp.quantization.gptq import gptq_each
from specomp.quantization.rtn import OnGrid, Spacing, round_to_nearest
from specomp.quantization.scaled import Scaled, scales_for
from specomp.settings import configurable
from specomp.slots import Chain, Form, Rounded


@configurable
class FactorQuantizer:
    """Rounds U and Vt to `bits` bits. Every setting is explained in
    conf/quantizer/gptq_int4.yaml.
    """

    algorithm: Literal["gptq", "rtn"]
    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    symmetric: bool
    act_order: bool
    damping: Annotated[float, Field(ge=0, le=1)]
    order: Literal["faithful", "sequential"]
    rebalance: bool
    search: Annotated[int, Field(ge=0, le=64)] = 0
    scaling: Annotated[int, Field(ge=0, le=100)] = 0
    output_damping: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "FactorQuantizer":
        if self.output_damping and (self.algorithm == "rtn" or self.scaling):
            raise ValueError(
                "output_damping is of algorithm=gptq without scaling: set it to null beside others"
            )
        return self

    @property
    def grid(self) -> GridSpec:
        """What it rounds to."""
        return GridSpec(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scaled=bool(self.scaling),
        )

    @property
    def grids(self) -> tuple[GridSpec, ...]:
        """The one."""
        return (self.grid,)

    def single(self, packing: Form) -> list[Form]:
        """The packing alone."""
        return [packing]

    def wide(self, forms: Sequence[Form]) -> Sequence[Form]:
        """The forms as they are."""
        return forms

    @property
    def needs(self) -> frozenset[Statistic]:
        """Rounding to nearest looks at no inputs, the choice of scales at their size."""
        found: set[Statistic] = {AbsMean()} if self.scaling else set()
        found |= {OutputGradGram()} if self.output_damping else set()
        return frozenset(found | ({Gram()} if found or self.algorithm == "gptq" else set()))

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """The rounded matrices, in float32, and their grids, whose scales are stored in the model's
        dtype (float16 for float32 models). Raises ValueError when the Gram is not finite.
        """
        return self.each([self], chain, stats, dtype)[0]

    def each(
        self, rules: Sequence["FactorQuantizer"], chain: Chain, stats: Stats, dtype: torch.dtype
    ) -> list[tuple[Rounded, ...]]:
        """The same by each of several rules that differ from this one in their grid alone."""
        matrices = chain.matrices
        if self.rebalance and chain.free_basis:
            Vt, U = matrices
            factors = rebalanced(LowRankFactors(U, Vt))
            matrices = (factors.Vt, factors.U)
        scale_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
        spacings = [
            Spacing(
                bits=x.bits,
                group_size=x.group_size,
                symmetric=x.symmetric,
                scale_dtype=scale_dtype,
                search=x.search,
            )
            for x in rules
        ]
        if self.scaling:
            return [self._scaled(matrices, stats, x) for x in spacings]
        found: list[list[OnGrid]]
        if self.algorithm == "rtn":
            found = [[round_to_nearest(x, s) for x in matrices] for s in spacings]
        elif self.order == "faithful" or len(matrices) == 1:
            by_matrix, G = [], stats[Gram()]
            for index, matrix in enumerate(matrices):
                B = self._outputs(chain, matrices, stats, index)
                by_matrix.append(self._gptq(matrix, G, spacings, chain.mask, B))
                if index + 1 < len(matrices):
                    G = congruence(matrix.to(SOLVE_DTYPE), G)
            found = [list(x) for x in zip(*by_matrix, strict=True)]
        else:
            found = [[] for _ in spacings]
            for mine, spacing in zip(found, spacings, strict=True):
                G = stats[Gram()]
                for index, matrix in enumerate(matrices):
                    B = self._outputs(chain, matrices, stats, index)
                    mine += self._gptq(matrix, G, [spacing], outputs=B)
                    G = congruence(mine[-1].values().to(SOLVE_DTYPE), G)
        return [tuple(Rounded(x.values(), x.grid, x.damping) for x in mine) for mine in found]

    def _scaled(
        self, matrices: Sequence[Tensor], stats: Stats, spacing: Spacing
    ) -> tuple[Rounded, ...]:
        """Every matrix with scales of its own, each on what the unrounded ones before put out, or
        the rounded ones.
        """
        found, G = list[Rounded](), stats[Gram()]
        size = stats.get(AbsMean())  # of the linear's own inputs; else the root of their energy
        for matrix in matrices:
            weight = matrix.float()
            size = G.diagonal().clamp_min(0).sqrt() if size is None else size
            scale = scales_for(weight, G, size, self.scaling, spacing)
            weight, seen = weight / scale.float(), scale[:, None].double() * G.double() * scale
            if self.algorithm == "rtn":
                on_grid = round_to_nearest(weight, spacing, seen.diagonal())
            else:
                (on_grid,) = self._gptq(weight, seen, [spacing])
            inner = on_grid.values()
            found.append(Scaled(inner * scale.float(), on_grid.grid, on_grid.damping, scale, inner))
            passed = matrix if self.order == "faithful" else found[-1].values
            G, size = congruence(passed.to(SOLVE_DTYPE), G), None
        return tuple(found)

    def _gptq(
        self,
        matrix: Tensor,
        G: Tensor,
        spacings: Sequence[Spacing],
        mask: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> list[OnGrid]:
        return gptq_each(
            matrix,
            G,
            spacings,
            act_order=self.act_order,
            damping=self.damping,
            mask=mask,
            outputs=outputs,
            output_damping=self.output_damping or 1.0,
        )

    def _outputs(
        self, chain: Chain, matrices: Sequence[Tensor], stats: Stats, index: int
    ) -> Tensor | None:
        """B of the outputs of one of the matrices, where errors of outputs count together."""
        if not self.output_damping or chain.lefts is None or chain.mask is not None:
            return None
        B, left = stats[OutputGradGram()], chain.lefts(matrices)[index]
        if left is None:
            return B
        if left.ndim == 1:
            return B[left][:, left]
        return congruence(left.T.to(SOLVE_DTYPE), B)

    def notes(self, damping: Sequence[float]) -> list[str]:
        """Where more damping was needed than was asked for."""
        more = [x for x in damping if x > self.damping]
        if not more:
            return []
        return [
            f"GPTQ of {len(more)} linears needed more damping than {self.damping:g}, at most"
            f" {max(more):.1e} of their mean diagonal"
        ]


def rebalanced(factors: LowRankFactors) -> LowRankFactors:
    """The same product with orthogonal components, Sigma^{1/2} on each side: an SVD of U Vt through
    QR of both factors, in float64.
    """
    Q, R = torch.linalg.qr(factors.U.to(SOLVE_DTYPE))
    P, L = torch.linalg.qr(factors.Vt.to(SOLVE_DTYPE).T)
    A, s, Bt = torch.linalg.svd(R @ L.T)
    return LowRankFactors((Q @ (A * s.sqrt())).float(), (s.sqrt()[:, None] * Bt @ P.T).float())
