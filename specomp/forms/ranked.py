"""What the forms of single linears at a rank have in common: one for every rank that is
below full.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.forms.prices import Part
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.grid import GridSpec
from specomp.slots import Evidence, SizeOf


class RankForm(ABC):
    """A form whose sizes are ranks, made of the best factors of that rank."""

    size_of: ClassVar[SizeOf] = "rank"

    @abstractmethod
    def shapes(self, m: int, n: int, rank: int, grid: GridSpec | None) -> Mapping[str, Part]:
        """What is stored of an m x n matrix, by arithmetic alone: the sizes may be tensors."""

    @abstractmethod
    def module(self, linear: LinearSpec, rank: int, evidence: Evidence) -> nn.Module:
        """What takes the linear's place."""

    def sizes(self, unit: Unit) -> range:
        """Ranks."""
        (linear,) = unit.linears
        return range(1, min(linear.m, linear.n))

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """See `shapes`."""
        (linear,) = unit.linears
        return self.shapes(linear.m, linear.n, size, grid)

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """sum_{i > rank} s_i^2 (sizes) in float64: what dropping the smallest components loses
        (Eckart-Young).
        """
        (linear,) = unit.linears
        squares = evidence.singular_values(linear).double().cpu().square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return tails[sizes.clamp_max(len(squares))]

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """One module."""
        (linear,) = unit.linears
        return {linear.name: self.module(linear, size, evidence)}

    def kept(self, unit: Unit) -> int:
        """Nothing but spectra."""
        return 0

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Nothing."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """Nothing."""
        return []
