"""In full, on a grid: what GPTQ, AWQ and rounding to nearest make of a linear.

Where the method rounds nothing it is the dense linear at the dense price, which no menu holds
twice.
"""

from collections.abc import Mapping

from torch import nn

from specomp.forms.cut import stored_linear
from specomp.forms.dense import Dense
from specomp.forms.prices import Part
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.settings import configurable
from specomp.slots import Evidence


@configurable
class Whole(Dense):
    """Every linear of a unit in full, rounded as the method rounds: one size, nothing truncated;
    what rounding loses is said where it is measured (forms/gridded.py).
    """

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """m n numbers of each linear, on the grid."""
        return {f"{x.name}.weight": Part((x.m, x.n), grid) for x in unit.linears}

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """Plain linears."""
        return {
            x.name: stored_linear(
                x, evidence.weight(x), evidence.bias(x), evidence, lambda W: W, None, left=None
            )
            for x in unit.linears
        }
