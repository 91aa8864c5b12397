"""Rounding that outputs make up for too: GPTQ in a two-sided norm (adaptive rounding with a
Kronecker-factored Hessian: YAQA, Tseng et al., arXiv:2505.22988).

GPTQ minimizes tr(E G E^T) of an error E (m, n): what a number loses, later columns of its row make
up for. In tr(B E G E^T), B (m, m) the Gram of the outputs' gradients, later rows can do so too.
Rounding one number after the other, each as near as possible to what the ones before leave to be
wanted of it, is the same greedy minimum for the Hessian G x B as GPTQ's is for G: with unit upper
triangular A_G and A_B of the inverses' Cholesky factors, number (i, j) is rounded from

    w_ij - sum_{(i',j') before} A_B[i',i] e_i'j' A_G[j',j]        e: lost of what was wanted there

With B a multiple of the identity that is GPTQ. Differs from the paper: the curvature is K-FAC's of
the text's own labels, not fitted to the model's KL, and B is damped by as much as its mean
diagonal; numbers one by one instead of vectors of a codebook, and no incoherence processing.

Numbers wait for those above and to their left alone, so all on an antidiagonal are rounded at once:
blocks on one of the matrix side by side, and in every block one antidiagonal after the other.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from specomp.numerics.feedback import Inputs
from specomp.numerics.grid import Grid, limits

BLOCK = 8


def two_sided(
    weight: Float[Tensor, "m n"], inputs: Inputs, outputs: Inputs, grids: Sequence[Grid]
) -> list[Int8[Tensor, "m n"]]:
    """Integers of a weight on each of several grids that stay, of all of them side by side; inputs,
    outputs: the feedback of G, and of B.
    """
    (m, n), count, b = weight.shape, len(grids), BLOCK
    rows, columns = _padded(outputs), _padded(inputs)  # (M M), (N N)
    (M, N), (R, C) = (len(rows), len(columns)), (len(rows) // b, len(columns) // b)
    walk = _Walk(b, weight.device)

    # In blocks, whose numbers are in the order of the walk. The rows of blocks stand last to first:
    # on an antidiagonal they fall while the columns rise, and slices do.
    def ordered(x: Tensor) -> Tensor:
        whole = x.new_zeros(M, N)
        whole[:m, :n] = x[outputs.order][:, inputs.order]
        return whole.view(R, b, C, b).transpose(1, 2).flatten(2)[..., walk.order].flip(0)

    wanted = ordered(weight)[:, :, None]  # (R C 1 b^2)
    spread = [x.by_column(weight) for x in grids]
    scales = torch.stack([ordered(x) for x, _ in spread], 2)  # (R C K b^2)
    zeros = torch.stack([ordered(torch.zeros_like(s) + z) for s, z in spread], 2)
    scales = torch.where(scales == 0, 1, scales)  # of what is padded
    bounds = torch.tensor([limits(x.bits) for x in grids], dtype=weight.dtype, device=weight.device)
    low, high = bounds.T[:, :, None]  # (K 1)
    by_row = rows.view(M, R, b).permute(1, 0, 2).flip(0).contiguous()  # (R M b)
    by_column = columns.view(N, C, b).permute(1, 0, 2).contiguous()  # (C N b)
    # what a number of a block hands on to another of it: the two factors, block by block
    corners = _diagonal(by_row.view(R, R, b, b).flip(0)), _diagonal(by_column.view(C, C, b, b))
    down = corners[0][:, walk.i][:, :, walk.i].flip(0)  # (R b^2 b^2), rows last to first
    right = corners[1][:, walk.j][:, :, walk.j]
    lost = weight.new_zeros(R, count, b, C, b)  # e
    passed = weight.new_zeros(C, R, b, count, b)  # e A_G of what is done; here R is in order
    integers = torch.empty(R, C, count, b * b, dtype=torch.int8, device=weight.device)
    for wave in range(R + C - 1):
        first, last = max(0, wave - R + 1), min(C - 1, wave)  # columns of blocks J; I = wave - J
        here = slice(first, last + 1)
        across = slice(R - 1 - wave + first, R - wave + last)  # I, from the last row up
        deep, far = (wave - first + 1) * b, (last + 1) * b
        which = torch.arange(last - first + 1, device=weight.device)
        at, blocks = wave - first - which, len(which)  # at: I of each J

        before = lost[across].flatten(3)[..., :far].reshape(blocks, -1, far)
        before = torch.bmm(before, by_column[here, :far]).view(blocks, count, b, b)
        passed_here = passed[here]
        passed_here[which, at] = before.transpose(1, 2)
        left = torch.bmm(
            by_row[across, :deep].transpose(1, 2),
            passed_here.view(blocks, M, count * b)[:, :deep],
        )
        left = left.view(blocks, b, count, b).transpose(1, 2).flatten(2)[..., walk.order]
        q, e = walk(
            _diagonal(wanted[across, here]) - left,
            _diagonal(scales[across, here]).contiguous(),
            _diagonal(zeros[across, here]).contiguous(),
            down[across] * right[here],
            (low, high),
        )
        _diagonal(integers[across, here]).copy_(q)
        e = e[..., walk.back].view(blocks, count, b, b)
        _diagonal(lost[across, :, :, here], 3).copy_(e)
        passed_here[which, at] += (e @ corners[1][here, None]).transpose(1, 2)
    whole = integers.flip(0)[..., walk.back].view(R, C, count, b, b)
    whole = whole.permute(2, 0, 3, 1, 4).reshape(count, M, N)[:, :m, :n]
    found = torch.empty(count, m, n, dtype=torch.int8, device=weight.device)
    found[:, outputs.order[:, None], inputs.order] = whole
    return list(found)


def _diagonal(blocks: Tensor, second: int = 1) -> Tensor:
    """Those whose place in dimension 0 is that in a second one, first to last."""
    return blocks.diagonal(0, 0, second).movedim(-1, 0)


class _Walk:
    """Through the numbers of a block, one antidiagonal after the other."""

    def __init__(self, size: int, device: torch.device) -> None:
        """order: of the numbers row by row; back: the way back; i, j: row and column of each."""
        i, j = (x.flatten() for x in torch.meshgrid(*2 * [torch.arange(size)], indexing="ij"))
        order = (i + j).argsort(stable=True)
        self.order, self.back = order.to(device), order.argsort().to(device)
        self.i, self.j = i[order].to(device), j[order].to(device)
        ends = torch.bincount(i + j).cumsum(0).tolist()
        self.steps = list(zip([0, *ends], ends, strict=False))

    def __call__(
        self,
        wanted: Float[Tensor, "blocks K numbers"],
        scale: Float[Tensor, "blocks K numbers"],
        zero: Float[Tensor, "blocks K numbers"],
        feedback: Float[Tensor, "blocks numbers numbers"],
        bounds: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Integers, and what each lost of what was wanted; feedback: what a number (first) hands on
        to another (second), 1 to itself.
        """
        target, per_step = wanted.contiguous(), 1 / scale
        offset = zero * scale
        q, e = torch.empty_like(target), torch.empty_like(target)
        for start, stop in self.steps:
            here = (..., slice(start, stop))
            t = target[here]
            found = torch.addcmul(zero[here], t, per_step[here]).round_().clamp_(*bounds)
            q[here] = found
            error = (t + offset[here]).addcmul_(found, scale[here], value=-1)
            e[here] = error
            if stop < target.shape[-1]:
                target[..., stop:].baddbmm_(error, feedback[:, start:stop, stop:], alpha=-1)
        return q, e


def _padded(side: Inputs) -> Tensor:
    """Unit upper triangular, of a multiple of BLOCK rows: those that are added have no part."""
    size = len(side.feedback)
    whole = torch.eye(
        -(-size // BLOCK) * BLOCK, dtype=side.feedback.dtype, device=side.feedback.device
    )
    whole[:size, :size] = side.feedback / side.feedback.diagonal()[:, None]
    return whole
