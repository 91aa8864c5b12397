"""Factors stay in the model's precision."""

from typing import ClassVar

import torch

from specomp.factors import LowRankFactors
from specomp.settings import configurable
from specomp.statistics import Statistic, Stats


@configurable
class NoQuantizer:
    """No quantization."""

    bits: ClassVar[int] = 16
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(self, factors: LowRankFactors, stats: Stats, dtype: torch.dtype) -> LowRankFactors:
        """The factors as they are."""
        return factors
