"""NF4 (QLoRA, arXiv:2305.14314, App. E): sixteen levels at quantiles of a normal distribution, one
largest magnitude for every block of consecutive numbers.

As bitsandbytes stores it without double quantization: blocks of 64 over the matrix read row by row,
their magnitudes in float32, so 4.5 bits a weight. Every number goes to the nearest level; looks at
no inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from specomp.models.modules import CodedLinear
from specomp.numerics.grid import CodeSpec
from specomp.numerics.statistics import Statistic, Stats
from specomp.settings import configurable
from specomp.slots import Chain, Form, Rounded


@configurable
class NormalFloat:
    """Rounds to NF4. Every setting is explained in conf/quantizer/nf4.yaml."""

    block_size: Annotated[int, Field(ge=8)]
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    @property
    def grid(self) -> CodeSpec:
        """What it rounds to."""
        return CodeSpec(bits=4, group_size=self.block_size, symmetric=True)

    @property
    def grids(self) -> tuple[CodeSpec, ...]:
        """The one."""
        return (self.grid,)

    def single(self, packing: Form) -> list[Form]:
        """The packing alone."""
        return [packing]

    def wide(self, forms: Sequence[Form]) -> Sequence[Form]:
        """The forms as they are."""
        return forms

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """Each matrix by itself."""
        return tuple(Coded.of(x, self.block_size) for x in chain.matrices)

    def notes(self, damping: Sequence[float]) -> list[str]:
        """Nothing."""
        return []


@dataclass(frozen=True, eq=False)
class Coded(Rounded):
    """A matrix of codes."""

    codes: Tensor | None = None  # as CodedLinear has them
    largest: Tensor | None = None
    block_size: int = 64
    exact: ClassVar[bool] = False  # type: ignore[misc]

    @classmethod
    def of(cls, matrix: Tensor, block_size: int) -> "Coded":
        """The nearest levels of a matrix (m n), block by block over its numbers row by row."""
        flat = matrix.float().flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
        largest = blocks.abs().amax(1, keepdim=True)
        levels = torch.tensor(CodedLinear.LEVELS, device=matrix.device)
        share = torch.where(largest > 0, blocks / largest, 0.0)
        codes = torch.bucketize(share, (levels[1:] + levels[:-1]) / 2)
        values = (levels[codes] * largest).flatten()[: len(flat)].view(matrix.shape)
        codes = codes.flatten()[: len(flat)]
        return cls(values, codes=codes, largest=largest[:, 0], block_size=block_size)

    def stored(self, linear: nn.Linear) -> CodedLinear:
        """A CodedLinear."""
        assert self.codes is not None and self.largest is not None, "made by `of`"
        return CodedLinear.of(self.codes, self.largest, linear, self.block_size)
