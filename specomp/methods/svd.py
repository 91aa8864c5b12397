"""The plain slots: truncated SVD at a uniform ratio; nothing compensated, refined or trained. The
target is compression.spectra.Weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from specomp.compression.spectra import Weight as Weight
from specomp.forms.options import Menu, chosen, fill, floor
from specomp.models.family import Unit
from specomp.numerics.factors import GramNorm, LowRankFactors, Norm
from specomp.numerics.linalg import SolveDtype
from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Choice, LayerBatches, Method, Reads, Upstream


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
    """The same retention for every unit (SVD-LLM: k = int(m n retention / (m + n)))."""

    # The published formula rounds every rank down; True spends what that leaves, to within one rank
    # of the target.
    exact_budget: bool
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    compresses: ClassVar[bool] = True
    needs_spectra: ClassVar[bool] = False

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices."""
        retention = dict.fromkeys(menu, share)
        return chosen(
            menu, fill(menu, retention, share) if self.exact_budget else floor(menu, retention)
        )


@configurable
class FullRank:
    """Every unit in full: in the packing where that is a form in full, else dense."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    compresses: ClassVar[bool] = False
    needs_spectra: ClassVar[bool] = False

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices."""
        found = {}
        for unit, options in menu.items():
            form = next(x for x in options.forms if x.size_of == "whole")
            found[unit] = Choice(form, form.sizes(unit)[0])
        return found


@configurable
class NoCompensation:
    """The truncated factors are final."""

    active: ClassVar[bool] = False
    upstream: ClassVar[Upstream] = "dense"
    num_samples: ClassVar[int | None] = None
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, target: Tensor, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """The factors as they are."""
        return factors

    def loss(self, error: Tensor, stats: Stats) -> float:
        """Nothing is compared."""
        return 0.0


@configurable
class NoRefinement:
    """Decoder layers stay as their units were stored."""

    active: ClassVar[bool] = False
    steps: ClassVar[int] = 0
    moves_stored: ClassVar[bool] = False

    def __call__(
        self, index: int, parameters: Sequence[nn.Parameter], batches: LayerBatches
    ) -> float:
        """Changes nothing."""
        return 1.0


@configurable
class NoTraining:
    """Calibration only: no gradient step on any parameter."""

    active: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    moves_stored: ClassVar[bool] = False
    adds_bias: ClassVar[bool] = False
    work: ClassVar[None] = None

    def samples_of(self, calibration: int) -> int:
        """None."""
        return 0

    def check(
        self, method: Method, budget: Any, num_samples: int, processes: int, dtype: str
    ) -> None:
        """Everything fits."""

    def before(self, run: Any) -> None:
        """Nothing."""

    def forms(
        self, run: Any, prepared: Any, choices: dict[Unit, Choice], statistics: Any, spectra: Any
    ) -> None:
        """The allocation's."""

    def after(self, run: Any, prepared: Any) -> Mapping[str, Any]:
        """Nothing."""
        return {}
