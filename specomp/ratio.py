"""Compression and retention meet here, and nowhere else: `1 -` for a ratio is written once in the package."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from specomp.settings import configurable

# A compression of 0.8 leaves a 100 x 100 matrix rank 10, although 1 - 0.8 is 0.19999999999999996 in binary.
_ROUNDING = 1e-9

Cost = Callable[[int, int, int], int]
"""(m, n, rank) -> numbers that a packing stores for a low-rank m x n matrix, growing with the rank; arithmetic alone, so tensors do too."""


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


def pair_cost(m: int, n: int, rank: int) -> int:
    """r (m + n): two factors."""
    return rank * (m + n)


def pivoted_cost(m: int, n: int, rank: int) -> int:
    """r (m + n - r): as many numbers as a matrix of this rank has degrees of freedom; m n at full rank."""
    return rank * (m + n - rank)


def rank_for_retention(m: int, n: int, retention: float, cost: Cost = pair_cost) -> int:
    """The largest rank that costs at most retention m n. May be 0, which callers refuse.

    For two factors floor(retention m n / (m + n)): AdaSVD Eq. 21, and SVD-LLM's code.
    """
    paid = retention * m * n + _ROUNDING * (m + n)
    return bisect_right(range(min(m, n) + 1), paid, key=lambda rank: cost(m, n, rank)) - 1


def retention_of_rank(m: int, n: int, rank: int) -> float:
    """r (m + n) / (m n): the fraction of a matrix's parameters that its two factors hold."""
    return rank * (m + n) / (m * n)


def break_even_rank(m: int, n: int) -> float:
    """m n / (m + n): from here on two factors cost as much as the dense matrix, which is then kept."""
    return m * n / (m + n)


def is_low_rank(m: int, n: int, rank: int, cost: Cost = pair_cost) -> bool:
    """Whether a factorization at this rank saves parameters."""
    return rank < min(m, n) and cost(m, n, rank) < m * n
