"""The plain slots: truncated SVD at a uniform ratio, stored as two factors, nothing repaired and nothing trained."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from specomp.budget import fill_ranks, floor_ranks, full_rank
from specomp.factors import GramNorm, LowRankFactors, Norm, QuantizedFactors
from specomp.linalg import SolveDtype
from specomp.methods.base import Probe, Spectra, StatsOf, Upstream
from specomp.models.family import LinearSpec
from specomp.modules import GridLinear, LowRankLinear
from specomp.phases import Trains
from specomp.ratio import Cost, Ratio, pair_cost
from specomp.settings import configurable
from specomp.statistics import Statistic, Stats


@configurable
class Weight:
    """Approximate the weight itself: T = W."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, W: Tensor, stats: Stats) -> Tensor:
        """W (m, n)."""
        return W


@configurable
class NoWhitening:
    """S = I: the Frobenius norm of the weight error."""

    solve: SolveDtype
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, stats: Stats) -> Norm:
        """Identity norm."""
        return GramNorm(None, solve=self.solve)


@configurable
class UniformAllocation:
    """The same retention for every linear (SVD-LLM: k = int(m n retention / (m + n)))."""

    # The published formula rounds every rank down; True spends what that leaves, to within one rank of the target.
    exact_budget: bool
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Ranks."""
        retention = {linear.name: target.retention for linear in linears}
        return fill_ranks(linears, retention, target.retention, cost) if self.exact_budget else floor_ranks(linears, retention, cost)


@configurable
class FullRank:
    """Every linear stays dense."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Ranks."""
        return {linear.name: full_rank(linear) for linear in linears}


@configurable
class NoCompensation:
    """The truncated factors are final."""

    upstream: ClassVar[Upstream] = "dense"
    num_samples: ClassVar[int | None] = None
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """The factors as they are."""
        return factors


@configurable
class NoTraining:
    """Calibration only: no gradient step on any parameter."""

    trains: ClassVar[Trains] = "nothing"


@configurable
class Factors:
    """Store U (m, r) and Vt (r, n): r (m + n) numbers."""

    def stored(self, m: int, n: int, rank: int) -> int:
        """r (m + n)."""
        return pair_cost(m, n, rank)

    def __call__(self, linear: nn.Linear, factors: LowRankFactors) -> nn.Module:
        """A LowRankLinear in the linear's dtype, on its device; rounded factors keep their grids."""
        old = linear.weight
        packed = LowRankLinear.from_factors(factors.U, factors.Vt, linear.bias, dtype=old.dtype, device=old.device)
        if isinstance(factors, QuantizedFactors):
            packed.u_proj, packed.v_proj = map(GridLinear.of, (packed.u_proj, packed.v_proj), factors.grids)
        return packed
