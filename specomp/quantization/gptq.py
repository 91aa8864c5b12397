"""GPTQ (arXiv:2210.17323): round column by column, and let the columns still to come make up for
each rounding error.

Shapes: W (m, n), gram (n, n); see numerics/feedback.py. Checked against gptqmodel:
experiments/benchmarks/gptq_reference.py. Differs from the published code: with act-order, groups
keep the grid of the weights as they were (their columns are not consecutive in the order of
rounding; compressed-tensors calls it static); scales are rounded to the 16 bits they are stored in.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from specomp.numerics.feedback import BLOCK_COLUMNS, Inputs, fed_back, inputs_of
from specomp.numerics.grid import Grid, limits
from specomp.quantization.rtn import OnGrid, Spacing
from specomp.quantization.two_sided import two_sided

# What the rows of all grids that are swept side by side take at most; one grid may take more.
SWEPT_BYTES = 2**28


def gptq(
    weight: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    spacing: Spacing,
    *,
    act_order: bool,
    damping: float,
) -> OnGrid:
    """Integers and grid of a weight whose inputs have this Gram; equals round to nearest for a
    diagonal Gram and grids that stay.

    act_order: the columns of the largest inputs first. damping: of the mean diagonal. Raises
    ValueError when the Gram is not finite.
    """
    return gptq_each(weight, gram, [spacing], act_order=act_order, damping=damping)[0]


def gptq_each(
    weight: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "n n"],
    spacings: Sequence[Spacing],
    *,
    act_order: bool,
    damping: float,
    mask: Bool[Tensor, "m n"] | None = None,
    outputs: Float[Tensor, "rows rows"] | None = None,
    output_damping: float = 1.0,
) -> list[OnGrid]:
    """The same on each of several grids, in one sweep where their grids stay: rows do not know of
    each other.

    mask: where in the weight the given numbers stand, row by row, whose groups are of neighbours
    among themselves; all others are 0 and stay so. outputs: how errors of outputs count together,
    damped so: later rows make up for them then (two_sided.py); grids stay, and there is no mask.
    """
    numbers, n = weight, gram.shape[0]
    if mask is not None:
        weight = weight.new_zeros(mask.shape).masked_scatter_(mask, weight)
    inputs = inputs_of(gram, act_order=act_order, damping=damping)
    weight, energy = inputs.awake(weight), inputs.energy
    # (n, m): a column of the weight is a row here, contiguous
    rows = weight.T[inputs.order].contiguous()
    if mask is None:
        grids = [spacing.fit(weight, energy) for spacing in spacings]
    else:
        of_numbers = energy.expand_as(weight)[mask].view_as(numbers)
        grids = [spacing.fit(weight[mask].view_as(numbers), of_numbers) for spacing in spacings]
    if outputs is not None:
        assert mask is None, "rows of the numbers that are left belong to no outputs"
        try:  # their rows of the largest gradients first
            sides = inputs_of(outputs, act_order=True, damping=output_damping)
        except ValueError as error:
            raise ValueError(f"the gradients of its outputs: {error}") from error
        at_once = max(1, SWEPT_BYTES // (24 * weight.numel()))
        each = [
            x
            for i in range(0, len(grids), at_once)
            for x in two_sided(weight, inputs, sides, grids[i : i + at_once])
        ]
        return [OnGrid(x, grid, inputs.damping) for x, grid in zip(each, grids, strict=True)]
    if mask is None and not act_order and any(x.group_size < n for x in grids):
        found = [
            _refitting(rows.clone(), inputs, x, s) for x, s in zip(grids, spacings, strict=True)
        ]
    else:
        at_once = max(1, SWEPT_BYTES // (4 * rows.numel()))
        integers = [
            x
            for i in range(0, len(grids), at_once)
            for x in _sweep(rows, inputs, grids[i : i + at_once], mask)
        ]
        found = list(zip(integers, grids, strict=True))
    back = inputs.order.argsort()
    whole = [(integers[back].T, grid) for integers, grid in found]
    if mask is not None:
        whole = [(integers[mask].view_as(numbers), grid) for integers, grid in whole]
    return [OnGrid(integers.contiguous(), grid, inputs.damping) for integers, grid in whole]


def _sweep(
    rows: Float[Tensor, "n m"],
    inputs: Inputs,
    grids: Sequence[Grid],
    mask: Bool[Tensor, "m n"] | None,
) -> list[Int8[Tensor, "n m"]]:
    """Integers on grids that stay, of all of them side by side."""
    n, m = rows.shape
    each = [_by_group(x) if mask is None else _by_number(x, mask) for x in grids]
    stays = None if mask is None else mask.T.repeat(1, len(grids))
    bounds = torch.tensor([limits(x.bits) for x in grids], dtype=rows.dtype, device=rows.device)
    low, high = bounds.repeat_interleave(m, 0).T
    rows = rows.repeat(1, len(grids))
    integers = torch.empty_like(rows, dtype=torch.int8)
    columns, feedback = inputs.order.tolist(), inputs.feedback
    for start in range(0, n, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, n)
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            at = [columns[j] // (x.group_size if mask is None else 1) for x in grids]
            scales = torch.cat([s[i] for (s, _), i in zip(each, at, strict=True)])
            zeros = torch.cat([z[i] for (_, z), i in zip(each, at, strict=True)])
            q = (rows[j] / scales).add_(zeros).round_().clamp_(low, high)
            integers[j] = q
            stored = q.sub_(zeros).mul_(scales)
            if stays is not None:
                stored *= stays[columns[j]]
            errors[j - start] = fed_back(rows, feedback, inputs.pivots[j], j, stop, stored)
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    return list(integers.split(m, 1))


def _refitting(
    rows: Float[Tensor, "n m"], inputs: Inputs, grid: Grid, spacing: Spacing
) -> tuple[Int8[Tensor, "n m"], Grid]:
    """Integers on a grid whose every group spans what its columns have become; rows in the order of
    the columns.
    """
    n, block, feedback = len(rows), grid.group_size, inputs.feedback
    (low, high), integers = limits(grid.bits), torch.empty_like(rows, dtype=torch.int8)
    grids = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        grids.append(spacing.fit(rows[start:stop].T, inputs.energy[start:stop]))
        ((scales,), (zeros,)) = _by_group(grids[-1])
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            q = (rows[j] / scales).add_(zeros).round_().clamp_(low, high)
            integers[j] = q
            stored = q.sub_(zeros).mul_(scales)
            errors[j - start] = fed_back(rows, feedback, inputs.pivots[j], j, stop, stored)
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    zeros = [x.zeros for x in grids if x.zeros is not None]
    together = torch.cat(zeros, dim=1) if zeros else None
    return integers, replace(
        grid, scales=torch.cat([x.scales for x in grids], dim=1), zeros=together
    )


def _by_group(grid: Grid) -> tuple[Float[Tensor, "groups m"], Float[Tensor, "groups m"]]:
    """Scales and zeros as float32."""
    scales = grid.scales.T.float().contiguous()
    return scales, torch.zeros_like(
        scales
    ) if grid.zeros is None else grid.zeros.T.float().contiguous()


def _by_number(
    grid: Grid, mask: Bool[Tensor, "m n"]
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """The same of the grid of the numbers at a mask, column by column of the weight; (1, 0) where
    there is none.
    """
    whole = torch.ones(mask.shape, device=mask.device), torch.zeros(mask.shape, device=mask.device)
    spread = (x.T.repeat_interleave(grid.group_size, 1) for x in _by_group(grid))
    numbers = int(mask.sum()) // len(grid.scales)
    scales, zeros = (
        x.masked_scatter_(mask, y[:, :numbers].contiguous()).T.contiguous()
        for x, y in zip(whole, spread, strict=True)
    )
    return scales, zeros
