"""Global allocation: the parameters go where they save the most predicted loss.

GlobalLossAllocation  least sum over linears of sum_{i > rank} s_i^2 at one budget (ours)

In a norm that approximates the model's loss (method/whitening=kronecker) the squared singular
values of all linears are predicted loss increases, and comparable. A norm of the inputs alone says
nothing about how much the outputs of different linears matter: `normalize` then compares shares of
each linear's energy (CHOICE).

Each linear is a curve of loss over stored parameters, one point per rank and one for dense (loss
0). Its lower convex hull has the steps that some price per parameter makes optimal, the jump to
dense among them; the steepest steps of all linears are taken until the budget ends inside one. That
is the optimum for what it spends. The rest, less than that step, buys the best of what still fits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from specomp.errors import UserError
from specomp.forms.options import Menu, Options, priced_in, steps
from specomp.models.family import Unit
from specomp.numerics.statistics import Statistic
from specomp.progress import track
from specomp.settings import configurable
from specomp.slots import Choice, Reads


@configurable
class GlobalLossAllocation:
    """Ranks of least predicted loss, at least one each; dense where a linear's share of the budget
    is best spent so.
    """

    normalize: bool
    # Ranks are multiples of this where a linear has such a rank, for kernels that want it.
    round_to: Annotated[int, Field(ge=1)]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    compresses: ClassVar[bool] = True
    needs_spectra: ClassVar[bool] = True

    def __call__(self, menu: Menu, share: float, reads: Reads) -> dict[Unit, Choice]:
        """Choices. Raises UserError when the budget cannot pay the smallest of them."""
        menu = {unit: options.multiples(self.round_to) for unit, options in menu.items()}
        curves = {
            unit: curve(options, normalize=self.normalize)
            for unit, options in track(menu.items(), "predict losses", len(menu))
        }
        budget = int(share * sum(x.dense for x in menu.values()) + 1e-6)
        least = sum(x.cheapest for x in curves.values())
        if least > budget:
            paid = priced_in(menu)
            raise UserError(
                f"The smallest ranks in multiples of method.allocation.round_to={self.round_to}"
                f" take {least} {paid.currency}, the budget is {budget}: lower round_to, that of"
                f" method.units too, or {paid.remedy}."
            )
        return {
            unit: menu[unit].choice(index) for unit, index in least_loss(curves, budget).items()
        }


@dataclass(frozen=True)
class Curve:
    """Some options of one unit by index, costs ascending and losses descending, each (options,) in
    float64.
    """

    indices: list[int]
    costs: Tensor
    losses: Tensor

    @property
    def cheapest(self) -> int:
        """What the first option costs."""
        return int(self.costs[0])

    def best(self, here: int, left: float) -> tuple[float, float, int]:
        """(loss saved per parameter, parameters, option) of the best step up from `here` that costs
        at most `left`; (0, 0, here): none.
        """
        more = self.costs[here + 1 :] - self.costs[here]
        saved = self.losses[here] - self.losses[here + 1 :]
        affordable = int((more <= left).sum())
        if affordable == 0:
            return 0.0, 0.0, here
        rates = saved[:affordable] / more[:affordable]
        index = int(rates.argmax())
        return float(rates[index]), float(more[index]), here + 1 + index


def curve(options: Options, *, normalize: bool) -> Curve:
    """Loss over price of one unit, its last point dense."""
    losses = options.losses
    if normalize and options.whole > 0:
        losses = losses / options.whole
    return Curve(list(range(len(options))), options.prices, losses)


def least_loss(curves: Mapping[Unit, Curve], budget: int) -> dict[Unit, int]:
    """The option of every unit. Optimal for what the steps on the hulls spend; the budget is met to
    less than the smallest step.
    """
    at = dict.fromkeys(curves, 0)
    left = float(budget - sum(x.cheapest for x in curves.values()))
    for _, more, name, stop in steps({k: (x.costs, x.losses) for k, x in curves.items()}):
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
            return {name: curves[name].indices[index] for name, index in at.items()}
        at[name], left = option, left - more
        best[name] = curves[name].best(option, left)
