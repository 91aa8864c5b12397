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
# Rows, or columns, whose errors reach later ones block by block; from further away they come in one
# product for as many.
NEAR = 64


def two_sided(
    weight: Float[Tensor, "m n"], inputs: Inputs, outputs: Inputs, grids: Sequence[Grid]
) -> list[Int8[Tensor, "m n"]]:
    """Integers of a weight on each of several grids that stay, of all of them side by side; inputs,
    outputs: the feedback of G, and of B.
    """
    (m, n), count, b = weight.shape, len(grids), BLOCK
    rows, columns = _padded(outputs), _padded(inputs)  # (up up), (along along)
    (up, along), (R, C) = (len(rows), len(columns)), (-(-m // b), -(-n // b))
    (M, N), each = (R * b, C * b), NEAR // b
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
    # what a number of a block hands on to another of it, and to those near: the two factors
    corners = _blocks(rows, b)[:R], _blocks(columns, b)[:C]
    down = corners[0][:, walk.i][:, :, walk.i].flip(0)  # (R b^2 b^2), rows last to first
    right = corners[1][:, walk.j][:, :, walk.j]
    by_row, by_column = _near(rows)[:R].flip(0).mT.contiguous(), _near(columns)[:C]
    # Of every row of blocks e of all columns, of those near, and what of the others reaches these;
    # of every column of blocks, in order, e A_G likewise.
    lost, kb = weight.new_zeros(R, count * b, along), count * b
    near_lost, far_lost = (weight.new_zeros(R, kb, each, b) for _ in range(2))
    passed = weight.new_zeros(C, up, kb)
    near_passed, far_passed = (weight.new_zeros(C, each, b, kb) for _ in range(2))
    integers = torch.empty(R, C, count, b * b, dtype=torch.int8, device=weight.device)
    for wave in range(R + C - 1):
        first, last = max(0, wave - R + 1), min(C - 1, wave)  # columns of blocks J; I = wave - J
        here = slice(first, last + 1)
        across = slice(R - 1 - wave + first, R - wave + last)  # I, from the last row up
        for j in range(first, last + 1):
            i, r = wave - j, R - 1 - wave + j
            if j and j % each == 0:  # a row of blocks comes to columns that were not near
                stop = j * b
                lost[r, :, stop - NEAR : stop] = near_lost[r].flatten(1)
                ahead = columns[:stop, stop : stop + NEAR]
                torch.mm(lost[r, :, :stop], ahead, out=far_lost[r].view(kb, NEAR))
                near_lost[r] = 0
            if i and i % each == 0:  # a column of blocks comes to such rows
                stop = i * b
                passed[j, stop - NEAR : stop] = near_passed[j].flatten(0, 1)
                ahead = rows[:stop, stop : stop + NEAR].T
                torch.mm(ahead, passed[j, :stop], out=far_passed[j].view(NEAR, kb))
                near_passed[j] = 0
        blocks = torch.arange(last - first + 1, device=weight.device)
        row, column = (wave - first - blocks) % each, (first + blocks) % each
        near_here, near_across = near_passed[here], near_lost[across]

        before = torch.baddbmm(
            far_lost[across][blocks, :, column], near_across.flatten(2), by_column[here]
        )
        before = before.view(-1, count, b, b).transpose(1, 2).flatten(2)
        near_here[blocks, row] = before
        left = torch.baddbmm(far_passed[here][blocks, row], by_row[across], near_here.flatten(1, 2))
        left = left.view(-1, b, count, b).transpose(1, 2).flatten(2)[..., walk.order]
        q, e = walk(
            _diagonal(wanted[across, here]) - left,
            _diagonal(scales[across, here]).contiguous(),
            _diagonal(zeros[across, here]).contiguous(),
            down[across] * right[here],
            (low, high),
        )
        _diagonal(integers[across, here]).copy_(q)
        e = e[..., walk.back].view(-1, count, b, b)
        near_across[blocks, :, column] = e.flatten(1, 2)
        more = (e @ corners[1][here, None]).transpose(1, 2).flatten(2)
        near_here[blocks, row] = before.add_(more)
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
        self.steps = torch.bincount(i + j).tolist()  # how many are rounded at once

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
        target = wanted.contiguous()
        q, e = torch.empty_like(target), torch.empty_like(target)
        whole = (target, q, e, scale, 1 / scale, zero, zero * scale)
        steps = zip(*(x.split(self.steps, -1) for x in whole), strict=True)
        for step, handed_on in zip(steps, feedback.split(self.steps, 1), strict=True):
            t, found, error, scales, per_step, zeros, offset = step
            torch.addcmul(zeros, t, per_step, out=found).round_().clamp_(*bounds)
            torch.add(t, offset, out=error).addcmul_(found, scales, value=-1)
            target.baddbmm_(error, handed_on, alpha=-1)  # those before are handed nothing
        return q, e


def _padded(side: Inputs) -> Tensor:
    """Unit upper triangular, of a multiple of NEAR rows: those that are added have no part."""
    size = len(side.feedback)
    whole = torch.eye(
        -(-size // NEAR) * NEAR, dtype=side.feedback.dtype, device=side.feedback.device
    )
    whole[:size, :size] = side.feedback / side.feedback.diagonal()[:, None]
    return whole


def _blocks(factor: Tensor, size: int) -> Tensor:
    """(count size size): those on its diagonal."""
    count = len(factor) // size
    return _diagonal(factor.view(count, size, count, size), 2)


def _near(factor: Tensor) -> Tensor:
    """(blocks NEAR BLOCK): what a block of columns is handed from those near it."""
    found = _blocks(factor, NEAR).unflatten(2, (-1, BLOCK))
    return found.transpose(1, 2).flatten(0, 1).contiguous()
