"""Not compressed: the weights as they are, or as a training left them."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.forms.prices import Part
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.settings import configurable
from specomp.slots import Evidence, SizeOf


@configurable
class Dense:
    """Every linear of a unit in full: one size, no loss."""

    size_of: ClassVar[SizeOf] = "whole"

    def sizes(self, unit: Unit) -> range:
        """One, called by the rank of a full matrix."""
        full = max(min(x.m, x.n) for x in unit.linears)
        return range(full, full + 1)

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """m n numbers of each linear, in the model's dtype."""
        return {f"{x.name}.weight": Part((x.m, x.n)) for x in unit.linears}

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """Zeros (sizes)."""
        return torch.zeros(len(sizes), dtype=torch.float64)

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """The linears themselves, where nothing has changed them."""
        return {x.name: evidence.dense(x) for x in unit.linears}

    def kept(self, unit: Unit) -> int:
        """Nothing but spectra."""
        return 0

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Nothing."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """Nothing."""
        return []
