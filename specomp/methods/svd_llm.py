"""SVD-LLM: Truncation-aware singular value decomposition (arXiv:2403.07378), and its version 2
(arXiv:2503.12340).

GramWhitening       S with S S^T = X X^T; every such S gives the same W' (Sec. 3.1, Theorem 3.2)
CholeskyWhitening   the published route: Cholesky, inverse, SVD (Algorithm 1)
UpdateU             closed-form refit of U on inputs from the compressed model (arXiv v1, Sec. 3.2;
                    the code's step 2)
TypeLossAllocation  heterogeneous ratios per weight type (V2, Sec. 3.1, Algorithm 1)

V2's two-SVD truncation has the same optimum as GramWhitening, so it needs
no slot of its own (methods agree to rounding, tested). Reference code: AIoT-MLSys-Lab/SVD-LLM; none
published for V2, whose printed pseudo-code does not type-check: see type_losses.
"""

import math
from collections import defaultdict
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from specomp.errors import UserError
from specomp.forms.options import Menu, Options, chosen, fill, floor, water_fill
from specomp.models.family import Unit
from specomp.numerics.factors import (
    CholeskyNorm,
    GramNorm,
    LowRankFactors,
    Norm,
    balanced,
    refit_left,
)
from specomp.numerics.linalg import SolveDtype
from specomp.numerics.ratio import retained
from specomp.numerics.statistics import Gram, Statistic, Stats
from specomp.progress import track
from specomp.settings import configurable
from specomp.slots import Choice, Reads, Upstream


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
    """U = argmin ||U Vt X' - W X'||_F with X' the inputs that the compressed decoder layers before
    it produce.
    """

    upstream: Upstream
    num_samples: Annotated[int, Field(ge=1)] | None
    active: ClassVar[bool] = True
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """Factors with U refitted."""
        U = refit_left(target, factors.Vt, stats[Gram()])
        return balanced(U.float(), factors.Vt)

    def loss(self, error: Tensor, stats: Stats) -> float:
        """||error X'||_F on the inputs it reads."""
        return GramNorm(stats[Gram()]).loss(error)


@configurable
class TypeLossAllocation:
    """V2, Algorithm 1: among the linears of one type, those that lose more are compressed less."""

    # CHOICE: the paper does not bound the ratios; one removing everything would leave rank 0.
    max_compression: Annotated[float, Field(gt=0, lt=1)]
    exact_budget: bool
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    compresses: ClassVar[bool] = True
    needs_spectra: ClassVar[bool] = True

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices."""
        groups: dict[tuple[str, ...], dict[Unit, Options]] = defaultdict(dict)
        for unit, options in track(menu.items(), "predict losses", len(menu)):
            groups[tuple(x.kind for x in unit.linears)][unit] = options
            _ = (
                options.losses
            )  # asked for here, where progress is told: it may take a decomposition
        found: dict[Unit, Choice] = {}
        for members in groups.values():
            losses = {
                unit: math.sqrt(float(x.losses[x.affordable(share)])) for unit, x in members.items()
            }
            retention = {
                unit: retained(removed)
                for unit, removed in type_losses(losses, retained(share)).items()
            }
            # Clipping moves the group's mean: the level restores it.
            level = water_fill(
                members,
                retention,
                dict.fromkeys(retention, 1.0),
                share,
                retained(self.max_compression),
            )
            found |= chosen(
                members, fill(members, level, share) if self.exact_budget else floor(members, level)
            )
        return found


def type_losses(losses: dict[Unit, float], compression: float) -> dict[Unit, float]:
    """R_i = N R l_i / sum_j l_j with l_i = 1 / log(L_i): fraction to remove per linear of one type
    (V2 Sec. 3.1).

    Needs L_i > 1: raw losses of a sum over tokens are; a normalized loss would flip the sign.
    Raises UserError otherwise.
    """
    smallest = min(losses, key=lambda name: losses[name])
    if losses[smallest] <= 1 + 1e-6:
        raise UserError(
            f"SVD-LLM V2 divides by log(loss), but {smallest.name} loses only"
            f" {losses[smallest]:.3g} (must exceed 1): calibrate on more tokens, or use"
            " method/allocation=uniform."
        )
    inverse = {name: 1 / math.log(loss) for name, loss in losses.items()}
    total = sum(inverse.values())
    return {name: len(losses) * compression * share / total for name, share in inverse.items()}
