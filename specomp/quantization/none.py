"""Numbers stay in the model's precision."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Rounded


@configurable
class NoQuantizer:
    """No quantization."""

    grid: ClassVar[None] = None
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, matrices: Sequence[Tensor], stats: Stats, dtype: torch.dtype, *, free_basis: bool
    ) -> tuple[Rounded, ...]:
        """The matrices as they are."""
        return tuple(map(Rounded, matrices))

    def notes(self, damping: Sequence[float]) -> list[str]:
        """Nothing."""
        return []
