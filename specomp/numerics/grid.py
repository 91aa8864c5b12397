"""The numbers a rounded weight can take, and the integers that stand for them.

W (m, n) ~= scale * (q - zero), q a signed integer of `bits` bits, one scale and zero for each row
and group of consecutive columns: the arithmetic of compressed-tensors, so that what is evaluated is
what a stored folder gives back.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int8
from torch import Tensor

SCALE_BYTES, ZERO_BYTES, SHAPE_BYTES, FLOAT_BYTES = 2, 1, 2 * 8, 4


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """A kind of grid. group_size: columns that share a scale, None for a whole row; symmetric:
    every zero is 0.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scaled: bool = False  # every column has a scale beside those of its groups
    # whether its values are held in the model's dtype, and integers on disk alone
    simulated: ClassVar[bool] = True

    def num_bytes(self, m: int | Tensor, n: int | Tensor) -> Any:
        """Bytes of a packed weight (m, n) as compressed-tensors stores it: integers in whole 32-bit
        words, scales, zeros, the shape. Arithmetic alone, so that m and n may be tensors of sizes
        too.
        """
        groups = 1 if self.group_size is None else -(-n // self.group_size)
        scales = m * groups * (SCALE_BYTES + (0 if self.symmetric else ZERO_BYTES))
        scales += n * SCALE_BYTES * self.scaled
        return m * 4 * -(-n * self.bits // 32) + scales + SHAPE_BYTES


@dataclass(frozen=True, kw_only=True)
class CodeSpec(GridSpec):
    """Codes of a table instead of integers, in blocks over the whole matrix, each with one float32
    number.
    """

    simulated: ClassVar[bool] = False

    def num_bytes(self, m: int | Tensor, n: int | Tensor) -> Any:
        """Codes in whole bytes, and the numbers of the blocks."""
        assert self.group_size is not None, "blocks"
        return -(-m * n * self.bits // 8) + FLOAT_BYTES * -(-m * n // self.group_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The grid of one weight (m, n). group_size: columns that share a scale; the last group has
    what is left.
    """

    scales: Float[Tensor, "m groups"]  # float16 or bfloat16: as they are stored
    zeros: Int8[Tensor, "m groups"] | None  # None: symmetric, every zero is 0
    bits: int
    group_size: int

    @property
    def spec(self) -> GridSpec:
        """What kind of grid it is."""
        return GridSpec(bits=self.bits, group_size=self.group_size, symmetric=self.zeros is None)

    def integers(self, weight: Float[Tensor, "m n"]) -> Int8[Tensor, "m n"]:
        """q of the grid points nearest to a weight; of one held in 16 bits, of points that give
        exactly that where there are such: in bfloat16 8 bits with zeros are finer than the weight.
        """
        scales, zeros = self.by_column(weight)
        low, high = limits(self.bits)
        found = (weight.float() / scales + zeros).round().clamp(low, high)
        if weight.dtype == torch.bfloat16 and self.bits == 8:
            for other in (found - 1, found + 1):
                held = ((found - zeros) * scales).to(weight.dtype)
                better = (held != weight) & (((other - zeros) * scales).to(weight.dtype) == weight)
                found = torch.where(better & (other >= low) & (other <= high), other, found)
        return found.to(torch.int8)

    def values(self, integers: Int8[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The weight in float32 that integers stand for: exact, a product of a few bits with a
        16-bit scale.
        """
        scales, zeros = self.by_column(integers)
        return (integers.float() - zeros) * scales

    def by_column(self, like: Tensor) -> tuple[Tensor, Tensor | int]:
        """Scales and zeros as float32 (m, n) on the device of a matrix (m, n)."""

        def spread(x: Tensor) -> Tensor:
            return x.to(like.device, torch.float32).repeat_interleave(self.group_size, dim=1)[
                :, : like.shape[1]
            ]

        return spread(self.scales), 0 if self.zeros is None else spread(self.zeros)


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
