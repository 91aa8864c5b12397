"""Global allocation: the parameters go where they save the most predicted loss.

GlobalLossAllocation   minimize sum over linears of sum_{i > rank} s_i^2 under one budget (ours)
In a norm that approximates the model's loss (method/whitening=kronecker) the squared singular values of all linears are predicted loss
increases, and comparable. A norm of the inputs alone says nothing about how much the outputs of different linears matter: `normalize`
then compares shares of each linear's energy (CHOICE).

Each linear is a curve of loss over stored parameters, one point per rank and one for dense (loss 0). Its lower convex hull has the steps
that some price per parameter makes optimal, the jump to dense among them; the steepest steps of all linears are taken until the budget
ends inside one. That is the optimum for what it spends. The rest, less than that step, buys the best of what still fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from specomp.budget import full_rank
from specomp.errors import UserError
from specomp.methods.base import Probe, Spectra, StatsOf
from specomp.models.family import LinearSpec
from specomp.ratio import Cost, Ratio, is_low_rank
from specomp.settings import configurable
from specomp.statistics import Statistic


@configurable
class GlobalLossAllocation:
    """Ranks of least predicted loss, at least one each; dense where a linear's share of the budget is best spent so."""

    normalize: bool
    # Ranks are multiples of this where a linear has such a rank, for kernels that want it.
    round_to: Annotated[int, Field(ge=1)]
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __call__(
        self, linears: Sequence[LinearSpec], target: Ratio, stats: StatsOf, spectra: Spectra, cost: Cost, probe: Probe
    ) -> dict[str, int]:
        """Ranks. Raises UserError when the budget cannot pay the smallest of them."""
        curves = {x.name: curve(x, spectra(x.name).s, cost, self.round_to, normalize=self.normalize) for x in linears}
        budget = int(target.retention * sum(x.params for x in linears) + 1e-6)
        least = sum(x.cheapest for x in curves.values())
        if least > budget:
            raise UserError(
                f"The smallest ranks in multiples of method.allocation.round_to={self.round_to} take {least} parameters, "
                f"the budget is {budget}: lower round_to or ratio.compression."
            )
        return least_loss(curves, budget)


@dataclass(frozen=True)
class Curve:
    """The options of one linear, costs ascending and losses descending, each (options,) in float64."""

    ranks: list[int]
    costs: Tensor
    losses: Tensor

    @property
    def cheapest(self) -> int:
        """Parameters of the first option."""
        return int(self.costs[0])

    def hull(self) -> list[int]:
        """Options on the lower convex hull, the first and the last among them."""
        kept: list[int] = []
        points = list(zip(self.costs.tolist(), self.losses.tolist(), strict=True))
        for index, (x, y) in enumerate(points):
            while len(kept) >= 2:
                (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
                if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                    break
                kept.pop()
            kept.append(index)
        return kept

    def best(self, here: int, left: float) -> tuple[float, float, int]:
        """(loss saved per parameter, parameters, option) of the best step up from `here` that costs at most `left`; (0, 0, here): none."""
        more, saved = self.costs[here + 1 :] - self.costs[here], self.losses[here] - self.losses[here + 1 :]
        affordable = int((more <= left).sum())
        if affordable == 0:
            return 0.0, 0.0, here
        rates = saved[:affordable] / more[:affordable]
        index = int(rates.argmax())
        return float(rates[index]), float(more[index]), here + 1 + index


def curve(linear: LinearSpec, s: Tensor, cost: Cost, round_to: int, *, normalize: bool) -> Curve:
    """Loss over parameters of one linear, from its singular values (k,)."""
    m, n, full = linear.m, linear.n, full_rank(linear)
    low = [rank for rank in range(1, full) if is_low_rank(m, n, rank, cost)]
    low = [rank for rank in low if rank % round_to == 0] or low
    squares = s.double().cpu().square()
    tails = squares.flip(0).cumsum(0).flip(0)  # tails[r] is what rank r loses
    losses = torch.cat([tails[low], tails.new_zeros(1)])
    if normalize and float(tails[0]) > 0:
        losses = losses / tails[0]
    costs = torch.tensor([cost(m, n, rank) for rank in low] + [linear.params], dtype=torch.float64)
    return Curve([*low, full], costs, losses)


def least_loss(curves: Mapping[str, Curve], budget: int) -> dict[str, int]:
    """The rank of every linear. Optimal for what the steps on the hulls spend; the budget is met to less than the smallest step."""
    steps = []
    for name, points in curves.items():
        hull, costs, losses = points.hull(), points.costs.tolist(), points.losses.tolist()
        for start, stop in zip(hull, hull[1:], strict=False):
            more = costs[stop] - costs[start]
            steps.append(((losses[start] - losses[stop]) / more, more, name, stop))
    at = dict.fromkeys(curves, 0)
    left = float(budget - sum(x.cheapest for x in curves.values()))
    # Along a hull the rate falls, so sorting (which is stable) keeps the order of each linear's steps.
    for _, more, name, stop in sorted(steps, key=lambda step: -step[0]):
        if more > left:
            break
        at[name], left = stop, left - more
    best = {name: points.best(at[name], left) for name, points in curves.items()}
    while True:
        for name, (_, more, _) in best.items():
            if more > left:
                best[name] = curves[name].best(at[name], left)
        name = max(best, key=lambda name: best[name][0])
        _, more, option = best[name]
        if option == at[name]:
            return {name: curves[name].ranks[index] for name, index in at.items()}
        at[name], left = option, left - more
        best[name] = curves[name].best(option, left)
