"""Compression and retention meet here, and nowhere else: `1 -` for a ratio is written once in the package."""

import math
from typing import Annotated

from pydantic import Field

from specomp.settings import configurable

# A compression of 0.8 leaves a 100 x 100 matrix rank 10, although 1 - 0.8 is 0.19999999999999996 in binary.
_ROUNDING = 1e-9


def retained(compression: float) -> float:
    """Fraction kept when `compression` is removed: the only place where one is made from the other."""
    return 1 - compression


@configurable
class Ratio:
    """How much of the compressible weights to remove. Papers quote compression; the mathematics uses retention."""

    compression: Annotated[float, Field(ge=0, lt=1)]

    @property
    def retention(self) -> float:
        """Fraction of parameters kept (AdaSVD's trr)."""
        return retained(self.compression)


def rank_for_retention(m: int, n: int, retention: float) -> int:
    """floor(retention m n / (m + n)): AdaSVD Eq. 21, and SVD-LLM's code. May be 0, which callers refuse."""
    return math.floor(retention * m * n / (m + n) + _ROUNDING)


def retention_of_rank(m: int, n: int, rank: int) -> float:
    """r (m + n) / (m n): the fraction of a matrix's parameters that its two factors hold."""
    return rank * (m + n) / (m * n)


def break_even_rank(m: int, n: int) -> float:
    """m n / (m + n): from here on two factors cost as much as the dense matrix, which is then kept."""
    return m * n / (m + n)


def is_low_rank(m: int, n: int, rank: int) -> bool:
    """Whether a factorization at this rank saves parameters."""
    return rank < break_even_rank(m, n)
