"""Rounding that outputs make up for too: GPTQ in a two-sided norm (adaptive rounding with a
Kronecker-factored Hessian: YAQA, Tseng et al., arXiv:2505.22988).

GPTQ minimizes tr(E G E^T) of an error E (m, n): what a number loses, later columns of its row make
up for. In tr(B E G E^T), B (m, m) the Gram of the outputs' gradients, later rows can do so too.
Rounding one number after the other, each as near as possible to what the ones before leave to be
wanted of it, is the same greedy minimum for the Hessian G x B as GPTQ's is for G: with unit upper
triangular A_G and A_B of the inverses' Cholesky factors, number (i, j) is rounded from

    w_ij - sum_{(i',j') before} A_B[i',i] e_i'j' A_G[j',j]        e: lost of what was wanted there

With B a multiple of the identity that is GPTQ. Differs from the paper: the curvature is the norm's
(K-FAC's of the text's own labels, not fitted to the model's KL), numbers one by one instead of
vectors of a codebook, and no incoherence processing.

Numbers wait for those above and to their left alone, so all on an antidiagonal are rounded at once:
blocks on one of the matrix side by side, and in every block one antidiagonal after the other.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from specomp.numerics.feedback import Inputs
from specomp.numerics.grid import Grid, limits

BLOCK = 16


def two_sided(
    weight: Float[Tensor, "m n"], inputs: Inputs, outputs: Inputs, grids: Sequence[Grid]
) -> list[Int8[Tensor, "m n"]]:
    """Integers of a weight on each of several grids that stay, of all of them side by side; inputs,
    outputs: the feedback of G, and of B.
    """
    (m, n), count, b = weight.shape, len(grids), BLOCK
    rows, columns = _padded(outputs), _padded(inputs)  # (M M), (N N)
    (M, N), (R, C) = (len(rows), len(columns)), (len(rows) // b, len(columns) // b)

    def ordered(x: Tensor) -> Tensor:
        """(m n) in the order of rounding, in blocks (R, C, b, b)."""
        whole = x.new_zeros(M, N)
        whole[:m, :n] = x[outputs.order][:, inputs.order]
        return whole.view(R, b, C, b).transpose(1, 2)

    # The rows of blocks stand last to first: on an antidiagonal they fall while the columns rise,
    # and slices do.
    wanted = ordered(weight).flip(0).contiguous()
    spread = [_spread(x, n) for x in grids]
    scales = torch.stack([ordered(x) for x, _ in spread], 3).flip(0)  # (R C b K b)
    zeros = torch.stack([ordered(x) for _, x in spread], 3).flip(0)
    scales = torch.where(scales == 0, 1, scales)  # of what is padded
    bounds = torch.tensor([limits(x.bits) for x in grids], dtype=weight.dtype, device=weight.device)
    low, high = bounds.T[:, None, None, :]  # (1 1 K)
    by_row = rows.view(M, R, b).permute(1, 0, 2).flip(0).contiguous()  # (R M b)
    by_column = columns.view(N, C, b).permute(1, 0, 2).contiguous()  # (C N b)
    lost = weight.new_zeros(R, b, count, C, b)  # e
    passed = weight.new_zeros(C, R, b, count, b)  # e A_G of what is done; here R is in order
    integers = weight.new_zeros(R, C, b, count, b)
    for wave in range(R + C - 1):
        first, last = max(0, wave - R + 1), min(C - 1, wave)  # columns of blocks J; I = wave - J
        here = slice(first, last + 1)
        across = slice(R - 1 - wave + first, R - wave + last)  # I, from the last row up
        deep, far = (wave - first + 1) * b, (last + 1) * b
        before = torch.bmm(
            lost[across].flatten(3)[..., :far].reshape(-1, b * count, far), by_column[here, :far]
        )
        passed_here = passed[here]
        which = torch.arange(last - first + 1, device=weight.device)
        at = wave - first - which  # I of each J
        passed_here[which, at] = before.view(-1, b, count, b)
        left = torch.bmm(
            by_row[across, :deep].transpose(1, 2),
            passed_here.flatten(3).reshape(len(which), M, count * b)[:, :deep],
        )
        block = wanted[across, here].diagonal(0, 0, 1).permute(2, 0, 1)
        target = block[:, :, None] - left.view(-1, b, count, b)
        scale = scales[across, here].diagonal(0, 0, 1).permute(3, 0, 1, 2)
        zero = zeros[across, here].diagonal(0, 0, 1).permute(3, 0, 1, 2)
        down = by_row[across].view(len(which), R, b, b)[which, at]
        right = by_column[here].view(len(which), C, b, b)[which, torch.arange(first, last + 1)]
        q, e = _rounded(target, scale, zero, down, right, (low, high))
        integers[across, here].diagonal(0, 0, 1).copy_(q.permute(1, 2, 3, 0))
        lost[across, :, :, here].diagonal(0, 0, 3).copy_(e.permute(1, 2, 3, 0))
        passed_here[which, at] += (e.flatten(1, 2) @ right).view(-1, b, count, b)
    whole = integers.flip(0).permute(3, 0, 2, 1, 4).reshape(count, M, N)[:, :m, :n]
    found = torch.empty(count, m, n, dtype=torch.int8, device=weight.device)
    found[:, outputs.order[:, None], inputs.order] = whole.to(torch.int8)
    return list(found)


def _rounded(
    target: Float[Tensor, "blocks b K b"],
    scale: Tensor,
    zero: Tensor,
    down: Float[Tensor, "blocks b b"],
    right: Float[Tensor, "blocks b b"],
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Integers and errors of blocks, antidiagonal by antidiagonal."""
    blocks, b, count, _ = target.shape
    target = target.contiguous()
    q, e = torch.empty_like(target), torch.empty_like(target)
    for d in range(2 * b - 1):
        i = torch.arange(max(0, d - b + 1), min(b, d + 1), device=target.device)
        j = d - i
        t = target[:, i, :, j]  # (len, blocks, K): advanced indices come first
        s, z = scale[:, i, :, j], zero[:, i, :, j]
        found = (t / s).add_(z).round_().clamp_(*bounds)
        error = t - (found - z) * s
        q[:, i, :, j], e[:, i, :, j] = found, error
        if d < 2 * b - 2:
            # of every number after it, below and to the right: what these lost
            spread = error.permute(1, 0, 2)[..., None] * right[:, j][:, :, None]
            target.view(blocks, b, -1).baddbmm_(
                down[:, i].transpose(1, 2), spread.flatten(2), alpha=-1
            )
    return q, e


def _padded(side: Inputs) -> Tensor:
    """Unit upper triangular, of a multiple of BLOCK rows: those that are added have no part."""
    size = len(side.feedback)
    whole = torch.eye(
        -(-size // BLOCK) * BLOCK, dtype=side.feedback.dtype, device=side.feedback.device
    )
    whole[:size, :size] = side.feedback / side.feedback.diagonal()[:, None]
    return whole


def _spread(grid: Grid, n: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros (m n) as float32."""
    scales = grid.scales.float().repeat_interleave(grid.group_size, 1)[:, :n]
    if grid.zeros is None:
        return scales, torch.zeros_like(scales)
    return scales, grid.zeros.float().repeat_interleave(grid.group_size, 1)[:, :n]
