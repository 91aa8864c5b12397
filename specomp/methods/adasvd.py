"""AdaSVD: Adaptive Singular Value Decomposition for Large Language Models (arXiv:2502.01403).

AdaComp   alternating least-squares repair of U and Vt     Sec. 3.1, Eq. 5-13, 16
          on all samples, on stacked batches (Eq. 14-15) or on the few samples that fit
AdaCR     retention per decoder layer from its importance  Sec. 3.2, Eq. 17-21
Whitening is SVD-LLM's; it is only composed, in conf/method/adasvd.yaml.

Notation: the paper's X is (n, tokens); we keep G = X X^T (n, n), which is all that Eq. 6-13 need,
so memory does not grow with the number of samples. Starting from the whitened optimum of the same G
both steps are fixed points (tests): a gain can only come from other inputs, here those of the
compressed decoder layers before it (INFERENCE: the paper does not say which). Differs from the
paper: Eq. 13 prints (U^+)^T W, whose shapes do not fit; clipping of Eq. 20 to [mrr, 1] and meeting
the budget exactly are ours (CHOICE), each an option. Reference code: none published.
"""

from statistics import fmean
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from specomp.errors import UserError
from specomp.forms.options import Menu, chosen, fill, floor, water_fill
from specomp.models.family import Unit
from specomp.numerics.factors import (
    GramNorm,
    LowRankFactors,
    balanced,
    refit_left,
    refit_left_naive,
    refit_right,
)
from specomp.numerics.statistics import Gram, IOCosine, StackedGram, Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Choice, Reads, Upstream

# The factors stay positive: the smallest retention that raw Eq. 20 is clipped to when mrr is 0.
_LEAST_RETENTION = 0.01


@configurable
class AdaComp:
    """(U, Vt) -> (U^1, Vt^1) -> ... -> (U^tau, Vt^tau), U first (Eq. 16)."""

    iterations: Annotated[int, Field(ge=1)]
    update: Literal["pseudo_inverse", "naive"]
    # gram: all samples, exactly; mean: the printed average over num_buckets stacks; off: only
    # num_buckets samples, unaveraged.
    stack_of_batch: Literal["gram", "mean", "off"]
    num_buckets: Annotated[int, Field(ge=1)]
    upstream: Upstream
    active: ClassVar[bool] = True

    @property
    def num_samples(self) -> int | None:
        """Without stacking only what fits is read (the paper's 'NC' curve of Figure 3b)."""
        return self.num_buckets if self.stack_of_batch == "off" else None

    @property
    def statistic(self) -> Statistic:
        """Where X X^T comes from."""
        return StackedGram(self.num_buckets) if self.stack_of_batch == "mean" else Gram()

    @property
    def needs(self) -> frozenset[Statistic]:
        """One kind of Gram."""
        return frozenset({self.statistic})

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """Alternate `iterations` times."""
        gram, Vt = stats[self.statistic], factors.Vt
        refit = refit_left if self.update == "pseudo_inverse" else refit_left_naive
        for _ in range(self.iterations):
            U = refit(target, Vt, gram)  # Eq. 6 / 12
            Vt = refit_right(target, U)  # Eq. 7 / 13
        return balanced(U.float(), Vt.float())

    def loss(self, error: Tensor, stats: Stats) -> float:
        """||error X||_F on the inputs it reads."""
        return GramNorm(stats[self.statistic]).loss(error)


@configurable
class AdaCR:
    """CR = mrr + I_n (trr - mrr), one per decoder layer (Eq. 20); all three are retention ratios,
    I_n its importance over the mean.
    """

    # trr - mrr. The paper's tables: 0.10 is best at 40, 50 and 60 % (Table 3d).
    min_retention_gap: Annotated[float, Field(ge=0, lt=1)]
    # block_influence: 1 - cos, which is what Figure 4 shows (INFERENCE); cosine: Eq. 18 as printed,
    # with which all I_n are nearly 1.
    importance: Literal["block_influence", "cosine"]
    # water_filling: clip to [mrr, 1] and shift the level until the budget is met (CHOICE); raw: Eq.
    # 20-21, clipped to what exists.
    budget: Literal["water_filling", "raw"]
    needs: ClassVar[frozenset[Statistic]] = frozenset({IOCosine()})
    compresses: ClassVar[bool] = True
    needs_spectra: ClassVar[bool] = False

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices."""
        linears = {y.decoder_layer: y for x in menu for y in x.linears}
        cosine = {layer: float(reads.stats(x)[IOCosine()]) for layer, x in sorted(linears.items())}
        importance = normalized_importance(cosine, self.importance)
        trr, mrr = share, max(0.0, share - self.min_retention_gap)
        least = max(mrr, min(_LEAST_RETENTION, trr))
        base = dict.fromkeys(menu, mrr)
        # a unit may be of several decoder layers
        slope = {x: fmean(importance[y.decoder_layer] for y in x.linears) for x in menu}
        if self.budget == "raw":
            raw = {unit: max(least, base[unit] + slope[unit] * (trr - mrr)) for unit in menu}
            return chosen(menu, floor(menu, raw))
        return chosen(menu, fill(menu, water_fill(menu, base, slope, trr, least), trr))


def normalized_importance(
    cosine: dict[int, float], kind: Literal["block_influence", "cosine"]
) -> dict[int, float]:
    """I_n = I / mean(I) per decoder layer (Eq. 19), I = cos as printed (Eq. 18) or 1 - cos
    (ShortGPT's block influence).
    """
    importance = {
        layer: 1.0 - value if kind == "block_influence" else value
        for layer, value in cosine.items()
    }
    mean = sum(importance.values()) / len(importance)
    if min(importance.values()) < 0 or mean <= 0:
        raise UserError(
            f"adaCR needs importances >= 0 with a positive mean, got {min(importance.values()):.3g}"
            f" to {max(importance.values()):.3g} ({kind}): choose another"
            " method.allocation.importance, or method/allocation=uniform."
        )
    return {layer: value / mean for layer, value in importance.items()}
