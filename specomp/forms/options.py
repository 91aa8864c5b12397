"""What an allocation chooses among: every way to store a unit, with its price and its predicted
loss.

And what allocations share: turning wished-for retentions into options that meet a budget. A
retention is a share of what the dense unit costs in the budget's currency.
"""

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from specomp.errors import UserError
from specomp.forms.dense import Dense
from specomp.forms.prices import Budget, Parts
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.slots import Choice, Evidence, Form

K = TypeVar("K", bound=Hashable)

BISECTIONS = 60
# of a mean over units, relative; and of a price: 0.2 of 10,000 is 2,000 although 1 - 0.8 is no
# fifth in binary
ROUNDING = 1e-9
DENSE = Dense()


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its price in the budget's currency, and the loss that is predicted
    for it.
    """

    choice: Choice
    price: float
    loss: float


class Options(Sequence[Option]):
    """The options of one unit, the cheapest first; dense is the last, whatever costs as much is
    left out.
    """

    def __init__(
        self,
        unit: Unit,
        forms: Sequence[Form],
        budget: Budget,
        dtype: torch.dtype,
        evidence: Evidence,
        grid: GridSpec | None,
    ) -> None:
        """dtype: of the model; grid: what the method rounds to."""

        def price(parts: Parts) -> int:
            return budget.price(parts, dtype)

        self.unit, self.budget, self.evidence = unit, budget, evidence
        self.forms = (*forms, DENSE)
        self.dense = float(price(DENSE.parts(unit, 0)))
        self._sizes = [torch.tensor(form.sizes(unit), dtype=torch.int64) for form in forms]
        prices = [
            torch.as_tensor(price(f.parts(unit, x, grid))).double().expand(len(x))
            for f, x in zip(forms, self._sizes, strict=True)
        ]
        owners = [torch.full_like(x, i) for i, x in enumerate(self._sizes)]
        self._sizes.append(torch.tensor(DENSE.sizes(unit)))
        flat = torch.cat([*prices, torch.tensor([self.dense], dtype=torch.float64)])
        order = flat[:-1].argsort(stable=True)
        self._order = torch.cat([order[flat[order] < self.dense], torch.tensor([len(order)])])
        self._owner = torch.cat([*owners, torch.tensor([len(forms)])])[self._order]
        self.prices = flat[self._order]
        self.sizes = torch.cat(self._sizes)[self._order]

    def choice(self, index: int) -> Choice:
        """The form and size at an index."""
        return Choice(self.forms[int(self._owner[index])], int(self.sizes[index]))

    @cached_property
    def losses(self) -> Tensor:
        """Predicted losses (options) in float64; asks for spectra."""
        found = [
            form.losses(self.unit, x, self.evidence)
            for form, x in zip(self.forms, self._sizes, strict=True)
        ]
        return torch.cat(found)[self._order]

    def predicted(self) -> "Options":
        """Itself, whose losses are known: the first time that takes a decomposition."""
        assert len(self.losses) == len(self)
        return self

    def multiples(self, of: int) -> "Options":
        """Those whose sizes are multiples of this, and dense; all where none is."""
        kept = (self.sizes % of == 0).nonzero().flatten()
        kept = kept[kept < self.last]
        if of == 1 or not len(kept):
            return self
        kept = torch.cat([kept, torch.tensor([self.last])])
        made = copy.copy(self)
        vars(made).pop("losses", None)
        made._order, made._owner = self._order[kept], self._owner[kept]
        made.prices, made.sizes = self.prices[kept], self.sizes[kept]
        return made

    @cached_property
    def whole(self) -> float:
        """What storing nothing would lose: size 0 of the first form."""
        return float(
            self.forms[0].losses(self.unit, torch.zeros(1, dtype=torch.int64), self.evidence)
        )

    def __len__(self) -> int:
        return len(self.prices)

    def __getitem__(self, index: int) -> Option:  # type: ignore[override]
        return Option(self.choice(index), float(self.prices[index]), float(self.losses[index]))

    @property
    def last(self) -> int:
        """Index of dense."""
        return len(self.prices) - 1

    def affordable(self, retention: float) -> int:
        """Index of the dearest option that costs at most this share of the dense one; -1 where none
        does.

        For two factors that is rank floor(retention m n / (m + n)): AdaSVD Eq. 21, and SVD-LLM's
        code.
        """
        if retention >= 1:
            return self.last
        paid = retention * self.dense * (1 + ROUNDING)
        return int(torch.searchsorted(self.prices, paid, right=True)) - 1


def read_off(at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """values (points) at ascending places `at`, read at others (k) between them in float64:
    straight lines, level outside.
    """
    x, y, wanted = at.double(), values.double(), wanted.double()
    if len(x) == 1:
        return y.expand(len(wanted)).clone()
    right = torch.searchsorted(x, wanted).clamp(1, len(x) - 1)
    share = ((wanted - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return y[right - 1] + share * (y[right] - y[right - 1])


def hull(prices: Tensor, losses: Tensor) -> list[int]:
    """Indices on the lower convex hull of losses over ascending prices, the first and the last
    among them.
    """
    kept: list[int] = []
    points = list(zip(prices.tolist(), losses.tolist(), strict=True))
    for index, (x, y) in enumerate(points):
        while len(kept) >= 2:
            (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            kept.pop()
        kept.append(index)
    return kept


def steps(
    curves: Mapping[K, tuple[Tensor, Tensor]],
) -> list[tuple[float, float, K, int]]:
    """(loss saved a unit of price, price, curve, index) of every step along the hulls, the
    steepest first: taken in this order they are the best there is at what they spend.
    """
    found = []
    for name, (prices, losses) in curves.items():
        points = hull(prices, losses)
        costs, lost = prices.tolist(), losses.tolist()
        for start, stop in zip(points, points[1:], strict=False):
            more = costs[stop] - costs[start]
            found.append(((lost[start] - lost[stop]) / more, more, name, stop))
    # Along a hull the rate falls, so sorting (which is stable) keeps the order of each one's steps.
    return sorted(found, key=lambda step: -step[0])


Menu = Mapping[Unit, Options]
"""Options by unit, in the order of the model; no linear is in two units."""


def priced_in(menu: Menu) -> Budget:
    """What all of a menu is priced in: the words of a message."""
    return next(iter(menu.values())).budget


def chosen(menu: Menu, at: Mapping[Unit, int]) -> dict[Unit, Choice]:
    """What stands at these indices."""
    return {unit: menu[unit].choice(index) for unit, index in at.items()}


def floor(menu: Menu, retention: Mapping[Unit, float]) -> dict[Unit, int]:
    """The dearest option that each unit's retention pays for. Raises UserError where it pays for
    none.
    """
    found = {}
    for unit, options in menu.items():
        found[unit] = options.affordable(retention[unit])
        if found[unit] < 0:
            sizes = ", ".join(f"{x.m} x {x.n}" for x in unit.linears)
            raise UserError(
                f"{unit.name} ({sizes}): a retention of {retention[unit]:.4g} leaves rank 0;"
                f" {options.budget.remedy}, or choose an allocation with a higher minimum"
                " retention."
            )
    return found


def fill(menu: Menu, retention: Mapping[Unit, float], target: float) -> dict[Unit, int]:
    """`floor`, then one option more for each unit that the budget still pays for, where the floor
    took the most first.
    """
    at = floor(menu, retention)
    budget = target * sum(x.dense for x in menu.values())
    used = sum(float(menu[unit].prices[index]) for unit, index in at.items())

    def lost(unit: Unit) -> float:
        return retention[unit] * menu[unit].dense - float(menu[unit].prices[at[unit]])

    for unit in sorted(menu, key=lost, reverse=True):
        prices, index = menu[unit].prices, at[unit]
        more = float(prices[index + 1] - prices[index]) if index < menu[unit].last else 0.0
        if 0 < more <= budget - used:
            at[unit] += 1
            used += more
    return at


def water_fill(
    menu: Menu, base: Mapping[Unit, float], slope: Mapping[Unit, float], target: float, low: float
) -> dict[Unit, float]:
    """Retentions clip(base + level * slope, low, 1) with the one level that meets the target on
    average over what units cost.

    slope must be >= 0 and positive somewhere. Equals AdaSVD Eq. 20 with level = trr - mrr where
    nothing is clipped and all decoder layers have the same size. Raises UserError when no level can
    meet the target.
    """
    weight = {unit: options.dense for unit, options in menu.items()}
    total = sum(weight.values())

    def at(level: float) -> dict[Unit, float]:
        return {x: min(1.0, max(low, base[x] + level * slope[x])) for x in menu}

    def mean(level: float) -> float:
        shares = at(level)
        return sum(weight[x] * shares[x] for x in menu) / total

    bottom, top = -1.0, 1.0
    while mean(top) < target and top < 2**40:
        top *= 2
    most = target * (1 + ROUNDING)  # a floor that is the target itself is no floor above it
    while mean(bottom) > most and bottom > -(2**40):
        bottom *= 2
    if mean(top) < target or mean(bottom) > most:
        raise UserError(
            f"No allocation with retentions in [{low:.3g}, 1] averages {target:.4g}: change"
            f" {priced_in(menu).setting} or the minimum retention."
        )
    for _ in range(BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if mean(middle) < target else (bottom, middle)
    return at(top)
