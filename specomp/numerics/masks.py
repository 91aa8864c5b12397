"""Which weights stay, and what the others make of them.

magnitude   |W_ij|
wanda       |W_ij| ||x_j||_2                                              arXiv:2306.11695, Sec. 3
sparsegpt   w^2 / F_jj^2 as the columns before have left it, F of the damped inverse Hessian; what
            is lost of a column the columns after it make up for          arXiv:2301.00774, Alg. 1
Shapes: W (m, n), gram (n, n) of the inputs; a mask (m, n) is True where a weight stays.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specomp.numerics.feedback import BLOCK_COLUMNS, fed_back, inputs_of

Pattern = tuple[int, int]
"""(N, M): N of every M neighbours in a row stay."""


def largest(
    scores: Float[Tensor, "m n"], kept: int, *, by_row: bool, pattern: Pattern | None = None
) -> Bool[Tensor, "m n"]:
    """The mask of the largest scores: of every row `kept`; or of the matrix m kept; or by a
    pattern, whose M divides n.
    """
    m, n = scores.shape
    if pattern is not None:
        count, of = pattern
        scores = scores.reshape(-1, of)
    else:
        count, scores = (kept, scores) if by_row else (m * kept, scores.reshape(1, -1))
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, scores.topk(count).indices, True).view(m, n)


def wanda(weight: Float[Tensor, "m n"], energy: Float[Tensor, " n"]) -> Float[Tensor, "m n"]:
    """|W_ij| ||x_j||, the root of what leaving out a weight alone costs; energy: ||x_j||^2."""
    return weight.float().abs() * energy.clamp_min(0).sqrt().to(weight.device).float()


def sparsegpt(
    weight: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    kept: int,
    *,
    damping: float,
    by_row: bool = False,
    pattern: Pattern | None = None,
) -> tuple[Float[Tensor, "m n"], Bool[Tensor, "m n"], float]:
    """The weights that stay, made up for those that do not; their mask; the damping that was
    needed, of the mean diagonal.

    Without a pattern every block of columns keeps its share of m kept in all, of each row if
    by_row (CHOICE: the paper's is of the block). Raises ValueError when the Gram is not finite.
    """
    n, of = weight.shape[1], 1 if pattern is None else pattern[1]
    inputs = inputs_of(gram, act_order=False, damping=damping)
    feedback, pivots = inputs.feedback, inputs.feedback.diagonal()[:, None]
    # (n, m): a column of the weight is a row here, contiguous
    rows = inputs.awake(weight).T.contiguous()
    mask = torch.ones_like(rows, dtype=torch.bool)
    block = max(of, BLOCK_COLUMNS - BLOCK_COLUMNS % of)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = torch.empty_like(rows[start:stop])
        if pattern is None:
            share = kept * stop // n - kept * start // n
            scores = (rows[start:stop] / pivots[start:stop]).square()
            mask[start:stop] = largest(scores.T, share, by_row=by_row).T
        for j in range(start, stop):
            if pattern is not None and j % of == 0:
                scores = (rows[j : j + of] / pivots[j : j + of]).square()
                mask[j : j + of] = largest(scores.T, 0, by_row=True, pattern=pattern).T
            stored = rows[j] * mask[j]
            errors[j - start] = fed_back(rows, feedback, inputs.pivots[j], j, stop, stored)
            rows[j] = stored
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    return rows.T.contiguous(), mask.T.contiguous(), inputs.damping
