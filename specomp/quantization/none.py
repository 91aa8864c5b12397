"""Numbers stay in the model's precision."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Chain, Form, Rounded


@configurable
class NoQuantizer:
    """No quantization."""

    grid: ClassVar[None] = None
    grids: ClassVar[tuple[()]] = ()
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def single(self, packing: Form) -> list[Form]:
        """The packing alone."""
        return [packing]

    def wide(self, forms: Sequence[Form]) -> Sequence[Form]:
        """The forms as they are."""
        return forms

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """The matrices as they are."""
        return tuple(map(Rounded, chain.matrices))

    def notes(self, damping: Sequence[float]) -> list[str]:
        """Nothing."""
        return []
