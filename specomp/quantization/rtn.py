"""Round to nearest: the grid that spans a weight, and the integers nearest to it. Shapes: W
(m, n).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from specomp.errors import UserError
from specomp.numerics.grid import Grid, GridSpec, limits


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A weight as integers on a grid; the damping that GPTQ needed, of the mean
    diagonal.
    """

    integers: Int8[Tensor, "m n"]
    grid: Grid
    damping: float = 0.0

    def values(self) -> Float[Tensor, "m n"]:
        """What the integers stand for, in float32."""
        return self.grid.values(self.integers)


@dataclass(frozen=True, kw_only=True)
class Spacing(GridSpec):
    """What determines the grid of a weight."""

    scale_dtype: torch.dtype

    def fit(self, weight: Float[Tensor, "m n"]) -> Grid:
        """The grid that spans each group's smallest to largest number and contains 0 (as GPTQ's
        published code, without its search).

        A step is (largest - smallest) / (2^bits - 1), symmetric: 2 max|w| / (2^bits - 1), and is
        rounded to the dtype it is stored in before any weight is rounded to it.
        """
        m, n = weight.shape
        size = min(self.group_size or n, n)
        # Padding with zeros widens no range, as every range contains 0.
        groups = torch.nn.functional.pad(weight.float(), (0, -n % size)).view(m, -1, size)
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        step = (high - low) / (2**self.bits - 1)
        scales = (
            step.where(step > 0, 1)
            .clamp_min(torch.finfo(self.scale_dtype).tiny)
            .to(self.scale_dtype)
        )
        if not torch.isfinite(scales).all():
            raise UserError(
                "A factor to be quantized is not finite, or too large for a scale in"
                f" {self.scale_dtype}."
            )
        zeros = None
        if not self.symmetric:
            smallest, largest = limits(self.bits)
            zeros = (
                (smallest - low / scales.float()).round().clamp(smallest, largest).to(torch.int8)
            )
        return Grid(scales=scales, zeros=zeros, bits=self.bits, group_size=size)


def round_to_nearest(weight: Float[Tensor, "m n"], spacing: Spacing) -> OnGrid:
    """Every number of a weight (m, n) to the nearest point of the grid that spans it: least squares
    in the weights, blind to inputs.
    """
    grid = spacing.fit(weight)
    return OnGrid(grid.integers(weight), grid)
