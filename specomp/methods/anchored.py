"""Anchored target: the dense model's outputs, from the inputs that the compressed model has
(AA-SVD, arXiv:2604.02119, objective 4).

DenseOutput   T = W + mix W (C - G') (G' + damping I)^{-1},   C = X X'^T, G' = X' X'^T

X are a linear's inputs in the dense model, X' its inputs once everything before it is compressed.
mix 1: T X' is the regression of W X on X', and truncating T in the norm of G' is the best rank-r
answer to min ||W' X' - W X||_F (reduced-rank regression). mix 0: T = W, the shift-aware objective
||(W' - W) X'||_F. Between them the outputs aimed at are W (mix X + (1 - mix) X'). Differs from the
paper: the damping is a ridge around W, not around 0, so that directions without data keep their
weight (CHOICE).
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from specomp.numerics.linalg import SOLVE_DTYPE, cholesky_damped
from specomp.numerics.statistics import CrossGram, Gram, Statistic, Stats
from specomp.settings import configurable

MAX_DAMPING = 1.0


@configurable
class DenseOutput:
    """The weight that answers compressed inputs with the dense model's outputs."""

    mix: Annotated[float, Field(ge=0, le=1)]
    damping: Annotated[float, Field(gt=0)]  # of the mean diagonal of G'
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram(), CrossGram()})

    def __call__(self, W: Tensor, stats: Stats) -> Tensor:
        """T (m, n) in the dtype of W, solved in float64. Raises ValueError when G' stays singular,
        as for non-finite inputs.
        """
        gram, cross = (stats[x].to(SOLVE_DTYPE) for x in (Gram(), CrossGram()))
        ridge = gram.clone()
        ridge.diagonal().add_(self.damping * gram.diagonal().mean())
        factor, _ = cholesky_damped(ridge, self.damping, MAX_DAMPING)
        shift = W.to(SOLVE_DTYPE) @ (cross - gram)
        return (W + self.mix * torch.cholesky_solve(shift.T, factor).T).to(W.dtype)
