"""What the columns still to come make up for when one column of a weight is changed: the feedback
of GPTQ (arXiv:2210.17323) and of SparseGPT (arXiv:2301.00774).

Both change a weight W (m, n) column by column and minimize ||(W' - W) X||_F greedily, from the Gram
X X^T (n, n) alone (the papers' Hessian is twice it: only ratios matter).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from specomp.numerics.linalg import SOLVE_DTYPE, cholesky_damped

# Columns whose errors are fed back one by one; to all after them once a block.
BLOCK_COLUMNS = 128
# Where the asked damping is not enough, it is raised by tens from the first of these, up to the
# second.
START_DAMPING, MAX_DAMPING = 1e-6, 1.0


def awake(
    weight: Float[Tensor, "m n"], gram: Float[Tensor, "n n"]
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
    """A weight in float32 and a Gram in float64 without the inputs that never occur: those weights
    are 0 and their energy that of the average, as the published codes do.
    """
    gram = gram.to(SOLVE_DTYPE).clone()
    dead = gram.diagonal() <= 0
    gram.diagonal()[dead] = gram.diagonal().mean() if not dead.all() else 1.0
    return weight.float().masked_fill(dead, 0.0), gram


def inverse_factor(
    gram: Float[Tensor, "n n"], damping: float
) -> tuple[Float[Tensor, "n n"], float]:
    """Upper triangular F (n, n) with F^T F = (gram + damping mean(diag gram) I)^-1, and the damping
    that was needed.

    One Cholesky factorization from the last row up and one triangular inverse: equals
    torch.linalg.cholesky(inv(gram), upper=True).
    """
    unit = gram.diagonal().mean()
    damped = gram.flip(0, 1)
    damped.diagonal().add_(damping * unit)
    lower, more = cholesky_damped(damped, damping or START_DAMPING, MAX_DAMPING)
    identity = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping + more * (
        1 + damping
    )


def fed_back(rows: Tensor, feedback: Tensor, j: int, stop: int, stored: Tensor) -> Tensor:
    """The error (m) of storing column j so, over its pivot, which the columns up to `stop` make up
    for; rows (n, m): the columns of the weight.
    """
    error = (rows[j] - stored) / feedback[j, j]
    rows[j + 1 : stop].addr_(feedback[j, j + 1 : stop], error, alpha=-1)
    return error
