"""In full, on a grid: what GPTQ, AWQ and rounding to nearest make of a linear.

Where the method rounds nothing it is the dense linear at the dense price, which no menu holds
twice.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.forms.cut import stored_linear
from specomp.forms.prices import Part
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.settings import configurable
from specomp.slots import Evidence, SizeOf


@configurable
class Whole:
    """Every linear of a unit in full, rounded as the method rounds: one size, nothing truncated."""

    size_of: ClassVar[SizeOf] = "whole"

    def sizes(self, unit: Unit) -> range:
        """One, called by the rank of a full matrix."""
        full = max(min(x.m, x.n) for x in unit.linears)
        return range(full, full + 1)

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """m n numbers of each linear, on the grid."""
        return {f"{x.name}.weight": Part((x.m, x.n), grid) for x in unit.linears}

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """Zeros (sizes): what rounding loses is said where it is measured (forms/gridded.py)."""
        return torch.zeros(len(sizes), dtype=torch.float64)

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """Plain linears."""
        return {
            x.name: stored_linear(
                x, evidence.weight(x), evidence.bias(x), evidence, lambda W: W, None
            )
            for x in unit.linears
        }

    def kept(self, unit: Unit) -> int:
        """Nothing."""
        return 0

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Nothing."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """Nothing."""
        return []
