"""ASVD: Activation-aware singular value decomposition (arXiv:2312.05821).

ActivationWhitening    S = diag(mean |x|)^alpha                                      Sec. 3.2
SensitivityAllocation  perplexity of cutting one linear at a time, then one cut      Sec. 3.3 (STRS)
Differs from the paper's code: exact SVD instead of a randomized one; the last cut tried is the one
applied (theirs can be off by one); the head is not compressed, as everywhere here. Reference code:
hahnyuan/ASVD4LLM.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from specomp.errors import UserError
from specomp.forms.options import Menu, chosen, floor, priced_in
from specomp.models.family import Unit
from specomp.numerics.factors import GramNorm, Norm
from specomp.numerics.linalg import SolveDtype
from specomp.numerics.statistics import AbsMean, Statistic, Stats
from specomp.progress import track
from specomp.settings import configurable
from specomp.slots import Choice, Reads

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
    """Sensitivity-based truncation rank search: each (linear, candidate retention) is tried alone;
    the least harmful cuts are kept.
    """

    # Retentions tried per linear; the lowest bounds what the search can reach.
    candidates: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    compresses: ClassVar[bool] = True
    needs_spectra: ClassVar[bool] = True

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices. Raises UserError when even the deepest cuts miss the target."""
        trials = []
        pairs = [(unit, candidate) for unit in menu for candidate in self.candidates]
        for unit, candidate in track(pairs, "sensitivity", len(pairs)):
            index = floor({unit: menu[unit]}, {unit: candidate})[unit]
            trials.append((reads.probe(unit, menu[unit].choice(index)), unit, index))
        return chosen(menu, cut(trials, menu, share))


def cut(trials: Sequence[tuple[float, Unit, int]], menu: Menu, share: float) -> dict[Unit, int]:
    """Apply the fewest, least harmful trials (loss, unit, index of an option) that bring what is
    stored to a share of the dense units.
    """
    dense = sum(x.dense for x in menu.values())
    budget, used, at = share * dense, dense, {unit: options.last for unit, options in menu.items()}
    # A cut that breaks the model has no loss to compare (NaN): tried last.
    for loss, unit, index in sorted(trials, key=lambda trial: (math.isnan(trial[0]), trial[0])):
        if used <= budget:
            break
        lower, prices = min(index, at[unit]), menu[unit].prices
        used += float(prices[lower] - prices[at[unit]])
        at[unit] = lower
        log.debug("cut %s to option %d (loss alone %.4f)", unit.name, lower, loss)
    if used > budget:
        raise UserError(
            f"The deepest candidates keep {used / budget * share:.3f} of the"
            f" {priced_in(menu).currency}, the target is {share:.3f}: add lower values to"
            " method.allocation.candidates."
        )
    return at
