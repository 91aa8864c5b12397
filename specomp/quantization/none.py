"""Factors stay in the model's precision."""

from typing import ClassVar

from specomp.factors import LowRankFactors
from specomp.settings import configurable
from specomp.statistics import Stats


@configurable
class NoQuantizer:
    """No quantization."""

    bits: ClassVar[int] = 16

    def __call__(self, factors: LowRankFactors, stats: Stats) -> LowRankFactors:
        """The factors as they are."""
        return factors
