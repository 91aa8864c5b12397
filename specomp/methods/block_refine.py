"""Block refinement: after a decoder layer is packed, its linears are fitted to the outputs of the dense one (AA-SVD, arXiv:2604.02119).

BlockRefine   some steps of Adam on   mean_t ||f'(h'_t) - f(h_t)||^2 / ||f(h_t)||^2

f is the dense decoder layer on the dense model's hidden states h, f' the packed one on those of the compressed model before it. Each
token counts relative to its own length, as the norm of the next decoder layer sees it; otherwise the few tokens with massive activations
would be all that is fitted (CHOICE, as is every number in conf/method/compensation/block_refine.yaml). Linears that stay dense are fitted
too. Local: no gradient leaves the decoder layer.
"""

from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from specomp.factors import LowRankFactors
from specomp.methods.base import Upstream
from specomp.settings import configurable
from specomp.statistics import Statistic, Stats


@configurable
class BlockRefine:
    """Settings of the fit; the factors of a linear alone are left as they are."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, lt=1)]
    learning_rate_final: Annotated[float, Field(ge=0, le=1)]
    upstream: ClassVar[Upstream] = "compressed"
    num_samples: ClassVar[int | None] = None
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """The factors as they are: the decoder layer is refined as a whole (stages/refine.py)."""
        return factors


def output_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """(): mean over tokens of ||output_t - wanted_t||^2 / ||wanted_t||^2 for hidden states (..., hidden), in float32."""
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
