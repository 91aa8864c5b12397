"""After GPTQ, nearer still: scales by least squares, integers by coordinate descent, by turns.

With everything else fixed, ||(W' - W) X||_F^2 is a quadratic of the scales of a row, which has its
smallest value where a small linear system says, and of one integer, whose best is the grid point
nearest to w_j + ((W - W') G)_j / G_jj taken as if it alone were wrong (coordinate descent as in
QuantEase, Behdin et al., arXiv:2309.01885, there without the scales). So no step makes it larger.
Columns in the order of GPTQ, G with its damping. Shapes: W (m, n), G (n, n).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from specomp.numerics.feedback import BLOCK_COLUMNS, Inputs
from specomp.numerics.grid import limits
from specomp.numerics.linalg import SOLVE_DTYPE
from specomp.quantization.rtn import OnGrid

# Of the mean diagonal of a row's system: groups whose integers are all zero have no scale to find.
RIDGE = 1e-6


def descended(
    weight: Float[Tensor, "m n"], inputs: Inputs, found: Sequence[OnGrid], passes: int
) -> list[OnGrid]:
    """The same weight, nearer: scales, then integers, so many times."""
    best = list(found)
    for _ in range(passes):
        best = _integers(weight, inputs, [_scales(weight, inputs, x) for x in best])
    return best


def _scales(weight: Float[Tensor, "m n"], inputs: Inputs, found: OnGrid) -> OnGrid:
    """With the scales of least squares, in every row that they serve as they are stored."""
    grid, (m, n) = found.grid, weight.shape
    size, gram = grid.group_size, inputs.damped
    unit = replace(grid, scales=torch.ones_like(grid.scales)).values(found.integers)  # q - zero
    groups = grid.scales.shape[1]
    system = weight.new_empty(m, groups, groups, dtype=SOLVE_DTYPE)
    pull = weight.new_empty(m, groups, dtype=SOLVE_DTYPE)
    wanted = (weight @ gram) * unit

    def by_group(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, -n % size)).view(m, groups, size).sum(2)

    for k in range(groups):
        here = slice(k * size, (k + 1) * size)
        system[:, :, k] = by_group((unit[:, here] @ gram[here]) * unit)
    pull[:] = by_group(wanted)
    system = (system + system.mT) / 2
    before = grid.scales.to(SOLVE_DTYPE)
    own = system.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(groups, dtype=SOLVE_DTYPE, device=weight.device)
    ridge = RIDGE * own + torch.finfo(SOLVE_DTYPE).tiny
    # towards the scales as they are
    solved = before + torch.linalg.solve(
        system + ridge * eye, pull - (system @ before[..., None])[..., 0]
    )
    low = torch.finfo(grid.scales.dtype).tiny
    scales = solved.clamp_min(low).to(grid.scales.dtype)

    def lost(s: Tensor) -> Tensor:
        s = s.to(SOLVE_DTYPE)
        return (s * ((system @ s[..., None])[..., 0] - 2 * pull)).sum(1)

    serves = (lost(scales) < lost(grid.scales)) & scales.isfinite().all(1)
    kept = torch.where(serves[:, None], scales, grid.scales)
    return replace(found, grid=replace(grid, scales=kept))


def _integers(
    weight: Float[Tensor, "m n"], inputs: Inputs, found: Sequence[OnGrid]
) -> list[OnGrid]:
    """Once through all columns, of all grids side by side; (n, grids m) inside."""
    n, m, order, gram = weight.shape[1], len(weight), inputs.order, inputs.damped
    gram = gram[order][:, order]

    def rows(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.float().T[order] for x in parts], 1)

    zeros_like = [torch.zeros_like(x.integers) for x in found]
    origin = [x.grid.values(y) for x, y in zip(found, zeros_like, strict=True)]
    scales = rows(
        [x.grid.values(y + 1) - z for x, y, z in zip(found, zeros_like, origin, strict=True)]
    )
    zeros = rows(origin).div_(scales).neg_().round_()
    integers, values = rows([x.integers for x in found]), rows([x.values() for x in found])
    bounds = torch.tensor([limits(x.grid.bits) for x in found], device=weight.device)
    low, high = bounds.float().repeat_interleave(m, 0).T
    # (W - W') G, kept up to date
    left = gram @ (rows([weight] * len(found)) - values)
    energy = gram.diagonal().tolist()
    for start in range(0, n, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, n)
        moved = torch.empty_like(values[start:stop])
        for j in range(start, stop):
            best = (left[j] / energy[j]).add_(values[j]).div_(scales[j]).add_(zeros[j])
            best.round_().clamp_(low, high)
            there = (best - zeros[j]).mul_(scales[j])
            step = torch.sub(there, values[j], out=moved[j - start])
            left[j:stop].addr_(gram[j:stop, j], step, alpha=-1)
            integers[j], values[j] = best, there
        left[stop:] -= gram[stop:, start:stop] @ moved
        left[:start] -= gram[:start, start:stop] @ moved
    back = order.argsort()
    whole = [x[back].T.contiguous().to(torch.int8) for x in integers.split(m, 1)]
    return [replace(x, integers=y) for x, y in zip(found, whole, strict=True)]
