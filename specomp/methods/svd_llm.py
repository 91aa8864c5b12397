"""SVD-LLM: Truncation-aware singular value decomposition (arXiv:2403.07378), and its version 2 (arXiv:2503.12340).

GramWhitening      S with S S^T = X X^T; every such S gives the same W'             Sec. 3.1, Theorem 3.2
CholeskyWhitening  the published route: Cholesky, inverse, SVD                      Algorithm 1
UpdateU            closed-form refit of U on inputs from the compressed model       arXiv v1 Sec. 3.2; the code's step 2
TypeLossAllocation heterogeneous ratios per weight type                             V2 Sec. 3.1, Algorithm 1
V2's two-SVD truncation has the same optimum as GramWhitening, so it needs no slot of its own (methods agree to rounding, tested).
Reference code: AIoT-MLSys-Lab/SVD-LLM; none published for V2, whose printed pseudo-code does not type-check: see type_losses.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from specomp.budget import fill_ranks, floor_ranks, water_fill
from specomp.errors import UserError
from specomp.factors import CholeskyNorm, GramNorm, LowRankFactors, Norm, balanced, refit_left
from specomp.linalg import SolveDtype
from specomp.methods.base import Probe, Spectra, StatsOf, Upstream
from specomp.models.family import LinearSpec
from specomp.ratio import Cost, Ratio, rank_for_retention, retained
from specomp.settings import configurable
from specomp.statistics import Gram, Statistic, Stats


@configurable
class GramWhitening:
    """||(W' - W) X||_F on the calibration inputs, without a Cholesky factor or an inverse."""

    solve: SolveDtype
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __call__(self, stats: Stats) -> Norm:
        """Gram norm."""
        return GramNorm(stats[Gram()], solve=self.solve)


@configurable
class CholeskyWhitening:
    """The same norm through S = chol(G + damping); the damping that was needed is recorded."""

    start_damping: Annotated[float, Field(gt=0)]
    max_damping: Annotated[float, Field(gt=0)]
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __call__(self, stats: Stats) -> Norm:
        """Gram norm by Cholesky."""
        return CholeskyNorm(stats[Gram()], self.start_damping, self.max_damping)


@configurable
class UpdateU:
    """U = argmin ||U Vt X' - W X'||_F with X' the inputs that the compressed decoder layers before it produce."""

    upstream: Upstream
    num_samples: Annotated[int, Field(ge=1)] | None
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """Factors with U refitted."""
        U = refit_left(target, factors.Vt, stats[Gram()])
        return balanced(U.float(), factors.Vt)


@configurable
class TypeLossAllocation:
    """V2, Algorithm 1: among the linears of one type, those that lose more are compressed less."""

    # CHOICE: the paper does not bound the ratios; one removing everything would leave rank 0.
    max_compression: Annotated[float, Field(gt=0, lt=1)]
    exact_budget: bool
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Ranks."""
        groups: dict[str, list[LinearSpec]] = defaultdict(list)
        for linear in linears:
            groups[linear.kind].append(linear)
        ranks: dict[str, int] = {}
        for members in groups.values():
            losses = {x.name: spectra(x.name).tail(rank_for_retention(x.m, x.n, target.retention, cost)) for x in members}
            removed = type_losses(losses, target.compression)
            retention = {name: retained(share) for name, share in removed.items()}
            # Clipping moves the group's mean: the level restores it.
            level = water_fill(members, retention, dict.fromkeys(retention, 1.0), target.retention, retained(self.max_compression))
            ranks |= fill_ranks(members, level, target.retention, cost) if self.exact_budget else floor_ranks(members, level, cost)
        return ranks


def type_losses(losses: dict[str, float], compression: float) -> dict[str, float]:
    """R_i = N R l_i / sum_j l_j with l_i = 1 / log(L_i): fraction to remove per linear of one type (V2 Sec. 3.1).

    Needs L_i > 1: raw losses of a sum over tokens are; a normalized loss would flip the sign. Raises UserError otherwise.
    """
    smallest = min(losses, key=lambda name: losses[name])
    if losses[smallest] <= 1 + 1e-6:
        raise UserError(
            f"SVD-LLM V2 divides by log(loss), but {smallest} loses only {losses[smallest]:.3g} (must exceed 1): "
            "calibrate on more tokens, or use method/allocation=uniform."
        )
    inverse = {name: 1 / math.log(loss) for name, loss in losses.items()}
    total = sum(inverse.values())
    return {name: len(losses) * compression * share / total for name, share in inverse.items()}
