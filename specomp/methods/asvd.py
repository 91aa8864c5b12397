"""ASVD: Activation-aware singular value decomposition (arXiv:2312.05821).

ActivationWhitening    S = diag(mean |x|)^alpha                                      Sec. 3.2
SensitivityAllocation  perplexity of cutting one linear at a time, then one cut      Sec. 3.3 (STRS)
Differs from the paper's code: exact SVD instead of a randomized one; the last cut tried is the one applied (theirs can be off
by one); the head is not compressed, as everywhere here. Reference code: hahnyuan/ASVD4LLM.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from specomp.budget import floor_ranks, full_rank, stored
from specomp.errors import UserError
from specomp.factors import GramNorm, Norm
from specomp.linalg import SolveDtype
from specomp.methods.base import Probe, Spectra, StatsOf
from specomp.models.family import LinearSpec
from specomp.progress import track
from specomp.ratio import Cost, Ratio, pair_cost
from specomp.settings import configurable
from specomp.statistics import AbsMean, Statistic, Stats

log = logging.getLogger(__name__)


@configurable
class ActivationWhitening:
    """||(W' - W) D||_F with D = diag(mean |x|^alpha + eps)."""

    alpha: Annotated[float, Field(ge=0)]
    eps: Annotated[float, Field(gt=0)]
    solve: SolveDtype
    needs: ClassVar[frozenset[Statistic]] = frozenset({AbsMean()})

    def __call__(self, stats: Stats) -> Norm:
        """Diagonal norm."""
        return GramNorm((stats[AbsMean()] ** self.alpha + self.eps) ** 2, solve=self.solve)


@configurable
class SensitivityAllocation:
    """Sensitivity-based truncation rank search: each (linear, candidate retention) is tried alone; the least harmful cuts are kept."""

    # Retentions tried per linear; the lowest bounds what the search can reach.
    candidates: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Ranks. Raises UserError when even the deepest cuts miss the target."""
        trials = []
        pairs = [(linear, share) for linear in linears for share in self.candidates]
        for linear, share in track(pairs, "sensitivity", len(pairs)):
            rank = floor_ranks([linear], {linear.name: share}, cost)[linear.name]
            trials.append((probe(linear.name, rank), linear, rank))
        return cut(trials, linears, target.retention, cost)


def cut(
    trials: Sequence[tuple[float, LinearSpec, int]], linears: Sequence[LinearSpec], target: float, cost: Cost = pair_cost
) -> dict[str, int]:
    """Apply the fewest, least harmful trials (loss, linear, rank) that bring the stored parameters to the target."""
    budget = target * sum(linear.params for linear in linears)
    ranks = {linear.name: full_rank(linear) for linear in linears}
    used = sum(linear.params for linear in linears)
    # A cut that breaks the model has no loss to compare (NaN): tried last.
    for loss, linear, rank in sorted(trials, key=lambda trial: (math.isnan(trial[0]), trial[0])):
        if used <= budget:
            break
        lower = min(rank, ranks[linear.name])
        used += stored(linear, lower, cost) - stored(linear, ranks[linear.name], cost)
        ranks[linear.name] = lower
        log.debug("cut %s to rank %d (loss alone %.4f)", linear.name, lower, loss)
    if used > budget:
        raise UserError(
            f"The deepest candidates keep {used / budget * target:.3f} of the parameters, the target is {target:.3f}: "
            "add lower values to method.allocation.candidates."
        )
    return ranks
