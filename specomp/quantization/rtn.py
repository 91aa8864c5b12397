"""Round to nearest: the grid that spans a weight, and the integers nearest to it. Shapes: W
(m, n).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from specomp.errors import UserError
from specomp.numerics.grid import Grid, GridSpec, limits

# Of a group's own range, the narrowest that a search tries (CHOICE).
NARROWEST = 0.5


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
    # how many narrower ranges are tried for every group, down to NARROWEST of its own
    search: int = 0

    def fit(self, weight: Float[Tensor, "m n"], energy: Tensor | None = None) -> Grid:
        """The grid that spans each group's smallest to largest number and contains 0 (as GPTQ's
        published code); with a search the narrower one of least squared error, every number counted
        by its energy: (n) of the columns or (m n) of each (default: alike).

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
        scales, zeros = self._spanning(low, high)
        if not torch.isfinite(scales).all():
            raise UserError(
                "A factor to be quantized is not finite, or too large for a scale in"
                f" {self.scale_dtype}."
            )
        if self.search:
            counts = weight.new_ones(n) if energy is None else energy.float()
            counts = torch.nn.functional.pad(counts, (0, -n % size))
            counts = counts.view(-1, groups.shape[1], size)
            least = self._error(groups, counts, scales, zeros)
            for share in torch.linspace(1, NARROWEST, self.search + 1)[1:].tolist():
                other, shifted = self._spanning(share * low, share * high)
                error = self._error(groups, counts, other, shifted)
                better = error < least
                least = torch.where(better, error, least)
                scales = torch.where(better, other, scales)
                if zeros is not None and shifted is not None:
                    zeros = torch.where(better, shifted, zeros)
        return Grid(scales=scales, zeros=zeros, bits=self.bits, group_size=size)

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros (m, groups) of grids from low to high."""
        step = (high - low) / (2**self.bits - 1)
        scales = (
            step.where(step > 0, 1)
            .clamp_min(torch.finfo(self.scale_dtype).tiny)
            .to(self.scale_dtype)
        )
        if self.symmetric:
            return scales, None
        smallest, largest = limits(self.bits)
        zeros = (smallest - low / scales.float()).round().clamp(smallest, largest).to(torch.int8)
        return scales, zeros

    def _error(
        self, groups: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> Tensor:
        """(m, groups): squared errors of rounding (m, groups, size) to nearest."""
        smallest, largest = limits(self.bits)
        step = scales.float()[..., None]
        shift = 0 if zeros is None else zeros.float()[..., None]
        near = (groups / step + shift).round_().clamp_(smallest, largest)
        return near.sub_(shift).mul_(step).sub_(groups).square_().mul_(counts).sum(2)


def round_to_nearest(
    weight: Float[Tensor, "m n"], spacing: Spacing, energy: Tensor | None = None
) -> OnGrid:
    """Every number of a weight (m, n) to the nearest point of the grid that spans it: least squares
    in the weights, blind to inputs but for a search that counts columns by their energy (n).
    """
    grid = spacing.fit(weight, energy)
    return OnGrid(grid.integers(weight), grid)
